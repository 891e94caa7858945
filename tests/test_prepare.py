"""Converters: exact counts on the published files, hand-made files in the published formats for everything else."""
import dataclasses
import gzip
import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import prepare
import pytest
import tyro

import distjudge
from distjudge import InputError

ROOT = Path(__file__).resolve().parents[1]
SENTENCES = 'id,split,V,A,D,text\n1,train,3,3,3,"So, he said: ""go""."\n2,test,3,3,3,Same words.\n3,train,3,3,3,Same words.\n4,dev,3,3,3,{braces}\n'
RATINGS = "id,V,A,D\n1,5,1,3\n1,4,1,3\n2,1,1,3\n3,2,2,2\n4,3,3,3\n9,3,3,3\n"


def run(*arguments):
    """The command line, in this process."""
    prepare.main(tyro.cli(prepare.PrepareConfig, args=[str(argument) for argument in arguments]))


def read(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def card_of(folder):
    return json.loads((folder / "card.json").read_text(encoding="utf-8"))


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def nli_row(number, votes, premise="A man eats.", hypothesis="A man sleeps.", **more):
    return {"annotator_labels": votes, "gold_label": "-", "pairID": f"{number}e", "sentence1": premise, "sentence2": hypothesis} | more


# --- EmoBank ----------------------------------------------------------------------------------------------------------
def emobank(tmp_path, monkeypatch, sentences=SENTENCES, ratings=RATINGS, *more):
    (tmp_path / "emobank.csv").write_text(sentences)
    (tmp_path / "ratings.csv").write_text(ratings)
    monkeypatch.chdir(tmp_path)
    run("emobank", "--raw", "ratings.csv", "emobank.csv", "--out", "o", *more)


def test_emobank_by_hand(tmp_path, monkeypatch):
    emobank(tmp_path, monkeypatch)
    train, valid, test = (distjudge.load_items(tmp_path / "o" / f"{s}.jsonl") for s in ("train", "valid", "test"))
    assert [(item.id, item.counts) for item in train] == [("1", {"1": 0, "2": 0, "3": 0, "4": 1, "5": 1})]
    assert [item.id for item in valid] == ["4"] and [item.id for item in test] == ["2"]
    assert train[0].prompt == ("How does this sentence make its reader feel? Rate its valence from 1 (very unpleasant) to 5 (very pleasant); "
                               '3 is neutral. Answer with the number only.\n\nSentence: So, he said: "go".')
    assert valid[0].prompt.endswith("Sentence: {braces}")
    card = card_of(tmp_path / "o")
    assert card["items"] == {"train": 1, "valid": 1, "test": 1} and card["votes_an_item"] == {"1": 2, "2": 1} and card["split"] == "published"
    assert card["dropped"] == {"rated, without text": 1, "text without ratings": 0, "empty text": 0, "also in test or valid": 1}
    emobank(tmp_path, monkeypatch, SENTENCES, RATINGS, "--dimension", "arousal")
    assert distjudge.load_items(tmp_path / "o" / "train.jsonl")[0].counts == {"1": 2, "2": 0, "3": 0, "4": 0, "5": 0}


@pytest.mark.parametrize(("sentences", "ratings", "more", "words"), [
    (SENTENCES, RATINGS + "1,6,1,1\n", [], "ratings.csv: row 8: V: '6' is not 1 to 5"),
    (SENTENCES, RATINGS + "1,5,1\n", [], "ratings.csv: row 8: fewer fields than columns"),
    (SENTENCES.replace("dev", "held out"), RATINGS, [], "emobank.csv: row 5: split: 'held out' is not one of"),
    (SENTENCES, SENTENCES, [], "is emobank.csv, which"),
    (SENTENCES, "a,b\n1,2\n", [], "ratings.csv: its columns ['a', 'b'] are not those of"),
    (SENTENCES, RATINGS, ["--raw", "emobank.csv"], "individual_reader_ratings.csv of EmoBank's folder corpus/ must be named too"),
    (SENTENCES, RATINGS, ["--raw", "gone.csv"], "gone.csv: no such file"),
    (SENTENCES.replace("1,train", "1,{scale}"), RATINGS, [], "split: '{scale}'"),
    (SENTENCES, RATINGS, ["--prompts", "gone.txt"], "gone.txt: the template cannot be read"),
    (SENTENCES, RATINGS, ["--prompts", "ratings.csv"], "the placeholder {text} must stand in it once"),
    (SENTENCES, RATINGS, ["--dimension", "joy"], "dimension: one of valence, arousal, dominance is needed, not joy"),
])
def test_emobank_refusals(tmp_path, monkeypatch, sentences, ratings, more, words):
    with pytest.raises(InputError) as error:
        emobank(tmp_path, monkeypatch, sentences, ratings, *more)
    assert words in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "o").exists()


def test_the_command_line(tmp_path):
    arguments = [sys.executable, ROOT / "data" / "prepare.py", "snli", "--out", "o", "--raw"]
    write(tmp_path / "x.jsonl", [nli_row(1, ["neutral"] * 5), nli_row(2, ["neutral", "entailment"], premise="Rain.")])
    done = subprocess.run([*arguments, "x.jsonl"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "kept {'train': 1, 'test': 1}" in done.stdout and "wrote o" in done.stdout
    done = subprocess.run([*arguments, "gone.jsonl"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr == "error: gone.jsonl: no such file\n"


# --- NLI --------------------------------------------------------------------------------------------------------------
def test_snli_keeps_the_votes_of_items_without_a_gold_label(tmp_path):
    raw = write(tmp_path / "x.jsonl.gz", [
        nli_row(1, ["neutral", "entailment", "neutral", "entailment", ""]),
        nli_row(2, ["entailment"], gold_label="entailment"), nli_row(3, ["neutral"] * 3, hypothesis="n/a"), nli_row(4, ["", ""], premise="B"),
        nli_row(5, ["contradiction", "neutral"], premise="{hypothesis}", hypothesis="{premise}", gold_label="neutral"),
        nli_row(1, ["neutral"] * 5, premise=" A  man eats. ", hypothesis="It rains.")])
    run("snli", "--raw", raw, "--out", tmp_path / "o", "--split", "none")
    one, two, three = read(tmp_path / "o" / "items.jsonl")
    assert one["id"] == "1e" and one["counts"] == {"entailment": 2, "neutral": 2, "contradiction": 0}
    assert two["prompt"].endswith("Premise: {hypothesis}\nHypothesis: {premise}") and three["id"] == "1e-2"
    assert one["group"] == three["group"] != two["group"] and one["group"].startswith("premise ")
    card = card_of(tmp_path / "o")
    assert card["read"] == {"rows": 6, "votes": 18, "gold label '-', votes kept": 4}
    assert card["dropped"] == {"no text": 1, "no label": 1, "fewer than 2 votes": 1} and card["items"] == {"items": 3}
    assert card["spellings"][0] == "entailment=entailment,Entailment" and card["ordered"] is False and card["groups"] == 2
    assert card["sha256"]["x.jsonl.gz"] and card["prompt"]["file"] == "snli.txt" and card["source"][0].endswith("snli_1.0.zip")
    assert set(distjudge.parse_spellings(card["spellings"])) == set(card["labels"])
    run("snli", "--raw", raw, "--out", tmp_path / "o", "--split", "none", "--min_votes", 1, "--drop-first-label")
    assert [row["counts"]["neutral"] for row in read(tmp_path / "o" / "items.jsonl")] == [1, 1, 4]


def test_mnli_as_published(tmp_path):
    row = {"annotator_labels": ["entailment", "neutral", "entailment", "entailment", "entailment"], "genre": "slate", "gold_label": "entailment",
           "pairID": "9e", "promptID": "9", "sentence1": "The bus left.", "sentence1_binary_parse": "", "sentence1_parse": "", "sentence2": "It left."}
    with zipfile.ZipFile(tmp_path / "multinli_1.0.zip", "w") as archive:
        for name, rows in {"train": [row | {"annotator_labels": ["neutral"], "pairID": "7n"}], "dev_matched": [row],
                           "dev_mismatched": [row | {"pairID": "8e", "sentence1": "No bus."}]}.items():
            archive.writestr(f"multinli_1.0/multinli_1.0_{name}.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
            archive.writestr(f"multinli_1.0/multinli_1.0_{name}.txt", "not read")
        archive.writestr("__MACOSX/multinli_1.0/._multinli_1.0_train.jsonl", b"\x00\x05")
    run("mnli", "--raw", tmp_path / "multinli_1.0.zip", "--out", tmp_path / "o")
    rows = read(tmp_path / "o" / "train.jsonl") + read(tmp_path / "o" / "test.jsonl")
    assert sorted(row["id"] for row in rows) == ["8e", "9e"] and rows[0]["counts"] == {"entailment": 4, "neutral": 1, "contradiction": 0}
    assert card_of(tmp_path / "o")["dropped"] == {"no text": 0, "no label": 0, "fewer than 2 votes": 1}
    assert distjudge.load_items(tmp_path / "o" / "test.jsonl")[0].votes == 5


def test_chaosnli_by_hand_and_what_it_shares_with_snli(tmp_path):
    chaos = {"uid": "c1", "label_counter": {"n": 70, "e": 30}, "example": {"uid": "c1", "premise": "A man eats.", "hypothesis": "A man sleeps. "},
             "old_labels": ["neutral"]}
    other = {"uid": "a1", "label_counter": {"2": 63, "1": 37}, "example": {"obs1": "x", "obs2": "y", "hyp1": "z", "hyp2": "w"}}
    raw = write(tmp_path / "chaos.jsonl", [chaos, other])
    run("chaosnli", "--raw", raw, "--out", tmp_path / "c", "--split", "none")
    (item,) = read(tmp_path / "c" / "items.jsonl")
    assert item["counts"] == {"entailment": 30, "neutral": 70, "contradiction": 0} and card_of(tmp_path / "c")["dropped"]["abductive (alphaNLI)"] == 1
    snli = write(tmp_path / "snli.jsonl", [nli_row(1, ["neutral"] * 5, hypothesis="A man sleeps. "), nli_row(2, ["neutral"] * 5, hypothesis="Other."),
                                           nli_row(3, ["neutral"] * 5, premise="Rain."), nli_row(4, ["neutral"] * 5, premise="Snow.")])
    run("snli", "--raw", snli, "--out", tmp_path / "s", "--without", tmp_path / "c" / "items.jsonl", "--split", "none")
    assert [row["id"] for row in read(tmp_path / "s" / "items.jsonl")] == ["3e", "4e"]
    dropped = card_of(tmp_path / "s")["dropped"]
    assert [dropped[f"in items.jsonl by {name}"] for name in ("prompt", "group", "id")] == [1, 1, 0]
    run("snli", "--raw", snli, "--out", tmp_path / "all", "--split", "none")
    with pytest.raises(InputError, match="item 'c1': prompt: also in the training items"):  # what every run with --test does
        distjudge.load_data(distjudge.Config(train=(str(tmp_path / "all" / "items.jsonl"),), test=(str(tmp_path / "c" / "items.jsonl"),)))


def test_keep_apart_refuses_or_removes():
    def items(*rows):
        return distjudge.load_items([{"counts": {"a": 1, "b": 0}} | row for row in rows])

    train = items({"id": "1", "prompt": "p"}, {"id": "2", "prompt": "q", "group": "g"}, {"id": "3", "prompt": "r"}, {"id": "4", "prompt": "s"})
    test = items({"id": "x", "prompt": "p"}, {"id": "y", "prompt": "z", "group": "g"}, {"id": "3", "prompt": "other"})
    kept, counts = distjudge.keep_apart(train, test, overlap="remove")
    assert [item.id for item in kept] == ["4"] and counts == {"prompt": 1, "group": 1, "id": 1}
    with pytest.raises(InputError, match="item 'x': prompt: also in the training items"):
        distjudge.keep_apart(train, test)
    turned = [dataclasses.replace(train[3], swap=distjudge.Swap(test[0].prompt, (1, 0)))]
    assert distjudge.keep_apart(turned, test, "remove") == ([], {"prompt": 1, "group": 0, "id": 0})
    assert distjudge.keep_apart(train[3:], test) == (train[3:], {"prompt": 0, "group": 0, "id": 0})


def test_nli_as_published(data_dir, tmp_path):
    snli, chaos, linguists = data_dir("snli"), data_dir("chaosnli"), data_dir("ling_in_loop")
    run("snli", "--raw", *sorted(snli.glob("*.jsonl")), "--out", tmp_path / "snli")
    card = card_of(tmp_path / "snli")
    assert card["read"] == {"rows": 2566, "votes": 12827, "gold label '-', votes kept": 39}
    assert card["items"] == {"train": 2053, "test": 513} and card["votes_an_item"] == {"4": 3, "5": 2563} and card["groups"] == 852
    train, test = (distjudge.load_items(tmp_path / "snli" / f"{side}.jsonl") for side in ("train", "test"))
    distjudge.check_apart(train, test)
    assert distjudge.counts_of(train + test).sum(0).tolist() == [4313, 4334, 4180]
    run("chaosnli", "--raw", *sorted(chaos.glob("*.jsonl")), "--out", tmp_path / "chaos", "--split", "none")
    assert card_of(tmp_path / "chaos")["votes_an_item"] == {"100": 3113}
    items = distjudge.load_items(tmp_path / "chaos" / "items.jsonl")
    kept, counts = distjudge.keep_apart(train + test, items, overlap="remove")
    assert counts == {"prompt": 381, "group": 573, "id": 0} and len(kept) == 2566 - 954
    run("mnli", "--raw", *sorted(linguists.glob("*.jsonl")), "--out", tmp_path / "mnli", "--without", tmp_path / "chaos" / "items.jsonl")
    card = card_of(tmp_path / "mnli")
    assert card["read"] == {"rows": 7371, "votes": 36842, "gold label '-', votes kept": 0}
    assert sum(n for name, n in card["dropped"].items() if name.startswith("in items.jsonl")) == 2378 and sum(card["items"].values()) == 4993


# --- SummEval ---------------------------------------------------------------------------------------------------------
def summary(story, system, text, expert=(1, 2, 5), crowd=(3, 3, 3, 3, 3)):
    votes = lambda numbers: [dict.fromkeys(prepare.QUALITIES["summeval"], n) | {"fluency": 4} for n in numbers]  # noqa: E731
    row = {"id": story, "model_id": system, "decoded": f"Short {system}.", "expert_annotations": votes(expert), "turker_annotations": votes(crowd)}
    return row | ({"text": text} if text else {})


def test_summeval_by_hand(tmp_path):
    raw = write(tmp_path / "x.jsonl", [summary("s-1", "M0", "Long one."), summary("s-2", "M0", "Long two."), summary("s-1", "M8", "Long one.")])
    run("summeval", "--raw", raw, "--out", tmp_path / "o", "--split", "none")
    rows = read(tmp_path / "o" / "items.jsonl")
    assert [row["id"] for row in rows][:4] == ["s-1-M0-coherence", "s-1-M8-coherence", "s-2-M0-coherence", "s-1-M0-consistency"] and len(rows) == 12
    assert rows[0]["counts"] == {"1": 1, "2": 1, "3": 5, "4": 0, "5": 1} and rows[6]["counts"]["4"] == 8 and rows[6]["id"] == "s-1-M0-fluency"
    assert rows[0]["group"] == rows[1]["group"] == rows[3]["group"] != rows[2]["group"]
    assert "3 of 3 summaries carry the same crowd ratings five times over" in card_of(tmp_path / "o")["notes"]
    for votes, counts in (("experts", [1, 1, 0, 0, 1]), ("crowd", [0, 0, 5, 0, 0])):
        run("summeval", "--raw", raw, "--out", tmp_path / "o", "--votes", votes, "--dimension", "relevance")
        rows = read(tmp_path / "o" / "train.jsonl") + read(tmp_path / "o" / "test.jsonl")
        assert len(rows) == 3 and list(rows[0]["counts"].values()) == counts and not (tmp_path / "o" / "items.jsonl").exists()


def test_summeval_joins_the_published_annotations_with_their_articles(tmp_path):
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"article": ["Long one."], "highlights": ["x"], "id": ["8764fb"]}), tmp_path / "articles.parquet")
    bare = write(tmp_path / "x.jsonl", [summary("dm-test-8764fb", "M0", ""), summary("dm-test-beef", "M0", "")])
    run("summeval", "--raw", bare, tmp_path / "articles.parquet", "--out", tmp_path / "o", "--split", "none")
    assert len(read(tmp_path / "o" / "items.jsonl")) == 4 and card_of(tmp_path / "o")["dropped"]["no article"] == 1
    with pytest.raises(InputError, match="no article text: the published annotations come without"):
        run("summeval", "--raw", bare, "--out", tmp_path / "n")


def test_summeval_as_published(data_dir, tmp_path):
    files = sorted(data_dir("summeval").glob("M*.jsonl"))
    run("summeval", "--raw", *files, "--out", tmp_path, "--votes", "experts")
    card = card_of(tmp_path)
    assert card["read"] == {"summaries": 1200, "votes": 14400} and card["items"] == {"train": 3840, "test": 960} and card["groups"] == 100
    assert card["votes_an_item"] == {"3": 4800} and card["notes"][1].startswith("542 of 1200 summaries carry the same crowd ratings")
    items = distjudge.load_items(tmp_path / "train.jsonl") + distjudge.load_items(tmp_path / "test.jsonl")
    disputed = {q: sum(item.id.endswith(q) and max(item.counts.values()) < 3 for item in items) for q in prepare.QUALITIES["summeval"]}
    assert disputed == {"coherence": 1046, "consistency": 245, "fluency": 344, "relevance": 1021}  # 87, 20, 29 and 85 %
    rows, _ = prepare.convert(prepare.PrepareConfig(task="summeval", out="", raw=tuple(map(str, files))))
    assert len(rows) == 4800 and sum(sum(row["counts"].values()) for row in rows) == 4800 * 8


# --- MT-Bench ---------------------------------------------------------------------------------------------------------
def vote(question, one, other, winner, judge="expert_1", turn=1):
    return {"question_id": question, "model_a": one, "model_b": other, "winner": winner, "judge": judge, "turn": turn}


def test_mtbench_merges_the_orders_of_a_pair(tmp_path):
    votes = [vote(81, "y", "x", "model_a"), vote(81, "x", "y", "model_a", "author_1"), vote(81, "x", "y", "tie (inconsistent)", "expert_1"),
             vote(81, "x", "y", "tie", turn=2), vote(82, "x", "y", "model_b"), vote(81, "x", "y", "model_b", "gpt4_pair")]
    answers = [{"question_id": q, "model_id": m, "choices": [{"index": 0, "turns": [f"{m} says {q}", "" if m == "y" else "x again"]}]}
               for q in (81, 82) for m in "xy"]
    questions = [{"question_id": 81, "category": "c", "turns": ["Why?", "And {answer_a}?"]}, {"question_id": 82, "category": "c", "turns": ["Who?", "So?"]}]
    raw = [write(tmp_path / name, rows) for name, rows in (("q.jsonl", questions), ("a.jsonl", answers), ("v.jsonl", votes))]
    run("mtbench", "--raw", *raw, "--out", tmp_path / "o", "--split", "none")
    first, other, second = read(tmp_path / "o" / "items.jsonl")
    assert first["id"] == "81-1-x-y" and first["counts"] == {"a": 1, "b": 1, "tie": 1} and other["counts"] == {"a": 0, "b": 1, "tie": 0}
    assert first["prompt"].endswith("Question:\nWhy?\n\nAnswer a:\nx says 81\n\nAnswer b:\ny says 81")
    assert first["swap"]["prompt"].endswith("Question:\nWhy?\n\nAnswer a:\ny says 81\n\nAnswer b:\nx says 81")
    assert first["swap"]["labels"] == {"a": "b", "b": "a"}
    assert second["prompt"].endswith(
        "Question:\nWhy?\n\nSecond question, after the first was answered:\nAnd {answer_a}?\n\nAnswer a:\nx says 81\n\nTo the second "
        "question:\nx again\n\nAnswer b:\ny says 81\n\nTo the second question:\n(no answer)")
    assert first["group"] == second["group"] != other["group"]
    card = card_of(tmp_path / "o")
    assert card["read"] == {"votes": 6} and card["dropped"] == {"judged by a model": 1, "no text": 0}
    assert card["notes"][1:] == ["votes that are a judge's second on the same pair: 1", "items with an empty answer, shown as (no answer): 1"]
    talk = lambda m, q, asked: [{"role": role, "content": text} for role, text in (  # noqa: E731
        ("user", asked[0]), ("assistant", f"{m} says {q}"), ("user", asked[1]), ("assistant", "" if m == "y" else "x again"))]
    asked = {row["question_id"]: row["turns"] for row in questions}
    import pyarrow.parquet

    told = [v | {f"conversation_{s}": talk(v[f"model_{s}"], v["question_id"], asked[v["question_id"]]) for s in "ab"} for v in votes]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(told), tmp_path / "human.parquet")
    run("mtbench", "--raw", tmp_path / "human.parquet", "--out", tmp_path / "p", "--split", "none")
    assert read(tmp_path / "p" / "items.jsonl") == [first, other, second]
    with pytest.raises(InputError, match=r"v.jsonl:5: question 82: its text or the answer of x is missing"):
        run("mtbench", "--raw", raw[0], write(tmp_path / "b.jsonl", answers[:2]), raw[2], "--out", tmp_path / "n")
    with pytest.raises(InputError, match="another answer of x to question 81 was read before"):
        run("mtbench", "--raw", *raw, write(tmp_path / "c.jsonl", [answers[0] | {"choices": [{"turns": ["else", "no"]}]}]), "--out", tmp_path / "n")


def test_mtbench_as_published(data_dir, tmp_path):
    files = [path for path in sorted(data_dir("mtbench").glob("*.jsonl")) if not path.name.startswith("reference")]
    run("mtbench", "--raw", *files, "--out", tmp_path)
    card = card_of(tmp_path)
    assert card["read"] == {"votes": 3355} and sum(card["items"].values()) == 1814 and card["groups"] == 80
    assert card["votes_an_item"] == {"1": 853, "2": 561, "3": 271, "4": 92, "5": 25, "6": 10, "7": 2}  # 961 have two or more
    rows = read(tmp_path / "train.jsonl") + read(tmp_path / "test.jsonl")
    assert [sum(row["counts"][label] for row in rows) for label in ("a", "b", "tie")] == [1342, 1233, 780]
    assert all(sorted(row["swap"]["prompt"]) == sorted(row["prompt"]) for row in rows)
    assert sum(row["swap"]["prompt"] == row["prompt"] for row in rows) == sum(same_answers(row["prompt"]) for row in rows)
    distjudge.check_apart(*(distjudge.load_items(tmp_path / f"{side}.jsonl") for side in ("train", "test")))


def same_answers(prompt):
    one, other = prompt.split("\n\nAnswer a:\n", 1)[1].split("\n\nAnswer b:\n", 1)
    return one == other


# --- HelpSteer2 -------------------------------------------------------------------------------------------------------
def test_helpsteer2_as_published(tmp_path):
    ratings = {"helpfulness": [3, 3, 4], "correctness": [3, 4, 4], "coherence": [4, 3, 4], "complexity": [2, 2, 2], "verbosity": [0, 1, 1]}
    talk = "Hi\n<extra_id_1>Assistant\nHello, you.\n<extra_id_1>User\nWhy is the sky blue?"
    raw = write(tmp_path / "disagreements.jsonl.gz", [{"prompt": talk, "response": "Air.", **ratings}, {"prompt": talk, "response": "Rayleigh.", **ratings},
                                                      {"prompt": "c#", "response": "A language.", **ratings, "helpfulness": [1, 0]}])
    run("helpsteer2", "--raw", raw, "--out", tmp_path / "o", "--split", "none")
    rows = read(tmp_path / "o" / "items.jsonl")
    assert len(rows) == 15 and [row["id"] for row in rows[:3]] == ["1-helpfulness", "2-helpfulness", "3-helpfulness"]
    assert rows[0]["counts"] == {"1": 0, "2": 0, "3": 0, "4": 2, "5": 1} and rows[2]["counts"] == {"1": 1, "2": 1, "3": 0, "4": 0, "5": 0}
    assert rows[0]["prompt"].endswith("Conversation:\nUser:\nHi\n\nAssistant:\nHello, you.\n\nUser:\nWhy is the sky blue?\n\nReply:\nAir.")
    assert rows[0]["group"] == rows[1]["group"] != rows[2]["group"] and card_of(tmp_path / "o")["read"] == {"replies": 3, "votes": 44}
    run("helpsteer2", "--raw", raw, "--out", tmp_path / "o", "--dimension", "verbosity")
    assert len(read(tmp_path / "o" / "train.jsonl") + read(tmp_path / "o" / "test.jsonl")) == 3


def test_helpsteer2_pref_folds_strengths(tmp_path):
    def pair(strengths, split="train", prompt="Why?"):
        votes = [{"strength": s, "justification": "@Response 1 ..."} for s in strengths]
        return {"split": split, "prompt": prompt, "response_1": "One.", "response_2": "Two.", "preference_strength": 1, "preference_statement": "",
                "preference_elaboration": "", "three_most_similar_preferences": [], "all_preferences_unprocessed": votes}

    raw = write(tmp_path / "preference.jsonl.gz", [pair([-3, -2, -1, 1, 2]), pair([0, 3, -100]), pair([-100]), pair([3], "val", "Who?")])
    run("helpsteer2_pref", "--raw", raw, "--out", tmp_path / "o", "--split", "published")
    one, two = read(tmp_path / "o" / "train.jsonl")
    assert one["counts"] == {"a": 2, "b": 1, "tie": 2} and two["counts"] == {"a": 0, "b": 1, "tie": 1} and "published" not in one
    assert one["swap"]["prompt"].endswith("Reply a:\nTwo.\n\nReply b:\nOne.") and one["swap"]["labels"] == {"a": "b", "b": "a"}
    assert [row["id"] for row in read(tmp_path / "o" / "test.jsonl")] == ["4"]
    card = card_of(tmp_path / "o")
    assert card["read"] == {"pairs": 4, "votes": 10} and card["split"] == "published"
    assert card["dropped"] == {"no text": 0, "no verdict": 1, "votes without a verdict": 2, "also in test or valid": 0}


# --- what all share ---------------------------------------------------------------------------------------------------
@pytest.fixture
def nli_file(tmp_path):
    rows = [nli_row(i, ["neutral", "entailment"], premise=f"Premise {i // 4}.", hypothesis=f"Hypothesis {i}.") for i in range(40)]
    return write(tmp_path / "x.jsonl", rows)


def test_splits(tmp_path, nli_file):
    def sides(name, *more):
        run("snli", "--raw", nli_file, "--out", tmp_path / name, *more)
        return [distjudge.load_items(tmp_path / name / f"{side}.jsonl") for side in ("train", "test")]

    train, test = sides("group")
    assert (len(train), len(test)) == (32, 8) and not {item.group for item in train} & {item.group for item in test}
    assert sides("group")[1] == test and [item.id for item in sides("group", "--seed", 1)[1]] != [item.id for item in test]
    train, test = sides("random", "--split", "random")
    assert (len(train), len(test)) == (32, 8) and all(item.group is None for item in train)
    premise = lambda item: item.prompt.split("Premise: ")[1].split("\n")[0]  # noqa: E731
    assert {premise(item) for item in train} & {premise(item) for item in test}
    train, test = sides("limit", "--limit", 10)
    assert len(train) + len(test) == 10 and card_of(tmp_path / "limit")["dropped"]["over the limit"] == 30
    with pytest.raises(InputError, match="published: this data set has no split of its own"):
        sides("no", "--split", "published")


@pytest.mark.parametrize(("task", "rows", "more", "words"), [
    ("snli", [nli_row(1, ["maybe"])], [], "x.jsonl:1: annotator_labels: unknown label {maybe}"),
    ("snli", [nli_row(1, ["neutral"])], [], "no item has 2 votes or more (--min_votes)"),
    ("snli", [{"sentence1": "x"}], [], "x.jsonl:1: sentence2: missing; the row has sentence1"),
    ("snli", [nli_row(1, "neutral")], [], "x.jsonl:1: annotator_labels: must be list, not 'neutral'"),
    ("snli", [nli_row(1, ["neutral"] * 2)], [], "1 items in 1 group cannot be split; --split none writes one file"),
    ("snli", [nli_row(1, ["neutral"] * 2)], ["--limit", "-1"], "limit: must be 0 or more"),
    ("snli", [nli_row(1, ["neutral"] * 2)], ["--without", "gone.jsonl"], "gone.jsonl: no such file"),
    ("snli", [nli_row(1, [], premise="")], [], "no items in it: read"),
    ("chaosnli", [{"uid": "u", "example": {"premise": "p", "hypothesis": "h"}, "label_counter": {"x": 1}}], [], "label_counter: unknown label {x}"),
    ("summeval", [summary("s", "M0", "Long.", expert=(6,))], [], "x.jsonl:1: coherence: '6' is not 1 to 5"),
    ("summeval", [summary("s", "M0", "Long.")], ["--dimension", "joy"], "dimension: 'joy' is not one of coherence"),
    ("mtbench", [vote(81, "x", "y", "both")], [], "winner: 'both' is not model_a, model_b or tie"),
    ("mtbench", [vote(81, "x", "x", "tie")], [], "model_b: the same as model_a, x"),
    ("mtbench", [vote(81, "x", "y", "tie", turn=3)], [], "turn: 3 is not 1 or 2"),
    ("helpsteer2", [{"prompt": "p", "response": "r", "helpfulness": [5]}], [], "helpfulness: 5 is not 0 to 4"),
    ("helpsteer2_pref", [{"prompt": "p", "response_1": "r", "response_2": "s", "all_preferences_unprocessed": [{"strength": 4}]}], [], "strength: 4 is not -3 to 3"),
])
def test_refusals(tmp_path, monkeypatch, task, rows, more, words):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "x.jsonl", rows)
    with pytest.raises(InputError) as error:
        run(task, "--raw", "x.jsonl", "--out", "o", *more)
    assert words in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "o").exists()


def test_a_template_of_ones_own(tmp_path, nli_file):
    (tmp_path / "mine.txt").write_text('Say {"e": 1} or\n{hypothesis}\n{premise}\n\n')
    run("snli", "--raw", nli_file, "--out", tmp_path / "o", "--prompts", tmp_path / "mine.txt")
    assert read(tmp_path / "o" / "train.jsonl")[0]["prompt"] == 'Say {"e": 1} or\nHypothesis 0.\nPremise 0.'
    for text, words in (("{premise} {hypotesis}", r"unknown placeholder \{hypotesis\}; there are \{premise\}, \{hypothesis\}"),
                        ("{premise} {premise} {hypothesis}", r"the placeholder \{premise\} must stand in it once")):
        (tmp_path / "mine.txt").write_text(text)
        with pytest.raises(InputError, match=words):
            run("snli", "--raw", nli_file, "--out", tmp_path / "o", "--template", tmp_path / "mine.txt")


def test_emobank_as_published(data_dir, tmp_path):
    folder = data_dir("emobank")
    run("emobank", "--raw", folder / "emobank.csv", folder / "individual_reader_ratings.csv", "--out", tmp_path)
    card = card_of(tmp_path)
    assert card["read"] == {"emobank.csv": 10062, "individual_reader_ratings.csv": 53055}
    assert card["items"] == {"train": 7984, "valid": 992, "test": 1000}
    assert card["dropped"] == {"rated, without text": 486, "text without ratings": 0, "empty text": 0, "also in test or valid": 86}
    assert sum(card["items"].values()) + card["dropped"]["also in test or valid"] == 10062
    assert card["votes_an_item"] == {"5": 9681, "6": 286, "7": 9}
    train, test = distjudge.load_items(tmp_path / "train.jsonl"), distjudge.load_items(tmp_path / "test.jsonl")
    distjudge.check_apart(train, test)
    assert distjudge.labels_of(train) == list("12345")


# --- prompts ----------------------------------------------------------------------------------------------------------
PROMPTS = {  # what stands in the placeholders, tokens under Qwen2.5's tokenizer and chat template, beginning of the prompt's sha256
    "snli": ({"premise": "A cook stirs a pot.", "hypothesis": "Someone is cooking."}, 122, "a18d8099b90bfbaa"),
    "summeval": ({"quality": prepare.QUALITIES["summeval"]["fluency"], "article": "The bridge opened on Monday.", "summary": "A bridge opened."}, 114, "af457408beceb9ee"),
    "summeval_rubric_last": ({"quality": prepare.QUALITIES["summeval"]["fluency"], "article": "The bridge opened on Monday.", "summary": "A bridge opened."}, 119, "6b292d2dac74fefd"),
    "mtbench": ({"question": "How do I boil an egg?", "answer_a": "Seven minutes.", "answer_b": "In water."}, 139, "c2c655b108758763"),
    "helpsteer2": ({"quality": prepare.QUALITIES["helpsteer2"]["verbosity"], "conversation": prepare.conversation("Hi"), "reply": "Hello."}, 117, "52f46367c77d7b8b"),
    "helpsteer2_pref": ({"conversation": prepare.conversation("Hi"), "answer_a": "Hello.", "answer_b": "Hi!"}, 104, "1b23753f84208d92"),
    "emobank": ({"dimension": "valence", "low": "very unpleasant", "high": "very pleasant", "text": "The rain has stopped."}, 74, "db6cb8d737053e43"),
}


@pytest.fixture(scope="module")
def qwen(tokenizers_dir):
    import transformers

    return distjudge.PromptEncoder(transformers.AutoTokenizer.from_pretrained(tokenizers_dir("qwen2.5")))


@pytest.mark.parametrize("task", PROMPTS)
def test_a_rendered_prompt_is_pinned(task, qwen):
    values, tokens, digest = PROMPTS[task]
    prompt = prepare.fill(prepare.read_template(prepare.PrepareConfig(task="snli", out=""), task, values), values)
    assert all(str(value) in prompt for value in values.values()) and "{" not in prompt
    assert (hashlib.sha256(prompt.encode()).hexdigest()[:16], len(qwen(prompt))) == (digest, tokens), prompt


def test_every_template_is_pinned():
    assert {path.stem for path in (ROOT / "data" / "prompts").iterdir()} == set(PROMPTS)


def test_spellings_are_read_by_their_first_token(qwen):
    for pairs in prepare.SPELLINGS.values():
        spellings = distjudge.parse_spellings(pairs)
        tokens = distjudge.label_tokens(qwen.tokenizer, list(spellings), spellings, qwen)
        assert not tokens.whole and len(tokens.sequences) == 2 * len(spellings)


def test_the_template_of_the_data_format_loads():
    items = distjudge.load_items(ROOT / "data" / "template.jsonl")
    assert len(items) == 4 and distjudge.labels_of(items) == list("12345") and [item.votes for item in items] == [5, 5, 5, 3]
