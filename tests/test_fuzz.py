"""Whatever the input is, it is used or refused in clear lines: never another exception, never half of it."""

import gzip
import json
import math
import os
import re

import distjudge
from distjudge import InputError, load_items

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e]")
examples, fixtures = int(os.environ.get("FUZZ_EXAMPLES", "50")), [HealthCheck.function_scoped_fixture]
quick = settings(max_examples=examples, deadline=None, suppress_health_check=fixtures)
odd = ["", " ", "a", "1", "1.0", "01", "\ud800", "\u202e1", "a\u0301", "\x00", "yes", "Yes", "yes "]
scalars = st.none() | st.booleans() | st.integers(-3, 9) | st.integers() | st.floats() | st.text(max_size=8)
scalars |= st.sampled_from([10**400, -0.0, 1e308]) | st.sampled_from(odd)
nest = lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4)  # noqa: E731
anything = st.recursive(scalars, nest, max_leaves=10)
labels = st.sampled_from(["1", "2", "3", "a", "b", "10", "1.0"])
shares = st.dictionaries(labels, st.floats(0, 1), max_size=3)
swap = {"prompt": st.text(max_size=5), "labels": st.dictionaries(labels, labels, max_size=3)}
likely = {  # what a row would hold, sometimes
    "prompt": st.text(min_size=1, max_size=12) | anything,
    "counts": st.dictionaries(labels, st.integers(0, 5) | scalars, max_size=4) | anything,
    "annotations": st.lists(labels | st.integers(1, 3), max_size=4) | anything,
    "distribution": shares | anything,
    "votes": scalars,
    "id": scalars,
    "group": scalars,
    "split": st.sampled_from(["train", "test"]) | scalars,
    "truth": shares | anything,
    "swap": st.fixed_dictionaries(swap) | anything,
}
right = {
    "prompt": st.text("abc ", min_size=1, max_size=6),
    "counts": st.dictionaries(labels, st.integers(0, 4), min_size=2, max_size=3),
}
beside = {name: values for name, values in likely.items() if name not in right}
row = st.fixed_dictionaries({}, optional=likely) | st.fixed_dictionaries(right, optional=beside)
rows = st.lists(row | anything, max_size=5)


def check_lines(error):
    lines = str(error).split("\n")
    assert lines and all(line.strip() and len(line) < 2000 for line in lines), lines
    assert not any(CONTROL.search(line) for line in lines), lines


def used_or_refused(*sources, **options):
    try:
        items = load_items(*sources, **options)
    except InputError as error:
        return check_lines(error)
    names = distjudge.labels_of(items)
    assert len(names) >= 2 and len({item.id for item in items}) == len(items)
    for item in items:
        assert item.prompt.strip() and item.votes > 0 and item.split in (None, "train", "test")
        assert all(math.isfinite(n) and n >= 0 for n in item.counts.values())
        assert item.truth is None or math.isclose(sum(item.truth.values()), 1, abs_tol=1e-9)
        back = item.swap and [item.swap.labels[i] for i in item.swap.labels]
        assert back is None or back == list(range(len(names)))
    assert distjudge.shares_of(items).sum(1).tolist() == pytest.approx([1] * len(items), abs=1e-9)
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
    parts = lambda items: items and [(i.id, i.prompt, i.counts) for i in items]  # noqa: E731
    assert parts(from_file) == parts(from_list)


LINE = b'{"prompt": "a", "counts": {"1": 1, "2": 0}}\n'
contents = st.binary(max_size=200) | st.text(max_size=100).map(lambda text: text.encode("utf-16"))
contents |= rows.map(lambda some: json.dumps(some, default=str).encode()[3:-2])
contents |= st.binary(max_size=5).map(lambda between: LINE + between + LINE)


@quick
@given(contents, st.sampled_from(["x.jsonl", "x.jsonl.gz"]))
def test_bytes_of_any_kind(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    used_or_refused(tmp_path / name)


cells = st.sampled_from(["1", "2", "", " ", "x", "1.5", "yes", "No", "\x00", "\u202e", "3 "])


def convert(tmp_path, table, **options):
    """The converter of a user's own table, on a text column and a rating column."""
    import prepare

    (tmp_path / "t.csv").write_text(table, encoding="utf-8")
    files = {"raw": (str(tmp_path / "t.csv"),), "out": str(tmp_path / "out")}
    prepare.main(prepare.PrepareConfig(task="own", text="text", split="none", **files, **options))


tables, scales = st.lists(st.lists(cells, max_size=5), max_size=6), [(), ("1-3",), ("yes", "no")]
pair = ("rating", "more")
columns = [({"label": pair[:1]}, 1), ({"label": pair}, 2), ({"counts": pair}, 6)]  # and votes a row, at most
named = [{}, {"item": "id"}, {"item": "id", "group": "more"}]
kinds = [st.sampled_from(some) for some in ([",", ";", "\t"], scales, columns, named)]


@quick
@given(tables, *kinds)
def test_tables_of_any_kind(tmp_path, table, separator, scale, votes, names):
    """A file of items that loads, or one clear refusal and nothing written."""
    for old in (tmp_path / "out").glob("*"):
        old.unlink()
    text = "\n".join(separator.join(row) for row in [["id", "text", "rating", "more"], *table])
    try:
        convert(tmp_path, text, labels=scale, **votes[0], **names)
    except InputError as error:
        check_lines(error)
        assert not list((tmp_path / "out").glob("*"))
    else:
        items = used_or_refused(tmp_path / "out" / "items.jsonl")
        assert items and sum(item.votes for item in items) <= votes[1] * len(table)


HOSTILE = ["tex\x14,v\nx,1\n", "text,\x01v,\x01v,v\nx,1,2,1\n", "text,v\nx,a\x02b\ny,A\x02b\n"]


@pytest.mark.parametrize("table", [*HOSTILE, 'text\tv\n"x"y\tz\n'])
def test_a_table_cannot_write_to_the_terminal(tmp_path, table):
    """Found by fuzzing: names and labels of a table were printed as they stand in it."""
    with pytest.raises(InputError) as caught:
        convert(tmp_path, table, label=("v",))
    assert not CONTROL.search(str(caught.value))
