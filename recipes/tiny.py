"""Train a judge from nothing on a laptop CPU, four ways, and compare them.

    python recipes/tiny.py                                    # the embedded sample, a minute or two on two cores
    python recipes/tiny.py --seeds 3 --out runs/tiny3         # three seeds
    python recipes/tiny.py --train votes.jsonl --test more.jsonl --epochs 8    # your own votes

Builds a small Qwen2 model (all weights random, all trained) and a tokenizer from the training prompts, then trains it
on the same items, for the same number of steps, as a single-point judge (cross-entropy with the majority label), as a
distributional judge without the adversary, with the paper's full method, and with a teacher
(--preset teacher of other recipes; its learning rate is constant and its loss KL, whatever the flags say). Writes into --out:

    table.json, table.md    a row a method and seed: KL to the votes, KL to the truth where it is known, accuracy
    METHOD-SEED/            a run folder each: judge, predictions, metrics, log
    plots/                  figures of the full method with the first seed
"""
import dataclasses
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import distjudge
from distjudge import (
    Config,
    Item,
    evaluate,
    labels_of,
    load_data,
    load_judge,
    marginal_distribution,
    save_judge,
    train,
    write_json,
    write_results,
)
from plots import figures

SAMPLE = str(Path(__file__).resolve().parents[1] / "data" / "panel.jsonl")
TEMPLATE = ("{% for m in messages %}{{ ('<|user|>' if m.role == 'user' else '<|judge|>') + m.content + '<|end|>' }}{% endfor %}"
            "{% if add_generation_prompt %}<|judge|>{% endif %}")
METHODS = {  # what the paper compares: single-point alignment, its own method without and with the adversary; and the teacher
    "single_point": {"alpha": 0.0, "eps": 0.0},
    "no_adversary": {"eps": 0.0},
    "full": {},
    "teacher": distjudge.PRESETS["teacher"],
}


@dataclasses.dataclass
class TinyConfig(Config):
    train: tuple[str, ...] = (SAMPLE,)
    """Training items: one or more .jsonl or .jsonl.gz files. Default: the embedded sample."""
    out: str = "runs/tiny"
    """The folder for the table, the figures and a run folder for each method and seed."""
    model: str = ""
    """Model folder to start from. Default: a small Qwen2 model with random weights, made on the spot."""
    lora_rank: int = 0
    """Rank of the LoRA adapters; 0 trains all weights."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW: a model that starts from nothing needs a larger one than the paper's 5e-5."""
    epochs: float = 8.0
    """Passes over the training items."""
    batch_size: int = 16
    """Items an optimizer step."""
    weight_decay: float = 0.1
    """Weight decay of AdamW."""
    seeds: int = 1
    """How many seeds, from `seed` on; each gives the model other first weights and the items another order."""
    hidden: int = 64
    """Width of the model, a multiple of 16."""
    layers: int = 2
    """Layers of the model."""
    vocabulary: int = 2000
    """Tokens of the tokenizer, at most."""

    def check(self) -> None:
        super().check()
        if self.export != "none" or self.push_to_hub:
            raise distjudge.InputError("export, push_to_hub: several judges are trained here; recipes/export.py --run FOLDER takes one")
        if self.dry_run:
            raise distjudge.InputError("dry_run: there is none of this command: the recipes of one backbone have it")


def build_tokenizer(texts: list[str], size: int):
    """Qwen2's kind of tokenizer (byte-level BPE, single digits) with a vocabulary of our own and a plain chat template."""
    from transformers import Qwen2Tokenizer

    untrained = Qwen2Tokenizer(vocab={"<|endoftext|>": 0}, merges=[])
    tokenizer = untrained.train_new_from_iterator(texts, size, new_special_tokens=["<|user|>", "<|judge|>", "<|end|>"], show_progress=False)
    tokenizer.eos_token = "<|end|>"
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def build_base(folder: Path, items: list[Item], config: TinyConfig, seed: int) -> str:
    """Saves a small random Qwen2 model and its tokenizer, as a model hub would serve them."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = build_tokenizer([item.prompt for item in items] + labels_of(items), config.vocabulary)
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=config.hidden, intermediate_size=3 * config.hidden, num_hidden_layers=config.layers,
        num_attention_heads=config.hidden // 16, num_key_value_heads=config.hidden // 16, max_position_embeddings=4096,
        tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def reference_rows(train_items: list[Item], test: list[Item], seed: int, config: TinyConfig) -> list[dict]:
    """What needs no judge: the training set's marginal distribution, and the truth itself against the votes."""
    marginal = evaluate(marginal_distribution(train_items).expand(len(test), -1), test, train_items=train_items, ordered=config.ordered)
    rows = [row("marginal", seed, marginal)]
    truth = distjudge.truths_of(test)
    if truth is not None:
        rows.append(row("noise_floor", seed, evaluate(truth, test, floor_draws=0)))
    elif marginal["kl_noise_floor"] is not None:
        rows.append({"method": "noise_floor", "seed": seed, "kl_votes": marginal["kl_noise_floor"], "kl_truth": None, "accuracy": None})
    return rows


def row(method: str, seed: int, metrics: dict) -> dict:
    return {"method": method, "seed": seed, "kl_votes": metrics["kl"], "kl_truth": metrics["kl_truth"], "accuracy": metrics["accuracy"]}


def table_lines(rows: list[dict]) -> list[str]:
    """A Markdown table: mean over seeds and, with several, their standard deviation."""
    lines = ["| method | KL to votes (nats) | KL to truth (nats) | accuracy |", "| --- | --- | --- | --- |"]
    for method in dict.fromkeys(r["method"] for r in rows):
        cells = []
        for column in ("kl_votes", "kl_truth", "accuracy"):
            values = torch.tensor([r[column] for r in rows if r["method"] == method and r[column] is not None], dtype=torch.float64)
            spread = f" ± {values.std():.3f}" if len(values) > 1 and values.std() > 0 else ""
            cells.append(f"{values.mean():.3f}{spread}" if len(values) else "–")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines


def compare(config: TinyConfig, items: list[Item], test: list[Item], out: Path, rows: list[dict]) -> tuple[list[Item], list[Item]]:
    """Trains and measures every method with every seed; adds to rows, and returns the items that were short enough."""
    for seed in range(config.seed, config.seed + config.seeds):
        base = config.model or build_base(out / f"base-{seed}", items, config, seed)
        for method, settings in {"untrained": {}, **METHODS}.items():
            run = dataclasses.replace(config, **settings, model=base, seed=seed, out=str(out / f"{method}-{seed}"))
            judge = load_judge(base, labels_of(items), spellings=distjudge.parse_spellings(config.spellings), lora_rank=run.lora_rank,
                               lora_alpha=run.lora_alpha, four_bit=run.four_bit, max_length=run.max_length, top_k=run.top_k, seed=seed)
            if method == "untrained":
                if not rows:
                    print(judge.tokens.describe(judge.tokenizer))
                    items = distjudge.keep_short(judge, items, run.overlong, "training")
                    test = distjudge.keep_short(judge, test, run.overlong, "test")
                    if config.model:
                        print("label mass: " + distjudge.check_mass(judge, items, config.min_mass))
                rows += reference_rows(items, test, seed, config)
            else:
                print(f"\n{method}, seed {seed}: alpha {run.alpha}, eps {run.eps}, {len(items)} items, {run.epochs:g} epochs")
                train(judge, items, run, eval_items=test)
                save_judge(judge, run.out)
            rows.append(row(method, seed, write_results(judge, test, items, run, run.out)))
    return items, test


def main(config: TinyConfig) -> None:
    config.check()
    if config.preset or config.prior != "none":
        raise distjudge.InputError("preset, prior: each row here has its own; recipes of one backbone take them")
    for name, least in (("seeds", 1), ("layers", 1), ("hidden", 16), ("vocabulary", 300)):
        if getattr(config, name) < least:
            raise distjudge.InputError(f"{name}: must be {least} or more, not {getattr(config, name)}")
    if config.hidden % 16:
        raise distjudge.InputError(f"hidden: must be a multiple of 16, not {config.hidden}")
    items, test = load_data(config)
    import transformers

    transformers.utils.logging.disable_progress_bar()  # of loading weights; training and judging keep theirs
    out, rows, fresh = Path(config.out), [], not Path(config.out).exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        items, test = compare(config, items, test, out, rows)
    except distjudge.InputError:
        if fresh and not rows:  # nothing was trained yet
            shutil.rmtree(out)
        raise
    order = ["marginal", "untrained", *METHODS, "noise_floor"]
    rows.sort(key=lambda r: (order.index(r["method"]), r["seed"]))
    write_json(out / "table.json", rows)
    lines = table_lines(rows)
    distjudge.write_lines(out / "table.md", lines)
    shutil.rmtree(out / "plots", ignore_errors=True)
    drawn = figures.draw_all(out / f"full-{config.seed}", out / "plots")
    print(f"\n{len(items)} training items, {len(test)} test items\n" + "\n".join(lines))
    print(f"\nwrote {out / 'table.json'} and " + ", ".join(str(path) for path in drawn))


if __name__ == "__main__":
    distjudge.cli(main, TinyConfig)
