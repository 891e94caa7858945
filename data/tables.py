"""A table of your own: its columns, its texts and its votes, understood, or refused with the row.

own() is the converter of `python data/prepare.py own`: read_votes() lists what people chose, a text each,
understand() says which labels each text means, count() takes what is a vote. prompts_of() makes the prompts
of a table once more, from the "own" part of the card.json that the converter wrote.
"""

import ast
import dataclasses
import datetime
import difflib
import functools
import html
import itertools
import math
import re
import shlex
import unicodedata
from collections import Counter, namedtuple
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import distjudge
from distjudge import InputError, listed, log, short

import pandas
import sources

# --- prompts ----------------------------------------------------------------------------------------------
PLACEHOLDER = re.compile(r"\{([^{}\n]+)\}")
placeholders = PLACEHOLDER.findall  # the names in a template
MESSAGES = re.compile(r"\s*\[\s*\{\s*['\"](role|content)")


def fill(template: str, values: dict[str, Any]) -> str:
    """The template with its placeholders replaced, once: braces in a value stay as they are."""
    return PLACEHOLDER.sub(lambda m: str(values[m[1]]) if m[1] in values else m[0], template)


def read_template(path: str | Path, needed: list[str], optional: Iterable[str] | None) -> str:
    """A prompt template. The `needed` placeholders must stand in it once, the `optional` may (None: all)."""
    try:
        template = Path(path).read_text(encoding="utf-8-sig").rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: the template cannot be read: {error}") from None
    found = placeholders(template)
    known = [*needed, *(found if optional is None else optional)]
    unknown = [name for name in found if name not in known]
    alike = {sources.tidy(name).casefold() for name in known}
    is_meant = lambda name: re.fullmatch(r"\w+", name) or sources.tidy(name).casefold() in alike  # noqa: E731
    if wrong := [*filter(is_meant, unknown)]:
        there = ", ".join(f"{{{short(name)}}}" for name in dict.fromkeys(known))
        raise InputError(f"{path}: unknown placeholder {{{short(wrong[0])}}}; there are {there}")
    if unknown:
        log.warning("%s: {%s} names no column and stays as it is", path, short(unknown[0]))
    if missing := [name for name in needed if found.count(name) != 1]:
        raise InputError(f"{path}: the placeholder {{{missing[0]}}} must stand in it once")
    return template


def cell(where: str, name: str, value: Any) -> str:
    """A cell as text, "" if it is empty. Raises InputError for bytes, lists, objects and broken text."""
    is_text = not isinstance(value, str) or distjudge.is_text(value)
    if not is_text or isinstance(value, (bytes, bytearray, list, tuple, dict, set)):
        kind = "text or a number, in a field of its own" if is_text else "text without lone surrogates"
        raise InputError(f"{where}: {short(name)}: must be {kind}, not {short(repr(value))}")
    return "" if pandas.isna(value) else str(value).strip()


def text_of(where: str, name: str, value: Any) -> str | list[dict[str, str]]:
    """A cell as text, or as messages {"role", "content"}, given as a list or as its JSON."""
    turns = parsed(where, name, value) if isinstance(value, str) and MESSAGES.match(value) else value
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        return cell(where, name, value)
    messages = [{key: turn.get(key) for key in ("role", "content")} for turn in turns]
    if any(not isinstance(x, str) or not distjudge.is_text(x) for turn in messages for x in turn.values()):
        form = 'messages {"role": text, "content": text}'
        raise InputError(f"{where}: {short(name)}: must be a list of {form}, not {short(repr(value))}")
    return messages


def prompts_of(own: dict[str, Any], columns: Iterable[str]) -> Callable[..., list[str]]:
    """A function of (where a row stands, the row, its text if no column has it): the prompts of the row.

    own: of card.json: {"template", "text": a column, "item", "optional": columns, "swap": two columns}. A
    second prompt is that of the other order; there are none if a text is empty. Raises InputError.
    """
    template, text, pair = own["template"], own["text"], own["swap"] or ()
    column_of = {name: text if name == "text" and text else name for name in placeholders(template)}
    known = {*columns, text or "text"}
    column_of = {name: column for name, column in column_of.items() if column in known}

    def make(where: str, row: dict[str, Any], about: str | None = None) -> list[str]:
        said = {c: text_of(where, c, row[c]) if c in row else "" for c in column_of.values()}
        said |= {"text": about} if about is not None else {}  # not what a column of this name holds
        if any(not value and name not in own["optional"] for name, value in said.items()):
            return []
        if template == "{text}" and isinstance(said[column_of["text"]], list):
            try:
                return [distjudge.prompt_text(said[column_of["text"]])]
            except ValueError as error:
                remedy = "with a --template that has {text}, a conversation is shown as text"
                raise InputError(f"{where}: {short(text)}: {error}; {remedy}") from None
        shown = {column: as_text(value) for column, value in said.items()}
        orders = [{}, dict(zip(pair, reversed(pair), strict=True))] if pair else [{}]
        return [fill(template, {n: shown[o.get(c, c)] for n, c in column_of.items()}) for o in orders]

    return make


def as_text(said: str | list[dict[str, str]]) -> str:
    """Messages as one text with the speakers' names."""
    if isinstance(said, str):
        return said
    return "\n\n".join(f"{turn['role'].capitalize()}:\n{turn['content'].strip()}" for turn in said)


# --- columns ----------------------------------------------------------------------------------------------
def conditions(config: Any) -> list[tuple[str, str, str, str]]:
    """What --where asks, each as written, and its column, "=" or "!=", and what its value looks like."""
    found = [re.fullmatch(r"([^=]*?)(!?=)(.*)", text, re.DOTALL) for text in config.where]
    if None in found:
        wrong = config.where[found.index(None)]
        raise InputError(f"where: '{short(wrong)}' is not COLUMN=VALUE or COLUMN!=VALUE")
    return [(m[0], sources.tidy(m[1]), m[2], look(plain(m[3]))) for m in found]


def columns_named(config: Any) -> dict[str, tuple[str, ...]]:
    """{option: the columns that it names}"""
    options = "text label counts item group rater keep optional swap".split()
    named = {option: getattr(config, option) or () for option in options}
    named = {option: (given,) if isinstance(given, str) else given for option, given in named.items()}
    return named | {"swap": config.swap[:2], "where": tuple(column for _, column, _, _ in conditions(config))}


def resolved(config: Any, path: str, columns: list[str]) -> Any:
    """The options, with the columns as the table names them. Raises InputError if one is wrong or missing."""
    there = f"The columns are {', '.join(short(column, 30) for column in columns)}"
    tidied = {sources.tidy(column): column for column in columns}
    changed: dict[str, Any] = {}
    for option, names in columns_named(config).items():
        found: list[str] = []
        for name in map(sources.tidy, names):
            start = (name[:-1].rstrip(),) if name.endswith("*") else ()
            some = [tidied[name]] if name in tidied else [c for k, c in tidied.items() if k.startswith(start)]
            if not some:
                close = difflib.get_close_matches(name, columns, 1)
                meant = f", did you mean '{short(close[0])}'?" if close else "."
                raise InputError(f"{path}: {option}: no column '{short(name)}'{meant} {there}")
            found += some
        if option != "where" and found:
            is_one = isinstance(getattr(config, option), str)
            if is_one and len(found) > 1:
                raise InputError(f"{path}: {option}: '{short(names[0])}' is {listed(found)}; name one column")
            changed[option] = found[0] if is_one else (*found, *getattr(config, option)[len(names) :])
    config = dataclasses.replace(config, **changed)
    used = Counter(config.label + config.counts).most_common(1) or [("", 0)]
    taken = "id prompt counts annotations distribution annotators group split swap truth where published"
    ours = [c for c in config.keep if c in taken.split()]
    a_text = "name the judged text (--text) or a template (--template); if a row is a person, add --by_column"
    votes = "name the columns of votes, or those of --counts, or (without --rater) one of each, a label and "
    votes += "how many people chose it"
    is_number = len(config.label) == len(config.counts) == 1 and not (config.rater or config.by_column)
    is_panel = len(config.label) > 1 and not config.by_column
    has_items = config.by_column and (config.counts or config.text or config.item)
    has_text = config.prompts or config.text or config.by_column
    problems = {
        f"label: column '{short(used[0][0])}' is named twice": used[0][1] > 1,
        f"label: {votes}. {there}": bool(config.label) == bool(config.counts) and not is_number,
        "by_column: the columns of --label are the items and their texts": has_items,
        "rater: with several columns of votes each column is a person": config.rater and is_panel,
        f"text: {a_text}. {there}": not has_text,
        "swap: name two columns, and the labels that trade places, in pairs": len(config.swap) % 2,
        f"keep: an item has a field {listed(ours)} of its own; rename the column": ours,
    }
    if found := [problem for problem, is_wrong in problems.items() if is_wrong]:
        raise InputError(f"{path}: {found[0]}")
    return config


def template_of(config: Any, path: str, columns: list[str]) -> str:
    """The template of a table's prompts."""
    needed = ["text"] if config.text or config.by_column else []
    template = read_template(config.prompts, needed, columns) if config.prompts else "{text}"
    shown = {config.text if name == "text" else name for name in placeholders(template)}
    if voted := sorted(shown.intersection(() if config.by_column else (*config.label, *config.counts))):
        raise InputError(f"{path}: the prompt would show the votes, of column '{short(voted[0])}'")
    if not needed and shown.isdisjoint(columns):
        remedy = f"write {{{short(columns[0])}}} where its cell goes"
        raise InputError(f"{config.prompts}: the template shows no column: {remedy}")
    for option, names in (("optional", config.optional), ("swap", config.swap[:2])):
        if unused := [name for name in names if name not in shown]:
            raise InputError(f"{path}: {option}: the template does not show the column '{short(unused[0])}'")
    return template


# --- what a cell says -------------------------------------------------------------------------------------
ALIKE = {c: "'" for c in '‘’‚‛“”„‟´`«»‹›"'} | {c: "-" for c in "‐‑‒–—―−﹣"} | {"\u0307": ""}
ALIKE |= dict(zip("авекмнорстухіјѕαβεζηικμνορτυχ", "abekmhopctyxijsabezhikmnoptyx", strict=True))
NO_VOTE_WORDS = r"""n/a na n.a n-a n\a #n/a #na <na> nan nat null #null! nil none missing empty blank void
#value! #ref! #div/0! \n ? ?? ??? . .. ... / _ * unknown unsure undecided undefined skip skipped
refused dk idk unanswered unrated k.a unbekannt ns/nc"""
NO_VOTE_PHRASES = """no vote|no answer|no opinion|no response|not answered|not applicable|not sure|not rated|
not available|none of these|none of the above|none of them|don't know|do not know|dont know|i don't know|
can't tell|cannot tell|can't say|can't decide|cannot decide|can't judge|cannot judge|unable to judge|
prefer not to say|prefer not to answer|keine angabe|keine antwort|keine ahnung|weiß nicht|nicht anwendbar|
ne sais pas|sans réponse|no sé|no sabe|no aplica"""
# "rank": an entry of a ranking, {"rank": 1, "value": "a"}, has two of these and is no vote
CHOSEN = "choices rating number value label labels answer choice vote selected score rank".split()
LISTS = ("\n", "<br>", ";", "；", "|", ",", "，", "、", "\t")  # what stands between the labels of one cell,
SEPARATORS = (*LISTS, "/", "+", " ")  # and what may stand within a label too
MARKS = dict.fromkeys("true x ✓ ✔ ☑ yes checked selected on wahr vrai".split(), "1")
MARKS |= {"": "0", "not selected": "0"}
MARKS |= dict.fromkeys("false no unchecked off ☐ falsch faux nan null none n/a na -".split(), "0")
PEOPLE = "rater annotator worker user judge coder participant respondent prolific who completed_by performer"
PEOPLE = PEOPLE.replace(" ", "|") + "|evaluator|labell?er|assignee|email"
A_PERSON = re.compile(rf"(ann|{PEOPLE})[\W_]*\d+", re.I)  # "Ann1", the name of one of them
PEOPLE = re.compile(rf"(.*[\W_])?({PEOPLE})([\W_]*(p?id|name|address))?", re.I)
STATE = re.compile(r".*status|answer", re.I)
REFUSED = "reject rejected discarded draft canceled cancelled invalid ignore returned timed.out preview spam"
REFUSED = re.compile(rf"(\w+ )?({REFUSED.replace(' ', '|')})", re.I)
TOTAL = "totals? sums? means? averages? avg median count std stdev gesamt insgesamt summe mittelwert mittel "
TOTAL += "durchschnitt anzahl moyenne somme média media suma promedio σ ø"
TOTAL = rf"((sub|grand)[\W_]*)?({TOTAL.replace(' ', '|')})([\W_]*(ratings?|scores?|votes?|points))?\W*"
TOTAL, TOTAL_COLUMN = re.compile(r"\W*" + TOTAL, re.I), r"(\w*[\W_])?(%s|majority|gold|consensus|adjudicated)"
TOTAL_COLUMN = re.compile(TOTAL_COLUMN % TOTAL.pattern, re.I)
NUMBER_COLUMN = r"n|#|(num(ber)?[\W_]*(of[\W_]*)?)?(counts?|votes|people|raters)|freq(uency)?|weights?"
NUMBER_COLUMN = re.compile(NUMBER_COLUMN, re.I)


@functools.lru_cache(10_000)
def look(text: str) -> str:
    """What a label looks like: case, quotes, brackets around, dashes, spaces, unseen signs do not count."""
    seen = unicodedata.normalize("NFKC", html.unescape(text)).casefold().translate(str.maketrans(ALIKE))
    seen = "".join(c for c in seen if unicodedata.category(c) != "Cf" and not "\ufe00" <= c <= "\ufe0f")
    seen = unicodedata.normalize("NFC", " ".join(seen.replace("_", " ").split()) or seen)
    seen = re.sub(r"\s*([^\w\s])\s*", r"\1", seen).rstrip(".。") or seen
    inner = re.fullmatch(r"['(\[{]*(.*?)[')\]}]*", seen, re.DOTALL)[1]
    return inner if re.search(r"\w", inner) else seen


DASHES = {"-" * number for number in range(1, 40)}
NO_VOTE = DASHES | {look(word) for word in [*NO_VOTE_WORDS.split(), *NO_VOTE_PHRASES.split("|")]}


def visible(text: str) -> str:
    """A text without unseen signs and odd spaces."""
    return unicodedata.normalize("NFC", " ".join(re.sub(sources.UNSEEN, "", text).split()))


def plain(text: str) -> str:
    """A label without unseen signs and odd spaces; numbers in digits: "4.0", "+4" and "'4" are 4."""
    text = visible(text)
    number = re.fullmatch(r"'?([+-]?)(\d{0,300})(?:\.(\d{0,300}))?", re.sub("[\u2212\u2013]", "-", text))
    if not number or not (number[2] or number[3]):
        return text
    whole, part = str(int(number[2] or 0)), (number[3] or "").rstrip("0")
    if len(part) > 6:  # 0.30000001192 is how a computer writes 0.3
        return plain(f"{number[1]}{float(f'{whole}.{part}'):.6f}")
    sign = "-" if number[1] == "-" and (part or whole != "0") else ""
    return sign + whole + (f".{part}" if part else "")


def label_in(config: Any, text: str) -> str:
    """A label in its plain form; decimal commas, where the user says so, as points."""
    if config.decimal == "comma" and re.fullmatch(r"[+\-\u2212]?(\d+|\d{1,3}(\.\d{3})+)(,\d+)?", text):
        text = text.replace(".", "").replace(",", ".")
    return plain(text)


def parsed(where: str, column: str, text: Any) -> Any:
    """What a cell of JSON or Python's lists and dicts says; the cell itself if it is neither.

    Raises InputError for what looks like a list and cannot be read.
    """
    inner = text.strip() if isinstance(text, str) else ""
    if inner[-1:] not in ("]", "}", ")"):
        return text
    at = f"{where}: {short(column)}: {short(repr(text))}"
    inner = re.sub(r"np\.\w+\(([^()]*)\)", r"\1", inner)
    kinds = r"(?:Counter|array|tensor|defaultdict)\((?:<class '\w+'>, )?"
    inner = re.sub(rf"^{kinds}(.*?)(?:, dtype=[\w.]+)?\)$", r"\1", inner, flags=re.DOTALL)
    if re.fullmatch(r"\{[^:]+\}", inner):  # PostgreSQL's way to write a list
        inner = f"[{inner[1:-1]}]"
    if inner[:1] + inner[-1:] not in ("[]", "{}", "()") and inner[:1] != "{":
        return text
    value, problem = distjudge.load_json(inner)
    if not problem:
        return value
    if "stands twice" in problem:
        raise InputError(f"{at} {problem.removeprefix('broken JSON: ').replace('an object', 'it')}")
    if re.fullmatch(r"\[\s*([+-]?\d[\d.]*|nan)(\s+([+-]?\d[\d.]*|nan))+\s*\]", inner):  # NumPy's way to write
        return [None if number == "nan" else number for number in inner.strip("[]").split()]
    if re.fullmatch(r"\[(\s*'[^']*')+\s*\]", inner):
        return re.findall("'([^']*)'", inner)
    try:
        if re.search(r"['\"]\s+['\"]", inner):  # words without commas between, which Python would join
            raise ValueError
        value = ast.literal_eval(re.sub(r"(?<=[\[,(:\s])(nan|null|NaN)(?=\s*[,\])}])", "None", inner))
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        if re.match(r"[\[({]\s*['\"\[{(]|.*\d\s*,|\{.*:", inner, re.DOTALL):
            raise InputError(f"{at} is neither JSON nor a list or dict of Python") from None
        return [part.strip() for part in inner[1:-1].split(",")] if "," in inner and inner[0] == "[" else text
    return value if isinstance(value, (list, dict, tuple, set)) else text


def people_in(where: str, row: dict[str, Any], column: str) -> list[list[str] | None]:
    """What each person chose, of a cell of votes: mostly one person, one text. Of a list, each entry's.

    None: an answer that its tool marks as discarded or draft.
    """
    value = parsed(where, column, row[column])
    if isinstance(value, str):
        return [[cell(where, column, value)]]
    lists = [*value.values()] if isinstance(value, dict) else []
    if len(lists) > 1 and all(isinstance(one, list) and len(one) == len(lists[0]) for one in lists):
        value = pandas.DataFrame(value).to_dict("records")  # Argilla's {"value": [...], "status": [...]}
    if isinstance(value, dict) and value and all(map(A_PERSON.fullmatch, map(str, value))):
        value = list(value.values())
    people = list(value) if isinstance(value, (list, tuple)) else [value]
    states = row.get(f"{column}.status")
    if not isinstance(states, list) or len(states) != len(people):
        states = [one.get("status") if isinstance(one, dict) else None for one in people]
    pairs = zip(people, states, strict=True)
    return [None if REFUSED.fullmatch(str(s)) else choices_in(where, column, one) for one, s in pairs]


def choices_in(where: str, column: str, value: Any) -> list[str]:
    """The texts that one person chose."""
    if isinstance(value, (list, tuple)):
        return [choice for one in value for choice in choices_in(where, column, one)]
    if isinstance(value, (datetime.date, datetime.time, datetime.timedelta)):
        raise InputError(f"{where}: {short(column)}: '{short(value, 30)}' {A_DATE}")
    if not isinstance(value, dict):
        return [cell(where, column, value)]
    if all(type(is_it) is bool for is_it in value.values()):
        return [cell(where, column, name) for name, is_it in value.items() if is_it]
    keys = [key for key in CHOSEN if key in value]
    keys = keys or [key for key in value if len(value) == 1 and isinstance(value[key], dict)]
    if len(keys) != 1:
        problem = f"{short(repr(value))} is an object, not a vote; --counts reads {{label: votes}}; people "
        problem += "are called Ann1, Ann2, or their votes stand in a list"
        raise InputError(f"{where}: {short(column)}: {problem}")
    return choices_in(where, column, value[keys[0]])


def counts_in(config: Any, where: str, row: dict[str, Any]) -> dict[str, int]:
    """{label: votes} of the columns of counts of a row."""
    what = " ".join(map(short, config.counts))
    given: Any = {column: row[column] for column in config.counts}
    if len(given) == 1 and not config.label:
        given = parsed(where, what, row[config.counts[0]])
        given = {} if not isinstance(given, (dict, list)) and not cell(where, what, given) else given
        if not isinstance(given, dict):
            form = 'must be an object such as {"1": 0, "2": 3}'
            raise InputError(f"{where}: {what}: {form}, not {short(repr(given))}")
        if given and all(map(A_PERSON.fullmatch, map(str, given))):
            raise InputError(f"{where}: {what}: {short(repr(given))} are people's votes: use --label")
    found: Counter = Counter()
    thousands = "['’ ]" if config.decimal == "comma" else "[,'’ ]"
    for label, number in given.items():
        said = "" if distjudge.is_missing(number) else visible(str(number)).casefold()
        text = label_in(config, re.sub(rf"(?<=\d){thousands}(?=\d{{3}}(\D|$))", "", said))
        text = MARKS.get(text, text)
        unclear = config.decimal == "point" and re.fullmatch(r"\d+(\.\d{3})+", said)
        if unclear or not re.fullmatch(r"[0-9]{1,9}", text):
            remedy = "; --decimal comma takes such points for thousands" if unclear else ""
            problem = f"a number of votes is needed, not '{short(number, 30)}'{remedy}"
            raise InputError(f"{where}: {short(label)}: {problem}")
        found[cell(where, "label", label)] += int(text)
    return found


# --- from a table to items --------------------------------------------------------------------------------
Panel = namedtuple("Panel", "number prompts fields at")  # an item before its votes are counted
# A text that somebody chose. ballot: a number for what one person, or `people` alike, chose in one cell
Choice = namedtuple("Choice", "item ballot person text people in_list at column turned")


def own(config: Any, out: Any) -> None:
    """A row a vote, a row an item (several columns, or counts), or a row a person (--by_column): items."""
    if not config.raw:
        raise InputError("raw: name your table, a file or a Hugging Face data set")
    panels: dict[str, Panel] = {}
    choices: list[Choice] = []
    wanted = [name for names in columns_named(config).values() for name in names if not name.endswith("*")]
    for path in config.raw:
        columns, rows = sources.read_table(path, config.hub_split, config.sheet, wanted)
        given = resolved(config, path, columns)
        out.own = {"template": template_of(given, path, columns), "text": given.text, "item": given.item}
        out.own |= {"optional": list(given.optional), "swap": list(given.swap[:2]) or None}
        shown = [given.text if name == "text" else name for name in placeholders(out.own["template"])]
        out.own["shown"] = [name for name in shown if name in columns]
        read_votes(given, out, list(rows), columns, panels, choices)
    said = pandas.DataFrame(choices, columns=Choice._fields)
    texts = said[said.text != ""].groupby("text", sort=False)
    texts = texts.agg(people=("people", "sum"), at=("at", "first"), column=("column", "first"))
    texts["at"] += ": " + texts.pop("column").map(short)
    out.labels, meaning = understand(given, texts, out.notes)
    traded = traded_labels(given.swap, out.labels) if given.swap and len(texts) else {}
    out.own["swap_labels"] = traded or None
    votes = count(given, out, said, meaning, traded)
    counts = votes.groupby(["item", "label"]).people.sum().to_dict()
    out.read["votes"] += sum(counts.values())
    named: dict[int, dict[str, Any]] = {}
    for (item, person), labels in votes[votes.person != ""].groupby(["item", "person"], sort=False).label:
        named.setdefault(item, {})[person] = labels.iloc[0] if len(labels) == 1 else labels.tolist()
    for key, panel in panels.items():
        name = key if config.item or config.by_column else ""
        swap = {"prompt": panel.prompts[1], "labels": traded} if traded else None
        shares = {label: counts.get((panel.number, label), 0) for label in out.labels}
        more = panel.fields | {"swap": swap, "annotators": named.get(panel.number)}
        out.add_item(name, panel.prompts[0], shares, **more)
    say_doubts(config, out, panels, said.person)


def read_votes(config: Any, out: Any, rows: list, columns: list[str], panels: dict, choices: list) -> None:
    """Adds the rows of a table to the Panels and their Choices; counts what is left out."""
    make, by_vote = prompts_of(out.own, columns), len(config.label) == 1 or config.by_column
    table = pandas.DataFrame([row for _, row in rows], columns=columns, dtype=object)
    said_in = lambda c: ["" if distjudge.is_missing(x) else str(x) for x in table[c]]  # noqa: E731
    keep: dict[tuple[str, str], Any] = {}  # of several wanted values of a column any does
    for asked, name, sign, value in conditions(config):
        c = next(c for c in columns if sources.tidy(c) == name)
        is_it = pandas.Series([look(plain(text)) == value for text in said_in(c)], table.index, dtype=bool)
        if not is_it.any():
            log.warning("--where %s: no row has that value", shlex.quote(short(asked)))
        keep[c, sign] = keep.get((c, sign), False) | is_it
    for (_, sign), is_it in keep.items():
        table = table[(is_it if sign == "=" else ~is_it)[table.index]]
    out.read["rows"] += len(rows)
    out.dropped["row left out by --where"] += len(rows) - len(table)
    texts = [c for c in columns if c == config.text or f"{{{c}}}" in out.own["template"]]
    used = {name for names in columns_named(config).values() for name in names} | {*texts}
    free = [c for c in columns if c not in used]
    names = {*texts, config.item, config.rater, *{*columns[:1]}.intersection(free)}
    checks = [(texts, lambda value: look(value) in NO_VOTE), (names, TOTAL.fullmatch)]
    checks.append(([*filter(STATE.fullmatch, free)], REFUSED.fullmatch))
    for c in columns:
        odd = [is_odd for some, is_odd in checks if c in some]
        for value, number in Counter(said_in(c)).items() if odd else ():
            if any(is_odd(value[:30]) for is_odd in odd):
                option = shlex.quote(f"{short(c)}!={short(value, 30)}")
                text = "%d rows count whose %s is '%s'; --where %s leaves them out"
                log.warning(text, number, short(c), short(value, 30), option)
    several = [*config.label, *config.counts]
    is_one_vote = len(several) == 1 and config.label and not (config.rater or config.by_column)
    for c in filter(NUMBER_COLUMN.fullmatch, free if is_one_vote else ()):
        if any(re.fullmatch(r"\d{2,}|[2-9]", plain(value)) for value in said_in(c)):
            text = "each row counts as one vote; if column '%s' says how many people chose so: --counts %s"
            log.warning(text, short(c), shlex.quote(short(c)))
    for c in filter(TOTAL_COLUMN.fullmatch, several if len(several) > 1 else ()):
        log.warning("column '%s' counts like the others; if it sums them up, name those without it", short(c))
    own = {c: (re.findall(r"\d+", c) or [""])[-1] for c in config.counts}
    marks = table[[*own]].map(lambda x: "" if distjudge.is_missing(x) else plain(str(x)))
    marks = marks.where(marks.map(str.isdigit) & (marks != "0"))
    numbers = {c: set(marks[c].dropna()) for c in own}
    only_own = all(numbers[c] <= {number} for c, number in own.items())
    only_own &= bool(config.item) or marks.notna().sum(axis=1).max() < 2  # else they may be counts
    if only_own and len(set().union(*numbers.values()) - {"1"}) > 1:
        out.notes.append("columns of counts say their own number: each such cell is one vote")
        rows = [(where, row | {c: 1 for c in own if plain(str(row[c])) == own[c]}) for where, row in rows]
    if config.decimal == "comma":  # a number, of Excel say, is one already: 0.125 is no 125
        number = lambda x: str(x).replace(".", ",") if type(x) is float and x == x else x  # noqa: E731
        rows = [(where, row | {c: number(row[c]) for c in several}) for where, row in rows]
    items = [("", None, config.label)]
    if config.by_column:
        items = [(c, getattr(c, "question", "") or c, (c,)) for c in config.label]
    keys = []
    for where, row in (rows[k] for k in table.index):
        named = {c: c for c in config.keep} | ({"group": config.group} if config.group else {})
        fields = {name: cell(where, c, row[c]) for name, c in named.items()}
        for name, text, vote_columns in items:
            keys.append("")
            if not (prompts := make(where, row, text)):
                out.dropped["row without text"] += 1
                continue
            key = name or (cell(where, config.item, row[config.item]) if config.item else "")
            if config.item and not key:
                raise InputError(f"{where}: {config.item}: empty, so the vote belongs to no item")
            text_key = next((prompt for prompt in prompts if prompt in panels), prompts[0])
            keys[-1] = key = key or (text_key if by_vote else where)
            is_new = key not in panels
            panel = panels.setdefault(key, Panel(len(panels), prompts, fields, where))
            differs = next((short(name) for name in fields if fields[name] != panel.fields[name]), "")
            before, now = [*map(visible, panel.prompts)], [*map(visible, prompts)]
            is_turned = before != now and before == now[::-1]  # a pair, shown in its other order
            if before != now and not is_turned:
                differs = "text"
            problem = f"its {differs} differs from that at {panel.at}" if differs else ""
            if not (is_new or by_vote or config.counts or differs):
                problem = f"stands twice, first at {panel.at}; with columns of votes a row is an item"
            if problem:
                raise InputError(f"{where}: item '{short(key)}': {problem}")
            for column, person, chosen, people, in_list in votes_in(config, where, row, vote_columns):
                out.dropped["vote that its tool marks as discarded or draft"] += chosen is None
                same = (people, in_list, where, column, is_turned)
                texts = [] if chosen is None else chosen or [""]
                choices += [Choice(panel.number, len(choices), person, one, *same) for one in texts]
    for c in filter(PEOPLE.fullmatch, free if by_vote and not (config.rater or config.by_column) else ()):
        votes_of = Counter(zip(keys, said_in(c), strict=True))
        if again := sum(number - 1 for (key, who), number in votes_of.items() if key and who):
            text = "%d votes are a person's second on an item, by column '%s'; --rater %s counts one"
            log.warning(text, again, short(c), shlex.quote(short(c)))


def votes_in(config: Any, where: str, row: dict[str, Any], columns: Iterable[str]) -> Iterator[tuple]:
    """(column, person or "", what they chose, how many people did, whether it is one of a list) of a row."""
    names = row[config.rater] if config.rater else ""
    number = 1
    if config.counts and config.label:
        (number,) = counts_in(config, where, row).values()
    elif config.counts:
        what, counts = " ".join(config.counts), counts_in(config, where, row)
        name = cell(where, "rater", names)
        is_several = sum(number > 0 for number in counts.values()) > 1
        votes = {label: 0 if name else number for label, number in counts.items()}
        yield from ((what, "", [label], number, is_several) for label, number in votes.items())
        if name:
            yield what, name, list(Counter(counts).elements()), 1, False
        return
    for column in columns:
        people = people_in(where, row, column)
        if config.counts and len(people) > 1:
            raise InputError(f"{where}: {column}: a list, and --counts says how many people chose one label")
        if not config.rater:
            yield from ((column, "", chosen, number, len(people) > 1) for chosen in people or [[]])
            continue
        if isinstance(names, str) and re.fullmatch(r"\[.+\]|\S+,\S+", names):  # a list as text
            split, votes = [name.strip(" '\"") for name in names.strip("[]").split(",")], people
            if config.multi == "split" and len(people) == 1 and people[0]:
                votes = [[part] for part in parts_of(people[0][0])]
            names, people = (split, votes) if len(split) == len(votes) else (names, people)
        if not isinstance(names, (list, tuple)):  # a list is what this person chose
            names, people = [names], [[text for one in people for text in one or []]]
        if len(names) != len(people):
            raise InputError(f"{where}: {config.rater}: {len(names)} names for {len(people)} votes")
        for name, chosen in zip(names, people, strict=True):
            yield column, cell(where, config.rater, name), chosen, 1, False


def count(config: Any, out: Any, said: Any, meaning: dict[str, list[str]], traded: dict[str, str]) -> Any:
    """The choices that are votes, a row a vote, with the "label"; counts the others in out.dropped.

    traded: {label: label that means the same} of a pair in its other order.
    Raises InputError where a person chose several labels and --multi does not say what that means.
    """
    votes = said.assign(label=said.text.map(meaning | {"": []})).explode("label", ignore_index=True)
    out.dropped["cell named by --no_vote"] += int(((votes.label == NOTHING) & (votes.people > 0)).sum())
    out.dropped["empty cell"] += int((said.text == "").sum())
    votes = votes[votes.label.notna() & (votes.label != NOTHING) & (votes.people > 0)]
    is_among = votes.item.map(said.groupby("item")["at"].nunique()) > 1  # the item has several rows
    may_be_several = bool(config.label) or said.people.max() < 2  # else they are counts of many people
    several = votes.duplicated("ballot", keep=False) | (votes.in_list & is_among & may_be_several)
    if config.multi != "split" and several.any():
        first = votes[several].iloc[0]
        labels = votes[votes.ballot == first.ballot].label
        if len(labels) == 1:  # one of a list
            labels = votes[(votes["at"] == first["at"]) & (votes.column == first.column)].label
        problem = f"a person's cell holds several labels, {listed(labels)}; --multi split counts each"
        if len(meaning[first.text]) > 1:
            problem += f"; if they are one label, name all: --labels {quoted([first.text])} ..."
        raise InputError(f"{first['at']}: {short(first.column)}: {problem}")
    if (turned := votes.turned.astype(bool)).any():
        votes.label = votes.label.mask(turned, votes.label.replace(traded))
        number = votes.people[turned].sum()
        out.notes.append(f"votes on a pair in its other order, for the label that means the same: {number:,}")
    firsts = votes.groupby(["item", "person"]).ballot.transform("min")
    late = votes[(votes.person != "") & (votes.ballot != firsts)]
    labels = votes.groupby("ballot").label.agg(list) if len(late) else {}
    for ballot, first in dict(zip(late.ballot, firsts[late.index], strict=True)).items():
        kind = "" if labels[ballot] == labels[first] else ", with another label: the first counts"
        out.dropped[f"second vote of a person on an item{kind}"] += 1
    return votes.drop(late.index)


def twins(looks: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Of pairs of a name and its look: each name whose look came before, behind the first of that look."""
    first: dict[str, str] = {}
    pairs = [(first.setdefault(seen, name), name) for name, seen in looks]
    return [pair for pair in pairs if pair[0] != pair[1]]


def say_doubts(config: Any, out: Any, panels: dict[str, Panel], people: Any) -> None:
    """Warns of what may not be meant."""
    rows, empty = out.read["rows"], out.dropped["row without text"]
    if empty > 0.05 * rows:
        remedy = "--optional COLUMN allows that; cells that were merged must be filled down"
        log.warning("%d of %d rows are left out, as a text in them is empty; %s", empty, rows, remedy)
    if same := twins((key, min(map(visible, panel.prompts))) for key, panel in panels.items()):
        adds_up = (len(config.label) == 1 or config.counts) and not (config.item or config.by_column)
        remedy = "; --item COLUMN adds up the rows of one item" if adds_up else ""
        text = "%d of %d items have the prompt of another item, up to unseen signs: '%s' and '%s'%s"
        log.warning(text, len(same), len(panels), *map(short, same[0]), remedy)
    if same := twins((name, look(plain(name))) for name in people.unique() if name):
        pairs = ", ".join(f"'{short(one, 20)}' and '{short(other, 20)}'" for one, other in same[:5])
        text = "names of --rater that look alike count as several people, %d times: %s; write each in one way"
        log.warning(text, len(same), pairs)
    if nobody := [name for name in people.unique() if look(name) in {*NO_VOTE, "anonymous"}]:
        text = "--rater: votes of '%s' count as one person's; in empty cells each would be another's"
        log.warning(text, short(nobody[0], 20))
    votes = [sum(row["counts"].values()) for row in out.rows if "counts" in row]
    if votes and max(votes) < 2:
        log.warning("every item has one vote only: nothing shows how far people disagree on one item")


def traded_labels(swap: tuple[str, ...], order: list[str]) -> dict[str, str]:
    """{label: label in the other order} of a pair of columns; swap[2:] names two labels, else names tell."""
    if unknown := [label for label in swap[2:] if label not in order]:
        raise InputError(f"swap: '{short(unknown[0])}' is not one of {listed(order)}")
    mirrored = dict(zip(order, order[::-1], strict=True))
    is_signed = distjudge.are_numeric(order) and "-" in order[0]  # from -2 to 2, say
    if is_signed and not swap[2:] and all(float(one) == -float(other) for one, other in mirrored.items()):
        return mirrored
    every, columns = list(itertools.permutations(order, 2)), tuple(map(look, swap[:2]))
    pairs = list(zip(swap[2::2], swap[3::2], strict=True))
    wanted = {columns, apart(columns)}
    if not (distjudge.are_numeric(order) and len(order) > 2):  # 1, 2, 3 may be "a", "the same", "b"
        pairs = pairs or [pair for pair in every if tuple(map(look, pair)) in wanted]
        pairs = pairs or [pair for pair in every if apart(tuple(map(look, pair))) in wanted]
    traded = dict(pairs) | {other: one for one, other in pairs}
    # one label may be its own mirror, a tie; of two or more nobody can tell
    if (len(pairs) != 1 and not swap[2:]) or len(set(order) - set(traded)) > 1:
        is_plain = len(order) < 3 or distjudge.are_numeric(order)
        ends = [*mirrored.items()][: (len(order) + 1) // 2] if is_plain else [("LABEL", "ITS MIRROR ...")]
        example = " ".join(map(shlex.quote, (*swap[:2], *itertools.chain(*ends))))
        problem = f"which of the labels {listed(order)} trade places cannot be told; if one is missing that "
        problem += "nobody chose, name all with --labels; else name these in pairs, "
        raise InputError(f"swap: {problem}one that stays with itself, as in --swap {example}")
    return traded


def apart(names: tuple[str, ...], of_words: bool = False) -> tuple[str, ...]:
    """Where names differ: ("a", "b") of "answer_a" and "answer_b"; of_words: they share whole words only."""
    for _ in range(2):  # the beginning goes, then the end, for each time the names are turned round
        shared = min(names)[: distjudge.common_length(min(names), max(names))]
        shared = re.sub(r"[^\W_]*$", "", shared) if of_words else shared
        names = tuple(name[len(shared) :][::-1] for name in names)
    return names


# --- what votes say ---------------------------------------------------------------------------------------
NOTHING = ""  # the label of a text that --no_vote names
POINT = re.compile(r"(-?\d+)[-:=.( ]\D+")  # "4 - agree", "1 (not at all)"
MONTH = r"(jan|feb|m[aä]r|mrz|apr|ma[iy]|jun|jul|aug|sep|o[ck]t|nov|de[cz])[a-z]*\.?"
DATE = r"\d{1,2}[-. /]+%s([-. /]+\d+)?|%s[-. /]+\d+|\d{4}-\d\d-\d\d.*|\d{1,2}:\d\d(:\d\d)?"
DATE = (DATE + r"|\d{1,2}(?P<s>[./])\d{1,2}(?P=s)\d{2,4}\b.*").replace("%s", MONTH)
WEAK = re.compile(r"\s+(?:and|or|und|et|y)\s+|[\W_]+")  # between labels that stand alone elsewhere
NUMBER = re.compile(r"-?\d{1,300}(\.\d{1,300})?")
A_DATE = "is a date or time, which spreadsheets make of cells such as 3-4 or 1/2; enter such votes as text"
FORMS = {  # texts that are no label unless --labels names them: what they are and what to do
    DATE: A_DATE,
    r"\d+([.,]\d+)?\s?%": "is a share; bins make labels of shares, as in --bins 0 20 40 60 80 100",
    r"\d+\s?/\s?\d+": "may be points, a date or two votes; name such labels, as in --labels 1/5 2/5 3/5",
}
FORMS = {re.compile(form, re.I): problem for form, problem in FORMS.items()}


def understand(config: Any, texts: Any, notes: list[str]) -> tuple[list[str], dict[str, list[str]]]:
    """The labels in order, and {text: its labels}. Raises InputError, with the row, if in doubt.

    texts: a DataFrame of what cells say, with "people" (how many say so) and "at" (where it stands first).
    """
    silent, order = {look(plain(word)) for word in config.no_vote}, named_labels(config.labels)
    silent |= DASHES if "-" in silent else set()
    if len(config.counts) > 1 and not order:
        order = [label for label in map(plain, config.counts) if look(label) not in silent]
    meaning = read_texts(config, order, silent, texts["at"])
    heard = {look(label) for labels in meaning.values() for label in labels}
    if unheard := [word for word in config.no_vote if look(plain(word)) not in heard]:
        log.warning("--no_vote: no cell says %s", quoted(unheard))
    meaning = {t: [NOTHING if look(x) in silent else x for x in labels] for t, labels in meaning.items()}
    meaning = {t: labels if any(labels) else labels[:1] for t, labels in meaning.items()}
    if config.bins:
        order = bin_labels(config, order, meaning, texts["at"], notes)
    votes = texts.assign(label=texts.index.map(meaning)).explode("label")
    votes = votes[votes.label != NOTHING].groupby("label", sort=False).agg({"people": "sum", "at": "first"})
    order = order or found_labels(votes)
    if len(votes) and len(order) < 2:
        what = " ".join(map(short, config.label or config.counts))
        raise InputError(f"{what}: only the label {listed(order)} occurs; name them all with --labels")
    changed = [t for t, labels in meaning.items() if labels not in ([t], [NOTHING]) and texts.people[t]]
    if changed and not config.bins:
        some = ", ".join(f"'{short(t, 20)}' as {short(' '.join(meaning[t]), 20)}" for t in changed[:5])
        number = texts.people[changed].sum()
        notes.append(f"cells that do not say their label to the letter: {number:,}, such as {some}")
    if config.bins or config.labels or not config.label:
        return order, meaning
    if doubtful := [label for label in order if look(label) in NO_VOTE]:
        some = ", ".join(f"'{short(label, 20)}' ({votes.people[label]:,})" for label in doubtful)
        text = "labels that read like no vote are counted as labels: %s; --no_vote %s leaves them out"
        log.warning(text, some, quoted(doubtful))
    if order and distjudge.are_numeric(order):
        if unchosen := [label for label in order if label not in votes.index]:
            notes.append(f"labels that nobody chose, within the scale: {', '.join(unchosen)}")
        ends = f"{order[0]} to {order[-1]}"
        notes.append(f"the scale was found in the votes: {ends}; --labels names a wider one")
    return order, meaning


def read_texts(config: Any, order: list[str], silent: set[str], first: Any) -> dict[str, list[str]]:
    """{text: the labels in it}, of `order` if there are any. first: where each text stands first."""
    said = {text: label_in(config, text) for text in first.index}
    if config.bins:
        return {text: [label] for text, label in said.items()}
    known = {look(label): label for label in order}
    if len(config.counts) > 1:  # "rate:::1" is 1, where that is a label
        bare = lambda text: look(re.sub(r"[\W_]+", " ", text))  # noqa: E731
        spaced, ends = {bare(label): label for label in order}, map(bare, apart(config.counts, of_words=True))
        own = {t: spaced.get(end) for t, end in zip(config.counts, ends, strict=True) if look(t) not in known}
        said |= {text: own[text] for text in said if own.get(text)}
    sure = {*known, *silent, *NO_VOTE}
    marks, is_split = SEPARATORS, config.multi == "split"
    if is_split and not known:  # one for all cells: "yes, but;no" holds two
        marks = [m for m in marks if any(parts_of(x, [m]) for x in said.values() if look(x) not in sure)][:1]
    times = Counter(look(part) for label in said.values() for part in {*parts_of(label), label})
    whole = {*sure, *(() if known else map(look, said.values()))}
    meaning: dict[str, list[str]] = {}
    for text, label in said.items():
        ways = [[label]] if look(label) in sure else [way for m in marks if (way := parts_of(label, [m]))]
        fits = [way for way in ways if all(look(part) in sure for part in way)]
        if not fits and look(label) not in sure and not any(x.fullmatch(label) for x in (NUMBER, *FORMS)):
            words = WEAK.split(label)
            others = [*(joined(label, sure, mark) for mark in SEPARATORS), words * (len(words) > 1)]
            fits = [way for way in others if way and all(look(part) in whole for part in way)]
        number = plain(label.replace(",", ".")) if re.fullmatch(r"[+-]?\d+,\d+", label) else ""
        if not known and not fits:
            is_list = is_split or (config.label and any(mark in label for mark in LISTS))
            again = lambda way: all(map(NUMBER.fullmatch, way)) or any(times[look(x)] > 1 for x in way)  # noqa: E731
            fits = [way for way in ways[:1] if is_list or len(way) == 1 or again(way)]
        if number and fits and not is_split:
            problem = "may be several votes (--multi split) or have a decimal comma (--decimal comma)"
            raise InputError(f"{first[text]}: '{short(text)}' {problem}")
        point = POINT.fullmatch(look(label)) if known and distjudge.are_numeric(order) else None
        fits += [[one] for one in (number, point and point[1]) if one and look(one) in known]
        best, *_ = fits or (known and is_split and ways) or [[label]]
        meaning[text] = [known.get(look(part), part) for part in best]
        for one in meaning[text]:
            problem = next((what for form, what in FORMS.items() if form.fullmatch(one)), "")
            if known and not problem and look(one) not in silent:
                problem = f"is not one of {listed(order)}"
                words = [x for x in (one, *said) if look(x) in NO_VOTE and look(x) not in {*known, *silent}]
                if words := words or [x for x in [one] if NUMBER.fullmatch(x) and look(x) not in silent]:
                    problem += f"; --no_vote {quoted(words)} leaves such cells out"
            if problem and look(one) not in known:
                raise InputError(f"{first[text]}: '{short(one, 30)}' {problem}")
    return meaning


def parts_of(text: str, marks: Iterable[str] = SEPARATORS) -> list[str]:
    """The labels that a cell may hold, by the first of the marks in it; [] of a cell with one label."""
    for mark in marks if not any(form.fullmatch(text) for form in FORMS) else ():
        parts = [plain(part) for part in text.split(mark) if part.strip()] if mark in text else []
        if len(parts) > 1 or (parts and mark in "\n;；|"):
            return parts if mark != " " or all(map(NUMBER.fullmatch, parts)) else []
    return []


def joined(text: str, sure: set[str], mark: str) -> list[str]:
    """The labels in a cell, of those that are known, where labels may hold the mark too: "Yes, very,No"."""
    found, open_part = [], ""
    for part in text.split(mark):
        open_part = f"{open_part}{mark}{part}" if open_part else part
        if look(open_part) in sure:
            found, open_part = [*found, plain(open_part)], ""
    return [] if open_part else found


def quoted(words: Iterable[str]) -> str:
    """Words for a command line, at most twenty."""
    kinds = {re.sub("^-+$", "-", look(word)): short(word) for word in words}
    kinds |= {"-": "-"} if "-" in kinds else {}
    return " ".join(map(shlex.quote, list(kinds.values())[:20]))


def bin_labels(config: Any, names: list[str], meaning: dict, first: Any, notes: list[str]) -> list[str]:
    """Puts numbers into bins: each from its lower edge up to the upper one, the last with it."""
    said = {t: label_in(config, visible(t).rstrip(" %")) for t in meaning if meaning[t] != [NOTHING]}
    numbers = {text: float(number) for text, number in said.items() if NUMBER.fullmatch(number)}
    edges = [float(edge) for edge in config.bins if NUMBER.fullmatch(plain(edge))]
    if len(edges) < max(3, len(config.bins)) or edges != sorted(set(edges)):
        example = equal_edges(min(numbers.values(), default=0), max(numbers.values(), default=100))
        raise InputError(f"bins: name three edges or more, from low to high, as in --bins {example}")
    names = names or [str(number) for number in range(1, len(edges))]
    if len(names) != len(edges) - 1:
        raise InputError(f"bins: {len(names)} --labels for {len(edges) - 1} bins")
    percents = {text for text in said if "%" in text}
    shares = [text for text, number in numbers.items() if 0 < number <= 1 < edges[1] and text not in percents]
    for text in said:
        problem = ""
        if text not in numbers or not edges[0] <= numbers[text] <= edges[-1]:
            problem = f"is no number from {edges[0]:g} to {edges[-1]:g}"
            problem += f"; if it is no vote, --no_vote {quoted([text])}"
            if re.fullmatch(r"\d+,\d+ ?%?", text):
                problem = "has a decimal comma: --decimal comma reads it"
        elif text in shares and percents:
            problem = "stands beside percents; write all in one way"
        elif text in shares and max(numbers.values()) <= 1:
            problem = f"is a share, as are all: --bins {equal_edges(0, 1)}"
        if problem:
            raise InputError(f"{first[text]}: '{short(text, 30)}' {problem}")
    places = pandas.cut([*numbers.values()], [*edges[:-1], math.inf], right=False, labels=False)
    meaning |= {text: [names[place]] for text, place in zip(numbers, places, strict=True)}
    ends = zip(names, edges, edges[1:], strict=False)
    ends = ", ".join(f"{name} is {low:g} to {high:g}" for name, low, high in ends)
    notes.append(f"bins, an edge being the upper bin's: {ends}")
    return names


def equal_edges(low: float, high: float) -> str:
    return " ".join(f"{low + ((high - low) or 1) * k / 5:g}" for k in range(6))


def named_labels(labels: Iterable[str]) -> list[str]:
    """("1-5",) or ("-3..3",) -> every whole number of the range; other names, or several, as they are."""
    labels, out = list(labels), []
    for label in labels:
        ends = re.fullmatch(r"([+-]?\d{1,300})(?:\.\.|-)([+-]?\d{1,300})", label.strip())
        ends = ends if len(labels) == 1 else None  # "0-20" among others is a label
        if ends and not int(ends[1]) < int(ends[2]) <= int(ends[1]) + 100:
            raise InputError(f"labels: '{label}' is not a range from low to high")
        out += map(str, range(int(ends[1]), int(ends[2]) + 1)) if ends else [plain(label)]
    if "" in out or len(set(map(look, out))) < len(out):
        raise InputError(f"labels: {listed(out)} names an empty label, or one twice (capitals are ignored)")
    return out


def found_labels(votes: Any) -> list[str]:
    """The labels that occur, in order. Raises InputError if they are no one scale.

    votes: a DataFrame, by label, of how many "people" chose it, and "at", where it stands first.
    """
    words = [label for label in votes.index if not distjudge.are_numeric([label])]
    values = {label: float(label) for label in votes.index if label not in words}
    parts = [label for label in values if "." in label]
    low, high = min(values.values(), default=0), max(values.values(), default=0)
    commonest = sorted(words, key=lambda word: (-votes.people[word], len(word)))
    alike = twins((word, look(word)) for word in commonest)
    odd = (words or parts or [""])[0]
    said, problem = f"'{short(odd, 20)}'", ""
    if values and words:
        number, point = next(iter(values)), POINT.fullmatch(look(odd))
        remedy = f"if such words are no vote, --no_vote {quoted(words)} leaves them out"
        remedy = f"with a scale, as in --labels 1-5, it counts as {point[1]}" if point else remedy
        at = votes["at"][number].rpartition(": ")[0]
        problem = f"mixed scales: {said} among numbers such as '{short(number, 20)}' ({at}); {remedy}"
    elif parts:
        step = 0.5 if all(value % 0.5 == 0 for value in values.values()) else 0.25
        remedy = f" (is this column a mean?); bins make labels, as in --bins {equal_edges(low, high)}"
        if all(value % step == 0 for value in values.values()) and 0 < high - low <= 40 * step:
            points = (f"{low + step * k:g}" for k in range(int((high - low) / step) + 1))
            remedy = f"; name the scale, as in --labels {' '.join(points)}"
        problem = f"{said} is not a whole number; a vote is one label{remedy}"
    elif alike:
        other, odd = alike[0]
        remedy = f"with --labels {quoted(sorted({*words} - {word for _, word in alike}))} both count as one"
        problem = f"'{short(odd, 20)}' and '{short(other, 20)}' look alike; {remedy}"
    elif len(words) > 20:
        problem = f"{len(words)} different labels, such as {listed(words[:4])}: is it the right column?"
    elif high - low > 20:
        odd = max(values, key=lambda label: abs(values[label]))
        problem = f"mixed scales? The votes reach from {low:.6g} to {high:.6g}; --labels 1-10 names a scale, "
        problem += f"--bins 0 20 40 60 80 100 makes labels, --no_vote {short(odd, 20)} leaves such votes out"
    if problem:
        raise InputError(f"{votes['at'][odd]}: {problem}")
    return [str(number) for number in range(int(low), int(high) + 1)] if values else sorted(words)
