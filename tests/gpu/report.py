"""Everything that only a GPU can tell, in one command: tests, agreement of the backends, 4-bit training, memory and speed.

    python tests/gpu/report.py --out runs/gpu                   # one card; some 35 GB of disk for models; nothing is downloaded
    python tests/gpu/report.py --out runs/gpu --stages tests agreement_transformers agreement_unsloth agreement
    python tests/gpu/report.py --out runs/gpu --cpu_smoke       # the same code with stand-ins, a few minutes: says nothing about a GPU

Each stage runs in a process of its own, with a limit of time, and whatever becomes of it, report.json and report.md in --out are
written anew after each. Models have the real architectures and random weights. Prompts are those of the public data sets where
DISTJUDGE_DATA names them, else made-up ones of the same lengths and shared beginnings (137 tokens of which 80 % are shared for NLI,
607 and 70 % for SummEval).

    tests                   pytest tests/gpu
    agreement_*             one saved judge under transformers and Unsloth: probabilities, eight training steps, probabilities again
    agreement               the two compared: 0.05 in a probability, 0.05 nats in a step's loss, for bfloat16
    packs, packs_unsloth    packs against one prompt at a time: blocks, SDPA, flex_attention; Unsloth's shared-prefix kernel
    model_*                 writes a model folder with random weights
    memory_*                trains in 4 bits with the smallest packs, PyTorch being allowed no more memory than the target
    speed_*                 trains in 4 bits: items a second, peak memory, the adversary's share, the share of the measured matrix rate
    stock_*                 Unsloth's own way: SFTTrainer on the majority label, same model, items and adapters, at its best rows a pass
"""
import contextlib
import dataclasses
import datetime
import json
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
import traceback
import xml.etree.ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / part) for part in ("", "recipes", "data")]

import torch

import distjudge
from distjudge import InputError, Item, Judge

TOLERANCE = {"probability": 0.05, "loss": 0.05, "packs": 0.05, "cosine": 0.99}
BACKBONES: dict[str, dict[str, Any]] = {
    "small": {"kind": "qwen2", "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16,
              "num_key_value_heads": 4, "vocab_size": 151_936, "initializer_range": 0.04},
    "qwen7b": {"kind": "qwen2", "hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28, "num_attention_heads": 28,
               "num_key_value_heads": 4, "vocab_size": 152_064, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "llama8b": {"kind": "llama", "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32,
                "num_key_value_heads": 8, "vocab_size": 128_256, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
}
STAND_IN = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "vocab_size": 4096, "initializer_range": 0.1}
SHAPES = {  # task: labels, tokens that all share, tokens that groups share, own tokens, items a group
    "nli": (["entailment", "neutral", "contradiction"], 90, 27, 20, 3),
    "summeval": (list("12345"), 150, 350, 107, 12),
}
PUBLIC = {"nli": "snli", "summeval": "summeval"}
LIMITS = {"nli": 8, "summeval": 12}  # GiB, for memory_*


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
    keep_models: bool = False
    """Keep models/ at the end."""
    seed: int = 0
    """Seed of weights, items and adapters."""
    stage: str = ""
    """Used by the script to call itself."""


class Skip(Exception):
    """Why a stage cannot run here."""


# --- what the stages share -------------------------------------------------------------------------------------------------
def model_folder(config: ReportConfig, name: str) -> str:
    folder = Path(config.out) / "models" / name
    if not (folder / "config.json").is_file():
        raise Skip(f"needs the stage model_{name}")
    return str(folder)


def make_model(config: ReportConfig, name: str) -> dict[str, Any]:
    """Saves a model of random weights and a tokenizer: Qwen's where it lies beside the data sets, else one of our own."""
    import transformers
    from tiny import build_tokenizer

    settings = BACKBONES[name] | (STAND_IN if config.cpu_smoke else {})
    kind = settings["kind"]
    real = Path(os.environ.get("DISTJUDGE_DATA") or ROOT / "no data sets").parent / "tokenizers" / "qwen2.5"
    if real.is_dir() and kind == "qwen2" and not config.cpu_smoke:
        tokenizer = transformers.AutoTokenizer.from_pretrained(real)
    else:
        tokenizer = build_tokenizer([prompt.prompt for task in SHAPES for prompt in made_up(task, 24, config.seed)], 2000)
    folder = Path(config.out) / "models" / name
    family = {"qwen2": transformers.Qwen2Config, "llama": transformers.LlamaConfig}[kind]
    torch.manual_seed(config.seed)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = transformers.AutoModelForCausalLM.from_config(family(
            **{k: v for k, v in settings.items() if k != "kind"}, max_position_embeddings=8192, tie_word_embeddings=False,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"parameters": model.num_parameters(), "gigabytes": sum(f.stat().st_size for f in folder.glob("*.safetensors")) / 1e9}


def made_up(task: str, n: int, seed: int) -> list[Item]:
    """Items of random words with the lengths and shared beginnings of a task's prompts, votes of five people each."""
    draw = random.Random(f"{task} {seed}")
    labels, common, shared, own, group = SHAPES[task]
    words = ("the time people way day man thing woman life child world school state family student group country problem hand part place case "
             "week company system program question work night point home water room mother area money story fact month lot right study book")
    text = lambda k: " ".join(draw.choice(words.split()) for _ in range(k))  # noqa: E731  # common words: one token each
    first, rows = text(common), []
    for i in range(n):
        if i % group == 0:
            middle = text(shared)
        counts = dict.fromkeys(labels, 0)
        for _ in range(5):
            counts[draw.choice(labels)] += 1
        rows.append({"id": f"{task}-{i}", "prompt": f"{first}\n{middle}\n{text(own)}", "counts": counts, "group": f"g{i // group}"})
    return distjudge.load_items(rows, labels=labels)


def shape_items(config: ReportConfig, task: str, n: int) -> tuple[list[Item], str]:
    """n items of a task, whole groups, and where they are from."""
    import bench

    public = PUBLIC[task]
    if (bench.data_folder() / public).is_dir() and not config.cpu_smoke:
        items = bench.training_items(public, bench.BenchConfig(batch_size=n, steps=1, seed=config.seed))
        return [dataclasses.replace(item, swap=None) for item in items], public
    return made_up(task, n, config.seed), "made up"


def on_gpu(config: ReportConfig) -> None:
    if not torch.cuda.is_available() and not config.cpu_smoke:
        raise Skip("no CUDA device")


def need_unsloth() -> None:
    use, why = distjudge.choose_backend("auto")
    if use != "unsloth":
        raise Skip(f"Unsloth cannot be used: {why}")


def gigabytes() -> dict[str, float]:
    """Peak memory of this process on the card, in GiB: what tensors took, and what PyTorch held."""
    if not torch.cuda.is_available():
        return {}
    return {"allocated_gib": torch.cuda.max_memory_allocated() / 2**30, "reserved_gib": torch.cuda.max_memory_reserved() / 2**30}


def train_steps(judge: Judge, items: list[Item], folder: Path, **settings: Any) -> tuple[list[float], list[float]]:
    """Seconds and losses of the steps of one epoch over the items."""
    import bench

    timer = bench.step_timer()
    made = distjudge.Config(**{"out": str(folder), "epochs": 1.0, "learning_rate": 2e-4, "warmup": 0.0, "save_every": 0.0, "log_every": 1} | settings)
    log = bench.quietly(lambda: distjudge.train(judge, items, made, callbacks=[timer]))
    return timer.times, [row["loss"] for row in log if "loss" in row]


# --- stages ----------------------------------------------------------------------------------------------------------------
def run_tests(config: ReportConfig) -> dict[str, Any]:
    """pytest tests/gpu, its outcome test by test."""
    found = (Path(config.out) / "stages" / "tests.xml").resolve()
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={found}", "tests/gpu"], cwd=ROOT)
    cases = list(xml.etree.ElementTree.parse(found).getroot().iter("testcase"))
    outcome = {case.get("name"): next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed") for case in cases}
    result = {kind: sum(value == kind for value in outcome.values()) for kind in ("passed", "failure", "error", "skipped")}
    wrong = [name for name, value in outcome.items() if value in ("failure", "error")]
    if done.returncode not in (0, 5):
        result["problem"] = f"{len(wrong)} tests fail: {', '.join(map(str, wrong))}" if wrong else f"pytest ends with exit code {done.returncode}"
    return result


def agreement_of(config: ReportConfig, backend: str, start: bool = False) -> dict[str, Any]:
    """Probabilities of one saved judge before and after eight steps, and the losses, under one backend."""
    on_gpu(config)
    if backend == "unsloth" and not config.cpu_smoke:
        need_unsloth()
    labels, folder = SHAPES["nli"][0], Path(config.out) / "agreement"
    items, prompts = made_up("nli", 64, config.seed), [item.prompt for item in made_up("nli", 30, config.seed + 1)]
    if start:
        first = distjudge.load_judge(model_folder(config, "small"), labels, backend="transformers", seed=config.seed, lora_rank=16)
        distjudge.save_judge(first, folder / "start")
        del first
    if not (folder / "start" / "judge.json").is_file():
        raise Skip("needs the stage agreement_transformers")
    judge = distjudge.load_judge(folder / "start", backend="transformers" if config.cpu_smoke else backend)
    if config.cpu_smoke and backend == "unsloth":
        judge.packs = False  # the stand-in for another way to compute the same
    before = judge.predict(prompts)
    _, losses = train_steps(judge, items, folder / backend, batch_size=8, seed=config.seed)
    return {"backend": judge.backend, "packs": judge.packs, "losses": losses, "before": before.tolist(), "after": judge.predict(prompts).tolist()}


def agreement(config: ReportConfig) -> dict[str, Any]:
    """How far the two backends are apart, beside how far training moved the probabilities and prompts differ from one another."""
    sides = []
    for name in ("agreement_transformers", "agreement_unsloth"):
        path = Path(config.out) / "stages" / f"{name}.json"
        side = json.loads(path.read_text()) if path.is_file() else {}
        if side.get("status") != "ok":
            raise Skip(f"needs the stage {name}")
        sides.append(side["result"])
    a, b = sides
    far = lambda x, y: (torch.tensor(x) - torch.tensor(y)).abs().max().item()  # noqa: E731
    before = torch.tensor(a["before"])
    result = {"backends": f"{a['backend']}, {b['backend']}", "probabilities_before": far(a["before"], b["before"]),
              "probabilities_after": far(a["after"], b["after"]), "losses": far(a["losses"], b["losses"]), "steps": len(a["losses"]),
              "moved_by_training": far(a["before"], a["after"]), "spread_of_prompts": (before.max(0).values - before.min(0).values).max().item()}
    over = [f"{name} {result[name]:.3g}" for name, kind in (("probabilities_before", "probability"), ("probabilities_after", "probability"),
                                                            ("losses", "loss")) if not result[name] <= TOLERANCE[kind]]
    if over:
        result["problem"] = f"beyond the tolerance: {', '.join(over)}"
    return result


def packs_against_single(judge: Judge, prompts: list[str]) -> dict[str, float]:
    """Scores and adapter gradients of packs against those of one prompt at a time, in training mode."""
    encoded, found = judge.encode(prompts), []
    for packed in (True, False):
        judge.packs = packed
        judge.model.train()
        judge.model.zero_grad()
        scores = []
        for members in judge.plan(encoded) if packed else [[i] for i in range(len(encoded))]:
            logq, _ = distjudge.label_logprobs(judge.model, judge.batch([encoded[i] for i in members]), judge.tokens)
            logq[:, 0].sum().backward()
            scores += zip(members, logq.detach().float().cpu(), strict=True)
        grads = torch.cat([w.grad.float().flatten().cpu() for w in judge.model.parameters() if w.grad is not None])
        found.append((torch.stack([row for _, row in sorted(scores, key=lambda pair: pair[0])]), grads))
    judge.packs = True
    (packed_q, packed_grads), (single_q, single_grads) = found
    return {"probabilities": (packed_q.exp() - single_q.exp()).abs().max().item(),
            "gradient_cosine": torch.nn.functional.cosine_similarity(packed_grads, single_grads, dim=0).item()}


def packs(config: ReportConfig, unsloth: bool = False) -> dict[str, Any]:
    on_gpu(config)
    if unsloth:
        need_unsloth()
    labels, prompts = SHAPES["nli"][0], [item.prompt for item in made_up("nli", 24, config.seed)]
    result: dict[str, Any] = {}
    for implementation in ("unsloth",) if unsloth else (distjudge.BLOCKS, "sdpa", *(("flex_attention",) if torch.cuda.is_available() else ())):
        judge = distjudge.load_judge(model_folder(config, "small"), labels, backend="unsloth" if unsloth else "transformers", lora_rank=16,
                                     gradient_checkpointing=unsloth)
        if not judge.packs:
            result["problem"] = f"{implementation}: the check at load refuses packs"
            continue
        if not unsloth:
            judge.model.get_base_model().set_attn_implementation(implementation)
        result[implementation] = packs_against_single(judge, prompts)
        del judge
        if not (result[implementation]["probabilities"] <= TOLERANCE["packs"] and result[implementation]["gradient_cosine"] >= TOLERANCE["cosine"]):
            result["problem"] = f"{implementation}: packs are not one prompt at a time"
    return result


def memory(config: ReportConfig, name: str, task: str) -> dict[str, Any]:
    """Trains in 4 bits, one prompt a pass, activations recomputed, with no more memory than the target (less 0.5 GiB for CUDA itself)."""
    on_gpu(config)
    limit = LIMITS[task]
    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(min(1.0, (limit - 0.5) * 2**30 / torch.cuda.get_device_properties(0).total_memory))
    items, source = shape_items(config, task, 4 if config.cpu_smoke else 24)
    judge = distjudge.load_judge(model_folder(config, name), SHAPES[task][0], four_bit=True, max_length=4096, gradient_checkpointing=True)
    times, losses = train_steps(judge, items, Path(config.out) / "train", batch_size=len(items) // 2, pack_tokens=1, gradient_checkpointing=True)
    return {"backend": judge.backend, "items_from": source, "limit_gib": limit, "steps": len(times), "last_loss": losses[-1], **gigabytes()}


def speed(config: ReportConfig, name: str, task: str) -> dict[str, Any]:
    """Items a second of 4-bit training with the default packs, and of judging; the adversary; the share of the matrix rate."""
    import bench

    on_gpu(config)
    labels = SHAPES[task][0]
    batch, steps = (4, 3) if config.cpu_smoke else (64, 12) if task == "nli" else (32, 8)
    items, source = shape_items(config, task, batch * steps)
    judge = distjudge.load_judge(model_folder(config, name), labels, four_bit=True, max_length=4096)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    times, losses = train_steps(judge, items, Path(config.out) / "train", batch_size=batch)
    times, full = times[min(3, len(times) - 2) : len(items) // batch], gigabytes()  # kernels are compiled in the first steps
    step, encoded = statistics.median(times), judge.encode([item.prompt for item in items])
    planned = judge.plan(encoded[:batch])
    p = torch.rand(batch, len(labels), device=judge.device).softmax(1)
    logq = torch.randn(p.shape, device=judge.device).log_softmax(1)
    adversary = statistics.median([bench.seconds(lambda: distjudge.worst_case(logq, p, 0.25)) for _ in range(20)][5:])
    judging = statistics.median([bench.seconds(lambda: judge.score([item.prompt for item in items[:batch]])) for _ in range(3)])
    judge.pack_tokens = 256 if config.cpu_smoke else 16_384  # large packs, for the matrix rate
    members = max(judge.plan(encoded), key=len)
    large = [encoded[i] for i in members]
    judge.model.train()
    tokens, flops = bench.model_flops(judge, large)
    measure, rates = bench.pass_seconds(judge, large), []
    taken = []
    for repeat in range(3 if config.cpu_smoke else 8):
        rate, passed = bench.matrix_rate(judge, tokens), measure()
        if repeat > 1:
            rates.append(rate)
            taken.append(passed)
    reached = flops / statistics.median(taken) / statistics.median(rates)
    return {"backend": judge.backend, "items_from": source, "items_a_step": batch, "steps_timed": len(times), "seconds_a_step": bench.spread(times),
            "items_a_second": batch / step, "tokens_a_prompt": statistics.mean(map(len, encoded)), "passes_a_step": len(planned),
            "adversary_share": len(planned) * adversary / step, "judged_items_a_second": batch / judging, "last_loss": losses[-1],
            "large_pack_tokens": tokens, "matrix_tflops_a_second": statistics.median(rates) / 1e12, "share_of_matrix_rate": reached, **full}


def stock(config: ReportConfig, name: str, task: str) -> dict[str, Any]:
    """Unsloth's SFTTrainer on the same items and model, at the rows a pass that suit it best; on a CPU, TRL's with PEFT."""
    on_gpu(config)
    if not config.cpu_smoke:
        need_unsloth()
    import bench

    folder, labels = model_folder(config, name), SHAPES[task][0]
    batch, steps = (4, 2) if config.cpu_smoke else (64, 4) if task == "nli" else (32, 4)
    items, source = shape_items(config, task, batch * steps)
    items = [item for item in items if list(item.counts) == labels]
    lora = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "bias": "none"}
    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    if config.cpu_smoke:
        import peft
        import transformers

        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model = peft.get_peft_model(model, peft.LoraConfig(**lora, target_modules=layers, task_type="CAUSAL_LM"))
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    else:
        from unsloth import FastLanguageModel

        model, tokenizer = FastLanguageModel.from_pretrained(folder, max_seq_length=4096, load_in_4bit=True, use_exact_model_name=True)
        model = FastLanguageModel.get_peft_model(model, **lora, target_modules=layers, random_state=config.seed, use_gradient_checkpointing=False)
    import datasets
    import trl

    data = bench.majority_rows(items, distjudge.PromptEncoder(tokenizer))
    if not config.cpu_smoke:  # which no trainer can overlook
        data = [{"input_ids": row["input_ids"], "labels": [token if counts else -100 for token, counts in
                                                          zip(row["input_ids"], row["completion_mask"], strict=True)]} for row in data]
    data = datasets.Dataset.from_list(data)
    tried: dict[int, Any] = {}
    for rows in (2, 4) if config.cpu_smoke else (8, 16, 32, 64) if task == "nli" else (1, 4, 8, 16):
        timer = bench.step_timer()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        arguments = trl.SFTConfig(
            output_dir=str(Path(config.out) / "train"), per_device_train_batch_size=rows, gradient_accumulation_steps=batch // rows, num_train_epochs=1,
            learning_rate=2e-4, optim="adamw_torch" if config.cpu_smoke else "adamw_8bit", max_length=4096, completion_only_loss=True,
            save_strategy="no", report_to="none", use_cpu=config.cpu_smoke, bf16=not config.cpu_smoke, seed=config.seed, logging_steps=1000,
            gradient_checkpointing=False)
        try:
            trainer = bench.quietly(lambda: trl.SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer,  # noqa: B023
                                                           callbacks=[timer]))  # noqa: B023
            bench.quietly(trainer.train)
            tried[rows] = {"seconds_a_step": statistics.median(timer.times[1:]), **gigabytes()}
        except torch.OutOfMemoryError:
            tried[rows] = {"seconds_a_step": None, "out_of_memory": True}
    fits = {rows: values for rows, values in tried.items() if values["seconds_a_step"]}
    if not fits:
        raise RuntimeError("the stock trainer runs out of memory at any rows a pass")
    best = min(fits, key=lambda rows: fits[rows]["seconds_a_step"])
    return {"items_from": source, "items_a_step": batch, "rows_a_pass": best, "items_a_second": batch / fits[best]["seconds_a_step"], **fits[best],
            "tried": tried}


STAGES: dict[str, Callable[[ReportConfig], dict[str, Any]]] = {
    "tests": run_tests,
    "model_small": lambda config: make_model(config, "small"),
    "agreement_transformers": lambda config: agreement_of(config, "transformers", start=True),
    "agreement_unsloth": lambda config: agreement_of(config, "unsloth"),
    "agreement": agreement,
    "packs": packs,
    "packs_unsloth": lambda config: packs(config, unsloth=True),
    "model_qwen7b": lambda config: make_model(config, "qwen7b"),
    "memory_qwen7b_nli": lambda config: memory(config, "qwen7b", "nli"),
    "memory_qwen7b_summeval": lambda config: memory(config, "qwen7b", "summeval"),
    "speed_qwen7b_nli": lambda config: speed(config, "qwen7b", "nli"),
    "stock_qwen7b_nli": lambda config: stock(config, "qwen7b", "nli"),
    "speed_qwen7b_summeval": lambda config: speed(config, "qwen7b", "summeval"),
    "stock_qwen7b_summeval": lambda config: stock(config, "qwen7b", "summeval"),
    "model_llama8b": lambda config: make_model(config, "llama8b"),
    "speed_llama8b_nli": lambda config: speed(config, "llama8b", "nli"),
}


# --- the report ------------------------------------------------------------------------------------------------------------
def hardware() -> dict[str, Any]:
    found: dict[str, Any] = {"system": platform.platform(), "cores": os.cpu_count(), "cuda": torch.version.cuda, **distjudge.versions()}
    from importlib import metadata

    for name in ("unsloth_zoo", "triton", "xformers"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        found |= {"gpu": card.name, "gpu_memory_gib": round(card.total_memory / 2**30, 1), "compute_capability": f"{card.major}.{card.minor}"}
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        found["commit"] = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    return found


def targets(results: dict[str, Any]) -> list[tuple[str, str, bool]]:
    """What we aim at on an H200, what was measured, and whether it is reached; only where the stages ran."""
    ok = {name: stage["result"] for name, stage in results.items() if stage["status"] == "ok"}
    found = []
    nli, other, stock_nli = ok.get("speed_qwen7b_nli"), ok.get("speed_qwen7b_summeval"), ok.get("stock_qwen7b_nli")
    if nli and stock_nli:
        times = nli["items_a_second"] / stock_nli["items_a_second"]
        found.append(("3 x stock Unsloth SFT, NLI prompts", f"{times:.2f} x", times >= 3))
    if nli:
        found.append(("150 items/s, Qwen2.5-7B, NLI prompts", f"{nli['items_a_second']:.1f} items/s", nli["items_a_second"] >= 150))
    for task, run in (("NLI", nli), ("SummEval", other)):
        if run:
            found.append((f"adversary under 2 % of a step, {task}", f"{run['adversary_share']:.2%}", run["adversary_share"] < 0.02))
            share = run["share_of_matrix_rate"]
            found.append((f"50 % of the measured bf16 matrix rate at large packs, {task}", f"{share:.0%}", share >= 0.5))
    for task, limit in LIMITS.items():
        if f"memory_qwen7b_{task}" in results:
            run = ok.get(f"memory_qwen7b_{task}")
            found.append((f"Qwen2.5-7B trains on {task} within {limit} GiB, smallest packs",
                          f"{run['reserved_gib']:.1f} GiB held" if run and "reserved_gib" in run else "it does not" if not run else "no GPU", bool(run)))
    return found


def write_report(config: ReportConfig, results: dict[str, Any]) -> None:
    out, smoke = Path(config.out), config.cpu_smoke
    distjudge.write_json(out / "report.json", {"hardware": hardware(), "config": dataclasses.asdict(config), "stages": results,
                                               "targets": [] if smoke else targets(results)})
    shown = lambda value: f"{value:.4g}" if isinstance(value, float) else str(value)  # noqa: E731
    lines = ["# distjudge on a GPU" if not smoke else "# A smoke run on a CPU: it measures nothing", "",
             f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC, seed {config.seed}, `python tests/gpu/report.py --out {out.name}"
             f"{' --cpu_smoke' * smoke}{' --stages ' + ' '.join(config.stages) if config.stages else ''}`. Models have random weights.", "",
             "| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in hardware().items()), "",
             "| stage | | seconds | |", "| --- | --- | --- | --- |",
             *(f"| {name} | {stage['status']} | {stage['seconds']:.0f} | {stage.get('why', '').replace('|', '/')} |" for name, stage in results.items()), ""]
    if not smoke and (rows := targets(results)):
        lines += ["## Targets (set for an H200)", "", "| target | measured | reached |", "| --- | --- | --- |",
                  *(f"| {what} | {measured} | {'yes' if reached else '**no**'} |" for what, measured, reached in rows), ""]
    for name, stage in results.items():
        if result := {k: v for k, v in (stage.get("result") or {}).items() if k not in ("before", "after")}:
            flat = {f"{k}, {inner}" if isinstance(v, dict) else k: x for k, v in result.items() for inner, x in (v.items() if isinstance(v, dict) else [("", v)])}
            lines += [f"## {name}", "", "| | |", "| --- | --- |", *(f"| {k.replace('_', ' ')} | {shown(v)} |" for k, v in flat.items()), ""]
    distjudge.write_lines(out / "report.md", lines)


def run_stage(config: ReportConfig) -> None:
    """In a process of its own: writes stages/NAME.json."""
    path = Path(config.out) / "stages" / f"{config.stage}.json"
    try:
        result = STAGES[config.stage](config)
        problem = result.pop("problem", None)
        found = {"status": "failed" if problem else "ok", "result": result} | ({"why": problem} if problem else {})
    except Skip as skip:
        found = {"status": "skipped", "why": str(skip)}
    except BaseException as error:
        traceback.print_exc()
        found = {"status": "failed", "why": f"{type(error).__name__}: {distjudge.first_line(error)}"}  # type: ignore[arg-type]
    distjudge.write_json(path, found)


def start_stage(config: ReportConfig, name: str) -> dict[str, Any]:
    """Runs one stage; whatever becomes of it, says so in a dict."""
    folder = Path(config.out) / "stages"
    path, log = folder / f"{name}.json", folder / f"{name}.log"
    path.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--out", config.out, "--stage", name, "--seed", str(config.seed), *(["--cpu_smoke"] if config.cpu_smoke else [])]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment.setdefault("UNSLOTH_COMPILE_LOCATION", str((Path(config.out) / "unsloth").resolve()))
    begin, why = time.perf_counter(), ""
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
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
    if unknown := set(config.stages) - set(STAGES) | ({config.stage} - {""} - set(STAGES)):
        raise InputError(f"stages: there is no {', '.join(sorted(unknown))}; there are {', '.join(STAGES)}")
    if not torch.cuda.is_available() and not config.cpu_smoke:
        raise InputError("there is no CUDA device here; --cpu_smoke runs the same code with stand-ins")
    if config.stage:
        run_stage(config)
        return 0
    (Path(config.out) / "stages").mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    for name in config.stages or STAGES:
        results[name] = start_stage(config, name)
        print(f"{name}: {results[name]['status']} ({results[name]['seconds']:.0f} s) {results[name].get('why', '')}", flush=True)
        write_report(config, results)
    if not config.keep_models:
        shutil.rmtree(Path(config.out) / "models", ignore_errors=True)
    shutil.rmtree(Path(config.out) / "train", ignore_errors=True)
    print(f"wrote {Path(config.out) / 'report.md'}")
    return int(any(stage["status"] == "failed" for stage in results.values()))


if __name__ == "__main__":
    distjudge.cli(lambda config: sys.exit(main(config)), ReportConfig)
