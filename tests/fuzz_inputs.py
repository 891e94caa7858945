"""Coverage-guided fuzzing of what reads users' data: any input is used or refused with InputError.

    pip install atheris                                                   # beside tests/requirements.txt
    python tests/fuzz_inputs.py items corpus/items -max_total_time=900    # load_items, from a file of bytes
    python tests/fuzz_inputs.py own corpus/own -max_total_time=900        # data/prepare.py own, from a table
    python tests/fuzz_inputs.py packs corpus/packs -max_total_time=900    # the pack builder, from token lists

The folder keeps the inputs that reached new code; other options are libFuzzer's (-help=1 lists them). An
input that fails is written to crash-HASH in the working directory. Made small, it belongs into a test.
"""

import contextlib
import io
import sys
import tempfile
from pathlib import Path

import atheris

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
with atheris.instrument_imports(include=["distjudge", "prepare", "sources", "tables"]):
    import distjudge

    import prepare

import test_fuzz

FOLDER = Path(tempfile.mkdtemp())
ROW = b'{"id": "a", "prompt": "x", "counts": {"1": 1, "2": 0}}\n'
PERSON = b'{"prompt": "y", "annotations": [1, "2"], "truth": {"1": 1}, "group": "g", "split": "test"}\n'
SHARES = b'{"prompt": "z", "distribution": {"a": 0.5, "b": 0.5}, "votes": 2'
SWAP = b', "swap": {"prompt": "w", "labels": {"a": "b", "b": "a"}}}'
TABLES = [b"\0\0text,v,w\nx,1,yes\ny,2,no\n", b'\1\1text;v;w\n"a ""b""";3;{"1": 2, "2": 0}\n']
TABLES.append(b'\2\4{"text": "x", "v": 1, "w": {"a": 1, "b": 2}}\n')


def items(data):
    path = FOLDER / "x.jsonl"
    path.write_bytes(data)
    if found := test_fuzz.used_or_refused(path):
        try:
            train, test = distjudge.split_items(found)
            assert sorted(item.id for item in [*train, *test]) == sorted(item.id for item in found)
        except distjudge.InputError as error:
            test_fuzz.check_lines(error)


def own(data):
    """The first two bytes are the kind of file and the flags, the rest is the table."""
    kind, way = ((value[0] if value else 0) for value in (data[:1], data[1:2]))
    path, out = FOLDER / ("t.jsonl" if kind % 3 == 2 else "t.csv"), FOLDER / "out"
    path.write_bytes(data[2:])
    for old in out.glob("*"):
        old.unlink()
    columns = ("v", "w") if way & 1 else ("w" if way & 4 else "v",)
    labels = ((), ("1-3",), ("yes", "no"))[(way >> 4) % 3]
    votes = {"counts" if way & 4 else "label": columns, "labels": labels}
    names = {"text": "text", "item": "id" if way & 8 else None, "group": "w" if way & 128 else None}
    config = prepare.PrepareConfig(task="own", raw=(str(path),), out=str(out), split="none", **votes, **names)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            prepare.main(config)
    except distjudge.InputError as error:
        assert not list(out.glob("*")), "half written"
        return test_fuzz.check_lines(error, 3000)  # it may list the columns
    assert distjudge.labels_of(distjudge.load_items(out / "items.jsonl"))


def packs(data):
    limit, lists = (data[0] if data else 0) + 1, [list(part) for part in data[1:].split(b"\xff") if part][:40]
    branches = [(), (7,), (7, 8)] if limit % 3 == 0 else [()]
    made = distjudge.pack_prompts(lists, limit, branches, two_levels=limit % 2 == 0)
    assert sorted(member for pack in made for member in pack.members) == list(range(len(lists)))
    for pack in made:
        assert len(pack.ids) <= limit or len(pack.members) == 1
        assert len(pack.ids) == len(pack.positions) == len(pack.ends)
        wanted = [[*lists[member], *branch] for member in pack.members for branch in branches]
        for path, tokens in zip(pack.paths, wanted, strict=True):
            assert [pack.ids[i] for i in path] == tokens
            assert [pack.positions[i] for i in path] == list(range(len(tokens)))
            last = path[-1]  # sees its own prompt, and nothing else
            assert [j for j in range(last + 1) if last < pack.ends[j]] == path


SEEDS = {items: [ROW + PERSON, b"\xef\xbb\xbf" + ROW + PERSON, SHARES + SWAP], own: TABLES}
SEEDS[packs] = [b"\x10\x01\x02\x03\xff\x01\x02\x04\xff\x05", bytes(range(40))]


def main():
    targets, (name, *rest) = {target.__name__: target for target in SEEDS}, sys.argv[1:] or [""]
    if name not in targets:
        sys.exit(__doc__)
    for folder in [Path(argument) for argument in rest if not argument.startswith("-")][:1]:
        folder.mkdir(parents=True, exist_ok=True)
        for k, seed in enumerate(SEEDS[targets[name]]):
            (folder / f"seed-{k}").write_bytes(seed)
    atheris.Setup([sys.argv[0], *rest], targets[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
