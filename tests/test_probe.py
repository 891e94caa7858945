"""recipes/probe.py: what it measures, on judges whose behaviour is known, and its command line."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from probe import CHANGES, CLAIMS, compare, probe, targets_of

import distjudge
from distjudge import load_judge, save_judge

ROOT = Path(__file__).resolve().parents[1]


def test_measures_by_hand():
    before = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]])
    after = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.2, 0.3]])
    assert targets_of(before).tolist() == [2, 0]
    assert compare(before, after, targets_of(before)) == pytest.approx({"moved": 0.2, "flips": 0.5, "target_before": 0.15, "target_after": 0.35, "taken": 0.5})
    assert set(compare(before, after, None)) == {"moved", "flips"}


class Gullible:
    """Answers what the last line asks for, and is even-handed otherwise but for its last label."""

    labels = ("yes", "no")

    def predict(self, prompts, progress=False):
        rows = []
        for prompt in prompts:
            asked = [label for label in self.labels if f" {label}" in prompt.split("\n\n", 1)[-1]] if "\n\n" in prompt else []
            rows.append([0.9, 0.1] if asked == ["yes"] else [0.1, 0.9] if asked == ["no"] else [0.6, 0.4])
        return torch.tensor(rows).numpy()


def test_a_gullible_judge_is_caught():
    items = distjudge.load_items([{"id": i, "prompt": f"Is it {i}?", "counts": {"yes": 1, "no": 1}} for i in range(4)])
    found = probe(Gullible(), items)
    assert set(found) == {*CHANGES, *CLAIMS}
    told = found["the correct label is"]
    assert told == pytest.approx({"moved": 0.5, "flips": 1.0, "target_before": 0.4, "target_after": 0.9, "taken": 1.0})
    assert found["nothing (a control: the noise of computing twice)"]["moved"] == 0 and found["flattery"]["flips"] == 0


def test_the_command(tiny_model, tmp_path):
    save_judge(load_judge(tiny_model, ["yes", "no"], lora_rank=2), tmp_path / "run")
    rows = [{"id": i, "prompt": f"soup {i}", "counts": {"yes": 1, "no": 2}, "swap": {"prompt": f"{i} soup", "labels": {"yes": "no", "no": "yes"}}} for i in range(3)]
    rows.append({"id": "long", "prompt": "word " * 400, "counts": {"yes": 1, "no": 2}})
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = subprocess.run([sys.executable, ROOT / "recipes" / "probe.py", "--run", "run", "--items", "items.jsonl"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "run" / "probe" / "probe.json").read_text())
    assert found["items"] == 3 and "left out 1 of 4 items" in done.stdout and "the pair in the other order" in found["probes"]
    assert found["probes"]["nothing (a control: the noise of computing twice)"]["moved"] < 1e-6 < found["probes"]["longer: five of them"]["moved"]
    assert "| flattery |" in (tmp_path / "run" / "probe" / "probe.md").read_text()
