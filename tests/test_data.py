"""plots/data.py: what it says of a data set, by hand."""
import json
import sys

import pytest
import torch
import tyro

import distjudge
from distjudge import InputError
from plots import data

ROWS = [{"id": "sure", "prompt": "Rate it. Yes $5", "counts": {"1": 4, "2": 0, "3": 0}}, {"id": "even", "prompt": "Rate it. No", "counts": {"1": 2, "2": 0, "3": 2}},
        {"id": "one", "prompt": "Rate it. Maybe", "counts": {"1": 0, "2": 1, "3": 0}}]


def test_text_and_picture(tmp_path, capsys):
    (tmp_path / "v.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    data.main(tyro.cli(data.DataConfig, args=[str(tmp_path / "v.jsonl"), "--examples", "1"]))
    said = capsys.readouterr().out
    assert (tmp_path / "v.png").read_bytes().startswith(b"\x89PNG") and (tmp_path / "v.txt").read_text() in said
    lines = [line for line in said.splitlines() if line]
    assert lines[1] == "3 items, 9 votes, 3 labels"
    assert lines[3:6] == ["1           6    50.0%         50.0%", "2           1    33.3%         33.3%", "3           2    16.7%         16.7%"]
    assert lines[6] == "votes an item      1: 1, 4: 2"
    assert lines[7] == "entropy            mean 0.231 nats of 1.099 at most; of 2 items with two votes or more 50.0% are unanimous, 50.0% tied"
    assert "prompt length      11 to 15 characters, median 14" in lines and "common beginnings  45% of the characters" in lines  # 18 of 40
    assert lines[-5:-1] == ["most agreed on", "  sure: 1 4: Rate it. Yes $5", "least agreed on", "  even: 1 2, 3 2: Rate it. No"]


def test_alpha_by_hand():
    """Nominal: 1 - D_o / D_e. Two items of 4 votes, (4, 0) and (2, 2): D_o = (2 * 2 * 2 / 3) / 8, D_e = 2 * 6 * 2 / (8 * 7)."""
    counts = torch.tensor([[4.0, 0], [2, 2], [0, 1]], dtype=torch.float64)
    assert data.krippendorff_alpha(counts, ordered=False) == pytest.approx(1 - (8 / 3 / 8) / (24 / 56))
    near, far = (torch.tensor([[2.0, 2, 0], [0, 2, 2]]), torch.tensor([[2.0, 0, 2], [0, 2, 2]]))
    assert data.krippendorff_alpha(near.double(), ordered=True) > data.krippendorff_alpha(far.double(), ordered=True)


@pytest.mark.parametrize(("counts", "words"), [
    ([[1, 0], [0, 1]], "every item has one vote"), ([[2, 0], [3, 0]], "all votes are for one label"), ([[1.5, 0.5]], "the panels are weighted"),
    ([[2, 0], [0, 1]], "all votes that can be compared are for one label")])
def test_alpha_is_not_always_there(counts, words):
    assert words in data.krippendorff_alpha(torch.tensor(counts, dtype=torch.float64), ordered=False)


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "krippendorff", None)
    found = data.look(distjudge.load_items(ROWS))
    assert any("needs the package krippendorff (pip install krippendorff)" in line for line in data.describe(found))
    data.plt.close(data.draw(found))


def test_lengths_in_tokens(tiny_model):
    found = data.look(distjudge.load_items(ROWS), model=str(tiny_model))
    judge = distjudge.PromptEncoder(distjudge.load_tokenizer(str(tiny_model)))
    assert found.unit == "tokens" and found.lengths == [len(judge(row["prompt"])) for row in ROWS] and 0 < found.shared < 1
    with pytest.raises(InputError, match="nowhere: model: no such folder"):
        data.look(distjudge.load_items(ROWS), model="./nowhere")


def test_large_files_are_sampled_by_group():
    items = distjudge.load_items([{"prompt": f"{i}", "group": f"g{i // 5}", "counts": {"a": 1, "b": 1}} for i in range(100)])
    drawn = data.some_groups(items, 20)
    assert len(drawn) == 20 and len({item.group for item in drawn}) == 4 and data.some_groups(items, 100) is items


def test_extremes_show_one_item_a_group():
    rows = [{"id": i, "prompt": f"p{i}", "group": g, "counts": {"a": a, "b": b}} for i, (g, a, b) in
            enumerate([("x", 3, 0), ("x", 5, 0), ("y", 4, 0), ("z", 1, 1), ("w", 3, 3), ("z", 2, 1)])]
    most, least = data.look(distjudge.load_items(rows)).extremes(2)
    assert (most, least) == ([1, 2], [4, 3])
