"""A run that is stopped goes on to the same bits; checkpoints are whole or not used; nothing is unpickled."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import distjudge
from distjudge import Config, InputError, load_judge, train

ROOT = Path(__file__).resolve().parents[1]


def trained(judge):
    return torch.cat([w.detach().flatten() for w in judge.model.parameters() if w.requires_grad])


@pytest.fixture
def go(tiny_model, votes, tmp_path):
    """Trains 10 steps in two epochs and a bit; with `stop`, raises after so many."""
    import transformers

    items = votes(14)

    class Crash(transformers.TrainerCallback):
        def __init__(self, at):
            self.at = at

        def on_log(self, args, state, control, **kwargs):  # before the checkpoint of the step is written
            if state.global_step == self.at:
                raise KeyboardInterrupt

    def run(out, stop=None, items=items, labels=("1", "2", "3"), callbacks=(), **changes):
        judge = load_judge(tiny_model, labels, lora_rank=4)
        fixed = {"batch_size": 4, "epochs": 2.5, "learning_rate": 1e-2, "save_every": 1, "log_every": 1}
        config = Config(out=str(tmp_path / out), **(fixed | changes))
        log = train(judge, items, config, callbacks=[*([Crash(stop)] if stop else []), *callbacks])
        return trained(judge), log
    return run


def steps(folder):
    return [path.name for path in distjudge.checkpoints_in(folder / "checkpoints")]


def test_stopped_anywhere_it_goes_on_to_the_same_bits(go, tmp_path):
    whole, _ = go("whole")
    lines = (tmp_path / "whole" / "log.jsonl").read_text().splitlines()
    assert steps(tmp_path / "whole") == ["step-000000010", "step-000000009"] and len(lines) == 11
    for stop in (1, 2, 4, 5, 9):  # before the first checkpoint, at an epoch's last step, and between
        with pytest.raises(KeyboardInterrupt):
            go(f"s{stop}", stop)
        again, _ = go(f"s{stop}", resume=True)
        assert torch.equal(again, whole)
        losses = lambda name: [json.loads(line).get("loss") for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]  # noqa: E731
        assert losses(f"s{stop}") == losses("whole")


@pytest.mark.parametrize("means", [{"average": 0.6, "prior": "model"}, {"prior": "teacher"}])
def test_with_checkpoints_now_and_then_and_packs_in_random_order(go, tmp_path, means):
    settings = {"save_every": 3, "shuffle": "packs", "warmup": 0.3, "schedule": "cosine", "log_every": 2, **means}
    whole, _ = go("whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        go("stopped", 8, **settings)
    assert steps(tmp_path / "stopped") == ["step-000000006", "step-000000003"]
    again, _ = go("stopped", **settings, resume=True)
    assert torch.equal(again, whole)
    logs = [[{k: v for k, v in json.loads(line).items() if k in ("step", "loss", "learning_rate")} for line in (tmp_path / name / "log.jsonl").open()]
            for name in ("whole", "stopped")]
    assert logs[0][:-1] == logs[1][:-1]


@pytest.mark.parametrize("settings", [{}, distjudge.PRESETS["teacher"], {"average": 0.5, "schedule": "constant"}])
def test_resuming_a_finished_run_changes_nothing(go, tmp_path, settings):
    once = go("run", **settings)[0]
    before = steps(tmp_path / "run")
    assert torch.equal(once, go("run", resume=True, **settings)[0]) and steps(tmp_path / "run") == before


def test_a_new_run_does_not_see_the_checkpoints_of_the_last(go, tmp_path):
    go("run")
    with pytest.raises(KeyboardInterrupt):
        go("run", 1)
    assert steps(tmp_path / "run") == []


@pytest.mark.parametrize(("damage", "what"), [("cut", "is damaged"), ("changed", "is damaged"), ("gone", "no whole checkpoint"), ("sums", "no whole checkpoint")])
def test_a_damaged_checkpoint_is_passed_over(go, tmp_path, caplog, damage, what):
    whole, _ = go("whole")
    with pytest.raises(KeyboardInterrupt):
        go("run", 6)
    newest = tmp_path / "run" / "checkpoints" / "step-000000005"
    weights = newest / "weights.safetensors"
    content = weights.read_bytes()
    if damage == "cut":
        weights.write_bytes(content[:-100])
    elif damage == "changed":
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "gone":
        weights.unlink()
    else:
        (newest / "sha256.json").write_text('{"state.json"')
    again, _ = go("run", resume=True)
    assert torch.equal(again, whole) and what in caplog.text and "trying the one before" in caplog.text
    for folder in distjudge.checkpoints_in(tmp_path / "run" / "checkpoints"):
        (folder / "state.json").write_text("{}")
    with pytest.raises(InputError, match="none of its checkpoints is whole"):
        go("run", resume=True)


def test_resuming_another_run_is_refused_by_name(go, votes, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        go("run", 6)
    for changes, message in (({"alpha": 0.5}, "alpha differs: 0.8 then, 0.5 now"), ({"seed": 3}, "seed differs: 0 then, 3 now"),
                             ({"items": votes(14, seed=5)}, "training items differs"), ({"epochs": 3.0}, "epochs differs"),
                             ({"labels": ("1", "2", "4"), "items": votes(14, labels=("1", "2", "4"))}, "labels differs")):
        with pytest.raises(InputError, match=message):
            go("run", resume=True, **changes)
    judge = json.loads((tmp_path / "run" / "checkpoints" / "step-000000005" / "about.json").read_text())
    assert judge["versions"] == distjudge.versions() and judge["prompt template"]["before"]


def test_a_full_disk_is_one_clear_error_and_earlier_checkpoints_stay(go, tmp_path, monkeypatch):
    import safetensors.torch

    plain, calls = safetensors.torch.save_file, []

    def full(tensors, path, *args):
        calls.append(path)
        if len(calls) == 8:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return plain(tensors, path, *args)
    whole, _ = go("whole")
    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match=r"cannot be written: .*No space left.*earlier ones are whole"):
        go("run")
    assert steps(tmp_path / "run") == ["step-000000003", "step-000000002"] and not list((tmp_path / "run" / "checkpoints").glob("*.part"))
    monkeypatch.undo()
    assert torch.equal(go("run", resume=True)[0], whole)


def test_a_signal_saves_and_stops_and_the_handlers_are_put_back(go, tmp_path):
    import transformers

    class Signal(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
    before = signal.getsignal(signal.SIGTERM)
    whole, _ = go("whole", save_every=0.5)
    with pytest.raises(distjudge.Stopped, match=r"stopped by SIGTERM after step 4 of 10; a checkpoint is saved, --resume") as caught:
        go("run", save_every=0.5, callbacks=[Signal()])
    assert caught.value.number == signal.SIGTERM and signal.getsignal(signal.SIGTERM) is before and steps(tmp_path / "run") == ["step-000000004"]
    assert torch.equal(go("run", save_every=0.5, resume=True)[0], whole)


class Trap:
    """Unpickling it would leave a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_nothing_is_unpickled(go, tmp_path):
    """Planted where transformers' own loading would look for optimizer, schedule and random states."""
    import pickle

    with pytest.raises(KeyboardInterrupt):
        go("run", 6)
    sprung = tmp_path / "sprung"
    for folder in distjudge.checkpoints_in(tmp_path / "run" / "checkpoints"):
        assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_0.pth", "training_args.bin", "pytorch_model.bin", "scaler.pt", "adapter_model.bin"):
            (folder / name).write_bytes(pickle.dumps(Trap(str(sprung))))
    go("run", resume=True)
    assert not sprung.exists()
    pickle.loads(pickle.dumps(Trap(str(sprung)))).close()
    assert sprung.exists()  # the trap does work


values = st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5)),
                      lambda inner: st.one_of(st.lists(inner, max_size=3), st.lists(inner, max_size=3).map(tuple),
                                              st.dictionaries(st.one_of(st.integers(), st.text(max_size=3)), inner, max_size=3)), max_leaves=12)


@settings(max_examples=100, deadline=None)
@given(values)
def test_states_come_back_as_they_were(value):
    tensors = {}
    packed = json.loads(json.dumps(distjudge._pack_state({"x": value, 3: torch.arange(3)}, tensors)))
    back = distjudge._unpack_state(packed, tensors)
    assert back["x"] == value and type(back["x"]) is type(value) and torch.equal(back[3], torch.arange(3))
    with pytest.raises(TypeError, match="cannot hold a set"):
        distjudge._pack_state({"x": {1}}, {})


def test_a_diverging_run_names_step_items_and_checkpoint(go, tmp_path, tiny_model, votes):
    import transformers

    class Poison(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 6:
                with torch.no_grad():
                    next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"not finite at step 7, for items i\d+, .*; last good checkpoint: .*step-000000005"):
        go("run", callbacks=[Poison()])


def test_a_teacher_that_diverges_names_them_too(go):
    import transformers

    class Poison(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step == 6:
                next(p for p in model.parameters() if p.grad is not None).grad.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"not finite at step 8, for items i\d+, .*; last good checkpoint: .*step-000000006"):
        go("run", callbacks=[Poison()], save_every=3, max_grad_norm=0.0, **distjudge.PRESETS["teacher"])


# --- the same with real processes --------------------------------------------------------------------------------------
SCRIPT = """
import sys
import distjudge
distjudge.cli(lambda config: distjudge.run(config), distjudge.Config)
"""


def start(tmp_path, model, out, *more):
    command = [sys.executable, "-c", SCRIPT, "--train", str(tmp_path / "items.jsonl"), "--model", str(model), "--out", str(tmp_path / out), "--lora_rank", "4",
               "--epochs", "6", "--batch_size", "3", "--learning_rate", "0.01", "--save_every", "1",
               "--min_mass", "0", *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


def write_items(tmp_path, votes):
    rows = [{"id": item.id, "prompt": item.prompt, "counts": item.counts} for item in votes(37)]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.slow
def test_killed_at_twenty_random_points(tiny_model, votes, tmp_path):
    """SIGKILL somewhere between the start and the end of the process, writing of checkpoints and results included."""
    write_items(tmp_path, votes)
    process = start(tmp_path, tiny_model, "whole")
    assert process.wait() == 0, process.stdout.read()
    draw, killed = random.Random(0), 0
    for n in range(20):
        out, process = tmp_path / f"run{n}", start(tmp_path, tiny_model, f"run{n}")
        step = draw.randint(0, 61)  # 60 steps; 0 is before the first, 61 after the last, when the results are written
        while process.poll() is None and (max([int(name[5:]) for name in steps(out)], default=0) < min(step, 60) or (step > 60 and not (out / "judge.json").exists())):
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.08))  # a step and its checkpoint take about as long
        process.kill()
        killed += process.wait() != 0
        process = start(tmp_path, tiny_model, out.name, "--resume")
        text = process.communicate()[0]
        assert process.returncode == 0, text
        for name in ("predictions.jsonl", "metrics.json"):
            assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), (n, step, name)
    assert killed >= 18


@pytest.mark.slow
def test_sigint_to_the_command_ends_in_130(tiny_model, votes, tmp_path):
    write_items(tmp_path, votes)
    process = start(tmp_path, tiny_model, "run", "--epochs", "300")
    while not steps(tmp_path / "run"):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    text = process.communicate()[0]
    assert process.returncode == 130 and "stopped by SIGINT after step" in text and "Traceback" not in text
    assert not (tmp_path / "run" / "metrics.json").exists()


@pytest.mark.slow
def test_a_disk_that_is_really_full(tiny_model, votes, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if not shutil.which("mount") or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        write_items(tmp_path, votes)
        process = start(tmp_path, tiny_model, "disk/run")
        text = process.communicate()[0]
        assert process.returncode == 2 and "the checkpoint cannot be written" in text and "Traceback" not in text, text
        kept = distjudge.checkpoints_in(disk / "run" / "checkpoints")
        assert kept and all(distjudge.load_checkpoint(path) for path in kept) and not list((disk / "run" / "checkpoints").glob("*.part"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)
