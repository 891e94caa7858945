"""Convert a public data set of human judgments, or a table of your own, into items with prompts.

    python data/prepare.py snli --out votes/snli                        # fetches it; or --raw snli_1.0.zip
    python data/prepare.py summeval --votes experts --dimension coherence --out votes/coherence
    python data/prepare.py mnli --without votes/chaosnli/items.jsonl --out votes/mnli    # no test items
    python data/prepare.py own --raw votes.csv --text answer --label rating --item id --out votes/own

snli, mnli, chaosnli, summeval, mtbench, helpsteer2, helpsteer2_pref and emobank are public data sets, own is
your table. Writes train.jsonl and test.jsonl (emobank: and valid.jsonl; --split none: items.jsonl) and
card.json into --out: what was read, kept and left out, and the licence. data/README.md tells of each.
"""

import dataclasses
import difflib
import json
import logging
import re
import sys
from collections import Counter, defaultdict, namedtuple
from collections.abc import Iterable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import sources
import tyro

import distjudge
from distjudge import InputError, listed, short

PROMPTS = Path(__file__).with_name("prompts")
log = logging.getLogger("distjudge")
NLI = ["entailment", "neutral", "contradiction"]
PAIR = ["a", "b", "tie"]
RATING = list("12345")
QUALITIES = {  # what is rated, as the prompt states it; of emobank, the ends of the scale
    "summeval": {
        "coherence": "coherence, whether the sentences fit together and build on one another",
        "consistency": "consistency, whether the article supports every statement of the summary",
        "fluency": "fluency, whether each sentence by itself is grammatical and easy to read",
        "relevance": "relevance, whether the summary holds what is important in the article and nothing else",
    },
    "helpsteer2": {
        "helpfulness": "helpfulness, how much the reply helps with what the user wants",
        "correctness": "correctness, whether it has all the facts that belong to it, and none that is wrong",
        "coherence": "coherence, how clear it is and how consistent with itself",
        "complexity": "complexity, how much expertise it takes to write it "
        "(1: anyone could, 5: an expert of the field)",
        "verbosity": "verbosity, how much detail it gives for what was asked (1: very terse, 5: very long)",
    },
    "emobank": {
        "valence": ("very unpleasant", "very pleasant"),
        "arousal": ("very calm", "very excited"),
        "dominance": ("no control at all", "full control"),
    },
}

TASK_NAMES = ("snli", "mnli", "chaosnli", "summeval", "mtbench", "helpsteer2", "helpsteer2_pref", "emobank")


@dataclasses.dataclass
class PrepareConfig:
    task: tyro.conf.Positional[Literal[(*TASK_NAMES, "own")]]
    """The data set."""
    out: str
    """The folder for the items and card.json; files in it are replaced."""
    raw: tuple[str, ...] = ()
    """Its files, in any order, plain, .gz or .zip. Default: they are fetched, see DISTJUDGE_CACHE."""
    prompts: Annotated[str | None, tyro.conf.arg(aliases=["--template"])] = None
    """Your template, with the placeholders of the one in data/prompts/; own: any {column} of the table."""
    split: Literal["", "group", "random", "published", "none"] = ""
    """8:2 by group (premise, article, question), 8:2 at random as in the paper (a group on both sides), as
    published, or one file, items.jsonl. Default: group; emobank: published."""
    seed: int = 0
    """Seed of the split."""
    min_votes: int | None = None
    """Leave out items with fewer votes. Default: 2 for snli and mnli, else 1."""
    without: tuple[str, ...] = ()
    """Files of items, test sets: leave out what shares a prompt, a group or an id with them."""

    votes: Literal["both", "experts", "crowd"] = "both"
    """summeval: whose ratings."""
    dimension: tuple[str, ...] = ()
    """summeval, helpsteer2: which qualities, by default all, each an item of its own; emobank: valence (the
    default), arousal or dominance."""
    drop_first_label: bool = False
    """snli, mnli: leave out the first label of an item, which is that of the writer of the hypothesis."""

    text: str | None = None
    """own: the column with the judged text: {text} in the template; without a template the whole prompt."""
    label: tuple[str, ...] = ()
    """own: the column with the votes; or several, each one person's votes."""
    counts: tuple[str, ...] = ()
    """own, instead of label: one column of {label: votes} as JSON, or several, one a label, of numbers."""
    item: str | None = None
    """own: the column that tells items apart. Default: the prompt; with columns of votes, the row."""
    group: str | None = None
    """own: the column of the group, whose items never end up on both sides of the split."""
    labels: tuple[str, ...] = ()
    """own: all labels, in order, or a range such as 1-5 or -3..3; capitals do not count. Default: found."""
    hub_split: str = "train"
    """own: which split of a Hugging Face data set."""


# --- what all converters share ---------------------------------------------------------------------------
@dataclasses.dataclass
class Converted:
    """What a converter makes: rows of the item format, and what the card says of them."""

    labels: list[str]
    template: str
    dimension: list[str] = dataclasses.field(default_factory=list)
    rows: list[dict] = dataclasses.field(default_factory=list)
    read: Counter = dataclasses.field(default_factory=Counter)
    dropped: Counter = dataclasses.field(default_factory=lambda: Counter({"no text": 0, "no votes": 0}))
    notes: list[str] = dataclasses.field(default_factory=list)
    ids: Counter = dataclasses.field(default_factory=Counter)

    def add(self, name: str, values: dict[str, str], votes: Any, **more: str | None) -> None:
        """Adds an item, or counts it as dropped: the template's values, and labels or {label: number}.

        An id that comes again gets -2, -3, ... A pair is written in both orders. more: "group", "published".
        """
        if not all(text.strip() for text in values.values()):
            self.dropped["no text"] += 1
            return
        votes = votes if isinstance(votes, dict) else Counter(votes)
        counts = {label: votes.get(label, 0) for label in self.labels}
        if not any(counts.values()):
            self.dropped["no votes"] += 1
            return
        self.ids[name] += 1
        name = f"{name}-{self.ids[name]}" if self.ids[name] > 1 else name
        row = {"id": name, "prompt": fill(self.template, values), "counts": counts}
        if "answer_b" in values:
            turned = values | {"answer_a": values["answer_b"], "answer_b": values["answer_a"]}
            row["swap"] = {"prompt": fill(self.template, turned), "labels": {"a": "b", "b": "a"}}
        self.rows.append(row | {key: value for key, value in more.items() if value})


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
        there = ", ".join(f"{{{name}}}" for name in known)
        raise InputError(f"{path}: unknown placeholder {{{unknown[0]}}}; there are {there}")
    if missing := [name for name in needed if found.count(name) != 1]:
        raise InputError(f"{path}: the placeholder {{{missing[0]}}} must stand in it once")
    return template


def task_template(task: str, own_file: str | None) -> tuple[Path, str]:
    """File and text of a public data set's prompt. Your own file needs the placeholders of ours."""
    ours = PROMPTS / f"{'snli' if task in ('mnli', 'chaosnli') else task}.txt"
    names = placeholders(ours.read_text(encoding="utf-8"))
    optional = [name for name in names if name in ("dimension", "low", "high")]
    path = Path(own_file) if own_file else ours
    return path, read_template(path, [name for name in names if name not in optional], optional)


def text_key(kind: str, text: str) -> str:
    """The group of all items with this premise, article or question, alike in every data set."""
    plain = " ".join(text.split()).encode("utf-8", "surrogatepass")
    return f"{kind} {sha256(plain).hexdigest()[:16]}"


def field(where: str, row: dict[str, Any], *names: str, kind: type = str) -> Any:
    """row[name] for the first name that is there. Raises InputError if none is, or not of the kind."""
    for name in names:
        if name in row:
            if not isinstance(row[name], kind) or isinstance(row[name], bool):
                raise InputError(f"{where}: {name}: must be {kind.__name__}, not {short(repr(row[name]))}")
            if isinstance(row[name], str) and not distjudge.is_text(row[name]):
                raise InputError(f"{where}: {name}: holds a lone surrogate, which is no character")
            return row[name]
    raise InputError(f"{where}: {names[0]}: missing; the row has {', '.join(sorted(row)[:12])}")


def texts_of(where: str, row: dict[str, Any], name: str) -> list[str]:
    texts = field(where, row, name, kind=list)
    for text in texts:
        if not isinstance(text, str) or not distjudge.is_text(text):
            raise InputError(f"{where}: {name}: must be a list of texts, not of {short(repr(text))}")
    return texts


def check_known(where: str, name: str, values: Iterable[Any], known: Iterable[Any], said: str) -> None:
    """Raises InputError for the first value that is not one of the known, which are `said` in words."""
    for value in values:
        if isinstance(value, bool) or value not in list(known):
            raise InputError(f"{where}: {name}: {short(repr(value))} is not {said}")


def chosen_dimensions(config: PrepareConfig) -> list[str]:
    known = list(QUALITIES.get(config.task, ()))
    if wrong := [name for name in config.dimension if known and name not in known]:
        raise InputError(f"dimension: '{short(wrong[0])}' is not one of {', '.join(known)}")
    if config.task == "emobank" and len(config.dimension) > 1:
        raise InputError(f"dimension: emobank takes one, not {' '.join(config.dimension)}")
    return list(dict.fromkeys(config.dimension)) or known[: 1 if config.task == "emobank" else None]


# --- converters of public data sets -----------------------------------------------------------------------
def nli(config: PrepareConfig, out: Converted) -> None:
    """SNLI, MNLI and files like them: {sentence1 or premise, sentence2 or hypothesis, annotator_labels}."""
    for where, row in sources.read_rows(config.raw):
        premise = field(where, row, "sentence1", "premise")
        hypothesis = field(where, row, "sentence2", "hypothesis")
        votes = field(where, row, "annotator_labels", kind=list)
        without_gold = row.get("gold_label", row.get("label")) in ("-", None)
        out.read.update({"rows": 1, "votes": len(votes), "gold label '-', votes kept": without_gold})
        votes = [vote for vote in votes[config.drop_first_label :] if vote]
        if wrong := [str(vote) for vote in votes if vote not in NLI]:
            problem = f"unknown label {listed(wrong[:5])}; the labels are {listed(NLI)}"
            raise InputError(f"{where}: annotator_labels: {problem}")
        values = {"premise": premise, "hypothesis": "" if hypothesis.strip().lower() == "n/a" else hypothesis}
        out.add(str(field(where, row, "pairID")), values, votes, group=text_key("premise", premise))
    left_out = "; left out" if config.drop_first_label else ""
    out.notes = [f"the first label of an item is that of the hypothesis's writer{left_out}"]


def chaosnli(config: PrepareConfig, out: Converted) -> None:
    letters = {"e": "entailment", "n": "neutral", "c": "contradiction"}
    out.dropped["abductive (alphaNLI)"] = 0
    for where, row in sources.read_rows(config.raw):
        texts, votes = (field(where, row, name, kind=dict) for name in ("example", "label_counter"))
        out.read["rows"] += 1
        if "obs1" in texts:  # another task: which of two hypotheses explains what happened
            out.dropped["abductive (alphaNLI)"] += 1
            continue
        values = {name: field(where, texts, name) for name in ("premise", "hypothesis")}
        check_known(where, "label_counter", votes, letters, f"one of {listed(letters)}")
        if wrong := [repr(number) for number in votes.values() if type(number) is not int or number < 0]:
            raise InputError(f"{where}: label_counter: must be a number of votes, not {short(wrong[0])}")
        votes = {letters[letter]: number for letter, number in votes.items()}
        out.add(field(where, row, "uid"), values, votes, group=text_key("premise", values["premise"]))
    out.notes = ["chosen by its authors for disagreement"]


def summeval(config: PrepareConfig, out: Converted) -> None:
    """The annotation files, with the article in "text" or in a file of CNN/DailyMail (id, article)."""
    panels = {"both": ("expert", "turker"), "experts": ("expert",), "crowd": ("turker",)}[config.votes]
    articles, stories, rows = {}, defaultdict(list), []
    for where, row in sources.read_rows(config.raw):
        if "article" in row:
            articles[field(where, row, "id")] = row["article"]
        else:
            stories[field(where, row, "id")].append((where, row))
    for story, summaries in stories.items():  # the summaries of an article stand together
        for where, row in summaries:
            article = row.get("text") or articles.get(story) or articles.get(story.rsplit("-", 1)[-1]) or ""
            rows.append((where, row, article if isinstance(article, str) else ""))
    out.read["summaries"] = len(rows)
    if rows and not any(article for _, _, article in rows):
        problem = "no article text: the published annotations come without. Name cnn_dailymail's test split"
        address = sources.SOURCES["summeval"]["cnn_dailymail_test.parquet"]
        raise InputError(f"{config.raw[0]}: {problem} ({address}) with --raw too")
    for quality in out.dimension:
        for where, row, article in rows:
            votes = [vote for name in panels for vote in field(where, row, f"{name}_annotations", kind=list)]
            stars = [str(vote.get(quality) if isinstance(vote, dict) else vote) for vote in votes]
            check_known(where, quality, stars, RATING, "1 to 5")
            out.read["votes"] += len(stars)
            values = {"quality": QUALITIES["summeval"][quality], "article": article}
            values["summary"] = field(where, row, "decoded")
            name = f"{row['id']}-{field(where, row, 'model_id')}-{quality}"
            out.add(name, values, stars, group=text_key("article", article), system=row["model_id"])
    crowds = [field(where, row, "turker_annotations", kind=list) for where, row, _ in rows]
    identical = sum(len(crowd) > 1 and all(vote == crowd[0] for vote in crowd) for crowd in crowds)
    who = " and ".join({"expert": "3 experts", "turker": "5 crowd workers"}[name] for name in panels)
    same = f"{identical} of {out.read['summaries']} summaries carry the same crowd ratings five times over"
    out.notes = [f"{config.votes}: {who}", same]


def mtbench(config: PrepareConfig, out: Converted) -> None:
    """Votes with their conversations (as published), or FastChat's votes, questions and answers.

    Answer a is that of the model first in the alphabet; votes on either order of a pair count for one item.
    """
    out.dropped["judged by a model"] = 0
    panels: dict[tuple[int, int, str, str], list[tuple[str, str, str]]] = defaultdict(list)
    questions, answers, talks = {}, {}, {}
    for where, row in sources.read_rows(config.raw):
        if "winner" in row:
            read_vote(where, row, out, panels, talks)
            continue
        number = field(where, row, "question_id", kind=int)
        if "choices" not in row:
            questions[number] = texts_of(where, row, "turns")
            continue
        model, choices = field(where, row, "model_id"), field(where, row, "choices", kind=list)
        if not choices or not isinstance(choices[0], dict):
            problem = f"must be a list of objects with turns, not {short(repr(choices))}"
            raise InputError(f"{where}: choices: {problem}")
        turns = texts_of(where, choices[0], "turns")
        if answers.setdefault((model, number), turns) != turns:
            problem = f"another answer of {model} to question {number} was read before"
            raise InputError(f"{where}: {problem}; if one file holds reference answers, leave it out")
    again = empty = 0
    for (turn, question, *models), votes in sorted(panels.items()):
        where, judges = votes[0][0], [judge for _, _, judge in votes if judge]
        again += len(judges) - len(set(judges))
        keys = [(model, question) for model in models]
        told = [talks.get(key) or (questions.get(question), answers.get(key)) for key in keys]
        if missing := [model for model, texts in zip(models, told, strict=True) if not all(texts)]:
            problem = (
                f"its text or the answer of {missing[0]} is missing: name the file with the conversations,"
            )
            problem += " or FastChat's question.jsonl and model_answer/*.jsonl, with --raw too"
            raise InputError(f"{where}: question {question}: {problem}")
        asked, both = told[0][0][:turn], [texts[1][:turn] for texts in told]
        if not all(text.strip() for text in asked) or {turn} != {len(texts) for texts in (asked, *both)}:
            out.dropped["no text"] += 1
            continue
        both = [[text.strip() or "(no answer)" for text in texts] for texts in both]
        empty += "(no answer)" in [*both[0], *both[1]]
        one, other = ("\n\nTo the second question:\n".join(texts) for texts in both)
        shown = "\n\nSecond question, after the first was answered:\n".join(asked)
        values = {"question": shown, "answer_a": one, "answer_b": other}
        name, labels = f"{question}-{turn}-{models[0]}-{models[1]}", [label for _, label, _ in votes]
        out.add(name, values, labels, group=text_key("question", asked[0]))
    out.notes = [
        "answer a is that of the model whose name comes first in the alphabet",
        f"votes that are a judge's second on the same pair: {again}",
        f"items with an empty answer, shown as (no answer): {empty}",
    ]


def read_vote(where: str, row: dict, out: Converted, panels: dict, talks: dict) -> None:
    """Adds (where, label, judge) to the panel of (turn, question, model a, model b), and what was said."""
    out.read["votes"] += 1
    question, turn = field(where, row, "question_id", kind=int), field(where, row, "turn", kind=int)
    shown, winner = [field(where, row, f"model_{side}") for side in "ab"], field(where, row, "winner")
    judge = str(row.get("judge", ""))
    if judge.startswith(("gpt4", "gpt-4", "['gpt-4")):
        out.dropped["judged by a model"] += 1
        return
    winner = "tie" if winner.startswith("tie") else winner
    check_known(where, "turn", [turn], (1, 2), "1 or 2")
    check_known(where, "winner", [winner], ("model_a", "model_b", "tie"), "model_a, model_b or tie")
    if shown[0] == shown[1]:
        raise InputError(f"{where}: model_b: the same as model_a, {shown[0]}")
    first, second = sorted(shown)
    label = winner if winner == "tie" else "a" if row[winner] == first else "b"
    panels[turn, question, first, second].append((where, label, judge))
    for side, model in zip("ab", shown, strict=True):
        if talk := row.get(f"conversation_{side}"):
            if not isinstance(talk, list) or not all(isinstance(message, dict) for message in talk):
                problem = f"must be a list of messages, not {short(repr(talk))}"
                raise InputError(f"{where}: conversation_{side}: {problem}")
            said = [field(where, message, "content") for message in talk]
            talks.setdefault((model, question), (said[0::2], said[1::2]))


def conversation(prompt: str) -> str:
    """HelpSteer2's prompt, whose later turns are set off by <extra_id_1>, as text with speakers."""
    if not prompt.strip():
        return ""
    parts = ["User", *re.split(r"\n?<extra_id_1>(User|Assistant)\n", prompt)]
    return "\n\n".join(f"{who}:\n{text}" for who, text in zip(parts[::2], parts[1::2], strict=True))


def helpsteer2(config: PrepareConfig, out: Converted) -> None:
    rows = list(sources.read_rows(config.raw))
    out.read["replies"] = len(rows)
    for quality in out.dimension:
        for number, (where, row) in enumerate(rows, 1):
            ratings = [vote for vote in field(where, row, quality, kind=list) if vote is not None]
            check_known(where, quality, ratings, range(5), "0 to 4")
            out.read["votes"] += len(ratings)
            prompt, reply = field(where, row, "prompt"), field(where, row, "response")
            values = {"quality": QUALITIES["helpsteer2"][quality], "conversation": conversation(prompt)}
            stars, group = [str(int(vote) + 1) for vote in ratings], text_key("question", prompt)
            out.add(f"{number}-{quality}", values | {"reply": reply}, stars, group=group)
    out.notes = ["published from 0 to 4, here from 1 to 5"]


def helpsteer2_pref(config: PrepareConfig, out: Converted) -> None:
    """Every annotator's strength from -3 (reply 1 much better) to 3; -100 is no verdict."""
    folded = {-3: "a", -2: "a", -1: "tie", 0: "tie", 1: "tie", 2: "b", 3: "b"}
    for where, row in sources.read_rows(config.raw):
        prompt, one, other = (field(where, row, name) for name in ("prompt", "response_1", "response_2"))
        votes = field(where, row, "all_preferences_unprocessed", kind=list)
        strengths = [vote.get("strength") if isinstance(vote, dict) else vote for vote in votes]
        check_known(where, "strength", strengths, (None, -100, *folded), "-3 to 3")
        out.read.update({"pairs": 1, "votes": len(strengths)})
        labels = [folded[strength] for strength in strengths if strength in folded]
        out.dropped["votes without a verdict"] += len(strengths) - len(labels)
        side = {"train": "train", "val": "test"}.get(str(row.get("split")))
        values = {"conversation": conversation(prompt), "answer_a": one, "answer_b": other}
        group = text_key("question", prompt)
        out.add(str(out.read["pairs"]), values, labels, group=group, published=side)
    out.notes = ["strengths -3, -2 are a; -1, 0, 1 tie; 2, 3 b"]


def emobank(config: PrepareConfig, out: Converted) -> None:
    (dimension,) = out.dimension
    low, high = QUALITIES["emobank"][dimension]
    tables: dict[str, list[sources.Row]] = {}
    for path in config.raw:
        columns, rows = sources.read_table(path)
        name = "emobank.csv" if "text" in columns else "individual_reader_ratings.csv"
        if name in tables:
            raise InputError(f"{path}: is {name}, by its columns, as a file before")
        tables[name] = list(rows)
        out.read[name] = len(tables[name])
    if len(tables) < 2:
        missing = {"emobank.csv", "individual_reader_ratings.csv"} - set(tables)
        raise InputError(
            f"raw: {' and '.join(sorted(missing))} of EmoBank's folder corpus/ must be named too"
        )
    votes, letter = defaultdict(list), dimension[0].upper()
    for where, row in tables["individual_reader_ratings.csv"]:
        check_known(where, letter, [field(where, row, letter)], RATING, "1 to 5")
        votes[field(where, row, "id")].append(row[letter])
    without_text = set(votes) - {field(where, row, "id") for where, row in tables["emobank.csv"]}
    out.dropped["rated, without text"] = len(without_text)
    sides = {"train": "train", "dev": "valid", "test": "test"}
    for where, row in tables["emobank.csv"]:
        side = field(where, row, "split")
        check_known(where, "split", [side], sides, f"one of {', '.join(sides)}")
        values = {"text": field(where, row, "text").strip(), "dimension": dimension, "low": low, "high": high}
        out.add(row["id"], values, votes.get(row["id"], []), published=sides[side])


# --- a table of one's own: read_table() -> rows -> panels of votes -> items -------------------------------
Panel = namedtuple("Panel", "prompt group where votes")  # of one item, and where it stands first


def own(config: PrepareConfig, out: Converted) -> None:
    """A row a vote (--label; --item or equal prompts), or a row an item (several columns, or --counts)."""
    if not config.raw:
        raise InputError("raw: name your table: CSV, Excel, Parquet, .jsonl or a Hugging Face data set")
    what, by_vote = " ".join(config.label or config.counts), len(config.label) == 1
    order = named_labels(config.labels)
    if len(config.counts) > 1 and not order:
        order = [as_digits(column.strip()) for column in config.counts]
    spelled = {label.casefold(): label for label in order}
    panels: dict[str, Panel] = {}
    first: dict[str, str] = {}  # label: where it stands first
    for path in config.raw:
        columns, rows = sources.read_table(path, config.hub_split)
        template = check_columns(config, path, columns)
        shown = placeholders(template)
        taken = [name for name in {*shown, config.text, config.item, config.group} if name in columns]
        for where, row in rows:
            out.read["rows"] += 1
            values = {name: cell(where, name, row.get(name)) for name in taken}
            values |= {"text": values[config.text]} if config.text else {}
            if any(values.get(name) == "" for name in shown):
                out.dropped["rows with empty text"] += 1
                continue
            prompt, group = fill(template, values), values.get(config.group, "")
            key = values[config.item] if config.item else prompt if by_vote else where
            if not key:
                raise InputError(f"{where}: {config.item}: empty, so the vote belongs to no item")
            panel = panels.get(key) or panels.setdefault(key, Panel(prompt, group, where, Counter()))
            differs = "text" if panel.prompt != prompt else "group" if panel.group != group else ""
            if differs:
                problem = f"its {differs} differs from that at {panel.where}"
                raise InputError(f"{where}: item '{short(key)}': {problem}")
            if panel.where != where and not by_vote:
                problem = f"stands twice, first at {panel.where}; with columns of votes a row is an item"
                raise InputError(f"{where}: item '{short(key)}': {problem}")
            for label, number in row_votes(config, where, row):
                out.read["votes"] += number
                if not label:
                    out.dropped["votes without a label"] += number
                    continue
                label = spelled.get(label.casefold(), label)
                if order and label not in order:
                    problem = f"'{short(label, 30)}' is not one of {listed(order)}"
                    raise InputError(f"{where}: {what}: {problem}")
                first.setdefault(label, where)
                panel.votes[label] += number
    out.labels = order or found_labels(first, what)
    if first and len(out.labels) < 2:
        raise InputError(f"{what}: only the label {listed(out.labels)} occurs; name them all with --labels")
    for number, (key, panel) in enumerate(panels.items(), 1):
        name = key if config.item else str(number)
        out.add(name, {"prompt": panel.prompt}, panel.votes, group=panel.group)
    if out.rows and all(panel.votes.total() < 2 for panel in panels.values()):
        log.warning("every item has one vote only: nothing shows how far people disagree on one item")


def check_columns(config: PrepareConfig, path: str, columns: list[str]) -> str:
    """The template of a table's prompts. Raises InputError if an option names no column or is missing."""
    there = f"The columns are {', '.join(short(column, 30) for column in columns)}"
    for option in ("text", "label", "counts", "item", "group"):
        named = getattr(config, option) or ()
        for name in [named] if isinstance(named, str) else named:
            if name not in columns:
                close = difflib.get_close_matches(name, columns, 1)
                meant = f", did you mean '{short(close[0])}'?" if close else "."
                raise InputError(f"{path}: {option}: no column '{short(name)}'{meant} {there}")
    if bool(config.label) == bool(config.counts):
        problem = "name the column with the votes with --label, or columns of counts with --counts, not both"
        raise InputError(f"{path}: label: {problem}. {there}")
    if not config.prompts and not config.text:
        problem = "name the column with the judged text (--text), or a template of columns (--template)"
        raise InputError(f"{path}: text: {problem}. {there}")
    if not config.prompts:
        return "{text}"
    return read_template(config.prompts, ["text"] if config.text else [], columns)


def cell(where: str, name: str, value: Any) -> str:
    """A cell as text, "" if it is empty. Raises InputError for bytes, lists, objects and broken text."""
    is_text = not isinstance(value, str) or distjudge.is_text(value)
    if not is_text or isinstance(value, (bytes, bytearray, list, tuple, dict)):
        kind = "text or a number" if is_text else "text without lone surrogates"
        raise InputError(f"{where}: {short(name)}: must be {kind}, not {short(repr(value))}")
    return "" if distjudge.is_missing(value) else str(value).strip()


def as_digits(text: str) -> str:
    """A label as written, but whole numbers in digits: "4.0" and "+4" are 4."""
    number = re.fullmatch(r"([+-]?\d{1,300})(\.0+)?", text)
    return str(int(number[1])) if number else text


def row_votes(config: PrepareConfig, where: str, row: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """(label, number of votes) of a row; ("", 1) for an empty cell of a label column."""
    for column in config.label:
        yield as_digits(cell(where, column, row.get(column))), 1
    given = {column: row.get(column) for column in config.counts}
    if len(config.counts) == 1:
        given = json_counts(f"{where}: {config.counts[0]}", row.get(config.counts[0]))
    for label, number in given.items():
        text = "0" if distjudge.is_missing(number) else as_digits(str(number).strip()) or "0"
        if not re.fullmatch(r"[0-9]{1,300}", text):
            problem = f"a number of votes is needed, not '{short(text, 30)}'"
            raise InputError(f"{where}: {short(label)}: {problem}")
        if int(text) > 10**9:
            problem = f"more than a billion votes for '{short(label, 30)}'"
            raise InputError(f"{where}: {' '.join(config.counts)}: {problem}")
        yield as_digits(cell(where, "label", label)), int(text)


def json_counts(where: str, value: Any) -> dict[str, Any]:
    """{label: votes} of a cell, written as JSON or read as an object already."""
    try:
        given = sources.read_json(value) if isinstance(value, str) else value
    except KeyError as error:
        raise InputError(f"{where}: '{short(error.args[0], 30)}' stands twice in it") from None
    except (ValueError, RecursionError):
        given = None
    if not isinstance(given, dict):
        raise InputError(f'{where}: must be an object such as {{"1": 0, "2": 3}}, not {short(repr(value))}')
    return given


def named_labels(labels: Iterable[str]) -> list[str]:
    """("1-5",) or ("-3..3",) -> every whole number of the range; other names as they are."""
    out: list[str] = []
    for label in labels:
        ends = re.fullmatch(r"([+-]?\d{1,300})(?:\.\.|-)([+-]?\d{1,300})", label.strip())
        if ends and not int(ends[1]) < int(ends[2]) <= int(ends[1]) + 100:
            raise InputError(f"labels: '{label}' is not a range from low to high")
        out += map(str, range(int(ends[1]), int(ends[2]) + 1)) if ends else [as_digits(label.strip())]
    folded = [label.casefold() for label in out]
    if "" in folded:
        raise InputError(f"labels: {listed(out)} names an empty label")
    if len(set(folded)) < len(folded):
        raise InputError(f"labels: {listed(out)} names a label twice (capitals are ignored)")
    return out


def found_labels(first: dict[str, str], what: str) -> list[str]:
    """The labels that occur (label: where it stands first), in order; InputError if they are no one scale."""
    words = [label for label in first if not distjudge.are_numeric([label])]
    whole = [label for label in first if re.fullmatch(r"-?\d{1,300}", label)]
    parts = [label for label in first if label not in whole and label not in words]
    low, high = min(map(int, whole), default=0), max(map(int, whole), default=0)
    quoted = {label: f"'{short(label, 20)}'" for label in first}
    problem = ""
    if parts:
        odd, problem = parts[0], f"{quoted[parts[0]]} is not a whole number; a vote is one label"
        problem += " (is this column a mean?)"
    elif whole and words:
        odd, problem = words[0], f"mixed scales: {quoted[words[0]]} among numbers such as {quoted[whole[0]]}"
        problem += f" ({first[whole[0]]}); name the labels that count with --labels, or clean the column"
    elif len(words) > 20:
        odd, problem = words[20], f"{len(words)} different labels, such as {listed(words[:4])}"
        problem += ": is it the right column?"
    elif twins := distjudge.look_alike(words):
        other, odd = twins
        problem = f"{quoted[odd]} and {quoted[other]} differ only in capitals; with --labels "
        problem += " ".join(short(word, 20) for word in sorted({word.casefold() for word in words}))
        problem += " both count as one"
        if odd.casefold() != other.casefold():
            problem = f"{quoted[odd]} is written in two ways (composed and combining characters)"
    elif high - low > 20:
        odd = max(whole, key=lambda label: abs(int(label)))
        problem = f"mixed scales? The votes reach from {short(low)} to {short(high)}; "
        problem += "name the scale with --labels, as in --labels 1-10"
    if problem:
        raise InputError(f"{first[odd]}: {what}: {problem}")
    return [str(number) for number in range(low, high + 1)] if whole else sorted(words)


# --- from items to files ----------------------------------------------------------------------------------
TASKS = {  # converter, labels in order, licence
    "snli": (nli, NLI, "CC BY-SA 4.0"),
    "mnli": (nli, NLI, "OANC, CC BY-SA 3.0, CC BY 3.0, US public domain, by genre"),
    "chaosnli": (chaosnli, NLI, "CC BY-NC 4.0"),
    "summeval": (summeval, RATING, "annotations MIT; news articles third-party"),
    "mtbench": (mtbench, PAIR, "votes CC BY 4.0; answers Apache-2.0"),
    "helpsteer2": (helpsteer2, RATING, "CC BY 4.0"),
    "helpsteer2_pref": (helpsteer2_pref, PAIR, "CC BY 4.0"),
    "emobank": (emobank, RATING, "CC BY-SA 4.0"),
    "own": (own, [], "your own"),
}


def spellings_of(labels: list[str]) -> list[str]:
    """For --spellings: each label, and with a capital."""
    return [f"{label}={label},{label.capitalize()}" for label in labels]


def convert(config: PrepareConfig) -> tuple[list[dict], dict]:
    """All items of a data set, in the order of its files, and what its card says; not split yet."""
    converter, labels, licence = TASKS[config.task]
    path, template = Path(config.prompts) if config.prompts else None, "{prompt}"
    if config.task != "own":
        path, template = task_template(config.task, config.prompts)
        config.raw = config.raw or sources.fetch_all(config.task)
    out = Converted(labels, template, chosen_dimensions(config))
    converter(config, out)
    if not out.rows:
        number = next(iter(out.read.values()), 0)
        raise InputError(f"{config.raw[0]}: no item is left of {number} rows: {dict(out.dropped)}")
    card = {"task": config.task, "labels": out.labels, "ordered": distjudge.are_numeric(out.labels)}
    if labels in (NLI, PAIR):
        card["spellings"] = spellings_of(labels)
    card |= {"licence": licence, "dimension": out.dimension, "notes": out.notes}
    card["source"] = list(sources.SOURCES.get(config.task, {}).values())
    card["prompt"] = {"file": path and path.name, "sha256": path and sources.sha256_of(path)}
    card["sha256"] = {Path(raw).name: sources.sha256_of(raw) for raw in config.raw if Path(raw).is_file()}
    return out.rows, card | {"read": dict(out.read), "dropped": dict(out.dropped)}


def split_rows(
    rows: list[dict], items: list[distjudge.Item], how: str, seed: int, dropped: dict[str, int]
) -> dict[str, list[dict]]:
    """{name of a file: its rows}; items: the rows, loaded."""
    if how == "none":
        return {"items": rows}
    if how == "published":
        if not all("published" in row for row in rows):
            raise InputError("split: published: this data set has no split of its own")
        sides, taken = {"train": [], "valid": [], "test": []}, set()
        for name in ("test", "valid", "train"):  # a prompt of two splits stays with the first of these
            here = [row for row in rows if row["published"] == name]
            sides[name] = [row for row in here if row["prompt"] not in taken]
            taken |= {row["prompt"] for row in here}
        dropped["also in test or valid"] = len(rows) - sum(map(len, sides.values()))
        return {name: part for name, part in sides.items() if part or name != "valid"}
    if how == "random":
        items = [dataclasses.replace(item, group=None) for item in items]
        rows = [{name: value for name, value in row.items() if name != "group"} for row in rows]
    try:
        test = {item.id for item in distjudge.split_items(items, seed=seed)[1]}
    except InputError as error:
        raise InputError(f"split: {error}; --split none writes one file") from None
    sides = {"train": [], "test": []}
    for row in rows:
        sides["test" if row["id"] in test else "train"].append(row)
    return sides


def main(config: PrepareConfig) -> None:
    if not config.out.strip():
        raise InputError("out: name a folder")
    if config.min_votes is not None and config.min_votes < 1:
        raise InputError(f"min_votes: must be 1 or more, not {config.min_votes}")
    least = config.min_votes or (2 if config.task in ("snli", "mnli") else 1)
    how = config.split or ("published" if config.task == "emobank" else "group")
    found, card = convert(config)
    dropped = card["dropped"]
    rows = {row["id"]: row for row in found if sum(row["counts"].values()) >= least}
    if least > 1:
        dropped[f"fewer than {least} votes"] = len(found) - len(rows)
    if not rows:
        raise InputError(f"{config.raw[0]}: no item has {least} votes or more (--min_votes)")
    items = distjudge.load_items(list(rows.values()), labels=card["labels"])
    for path in config.without:
        items, shared = distjudge.keep_apart(items, distjudge.load_items(path), overlap="remove")
        for field_name, number in shared.items():
            reason = f"in {Path(path).name} by {field_name}"
            dropped[reason] = dropped.get(reason, 0) + number
    if not items:
        raise InputError(f"{config.raw[0]}: no items are left: dropped {dropped}")
    kept = [rows[item.id] for item in items]
    splits = split_rows(kept, items, how, config.seed, dropped)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    for name in {"train", "valid", "test", "items"} - set(splits):  # of an earlier run with another split
        (out / f"{name}.jsonl").unlink(missing_ok=True)
    for name, part in splits.items():
        lines = ({key: value for key, value in row.items() if key != "published"} for row in part)
        distjudge.write_lines(out / f"{name}.jsonl", (json.dumps(row, ensure_ascii=False) for row in lines))
    votes = Counter(sum(row["counts"].values()) for part in splits.values() for row in part)
    card |= {"items": {name: len(part) for name, part in splits.items()}, "split": how, "seed": config.seed}
    card["votes_an_item"] = {str(number): votes[number] for number in sorted(votes)}
    card["groups"] = len({row["group"] for row in kept if "group" in row})
    distjudge.write_json(out / "card.json", card)
    print(f"read {card['read']}\ndropped {dropped}")
    print(f"kept {card['items']}, votes an item {card['votes_an_item']}")
    for note in card["notes"]:
        print(f"note: {note}")
    if "spellings" in card:
        print(f"judges may spell the labels more ways: --spellings {' '.join(card['spellings'])}")
    print(f"labels {' '.join(card['labels'])}\nwrote {out}")


if __name__ == "__main__":
    distjudge.cli(main, PrepareConfig)
