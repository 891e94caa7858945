"""A table of your own: its columns, its texts and its votes, understood, or refused with the row.

own() is the converter of `python data/prepare.py own`. A cell that can mean several things is never guessed
at: the message names the option that decides. prompts_of() makes the prompts of a table once more, from the
"own" part of the card.json that the converter wrote.
"""

import ast
import bisect
import dataclasses
import datetime
import difflib
import functools
import itertools
import logging
import re
import shlex
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import distjudge
from distjudge import InputError, listed, short

import sources

log = logging.getLogger("distjudge")


# --- prompts ----------------------------------------------------------------------------------------------
def placeholders(template: str) -> list[str]:
    return re.findall(r"\{([^{}\n]+)\}", template)


def fill(template: str, values: dict[str, Any]) -> str:
    """The template with its placeholders replaced, once: braces in a value stay as they are."""
    return re.sub(r"\{([^{}\n]+)\}", lambda m: str(values[m[1]]) if m[1] in values else m[0], template)


def read_template(path: str | Path, needed: list[str], optional: Iterable[str]) -> str:
    """A prompt template. The `needed` placeholders must stand in it once, the `optional` ones may."""
    try:
        template = Path(path).read_text(encoding="utf-8-sig").rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: the template cannot be read: {error}") from None
    known, found = [*needed, *optional], placeholders(template)
    if unknown := [name for name in found if name not in known and re.fullmatch(r"\w+", name)]:
        there = ", ".join(f"{{{short(name)}}}" for name in known)
        raise InputError(f"{path}: unknown placeholder {{{unknown[0]}}}; there are {there}")
    if missing := [name for name in needed if found.count(name) != 1]:
        raise InputError(f"{path}: the placeholder {{{missing[0]}}} must stand in it once")
    return template


def cell(where: str, name: str, value: Any) -> str:
    """A cell as text, "" if it is empty. Raises InputError for bytes, lists, objects and broken text."""
    is_text = not isinstance(value, str) or distjudge.is_text(value)
    if not is_text or isinstance(value, (bytes, bytearray, list, tuple, dict, set)):
        kind = "text or a number" if is_text else "text without lone surrogates"
        raise InputError(f"{where}: {short(name)}: must be {kind}, not {short(repr(value))}")
    return "" if distjudge.is_missing(value) else str(value).strip()


def text_of(where: str, name: str, value: Any) -> str | list[dict[str, str]]:
    """A cell as text, or as messages {"role", "content"}, given as a list or as its JSON."""
    is_json = isinstance(value, str) and re.match(r"\s*\[\s*\{\s*['\"](role|content)", value)
    turns = parsed(value) if is_json else value
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        return cell(where, name, value)
    messages = [{key: turn.get(key) for key in ("role", "content")} for turn in turns]
    said = [text for turn in messages for text in turn.values()]
    if not all(isinstance(text, str) and distjudge.is_text(text) for text in said):
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
    known = {*columns, *([] if text else ["text"])}
    column_of = {name: column for name, column in column_of.items() if column in known}
    other = dict(zip(pair, reversed(pair), strict=True))

    def make(where: str, row: dict[str, Any], about: str | None = None) -> list[str]:
        said = {c: text_of(where, c, row[c]) if c in row else about for c in column_of.values()}
        if any(not value and name not in own["optional"] for name, value in said.items()):
            return []
        if template == "{text}" and isinstance(said[column_of["text"]], list):
            try:
                return [distjudge.prompt_text(said[column_of["text"]])]
            except ValueError as error:
                remedy = "with a --template that has {text}, a conversation is shown as text"
                raise InputError(f"{where}: {short(text)}: {error}; {remedy}") from None
        shown = {column: as_text(value) for column, value in said.items()}
        orders = [{}, other] if pair else [{}]
        return [fill(template, {n: shown[o.get(c, c)] for n, c in column_of.items()}) for o in orders]

    return make


def as_text(said: str | list[dict[str, str]]) -> str:
    """Messages as one text with the speakers' names."""
    if isinstance(said, str):
        return said
    return "\n\n".join(f"{turn['role'].capitalize()}:\n{turn['content'].strip()}" for turn in said)


# --- columns ----------------------------------------------------------------------------------------------
COLUMN_OPTIONS = ("text", "label", "counts", "item", "group", "rater", "optional", "swap")


def conditions(config: Any) -> list[tuple[str, bool, str]]:
    """(column, whether its cells must be the value, value) of --where."""
    found = [re.fullmatch(r"([^=]*?)(!?=)(.*)", text, re.DOTALL) for text in config.where]
    if None in found:
        wrong = config.where[found.index(None)]
        raise InputError(f"where: '{short(wrong)}' is not COLUMN=VALUE or COLUMN!=VALUE")
    return [(sources.tidy(match[1]), match[2] == "=", look(match[3])) for match in found]


def columns_named(config: Any) -> dict[str, tuple[str, ...]]:
    """{option: the columns that it names}"""
    named = {option: getattr(config, option) or () for option in COLUMN_OPTIONS}
    named = {option: (given,) if isinstance(given, str) else given for option, given in named.items()}
    return named | {"swap": config.swap[:2], "where": tuple(column for column, _, _ in conditions(config))}


def resolved(config: Any, path: str, columns: list[str]) -> Any:
    """The options, with the columns as the table names them. Raises InputError if one is wrong or missing."""
    there = f"The columns are {', '.join(short(column, 30) for column in columns)}"
    plainly = {sources.tidy(column): column for column in columns}
    changed: dict[str, Any] = {}
    for option, names in columns_named(config).items():
        found: list[str] = []
        for name in names:
            start = sources.tidy(name[:-1]) if name.endswith("*") else None
            some = [c for c in columns if start is not None and c.startswith(start)]
            if not (some := some or [plainly[key] for key in (sources.tidy(name),) if key in plainly]):
                close = difflib.get_close_matches(name, columns, 1)
                meant = f", did you mean '{short(close[0])}'?" if close else "."
                raise InputError(f"{path}: {option}: no column '{short(name)}'{meant} {there}")
            found += some
        if option != "where" and found:
            is_one = isinstance(getattr(config, option), str)
            changed[option] = found[0] if is_one else (*found, *getattr(config, option)[len(names) :])
    config = dataclasses.replace(config, **changed)
    if twice := [name for name, times in Counter(config.label + config.counts).items() if times > 1]:
        raise InputError(f"{path}: label: column '{short(twice[0])}' is named twice")
    if bool(config.label) == bool(config.counts):
        problem = "name the column with the votes with --label, or columns of counts with --counts, not both"
        raise InputError(f"{path}: label: {problem}. {there}")
    if config.by_column and (config.counts or config.text or config.item):
        raise InputError(f"{path}: by_column: the columns of --label are the items and their texts")
    if config.rater and len(config.label) > 1 and not config.by_column:
        raise InputError(f"{path}: rater: with several columns of votes each column is a person")
    if not config.prompts and not config.text and not config.by_column:
        problem = "name the column with the judged text (--text), or a template of columns (--template)"
        problem += "; if a row is a person and each column of --label an item, add --by_column"
        raise InputError(f"{path}: text: {problem}. {there}")
    if len(config.swap) % 2:
        raise InputError("swap: name two columns, and where needed the labels that trade places, in pairs")
    return config


def template_of(config: Any, path: str, columns: list[str]) -> str:
    """The template of a table's prompts."""
    template = "{text}"
    if config.prompts:
        template = read_template(config.prompts, ["text"] if config.text or config.by_column else [], columns)
    shown = {config.text if name == "text" else name for name in placeholders(template)}
    for option, names in (("optional", config.optional), ("swap", config.swap[:2])):
        if unused := [name for name in names if name not in shown]:
            raise InputError(f"{path}: {option}: the template does not show the column '{short(unused[0])}'")
    return template


# --- cells of votes ---------------------------------------------------------------------------------------
ALIKE = {c: "'" for c in '‘’‚‛“”„‟´`«»‹›"＂＇'} | {c: "-" for c in "‐‑‒–—―−﹣－"}
INVISIBLE = re.compile("[\u00ad\u200b\u200e\u200f\u2060\ufeff]")
NO_VOTE_WORDS = r"""n/a na n.a n-a n\a #n/a #na <na> nan nat null #null! nil none missing empty blank void
- #value! #ref! #div/0! ? ?? ??? . .. ... / _ * unknown unsure undecided undefined skip skipped refused dk idk
unanswered unrated k.a unbekannt ns/nc"""
NO_VOTE_PHRASES = """no vote|no answer|no opinion|no response|not answered|not applicable|not sure|not rated|
not available|none of these|none of the above|none of them|don't know|do not know|dont know|i don't know|
can't tell|cannot tell|can't say|can't decide|cannot decide|prefer not to say|prefer not to answer|
keine angabe|keine antwort|weiß nicht|ne sais pas|sans réponse|no sé"""
CHOSEN = ("choices", "rating", "number", "value", "label", "labels", "answer", "choice", "vote")
SEPARATORS = ("\n", "<br>", ";", "；", "|", ",", "，", "、", "/", "\t", "+", " ")
MONTH = r"(jan|feb|m[aä]r|mrz|apr|ma[iy]|jun|jul|aug|sep|o[ck]t|nov|de[cz])[a-z]*\.?"
DATE = (
    r"\d{1,2}[-. /]+%s([-. /]+\d+)?|%s[-. /]+\d+|\d{4}-\d\d-\d\d.*|\d{1,2}(?P<s>[./])\d{1,2}(?P=s)\d{2,4}\b.*"
)
DATE = re.compile(DATE.replace("%s", MONTH), re.I)
MARKS = dict.fromkeys(("true", "x", "✓", "✔", "☑", "yes", "checked", "selected", "on"), "1")
MARKS |= dict.fromkeys(("false", "no", "unchecked", "not selected", "off", "☐", ""), "0")
PEOPLE = re.compile(
    r"(.*[._ ])?(rater|annotator|worker|user|judge|coder|participant|who)([._ ]?(id|name))?", re.I
)
REFUSED = re.compile(r".*(rejected|discarded|cancell?ed|invalid).*", re.I)


@functools.lru_cache(10_000)
def look(text: str) -> str:
    """What a label looks like: case, quotes, dashes, spaces, unseen signs, a last full stop do not count."""
    seen = unicodedata.normalize("NFC", text).casefold().translate(str.maketrans(ALIKE))
    seen = "".join(c for c in seen if unicodedata.category(c) != "Cf" and not "\ufe00" <= c <= "\ufe0f")
    seen = unicodedata.normalize("NFC", " ".join(seen.split()))
    return re.sub("^-+$", "-", seen.rstrip(".。．") or seen)


NO_VOTE = {look(word) for word in [*NO_VOTE_WORDS.split(), *NO_VOTE_PHRASES.split("|")]}


def plain(text: str) -> str:
    """A label without unseen signs and odd spaces; numbers in digits: "4.0" and "+4" are 4, "2.50" is 2.5."""
    text = unicodedata.normalize("NFC", " ".join(INVISIBLE.sub("", text).split()))
    number = re.fullmatch(r"([+-]?)(\d{0,300})(?:\.(\d{0,300}))?", text.replace("\u2212", "-"))
    if not number or not (number[2] or number[3]):
        return text
    whole, part = str(int(number[2] or 0)), (number[3] or "").rstrip("0")
    sign = "-" if number[1] == "-" and (part or whole != "0") else ""
    return sign + whole + (f".{part}" if part else "")


def is_number(label: str) -> bool:
    return re.fullmatch(r"-?\d{1,300}(\.\d{1,300})?", label) is not None


def parsed(text: str) -> Any:
    """What a cell of JSON or Python's lists and dicts says; the text itself if it is neither.

    Raises ValueError for what looks like a list and cannot be read.
    """
    inner = re.sub(r"^(?:Counter|array)\((.*?)(?:, dtype=\w+)?\)$", r"\1", text.strip(), flags=re.DOTALL)
    if inner[:1] + inner[-1:] not in ("[]", "{}", "()") and inner[:1] != "{":
        return text
    value, problem = distjudge.load_json(inner)
    if not problem:
        return value
    if "stands twice" in problem:
        raise ValueError(problem.removeprefix("broken JSON: ").replace("an object", "it"))
    if re.fullmatch(r"\[[\d\s.+-]+\]", inner) and re.search(r"\d\s+\d", inner):  # NumPy's way to write
        return inner.strip("[]").split()
    try:
        if re.search(r"['\"]\s+['\"]", inner):  # words without commas between, which Python would join
            raise ValueError
        value = ast.literal_eval(re.sub(r"(?<=[\[,(:\s])(nan|null|NaN)(?=\s*[,\])}])", "None", inner))
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        if re.search(r"['\":]|\d\s*,", inner) or inner[:2] in ("[[", "{{"):
            raise ValueError("is neither JSON nor a list or dict of Python") from None
        return text
    return value if isinstance(value, (list, dict, tuple, set)) else text


def people_in(where: str, column: str, value: Any) -> list[tuple[str, ...]]:
    """What each person chose, of a cell of votes: mostly one person, one text. Of a list, each entry's."""
    try:
        value = parsed(value) if isinstance(value, str) and value[-1:] in ("]", "}", ")") else value
    except ValueError as error:
        raise InputError(f"{where}: {short(column)}: {short(repr(value))} {error}") from None
    if isinstance(value, str):
        return [(cell(where, column, value),)]
    value = value.tolist() if hasattr(value, "tolist") else value
    people = value if isinstance(value, (list, tuple)) else [value]
    return [tuple(choices_in(where, column, one)) for one in people]


def choices_in(where: str, column: str, value: Any) -> list[str]:
    """The texts that one person chose."""
    if isinstance(value, (list, tuple)):
        return [choice for one in value for choice in choices_in(where, column, one)]
    if isinstance(value, datetime.date):
        raise InputError(f"{where}: {short(column)}: {a_date(value)}")
    if not isinstance(value, dict):
        return [cell(where, column, value)]
    keys = [key for key in CHOSEN if key in value]
    if len(keys) != 1:
        problem = f"{short(repr(value))} is an object, not a vote; --counts reads {{label: votes}}"
        raise InputError(f"{where}: {short(column)}: {problem}")
    return choices_in(where, column, value[keys[0]])


def a_date(value: Any) -> str:
    problem = f"'{short(value, 30)}' is a date; spreadsheets make dates of cells such as 3-4 or 1/2"
    return f"{problem}: format the column as text and enter the votes again"


def counts_in(config: Any, where: str, row: dict[str, Any]) -> dict[str, int]:
    """{label: votes} of the columns of counts of a row."""
    given: Any = {column: row[column] for column in config.counts}
    if len(config.counts) == 1:
        name, given = config.counts[0], row[config.counts[0]]
        form = 'must be an object such as {"1": 0, "2": 3}'
        try:
            given = parsed(given) if isinstance(given, str) else given
        except ValueError as error:
            raise InputError(f"{where}: {short(name)}: {form}; {short(repr(given))} {error}") from None
        if not isinstance(given, dict):
            raise InputError(f"{where}: {short(name)}: {form}, not {short(repr(given))}")
    found: Counter = Counter()
    for label, number in given.items():
        text = "" if distjudge.is_missing(number) else look(str(number))
        text = re.sub(r"(?<=\d)[,' ](?=\d{3}(\D|$))", "", text)  # thousands
        text = MARKS.get(text, plain(text))
        if not re.fullmatch(r"[0-9]{1,300}", text) or re.fullmatch(r"\d+(\.\d{3})+", str(number).strip()):
            problem = f"a number of votes is needed, not '{short(number, 30)}'"
            raise InputError(f"{where}: {short(label)}: {problem}")
        if int(text) > 10**9:
            problem = f"more than a billion votes for '{short(label, 30)}'"
            raise InputError(f"{where}: {' '.join(map(short, config.counts))}: {problem}")
        found[cell(where, "label", label)] += int(text)
    return found


# --- from a table to items --------------------------------------------------------------------------------
@dataclasses.dataclass
class Panel:
    """The votes on one item. people: {choices: how many people made them}; named: {person: their choices}."""

    prompts: list[str]
    group: str
    where: str
    people: Counter = dataclasses.field(default_factory=Counter)
    named: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    rows: int = 0
    list_at: str = ""


def own(config: Any, out: Any) -> None:
    """A row a vote, a row an item (several columns, or counts), or a row a person (--by_column): items."""
    if not config.raw:
        raise InputError(
            "raw: name your table: CSV, Excel, Parquet, .json, .jsonl or a Hugging Face data set"
        )
    first: dict[str, str] = {}  # a text in a cell of votes: where it stands first
    panels: dict[str, Panel] = {}
    wanted = [name for names in columns_named(config).values() for name in names if not name.endswith("*")]
    for path in config.raw:
        columns, rows = sources.read_table(path, config.hub_split, config.sheet, wanted)
        given = resolved(config, path, columns)
        out.own = {"template": template_of(given, path, columns), "text": given.text, "item": given.item}
        out.own |= {"optional": list(given.optional), "swap": list(given.swap[:2]) or None}
        read_panels(given, out, rows, columns, panels, first)
    texts: Counter = Counter()
    for chosen, number in ((c, n) for panel in panels.values() for c, n in panel.people.items()):
        texts.update({text: number * chosen.count(text) for text in chosen})
    out.labels, meaning = understand(given, texts, first, out.notes)
    traded = traded_labels(given.swap, out.labels) if given.swap and first else {}
    out.own["swap_labels"] = traded or None
    for number, (key, panel) in enumerate(panels.items(), 1):
        labels = {chosen: [label for text in chosen for label in meaning[text]] for chosen in panel.people}
        if panel.list_at and panel.rows > 1 and config.multi != "split":
            problem = "a person's cell holds several labels; --multi split counts each as a vote"
            raise InputError(f"{panel.list_at}: {problem}")
        counts = dict.fromkeys(out.labels, 0)
        for chosen, people in panel.people.items():
            for label in labels[chosen]:
                counts[label] += people
        out.read["votes"] += sum(counts.values())
        name = key if config.item or config.by_column else str(number)
        swap = {"prompt": panel.prompts[1], "labels": traded} if traded else None
        said = {person: labels[chosen] for person, chosen in panel.named.items()}
        said = {person: several[0] if len(several) == 1 else several for person, several in said.items()}
        out.add_item(name, panel.prompts[0], counts, group=panel.group, swap=swap, annotators=said)
    say_doubts(config, out, panels)


def read_panels(config: Any, out: Any, rows: Iterable, columns: list[str], panels: dict, first: dict) -> None:
    """Adds the rows of a table to the panels; counts what is left out."""
    make, by_vote = prompts_of(out.own, columns), len(config.label) == 1 or config.by_column
    items = [(c, (c,)) for c in config.label] if config.by_column else [(None, config.label)]
    no_vote, asked = {look(plain(word)) for word in config.no_vote}, conditions(config)
    states = {c for c in columns if c.lower().endswith("status")} - {c for c, _, _ in asked}
    persons = [
        c for c in columns if PEOPLE.fullmatch(c) and by_vote and not (config.rater or config.by_column)
    ]
    votes_of: Counter = Counter()
    for where, row in rows:
        out.read["rows"] += 1
        fits: dict[str, bool] = {}  # of several wanted values of a column any does
        for c, wanted, value in asked:
            is_it = look(plain(cell(where, c, row[c]))) == look(plain(value))
            fits[c] = fits.get(c, False) or is_it if wanted else fits.get(c, True) and not is_it
        if not all(fits.values()):
            out.dropped["row left out by --where"] += 1
            continue
        for c in states:
            out.doubts[c, short(row[c], 30)] += REFUSED.fullmatch(str(row[c])) is not None
        group = cell(where, config.group, row[config.group]) if config.group else ""
        for text, vote_columns in items:
            if not (prompts := make(where, row, text)):
                out.dropped["row without text"] += 1
                continue
            key = text or (cell(where, config.item, row[config.item]) if config.item else "")
            if config.item and not key:
                raise InputError(f"{where}: {config.item}: empty, so the vote belongs to no item")
            key = key or (prompts[0] if by_vote else where)
            panel = panels.get(key) or panels.setdefault(key, Panel(prompts, group, where))
            differs = "text" if panel.prompts != prompts else "group" if panel.group != group else ""
            if differs:
                problem = f"its {differs} differs from that at {panel.where}"
                raise InputError(f"{where}: item '{short(key)}': {problem}")
            if panel.rows and not by_vote and not config.counts:
                problem = f"stands twice, first at {panel.where}; with columns of votes a row is an item"
                raise InputError(f"{where}: item '{short(key)}': {problem}")
            panel.rows += 1
            votes_of.update((key, c, str(row[c])) for c in persons)
            for column, person, chosen, number in votes_in(config, where, row, vote_columns, panel):
                said = chosen
                if no_vote or "" in chosen or not chosen:
                    said = tuple(text for text in chosen if text and look(plain(text)) not in no_vote)
                    out.dropped["cell named by --no_vote"] += sum(map(bool, chosen)) - len(said)
                    out.dropped["empty cell"] += not any(chosen)
                if len(said) > 1:
                    panel.list_at, panel.rows = panel.list_at or f"{where}: {short(column)}", 2
                for text in said:
                    if text not in first:
                        first[text] = f"{where}: {short(column)}"
                if said and person and person in panel.named:
                    kind = "" if panel.named[person] == said else ", with another label: the first counts"
                    out.dropped[f"second vote of a person on an item{kind}"] += 1
                elif said:
                    panel.people[said] += number
                    panel.named |= {person: said} if person else {}
    for column in persons:
        if again := sum(number - 1 for (_, c, _), number in votes_of.items() if c == column):
            text = (
                "%d votes are a person's second on an item, by column '%s'; --rater %s counts a person once"
            )
            log.warning(text, again, short(column), shlex.quote(short(column)))


def votes_in(
    config: Any, where: str, row: dict[str, Any], columns: Iterable[str], panel: Panel
) -> Iterator[tuple[str, str, tuple[str, ...], int]]:
    """(column, person or "", what they chose, how many people did) of a row."""
    names = row[config.rater] if config.rater else ""
    if config.counts:
        what, counts = " ".join(config.counts), counts_in(config, where, row)
        if name := cell(where, config.rater or "", names):
            yield what, name, tuple(Counter(counts).elements()), 1
        else:
            yield from ((what, "", (label,), number) for label, number in counts.items())
        return
    for column in columns:
        people = people_in(where, column, row[column])
        if isinstance(names, (list, tuple)):
            if len(names) != len(people):
                raise InputError(f"{where}: {config.rater}: {len(names)} names for {len(people)} votes")
            for name, chosen in zip(names, people, strict=True):
                yield column, cell(where, config.rater, name), chosen, 1
        elif config.rater:  # a list is what this person chose
            yield column, cell(where, config.rater, names), tuple(itertools.chain.from_iterable(people)), 1
        else:
            panel.list_at = panel.list_at or (f"{where}: {short(column)}" if len(people) > 1 else "")
            yield from ((column, "", chosen, 1) for chosen in people or [()])


def say_doubts(config: Any, out: Any, panels: dict[str, Panel]) -> None:
    """Warns of what may not be meant."""
    for (column, value), number in out.doubts.items():
        if number:
            option = shlex.quote(f"{short(column)}!={value}")
            log.warning("%d rows count whose %s is '%s'; --where %s", number, short(column), value, option)
    rows, empty = out.read["rows"], out.dropped["row without text"]
    if empty > 0.05 * rows:
        text = "%d of %d rows are left out, as a text in them is empty; --optional COLUMN allows that"
        log.warning(text, empty, rows)
    same: dict[str, str] = {}
    twins = [(same.setdefault(panel.prompts[0], key), key) for key, panel in panels.items()]
    if twins := [pair for pair in twins if pair[0] != pair[1]]:
        remedy = "" if config.item else "; --item COLUMN tells items apart, and adds rows of counts up"
        text = "%d of %d items have the prompt of another item, such as '%s' and '%s'%s"
        log.warning(text, len(twins), len(panels), *map(short, twins[0]), remedy)
    if out.rows and all(sum(row["counts"].values()) < 2 for row in out.rows):
        log.warning("every item has one vote only: nothing shows how far people disagree on one item")


def traded_labels(swap: tuple[str, ...], order: list[str]) -> dict[str, str]:
    """{label: label in the other order} of a pair of columns; swap[2:] names two labels, else names tell."""
    if unknown := [label for label in swap[2:] if label not in order]:
        raise InputError(f"swap: '{short(unknown[0])}' is not one of {listed(order)}")
    if (
        not swap[2:]
        and distjudge.are_numeric(order)
        and [plain(f"-{label}") for label in order] == order[::-1]
    ):
        return dict(zip(order, order[::-1], strict=True))
    wanted = [tuple(map(look, swap[:2])), apart(*swap[:2])]
    every = list(itertools.permutations(order, 2))
    pairs = list(zip(swap[2::2], swap[3::2], strict=True))
    is_named = bool(pairs)
    pairs = pairs or [pair for pair in every if tuple(map(look, pair)) in wanted]
    pairs = pairs or [pair for pair in every if apart(*pair) in wanted]
    traded = dict(pairs) | {other: one for one, other in pairs}
    # one label may be its own mirror, a tie; of two or more nobody can tell
    if (len(pairs) != 1 and not is_named) or len(set(order) - set(traded)) > 1:
        mirrored = [pair for pair in zip(order, order[::-1], strict=True)][: (len(order) + 1) // 2]
        example = " ".join(map(shlex.quote, (*swap[:2], *itertools.chain(*mirrored))))
        problem = f"which of the labels {listed(order)} trade places cannot be told; name them in pairs, "
        problem += "one that stays with itself"
        raise InputError(f"swap: {problem}, as in --swap {example}")
    return traded


def apart(one: str, other: str) -> tuple[str, str]:
    """Where two names differ: ("a", "b") of "answer_a" and "answer_b"."""
    one, other = look(one), look(other)
    start = distjudge.common_length(one, other)
    end = distjudge.common_length(one[start:][::-1], other[start:][::-1])
    return one[start : len(one) - end], other[start : len(other) - end]


# --- what votes say ---------------------------------------------------------------------------------------
def understand(
    config: Any, texts: Counter, first: dict[str, str], notes: list[str]
) -> tuple[list[str], dict[str, tuple[str, ...]]]:
    """The labels in order, and {text of a cell: its labels}. Raises InputError, with the row, if in doubt."""
    order = named_labels(config.labels)
    if len(config.counts) > 1 and not order:
        order = [plain(column) for column in config.counts]
    said = {text: label_in(config, text) for text in {**first, **texts}}
    if config.bins:
        return binned(config, order, said, first, notes)
    known = {look(label): label for label in order}
    if len(config.counts) > 1:  # "rate:::1" is 1, where that is a label
        ends = {t: [k for k in known if re.search(rf"(\W|_){re.escape(k)}$", look(t))] for t in said}
        said |= {t: max(keys, key=len) for t, keys in ends.items() if keys and look(said[t]) not in known}
    alone = {look(label) for label in said.values()}
    times = Counter(part for label in said.values() for part in set(map(look, parts_of(label))))
    meaning: dict[str, tuple[str, ...]] = {}
    for text, label in said.items():
        doubtless = look(label) in known or look(label) in NO_VOTE or DATE.fullmatch(label)
        parts = [] if doubtless else parts_of(label)
        seen = [look(part) for part in parts]
        decimal = known.get(look(plain(label.replace(",", ".")))) if "," in label else None
        if len(parts) == 1:  # "red;", as Microsoft Forms writes it
            joined = True
        elif order:
            joined = bool(parts) and all(part in known for part in seen)
        else:
            joined = bool(parts) and (all(map(is_number, parts)) or any(part in alone for part in seen))
            joined = joined or (bool(parts) and all(times[part] > 1 for part in seen))
        if joined and len(parts) > 1 and config.multi != "split":
            problem = "holds several labels: --multi split counts each as a vote"
            if re.fullmatch(r"[+-]?\d+,\d+", label):
                problem = "may be several votes (--multi split) or have a decimal comma (--decimal comma)"
            raise InputError(f"{first[text]}: '{short(text)}' {problem}")
        labels = parts if joined else [decimal or label]
        meaning[text] = tuple(known.get(look(label), label) for label in labels)
        if order and meaning[text][0] not in order:
            problem = f"'{short(text, 30)}' is not one of {listed(order)}"
            if words := [word for word in said if look(word) in NO_VOTE and look(said[word]) not in known]:
                problem += f"; --no_vote {quoted(words)} leaves such cells out"
            raise InputError(f"{first[text]}: {problem}")
    votes: Counter = Counter()
    found: dict[str, str] = {}  # a label: where it stands first
    for text, labels in meaning.items():
        for label in labels:
            votes[label] += texts[text]
            found.setdefault(label, first.get(text, ""))
    order = order or found_labels(votes, found)
    what = " ".join(map(short, config.label or config.counts))
    if found and len(order) < 2:
        raise InputError(f"{what}: only the label {listed(order)} occurs; name them all with --labels")
    if changed := [text for text, labels in meaning.items() if labels != (text,) and texts[text]]:
        some = ", ".join(
            f"'{short(text, 20)}' as {short(' '.join(meaning[text]), 20)}" for text in changed[:5]
        )
        number = sum(texts[text] for text in changed)
        notes.append(f"cells that do not say their label to the letter: {number:,}, such as {some}")
    if doubtful := [
        label for label in order if look(label) in NO_VOTE and not (config.labels or config.counts)
    ]:
        some = ", ".join(f"'{short(label, 20)}' ({votes[label]:,})" for label in doubtful)
        text = "labels that read like no vote are counted as labels: %s; --no_vote %s leaves them out"
        log.warning(text, some, quoted(doubtful))
    if distjudge.are_numeric(order) and found and not (config.labels or config.counts):
        if unchosen := [label for label in order if not votes[label]]:
            notes.append(f"labels that nobody chose, within the scale: {', '.join(unchosen)}")
        notes.append(
            f"the scale was found in the votes: {order[0]} to {order[-1]}; --labels names a wider one"
        )
    return order, meaning


def quoted(words: Iterable[str]) -> str:
    """Words for a command line, at most twenty."""
    kinds = {look(word): "-" if look(word) == "-" else short(word) for word in words}
    return " ".join(map(shlex.quote, list(kinds.values())[:20]))


def label_in(config: Any, text: str) -> str:
    """A label in its plain form; percents, and decimal commas where the user says so, as numbers."""
    if config.decimal == "comma" and re.fullmatch(r"[+\-\u2212]?(\d+|\d{1,3}(\.\d{3})+)(,\d+)?", text):
        text = text.replace(".", "").replace(",", ".")
    return plain(text)


def parts_of(text: str) -> list[str]:
    """The labels that a cell may hold, by the first separator in it; [] of a cell with one label."""
    for mark in SEPARATORS:
        parts = [plain(part) for part in text.split(mark) if part.strip()] if mark in text else []
        if len(parts) > 1 or (parts and mark in "\n;；|"):
            return parts if mark != " " or all(map(is_number, parts)) else []
    return []


def binned(
    config: Any, names: list[str], said: dict[str, str], first: dict[str, str], notes: list[str]
) -> tuple[list[str], dict[str, tuple[str, ...]]]:
    """Numbers as the bins they fall in: each from its lower edge up to the upper one, the last with it."""
    numbers = {text: plain(label.rstrip(" %")) for text, label in said.items()}
    numbers = {text: float(number) for text, number in numbers.items() if is_number(number)}
    edges = [float(edge) for edge in config.bins if is_number(plain(edge))]
    if len(edges) < max(3, len(config.bins)) or edges != sorted(set(edges)):
        example = equal_edges(numbers.values() or (0, 100))
        raise InputError(f"bins: name three edges or more, from low to high, as in --bins {example}")
    names = names or [str(number) for number in range(1, len(edges))]
    if len(names) != len(edges) - 1:
        raise InputError(f"bins: {len(names)} --labels for {len(edges) - 1} bins")
    for text in said:
        if text not in numbers or not edges[0] <= numbers[text] <= edges[-1]:
            problem = f"'{short(text, 30)}' is no number from {edges[0]:g} to {edges[-1]:g}"
            raise InputError(f"{first[text]}: {problem}; if it is no vote, --no_vote {quoted([text])}")
    places = {
        text: min(bisect.bisect_right(edges, number), len(names)) - 1 for text, number in numbers.items()
    }
    bins = (
        f"{name} is {low:g} to {high:g}" for name, low, high in zip(names, edges, edges[1:], strict=False)
    )
    notes.append(f"bins, an edge being the upper bin's: {', '.join(bins)}")
    return names, {text: (names[place],) for text, place in places.items()}


def equal_edges(numbers: Iterable[float]) -> str:
    low, high = min(numbers), max(numbers)
    return " ".join(f"{low + (high - low) * k / 5:g}" for k in range(6))


def named_labels(labels: Iterable[str]) -> list[str]:
    """("1-5",) or ("-3..3",) -> every whole number of the range; other names as they are."""
    out: list[str] = []
    for label in labels:
        ends = re.fullmatch(r"([+-]?\d{1,300})(?:\.\.|-)([+-]?\d{1,300})", label.strip())
        if ends and not int(ends[1]) < int(ends[2]) <= int(ends[1]) + 100:
            raise InputError(f"labels: '{label}' is not a range from low to high")
        out += map(str, range(int(ends[1]), int(ends[2]) + 1)) if ends else [plain(label)]
    if "" in out:
        raise InputError(f"labels: {listed(out)} names an empty label")
    if len(set(map(look, out))) < len(out):
        raise InputError(f"labels: {listed(out)} names a label twice (capitals are ignored)")
    return out


def found_labels(votes: Counter, first: dict[str, str]) -> list[str]:
    """The labels that occur (label: where it stands first), in order; InputError if they are no one scale."""
    words = [label for label in first if not distjudge.are_numeric([label])]
    whole = [label for label in first if re.fullmatch(r"-?\d{1,300}", label)]
    parts = [label for label in first if label not in whole and label not in words]
    low, high = min(map(int, whole), default=0), max(map(int, whole), default=0)
    shown = {label: f"'{short(label, 20)}'" for label in first}
    pairs = itertools.combinations(words[:200], 2)
    twins = next(((odd, other) for other, odd in pairs if look(odd) == look(other)), None)
    percents = [label for label in words if re.fullmatch(r"\d+([.,]\d+)? ?%", label)]
    problem = ""
    if dates := [label for label in words if DATE.fullmatch(label)]:
        odd, problem = dates[0], a_date(dates[0])
    elif percents:
        odd, problem = percents[0], f"{shown[percents[0]]} is a share; bins make labels of shares written as"
        problem += " percents or from 0 to 100, as in --bins 0 20 40 60 80 100"
    elif (whole or parts) and words:
        odd, number = words[0], (whole or parts)[0]
        problem = f"mixed scales: {shown[odd]} among numbers such as {shown[number]}"
        problem += f" ({first[number].rpartition(': ')[0]}); if such words are no vote, "
        problem += f"--no_vote {quoted(words)} leaves them out; else clean the column"
    elif parts:
        odd, problem = parts[0], f"{shown[parts[0]]} is not a whole number; a vote is one label"
        numbers = sorted(map(float, first))
        step = 0.5 if all(number % 0.5 == 0 for number in numbers) else 0.25
        points = [numbers[0] + step * k for k in range(min(100, int((numbers[-1] - numbers[0]) / step)) + 1)]
        if set(numbers) <= set(points) and len(points) <= 41:
            problem += f"; half points are named, as in --labels {' '.join(f'{point:g}' for point in points)}"
        else:
            problem += f" (is this column a mean?); bins make labels, as in --bins {equal_edges(numbers)}"
    elif twins:
        odd, other = twins
        problem = "differ only in capitals" if odd.casefold() == other.casefold() else "look alike"
        kept = {
            look(word): word for word in sorted(words, key=lambda w: (votes[w], -len(w)))
        }  # the commonest
        kept |= {look(word): word.casefold() for word in twins if odd.casefold() == other.casefold()}
        problem = (
            f"{shown[odd]} and {shown[other]} {problem}; with --labels {quoted(sorted(kept.values()))} both"
        )
        problem += " count as one"
    elif len(words) > 20:
        odd, problem = words[20], f"{len(words)} different labels, such as {listed(words[:4])}"
        problem += ": is it the right column?"
    elif high - low > 20:
        odd = max(whole, key=lambda label: abs(int(label)))
        problem = f"mixed scales? The votes reach from {short(low)} to {short(high)}; name the scale, as in "
        problem += (
            "--labels 1-10, put it into bins, as in --bins 0 20 40 60 80 100, or name what is no vote, "
        )
        problem += f"as in --no_vote {short(odd, 20)}"
    if problem:
        raise InputError(f"{first[odd]}: {problem}")
    return [str(number) for number in range(low, high + 1)] if whole else sorted(words)
