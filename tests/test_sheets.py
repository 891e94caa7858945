"""Spreadsheets through recipes/judge.py: prompts by the judge's own template, and the same table, judged."""

import csv
import functools
import io
import json
import shutil

import distjudge
from distjudge import InputError, load_judge, save_judge

import judge as recipe
import openpyxl
import pandas
import pytest
import tables

from recipes import sheets

TEMPLATE = "Frage: {Frage}\nAntwort: {text}"
OWN = {"template": TEMPLATE, "text": "Antwort", "item": "Nr", "optional": ["Frage"], "swap": None}
TABLE = [["Nr", "Frage", "Antwort", "=Notiz"], ["7", "Wie?", "Schön; grün", "=1+1"]]
TABLE.append(["8", "", "Ein\nBad", "-5"])
TABLE += [["9", "Was?", "", "-x"], ["10", "Wo?", "\u2028@ {Nr}", "@SUM(A1)"], ["11", "Ja?", "no", "-1.234,5"]]
SAFE = ["'=Notiz", "'=1+1", "-5", "'-x", "'@SUM(A1)", "-1.234,5"]
ADDED = ["judge_p(1)", "judge_p(2)", "judge_mode", "judge_mean", "judge_entropy", "judge_credible_set"]
ADDED += ["judge_label_mass", "judge_problem"]


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory):
    """A run folder whose judge was trained on a table of one's own."""
    folder = tmp_path_factory.mktemp("sheets") / "run"
    save_judge(load_judge(tiny_model, ["1", "2"]), folder)
    (folder / "card.json").write_text(json.dumps({"task": "own", "own": OWN}))
    return folder


@pytest.fixture
def judge(run, tmp_path, monkeypatch):
    """A function that runs the recipe in tmp_path on a file of items."""
    loaded = load_judge(run)
    monkeypatch.setattr(distjudge, "load_judge", lambda path, *_, **__: loaded)
    monkeypatch.chdir(tmp_path)

    def call(items, out, **settings):
        recipe.main(recipe.JudgeConfig(**{"run": str(run), "items": items, "out": out, **settings}))

    call.predict = loaded.predict
    return call


def write_csv(path, rows, delimiter=";", bom=b"\xef\xbb\xbf", ends="\r\n"):
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter, lineterminator=ends).writerows(rows)
    path.write_bytes(bom + text.getvalue().encode())


def write_excel(path, rows):
    sheet = openpyxl.Workbook()
    for i, row in enumerate(rows, 1):
        for j, cell in enumerate(row, 1):
            at = sheet.active.cell(i, j, int(cell) if cell.lstrip("-").isdigit() else cell or None)
            at.data_type = "s" if isinstance(at.value, str) else at.data_type
    sheet.save(path)


def expected(judge):
    """p(1) of the rows with a text, by hand."""
    prompts = [f"Frage: {row[1]}\nAntwort: {row[2]}".replace("\u2028@", "@") for row in TABLE[1:] if row[2]]
    return judge.predict(prompts)[:, 0]


def test_a_german_spreadsheet_comes_back_judged(judge, tmp_path, capsys):
    write_csv(tmp_path / "neu.csv", TABLE)
    judge("neu.csv", "aus.csv", skip_bad=True)
    raw = (tmp_path / "aus.csv").read_bytes()
    assert raw.startswith(b"\xef\xbb\xbfNr;Frage;Antwort;'=Notiz;judge_p(1)") and raw.count(b"\r\n") == 6
    head, *rows = csv.reader(io.StringIO(raw.decode("utf-8-sig"), newline=""), delimiter=";")
    assert head == [*TABLE[0][:3], SAFE[0], *ADDED] and [row[3] for row in rows] == SAFE[1:]
    assert [row[:3] for row in rows] == [row[:3] for row in TABLE[1:]]
    good, bad = [row[4:] for row in rows if row[2]], rows[2]
    assert [float(row[0].replace(",", ".")) for row in good] == pytest.approx(expected(judge), abs=1e-5)
    assert all("." not in "".join(row) and row[2] in "12" and row[5][0] == "{" for row in good)
    assert bad[4:] == [""] * 7 + ["Antwort: empty"] and {row[-1] for row in good} == {""}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["aus.csv", "neu.csv"]
    said = capsys.readouterr().err
    assert "with {Frage, Antwort}" in said and "skipped: neu.csv: row 4: Antwort: empty" in said


def test_a_conversation_is_the_prompt_that_it_was_in_training(tmp_path):
    """Messages in a cell, as text or as a list: prepare.py and the template make the same of them."""
    turns = [{"role": "system", "content": "Be fair."}, {"role": "user", "content": "Good soup?"}]
    own = {"template": "{text}", "text": "talk", "item": None, "optional": [], "swap": None}
    for cell in (turns, json.dumps(turns), f"{json.dumps(turns)}\n"):
        (wanted,) = tables.prompts_of(own, ["talk"])("t.csv: row 2", {"talk": cell})
        made = sheets.Template(template="{text}", text="talk").fill("t.csv: row 2", {"talk": cell})
        assert made["prompt"] == wanted and distjudge.messages_of(wanted) == turns
    whole = sheets.Template(item="no").fill("t.parquet: row 2", {"prompt": turns, "no": "7", "id": "i"})
    assert whole["id"] == "7"


@pytest.mark.parametrize("suffix", [".xlsx", ".parquet", ".tsv", ".jsonl"])
def test_excel_in_and_every_form_out(judge, tmp_path, suffix):
    write_excel(tmp_path / "in.xlsx", TABLE)
    out = tmp_path / f"out{suffix}"
    judge("in.xlsx", out.name, skip_bad=True)
    read = {".xlsx": pandas.read_excel, ".parquet": pandas.read_parquet}
    read |= {".tsv": pandas.read_table, ".jsonl": functools.partial(pandas.read_json, lines=True)}
    table = read[suffix](out)
    if suffix == ".jsonl":
        table["judge_p(1)"] = [row["1"] for row in table["predicted"]]
        assert list(table["id"]) == [7, 8, 10, 11] == list(table["Nr"])
    else:
        assert list(table.columns)[-8:] == ADDED and table["Nr"].tolist() == [7, 8, 9, 10, 11]
        assert table["judge_problem"].dropna().tolist() == ["Antwort: empty"]
    assert table["judge_p(1)"].dropna().tolist() == pytest.approx(expected(judge), abs=1e-5)
    if suffix == ".xlsx":
        cells = openpyxl.load_workbook(out).active["D"]
        assert [cell.value for cell in cells] == ["=Notiz", "=1+1", -5, "-x", "@SUM(A1)", "-1.234,5"]
        assert [cell.data_type for cell in cells] == list("ssnsss")  # f would be a formula
        assert [cell.quotePrefix for cell in cells] == [True, True, False, True, True, False]


def test_what_is_mixed_in_a_parquet_column_is_text(tmp_path):
    cells = {"list": [[4, 5], [4, "N/A"]], "large": [1, 2**64], "empty": [{}, {}], "same": [[1], [2, 3]]}
    frame = pandas.DataFrame(cells, dtype=object)
    sheets.write_table(frame, [{"judge_mode": "1"}] * 2, tmp_path / "t.parquet", {})
    table = pandas.read_parquet(tmp_path / "t.parquet")
    assert table["list"].tolist() == ["[4, 5]", '[4, "N/A"]'] and table["large"].tolist() == ["1", str(2**64)]
    assert table["empty"].tolist() == ["{}"] * 2 and [[*x] for x in table["same"]] == [[1], [2, 3]]
    assert table["judge_mode"].tolist() == [1, 1] and not (tmp_path / "t.parquet.part").exists()


def test_a_whole_number_stays_one_beside_an_empty_cell(judge, tmp_path):
    write_excel(tmp_path / "in.xlsx", [["Frage", "Antwort", "Jahr"], ["a", "b", "5"], ["c", "d", ""]])
    judge("in.xlsx", "out.csv", item="Frage")
    lines = (tmp_path / "out.csv").read_text().splitlines()
    assert lines[1].startswith("a,b,5,") and lines[2].startswith("c,d,,")


def test_a_stopped_table_goes_on(judge, tmp_path, capsys):
    rows = [["Nr", "Frage", "Antwort"], *([str(i), "", f"soup {i}"] for i in range(6))]
    write_csv(tmp_path / "in.csv", rows, ",", b"", "\n")
    judge("in.csv", "whole.csv")
    write_csv(tmp_path / "in.csv", [*rows[:4], ["3", "", ""], *rows[5:]], ",", b"", "\n")
    with pytest.raises(InputError, match=r"in.csv: row 5: Antwort: empty \(--skip_bad"):
        judge("in.csv", "out.csv")
    journal = tmp_path / "out.csv.part.jsonl"
    assert len(journal.read_text().splitlines()) == 3 and not (tmp_path / "out.csv").exists()
    write_csv(tmp_path / "in.csv", rows, ",", b"", "\n")
    journal.write_bytes(journal.read_bytes()[:-30])
    judge("in.csv", "out.csv")
    assert "judged 4 items; kept 2 judged before" in capsys.readouterr().err and not journal.exists()
    one, other = (pandas.read_csv(tmp_path / name) for name in ("whole.csv", "out.csv"))
    pandas.testing.assert_frame_equal(one, other, atol=1e-5)


def test_templates_and_columns(judge, run, tmp_path):
    """--template, --text, a column "prompt", pairs, fields of JSON lines; what is not there is named."""
    write_csv(tmp_path / "in.csv", [["a", "b", "prompt"], ["soup", "tea", "Is it fine?"]])
    (tmp_path / "t.txt").write_text("{text} or {b}?")
    (tmp_path / "j.jsonl").write_text('{"Antwort": "x", "Frage": "y"}\n{"prompt": "z", "Antwort": "x"}\n')
    cases = [("in.csv", {}, ["Is it fine?"]), ("j.jsonl", {}, ["Frage: y\nAntwort: x", "z"])]
    cases += [("in.csv", {"template": "t.txt", "text": "a"}, ["soup or tea?"])]
    for number, (items, settings, prompts) in enumerate(cases):
        judge(items, f"{number}.jsonl", **settings)
        lines = map(json.loads, (tmp_path / f"{number}.jsonl").read_text().splitlines())
        assert [x["predicted"]["1"] for x in lines] == pytest.approx(judge.predict(prompts)[:, 0], abs=1e-5)
    pair = sheets.Template(template="A: {a} B: {b}", swap=("a", "b"))
    filled = pair.fill("x", {"a": "1", "b": "2"})
    assert filled["prompt"] == "A: 1 B: 2"
    assert filled["swap"] == {"prompt": "A: 2 B: 1", "labels": {"a": "b", "b": "a"}}
    write_csv(tmp_path / "bare.csv", [["a", "judge_mode"], ["soup", "1"]])
    (tmp_path / "bell.csv").write_text("Antwort,Frage,no\ate\nx,y,z\n")
    (tmp_path / "long.csv").write_text("Antwort,Frage\n" + "x" * 40_000 + ",\n")
    untrained = {"run": ".", "labels": ("1", "2")}
    for items, out, settings, words in (
        ("bare.csv", "x.csv", {}, "bare.csv: no column 'Frage', .* the columns are a, judge_mode$"),
        ("in.csv", "x.csv", {"text": "c"}, "in.csv: no column '(Frage|c)'"),
        ("in.csv", "x.csv", {"item": "id"}, "in.csv: no column 'id', which --item names"),
        ("bare.csv", "x.csv", {"text": "a", "template": "t.txt"}, "bare.csv: no column 'b'"),
        ("bare.csv", "x.csv", untrained, "no column 'prompt', and no template"),
        ("bare.csv", "x.csv", untrained | {"text": "a"}, "column 'judge_mode': judging adds"),
        ("long.csv", "x.xlsx", {}, "long.csv: row 2: Antwort: has more than 32,767 characters"),
        ("bell.csv", "x.xlsx", {}, "bell.csv: row 2: .*a control character; name a .csv file"),
    ):
        with pytest.raises(InputError, match=words):
            judge(items, out, **settings)
        assert not (tmp_path / out).exists()


def test_columns_of_two_words_and_lines_above_the_header(judge, run, tmp_path):
    """What the template showed in training must be there; the columns tell the header."""
    own = {"template": "{The answer}?", "text": None, "item": "no", "optional": [], "swap": None}
    folder = tmp_path / "two"
    shutil.copytree(run, folder)
    (folder / "card.json").write_text(json.dumps({"task": "own", "own": own | {"shown": ["The answer"]}}))
    (tmp_path / "new.csv").write_text("Export of May\n\nno,The answer\n7,Green\n")
    judge("new.csv", "o.jsonl", run=str(folder))
    (row,) = map(json.loads, (tmp_path / "o.jsonl").read_text().splitlines())
    (tmp_path / "whole.jsonl").write_text('{"id": "7", "prompt": "Green?"}')
    judge("whole.jsonl", "w.jsonl", run=str(folder))
    whole = json.loads((tmp_path / "w.jsonl").read_text())
    assert row == whole | {"no": "7", "The answer": "Green"}
    (tmp_path / "whole.csv").write_text("Export\n\nno,prompt\n1,Fine?\n2,The answer\n3,no\n")
    judge("whole.csv", "q.jsonl", run=str(folder))
    assert len((tmp_path / "q.jsonl").read_text().splitlines()) == 3
    with pandas.ExcelWriter(tmp_path / "two.xlsx") as book:  # one of several sheets has the columns
        for name, column in {"May": "The answer", "Notes": "Remark"}.items():
            table = pandas.DataFrame({"no": [1, 2], column: ["Green", "Blue"]})
            table.to_excel(book, sheet_name=name, index=False)
    judge("two.xlsx", "s.jsonl", run=str(folder))
    assert len((tmp_path / "s.jsonl").read_text().splitlines()) == 2
    (tmp_path / "old.csv").write_text("no,the answer\n7,Green\n")
    with pytest.raises(InputError, match=r"old.csv: no column 'The answer', which the template needs; the"):
        judge("old.csv", "p.jsonl", run=str(folder))


def test_what_a_spreadsheet_would_run():
    run = ["=1", "+a", "-a", "@a", "\ta", "\ra", "+49 30 12", "-1+cmd|' /C calc'!A0", "\uff1d1"]
    assert all(map(sheets.is_formula, run))
    safe = ["-5", "+1,5", "-1.234,5", "-2e-5", "-3%", "a=1", "", 3, None, -1.5, "-"]
    assert not any(map(sheets.is_formula, safe))


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
def test_the_delimiter_is_the_inputs_own(tmp_path, mark):
    rows = [["Nr", "Text"], *([str(i), "a, b; c"] for i in range(5))]
    write_csv(tmp_path / "x.csv", rows, mark, b"", "\n")
    form = sheets.csv_form(str(tmp_path / "x.csv"), rows[0], ".csv")
    assert (form["sep"], form["decimal"]) == (mark, "," if mark == ";" else ".")
    assert (form["encoding"], form["lineterminator"]) == ("utf-8", "\n")
    assert sheets.csv_form(str(tmp_path / "x.csv"), rows[0], ".tsv")["sep"] == "\t"
    (tmp_path / "y.csv").write_text("Nr,Text\n1,bad \ufffd sign\n", encoding="utf-8")
    assert sheets.csv_form(str(tmp_path / "y.csv"), rows[0], ".csv")["encoding"] == "utf-8"  # no mark
