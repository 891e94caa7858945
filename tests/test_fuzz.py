"""Whatever the input is, it is used or refused in clear lines: never another exception, never half of it."""
import gzip
import json
import math
import os
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import distjudge
from distjudge import InputError, load_items

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e]")
quick = settings(max_examples=int(os.environ.get("FUZZ_EXAMPLES", "50")), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

scalars = st.one_of(st.none(), st.booleans(), st.integers(-3, 9), st.integers(), st.floats(), st.sampled_from([10**400, -0.0, 1e308]),
                    st.text(max_size=8), st.sampled_from(["", " ", "a", "1", "1.0", "01", "\ud800", "\u202e1", "a\u0301", "\x00", "yes", "Yes", "yes "]))
anything = st.recursive(scalars, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=4), inner, max_size=4)), max_leaves=10)
labels = st.sampled_from(["1", "2", "3", "a", "b", "10", "1.0"])
likely = {  # what a row would hold, sometimes
    "prompt": st.one_of(st.text(min_size=1, max_size=12), anything),
    "counts": st.one_of(st.dictionaries(labels, st.one_of(st.integers(0, 5), scalars), max_size=4), anything),
    "annotations": st.one_of(st.lists(st.one_of(labels, st.integers(1, 3)), max_size=4), anything),
    "distribution": st.one_of(st.dictionaries(labels, st.floats(0, 1), max_size=3), anything), "votes": scalars, "id": scalars, "group": scalars,
    "split": st.one_of(st.sampled_from(["train", "test"]), scalars), "truth": st.one_of(st.dictionaries(labels, st.floats(0, 1), max_size=3), anything),
    "swap": st.one_of(st.fixed_dictionaries({"prompt": st.text(max_size=5), "labels": st.dictionaries(labels, labels, max_size=3)}), anything)}
rows = st.lists(st.one_of(st.fixed_dictionaries({}, optional=likely),
                          st.fixed_dictionaries({"prompt": st.text("abc ", min_size=1, max_size=6), "counts": st.dictionaries(labels, st.integers(0, 4), min_size=2, max_size=3)},
                                                optional={k: v for k, v in likely.items() if k not in ('prompt', 'counts')}), anything), max_size=5)


def check_lines(error, longest=2000):
    lines = str(error).split("\n")
    assert lines and all(line.strip() and len(line) < longest and not CONTROL.search(line) for line in lines), lines


def used_or_refused(*sources, **options):
    try:
        items = load_items(*sources, **options)
    except InputError as error:
        return check_lines(error)
    names = distjudge.labels_of(items)
    assert len(names) >= 2 and len({item.id for item in items}) == len(items)
    for item in items:
        assert item.prompt.strip() and item.votes > 0 and all(math.isfinite(n) and n >= 0 for n in item.counts.values())
        assert math.isclose(sum(item.distribution), 1, abs_tol=1e-9) and item.split in (None, "train", "test")
        assert item.truth is None or math.isclose(sum(item.truth.values()), 1, abs_tol=1e-9)
        assert item.swap is None or [item.swap.labels[i] for i in item.swap.labels] == list(range(len(names)))
    distjudge.counts_of(items)
    return items


@quick
@given(rows)
def test_rows_of_any_kind(some):
    used_or_refused(some)


@quick
@given(rows, st.sampled_from(["\n", "\r\n", "\n\n", " \n"]), st.booleans(), st.booleans())
def test_files_of_rows(tmp_path, some, end, bom, zipped):
    """Through a file nothing is lost or added: the same items, or a refusal, as from the list."""
    path = tmp_path / ("x.jsonl.gz" if zipped else "x.jsonl")
    try:
        text = end.join(json.dumps(row) for row in some)
        same = [json.loads(json.dumps(row)) for row in some]
    except ValueError:
        return
    content = (b"\xef\xbb\xbf" if bom else b"") + text.encode()
    path.write_bytes(gzip.compress(content) if zipped else content)
    from_file, from_list = used_or_refused(path), used_or_refused(same)
    assert (from_file is None) == (from_list is None)
    assert from_file is None or [(i.id, i.prompt, i.counts) for i in from_file] == [(i.id, i.prompt, i.counts) for i in from_list]


@quick
@given(st.one_of(st.binary(max_size=200), st.text(max_size=100).map(lambda t: t.encode("utf-16")),
                 rows.map(lambda some: json.dumps(some, default=str).encode()[3:-2]),
                 st.tuples(st.binary(max_size=5), st.sampled_from([b'{"prompt": "a", "counts": {"1": 1, "2": 0}}\n'])).map(lambda ab: ab[1] + ab[0] + ab[1])),
       st.sampled_from(["x.jsonl", "x.jsonl.gz"]))
def test_bytes_of_any_kind(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    used_or_refused(tmp_path / name)


@quick
@given(st.lists(st.lists(st.sampled_from(["1", "2", "", " ", "x", "1.5", "yes", "No", "\x00", "\u202e", "3 "]), min_size=0, max_size=5), max_size=6),
       st.sampled_from([",", ";", "\t"]), st.sampled_from([(), ("1-3",), ("yes", "no")]), st.booleans())
def test_tables_of_any_kind(tmp_path, table, separator, scale, by_item):
    """The converter of a user's own table: a file of items that loads, or one clear refusal and nothing written."""
    import prepare

    path, out = tmp_path / "t.csv", tmp_path / "out"
    for old in out.glob("*"):
        old.unlink()
    path.write_text("\n".join(separator.join(row) for row in [["id", "text", "rating"], *table]), encoding="utf-8")
    config = prepare.PrepareConfig(task="own", out=str(out), raw=(str(path),), text="text", label=("rating",), item="id" if by_item else None,
                                   labels=scale, split="none")
    try:
        prepare.main(config)
    except InputError as error:
        assert str(error).strip() and not list(out.glob("*"))
    else:
        items = used_or_refused(out / "items.jsonl")
        assert items and sum(item.votes for item in items) <= len(table)


@pytest.mark.parametrize("content", [
    b'{"prompt": "a", "counts": {"1": 1, "2": 0}}' * 2, b"[1, 2]\n", b"null\n", b'"text"\n', b"{" * 100_000, b'{"prompt": "a", "counts": {"1": 1e999, "2": 0}}',
    b'{"prompt": "a", "counts": {"1": 1, "1": 2}}', b'{"prompt": "a", "counts": {"1": NaN, "2": 1}}', b"\xff\xfe{\x00}\x00", b"\x00" * 50, b'{"prompt": "a"',
    b'{"prompt": "\\ud800", "counts": {"1": 1, "2": 1}}', b'{"prompt": "a", "counts": {"a": 1, "A": 1, "a ": 2}}', b'{"prompt": "a", "counts": []}',
    b'{"prompt": "a", "counts": {"1": 123456789012345678901234567890, "2": 0}}', b'{"prompt": ["a"], "counts": {"1": 1, "2": 1}}', b"id,prompt\n1,a\n",
    b'{"prompt": "a", "counts": {"1": "1", "2": "0"}}', b'{"prompt": "a", "counts": {"1": 1, "01": 1}}', b'{"prompt": "a", "votes": 3, "distribution": {"1": 0.5, "2": 0.2}}',
    b'{"prompt": "a", "counts": {"1": true, "2": false}}', b'{"prompt": "a", "counts": {"1": -1, "2": 2}}', b'{"prompt": "a", "counts": {"1": 0.5, "2": 2}}',
    b'{"prompt": "a", "counts": {"1": 0, "2": 0}}', b'{"prompt": "a", "annotations": []}', b'{"prompt": "a", "annotations": [1, [2]]}', b'{"prompt": "", "annotations": [1, 2]}',
    b'{"prompt": "a", "annotations": [1, 2], "counts": {"1": 1, "2": 1}}', b'{"prompt": "a", "annotations": [1, 1]}', b"", b"\n\n \n",
    b'{"id": 1, "prompt": "a", "annotations": [1, 2]}\n{"id": "1", "prompt": "b", "annotations": [1, 2]}', b'{"prompt": "a", "annotations": [1, 2], "split": "dev"}',
    b'{"prompt": "a", "annotations": [1, 2], "truth": {"1": 0.9, "2": 0.3}}', b'{"prompt": "a", "annotations": [1, 2], "truth": {"9": 1.0}}',
    b'{"prompt": "a", "annotations": [1, 2], "group": {"a": 1}}', b'{"prompt": "a", "counts": {"": 1, "2": 1}}', b'{"prompt": "a", "counts": {" 1": 1, "2": 1}}',
    b'{"prompt": "a", "counts": {"1": 2000000000, "2": 1}}', b'{"prompt": "a", "distribution": {"1": 0.5, "2": 0.5}}', b'{"prompt": "a", "distribution": {"1": 0.5, "2": 0.5}, "votes": 0}',
    b'{"prompt": "a", "distribution": {"1": 0.5, "2": 0.5}, "votes": 2.5}', b'{"prompt": "a", "distribution": {"1": -0.5, "2": 1.5}, "votes": 2}', b'{"counts": {"1": 1, "2": 1}}',
    b'{"prompt": "a", "counts": {"1": 1, "2": 1}}\n{"prompt": "b", "counts": {"1": 1, "3": 1}}', b'{"prompt": "a", "counts": {"1": 1}}',
])
def test_files_that_are_refused(tmp_path, content):
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_items(path)
    assert str(path) in str(caught.value) and not any(CONTROL.search(line) for line in str(caught.value).split("\n"))


@pytest.mark.parametrize("table", [  # found by tests/fuzz_inputs.py: names and labels of a table were printed as they stand in it
    "tex\x14,v\nx,1\n", "text,\x01v,\x01v,v\nx,1,2,1\n", "text,v\nx,a\x02b\ny,A\x02b\n", 'text\tv\n"x"y\tz\n',
])
def test_a_table_cannot_write_to_the_terminal(tmp_path, table):
    import prepare

    (tmp_path / "t.csv").write_text(table, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        prepare.main(prepare.PrepareConfig(task="own", out=str(tmp_path / "out"), raw=(str(tmp_path / "t.csv"),), text="text", label=("v",), split="none"))
    assert not CONTROL.search(str(caught.value))
