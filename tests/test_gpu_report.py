"""tests/gpu/report.py without a GPU: stages that fail leave a report; all stages with stand-ins."""

import dataclasses
import json
import os
import subprocess
import sys
from unittest.mock import Mock

import distjudge
from distjudge import InputError

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tests" / "gpu"))

import report
from report import ReportConfig

NO_CARD = os.environ | {"CUDA_VISIBLE_DEVICES": "", "DISTJUDGE_REHEARSE": "1"}


def read(tmp_path, stage):
    return json.loads((tmp_path / "stages" / f"{stage}.json").read_text())


@pytest.fixture
def config(tmp_path):
    (tmp_path / "stages").mkdir()
    return ReportConfig(out=str(tmp_path), limit_s=1, cpu_smoke=True)


def test_a_stage_that_dies_or_hangs_leaves_a_report(config, tmp_path, monkeypatch):
    results, python = {}, tmp_path / "python"
    dies, hangs = ("kill -9 $$", "ends with exit code -9 and no result"), ("sleep 60", "takes more than 1 s")
    for stage, (body, why) in {"tests": dies, "agreement": hangs}.items():
        python.write_text(f"#!/bin/sh\n{body}\n")
        python.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(python))
        results[stage] = report.start_stage(config, stage)
        assert results[stage]["seconds"] < 30
        assert results[stage] == {"status": "failed", "why": why, "seconds": results[stage]["seconds"]}
        report.write_report(config, results)
    page = (tmp_path / "report.md").read_text()
    assert "| tests | failed |" in page and "| agreement | failed |" in page and "it measures nothing" in page
    assert json.loads((tmp_path / "report.json").read_text())["stages"] == results


def test_a_folder_of_other_things_keeps_its_models(tmp_path):
    (tmp_path / "models").mkdir()
    with pytest.raises(InputError, match="holds other files, such as models: name a new folder"):
        report.main(ReportConfig(out=str(tmp_path), cpu_smoke=True, stages=("agreement",)))
    assert (tmp_path / "models").is_dir()


STAGES = [  # what a stage does, and what is told of it
    (report.Skip("no such card"), {"status": "skipped", "why": "no such card"}),
    (ZeroDivisionError("by zero"), {"status": "failed", "why": "ZeroDivisionError: by zero"}),
    ([{"a": 1}], {"status": "ok", "result": {"a": 1}}),
    ([{"a": 1, "problem": "far"}], {"status": "failed", "result": {"a": 1}, "why": "far"}),
]


@pytest.mark.parametrize(("stage", "expected"), STAGES)
def test_what_a_stage_says_of_itself(config, tmp_path, monkeypatch, stage, expected):
    monkeypatch.setitem(report.STAGES, "tests", Mock(side_effect=stage))
    report.run_stage(dataclasses.replace(config, stage="tests"))
    assert read(tmp_path, "tests") == expected


def test_two_backends_that_disagree_are_a_problem():
    one = {"backend": "x", "losses": [1.0, 0.9], "before": [[0.5, 0.5], [0.2, 0.8]]}
    one["after"] = [[0.6, 0.4], [0.1, 0.9]]
    found = report.compared(one, one | {"after": [[0.57, 0.43], [0.1, 0.9]]})
    assert "problem" not in found and found["apart"]["after"] == pytest.approx(0.03, abs=1e-6)
    told = [found["moved_by_training"], found["spread_of_prompts"]]
    assert told == pytest.approx([0.1, 0.3])
    wrong = {
        "losses 0.1": {"losses": [1.0, 0.8]},
        "before nan": {"before": [[float("nan"), 0.5], [0.2, 0.8]]},
    }
    for words, change in wrong.items():
        assert report.compared(one, one | change)["problem"] == f"beyond the tolerance: {words}"


def test_targets():
    speed = {"items_a_second": 160.0, "adversary_share": 0.03, "large_packs": {"reached": {"median": 0.5}}}
    ran = {"speed_qwen7b_nli": speed, "stock_qwen7b_nli": {"items_a_second": 80.0}}
    ran["memory_qwen7b_nli"] = {"held_gib": 7.2}
    results = {name: {"status": "ok", "result": result} for name, result in ran.items()}
    results["memory_qwen7b_summeval"] = {"status": "failed", "why": "out of memory"}
    assert [tuple(row.values()) for row in report.targets(results)] == [
        ("3 times the items a second of stock Unsloth SFT", "nli", 2.0, "**no**"),
        ("150 items a second", "nli", 160.0, "yes"),
        ("adversary under 0.02 of a step", "nli", 0.03, "**no**"),
        ("half of the measured matrix rate at large packs", "nli", 0.5, "yes"),
        ("trains within 8 GiB", "nli", 7.2, "yes"),
        ("trains within 12 GiB", "summeval", "it does not", "**no**"),
    ]
    assert report.targets({"speed_qwen7b_nli": {"status": "skipped"}}) == []


@pytest.mark.parametrize("task", report.SHAPES)
def test_made_up_prompts_share_what_they_say(task):
    labels, common, shared, own, group = report.SHAPES[task]
    items = report.made_up(task, 2 * group, 0)
    words = [item.prompt.split() for item in items]
    assert list(items[0].counts) == labels and all(len(w) == common + shared + own for w in words)
    assert all(distjudge.common_length(words[0], w) >= common + shared for w in words[:group])
    assert common <= distjudge.common_length(words[0], words[group]) < common + shared
    assert len({item.group for item in items}) == 2 and all(item.votes == 5 for item in items)


def test_no_gpu_and_wrong_stages_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="there is no CUDA device here; --cpu_smoke"):
        report.main(ReportConfig(out=str(tmp_path)))
    with pytest.raises(InputError, match="stages: there is no sped; there are model_qwen7b, recipe_qwen7b"):
        report.main(ReportConfig(out=str(tmp_path), stages=("sped",)))


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: run the report itself")
def test_every_stage_with_stand_ins(config, tmp_path):
    """In this process: all run, and the numbers are sane."""
    pytest.importorskip("trl")
    stages = [name for name in report.STAGES if name != "tests"]  # which runs pytest
    for name in stages:
        report.run_stage(dataclasses.replace(config, stage=name))
    results = {name: read(tmp_path, name) | {"seconds": 0.0} for name in stages}
    report.write_report(config, results)
    assert {name: stage for name, stage in results.items() if stage["status"] != "ok"} == {}
    result = {name: stage["result"] for name, stage in results.items()}
    assert result["agreement"]["apart"]["after"] < 1e-4 < result["agreement"]["moved_by_training"]
    assert result["recipe_qwen7b"]["items"] == 40 and result["recipe_qwen7b"]["kl"] > 0
    speed = result["speed_qwen7b_nli"]
    assert speed["items_a_second"] == pytest.approx(4 / speed["seconds_a_step"]["median"])
    assert 0 < speed["large_packs"]["reached"]["median"] < 1.5 and 0 < speed["adversary_share"] < 1
    assert set(result["stock_qwen7b_nli"]["tried"]) == {"2", "4"}
    assert result["memory_qwen7b_nli"]["steps"] == 2
    assert "stock_qwen7b_nli |\n| --- | --- |\n| items a step | 4 |" in (tmp_path / "report.md").read_text()


@pytest.mark.slow
def test_the_command_runs_stages_in_processes_of_their_own(tmp_path):
    stages = ["agreement", "model_middle"]  # the first needs the second
    command = [sys.executable, report.__file__, "--out", "gpu", "--cpu_smoke", "--stages", *stages]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=NO_CARD)
    assert done.returncode == 0 and "model_middle: ok" in done.stdout, done.stdout + done.stderr
    short = done.stdout.splitlines()[-4:]  # the short table comes last
    assert [line.split(" | ")[0] for line in short[:2]] == [f"| {name}" for name in stages]
    found = json.loads((tmp_path / "gpu" / "report.json").read_text())
    assert [found["stages"][name]["status"] for name in stages] == ["skipped", "ok"]
    assert found["stages"]["model_middle"]["result"]["parameters"] > 1000 and found["hardware"]["torch"]
    assert not (tmp_path / "gpu" / "models").exists()


@pytest.mark.slow
def test_the_gpu_tests_themselves_run_on_a_cpu():
    """All but those of CUDA's memory, of compiled flex_attention and of Unsloth."""
    options = "-q -m gpu tests/gpu -k".split()
    command = [sys.executable, "-m", "pytest", *options, "not memory and not flex"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=NO_CARD)
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(done.stdout.split(" passed")[0].split()[-1]) >= 15
