"""A user's own table: every form it may have, and what is said of every mistake."""

import gzip
import json

import datasets
import pandas
import prepare
import pytest
import tyro

import distjudge
from distjudge import InputError

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
        prepare.main(tyro.cli(prepare.PrepareConfig, args=[*fixed, *arguments.split()]))
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


def test_a_template_of_several_columns(own, tmp_path):
    (tmp_path / "t.txt").write_text("Q: {the question}\nA: {answer}")
    table = "the question,answer,ok,set\nWhy?,{answer}!,yes,s1\nWhy?,{answer}!,no,s1\n"
    item = {"id": "1", "prompt": "Q: Why?\nA: {answer}!", "counts": {"no": 1, "yes": 1}, "group": "s1"}
    assert own(table, "--label ok --template t.txt --group set") == [item]
    (tmp_path / "t.txt").write_text("Rate {anwser}")
    words = r"t.txt: unknown placeholder \{anwser\}; there are \{id\}, \{answer\}, \{rating\}, \{who\}"
    with pytest.raises(InputError, match=words):
        own(VOTES, "--label rating --template t.txt")


def test_one_row_an_item(own):
    rows = own("text;r1;r2\nx;1;2\n ;2;2\nx;;3\n", "--text text --label r1 r2")
    assert counts_of(rows) == [{"1": 1, "2": 1, "3": 0}, {"1": 0, "2": 0, "3": 1}]
    table = 'text,n\nx,"{""yes"": 3, ""no"": 0}"\ny,"{""yes"": 1, ""no"": 4}"\n'
    assert counts_of(own(table, "--text text --counts n")) == [{"no": 0, "yes": 3}, {"no": 4, "yes": 1}]
    rows = own("text\tgood\tbad\nx\t3\t\ny\t0\t2.0\n", "--text text --counts good bad")
    assert counts_of(rows) == [{"good": 3, "bad": 0}, {"good": 0, "bad": 2}]
    rows = own(
        "text,2.0,1.0\nx,3,4\n", "--text text --counts 2.0 1.0"
    )  # whole numbers, as in a column of votes
    assert counts_of(rows) == [{"2": 3, "1": 4}]


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
    kinds = {"text": datasets.Value("string"), "v": datasets.ClassLabel(names=["0", "1"])}
    table = {"text": ["x", "x", "x"], "v": [1, 0, -1]}  # -1: no label
    table = datasets.Dataset.from_dict(table, features=datasets.Features(kinds))
    datasets.DatasetDict({"all": table}).save_to_disk(tmp_path / "named")
    assert counts_of(own("./named", "--text text --label v --hub_split all")) == [{"0": 1, "1": 1}]
    with pytest.raises(InputError, match="hub_split: there is no 'train'; there are all"):
        own("./named", "--text text --label v")


def test_one_annotator_works_and_warns(own, caplog):
    assert len(own("text,v\nx,1\ny,2\n", "--text text --label v")) == 2
    assert "every item has one vote only" in caplog.text


RATING, LABEL = "--text answer --label rating", "--text text --label v"
MISTAKES = [  # table, arguments, words
    (
        VOTES,
        "--text answr --label rating",
        "text: no column 'answr', did you mean 'answer'? The columns are id, ",
    ),
    (VOTES, "--text answer --label stars", "votes.csv: label: no column 'stars'. The columns are id, answer"),
    (VOTES, "", "label: name the column with the votes with --label, or columns of counts with --counts"),
    (
        VOTES,
        "--label rating --counts id",
        "or columns of counts with --counts, not both. The columns are id, an",
    ),
    (
        VOTES,
        "--label rating",
        "votes.csv: text: name the column with the judged text (--text), or a template",
    ),
    (VOTES, f"{RATING} --labels 1-4", "votes.csv: row 10: rating: '5' is not one of {1, 2, 3, 4}"),
    (VOTES, f"{RATING} --labels 5-1", "labels: '5-1' is not a range from low to high"),
    (
        VOTES + "9,Else.,3,p\n",
        f"{RATING} --item id",
        "32: item '9': its text differs from that at votes.csv: row 29",
    ),
    (
        VOTES + "9,Answer 9.,3,q\n",
        f"{RATING} --item id --group who",
        "row 3: item '0': its group differs from",
    ),
    (VOTES + ",Else.,3,p\n", f"{RATING} --item id", "row 32: id: empty, so the vote belongs to no item"),
    (
        VOTES + "9,x,good,p\n",
        RATING,
        "32: rating: mixed scales: 'good' among numbers such as '1' (votes.csv: row 2)",
    ),
    (VOTES + "9,x,90,p\n", RATING, "row 32: rating: mixed scales? The votes reach from 1 to 90"),
    (VOTES + "9,x,3.5,p\n", RATING, "row 32: rating: '3.5' is not a whole number"),
    (
        "t\n" + "".join(f"answer {i}\n" for i in range(30)),
        "--text t --label t",
        "t: 30 different labels, such as {answer 0",
    ),
    (
        "text,v\nx,Yes\nx,yes\n",
        LABEL,
        "3: v: 'yes' and 'Yes' differ only in capitals; with --labels yes both count",
    ),
    ("text,v\nx,1\ny,1\n", LABEL, "v: only the label {1} occurs; name them all with --labels"),
    ("text,v\n ,1\n,2\n", LABEL, "no item is left of 2 rows: "),
    ("text,v\nx,\ny,\n", LABEL, "no item is left of 2 rows: "),
    ("text,n\nx,3\n", "--text text --counts n", "votes.csv: row 2: n: must be an object such as"),
    ("text,a,b\nx,3,many\n", "--text text --counts a b", "row 2: b: a number of votes is needed, not 'many'"),
    ("text,text\nx,3\n", "--text text --label text", "column 'text' stands there twice"),
    (
        "text,a,b\nx,1,2\nx,1,2\n",
        "--text text --label a b --item text",
        "item 'x': stands twice, first at votes.csv: row 2",
    ),
    ("votes", RATING, "votes: no such file"),
    ("odd.doc.gz", RATING, "odd.doc.gz: is not a table that can be read"),
    *((f"gone.{kind}", RATING, f"gone.{kind}: no such file") for kind in ("csv", "xlsx", "parquet", "jsonl")),
    (
        "latin.csv",
        LABEL,
        "latin.csv: cannot be read as CSV: byte 11 is not UTF-8; save the sheet as 'CSV UTF-8'",
    ),
]


@pytest.mark.parametrize(("table", "arguments", "words"), MISTAKES)
def test_what_a_new_user_gets_wrong(own, tmp_path, table, arguments, words):
    (tmp_path / "odd.doc.gz").write_bytes(b"")
    (tmp_path / "latin.csv").write_bytes("text,v\ncafé,1\n".encode("latin-1"))
    with pytest.raises(InputError) as error:
        own(table, arguments)
    assert words in str(error.value) and not (tmp_path / "o").exists()
