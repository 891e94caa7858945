"""tests/gpu/report.py without a GPU: a failing stage leaves a report, targets are what they say; the whole of it with stand-ins."""
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import distjudge
from distjudge import InputError

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tests" / "gpu" / "report.py"


@pytest.fixture
def gpu_report():
    spec = importlib.util.spec_from_file_location("gpu_report", SCRIPT)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_stage_that_dies_or_hangs_leaves_a_report(gpu_report, tmp_path, monkeypatch):
    if os.name == "nt":
        pytest.skip("needs a shell")
    for name, body in (("dies", "kill -9 $$"), ("hangs", "sleep 60")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    config = gpu_report.ReportConfig(out=str(tmp_path / "out"), limit_s=1, cpu_smoke=True)
    (tmp_path / "out" / "stages").mkdir(parents=True)
    results = {}
    for name, stage, words in (("dies", "tests", "ends with exit code -9 and no result"), ("hangs", "packs", "takes more than 1 s")):
        monkeypatch.setattr(sys, "executable", str(tmp_path / name))
        results[stage] = gpu_report.start_stage(config, stage)
        assert results[stage]["status"] == "failed" and results[stage]["why"] == words
        gpu_report.write_report(config, results)
    page = (tmp_path / "out" / "report.md").read_text()
    assert "| tests | failed |" in page and "| packs | failed |" in page and "it measures nothing" in page
    assert json.loads((tmp_path / "out" / "report.json").read_text())["stages"]["packs"]["status"] == "failed"


def test_what_a_stage_says_of_itself(gpu_report, tmp_path, monkeypatch):
    def skips(config):
        raise gpu_report.Skip("no such card")

    def fails(config):
        raise ZeroDivisionError("by zero")

    (tmp_path / "stages").mkdir()
    for stage, expected in ((skips, {"status": "skipped", "why": "no such card"}), (fails, {"status": "failed", "why": "ZeroDivisionError: by zero"}),
                            (lambda config: {"a": 1}, {"status": "ok", "result": {"a": 1}}),
                            (lambda config: {"a": 1, "problem": "too far"}, {"status": "failed", "result": {"a": 1}, "why": "too far"})):
        monkeypatch.setitem(gpu_report.STAGES, "tests", stage)
        gpu_report.run_stage(gpu_report.ReportConfig(out=str(tmp_path), stage="tests"))
        assert json.loads((tmp_path / "stages" / "tests.json").read_text()) == expected


def test_two_backends_that_disagree_are_a_problem(gpu_report, tmp_path):
    (tmp_path / "stages").mkdir()
    config = gpu_report.ReportConfig(out=str(tmp_path))
    side = {"backend": "x", "losses": [1.0, 0.9], "before": [[0.5, 0.5], [0.2, 0.8]], "after": [[0.6, 0.4], [0.1, 0.9]]}
    write = lambda name, **changes: (tmp_path / "stages" / f"{name}.json").write_text(json.dumps({"status": "ok", "result": side | changes}))  # noqa: E731
    with pytest.raises(gpu_report.Skip, match="needs the stage agreement_transformers"):
        gpu_report.agreement(config)
    write("agreement_transformers")
    write("agreement_unsloth", after=[[0.57, 0.43], [0.1, 0.9]])
    found = gpu_report.agreement(config)
    assert "problem" not in found and found["probabilities_after"] == pytest.approx(0.03, abs=1e-6) and found["moved_by_training"] == pytest.approx(0.1)
    assert found["spread_of_prompts"] == pytest.approx(0.3)
    write("agreement_unsloth", losses=[1.0, 0.8])
    assert gpu_report.agreement(config)["problem"] == "beyond the tolerance: losses 0.1"
    write("agreement_unsloth", before=[[float("nan"), 0.5], [0.2, 0.8]])
    assert "probabilities_before" in gpu_report.agreement(config)["problem"]


def test_targets(gpu_report):
    ok = lambda **result: {"status": "ok", "result": result}  # noqa: E731
    speed = ok(items_a_second=160.0, adversary_share=0.03, share_of_matrix_rate=0.5)
    found = gpu_report.targets({"speed_qwen7b_nli": speed, "stock_qwen7b_nli": ok(items_a_second=80.0), "memory_qwen7b_nli": ok(reserved_gib=7.2),
                                "memory_qwen7b_summeval": {"status": "failed", "why": "out of memory"}})
    reached = {what: (measured, yes) for what, measured, yes in found}
    assert reached["3 x stock Unsloth SFT, NLI prompts"] == ("2.00 x", False)
    assert reached["150 items/s, Qwen2.5-7B, NLI prompts"] == ("160.0 items/s", True)
    assert reached["adversary under 2 % of a step, NLI"] == ("3.00%", False)
    assert reached["50 % of the measured bf16 matrix rate at large packs, NLI"] == ("50%", True)
    assert reached["Qwen2.5-7B trains on nli within 8 GiB, smallest packs"] == ("7.2 GiB held", True)
    assert reached["Qwen2.5-7B trains on summeval within 12 GiB, smallest packs"] == ("it does not", False)
    assert gpu_report.targets({"speed_qwen7b_nli": {"status": "skipped"}}) == []


def test_made_up_prompts_share_what_they_say(gpu_report):
    for task, (labels, common, shared, own, group) in gpu_report.SHAPES.items():
        items = gpu_report.made_up(task, 2 * group, 0)
        words = [item.prompt.split() for item in items]
        assert list(items[0].counts) == labels and all(len(w) == common + shared + own for w in words)
        assert all(distjudge.common_length(words[0], w) >= common + shared for w in words[:group])
        assert common <= distjudge.common_length(words[0], words[group]) < common + shared
        assert len({item.group for item in items}) == 2 and all(item.votes == 5 for item in items)


def test_no_gpu_and_wrong_stages_are_refused(gpu_report, tmp_path, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="there is no CUDA device here; --cpu_smoke"):
        gpu_report.main(gpu_report.ReportConfig(out=str(tmp_path)))
    with pytest.raises(InputError, match="stages: there is no sped; there are tests"):
        gpu_report.main(gpu_report.ReportConfig(out=str(tmp_path), stages=("sped",)))


@pytest.mark.slow
def test_every_stage_with_stand_ins(gpu_report, tmp_path):
    """In this process, on a CPU: all run but the one of Unsloth's own, which says why not, and the numbers are sane."""
    import torch

    pytest.importorskip("trl")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: run the report itself")
    (tmp_path / "stages").mkdir()
    results = {}
    for stage in gpu_report.STAGES:
        if stage != "tests":  # it runs pytest
            gpu_report.run_stage(gpu_report.ReportConfig(out=str(tmp_path), cpu_smoke=True, stage=stage))
            results[stage] = json.loads((tmp_path / "stages" / f"{stage}.json").read_text()) | {"seconds": 0.0}
    gpu_report.write_report(gpu_report.ReportConfig(out=str(tmp_path), cpu_smoke=True), results)
    assert {name: stage["why"] for name, stage in results.items() if stage["status"] != "ok"} == {"packs_unsloth": "Unsloth cannot be used: no CUDA device"}
    result = {name: stage.get("result", {}) for name, stage in results.items()}
    assert result["agreement"]["probabilities_after"] < 1e-4 < result["agreement"]["moved_by_training"]
    assert result["packs"]["sdpa"]["gradient_cosine"] > 0.9999 and result["packs"]["distjudge_blocks"]["probabilities"] < 1e-4
    speed = result["speed_qwen7b_nli"]
    assert speed["items_a_second"] == pytest.approx(4 / speed["seconds_a_step"]["median"]) and 0 < speed["share_of_matrix_rate"] < 1.5
    assert set(result["stock_qwen7b_nli"]["tried"]) == {"2", "4"} and result["memory_qwen7b_nli"]["steps"] == 2
    assert "## stock_qwen7b_nli" in (tmp_path / "report.md").read_text() and json.loads((tmp_path / "report.json").read_text())["targets"] == []


@pytest.mark.slow
def test_the_command_line_runs_a_stage_in_a_process_of_its_own(tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, "--out", "gpu", "--cpu_smoke", "--stages", "model_small", "agreement"], capture_output=True, text=True,
                          cwd=tmp_path, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0 and "model_small: ok" in done.stdout and "agreement: skipped" in done.stdout, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu" / "report.json").read_text())
    assert found["stages"]["model_small"]["result"]["parameters"] > 1000 and found["hardware"]["torch"]
    assert not (tmp_path / "gpu" / "models").exists() and "it measures nothing" in (tmp_path / "gpu" / "report.md").read_text()


@pytest.mark.slow
def test_the_gpu_tests_themselves_run_on_a_cpu(tmp_path):
    """All but those of CUDA's memory, of compiled flex_attention and of Unsloth, so that a GPU's minutes go into what only it can tell."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-k", "not memory and not flex", "-p", "no:cacheprovider", str(ROOT / "tests" / "gpu")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"DISTJUDGE_REHEARSE": "1", "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(done.stdout.split(" passed")[0].split()[-1]) >= 15
