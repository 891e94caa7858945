"""What large inputs and long runs take: memory, time, and whether anything grows. Linux only; run by name, not by pytest.

    python tests/load.py --parts judge                  # recipes/judge.py on 10,000, 100,000 and 1,000,000 items, the last killed half way and resumed
    python tests/load.py --parts open                   # from a training file of 100,000 items to the first step, stage by stage
    python tests/load.py --parts soak --minutes 60      # train, stop, resume, save, load, judge: over and over in one process

Everything is made on the spot from --seed: a small Qwen2 of random weights, and items of random words of the embedded sample. Each part writes
PART.csv and PART.md into --out (the repository's own are in plots/results/load). Memory is resident memory, from /proc (VmHWM is its peak,
VmRSS its present size), in MiB. Times depend on what else the machine does: CPU seconds stand beside them.
"""
import concurrent.futures
import contextlib
import csv
import dataclasses
import json
import multiprocessing
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / part) for part in ("", "recipes")]

import judge as judge_recipe
import tiny
import torch

import distjudge

LABELS = list("12345")
INSTRUCTION = "How many stars, from 1 to 5, does this review give? Answer with the number only."


@dataclasses.dataclass
class LoadConfig:
    parts: tuple[Literal["judge", "open", "soak"], ...] = ("judge", "open", "soak")
    """What to measure."""
    out: str = "runs/load"
    """Where the tables go."""
    work: str = ""
    """Folder for models and items, about 700 MB at a million items. Default: a temporary one, removed at the end."""
    sizes: tuple[int, ...] = (10_000, 100_000, 1_000_000)
    """Items to judge; the last run is killed when half of them are out, and resumed."""
    train_items: int = 100_000
    """Items of the training file to open."""
    minutes: float = 60.0
    """How long the soak run goes on."""
    seed: int = 0
    """Seed of items and weights."""


def words() -> list[str]:
    """The words of the embedded sample."""
    return sorted({word for item in distjudge.load_items(tiny.SAMPLE) for word in re.findall(r"\w+", item.prompt)})


def write_items(path: Path, number: int, seed: int, groups: bool = False) -> None:
    """Reviews of 10 to 30 random words, without votes; with `groups` four at a time about one article of 60 words, with five votes each."""
    draw, known = random.Random(seed), words()
    with open(path, "w", encoding="utf-8") as file:
        for i in range(number):
            if groups and i % 4 == 0:
                article = " ".join(draw.choices(known, k=60))
            row: dict[str, Any] = {"id": f"r{i}", "prompt": f"{INSTRUCTION}\n\n" + (f"Article: {article}\n\n" if groups else "")
                                   + "Review: " + " ".join(draw.choices(known, k=draw.randint(10, 30)))}
            if groups:
                votes = draw.choices(LABELS, k=5)
                row |= {"group": f"g{i // 4}", "counts": {label: votes.count(label) for label in LABELS}}
            file.write(json.dumps(row) + "\n")


def make_base(folder: Path, seed: int) -> str:
    """One layer of width 32 and a vocabulary of about 600, saved as a model hub would serve it."""
    return tiny.build_base(folder, distjudge.load_items(tiny.SAMPLE), tiny.TinyConfig(hidden=32, layers=1), seed)


def memory(field: Literal["VmHWM", "VmRSS", "Threads"], pid: int | str = "self") -> float:
    """A field of /proc/PID/status: MiB, or a number of threads; 0 for a process that has ended."""
    with contextlib.suppress(OSError):
        found = re.search(rf"^{field}:\s+(\d+)( kB)?", Path(f"/proc/{pid}/status").read_text(), re.M)
        return int(found[1]) / (1024 if found[2] else 1) if found else 0.0
    return 0.0


def watch(command: list[str], kill_at: int = 0, file: Path | None = None) -> dict[str, float]:
    """Runs a command: its seconds, CPU seconds and peak memory. It is killed (SIGKILL) once `file` has kill_at bytes."""
    start, peak = time.monotonic(), 0.0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        peak = max(peak, memory("VmHWM", process.pid))
        if kill_at and file and file.exists() and file.stat().st_size >= kill_at:
            process.kill()
        time.sleep(0.05)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != (-signal.SIGKILL if kill_at else 0):
        raise RuntimeError(f"{' '.join(command)}: exit code {process.returncode}")
    return {"seconds": time.monotonic() - start, "cpu_seconds": usage.ru_utime + usage.ru_stime, "peak_mib": peak}


def judge_part(config: LoadConfig, work: Path) -> list[dict[str, Any]]:
    """recipes/judge.py, a process a run. Every output is checked: all items, once each, in order, with distributions."""
    run, rows = work / "run", []
    distjudge.save_judge(distjudge.load_judge(make_base(work / "base", config.seed), LABELS, lora_rank=0), run)
    for size in config.sizes:
        items, out = work / "items.jsonl", work / "judged.jsonl"
        write_items(items, size, config.seed)
        command = [sys.executable, str(ROOT / "recipes" / "judge.py"), "--run", str(run), "--items", str(items), "--out", str(out)]
        halves = size == config.sizes[-1] and len(config.sizes) > 1
        if halves:
            line = rows[-1]["output_mib"] / rows[-1]["items"] * 2**20
            found = {"items": size, "what": "killed half way"} | watch(command, int(size / 2 * line), out)
            found["judged"] = sum(1 for _ in open(out, "rb"))
            rows.append(found | {"output_mib": out.stat().st_size / 2**20})
        kept = rows[-1]["judged"] if halves else 0
        found = {"items": size, "what": "resumed" if halves else "whole"} | watch(command)
        rows.append(found | {"judged": size - kept, "output_mib": out.stat().st_size / 2**20})
        for row in rows[-2:] if halves else rows[-1:]:
            row["items_a_second"], row["items_a_cpu_second"] = row["judged"] / row["seconds"], row["judged"] / row["cpu_seconds"]
        with open(out, encoding="utf-8") as file:
            for i, text in enumerate(file):
                row = json.loads(text)
                if row["id"] != f"r{i}" or abs(sum(row["predicted"].values()) - 1) > 1e-5:
                    raise RuntimeError(f"{out}:{i + 1}: item '{row['id']}' in the place of 'r{i}', or no distribution")
        if i + 1 != size:
            raise RuntimeError(f"{out}: {i + 1} lines of {size}")
        out.unlink()
        print(rows[-1], file=sys.stderr)
    return rows


class FirstStep(Exception):
    """Training has come to its first step."""


def open_stages(path: str, base: str, out: str) -> list[dict[str, Any]]:
    """What distjudge.run() does before the first step, a row a stage; then the packs of an epoch and of all items at once."""
    import transformers

    rows: list[dict[str, Any]] = []

    @contextlib.contextmanager
    def stage(what: str):
        start, cpu = time.monotonic(), time.process_time()
        yield
        rows.append({"stage": what, "seconds": time.monotonic() - start, "cpu_seconds": time.process_time() - cpu, "peak_mib": memory("VmHWM")})
        print(rows[-1], file=sys.__stderr__, flush=True)

    class Stop(transformers.TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            raise FirstStep

    with stage("start (imports)"):
        torch.set_num_threads(1)
    with stage("load_items"):
        items = distjudge.load_items(path)
    with stage("split_items"):
        learn, test = distjudge.split_items(items)
    with stage("check_apart"):
        distjudge.check_apart(learn, test)
    with stage("load_judge"):
        judge = distjudge.load_judge(base, LABELS, lora_rank=0)
    judge.encoder.memo = {}  # as distjudge.run() does
    with stage("keep_short (tokenizes every prompt)"):
        learn, test = (distjudge.keep_short(judge, some, "error", "training") for some in (learn, test))
    with stage("train() to its first step"), open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere), contextlib.suppress(FirstStep):
        distjudge.train(judge, learn, distjudge.Config(out=out, lora_rank=0, batch_size=16, save_every=0), test, [Stop()])
    encoded = judge.encode([item.prompt for item in learn])
    with stage("of which: order of an epoch"):
        order = distjudge.shuffled(encoded, 0, 16, 16)
    with stage("packs of every step of an epoch"):
        packs = sum(len(judge.plan([encoded[i] for i in order[k : k + 16]])) for k in range(0, len(order), 16))
    with stage("packs of all training items at once"):
        once = distjudge.pack_prompts(encoded, judge.pack_tokens)
    tokens = sum(map(len, encoded))
    print(f"{len(learn):,} training items, {tokens:,} tokens, {packs:,} packs an epoch; all at once {len(once):,} of "
          f"{sum(len(pack.ids) for pack in once):,} tokens", file=sys.stderr)
    return rows


def open_part(config: LoadConfig, work: Path) -> list[dict[str, Any]]:
    write_items(work / "train.jsonl", config.train_items, config.seed, groups=True)
    base = make_base(work / "base", config.seed)
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
        return fresh.submit(open_stages, str(work / "train.jsonl"), base, str(work / "opened")).result()


def soak_part(config: LoadConfig, work: Path) -> list[dict[str, Any]]:
    """Cycles of the whole life of a judge; a row every cycle. LoRA and all weights take turns."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    base = make_base(work / "base", config.seed)
    write_items(work / "in.jsonl", 200, config.seed)
    items, out, rows, start = distjudge.load_items(tiny.SAMPLE), work / "soak", [], time.monotonic()
    learn, test = items[:96], items[96:160]

    class Interrupt(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:
                os.kill(os.getpid(), signal.SIGTERM)

    def cycle(number: int) -> None:
        settings = distjudge.Config(out=str(out), batch_size=8, epochs=1.0, learning_rate=1e-3, save_every=2, eval_every=6, seed=number,
                                    lora_rank=4 * (number % 2), average=0.5)
        for resume in (False, True):
            judge = distjudge.load_judge(base, LABELS, lora_rank=settings.lora_rank, seed=number)
            with contextlib.suppress(distjudge.Stopped):
                distjudge.train(judge, learn, dataclasses.replace(settings, resume=resume), test, [] if resume else [Interrupt()])
        distjudge.save_judge(judge, out)
        distjudge.write_results(judge, test, learn, settings, out)
        (work / "out.jsonl").unlink(missing_ok=True)
        judge_recipe.main(judge_recipe.JudgeConfig(run=str(out), items=str(work / "in.jsonl"), out=str(work / "out.jsonl")))
        if sum(1 for _ in open(work / "out.jsonl")) != 200:
            raise RuntimeError("judgments are missing")

    while not rows or time.monotonic() - start < 60 * config.minutes:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
            cycle(len(rows))
        rows.append({"cycle": len(rows) + 1, "seconds": time.monotonic() - start, "cpu_seconds": time.process_time(), "rss_mib": memory("VmRSS"), "peak_mib": memory("VmHWM"),
                     "open_files": len(os.listdir("/proc/self/fd")) - 1, "threads": int(memory("Threads")), "blocks": sys.getallocatedblocks()})
        if len(rows) % 20 == 1:
            print(rows[-1], file=sys.stderr, flush=True)
            write_csv(Path(config.out) / "soak.csv", rows)
    return rows


def growth(rows: list[dict[str, Any]], field: str, along: str, warm_up: float = 1 / 6) -> tuple[float, float]:
    """(growth a unit of `along`, its standard error) of a line fitted by least squares to what comes after the warm-up."""
    late = [row for row in rows if row["seconds"] >= warm_up * rows[-1]["seconds"]]
    x, y = (torch.tensor([float(row[name]) for row in late], dtype=torch.float64) for name in (along, field))
    x = x - x.mean()
    slope = (x @ y / (x @ x)).item()
    left = y - y.mean() - slope * x
    return slope, ((left @ left) / max(1, len(late) - 2) / (x @ x)).sqrt().item()


def soak_lines(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| | after the first cycle | at the end | greatest | growth an hour | growth in 100 cycles |", "| --- " * 6 + "|"]
    for name, field in (("resident memory, MiB", "rss_mib"), ("open files", "open_files"), ("threads", "threads"), ("Python's memory blocks", "blocks")):
        fits = [[factor * x for x in growth(rows, field, along)] for along, factor in (("seconds", 3600), ("cycle", 100))]
        lines.append(f"| {name} | {rows[0][field]:,.0f} | {rows[-1][field]:,.0f} | {max(row[field] for row in rows):,.0f} | "
                     + " | ".join(f"{slope:+,.2f} ± {error:,.2f}" for slope, error in fits) + " |")
    return [f"{len(rows)} cycles in {rows[-1]['seconds'] / 60:.0f} minutes, {rows[-1]['cpu_seconds'] / 60:.1f} of them the process's own; "
            "growth is a least-squares line after the first sixth, with its standard error", "", *lines]


def table(rows: list[dict[str, Any]]) -> list[str]:
    shown = lambda x: f"{x:,.1f}" if isinstance(x, float) else f"{x:,}" if isinstance(x, int) else str(x)  # noqa: E731
    return [f"| {' | '.join(name.replace('_', ' ') for name in rows[0])} |", "| --- " * len(rows[0]) + "|",
            *(f"| {' | '.join(map(shown, row.values()))} |" for row in rows)]


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def main(config: LoadConfig) -> None:
    if not Path("/proc/self/status").exists():
        raise distjudge.InputError("load: memory is read from /proc, which this system does not have")
    work, out = Path(config.work or tempfile.mkdtemp(prefix="load-")), Path(config.out)
    work.mkdir(parents=True, exist_ok=True)
    found = distjudge.versions() | {"machine": f"{os.cpu_count()} {platform.machine()} cores", "threads": torch.get_num_threads(), "seed": config.seed}
    try:
        for part in config.parts:
            rows = {"judge": judge_part, "open": open_part, "soak": soak_part}[part](config, work)
            write_csv(out / f"{part}.csv", rows)
            given = {"judge": f"--sizes {' '.join(map(str, config.sizes))}", "open": f"--train_items {config.train_items}",
                     "soak": f"--minutes {config.minutes:g}"}
            command = f"python tests/load.py --parts {part} {given[part]} --seed {config.seed}"
            lines = [f"`{command}`", "", *(soak_lines(rows) if part == "soak" else table(rows)), "",
                     ", ".join(f"{name} {value}" for name, value in found.items())]
            distjudge.write_lines(out / f"{part}.md", lines)
            print("\n".join(lines))
    finally:
        if not config.work:
            shutil.rmtree(work)


if __name__ == "__main__":
    distjudge.cli(main, LoadConfig)
