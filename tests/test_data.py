"""plots/data.py: what it says of a data set, by hand."""

import json

import distjudge
from distjudge import InputError, PromptEncoder

import pytest
import torch
import tyro

from plots import data, figures

ROWS = [
    {"id": "sure", "prompt": "Rate it. Yes $5", "counts": {"1": 4, "2": 0, "3": 0}},
    {"id": "even", "prompt": "Rate it. No", "counts": {"1": 2, "2": 0, "3": 2}},
    {"id": "one", "prompt": "Rate it. Maybe", "counts": {"1": 0, "2": 1, "3": 0}},
]
SAID = """3 items, 9 votes, 3 labels
label       votes    share   majority of
1               6    66.7%         50.0%
2               1    11.1%         33.3%
3               2    22.2%         16.7%
votes an item      1: 1, 4: 2"""


def test_text_and_picture(tmp_path, capsys):
    (tmp_path / "v.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    data.main(tyro.cli(data.DataConfig, args=[str(tmp_path / "v.jsonl")]))
    said = capsys.readouterr().out
    assert (tmp_path / "plots" / "v.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "plots" / "v.txt").read_text() in said
    lines = [line for line in said.splitlines() if line]
    assert lines[1:7] == SAID.splitlines()
    entropy = "mean 0.231 nats of 1.099 at most; of 2 items with several votes 50.0% unanimous, 50.0% tied"
    assert lines[7] == f"entropy            {entropy}"
    assert "prompt length      11 to 15 characters, median 14" in lines
    assert "common beginnings  45% of the characters" in lines  # 18 of 40
    most, least = lines.index("most agreed on"), lines.index("least agreed on")
    assert lines[most + 1 : most + 4] == ["  sure", "    votes  label 1: 4", "    text   Yes $5"]
    assert lines[least + 1 : least + 4] == ["  even", "    votes  label 1: 2, label 3: 2", "    text   No"]


def test_nothing_of_a_file_commands_the_terminal(tmp_path, monkeypatch, capsys):
    """Escape sequences and marks that turn the direction, in the file's name, ids, prompts and labels."""
    bad = "\x1b]0;t\x07\u202e\u200fevil\x9b"
    votes = {bad: 2, "fine": 1}
    rows = [{"id": f"{i}{bad}", "prompt": f"{bad} {i} {bad}", "counts": votes} for i in range(3)]
    name = bad.replace("/", "_") + ".jsonl"
    (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    data.main(data.DataConfig((name,)))
    found = data.Look(distjudge.load_items(rows))
    for said in (capsys.readouterr().out, "\n".join(data.describe(found))):
        assert "evil" in said and not set(said) & set(bad) - set("]0;tevil")


def test_pieces_of_prompts_are_what_they_do_not_share():
    """By hand: the words that all begin and end with are left out, never half a word."""
    texts = ("so  so\nplain", "some\x1b", "s" * 30)
    prompts = [f"Rate it.\n\nText: {text}\n\nAnswer 1 or 2." for text in texts]
    assert figures.pieces(prompts, 20) == ["so so plain", "some ", "s" * 17 + "..."]
    prompts = ["Is it good? Yes.", "What is it? " + "no " * 9]
    assert figures.pieces(prompts, 12) == ["...ood? Yes.", "... no no no"]
    assert figures.pieces(["the same", "the same"], 12) == ["the same", "the same"]
    assert figures.pieces(["", ""], 12) == ["", ""]


@pytest.mark.parametrize(("ordered", "level"), [(False, "nominal"), (True, "ordinal")])
def test_alpha_is_that_of_the_package(ordered, level):
    krippendorff = pytest.importorskip("krippendorff")
    counts = torch.randint(0, 4, (40, 5), generator=torch.Generator().manual_seed(0)).double()
    counts[:, 3] = 0  # a label without votes
    counts = counts[counts.sum(1) >= 2]
    theirs = krippendorff.alpha(value_counts=counts.long().numpy(), level_of_measurement=level)
    assert data.krippendorff_alpha(counts, ordered) == pytest.approx(theirs, abs=1e-12)


NONE = {
    "no item has two votes": [[1, 0], [0, 1]],
    "all votes that can be compared are for one label": [[2, 0], [0, 1]],
    "the panels are weighted": [[1.5, 0.5]],
}


@pytest.mark.parametrize("words", NONE)
def test_alpha_is_not_always_there(words):
    assert words in data.krippendorff_alpha(torch.tensor(NONE[words], dtype=torch.float64), ordered=False)


def test_what_is_shown_does_not_depend_on_the_order_of_labels():
    rows = [{"prompt": f"{i}", "counts": {"-1": i % 3, "0": 2, "1": i % 2}} for i in range(12)]
    orders = (["-1", "0", "1"], ["0", "1", "-1"])
    plain, turned = (data.Look(distjudge.load_items(rows, labels=labels)) for labels in orders)
    assert plain.alpha == pytest.approx(turned.alpha, abs=1e-12)


def test_bars_hold_every_item_and_panels_are_told_by_people():
    """Rounding puts the entropy of five equal shares above log 5, and the sum of seven people's under 7."""
    five, none = dict.fromkeys("12345", 1), {"4": 0, "5": 0}
    rows = [{"prompt": f"{i}", "counts": five | {"1": 1 + 4 * (i > 2)}} for i in range(6)]
    for one in ((0.37, 0.41, 0.22), (0.22, 0.37, 0.41)):
        shares = none | dict(zip("123", one, strict=True))
        rows.append({"prompt": str(one), "distribution": shares, "votes": 7})
    found = data.Look(distjudge.load_items(rows))
    figure = data.draw(found)
    labels, _, entropy = ([bar.get_height() for bar in axes.patches] for axes in figure.axes[:3])
    data.plt.close(figure)
    assert labels == pytest.approx(torch.cat([*found.shares.values()]).tolist())
    assert sum(entropy) == 8 and entropy[-1] >= 3
    assert "votes an item      5: 3, 7: 2, 9: 3" in data.describe(found)


def test_both_orders_of_a_pair_are_counted_among_beginnings():
    turn = lambda n: {"prompt": f"B, or else A? {n}", "labels": {"a": "b", "b": "a"}}  # noqa: E731
    rows = [{"prompt": f"A or B? {n}", "counts": {"a": 1, "b": 2}, "swap": turn(n)} for n in "12"]
    assert data.Look(distjudge.load_items(rows)).shared == pytest.approx((8 + 14) / (2 * 9 + 2 * 15))


def test_one_vote_an_item_is_shown_too():
    found = data.Look(distjudge.load_items([ROWS[2], ROWS[2] | {"id": "two"}]))
    text = "\n".join(data.describe(found))
    assert "alpha none: no item has two votes" in text
    assert "noise floor        none: no item has two votes" in text
    data.plt.close(data.draw(found))


def test_a_bar_of_votes_an_item_is_of_whole_numbers():
    rows = [{"prompt": f"{n} {k}", "counts": {"a": n, "b": 0}} for n in range(1, 46) for k in range(2)]
    figure = data.draw(data.Look(distjudge.load_items(rows)))
    (votes,) = [axes for axes in figure.axes if axes.get_title() == "votes an item"]
    heights = [bar.get_height() for bar in votes.patches]
    assert heights == [4] * 22 + [2]  # two numbers a bar, but for the last
    data.plt.close(figure)


def test_lengths_in_tokens(tiny_model):
    found = data.Look(distjudge.load_items(ROWS), model=str(tiny_model))
    encode = PromptEncoder(distjudge.load_tokenizer(str(tiny_model)))
    assert found.lengths == [len(encode(row["prompt"])) for row in ROWS]
    assert found.unit == "tokens" and 0 < found.shared < 1
    with pytest.raises(InputError, match="nowhere: model: no such folder"):
        data.Look(distjudge.load_items(ROWS), model="./nowhere")


def test_large_files_are_sampled_by_group():
    votes = {"a": 1, "b": 1}
    rows = [{"prompt": f"{i}", "group": f"g{i // 5}", "counts": votes} for i in range(100)]
    items = distjudge.load_items(rows)
    drawn = data.some_groups(items, 20)
    assert len(drawn) == 20 and len({item.group for item in drawn}) == 4
    assert data.some_groups(items, 100) is items


def test_extremes_show_one_item_a_group():
    votes = [("x", 3, 0), ("x", 5, 0), ("y", 4, 0), ("z", 1, 1), ("w", 3, 3), ("z", 2, 1)]
    rows = [{"prompt": f"p{i}", "group": g, "counts": {"a": a, "b": b}} for i, (g, a, b) in enumerate(votes)]
    assert data.Look(distjudge.load_items(rows)).extremes(2) == [[1, 2], [4, 3]]
