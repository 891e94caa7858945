"""Everything that only a GPU can tell, in one command: tests, backends, 4-bit training, memory, speed.

    python tests/gpu/report.py --out runs/gpu               # one card; 35 GB of disk; nothing is downloaded
    python tests/gpu/report.py --out runs/gpu --stages tests model_middle agreement
    python tests/gpu/report.py --out runs/gpu --cpu_smoke   # stand-ins, minutes: tells nothing of a GPU

Each stage runs in a process of its own, with a limit of time. Whatever becomes of it, report.json and
report.md in --out are written anew after each; the short table comes last. Models have the real architectures
and random weights. Prompts are made up, with the lengths and shared beginnings of real ones (137 tokens of
which 80 % are shared for NLI, 607 and 70 % for SummEval).

    model_*                 writes a model folder with random weights
    recipe_*                a recipe as it is, on a file of made-up votes: trains in 4 bits, saves, judges
    speed_*                 trains in 4 bits: items a second, memory, the adversary, the matrix rate
    stock_*                 Unsloth's SFTTrainer on the majority label, at its best rows a pass
    memory_*                trains in 4 bits with the smallest packs, in no more memory than the target
    agreement               one saved judge under each backend: probabilities, eight steps, and again
    tests                   pytest tests/gpu: packs against single prompts, flex_attention, Unsloth's kernel

What matters most comes first, so that a report that is cut short still tells it.
"""

import contextlib
import dataclasses
import functools
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / part) for part in ("", "recipes", "data")]

import distjudge
from distjudge import InputError, Item, Judge

import bench
import common
import qwen7b
import tiny
import torch

TOLERANCE = 0.05  # in a probability, and in nats of a step's loss
STAND_IN = dict(zip(bench.SIZES, (64, 128, 2, 4, 2), strict=True)) | {"initializer_range": 0.1}
SHAPES = {  # task: labels, tokens that all share, tokens that groups share, own tokens, items a group
    "nli": (["entailment", "neutral", "contradiction"], 90, 27, 20, 3),
    "summeval": (list("12345"), 150, 350, 107, 12),
}
WORDS = """the time people way day man thing woman life child world school state family student group country
problem hand part place case week company system program question work night point home water room mother area
money story fact month lot right study book""".split()  # common ones: a token each
LIMITS = {"nli": 8, "summeval": 12}  # GiB, for memory_*
BATCH = {"nli": 64, "summeval": 32}  # items a training step, for speed_* and stock_*
ROWS = {"nli": (8, 16, 32, 64), "summeval": (1, 4, 8, 16)}  # rows a pass that stock_* tries


@dataclasses.dataclass
class ReportConfig:
    out: str = "runs/gpu"
    """The folder for report.md, report.json, stages/ (a log and a result each) and models/."""
    stages: tuple[str, ...] = ()
    """Which stages to run, in this order. Default: all."""
    cpu_smoke: bool = False
    """Small models and few items, on a CPU: shows that this script works, and nothing else."""
    limit_s: int = 1200
    """Seconds a stage, at most."""
    seed: int = 0
    """Seed of weights, items and adapters."""
    stage: str = ""
    """Used by the script to call itself."""


class Skip(Exception):
    """Why a stage cannot run here."""


def made_up(task: str, n: int, seed: int) -> list[Item]:
    """Items of random words, shaped like a task's, with votes of five people each."""
    draw, rows, (labels, common, shared, own, group) = random.Random(f"{task} {seed}"), [], SHAPES[task]
    first = draw.choices(WORDS, k=common)
    for i in range(n):
        if i % group == 0:
            middle = draw.choices(WORDS, k=shared)
        prompt = "\n".join(" ".join(part) for part in (first, middle, draw.choices(WORDS, k=own)))
        votes = draw.choices(labels, k=5)
        counts = {label: votes.count(label) for label in labels}
        rows.append({"id": f"{task}-{i}", "prompt": prompt, "counts": counts, "group": f"g{i // group}"})
    return distjudge.load_items(rows, labels=labels)


def make_model(name: str, config: ReportConfig) -> dict[str, Any]:
    """Saves a model of random weights and a tokenizer of the made-up prompts."""
    folder = Path(config.out) / "models" / name
    texts = [item.prompt for task in SHAPES for item in made_up(task, 24, 0)]
    tokenizer = tiny.build_tokenizer(texts, 2000)
    changes = STAND_IN if config.cpu_smoke else {"initializer_range": 0.04} if name == "middle" else {}
    model = bench.random_model(name, tokenizer, config.seed, **changes)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"parameters": model.num_parameters()}


def load(name: str, task: str, config: ReportConfig, **settings: Any) -> Judge:
    folder = model_folder(name, config)
    return distjudge.load_judge(folder, SHAPES[task][0], seed=config.seed, max_length=4096, **settings)


def model_folder(name: str, config: ReportConfig) -> str:
    folder = Path(config.out) / "models" / name
    if not (folder / "config.json").is_file():
        raise Skip(f"needs the stage model_{name}")
    return str(folder)


def need_unsloth() -> None:
    use, why = distjudge.choose_backend("auto")
    if use != "unsloth":
        raise Skip(f"Unsloth cannot be used: {why}")


def gigabytes() -> dict[str, float]:
    """Peak memory on the card since the last call, in GiB: what tensors took, and what PyTorch held."""
    if not torch.cuda.is_available():
        return {}
    taken, held = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return {"allocated_gib": taken / 2**30, "held_gib": held / 2**30}


# --- stages: each returns its result; a "problem" in it is a failure ---
def run_tests(config: ReportConfig) -> dict[str, Any]:
    command = [sys.executable, "-m", "pytest", "-v", "-rfE", "-p", "no:cacheprovider", "tests/gpu"]
    said = Path(config.out) / "stages" / "tests.txt"  # what passed stands there, also when time runs out
    with open(said, "w") as file:
        done = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
    lines = said.read_text().splitlines()
    result = {"pytest": lines[-1]}
    if done.returncode:
        wrong = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        result["problem"] = "; ".join(wrong) or f"pytest: exit code {done.returncode}"
    return result


def trained_under(backend: str, config: ReportConfig) -> dict[str, Any]:
    """Probabilities of one saved judge before and after eight steps, and the losses; in a new process."""
    start = Path(config.out) / "agreement"
    if backend == "transformers":
        distjudge.save_judge(load("middle", "nli", config, backend=backend), start)
    judge = distjudge.load_judge(start, backend="transformers" if config.cpu_smoke else backend)
    if config.cpu_smoke and backend == "unsloth":
        judge.packs = False  # the stand-in for another way to compute the same
    prompts = [item.prompt for item in made_up("nli", 30, config.seed + 1)]
    before = judge.predict(prompts)
    settings = {"batch_size": 8, "epochs": 1.0, "learning_rate": 2e-4, "seed": config.seed}
    _, losses = bench.train_ours(judge, made_up("nli", 64, config.seed), **settings)
    return {"before": before, "after": judge.predict(prompts), "losses": losses, "backend": judge.backend}


def compared(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """How far two backends are apart, beside how far training moved the probabilities and prompts differ."""
    names, sides = ("before", "after", "losses"), (one, other)
    a, b = ({name: torch.as_tensor(side[name]) for name in names} for side in sides)
    apart = {name: (a[name] - b[name]).abs().max().item() for name in a}
    result = {"backends": f"{one['backend']}, {other['backend']}", "steps": len(a["losses"]), "apart": apart}
    result["moved_by_training"] = (a["before"] - a["after"]).abs().max().item()
    result["spread_of_prompts"] = (a["before"].max(0).values - a["before"].min(0).values).max().item()
    over = [f"{name} {value:.3g}" for name, value in apart.items() if not value <= TOLERANCE]
    if over:  # NaN is
        result["problem"] = f"beyond the tolerance: {', '.join(over)}"
    return result


def agreement(config: ReportConfig) -> dict[str, Any]:
    if not config.cpu_smoke:
        need_unsloth()
    model_folder("middle", config)
    backends = ("transformers", "unsloth")  # the latter patches what it imports
    return compared(*(bench.in_new_process(trained_under, backend, config) for backend in backends))


def recipe(config: ReportConfig) -> dict[str, Any]:
    """recipes/qwen7b.py in its own settings, for one epoch; a model of random weights learns little."""
    folder, items = Path(config.out) / "recipe", made_up("nli", 40 if config.cpu_smoke else 960, config.seed)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{name: getattr(item, name) for name in ("id", "prompt", "counts", "group")} for item in items]
    distjudge.write_lines(folder / "votes.jsonl", map(json.dumps, rows))
    files = {"train": (str(folder / "votes.jsonl"),), "out": str(folder / "run")}
    settings = qwen7b.Recipe(**files, model=model_folder("qwen7b", config), epochs=1.0, seed=config.seed)
    start = bench.now()
    metrics = common.run(settings)
    found = {"settings": "recipes/qwen7b.py", "items": len(items), "seconds": bench.now() - start}
    return found | {"kl": metrics["kl"], "label_mass": metrics["label_mass"]} | gigabytes()


def memory(name: str, task: str, config: ReportConfig) -> dict[str, Any]:
    """Trains one prompt a pass, activations recomputed, in the target less 0.5 GiB for CUDA itself."""
    limit, items = LIMITS[task], made_up(task, 4 if config.cpu_smoke else 24, config.seed)
    if torch.cuda.is_available():
        share = (limit - 0.5) * 2**30 / torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, share))
    judge = load(name, task, config, four_bit=True, gradient_checkpointing=True)
    settings = {"batch_size": len(items) // 2, "pack_tokens": 1, "gradient_checkpointing": True}
    _, losses = bench.train_ours(judge, items, epochs=1.0, **settings)
    found = {"backend": judge.backend, "limit_gib": limit, "steps": len(losses), "last_loss": losses[-1]}
    return found | gigabytes()


def speed(name: str, task: str, config: ReportConfig) -> dict[str, Any]:
    """Training with the default packs, judging, the adversary, and the matrix rate at large packs."""
    batch, steps = (4, 3) if config.cpu_smoke else (BATCH[task], 12)
    items = made_up(task, batch * steps, config.seed)
    judge, prompts = load(name, task, config, four_bit=True), [item.prompt for item in items]
    gigabytes()
    times, _ = bench.train_ours(judge, items, batch_size=batch, epochs=1.0, learning_rate=2e-4)
    times, peak = bench.spread(times[2:] or times), gigabytes()  # kernels are compiled in the first steps
    encoded = judge.encode(prompts)
    passes = len(judge.plan(encoded[:batch]))
    judging = statistics.median([bench.seconds(lambda: judge.score(prompts[:batch])) for _ in range(3)])
    adversary = passes * bench.adversary_seconds(judge, batch)
    judge.pack_tokens = 256 if config.cpu_smoke else 16_384
    found = {"backend": judge.backend, "items_a_step": batch, "seconds_a_step": times}
    found |= {"items_a_second": batch / times["median"], "judged_items_a_second": batch / judging}
    found |= {"passes_a_step": passes, "adversary_share": adversary / times["median"], **peak}
    return found | {"large_packs": bench.matrix_share(judge, encoded, 1 if config.cpu_smoke else 6)}


def stock(name: str, task: str, config: ReportConfig) -> dict[str, Any]:
    """Unsloth's SFTTrainer on the same items and model, without packs; on a CPU, TRL's with PEFT."""
    folder, tried = model_folder(name, config), {}
    batch, tries = (4, (2, 4)) if config.cpu_smoke else (BATCH[task], ROWS[task])
    items = made_up(task, 4 * batch, config.seed)
    if config.cpu_smoke:
        import transformers

        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model = bench.with_adapters(model)
        tokenizer, optimizer = distjudge.load_tokenizer(folder), "adamw_torch"
    else:
        need_unsloth()
        from unsloth import FastLanguageModel

        layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        lora = {"r": 16, "lora_alpha": 32, "target_modules": layers, "use_gradient_checkpointing": False}
        loaded = {"max_seq_length": 4096, "load_in_4bit": True, "use_exact_model_name": True}
        model, tokenizer = FastLanguageModel.from_pretrained(folder, **loaded)
        model = FastLanguageModel.get_peft_model(model, random_state=config.seed, **lora)
        optimizer = "adamw_8bit"
    settings = {"num_train_epochs": 1, "max_length": 4096, "optim": optimizer}
    for rows in tries:
        gigabytes()
        try:
            settings["gradient_accumulation_steps"] = batch // rows
            times = bench.train_stock(model, tokenizer, items, rows, **settings)
            tried[rows] = {"items_a_second": batch / statistics.median(times), **gigabytes()}
        except torch.OutOfMemoryError:
            tried[rows] = {"items_a_second": 0.0}
    best = max(tried, key=lambda rows: tried[rows]["items_a_second"])
    if not tried[best]["items_a_second"]:
        raise RuntimeError("the stock trainer runs out of memory at any rows a pass")
    return {"items_a_step": batch, "rows_a_pass": best, **tried[best], "tried": tried}


STAGES: dict[str, Callable[[ReportConfig], dict[str, Any]]] = {
    "model_qwen7b": functools.partial(make_model, "qwen7b"),
    "recipe_qwen7b": recipe,
}
for task in SHAPES:
    for stage in (speed, stock, memory):
        STAGES[f"{stage.__name__}_qwen7b_{task}"] = functools.partial(stage, "qwen7b", task)
STAGES |= {
    "model_middle": functools.partial(make_model, "middle"),
    "agreement": agreement,
    "tests": run_tests,
    "model_llama8b": functools.partial(make_model, "llama8b"),
    "speed_llama8b_nli": functools.partial(speed, "llama8b", "nli"),
}


def targets(results: dict[str, Any]) -> list[dict[str, Any]]:
    """What we aim at on an H200, what was measured, and whether it is reached; only where the stages ran."""
    ok, rows = {name: stage["result"] for name, stage in results.items() if stage["status"] == "ok"}, []
    for task, limit in LIMITS.items():
        run, other = ok.get(f"speed_qwen7b_{task}"), ok.get(f"stock_qwen7b_{task}")
        rate = run and run["items_a_second"]
        if run and other and task == "nli":
            times = rate / other["items_a_second"]
            rows.append(("3 times the items a second of stock Unsloth SFT", task, times, times >= 3))
        if run and task == "nli":
            rows.append(("150 items a second", task, rate, rate >= 150))
        if run:
            share, reached = run["adversary_share"], run["large_packs"]["reached"]["median"]
            rows.append(("adversary under 0.02 of a step", task, share, share < 0.02))
            rows.append(("half of the measured matrix rate at large packs", task, reached, reached >= 0.5))
        if (name := f"memory_qwen7b_{task}") in results:
            measured = ok[name]["held_gib"] if name in ok else "it does not"
            rows.append((f"trains within {limit} GiB", task, measured, name in ok))
    names = ("target", "prompts", "measured", "reached")
    return [dict(zip(names, (*row[:3], "yes" if row[3] else "**no**"), strict=True)) for row in rows]


def write_report(config: ReportConfig, results: dict[str, Any]) -> list[str]:
    """report.json and report.md; returns the short table: the stages and, on a GPU, the targets."""
    out, about = Path(config.out), {"config": dataclasses.asdict(config), "hardware": distjudge.versions()}
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        about["hardware"] |= {"gpu": card.name, "gib": card.total_memory / 2**30, "cuda": torch.version.cuda}
    aims = [] if config.cpu_smoke else targets(results)
    distjudge.write_json(out / "report.json", about | {"stages": results, "targets": aims})
    stages = [{"stage": name, "why": ""} | stage | {"result": "see below"} for name, stage in results.items()]
    keys = ("stage", "status", "seconds", "why")
    short = bench.table([{key: stage[key] for key in keys} for stage in stages])
    if aims:
        short += ["", "Targets for Qwen2.5-7B's architecture in 4 bits on an H200:", "", *bench.table(aims)]
    title = "# A smoke run on a CPU: it measures nothing" if config.cpu_smoke else "# distjudge on a GPU"
    lines = [title, "", *short, "", *bench.table([{"": ""} | about], down=True)]
    for name, stage in results.items():
        if "result" in stage:
            lines += ["", *bench.table([{"": name} | stage["result"]], down=True)]
    distjudge.write_lines(out / "report.md", lines)
    return short


def run_stage(config: ReportConfig) -> None:
    """In a process of its own: writes stages/NAME.json."""
    try:
        result = STAGES[config.stage](config)
        problem = result.pop("problem", None)
        found = {"result": result} | ({"status": "failed", "why": problem} if problem else {"status": "ok"})
    except Skip as skip:
        found = {"status": "skipped", "why": str(skip)}
    except Exception as error:
        traceback.print_exc()
        found = {"status": "failed", "why": f"{type(error).__name__}: {distjudge.first_line(error)}"}
    distjudge.write_json(Path(config.out) / "stages" / f"{config.stage}.json", found)


def start_stage(config: ReportConfig, name: str) -> dict[str, Any]:
    """Runs one stage; whatever becomes of it, says so in a dict."""
    path, begin = Path(config.out) / "stages" / f"{name}.json", time.perf_counter()
    path.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--out", config.out, "--stage", name, "--seed", str(config.seed)]
    command += ["--cpu_smoke"] * config.cpu_smoke
    environment = {"UNSLOTH_COMPILE_LOCATION": str((Path(config.out) / "unsloth").resolve())} | os.environ
    environment |= {"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}
    with open(path.with_suffix(".log"), "w") as log:
        streams = {"stdout": log, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, env=environment, start_new_session=True, **streams)
        try:
            why = f"ends with exit code {process.wait(config.limit_s)} and no result"
        except subprocess.TimeoutExpired:
            why = f"takes more than {config.limit_s} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it has started goes with it
            process.wait()
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        found = {"status": "failed", "why": why}
    return found | {"seconds": time.perf_counter() - begin}


def main(config: ReportConfig) -> int:
    if unknown := {*config.stages, config.stage or "tests"} - set(STAGES):
        raise InputError(f"stages: there is no {', '.join(sorted(unknown))}; there are {', '.join(STAGES)}")
    if not torch.cuda.is_available() and not config.cpu_smoke:
        raise InputError("there is no CUDA device here; --cpu_smoke runs the same code with stand-ins")
    if config.stage:
        run_stage(config)
        return 0
    distjudge.check_out(config.out, "stages", "report.json")  # its models/ goes in the end
    out, results, short = Path(config.out), {}, []
    (out / "stages").mkdir(parents=True, exist_ok=True)
    for name in config.stages or STAGES:
        found = results[name] = start_stage(config, name)
        print(f"{name}: {found['status']} ({found['seconds']:.0f} s) {found.get('why', '')}", flush=True)
        short = write_report(config, results)
    shutil.rmtree(out / "models", ignore_errors=True)
    print("\n".join(["", *short, "", f"wrote {out / 'report.md'}"]))
    return int(any(stage["status"] == "failed" for stage in results.values()))


if __name__ == "__main__":
    distjudge.cli(lambda config: sys.exit(main(config)), ReportConfig)
