"""A user's own table: every form it may have, and what is said of every mistake."""

import copy
import datetime
import functools
import gzip
import json
import re
import shlex
import zipfile

import distjudge
from distjudge import InputError

import datasets
import openpyxl
import pandas
import prepare
import pytest
import sheets
import tables
import tyro

ROWS = [f"{i},Answer {i}.,{1 + (i + k) % 5},p{k}\n" for i in range(10) for k in range(3)]
VOTES = "id,answer,rating,who\n" + "".join(ROWS)


@pytest.fixture
def own(tmp_path, monkeypatch):
    """own("a,b\\n1,2\\n", "--label b") -> the items written; the table may also be a file name."""
    monkeypatch.chdir(tmp_path)

    def run(table, arguments):
        if "\n" in table:
            (tmp_path / "votes.csv").write_text(table, encoding="utf-8")
        raw = "votes.csv" if "\n" in table else table
        fixed = ["own", "--raw", raw, "--out", "o", "--split", "none"]
        prepare.main(tyro.cli(prepare.PrepareConfig, args=[*fixed, *shlex.split(arguments)]))
        lines = (tmp_path / "o" / "items.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    return run


def counts_of(rows):
    return [row["counts"] for row in rows]


def test_one_row_a_vote(own, tmp_path):
    (tmp_path / "prompt.txt").write_text("Rate this from 1 to 5.\n\nAnswer: {text}\n")
    arguments = "--text answer --label rating --template prompt.txt"
    rows = own(VOTES, f"{arguments} --item id")
    prompt, votes = "Rate this from 1 to 5.\n\nAnswer: Answer 0.", {"1": 1, "2": 1, "3": 1, "4": 0, "5": 0}
    assert len(rows) == 10 and rows[0] == {"id": "0", "prompt": prompt, "counts": votes}
    assert rows[3]["counts"] == {"1": 1, "2": 0, "3": 0, "4": 1, "5": 1}
    assert counts_of(own(VOTES, arguments)) == counts_of(rows)  # equal prompts are one item
    card = json.loads((tmp_path / "o" / "card.json").read_text())
    assert card["read"] == {"rows": 30, "votes": 30} and card["ordered"] is True
    assert card["prompt"]["file"] == "prompt.txt" and len(distjudge.load_items("o/items.jsonl")) == 10


def test_columns_that_are_kept_and_items_without_votes(own, tmp_path):
    """A sheet with the systems of its texts, some of them rated, is what systems.py takes."""
    table = "text,who wrote,a,b\nx,M1,1,2\ny,M2,,\nz,M1,3,3\n"
    rows = own(table, "--text text --label a b --keep 'who wrote' --min_votes 0 --labels 1-3")
    assert [row["who wrote"] for row in rows] == ["M1", "M2", "M1"] and "counts" not in rows[1]
    assert rows[2]["counts"] == {"1": 0, "2": 0, "3": 2}
    card = json.loads((tmp_path / "o" / "card.json").read_text())
    assert card["votes_an_item"] == {"0": 1, "2": 2} and card["read"]["votes"] == 4
    assert len(own(table, "--text text --label a b --keep 'who wrote' --labels 1-3")) == 2
    late = "text,a\nx,\ny,2\nz,1\n"  # the first one without votes, and the others have one each
    assert "counts" not in own(late, "--text text --label a --min_votes 0 --labels 1-3")[0]
    votes = "id,text,m,v\n1,x,A,1\n1,x,A,2\n2,y,B,1\n"
    assert [row["m"] for row in own(votes, "--text text --label v --item id --keep m")] == ["A", "B"]
    with pytest.raises(InputError, match=r"row 3: item '1': its m differs from that at votes.csv: row 2"):
        own(votes.replace("A,2", "B,2"), "--text text --label v --item id --keep m")
    named = own(votes.replace(",m,", ",name,"), "--text text --label v --item id --keep name")
    assert [row["name"] for row in named] == ["A", "B"]
    for name in ("annotations", "published"):
        with pytest.raises(InputError, match=rf"keep: an item has a field \{{{name}\}} of its own"):
            own(votes.replace(",m,", f",{name},"), f"--text text --label v --item id --keep {name}")
    with pytest.raises(InputError, match=r"keep: an item has a field \{id\} of its own; rename the column"):
        own(votes, "--text text --label v --item id --keep id")
    with pytest.raises(InputError, match=r"votes.csv: is a table, not JSON lines: data/prepare.py own makes"):
        distjudge.load_items("votes.csv")


def test_a_template_of_several_columns(own, tmp_path, caplog):
    (tmp_path / "t.txt").write_text("Q: {the question}\nA: {answer}")
    table = "the question,answer,ok,set\nWhy?,{answer}!,yes,s1\nWhy?,{answer}!,no,s1\n"
    item = {"prompt": "Q: Why?\nA: {answer}!", "counts": {"no": 1, "yes": 1}, "group": "s1"}
    (row,) = own(table, "--label ok --template t.txt --group set")
    (read,) = distjudge.load_items([item])  # an id that another table's items do not share by chance
    assert row == item | {"id": read.id}
    for typo in ("{The Question}", "{the  question}"):
        (tmp_path / "t.txt").write_text(f"Q: {typo}\nA: {{answer}}")
        with pytest.raises(InputError, match=r"t.txt: unknown placeholder .*; there are \{the question\}"):
            own(table, "--label ok --template t.txt")
    (tmp_path / "t.txt").write_text('{answer} Write {yes or no}, {"as": "JSON"}')
    assert own(table, "--label ok --template t.txt")[0]["prompt"].startswith("{answer}! Write {yes or no}")
    assert "t.txt: {yes or no} names no column and stays as it is" in caplog.text
    (tmp_path / "t.txt").write_text('{"ok"} {answer}')
    assert own(table, "--label ok --template t.txt")[0]["prompt"].startswith('{"ok"} ')
    (tmp_path / "t.txt").write_text("Rate the answer.")
    with pytest.raises(InputError, match=r"t.txt: the template shows no column: write \{the question\} wh"):
        own(table, "--label ok --template t.txt")
    (tmp_path / "t.txt").write_text("Rate {anwser}")
    words = r"t.txt: unknown placeholder \{anwser\}; there are \{id\}, \{answer\}"
    with pytest.raises(InputError, match=words):
        own(VOTES, "--label rating --template t.txt")


def test_one_row_an_item(own):
    rows = own("text;r1;r2\nx;1;2\n ;2;2\nx;;3\n", "--text text --label r1 r2")
    assert counts_of(rows) == [{"1": 1, "2": 1, "3": 0}, {"1": 0, "2": 0, "3": 1}]
    table = 'text,n\nx,"{""yes"": 3, ""no"": 0}"\ny,"{""yes"": 1, ""no"": 4}"\n'
    assert counts_of(own(table, "--text text --counts n")) == [{"no": 0, "yes": 3}, {"no": 4, "yes": 1}]
    rows = own("text\tgood\tbad\nx\t3\t\ny\t0\t2.0\n", "--text text --counts good bad")
    assert counts_of(rows) == [{"good": 3, "bad": 0}, {"good": 0, "bad": 2}]
    rows = own("text,2.0,1.0\nx,3,4\n", "--text text --counts 2.0 1.0")
    assert counts_of(rows) == [{"2": 3, "1": 4}]  # whole numbers, as in a column of votes


@pytest.mark.parametrize(
    ("labels", "votes", "order"),
    [
        ("", "1 3", "1 2 3"),
        ("1-5", "1 3", "1 2 3 4 5"),
        ("1..7", "2 6.0", "1 2 3 4 5 6 7"),
        ("1-10", "10 2", "1 2 3 4 5 6 7 8 9 10"),
        ("-3..3", "-3 +2", "-3 -2 -1 0 1 2 3"),
        ("", "-1 1", "-1 0 1"),
        ("yes no", "Yes NO", "yes no"),
        ("", "fair unfair", "fair unfair"),
        ("a b tie", "b tie", "a b tie"),
    ],
)
def test_scales(own, labels, votes, order):
    table = "text,v\n" + "".join(f"x,{v}\n" for v in votes.split())
    (row,) = own(table, "--text text --label v" + (f" --labels {labels}" if labels else ""))
    assert list(row["counts"]) == order.split() and sum(row["counts"].values()) == 2


def test_excel_parquet_jsonl_and_datasets(own, tmp_path):
    table = pandas.DataFrame({"text": ["x", "x", "y"], "v": [1, 2, 2]})
    table.to_excel(tmp_path / "v.xlsx", index=False)
    table.to_parquet(tmp_path / "v.parquet")
    table.to_json(tmp_path / "v.jsonl", orient="records", lines=True)
    (tmp_path / "v.csv.gz").write_bytes(gzip.compress(table.to_csv(index=False).encode()))
    datasets.Dataset.from_pandas(table).save_to_disk(tmp_path / "saved")
    for source in ("v.xlsx", "v.parquet", "v.jsonl", "v.csv.gz", "./saved"):
        assert counts_of(own(source, "--text text --label v")) == [{"1": 1, "2": 1}, {"1": 0, "2": 1}], source


def test_named_labels_of_datasets(own, tmp_path):
    numbers, named = datasets.ClassLabel(names=["0", "1"]), datasets.ClassLabel(names=["calm", "angry"])
    kinds = {"prompt": datasets.Value("string"), "v": numbers, "annotations": datasets.Sequence(named)}
    table = {"prompt": ["x"] * 3, "v": [1, 0, -1], "annotations": [[0, 1, 1], [0], []]}  # -1: no label
    table = datasets.Dataset.from_dict(table, features=datasets.Features(kinds))
    datasets.DatasetDict({"all": table}).save_to_disk(tmp_path / "named")
    flags = "--text prompt --hub_split all --label"
    assert counts_of(own("./named", f"{flags} v")) == [{"0": 1, "1": 1}]
    assert counts_of(own("./named", f"{flags} annotations --multi split")) == [{"angry": 2, "calm": 2}]
    assert distjudge.load_items(table.select([0]))[0].counts == {"angry": 2, "calm": 1}
    with pytest.raises(InputError, match="hub_split: there is no 'train'; there are all"):
        own("./named", "--text prompt --label v")


RATING, LABEL = "--text answer --label rating", "--text text --label v"
MISTAKES = [  # rows behind VOTES, or a whole table, or a file; arguments, words
    ("text_a,text_b,v\nx,y,1\n", "--text 'text*' --label v", "text: 'text*' is {text_a, text_b}; name one"),
    ('text,v\nx,1\n"Say "hi" to",2\n', LABEL, "votes.csv: line 3: ',' expected after '\"'; within quotes"),
    ("", "--text answr --label rating", "text: no column 'answr', did you mean 'answer'? The columns are"),
    ("", "--text answer --label stars", "votes.csv: label: no column 'stars'. The columns are id, answer"),
    ("", "", "label: name the columns of votes, or those of --counts, or (without --rater) one"),
    ("", "--label rating who --counts id", "label: name the columns of votes, or those of --counts, or (w"),
    ("", "--text rating --label rating", "the prompt would show the votes, of column 'rating'"),
    ("", "--label rating", "votes.csv: text: name the judged text (--text) or a template (--template); if"),
    ("", f"{RATING} --labels 1-4", "votes.csv: row 10: rating: '5' is not one of {1, 2, 3, 4}"),
    ("", f"{RATING} --labels 5-1", "labels: '5-1' is not a range from low to high"),
    ("9,Else.,3,p\n", f"{RATING} --item id", "32: item '9': its text differs from that at votes.csv: row 29"),
    ("9,Answer 9.,3,q\n", f"{RATING} --item id --group who", "row 3: item '0': its group differs from"),
    (",Else.,3,p\n", f"{RATING} --item id", "row 32: id: empty, so the vote belongs to no item"),
    ("t,v\n" + "".join(f"x,a{i}\n" for i in range(30)), "--text t --label v", "v: 30 different labels, such"),
    ("text,v\nx,1\ny,1\n", LABEL, "v: only the label {1} occurs; name them all with --labels"),
    ("text,v\n ,1\n,2\n", LABEL, "no item is left of 2 rows: 2 rows without text"),
    ("text,v\nx,\ny,\n", LABEL, "no item is left of 2 rows: 2 empty cells; 2 items without votes"),
    ("text,n\nx,3\n", "--text text --counts n", "votes.csv: row 2: n: must be an object such as"),
    ("text,a,b\nx,3,many\n", "--text text --counts a b", "row 2: b: a number of votes is needed, not 'many'"),
    ("text,text\nx,3\n", "--text text --label text", "column 'text' stands there twice"),
    ("text,a,b\nx,1,2\nx,1,2\n", "--text text --label a b --item text", "item 'x': stands twice, first at v"),
    ("text,v\nx,1\n", f"{LABEL} --where v", "where: 'v' is not COLUMN=VALUE"),
    ("votes", RATING, "votes: no such file"),
    ("gone.xlsx", RATING, "gone.xlsx: no such file"),
    ("latin.csv", LABEL, "line 2: byte 4 of it is not UTF-8; save the sheet as 'CSV UTF-8'"),
    ("wide.tsv", LABEL, "line 1: byte 1 of it is UTF-16 ('Unicode text'), not UTF-8; save the sheet as"),
    ("v.zip", LABEL, "v.zip: no .jsonl file in it; unpack it, and name one of {v.csv}"),
]


@pytest.mark.parametrize(("table", "arguments", "words"), MISTAKES)
def test_what_a_new_user_gets_wrong(own, tmp_path, table, arguments, words):
    (tmp_path / "latin.csv").write_bytes("text,v\ncafé,1\n".encode("latin-1"))
    (tmp_path / "wide.tsv").write_bytes("text\tv\nx\t1\n".encode("utf-16"))
    with zipfile.ZipFile(tmp_path / "v.zip", "w") as archive:
        archive.writestr("v.csv", "text,v\nx,1\n")
    is_whole = table and not re.match(r"\d?,", table)
    with pytest.raises(InputError) as error:
        own(table if is_whole else VOTES + table, arguments)
    assert words in str(error.value) and not (tmp_path / "o").exists()


# --- votes as they come -----------------------------------------------------------------------------------
def votes_of(rows):
    """ "1:2 3:1" of the first item: label and votes, of those that have any."""
    return " ".join(f"{label}:{number}" for label, number in rows[0]["counts"].items() if number)


def column(*cells):
    """A table of one item, a row a vote."""
    return "text,v\n" + "".join(f'x,"{cell.replace(chr(34), chr(34) * 2)}"\n' for cell in cells)


SAYS = [  # cells of one item, flags, its votes
    (["[1, 0, 1]"], "", "0:1 1:2"),
    (['["yes", null, "no", ""]'], "", "no:1 yes:1"),
    (["['yes', 'no', nan]"], "", "no:1 yes:1"),
    (["(1, 2)"], "", "1:1 2:1"),
    (["[1 0 1]"], "", "0:1 1:2"),
    (["array([1, 2])"], "", "1:1 2:1"),
    (['[{"rating": 4}]', '[{"rating": 5}]'], "", "4:1 5:1"),
    (['{"choices": ["warm"]}', "cold"], "", "cold:1 warm:1"),
    (['{"choices": ["warm", "cold"]}', "cold"], "--multi split", "cold:2 warm:1"),
    (["0,0,1"], "--multi split", "0:2 1:1"),
    (["red;green", "red", "green;blue", "blue"], "--multi split", "blue:2 green:2 red:2"),
    (["red;blue", "yellow;black"], "--multi split", "black:1 blue:1 red:1 yellow:1"),
    (["yes, but;no", "yes, but"], "--multi split", "no:1 yes, but:2"),
    (["red/blue", "blue"], "--multi split --labels blue red green", "blue:2 red:1"),
    (["4,N/A,5", "3,4,4", "N/A", "5,5,-"], "--multi split --no_vote N/A -", "3:1 4:3 5:3"),
    (["yes;skip;no", "yes"], "--multi split --no_vote skip --labels yes no", "yes:2 no:1"),
    (["red;", "green;"], "", "green:1 red:1"),
    (["a|b", "b"], "--multi split --labels a b", "a:1 b:2"),
    (["A", "A+", "B-"], "", "A:1 A+:1 B-:1"),
    (["1", "2", "N/A", "–", "-----", "k.A."], "--no_vote n/a - K.A.", "1:1 2:1"),
    (["1", "9.0", "2.0", "-99"], "--no_vote 9 -99", "1:1 2:1"),
    (["1", "2.50", "4.0", "+3", "02", "'4"], "--labels 1 2 2.5 3 4", "1:1 2:1 2.5:1 3:1 4:2"),
    (["2,5", "3", "4,0"], "--decimal comma --labels 2.5 3 4", "2.5:1 3:1 4:1"),
    (["1.0", "2,0", "1.5", "1,5"], "--decimal comma --labels 1 1.5 2", "1:1 1.5:2 2:1"),
    (["2,5", "3"], "--labels 2.5 3", "2.5:1 3:1"),  # 2 and 5 are no labels, so it is one number
    (["4/5", "1/5"], "--labels 1/5 4/5", "1/5:1 4/5:1"),
    (["\u22121", "0", "1"], "", "-1:1 0:1 1:1"),
    (["80%", "20 %", "100%"], "--bins 0 50 100", "1:1 2:2"),
    (["0", "50", "51", "100"], "--bins 0 50 100 --labels low high", "low:1 high:3"),
    (["12,5 %", "80\u00a0%", "skip"], "--bins 0 50 100 --decimal comma --no_vote skip", "1:1 2:1"),
    (["yes", "yes\u200b", "very\u00a0good", "very good"], "", "very good:2 yes:2"),
    (["do", "do.", "DO", "don’t", "don't", "❤", "❤\ufe0f"], '--labels do "don\'t" ❤', "do:3 don't:2 ❤:2"),
    (["caf\u00e9", "cafe\u0301", "tea"], "", "café:2 tea:1"),
    (["A", "\u0410", "\uff21", "b"], "--labels A b", "A:3 b:1"),  # Cyrillic, full width
    # what other tools and languages write
    (["{1, 1, 0}"], "", "0:1 1:2"),  # PostgreSQL
    (["{yes,no}"], "", "no:1 yes:1"),
    (["[np.int64(1), np.int64(0)]"], "", "0:1 1:1"),
    (["tensor([1, 0, 1])"], "", "0:1 1:2"),
    (["[nan 4. nan 5. 4.]"], "", "4:2 5:1"),  # NumPy, of a column with gaps
    (["{}", "{1,2}"], "--multi split", "1:1 2:1"),
    (["['yes' 'not me']"], "", "not me:1 yes:1"),
    (['{"1": false, "2": true}', '[{"rating": {"1": true, "2": false}}]'], "", "1:1 2:1"),  # MTurk
    (['{"Ann1": "1", "Ann2": "0"}'], "", "0:1 1:1"),  # LeWiDi
    (["Yes, definitely,No", "No"], "--multi split --labels 'Yes, definitely' No", "Yes, definitely:1 No:2"),
    (["red & blue", "red", "blue"], "--multi split", "blue:2 red:2"),
    (["1", "\u20131", "0.30000001192"], "--labels -1 0.3 1", "-1:1 0.3:1 1:1"),
    (["yes", "'yes'", "(no)", "[no]", "R&amp;D", "r&d"], "--labels yes no R&D", "yes:2 no:2 R&D:2"),
    (["a", "b", "(blank)", "[no answer]"], "--no_vote blank 'no answer'", "a:1 b:1"),
    (["a", "b", "(don't know)", "[other: me]"], "--no_vote \"don't know\" '[other: me]'", "a:1 b:1"),
    (["good", "(it's ok)"], "", "(it's ok):1 good:1"),
    ([":)", ":("], "", ":(:1 :):1"),
    (["3", "50"], "--labels 1-3 --no_vote 50", "3:1"),
    (["0-20", "21-40", "0–20"], "--labels 0-20 21-40 41-60", "0-20:2 21-40:1"),  # no ranges of labels
    (["5", "25"], "--bins 0 20 40 60 --labels 0-20 20-40 40-60", "0-20:1 20-40:1"),
    (["++", "+", "-", "--", "--"], "", "+:1 ++:1 -:1 --:2"),
]


@pytest.mark.parametrize(("cells", "flags", "said"), SAYS)
def test_what_cells_say(own, cells, flags, said):
    assert votes_of(own(column(*cells), f"--text text --label v {flags}")) == said


SEVERAL = "a person's cell holds several labels, "
DOUBTS = [  # cells of one item, words of the refusal, the remedy in it, and the votes when it is followed
    (["0,0,1"], f"row 2: v: {SEVERAL}{{0, 0, 1}}", "--multi split", "0:2 1:1"),
    (["a", "b", "a#b"], f"row 4: v: {SEVERAL}{{a, b}}", "--multi split", "a:2 b:2"),
    (["a b", "b", "a"], f"row 2: v: {SEVERAL}{{a, b}}", "--multi split", "a:2 b:2"),
    (["very_good", "very good", "bad"], "look alike", "--labels bad very_good", "bad:1 very_good:2"),
    (["red", "red, green", "green"], f"3: v: {SEVERAL}{{red, green}}", "--multi split", "green:2 red:2"),
    (['{"choices": ["a", "b"]}', "a"], f"row 2: v: {SEVERAL}{{a, b}}", "--multi split", "a:2 b:1"),
    (['["a", "b"]', "a"], f"row 2: v: {SEVERAL}{{a, b}}", "--multi split", "a:2 b:1"),
    (["4,N/A", "4", "5"], "row 2: v: mixed scales: 'N/A'", "--no_vote N/A", "4:2 5:1"),
    (["so, so", "so", "no"], f"2: v: {SEVERAL}{{so, so}}", "--labels 'so, so' + so no", "so, so:1 so:1 no:1"),
    (["A,B", "C,D"], f"row 2: v: {SEVERAL}{{A, B}}", "--multi split", "A:1 B:1 C:1 D:1"),
    (["Yes, very", "No, not"], "{Yes, very}", "--labels 'Yes, very' + 'No, not'", "Yes, very:1 No, not:1"),
    (["2,5", "3"], "row 2: v: '2,5' may be several votes", "--multi split", "2:1 3:1 5:1"),
    (["1", "nan", "2", "N/A", "—"], "'nan' among numbers such as '1' (v", "--no_vote nan N/A -", "1:1 2:1"),
    (["1 (not at all)", "2", "5 – very"], "'1 (not at all)' among", "--labels 1-5", "1:1 2:1 5:1"),
    (["1", "2.50", "3"], "row 3: v: '2.5' is not a whole", "--labels 1 1.5 2 2.5 3", "1:1 2.5:1 3:1"),
    (["0.1", "0.73"], "bins make labels, as in", "--bins 0.1 0.226 0.352 0.478 0.604 0.73", "1:1 5:1"),
    (["80%", "20%"], "row 2: v: '80%' is a share", "--bins 0 20 40 60 80 100", "2:1 5:1"),
    (["4/5", "1/5"], "row 2: v: '4/5' may be points, a date", "--labels 1/5 2/5 3/5 + 4/5", "1/5:1 4/5:1"),
    (["0", "90"], "row 3: v: mixed scales? The votes reach from 0 to 90", "--no_vote 90", "0:1 1:1"),
    (["don’t", "don't", "do"], "3: v: 'don't' and 'don’t' look alike", "--labels do 'don’t'", "do:1 don’t:2"),
    (["❤", "❤\ufe0f", "no"], "look alike", "--labels no '❤'", "no:1 ❤:2"),
    (["Yes", "yes.", "no"], "row 3: v: 'yes.' and 'Yes' look alike", "--labels Yes no", "Yes:2 no:1"),
    (["A", "\u0410", "b"], "row 3: v: '\u0410' and 'A' look alike", "--labels A b", "A:2 b:1"),
]


@pytest.mark.parametrize(("cells", "words", "remedy", "said"), DOUBTS)
def test_a_remedy_works_when_followed(own, cells, words, remedy, said):
    extra = ["1"] if remedy == "--no_vote 90" else []
    with pytest.raises(InputError) as error:
        own(column(*cells, *extra), "--text text --label v")
    assert words in str(error.value) and "\n" not in str(error.value)
    remedy, _, more = remedy.partition(" + ")
    assert remedy in str(error.value)
    assert votes_of(own(column(*cells, *extra), f"--text text --label v {remedy} {more}")) == said


REFUSED = [  # cells of one item, flags, words
    (["3-4", "4-Mar", "5"], "", "row 3: v: '4-Mar' is a date"),
    (["3:04", "4"], "", "row 2: v: '3:04' is a date or time"),
    (['{"rank": 1, "value": "a"}', "5"], "", "'a'} is an object, not a vote"),
    (["2024-03-04 00:00:00", "1"], "", "row 2: v: '2024-03-04 00:00:00' is a date"),
    (["['yes' 'no',]", "5"], "", "row 2: v: \"['yes' 'no',]\" is neither JSON nor a list"),
    (["{1, 2}", "5"], "", f"row 2: v: {SEVERAL}{{1, 2}}"),
    (["[1, 2", "5"], "", "row 2: v: mixed scales"),
    (['{"ann": "yes"}', "5"], "", "is an object, not a vote; --counts reads"),
    (['{"a": ["x"], "b": ["y", "z"]}', "5"], "", "is an object, not a vote"),
    (["{'a'; 'b'}", "5"], "", "is neither JSON nor a list"),
    (["good", "bad", "NULL"], "--labels good bad", "'NULL' is not one of {good, bad}; --no_vote NULL leaves"),
    (["3", "50"], "--labels 1-3", "'50' is not one of {1, 2, 3}; --no_vote 50 leaves such"),
    (["4", "k.A.", "4.5"], "--labels 1-5 --no_vote k.A.", "not one of {1, 2, 3, 4, 5}; --no_vote 4.5 leaves"),
    (["80%", "0.8", "30%"], "--bins 0 50 100", "row 3: v: '0.8' stands beside percents"),
    (["0.8", "0.3", "1"], "--bins 0 50 100", "v: '0.8' is a share, as are all: --bins 0 0.2 0.4 0.6 0.8 1"),
    (["12,5 %", "80%"], "--bins 0 50 100", "v: '12,5 %' has a decimal comma: --decimal comma reads it"),
    (["50", "high"], "--bins 0 50 100", "is no number from 0 to 100; if it is no vote, --no_vote high"),
]


@pytest.mark.parametrize(("cells", "flags", "words"), REFUSED)
def test_cells_that_are_refused(own, cells, flags, words):
    with pytest.raises(InputError, match=re.escape(words)):
        own(column(*cells), f"--text text --label v {flags}")


def test_words_for_no_vote_are_told_of(own, caplog, tmp_path, capsys):
    rows = own(column("good", "bad", "NULL", "none of these", "n/a"), "--text text --label v")
    assert "'NULL' (1), 'n/a' (1), 'none of these' (1); --no_vote NULL n/a 'none of these'" in caplog.text
    assert sum(rows[0]["counts"].values()) == 5
    capsys.readouterr()
    own("text,v,w\nx,1,N/A\ny,,2\n,1,1\n", "--text text --label v w --no_vote n/a")
    said = capsys.readouterr().out
    assert "left out: 1 row without text; 1 cell named by --no_vote; 1 empty cell\n" in said
    assert "kept: 2 votes on 2 items, 1 an item\n" in said


def test_a_cell_of_nothing_but_words_for_no_vote_counts_once(own, capsys):
    table = "text,v\n" + "".join(
        f"t{i},{v}\n" for i, v in enumerate(["1", "2", '"skip, none"', '"skip, none"'])
    )
    assert len(own(table, "--text text --label v --no_vote skip none")) == 2
    said = capsys.readouterr().out
    assert "2 cells named by --no_vote" in said and "do not say their label" not in said


def test_a_scale_point_nobody_chose_is_said(own, caplog, tmp_path):
    own(column("1", "2", "4"), "--text text --label v")
    notes = json.loads((tmp_path / "o" / "card.json").read_text())["notes"]
    assert notes == [
        "labels that nobody chose, within the scale: 3",
        "the scale was found in the votes: 1 to 4; --labels names a wider one",
    ]
    distjudge.load_items([{"prompt": "x", "annotations": [1, 4, 2]}])
    assert "the labels are {1, 2, 4}, as found in the votes: nobody chose {3}" in caplog.text
    caplog.clear()
    distjudge.load_items([{"prompt": "x", "annotations": [1, 4, 2]}], labels=list("12345"))
    assert not caplog.text


# --- files as tools write them ----------------------------------------------------------------------------
def test_headers_of_tools(own, tmp_path, caplog):
    ids = ",".join(['"{""ImportId"":""x""}"'] * 3)
    qualtrics = f"id,Q1,text\nID,How?,text\n{ids}\n"
    for table, flags, words in (
        (qualtrics + "1,a,x\n2,b,x\n", "--label Q1", "further header rows left out: 2"),
        ("Person,v,text\n,Response,Open-Ended Response\n1,a,x\n2,b,x\n", "--label v", "left out: 1"),
        ("Our survey\nof May\n\ntext;v\nx;a\nx;b\n", "--label v", "is row 4; lines above it left out: 2"),
        ('id|"the\n vote"|text\n1|a|x, y\n2|b|x, y\n', "--label the\u00a0vote", ""),
        ('sep=;\n"text";v,w\nx;a\nx;b\n', "--label v,w", ""),
        ("text,v,\nx,a,\nx,b\n", "--label v", ""),
        ("text,v\nx,a\ntext,v\nx,b\n", "--label v", "further header rows left out: 1"),
    ):
        caplog.clear()
        assert votes_of(own(table, f"--text text {flags}")) == "a:1 b:1"
        assert words in caplog.text and bool(words) == bool(caplog.text)
    with pytest.raises(InputError, match=r"row 3: more fields than columns \(fields end at '\|'\): text, v"):
        own("text|v\nx|1\nx|1|2\n", "--text text --label v")


def test_json_documents(own, tmp_path):
    rows = [{"text": "x", "v": [1, 2]}, {"text": "y", "v": [2]}]
    documents = {"array": rows, "by_id": {"7": rows[0], "8": rows[1]}, "within": {"data": rows}}
    for name, document in documents.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(document, indent=1))
        assert own(f"{name}.json", "--text text --label v")[0]["counts"] == {"1": 1, "2": 1}, name
    (tmp_path / "lines.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert own("lines.json", "--text text --label v")[0]["counts"] == {"1": 1, "2": 1}
    items = [{"prompt": "x", "annotations": [1, 2]}, {"prompt": "y", "annotations": [2]}]
    (tmp_path / "items.json").write_text(json.dumps(items, indent=2))
    assert [item.where for item in distjudge.load_items("items.json")] == ["items.json[0]", "items.json[1]"]
    (tmp_path / "commas.jsonl").write_text("".join(json.dumps(item) + ",\n" for item in items))
    with pytest.raises(InputError, match=r"^commas.jsonl: its lines end in commas.*rows$"):
        distjudge.load_items("commas.jsonl")


def studio(*people):
    """A task of Label Studio: what each person chose, None for a cancelled annotation."""
    done = []
    for who, said in enumerate(people):
        result = [{"from_name": "v", "value": {"choices": [one]}} for one in said or ["b"]]
        result.append({"type": "relation", "from_id": "1", "to_id": "2"})
        result = result if said != "-" else []
        done.append({"completed_by": who, "was_cancelled": said is None, "result": result})
    return {"id": 5, "data": {"text": "x", "v": "b"}, "annotations": done}


ONE, OTHER = {"value": "a", "status": "submitted"}, {"value": "b", "status": "discarded"}
ARGILLA = {"value": ["a", "b", "b"], "status": ["submitted", "draft", "submitted"], "user_id": [1, 2, 3]}
MARKED = "left out: 1 vote that its tool marks as discarded or draft"
TOOLS = [  # tasks of Label Studio or columns of a table, flags, votes or words of the refusal, what is said
    ([studio("a", "b", None, "-", "a")], "", "a:2 b:1", f"{MARKED}; 1 empty cell"),
    ([studio("ab", "b")], "", "a person's cell holds several labels, {a, b}; --multi split counts each", ""),
    ([studio("ab", "b")], "--multi split", "a:1 b:2", ""),
    ({"v": [[ONE, OTHER, ONE, {"value": "b"}]]}, "", "a:2 b:1", MARKED),
    ({"v": [ARGILLA]}, "", "a:1 b:1", MARKED),
    ({"v": [["a", "b", "b"]], "v.status": [ARGILLA["status"]]}, "", "a:1 b:1", MARKED),
    ({"v": [["a", "b"]], "v.status": [["draft"]]}, "", "a:1 b:1", ""),  # of no vote that is there
    ({"v": [[{"rank": 1, "value": "a"}]]}, "", "{'rank': 1, 'value': 'a'} is an object, not a vote", ""),
    ({"v": [["a"], "b", "b"], "answer": ["accept", "", "reject"]}, "", "a:1 b:2", "--where 'answer!=reject'"),
    ({"v": [*"abb"], "PROLIFIC_PID": [*"ppq"]}, "", "a:1 b:2", "1 votes are a person's second on an item"),
    ({"text": [*"xy"], "v": [*"ab"]}, "", "a:1", "every item has one vote only: nothing shows how far"),
    ({"v": [*"abb"]}, "--no_vote skip", "a:1 b:2", "--no_vote: no cell says skip"),
    ({"v": [*"aab"], "ok": ["1.0", "1", "0"]}, "--where ok=1 --labels a b", "a:2", ""),
    ({"v": [*"abb"]}, "--where v!=c", "a:1 b:2", "--where 'v!=c': no row has that value"),
    ({"text": ["nan", None, "nan"], "v": [*"aab"]}, "", "a:1 b:1", "2 rows count whose text is 'nan'; --w"),
    ({"text": ["a b", "a\u00a0b"], "v": [*"ab"]}, "", "a:1", "1 of 2 items have the prompt of another item"),
    ({"text": ["a b", "a\u200b b"], "v": [*"ab"], "id": 1}, "--item id", "a:1 b:1", ""),
    ({"text": [*"xx", "Total votes:"], "v": [*"aba"]}, "", "a:1 b:1", "--where 'text!=Total votes:' leaves"),
    ({"id": [1, 1, "Ø"], "v": [*"aba"]}, "--item id", "a:1 b:1", "1 rows count whose id is 'Ø'; --where"),
    ({"v": [*"ab"], "v_mean": "b"}, "'v_*'", "a:1 b:1", "column 'v_mean' counts like the others; if"),
    ({"v": [*"abb"], "who": ["anna", "Anna", "x"]}, "--rater who", "a:1 b:2", "1 times: 'anna' and 'Anna'"),
    ({"text": [{"q": 1}], "v": ["a"]}, "", "t.json[0]: text: must be text or a number, in a field of", ""),
    ({"text": ['[{"role": "me" "content": "x"}]'], "v": ["a"]}, "", 't.json[0]: text: \'[{"role":', ""),
]


@pytest.mark.parametrize(("table", "flags", "votes", "said"), TOOLS)
def test_what_labelling_tools_write(own, tmp_path, capsys, caplog, table, flags, votes, said):
    rows = table if isinstance(table, list) else pandas.DataFrame({"text": "x"} | table).to_dict("records")
    (tmp_path / "t.json").write_text(json.dumps(rows))
    if re.fullmatch(r"(\w:\d ?)+", votes):
        assert votes_of(own("t.json", f"--text text --label v {flags}")) == votes
        assert said in capsys.readouterr().out + caplog.text
    else:
        with pytest.raises(InputError, match=re.escape(votes)):
            own("t.json", f"--text text --label v {flags}")


def test_columns_of_counts_name_their_labels(own):
    table = "id,text,tone_agree,tone_strongly_agree,tone_no\n1,x,2,3,0\n2,y,WAHR,FALSCH,x\n"
    flags = "--text text --item id --counts tone_agree tone_strongly_agree tone_no"
    rows = own(table, f"{flags} --labels no agree 'strongly agree'")
    assert rows[0]["counts"] == {"no": 0, "agree": 2, "strongly agree": 3}
    assert rows[1]["counts"] == {"no": 1, "agree": 1, "strongly agree": 0}
    with pytest.raises(InputError, match=r"row 2: .*: 'tone_strongly_agree' is not one of {no, agree}"):
        own(table, f"{flags} --labels no agree")
    (row,) = own("text,yes,no,N/A\nx,6,4,5\n", "--text text --counts yes no N/A --no_vote N/A")
    assert row["counts"] == {"yes": 6, "no": 4}
    for number, flag in (("1,204", ""), ("1 204", ""), ("1.204", "--decimal comma")):
        (row,) = own(f"text;a;b\nx;{number};1\n", f"--text text --counts a b {flag}")
        assert row["counts"] == {"a": 1204, "b": 1}
    with pytest.raises(InputError, match=r"a number of votes is needed, not '1\.204'; --decimal comma"):
        own("text;a;b\nx;1.204;1\n", "--text text --counts a b")


def test_what_excel_makes_of_cells(own, tmp_path, caplog):
    book = openpyxl.Workbook()
    for row in (["id", "text", "v"], [1, "x", "a"], [None, None, "b"], [None, None, "b"], [2, "y", "a"]):
        book.active.append(row)
    book.active.merge_cells("A2:A4")
    book.active.merge_cells("B2:B4")
    for row in (4, 5, 40):  # the last is empty
        book.active.row_dimensions[row].hidden = True
    book.save(tmp_path / "v.xlsx")
    assert counts_of(own("v.xlsx", "--text text --label v --item id")) == [{"a": 1, "b": 2}, {"a": 1, "b": 0}]
    assert "v.xlsx: 2 hidden rows of the sheet 'Sheet' are read too, row 4 first" in caplog.text
    book.active["B5"] = "a_x000D_\nb"
    book.save(tmp_path / "w.xlsx")
    assert own("w.xlsx", "--text text --label v --item id")[1]["prompt"] == "a\r\nb"
    numbers = openpyxl.Workbook()
    for row in (["text", "v"], ["x", 0.125], ["x", "0,5"]):
        numbers.active.append(row)
    numbers.save(tmp_path / "n.xlsx")
    rows = own("n.xlsx", "--text text --label v --decimal comma --labels 0.125 0.5")
    assert votes_of(rows) == "0.125:1 0.5:1"
    for value in (datetime.time(3, 4), datetime.datetime(2024, 3, 4), datetime.timedelta(hours=3)):
        book.active["C5"] = value
        book.save(tmp_path / "v.xlsx")
        with pytest.raises(InputError, match=r"row 5: v: .* is a date or time, which spreadsheets make"):
            own("v.xlsx", "--text text --label v --item id")


def test_sheets(own, tmp_path, caplog):
    with pandas.ExcelWriter(tmp_path / "v.xlsx") as book:
        pandas.DataFrame({"Notes": ["see below"]}).to_excel(book, sheet_name="README", index=False)
        pandas.DataFrame({"text": ["x", "x"], "v": [1, 2.0]}).to_excel(book, sheet_name="May", index=False)
    with pytest.raises(InputError, match=r"'README': no column 'text'; the sheets are {README, May}, --sh"):
        own("v.xlsx", "--text text --label v")
    assert votes_of(own("v.xlsx", "--text text --label v --sheet May")) == "1:1 2:1"
    with pytest.raises(InputError, match=r"sheet: no 'June'; there are {README, May}"):
        own("v.xlsx", "--text text --label v --sheet June")


# --- rows, people, prompts --------------------------------------------------------------------------------
def test_a_person_counts_once(own, capsys):
    table = "id,text,who,v\n1,x,anna,4\n1,x,anna,4\n1,x,ben,5\n1,x,ben,4\n2,y,ben,4\n"
    (one, two) = own(table, "--text text --label v --item id --rater who")
    assert one["counts"] == {"4": 1, "5": 1} and one["annotators"] == {"anna": "4", "ben": "5"}
    assert two["annotators"] == {"ben": "4"}
    second = "1 second vote of a person on an item"
    assert f"left out: {second}; {second}, with another label" in capsys.readouterr().out
    assert distjudge.load_items("o/items.jsonl")[0].votes == 2


def test_one_hot_rows_add_up(own, caplog):
    table = "w,id,text,c:::no,c:::yes,Status\na,1,x,TRUE,FALSE,ok\nb,1,x,,x,ok\nc,1,x,1,0,Rejected\n"
    flags = "--text text --item id --counts c:::*"
    assert own(table, flags)[0]["counts"] == {"c:::no": 2, "c:::yes": 1}
    assert "1 rows count whose Status is 'Rejected'; --where 'Status!=Rejected'" in caplog.text
    for where in ("Status=OK", "Status!=Rejected"):
        (row,) = own(table, f"{flags} --labels yes no --rater w --where {where}")
        assert row["counts"] == {"yes": 1, "no": 1} and row["annotators"] == {"a": "no", "b": "yes"}


def test_columns_of_marks(own, capsys):
    table = "id,text,a.1.on,a.2.on,a.3.on\n1,x,{},,\n1,x,,{},\n1,x,,nan,{}\n"
    flags = "--text text --item id --counts a.*"
    for marks in ("TRUE", "true", "x"), ("1", "1", "1"), ("1", "2", "3"):  # Potato writes a column's number
        assert votes_of(own(table.format(*marks), f"{flags} --labels 1-3")) == "1:1 2:1 3:1"
    assert "columns of counts say their own number: each such cell is one vote" in capsys.readouterr().out
    table += "1,x,1,1,\n"
    with pytest.raises(InputError, match=r"row 5: a.*several labels, .*; --multi split counts each"):
        own(table.format(1, 1, 1), flags)
    assert votes_of(own(table.format(1, 1, 1), f"{flags} --labels 1-3 --multi split")) == "1:2 2:2 3:1"
    assert votes_of(own(table.format(1, 1, 4), f"{flags} --labels 1-3")) == "1:2 2:2 3:4"  # true counts
    counts = own("text,1,2,3\nx,0,2,3\ny,1,2,0\n", "--text text --counts 1 2 3")  # two in a row are no marks
    assert counts_of(counts) == [{"1": 0, "2": 2, "3": 3}, {"1": 1, "2": 2, "3": 0}]


def test_a_column_of_how_many_people_chose_a_label(own, caplog):
    table = "id,text,v,n\n1,x,yes,30\n1,x,no,2\n2,y,yes,1\n2,y,no,9\n"
    own(table, "--text text --label v --item id")
    assert "if column 'n' says how many people chose so: --counts n" in caplog.text
    caplog.clear()
    rows = own(table, "--text text --label v --counts n --item id")
    assert counts_of(rows) == [{"no": 2, "yes": 30}, {"no": 9, "yes": 1}] and not caplog.text
    rows = own(table.replace("30", "0"), "--text text --label v --counts n")
    assert counts_of(rows)[0] == {"no": 2, "yes": 0}
    rows = own(f"{table}3,z,[1],3\n", "--text text --label v --counts n --labels yes no 1 2")
    assert rows[2]["counts"]["1"] == 3
    with pytest.raises(InputError, match="row 6: v: a list, and --counts says how many people"):
        own(f"{table}3,z,'[1, 2]',3\n".replace("'", '"'), "--text text --label v --counts n")
    with pytest.raises(InputError, match=r"\(without --rater\) one of each, a label and how"):
        own(table, "--text text --label v --counts n --rater id")
    for number in ("0.5", "many"):
        with pytest.raises(InputError, match=rf"row 2: n: a number of votes is needed, not '{number}'"):
            own(table.replace("30", number), "--text text --label v --counts n --item id")
    own("text,v,n\nx,yes,1\nx,no,1\n", "--text text --label v")
    assert "how many people" not in caplog.text


def test_cells_without_votes_among_counts(own):
    table = 'text,n\nx,{}\ny,\nz,"{""no"": 1, ""yes"": 2}"\n'
    rows = own(table, "--text text --counts n --min_votes 0")
    assert [row.get("counts") for row in rows] == [None, None, {"no": 1, "yes": 2}]


def test_columns_and_raters_that_are_no_persons(own, caplog):
    own("text,r1,r2,r_majority\nx,1,2,2\ny,2,2,2\n", "--text text --label r*")
    assert "column 'r_majority' counts like the others" in caplog.text
    own("id,text,v,w\n1,x,1,Anonymous\n1,x,2,N/A\n1,x,2,\n", "--text text --label v --item id --rater w")
    assert "--rater: votes of 'Anonymous' count as one person's" in caplog.text


def test_a_list_of_names_is_of_as_many_people(own, tmp_path):
    for votes, names in (("1,0", "Ann1,Ann2"), ("[1, 0]", "['Ann1', 'Ann2']")):
        table = f'text,v,who\nx,"{votes}","{names}"\ny,"{votes}","{names}"\n'
        for row in own(table, "--text text --label v --rater who --multi split"):
            assert row["annotators"] == {"Ann1": "1", "Ann2": "0"}
    (tmp_path / "t.json").write_text('[{"text": "x", "v": {"Ann1": "1", "Ann2": "0"}}]')
    with pytest.raises(InputError, match=r"are people's votes: use --label"):
        own("t.json", "--text text --counts v")


def test_tasks_of_label_studio(own, tmp_path, capsys, caplog):
    said = lambda vote, **who: who | {"result": [{"from_name": "v", "value": {"choices": [vote]}}]}  # noqa: E731
    done = [said("a", completed_by={"id": 1}), said("a", completed_by={"id": 1}), said("b"), said("b")]
    tasks = [{"id": k, "data": {"text": f"t{k}"}, "annotations": done * (k == 0)} for k in range(2)]
    (tmp_path / "t.json").write_text(json.dumps(tasks))
    assert own("t.json", "--text text --label v")[0]["counts"] == {"a": 2, "b": 2}
    assert "1 votes are a person's second" in caplog.text  # nameless annotations are not one person
    assert "left out: 1 empty cell; 1 item without votes" in capsys.readouterr().out
    (row,) = own("t.json", "--text text --label v --rater completed_by")
    assert row["counts"] == {"a": 1, "b": 2} and row["annotators"] == {"1": "a"}


def test_a_row_a_person(own, caplog):
    monkey = "ID,When,Is it clear?,,Why?\n,,Boil it.,Wait.,Response\n1,May,Yes,No,so\n2,May,No,No,\n"
    boil, wait = own(monkey, "--label 'Is it clear?*' --by_column")
    assert boil["prompt"] == "Is it clear? Boil it." and boil["counts"] == {"No": 1, "Yes": 1}
    assert wait["prompt"] == "Is it clear? Wait." and wait["counts"] == {"No": 2, "Yes": 0}
    own("When,Q1\nMay,a\nAverage,b\n", "--label Q1 --by_column")
    assert "1 rows count whose When is 'Average'; --where 'When!=Average' leaves them out" in caplog.text
    asked = 'id,Q_1,Q_2\nID,Clear? - Soup,"Clear? -\n Tea"\n' + ",".join(['"{""ImportId"":""x""}"'] * 3)
    (row,) = own("text,Rate *,Rate how\nx,1,2\n", "--text text --label 'Rate *' --labels 1-2")
    assert row["counts"] == {"1": 1, "2": 0}  # a column of just this name is meant alone
    items = own("text,Q1,Q2\nfine,1,2\n,2,1\n", "--label Q* --by_column")  # what people wrote is no question
    assert [item["prompt"] for item in items] == ["Q1", "Q2"]
    soup, tea = own(f"{asked}\n1,Yes,No\n2,No,No\n", "--label Q* --by_column")
    assert (soup["id"], soup["prompt"], soup["counts"]) == ("Q_1", "Clear? - Soup", {"No": 1, "Yes": 1})
    assert (tea["id"], tea["prompt"], tea["counts"]) == ("Q_2", "Clear? - Tea", {"No": 2, "Yes": 0})
    table = 'Who,"Clear?\n[soup]",Clear? [tea]\np,Yes,No\nq,No,No\np,Yes,Yes\n'
    soup, tea = own(table, "--label Clear?* --by_column --rater Who")
    assert soup["prompt"] == soup["id"] == "Clear? [soup]" and soup["counts"] == {"No": 1, "Yes": 1}
    assert tea["annotators"] == {"p": "No", "q": "No"} and tea["counts"] == {"No": 2, "Yes": 0}


def test_optional_columns_and_pairs(own, tmp_path, caplog, capsys):
    (tmp_path / "t.txt").write_text("{q} {more}|{answer_a}|{answer_b}")
    table = "q,more,answer_a,answer_b,v\nq,,one,two,A\nq,,one,two,tie\nr,m,1,2,B\n"
    flags = "--label v --template t.txt"
    own(table, f"{flags} --labels a b tie")
    assert "2 of 3 rows are left out, as a text in them is empty; --optional COLUMN" in caplog.text
    first, second = own(table, f"{flags} --optional more --swap answer_a answer_b")
    assert first["prompt"] == "q |one|two" and first["swap"]["prompt"] == "q |two|one"
    assert first["swap"]["labels"] == {"A": "B", "B": "A"} and second["counts"] == {"A": 0, "B": 1, "tie": 0}
    form = {"template": "{q} {more}|{answer_a}|{answer_b}", "text": None, "item": None, "optional": ["more"]}
    card = json.loads((tmp_path / "o" / "card.json").read_text())
    traded = {"A": "B", "B": "A"}
    form["shown"] = ["q", "more", "answer_a", "answer_b"]
    assert card["own"] == form | {"swap": ["answer_a", "answer_b"], "swap_labels": traded}
    assert sheets.Template(**card["own"]).fill(
        "row 2", first | dict(zip(table.split(",")[:4], "qmab", strict=True))
    ) == {"id": first["id"], "prompt": "q m|a|b", "swap": {"prompt": "q m|b|a", "labels": traded}}
    make = tables.prompts_of(card["own"], table.splitlines()[0].split(","))
    row = {"q": "s", "more": None, "answer_a": "{q}", "answer_b": 2}
    assert make("row 2", row) == ["s |{q}|2", "s |2|{q}"]
    for item in ("", "--item q"):  # shown in the other order to some: a vote for B of the first one
        rows = own(f"{table}q,,two,one,A\n", f"{flags} --optional more --swap answer_a answer_b {item}")
        assert rows[0]["counts"] == {"A": 1, "B": 1, "tie": 1} and len(rows) == 2
    assert "for the label that means the same: 1" in capsys.readouterr().out
    turned = "q,more,answer_a,answer_b,v,n,who\n" + "q,,one,two,A,3,p\nq,,two,one,B,7,p\nq,,one,two,tie,1,q\n"
    pair = "--label v --template t.txt --optional more --swap answer_a answer_b"
    assert own(turned, f"{pair} --counts n")[0]["counts"] == {"A": 10, "B": 0, "tie": 1}
    assert "for the label that means the same: 7" in capsys.readouterr().out
    assert own(turned, f"{pair} --rater who")[0]["counts"] == {"A": 1, "B": 0, "tie": 1}
    assert "1 second vote of a person on an item\n" in capsys.readouterr().out  # it is the same vote
    caplog.clear()  # a row an item: two items, with a warning
    both = "q,more,answer_a,answer_b,A,B\nq,,1,2,1,2\nq,,2,1,2,1\n"
    own(both, pair.replace("--label v", "--counts A B"))
    assert "1 of 2 items have the prompt of another item" in caplog.text
    with pytest.raises(InputError, match=r"which of the labels {left, right} .* --swap q more left right"):
        table = table.replace(",A", ",left").replace(",tie", ",right").replace(",B", ",left")
        own(table, f"{flags} --optional more --swap q more")


def test_an_out_with_other_files_is_left_alone(own, tmp_path):
    table = "t,v\na,1\nb,2\n"
    own(table, "--text t --label v")
    own(table, "--text t --label v")  # over an earlier one
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "train.jsonl").write_text("mine")
    for out in ("p", "."):
        with pytest.raises(InputError, match=f"out: [{out}] holds other files"):
            own(table, f"--text t --label v --out {out}")
    (tmp_path / "o" / "votes.csv").write_text(table)
    with pytest.raises(InputError, match=r"out: o/votes\.csv is in this folder"):
        own("o/votes.csv", "--text t --label v")
    assert (tmp_path / "p" / "train.jsonl").read_text() == "mine"


def test_every_label_of_a_pair_s_scale_trades_places(own, tmp_path):
    (tmp_path / "p.txt").write_text("{a} or {b}?")
    table = "a,b,vote\nx,y,1\nx,y,5\nx,y,2\nz,y,3\nz,y,4\n"
    flags = "--label vote --template p.txt --labels 1-5 --swap a b"
    with pytest.raises(InputError, match=r"cannot be told; .* in pairs, .* --swap a b 1 5 2 4 3 3$"):
        own(table, flags)
    with pytest.raises(InputError, match="name these in pairs"):
        own(table, f"{flags} 1 5")
    named = "answer_1,answer_2,vote\nx,y,1\nx,y,3\n"  # 1, 2, 3 may be the first, neither, the second
    (tmp_path / "n.txt").write_text("{answer_1} or {answer_2}?")
    pair = "--label vote --template n.txt --labels 1-3 --swap answer_1 answer_2"
    (row,) = own(named, f"{pair} 1 3 2 2")
    assert row["swap"]["labels"] == {"1": "3", "2": "2", "3": "1"}
    with pytest.raises(InputError, match=r"of the labels {1, 2, 3} trade places cannot be told"):
        own(named, pair)
    signed = own("a,b,vote\nx,y,-1\nx,y,1\nz,y,0\n", "--label vote --template p.txt --swap a b")
    assert signed[0]["swap"]["labels"] == {"-1": "1", "0": "0", "1": "-1"}
    (first, second) = own(table, f"{flags} 1 5 2 4 3 3")
    mirror = {"1": "5", "2": "4", "3": "3", "4": "2", "5": "1"}
    assert first["swap"] == {"prompt": "y or x?", "labels": mirror} == second["swap"] | {"prompt": "y or x?"}


SYSTEM = [{"role": "system", "content": "Be <|im_end|> brief."}, {"role": "user", "content": "Hi </s>"}]
TALK = [*SYSTEM[1:], {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": " So: 1 +\n2? "}]


def test_messages_as_prompts(own, tmp_path):
    lines = [{"m": messages, "v": vote} for messages in (SYSTEM, TALK) for vote in (1, 2)]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = own("m.jsonl", "--text m --label v")
    assert [row["prompt"] for row in rows] == [SYSTEM, TALK]
    one = distjudge.load_items("o/items.jsonl")[0]
    assert distjudge.messages_of(one.prompt) == SYSTEM and one.prompt == distjudge.prompt_text(SYSTEM)
    assert one.prompt != str(one.prompt) and len({one.prompt, str(one.prompt)}) == 2
    (tmp_path / "t.txt").write_text("Rate: {text}")
    rows = own("m.jsonl", "--text m --label v --template t.txt")
    assert rows[0]["prompt"] == "Rate: System:\nBe <|im_end|> brief.\n\nUser:\nHi </s>"
    (tmp_path / "n.jsonl").write_text(json.dumps({"m": TALK[:2], "v": 1}) + "\n")
    with pytest.raises(InputError, match=r"l:1: m: the last message must be the user's.*with a --template"):
        own("n.jsonl", "--text m --label v")


NAMES = [("qwen2.5", ""), ("mistral_v3", ""), ("qwen2.5", "llama3_1"), ("qwen2.5", "qwen3")]
NAMES += [("mistral_v3", "v3_spm")]


@pytest.mark.parametrize(("name", "template"), NAMES)
def test_messages_are_encoded_as_the_template_has_them(tokenizers_dir, name, template):
    tokenizer = distjudge.load_tokenizer(str(tokenizers_dir(name)))
    if template:
        tokenizer.chat_template = tokenizers_dir(f"chat_templates/{template}.jinja").read_text()
    encoder = distjudge.PromptEncoder(tokenizer)
    assert encoder(distjudge.prompt_text(SYSTEM[1:])) == encoder(SYSTEM[1]["content"])
    more = {"enable_thinking": False, "strftime_now": lambda form: "26 Jul 2024"}
    render = functools.partial(
        tokenizer.apply_chat_template, tokenize=False, add_generation_prompt=True, **more
    )
    for messages in (SYSTEM, TALK):
        prompt = distjudge.prompt_text(messages)
        assert encoder.render(prompt) == render(messages)
        harmless = json.loads(json.dumps(messages).replace("<|im_end|>", "end").replace("</s>", "end"))
        ids = encoder(distjudge.prompt_text(harmless))
        assert ids == tokenizer(render(harmless), add_special_tokens=False)["input_ids"]
        control = lambda some: [token for token in some if token in encoder.control_ids]  # noqa: E731
        assert control(encoder(prompt)) == control(ids)  # none from what people wrote


def test_messages_that_a_template_cannot_show(tokenizers_dir, tiny_tokenizer):
    tokenizer = distjudge.load_tokenizer(str(tokenizers_dir("mistral_v3")))
    tokenizer.chat_template = tokenizers_dir("chat_templates/gemma.jinja").read_text()
    with pytest.raises(InputError, match="chat template: System role not supported"):
        distjudge.PromptEncoder(tokenizer)(distjudge.prompt_text(SYSTEM))
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="has no chat template for a prompt of several messages"):
        distjudge.PromptEncoder(tokenizer)(distjudge.prompt_text(SYSTEM))
