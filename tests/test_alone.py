"""distjudge.py copied alone into an empty folder needs torch, transformers, peft and what they need."""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

ABSENT = ["tyro", "matplotlib", "datasets", "trl", "unsloth", "bitsandbytes", "scipy", "pandas"]
SCRIPT = """
import sys

sys.modules.update(dict.fromkeys(sys.argv[2:]))  # to import one of these is an ImportError

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


@pytest.mark.slow
def test_distjudge_copied_alone_trains_predicts_saves_and_loads(tiny_model, tmp_path):
    (tmp_path / "empty").mkdir()
    shutil.copy(ROOT / "distjudge.py", tmp_path / "empty")
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", SCRIPT, str(tiny_model), *ABSENT]
    options = {"capture_output": True, "text": True, "cwd": tmp_path / "empty", "env": environment}
    done = subprocess.run(command, timeout=900, **options)
    assert done.returncode == 0 and float(done.stdout.splitlines()[-1]) > 0, done.stderr[-3000:]
    assert sorted(path.name for path in (tmp_path / "empty").iterdir()) == ["distjudge.py", "run"]
