"""Coverage-guided fuzzing (atheris) of what reads users' data: any input is used or refused with InputError, never anything else.

    pip install atheris                                                        # beside tests/requirements.txt
    python tests/fuzz_inputs.py items corpus/items -max_total_time=900        # load_items, from a file of bytes
    python tests/fuzz_inputs.py own corpus/own -max_total_time=900            # data/prepare.py own, from a table of bytes
    python tests/fuzz_inputs.py packs corpus/packs -max_total_time=900        # the pack builder, from any token lists

The folder keeps the inputs that reached new code; other options are libFuzzer's (-help=1 lists them). An input that fails is written
to crash-HASH in the working directory; it belongs, made small, into tests/test_fuzz.py or tests/test_bad_input.py.
"""
import contextlib
import io
import itertools
import sys
import tempfile
from pathlib import Path

import atheris

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[1] / "data")]
with atheris.instrument_imports(include=["distjudge", "prepare", "sources"]):
    import prepare

    import distjudge

import test_fuzz

FOLDER = Path(tempfile.mkdtemp())
ROW = b'{"id": "a", "prompt": "x", "counts": {"1": 1, "2": 0}}\n{"prompt": "y", "annotations": [1, "2"], "truth": {"1": 1}, "group": "g", "split": "test"}\n'
SEEDS = {"items": [ROW, b"\xef\xbb\xbf" + ROW, b'{"prompt": "z", "distribution": {"a": 0.5, "b": 0.5}, "votes": 2, "swap": {"prompt": "w", "labels": {"a": "b", "b": "a"}}}'],
         "own": [b"\0\0text,v,w\nx,1,yes\ny,2,no\n", b'\1\1text;v;w\n"a ""b""";3;{"1": 2, "2": 0}\n', b"\2\4" + b'{"text": "x", "v": 1, "w": {"a": 1, "b": 2}}\n'],
         "packs": [b"\x10\x01\x02\x03\xff\x01\x02\x04\xff\x05", bytes(range(40))]}


def items(data):
    path = FOLDER / "x.jsonl"
    path.write_bytes(data)
    found = test_fuzz.used_or_refused(path)
    if found is None:
        return
    try:
        train, test = distjudge.split_items(found)
        assert sorted(item.id for item in [*train, *test]) == sorted(item.id for item in found)
    except distjudge.InputError as error:
        test_fuzz.check_lines(error)


def own(data):
    kind, options, table = data[:1], data[1:2], data[2:]
    path, out = FOLDER / ("t.jsonl" if kind and kind[0] % 3 == 2 else "t.csv"), FOLDER / "out"
    path.write_bytes(table)
    for old in out.glob("*"):
        old.unlink()
    way = options[0] if options else 0
    config = prepare.PrepareConfig(
        task="own", raw=(str(path),), out=str(out), text="text", split="none", item="id" if way & 8 else None,
        label=() if way & 4 else (("v", "w") if way & 1 else ("v",)), counts=(("v", "w") if way & 1 else ("w",)) if way & 4 else (),
        labels=((), ("1-3",), ("yes", "no"))[(way >> 4) % 3], group="w" if way & 128 else None)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            prepare.main(config)
    except distjudge.InputError as error:
        assert not list(out.glob("*")), "half written"
        return test_fuzz.check_lines(error, 3000)  # it may list the columns
    found = distjudge.load_items(out / "items.jsonl")
    assert found and distjudge.labels_of(found)


def packs(data):
    limit, data = (data[0] if data else 0) + 1, data[1:]
    lists = [list(part) for part in data.split(b"\xff") if part][:40]
    if not lists:
        return
    branches = [(), (7,), (7, 8)] if limit % 3 == 0 else [()]
    made = distjudge.pack_prompts(lists, limit, branches, two_levels=limit % 2 == 0)
    assert sorted(member for pack in made for member in pack.members) == list(range(len(lists)))
    for pack in made:
        assert len(pack.ids) <= limit or len(pack.members) == 1
        assert len(pack.ids) == len(pack.positions) == len(pack.ends)
        wanted = [[*lists[member], *branch] for member in pack.members for branch in sorted(map(list, branches))]
        for path, tokens in zip(pack.paths, wanted, strict=True):
            assert [pack.ids[i] for i in path] == tokens and [pack.positions[i] for i in path] == list(range(len(tokens)))
            last = path[-1]
            assert [j for j in range(last + 1) if last < pack.ends[j]] == path  # it sees its own prompt, and nothing else
        table = pack.segments
        assert table[0][1] == 0 and table[-1][2] == len(pack.ids) and all(a[2] == b[1] for a, b in itertools.pairwise(table))


def main():
    name, rest = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("", [])
    if name not in SEEDS:
        sys.exit(__doc__)
    for folder in [Path(argument) for argument in rest if not argument.startswith("-")][:1]:
        folder.mkdir(parents=True, exist_ok=True)
        for k, seed in enumerate(SEEDS[name]):
            (folder / f"seed-{k}").write_bytes(seed)
    atheris.Setup([sys.argv[0], *rest], globals()[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
