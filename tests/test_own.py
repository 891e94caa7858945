"""A user's own table: every form it may have, and what is said of every mistake."""
import json

import prepare
import pytest
import tyro

import distjudge
from distjudge import InputError

VOTES = "id,answer,rating,who\n" + "".join(f"{i},Answer {i}.,{1 + (i + k) % 5},p{k}\n" for i in range(10) for k in range(3))


@pytest.fixture
def own(tmp_path, monkeypatch):
    """own("a,b\\n1,2\\n", "--label", "b") -> the items written, by id; the table may also be a file name."""
    monkeypatch.chdir(tmp_path)

    def run(table, *arguments):
        if "\n" in table:
            (tmp_path / "votes.csv").write_text(table, encoding="utf-8")
        raw = "votes.csv" if "\n" in table else table
        config = tyro.cli(prepare.PrepareConfig, args=["own", "--raw", raw, "--out", "o", "--split", "none", *map(str, arguments)])
        prepare.main(config)
        return {row["id"]: row for row in map(json.loads, (tmp_path / "o" / "items.jsonl").read_text(encoding="utf-8").splitlines())}

    return run


def test_one_row_a_vote(own, tmp_path):
    (tmp_path / "prompt.txt").write_text("Rate this from 1 to 5.\n\nAnswer: {text}\n")
    rows = own(VOTES, "--text", "answer", "--label", "rating", "--item", "id", "--template", "prompt.txt")
    assert len(rows) == 10 and rows["0"] == {"id": "0", "prompt": "Rate this from 1 to 5.\n\nAnswer: Answer 0.",
                                             "counts": {"1": 1, "2": 1, "3": 1, "4": 0, "5": 0}}
    assert rows["3"]["counts"] == {"1": 1, "2": 0, "3": 0, "4": 1, "5": 1}
    same = own(VOTES, "--text", "answer", "--label", "rating", "--template", "prompt.txt")  # equal prompts are one item
    assert [row["counts"] for row in same.values()] == [row["counts"] for row in rows.values()]
    card = json.loads((tmp_path / "o" / "card.json").read_text())
    assert card["read"] == {"rows": 30, "votes": 30} and card["ordered"] is True and card["prompt"]["file"] == "prompt.txt"
    distjudge.load_items(tmp_path / "o" / "items.jsonl")


def test_a_template_of_several_columns(own, tmp_path):
    (tmp_path / "t.txt").write_text("Q: {the question}\nA: {answer}")
    rows = own("the question,answer,ok,set\nWhy?,{answer}!,yes,s1\nWhy?,{answer}!,no,s1\n", "--label", "ok", "--template", "t.txt", "--group", "set")
    assert rows["1"] == {"id": "1", "prompt": "Q: Why?\nA: {answer}!", "counts": {"no": 1, "yes": 1}, "group": "s1"}


def test_one_row_an_item_with_several_label_columns(own):
    rows = own("text;r1;r2\nHello;1;2\n ;2;2\nHello;;3\n", "--text", "text", "--label", "r1", "r2")
    assert [(row["prompt"], row["counts"]) for row in rows.values()] == [("Hello", {"1": 1, "2": 1, "3": 0}), ("Hello", {"1": 0, "2": 0, "3": 1})]


def test_counts_as_one_column_or_several(own):
    rows = own('text,n\nx,"{""yes"": 3, ""no"": 0}"\ny,"{""yes"": 1, ""no"": 4}"\n', "--text", "text", "--counts", "n")
    assert [row["counts"] for row in rows.values()] == [{"no": 0, "yes": 3}, {"no": 4, "yes": 1}]
    rows = own("text\tgood\tbad\nx\t3\t\ny\t0\t2.0\n", "--text", "text", "--counts", "good", "bad")
    assert [row["counts"] for row in rows.values()] == [{"good": 3, "bad": 0}, {"good": 0, "bad": 2}]


@pytest.mark.parametrize(("labels", "votes", "order"), [
    ((), "1 3", ["1", "2", "3"]), (("1-5",), "1 3", list("12345")), (("1..7",), "2 6.0", list("1234567")),
    (("1-10",), "10 2", [str(n) for n in range(1, 11)]), (("-3..3",), "-3 +2", ["-3", "-2", "-1", "0", "1", "2", "3"]), ((), "-1 1", ["-1", "0", "1"]),
    (("yes", "no"), "Yes NO", ["yes", "no"]), ((), "fair unfair", ["fair", "unfair"]), (("a", "b", "tie"), "b tie", ["a", "b", "tie"]),
])
def test_scales(own, labels, votes, order):
    table = "text,v\n" + "".join(f"x,{v}\n" for v in votes.split())
    (row,) = own(table, "--text", "text", "--label", "v", *(["--labels", *labels] if labels else [])).values()
    assert list(row["counts"]) == order and sum(row["counts"].values()) == 2


def test_excel_parquet_jsonl_and_datasets(own, tmp_path):
    import datasets
    import pandas

    table = pandas.DataFrame({"text": ["x", "x", "y"], "v": [1, 2, 2]})
    table.to_excel(tmp_path / "v.xlsx", index=False)
    table.to_parquet(tmp_path / "v.parquet")
    table.to_json(tmp_path / "v.jsonl", orient="records", lines=True)
    datasets.Dataset.from_pandas(table).save_to_disk(tmp_path / "saved")
    for source in ("v.xlsx", "v.parquet", "v.jsonl", "./saved"):
        assert [row["counts"] for row in own(source, "--text", "text", "--label", "v").values()] == [{"1": 1, "2": 1}, {"1": 0, "2": 1}], source
    kinds = datasets.Features({"text": datasets.Value("string"), "v": datasets.ClassLabel(names=["no", "yes"])})
    datasets.DatasetDict({"all": datasets.Dataset.from_dict({"text": ["x", "x"], "v": [1, 0]}, features=kinds)}).save_to_disk(tmp_path / "named")
    assert own("./named", "--text", "text", "--label", "v", "--hub_split", "all")["1"]["counts"] == {"no": 1, "yes": 1}
    with pytest.raises(InputError, match="hub_split: there is no 'train'; there are all"):
        own("./named", "--text", "text", "--label", "v")


def test_one_annotator_works_and_warns(own, caplog):
    assert len(own("text,v\nx,1\ny,2\n", "--text", "text", "--label", "v")) == 2
    assert "every item has one vote only" in caplog.text


@pytest.mark.parametrize(("table", "arguments", "words"), [
    (VOTES, ["--text", "answr", "--label", "rating"], "votes.csv: text: no column 'answr', did you mean 'answer'? The columns are id, answer, rating, who"),
    (VOTES, ["--text", "answer", "--label", "stars"], "votes.csv: label: no column 'stars'. The columns are id, answer"),
    (VOTES, [], "name the column with the votes with --label, or columns of counts with --counts; votes.csv has id, answer, rating, who"),
    (VOTES, ["--label", "rating"], "votes.csv: text: name the column with the judged text (--text), or a template of columns"),
    (VOTES, ["--label", "rating", "--counts", "id"], "label: name the column with the votes with --label, or --counts, not both"),
    (VOTES, ["--text", "answer", "--label", "rating", "--labels", "1-4"], "votes.csv: row 10: rating: '5' is not one of {1, 2, 3, 4}"),
    (VOTES + "9,Another.,3,p\n", ["--text", "answer", "--label", "rating", "--item", "id"], "row 32: item '9': its text differs from that at votes.csv: row 29"),
    (VOTES + ",Another.,3,p\n", ["--text", "answer", "--label", "rating", "--item", "id"], "row 32: id: empty, so the vote belongs to no item"),
    (VOTES + "9,Answer 9.,good,p\n", ["--text", "answer", "--label", "rating"], "row 32: rating: mixed scales: 'good' among numbers such as '1' (votes.csv: row 2)"),
    (VOTES + "9,Answer 9.,90,p\n", ["--text", "answer", "--label", "rating"], "row 32: rating: mixed scales? The votes reach from 1 to 90"),
    (VOTES + "9,Answer 9.,3.5,p\n", ["--text", "answer", "--label", "rating"], "row 32: rating: '3.5' is not a whole number"),
    ("t\n" + "".join(f"answer {i}\n" for i in range(30)), ["--text", "t", "--label", "t"], "t: 30 different labels, such as {answer 0, answer 1, "),
    ("text,v\nx,Yes\nx,yes\n", ["--text", "text", "--label", "v"], "row 3: v: 'yes' and 'Yes' differ only in capitals; with --labels yes both count as one"),
    ("text,v\nx,1\ny,1\n", ["--text", "text", "--label", "v"], "v: only the label {1} occurs; name them all with --labels"),
    ("text,v\n ,1\n,2\n", ["--text", "text", "--label", "v"], "no item is left of 2 rows: {'rows with empty text': 2"),
    ("text,v\nx,\ny,\n", ["--text", "text", "--label", "v"], "no item is left of 2 rows"),
    ("text,n\nx,3\n", ["--text", "text", "--counts", "n"], "votes.csv: row 2: n: must be an object such as"),
    ("text,a,b\nx,3,many\n", ["--text", "text", "--counts", "a", "b"], "votes.csv: row 2: b: a number of votes is needed, not 'many'"),
    ("text,text\nx,3\n", ["--text", "text", "--label", "text"], "column 'text' stands there twice"),
    ("text,a,b\nx,1,2\nx,1,2\n", ["--text", "text", "--label", "a", "b", "--item", "text"], "item 'x': stands twice, first at votes.csv: row 2"),
    (VOTES, ["--text", "answer", "--label", "rating", "--labels", "5-1"], "labels: '5-1' is not a range from low to high"),
    ("votes", ["--text", "answer", "--label", "rating"], "votes: no such file"),
    ("prompt.txt.gz", ["--text", "answer", "--label", "rating"], "prompt.txt.gz: is not a table that can be read"),
    ("gone.csv", ["--text", "answer", "--label", "rating"], "gone.csv: no such file"),
    ("gone.xlsx", ["--text", "answer", "--label", "rating"], "gone.xlsx: no such file"),
    ("gone.parquet", ["--text", "answer", "--label", "rating"], "gone.parquet: cannot be read as Parquet: no such file"),
])
def test_what_a_new_user_gets_wrong(own, tmp_path, table, arguments, words):
    (tmp_path / "prompt.txt.gz").write_bytes(b"")
    with pytest.raises(InputError) as error:
        own(table, *arguments)
    assert words in str(error.value) and not (tmp_path / "o").exists()


def test_a_template_with_an_unknown_column(own, tmp_path):
    (tmp_path / "t.txt").write_text("Rate {anwser}")
    with pytest.raises(InputError, match=r"t.txt: unknown placeholder \{anwser\}; there are \{id\}, \{answer\}, \{rating\}, \{who\}"):
        own(VOTES, "--label", "rating", "--template", "t.txt")


def test_latin_1_is_named(own, tmp_path):
    (tmp_path / "l.csv").write_bytes("text,v\ncafé,1\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"l.csv: cannot be read as CSV: byte 11 is not UTF-8; save the sheet as 'CSV UTF-8'"):
        own("l.csv", "--text", "text", "--label", "v")
