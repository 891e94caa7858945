"""Measure this machine: packs against the stock ways of training and judging, the adversary's share, the exact projection.

    python recipes/bench.py --out runs/bench                         # everything; half an hour on two cores
    python recipes/bench.py --parts projection                       # one part; the projection takes half a minute
    python recipes/bench.py --backbone qwen7b                        # on a GPU: the real architecture, random weights, no download

Parts:
    train       seconds of a training step over one epoch of the same items, same model: ours, ours without packs, and trl.SFTTrainer
                (single-point, loss on the completion only) with the rows a pass that suit it best, with what the adversary takes of ours
    judge       seconds to judge the same items: ours, padded batches, one prompt at a time, generating one token
    rate        the part of the machine's own matrix rate that a forward and backward pass of ours reaches, for the tokens computed
    memory      peak memory of training, each way in a process of its own
    scaling     seconds of a step against the number of items, the length of the prompts and the share of common tokens
    projection  the exact projection against CVXPY

All ways take turns within one run; figures are medians with the smallest and largest. Prompts come from the folder of public data
sets named by DISTJUDGE_DATA (snli, summeval, mtbench), so that their lengths and shared beginnings are real, or else from the
embedded sample. Needs trl (on a CPU 1.14.2 or older: later ones train
with Triton kernels) and cvxpy: tests/requirements.txt. Writes bench.json and bench.md into --out.
"""

import contextlib
import dataclasses
import gc
import importlib.util
import io
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / part) for part in ("", "recipes", "data")]

import prepare
import torch

import distjudge
from distjudge import InputError, Item, Judge

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("train", "judge", "rate", "memory", "scaling", "projection")
BACKBONES = {  # architecture of each; "small" is what two CPU cores can bear, "toy" only shows that this script runs
    "toy": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2},
    "small": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8},
    "qwen0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
    "qwen1.5b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
    "qwen7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
}
TASKS = {
    "snli": ["entailment", "neutral", "contradiction"],
    "summeval": list("12345"),
    "mtbench": ["a", "b", "tie"],
    "sample": list("12345"),
}


@dataclasses.dataclass
class BenchConfig:
    out: str = "runs/bench"
    """The folder for bench.json and bench.md."""
    parts: tuple[Literal["train", "judge", "rate", "memory", "scaling", "projection"], ...] = PARTS
    """What to measure."""
    backbone: Literal["toy", "small", "qwen0.5b", "qwen1.5b", "qwen7b"] = "small"
    """The architecture (Qwen2), with random weights."""
    vocabulary: int = 151_936
    """Its vocabulary; Qwen's by default."""
    tasks: tuple[Literal["snli", "summeval", "mtbench", "sample"], ...] = ()
    """Which prompts. Default: snli and summeval and mtbench where DISTJUDGE_DATA has them, else the sample."""
    batch_size: int = 16
    """Items a training step."""
    stock_rows: tuple[int, ...] = (1, 4, 16)
    """Rows a forward pass of the stock trainer: one epoch is run with each, and the fastest is measured. Each must divide batch_size."""
    judged: int = 32
    """Items judged a repeat."""
    steps: int = 2
    """Training steps a repeat."""
    repeats: int = 3
    """Repeats of each measurement."""
    labels: tuple[int, ...] = (3, 5, 10)
    """projection: numbers of labels."""
    solved: int = 40
    """projection: points given to the solver a repeat."""
    seed: int = 0
    """Seed of weights, items and points."""
    measure_memory: str = ""
    """Used by the memory part to call itself: TASK/WAY."""


def seconds(action: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def shown(values: dict[str, float]) -> str:
    return f"{values['median']:.4g} ({values['min']:.3g} to {values['max']:.3g})"


def take_turns(ways: dict[str, Callable[[], float]], repeats: int, warm_up: int = 1) -> dict[str, dict[str, float]]:
    """Each way measures itself in turn, `repeats` times after a warm-up; medians and spreads."""
    times: dict[str, list[float]] = {way: [] for way in ways}
    for repeat in range(repeats + warm_up):
        for way, measure in ways.items():
            gc.collect()
            taken = measure()
            if repeat >= warm_up:
                times[way].append(taken)
    return {way: spread(values) for way, values in times.items()}


# --- prompts and models -------------------------------------------------------------------------------------------------
def data_folder() -> Path:
    """The folder of public data sets, or one that does not exist."""
    return Path(os.environ.get("DISTJUDGE_DATA") or ROOT / "no data sets")


def load_task(task: str, limit: int) -> list[Item]:
    """Items with real prompts, in the converters' order (which keeps articles and questions together)."""
    folder = data_folder()
    if task == "sample":
        return distjudge.load_items(ROOT / "data" / "panel.jsonl")[:limit]
    other = ("snli_1.0_test.jsonl", "reference_answer_gpt-4.jsonl")  # not needed, and no model's answer
    raw = [str(path) for path in sorted((folder / task).glob("*.jsonl")) if path.name not in other]
    quality = ("coherence",) if task == "summeval" else ()
    rows, card = prepare.convert(prepare.PrepareConfig(task=task, out="", raw=tuple(raw), dimension=quality))
    unique = {row["prompt"]: row for row in rows[:limit]}
    return distjudge.load_items(list(unique.values()), labels=card["labels"])


def available_tasks(config: BenchConfig) -> list[str]:
    folder = data_folder()
    return list(config.tasks) or [task for task in ("snli", "summeval", "mtbench") if (folder / task).is_dir()] or ["sample"]


def build_parts(config: BenchConfig):
    """A model with random weights on the machine's device, and a tokenizer: Qwen's own where it lies beside the data sets."""
    import transformers

    folder = data_folder().parent / "tokenizers" / "qwen2.5"
    if folder.is_dir():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    else:
        from tiny import build_tokenizer

        tokenizer = build_tokenizer([item.prompt for item in load_task("sample", 1500)], 2000)
    torch.manual_seed(config.seed)
    on_cuda = torch.cuda.is_available()
    with torch.device("cuda" if on_cuda else "cpu"):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.Qwen2Config(
                vocab_size=config.vocabulary,
                max_position_embeddings=8192,
                tie_word_embeddings=config.backbone != "qwen7b",
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
                bos_token_id=None,
                **BACKBONES[config.backbone],
            ),
            dtype=torch.bfloat16 if on_cuda else torch.float32,
        )
    return model.eval(), tokenizer


def make_judge(config: BenchConfig, labels: list[str], packs: bool = True) -> Judge:
    model, tokenizer = build_parts(config)
    judge = distjudge.make_judge(model, tokenizer, labels, seed=config.seed, max_length=8192)
    judge.packs = judge.packs and packs
    return judge


# --- training ----------------------------------------------------------------------------------------------------------
def step_timer():
    """A trainer callback that notes how long each optimizer step took."""
    import transformers

    class Timer(transformers.TrainerCallback):
        def __init__(self):
            self.times, self.start = [], 0.0

        def on_step_begin(self, *args, **kwargs):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.start = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.times.append(time.perf_counter() - self.start)

    return Timer()


def quietly(action: Callable[[], object]) -> object:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return action()


def train_ours(judge: Judge, items: list[Item], config: BenchConfig, alpha: float = 0.8, eps: float = 0.25) -> float:
    """Mean seconds of a step over one epoch of the items: every way then computes the same items, whatever their order."""
    timer = step_timer()
    with tempfile.TemporaryDirectory() as out:
        settings = distjudge.Config(out=out, batch_size=config.batch_size, epochs=1.0, alpha=alpha, eps=eps, warmup=0.0, save_every=0.0)
        quietly(lambda: distjudge.train(judge, items, settings, callbacks=[timer]))
    return statistics.mean(timer.times)


def majority_rows(items: list[Item], encoder: distjudge.PromptEncoder) -> list[dict[str, list[int]]]:
    """What a stock trainer of completions learns from: the prompts, each with its majority label for an answer."""
    rows = []
    for item in items:
        prompt = encoder(item.prompt)
        answer = [*encoder(item.prompt, max(item.counts, key=item.counts.get))[len(prompt) :], encoder.end_id]
        rows.append({"input_ids": prompt + answer, "completion_mask": [0] * len(prompt) + [1] * len(answer)})
    return rows


def make_stock(config: BenchConfig, items: list[Item], stock_rows: int):
    """trl's SFTTrainer on the majority label: the same model, LoRA, items a step and optimizer, its padded batches."""
    import datasets
    import peft
    import trl

    model, tokenizer = build_parts(config)
    rows = majority_rows(items, distjudge.PromptEncoder(tokenizer))
    accum = config.batch_size // stock_rows
    on_cuda = torch.cuda.is_available()
    padding_free = on_cuda and importlib.util.find_spec("flash_attn") is not None
    if padding_free:
        model.set_attn_implementation("flash_attention_2")

    def run() -> float:
        timer = step_timer()
        with tempfile.TemporaryDirectory() as out:
            arguments = trl.SFTConfig(
                output_dir=out,
                per_device_train_batch_size=stock_rows,
                padding_free=padding_free,
                gradient_accumulation_steps=accum,
                num_train_epochs=1,
                learning_rate=1e-5,
                optim="adamw_torch",
                max_length=None,
                completion_only_loss=True,
                save_strategy="no",
                report_to="none",
                use_cpu=not on_cuda,
                bf16=on_cuda,
                seed=config.seed,
                gradient_checkpointing=False,
                dataset_num_proc=None,
                logging_steps=1000,
            )
            lora = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
            trainer = quietly(
                lambda: trl.SFTTrainer(
                    model=model,
                    args=arguments,
                    train_dataset=datasets.Dataset.from_list(rows),
                    processing_class=tokenizer,
                    peft_config=lora,
                    callbacks=[timer],
                )
            )
            quietly(trainer.train)
            trainer.model.unload()
        return statistics.mean(timer.times)

    return run


def training_items(task: str, config: BenchConfig) -> list[Item]:
    """Items for so many steps: whole groups (an article's summaries, a question's pairs), drawn from the whole file."""
    groups: dict[str, list[Item]] = {}
    for item in load_task(task, 100_000):
        groups.setdefault(item.group or item.id, []).append(item)
    order = list(groups.values())
    random.Random(config.seed).shuffle(order)
    return [item for group in order for item in group][: config.batch_size * config.steps]


def bench_train(task: str, config: BenchConfig) -> dict:
    items = [dataclasses.replace(item, swap=None) for item in training_items(task, config)]
    judge = make_judge(config, TASKS[task])

    def ours(packs: bool) -> float:
        judge.packs = packs
        try:
            return train_ours(judge, items, config)
        finally:
            judge.packs = True

    stock = {rows: make_stock(config, items, rows) for rows in dict.fromkeys(min(n, config.batch_size) for n in config.stock_rows)}
    tried = {rows: run() for rows, run in stock.items()} if len(stock) > 1 else dict.fromkeys(stock, 0.0)
    rows = min(tried, key=tried.__getitem__)
    ways = {"ours": lambda: ours(True), "ours without packs": lambda: ours(False), "stock SFTTrainer": stock[rows]}
    times = take_turns(ways, config.repeats)
    encoded = judge.encode([item.prompt for item in items])
    p = torch.rand(config.batch_size, len(TASKS[task])).softmax(1)
    logq = torch.randn(p.shape).log_softmax(1)
    p, logq = p.to(judge.device), logq.to(judge.device)
    adversary = spread([seconds(lambda: distjudge.worst_case(logq, p, 0.25)) for _ in range(30)][5:])
    order = distjudge.shuffled(encoded, config.seed, 16, config.batch_size)
    steps = [order[k : k + config.batch_size] for k in range(0, len(order), config.batch_size)]
    plans = [distjudge.pack_prompts([encoded[i] for i in step], judge.pack_tokens, judge.tokens.branches) for step in steps]
    packed, passes = sum(len(pack.ids) for packs in plans for pack in packs), sum(map(len, plans)) / len(plans)
    return {
        "task": task,
        "items_a_step": config.batch_size,
        "tokens_a_prompt": statistics.mean(map(len, encoded)),
        "shared_tokens": 1 - packed / sum(map(len, encoded)),
        "passes_a_step": passes,
        "stock_rows": rows,
        "stock_rows_tried": tried,
        "seconds_a_step": times,
        "adversary_seconds": adversary,
        "adversary_share": passes * adversary["median"] / times["ours"]["median"],
    }


# --- judging -----------------------------------------------------------------------------------------------------------
def bench_judge(task: str, config: BenchConfig) -> dict:
    items = training_items(task, dataclasses.replace(config, batch_size=config.judged, steps=1))
    prompts = [item.prompt for item in items]
    judge = make_judge(config, TASKS[task])
    if judge.tokens.whole:
        raise InputError("bench: judge compares first-token readings, but this tokenizer needs whole labels")
    model = judge.model.get_base_model()
    encoded = judge.encode(prompts)
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    size, ids = 16, [sequence[0] for _, sequence in judge.tokens.sequences]

    def padded(group: list[int]) -> dict[str, torch.Tensor]:
        length = max(len(encoded[i]) for i in group)
        rows = [[judge.pad_id] * (length - len(encoded[i])) + encoded[i] for i in group]
        mask = [[0] * (length - len(encoded[i])) + [1] * len(encoded[i]) for i in group]
        return {"input_ids": torch.tensor(rows, device=judge.device), "attention_mask": torch.tensor(mask, device=judge.device)}

    batches = [order[i : i + size] for i in range(0, len(order), size)]

    @torch.no_grad()
    def in_batches() -> torch.Tensor:
        out = torch.empty(len(encoded), len(ids))
        for group in batches:
            out[group] = model(**padded(group), logits_to_keep=1).logits[:, -1, ids].float().log_softmax(1).cpu()
        return out

    @torch.no_grad()
    def one_at_a_time() -> torch.Tensor:
        return torch.stack(
            [
                model(input_ids=torch.tensor([row], device=judge.device), logits_to_keep=1).logits[0, -1, ids].float().log_softmax(0).cpu()
                for row in encoded
            ]
        )

    @torch.no_grad()
    def generating() -> None:
        for group in batches:
            model.generate(
                **padded(group),
                max_new_tokens=1,
                do_sample=False,
                output_scores=True,
                return_dict_in_generate=True,
                pad_token_id=judge.pad_id,
            )

    model.eval()
    ours = judge.score(prompts)[0]
    differences = {"padded batches": (in_batches() - ours).abs().max().item(), "one at a time": (one_at_a_time() - ours).abs().max().item()}
    if (worst := max(differences.values())) > (1e-4 if next(model.parameters()).dtype == torch.float32 else 0.1):
        raise RuntimeError(f"the ways to judge {task} differ by {worst:.2g} nats: times of different answers mean nothing")
    ways = {
        "ours": lambda: seconds(lambda: judge.score(prompts)),
        "padded batches": lambda: seconds(in_batches),
        "one at a time": lambda: seconds(one_at_a_time),
        "generate one token": lambda: seconds(lambda: quietly(generating)),
    }
    return {"task": task, "items": len(items), "seconds": take_turns(ways, config.repeats), "largest_difference_nats": differences}


# --- rate, memory, scaling ---------------------------------------------------------------------------------------------
def pass_seconds(judge: Judge, encoded: list[list[int]]) -> Callable[[], float]:
    """Times one forward and backward pass over prompts, in as many packs as they need."""
    passes = [judge.batch([encoded[i] for i in members]) for members in judge.plan(encoded)]

    def run() -> None:
        for batch in passes:
            distjudge.label_logprobs(judge.model, batch, judge.tokens)[0].sum().backward()
        judge.model.zero_grad()

    return lambda: seconds(run)


def matrix_rate(judge: Judge, tokens: int) -> float:
    """FLOP/s of this machine in the model's own largest matrix products, forward, for a pass of so many tokens."""
    config = judge.model.config
    dtype = next(judge.model.parameters()).dtype
    x = torch.randn(tokens, config.hidden_size, dtype=dtype, device=judge.device)
    w = torch.randn(config.intermediate_size, config.hidden_size, dtype=dtype, device=judge.device)
    out = torch.empty(tokens, config.intermediate_size, dtype=dtype, device=judge.device)  # a new one each time would slow it down
    times = [seconds(lambda: [torch.mm(x, w.T, out=out) for _ in range(10)]) / 10 for _ in range(12)]
    return 2 * tokens * w.numel() / statistics.median(times[2:])


def model_flops(judge: Judge, encoded: list[list[int]]) -> tuple[int, float]:
    """Tokens of one pack of the prompts, and the FLOPs of a forward and backward pass over it.

    Products with weights and attended pairs; backward only towards the inputs, as LoRA needs. 4-bit weights count as what they stand for.
    """
    pack = distjudge.build_pack(encoded, range(len(encoded)), judge.tokens.branches, getattr(judge.model, "two_levels", False))
    tokens, layers = len(pack.ids), judge.model.get_base_model().model.layers
    size = lambda part: part.in_features * part.out_features  # noqa: E731
    linear = {name: module for name, module in layers.named_modules() if isinstance(module, torch.nn.Linear)}
    weights = sum(size(module) for name, module in linear.items() if "lora_" not in name)
    adapters = sum(size(module) for name, module in linear.items() if "lora_" in name)
    pairs = sum(end - place for place, end in enumerate(pack.ends))
    config = judge.model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 4 * pairs * head * config.num_attention_heads * config.num_hidden_layers
    first = ("0.self_attn.q_proj", "0.self_attn.k_proj", "0.self_attn.v_proj")  # what the embeddings would get: nobody needs it
    unneeded = sum(size(module) for name, module in linear.items() if name.startswith(first))
    return tokens, 2 * tokens * (2 * weights + 3 * adapters - unneeded) + 3 * attention


def bench_rate(config: BenchConfig) -> dict:
    """Model FLOPs over the time of a forward and backward pass and the machine's own rate."""
    task = available_tasks(config)[0]
    judge = make_judge(config, TASKS[task])
    encoded = judge.encode([item.prompt for item in load_task(task, 10_000)[:128]])
    members = max(judge.plan(encoded), key=len)
    encoded = [encoded[i] for i in members]
    tokens, flops = model_flops(judge, encoded)
    judge.model.train()
    measure = pass_seconds(judge, encoded)
    times, rates = [], []
    for repeat in range(config.repeats + 2):
        rate, taken = matrix_rate(judge, tokens), measure()
        if repeat > 1:
            rates.append(rate)
            times.append(taken)
    reached = [flops / t / r for t, r in zip(times, rates, strict=True)]
    return {"tokens": tokens, "flops": flops, "seconds": spread(times), "matrix_flops_a_second": spread(rates), "reached": spread(reached)}


@contextlib.contextmanager
def peak_memory():
    """Yields a dict that holds, at the end, MiB before and at the peak within: of the GPU where there is one, else of this process.

    A process's own high-water mark would show the building of the model, so its resident size is sampled every 2 ms.
    """
    found: dict[str, float] = {}
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        found["before"] = torch.cuda.memory_allocated() / 2**20
        yield found
        found["peak"] = torch.cuda.max_memory_allocated() / 2**20
        return
    page = os.sysconf("SC_PAGE_SIZE")
    resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * page / 2**20  # noqa: E731
    found["before"] = found["peak"] = resident()
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            found["peak"] = max(found["peak"], resident())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    yield found
    done.set()
    watcher.join()


def measure_memory(config: BenchConfig) -> None:
    """Prints the peak memory of one way of training as JSON: before the steps, and after."""
    task, way = config.measure_memory.split("/", 1)
    items = [dataclasses.replace(item, swap=None) for item in training_items(task, dataclasses.replace(config, steps=2))]
    small = dataclasses.replace(config, steps=2)
    if way == "stock SFTTrainer":
        run = make_stock(small, items, min(config.batch_size, config.stock_rows[0]))
    else:
        judge = make_judge(small, TASKS[task], packs=way == "ours")
        run = lambda: train_ours(judge, items, small)  # noqa: E731
    gc.collect()
    with peak_memory() as found:
        run()
    print(json.dumps(found))


def bench_memory(task: str, config: BenchConfig, stock_rows: int) -> dict:
    rows = {}
    for way in ("ours", "ours without packs", "stock SFTTrainer"):
        command = [
            sys.executable,
            __file__,
            "--measure_memory",
            f"{task}/{way}",
            "--backbone",
            config.backbone,
            "--vocabulary",
            str(config.vocabulary),
            "--batch_size",
            str(config.batch_size),
            "--stock_rows",
            str(stock_rows),
            "--out",
            config.out,
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{way}: {done.stderr[-2000:]}")
        rows[way] = json.loads(done.stdout.splitlines()[-1])
    return {"task": task, "stock_rows": stock_rows, "mib": rows}


def bench_scaling(config: BenchConfig) -> list[dict]:
    """Forward and backward over made-up prompts: items, prompt length, share of common tokens, one at a time."""
    judge = make_judge(config, ["1", "2", "3"])
    judge.model.train()
    draw = torch.Generator().manual_seed(config.seed)

    def prompts(items: int, length: int, share: float) -> list[list[int]]:
        ids = torch.randint(100, 1900, (items + 1, length), generator=draw).tolist()
        common = round(share * length)
        return [ids[0][:common] + row[common:] for row in ids[1:]]

    cases = [(n, 128, 0.75) for n in (4, 8, 16, 32)] + [(8, length, 0.75) for length in (64, 128, 256, 512)]
    cases += [(16, 128, share) for share in (0.0, 0.25, 0.5, 0.75, 0.9)]
    ways = {case: pass_seconds(judge, prompts(*case)) for case in dict.fromkeys(cases)}
    times = take_turns(ways, config.repeats)
    return [{"items": n, "tokens": length, "share": share, "seconds": times[(n, length, share)]} for n, length, share in ways]


# --- projection --------------------------------------------------------------------------------------------------------
def points(labels: int, n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Panels of five votes and, from each, the point that one step of the adversary against a random judge asks for."""
    draw = torch.Generator().manual_seed(seed)
    votes = torch.randint(labels, (n, 5), generator=draw)
    p = torch.nn.functional.one_hot(votes, labels).double().mean(1)
    logq = torch.randn(n, labels, generator=draw, dtype=torch.float64).log_softmax(1)
    return p + 0.2 * (p.clamp_min(1e-12).log() - logq + 1), p


def bench_projection(labels: int, config: BenchConfig) -> dict:
    """Milliseconds a projection; the solver's problem once compiled with parameters, its best case, and once made afresh."""
    import cvxpy

    eps, n, ours = 0.25, 1024, distjudge.project_ball
    y, p = points(labels, n, config.seed)
    x, y_, p_ = cvxpy.Variable(labels), cvxpy.Parameter(labels), cvxpy.Parameter(labels)
    compiled = cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(x - y_)), [x >= 0, cvxpy.sum(x) == 1, cvxpy.norm(x - p_) <= eps])
    solved = torch.empty(config.solved, labels, dtype=torch.float64)

    def solver(fresh: bool) -> None:
        for i in range(config.solved):
            if fresh:
                limits = [x >= 0, cvxpy.sum(x) == 1, cvxpy.norm(x - p[i].numpy()) <= eps]
                cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(x - y[i].numpy())), limits).solve(solver=cvxpy.CLARABEL)
            else:
                y_.value, p_.value = y[i].numpy(), p[i].numpy()
                compiled.solve(solver=cvxpy.CLARABEL)
            solved[i] = torch.from_numpy(x.value)

    times = take_turns(
        {
            "ours, 1,024 at once": lambda: 1000 * seconds(lambda: ours(y, p, eps)) / n,
            "ours, one by one": lambda: (
                1000 * seconds(lambda: [ours(y[i : i + 1], p[i : i + 1], eps) for i in range(config.solved)]) / config.solved
            ),
            "CVXPY, compiled once": lambda: 1000 * seconds(lambda: solver(False)) / config.solved,
            "CVXPY, afresh": lambda: 1000 * seconds(lambda: solver(True)) / config.solved,
        },
        config.repeats,
    )
    difference = (solved - ours(y, p, eps)[: config.solved]).abs().max().item()
    return {"labels": labels, "ms_a_projection": times, "largest_difference": difference}


# --- tables ------------------------------------------------------------------------------------------------------------
def ratio(times: dict, way: str, ours: str = "ours") -> str:
    return f"{times[way]['median'] / times[ours]['median']:.2f} x"


def tables(results: dict) -> list[str]:
    lines: list[str] = []

    def table(title: str, head: list[str], rows: list[list[str]]) -> None:
        lines.extend(
            ["", f"**{title}**", "", f"| {' | '.join(head)} |", "| --- " * len(head) + "|", *(f"| {' | '.join(row)} |" for row in rows)]
        )

    if rows := results.get("train"):
        ways = list(rows[0]["seconds_a_step"])
        table(
            "Training step, seconds",
            ["prompts", "tokens a prompt", "shared", *ways, "rows a pass, stock", "without packs / ours", "stock / ours", "adversary"],
            [
                [
                    r["task"],
                    f"{r['tokens_a_prompt']:.0f}",
                    f"{r['shared_tokens']:.0%}",
                    *(shown(r["seconds_a_step"][w]) for w in ways),
                    str(r["stock_rows"]),
                    ratio(r["seconds_a_step"], ways[1]),
                    ratio(r["seconds_a_step"], ways[2]),
                    f"{r['adversary_share']:.2%}",
                ]
                for r in rows
            ],
        )
    if rows := results.get("judge"):
        ways = list(rows[0]["seconds"])
        table(
            "Judging, seconds",
            ["prompts", "items", *ways, *(f"{w} / ours" for w in ways[1:]), "largest difference"],
            [
                [
                    r["task"],
                    str(r["items"]),
                    *(shown(r["seconds"][w]) for w in ways),
                    *(ratio(r["seconds"], w) for w in ways[1:]),
                    f"{max(r['largest_difference_nats'].values()):.1e} nats",
                ]
                for r in rows
            ],
        )
    if r := results.get("rate"):
        table(
            "Matrix rate",
            ["tokens a pass", "seconds", "the machine's GFLOP/s", "reached"],
            [[str(r["tokens"]), shown(r["seconds"]), f"{r['matrix_flops_a_second']['median'] / 1e9:.0f}", f"{r['reached']['median']:.0%}"]],
        )
    if rows := results.get("memory"):
        ways = list(rows[0]["mib"])
        table(
            "Memory of training, MiB above what the loaded model takes",
            ["prompts", "rows a pass, stock", *ways],
            [[r["task"], str(r["stock_rows"]), *(f"{r['mib'][w]['peak'] - r['mib'][w]['before']:,.0f}" for w in ways)] for r in rows],
        )
    if rows := results.get("scaling"):
        table(
            "Forward and backward, seconds",
            ["items", "tokens a prompt", "common", "seconds", "ms an item"],
            [
                [
                    str(r["items"]),
                    str(r["tokens"]),
                    f"{r['share']:.0%}",
                    shown(r["seconds"]),
                    f"{1000 * r['seconds']['median'] / r['items']:.1f}",
                ]
                for r in rows
            ],
        )
    if rows := results.get("projection"):
        ways = list(rows[0]["ms_a_projection"])
        table(
            "Projection, milliseconds",
            ["labels", *ways, "compiled solver / ours at once", "largest difference"],
            [
                [
                    str(r["labels"]),
                    *(shown(r["ms_a_projection"][w]) for w in ways),
                    ratio(r["ms_a_projection"], ways[2], ways[0]),
                    f"{r['largest_difference']:.1e}",
                ]
                for r in rows
            ],
        )
    return lines[1:]


def machine() -> dict:
    found = {"machine": platform.machine(), "cores": os.cpu_count(), "torch_threads": torch.get_num_threads(), **distjudge.versions()}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def main(config: BenchConfig) -> None:
    if config.measure_memory:
        measure_memory(config)
        return
    for part, module in (("projection", "cvxpy"), ("train", "trl"), ("memory", "trl")):
        if part in config.parts:
            try:
                __import__(module)
            except ImportError:
                raise InputError(f"bench: {part} needs {module}: pip install -r tests/requirements.txt") from None
    if any(rows < 1 or config.batch_size % min(config.batch_size, rows) for rows in config.stock_rows) or not config.stock_rows:
        raise InputError("stock_rows: must divide batch_size")
    tasks, out = available_tasks(config), Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    results: dict = {"machine": machine(), "config": dataclasses.asdict(config)}

    def best_rows(task: str) -> int:
        """What the train part of this run found for the stock trainer, or else the first it was to try."""
        found = [row["stock_rows"] for row in results.get("train", ()) if row["task"] == task]
        return found[0] if found else min(config.batch_size, config.stock_rows[0])

    measures = {
        "train": lambda: [bench_train(task, config) for task in tasks],
        "judge": lambda: [bench_judge(task, config) for task in tasks],
        "rate": lambda: bench_rate(config),
        "memory": lambda: [bench_memory(task, config, best_rows(task)) for task in tasks],
        "scaling": lambda: bench_scaling(config),
        "projection": lambda: [bench_projection(labels, config) for labels in config.labels],
    }
    for part in config.parts:
        print(f"measuring: {part}", file=sys.stderr)
        results[part] = measures[part]()
        distjudge.write_json(out / "bench.json", results)
    lines = tables(results)
    distjudge.write_lines(out / "bench.md", lines)
    print("\n".join(lines))


if __name__ == "__main__":
    distjudge.cli(main, BenchConfig)
