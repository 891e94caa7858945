"""load_items: every accepted form, every refusal; splitting and keeping train and test apart."""
import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

import distjudge
from distjudge import InputError, load_items, split_items

ROOT = Path(__file__).resolve().parents[1]
GOOD = {"id": "a", "prompt": "Is it?", "counts": {"yes": 3, "no": 2}}


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return path


def refusal(rows, tmp_path, **options):
    with pytest.raises(InputError) as error:
        load_items(write(tmp_path / "votes.jsonl", rows), **options)
    return str(error.value)


def test_counts_annotations_and_distribution_are_the_same_votes(tmp_path):
    rows = [GOOD, {"id": "b", "prompt": "Or?", "annotations": ["no", "yes", "no", "yes", "yes"]},
            {"id": "c", "prompt": "And?", "distribution": {"no": 0.4, "yes": 0.6}, "votes": 5}]
    items = load_items(write(tmp_path / "v.jsonl", rows))
    assert [item.counts for item in items] == [{"yes": 3, "no": 2}] * 3
    assert [list(item.counts) for item in items] == [["yes", "no"]] * 3
    assert [item.votes for item in items] == [5, 5, 5] and items[0].distribution == [0.6, 0.4]
    assert items[1].where == f"{tmp_path / 'v.jsonl'}:2"


def test_rounded_shares_become_whole_votes_and_weighted_panels_stay_fractional():
    thirds, weighted = load_items([{"prompt": "x", "distribution": {"a": 0.333, "b": 0.667}, "votes": 3},
                                   {"prompt": "y", "distribution": {"a": 0.45, "b": 0.55}, "votes": 2}])
    assert thirds.counts == {"a": 1, "b": 2}
    assert weighted.counts == pytest.approx({"a": 0.9, "b": 1.1}) and weighted.votes == pytest.approx(2)


def test_numeric_labels_are_ordered_by_value_others_as_given():
    assert distjudge.labels_of(load_items([{"prompt": "x", "counts": {"10": 1, "9": 0, "-1": 2, "2": 0}}])) == ["-1", "2", "9", "10"]
    assert distjudge.labels_of(load_items([{"prompt": "x", "counts": {"tie": 1, "b": 0, "a": 2}}])) == ["tie", "b", "a"]
    assert distjudge.labels_of(load_items([{"prompt": "x", "annotations": [3, 1]}, {"prompt": "y", "annotations": ["2"]}])) == ["1", "2", "3"]
    assert distjudge.labels_of(load_items([{"prompt": "x", "annotations": ["tie", "b"]}, {"prompt": "y", "annotations": ["a"]}])) == ["a", "b", "tie"]
    named = load_items([{"prompt": "x", "counts": {"a": 2}}, {"prompt": "y", "counts": {"tie": 2, "b": 1}}], labels=["b", "tie", "a"])
    assert [item.counts for item in named] == [{"b": 0, "tie": 0, "a": 2}, {"b": 1, "tie": 2, "a": 0}]


def test_label_order_does_not_depend_on_the_order_inside_later_items():
    items = load_items([{"prompt": "x", "counts": {"b": 1, "a": 0}}, {"prompt": "y", "counts": {"a": 5, "b": 2}}])
    assert list(items[1].counts.items()) == [("b", 2), ("a", 5)]


def test_several_files_gzip_bom_crlf_and_blank_lines(tmp_path):
    plain, packed = tmp_path / "v.jsonl", tmp_path / "w.jsonl.gz"
    plain.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n\r\n")
    packed.write_bytes(gzip.compress(json.dumps(GOOD | {"id": "b", "prompt": "é?"}).encode()))
    for items in (load_items(plain, packed), load_items([plain, str(packed)])):
        assert [(item.id, item.prompt) for item in items] == [("a", "Is it?"), ("b", "é?")]


def test_what_notebooks_hold():
    import datasets
    import pandas

    rows = [GOOD | {"group": None}, GOOD | {"id": 2, "prompt": "Or?", "group": "g"}]
    expected = [("a", None, {"yes": 3, "no": 2}), ("2", "g", {"yes": 3, "no": 2})]
    for source in (rows, pandas.DataFrame(rows), datasets.Dataset.from_list([row | {"id": str(row["id"])} for row in rows])):
        assert [(item.id, item.group, item.counts) for item in load_items(source)] == expected
    lists = pandas.DataFrame({"prompt": ["x", "y"], "annotations": [[1, 2], [2, 2]]})
    assert [item.counts for item in load_items(lists)] == [{"1": 1, "2": 1}, {"1": 0, "2": 2}]
    arrays = datasets.Dataset.from_list([{"prompt": "x", "annotations": ["p", "q"]}]).with_format("numpy")
    assert load_items(arrays)[0].counts == {"p": 1, "q": 1}


def test_ids_default_to_a_hash_of_the_prompt():
    first, second = load_items([{"prompt": "x", "counts": {"a": 1, "b": 0}}, {"prompt": "y", "counts": {"a": 1, "b": 0}}])
    assert first.id != second.id and first.id == load_items([{"prompt": "x", "counts": {"a": 0, "b": 2}}])[0].id


@pytest.mark.parametrize(("row", "field", "words"), [
    ('{"id": "z", "prompt": "x", "counts"', "", "broken JSON"),
    ("[1, 2]", "", "not a JSON object but list"),
    ('"hello"', "", "not a JSON object but str"),
    ('{"id": "z", "prompt": "x", "counts": {"yes": 1, "yes": 2, "no": 0}}', "counts", "duplicate label 'yes'"),
    ('{"id": "z", "prompt": "x", "prompt": "y", "counts": {"yes": 1, "no": 0}}', "prompt", "stands twice"),
    ({"id": 10**400, "prompt": "x", "counts": {"yes": 1, "no": 0}}, "id", "must be text"),
    ({"id": "z", "prompt": "x", "annotations": ["yes", 10**400]}, "annotations", "a label must be text"),
    ('{"prompt": "x", "counts": {"yes": ' + "9" * 5000 + ', "no": 1}}', "", "broken JSON"),
    ("[" * 100_000, "", "broken JSON"),
    ({"id": "z", "counts": {"yes": 1, "no": 0}}, "prompt", "missing"),
    ({"id": "z", "prompt": "  ", "counts": {"yes": 1, "no": 0}}, "prompt", "empty"),
    ({"id": "z", "prompt": ["x"], "counts": {"yes": 1, "no": 0}}, "prompt", "not text but list"),
    ('{"id": "z", "prompt": "\\ud800", "counts": {"yes": 1, "no": 0}}', "prompt", "lone surrogate"),
    ({"id": "z", "prompt": "x"}, "counts", "found none"),
    ({"id": "z", "prompt": "x", "counts": {"yes": 1, "no": 0}, "annotations": ["yes"]}, "counts", "found counts and annotations"),
    ({"id": "z", "prompt": "x", "counts": [1, 2]}, "counts", "must be an object"),
    ({"id": "z", "prompt": "x", "counts": {"yes": -1, "no": 3}}, "counts", "negative: -1"),
    ({"id": "z", "prompt": "x", "counts": {"yes": 1.5, "no": 3}}, "counts", "fractional: 1.5"),
    ('{"id": "z", "prompt": "x", "counts": {"yes": NaN, "no": 1}}', "counts", "are nan"),
    ('{"id": "z", "prompt": "x", "counts": {"yes": Infinity, "no": 1}}', "counts", "are inf"),
    ({"id": "z", "prompt": "x", "counts": {"yes": 10**400, "no": 1}}, "counts", "must be a number"),
    ({"id": "z", "prompt": "x", "counts": {"yes": 10**10, "no": 1}}, "counts", "billion"),
    ({"id": "z", "prompt": "x", "counts": {"yes": "3", "no": 1}}, "counts", "must be a number"),
    ({"id": "z", "prompt": "x", "counts": {"yes": True, "no": 1}}, "counts", "must be a number"),
    ({"id": "z", "prompt": "x", "counts": {"yes": 0, "no": 0}}, "counts", "no votes at all"),
    ({"id": "z", "prompt": "x", "counts": {"yes ": 1, "no": 0}}, "counts", "without spaces around it"),
    ({"id": "z", "prompt": "x", "counts": {"Yes": 1, "no": 0}}, "counts", "differ from {yes, no}"),
    ({"id": "z", "prompt": "x", "counts": {"yes": 1}}, "counts", "differ from {yes, no}"),
    ({"id": "z", "prompt": "x", "annotations": ["maybe"]}, "annotations", "unknown label {maybe}"),
    ({"id": "z", "prompt": "x", "annotations": []}, "annotations", "list of one label or more"),
    ({"id": "z", "prompt": "x", "annotations": [1.5]}, "annotations", "not 1.5"),
    ({"id": "z", "prompt": "x", "distribution": {"yes": 0.5, "no": 0.5}}, "votes", "needs the number of people"),
    ({"id": "z", "prompt": "x", "distribution": {"yes": 0.5, "no": 0.2}, "votes": 3}, "distribution", "add up to 1, not to 0.7"),
    ({"id": "z", "prompt": "x", "distribution": {"yes": 1.5, "no": -0.5}, "votes": 3}, "distribution", "0 or more"),
    ({"id": "z", "prompt": "x", "distribution": {"yes": 0.5, "no": 0.5}, "votes": 2.5}, "votes", "not 2.5"),
    ({"id": "z", "prompt": "x", "counts": {"yes": 1, "no": 0}, "truth": {"yes": 0.1, "no": 0.1}}, "truth", "add up to 1"),
    ({"id": "z", "prompt": "x", "counts": {"yes": 1, "no": 0}, "truth": {"perhaps": 1}}, "truth", "unknown label {perhaps}"),
    ({"id": "z", "prompt": "x", "counts": {"yes": 1, "no": 0}, "split": "dev"}, "split", "train or test"),
    ({"id": ["z"], "prompt": "x", "counts": {"yes": 1, "no": 0}}, "id", "must be text"),
    ({"id": "a", "prompt": "x", "counts": {"yes": 1, "no": 0}}, "id", "duplicate, first at"),
])
def test_a_bad_line_is_named(row, field, words, tmp_path):
    message = refusal([GOOD, row], tmp_path)
    assert message.startswith(f"{tmp_path / 'votes.jsonl'}:2: ") and "\n" not in message
    assert f"{field}: " in message and words in message
    if isinstance(row, dict) and isinstance(row.get("id"), str):
        assert f"item '{row['id']}'" in message


def test_no_two_labels_no_items_no_file(tmp_path):
    assert "two labels or more" in refusal([{"prompt": "x", "counts": {"a": 1}}], tmp_path)
    assert "no items" in refusal([""], tmp_path)
    with pytest.raises(InputError, match=r"none\.jsonl: no such file"):
        load_items(tmp_path / "none.jsonl")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b"x" * 5000)[:-20])
    with pytest.raises(InputError, match="cannot be read"):
        load_items(tmp_path / "cut.jsonl.gz")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "caf\xe9", "counts": {"a": 1, "b": 0}}\n')
    with pytest.raises(InputError, match=r"latin.jsonl:1: not UTF-8"):
        load_items(tmp_path / "latin.jsonl")
    with pytest.raises(InputError, match="expected paths"):
        load_items(7)
    with pytest.raises(InputError, match="names a label twice"):
        load_items([GOOD], labels=["yes", "yes", "no"])


def test_every_problem_is_listed_twenty_at_most(tmp_path):
    bad = [{"id": f"b{i}", "prompt": "", "counts": {"yes": -1, "no": 0}} for i in range(3)]
    lines = refusal([GOOD, *bad], tmp_path).splitlines()
    assert len(lines) == 6 and lines[0].endswith("votes.jsonl:2: item 'b0': prompt: empty") and "counts: " in lines[1]
    lines = refusal([GOOD, *[row | {"id": f"c{i}"} for i, row in enumerate(bad * 10)]], tmp_path).splitlines()
    assert len(lines) == 21 and lines[-1].endswith("and 40 more problems")
    mixed = [{"id": f"d{i}", "prompt": "", "counts": {"yes": 1, "no": 1}} for i in range(15)]
    mixed += [{"id": f"e{i}", "prompt": f"{i}", "counts": {"yes": 1, "maybe": 1}} for i in range(15)] + [GOOD | {"id": f"f{i}"} for i in range(20)]
    lines = refusal(mixed, tmp_path).splitlines()
    assert len(lines) == 21 and lines[-1].endswith("and 10 more problems")  # an odd minority is to blame, and named, wherever it stands
    assert "differ from {yes, no}" in lines[15]
    assert refusal([GOOD, {"id": "a", "prompt": "", "counts": {"yes": 1, "no": 0}}], tmp_path).count("duplicate") == 1
    assert "\n" not in refusal([GOOD | {"id": "two\nlines", "prompt": ""}], tmp_path)
    assert "two spellings" in refusal([{"prompt": "x", "counts": {"1": 1, "1.0": 2}}], tmp_path)


def test_split_by_group_is_seeded_and_keeps_groups_and_equal_prompts_whole():
    items = load_items([{"id": i, "prompt": f"p{i % 90}", "counts": {"a": 1, "b": 0}, "group": f"g{i // 4}" if i < 40 else None} for i in range(100)])
    train, test = split_items(items, seed=3)
    assert len(train) + len(test) == 100 and abs(len(test) - 20) <= 2 and split_items(items, seed=3) == (train, test) != split_items(items, seed=4)
    assert {item.id for item in train} | {item.id for item in test} == {str(i) for i in range(100)}
    assert not {item.group for item in train if item.group} & {item.group for item in test}
    assert not {item.prompt for item in train if not item.group} & {item.prompt for item in test if not item.group}
    assert [int(item.id) for item in test] == sorted(int(item.id) for item in test)
    with pytest.raises(InputError, match="cannot be split"):
        split_items([item for item in items if item.group == "g0"])


def test_split_with_equal_prompts_across_groups_and_with_large_groups():
    chained = load_items([{"id": i, "prompt": f"p{i // 2}", "group": f"g{(i + 1) // 2}", "counts": {"a": 1, "b": 0}} for i in range(6)]
                         + [{"id": f"x{i}", "prompt": f"x{i}", "counts": {"a": 1, "b": 0}} for i in range(4)])
    for seed in range(20):
        sides = split_items(chained, seed=seed)
        assert sorted(len([item for item in side if item.id.isdigit()]) for side in sides) == [0, 6]
        distjudge.check_apart(*sides)
    for groups in (2, 3, 4, 10):
        equal = load_items([{"id": i, "prompt": f"p{i}", "group": f"g{i % groups}", "counts": {"a": 1, "b": 0}} for i in range(16 * groups)])
        train, test = split_items(equal)
        assert len(test) == 16 * max(1, round(0.2 * groups)) and len(train) + len(test) == 16 * groups


def test_train_and_test_must_be_apart():
    train = load_items([GOOD])
    distjudge.check_apart(train, load_items([GOOD | {"id": "b", "prompt": "Other?"}]))
    train = load_items([GOOD | {"group": "g"}])
    for row, field in ((GOOD | {"prompt": "Other?"}, "id"), (GOOD | {"id": "b"}, "prompt"), (GOOD | {"id": "b", "prompt": "Other?", "group": "g"}, "group")):
        with pytest.raises(InputError, match=rf"items\[0\]: item '{row['id']}': {field}: also in the training items, at items\[0\]"):
            distjudge.check_apart(train, load_items([row]))


def test_the_command_line_ends_in_one_line_and_exit_code_2(tmp_path):
    path = write(tmp_path / "votes.jsonl", [GOOD, {"id": "z", "prompt": "x", "counts": {"yes": -1, "no": 1}}])
    done = subprocess.run([sys.executable, ROOT / "recipes" / "tiny.py", "--train", path, "--out", tmp_path / "out"], capture_output=True, text=True)
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert done.stderr == f"error: {path}:2: item 'z': counts: votes for 'yes' are negative: -1\n"


PAIR = {"id": "x", "prompt": "a: hot b: cold", "counts": {"a": 3, "b": 1, "tie": 0}, "swap": {"prompt": "a: cold b: hot", "labels": {"a": "b", "b": "a"}}}


def test_pairs_know_their_other_order():
    item, other = distjudge.load_items([PAIR, {"prompt": "alone", "counts": {"a": 1, "b": 1, "tie": 0}}])
    assert item.swap == distjudge.Swap("a: cold b: hot", (1, 0, 2)) and item.prompts == ["a: hot b: cold", "a: cold b: hot"]
    assert other.swap is None and other.prompts == ["alone"]


@pytest.mark.parametrize(("swap", "message"), [
    ("a: cold b: hot", "items[0]: item 'x': swap: must be"),
    ({"labels": {"a": "b", "b": "a"}}, "items[0]: item 'x': swap: prompt: missing"),
    ({"prompt": " ", "labels": {}}, "items[0]: item 'x': swap: prompt: empty"),
    ({"prompt": "p", "labels": {"a": "c"}}, "items[0]: item 'x': swap: unknown label {c}"),
    ({"prompt": "p", "labels": {"a": "b"}}, "do not trade places"),
    ({"prompt": "p", "labels": {"a": "b", "b": "tie", "tie": "a"}}, "do not trade places"),
    ({"prompt": "p", "labels": {"a": [1]}}, "items[0]: item 'x': swap: labels: must be text"),
])
def test_broken_swaps(swap, message):
    with pytest.raises(InputError) as caught:
        distjudge.load_items([PAIR | {"swap": swap}])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_pair_and_its_other_order_stay_on_one_side():
    rows = [{"id": f"{n}{k}", "prompt": f"{n} {'ab'[k]}", "counts": {"a": 1, "b": 2}, "swap": {"prompt": f"{n} {'ba'[k]}", "labels": {"a": "b", "b": "a"}}}
            for n in range(20) for k in (0, 1)]
    train, test = distjudge.split_items(distjudge.load_items(rows))
    assert not {item.id[:-1] for item in train} & {item.id[:-1] for item in test}
    items = distjudge.load_items(rows)
    with pytest.raises(InputError, match="prompt: also in the training items"):
        distjudge.check_apart(items[:1], items[1:2])
