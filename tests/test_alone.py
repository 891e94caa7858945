"""distjudge.py copied alone into an empty folder needs torch, transformers, peft and what they need."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ABSENT = ["tyro", "matplotlib", "datasets", "trl", "unsloth", "bitsandbytes", "scipy", "pandas"]
SCRIPT = """
import importlib.util, sys

for absent in sys.argv[2:]:
    assert importlib.util.find_spec(absent) is None, absent

import distjudge

rows = [{"id": i, "prompt": f"Rate {i}: soup", "counts": {"1": i % 3, "2": 1, "3": i % 2}} for i in range(8)]
items = distjudge.load_items(rows)
judge = distjudge.load_judge(sys.argv[1], labels=distjudge.labels_of(items), lora_rank=4)
before = judge.predict(["Rate 9: soup"])
log = distjudge.train(judge, items, distjudge.Config(out="run", learning_rate=1e-2, epochs=2.0, batch_size=2))
q = judge.predict(["Rate 9: soup"])
assert q.shape == (1, 3) and abs(q - before).max() > 1e-3 and log[0]["loss"] > 0
distjudge.save_judge(judge, "run")
assert abs(distjudge.load_judge("run").predict(["Rate 9: soup"]) - q).max() < 1e-6
print(distjudge.evaluate(judge.predict([item.prompt for item in items]), items, draws=0)["kl"])
"""


def link_packages(names, into):
    """Links these installed packages, and all that they require, into a folder; returns their names."""
    from packaging.requirements import Requirement

    todo, done = list(names), set()
    while todo:
        try:
            package = importlib.metadata.distribution(todo.pop())
        except importlib.metadata.PackageNotFoundError:  # not needed by what is installed
            continue
        if package.metadata["Name"] in done:
            continue
        done.add(package.metadata["Name"])
        wanted = [Requirement(text) for text in package.requires or ()]
        todo += [r.name for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
        for top in {file.parts[0] for file in package.files or ()} - {"..", "__pycache__"}:
            source = Path(package.locate_file(top))
            if source.exists() and not (into / top).exists():
                (into / top).symlink_to(source)
    return done


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="links packages into a folder")
def test_distjudge_copied_alone_trains_predicts_saves_and_loads(tiny_model, tmp_path):
    (tmp_path / "packages").mkdir()
    (tmp_path / "empty").mkdir()
    packages = link_packages(["torch", "transformers", "peft"], tmp_path / "packages")
    assert not packages & set(ABSENT)
    shutil.copy(ROOT / "distjudge.py", tmp_path / "empty")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "packages"), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-S", "-c", SCRIPT, str(tiny_model), *ABSENT]
    options = {"capture_output": True, "text": True, "cwd": tmp_path / "empty", "env": environment}
    done = subprocess.run(command, timeout=900, **options)
    assert done.returncode == 0 and float(done.stdout.splitlines()[-1]) > 0, done.stderr[-3000:]
    assert sorted(path.name for path in (tmp_path / "empty").iterdir()) == ["distjudge.py", "run"]
