"""load_items: every accepted form, every refusal; splitting and keeping train and test apart."""

import gzip
import json

import distjudge
from distjudge import InputError, labels_of, load_items, split_items

import pytest
from conftest import write_rows

GOOD = {"id": "a", "prompt": "Is it?", "counts": {"yes": 3, "no": 2}}
ONE = {"a": 1, "b": 0}


def refusal(rows, tmp_path, **options):
    with pytest.raises(InputError) as error:
        load_items(write_rows(tmp_path / "votes.jsonl", rows), **options)
    return str(error.value)


def test_a_line_of_json_lines_is_a_row_whatever_else_it_holds(tmp_path):
    row = {"prompt": "soup", "counts": {"a": 1, "b": 2}, "items": [{"x": 1}], "data": [{"y": 2}]}
    for name in ("one.jsonl", "one.jsonl.gz"):
        text = json.dumps(row).encode()
        (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
        assert [item.counts for item in load_items(tmp_path / name)] == [{"a": 1, "b": 2}]


# --- what is taken ----------------------------------------------------------------------------------------
def test_counts_annotations_and_distribution_are_the_same_votes(tmp_path):
    rows = [
        GOOD,
        {"id": "b", "prompt": "Or?", "annotations": ["no", "yes", "no", "yes", "yes"]},
        {"id": "c", "prompt": "And?", "distribution": {"no": 0.4, "yes": 0.6}, "votes": 5},
    ]
    items = load_items(write_rows(tmp_path / "v.jsonl", rows))
    assert [list(item.counts.items()) for item in items] == [[("yes", 3), ("no", 2)]] * 3
    assert [item.votes for item in items] == [5] * 3
    assert distjudge.shares_of(items)[0].tolist() == [0.6, 0.4]
    assert items[1].where == f"{tmp_path / 'v.jsonl'}:2"


def test_rounded_shares_become_whole_votes_and_weighted_panels_stay_fractional():
    rounded = {"prompt": "x", "distribution": {"a": 0.333, "b": 0.667}, "votes": 3}
    weighted = {"prompt": "y", "distribution": {"a": 0.45, "b": 0.55}, "votes": 2}
    thirds, weighted = load_items([rounded, weighted])
    assert thirds.counts == {"a": 1, "b": 2}
    assert weighted.counts == pytest.approx({"a": 0.9, "b": 1.1}) and weighted.votes == pytest.approx(2)


@pytest.mark.parametrize(
    ("votes", "labels"),
    [
        ([{"10": 1, "9": 0, "-1": 2, "2": 0}], ["-1", "2", "9", "10"]),  # numbers by value
        ([{"tie": 1, "b": 0, "a": 2}, {"a": 5, "b": 2, "tie": 0}], ["tie", "b", "a"]),  # as first given
        ([[3, 1], ["2"]], ["1", "2", "3"]),
        ([["tie", "b"], ["a"]], ["a", "b", "tie"]),  # annotations alone: by the alphabet
    ],
)
def test_the_order_of_labels(votes, labels):
    kind = "counts" if isinstance(votes[0], dict) else "annotations"
    assert labels_of(load_items([{"prompt": f"{i}", kind: one} for i, one in enumerate(votes)])) == labels


def test_label_order_is_that_of_the_labels_named():
    rows = [{"prompt": "x", "counts": {"a": 2}}, {"prompt": "y", "counts": {"tie": 2, "b": 1}}]
    named = [list(item.counts.items()) for item in load_items(rows, labels=["b", "tie", "a"])]
    assert named == [[("b", 0), ("tie", 0), ("a", 2)], [("b", 1), ("tie", 2), ("a", 0)]]


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
    same = datasets.Dataset.from_list([row | {"id": str(row["id"])} for row in rows])
    for source in (rows, pandas.DataFrame(rows), same):
        found = [(item.id, item.group, item.counts) for item in load_items(source)]
        assert found == [("a", None, {"yes": 3, "no": 2}), ("2", "g", {"yes": 3, "no": 2})]
    lists = pandas.DataFrame({"prompt": ["x", "y"], "annotations": [[1, 2], [2, 2]]})
    assert [item.counts for item in load_items(lists)] == [{"1": 1, "2": 1}, {"1": 0, "2": 2}]
    arrays = datasets.Dataset.from_list([{"prompt": "x", "annotations": ["p", "q"]}]).with_format("numpy")
    assert load_items(arrays)[0].counts == {"p": 1, "q": 1}


def test_ids_default_to_a_hash_of_the_prompt():
    first, second = load_items([{"prompt": "x", "counts": ONE}, {"prompt": "y", "counts": ONE}])
    (again,) = load_items([{"prompt": "x", "counts": {"a": 0, "b": 2}}])
    assert first.id == again.id != second.id


def test_pairs_know_their_other_order():
    item, other = load_items([PAIR, {"prompt": "alone", "counts": {"a": 1, "b": 1, "tie": 0}}])
    assert item.swap == distjudge.Swap("a: cold b: hot", (1, 0, 2))
    assert item.prompts == ["a: hot b: cold", "a: cold b: hot"]
    assert other.swap is None and other.prompts == ["alone"]


# --- what is refused --------------------------------------------------------------------------------------
SWAP = {"prompt": "a: cold b: hot", "labels": {"a": "b", "b": "a"}}
PAIR = {"id": "z", "prompt": "a: hot b: cold", "counts": {"a": 3, "b": 1, "tie": 0}, "swap": SWAP}
ZEROS = "0" * 400
TEXT = [  # a line that is no row
    ('{"id": "z", "prompt": "x", "counts"', "broken JSON"),
    ('{"prompt": "a"}' * 2, "broken JSON: Extra data"),
    ("id,prompt", "broken JSON"),
    ("[" * 100_000, "broken JSON"),
    ('{"prompt": "x", "counts": {"yes": ' + "9" * 5000 + "}}", "broken JSON"),
    ("[1, 2]", "not a JSON object but list"),
    ("null", "not a JSON object but NoneType"),
    ('{"id": "z", "prompt": "x", "counts": {"yes": 1, "yes": 2}}', "'yes' stands twice"),
    ('{"id": "z", "prompt": "x", "prompt": "y"}', "'prompt' stands twice"),
]
FIELDS = [  # a field of a row in the place of the right one, what the refusal names, and its words
    ({"prompt": None}, "prompt", "missing"),
    ({"prompt": "  "}, "prompt", "empty"),
    ({"prompt": ["x"]}, "prompt", "not text but list"),
    ({"prompt": "\ud800"}, "prompt", "lone surrogate"),
    ({"counts": None}, "counts", "found none"),
    ({"annotations": ["yes"]}, "counts", "found counts and annotations"),
    ({"counts": [1, 2]}, "counts", "must be an object"),
    ({"counts": {}}, "counts", "must be an object"),
    ({"counts": {"yes": -1, "no": 3}}, "counts", "'yes' must be a whole number from 0 to a billion, not -1"),
    ({"counts": {"yes": 1.5, "no": 3}}, "counts", "must be a whole number from 0 to a billion, not 1.5"),
    ({"counts": {"yes": float("nan"), "no": 1}}, "counts", "whole number from 0 to a billion, not nan"),
    ({"counts": {"yes": 10**400, "no": 1}}, "counts", f"not 1{ZEROS[:50]}"),
    ({"counts": {"yes": "3", "no": 1}}, "counts", "must be a whole number from 0 to a billion, not '3'"),
    ({"counts": {"yes": True, "no": 1}}, "counts", "must be a whole number from 0 to a billion, not True"),
    ({"counts": {"yes": 0, "no": 0}}, "counts", "no votes at all"),
    ({"counts": {"yes ": 1, "no": 0}}, "counts", "without spaces around it"),
    ({"counts": {"Yes": 1, "no": 0}}, "counts", "differ from {yes, no}"),
    ({"counts": {"yes": 1}}, "counts", "differ from {yes, no}"),
    ({"counts": None, "annotations": ["maybe"]}, "annotations", "unknown label {maybe}"),
    ({"counts": None, "annotations": []}, "annotations", "list of one label or more"),
    ({"counts": None, "annotations": [1.5]}, "annotations", "not 1.5"),
    ({"counts": None, "annotations": ["yes", [2]]}, "annotations", "must be text"),
    ({"counts": None, "distribution": {"yes": 0.5, "no": 0.5}}, "votes", "the number of people"),
    ({"counts": None, "distribution": {"yes": 0.9}, "votes": 3}, "distribution", "add up to 1, not to 0.9"),
    ({"counts": None, "distribution": {"yes": 1.5, "no": -0.5}, "votes": 3}, "distribution", "0 or more"),
    ({"counts": None, "distribution": {"yes": 1}, "votes": 2.5}, "votes", "not 2.5"),
    ({"counts": None, "distribution": {"yes": 1}, "votes": 0}, "votes", "not 0"),
    ({"truth": {"yes": 0.1, "no": 0.1}}, "truth", "add up to 1"),
    ({"truth": {"perhaps": 1}}, "truth", "unknown label {perhaps}"),
    ({"split": "dev"}, "split", "train or test"),
    ({"group": {"a": 1}}, "group", "must be text"),
    ({"id": ["z"]}, "id", "must be text"),
    ({"id": "a"}, "id", "duplicate, first at"),
]
SWAPS = [
    ("a: cold b: hot", "must be"),
    (SWAP | {"prompt": None}, "prompt: missing"),
    (SWAP | {"prompt": " "}, "empty"),
    (SWAP | {"labels": {"a": "c"}}, "unknown label {c}"),
    (SWAP | {"labels": {"a": "b"}}, "do not trade places"),
    (SWAP | {"labels": {"a": "b", "b": "tie", "tie": "a"}}, "do not trade places"),
    (SWAP | {"labels": {"a": [1]}}, "must be text"),
]


@pytest.mark.parametrize(("line", "words"), TEXT)
def test_a_line_that_is_no_row_is_named(line, words, tmp_path):
    message = refusal([GOOD, line], tmp_path)
    assert message.startswith(f"{tmp_path / 'votes.jsonl'}:2: ") and "\n" not in message and words in message


FIELDS += [({"swap": swap}, "swap", words) for swap, words in SWAPS]


@pytest.mark.parametrize(("change", "field", "words"), FIELDS)
def test_a_bad_field_is_named(change, field, words, tmp_path):
    first, row = (PAIR | {"id": "a"}, PAIR) if field == "swap" else (GOOD, GOOD | {"id": "z", "prompt": "x"})
    message = refusal([first, row | change], tmp_path)
    name = change.get("id", "z")
    head = f"{tmp_path / 'votes.jsonl'}:2: " + (f"item '{name}': " if isinstance(name, str) else "")
    assert message.startswith(f"{head}{field}: ") and words in message and "\n" not in message


def test_what_is_wrong_with_all_of_it(tmp_path):
    assert "two labels or more" in refusal([{"prompt": "x", "counts": {"a": 1}}], tmp_path)
    assert "two labels or more" in refusal([{"prompt": "x", "annotations": [1, 1]}], tmp_path)
    assert "two spellings" in refusal([{"prompt": "x", "counts": {"1": 1, "1.0": 2}}], tmp_path)
    assert "two spellings" in refusal([{"prompt": "x", "counts": {"1": 1, "01": 1}}], tmp_path)
    assert "differ only in capitals" in refusal([{"prompt": "x", "counts": {"a": 1, "A": 1}}], tmp_path)
    assert "no items" in refusal([""], tmp_path)
    with pytest.raises(InputError, match="expected paths"):
        load_items(7)
    with pytest.raises(InputError, match="names a label twice"):
        load_items([GOOD], labels=["yes", "yes", "no"])


def test_every_problem_is_listed_twenty_at_most(tmp_path):
    bad = [{"id": f"b{i}", "prompt": "", "counts": {"yes": -1, "no": 0}} for i in range(3)]
    lines = refusal([GOOD, *bad], tmp_path).splitlines()
    assert lines[0].endswith("votes.jsonl:2: item 'b0': prompt: empty")
    assert len(lines) == 6 and "counts: " in lines[1]
    lines = refusal([GOOD, *[row | {"id": f"c{i}"} for i, row in enumerate(bad * 10)]], tmp_path).splitlines()
    assert len(lines) == 21 and lines[-1].endswith("and 40 more problems")
    # an odd minority is to blame, and named, wherever it stands
    mixed = [{"id": f"d{i}", "prompt": "", "counts": {"yes": 1, "no": 1}} for i in range(15)]
    mixed += [{"id": f"e{i}", "prompt": f"{i}", "counts": {"yes": 1, "maybe": 1}} for i in range(15)]
    lines = refusal([*mixed, *(GOOD | {"id": f"f{i}"} for i in range(20))], tmp_path).splitlines()
    assert lines[-1].endswith("and 10 more problems")
    assert len(lines) == 21 and "differ from {yes, no}" in lines[15]
    again = {"id": "a", "prompt": "", "counts": {"yes": 1, "no": 0}}
    assert refusal([GOOD, again], tmp_path).count("duplicate") == 1
    assert "\n" not in refusal([GOOD | {"id": "two\nlines", "prompt": ""}], tmp_path)


# --- splitting, and keeping apart -------------------------------------------------------------------------
def test_split_by_group_is_seeded_and_keeps_groups_and_equal_prompts_whole():
    rows = [{"id": i, "prompt": f"p{i % 90}", "counts": ONE} for i in range(100)]
    items = load_items([row | ({"group": f"g{i // 4}"} if i < 40 else {}) for i, row in enumerate(rows)])
    train, test = split_items(items, seed=3)
    assert split_items(items, seed=3) == (train, test) != split_items(items, seed=4)
    assert len(train) + len(test) == 100 and abs(len(test) - 20) <= 2
    assert {item.id for item in train} | {item.id for item in test} == {str(i) for i in range(100)}
    assert not {item.group for item in train if item.group} & {item.group for item in test}
    assert not {item.prompt for item in train} & {item.prompt for item in test}
    assert [int(item.id) for item in test] == sorted(int(item.id) for item in test)
    with pytest.raises(InputError, match="cannot be split"):
        split_items([item for item in items if item.group == "g0"])


def test_split_with_equal_prompts_across_groups_and_with_large_groups():
    rows = [{"id": i, "prompt": f"p{i // 2}", "group": f"g{(i + 1) // 2}", "counts": ONE} for i in range(6)]
    chained = load_items(rows + [{"id": f"x{i}", "prompt": f"x{i}", "counts": ONE} for i in range(4)])
    for seed in range(20):
        sides = split_items(chained, seed=seed)
        assert sorted(sum(item.id.isdigit() for item in side) for side in sides) == [0, 6]
        distjudge.keep_apart(*sides)
    for n in (2, 3, 4, 10):
        rows = [{"id": i, "prompt": f"p{i}", "group": f"g{i % n}", "counts": ONE} for i in range(16 * n)]
        train, test = split_items(load_items(rows))
        assert len(test) == 16 * max(1, round(0.2 * n)) and len(train) + len(test) == 16 * n
    rows = [{"id": i, "prompt": f"p{i}", "group": f"g{i < 11}", "counts": ONE} for i in range(27)]
    assert len(split_items(load_items(rows))[1]) == 11  # no group brings the test side nearer: the smallest


def test_a_pair_and_its_other_order_stay_on_one_side():
    swap = lambda n, k: {"prompt": f"{n} {'ba'[k]}", "labels": {"a": "b", "b": "a"}}  # noqa: E731
    names = [(f"{n}{k}", f"{n} {'ab'[k]}", swap(n, k)) for n in range(20) for k in (0, 1)]
    rows = [dict(zip(("id", "prompt", "swap"), name, strict=True)) for name in names]
    items = load_items([row | {"counts": {"a": 1, "b": 2}} for row in rows])
    train, test = split_items(items)
    assert not {item.id[:-1] for item in train} & {item.id[:-1] for item in test}
    with pytest.raises(InputError, match="prompt: also in the training items"):
        distjudge.keep_apart(items[:1], items[1:2])


def test_a_single_prompt_is_kept_from_a_pair_that_shows_it_in_its_other_order():
    pair, (alone,) = load_items([PAIR]), load_items([{"prompt": SWAP["prompt"], "counts": ONE}])
    for train, test in ((pair, [alone]), ([alone], pair)):
        assert distjudge.keep_apart(train, test, "remove") == ([], {"prompt": 1, "group": 0, "id": 0})


@pytest.mark.parametrize("field", ["id", "prompt", "group"])
def test_train_and_test_must_be_apart(field):
    train = load_items([GOOD | {"group": "g"}])
    other = {"id": "b", "prompt": "Other?", "counts": GOOD["counts"]}
    distjudge.keep_apart(train, load_items([other]))
    same = load_items([other | {field: getattr(train[0], field)}])
    where = rf"items\[0\]: item '{same[0].id}': {field}: also in the training items, at items\[0\]"
    with pytest.raises(InputError, match=where):
        distjudge.keep_apart(train, same)
