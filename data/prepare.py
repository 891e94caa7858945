"""Convert a public data set of human judgments, or a table of your own, into items with prompts.

    python data/prepare.py snli --out votes/snli                        # fetches it; or --raw snli_1.0.zip
    python data/prepare.py summeval --votes experts --dimension coherence --out votes/coherence
    python data/prepare.py mnli --without votes/chaosnli/items.jsonl --out votes/mnli    # no test items
    python data/prepare.py own --raw votes.csv --text answer --label rating --item id --out votes/own

own is your table. Writes train.jsonl and test.jsonl (emobank: and valid.jsonl; --split none: items.jsonl) and
card.json into --out: what was read, kept and left out, the licence, and how prompts were made. data/README.md
tells of each data set, and of every form that your table may have.
"""

import dataclasses
import json
import re
import shlex
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import distjudge
from distjudge import InputError, listed, short

import sources
import tyro
from tables import fill, own, placeholders, read_template

PROMPTS = Path(__file__).with_name("prompts")
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


@dataclasses.dataclass
class PrepareConfig:
    task: tyro.conf.Positional[Literal[(*sources.SOURCES, "own")]]
    """The data set."""
    out: str
    """The folder for the items and card.json; files in it are replaced."""
    raw: tuple[str, ...] = ()
    """Its files, in any order, plain, .gz or .zip. Default: they are fetched, see DISTJUDGE_CACHE."""
    prompts: Annotated[str | None, tyro.conf.arg(aliases=["--template"])] = None
    """Your template, with the placeholders of the one in data/prompts/; own: any {column} of the table."""
    split: Literal["", "group", "random", "published", "none"] = ""
    """8:2 by group (article, question), at random as in the paper, published, or one file. Default: group."""
    seed: int = 0
    """Seed of the split."""
    min_votes: int | None = None
    """Leave out items with fewer votes. Default: 2 for snli and mnli, else 1. 0 keeps items without votes,
    for systems.py; training refuses them."""
    without: tuple[str, ...] = ()
    """Files of items, test sets: leave out what shares a prompt, a group or an id with them."""

    votes: Literal["both", "experts", "crowd"] = "both"
    """summeval: whose ratings."""
    dimension: tuple[str, ...] = ()
    """summeval, helpsteer2: which qualities, by default all; emobank: valence, arousal or dominance."""
    drop_first_label: bool = False
    """snli, mnli: leave out the first label of an item, which is that of the writer of the hypothesis."""

    text: str | None = None
    """own: the column with the judged text, or with messages: {text} of a template, or the prompt."""
    label: tuple[str, ...] = ()
    """own: the column with the votes; or several, each one person's votes; 'Q*' is all that begin with Q."""
    counts: tuple[str, ...] = ()
    """own, instead of label: a column of {label: votes}, or a column a label. Rows of an --item add up.
    Beside one column of --label: the column that says how many people chose so."""
    by_column: bool = False
    """own: a row is a person, and each column of --label an item, whose text is the column's name."""
    item: str | None = None
    """own: the column that tells items apart. Default: the prompt; with columns of votes, the row."""
    group: str | None = None
    """own: the column of the group, whose items never end up on both sides of the split."""
    rater: str | None = None
    """own: the column with who voted: kept in the item; a person's second vote on it does not count."""
    keep: tuple[str, ...] = ()
    """own: columns that become fields of the items, for systems.py and trust.py --by."""
    where: tuple[str, ...] = ()
    """own: only rows with COLUMN=VALUE, or COLUMN!=VALUE; of several values of a column any does."""
    labels: tuple[str, ...] = ()
    """own: all labels, in order, or a range such as 1-5; capitals do not count. Default: those found."""
    no_vote: tuple[str, ...] = ()
    """own: words that are no vote, such as N/A or skip."""
    multi: Literal["refuse", "split"] = "refuse"
    """own: a cell with several labels, such as 'a;b' or 0,1,1: refuse, or split into a vote each."""
    decimal: Literal["point", "comma"] = "point"
    """own: how votes such as 2,5 are written."""
    bins: tuple[str, ...] = ()
    """own: edges, as in 0 20 40 60 80 100: votes are numbers, labels the bins they fall in, 1, 2, ..."""
    optional: tuple[str, ...] = ()
    """own: columns of the template that may be empty."""
    swap: tuple[str, ...] = ()
    """own: a pair's two columns, which trade places; and, unless their names tell, the labels, in pairs."""
    sheet: str | None = None
    """own: the sheet of an Excel file. Default: the first."""
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
    dropped: Counter = dataclasses.field(default_factory=Counter)
    notes: list[str] = dataclasses.field(default_factory=list)
    ids: Counter = dataclasses.field(default_factory=Counter)
    own: dict = dataclasses.field(default_factory=dict)
    least: int = 1

    def add(self, name: str, values: dict[str, str], votes: Any, **more: str | None) -> None:
        """Adds an item, or counts it as dropped: the template's values, and labels or {label: number}.

        A pair is written in both orders. more: "group", "published".
        """
        if not all(text.strip() for text in values.values()):
            self.dropped["item without text"] += 1
            return
        votes = votes if isinstance(votes, dict) else Counter(votes)
        counts, swap = {label: votes.get(label, 0) for label in self.labels}, None
        if "answer_b" in values:
            turned = values | {"answer_a": values["answer_b"], "answer_b": values["answer_a"]}
            swap = {"prompt": fill(self.template, turned), "labels": {"a": "b", "b": "a"}}
        self.add_item(name, fill(self.template, values), counts, swap=swap, **more)

    def add_item(self, name: str, prompt: str, counts: dict[str, int], /, **more: Any) -> None:
        """Adds an item with votes, or counts it as dropped. An id that comes again gets -2, -3, ...

        name: "" is a hash of the prompt, so that items of different tables are not taken for the same.
        """
        voted = any(counts.values())
        if self.least and not voted:
            self.dropped["item without votes"] += 1
            return
        name = first = name or distjudge.prompt_id(prompt)
        while name in self.ids:
            self.ids[first] += 1
            name = f"{first}-{self.ids[first]}"
        self.ids[name] = 1
        row = {"id": name, "prompt": distjudge.prompt_field(prompt)}
        row |= {"counts": counts} if voted else {}
        self.rows.append(row | {key: value for key, value in more.items() if value})


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


def list_of(where: str, row: dict[str, Any], name: str, kind: type = str) -> list:
    """row[name], a list whose entries are all of the kind."""
    for number, one in enumerate(field(where, row, name, kind=list)):
        field(where, {f"{name}[{number}]": one}, f"{name}[{number}]", kind=kind)
    return row[name]


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
        votes = [vote for vote in votes[config.drop_first_label :] if vote]
        out.read.update({"rows": 1, "votes": len(votes), "rows without a gold label": without_gold})
        check_known(where, "annotator_labels", votes, NLI, f"one of {listed(NLI)}")
        values = {"premise": premise, "hypothesis": "" if hypothesis.strip().lower() == "n/a" else hypothesis}
        out.add(str(field(where, row, "pairID")), values, votes, group=text_key("premise", premise))
    left_out = "; left out" if config.drop_first_label else ""
    out.notes = [f"the first label of an item is that of the hypothesis's writer{left_out}"]


def chaosnli(config: PrepareConfig, out: Converted) -> None:
    letters = {"e": "entailment", "n": "neutral", "c": "contradiction"}
    out.dropped["abductive item of alphaNLI"] = 0
    for where, row in sources.read_rows(config.raw):
        texts, votes = (field(where, row, name, kind=dict) for name in ("example", "label_counter"))
        out.read["rows"] += 1
        if "obs1" in texts:  # another task: which of two hypotheses explains what happened
            out.dropped["abductive item of alphaNLI"] += 1
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
    articles, summaries, rows = {}, defaultdict(list), []
    for where, row in sources.read_rows(config.raw):
        story = field(where, row, "id")
        if "article" in row:
            articles[story.rsplit("-", 1)[-1]] = row["article"]
        else:
            summaries[story].append((where, row))
    for story, some in summaries.items():  # those of an article stand together
        texts = [row.get("text") or articles.get(story.rsplit("-", 1)[-1]) for _, row in some]
        rows += [(*one, text if isinstance(text, str) else "") for one, text in zip(some, texts, strict=True)]
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
    out.dropped["vote of a model"] = 0
    panels: dict[tuple[int, int, str, str], list[tuple[str, str, str]]] = defaultdict(list)
    questions, answers = {}, {}
    for where, row in sources.read_rows(config.raw):
        if "winner" in row:
            read_vote(where, row, out, panels, questions, answers)
        elif "choices" not in row:
            questions[field(where, row, "question_id", kind=int)] = list_of(where, row, "turns")
        else:
            key = field(where, row, "model_id"), field(where, row, "question_id", kind=int)
            choices = list_of(where, row, "choices", kind=dict)
            turns = list_of(where, choices[0] if choices else {}, "turns")
            if answers.setdefault(key, turns) != turns:
                problem = f"another answer of {key[0]} to question {key[1]} was read before"
                raise InputError(f"{where}: {problem}; if one file holds reference answers, leave it out")
    again = empty = 0
    for (turn, question, *models), votes in sorted(panels.items()):
        judges = [judge for _, _, judge in votes if judge]
        again += len(judges) - len(set(judges))
        asked = questions.get(question)
        if missing := [model for model in models if not asked or not answers.get((model, question))]:
            problem = f"question {question}: its text or the answer of {missing[0]} is missing: name the file"
            remedy = "with the conversations, or FastChat's question.jsonl and model_answer/*.jsonl, too"
            raise InputError(f"{votes[0][0]}: {problem} {remedy}")
        asked, both = asked[:turn], [answers[model, question][:turn] for model in models]
        if not all(text.strip() for text in asked) or {turn} != {len(texts) for texts in (asked, *both)}:
            out.dropped["item without text"] += 1
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


def read_vote(where: str, row: dict, out: Converted, panels: dict, questions: dict, answers: dict) -> None:
    """Adds (where, label, judge) to the panel of (turn, question, model a, model b), and what was said."""
    out.read["votes"] += 1
    question, turn = field(where, row, "question_id", kind=int), field(where, row, "turn", kind=int)
    shown, winner = [field(where, row, f"model_{side}") for side in "ab"], field(where, row, "winner")
    judge = str(row.get("judge", ""))
    if judge.startswith(("gpt4", "gpt-4", "['gpt-4")):
        out.dropped["vote of a model"] += 1
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
        if row.get(f"conversation_{side}"):
            talk = list_of(where, row, f"conversation_{side}", kind=dict)
            said = [field(where, message, "content") for message in talk]
            questions.setdefault(question, said[0::2])
            answers.setdefault((model, question), said[1::2])


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
        for where, row in rows:
            ratings = [vote for vote in field(where, row, quality, kind=list) if vote is not None]
            check_known(where, quality, ratings, range(5), "0 to 4")
            out.read["votes"] += len(ratings)
            prompt, reply = field(where, row, "prompt"), field(where, row, "response")
            values = {"quality": QUALITIES["helpsteer2"][quality], "conversation": conversation(prompt)}
            stars, group = [str(int(vote) + 1) for vote in ratings], text_key("question", prompt)
            out.add("", values | {"reply": reply}, stars, group=group)
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
        out.dropped["vote without a verdict"] += len(strengths) - len(labels)
        side = {"train": "train", "val": "test"}.get(str(row.get("split")))
        values = {"conversation": conversation(prompt), "answer_a": one, "answer_b": other}
        group = text_key("question", prompt)
        out.add("", values, labels, group=group, published=side)
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
        raise InputError(f"raw: {' and '.join(sorted(missing))} of EmoBank's folder corpus/ must be named")
    votes, letter = defaultdict(list), dimension[0].upper()
    for where, row in tables["individual_reader_ratings.csv"]:
        check_known(where, letter, [field(where, row, letter)], RATING, "1 to 5")
        votes[field(where, row, "id")].append(row[letter])
    without_text = set(votes) - {field(where, row, "id") for where, row in tables["emobank.csv"]}
    out.dropped["rated item without text"] = len(without_text)
    sides = {"train": "train", "dev": "valid", "test": "test"}
    for where, row in tables["emobank.csv"]:
        side = field(where, row, "split")
        check_known(where, "split", [side], sides, f"one of {', '.join(sides)}")
        values = {"text": field(where, row, "text").strip(), "dimension": dimension, "low": low, "high": high}
        document = re.sub(r"_\d+_\d+$", "", row["id"])  # the rest is where its sentence begins and ends
        out.add(row["id"], values, votes.get(row["id"], []), group=document, published=sides[side])


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


def least_votes(config: PrepareConfig) -> int:
    if config.min_votes is None:
        return 2 if config.task in ("snli", "mnli") else 1
    if config.min_votes < 0:
        raise InputError(f"min_votes: must be 0 or more, not {config.min_votes}")
    return config.min_votes


def votes_of(row: dict) -> float:
    return sum(row.get("counts", {}).values())


def convert(config: PrepareConfig) -> tuple[list[dict], dict]:
    """All items of a data set, in the order of its files, and what its card says; not split yet."""
    converter, labels, licence = TASKS[config.task]
    path, template = Path(config.prompts) if config.prompts else None, "{prompt}"
    if config.task != "own":  # a template of one's own needs the placeholders of ours
        ours = PROMPTS / f"{'snli' if labels == NLI else config.task}.txt"
        names, path = placeholders(ours.read_text(encoding="utf-8")), path or ours
        optional = {"dimension", "low", "high"}.intersection(names)
        template = read_template(path, [name for name in names if name not in optional], optional)
        config.raw = config.raw or sources.fetch_all(config.task)
    out = Converted(labels, template, chosen_dimensions(config), least=least_votes(config))
    converter(config, out)
    card = {"task": config.task, "labels": out.labels, "ordered": distjudge.are_numeric(out.labels)}
    if labels in (NLI, PAIR):
        card["spellings"] = [f"{label}={label},{label.capitalize()}" for label in labels]
    addresses = list(sources.SOURCES.get(config.task, {}).values())
    strange = [name for name in (Path(raw).name for raw in config.raw) if "multinli" not in name.lower()]
    if config.task == "mnli" and strange:
        problem = "in MNLI's format, by the name not MultiNLI: its source and licence are not known"
        out.notes.append(f"{', '.join(strange)}: {problem}")
        licence, addresses = "not known: that of the files", []
    card |= {"licence": licence, "dimension": out.dimension, "notes": out.notes, "source": addresses}
    card |= {"own": out.own} if out.own else {}
    card["prompt"] = {"file": path and path.name, "sha256": path and sources.sha256_of(path)}
    card["sha256"] = {Path(raw).name: sources.sha256_of(raw) for raw in config.raw if Path(raw).is_file()}
    return out.rows, card | {"read": out.read, "dropped": out.dropped}


def split_rows(rows: list[dict], items: list, how: str, seed: int, dropped: dict) -> dict[str, list[dict]]:
    """{name of a file: its rows}; items: the rows, loaded."""
    if how == "none":
        return {"items": rows}
    if how == "published":
        if not all("published" in row for row in rows):
            raise InputError("split: published: this data set has no split of its own")
        names = ("train", "valid", "test")  # a prompt of two of them stays with the last
        last = {row["prompt"]: name for name in names for row in rows if row["published"] == name}
        of = lambda name: [row for row in rows if row["published"] == name == last[row["prompt"]]]  # noqa: E731
        sides = {name: of(name) for name in names}
        tested = {row.get("group") for row in sides["test"]}  # a group may be on both sides, as published
        for row in sides["train"] + sides["valid"]:
            if row.get("group") in tested:  # it stays with the test items, for intervals by group
                row.pop("group", None)
        dropped["item that is also in test or valid"] = len(rows) - sum(map(len, sides.values()))
        return {name: part for name, part in sides.items() if part or name != "valid"}
    if how == "random":
        items = [dataclasses.replace(item, group=None) for item in items]
        rows = [row | {"group": None} for row in rows]
    try:
        test = {item.id for item in distjudge.split_items(items, seed=seed)[1]}
    except InputError as error:
        raise InputError(f"split: {error}; --split none writes one file") from None
    train = [row for row in rows if row["id"] not in test]
    return {"train": train, "test": [row for row in rows if row["id"] in test]}


def main(config: PrepareConfig) -> None:
    if not config.out.strip():
        raise InputError("out: name a folder")
    out = Path(config.out)
    distjudge.check_out(out, "card.json")
    files = (*config.raw, *config.without)
    if inside := [path for path in files if Path(path).resolve().parent == out.resolve()]:
        raise InputError(f"out: {inside[0]} is in this folder, whose files are replaced; name another")
    least = least_votes(config)
    how = config.split or ("published" if config.task == "emobank" else "group")
    found, card = convert(config)
    dropped = card["dropped"]
    rows = {row["id"]: row for row in found if votes_of(row) >= least}
    if least > 1:
        dropped[f"item with fewer than {least} votes"] = len(found) - len(rows)
    items = distjudge.load_items(list(rows.values()), labels=card["labels"], votes=least > 0) if rows else []
    for path in config.without:
        items, shared = distjudge.keep_apart(items, distjudge.load_items(path), overlap="remove")
        where = Path(path).name
        dropped.update({f"item that shares its {name} with {where}": n for name, n in shared.items()})
    if not items:
        number = next(iter(card["read"].values()), 0)
        raise InputError(f"{config.raw[0]}: no item is left of {number} rows: {told(dropped)}")
    kept = [rows[item.id] for item in items]
    splits = split_rows(kept, items, how, config.seed, dropped)
    for name in {"train", "valid", "test", "items"} - set(splits):  # of an earlier run with another split
        (out / f"{name}.jsonl").unlink(missing_ok=True)
    for name, part in splits.items():
        lines = ({x: y for x, y in row.items() if x != "published" and y is not None} for row in part)
        distjudge.write_lines(out / f"{name}.jsonl", (json.dumps(row, ensure_ascii=False) for row in lines))
    votes = Counter(votes_of(row) for part in splits.values() for row in part)
    card |= {"items": {name: len(part) for name, part in splits.items()}, "split": how, "seed": config.seed}
    card["votes_an_item"] = {str(number): votes[number] for number in sorted(votes)}
    card["groups"] = len({row["group"] for row in kept if "group" in row})
    distjudge.write_json(out / "card.json", card)
    print_summary(card, out)


def counted(number: int, thing: str) -> str:
    """ "1 row without text", "1,207 rows without text": `thing` begins with a noun that takes an s."""
    plural = re.sub(r"\b(row|item|cell|vote)\b", r"\1s", thing, count=1) if number != 1 else thing
    return f"{number:,} {plural}"


def told(counts: dict[str, int]) -> str:
    return "; ".join(counted(number, thing) for thing, number in counts.items() if number) or "nothing"


def print_summary(card: dict, out: Path) -> None:
    """What was read, kept and left out, in words, and the command to go on with."""
    votes = {int(number): items for number, items in card["votes_an_item"].items()}
    total = sum(number * items for number, items in votes.items())
    sides = ", ".join(f"{number:,} {name}" for name, number in card["items"].items() if name != "items")
    each = f"{min(votes)}" if len(votes) == 1 else f"{min(votes)} to {max(votes)}"
    print(f"read: {', '.join(f'{number:,} {thing}' for thing, number in card['read'].items())}")
    print(f"left out: {told(card['dropped'])}")
    kept = f"kept: {counted(total, 'vote')} on {counted(sum(votes.values()), 'item')}, {each} an item"
    print(f"{kept}; {sides}".rstrip("; "))
    for note in card["notes"]:
        print(f"note: {note}")
    print(f"labels: {listed(card['labels'])}\nwrote {out}\nnext:")
    first = "train" if "train" in card["items"] else next(iter(card["items"]))
    print(f"  python plots/data.py {shlex.quote(str(out / first))}.jsonl")
    if "test" in card["items"]:
        files = " ".join(f"--{name} {shlex.quote(f'{out / name}.jsonl')}" for name in ("train", "test"))
        spellings = f" --spellings {' '.join(card['spellings'])}" if "spellings" in card else ""
        print(f"  python recipes/smollm.py {files} --out runs/{shlex.quote(out.resolve().name)}{spellings}")


if __name__ == "__main__":
    distjudge.cli(main, PrepareConfig)
