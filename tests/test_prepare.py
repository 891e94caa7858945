"""Converters: exact counts on the published files, hand-made files in the published formats for the rest."""

import gzip
import hashlib
import json
import zipfile

import distjudge
from distjudge import InputError

import prepare
import pyarrow.parquet
import pytest
import tyro
from conftest import ROOT, call


def run(*arguments):
    """The command line, in this process."""
    prepare.main(tyro.cli(prepare.PrepareConfig, args=[str(argument) for argument in arguments]))


def read(folder, *names):
    paths = [folder / f"{name}.jsonl" for name in names]
    return [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines()]


def card_of(folder):
    return json.loads((folder / "card.json").read_text(encoding="utf-8"))


def write(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.fixture
def convert(tmp_path):
    """convert(task, rows, ...) -> the items written, in one file unless a --split is named, and the card."""

    def run_on(task, rows, *arguments, name="x.jsonl"):
        raw = write(tmp_path / name, rows)
        split = () if "--split" in arguments else ("--split", "none")
        run(task, "--raw", raw, "--out", tmp_path / "o", *split, *arguments)
        names = ("train", "test") if "--split" in arguments else ("items",)
        return read(tmp_path / "o", *names), card_of(tmp_path / "o")

    return run_on


def published(files, folder, task, *arguments):
    """The card and all items of files as published; training items are apart from test items."""
    run(task, "--raw", *files, "--out", folder, *arguments)
    items = {path.stem: distjudge.load_items(path) for path in sorted(folder.glob("*.jsonl"))}
    distjudge.keep_apart(items.get("train", []), items.get("test", []))
    return card_of(folder), [item for side in items.values() for item in side]


def check_refused(tmp_path, monkeypatch, words, *arguments):
    """One line that says so, and nothing written."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        run(*arguments, "--out", "o")
    assert words in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "o").exists()


def nli_row(number, votes, premise="A man eats.", hypothesis="A man sleeps.", **more):
    row = {"annotator_labels": votes, "gold_label": "-", "pairID": f"{number}e"}
    return row | {"sentence1": premise, "sentence2": hypothesis} | more


def test_the_command_line(tmp_path):
    given = ["data/prepare.py", "snli", "--out", "o", "--raw"]
    rows = [nli_row(1, ["neutral"] * 5), nli_row(2, ["neutral", "entailment"], premise="Rain.")]
    write(tmp_path / "x.jsonl", rows)
    done = call(*given, "x.jsonl", cwd=tmp_path)
    said = """read: 2 rows, 7 votes, 2 rows without a gold label
left out: nothing
kept: 7 votes on 2 items, 2 to 5 an item; 1 train, 1 test
note: the first label of an item is that of the hypothesis's writer
labels: {entailment, neutral, contradiction}
wrote o
next:
  python plots/data.py o/train.jsonl
  python recipes/smollm.py --train o/train.jsonl --test o/test.jsonl --out runs/o --spellings entailment="""
    assert done.stdout.startswith(said)
    done = call(*given, "gone.jsonl", code=2, cwd=tmp_path)
    assert done.stderr == "error: gone.jsonl: no such file\n"


# --- EmoBank ----------------------------------------------------------------------------------------------
SENTENCES = (
    'id,split,V,A,D,text\n1,train,3,3,3,"So, he said: ""go""."\n2,test,3,3,3,Same words.\n'
    "3,train,3,3,3,Same words.\n4,dev,3,3,3,{braces}\n"
)
RATINGS = "id,V,A,D\n1,5,1,3\n1,4,1,3\n2,1,1,3\n3,2,2,2\n4,3,3,3\n9,3,3,3\n"
EMOBANK = ("emobank", "--raw", "ratings.csv", "emobank.csv")


def test_emobank_by_hand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "emobank.csv").write_text(SENTENCES)
    (tmp_path / "ratings.csv").write_text(RATINGS)
    run(*EMOBANK, "--out", "o")
    train, valid, test = (read(tmp_path / "o", name) for name in ("train", "valid", "test"))
    assert [(row["id"], row["counts"]) for row in train] == [("1", {"1": 0, "2": 0, "3": 0, "4": 1, "5": 1})]
    assert [row["id"] for row in valid] == ["4"] and [row["id"] for row in test] == ["2"]
    assert train[0]["prompt"] == (
        "How does this sentence make its reader feel? Rate its valence from 1 (very unpleasant) to 5 (very "
        'pleasant); 3 is neutral. Answer with the number only.\n\nSentence: So, he said: "go".'
    )
    assert valid[0]["prompt"].endswith("Sentence: {braces}") and "published" not in train[0]
    card = card_of(tmp_path / "o")
    assert card["items"] == {"train": 1, "valid": 1, "test": 1} and card["split"] == "published"
    assert card["votes_an_item"] == {"1": 2, "2": 1}
    assert card["dropped"] == {"rated item without text": 1, "item that is also in test or valid": 1}
    run(*EMOBANK, "--out", "o", "--dimension", "arousal")
    assert read(tmp_path / "o", "train")[0]["counts"] == {"1": 2, "2": 0, "3": 0, "4": 0, "5": 0}


@pytest.mark.parametrize(
    ("old", "new", "more", "words"),
    [
        (RATINGS, RATINGS + "1,6,1,1\n", "", "ratings.csv: row 8: V: '6' is not 1 to 5"),
        (RATINGS, RATINGS + "1,5,1\n", "", "ratings.csv: row 8: fewer fields than columns"),
        ("dev", "held out", "", "emobank.csv: row 5: split: 'held out' is not one of train, dev, test"),
        ("1,train", "1,{scale}", "", "split: '{scale}'"),
        (RATINGS, SENTENCES, "", "emobank.csv: is emobank.csv, by its columns, as a file before"),
        (RATINGS, "a,b\n1,2\n", "", "ratings.csv: row 2: V: missing; the row has a, b"),
        ("", "", "--raw emobank.csv", "individual_reader_ratings.csv of EmoBank's folder corpus/ must be"),
        ("", "", "--raw gone.csv", "gone.csv: no such file"),
        ("", "", "--prompts gone.txt", "gone.txt: the template cannot be read"),
        ("", "", "--prompts ratings.csv", "the placeholder {text} must stand in it once"),
        ("", "", "--dimension joy", "dimension: 'joy' is not one of valence, arousal, dominance"),
        ("", "", "--dimension valence arousal", "dimension: emobank takes one, not valence arousal"),
    ],
)
def test_emobank_refusals(tmp_path, monkeypatch, old, new, more, words):
    for name, text in (("emobank.csv", SENTENCES), ("ratings.csv", RATINGS)):
        (tmp_path / name).write_text(text.replace(old, new) if old else text)
    check_refused(tmp_path, monkeypatch, words, *EMOBANK, *more.split())


def test_emobank_as_published(data_dir, tmp_path):
    files = [data_dir("emobank") / name for name in ("emobank.csv", "individual_reader_ratings.csv")]
    card, items = published(files, tmp_path, "emobank")
    assert card["read"] == {"emobank.csv": 10062, "individual_reader_ratings.csv": 53055}
    assert card["items"] == {"train": 7984, "valid": 992, "test": 1000} and len(items) == 9976
    dropped = {"rated item without text": 486, "item that is also in test or valid": 86}
    assert card["dropped"] == dropped and len(items) + 86 == 10062
    assert card["votes_an_item"] == {"5": 9681, "6": 286, "7": 9}
    assert distjudge.labels_of(items) == list("12345")
    groups = {side: {row.get("group") for row in read(tmp_path, side)} for side in ("train", "test")}
    both = groups["test"] & groups["train"]
    assert "wsj_0132" in groups["test"] and both <= {None}  # though it is in training's texts


# --- NLI --------------------------------------------------------------------------------------------------
def test_snli_keeps_the_votes_of_items_without_a_gold_label(convert):
    rows = [
        nli_row(1, ["neutral", "entailment", "neutral", "entailment", ""]),
        nli_row(2, ["entailment"], gold_label="entailment"),
        nli_row(3, ["neutral"] * 3, hypothesis="n/a"),
        nli_row(4, ["", ""], premise="B"),
        nli_row(5, ["contradiction", "neutral"], "{hypothesis}", "{premise}", gold_label="neutral"),
        nli_row(1, ["neutral"] * 5, premise=" A  man eats. ", hypothesis="It rains."),
    ]
    (one, two, three), card = convert("snli", rows, name="x.jsonl.gz")
    assert one["id"] == "1e" and one["counts"] == {"entailment": 2, "neutral": 2, "contradiction": 0}
    assert two["prompt"].endswith("Premise: {hypothesis}\nHypothesis: {premise}") and three["id"] == "1e-2"
    made = prepare.Converted(["a", "b"], "")
    for name in ("x", "x", "x-2", "x"):
        made.add_item(name, "Hm?", {"a": 1, "b": 1})
    assert len({row["id"] for row in made.rows}) == 4  # one of their own may look like one made up
    assert one["group"] == three["group"] != two["group"] and one["group"].startswith("premise ")
    assert card["read"] == {"rows": 6, "votes": 15, "rows without a gold label": 4}
    dropped = {"item without text": 1, "item without votes": 1, "item with fewer than 2 votes": 1}
    assert card["dropped"] == dropped
    assert card["items"] == {"items": 3} and card["ordered"] is False and card["groups"] == 2
    assert card["spellings"][0] == "entailment=entailment,Entailment"
    assert set(distjudge.parse_spellings(card["spellings"])) == set(card["labels"])
    assert card["sha256"]["x.jsonl.gz"] and card["prompt"]["file"] == "snli.txt"
    assert card["source"][0].endswith("snli_1.0.zip") and card["licence"] == "CC BY-SA 4.0"
    found, _ = convert("snli", rows, "--min_votes", 1, "--drop-first-label")
    assert [row["counts"]["neutral"] for row in found] == [1, 1, 4]


def test_mnli_as_published(tmp_path, convert):
    row = nli_row(9, ["entailment", "neutral", *["entailment"] * 3], "The bus left.", genre="slate")
    parts = {
        "train": [row | {"annotator_labels": ["neutral"], "pairID": "7n"}],
        "dev_matched": [row],
        "dev_mismatched": [row | {"pairID": "8e", "sentence1": "No bus."}],
    }
    with zipfile.ZipFile(tmp_path / "multinli_1.0.zip", "w") as archive:
        for name, rows in parts.items():
            lines = "".join(json.dumps(r) + "\n" for r in rows)
            archive.writestr(f"multinli_1.0/multinli_1.0_{name}.jsonl", lines)
            archive.writestr(f"multinli_1.0/multinli_1.0_{name}.txt", "not read")
        archive.writestr("__MACOSX/multinli_1.0/._multinli_1.0_train.jsonl", b"\x00\x05")
    run("mnli", "--raw", tmp_path / "multinli_1.0.zip", "--out", tmp_path / "o")
    rows = read(tmp_path / "o", "train", "test")
    assert sorted(row["id"] for row in rows) == ["8e", "9e"]
    assert rows[0]["counts"] == {"entailment": 4, "neutral": 1, "contradiction": 0}
    card = card_of(tmp_path / "o")
    assert card["dropped"] == {"item with fewer than 2 votes": 1} and card["licence"].startswith("OANC")
    assert card["source"][0].endswith("multinli_1.0.zip")
    _, card = convert("mnli", parts["dev_matched"], name="ours.jsonl")  # may be anybody's
    assert card["source"] == [] and card["licence"] == "not known: that of the files"
    assert "ours.jsonl: in MNLI's format" in card["notes"][-1]


def test_chaosnli_by_hand_and_what_it_shares_with_snli(tmp_path, convert):
    texts = {"uid": "c1", "premise": "A man eats.", "hypothesis": "A man sleeps. "}
    chaos = {"uid": "c1", "label_counter": {"n": 70, "e": 30}, "example": texts, "old_labels": ["neutral"]}
    other = {"uid": "a1", "label_counter": {"2": 63, "1": 37}, "example": {"obs1": "x", "obs2": "y"}}
    (item,), card = convert("chaosnli", [chaos, other])
    assert item["counts"] == {"entailment": 30, "neutral": 70, "contradiction": 0}
    assert card["dropped"]["abductive item of alphaNLI"] == 1
    test = (tmp_path / "o" / "items.jsonl").rename(tmp_path / "chaos.jsonl")
    rows = [nli_row(1, ["neutral"] * 5, hypothesis="A man sleeps. "), nli_row(2, ["neutral"] * 5)]
    rows += [nli_row(3, ["neutral"] * 5, premise="Rain."), nli_row(4, ["neutral"] * 5, premise="Snow.")]
    found, card = convert("snli", rows, "--without", test)
    assert [row["id"] for row in found] == ["3e", "4e"]
    shared = {"prompt": 1, "group": 1, "id": 0}
    shared = {f"item that shares its {name} with chaos.jsonl": n for name, n in shared.items()}
    assert card["dropped"].items() >= shared.items()
    convert("snli", rows)
    config = distjudge.Config(train=(str(tmp_path / "o" / "items.jsonl"),), test=(str(test),))
    with pytest.raises(InputError, match="item 'c1': prompt: also in the training items"):
        distjudge.load_data(config)  # what every run with --test does


def test_nli_as_published(data_dir, tmp_path):
    snli, chaos, linguists = data_dir("snli"), data_dir("chaosnli"), data_dir("ling_in_loop")
    card, items = published(sorted(snli.glob("*.jsonl")), tmp_path / "snli", "snli")
    assert card["read"] == {"rows": 2566, "votes": 12827, "rows without a gold label": 39}
    assert card["items"] == {"train": 2053, "test": 513} and card["votes_an_item"] == {"4": 3, "5": 2563}
    assert card["groups"] == 852
    assert distjudge.counts_of(items).sum(0).tolist() == [4313, 4334, 4180]
    card, test = published(sorted(chaos.glob("*.jsonl")), tmp_path / "chaos", "chaosnli", "--split", "none")
    assert card["votes_an_item"] == {"100": 3113}
    kept, counts = distjudge.keep_apart(items, test, overlap="remove")
    assert counts == {"prompt": 381, "group": 573, "id": 0} and len(kept) == 2566 - 954
    without = ("--without", tmp_path / "chaos" / "items.jsonl")
    card, items = published(sorted(linguists.glob("*.jsonl")), tmp_path / "mnli", "mnli", *without)
    assert card["read"] == {"rows": 7371, "votes": 36842, "rows without a gold label": 0}
    shared = [n for name, n in card["dropped"].items() if name.startswith("item that shares")]
    assert sum(shared) == 2378 and sum(card["items"].values()) == len(items) == 4993


# --- SummEval ---------------------------------------------------------------------------------------------
def summary(story, system, text, expert=(1, 2, 5), crowd=(3, 3, 3, 3, 3)):
    def votes(numbers):
        return [dict.fromkeys(prepare.QUALITIES["summeval"], n) | {"fluency": 4} for n in numbers]

    row = {"id": story, "model_id": system, "decoded": f"Short {system}."}
    row |= {"expert_annotations": votes(expert), "turker_annotations": votes(crowd)}
    return row | ({"text": text} if text else {})


def test_summeval_by_hand(tmp_path, convert):
    raw = [("s-1", "M0", "Long one."), ("s-2", "M0", "Long two."), ("s-1", "M8", "Long one.")]
    raw = [summary(*row) for row in raw]
    rows, card = convert("summeval", raw)
    names = ["s-1-M0-coherence", "s-1-M8-coherence", "s-2-M0-coherence", "s-1-M0-consistency"]
    assert [row["id"] for row in rows][:4] == names and len(rows) == 12
    assert rows[0]["counts"] == {"1": 1, "2": 1, "3": 5, "4": 0, "5": 1}
    assert rows[6]["counts"]["4"] == 8 and rows[6]["id"] == "s-1-M0-fluency"
    assert rows[0]["group"] == rows[1]["group"] == rows[3]["group"] != rows[2]["group"]
    assert "3 of 3 summaries carry the same crowd ratings five times over" in card["notes"]
    assert card["ordered"] is True and "spellings" not in card and card["dimension"][1:2] == ["consistency"]
    for votes, counts in (("experts", [1, 1, 0, 0, 1]), ("crowd", [0, 0, 5, 0, 0])):
        more = ("--votes", votes, "--dimension", "relevance", "--split", "group")
        rows, _ = convert("summeval", raw, *more)
        assert len(rows) == 3 and list(rows[0]["counts"].values()) == counts
        assert not (tmp_path / "o" / "items.jsonl").exists()  # that of the run before


def test_summeval_joins_the_published_annotations_with_their_articles(tmp_path):
    table = pyarrow.table({"article": ["Long one."], "highlights": ["x"], "id": ["8764fb"]})
    pyarrow.parquet.write_table(table, tmp_path / "articles.parquet")
    rows = [summary("dm-test-8764fb", "M0", ""), summary("dm-test-beef", "M0", "")]
    bare = write(tmp_path / "x.jsonl", rows)
    more = ("--out", tmp_path / "o", "--split", "none")
    run("summeval", "--raw", bare, tmp_path / "articles.parquet", *more)
    assert card_of(tmp_path / "o")["dropped"]["item without text"] == 4 == len(read(tmp_path / "o", "items"))
    with pytest.raises(InputError, match="no article text: the published annotations come without"):
        run("summeval", "--raw", bare, "--out", tmp_path / "n")


def test_summeval_as_published(data_dir, tmp_path):
    files = sorted(data_dir("summeval").glob("M*.jsonl"))
    card, items = published(files, tmp_path, "summeval", "--votes", "experts")
    assert card["read"] == {"summaries": 1200, "votes": 14400} and card["groups"] == 100
    assert card["items"] == {"train": 3840, "test": 960} and card["votes_an_item"] == {"3": 4800}
    assert card["notes"][1].startswith("542 of 1200 summaries carry the same crowd ratings")
    disputed = dict.fromkeys(prepare.QUALITIES["summeval"], 0)
    for item in items:
        disputed[item.id.rsplit("-", 1)[1]] += max(item.counts.values()) < 3
    # 87, 20, 29 and 85 %
    assert disputed == {"coherence": 1046, "consistency": 245, "fluency": 344, "relevance": 1021}
    config = prepare.PrepareConfig(task="summeval", out="", raw=tuple(map(str, files)))
    rows, _ = prepare.convert(config)
    assert len(rows) == 4800 and sum(sum(row["counts"].values()) for row in rows) == 4800 * 8


# --- MT-Bench ---------------------------------------------------------------------------------------------
def vote(question, models, winner, judge="expert_1", turn=1):
    row = {"question_id": question, "model_a": models[0], "model_b": models[1], "winner": winner}
    return row | {"judge": judge, "turn": turn}


def talk(asked, answered):
    texts = [text for turn in zip(asked, answered, strict=True) for text in turn]
    pairs = zip(["user", "assistant"] * 2, texts, strict=True)
    return [{"role": role, "content": text} for role, text in pairs]


def test_mtbench_merges_the_orders_of_a_pair(tmp_path):
    votes = [vote(81, "yx", "model_a"), vote(81, "xy", "model_a", "author_1")]
    votes += [vote(81, "xy", "tie (inconsistent)"), vote(81, "xy", "tie", turn=2)]
    votes += [vote(82, "xy", "model_b"), vote(81, "xy", "model_b", "gpt4_pair")]
    asked = {81: ["Why?", "And {answer_a}?"], 82: ["Who?", "So?"]}
    said = {(m, q): [f"{m} says {q}", "" if m == "y" else "x again"] for q in asked for m in "xy"}
    questions = [{"question_id": q, "category": "c", "turns": turns} for q, turns in asked.items()]
    answers = [
        {"question_id": q, "model_id": m, "choices": [{"index": 0, "turns": turns}]}
        for (m, q), turns in said.items()
    ]
    files = {"q.jsonl": questions, "a.jsonl": answers, "v.jsonl": votes}
    raw = [write(tmp_path / name, rows) for name, rows in files.items()]
    run("mtbench", "--raw", *raw, "--out", tmp_path / "o", "--split", "none")
    first, other, second = items = read(tmp_path / "o", "items")
    assert first["id"] == "81-1-x-y" and first["counts"] == {"a": 1, "b": 1, "tie": 1}
    assert other["counts"] == {"a": 0, "b": 1, "tie": 0}
    ending = "Question:\nWhy?\n\nAnswer a:\n{} says 81\n\nAnswer b:\n{} says 81"
    assert first["prompt"].endswith(ending.format("x", "y"))
    assert first["swap"]["prompt"].endswith(ending.format("y", "x"))
    assert first["swap"]["labels"] == {"a": "b", "b": "a"}
    assert second["prompt"].endswith(
        "Question:\nWhy?\n\nSecond question, after the first was answered:\nAnd {answer_a}?\n\n"
        "Answer a:\nx says 81\n\nTo the second question:\nx again\n\n"
        "Answer b:\ny says 81\n\nTo the second question:\n(no answer)"
    )
    assert first["group"] == second["group"] != other["group"]
    card = card_of(tmp_path / "o")
    assert card["read"] == {"votes": 6} and card["dropped"]["vote of a model"] == 1
    assert card["notes"][1:] == [
        "votes that are a judge's second on the same pair: 1",
        "items with an empty answer, shown as (no answer): 1",
    ]
    told = []  # the same as the published Parquet file has it
    for row in votes:
        keys = [(row[f"model_{side}"], row["question_id"]) for side in "ab"]
        talks = [talk(asked[key[1]], said[key]) for key in keys]
        told.append(row | {"conversation_a": talks[0], "conversation_b": talks[1]})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(told), tmp_path / "human.parquet")
    run("mtbench", "--raw", tmp_path / "human.parquet", "--out", tmp_path / "p", "--split", "none")
    assert read(tmp_path / "p", "items") == items
    few = write(tmp_path / "b.jsonl", answers[:2])
    with pytest.raises(InputError, match=r"v.jsonl:5: question 82: its text or the answer of x is missing"):
        run("mtbench", "--raw", raw[0], few, raw[2], "--out", tmp_path / "n")
    another = write(tmp_path / "c.jsonl", [answers[0] | {"choices": [{"turns": ["else", "no"]}]}])
    with pytest.raises(InputError, match="another answer of x to question 81 was read before"):
        run("mtbench", "--raw", *raw, another, "--out", tmp_path / "n")


def test_mtbench_as_published(data_dir, tmp_path):
    files = sorted(data_dir("mtbench").glob("*.jsonl"))
    files = [path for path in files if not path.name.startswith("reference")]
    card, items = published(files, tmp_path, "mtbench")
    assert card["read"] == {"votes": 3355} and card["groups"] == 80
    assert sum(card["items"].values()) == len(items) == 1814
    votes = {"1": 853, "2": 561, "3": 271, "4": 92, "5": 25, "6": 10, "7": 2}  # 961 have two or more
    assert card["votes_an_item"] == votes
    assert distjudge.counts_of(items).sum(0).tolist() == [1342, 1233, 780]
    for item in items:
        answers = item.prompt.split("\n\nAnswer a:\n", 1)[1].split("\n\nAnswer b:\n", 1)
        assert sorted(item.swap.prompt) == sorted(item.prompt)
        assert (item.swap.prompt == item.prompt) == (answers[0] == answers[1])


# --- HelpSteer2 -------------------------------------------------------------------------------------------
def test_helpsteer2_as_published(convert):
    ratings = {"helpfulness": [3, 3, 4], "correctness": [3, 4, 4], "coherence": [4, 3, 4]}
    ratings |= {"complexity": [2, 2, 2], "verbosity": [0, 1, 1]}
    asked = "Hi\n<extra_id_1>Assistant\nHello, you.\n<extra_id_1>User\nWhy is the sky blue?"
    raw = [{"prompt": asked, "response": reply, **ratings} for reply in ("Air.", "Rayleigh.")]
    raw += [{"prompt": "c#", "response": "A language.", **ratings, "helpfulness": [1, 0]}]
    rows, card = convert("helpsteer2", raw, name="disagreements.jsonl.gz")
    assert len(rows) == 15
    assert len({row["id"] for row in rows}) == 15 and "helpfulness" in rows[2]["prompt"]
    other, _ = convert("helpsteer2", raw[2:], name="validation.jsonl.gz")
    assert [row["id"] for row in other] == [row["id"] for row in rows[2::3]]  # not the row's number
    assert rows[0]["counts"] == {"1": 0, "2": 0, "3": 0, "4": 2, "5": 1}
    assert rows[2]["counts"] == {"1": 1, "2": 1, "3": 0, "4": 0, "5": 0}
    assert rows[0]["prompt"].endswith(
        "Conversation:\nUser:\nHi\n\nAssistant:\nHello, you.\n\nUser:\nWhy is the sky blue?\n\nReply:\nAir."
    )
    assert rows[0]["group"] == rows[1]["group"] != rows[2]["group"]
    assert card["read"] == {"replies": 3, "votes": 44}
    rows, _ = convert("helpsteer2", raw, "--dimension", "verbosity", "--split", "group")
    assert len(rows) == 3


def test_helpsteer2_pref_folds_strengths(tmp_path, convert):
    def pair(strengths, split="train", prompt="Why?"):
        votes = [{"strength": s, "justification": "@Response 1 ..."} for s in strengths]
        row = {"split": split, "prompt": prompt, "response_1": "One.", "response_2": "Two."}
        return row | {"preference_strength": 1, "all_preferences_unprocessed": votes}

    raw = [pair([-3, -2, -1, 1, 2]), pair([0, 3, -100]), pair([-100]), pair([3], "val", "Who?")]
    (one, two, test), card = convert("helpsteer2_pref", raw, "--split", "published", name="p.jsonl.gz")
    assert one["counts"] == {"a": 2, "b": 1, "tie": 2} and two["counts"] == {"a": 0, "b": 1, "tie": 1}
    assert one["swap"]["prompt"].endswith("Reply a:\nTwo.\n\nReply b:\nOne.") and "published" not in one
    assert one["swap"]["labels"] == {"a": "b", "b": "a"} and [test] == read(tmp_path / "o", "test")
    assert card["read"] == {"pairs": 4, "votes": 10} and card["split"] == "published"
    assert "Who?" in test["prompt"]
    dropped = {"item without votes": 1, "vote without a verdict": 2, "item that is also in test or valid": 0}
    assert card["dropped"] == dropped


# --- what all share ---------------------------------------------------------------------------------------
FORTY = [nli_row(i, ["neutral", "entailment"], f"Premise {i // 4}.", f"Hypothesis {i}.") for i in range(40)]


def test_splits(convert, tmp_path):
    def sides(*more):
        convert("snli", FORTY, *more)
        return [distjudge.load_items(tmp_path / "o" / f"{side}.jsonl") for side in ("train", "test")]

    train, test = sides("--split", "group")
    assert (len(train), len(test)) == (32, 8)
    assert not {item.group for item in train} & {item.group for item in test}
    assert sides("--split", "group")[1] == test
    other = sides("--split", "group", "--seed", 1)[1]
    assert [item.id for item in other] != [item.id for item in test]
    train, test = sides("--split", "random")
    assert (len(train), len(test)) == (32, 8) and all(item.group is None for item in train)
    premises = [{item.prompt.partition("Hypothesis: ")[0] for item in side} for side in (train, test)]
    assert premises[0] & premises[1]
    with pytest.raises(InputError, match="published: this data set has no split of its own"):
        sides("--split", "published")


TWO = [nli_row(1, ["neutral"] * 2)]
CHAOS = {"uid": "u", "example": {"premise": "p", "hypothesis": "h"}, "label_counter": {"x": 1}}
REPLIES = {"prompt": "p", "response_1": "r", "response_2": "s"}


@pytest.mark.parametrize(
    ("task", "rows", "more", "words"),
    [
        ("snli", [nli_row(1, ["maybe"])], "", "x.jsonl:1: annotator_labels: 'maybe' is not one of {"),
        ("snli", [nli_row(1, ["neutral"])], "", "no item is left of 1 rows: 1 item with fewer than 2 votes"),
        ("snli", [{"sentence1": "x"}], "", "x.jsonl:1: sentence2: missing; the row has sentence1"),
        ("snli", [nli_row(1, "neutral")], "", "x.jsonl:1: annotator_labels: must be list, not 'neutral'"),
        ("snli", TWO, "", "1 items in 1 group cannot be split; --split none writes one file"),
        ("snli", TWO, "--without gone.jsonl", "gone.jsonl: no such file"),
        ("snli", [nli_row(1, [], premise="")], "", "x.jsonl: no item is left of 1 rows: 1 item without text"),
        ("chaosnli", [CHAOS], "", "x.jsonl:1: label_counter: 'x' is not one of {e, n, c}"),
        ("summeval", [summary("s", "M0", "L", (6,))], "", "x.jsonl:1: coherence: '6' is not 1 to 5"),
        ("summeval", [summary("s", "M0", "L")], "--dimension joy", "'joy' is not one of coherence"),
        ("mtbench", [vote(81, "xy", "both")], "", "winner: 'both' is not model_a, model_b or tie"),
        ("mtbench", [vote(81, "xx", "tie")], "", "model_b: the same as model_a, x"),
        ("mtbench", [vote(81, "xy", "tie", turn=3)], "", "turn: 3 is not 1 or 2"),
        ("helpsteer2", [{"prompt": "p", "response": "r", "helpfulness": [5]}], "", "5 is not 0 to 4"),
        ("helpsteer2_pref", [REPLIES | {"all_preferences_unprocessed": [4]}], "", "4 is not -3 to 3"),
    ],
)
def test_refusals(tmp_path, monkeypatch, task, rows, more, words):
    write(tmp_path / "x.jsonl", rows)
    check_refused(tmp_path, monkeypatch, words, task, "--raw", "x.jsonl", *more.split())


def test_a_template_of_ones_own(tmp_path, convert):
    template = tmp_path / "mine.txt"
    template.write_text('Say {"e": 1} or\n{hypothesis}\n{premise}\n\n')
    rows, _ = convert("snli", FORTY, "--prompts", template)
    assert rows[0]["prompt"] == 'Say {"e": 1} or\nHypothesis 0.\nPremise 0.'
    there = r"unknown placeholder \{hypotesis\}; there are \{premise\}, \{hypothesis\}"
    once = r"the placeholder \{premise\} must stand in it once"
    for text, words in (("{premise} {hypotesis}", there), ("{premise} {premise} {hypothesis}", once)):
        template.write_text(text)
        with pytest.raises(InputError, match=words):
            convert("snli", FORTY, "--template", template)


# --- prompts ----------------------------------------------------------------------------------------------
FLUENCY, VERBOSITY = prepare.QUALITIES["summeval"]["fluency"], prepare.QUALITIES["helpsteer2"]["verbosity"]
COOK = {"premise": "A cook stirs a pot.", "hypothesis": "Someone is cooking."}
NEWS = {"quality": FLUENCY, "article": "The bridge opened on Monday.", "summary": "A bridge opened."}
EGG = {"question": "How do I boil an egg?", "answer_a": "Seven minutes.", "answer_b": "In water."}
REPLY = {"quality": VERBOSITY, "conversation": prepare.conversation("Hi"), "reply": "Hello."}
REPLIES = {"conversation": prepare.conversation("Hi"), "answer_a": "Hello.", "answer_b": "Hi!"}
FEELING = {"dimension": "valence", "low": "very unpleasant", "high": "very pleasant"}
PROMPTS = {  # what stands in the placeholders, tokens under Qwen2.5's chat template, beginning of the sha256
    "snli": (COOK, 122, "a18d8099b90bfbaa"),
    "summeval": (NEWS, 114, "af457408beceb9ee"),
    "summeval_rubric_last": (NEWS, 119, "6b292d2dac74fefd"),
    "mtbench": (EGG, 139, "c2c655b108758763"),
    "helpsteer2": (REPLY, 117, "52f46367c77d7b8b"),
    "helpsteer2_pref": (REPLIES, 104, "1b23753f84208d92"),
    "emobank": (FEELING | {"text": "The rain has stopped."}, 74, "db6cb8d737053e43"),
}


@pytest.fixture(scope="module")
def qwen(tokenizers_dir):
    return distjudge.PromptEncoder(distjudge.load_tokenizer(str(tokenizers_dir("qwen2.5"))))


@pytest.mark.parametrize("task", sorted(path.stem for path in prepare.PROMPTS.iterdir()))
def test_a_rendered_prompt_is_pinned(task, qwen):
    values, tokens, digest = PROMPTS[task]
    template = prepare.read_template(prepare.PROMPTS / f"{task}.txt", list(values), [])
    prompt = prepare.fill(template, values)
    assert all(str(value) in prompt for value in values.values()) and "{" not in prompt
    assert hashlib.sha256(prompt.encode()).hexdigest()[:16] == digest and len(qwen(prompt)) == tokens, prompt


@pytest.mark.parametrize("labels", [prepare.NLI, prepare.PAIR])
def test_spellings_are_read_by_their_first_token(qwen, labels):
    spellings = {label: [label, label.capitalize()] for label in labels}
    tokens = distjudge.label_tokens(qwen.tokenizer, list(spellings), spellings, qwen)
    assert not tokens.whole and len(tokens.sequences) == 2 * len(labels)


def test_the_template_of_the_data_format_loads():
    items = distjudge.load_items(ROOT / "data" / "template.jsonl")
    assert len(items) == 4 and distjudge.labels_of(items) == list("12345")
    assert [item.votes for item in items] == [5, 5, 5, 3]
