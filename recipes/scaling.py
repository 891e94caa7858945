"""How much faster two processes train and judge than one: items a second, and the ratio.

    python recipes/scaling.py          # training under torchrun, judging under Ray Data where it is installed
    python recipes/scaling.py --processes 1 2 4 --repeats 5 --out runs/scaling

The model, the items and the items a step are the same for any number of processes. Each computes with one
thread. The counts take turns, so that a busy minute is shared. Medians and ranges go to scaling.json and
scaling.md in --out. Starting, loading and the first step (for judging: the first batch) are not counted.
Tokens are what all forward passes computed: two processes share less of what prompts have in common.
"""

import dataclasses
import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "recipes")]

import distjudge
from distjudge import InputError

import bench
import tiny
import torch


@dataclasses.dataclass
class ScalingConfig:
    items: str = ""
    """What to train on and to judge. Default: the embedded sample."""
    number: int = 960
    """So many of them."""
    processes: tuple[int, ...] = (1, 2)
    """Numbers of processes, the first of which the others are compared with."""
    repeats: int = 3
    """Runs of each."""
    batch_size: int = 32
    """Items an optimizer step, all processes together."""
    hidden: int = 256
    """Width of the model, which has random weights."""
    layers: int = 4
    """Layers of the model."""
    out: str = "runs/scaling"
    """The folder for model, table and judgments; it is replaced."""


def items_of(config: ScalingConfig) -> list[distjudge.Item]:
    return distjudge.load_items(config.items or tiny.SAMPLE)[: config.number]


def work(config: ScalingConfig) -> None:
    """One process of one run: trains, and writes the seconds from its second step on and its tokens."""
    torch.set_num_threads(1)
    out, items, tokens, ends = Path(config.out), items_of(config), [], []
    judge = distjudge.load_judge(out / "base", distjudge.labels_of(items), lora_rank=0)
    batch = judge.batch

    def counted(encoded: list[list[int]]) -> dict[str, torch.Tensor]:
        made = batch(encoded)
        tokens.append(made["input_ids"].numel())
        return made

    judge.batch = counted
    settings = {"batch_size": config.batch_size, "epochs": 1.0, "learning_rate": 1e-3, "save_every": 0.0}
    training = distjudge.Config(out=str(out / "train"), lora_rank=0, **settings)
    distjudge.train(judge, items, training, on_step=lambda _: ends.append(time.perf_counter()))
    found = {"seconds": ends[-1] - ends[0], "items": len(items) - config.batch_size, "tokens": sum(tokens)}
    distjudge.write_json(out / f"rank-{os.environ['RANK']}.json", found)


def call(*command: Any) -> str:
    command, environment = [sys.executable, *map(str, command)], os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise InputError(f"{' '.join(command[:4])} ...: {done.stderr.strip().rpartition(chr(10))[2]}")
    return done.stderr


def train_once(config: ScalingConfig, processes: int) -> dict[str, float]:
    given = dataclasses.asdict(config).items()
    own = [f"--{name}={value}" for name, value in given if name not in ("processes", "repeats")]
    call("-m", "torch.distributed.run", "--nproc_per_node", processes, "--standalone", __file__, *own)
    ranks = [json.loads(Path(config.out, f"rank-{n}.json").read_text()) for n in range(processes)]
    slowest = max(rank["seconds"] for rank in ranks)
    return {"rate": ranks[0]["items"] / slowest, "tokens": sum(rank["tokens"] for rank in ranks)}


def judge_once(config: ScalingConfig, processes: int) -> dict[str, float]:
    """Twelve batches, or the first of each actor would be most of the work."""
    out, size = Path(config.out), max(1, config.number // 12)
    files = ("--run", out / "run", "--items", out / "items.jsonl", "--out", out / "judged.jsonl")
    sizes = ("--judges", processes, "--batch_size", size, "--blocks", 12)
    said = call(ROOT / "recipes" / "judge_ray.py", *files, *sizes)
    found = re.search(r"judged (\d+) items .* ([0-9.]+) s of them after the first batch", said)
    return {"rate": (int(found[1]) - size) / float(found[2])}


def main(config: ScalingConfig) -> None:
    if "RANK" in os.environ:  # started by torchrun
        return work(config)
    items, out = items_of(config), Path(config.out)
    size = tiny.TinyConfig(hidden=config.hidden, layers=config.layers)
    size.check()
    if min(config.repeats, config.batch_size, *config.processes or [0]) < 1:
        raise InputError("repeats, batch_size, processes: must be 1 or more")
    if len(items) < 3 * config.batch_size:
        raise InputError(f"items: {len(items)} are under three steps of {config.batch_size}")
    distjudge.check_out(out, "scaling.json", "base")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    base = tiny.build_base(out / "base", items, size, 0)
    distjudge.write_lines(out / "items.jsonl", [json.dumps({"prompt": item.prompt}) for item in items])
    distjudge.save_judge(distjudge.load_judge(base, distjudge.labels_of(items), lora_rank=0), out / "run")
    kinds = {"training, torchrun": train_once}
    if importlib.util.find_spec("ray"):
        kinds["judging, Ray Data"] = judge_once
    else:
        print('judging is not measured: pip install "ray[data]"')

    def measure(what: str, n: int) -> dict[str, float]:
        found = kinds[what](config, n)
        print(f"{what}, {n} processes: {found['rate']:.1f} items/s", flush=True)
        return found

    ways = {(what, n): functools.partial(measure, what, n) for what in kinds for n in config.processes}
    runs, rows = {what: {} for what in kinds}, []
    for (what, n), found in bench.take_turns(ways, config.repeats).items():
        runs[what][n] = found
        first = runs[what][config.processes[0]]
        ratios = [run["rate"] / one["rate"] for run, one in zip(found, first, strict=True)]
        row = {"what": what, "processes": n, "items a second": bench.spread([run["rate"] for run in found])}
        rows.append(row | {"times the first": bench.spread(ratios)})
        rows[-1]["tokens computed"] = found[0].get("tokens", "")
    about = {"settings": dataclasses.asdict(config), "versions": distjudge.versions(), "runs": runs}
    distjudge.write_json(out / "scaling.json", about | {"cores": os.cpu_count()})
    distjudge.write_lines(out / "scaling.md", lines := bench.table(rows))
    print("\n".join([*lines, f"wrote {out / 'scaling.md'}"]))


if __name__ == "__main__":
    distjudge.cli(main, ScalingConfig)
