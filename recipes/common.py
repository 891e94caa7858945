"""What the recipes of real backbones share: presets, a dry run, a page before the first step.

A recipe's page names a model, and main() makes its command line. In Python:

    config = common.FourBitConfig(train=("votes.jsonl",), model="Qwen/Qwen3-4B", out="runs/qwen3_4b")
    metrics = common.run(config)
"""

import argparse
import dataclasses
import functools
import itertools
import math
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_type_hints

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import distjudge
from distjudge import Config, InputError, Item, Judge, log

import torch

FIRST = os.environ.get("RANK", "0") == "0"  # of torchrun's processes; it does the talking


@dataclasses.dataclass
class RunConfig(Config):
    """The settings of a run, and what its command adds."""

    train: tuple[str, ...] = ()
    """REQUIRED: training items, one or more .jsonl or .jsonl.gz files."""
    preset: Literal["default", "paper", "single", "kl", "teacher"] = "default"
    """The method's settings by name; flags beside it win. (Python: Config(**distjudge.PRESETS[name]).)"""
    dry_run: bool = False
    """Print what a run would do, and stop. Needs config.json and the tokenizer; no weights, no GPU."""
    card_gib: float = 0.0
    """With --dry_run: plan for a card with so many GiB, here or not, and say which settings fit into it."""
    min_mass: float = 0.01
    """With --answer 0: refuse a model whose labels hold less of its probability before training."""

    def check(self) -> None:
        """Raises InputError naming the field for a value outside its range."""
        super().check()
        if not 0 <= self.min_mass <= 1:
            raise InputError(f"min_mass: must be between 0 and 1, not {self.min_mass}")
        if not 0 <= self.card_gib < math.inf or (self.card_gib and not self.dry_run):
            raise InputError(f"card_gib: needs --dry_run, and must be 0 or more, not {self.card_gib}")

    def settle(self, items: int) -> None:
        """For a recipe whose settings go by the number of training items: fills in what is None."""


@dataclasses.dataclass
class FourBitConfig(RunConfig):
    """A 4-bit model on one consumer GPU."""

    four_bit: bool = True
    """Load the weights in 4 bits (NF4, quantized twice); --no_four_bit: 16 bits, four times the memory."""
    gradient_checkpointing: bool = True
    max_length: int = 4096
    pack_tokens: int = 4096
    batch_size: int = 16


@dataclasses.dataclass
class BySizeConfig(RunConfig):
    """A small model, whose epochs and rate go by the number of training items."""

    epochs: float | None = None
    """Passes over the training items. Default: 1,200 / items, but 2 at least and 8 at most."""
    learning_rate: float | None = None
    """Peak learning rate of AdamW. Default: 1e-3 up to 4,000 training items, 3e-4 for more."""

    def settle(self, items: int) -> None:
        if self.epochs is None:
            self.epochs = min(8.0, max(2.0, 1200 / items))
        if self.learning_rate is None:
            self.learning_rate = 1e-3 if items <= 4000 else 3e-4


def with_defaults(config_class: type[RunConfig], **values: Any) -> type[RunConfig]:
    """The same settings with other defaults."""
    hints = get_type_hints(config_class)
    changed = [(name, hints[name], value) for name, value in values.items()]
    return dataclasses.make_dataclass(config_class.__name__, changed, bases=(config_class,))


def recipe(page: str, model: str, kind: type[RunConfig] = FourBitConfig, **defaults: Any) -> type[RunConfig]:
    """The settings of a recipe's page; its file's name is that of the run folder."""
    return with_defaults(kind, model=model, out=f"runs/{Path(page).stem}", **defaults)


def main(config_class: type[RunConfig]) -> None:
    """The command line of a recipe: a flag for each setting; --preset changes their defaults."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", nargs="?")
    preset = parser.parse_known_args()[0].preset
    changed = {"preset": preset, **distjudge.PRESETS[preset]} if preset in distjudge.PRESETS else {}
    distjudge.cli(run, with_defaults(config_class, **changed))


def run(config: RunConfig) -> dict[str, float | None]:
    """distjudge.run() with a page before the first step: what it will do (plan_lines), and the label mass.

    With config.dry_run only the first: then it reads no weights, writes nothing and returns {}. Raises
    InputError for what cannot be used. Of several processes (torchrun) the first does the talking.
    """
    say = functools.partial(print, flush=True) if FIRST else lambda *_: None

    def look(judge: Judge, items: Sequence[Item], test: Sequence[Item]) -> None:
        config.settle(len(items))
        if FIRST:
            plan = plan_lines(judge, items, test, config)
            say("\n".join(f"{name:<11} {text}" for name, text in plan.items()))
        if not config.dry_run:
            say(f"{'label mass':<11} {check_mass(judge, items, config.answer, config.min_mass)}")

    config.check()
    if not config.dry_run:
        refuse_stopped(config)
        metrics = distjudge.run(config, before_training=look)
        say(outcome(metrics, config.out) if metrics else "")
        return metrics
    items, test = distjudge.load_data(config)
    judge = outline(config, distjudge.labels_of(items))
    items = distjudge.keep_short(judge, items, config.overlong, "training")
    look(judge, items, distjudge.keep_short(judge, test, config.overlong, "test"))
    return {}


def refuse_stopped(config: RunConfig) -> None:
    """InputError where config.out holds a run that was stopped, whose checkpoints would be lost."""
    out = Path(config.out)
    left, last = distjudge.checkpoints_in(out / "checkpoints"), out / "metrics.json"  # which a run ends with
    is_done = left and last.exists() and last.stat().st_mtime >= left[0].stat().st_mtime
    if left and not config.resume and not is_done:
        after = f"holds a run that was stopped after step {distjudge.step_of(left[0])}"
        raise InputError(f"out: {out}: {after}: --resume goes on; or name another --out, or remove it")


def outline(config: RunConfig, labels: Sequence[str]) -> Judge:
    """The judge of a run without its weights; with card_gib it is planned for a card."""
    return distjudge.judge_of(config, labels, weights=False, device="cuda" if config.card_gib else None)


def worth(people: float | None, low: float | None, high: float | None) -> str:
    """evaluate()'s "31.5 [17.2, 152.0]"; inf: votes cannot tell the judge from the truth; "–": unknown."""
    return "–" if low is None else f"{people or math.inf:.1f} [{low:.1f}, {high or math.inf:.1f}]"


def outcome(metrics: dict[str, float | None], out: str) -> str:
    """What a run came to: people and KL beside its rivals, what was written, and the next command."""
    beside = f"{metrics['kl_marginal']:.3f} of the mean distribution"
    beside += f", {floor:.3f} of the truth" if (floor := metrics["kl_noise_floor"]) else ""
    people = worth(*(metrics[name] for name in ("people", "people_low", "people_high")))
    kl, accuracy = f"{metrics['kl']:.3f} nats (beside it: {beside})", f"accuracy {metrics['accuracy']:.3f}"
    mean = "–" if metrics["people_low"] is None else f"{metrics['people_marginal'] or math.inf:.1f}"
    few = "no nearer to the votes than that mean: more items or --epochs may help, or another rate\n"
    few *= metrics["kl"] >= metrics["kl_marginal"]
    return f"""
worth {people} people (the mean of the training votes, whatever the item: {mean})
KL to the votes of {metrics["items"]} test items: {kl}; {accuracy}
{few}wrote {out}: the judge, predictions.jsonl, metrics.json, log.jsonl
next: python recipes/judge.py --run {shlex.quote(out)} --items new.csv --out judged.csv"""


def check_mass(judge: Judge, items: Sequence[Item], answer: float, least: float = 0.0) -> str:
    """Says how much of the untrained model's probability the labels hold on the first 16 items.

    Under a half the model has something else to say, and a warning says what training does about that. It is
    the answer term (answer: its weight) that teaches it to say a label. Without it, training moves the labels
    only against each other: InputError under `least`, a share of 1.
    """
    mass = judge.score([item.prompt for item in items[:16]])[1]
    low, mean, high = mass.min(), mass.mean(), mass.max()
    said = f"{mean:.2%} of the model's probability on the first {len(mass)} items ({low:.2%} to {high:.2%})"
    if mean < least and not answer:
        remedy = "let the prompt ask for the label alone, or use --answer 1, which teaches that"
        remedy += ", or --min_mass 0"
        raise InputError(f"label mass: the labels hold {said}, less than min_mass {least:g}: {remedy}")
    if mean < 0.5 and FIRST:
        then = "training teaches it to answer with one" if answer else "so it will stay without --answer 1"
        log.warning("label mass: under a half, it would rather say something else than a label; %s", then)
    return said


# --- what a run would do ------------------------------------------------------------------------------------
def plan_lines(judge: Judge, items: list[Item], test: list[Item], config: RunConfig) -> dict[str, str]:
    """What run() prints before the first step, a text a name: settings with their reasons, labels, sizes.

    Goes through the first epoch as train() will, pass for pass; of several processes (torchrun) for the share
    of the first. Counts are exact but for Unsloth's packs, which a dry run plans like the others; memory is
    an estimate.
    """
    model, on, adapters = judge.model, judge.device.type, hasattr(judge.model, "peft_config")
    encoded = distjudge.training_rows(judge, items)[0]
    turned = f" (and {len(encoded) - len(items):,} turned round)" if len(encoded) > len(items) else ""
    passes, largest = first_epoch(judge, encoded, config)
    steps = math.ceil(math.ceil(len(encoded) / config.batch_size) * config.epochs)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(weight_sizes(model).values()) - trained * adapters
    planned = f", none of them loaded, planned for {'CUDA' if on == 'cuda' else 'a CPU'}"
    held = str(model.get_input_embeddings().weight.dtype).removeprefix("torch.")
    why = {"bfloat16": "the card has it, or is assumed to", "float16": "the card has no bfloat16"}
    why["float32"] = "on a CPU" if on == "cpu" else "float16 is too narrow" if adapters else "all are trained"
    four_bit = "4-bit (NF4, quantized twice); embeddings, output layer and norms "
    halved = ", products in bfloat16 (the processor is made for it; --no_bf16: float32)"
    halved *= any(w.dtype == torch.bfloat16 for w in model.parameters()) and held == "float32"
    targets = sorted(model.peft_config["default"].target_modules) if adapters else []
    lora = f"LoRA of rank {config.lora_rank} on {', '.join(targets)}" if adapters else "all"
    attention = model.config.get_text_config()._attn_implementation
    attention = {distjudge.BLOCKS: "SDPA in blocks"}.get(attention, attention)
    return {
        "backend": f"{judge.backend} ({model.backend_reason})",
        "model": f"{config.model}: {total / 1e9:.3g} billion weights" + planned * hasattr(model, "meant_for"),
        "weights": four_bit * getattr(model, "is_loaded_in_4bit", False) + f"{held} ({why[held]}){halved}",
        "trained": f"{trained:,} weights in float32: {lora}",
        "optimizer": ("8-bit AdamW" if distjudge.optimizer_is_8bit(judge) else "AdamW")
        + f", learning rate {config.learning_rate:g}, {config.schedule}",
        "passes": f"{'packs' if judge.packs else 'padded rows'} of at most {judge.pack_tokens:,} tokens "
        f"({'asked for' if config.pack_tokens else 'the default on ' + on}), attention by "
        + ("Unsloth" if getattr(model, "two_levels", False) else attention)
        + ", layers recomputed in the backward pass" * config.gradient_checkpointing,
        "labels": reading(judge.tokens, judge.tokenizer).removeprefix("labels are "),
        "items": f"{len(items):,} to train on{turned}, {len(test):,} to test on, prompts of up to "
        f"{max(map(len, encoded)):,} tokens",
        "tokens": f"{sum(map(len, encoded)):,} an epoch, {sum(passes):,} after packing, in {len(passes):,} "
        f"passes of up to {max(passes):,}",
        "memory": memory_text(judge, estimate_memory(judge, config, largest), config.card_gib),
        "steps": f"{steps:,}, of {config.batch_size} items each, in {config.epochs:g} epochs",
    } | ({"fits": fit_text(judge, items, config)} if config.card_gib else {})


def reading(tokens: distjudge.LabelTokens, tokenizer: Any) -> str:
    """How the labels are read, and each with its tokens, in a line."""
    how = "as whole words, closed by the end of the turn (some begin with the same token)"
    how = how if tokens.whole else "by the first token of the answer"
    piece = lambda token: repr(tokenizer.decode([token]) or tokenizer.convert_ids_to_tokens(token))  # noqa: E731
    spelled: list[list[str]] = [[] for _ in tokens.labels]
    for owner, ids in tokens.sequences:
        spelled[owner].append(" ".join(map(piece, ids)))
    pairs = zip(map(distjudge.short, tokens.labels), map(" or ".join, spelled), strict=True)
    return f"labels are read {how}: {', '.join(map(': '.join, pairs))}"


def first_epoch(judge: Judge, encoded: Sequence[list[int]], config: Config) -> tuple[list[int], dict]:
    """The tokens of each forward pass of the first epoch, padding included, and the largest pass's batch."""
    order, processes = distjudge.epoch_order(encoded, config, 0), int(os.environ.get("WORLD_SIZE", 1))
    passes, largest = [], {}
    for start in range(0, len(order), config.batch_size):
        chosen = [encoded[i] for i in order[start : start + config.batch_size]]
        chosen = chosen[: max(1, len(chosen) // processes)]
        for members in judge.plan(chosen):
            batch = judge.batch([chosen[i] for i in members], "cpu")
            passes.append(batch["input_ids"].numel())
            if not largest or passes[-1] > largest["input_ids"].numel():
                largest = batch
    return passes, largest


def memory_text(judge: Judge, memory: dict[str, float], card_gib: float) -> str:
    """The estimate beside the memory there is, or is planned for; warns where that is less."""
    needed, there, place = sum(memory.values()) / 2**30, card_gib, "--card_gib"
    if not there and judge.device.type == "cpu":
        import psutil

        there, place = psutil.virtual_memory().total / 2**30, "main memory"
    elif not there and torch.cuda.is_available():
        card = torch.cuda.get_device_properties(judge.device)
        there, place = card.total_memory / 2**30, card.name
    if there and needed > there and not card_gib:
        log.warning("memory: more than there is; --dry_run --card_gib N says what would fit on N GiB")
    compared = f"of {there:.1f} ({place})" if there else "no card here to compare with (--card_gib names one)"
    parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in memory.items())
    return f"about {needed:.1f} GiB by estimate, {compared}: {parts}"


def fit_text(judge: Judge, items: Sequence[Item], config: RunConfig) -> str:
    """The first settings estimated to fit into card_gib: as given, then what is slower, then 4 bits."""
    judges, encoded = {config.four_bit: judge}, distjudge.training_rows(judge, items)[0]
    if config.lora_rank and not config.four_bit:
        judges[True] = outline(dataclasses.replace(config, four_bit=True), judge.labels)
    own, recomputing, least = judge.pack_tokens, sorted({config.gradient_checkpointing, True}), math.inf
    sizes = [own, *(size for size in (4096, 2048, 1024, 512, 1) if size < own)]
    for four_bit, size, recomputed in itertools.product(judges, sizes, recomputing):
        flags = [f"--pack_tokens {size}"] * (size != own)
        flags += ["--gradient_checkpointing"] * (recomputed != config.gradient_checkpointing)
        flags += ["--four_bit"] * (four_bit != config.four_bit)
        changed = dataclasses.replace(config, gradient_checkpointing=recomputed)
        judges[four_bit].pack_tokens = size
        largest = first_epoch(judges[four_bit], encoded, config)[1]
        needed = sum(estimate_memory(judges[four_bit], changed, largest).values()) / 2**30
        if needed <= config.card_gib:
            return f"{' '.join(flags) or 'as it is'}: about {needed:.1f} GiB"
        least = min(least, needed)
    return f"nothing does: it takes at least {least:.1f} GiB, with the smallest settings"


# --- memory -------------------------------------------------------------------------------------------------
def weight_sizes(model: Any) -> dict[int, int]:
    """The number of weights of each parameter by its id; 4-bit matrices count as what they stand for."""
    sizes = {id(p): p.numel() for p in model.parameters()}
    linear = (m for m in model.modules() if isinstance(m, torch.nn.Linear))
    return sizes | {id(m.weight): m.in_features * m.out_features for m in linear}


def estimate_memory(judge: Judge, config: Config, batch: dict[str, torch.Tensor]) -> dict[str, float]:
    """An estimate of the most memory that training takes, in bytes by what takes it.

    batch: its largest pass, see Judge.batch(). For decoders of Llama's kind; b: bytes of a number computed
    with (2 in 16 bits, 4 in float32), L: tokens in the pass.

      weights      as held; 4-bit ones, quantized twice, have a byte for 64 and a float32 for 256 of those
      training     trained weights, gradients and AdamW's moments, in float32 or, the moments, 8 bits; the
                   teacher's weights; where all are trained in 16 bits, autocast's copies
      activations  of all layers or, recomputed, of one beside every layer's input: b L (inputs of the
                   matrices, 3 widths of the MLP, queries and outputs of attention, ranks of the adapters)
                   + 4 L (inputs of the norms) + the mask, keys and values of each block of queries; and the
                   gradients of one MLP
      label rows   the answers' hidden states, and a slice of the output layer with its logits, in float32
      the rest     the largest matrix in b bytes, as 4-bit ones are unpacked, and 1 GiB for CUDA: a guess

    Unsloth keeps less. Weights are exact, and layers keep what autograd saves on a CPU; an H200 held
    0.8 to 1.9 GiB less.
    """
    model, half, sizes = judge.model, distjudge.autocast_type(judge) is not None, weight_sizes(judge.model)
    shape, adapters, b = model.config.get_text_config(), hasattr(model, "peft_config"), 2 if half else 4
    linear = [m for m in model.get_decoder().modules() if isinstance(m, torch.nn.Linear)]
    own = [m for m in linear if m.weight.requires_grad is not adapters]  # the model's, not the adapters'
    packed = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Linear)}
    packed -= {id(model.get_output_embeddings().weight)}
    packed = packed if getattr(model, "is_loaded_in_4bit", False) else set()
    nf4 = 1 / 2 + (1 + 4 / 256) / 64  # bytes
    held = {id(p): nf4 * sizes[id(p)] if id(p) in packed else p.nbytes for p in model.parameters()}
    weights = sum(held[id(p)] for p in model.parameters() if not p.requires_grad)
    moments, teacher = 2 if distjudge.optimizer_is_8bit(judge) else 8, 4 * (config.teacher > 0)
    training = sum(p.numel() for p in model.parameters() if p.requires_grad) * (8 + moments + teacher)
    training += 2 * sum(sizes[id(m.weight)] for m in own) * (half and not adapters)

    hidden, layers, heads = shape.hidden_size, shape.num_hidden_layers, shape.num_attention_heads
    mlp = getattr(shape, "intermediate_size", None) or 4 * hidden
    kv_heads = getattr(shape, "num_key_value_heads", None) or heads
    width = heads * (getattr(shape, "head_dim", None) or hidden // heads)
    inputs = sum(m.in_features for m in own) / layers if half else 2 * hidden + width + mlp
    ranks = norms = 0
    for name, p in model.named_parameters():
        ranks += p.shape[0] if "lora_A" in name else 0
        if name.endswith("norm.weight"):  # those of queries and keys are of one head's width
            norms += p.numel() * {"q_norm": heads, "k_norm": kv_heads}.get(name.split(".")[-2], 1)
    rows, length = batch["input_ids"].shape
    tokens, keys, mask = rows * length, rows * length, rows * length**2
    if "ends" in batch:
        size, ends = distjudge.block_length(judge.device), batch["ends"][0]
        keys = mask = 0
        for start in range(0, length, size):
            queries = min(size, length - start)
            seen = queries + int((ends[:start] > start).sum())  # itself, and what before it reaches into it
            keys, mask = keys + seen, mask + queries * seen
    layer = b * (tokens * (inputs + 3 * mlp + 2 * width + ranks / layers) + 2 * width * keys + mask)
    layer += 4 * tokens * norms / layers
    kept = layer + layers * b * tokens * hidden if config.gradient_checkpointing else layers * layer
    answers, part, logits = len(batch["answer_at"]), distjudge.SLICE, distjudge.SLICE_LOGITS
    return {
        "weights": weights,
        "training": training,
        "activations": kept + 3 * b * tokens * mlp,
        "label rows": 4 * ((3 * answers + part) * hidden + 3 * min(logits, answers * part)),
        "the rest": b * max((sizes[id(m.weight)] for m in own), default=0) + 2**30,
    }
