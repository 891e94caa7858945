"""How much faster two processes train and judge than one: items a second, and the ratio.

    python recipes/scaling.py          # training under torchrun, judging under Ray Data where it is installed
    python recipes/scaling.py --processes 1 2 4 --repeats 5 --out runs/scaling

The model, the items and the items a step are the same for any number of processes. Each computes with one
thread. The counts take turns, so that a busy minute is shared. Medians and ranges go to scaling.json and
scaling.md in --out. Starting, loading and the first step (for judging: the first batch) are not counted.
Tokens are what all forward passes computed: two processes share less of what prompts have in common.
"""

import dataclasses
import importlib.util
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "recipes")]

import distjudge
from distjudge import InputError

import tiny
import torch


@dataclasses.dataclass
class ScalingConfig:
    items: str = tiny.SAMPLE
    """What to train on and to judge."""
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


def work(config: ScalingConfig) -> None:
    """One process of one run: trains, and writes the seconds from its second step on and its tokens."""
    torch.set_num_threads(1)
    out, items, tokens, ends = Path(config.out), distjudge.load_items(config.items)[: config.number], [], []
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
        why = done.stderr.strip().splitlines()[-1:]
        raise InputError(f"{' '.join(command[:4])} ... ended with {done.returncode}: {why}")
    return done.stderr


def train_once(config: ScalingConfig, processes: int) -> dict[str, float]:
    out = Path(config.out)
    for old in out.glob("rank-*.json"):
        old.unlink()
    own = dataclasses.asdict(config)
    del own["processes"], own["repeats"]
    own = [f"--{name}={value}" for name, value in own.items()]
    call("-m", "torch.distributed.run", "--nproc_per_node", processes, "--standalone", __file__, *own)
    ranks = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("rank-*.json"))]
    if len(ranks) != processes:
        raise InputError(f"{out}: {processes} processes were started, {len(ranks)} wrote what they measured")
    slowest = max(rank["seconds"] for rank in ranks)
    return {"rate": ranks[0]["items"] / slowest, "tokens": sum(rank["tokens"] for rank in ranks)}


def judge_once(config: ScalingConfig, processes: int) -> dict[str, float]:
    """Twelve batches, or the first of each actor would be most of the work."""
    out, size = Path(config.out), max(1, config.number // 12)
    files = ("--run", out / "run", "--items", out / "items.jsonl", "--out", out / "judged.jsonl")
    sizes = ("--judges", processes, "--batch_size", size, "--blocks", 12)
    said = call(ROOT / "recipes" / "judge_ray.py", *files, *sizes)
    found = re.search(r"judged (\d+) items .* ([0-9.]+) s of them after the first batch", said)
    if not found:
        raise InputError(f"recipes/judge_ray.py did not say how long it took: {said[-300:]}")
    return {"rate": (int(found[1]) - size) / float(found[2])}


def line_of(name: str, processes: int, found: list[dict[str, float]], base: list[dict[str, float]]) -> str:
    """A row of the table: median (least to most), and the same of the ratios run by run."""
    rates = [run["rate"] for run in found]
    ratios = [rate / run["rate"] for rate, run in zip(rates, base, strict=True)]
    cells = [f"{statistics.median(x):.2f} ({min(x):.2f} to {max(x):.2f})" for x in (rates, ratios)]
    tokens = f"{found[0]['tokens']:,.0f}" if "tokens" in found[0] else ""
    return f"| {' | '.join([name, str(processes), *cells, tokens])} |"


def main(config: ScalingConfig) -> None:
    if "RANK" in os.environ:  # started by torchrun
        return work(config)
    items, out = distjudge.load_items(config.items)[: config.number], Path(config.out)
    values = dataclasses.asdict(config) | {"processes": min(config.processes, default=0)}
    for name, low in {"repeats": 1, "batch_size": 1, "layers": 1, "hidden": 16, "processes": 1}.items():
        if values[name] < low:
            raise InputError(f"{name}: must be {low} or more, not {values[name]}")
    if len(items) < 3 * config.batch_size:
        raise InputError(f"{config.items}: {len(items)} items are under three steps of {config.batch_size}")
    if out.exists() and any(out.iterdir()) and not (out / "scaling.json").exists():
        raise InputError(f"{out}: holds something else than an earlier run of this; name another folder")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    size = tiny.TinyConfig(hidden=config.hidden, layers=config.layers)
    base = tiny.build_base(out / "base", items, size, 0)
    rows = [json.dumps({"id": item.id, "prompt": item.prompt}) for item in items]
    distjudge.write_lines(out / "items.jsonl", rows)
    distjudge.save_judge(distjudge.load_judge(base, distjudge.labels_of(items), lora_rank=0), out / "run")
    kinds = {"training, torchrun": train_once}
    if importlib.util.find_spec("ray"):
        kinds["judging, Ray Data"] = judge_once
    else:
        print('judging is not measured: pip install "ray[data]"')
    runs = {name: {n: [] for n in config.processes} for name in kinds}
    for turn in range(config.repeats):
        for name, once in kinds.items():
            for n, found in runs[name].items():
                found.append(once(config, n))
                print(f"{turn + 1}: {name}, {n} processes: {found[-1]['rate']:.1f} items/s", flush=True)
    lines = ["| what | processes | items a second (least to most) | times the first | tokens computed |"]
    lines.append("| --- " * 5 + "|")
    for name, counts in runs.items():
        lines += [line_of(name, n, found, counts[config.processes[0]]) for n, found in counts.items()]
    about = {"settings": dataclasses.asdict(config), "versions": distjudge.versions(), "runs": runs}
    distjudge.write_json(out / "scaling.json", about | {"cores": os.cpu_count()})
    distjudge.write_lines(out / "scaling.md", lines)
    print("\n".join(lines) + f"\nwrote {out / 'scaling.md'}")


if __name__ == "__main__":
    distjudge.cli(main, ScalingConfig)
