"""Kinds of bad input, through the real command lines: one line that says what and where, exit code 2, nothing written.

Four classes; the tables below are the list. What other files test already is not repeated here:

    item files      ITEMS (below), and by load_items alone: test_items.py::test_a_bad_line_is_named, test_broken_swaps,
                    test_no_two_labels_no_items_no_file; test_fuzz.py::test_files_that_are_refused
    converters      CONVERTERS (below), and test_own.py::test_what_a_new_user_gets_wrong; test_prepare.py::test_refusals,
                    test_emobank_refusals; test_sources.py::test_files_that_are_not_what_they_say, and fetching
    configuration   CONFIGURATIONS, FLAGS (below), and test_recipes.py::test_bad_input_ends_in_one_message_and_exit_code_2
    model folders   MODELS, JUDGES (below), and test_judge.py::test_a_judge_whose_parts_have_changed_is_refused,
                    test_missing_weights_are_refused_not_made_up, test_what_cannot_be_loaded_is_refused_in_one_line

Odd input that is legal (a byte order mark, CRLF, right-to-left and combining text, long cells) must be taken exactly: LEGAL, LEGAL_TABLES.
"""
import gzip
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import judge as judge_recipe
import prepare
import pytest
import tiny
import torch

import distjudge
from distjudge import Config, load_items, load_judge

ROOT = Path(__file__).resolve().parents[1]


def row(name, prompt="soup", more="", counts='{"yes": 1, "no": 2}'):
    return f'{{"id": "{name}", "prompt": "{prompt}"{more}, "counts": {counts}}}\n'


GOOD = row("a") + row("b", "bad soup")


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Runs a command in this process, in tmp_path, and gives the one line it ends with; nothing may have changed on the disk."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.modules["__main__"], "__doc__", "")

    def listing():
        return sorted((str(path), path.is_dir() or path.read_bytes()) for path in tmp_path.rglob("*"))

    def run(main, config, *arguments):
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        before = listing()
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            distjudge.cli(main, config)
        said = capsys.readouterr().err
        assert caught.value.code == 2, said
        assert said.startswith("error: ") and said.endswith("\n") and said.count("\n") == 1 and len(said) < 1500, said
        assert listing() == before, "something was written"
        return said[len("error: "):-1]

    return run


def train(config):
    distjudge.run(config)


# --- item files ---------------------------------------------------------------------------------------------------------
ITEMS = {  # kind: (the file's bytes or text, what the line begins with, a word in it)
    "UTF-16": (GOOD.encode("utf-16"), "x.jsonl: ", "UTF-16"),
    "UTF-16 without a byte order mark": (GOOD.encode("utf-16-le"), "x.jsonl: ", "UTF-16"),
    "UTF-32": (GOOD.encode("utf-32-be"), "x.jsonl: ", "UTF-16 or no text"),
    "Latin-1": (GOOD.encode() + row("c", "café").encode("latin-1"), "x.jsonl:3: ", "not UTF-8 (byte 27 of the line)"),
    "gzip under the name of a plain file": (gzip.compress(GOOD.encode()), "x.jsonl: ", "no text at all"),
    "a NUL": (row("a") + row("b", "so\0up"), "x.jsonl:2: ", "broken JSON: Invalid control character"),
    "a byte order mark in the middle": (row("a") + "\ufeff" + row("b"), "x.jsonl:2: ", "broken JSON: Unexpected UTF-8 BOM"),
    "carriage returns alone": (GOOD.replace("\n", "\r"), "x.jsonl:1: ", "broken JSON: Extra data"),
    "a lone surrogate in a prompt": (row("a") + row("b", "\\ud800"), "x.jsonl:2: item 'b': prompt: ", "lone surrogate"),
    "a lone surrogate in the encoding": (row("a").encode() + row("b", "\ud800").encode("utf-8", "surrogatepass"), "x.jsonl:2: ", "not UTF-8"),
    "a lone surrogate in a label": (row("a") + row("b", counts='{"\\udc00": 1, "no": 1}'), "x.jsonl:2: item 'b': counts: ", "a label must be text"),
    "a lone surrogate in a group": (row("a") + row("b", more=', "group": "\\udfff"'), "x.jsonl:2: item 'b': group: ", "must be text"),
    "a gigantic line that is cut": (row("a") + row("b", "soup " * 400_000)[:-40], "x.jsonl:2: ", "broken JSON"),
    "a gigantic id": (row("a") + row("q" * 100_000, ""), "x.jsonl:2: item 'qqq", "prompt: empty"),
    "nested lists in a field": (row("a") + row("b", more=', "group": ' + "[" * 300 + "]" * 300), "x.jsonl:2: item 'b': group: ", "must be text"),
    "a line nested too deep": (row("a") + '{"a":' * 100_000 + "\n", "x.jsonl:2: ", "broken JSON"),
    "an integer of 400 digits": (row("a") + row("b", counts='{"yes": 1' + "0" * 400 + ', "no": 1}'), "x.jsonl:2: item 'b': counts: ", "must be a number, not 1000"),
    "an integer of 5,000 digits": (row("a") + row("b", counts='{"yes": 1' + "0" * 5000 + ', "no": 1}'), "x.jsonl:2: ", "broken JSON: Exceeds the limit"),
    "an id of 400 digits": (row("a") + '{"id": 1' + "0" * 400 + ', "prompt": "x", "counts": {"yes": 1, "no": 1}}', "x.jsonl:2: id: ", "must be text"),
    "a no-break space around a label": (row("a") + row("b", counts='{"\u00a0yes": 1, "no": 1}'), "x.jsonl:2: item 'b': counts: ", "without spaces around it"),
    "labels that differ by case": ('{"id": "a", "prompt": "x", "annotations": ["yes", "no"]}\n{"id": "b", "prompt": "y", "annotations": ["Yes", "no"]}\n', "x.jsonl:1: ", "differ only in capitals"),
    "labels that differ in combining characters": (row("a", counts='{"\u00e9t\u00e9": 1, "e\u0301te\u0301": 2}'), "x.jsonl:1: ", "how a letter is coded"),
    "numbers in two spellings": (row("a", counts='{"1": 1, "1.0": 2}'), "x.jsonl:1: ", "a number in two spellings"),
    "a line break in an id": (row("a\\nb") + row("c", more=', "split": "train"'), "x.jsonl:1: item 'a b': split: ", "missing, though other items have one"),
    "an override mark in an id": (row("a") + row("\u202eb", ""), "x.jsonl:2: item ' b': ", "prompt: empty"),
    "a JSON array over lines": ("[" + GOOD.replace("}\n", "},")[:-1] + "]", "x.jsonl:1: ", "not a JSON object but list"),
    "a web page": ("<!DOCTYPE html><html></html>", "x.jsonl:1: ", "broken JSON"),
    "one group": (row("a", more=', "group": "g"') + row("b", more=', "group": "g"'), "x.jsonl: ", "2 items in 1 group cannot be split"),
    "all for training": (row("a", more=', "split": "train"'), "x.jsonl: split: ", "both train and test"),
    "one label": (row("a", counts='{"yes": 3}'), "x.jsonl:1: counts: ", "two labels or more"),
    "blank lines alone": ("\n\n \n", "x.jsonl: ", "no items"),
}


@pytest.mark.parametrize("kind", ITEMS)
def test_item_files(refused, tmp_path, kind):
    content, where, words = ITEMS[kind]
    (tmp_path / "x.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    said = refused(train, Config, "--train", "x.jsonl", "--model", "m", "--out", "o")
    assert said.startswith(where) and words in said, said


@pytest.mark.parametrize(("name", "content", "words"), [
    ("x.jsonl.gz", GOOD.encode(), "x.jsonl.gz: cannot be read: Not a gzipped file"), ("x.jsonl.gz", gzip.compress(GOOD.encode(), mtime=0)[:-9], "x.jsonl.gz: cannot be read: "),
    (".", None, ".: cannot be read: "), ("a\0b", None, "a b: cannot be read: embedded null"), ("two\nlines.jsonl", b"{", "two lines.jsonl:1: broken JSON"),
    ("gone.jsonl", None, "gone.jsonl: no such file"),
])
def test_names_of_item_files(refused, tmp_path, name, content, words):
    if content:
        (tmp_path / name).write_bytes(content)
    assert refused(train, Config, "--train", name, "--model", "m", "--out", "o").startswith(words)


def test_an_item_on_both_sides(refused, tmp_path):
    (tmp_path / "x.jsonl").write_text(GOOD)
    (tmp_path / "t.jsonl").write_text(row("c", "bad soup"))
    said = refused(train, Config, "--train", "x.jsonl", "--test", "t.jsonl", "--model", "m", "--out", "o")
    assert said == "t.jsonl:1: item 'c': prompt: also in the training items, at x.jsonl:2"


LEGAL = {  # kind: (the file's bytes, the prompts in it)
    "a byte order mark": (b"\xef\xbb\xbf" + GOOD.encode(), ["soup", "bad soup"]),
    "CRLF and a last line without an end": (GOOD.replace("\n", "\r\n")[:-2].encode(), ["soup", "bad soup"]),
    "right-to-left text and marks": (row("a", "\u202e\u05d0\u05d1\u05d2 abc\u202c \u0627\u0644").encode(), ["\u202e\u05d0\u05d1\u05d2 abc\u202c \u0627\u0644"]),
    "combining characters": (row("a", "e\u0301\u0327 \u00e9 \u0301").encode(), ["e\u0301\u0327 \u00e9 \u0301"]),
    "control characters": (row("a", "a\\u0000b\\u0007\\u001b[31m").encode(), ["a\x00b\x07\x1b[31m"]),
    "a pair of surrogates": (row("a", "\\ud83d\\ude00").encode(), ["\U0001f600"]),
    "line separators of Unicode": (row("a", "x\u2028y\u2029z\u0085").encode(), ["x\u2028y\u2029z\u0085"]),
    "spaces around a prompt": (row("a", "  x \\n").encode(), ["  x \n"]),
    "joined emoji": (row("a", "\U0001f469\u200d\U0001f4bb").encode(), ["\U0001f469\u200d\U0001f4bb"]),
    "a gigantic line": (row("a", "soup " * 400_000).encode(), ["soup " * 400_000]),
    "other fields, nested, with a lone surrogate": (row("a", more=', "x": ' + "[" * 300 + '"\\ud800"' + "]" * 300).encode(), ["soup"]),
}


@pytest.mark.parametrize("kind", LEGAL)
def test_odd_item_files_are_taken_exactly(tmp_path, kind):
    content, prompts = LEGAL[kind]
    (tmp_path / "x.jsonl").write_bytes(content)
    assert [item.prompt for item in load_items(tmp_path / "x.jsonl")] == prompts


# --- converters ---------------------------------------------------------------------------------------------------------
V = "text,v\nx,1\ny,2\n"
TV = ["--text", "text", "--label", "v"]
TC = ["--text", "text", "--counts", "n"]
NLI = {"annotator_labels": ["neutral"] * 3, "gold_label": "-", "pairID": "1n", "sentence1": "A man eats.", "sentence2": "He eats."}
CHAOS = {"uid": "u", "example": {"premise": "p", "hypothesis": "h"}, "label_counter": {"e": 5}}
SUMMARY = {"id": "s", "model_id": "M0", "decoded": "Short.", "text": "Long.", "expert_annotations": [dict.fromkeys(prepare.QUALITIES["summeval"], 3)], "turker_annotations": []}
VOTE = {"question_id": 1, "turn": 1, "model_a": "x", "model_b": "y", "winner": "tie"}
HELP = {"prompt": "p", "response": "r"} | {quality: [1, 2] for quality in prepare.QUALITIES["helpsteer2"]}
PREFERENCE = {"prompt": "p", "response_1": "r", "response_2": "s", "all_preferences_unprocessed": [{"strength": 1}]}


def own(content, where, words, *arguments, name="t.csv"):
    return "own", name, content, where, words, arguments or TV


def published(task, content, where, words):
    return task, "t.jsonl", content if isinstance(content, str) else json.dumps(content) + "\n", where, words, ()


CONVERTERS = {  # kind: (task, the file's name and content, what the line begins with, a word in it, arguments)
    "a table in UTF-16": own(V.encode("utf-16"), "t.csv: ", "not UTF-8; save the sheet as 'CSV UTF-8'"),
    "an empty table": own("", "t.csv: text: ", "no column 'text'"),
    "a header alone": own("text,v\n", "t.csv: ", "no item is left of 0 rows"),
    "a quote that is never closed": own(V + '"z,1\n', "t.csv: ", "unexpected end of data"),
    "text behind a closed quote": own(V + '"z"z,1\n', "t.csv: ", "expected after"),
    "too many cells": own(V + "a,b,c\n", "t.csv: row 4: ", "more fields than columns"),
    "a label of 5,000 digits": own(V + "z," + "9" * 5000 + "\n", "t.csv: row 4: v: ", "mixed scales: '9999"),
    "a label of 30 digits": own(V + "z," + "9" * 30 + "\n", "t.csv: row 4: v: ", "mixed scales: '9999"),
    "a superscript digit": own(V + "z,\u00b2\n", "t.csv: row 4: v: ", "mixed scales: '\u00b2'"),
    "a zero-width space in a label": own(V + "z,\u200b2\n", "t.csv: row 4: v: ", "mixed scales"),
    "not a number": own(V + "z,nan\n", "t.csv: row 4: v: ", "mixed scales: 'nan'"),
    "labels in composed and combining characters": own("text,v\nx,\u00e9\nx,e\u0301\n", "t.csv: row 3: v: ", "written in two ways"),
    "counts nested too deep": own('text,n\nx,"' + "[" * 100_000 + '"\n', "t.csv: row 2: n: ", "must be an object", *TC),
    "an object nested too deep": own('text,n\nx,"' + '{""a"":' * 5000 + "1" + "}" * 5000 + '"\n', "t.csv: row 2: n: ", "must be an object", *TC),
    "a count of 400 digits": own('text,n\nx,"{""1"": 1' + "0" * 400 + ', ""2"": 1}"\n', "t.csv: row 2: 1: ", "a number of votes is needed", *TC),
    "a count of 5,000 digits": own('text,n\nx,"{""1"": 1' + "0" * 5000 + ', ""2"": 1}"\n', "t.csv: row 2: n: ", "must be an object", *TC),
    "an infinite count": own('text,n\nx,"{""1"": 1e400, ""2"": 1}"\n', "t.csv: row 2: 1: ", "not 'inf'", *TC),
    "a count that is an object": own('text,n\nx,"{""1"": {""a"": 1}}"\n', "t.csv: row 2: 1: ", "a number of votes is needed", *TC),
    "a label twice in counts": own('text,n\nx,"{""1"": 1, ""1"": 5, ""2"": 1}"\n', "t.csv: row 2: n: ", "'1' stands twice in it", *TC),
    "two billion votes": own('text,n\nx,"{""1"": 2000000000, ""2"": 1}"\n', "t.csv: row 2: n: ", "more than a billion votes for '1'", *TC),
    "a count column of 5,000 digits": own("text,a,b\nx," + "9" * 5000 + ",1\n", "t.csv: row 2: a: ", "a number of votes is needed", "--text", "text", "--counts", "a", "b"),
    "a count in superscript": own("text,a,b\nx,\u00b2,1\n", "t.csv: row 2: a: ", "a number of votes is needed", "--text", "text", "--counts", "a", "b"),
    "a lone surrogate in a text": own('{"text": "a", "v": 1}\n{"text": "\\ud800", "v": 2}\n', "t.jsonl:2: text: ", "without lone surrogates", name="t.jsonl"),
    "a lone surrogate in a vote": own('{"text": "a", "v": "x"}\n{"text": "b", "v": "\\ud800"}\n', "t.jsonl:2: v: ", "without lone surrogates", name="t.jsonl"),
    "a lone surrogate in a group name": own('{"text": "a", "v": 1, "g": "\\ud800"}\n', "t.jsonl:1: g: ", "without lone surrogates", *TV, "--group", "g", name="t.jsonl"),
    "a list as text": own('{"text": ["a"], "v": 1}\n', "t.jsonl:1: text: ", "must be text or a number, not ['a']", name="t.jsonl"),
    "a list as a vote": own('{"text": "a", "v": [1, 2]}\n', "t.jsonl:1: v: ", "must be text or a number, not [1, 2]", name="t.jsonl"),
    "a field twice": own('{"text": "a", "v": 1, "v": 2}\n', "t.jsonl:1: v: ", "stands twice in the row", name="t.jsonl"),
    "a workbook that is another archive": own("zip", "t.xlsx: ", "cannot be read as Excel", name="t.xlsx"),
    "a workbook that is a web page": own("<html>", "t.xlsx: ", "cannot be read as Excel", name="t.xlsx"),
    "bytes in a Parquet file": own("parquet", "t.parquet: row 1: text: ", "must be text or a number, not b'", name="t.parquet"),
    "a Parquet file that is cut": own("cut parquet", "t.parquet: ", "cannot be read as Parquet", name="t.parquet"),
    "a kind of file nobody knows": own(V, "t.doc: ", "is not a table that can be read", name="t.doc"),
    "a scale of 5,000 digits": own(V, "t.csv: row 2: v: ", "is not one of", *TV, "--labels", "1-" + "9" * 5000, "2"),
    "a scale without an end": own(V, "labels: ", "is not a range", *TV, "--labels", "1-5000000000000"),
    "a label named twice": own(V, "labels: ", "names a label twice", *TV, "--labels", "1", "1.0"),
    "labels named that differ by case": own(V, "labels: ", "names a label twice (capitals are ignored)", *TV, "--labels", "a", "A"),
    "an empty label named": own(V, "labels: ", "names an empty label", *TV, "--labels", "1", " "),
    "no least number of votes": own(V, "min_votes: ", "must be 1 or more, not 0", *TV, "--min_votes", "0"),
    "a template that is no text": own(V, "t.csv.bin: ", "the template cannot be read", *TV, "--template", "t.csv.bin"),
    "no folder to write to": own(V, "out: ", "name a folder", *TV, "--out", ""),
    "SNLI: a label that is a list": published("snli", NLI | {"annotator_labels": [["neutral"]]}, "t.jsonl:1: annotator_labels: ", "unknown label"),
    "SNLI: a lone surrogate": published("snli", NLI | {"sentence1": "\ud800"}, "t.jsonl:1: sentence1: ", "lone surrogate"),
    "SNLI: no premise": published("snli", NLI | {"sentence1": None}, "t.jsonl:1: sentence1: ", "must be str, not None"),
    "ChaosNLI: votes in words": published("chaosnli", CHAOS | {"label_counter": {"e": "many"}}, "t.jsonl:1: label_counter: ", "not 'many'"),
    "ChaosNLI: votes below zero": published("chaosnli", CHAOS | {"label_counter": {"e": -3, "n": 5}}, "t.jsonl:1: label_counter: ", "not -3"),
    "SummEval: a rating by itself": published("summeval", SUMMARY | {"expert_annotations": [1.5]}, "t.jsonl:1: coherence: ", "'1.5' is not 1 to 5"),
    "MT-Bench: no choices": published("mtbench", {"question_id": 1, "model_id": "x", "choices": []}, "t.jsonl:1: choices: ", "must be a list of"),
    "MT-Bench: turns that are numbers": published("mtbench", {"question_id": 1, "turns": [1, 2]}, "t.jsonl:1: turns: ", "must be a list of texts, not of 1"),
    "MT-Bench: a conversation that is text": published("mtbench", VOTE | {"conversation_a": "hi", "conversation_b": "ho"}, "t.jsonl:1: conversation_a: ", "must be a list of messages"),
    "HelpSteer2: a rating that is true": published("helpsteer2", HELP | {"helpfulness": [True]}, "t.jsonl:1: helpfulness: ", "True is not 0 to 4"),
    "HelpSteer2-Preference: a strength in a list": published("helpsteer2_pref", PREFERENCE | {"all_preferences_unprocessed": [[1]]}, "t.jsonl:1: strength: ", "[1] is not -3 to 3"),
}


@pytest.mark.parametrize("kind", CONVERTERS)
def test_converters(refused, tmp_path, kind):
    task, name, content, where, words, arguments = CONVERTERS[kind]
    (tmp_path / "t.csv.bin").write_bytes(b"\xff{text}")
    if "parquet" in name:
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([b"caf\xc3\xa9"], pyarrow.binary()), "v": [1]}), tmp_path / name)
        if content == "cut parquet":
            (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-20])
    elif content == "zip":
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("a.txt", "x")
    else:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    said = refused(prepare.main, prepare.PrepareConfig, task, "--raw", name, "--out", "o", "--split", "none", *arguments)
    assert said.startswith(where) and words in said, said


LEGAL_TABLES = {  # kind: (the table, its prompts)
    "a byte order mark and CRLF": ("\ufeff" + V.replace("\n", "\r\n"), ["x", "y"]),
    "right-to-left text": (V + "\u202e\u05d0\u05d1 abc,1\n", ["x", "y", "\u202e\u05d0\u05d1 abc"]),
    "combining characters": (V + "e\u0301\u0327,1\n", ["x", "y", "e\u0301\u0327"]),
    "a NUL": (V + "a\0b,1\n", ["x", "y", "a\0b"]),
    "a line break in a cell": (V + '"a\n\nb",1\n', ["x", "y", "a\n\nb"]),
    "a cell of 200,000 characters": (V + "z" * 200_000 + ",1\n", ["x", "y", "z" * 200_000]),
    "what looks like a placeholder or a formula": (V + "{v} =1+1,1\n", ["x", "y", "{v} =1+1"]),
}


@pytest.mark.parametrize("kind", LEGAL_TABLES)
def test_odd_tables_are_taken_exactly(tmp_path, kind):
    table, prompts = LEGAL_TABLES[kind]
    (tmp_path / "t.csv").write_bytes(table.encode())
    prepare.main(prepare.PrepareConfig(task="own", raw=(str(tmp_path / "t.csv"),), out=str(tmp_path / "o"), text="text", label=("v",), split="none"))
    assert [item.prompt for item in load_items(tmp_path / "o" / "items.jsonl")] == prompts


# --- configuration ------------------------------------------------------------------------------------------------------
CONFIGURATIONS = {  # kind: (arguments, what the line begins with)
    "a seed below zero": (["--seed", "-1"], "seed: must be between 0 and 4294967295, not -1"),
    "a seed beyond 32 bits": (["--seed", "4294967296"], "seed: must be between"),
    "a learning rate that is no number": (["--learning_rate", "nan"], "learning_rate: must be 0 or more, not nan"),
    "epochs without end": (["--epochs", "inf"], "epochs: must be 0 or more, not inf"),
    "no epochs": (["--epochs", "0"], "epochs: must be more than 0"),
    "alpha that is no number": (["--alpha", "nan"], "alpha: must be between 0 and 1, not nan"),
    "a radius below zero": (["--eps", "-0.1"], "eps: must be 0 or more, not -0.1"),
    "no items a step": (["--batch_size", "0"], "batch_size: must be 1 or more, not 0"),
    "a warm-up below zero": (["--warmup", "-1"], "warmup: must be 0 or more, not -1"),
    "averaging more than all steps": (["--average", "1.5"], "average: must be between 0 and 1, not 1.5"),
    "averaging a teacher's mean": (["--preset", "teacher", "--average", "0.3"], "average: with --prior teacher it must be 0"),
    "a ball the paper's adversary does not know": (["--ball", "kl"], "ball: the kl ball needs --adversary exact"),
    "a radius in another distance": (["--ball", "tv", "--adversary", "exact", "--radius", "annotators"], "radius: the annotators' radius"),
    "tokens a pass below zero": (["--pack_tokens", "-5"], "pack_tokens: must be 0 or more, not -5"),
    "a prior worth no number": (["--concentration", "nan"], "concentration: must be 0 or more, not nan"),
    "a preset beside a bad flag": (["--preset", "kl", "--alpha", "2"], "alpha: must be between 0 and 1, not 2.0"),
    "no folder": (["--out", ""], "out: name a folder"),
    "no training items": (["--train"], "train: name a file of training items"),
    "a label twice": (["--labels", "yes", "yes"], "labels: "),
    "a label with spaces": (["--labels", "yes ", "no", "--train", "one.jsonl"], "one.jsonl:1: item 'a': counts: unknown label {yes}"),
    "one label": (["--labels", "no", "--train", "one.jsonl"], "one.jsonl:1: item 'a': counts: unknown label {yes}; the labels are {no}"),
    "no model": (["--model", ""], "model: name a folder or a hub id"),
    "a spelling of no label": (["--spellings", "maybe=a"], "spellings: unknown label {maybe}"),
    "a spelling that is none": (["--spellings", "yes"], "spellings: 'yes' is not LABEL=TEXT,TEXT"),
    "an empty spelling": (["--spellings", "yes="], "spellings: label 'yes': '' is empty"),
    "a spelling that is not text": (["--spellings", "yes=a\udcff"], "spellings: label 'yes': 'a\\udcff' is not text that can be encoded"),
    "a control token as a spelling": (["--spellings", "yes=<|end|>"], "spellings: label 'yes': '<|end|>' is a control token"),
    "two labels spelled alike": (["--spellings", "yes=x", "no=x"], "spellings: two labels have the same tokens"),
    "4 bits without adapters": (["--four_bit", "--lora_rank", "0"], "four_bit: "),
    "prompts longer than the longest": (["--max_length", "3", "--train", "items.jsonl"], "items.jsonl:"),
    "a scale of words": (["--loss", "rps"], "loss: rps needs ordered labels"),
    "a logger nobody knows": (["--report_to", "nonesuch"], "training settings: nonesuch is not supported"),
    "a file where the folder should be": (["--out", "items.jsonl/run"], "[Errno 20] "),
}


@pytest.mark.parametrize("kind", CONFIGURATIONS)
def test_configurations(refused, tmp_path, tiny_model, kind):
    arguments, words = CONFIGURATIONS[kind]
    (tmp_path / "items.jsonl").write_text(GOOD)
    (tmp_path / "one.jsonl").write_text(row("a"))
    options = {"--train": ["items.jsonl"], "--model": [tiny_model], "--out": ["o"], "--min_mass": ["0"]}
    said = refused(train, Config, *(x for name, given in options.items() if name not in arguments for x in (name, *given)), *arguments)
    assert said.startswith(words), said


@pytest.mark.parametrize(("arguments", "words"), [(["--max_length", "3"], "tokens; "), (["--spellings", "maybe=x"], "unknown label {maybe}")])
def test_a_recipe_that_makes_its_own_model_leaves_nothing_behind(refused, tmp_path, arguments, words):
    (tmp_path / "items.jsonl").write_text(GOOD)
    assert words in refused(tiny.main, tiny.TinyConfig, "--train", "items.jsonl", "--out", "o", "--hidden", "16", *arguments)


FLAGS = {"a word for a number": ["--alpha", "much"], "a fraction for a count": ["--steps", "1.5"], "an unknown flag": ["--no_such", "1"],
         "an unknown choice": ["--schedule", "nonesuch"], "an unknown preset": ["--preset", "nonesuch"], "a flag without its value": ["--alpha"]}


@pytest.mark.parametrize("kind", FLAGS)
def test_flags_are_refused_by_the_command_line_itself(tmp_path, monkeypatch, capsys, kind):
    """tyro's own message, framed over several lines: it names the flag, the exit code is 2, and nothing ran."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["command", *FLAGS[kind]])
    with pytest.raises(SystemExit) as caught:
        distjudge.cli(lambda config: pytest.fail("it ran"), Config)
    said = capsys.readouterr()
    assert caught.value.code == 2 and FLAGS[kind][0].lstrip("-") in said.err + said.out and not list(tmp_path.iterdir())


# --- model folders ------------------------------------------------------------------------------------------------------
def put(name, content):
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def take(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def cut(name, left=0.5):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[: int(left * (folder / name).stat().st_size)])


def fields(name, **values):
    def change(folder):
        there = json.loads((folder / name).read_text()) | values
        (folder / name).write_text(json.dumps({key: value for key, value in there.items() if value is not ...}))
    return change


def weights(change):
    def rewrite(folder):
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return rewrite


def shards(change):
    def rewrite(folder):
        import transformers

        transformers.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="40KB")
        (folder / WEIGHTS).unlink(missing_ok=True)
        change(sorted(folder.glob("model-*-of-*.safetensors")), folder / "model.safetensors.index.json")
    return rewrite


def pickled(folder):
    (folder / WEIGHTS).unlink()
    torch.save({"x": torch.ones(1)}, folder / "pytorch_model.bin")


def adapter(folder):
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "base_model_name_or_path": "other/base"}))


WEIGHTS, TEMPLATE = "model.safetensors", "chat_template.jinja"
TURNS = "{% for m in messages %}{{ ('<|user|>' if m.role == 'user' else '<|judge|>') + m.content + '<|end|>' }}{% endfor %}"
EVIL = "import pathlib\npathlib.Path('sprung').touch()\n"
MODELS = {  # kind: (what is done to the folder, words of the line, which begins with the folder)
    "no config.json": (take("config.json"), "there is no config.json in it"),
    "a broken config.json": (put("config.json", "{"), "config.json cannot be used"),
    "a list for a config.json": (put("config.json", "[1]"), "config.json cannot be used"),
    "a config.json in Latin-1": (put("config.json", b'{"model_type": "caf\xe9"}'), "config.json cannot be used"),
    "no model type": (fields("config.json", model_type=..., architectures=...), "model_type"),
    "an unknown model type": (fields("config.json", model_type="nonesuch"), "nonesuch"),
    "an encoder-decoder": (fields("config.json", model_type="t5"), "cannot be loaded: Unrecognized configuration class"),
    "a size in words": (fields("config.json", hidden_size="many"), "config.json cannot be used: Validation error for field 'hidden_size'"),
    "layers that contradict each other": (fields("config.json", num_hidden_layers=3), "config.json cannot be used"),
    "another width": (fields("config.json", hidden_size=48), "weights are missing or of another shape, the first "),
    "no attention heads": (fields("config.json", num_attention_heads=0), "cannot be "),
    "code of its own": (lambda folder: (fields("config.json", model_type="own", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})(folder),
                                        put("evil.py", EVIL)(folder)), "contains custom code"),
    "weights that are cut": (cut(WEIGHTS), "incomplete metadata, file not fully covered"),
    "empty weights": (put(WEIGHTS, b""), "header too small"),
    "weights that are a pointer to large files": (put(WEIGHTS, "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n"), "header too large"),
    "no weights": (take(WEIGHTS), "no file named model.safetensors"),
    "pickled weights alone": (pickled, "cannot be loaded"),
    "weights that are no numbers": (weights(lambda t: t["model.layers.0.mlp.up_proj.weight"].fill_(float("nan"))), "its scores are not finite"),
    "a layer that is missing": (weights(lambda t: t.pop("model.layers.1.mlp.up_proj.weight")), "1 of its weights are missing or of another shape"),
    "a shard that is missing": (shards(lambda files, index: files[1].unlink()), "No such file"),
    "a shard that is cut": (shards(lambda files, index: files[1].write_bytes(files[1].read_bytes()[:-9])), "file not fully covered"),
    "a broken index of shards": (shards(lambda files, index: index.write_text("{")), "cannot be loaded"),
    "an index that points elsewhere": (shards(lambda files, index: index.write_text('{"metadata": {}, "weight_map": {"x": "../gone"}}')), "No such file"),
    "an adapter": (adapter, "holds a PEFT adapter, not a model"),
    "no tokenizer.json": (take("tokenizer.json"), "it has no vocabulary (tokenizer.json is missing)"),
    "a broken tokenizer.json": (cut("tokenizer.json"), "its tokenizer cannot be loaded"),
    "a tokenizer.json of another kind": (put("tokenizer.json", "{}"), "its tokenizer cannot be loaded"),
    "a list for the tokenizer's settings": (put("tokenizer_config.json", "[]"), "its tokenizer cannot be loaded"),
    "a tokenizer larger than the embedding": (lambda folder: smaller(folder), "has 20 tokens, its tokenizer "),
    "a template in another encoding": (put(TEMPLATE, b"\xff\xfe{"), "its tokenizer cannot be loaded"),
    "a template that cannot be parsed": (put(TEMPLATE, "{% for m in messages %}{{ m.content }"), "chat template: unexpected '}'"),
    "a template that raises, in two lines": (put(TEMPLATE, "{{ raise_exception('only\npictures') }}"), "chat template: only"),
    "a template that reaches for Python": (put(TEMPLATE, "{{ ''.__class__.__mro__ }}"), "chat template: access to attribute '__class__'"),
    "a template without the message": (put(TEMPLATE, "hello"), "chat template: shows the message 0 times"),
    "a template with the message twice": (put(TEMPLATE, "{{ messages[0].content * 2 }}"), "chat template: shows the message 2 times"),
    "a template that changes the message": (put(TEMPLATE, "{{ messages[0].content | upper }}"), "chat template: "),
    "a template that knows no judge": (put(TEMPLATE, "{% for m in messages %}{% if m.role != 'user' %}{{ raise_exception('no such role') }}{% endif %}{{ m.content }}{% endfor %}"), "chat template: no such role"),
    "a template that strips the answer prefix": (put(TEMPLATE, TURNS), "chat template: ends a prompt without '<|judge|>', which it puts before an answer"),
}


def smaller(folder):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    Qwen2ForCausalLM(Qwen2Config(vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)).save_pretrained(folder)


@pytest.mark.parametrize("kind", MODELS)
def test_model_folders(refused, tmp_path, tiny_model, kind):
    change, words = MODELS[kind]
    shutil.copytree(tiny_model, tmp_path / "m")
    (tmp_path / "items.jsonl").write_text(GOOD)
    change(tmp_path / "m")
    said = refused(train, Config, "--train", "items.jsonl", "--model", "m", "--out", "o")
    assert words in said and said.startswith("m: "), said


@pytest.mark.parametrize(("name", "words"), [("items.jsonl", "items.jsonl: model: is a file, not a folder"), ("./gone", "./gone: model: no such folder"),
                                             ("nobody/nothing", "nobody/nothing: model: no such folder, and it cannot be loaded from a model hub")])
def test_names_of_models(refused, tmp_path, name, words):
    (tmp_path / "items.jsonl").write_text(GOOD)
    assert refused(train, Config, "--train", "items.jsonl", "--model", name, "--out", "o").startswith(words)


def test_labels_that_are_the_same_tokens(refused, tmp_path, tiny_model):
    """Qwen's tokenizers compose characters, so two labels that differ in that alone cannot be told apart, even when both are named."""
    (tmp_path / "items.jsonl").write_text(row("a", counts='{"\u00e9": 1, "e\u0301": 2}') + row("b", "bad", counts='{"\u00e9": 1, "e\u0301": 2}'))
    said = refused(train, Config, "--train", "items.jsonl", "--model", tiny_model, "--out", "o", "--labels", "\u00e9", "e\u0301")
    assert said.startswith("spellings: two labels have the same tokens")


def test_code_that_a_tokenizer_brings_is_not_run(tmp_path, tiny_model, monkeypatch):
    shutil.copytree(tiny_model, tmp_path / "m")
    monkeypatch.chdir(tmp_path)
    fields("tokenizer_config.json", tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.T", None]})(tmp_path / "m")
    put("evil.py", EVIL)(tmp_path / "m")
    assert load_judge("m", ["yes", "no"], lora_rank=0).labels == ["yes", "no"] and not (tmp_path / "sprung").exists()


def test_templates_without_control_tokens_are_told_of(tiny_tokenizer, caplog):
    import copy

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    distjudge.PromptEncoder(tokenizer)
    assert "ends a turn in plain words" in caplog.text
    caplog.clear()
    tokenizer.chat_template = TURNS + "{% if add_generation_prompt %}<|judge|>thinking\n{% endif %}"
    distjudge.PromptEncoder(tokenizer)
    assert "ends a prompt with" in caplog.text and "thinking" in caplog.text
    caplog.clear()
    distjudge.PromptEncoder(tiny_tokenizer)
    assert not caplog.text


JUDGES = {  # kind: (what is done to the run folder, words of the line)
    "a judge.json that is cut": (cut("judge.json"), "judge.json: not a judge written by distjudge"),
    "a list": (put("judge.json", "[]"), "judge.json: not a judge written by distjudge (TypeError"),
    "a judge.json in another encoding": (put("judge.json", b"\xff\xfe"), "judge.json: not a judge written by distjudge (UnicodeDecodeError"),
    "one nested too deep": (put("judge.json", "[" * 100_000), "judge.json: not a judge written by distjudge (RecursionError"),
    "no labels": (fields("judge.json", labels=...), "judge.json: not a judge written by distjudge (KeyError: 'labels'"),
    "labels that are null": (fields("judge.json", labels=None), "judge.json: not a judge written by distjudge (ValueError: labels: None"),
    "no template": (fields("judge.json", frame=None), "judge.json: not a judge written by distjudge (ValueError: frame: None"),
    "half a template": (fields("judge.json", frame={"before": "x"}), "judge.json: not a judge written by distjudge (KeyError: 'after'"),
    "label tokens that are numbers": (fields("judge.json", sequences=[1, 2]), "judge.json: not a judge written by distjudge (TypeError"),
    "a length in words": (fields("judge.json", max_length="long"), "judge.json: not a judge written by distjudge (ValueError: max_length: 'long'"),
    "a length below zero": (fields("judge.json", max_length=-5), "judge.json: not a judge written by distjudge (ValueError: max_length: -5"),
    "top tokens below zero": (fields("judge.json", top_k=-1), "judge.json: not a judge written by distjudge (ValueError: top_k: -1"),
    "spellings that are a list": (fields("judge.json", spellings=[1]), "judge.json: not a judge written by distjudge (ValueError: spellings: [1]"),
    "weights of another kind": (fields("judge.json", weights="pickle"), "judge.json: not a judge written by distjudge (ValueError: weights: 'pickle'"),
    "no adapter": (lambda run: shutil.rmtree(run / "adapter"), "run: adapter/adapter_model.safetensors is missing"),
    "no tokenizer": (lambda run: shutil.rmtree(run / "tokenizer"), "run: tokenizer is missing"),
    "an adapter that is cut": (cut("adapter/adapter_model.safetensors"), "run/adapter/adapter_model.safetensors: has changed"),
}


@pytest.mark.parametrize("kind", JUDGES)
def test_judges(refused, tmp_path, saved_run, kind):
    change, words = JUDGES[kind]
    shutil.copytree(saved_run, tmp_path / "run")
    (tmp_path / "items.jsonl").write_text(GOOD)
    change(tmp_path / "run")
    said = refused(judge_recipe.main, judge_recipe.JudgeConfig, "--run", "run", "--items", "items.jsonl", "--out", "judged.jsonl")
    assert words in said, said


def test_an_adapter_for_another_base(refused, tmp_path, saved_run, tiny_tokenizer):
    shutil.copytree(saved_run, tmp_path / "run")
    smaller(tmp_path / "other")
    fields("judge.json", base=str(tmp_path / "other"))(tmp_path / "run")
    (tmp_path / "items.jsonl").write_text(GOOD)
    said = refused(judge_recipe.main, judge_recipe.JudgeConfig, "--run", "run", "--items", "items.jsonl", "--out", "judged.jsonl")
    assert said.startswith(f"{tmp_path / 'other'}: model: has 20 tokens, its tokenizer {len(tiny_tokenizer)}")


# --- the list, and what a user sees -------------------------------------------------------------------------------------
def test_the_list_is_long_enough_and_nothing_stands_in_it_twice():
    classes = {"items": ITEMS, "converters": CONVERTERS, "configuration": CONFIGURATIONS | FLAGS, "model folders": MODELS | JUDGES}
    assert all(len(kinds) >= 30 for kinds in classes.values()) and sum(map(len, classes.values())) >= 170
    told = [(name, str(case)) for name, kinds in classes.items() for case in kinds.values()]
    assert len(set(told)) == len(told)


@pytest.mark.slow
@pytest.mark.parametrize(("command", "words"), [
    (["recipes/tiny.py", "--train", "x.jsonl", "--out", "o"], "error: x.jsonl: is UTF-16 or no text at all; save it as UTF-8\n"),
    (["data/prepare.py", "own", "--raw", "t.csv", "--text", "text", "--label", "v", "--out", "o"], f"error: t.csv: row 4: v: mixed scales: '{'9' * 17}...' among numbers"),
    (["recipes/tiny.py", "--seed", "-1", "--out", "o"], "error: seed: must be between 0 and 4294967295, not -1\n"),
    (["recipes/tiny.py", "--preset", "kl", "--out", "o"], "error: preset, prior: each row here has its own; recipes of one backbone take them\n"),
    (["recipes/study.py", "main", "--prior", "teacher", "--out", "o"], "error: preset, prior: each row has its own; --methods names rows\n"),
    (["recipes/tiny.py", "--model", "m", "--out", "o", "--lora_rank", "2"], "error: m: chat template: ends a prompt without '<|judge|>'"),
    (["recipes/judge.py", "--run", "run", "--items", "i.jsonl", "--out", "j.jsonl"], "error: run/tokenizer/chat_template.jinja: has changed"),
])
def test_as_a_user_sees_it(tmp_path, tiny_model, saved_run, command, words):
    (tmp_path / "x.jsonl").write_bytes(GOOD.encode("utf-16"))
    (tmp_path / "i.jsonl").write_text(GOOD)
    (tmp_path / "t.csv").write_text(V + "z," + "9" * 5000 + "\n")
    shutil.copytree(tiny_model, tmp_path / "m")
    shutil.copytree(saved_run, tmp_path / "run")
    put(TEMPLATE, TURNS)(tmp_path / "m")
    put("tokenizer/" + TEMPLATE, TURNS)(tmp_path / "run")
    done = subprocess.run([sys.executable, ROOT / command[0], *command[1:]], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith(words) and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "o").exists() and not (tmp_path / "j.jsonl").exists()
