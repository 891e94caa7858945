"""Several processes: training under torchrun with gloo, and how it scales."""

import itertools
import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, call

HEAD = """
import json, os, signal, sys
sys.path.insert(0, {root!r})
import torch, distjudge
torch.set_num_threads(1)
rank, trouble = os.environ.get("RANK", "0"), sys.argv[2:]
items = distjudge.load_items("items.jsonl")
judge = distjudge.load_judge({model!r}, distjudge.labels_of(items), lora_rank=4)
settings = {{"batch_size": 8, "epochs": 2.0, "learning_rate": 1e-2, "schedule": "constant"}}
"""
TRAIN = """
given = []
plan = judge.plan
seen = lambda encoded: [tuple(ids) for ids in encoded]
# a teacher plans them too
judge.plan = lambda encoded: given[-1:] != [seen(encoded)] and given.append(seen(encoded)) or plan(encoded)
log = distjudge.train(judge, items, distjudge.Config(out=sys.argv[1], teacher=float(sys.argv[2]), **settings))
number = {{tuple(ids): i for i, ids in enumerate(judge.encode([item.prompt for item in items]))}}
weights = torch.cat([p.detach().flatten() for p in judge.model.parameters() if p.requires_grad])
with open(sys.argv[1] + "/rank" + rank + ".json", "w") as file:
    given = [[number[ids] for ids in step] for step in given]
    json.dump({{"losses": [line["loss"] for line in log], "given": given,
               "weights": weights.tolist()}}, file)
"""
RUN = """
one = dict(train=("items.jsonl",), epochs=1.0, batch_size=6, bf16=False)  # bfloat16 rounds by the pass
config = distjudge.Config(**one, model={model!r}, out=sys.argv[1])
found = distjudge.run(config)
print("metrics", len(found))
"""


@pytest.fixture
def launch(tiny_model, items_file, tmp_path):
    """A function that runs a script on n processes and returns its standard output."""
    items_file(25)  # steps of 8, 8, 8 and 1: in the last one a process of two has nothing to do

    def run(script, out, processes, *arguments):
        script = (HEAD + script).format(root=str(ROOT), model=str(tiny_model))
        (tmp_path / "script.py").write_text(script)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        torchrun = f"-m torch.distributed.run --nproc_per_node {processes} --master_addr 127.0.0.1"
        torchrun = [*torchrun.split(), "--master_port", str(port)] if processes > 1 else []
        command = [sys.executable, *torchrun, "script.py", out, *arguments]
        options = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 600}
        done = subprocess.run(command, **options, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "teacher"), [(2, "0"), (3, "0"), (2, "5")])
def test_processes_train_as_one_does(launch, tmp_path, processes, teacher):
    """Same losses and weights as one process: batch_size items a step altogether, each dealt once."""
    launch(TRAIN, "one", 1, teacher)
    launch(TRAIN, "several", processes, teacher)
    read = lambda name: json.loads((tmp_path / name).read_text())  # noqa: E731
    one, ranks = read("one/rank0.json"), [read(f"several/rank{k}.json") for k in range(processes)]
    steps = [8, 8, 8, 1] * 2
    assert [len(step) for step in one["given"]] == steps
    assert sorted(itertools.chain(*one["given"][:4])) == list(range(25))
    for k, step in enumerate(one["given"]):
        dealt = [rank["given"][k] for rank in ranks]
        if steps[k] == 8:
            assert list(itertools.chain(*dealt)) == step and max(map(len, dealt)) - min(map(len, dealt)) <= 1
        else:  # one has the item, and the others nothing
            assert sorted(dealt) == [[]] * (processes - 1) + [step]
    for rank in ranks:
        assert rank["losses"] == pytest.approx(one["losses"], rel=1e-4) and len(set(one["losses"])) == 8
        assert torch.allclose(torch.tensor(rank["weights"]), torch.tensor(one["weights"]), atol=1e-4)
        assert rank["weights"] == ranks[0]["weights"]


TROUBLE = """
layer, calls = judge.model.get_decoder().layers[-1], []

def out_of_memory(*unused):  # once, in the second step of the second process
    calls.append(1)
    if trouble == ["memory"] and rank == "1" and len(calls) == 3:
        raise torch.OutOfMemoryError("played")

layer.register_forward_hook(out_of_memory)

def on_step(n):
    if trouble == ["signal"] and rank == "1" and n == 2:
        os.kill(os.getpid(), signal.SIGTERM)

try:
    config = distjudge.Config(out=sys.argv[1], **settings, pack_tokens=200)
    log = distjudge.train(judge, items, config, on_step=on_step)
except distjudge.Stopped as stopped:
    log = [{{"loss": str(stopped)[:31]}}]
with open(sys.argv[1] + "/rank" + rank + ".json", "w") as file:
    json.dump([row["loss"] for row in log], file)
"""


@pytest.mark.slow
def test_trouble_of_one_process_is_that_of_all(launch, tmp_path):
    """Memory runs out on one: smaller passes, nobody hangs. A signal to one: all stop after one step."""
    launch(TROUBLE, "one", 1, "none")
    for trouble in ("memory", "signal"):
        launch(TROUBLE, trouble, 2, trouble)
    read = lambda name: json.loads((tmp_path / name).read_text())  # noqa: E731
    for rank in (0, 1):
        assert read(f"memory/rank{rank}.json") == pytest.approx(read("one/rank0.json"), rel=1e-4)
        assert read(f"signal/rank{rank}.json") == ["stopped by SIGTERM after step 3"]
    assert len(list((tmp_path / "signal/checkpoints").glob("step-000000003*"))) == 1


HALF = """
for name, weight in judge.model.named_parameters():
    weight.data = weight.data if weight.requires_grad else weight.data.half()
settings["batch_size"] = 1
assert distjudge.autocast_type(judge) == torch.float16
log = distjudge.train(judge, items[:3], distjudge.Config(out=sys.argv[1], **settings))
print("steps", len(log))
"""


@pytest.mark.slow
def test_a_process_without_items_takes_part_in_float16(launch):
    assert launch(HALF, "half", 2).count("steps 6") == 2


@pytest.mark.slow
def test_a_run_of_two_processes_writes_one_folder(launch, tmp_path):
    assert sorted(launch(RUN, "two", 2).split("metrics ")[1:])[0].strip() == "0"
    launch(RUN, "one", 1)
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two")]
    assert metrics[0].keys() == metrics[1].keys() and metrics[0]["items"] == 5
    for name, value in metrics[0].items():
        assert metrics[1][name] == (None if value is None else pytest.approx(value, rel=1e-3, abs=1e-5)), name
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("one", "two")]
    assert [json.loads(line)["step"] for line in logs[0]] == [json.loads(line)["step"] for line in logs[1]]


@pytest.mark.slow
def test_scaling_is_measured(tmp_path):
    """Every count of processes took the same items once, in the same steps; nothing is said of how fast."""
    flags = f"--number 60 --batch_size 16 --hidden 16 --layers 1 --repeats 1 --out {tmp_path / 's'}"
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    call("recipes/scaling.py", *flags.split(), timeout=900, env=one_thread)
    found = json.loads((tmp_path / "s" / "scaling.json").read_text())
    training = found["runs"]["training, torchrun"]
    assert [len(training[n]) for n in ("1", "2")] == [1, 1]
    assert all(runs[0]["rate"] > 0 for runs in training.values())
    # two shares of a step have less in common than the whole
    assert training["2"][0]["tokens"] > training["1"][0]["tokens"]
    assert len((tmp_path / "s" / "scaling.md").read_text().splitlines()) == 2 + 2 * len(found["runs"])
