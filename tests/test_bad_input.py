r"""Bad input through the real command lines: one line that says what and where, exit code 2, nothing written.

The tables have a case a line: name | input | what the command says. Inputs are Python expressions, or flags;
"..." stands for words left out. What load_items refuses in a line is in test_items.py; more of converters in
test_own.py, test_prepare.py and test_sources.py, of judges in test_judge.py.
"""

import copy
import dataclasses
import gzip
import json
import re
import shlex
import shutil
import sys
import zipfile
from pathlib import Path
from unittest.mock import Mock

import distjudge
from distjudge import Config, InputError, load_items, load_judge

import common
import prepare
import pytest
import tiny
from conftest import call, change_json, change_weights

COMMANDS = {  # a command, and the flags before those of a case, which win
    "train": (distjudge.run, Config, "--train x.jsonl --model m --out o"),
    "own": (prepare.main, prepare.PrepareConfig, "own --raw t.csv --out o --split none --text text"),
    "published": (prepare.main, prepare.PrepareConfig, "--raw t.jsonl --out o --split none"),
    "tiny": (tiny.main, tiny.TinyConfig, "--train x.jsonl --out o --hidden 16"),
}


def cases(text):
    """Marks a test with the cases of a table: it gets `given` and `words` of each."""
    lines = [[cell.strip() for cell in line.split(" | ")] for line in text.strip().splitlines()]
    params = [pytest.param(given, words, id=name) for name, given, words in lines]
    return pytest.mark.parametrize(("given", "words"), params)


def row(name, prompt="soup", more="", counts='{"yes": 1, "no": 2}'):
    return f'{{"id": "{name}", "prompt": "{prompt}"{more}, "counts": {counts}}}\n'


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.fixture
def refused(tmp_path, monkeypatch, ended):
    """Runs a command in tmp_path and checks the one line it ends with; nothing may change on the disk."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.modules["__main__"], "__doc__", "")

    def listing():
        return sorted((str(path), path.is_dir() or path.read_bytes()) for path in tmp_path.rglob("*"))

    def run(words, command, *flags):
        main, config, first = COMMANDS[command]
        before = listing()
        code, said = ended(main, config, *first.split(), *flags)
        assert code == 2 and said.endswith("\n") and said.count("\n") == 1, said
        assert listing() == before, "something was written"
        beginning, *more = re.split(r" *\.\.\. *", words)
        assert said.startswith("error: " + beginning) and all(part in said for part in more), said
        assert len(said) < 1500

    return run


# --- item files -------------------------------------------------------------------------------------------
A = row("a")
GOOD = A + row("b", "bad soup")
GROUP, SPLIT, DEEP = ', "group": "g"', ', "split": "train"', "[" * 300 + "]" * 300
ZEROS, NINES = "0" * 400, "9" * 5000
RTL = "\u202e\u05d0\u05d1\u05d2 abc\u202c \u0627\u0644"
ITEMS = r"""
UTF-16                 | GOOD.encode("utf-16")                   | : is UTF-16
UTF-16 without a mark  | GOOD.encode("utf-16-le")                | : is UTF-16
gzip, by its name not  | gzip.compress(GOOD.encode())            | : ... no text at all
Latin-1                | GOOD.encode() + row("c", "é").encode("latin-1") | :3: not UTF-8 (byte 24
carriage returns alone | GOOD.replace("\n", "\r")                | :1: broken JSON: Extra data
a NUL                  | A + row("b", "so\0up")                  | :2: broken JSON: Invalid control character
surrogate in the bytes | row("b", "\ud800").encode("utf-8", "surrogatepass") | :1: item 'b': prompt: ... lone
surrogate in a label   | A + row("b", counts='{"\\udc00": 1}')   | :2: item 'b': counts: must be text
surrogate in a group   | A + row("b", more=', "group": "\\udfff"') | :2: item 'b': group: must be text
a cut gigantic line    | A + row("b", "soup " * 400_000)[:-40]   | :2: broken JSON
a gigantic id          | A + row("q" * 100_000, "")              | :2: item 'qqq ... prompt: empty
a no-break space | A + row("b", counts='{"\u00a0yes": 1}') | :2: item 'b': counts: ... without spaces around
labels composed or not | row("a", counts='{"\u00e9": 1, "e\u0301": 2}') | :1: labels ... how a letter is coded
an override mark       | A + row("\u202eb", "")                  | :2: item ' b': prompt: empty
a line break in an id  | row("a\\nb") + row("c", more=SPLIT)     | :1: item 'a b': split: missing, though o
one group              | row("a", more=GROUP) + row("b", more=GROUP) | : 2 items in 1 group cannot be split
all for training       | row("a", more=SPLIT)                    | : split: ... both train and test
"""
LEGAL = r"""
a mark in the middle   | A + "\ufeff" + row("b")                 | ["soup", "soup"]
right-to-left text     | row("a", RTL)                           | [RTL]
combining characters   | row("a", "e\u0301\u0327 \u00e9 \u0301") | ["e\u0301\u0327 \u00e9 \u0301"]
control characters     | row("a", "a\\u0000b\\u0007\\u001b[31m") | ["a\x00b\x07\x1b[31m"]
a pair of surrogates   | row("a", "\\ud83d\\ude00")              | ["\U0001f600"]
line separators        | row("a", "x\u2028y\u2029z\u0085")       | ["x\u2028y\u2029z\u0085"]
spaces around a prompt | row("a", "  x \\n")                     | ["  x \n"]
joined emoji           | row("a", "\U0001f469\u200d\U0001f4bb")  | ["\U0001f469\u200d\U0001f4bb"]
a gigantic line        | row("a", "soup " * 400_000)             | ["soup " * 400_000]
another field, nested  | row("a", more=', "x": ' + DEEP.replace("[]", '["\\ud800"]')) | ["soup"]
"""


@cases(ITEMS)
def test_item_files(refused, tmp_path, given, words):
    write(tmp_path / "x.jsonl", eval(given))
    refused("x.jsonl" + words, "train")


@cases(LEGAL)
def test_odd_item_files_are_taken_exactly(tmp_path, given, words):
    write(tmp_path / "x.jsonl", eval(given))
    assert [item.prompt for item in load_items(tmp_path / "x.jsonl")] == eval(words)


# --- converters -------------------------------------------------------------------------------------------
V = "text,v\nx,1\ny,2\n"
N, AB = ("--counts", "n"), ("--counts", "a", "b")
JSONL = ("--raw", "t.jsonl")
OWN = r"""
a table in UTF-16    | V.encode("utf-16") | t.csv: ... not UTF-8; save the sheet as 'CSV UTF-8'
an empty table       | ""                                       | t.csv: text: no column 'text'
a header alone       | "text,v\n"                               | t.csv: no item is left of 0 rows
an open quote        | V + '"z,1\n'                             | t.csv: ... unexpected end of data
5,000 digits         | V + f"z,{NINES}\n"                       | t.csv: row 4: v: mixed scales: '9999
lists too deep       | 'text,n\nx,"' + "[" * 100_000 + '"\n', *N | t.csv: row 2: n: must be an object
a count of 5,000     | f'text,n\nx,"{{""1"": {NINES}}}"\n', *N  | t.csv: row 2: n: ... neither JSON nor
an infinite count    | 'text,n\nx,"{""1"": 1e400, ""2"": 1}"\n', *N | t.csv: row 2: 1: ... not 'inf'
an object as a count | 'text,n\nx,"{""1"": {""a"": 1}}"\n', *N  | t.csv: row 2: 1: a number of votes is needed
a label twice        | 'text,n\nx,"{""1"": 1, ""1"": 5}"\n', *N | t.csv: row 2: n: ... '1' stands twice in it
too many votes | 'text,n\nx,"{""1"": 2000000000}"\n', *N | t.csv: row 2: 1: a number of votes is needed
a column of digits   | f"text,a,b\nx,{NINES},1\n", *AB          | t.csv: row 2: a: a number of votes is needed
a scale of digits    | V, "--labels", "1-" + NINES, "2"         | t.csv: row 2: v: ... is not one of
a scale without an end | V, "--labels", "1-5000000000000"         | labels: ... is not a range
a label named twice  | V, "--labels", "1", "1.0"                | labels: ... or one twice
labels but for case  | V, "--labels", "a", "A"                  | labels: ... twice (capitals are ignored)
an empty label       | V, "--labels", "1", " "                  | labels: ... names an empty label
no number of votes   | V, "--min_votes", "-1"                   | min_votes: must be 0 or more, not -1
a template, no text  | V, "--template", "latin.txt"             | latin.txt: the template cannot be read
no folder            | V, "--out", ""                           | out: name a folder
surrogate in a text  | '{"text": "\\ud800", "v": 1}', *JSONL    | t.jsonl:1: text: ... lone surrogates
a list as text       | '{"text": ["a"], "v": 1}', *JSONL        | t.jsonl:1: text: ... of its own, not ['a']
a field twice        | '{"text": "a", "v": 1, "v": 2}', *JSONL  | t.jsonl:1: ... 'v' stands twice in an object
surrogate in a group | '{"text": "a", "v": 1, "g": "\\ud800"}', *JSONL, "--group", "g" | t.jsonl:1: g: ...
another archive      | a_zip(), "--raw", "t.xlsx"               | t.xlsx: ... cannot be read as Excel
bytes in Parquet | a_parquet(), "--raw", "t.parquet" | t.parquet: row 1: text: must be text or a number
a cut Parquet        | a_parquet()[:-20], "--raw", "t.parquet"  | t.parquet: ... cannot be read as Parquet
an unknown kind      | V, "--raw", "t.doc"                      | t.doc: is not a table that can be read
"""
NLI = {"annotator_labels": ["neutral"] * 3, "pairID": "1n", "sentence1": "A man.", "sentence2": "He eats."}
CHAOS = {"uid": "u", "example": {"premise": "p", "hypothesis": "h"}}
SUMMARY = {"id": "s", "model_id": "M0", "decoded": "Short.", "text": "Long.", "turker_annotations": []}
VOTE = {"question_id": 1, "turn": 1, "model_a": "x", "model_b": "y", "winner": "tie", "conversation_b": "ho"}
HELP = {"prompt": "p", "response": "r"} | {quality: [1, 2] for quality in prepare.QUALITIES["helpsteer2"]}
PREFERENCE = {"prompt": "p", "response_1": "r", "response_2": "s"}
PUBLISHED = r"""
snli: a label in a list    | NLI, {"annotator_labels": [["neutral"]]}    | annotator_labels: ... is not one of
snli: a lone surrogate     | NLI, {"sentence1": "\ud800"}                | sentence1: ... lone surrogate
snli: no premise           | NLI, {"sentence1": None}                    | sentence1: must be str, not None
chaosnli: votes in words   | CHAOS, {"label_counter": {"e": "many"}}     | label_counter: ... not 'many'
chaosnli: votes below zero | CHAOS, {"label_counter": {"e": -3, "n": 5}} | label_counter: ... not -3
summeval: a rating alone   | SUMMARY, {"expert_annotations": [1.5]}      | coherence: '1.5' is not 1 to 5
mtbench: no choices        | {"question_id": 1}, {"model_id": "x", "choices": []} | turns: missing
mtbench: turns in numbers  | {"question_id": 1}, {"turns": [1, 2]} | turns[0]: must be str, not 1
mtbench: text for turns    | VOTE, {"conversation_a": "hi"} | conversation_a: must be list, not 'hi'
helpsteer2: a rating of true | HELP, {"helpfulness": [True]}               | helpfulness: True is not 0 to 4
helpsteer2_pref: a list    | PREFERENCE, {"all_preferences_unprocessed": [[1]]} | strength: [1] is not -3 to 3
"""
LEGAL_TABLES = r"""
a mark and CRLF      | "\ufeff" + (V + "z,1\n").replace("\n", "\r\n") | z
right-to-left text   | V + "\u202e\u05d0\u05d1 abc,1\n"               | \u202e\u05d0\u05d1 abc
combining characters | V + "e\u0301\u0327,1\n"                        | e\u0301\u0327
a NUL                | V + "a\0b,1\n"                                 | a\0b
a line break         | V + '"a\n\nb",1\n'                             | a\n\nb
a cell without end   | V + "z" * 200_000 + ",1\n"                     | {'z' * 200_000}
like a formula       | V + "{v} =1+1,1\n"                             | {{v}} =1+1
"""


def a_zip():
    with zipfile.ZipFile("some.zip", "w") as archive:
        archive.writestr("a.txt", "x")
    return Path("some.zip").read_bytes()


def a_parquet():
    import pyarrow.parquet

    columns = {"text": pyarrow.array([b"caf\xc3\xa9"], pyarrow.binary()), "v": [1]}
    pyarrow.parquet.write_table(pyarrow.table(columns), "some.parquet")
    return Path("some.parquet").read_bytes()


@cases(OWN)
def test_tables_of_ones_own(refused, tmp_path, given, words):
    content, *flags = eval(f"[{given}]")
    name = flags[flags.index("--raw") + 1] if "--raw" in flags else "t.csv"
    write(tmp_path / name, content)
    write(tmp_path / "latin.txt", b"\xff{text}")
    refused(words, "own", *(() if "--counts" in flags else ("--label", "v")), *flags)


@cases(PUBLISHED)
def test_published_files(refused, request, tmp_path, given, words):
    right, wrong = eval(given)
    write(tmp_path / "t.jsonl", json.dumps(right | wrong) + "\n")
    refused("t.jsonl:1: " + words, "published", request.node.callspec.id.split(":")[0])


@cases(LEGAL_TABLES)
def test_odd_tables_are_taken_exactly(tmp_path, given, words):
    write(tmp_path / "t.csv", eval(given))
    files = {"raw": (str(tmp_path / "t.csv"),), "out": str(tmp_path / "o")}
    prepare.main(prepare.PrepareConfig(task="own", text="text", label=("v",), split="none", **files))
    found = [item.prompt for item in load_items(tmp_path / "o" / "items.jsonl")]
    assert found == ["x", "y", eval(f'f"{words}"')]


# --- configuration ----------------------------------------------------------------------------------------
ACCENTS = '{"\u00e9": 1, "e\u0301": 2}'
FILES = {
    "x.jsonl": GOOD,
    "one.jsonl": row("a"),
    "test.jsonl": row("c", "bad soup"),
    "accents.jsonl": row("a", counts=ACCENTS) + row("b", "bad", counts=ACCENTS),
    "two\nlines.jsonl": "{",
    "plain.jsonl.gz": GOOD,
    "cut.jsonl.gz": gzip.compress(GOOD.encode())[:-9],
}
FLAGS = r"""
a seed below zero     | --seed -1                     | seed: must be between 0 and 4294967295, not -1
a rate of nan         | --learning_rate nan           | learning_rate: must be 0 or more, not nan
epochs without end    | --epochs inf                  | epochs: must be more than 0, not inf
no epochs             | --epochs 0                    | epochs: must be more than 0
alpha beyond 1        | --alpha 2                     | alpha: must be between 0 and 1, not 2.0
a loss nobody knows   | --loss nonesuch               | loss: must be one of kl, not nonesuch
no items a step       | --batch_size 0                | batch_size: must be 1 or more, not 0
no folder             | --out ''                      | out: name a folder
no training items     | --train                       | train: name a file of training items
a label twice         | --labels yes yes              | labels:
a label with spaces   | --labels 'yes ' no --train one.jsonl | one.jsonl:1: item 'a': ... unknown label {yes}
labels of same tokens | --train accents.jsonl --labels \u00e9 e\u0301 | spellings: two labels have the same
a spelling of nothing | --spellings maybe=a           | spellings: unknown label {maybe}
a spelling of no form | --spellings yes               | spellings: 'yes' is not LABEL=TEXT,TEXT
an empty spelling     | --spellings yes=              | spellings: label 'yes': '' is empty
a spelling of no text | --spellings yes=a\udcff       | spellings: label 'yes': 'a ... is not text that can
a control token       | --spellings 'yes=<|end|>'     | spellings: label 'yes': '<|end|>' is a control token
two spelled alike     | --spellings yes=x no=x        | spellings: two labels have the same tokens
4 bits, all weights   | --four_bit --lora_rank 0      | four_bit: 4-bit weights cannot be trained
prompts too long      | --max_length 3                | x.jsonl:
a logger nobody knows | --report_to nonesuch          | report_to: ... nonesuch
a file for a folder   | --out x.jsonl/run             | [Errno 20]
an item on both sides | --test test.jsonl | test.jsonl:1: item 'c': prompt: also in the training items, at
no model              | --model ''                    | model: name a folder or a hub id
a file for a model    | --model x.jsonl               | x.jsonl: model: is a file, not a folder
no folder of a model  | --model ./gone                | ./gone: model: no such folder
no hub id | --model no/hub | no/hub: model: no such folder, and it cannot be loaded from a model hub
no gzip               | --train plain.jsonl.gz        | plain.jsonl.gz: cannot be read: Not a gzipped file
a cut gzip            | --train cut.jsonl.gz          | cut.jsonl.gz: cannot be read:
a folder of items     | --train .                     | .: cannot be read:
a NUL in a name       | --train 'a\0b'                | a b: cannot be read: embedded null
a line break in one   | --train 'two\nlines.jsonl'    | two lines.jsonl:1: broken JSON
no such file          | --train gone.jsonl            | gone.jsonl: no such file
"""


@cases(FLAGS)
def test_flags(refused, tmp_path, tiny_model, given, words):
    for name, content in FILES.items():
        write(tmp_path / name, content)
    refused(words, "train", "--model", str(tiny_model), *shlex.split(eval(f'"""{given}"""')))


OWN_MODEL = """
prompts too long      | --max_length 3                | x.jsonl: ... tokens;
a spelling of nothing | --spellings maybe=x           | spellings: unknown label {maybe}
no seeds              | --seeds 0                     | seeds: must be 1 or more, not 0
an odd width          | --hidden 17                   | hidden: must be a multiple of 16, not 17
a teacher for all     | --teacher 5                   | teacher: each row here has its own
"""


@cases(OWN_MODEL)
def test_a_recipe_that_makes_its_own_model_leaves_nothing_behind(refused, tmp_path, given, words):
    write(tmp_path / "x.jsonl", GOOD)
    refused(words, "tiny", *given.split())


WRONG = ["--alpha much", "--steps 1.5", "--no_such 1", "--schedule nonesuch", "--alpha"]


@pytest.mark.parametrize("flag", WRONG)
def test_flags_are_refused_by_the_command_line_itself(tmp_path, monkeypatch, capsys, flag):
    """tyro's own message, framed over several lines: it names the flag, the exit code is 2, nothing ran."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["command", *flag.split()])
    with pytest.raises(SystemExit) as caught:
        distjudge.cli(lambda config: pytest.fail("it ran"), Config)
    said = capsys.readouterr()
    assert caught.value.code == 2 and not list(tmp_path.iterdir())
    assert flag.split()[0].lstrip("-") in said.err + said.out


# --- model folders ----------------------------------------------------------------------------------------
def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def sharded(folder):
    """Divides the weights into several files; returns these, and the index of them."""
    import transformers

    transformers.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="40KB")
    (folder / WEIGHTS).unlink(missing_ok=True)
    return [*sorted(folder.glob("model-*-of-*.safetensors")), folder / "model.safetensors.index.json"]


def smaller(folder):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = Qwen2Config(vocab_size=20, num_attention_heads=1, num_key_value_heads=1, **sizes)
    Qwen2ForCausalLM(config).save_pretrained(folder)


CONFIG, WEIGHTS, TEMPLATE = "config.json", "model.safetensors", "chat_template.jinja"
TURN = "{{ ('<|user|>' if m.role == 'user' else '<|judge|>') + m.content + '<|end|>' }}"
TURNS = "{% for m in messages %}" + TURN + "{% endfor %}"
USER_ALONE = "{{ messages[0].content }}{% if messages[1] %}{{ raise_exception('no such role') }}{% endif %}"
OWN_CODE = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
EVIL = "import pathlib\npathlib.Path('sprung').touch()\n"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n"
INDEX = '{"metadata": {}, "weight_map": {"x": "%s"}}'
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True}
LOOP = "{% for i in range(99999) %}" * 2 + "{% endfor %}" * 2
PEFT = '{"peft_type": "LORA", "r": 2, "base_model_name_or_path": "other/base"}'
lost = lambda name, w: w if name != "model.layers.1.mlp.up_proj.weight" else None  # noqa: E731
MODELS = r"""
no config.json     | (m / CONFIG).unlink() | model: cannot be loaded: there is no config.json
a broken config.json | write(m / CONFIG, "{")                    | model: ... config.json
an unknown type    | fields(m / CONFIG, model_type="nonesuch") | model: ... nonesuch
an encoder-decoder | fields(m / CONFIG, model_type="t5") | model: cannot be loaded: Unrecognized configuration
a layer too many   | fields(m / CONFIG, num_hidden_layers=3)   | model: ... `num_hidden_layers` (3)
another width | fields(m / CONFIG, hidden_size=48) | model: ... or of another shape: lm_head.weight
code of its own    | fields(m / CONFIG, model_type="own", auto_map=OWN_CODE) | model: ... contains custom code
cut weights        | cut(m / WEIGHTS) | model: ... incomplete metadata, file not fully covered
a pointer to weights | write(m / WEIGHTS, POINTER)               | model: ... header too large
no weights         | (m / WEIGHTS).unlink()                    | model: ... a file named model.safetensors
pickled weights | (m / WEIGHTS).unlink(), write(m / "pytorch_model.bin", b"\x80\x04}.") | model: cannot be
weights of nan     | weights(m / WEIGHTS, lambda name, w: w * float("nan")) | model: its scores are not
a lost layer       | weights(m / WEIGHTS, lost) | model: ... 1 of its weights are missing
a lost shard       | sharded(m)[1].unlink()                    | model: ... a file named model-00002-of-
a broken index     | write(sharded(m)[-1], "{")                | model: cannot be loaded
an index to elsewhere | write(sharded(m)[-1], INDEX % "../x.safetensors") | model: ... names '../x.safetensors
an index to pickles | write(sharded(m)[-1], INDEX % "x.bin")    | model: ... names 'x.bin'; only safetensors
quantized in words | fields(m / CONFIG, quantization_config=NF4) | model: config.json has a quantization
an adapter         | write(m / "adapter_config.json", PEFT)    | model: holds a PEFT adapter, not a model
no tokenizer.json  | (m / "tokenizer.json").unlink() | model: ... no vocabulary (tokenizer.json is missing)
a cut tokenizer.json | cut(m / "tokenizer.json")                 | model: its tokenizer cannot be loaded
a list of settings | write(m / "tokenizer_config.json", "[]")  | model: its tokenizer cannot be loaded
a larger tokenizer | smaller(m)                                | model: has 20 tokens, its tokenizer
a template in UTF-16 | write(m / TEMPLATE, b"\xff\xfe{")         | model: its tokenizer cannot be loaded
a fault in it      | write(m / TEMPLATE, "{{ messages[0].content }") | chat template: unexpected '}'
one that raises    | write(m / TEMPLATE, "{{ raise_exception('only\npictures') }}") | chat template: only
one that wants Python | write(m / TEMPLATE, "{{ ''.__class__.__mro__ }}") | chat template: access to attribute
no message in it   | write(m / TEMPLATE, "hello")              | chat template: shows 0 messages in place
another message    | write(m / TEMPLATE, "{{ messages[0].content|upper }}") | chat template:
no turn of a judge | write(m / TEMPLATE, USER_ALONE)           | chat template: no such role
no answer prefix   | write(m / TEMPLATE, TURNS) | chat template: ends a prompt without '<|judge|>', which it
"""


@cases(MODELS)
def test_model_folders(refused, tmp_path, tiny_model, given, words):
    m = shutil.copytree(tiny_model, tmp_path / "m")
    write(tmp_path / "x.jsonl", GOOD)
    eval(given, globals(), {"m": m, "fields": change_json, "weights": change_weights})
    refused("m: " + words, "train")


def test_code_that_a_tokenizer_brings_is_not_run(tmp_path, tiny_model, monkeypatch):
    m = shutil.copytree(tiny_model, tmp_path / "m")
    monkeypatch.chdir(tmp_path)
    own = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.T", None]}}
    change_json(m / "tokenizer_config.json", **own)
    write(m / "evil.py", EVIL)
    assert load_judge("m", ["yes", "no"], lora_rank=0).labels == ["yes", "no"]
    assert not (tmp_path / "sprung").exists()


def test_attention_that_a_folder_names_is_not_taken(tmp_path, tiny_model):
    """Such a name may be that of a repository whose code would be fetched and run."""
    for field in ("attn_implementation", "_attn_implementation"):
        m = shutil.copytree(tiny_model, tmp_path / field)
        change_json(m / "config.json", **{field: "other/kernels"})
        judges = [load_judge(folder, ["yes", "no"]) for folder in (m, tiny_model)]
        assert judges[0].predict(["soup"]).tolist() == judges[1].predict(["soup"]).tolist()
        assert judges[0].model.config._attn_implementation == judges[1].model.config._attn_implementation


def test_what_a_file_brings_cannot_steer_a_terminal(tiny_model, ended):
    marks = "\x1b[31m \u200f \u202e \u2066 \x9b \u061c"
    judge = load_judge(tiny_model, ["yes" + marks, "no"])
    said = common.reading(judge.tokens, judge.tokenizer)
    error = InputError(f"{marks}: no such file\nand more")
    said += ended(Mock(side_effect=error), dataclasses.make_dataclass("Nothing", []))[1]
    odd = set(marks.replace("[31m", "").replace(" ", ""))
    assert not set(said) & odd and "no such file\nand more" in said


PLAIN = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
ASKING = "{% if add_generation_prompt %}<|judge|>thinking\n{% endif %}"


def test_templates_without_control_tokens_are_told_of(tiny_tokenizer, caplog):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    for chat_template, told in (
        (PLAIN + ASKING.replace("<|judge|>thinking\n", "assistant: "), ["ends a turn in plain words"]),
        (TURNS + ASKING, ["ends a prompt with", "thinking"]),
        (tiny_tokenizer.chat_template, []),
    ):
        caplog.clear()
        tokenizer.chat_template = chat_template
        distjudge.PromptEncoder(tokenizer)
        assert all(words in caplog.text for words in told) and bool(caplog.text) == bool(told)


# --- what a user sees -------------------------------------------------------------------------------------
SEEN = """
UTF-16     | recipes/tiny.py --train x.jsonl --out o | x.jsonl: is UTF-16 or no text at all; save it as UTF-8
a loop     | recipes/tiny.py --model loop --out o --lora_rank 2 | loop: chat template: takes more than 5
a judge    | recipes/judge.py --run run --items i.jsonl --out j.jsonl | run/tokenizer/chat_template.jinja: has
"""


@pytest.mark.slow
@cases(SEEN)
def test_as_a_user_sees_it(tmp_path, tiny_model, saved_run, given, words):
    write(tmp_path / "x.jsonl", GOOD.encode("utf-16"))
    write(tmp_path / "i.jsonl", GOOD)
    write(shutil.copytree(tiny_model, tmp_path / "loop") / TEMPLATE, LOOP)
    write(shutil.copytree(saved_run, tmp_path / "run") / "tokenizer" / TEMPLATE, TURNS)
    before = sorted(tmp_path.rglob("*"))
    script, *flags = given.split()
    said = call(script, *flags, code=2, cwd=tmp_path).stderr
    assert said.startswith("error: " + words), said
    assert said.count("\n") == 1 and sorted(tmp_path.rglob("*")) == before
