"""recipes/judge_ray.py, in an environment with Ray: the answers of recipes/judge.py, whoever dies."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import distjudge

import pytest

pytest.importorskip("ray", reason="needs Ray: pip install 'ray[data]'")
import psutil
import pyarrow
import pyarrow.parquet
from conftest import write_rows

pytestmark = pytest.mark.slow
RECIPES = Path(__file__).resolve().parents[1] / "recipes"


@pytest.fixture(scope="module")
def run_folder(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ray") / "run"
    distjudge.save_judge(distjudge.load_judge(tiny_model, ["a", "b", "tie"], max_length=80), folder)
    return folder


@pytest.fixture
def start(run_folder, tmp_path):
    """A function that starts a recipe on a file of items."""

    def run(recipe, items, out, *arguments):
        command = [sys.executable, RECIPES / recipe, "--run", run_folder, "--items", items, "--out", out]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        settings = {"cwd": tmp_path, "stderr": subprocess.PIPE, "text": True, "env": environment}
        return subprocess.Popen([*command, *map(str, arguments)], **settings)

    return run


def rows(n):
    swap = {"swap": {"prompt": "Second or first?", "labels": {"a": "b", "b": "a"}}}
    soups = [f"Is soup {i} fine? " + "good " * (i % 7) for i in range(n)]
    some = [{"id": f"i{i}", "prompt": soup, "note": {"n": i}} for i, soup in enumerate(soups)]
    return [row | (swap if i % 5 == 0 else {}) for i, row in enumerate(some)]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_same(found, expected):
    assert [row["id"] for row in found] == [row["id"] for row in expected]
    for row, other in zip(found, expected, strict=True):
        assert row["predicted"] == pytest.approx(other["predicted"], abs=1e-5)
        assert row["key"] == other["key"] and row.get("flipped") == other.get("flipped")


def test_a_killed_worker_costs_no_row_and_doubles_none(start, tmp_path):
    write_rows(tmp_path / "in.jsonl", rows(1500))
    part, killed = tmp_path / "out.jsonl.part", None
    running = start("judge_ray.py", "in.jsonl", "out.jsonl", "--judges", 2, "--batch_size", 4, "--blocks", 8)
    while running.poll() is None and killed is None:
        time.sleep(0.02)
        if part.exists() and part.stat().st_size:  # some rows are written
            children = psutil.Process(running.pid).children(recursive=True)
            killed = next(child for child in children if child.name().startswith("ray::MapWorker"))
            killed.kill()
    said = running.communicate()[1]
    assert killed and running.returncode == 0, said[-3000:]
    found, here = read(tmp_path / "out.jsonl"), start("judge.py", "in.jsonl", "here.jsonl")
    assert [row["note"]["n"] for row in found] == list(range(1500))
    assert "judged 1500 items with 2 judges" in said
    assert here.wait() == 0 and not part.exists()
    assert_same(found, read(tmp_path / "here.jsonl"))


def test_parquet_in_and_out_and_bad_rows(start, tmp_path):
    some = rows(20)
    write_rows(tmp_path / "in.jsonl", some)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(some), tmp_path / "in.parquet")
    here = start("judge.py", "in.jsonl", "here.jsonl")
    running = start("judge_ray.py", "in.parquet", "out.parquet", "--batch_size", 6)
    assert here.wait() == 0 and running.wait() == 0, running.stderr.read()[-3000:]
    expected = read(tmp_path / "here.jsonl")
    found = pyarrow.parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert_same(found, expected)
    assert [row["low_mass"] for row in found] == [row.get("low_mass", False) for row in expected]
    assert json.loads(found[3]["fields"]) == {"note": {"n": 3}}
    bad = {
        '{"id": "odd", "prompt": 5}': "item 'odd': prompt: not text but int",
        "{broken": "broken JSON",
        '{"prompt": "x", "prompt": "y"}': "stands twice",
        "[1]": "not a JSON object",
        json.dumps({"prompt": "soup " * 99}): "more than the judge's max_length 80",
    }
    write_rows(tmp_path / "bad.jsonl", [*some[:2], "  ", *bad])
    running = start("judge_ray.py", "bad.jsonl", "bad.out.jsonl")
    said = running.communicate()[1]
    assert running.returncode == 2 and f"bad.jsonl: '{next(iter(bad))}': {next(iter(bad.values()))}" in said
    assert not (tmp_path / "bad.out.jsonl").exists() and not (tmp_path / "bad.out.jsonl.part").exists()
    running = start("judge_ray.py", "bad.jsonl", "bad.out.jsonl", "--skip_bad")
    said = running.communicate()[1]
    assert running.returncode == 0 and "skipped 5 bad rows" in said
    assert all(words in said for words in bad.values())
    assert_same(read(tmp_path / "bad.out.jsonl"), expected[:2])
