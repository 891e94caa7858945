"""Converters: exact counts on the published files, hand-made files for everything that can be wrong."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

import distjudge

ROOT = Path(__file__).resolve().parents[1]
SENTENCES = 'id,split,V,A,D,text\n1,train,3,3,3,"So, he said: ""go""."\n2,test,3,3,3,Same words.\n3,train,3,3,3,Same words.\n4,dev,3,3,3,{braces}\n'
RATINGS = "id,V,A,D\n1,5,1,3\n1,4,1,3\n2,1,1,3\n3,2,2,2\n4,3,3,3\n9,3,3,3\n"


def prepare(tmp_path, sentences=SENTENCES, ratings=RATINGS, *more):
    (tmp_path / "emobank.csv").write_text(sentences)
    (tmp_path / "ratings.csv").write_text(ratings)
    return subprocess.run([sys.executable, ROOT / "data" / "prepare.py", "emobank", "--raw", "ratings.csv", "emobank.csv", "--out", "o", *more],
                          capture_output=True, text=True, cwd=tmp_path)


def test_emobank_by_hand(tmp_path):
    done = prepare(tmp_path)
    assert done.returncode == 0, done.stderr
    train, valid, test = (distjudge.load_items(tmp_path / "o" / f"{s}.jsonl") for s in ("train", "valid", "test"))
    assert [(item.id, item.counts) for item in train] == [("1", {"1": 0, "2": 0, "3": 0, "4": 1, "5": 1})]
    assert [item.id for item in valid] == ["4"] and [item.id for item in test] == ["2"]
    assert train[0].prompt == ("How does this sentence make its reader feel? Rate its valence from 1 (very unpleasant) to 5 (very pleasant); "
                               '3 is neutral. Answer with the number only.\n\nSentence: So, he said: "go".')
    assert valid[0].prompt.endswith("Sentence: {braces}")
    card = json.loads((tmp_path / "o" / "card.json").read_text())
    assert card["items"] == {"train": 1, "valid": 1, "test": 1} and card["votes_an_item"] == {"1": 2, "2": 1}
    assert card["dropped"] == {"rated, without text": 1, "text without ratings": 0, "empty text": 0, "also in test or valid": 1}
    prepare(tmp_path, SENTENCES, RATINGS, "--dimension", "arousal")
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
])
def test_emobank_refusals(tmp_path, sentences, ratings, more, words):
    done = prepare(tmp_path, sentences, ratings, *more)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1 and not (tmp_path / "o").exists()


def test_emobank_as_published(data_dir, tmp_path):
    folder = data_dir("emobank")
    done = subprocess.run([sys.executable, ROOT / "data" / "prepare.py", "emobank", "--raw", folder / "emobank.csv",
                           folder / "individual_reader_ratings.csv", "--out", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["read"] == {"emobank.csv": 10062, "individual_reader_ratings.csv": 53055}
    assert card["items"] == {"train": 7984, "valid": 992, "test": 1000}
    assert card["dropped"] == {"rated, without text": 486, "text without ratings": 0, "empty text": 0, "also in test or valid": 86}
    assert sum(card["items"].values()) + card["dropped"]["also in test or valid"] == 10062
    assert card["votes_an_item"] == {"5": 9681, "6": 286, "7": 9}
    train, test = distjudge.load_items(tmp_path / "train.jsonl"), distjudge.load_items(tmp_path / "test.jsonl")
    distjudge.check_apart(train, test)
    assert distjudge.labels_of(train) == list("12345")
