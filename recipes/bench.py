"""Measure this machine: training and judging against the stock ways, the adversary, the matrix rate.

    python recipes/bench.py --out runs/bench             # everything; the better part of an hour on two cores
    python recipes/bench.py --parts judge rate           # two parts
    python recipes/bench.py --backbone qwen7b            # on a GPU: the real architecture, random weights
    python recipes/bench.py --model runs/smollm2 --tasks votes.jsonl     # your weights and items

Parts:
    train       seconds of a training step on the same items and model: ours, ours without packs, and
                trl.SFTTrainer (single-point, loss on the label only) with the rows a pass that suit it best;
                what packs save; the adversary's share
    judge       seconds to judge the same items: ours, padded batches, one at a time, generating one token
                (both parts on a CPU with AMX or AVX512-BF16: also ours in bfloat16, as recipes run there)
    rate        the part of the machine's own matrix rate that a forward and backward pass of ours reaches

All ways take turns within one run. Figures are medians with the smallest and largest. Prompts come from the
folder of public data sets named by DISTJUDGE_DATA, so that their lengths and shared beginnings are real, or
else from the embedded sample. Needs trl (on a CPU 1.14.2 or older: later ones train with Triton kernels), see
tests/requirements.txt. Writes bench.json and bench.md into --out.
"""

import concurrent.futures
import contextlib
import dataclasses
import gc
import importlib.util
import io
import itertools
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / part) for part in ("", "recipes", "data")]

import distjudge
from distjudge import InputError, Item, Judge

import common
import prepare
import tiny
import torch

from plots.data import some_groups

DATA = Path(os.environ.get("DISTJUDGE_DATA") or ROOT / "no data sets")
TASKS = tuple(task for task in ("snli", "summeval", "mtbench") if (DATA / task).is_dir()) or ("sample",)
PARTS = {"train": "Training step", "judge": "Judging", "rate": "Matrix rate"}
SIZES = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads".split()
BACKBONES = {  # family, SIZES, vocabulary, whether input and output embeddings are one
    "toy": ("qwen2", (32, 64, 2, 2, 2), 4096, True),  # only shows that this script runs
    "small": ("qwen2", (512, 1408, 8, 8, 8), 151_936, True),  # what two CPU cores can bear
    "middle": ("qwen2", (1024, 2816, 8, 16, 4), 151_936, False),
    "qwen7b": ("qwen2", (3584, 18_944, 28, 28, 4), 152_064, False),
    "llama8b": ("llama", (4096, 14_336, 32, 32, 8), 128_256, False),
}
OURS, HALVED, UNPACKED, STOCK = "ours", "ours in bfloat16", "ours without packs", "stock SFTTrainer"


@dataclasses.dataclass
class BenchConfig:
    out: str = "runs/bench"
    """The folder for bench.json and bench.md."""
    parts: tuple[Literal[tuple(PARTS)], ...] = tuple(PARTS)
    """What to measure."""
    backbone: Literal[tuple(BACKBONES)] = "small"
    """The architecture, with random weights."""
    model: str = ""
    """A model's folder or hub id, in place of backbone: its own weights and tokenizer."""
    tasks: tuple[str, ...] = TASKS
    """Whose prompts: snli, summeval, mtbench (in DISTJUDGE_DATA), sample, or files of items."""
    batch_size: int = 16
    """Items a training step."""
    stock_rows: tuple[int, ...] = (1, 4, 16)
    """Rows a pass of the stock trainer, divisors of batch_size: all are tried, the fastest is measured."""
    steps: int = 2
    """Training steps a repeat, after as many to warm up. Their items are judged, too."""
    repeats: int = 3
    """Repeats of each measurement."""
    seed: int = 0
    """Seed of weights and items."""


def in_new_process(action: Callable[..., Any], *arguments: Any) -> Any:
    """What a function at the top of a module returns, called in a process that has computed nothing yet."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
        return fresh.submit(action, *arguments).result()


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(action: Callable[[], object]) -> float:
    start = now()
    action()
    return now() - start


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def take_turns(ways: dict[Any, Callable[[], Any]], repeats: int, warm_up: int = 0) -> dict[Any, list]:
    """What each way measures of itself, the ways in turn; after as many turns to warm up."""
    found: dict[Any, list] = {way: [] for way in ways}
    for _ in range(warm_up + repeats):
        for way, measure in ways.items():
            gc.collect()
            found[way].append(measure())
    return {way: values[warm_up:] for way, values in found.items()}


def spreads(times: dict[str, list[float]]) -> dict[str, Any]:
    """The spread of each way's times, and each median over that of the first way."""
    found = {way: spread(values) for way, values in times.items()}
    first, *others = times
    return found | {f"{way} / {first}": found[way]["median"] / found[first]["median"] for way in others}


def quietly(action: Callable[[], Any]) -> Any:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return action()


def some_items(task: str, number: int, seed: int) -> list[Item]:
    """So many items with different prompts, by whole groups (an article's summaries, a question's pairs)."""
    if task == "sample" or task.endswith((".jsonl", ".jsonl.gz")):
        items = distjudge.load_items(tiny.SAMPLE if task == "sample" else task)
    elif task not in TASKS:
        there = distjudge.listed(TASKS)
        raise InputError(f"tasks: {distjudge.short(task)}: name a file of items (.jsonl), sample, or {there}")
    else:
        other = ("snli_1.0_test.jsonl", "reference_answer_gpt-4.jsonl")  # not needed, and no model's answer
        raw = tuple(str(path) for path in sorted((DATA / task).glob("*.jsonl")) if path.name not in other)
        quality = ("coherence",) if task == "summeval" else ()
        config = prepare.PrepareConfig(task=task, out="", raw=raw, dimension=quality)
        rows, card = prepare.convert(config)
        items = distjudge.load_items(rows, labels=card["labels"])
    items = list({item.prompt: item for item in items}.values())
    return [dataclasses.replace(item, swap=None) for item in some_groups(items, number, seed)]


def step_items(task: str, config: BenchConfig) -> list[Item]:
    """The items of all steps. Raises InputError if there are fewer: a shorter step is not a step."""
    items = some_items(task, number := config.batch_size * config.steps, config.seed)
    if len(items) < number:
        few = f"{len(items)} different prompts, and batch_size times steps is {number}"
        raise InputError(f"tasks: {distjudge.short(task, 200)} has {few}: set one of them lower")
    return items


def random_model(backbone: str, tokenizer: Any, seed: int, **changes: Any) -> Any:
    """A model with random weights: in bfloat16 on the GPU where there is one, else in float32."""
    import transformers

    family, sizes, vocabulary, tied = BACKBONES[backbone]
    settings = dict(zip(SIZES, sizes, strict=True)) | {"tie_word_embeddings": tied, "bos_token_id": None}
    settings |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    settings |= {"vocab_size": max(vocabulary, len(tokenizer)), "max_position_embeddings": 8192} | changes
    torch.manual_seed(seed)
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    with torch.device(device):
        config = transformers.AutoConfig.for_model(family, **settings)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def model_and_tokenizer(config: BenchConfig) -> tuple[Any, Any]:
    """config.model's; else random weights and, where it lies beside the data sets, Qwen's tokenizer."""
    if config.model:
        return distjudge.load_model(config.model), distjudge.load_tokenizer(config.model)
    folder = DATA.parent / "tokenizers" / "qwen2.5"
    if folder.is_dir():
        tokenizer = distjudge.load_tokenizer(str(folder))
    else:
        tokenizer = tiny.build_tokenizer([item.prompt for item in distjudge.load_items(tiny.SAMPLE)], 2000)
    return random_model(config.backbone, tokenizer, config.seed), tokenizer


def make_judge(config: BenchConfig, items: list[Item], bf16: bool = False) -> Judge:
    options = {"seed": config.seed, "max_length": 8192, "bf16": bf16}
    return distjudge.make_judge(*model_and_tokenizer(config), distjudge.labels_of(items), **options)


def train_ours(judge: Judge, items: list[Item], **settings: Any) -> tuple[list[float], list[float]]:
    """Trains with Config's defaults and these settings: seconds of each step but the first, losses of all."""
    ends: list[float] = []
    with tempfile.TemporaryDirectory() as out:
        config = distjudge.Config(out=out, save_every=0.0, **settings)
        log = quietly(lambda: distjudge.train(judge, items, config, on_step=lambda _: ends.append(now())))
    return [b - a for a, b in itertools.pairwise(ends)], [row["loss"] for row in log if "loss" in row]


def train_stock(model: Any, tokenizer: Any, items: list[Item], rows: int, **settings: Any) -> list[float]:
    """Trains by trl.SFTTrainer on the majority labels, so many rows a pass: seconds likewise."""
    import datasets
    import transformers
    import trl
    from accelerate.state import AcceleratorState

    encoder, data, ends = distjudge.PromptEncoder(tokenizer), [], []
    for item in items:
        prompt = encoder(item.prompt)
        answer = [*encoder(item.prompt, max(item.counts, key=item.counts.get))[len(prompt) :], encoder.end_id]
        data.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(now())

    cuda = torch.cuda.is_available()
    settings |= {"per_device_train_batch_size": rows, "use_cpu": not cuda, "bf16": cuda}
    settings |= {"gradient_checkpointing": False, "save_strategy": "no", "report_to": "none"}
    with tempfile.TemporaryDirectory() as out:
        arguments = trl.SFTConfig(output_dir=out, **settings)
        given = {"train_dataset": datasets.Dataset.from_list(data), "processing_class": tokenizer}
        trainer = quietly(lambda: trl.SFTTrainer(model=model, args=arguments, callbacks=[Clock()], **given))
        quietly(trainer.train)
    AcceleratorState._reset_state(True)  # which holds the stock trainer's precision; ours has another
    return [b - a for a, b in itertools.pairwise(ends)]


def our_step(judge: Judge, items: list[Item], config: BenchConfig, packs: bool) -> float:
    """Mean seconds of a step of the second epoch: every way then computes the same items."""
    allowed, judge.packs = judge.packs, judge.packs and packs
    times, _ = train_ours(judge, items, epochs=2.0, batch_size=config.batch_size)
    judge.packs = allowed
    return statistics.mean(times[len(times) // 2 :])


def with_adapters(model: Any) -> Any:
    """As ours, for the stock trainer."""
    import peft

    lora = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(model, lora)


def adversary_seconds(judge: Judge, rows: int) -> float:
    """The median over calls of the adversary for a pass of so many items."""
    p = torch.rand(rows, len(judge.labels), device=judge.device).softmax(1)
    logq = torch.randn(p.shape, device=judge.device).log_softmax(1)
    return statistics.median([seconds(lambda: distjudge.worst_case(logq, p, 0.25)) for _ in range(30)][5:])


def bench_train(task: str, config: BenchConfig) -> dict[str, Any]:
    """shared_tokens: the share of tokens that packs save; adversary_share: of our step, a call a pass."""
    items = step_items(task, config)
    judge, (model, tokenizer) = make_judge(config, items), model_and_tokenizer(config)
    model = with_adapters(model)

    def stock(rows: int) -> float:
        """As our_step(), with so many rows a pass: same model, adapters, items a step and optimizer."""
        settings = {"gradient_accumulation_steps": config.batch_size // rows, "optim": "adamw_torch"}
        times = train_stock(model, tokenizer, items, rows, num_train_epochs=2, max_length=None, **settings)
        return statistics.mean(times[len(times) // 2 :])

    tried = {rows: stock(rows) for rows in config.stock_rows}  # and warms up
    best = min(tried, key=tried.__getitem__)
    ways = {
        OURS: lambda: our_step(judge, items, config, packs=True),
        UNPACKED: lambda: our_step(judge, items, config, packs=False),
        STOCK: lambda: stock(best),
    }
    if distjudge.multiplies_bf16(judge.device):
        halved = make_judge(config, items, bf16=True)
        ways[HALVED] = lambda: our_step(halved, items, config, packs=True)
    times = spreads(take_turns(ways, config.repeats))
    encoded = judge.encode([item.prompt for item in items])
    tokens, _ = common.first_epoch(judge, encoded, distjudge.Config(batch_size=config.batch_size))
    passes = len(tokens) * config.batch_size / len(items)
    adversary = passes * adversary_seconds(judge, config.batch_size)
    found = {"task": task, "items_a_step": config.batch_size}
    found |= {"tokens_a_prompt": statistics.mean(map(len, encoded))}
    found |= {"shared_tokens": 1 - sum(tokens) / sum(map(len, encoded)), "passes_a_step": passes}
    found |= {"seconds_a_step": times, "stock_rows": best, "stock_rows_tried": tried}
    return found | {"adversary_share": adversary / times[OURS]["median"]}


def bench_judge(task: str, config: BenchConfig) -> dict[str, Any]:
    items = step_items(task, config)
    judge, prompts = make_judge(config, items), [item.prompt for item in items]
    if judge.tokens.whole:
        raise InputError("bench: judge compares first-token readings, but this tokenizer needs whole labels")
    model, encoded = judge.model.get_base_model().eval(), judge.encode(prompts)
    ids = [ids[0] for _, ids in judge.tokens.sequences]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    singly, batches = [[i] for i in order], [order[i : i + 16] for i in range(0, len(order), 16)]

    def padded(group: list[int]) -> Any:
        rows = {"input_ids": [encoded[i] for i in group]}
        return judge.tokenizer.pad(rows, padding_side="left", return_tensors="pt").to(judge.device)

    @torch.no_grad()
    def read(groups: list[list[int]]) -> torch.Tensor:
        out = torch.empty(len(encoded), len(ids))
        for group in groups:
            logits = model(**padded(group), logits_to_keep=1).logits[:, -1, ids]
            out[group] = logits.float().log_softmax(1).cpu()
        return out

    def generate() -> None:
        for group in batches:
            model.generate(**padded(group), max_new_tokens=1, do_sample=False)

    ours, close = judge.score(prompts)[0], 1e-4 if next(model.parameters()).dtype == torch.float32 else 0.1
    apart = max((read(groups) - ours).abs().max().item() for groups in (batches, singly))
    if not apart <= close:
        raise RuntimeError(f"{task}: the ways to judge differ by {apart:.2g} nats: their times mean nothing")
    ways = {
        OURS: lambda: seconds(lambda: judge.judge_encoded(encoded)),
        "padded batches": lambda: seconds(lambda: read(batches)),
        "one at a time": lambda: seconds(lambda: read(singly)),
        "generate one token": lambda: seconds(lambda: quietly(generate)),
    }
    if distjudge.multiplies_bf16(judge.device):
        halved = make_judge(config, items, bf16=True)
        ways[HALVED] = lambda: seconds(lambda: halved.judge_encoded(encoded))
    times = spreads(take_turns(ways, config.repeats, warm_up=1))
    return {"task": task, "items": len(items), "seconds": times, "largest_difference_nats": apart}


def pass_flops(judge: Judge, batch: dict[str, torch.Tensor]) -> int:
    """FLOPs of a forward and backward pass over a pack.

    Products with weights and attended pairs; backward only towards the inputs, as LoRA needs. 4-bit weights
    count as what they stand for.
    """
    config, ends, weights = judge.model.config, batch["ends"][0], 0
    unneeded = ("0.self_attn.q_proj", "0.self_attn.k_proj", "0.self_attn.v_proj")  # back to the embeddings
    for name, part in judge.model.get_base_model().model.layers.named_modules():
        if isinstance(part, torch.nn.Linear):
            times = (3 if "lora_" in name else 2) - name.startswith(unneeded)
            weights += times * part.in_features * part.out_features
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    pairs = int(ends.sum()) - len(ends) * (len(ends) - 1) // 2  # a token is seen from its place to its end
    attention = 4 * pairs * head * config.num_attention_heads * config.num_hidden_layers
    return 2 * len(ends) * weights + 3 * attention


def matrix_share(judge: Judge, encoded: list[list[int]], repeats: int) -> dict[str, Any]:
    """FLOP/s of a pass over the largest pack of the prompts against those of the model's largest product.

    The two take turns. The product is of as many tokens, into a tensor that is there already: a new one each
    time would slow it down.
    """
    batch, config = judge.batch([encoded[i] for i in max(judge.plan(encoded), key=len)]), judge.model.config
    flops, tokens = pass_flops(judge, batch), batch["input_ids"].numel()
    like = {"dtype": next(judge.model.parameters()).dtype, "device": judge.device}
    x = torch.randn(tokens, config.hidden_size, **like)
    w = torch.randn(config.intermediate_size, config.hidden_size, **like)
    out = torch.empty(tokens, config.intermediate_size, **like)

    def products() -> None:
        for _ in range(10):
            torch.mm(x, w.T, out=out)

    def rate() -> float:
        return 20 * tokens * w.numel() / statistics.median([seconds(products) for _ in range(12)][2:])

    def step() -> None:
        distjudge.label_logprobs(judge.model, batch, judge.tokens)[0].sum().backward()
        judge.model.zero_grad()

    judge.model.train()
    found = take_turns({"rate": rate, "seconds": lambda: seconds(step)}, repeats, warm_up=2)
    rates, times = found.values()
    reached = spread([flops / taken / rate for taken, rate in zip(times, rates, strict=True)])
    found = {"tokens": tokens, "flops": flops, "seconds": spread(times), "reached": reached}
    return found | {"matrix_flops_a_second": spread(rates)}


def bench_rate(task: str, config: BenchConfig) -> dict[str, Any]:
    items = some_items(task, 128, config.seed)
    judge = make_judge(config, items)
    return {"task": task} | matrix_share(judge, judge.encode([item.prompt for item in items]), config.repeats)


def flat(row: dict[str, Any], before: str = "") -> dict[str, str]:
    """A row of text: dicts within it as fields of their own, a spread as "median (least to greatest)"."""
    found = {}
    for key, value in row.items():
        name = f"{before}{key}".replace("_", " ")
        if isinstance(value, dict) and "median" in value:
            found[name] = f"{value['median']:.4g} ({value['min']:.3g} to {value['max']:.3g})"
        elif isinstance(value, dict):
            found |= flat(value, f"{name}, ")
        else:
            found[name] = (f"{value:.4g}" if isinstance(value, float) else str(value)).replace("|", "/")
    return found


def table(rows: list[dict[str, Any]], down: bool = False) -> list[str]:
    """A Markdown table of rows that have the same fields; down: a field a line, and each row a column."""
    rows = [flat(row) for row in rows]
    grid = [list(rows[0]), *(list(row.values()) for row in rows)]
    head, *body = zip(*grid, strict=True) if down else grid
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *body)]


def main(config: BenchConfig) -> None:
    if "train" in config.parts and importlib.util.find_spec("trl") is None:
        raise InputError("bench: train needs trl: pip install -r tests/requirements.txt")
    if not config.stock_rows or any(rows < 1 or config.batch_size % rows for rows in config.stock_rows):
        raise InputError(f"stock_rows: must divide batch_size, {config.batch_size}")
    if config.repeats < 1 or not config.tasks:
        raise InputError("repeats, tasks: one or more of each")
    out, lines = Path(config.out), []
    out.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    machine = {"device": device, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    results = {"machine": machine | distjudge.versions(), "config": dataclasses.asdict(config)}
    measures = {"train": bench_train, "judge": bench_judge, "rate": bench_rate}
    for part in config.parts:
        print(f"measuring: {part}", file=sys.stderr)
        results[part] = [measures[part](task, config) for task in config.tasks]
        lines += [f"**{PARTS[part]}**", "", *table(results[part], down=True), ""]
        distjudge.write_json(out / "bench.json", results)
        distjudge.write_lines(out / "bench.md", lines)
    print("\n".join(lines))


if __name__ == "__main__":
    distjudge.cli(main, BenchConfig)
