"""What large inputs and long runs take: memory, time, and whether anything grows. Linux only; run by name.

    python tests/load.py --parts judge               # judges 10,000, 100,000 and 1,000,000 items
    python tests/load.py --parts open                # a training file of 100,000 items, to the first step
    python tests/load.py --parts soak --minutes 60   # trains, stops, resumes, saves, loads, judges, all over

Everything is made on the spot from --seed: a small Qwen2 of random weights, and items of random words of the
embedded sample. The last run of the judge part is killed half way and resumed. Each part writes PART.csv and
PART.md into --out (the repository's own are in plots/results/load). Memory is resident memory in MiB, from
/proc: VmHWM is its peak, VmRSS its present size. Times depend on other work; CPU seconds do not.
"""

import contextlib
import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / part) for part in ("", "recipes", "data")]

import distjudge

import bench
import judge as judge_recipe
import numpy
import pandas
import tiny
import torch

LABELS = list("12345")
INSTRUCTION = "How many stars, from 1 to 5, does this review give? Answer with the number only."


@dataclasses.dataclass
class LoadConfig:
    parts: tuple[Literal["judge", "open", "soak"], ...] = ("judge", "open", "soak")
    """What to measure."""
    out: str = "runs/load"
    """Where the tables go."""
    sizes: tuple[int, ...] = (10_000, 100_000, 1_000_000)
    """Items to judge; the last run is killed when half of them are out, and resumed."""
    train_items: int = 100_000
    """Items of the training file to open."""
    minutes: float = 60.0
    """How long the soak run goes on."""
    seed: int = 0
    """Seed of items and weights."""


def write_items(path: Path, number: int, seed: int, groups: bool = False) -> None:
    """Reviews of random words; with `groups` four at a time about one article, with five votes each."""
    draw, sample = random.Random(seed), " ".join(item.prompt for item in distjudge.load_items(tiny.SAMPLE))
    words, article = sorted(set(re.findall(r"\w+", sample))), ""
    with open(path, "w", encoding="utf-8") as file:
        for i in range(number):
            row: dict[str, Any] = {"id": f"r{i}"}
            if groups:
                row |= {"group": f"g{i // 4}", "annotations": draw.choices(LABELS, k=5)}
                article = article if i % 4 else f"Article: {' '.join(draw.choices(words, k=60))}\n\n"
            review = " ".join(draw.choices(words, k=draw.randint(10, 30)))
            row["prompt"] = f"{INSTRUCTION}\n\n{article}Review: {review}"
            file.write(json.dumps(row) + "\n")


def watch(command: list[str], file: Path, kill_at: float = 0) -> dict[str, float]:
    """Runs a command: its seconds, CPU seconds and peak memory. Kills it once `file` has kill_at bytes."""
    start, peak = time.monotonic(), 0.0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
        peak = max(peak, bench.resident("VmHWM", process.pid))
        if kill_at and file.exists() and file.stat().st_size >= kill_at:
            process.kill()
        time.sleep(0.05)
    process.returncode = os.waitstatus_to_exitcode(ended[1])
    if process.returncode != (-signal.SIGKILL if kill_at else 0):
        raise RuntimeError(f"{' '.join(command)}: exit code {process.returncode}")
    cpu = ended[2].ru_utime + ended[2].ru_stime
    return {"seconds": time.monotonic() - start, "cpu_seconds": cpu, "peak_mib": peak}


def check_judgments(path: Path, number: int) -> None:
    """All items, once each, in order, with distributions."""
    with open(path, encoding="utf-8") as file:
        for i, line in enumerate(file):
            row = json.loads(line)
            if row["id"] != f"r{i}" or abs(sum(row["predicted"].values()) - 1) > 1e-5:
                raise RuntimeError(f"{path}:{i + 1}: not a distribution for 'r{i}'")
    if i + 1 != number:
        raise RuntimeError(f"{path}: {i + 1} lines of {number}")


def judge_part(config: LoadConfig, work: Path, base: str) -> list[dict[str, Any]]:
    """recipes/judge.py, a process a run, and every output checked."""
    run, items, out = work / "run", work / "items.jsonl", work / "judged.jsonl"
    rows, bytes_an_item = [], 0.0
    distjudge.save_judge(distjudge.load_judge(base, LABELS, lora_rank=0), run)
    command = [sys.executable, ROOT / "recipes" / "judge.py", "--run", run, "--items", items, "--out", out]
    for size in config.sizes:
        write_items(items, size, config.seed)
        kept, killed = 0, bool(rows) and size == config.sizes[-1]
        for what in ("killed half way", "resumed") if killed else ("whole",):
            half = bytes_an_item * size / 2 if what == "killed half way" else 0
            found = watch(list(map(str, command)), out, half)
            there = sum(1 for _ in open(out, "rb"))
            found |= {"items": size, "what": what, "judged": there - kept}
            rows.append(found | {"items_a_cpu_second": (there - kept) / found["cpu_seconds"]})
            kept = there
        check_judgments(out, size)
        bytes_an_item = out.stat().st_size / size
        out.unlink()
    return rows


class FirstStep(Exception):
    """Training has made its first step."""


def open_stages(path: Path, base: str, out: Path) -> list[dict[str, Any]]:
    """What distjudge.run() does until the first step, a row a stage; then packs. In a process of its own."""
    rows: list[dict[str, Any]] = []

    def stop(number: int) -> None:
        raise FirstStep

    @contextlib.contextmanager
    def stage(what: str):
        start, cpu = time.monotonic(), time.process_time()
        yield
        times = {"seconds": time.monotonic() - start, "cpu_seconds": time.process_time() - cpu}
        rows.append({"stage": what, **times, "peak_mib": bench.resident("VmHWM")})

    with stage("start (imports)"):
        torch.set_num_threads(1)
    with stage("load_items"):
        items = distjudge.load_items(path)
    with stage("split_items, keep_apart"):
        learn, test = distjudge.split_items(items)
        distjudge.keep_apart(learn, test)
    with stage("load_judge"):
        judge = distjudge.load_judge(base, LABELS, lora_rank=0)
    judge.encoder.memo = {}  # as distjudge.run() does
    with stage("keep_short (tokenizes every prompt)"):
        learn, test = (distjudge.keep_short(judge, some, "error", "training") for some in (learn, test))
    with stage("train() to the end of its first step"), contextlib.suppress(FirstStep):
        config = distjudge.Config(out=str(out), lora_rank=0, batch_size=16, save_every=0)
        bench.quietly(lambda: distjudge.train(judge, learn, config, test, on_step=stop))
    encoded = judge.encode([item.prompt for item in learn])
    with stage("of which: order of an epoch"):
        order = distjudge.epoch_order(encoded, config, 0)
    with stage("packs of every step of an epoch"):
        for k in range(0, len(order), 16):
            judge.plan([encoded[i] for i in order[k : k + 16]])
    return rows


def open_part(config: LoadConfig, work: Path, base: str) -> list[dict[str, Any]]:
    write_items(work / "train.jsonl", config.train_items, config.seed, groups=True)
    return bench.in_new_process(open_stages, work / "train.jsonl", base, work / "opened")


def soak_cycle(number: int, base: str, work: Path) -> None:
    """The whole life of a judge. LoRA and all weights take turns."""
    out, judged, items = work / "soak", work / "out.jsonl", distjudge.load_items(tiny.SAMPLE)
    learn, test, rank = items[:96], items[96:160], 4 * (number % 2)
    settings = {"batch_size": 8, "epochs": 1.0, "save_every": 2, "eval_every": 6, "teacher": 5.0}
    config = distjudge.Config(out=str(out), seed=number, lora_rank=rank, **settings)

    def interrupt(step: int) -> None:
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    judge = distjudge.load_judge(base, LABELS, lora_rank=rank, seed=number)
    with contextlib.suppress(distjudge.Stopped):
        distjudge.train(judge, learn, config, test, on_step=interrupt)
        raise RuntimeError("training went on after SIGTERM")
    judge, config.resume = distjudge.load_judge(base, LABELS, lora_rank=rank, seed=number), True
    distjudge.train(judge, learn, config, test)
    distjudge.save_judge(judge, out)
    distjudge.write_results(judge, test, learn, config, out)
    judged.unlink(missing_ok=True)
    judge_recipe.main(judge_recipe.JudgeConfig(run=str(out), items=str(work / "in.jsonl"), out=str(judged)))
    check_judgments(judged, 200)


def soak_part(config: LoadConfig, work: Path, base: str) -> list[dict[str, Any]]:
    """A row a cycle."""
    rows, start = [], time.monotonic()
    write_items(work / "in.jsonl", 200, config.seed)
    while len(rows) < 4 or time.monotonic() - start < 60 * config.minutes:
        bench.quietly(lambda: soak_cycle(len(rows), base, work))
        row = {
            "cycle": len(rows) + 1,
            "seconds": time.monotonic() - start,
            "rss_mib": bench.resident("VmRSS"),
        }
        row |= {
            "threads": len(os.listdir("/proc/self/task")),
            "open_files": len(os.listdir("/proc/self/fd")) - 1,
        }
        rows.append(row | {"cpu_seconds": time.process_time(), "blocks": sys.getallocatedblocks()})
        if len(rows) % 20 == 1:
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def growth(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """growth: the slope of a least-squares line after the first sixth of the time, and its standard error."""
    table = pandas.DataFrame(rows)
    late, found = table[table["seconds"] >= table["seconds"].iloc[-1] / 6], []
    for name in ("rss_mib", "open_files", "threads", "blocks"):
        values = table[name]
        row = {"": name, "at_first": values.iloc[0], "at_last": values.iloc[-1], "greatest": values.max()}
        for what, along, times in (("an_hour", "seconds", 3600), ("in_100_cycles", "cycle", 100)):
            line, cov = numpy.polyfit(late[along], late[name], 1, cov=True)
            row[f"growth_{what}"] = f"{times * line[0]:+,.2f} ± {times * cov[0, 0] ** 0.5:,.2f}"
        found.append(row)
    return found


def main(config: LoadConfig) -> None:
    if not bench.resident("VmHWM"):
        raise distjudge.InputError("load: memory is read from /proc, which this system does not have")
    out, parts = Path(config.out), {"judge": judge_part, "open": open_part, "soak": soak_part}
    out.mkdir(parents=True, exist_ok=True)
    for part in config.parts:
        with tempfile.TemporaryDirectory(prefix="load-") as work:  # 700 MB at a million items
            sample, small = distjudge.load_items(tiny.SAMPLE), tiny.TinyConfig(hidden=32, layers=1)
            base = tiny.build_base(Path(work) / "base", sample, small, config.seed)
            rows = parts[part](config, Path(work), base)
        pandas.DataFrame(rows).round(2).to_csv(out / f"{part}.csv", index=False)
        about = dataclasses.asdict(config) | {"cores": os.cpu_count()} | distjudge.versions()
        lines = [*bench.table(growth(rows) if part == "soak" else rows), ""]
        lines.append(", ".join(f"{name} {value}" for name, value in about.items()))
        distjudge.write_lines(out / f"{part}.md", lines)
        print("\n".join(lines))


if __name__ == "__main__":
    distjudge.cli(main, LoadConfig)
