"""A run that is stopped goes on to the same bits; checkpoints are whole or not used, and run no code."""

import hashlib
import io
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time

import distjudge
from distjudge import Config, InputError, load_judge, train

import pytest
import torch
from conftest import ROOT

TEACHER = distjudge.PRESETS["teacher"]


@pytest.fixture
def go(tiny_model, votes, tmp_path):
    """Trains 10 steps in two epochs and a bit; with `stop`, raises after so many, before their checkpoint."""
    items = votes(14)

    def run(out, stop=None, items=items, labels=("1", "2", "3"), at=None, dropout=0.0, tested=(), **changes):
        made = {"lora_rank": changes.pop("rank", 4), "bf16": changes.pop("bf16", None)}
        judge = load_judge(tiny_model, labels, **made)
        for module in judge.model.modules() if dropout else ():
            if hasattr(module, "lora_dropout"):
                module.lora_dropout["default"] = torch.nn.Dropout(dropout)
        fixed = {"batch_size": 4, "epochs": 2.5, "learning_rate": 1e-2, "save_every": 1}

        def on_step(n):
            if n == stop:
                raise KeyboardInterrupt
            if at and n in at:
                at[n](judge)

        log = train(judge, items, Config(out=str(tmp_path / out), **(fixed | changes)), tested, on_step)
        return torch.cat([w.detach().flatten() for w in judge.model.parameters() if w.requires_grad]), log

    return run


@pytest.fixture
def stopped(go):
    """go(), stopped after so many steps."""

    def run(out, stop, **changes):
        with pytest.raises(KeyboardInterrupt):
            go(out, stop, **changes)

    return run


def checkpoints(folder):
    return distjudge.checkpoints_in(folder / "checkpoints")


def steps(folder):
    return [int(path.name[5:14]) for path in checkpoints(folder)]


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_stopped_anywhere_it_goes_on_to_the_same_bits(go, stopped, tmp_path):
    whole, log = go("whole")
    assert steps(tmp_path / "whole") == [10, 9] and log == lines(tmp_path / "whole")
    assert [row["step"] for row in log] == list(range(1, 11))
    for stop in (1, 2, 4, 5, 9):  # before the first checkpoint, at an epoch's last step, and between
        stopped(f"s{stop}", stop)
        again, log_again = go(f"s{stop}", resume=True)
        assert torch.equal(again, whole) and log_again == log == lines(tmp_path / f"s{stop}")


@pytest.mark.parametrize("method", [{}, TEACHER])
def test_with_checkpoints_now_and_then(go, stopped, tmp_path, method):
    settings = {"schedule": "cosine", **method, "save_every": 3}
    whole, log = go("whole", **settings)
    stopped("stopped", 8, **settings)
    assert steps(tmp_path / "stopped") == [6, 3]
    again, log_again = go("stopped", **settings, resume=True)
    assert torch.equal(again, whole) and log_again == log
    before = steps(tmp_path / "stopped")
    once_more, _ = go("stopped", **settings, resume=True)  # a finished run: nothing is left to do
    assert torch.equal(once_more, whole) and steps(tmp_path / "stopped") == before == [10, 9]


@pytest.mark.parametrize("method", [{}, TEACHER])
def test_dropout_goes_on_with_the_numbers_it_would_have_drawn(go, stopped, method):
    whole, log = go("whole", dropout=0.5, **method)
    assert not torch.equal(whole, go("without", **method)[0])
    stopped("stopped", 6, dropout=0.5, **method)
    again, log_again = go("stopped", dropout=0.5, **method, resume=True)
    assert torch.equal(again, whole) and log_again == log


def test_passes_that_have_shrunk_stay_small(go, stopped):
    """As after running out of memory; other passes would be other roundings."""
    seen = {}
    at = {3: lambda judge: setattr(judge, "pack_tokens", 40)}
    whole, log = go("whole", at=at)
    stopped("stopped", 6, at=at)
    look = {10: lambda judge: seen.update(tokens=judge.pack_tokens)}
    again, log_again = go("stopped", at=look, resume=True)
    assert seen == {"tokens": 40} and torch.equal(again, whole) and log_again == log


def test_a_new_run_does_not_see_the_checkpoints_of_the_last(go, stopped, tmp_path):
    go("run")
    stopped("run", 1)
    assert steps(tmp_path / "run") == []


def plant(path, content):
    """Another checkpoint of the same step, whose name has the right checksum."""
    name = f"{path.name[:15]}{hashlib.sha256(content).hexdigest()}.pt"
    path.unlink()
    (path.parent / name).write_bytes(content)


def saved(content):
    torch.save(content, stream := io.BytesIO())
    return stream.getvalue()


def overwrite(path, at, content):
    whole = path.read_bytes()
    path.write_bytes(whole[:at] + content + whole[at:][len(content) :])


DAMAGES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "changed": lambda path: overwrite(path, -1, bytes([path.read_bytes()[-1] ^ 1])),
    "changed within a tensor": lambda path: overwrite(path, 4096, b"xx"),
    "no checkpoint": lambda path: plant(path, b"hello"),
    "of another program": lambda path: plant(path, saved({"model": torch.zeros(2)})),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(go, stopped, tmp_path, caplog, damage):
    whole, _ = go("whole")
    stopped("run", 6)
    assert steps(tmp_path / "run") == [5, 4]
    DAMAGES[damage](checkpoints(tmp_path / "run")[0])
    again, _ = go("run", resume=True)
    assert torch.equal(again, whole) and "is no whole checkpoint" in caplog.text
    assert "trying the one before" in caplog.text
    for path in checkpoints(tmp_path / "run"):
        DAMAGES[damage](path)
    with pytest.raises(InputError, match="none of its checkpoints is whole"):
        go("run", resume=True)


class Trap:
    """Unpickling it would leave a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("by", ["pickle", "torch"])
def test_no_code_of_a_planted_checkpoint_is_run(go, stopped, tmp_path, caplog, by):
    whole, _ = go("whole")
    stopped("run", 6)
    newest, sprung, content = checkpoints(tmp_path / "run")[0], tmp_path / "sprung", tmp_path / "content"
    state = torch.load(newest, weights_only=True) | {"random": Trap(str(sprung))}
    if by == "torch":
        torch.save(state, content)
    else:
        content.write_bytes(pickle.dumps(state))
    plant(newest, content.read_bytes())
    again, _ = go("run", resume=True)
    assert torch.equal(again, whole) and "trying the one before" in caplog.text and not sprung.exists()
    if by == "pickle":
        pickle.loads(content.read_bytes())
    else:
        torch.load(content, weights_only=False)
    assert sprung.exists()  # the trap does work


OTHER = {"eps": 0.1, "teacher": 1.0, "answer": 0.5, "steps": 2, "learning_rate": 1e-3}
OTHER |= {"batch_size": 2, "pack_tokens": 64, "schedule": "cosine", "weight_decay": 0.1}


def test_resuming_another_run_is_refused_by_name(go, stopped, votes, tmp_path, monkeypatch):
    monkeypatch.setattr(distjudge, "multiplies_bf16", lambda device: True)
    stopped("run", 6)
    four = ("1", "2", "4")
    for changes, message in (
        ({"alpha": 0.5}, "alpha differs: 0.8 then, 0.5 now"),
        ({"seed": 3}, "seed differs: 0 then, 3 now"),
        ({"items": votes(14, seed=5)}, "training items differs"),
        ({"tested": votes(3)}, "test items differs"),
        ({"epochs": 3.0}, "epochs differs"),
        ({"labels": four, "items": votes(14, labels=four)}, "labels differs"),
        ({"rank": 1}, "kinds of weights differs"),
        ({"bf16": True}, "kinds of weights differs"),
        *(({name: value}, f"{name} differs") for name, value in OTHER.items()),
    ):
        with pytest.raises(InputError, match=message):
            go("run", resume=True, **changes)
    go("run", resume=True, model="the same, spelled otherwise")  # the folder and its weights are compared
    made_from = distjudge.load_checkpoint(checkpoints(tmp_path / "run")[0])["made_from"]
    assert made_from["versions"] == distjudge.versions() and made_from["prompt template"]["before"]


def test_the_map_of_a_pair_s_labels_decides_what_is_resumed(tiny_model, tmp_path):
    def go(labels, **more):
        swap = {"prompt": "second, first", "labels": labels}
        rows = [{"prompt": f"p{i}", "counts": {"a": 2, "b": 1, "tie": 1}, "swap": swap} for i in range(3)]
        items = distjudge.load_items(rows)
        judge = load_judge(tiny_model, ["a", "b", "tie"], lora_rank=2)
        train(judge, items, Config(out=str(tmp_path / "run"), epochs=1.0, **more))

    go({"a": "b", "b": "a"})
    with pytest.raises(InputError, match="training items differs"):
        go({"a": "tie", "tie": "a"}, resume=True)


def test_a_full_disk_is_one_clear_error_and_earlier_checkpoints_stay(go, tmp_path, monkeypatch):
    plain, calls = torch.save, []

    def full(state, file):
        calls.append(file)
        if len(calls) == 4:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        return plain(state, file)

    whole, _ = go("whole")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"cannot be written: .*No space left.*earlier ones are whole"):
        go("run")
    assert steps(tmp_path / "run") == [3, 2] and not list((tmp_path / "run" / "checkpoints").glob("*.part"))
    monkeypatch.undo()
    assert torch.equal(go("run", resume=True)[0], whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops_and_the_handlers_are_put_back(go, tmp_path, number):
    before = signal.getsignal(number)
    whole, _ = go("whole", save_every=0.5)
    said = rf"stopped by {number.name} after step 4 of 10; a checkpoint is saved, --resume"
    with pytest.raises(distjudge.Stopped, match=said) as caught:
        go("run", save_every=0.5, at={3: lambda judge: os.kill(os.getpid(), number)})
    assert caught.value.number == number and signal.getsignal(number) is before
    assert steps(tmp_path / "run") == [4]
    assert torch.equal(go("run", save_every=0.5, resume=True)[0], whole)


def test_a_second_signal_stops_at_once(go, tmp_path):
    twice = lambda judge: [signal.raise_signal(signal.SIGINT) for _ in range(2)]  # noqa: E731
    with pytest.raises(KeyboardInterrupt):
        go("run", save_every=0.5, at={4: twice})
    assert steps(tmp_path / "run") == []


def poison(judge):
    with torch.no_grad():
        next(p for p in judge.model.parameters() if p.requires_grad).fill_(float("nan"))


@pytest.mark.parametrize("method", [{}, TEACHER])
def test_a_diverging_run_names_step_items_and_checkpoint(go, method):
    named = r"not finite at step 7, for items i\d+, .*; last good checkpoint: .*step-000000005"
    with pytest.raises(FloatingPointError, match=named):
        go("run", at={6: poison}, save_every=5, **method)
    with pytest.raises(FloatingPointError, match=r"weights are not finite after step 5, of items i\d+"):
        go("other", at={5: poison}, save_every=5, **method)


# --- the same with real processes ----------------------------------------------------------------------
SCRIPT = "import distjudge; distjudge.cli(distjudge.run, distjudge.Config)"


def start(tmp_path, model, out, *more):
    settings = f"--train {tmp_path}/items.jsonl --model {model} --out {tmp_path}/{out} --lora_rank 4"
    settings += " --epochs 6 --batch_size 3 --learning_rate 0.01 --save_every 1"
    command = [sys.executable, "-c", SCRIPT, *settings.split(), *more]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, **pipe, env=environment)


@pytest.mark.slow
def test_killed_at_twenty_random_points(tiny_model, items_file, tmp_path):
    """SIGKILL somewhere between the start and the end, writing of checkpoints and results included."""
    items_file(37)
    process = start(tmp_path, tiny_model, "whole")
    assert process.wait() == 0, process.stdout.read()
    draw, killed = random.Random(0), 0
    for n in range(20):
        out, process = tmp_path / f"run{n}", start(tmp_path, tiny_model, f"run{n}")
        step = draw.randint(0, 61)  # of 60; 61: after the last, when results are written
        done = lambda out=out: (out / "judge.json").exists()  # noqa: E731
        there = done if step > 60 else lambda out=out, k=step: max(steps(out), default=0) >= k
        while process.poll() is None and not there():
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
def test_sigint_to_the_command_ends_in_130(tiny_model, items_file, tmp_path):
    items_file(37)
    process = start(tmp_path, tiny_model, "run", "--epochs", "300")
    while not steps(tmp_path / "run"):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    text = process.communicate()[0]
    assert process.returncode == 130 and "stopped by SIGINT after step" in text and "Traceback" not in text
    assert not (tmp_path / "run" / "metrics.json").exists()


@pytest.mark.slow
def test_a_disk_that_is_really_full(tiny_model, items_file, tmp_path):
    items_file(37)
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        process = start(tmp_path, tiny_model, "disk/run")
        text = process.communicate()[0]
        assert process.returncode == 2 and "the checkpoint cannot be written" in text, text
        assert "Traceback" not in text
        kept = checkpoints(disk / "run")
        assert kept and all(distjudge.load_checkpoint(path) for path in kept)
        assert not list((disk / "run" / "checkpoints").glob("*.part"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)
