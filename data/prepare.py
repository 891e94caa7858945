"""Convert a published data set of human judgments, or a table of your own, into items with prompts, and a card of what was done.

    python data/prepare.py snli --out votes/snli                               # fetches the published file; or --raw snli_1.0.zip
    python data/prepare.py summeval --votes experts --dimension coherence --out votes/coherence
    python data/prepare.py mnli --without votes/chaosnli/items.jsonl --out votes/mnli    # leaves out what stands in a test set
    python data/prepare.py own --raw votes.csv --text answer --label rating --item id --template prompt.txt --out votes/own

    snli            Stanford NLI (Bowman et al. 2015), CC BY-SA 4.0; five labels for a tenth of it
    mnli            MultiNLI (Williams et al. 2018), OANC and others; also any file of premise, hypothesis and annotator_labels
    chaosnli        ChaosNLI (Nie et al. 2020), CC BY-NC 4.0: 100 labels for each of 3,113 items of SNLI's and MNLI's development sets
    summeval        SummEval (Fabbri et al. 2021), MIT; the news articles are third-party: 3 experts and 5 of a crowd on four qualities
    mtbench         MT-Bench human judgments (Zheng et al. 2023), CC BY 4.0: which of two models' answers is better
    helpsteer2      HelpSteer2's single ratings of five qualities (Wang et al. 2024), CC BY 4.0
    helpsteer2_pref HelpSteer2-Preference (Wang et al. 2024), CC BY 4.0: which of two replies is better
    emobank         EmoBank (Buechel and Hahn 2017), CC BY-SA 4.0: about five readers on a sentence's valence, arousal or dominance
    own             your table, CSV, Excel, Parquet, .jsonl or a Hugging Face data set: a row a vote (--item, --label) or a row an item

Writes train.jsonl and test.jsonl (emobank: and valid.jsonl; --split none: items.jsonl) and card.json into --out.
"""
import dataclasses
import difflib
import hashlib
import json
import logging
import math
import random
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import sources
import tyro

import distjudge
from distjudge import InputError, Item, _listed, _short

PROMPTS = Path(__file__).with_name("prompts")
log = logging.getLogger("distjudge")
NLI = ["entailment", "neutral", "contradiction"]
PAIR = ["a", "b", "tie"]
RATING = list("12345")
SWAP = {"a": "b", "b": "a"}  # what a label means when the pair is shown in the other order
SPELLINGS = {"nli": ["entailment=entailment,Entailment", "neutral=neutral,Neutral", "contradiction=contradiction,Contradiction"],
             "pair": ["a=a,A", "b=b,B", "tie=tie,Tie"]}
QUALITIES = {  # of SummEval and HelpSteer2, each as the prompt states it
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
        "complexity": "complexity, how much expertise it takes to write it (1: anyone could, 5: an expert of the field)",
        "verbosity": "verbosity, how much detail it gives for what was asked (1: very terse, 5: very long)",
    },
}
EMOTIONS = {"valence": ("V", "very unpleasant", "very pleasant"), "arousal": ("A", "very calm", "very excited"),
            "dominance": ("D", "no control at all", "full control")}


@dataclasses.dataclass
class PrepareConfig:
    task: tyro.conf.Positional[
        Literal["snli", "mnli", "chaosnli", "summeval", "mtbench", "helpsteer2", "helpsteer2_pref", "emobank", "own"]]
    """The data set."""
    out: str
    """The folder for the items and card.json; files in it are replaced."""
    raw: tuple[str, ...] = ()
    """Its files as published, in any order, plain, .gz or .zip. Default: they are fetched, see DISTJUDGE_CACHE."""
    prompts: Annotated[str | None, tyro.conf.arg(aliases=["--template"])] = None
    """A template of your own, with the placeholders of the one in data/prompts/; own: any {column} of the table."""
    split: Literal["", "group", "random", "published", "none"] = ""
    """8:2 by group (premise, article, question), 8:2 at random as in the paper (items of one group on both sides), the
    data set's own (emobank, helpsteer2_pref), or one file, items.jsonl. Default: group; emobank: published."""
    seed: int = 0
    """Seed of the split and of `limit`."""
    min_votes: int | None = None
    """Leave out items with fewer votes. Default: 2 for snli and mnli, whose training sets mostly have one label, else 1."""
    limit: int = 0
    """Keep so many items at most, drawn at random; 0 keeps all."""
    without: tuple[str, ...] = ()
    """Files of items, test sets: leave out what shares a prompt, a group or an id with them."""

    votes: Literal["both", "experts", "crowd"] = "both"
    """summeval: whose ratings."""
    dimension: tuple[str, ...] = ()
    """summeval: coherence, consistency, fluency, relevance; helpsteer2: helpfulness, correctness, coherence, complexity,
    verbosity; default all, each an item of its own. emobank: valence (the default), arousal or dominance."""
    drop_first_label: bool = False
    """snli, mnli: leave out the first label of an item, which is that of the writer of the hypothesis."""

    text: str | None = None
    """own: the column with the judged text: {text} in the template, or without a template the whole prompt."""
    label: tuple[str, ...] = ()
    """own: the column with the votes; or several, each one person's votes."""
    counts: tuple[str, ...] = ()
    """own, instead of label: one column that holds {label: votes} as JSON, or several, one a label, that hold numbers."""
    item: str | None = None
    """own: the column that tells items apart. Default: equal prompts are one item (several label or counts columns: a row is)."""
    group: str | None = None
    """own: the column of the group, whose items never end up on both sides of the split."""
    labels: tuple[str, ...] = ()
    """own: all labels, in order, or a range such as 1-5 or -3..3; capitals are ignored then. Default: those found."""
    hub_split: str = "train"
    """own: which split of a Hugging Face data set."""


# --- prompts ----------------------------------------------------------------------------------------------------------
def fill(template: str, values: dict[str, Any]) -> str:
    """The template with its placeholders replaced, once: braces in a value stay as they are."""
    return re.sub(r"\{([^{}\n]+)\}", lambda m: str(values[m[1]]) if m[1] in values else m[0], template)


def read_template(config: PrepareConfig, name: str, needed: Iterable[str], optional: Iterable[str] = ()) -> str:
    """The task's prompt template. `needed` placeholders must stand in it once, `optional` ones may."""
    path, needed, optional = Path(config.prompts) if config.prompts else PROMPTS / f"{name}.txt", list(needed), list(optional)
    try:
        template = path.read_text(encoding="utf-8-sig").rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: the template cannot be read: {error}") from None
    found = [name for name in re.findall(r"\{([^{}\n]+)\}", template) if re.fullmatch(r"\w+", name) or name in needed + optional]
    if unknown := set(found) - {*needed, *optional}:
        raise InputError(f"{path}: unknown placeholder {{{min(unknown)}}}; there are "
                         + ", ".join("{" + field + "}" for field in [*needed, *optional]))
    if missing := [field for field in needed if found.count(field) != 1]:
        raise InputError(f"{path}: the placeholder {{{missing[0]}}} must stand in it once")
    return template


def text_key(kind: str, text: str) -> str:
    """The group of all items with this premise, article or question, written alike in every data set. Spaces do not matter."""
    return f"{kind} {hashlib.sha256(' '.join(text.split()).encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"


def field(where: str, row: dict[str, Any], *names: str, kind: type = str) -> Any:
    """row[name] for the first name that is there. Raises InputError if none is, or if it is not of the kind."""
    for name in names:
        if name in row:
            if not isinstance(row[name], kind) or isinstance(row[name], bool):
                raise InputError(f"{where}: {name}: must be {kind.__name__}, not {_short(repr(row[name]))}")
            if isinstance(row[name], str) and not distjudge.is_text(row[name]):
                raise InputError(f"{where}: {name}: holds a lone surrogate, which is no character")
            return row[name]
    raise InputError(f"{where}: {names[0]}: missing; the row has {', '.join(sorted(row)[:12])}")


def progress(rows: Iterable[Any], what: str) -> Iterator[Any]:
    from tqdm import tqdm

    yield from tqdm(rows, desc=what, unit=" rows", disable=None, mininterval=0.5, leave=False)


def raw_rows(config: PrepareConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    for path in config.raw:
        yield from progress(sources.read_rows(path), Path(path).name)


def texts_of(where: str, row: dict[str, Any], name: str) -> list[str]:
    """row[name], which must be a list of texts."""
    for text in (texts := field(where, row, name, kind=list)):
        if not isinstance(text, str) or not distjudge.is_text(text):
            raise InputError(f"{where}: {name}: must be a list of texts, not of {_short(repr(text))}")
    return texts


class Ids:
    """Ids as published; where one comes again, -2, -3, ... is added."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()

    def __call__(self, name: str) -> str:
        self.seen[name] += 1
        return name if self.seen[name] == 1 else f"{name}-{self.seen[name]}"


def tally(labels: Iterable[str], votes: Iterable[str]) -> dict[str, int]:
    counts = dict.fromkeys(labels, 0)
    for vote in votes:
        counts[vote] += 1
    return counts


# --- converters: (items with "published" where the data set has a split of its own, what goes into the card) ----------
def nli(config: PrepareConfig) -> tuple[list[dict], dict]:
    """SNLI, MNLI and the files written in their manner: {sentence1 or premise, sentence2 or hypothesis, annotator_labels}."""
    template = read_template(config, "snli", ["premise", "hypothesis"])
    rows, ids, read, dropped = [], Ids(), Counter(), Counter({"no text": 0, "no label": 0})
    for where, row in raw_rows(config):
        premise, hypothesis = field(where, row, "sentence1", "premise"), field(where, row, "sentence2", "hypothesis")
        votes = field(where, row, "annotator_labels", kind=list)
        read["rows"] += 1
        read["votes"] += len(votes)
        gold = row.get("gold_label", row.get("label"))
        read["gold label '-', votes kept"] += gold in ("-", None)
        votes = [vote for vote in votes[config.drop_first_label:] if vote]
        if wrong := [vote for vote in votes if vote not in NLI]:
            raise InputError(f"{where}: annotator_labels: unknown label {_listed(map(str, wrong[:5]))}; the labels are {_listed(NLI)}")
        if not premise.strip() or hypothesis.strip().lower() in ("", "n/a"):
            dropped["no text"] += 1
        elif not votes:
            dropped["no label"] += 1
        else:
            prompt = fill(template, {"premise": premise, "hypothesis": hypothesis})
            rows.append({"id": ids(str(field(where, row, "pairID"))), "prompt": prompt, "counts": tally(NLI, votes),
                         "group": text_key("premise", premise)})
    licence = {"snli": "CC BY-SA 4.0", "mnli": "OANC, CC BY-SA 3.0, CC BY 3.0, US public domain, by genre"}[config.task]
    notes = ["the first label of an item is that of the hypothesis's writer" + ("; left out" if config.drop_first_label else "")]
    return rows, {"labels": NLI, "ordered": False, "licence": licence, "spellings": SPELLINGS["nli"], "read": dict(read),
                  "dropped": dict(dropped), "notes": notes}


def chaosnli(config: PrepareConfig) -> tuple[list[dict], dict]:
    template = read_template(config, "snli", ["premise", "hypothesis"])
    letters = {"entailment": "e", "neutral": "n", "contradiction": "c"}
    rows, ids, read, dropped = [], Ids(), Counter(), Counter({"abductive (alphaNLI)": 0, "no text": 0})
    for where, row in raw_rows(config):
        texts, votes = field(where, row, "example", kind=dict), field(where, row, "label_counter", kind=dict)
        read["rows"] += 1
        if "obs1" in texts:  # another task: which of two hypotheses explains what happened
            dropped["abductive (alphaNLI)"] += 1
            continue
        premise, hypothesis = field(where, texts, "premise"), field(where, texts, "hypothesis")
        if wrong := set(votes) - set(letters.values()):
            raise InputError(f"{where}: label_counter: unknown label {_listed(wrong)}; the labels are {_listed(letters.values())}")
        if wrong := [n for n in votes.values() if not isinstance(n, int) or n < 0]:
            raise InputError(f"{where}: label_counter: a number of votes is needed, not {_short(repr(wrong[0]))}")
        if not premise.strip() or not hypothesis.strip():
            dropped["no text"] += 1
            continue
        rows.append({"id": ids(field(where, row, "uid")), "prompt": fill(template, {"premise": premise, "hypothesis": hypothesis}),
                     "counts": {label: votes.get(letter, 0) for label, letter in letters.items()}, "group": text_key("premise", premise)})
    return rows, {"labels": NLI, "ordered": False, "licence": "CC BY-NC 4.0", "spellings": SPELLINGS["nli"], "read": dict(read),
                  "dropped": dict(dropped), "notes": ["chosen by its authors for disagreement"]}


def dimensions(config: PrepareConfig) -> list[str]:
    known = list(QUALITIES[config.task])
    if wrong := [d for d in config.dimension if d not in known]:
        raise InputError(f"dimension: '{wrong[0]}' is not one of {', '.join(known)}")
    return list(dict.fromkeys(config.dimension)) or known


def summeval(config: PrepareConfig) -> tuple[list[dict], dict]:
    """The annotation files, one or several, with the article in "text" or in a Parquet file of CNN/DailyMail (id, article)."""
    template = read_template(config, "summeval", ["quality", "article", "summary"])
    names = {"both": ["expert", "turker"], "experts": ["expert"], "crowd": ["turker"]}[config.votes]
    found, articles, read = [], {}, Counter()
    for where, row in raw_rows(config):
        if "article" in row:
            articles[field(where, row, "id")] = row["article"]
        else:
            found.append((where, row))
    dropped = Counter({"no article": 0, "no summary": 0})
    ids, identical, written = Ids(), 0, defaultdict(list)
    for where, row in found:
        read["summaries"] += 1
        story = field(where, row, "id")
        article = row.get("text") or articles.get(story) or articles.get(story.rsplit("-", 1)[-1]) or ""
        summary = field(where, row, "decoded")
        crowd = field(where, row, "turker_annotations", kind=list)
        identical += len(crowd) > 1 and all(vote == crowd[0] for vote in crowd)
        votes = [vote for name in names for vote in field(where, row, f"{name}_annotations", kind=list)]
        if not isinstance(article, str) or not article.strip():
            dropped["no article"] += 1
        elif not summary.strip():
            dropped["no summary"] += 1
        else:
            name = ids(f"{story}-{field(where, row, 'model_id')}")
            for quality in dimensions(config):
                ratings = [str(vote.get(quality)) if isinstance(vote, dict) else str(vote) for vote in votes]
                if wrong := [r for r in ratings if r not in RATING]:
                    raise InputError(f"{where}: {quality}: '{_short(wrong[0])}' is not 1 to 5")
                read["votes"] += len(ratings)
                prompt = fill(template, {"quality": QUALITIES["summeval"][quality], "article": article, "summary": summary})
                written[quality].append((story, {"id": f"{name}-{quality}", "prompt": prompt, "counts": tally(RATING, ratings),
                                                 "group": text_key("article", article)}))
    if dropped["no article"] and dropped["no article"] == read["summaries"]:
        raise InputError(f"{config.raw[0]}: no article text: the published annotations come without. Name cnn_dailymail's test split "
                         f"({sources.SOURCES['summeval'][1].url}) with --raw too")
    place = {story: i for i, story in enumerate(dict.fromkeys(row["id"] for _, row in found))}  # an article's summaries stand together
    rows = [row for quality in dimensions(config) for _, row in sorted(written[quality], key=lambda pair: place[pair[0]])]
    notes = [f"{config.votes}: {' and '.join({'expert': '3 experts', 'turker': '5 crowd workers'}[name] for name in names)}",
             f"{identical} of {read['summaries']} summaries carry the same crowd ratings five times over"]
    return rows, {"labels": RATING, "ordered": True, "licence": "annotations MIT; news articles third-party", "read": dict(read),
                  "dropped": dict(dropped), "dimension": dimensions(config), "notes": notes}


def mtbench(config: PrepareConfig) -> tuple[list[dict], dict]:
    """Votes with their conversations (the published Parquet file), or without, joined with FastChat's questions and answers.

    Answer a is that of the model whose name comes first in the alphabet; votes on either order of a pair count for the one item.
    """
    template = read_template(config, "mtbench", ["question", "answer_a", "answer_b"])
    votes, questions, answers, texts = [], {}, {}, {}
    read, dropped = Counter(), Counter({"judged by a model": 0, "no text": 0})
    for where, row in raw_rows(config):
        if "winner" in row:
            votes.append((where, row))
        elif "choices" in row:
            choices = field(where, row, "choices", kind=list)
            if not choices or not isinstance(choices[0], dict):
                raise InputError(f"{where}: choices: must be a list of {{\"turns\": [...]}}, not {_short(repr(choices))}")
            turns = texts_of(where, choices[0], "turns")
            key = field(where, row, "model_id"), field(where, row, "question_id", kind=int)
            if answers.setdefault(key, turns) != turns:
                raise InputError(f"{where}: another answer of {key[0]} to question {key[1]} was read before; if one file holds reference "
                                 "answers, leave it out")
        else:
            questions[field(where, row, "question_id", kind=int)] = texts_of(where, row, "turns")
    counts: dict[tuple[int, int, str, str], dict[str, int]] = {}
    judges: dict[tuple[int, int, str, str], set] = defaultdict(set)
    twice = 0
    for where, row in votes:
        read["votes"] += 1
        question, turn = field(where, row, "question_id", kind=int), field(where, row, "turn", kind=int)
        shown, winner = [field(where, row, "model_a"), field(where, row, "model_b")], field(where, row, "winner")
        judge = str(row.get("judge", ""))
        if judge.startswith(("gpt4", "gpt-4", "['gpt-4")):
            dropped["judged by a model"] += 1
            continue
        if turn not in (1, 2):
            raise InputError(f"{where}: turn: {turn} is not 1 or 2")
        if shown[0] == shown[1]:
            raise InputError(f"{where}: model_b: the same as model_a, {shown[0]}")
        if winner not in ("model_a", "model_b") and not winner.startswith("tie"):
            raise InputError(f"{where}: winner: '{_short(winner)}' is not model_a, model_b or tie")
        key = (question, turn, *sorted(shown))
        label = "tie" if winner.startswith("tie") else "a" if row[winner] == key[2] else "b"
        counts.setdefault(key, dict.fromkeys(PAIR, 0))[label] += 1
        twice += bool(judge) and judge in judges[key]
        judges[key].add(judge)
        for side, model in zip("ab", shown, strict=True):
            if conversation := row.get(f"conversation_{side}"):
                if not isinstance(conversation, list) or not all(isinstance(message, dict) for message in conversation):
                    raise InputError(f"{where}: conversation_{side}: must be a list of messages, not {_short(repr(conversation))}")
                said = [field(where, message, "content") for message in conversation]
                texts.setdefault((model, question), (said[0::2], said[1::2]))
    rows, places, empty = [], {row["question_id"]: where for where, row in votes}, 0
    for (question, turn, *models), tallied in sorted(counts.items(), key=lambda entry: (entry[0][1], entry[0][0], entry[0][2:])):
        said = [texts.get((m, question)) or (questions.get(question), answers.get((m, question))) for m in models]
        if missing := [m for m, (asked, answered) in zip(models, said, strict=True) if not asked or not answered]:
            raise InputError(f"{places[question]}: question {question}: its text or the answer of {missing[0]} is missing: name the "
                             "file with the conversations, or FastChat's question.jsonl and model_answer/*.jsonl, with --raw too")
        asked, answered = said[0][0][:turn], [[text.strip() or "(no answer)" for text in pair[1][:turn]] for pair in said]
        if len(asked) < turn or not all(text.strip() for text in asked) or any(len(texts) < turn for texts in answered):
            dropped["no text"] += 1
            continue
        empty += any("(no answer)" in texts for texts in answered)
        one, other = ("\n\nTo the second question:\n".join(texts) for texts in answered)
        values = {"question": "\n\nSecond question, after the first was answered:\n".join(asked), "answer_a": one, "answer_b": other}
        rows.append({"id": f"{question}-{turn}-{models[0]}-{models[1]}", "prompt": fill(template, values), "counts": tallied,
                     "group": text_key("question", asked[0]),
                     "swap": {"prompt": fill(template, values | {"answer_a": other, "answer_b": one}), "labels": SWAP}})
    notes = ["answer a is that of the model whose name comes first in the alphabet",
             f"votes that are a judge's second on the same pair: {twice}", f"items with an empty answer, shown as (no answer): {empty}"]
    return rows, {"labels": PAIR, "ordered": False, "licence": "votes CC BY 4.0; answers Apache-2.0", "spellings": SPELLINGS["pair"],
                  "read": dict(read), "dropped": dict(dropped), "notes": notes}


def conversation(prompt: str) -> str:
    """HelpSteer2's prompt, whose later turns are set off by <extra_id_1>, as text with speakers."""
    parts = re.split(r"\n?<extra_id_1>(User|Assistant)\n", prompt)
    return "\n\n".join(f"{speaker}:\n{text}" for speaker, text in zip(["User", *parts[1::2]], parts[0::2], strict=True))


def helpsteer2(config: PrepareConfig) -> tuple[list[dict], dict]:
    template = read_template(config, "helpsteer2", ["quality", "conversation", "reply"])
    read, dropped, written = Counter(), Counter({"no text": 0, "no rating": 0}), defaultdict(list)
    for where, row in raw_rows(config):
        read["replies"] += 1
        prompt, reply = field(where, row, "prompt"), field(where, row, "response")
        if not prompt.strip() or not reply.strip():
            dropped["no text"] += 1
            continue
        for quality in dimensions(config):
            ratings = [vote for vote in field(where, row, quality, kind=list) if vote is not None]
            if wrong := [vote for vote in ratings if isinstance(vote, bool) or vote not in range(5)]:
                raise InputError(f"{where}: {quality}: {_short(repr(wrong[0]))} is not 0 to 4")
            read["votes"] += len(ratings)
            if not ratings:
                dropped["no rating"] += 1
                continue
            values = {"quality": QUALITIES["helpsteer2"][quality], "conversation": conversation(prompt), "reply": reply}
            counts = tally(RATING, [str(int(vote) + 1) for vote in ratings])
            written[quality].append({"id": f"{read['replies']}-{quality}", "prompt": fill(template, values), "counts": counts,
                                     "group": text_key("question", prompt)})
    return [row for quality in dimensions(config) for row in written[quality]], {
        "labels": RATING, "ordered": True, "licence": "CC BY 4.0", "read": dict(read), "dropped": dict(dropped),
        "dimension": dimensions(config), "notes": ["published from 0 to 4, here from 1 to 5"]}


def helpsteer2_pref(config: PrepareConfig) -> tuple[list[dict], dict]:
    """Every annotator's strength from -3 (reply 1 much better) to 3: {-3, -2} is a, {-1, 0, 1} tie, {2, 3} b; -100 is no verdict."""
    template = read_template(config, "helpsteer2_pref", ["conversation", "answer_a", "answer_b"])
    folded = {-3: "a", -2: "a", -1: "tie", 0: "tie", 1: "tie", 2: "b", 3: "b"}
    published = {"train": {"published": "train"}, "val": {"published": "test"}}
    rows, read, dropped = [], Counter(), Counter({"no text": 0, "no verdict": 0, "votes without a verdict": 0})
    for where, row in raw_rows(config):
        read["pairs"] += 1
        prompt, one, other = (field(where, row, name) for name in ("prompt", "response_1", "response_2"))
        strengths = [vote.get("strength") if isinstance(vote, dict) else vote
                     for vote in field(where, row, "all_preferences_unprocessed", kind=list)]
        if wrong := [s for s in strengths if s not in (None, -100) and s not in list(folded)]:
            raise InputError(f"{where}: strength: {_short(repr(wrong[0]))} is not -3 to 3")
        read["votes"] += len(strengths)
        votes = [folded[s] for s in strengths if s in folded]
        dropped["votes without a verdict"] += len(strengths) - len(votes)
        if not prompt.strip() or not one.strip() or not other.strip():
            dropped["no text"] += 1
        elif not votes:
            dropped["no verdict"] += 1
        else:
            values = {"conversation": conversation(prompt), "answer_a": one, "answer_b": other}
            rows.append({"id": str(read["pairs"]), "prompt": fill(template, values), "counts": tally(PAIR, votes),
                         "group": text_key("question", prompt),
                         "swap": {"prompt": fill(template, values | {"answer_a": other, "answer_b": one}), "labels": SWAP}}
                        | published.get(str(row.get("split")), {}))
    return rows, {"labels": PAIR, "ordered": False, "licence": "CC BY 4.0", "spellings": SPELLINGS["pair"], "read": dict(read),
                  "dropped": dict(dropped), "notes": ["strengths -3, -2 are a; -1, 0, 1 tie; 2, 3 b"]}


def emobank(config: PrepareConfig) -> tuple[list[dict], dict]:
    dimension = (config.dimension or ("valence",))[0]
    if dimension not in EMOTIONS or len(config.dimension) > 1:
        raise InputError(f"dimension: one of {', '.join(EMOTIONS)} is needed, not {' '.join(config.dimension)}")
    letter, low, high = EMOTIONS[dimension]
    template = read_template(config, "emobank", ["text"], ["dimension", "low", "high"])
    template = fill(template, {"dimension": dimension, "low": low, "high": high})
    expected = {"emobank.csv": {"id", "split", "V", "A", "D", "text"}, "individual_reader_ratings.csv": {"id", "V", "A", "D"}}
    tables, paths = {}, {}
    for path in config.raw:
        columns, rows = sources.read_csv(path)
        kind = next((kind for kind, names in expected.items() if set(columns) == names), None)
        if not kind:
            known = " or ".join(f"{kind} ({', '.join(sorted(names))})" for kind, names in expected.items())
            raise InputError(f"{path}: its columns {sorted(columns)} are not those of {known}")
        if kind in tables:
            raise InputError(f"{path}: is {kind}, which {paths[kind]} is too")
        tables[kind], paths[kind] = rows, path
    if set(tables) != set(expected):
        raise InputError(f"raw: {' and '.join(sorted(set(expected) - set(tables)))} of EmoBank's folder corpus/ must be named too")
    counts: dict[str, dict[str, int]] = {}
    for line, rating in enumerate(tables["individual_reader_ratings.csv"], 2):
        if rating[letter] not in RATING:
            raise InputError(f"{paths['individual_reader_ratings.csv']}: row {line}: {letter}: '{_short(rating[letter])}' is not 1 to 5")
        counts.setdefault(rating["id"], dict.fromkeys(RATING, 0))[rating[letter]] += 1
    names, sentences, items = {"train": "train", "dev": "valid", "test": "test"}, tables["emobank.csv"], []
    dropped = {"rated, without text": len(set(counts) - {row["id"] for row in sentences}), "text without ratings": 0, "empty text": 0}
    for line, row in enumerate(sentences, 2):
        if row["split"] not in names:
            raise InputError(f"{paths['emobank.csv']}: row {line}: split: '{_short(row['split'])}' is not one of {', '.join(names)}")
        text = row["text"].strip()
        if not text or row["id"] not in counts:
            dropped["text without ratings" if text else "empty text"] += 1
        else:
            items.append({"id": row["id"], "prompt": fill(template, {"text": text}), "counts": counts[row["id"]],
                          "published": names[row["split"]]})
    return items, {"labels": RATING, "ordered": True, "licence": "CC BY-SA 4.0", "dimension": dimension, "dropped": dropped,
                   "read": {kind: len(rows) for kind, rows in tables.items()}}


# --- a table of one's own ---------------------------------------------------------------------------------------------
def vote_text(value: Any) -> str:
    """A cell as a label: without spaces around it, whole numbers in digits ("4.0" is 4), "" for an empty cell."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    text = str(value).strip()
    number = re.fullmatch(r"([+-]?\d{1,300})(\.0+)?", text)
    return str(int(number[1])) if number else text


def cell(where: str, name: str, value: Any) -> Any:
    """A cell that holds one thing, text or a number. Raises InputError for bytes, lists, objects and text that is none."""
    if isinstance(value, (bytes, bytearray, list, tuple, dict)) or (isinstance(value, str) and not distjudge.is_text(value)):
        what = "text without lone surrogates" if isinstance(value, str) else "text or a number"
        raise InputError(f"{where}: {_short(name)}: must be {what}, not {_short(repr(value))}")
    return value


def named_labels(labels: Iterable[str]) -> list[str]:
    """("1-5",) or ("-3..3",) -> every whole number of the range; other names as they are."""
    out: list[str] = []
    for label in labels:
        ends = re.fullmatch(r"([+-]?\d{1,300})(?:\.\.|-)([+-]?\d{1,300})", label.strip())
        if ends and not int(ends[1]) < int(ends[2]) <= int(ends[1]) + 100:
            raise InputError(f"labels: '{label}' is not a range from low to high")
        out += map(str, range(int(ends[1]), int(ends[2]) + 1)) if ends else [vote_text(label)]
    folded = [label.casefold() for label in out]
    if twice := [label for label in folded if not label or folded.count(label) > 1]:
        raise InputError(f"labels: {_listed(out)} names " + ("a label twice (capitals are ignored)" if twice[0] else "an empty label"))
    return out


def found_labels(first: dict[str, str], what: str) -> list[str]:
    """The labels of a column in order, from those that occur (label -> where first). Raises InputError if they look like no one scale."""
    whole = [label for label in first if re.fullmatch(r"-?\d{1,300}", label)]
    words = [label for label in first if not distjudge.are_numeric([label])]
    if parts := [label for label in first if label not in whole and label not in words]:
        raise InputError(f"{first[parts[0]]}: {what}: '{_short(parts[0], 20)}' is not a whole number; a vote is one label (is this column "
                         "a mean?)")
    if whole and words:
        raise InputError(f"{first[words[0]]}: {what}: mixed scales: '{_short(words[0], 20)}' among numbers such as "
                         f"'{_short(whole[0], 20)}' ({first[whole[0]]}); name the labels that count with --labels, or clean the column")
    if len(words) > 20:
        raise InputError(f"{what}: {len(words)} different labels, such as {_listed(words[:4])}: is it the right column?")
    folded: dict[str, str] = {}
    for label in words:
        if folded.setdefault(label.casefold(), label) != label:
            raise InputError(f"{first[label]}: {what}: '{_short(label, 20)}' and '{_short(folded[label.casefold()], 20)}' differ only in "
                             f"capitals; with --labels {' '.join(_short(word, 20) for word in sorted({w.casefold() for w in words}))} both "
                             "count as one")
    if twins := distjudge.look_alike(words):
        raise InputError(f"{first[twins[1]]}: {what}: '{_short(twins[1], 20)}' is written in two ways (composed and combining characters)")
    if whole:
        low, high = min(map(int, whole)), max(map(int, whole))
        if high - low > 20:
            odd = max(whole, key=lambda label: abs(int(label)))
            raise InputError(f"{first[odd]}: {what}: mixed scales? The votes reach from {_short(low)} to {_short(high)}; name the scale "
                             f"with --labels, as in --labels 1-10")
        return list(map(str, range(low, high + 1)))
    return sorted(words)


def own(config: PrepareConfig) -> tuple[list[dict], dict]:
    """One row a vote (label, and item or equal prompts), or one row an item (several label columns, or counts)."""
    if not config.raw:
        raise InputError("raw: name your table: a CSV, Excel, Parquet or .jsonl file, or a Hugging Face data set")
    if bool(config.label) == bool(config.counts):
        raise InputError("label: name the column with the votes with --label" + (", or --counts, not both" if config.label else
                         f", or columns of counts with --counts; {config.raw[0]} has "
                         f"{', '.join(sources.read_table(config.raw[0], config.hub_split)[0])}"))
    by_vote, what = len(config.label) == 1, " ".join(config.label or config.counts)
    wanted = {"text": [config.text] if config.text else [], "label": config.label, "counts": config.counts,
              "item": [config.item] if config.item else [], "group": [config.group] if config.group else []}
    order = named_labels(config.labels)
    spelled = {label.casefold(): label for label in order}
    items: dict[Any, dict] = {}
    read, dropped = Counter(), Counter({"rows with empty text": 0, "votes without a label": 0, "items without votes": 0})
    first: dict[str, str] = {}
    problems: list[str] = []
    for path in config.raw:
        columns, rows = sources.read_table(path, config.hub_split)
        for option, names in wanted.items():
            for name in names:
                if name not in columns:
                    close = difflib.get_close_matches(name, columns, 1)
                    raise InputError(f"{path}: {option}: no column '{_short(name)}'" +
                                     (f", did you mean '{_short(close[0])}'?" if close else ".") +
                                     f" The columns are {', '.join(_short(c, 30) for c in columns)}")
        if not config.prompts and not config.text:
            raise InputError(f"{path}: text: name the column with the judged text (--text), or a template of columns (--template). "
                             f"The columns are {', '.join(_short(c, 30) for c in columns)}")
        template = read_template(config, "", ["text"] if config.text else [], columns) if config.prompts else "{text}"
        shown = re.findall(r"\{([^{}\n]+)\}", template)
        for where, row in progress(rows, Path(path).name):
            read["rows"] += 1
            taken = dict.fromkeys(name for name in [*shown, config.text, config.item, config.group] if name in columns)
            values = {name: "" if distjudge.is_missing(cell(where, name, row.get(name))) else str(row[name]).strip() for name in taken}
            values |= {"text": values[config.text]} if config.text else {}
            if any(not values[name] for name in shown if name in values):
                dropped["rows with empty text"] += 1
                continue
            prompt = fill(template, values)
            key = values[config.item] if config.item else prompt if by_vote else where
            if config.item and not key:
                raise InputError(f"{where}: {config.item}: empty, so the vote belongs to no item")
            group = values[config.group] if config.group else None
            item = items.setdefault(key, {"prompt": prompt, "group": group, "votes": Counter(), "where": where, "rows": 0})
            if item["prompt"] != prompt or item["group"] != group:
                raise InputError(f"{where}: item '{_short(key)}': its {'text' if item['prompt'] != prompt else 'group'} differs from that "
                                 f"at {item['where']}")
            item["rows"] += 1
            if config.item and not by_vote and item["rows"] > 1:
                raise InputError(f"{where}: item '{_short(key)}': stands twice, first at {item['where']}; with several columns of votes "
                                 "a row is an item")
            for label, number in row_votes(config, where, row):
                read["votes"] += number
                if not label:
                    dropped["votes without a label"] += number
                    continue
                if number > 10**9:
                    raise InputError(f"{where}: {what}: more than a billion votes for '{_short(label, 30)}'")
                label = spelled.get(label.casefold(), label)
                if order and label not in order:
                    problems.append(f"{where}: {what}: '{_short(label, 30)}' is not one of {_listed(order)}")
                first.setdefault(label, where)
                item["votes"][label] += number
    if problems:
        raise InputError("\n".join(problems[:5] + ([f"and {len(problems) - 5} more rows"] if len(problems) > 5 else [])))
    if not order:
        order = list(config.counts) if len(config.counts) > 1 else found_labels(first, what)
    ids, out = Ids(), []
    for number, (key, item) in enumerate(items.items(), 1):
        if not sum(item["votes"].values()):
            dropped["items without votes"] += 1
            continue
        out.append({"id": ids(key if config.item else str(number)), "prompt": item["prompt"],
                    "counts": {label: item["votes"][label] for label in order}} | ({"group": item["group"]} if item["group"] else {}))
    if not out:
        raise InputError(f"{config.raw[0]}: no item is left of {read['rows']} rows: {dict(dropped)}")
    if len(order) < 2:
        raise InputError(f"{what}: only the label {_listed(order)} occurs; name them all with --labels")
    if all(sum(row["counts"].values()) == 1 for row in out):
        log.warning("every item has one vote only: nothing shows how far people disagree on one item, so the noise floor cannot be told")
    return out, {"labels": order, "ordered": distjudge.are_numeric(order), "licence": "your own", "read": dict(read),
                 "dropped": dict(dropped)}


def row_votes(config: PrepareConfig, where: str, row: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """(label, number of votes) of a row; ("", 1) for an empty cell of a label column."""
    for column in config.label:
        yield vote_text(cell(where, column, row.get(column))), 1
    if len(config.counts) == 1:
        given = row.get(config.counts[0])
        try:
            given = json.loads(given, object_pairs_hook=distjudge._Object) if isinstance(given, str) else given
            pairs = list(given.items()) if isinstance(given, dict) else None
        except (ValueError, RecursionError):
            pairs = None
        if pairs is None:
            raise InputError(f"{where}: {config.counts[0]}: must be an object such as {{\"1\": 0, \"2\": 3}}, not {_short(repr(given))}")
        if twice := getattr(given, "twice", ()):
            raise InputError(f"{where}: {config.counts[0]}: '{_short(twice[0], 30)}' stands twice in it")
    else:
        pairs = [(column, row.get(column)) for column in config.counts]
    for label, number in pairs:
        text = vote_text(number) or "0"
        if not re.fullmatch(r"[0-9]{1,300}", text):
            raise InputError(f"{where}: {_short(label)}: a number of votes is needed, not '{_short(text, 30)}'")
        if int(text) or len(config.counts) == 1:
            yield vote_text(cell(where, "label", label)), int(text)


# --- from items to files ----------------------------------------------------------------------------------------------
CONVERTERS = {"snli": nli, "mnli": nli, "chaosnli": chaosnli, "summeval": summeval, "mtbench": mtbench, "helpsteer2": helpsteer2,
              "helpsteer2_pref": helpsteer2_pref, "emobank": emobank, "own": own}


def convert(config: PrepareConfig) -> tuple[list[dict], dict]:
    """All items of a data set, in the order of its files, and what its card says of them; nothing is left out or split yet."""
    if not config.raw and config.task != "own":
        folder = sources.cache_folder(config.task)
        config.raw = tuple(str(sources.fetch(source, folder)) for source in sources.SOURCES[config.task])
    rows, card = CONVERTERS[config.task](config)
    if not rows:
        raise InputError(f"{config.raw[0]}: no items in it: read {card['read']}, dropped {card['dropped']}")
    return rows, card


def split_rows(items: list[Item], rows: dict[str, dict], how: str, seed: int, dropped: dict[str, int]) -> dict[str, list[Item]]:
    if how == "none":
        return {"items": items}
    if how == "published":
        if not all("published" in rows[item.id] for item in items):
            raise InputError("split: published: this data set has no split of its own")
        splits: dict[str, list[Item]] = {name: [] for name in ("train", "valid", "test")}
        taken: set[str] = set()
        dropped["also in test or valid"] = 0
        for name in ("test", "valid", "train"):  # a prompt of two splits stays with the first of these
            here = [item for item in items if rows[item.id]["published"] == name]
            splits[name] = [item for item in here if item.prompt not in taken]
            dropped["also in test or valid"] += len(here) - len(splits[name])
            taken |= {item.prompt for item in here}
        return {name: found for name, found in splits.items() if found or name != "valid"}
    if how == "random":
        items = [dataclasses.replace(item, group=None) for item in items]
    try:
        train, test = distjudge.split_items(items, seed=seed)
    except InputError as error:
        raise InputError(f"split: {error}; --split none writes one file") from None
    return {"train": train, "test": test}


def main(config: PrepareConfig) -> None:
    if not config.out.strip():
        raise InputError("out: name a folder")
    if config.limit < 0 or (config.min_votes is not None and config.min_votes < 1):
        raise InputError("limit: must be 0 or more" if config.limit < 0 else f"min_votes: must be 1 or more, not {config.min_votes}")
    least = config.min_votes or (2 if config.task in ("snli", "mnli") else 1)
    how = config.split or ("published" if config.task == "emobank" else "group")
    converted, card = convert(config)
    read, dropped = card.pop("read"), card.pop("dropped")
    enough = [row for row in converted if sum(row["counts"].values()) >= least]
    if least > 1:
        dropped[f"fewer than {least} votes"] = len(converted) - len(enough)
    if not enough:
        raise InputError(f"{config.raw[0]}: no item has {least} votes or more (--min_votes)")
    rows = {row["id"]: row for row in enough}
    items = distjudge.load_items(enough, labels=card["labels"])
    for path in config.without:
        items, shared = distjudge.keep_apart(items, distjudge.load_items(path), overlap="remove")
        dropped |= {f"in {Path(path).name} by {name}": dropped.get(f"in {Path(path).name} by {name}", 0) + n for name, n in shared.items()}
    if config.limit and len(items) > config.limit:
        dropped["over the limit"] = len(items) - config.limit
        chosen = set(random.Random(config.seed).sample(range(len(items)), config.limit))
        items = [item for i, item in enumerate(items) if i in chosen]
    if not items:
        raise InputError(f"{config.raw[0]}: no items are left: dropped {dropped}")
    splits = split_rows(items, rows, how, config.seed, dropped)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    for name in {"train", "valid", "test", "items"} - set(splits):  # of an earlier run with another split
        (out / f"{name}.jsonl").unlink(missing_ok=True)
    unwritten = {"published", "group"} if how == "random" else {"published"}
    for name, found in splits.items():
        kept = ({k: v for k, v in rows[item.id].items() if k not in unwritten} for item in found)
        distjudge.write_lines(out / f"{name}.jsonl", (json.dumps(row, ensure_ascii=False) for row in kept))
    votes = Counter(int(item.votes) for found in splits.values() for item in found)
    name = "snli" if config.task in ("mnli", "chaosnli") else config.task  # one template for the three
    template = Path(config.prompts) if config.prompts else PROMPTS / f"{name}.txt"
    urls = [source.url for source in sources.SOURCES.get(config.task, ())]
    card = {"task": config.task, **card, "source": urls, "items": {name: len(found) for name, found in splits.items()},
            "votes_an_item": {str(n): votes[n] for n in sorted(votes)}, "read": read, "dropped": dropped, "split": how, "seed": config.seed,
            "groups": len({item.group for item in items if item.group is not None}),
            "prompt": {"file": template.name, "sha256": sources.sha256_of(template)} if template.exists() else {"file": None},
            "sha256": {Path(path).name: sources.sha256_of(path) for path in config.raw if Path(path).is_file()}}
    distjudge.write_json(out / "card.json", card)
    print(f"read {read}\ndropped {dropped}\nkept {card['items']}, votes an item {card['votes_an_item']}")
    for note in card.get("notes", []):
        print(f"note: {note}")
    if card.get("spellings"):
        print(f"judges may spell the labels more ways: --spellings {' '.join(card['spellings'])}")
    print(f"labels {' '.join(card['labels'])}\nwrote {out}")


if __name__ == "__main__":
    distjudge.cli(main, PrepareConfig)
