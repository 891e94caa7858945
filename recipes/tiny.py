"""Train a judge from nothing on a laptop CPU, four ways, and compare them.

    python recipes/tiny.py                                    # the embedded sample, a minute on two cores
    python recipes/tiny.py --seeds 3 --out runs/tiny3         # three seeds
    python recipes/tiny.py --train votes.jsonl --test more.jsonl --epochs 8    # your own votes

Makes a small Qwen2 model with random weights, and a tokenizer from the training prompts. Trains all weights
on the same items, for the same number of steps, by each of METHODS. Writes into --out:

    table.json, table.md    a row a method and seed, and a row a method: how many people the judge is worth,
                            KL to the votes, KL to the truth if known (in nats), accuracy
    METHOD-SEED/            a run folder each: judge, predictions, metrics, log
    plots/                  the four judges of the first seed in one figure; more of the full method
"""

import dataclasses
import os
import shlex
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "recipes")]

import distjudge
from distjudge import Config, InputError, Item, Judge, evaluate, labels_of

import common
import pandas as pd
import torch

from plots import figures

SAMPLE = str(ROOT / "data" / "panel.jsonl")  # 1,200 items to train on, 300 to test on
TEMPLATE = (
    "{% for m in messages %}{{ ('<|user|>' if m.role == 'user' else '<|judge|>') + m.content + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}<|judge|>{% endif %}"
)
METHODS = {  # what the progress says of each, and its settings
    "single_point": ("the majority label alone", {"alpha": 0.0, "eps": 0.0}),
    "no_adversary": ("the votes' shares, without the adversary", {"eps": 0.0}),
    "full": ("the paper's method", {}),
    "teacher": ("with a teacher", distjudge.PRESETS["teacher"]),  # its learning rate is always constant
}
ORDER = ["marginal", "untrained", *METHODS, "noise_floor"]
COLUMNS = {"people": "worth, people", "kl_votes": "KL to votes", "kl_truth": "KL to truth"}
COLUMNS["accuracy"] = "accuracy"


@dataclasses.dataclass
class TinyConfig(Config):
    train: tuple[str, ...] = ()
    """Training items: .jsonl or .jsonl.gz files. Default: the embedded sample, data/panel.jsonl."""
    out: str = "runs/tiny"
    """The folder for the table, the figures and a run folder for each method and seed."""
    model: str = ""
    """Model folder to start from. Default: a small Qwen2 model with random weights, made on the spot."""
    lora_rank: int = 0
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW. A model that starts from nothing needs more than the paper's 5e-5."""
    answer: float = 0.1
    """Weight of -log m, where m is the probability of a label at all. The others take 1; a model that starts
    from nothing would spend its eight epochs on that."""
    epochs: float = 8.0
    batch_size: int = 16
    weight_decay: float = 0.1
    seeds: int = 1
    """How many seeds, from `seed` on; each brings other first weights and another order of the items."""
    hidden: int = 64
    """Width of the model, a multiple of 16."""
    layers: int = 2
    """Layers of the model."""
    vocabulary: int = 2000
    """Tokens of the tokenizer, at most."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.train = self.train or (SAMPLE,)

    def check(self) -> None:
        super().check()
        for name, least in (("seeds", 1), ("layers", 1), ("hidden", 16), ("vocabulary", 300)):
            if getattr(self, name) < least:
                raise InputError(f"{name}: must be {least} or more, not {getattr(self, name)}")
        if self.hidden % 16:
            raise InputError(f"hidden: must be a multiple of 16, not {self.hidden}")


def build_tokenizer(texts: list[str], size: int):
    """Qwen2's kind of tokenizer (byte-level BPE, single digits) with our own vocabulary and template."""
    from transformers import Qwen2Tokenizer

    empty = Qwen2Tokenizer(vocab={"<|endoftext|>": 0}, merges=[])
    special = ["<|user|>", "<|judge|>", "<|end|>"]
    tokenizer = empty.train_new_from_iterator(texts, size, new_special_tokens=special, show_progress=False)
    tokenizer.eos_token = "<|end|>"
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def build_base(folder: Path, items: list[Item], config: TinyConfig, seed: int) -> str:
    """Saves a small random Qwen2 model and its tokenizer, as a model hub would serve them."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = build_tokenizer([item.prompt for item in items] + labels_of(items), config.vocabulary)
    torch.manual_seed(seed)
    sizes = {"hidden_size": config.hidden, "intermediate_size": 3 * config.hidden}
    sizes |= {"vocab_size": len(tokenizer), "num_hidden_layers": config.layers}
    sizes |= dict.fromkeys(("num_attention_heads", "num_key_value_heads"), config.hidden // 16)
    more = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    shape = Qwen2Config(**sizes, **more, max_position_embeddings=4096, tie_word_embeddings=True)
    Qwen2ForCausalLM(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def load_base(base: str, labels: list[str], config: TinyConfig) -> Judge:
    """The model in `base` as a judge that is still to be trained."""
    import transformers

    transformers.utils.logging.disable_progress_bar()  # of loading weights; training and judging keep theirs
    return distjudge.judge_of(dataclasses.replace(config, model=base), labels)


def row(method: str, seed: int, metrics: dict) -> dict:
    names = ("people", "people_low", "people_high", "kl_truth", "accuracy")
    known = {name: metrics.get(name) for name in names}
    return {"method": method, "seed": seed, "kl_votes": metrics["kl"], **known}


def reference_rows(train_items: list[Item], test: list[Item], seed: int) -> list[dict]:
    """What needs no judge: the mean of the training votes for every item, and the truth against the votes."""
    mean = distjudge.shares_of(train_items).mean(0).expand(len(test), -1)
    marginal = evaluate(mean, test, train_items=train_items)
    floor = {"kl": marginal["kl_noise_floor"]}
    if (truth := distjudge.truths_of(test)) is not None:
        floor = {name: evaluate(truth, test, draws=0)[name] for name in ("kl", "kl_truth", "accuracy")}
    rows = [row("marginal", seed, marginal), row("noise_floor", seed, floor)]
    return [r for r in rows if r["kl_votes"] is not None]


def cells_of(own: list[dict]) -> list[str]:
    """A method's cells by COLUMNS: of one seed, people with an interval; or means ± deviations."""
    if len(own) == 1:
        (only,) = own
        numbers = ["–" if only[name] is None else f"{max(0.0, only[name]):.3f}" for name in COLUMNS]
        return [common.worth(only["people"], only["people_low"], only["people_high"]), *numbers[1:]]
    table = pd.DataFrame(own)[[*COLUMNS]].astype(float)
    pairs = zip(table.mean(), table.std(), table.notna().all(), (1, 3, 3, 3), strict=True)
    return [f"{max(0, mean):.{n}f} ± {std:.{n}f}" if known else "–" for mean, std, known, n in pairs]


def table_lines(cells: dict[str, list[str]]) -> list[str]:
    """A Markdown table in aligned columns."""
    lines = [["method", *COLUMNS.values()], *([name, *own] for name, own in cells.items())]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    pad = lambda line: [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]  # noqa: E731
    return [f"| {' | '.join(pad(line))} |" for line in lines]


def meaning(cells: dict[str, list[str]]) -> str:
    """What the table means, in two sentences, as far as the judges' worth is known."""
    said = "A judge is worth n people if it is as near to what everybody thinks as a panel of n is"
    said += " [95 % interval]." if "[" in cells["full"][0] else "; means ± standard deviations over seeds."
    if "–" not in (full := cells["full"][0], single := cells["single_point"][0]):
        said += f" Trained on all votes the paper's method is worth {full}, on the majority label {single}."
    return said


def compare(config: TinyConfig, items: list[Item], test: list[Item], rows: list[dict]) -> None:
    """Trains and measures every method with every seed. Adds to rows; takes overlong items out of lists."""
    out = Path(config.out)
    for seed in range(config.seed, config.seed + config.seeds):
        base = config.model or build_base(out / f"base-{seed}", items, config, seed)
        for k, (method, (said, settings)) in enumerate({"untrained": ("", {}), **METHODS}.items()):
            own = {"model": base, "seed": seed, "out": str(out / f"{method}-{seed}")}
            run = dataclasses.replace(config, **settings, **own)
            judge = load_base(base, labels_of(items), run)
            if not rows:
                print(common.reading(judge.tokens, judge.tokenizer))
                items[:] = distjudge.keep_short(judge, items, run.overlong, "training")
                test[:] = distjudge.keep_short(judge, test, run.overlong, "test")
                if config.model:
                    print("label mass: " + common.check_mass(judge, items, config.answer))
            if method == "untrained":
                rows += reference_rows(items, test, seed)
            else:
                print(f"\n{k} of {len(METHODS)}: {said} ({method}, seed {seed})", flush=True)
                distjudge.train(judge, items, run, eval_items=test)
                distjudge.save_judge(judge, run.out)
            rows.append(row(method, seed, distjudge.write_results(judge, test, items, run, run.out)))


def main(config: TinyConfig) -> None:
    config.check()
    if config.teacher:
        raise InputError("teacher: each row here has its own; the recipes of one backbone take it")
    distjudge.check_out(config.out, "table.json", f"base-{config.seed}", f"untrained-{config.seed}")
    items, test = distjudge.load_data(config)
    if not config.model and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # a model this small is faster on one, several times so on a busy machine
    out, rows, fresh = Path(config.out), [], not Path(config.out).exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        with distjudge.locked(out):
            compare(config, items, test, rows)
    except InputError:
        if fresh and not rows:  # nothing was trained yet
            shutil.rmtree(out)
        raise
    rows.sort(key=lambda r: (ORDER.index(r["method"]), r["seed"]))
    cells = {name: cells_of(own) for name in ORDER if (own := [r for r in rows if r["method"] == name])}
    lines = table_lines(cells)
    distjudge.write_json(out / "table.json", rows)
    distjudge.write_lines(out / "table.md", lines)
    runs = {method: out / f"{method}-{config.seed}" for method in METHODS}
    drawn = [figures.compare(runs, out / "plots"), *figures.draw_all(runs["full"], out / "plots")]
    print(f"\n{len(items):,} items to train on, {len(test):,} to test on; KL in nats\n\n" + "\n".join(lines))
    print(f"\n{meaning(cells)}\n\nwrote {out / 'table.md'}, a folder for each judge, and {drawn[0]}")
    run, judged = map(shlex.quote, (str(runs["full"]), os.path.relpath((config.test or config.train)[0])))
    print(f"next: python recipes/judge.py --run {run} --items {judged} --out judged.jsonl")


if __name__ == "__main__":
    distjudge.cli(main, TinyConfig)
