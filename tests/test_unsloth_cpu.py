"""The Unsloth path, run for real on a CPU and compared with transformers: see unsloth_cpu.py.

One command: python -m pytest -q -m slow tests/test_unsloth_cpu.py
"""

import importlib.util
import json
import os
import subprocess
import sys

import distjudge

import pytest
import torch
import unsloth_cpu

no_kit = pytest.mark.skipif(not importlib.util.find_spec("unsloth"), reason="needs requirements.txt")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: run tests/gpu/report.py")
pytestmark = [pytest.mark.slow, no_kit, no_gpu]
OWN = ("qwen2", "qwen3", "llama", "smollm", "mistral")  # have Unsloth's forward; others keep transformers'
# how the model is loaded, and how far log-probabilities and gradients (relative) may be off
CASES = {name: ({}, 0.01, 0.03) for name in OWN} | {"phi4": ({}, 0.01, 0.03)}
CASES |= {"gemma3": ({}, 0.015, 0.05)}  # on its way into float16 Unsloth rounds it to bfloat16
CASES |= {"qwen2 in 4 bits": ({"four_bit": True}, 0.01, 0.03)}
CASES |= {"qwen2 in float32": ({"float32": True}, 2e-5, 1e-4)}


def run_unsloth(model, work, **settings):
    environment = os.environ | unsloth_cpu.ENVIRONMENT | {"UNSLOTH_COMPILE_LOCATION": str(work / "compiled")}
    environment |= {"UNSLOTH_OFFLOAD_FP32": "exact"} if "float32" in settings else {}  # else kept in bfloat16
    work.mkdir(exist_ok=True)
    given = json.dumps({"model": str(model), "work": str(work)} | settings)
    command = [sys.executable, unsloth_cpu.__file__, given]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=work)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-5000:]
    return torch.load(work / "found.pt") | {"said": done.stdout + done.stderr}


class Case:
    def __init__(self, name, tokenizer, folder):
        self.settings, self.logq, self.gradient = CASES[name]
        self.name, self.run, base = name.split()[0], folder / "work" / "run", folder / "model"
        unsloth_cpu.save_model(self.name, tokenizer, base)
        self.found = run_unsloth(base, folder / "work", **self.settings)
        base = folder / "work" / "dequantized" if "four_bit" in self.settings else base
        judge = unsloth_cpu.load(str(base), "transformers", device="cpu")
        assert judge.packs and next(judge.model.parameters()).dtype == torch.float32
        self.plain = unsloth_cpu.measure(judge, False)
        judge.packs = True
        self.trained = unsloth_cpu.trained(judge, folder / "reference")


@pytest.fixture(scope="module", params=CASES)
def case(request, tiny_tokenizer, tmp_path_factory):
    return Case(request.param, tiny_tokenizer, tmp_path_factory.mktemp("rehearsal"))


def gradients_off(found, expected):
    a, b = found["gradients"], expected["gradients"]
    assert set(a) == set(b) and all(b[name].norm() > 0 for name in b)
    return max(((a[name] - b[name]).norm() / b[name].norm()).item() for name in b)


def test_it_is_unsloth_that_ran(case):
    found = case.found
    assert found["backend"] == "unsloth" and found["two_levels"] == (case.name in OWN) and found["packs"]
    assert found["four_bit"] == ("four_bit" in case.settings)
    assert found["offloads"] is False  # "auto" moves embeddings to main memory on small cards
    exact = "float32" in case.settings or case.name == "gemma3"  # which float16 cannot hold
    assert found["autocast"] == (None if exact else torch.float16)


def test_unsloth_computes_what_transformers_does(case):
    """Label log-probabilities, masses over the whole vocabulary, and the gradients of both."""
    for name in ("logq", "log_mass"):
        assert (case.found["single"][name] - case.plain[name]).abs().max() < case.logq
    assert case.plain["logq"].std(0).max() > 10 * case.logq  # or all would agree
    assert gradients_off(case.found["single"], case.plain) < case.gradient
    assert case.found.get("nf4_kernel_off", 0.0) < 1e-6


def test_packs_are_one_prompt_at_a_time(case):
    for name in ("logq", "log_mass"):
        assert (case.found["packed"][name] - case.found["single"][name]).abs().max() < case.logq
    assert gradients_off(case.found["packed"], case.found["single"]) < case.gradient


def test_training_with_and_without_checkpointing(case):
    found = case.found
    assert gradients_off(found["recomputed step"], found["packed"]) < 1e-3
    assert found["plain"]["losses"] == pytest.approx(case.trained["losses"], abs=3 * case.logq)
    assert found["recomputed"]["losses"] == pytest.approx(found["plain"]["losses"], abs=1e-3)
    assert found["plain"]["losses"][-1] < found["plain"]["losses"][0]
    assert found["recomputed"]["layer_runs"] == 2 * found["plain"]["layer_runs"]


def test_a_saved_judge_is_loaded_again(case):
    """Under Unsloth, and on a CPU under transformers, where its weights are in another precision."""
    assert (case.found["again"] - case.found["after"]).abs().max() == 0
    judge = distjudge.load_judge(case.run, backend="transformers", device="cpu")
    assert (judge.score(unsloth_cpu.TEXTS)[0] - case.found["after"]).abs().max() < case.logq


def test_a_saved_judge_is_merged(case):
    import export

    export.main(export.ExportConfig(run=str(case.run), export="merged"))
    report = json.loads((case.run / "merged" / "export.json").read_text())
    merging = report["merged weights against their base with the adapter"]
    assert report["changed_by_training"] > 4 * merging["largest difference in a probability"]


def test_segments_that_let_everything_be_seen_are_caught(tiny_tokenizer, tmp_path):
    """A mutant: the check at load refuses its packs, and the comparison above would see them."""
    unsloth_cpu.save_model("qwen2", tiny_tokenizer, tmp_path / "model")
    found = run_unsloth(tmp_path / "model", tmp_path / "work", mutant=True)
    assert not found["packs"] and "cannot be run on packed prompts (hidden states are off by" in found["said"]
    off = (found["packed"]["logq"] - found["single"]["logq"]).abs().max()
    assert off > 0.03 and gradients_off(found["packed"], found["single"]) > 0.09
