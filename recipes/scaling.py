"""How training and judging go on one process and on two: items a second, and how near that comes to twice as many.

    python recipes/scaling.py                          # training under torchrun, judging under Ray Data where it is installed
    python recipes/scaling.py --processes 1 2 4 --repeats 5 --out runs/scaling

Trains the same model on the same items with the same items a step, whatever the number of processes; each process computes with one
thread, so that two have twice the means of one. The counts take turns, so that a busy minute is shared; medians and ranges go to
scaling.json and scaling.md in --out. Starting, loading and the first step (for judging: the first batch) are not counted.
Tokens are what the forward passes computed, all processes together: two processes share less of what prompts have in common.
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

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "recipes")]

import tiny
import torch

import distjudge
from distjudge import InputError


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
    """One process of one run: trains, and writes the seconds from its second step on and the tokens it computed."""
    import transformers

    torch.set_num_threads(1)
    items = distjudge.load_items(config.items)[: config.number]
    judge = distjudge.load_judge(str(Path(config.out) / "base"), distjudge.labels_of(items), lora_rank=0)
    batch, tokens, ends = judge.batch, [], []

    def counted(encoded):
        made = batch(encoded)
        tokens.append(made["input_ids"].numel())
        return made

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            ends.append(time.perf_counter())

    judge.batch = counted
    distjudge.train(judge, items, distjudge.Config(out=str(Path(config.out) / "train"), batch_size=config.batch_size, epochs=1.0,
                                                   learning_rate=1e-3, save_every=0.0), callbacks=[Clock()])
    rank = os.environ.get("RANK", "0")
    found = {"seconds": ends[-1] - ends[0], "items": len(items) - config.batch_size, "tokens": sum(tokens)}
    (Path(config.out) / f"rank-{rank}.json").write_text(json.dumps(found), encoding="utf-8")


def call(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise InputError(f"{' '.join(command[:4])} ... ended with {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
    return done.stderr


def train_once(config: ScalingConfig, processes: int) -> dict[str, float]:
    out = Path(config.out)
    for old in out.glob("rank-*.json"):
        old.unlink()
    own = [f"--{name}={value}" for name, value in dataclasses.asdict(config).items() if name not in ("processes", "repeats")]
    call([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone", str(Path(__file__)), *own])
    ranks = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("rank-*.json"))]
    if len(ranks) != processes:
        raise InputError(f"{out}: {processes} processes were started, {len(ranks)} wrote what they measured")
    return {"rate": ranks[0]["items"] / max(rank["seconds"] for rank in ranks), "tokens": sum(rank["tokens"] for rank in ranks)}


def judge_once(config: ScalingConfig, processes: int) -> dict[str, float]:
    """Twelve batches at least, or the first of each actor would be most of the work."""
    size = max(1, config.number // 12)
    said = call([sys.executable, str(ROOT / "recipes" / "judge_ray.py"), "--run", str(Path(config.out) / "run"), "--items",
                 str(Path(config.out) / "items.jsonl"), "--out", str(Path(config.out) / "judged.jsonl"), "--judges", str(processes),
                 "--batch_size", str(size), "--blocks", str(12)])
    found = re.search(r"judged (\d+) items .* ([0-9.]+) s of them after the first batch", said)
    if not found:
        raise InputError(f"recipes/judge_ray.py did not say how long it took: {said[-300:]}")
    return {"rate": (int(found[1]) - size) / float(found[2])}


def lines_of(name: str, runs: dict[int, list[dict[str, float]]]) -> list[str]:
    """Rows of the table: median (least to most), and the median of the ratios run by run."""
    first, lines = next(iter(runs)), []
    for processes, found in runs.items():
        rates = [run["rate"] for run in found]
        ratios = [run["rate"] / base["rate"] for run, base in zip(found, runs[first], strict=True)]
        tokens = f"{found[0]['tokens']:,.0f}" if "tokens" in found[0] else ""
        lines.append(f"| {name} | {processes} | {statistics.median(rates):.1f} ({min(rates):.1f} to {max(rates):.1f}) | "
                     f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | {tokens} |")
    return lines


def main(config: ScalingConfig) -> None:
    if "RANK" in os.environ:  # started by torchrun
        return work(config)
    items = distjudge.load_items(config.items)[: config.number]
    for name, low in (("repeats", 1), ("batch_size", 1), ("layers", 1), ("hidden", 16)):
        if getattr(config, name) < low:
            raise InputError(f"{name}: must be {low} or more, not {getattr(config, name)}")
    if not config.processes or min(config.processes) < 1:
        raise InputError("processes: must be 1 or more")
    if len(items) < 3 * config.batch_size:
        raise InputError(f"{config.items}: {len(items)} items are under three steps of {config.batch_size}")
    out = Path(config.out)
    if out.exists() and any(out.iterdir()) and not (out / "scaling.json").exists():
        raise InputError(f"{out}: holds something else than an earlier run of this; name another folder")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    base = tiny.build_base(out / "base", items, tiny.TinyConfig(hidden=config.hidden, layers=config.layers), 0)
    distjudge.write_lines(out / "items.jsonl", [json.dumps({"id": item.id, "prompt": item.prompt}) for item in items])
    judge = distjudge.load_judge(base, distjudge.labels_of(items), lora_rank=0)
    distjudge.save_judge(judge, out / "run")
    kinds = {"training, torchrun": train_once}
    if importlib.util.find_spec("ray"):
        kinds["judging, Ray Data"] = judge_once
    else:
        print('judging is not measured: pip install "ray[data]"')
    runs: dict[str, dict[int, list[dict[str, float]]]] = {name: {n: [] for n in config.processes} for name in kinds}
    for turn in range(config.repeats):
        for name, once in kinds.items():
            for n in config.processes:
                runs[name][n].append(once(config, n))
                print(f"{turn + 1}: {name}, {n} processes: {runs[name][n][-1]['rate']:.1f} items a second", flush=True)
    lines = ["| what | processes | items a second, median (least to most) | times the first | tokens computed |", "| --- " * 5 + "|"]
    lines += [line for name, found in runs.items() for line in lines_of(name, found)]
    about = {"settings": dataclasses.asdict(config), "versions": distjudge.versions(), "cores": os.cpu_count()}
    distjudge.write_json(out / "scaling.json", about | {"runs": runs})
    distjudge.write_lines(out / "scaling.md", lines)
    print("\n".join(lines) + f"\nwrote {out / 'scaling.md'}")


if __name__ == "__main__":
    distjudge.cli(main, ScalingConfig)
