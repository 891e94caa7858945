"""The paper's studies on any backbone, and ours, each as one command with intervals and rivals.

    python recipes/study.py main                                         # the embedded sample, a small model from nothing
    python recipes/study.py main --train a.jsonl --test b.jsonl --model Qwen/Qwen2.5-0.5B-Instruct --lora_rank 16 --learning_rate 5e-5
    python recipes/study.py methods --votes 1 3 5 20 --seeds 5           # our changes to the method, by votes an item

    main        untrained, single-point and distributional judge, beside the marginal, label smoothing and temperature scaling
    ablation    the full method without adversary, without KL, without cross-entropy
    sweep       KL over alpha, one line an eps
    robustness  KL when the test targets are moved by delta, at random inside the simplex
    budget      one number of annotations spent as N x 1, N/3 x 3 and N/5 x 5
    length      each method trained for several numbers of epochs, and for the number that other items' votes favour
    ood         trained on --train, tested on --test; items in both are refused, or dropped from training on request
    cost        seconds an epoch and items a second
    methods     a teacher, the judge's own earlier predictions, shrunken votes, other adversaries, the ranked probability score and
                calibration, against the paper's method
    adversary   how far the paper's five steps fall short of the exact worst case, with a proof of it

Writes STUDY.csv (tidy: a row for each number), STUDY.md and STUDY.svg/.png into --out, and a folder for each trained judge into
--out/cells, named by a hash of everything that decides its result. A cell that is there is not trained again, so a study
can be stopped, started again and shared between commands. Intervals are 95 % bootstrap intervals over groups of test items
and, with several seeds, over seeds (see distjudge.bootstrap); a difference is starred where its interval leaves out 0.
"""

import csv
import dataclasses
import hashlib
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any, Literal

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import itertools

import tiny
import torch
import tyro

import distjudge
from distjudge import InputError, Item, bootstrap, counts_of, kl_loss, labels_of, majority, marginal_distribution, noise_floor
from plots import study as figures

PAPER = {"alpha": 0.8, "eps": 0.25}
SINGLE = {"alpha": 0.0, "eps": 0.0}
METHODS: dict[
    str, dict[str, Any]
] = {  # settings of Config; "votes_as" changes the training votes, "calibrate" holds items out for a temperature
    "untrained": {"untrained": True},
    "single-point": SINGLE,
    "label smoothing": {"alpha": 1.0, "eps": 0.0, "votes_as": "smoothed"},
    "temperature": SINGLE | {"calibrate": True},
    "distribution": PAPER,
    "without adversary": PAPER | {"eps": 0.0},
    "without KL": SINGLE,
    "without CE": PAPER | {"alpha": 1.0},
    "KL alone": {"alpha": 1.0, "eps": 0.0},
    "KL averaged": {"alpha": 1.0, "eps": 0.0, "average": 0.3},
    "distribution averaged": PAPER | {"average": 0.3},
    "KL, constant rate, averaged": {"alpha": 1.0, "eps": 0.0, "average": 0.5, "schedule": "constant"},
    "distribution, constant rate, averaged": PAPER | {"average": 0.5, "schedule": "constant"},
    "exact adversary": PAPER | {"adversary": "exact"},
    "exact adversary, TV": PAPER | {"adversary": "exact", "ball": "tv", "eps": 0.15},
    "exact adversary, KL ball": PAPER | {"adversary": "exact", "ball": "kl", "eps": 0.1},
    "annotators' radius": PAPER | {"radius": "annotators"},
    "RPS": PAPER | {"eps": 0.0, "alpha": 1.0, "loss": "rps"},
    "KL + RPS": PAPER | {"loss": "mixed"},
    "EB marginal": {"alpha": 1.0, "eps": 0.0, "prior": "marginal"},
    "EB marginal, k = 1": {"alpha": 1.0, "eps": 0.0, "prior": "marginal", "concentration": 1.0},
    "EB marginal, k = 2": {"alpha": 1.0, "eps": 0.0, "prior": "marginal", "concentration": 2.0},
    "EB group": {"alpha": 1.0, "eps": 0.0, "prior": "group"},
    "EB model": {"alpha": 1.0, "eps": 0.0, "prior": "model"},
    "EB model averaged": {"alpha": 1.0, "eps": 0.0, "prior": "model", "average": 0.3},
    "EB model, constant rate, averaged": {"alpha": 1.0, "eps": 0.0, "prior": "model", "average": 0.5, "schedule": "constant"},
    "EB model + adversary": {"alpha": 1.0, "eps": 0.25, "prior": "model"},
    "few": distjudge.PRESETS["few"],
    "teacher": distjudge.PRESETS["teacher"],
    "teacher + adversary": distjudge.PRESETS["teacher"] | PAPER | {"alpha": 1.0},
    "EB cross-fitted": {"alpha": 1.0, "eps": 0.0, "prior": "crossfit"},
    "EB + adversary": {"alpha": 1.0, "eps": 0.25, "prior": "marginal", "radius": "annotators"},
    "EB + exact adversary": {"alpha": 1.0, "eps": 0.25, "prior": "marginal", "radius": "annotators", "adversary": "exact"},
    "KL alone + temperature": {"alpha": 1.0, "eps": 0.0, "calibrate": True},
    "KL + RPS alone": {"alpha": 1.0, "eps": 0.0, "loss": "mixed"},
    "EB cross-fitted + RPS": {"alpha": 1.0, "eps": 0.0, "prior": "crossfit", "loss": "mixed"},
    "EB marginal, k = 0.3": {"alpha": 1.0, "eps": 0.0, "prior": "marginal", "concentration": 0.3},
    "EB + paper": PAPER | {"prior": "marginal"},
}
ROWS = {  # which methods a study compares by default; the first is what the others are compared with
    "main": ("single-point", "untrained", "label smoothing", "temperature", "distribution"),
    "ablation": ("distribution", "without adversary", "without KL", "without CE"),
    "sweep": ("distribution",),
    "robustness": ("single-point", "without adversary", "distribution", "exact adversary", "EB model averaged", "teacher"),
    "budget": ("distribution", "KL alone", "teacher"),
    "length": ("distribution", "teacher", "few", "KL alone", "KL, constant rate, averaged"),
    "ood": ("single-point", "untrained", "label smoothing", "temperature", "distribution"),
    "cost": ("single-point", "without adversary", "distribution", "exact adversary", "teacher"),
    "methods": (
        "distribution",
        "teacher",
        "few",
        "EB model averaged",
        "EB model",
        "KL alone",
        "EB marginal, k = 1",
        "exact adversary",
        "annotators' radius",
        "KL + RPS",
        "single-point",
        "label smoothing",
        "temperature",
    ),
    "adversary": ("distribution",),
}
METRICS = {
    "kl": "KL to votes",
    "kl_truth": "KL to truth",
    "accuracy": "accuracy",
    "js_divergence": "JS",
    "total_variation": "TV",
    "brier": "Brier",
    "entropy_correlation": "entropy r",
    "emd": "EMD",
    "rps": "RPS",
    "mean_correlation": "mean r",
}
# hashed into a cell's name always; other settings, those of later versions too, only where they are not at their default
DECIDES = """labels ordered spellings model four_bit lora_rank lora_alpha max_length overlong top_k alpha eps radius adversary ball steps
    step_size prior concentration loss rps_weight learning_rate epochs batch_size grad_accum shuffle warmup schedule weight_decay
    max_grad_norm gradient_checkpointing seed hidden layers vocabulary""".split()
COLUMNS = (
    "study",
    "data",
    "votes",
    "items",
    "epochs",
    "alpha",
    "eps",
    "delta",
    "entropy",
    "method",
    "seed",
    "metric",
    "value",
    "std",
    "low",
    "high",
    "against",
    "difference",
    "difference_low",
    "difference_high",
    "p",
)


@dataclasses.dataclass
class StudyConfig(tiny.TinyConfig):
    study: tyro.conf.Positional[
        Literal["main", "ablation", "sweep", "robustness", "budget", "length", "ood", "cost", "methods", "adversary"]
    ] = "main"
    """The study."""
    out: str = "runs/study"
    """The folder for table, figure and cells; studies may share one, and then share cells."""
    seeds: int = 5
    """How many seeds, from `seed` on: first weights, order and, with --votes, the votes themselves."""
    methods: tuple[str, ...] = ()
    """Rows of the table, the first of which the others are compared with. Default: the study's own. A row brings its alpha and eps."""
    votes: tuple[int, ...] = ()
    """Train on so many votes an item: drawn from the true distribution where it is known, else from the item's votes without
    replacement (items with fewer are left out). Default: all votes as they are."""
    train_items: int = 0
    """Train on a random part of so many items; 0 is all."""
    alphas: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    """sweep: the weights of KL."""
    epsilons: tuple[float, ...] = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25)
    """sweep: the radii of the adversary."""
    deltas: tuple[float, ...] = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25)
    """robustness: how far, in l2, test targets are moved."""
    perturbations: int = 50
    """robustness: random moves an item."""
    budget_equal: Literal["epochs", "steps"] = "epochs"
    """budget: fewer items mean fewer steps at equal epochs, or more epochs at equal steps."""
    lengths: tuple[float, ...] = (4.0, 8.0, 16.0, 32.0)
    """length: the numbers of epochs, each with its own learning-rate schedule to the end."""
    overlap: Literal["error", "drop"] = "error"
    """ood: what to do when a training item's id, prompt or group is in the test set: stop, or leave it out and say how many."""
    smoothing: float = 0.1
    """What label smoothing spreads over all labels."""
    draws: int = 2000
    """Bootstrap draws."""
    report: bool = False
    """Train nothing: write table and figure of the cells that are there."""


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------
def read_items(config: StudyConfig) -> tuple[list[Item], list[Item]]:
    """Training and test items; for "ood" apart from each other by id, prompt and group."""
    if config.study != "ood":
        return distjudge.load_data(config)
    if not config.test:
        raise InputError("test: ood needs --train and --test, two data sets")
    labels = list(config.labels) or None
    train = distjudge.load_items(*config.train, labels=labels)
    test = distjudge.load_items(*config.test, labels=labels or labels_of(train), complete=labels is None)
    if config.overlap == "error":
        distjudge.check_apart(train, test)
        return train, test
    kept, _ = distjudge.keep_apart(train, test, "remove", lambda prompt: " ".join(prompt.casefold().split()))
    print(f"left out {len(train) - len(kept)} of {len(train)} training items whose id, prompt or group is in the test set")
    if not kept:
        raise InputError(f"{config.train[0]}: every item is in the test set too")
    distjudge.check_apart(kept, test)
    return kept, test


def draw_votes(items: list[Item], votes: int, seed: int) -> list[Item]:
    """The items with so many votes each: from their truth, or else without replacement from the votes they have."""
    draw, drawn, known = torch.Generator().manual_seed(10_007 * seed + votes), [], all(item.truth for item in items)
    for item in items:
        labels = list(item.counts)
        if known:
            chosen = torch.multinomial(torch.tensor(list(item.truth.values())), votes, replacement=True, generator=draw).tolist()
        else:
            pool = [c for c, n in enumerate(item.counts.values()) for _ in range(round(n))]
            if len(pool) < votes:
                continue
            chosen = [pool[i] for i in torch.randperm(len(pool), generator=draw)[:votes].tolist()]
        drawn.append(dataclasses.replace(item, counts={label: chosen.count(c) for c, label in enumerate(labels)}))
    if not drawn:
        raise InputError(f"votes: no training item has {votes}")
    return drawn


def some_of(items: list[Item], number: int, seed: int) -> list[Item]:
    """A random part of the items, in their order; all for 0."""
    if not number or number >= len(items):
        return items
    chosen = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed))[:number].sort().values.tolist()
    return [items[i] for i in chosen]


def smoothed(items: list[Item], share: float) -> list[Item]:
    """The majority label with `share` of its probability spread over all labels, in place of the votes."""
    p = majority(counts_of(items) / counts_of(items).sum(1, keepdim=True)) * (1 - share) + share / len(labels_of(items))
    return [dataclasses.replace(item, counts=dict(zip(item.counts, row, strict=True))) for item, row in zip(items, p.tolist(), strict=True)]


# ---------------------------------------------------------------------------------------------------------------------
# Cells
# ---------------------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Cell:
    """One judge to train: a method with one seed on so many votes and items. votes and items 0: as they are."""

    method: str
    seed: int
    votes: int = 0
    items: int = 0
    alpha: float | None = None
    eps: float | None = None
    epochs: float | None = None
    repeat: int = 0


class Workshop:
    """Trains cells, or finds them trained. `scores(cell)` are its predictions for the test items, (N, C) float64."""

    def __init__(self, config: StudyConfig):
        self.config, self.out = config, Path(config.out)
        self.train, self.test = read_items(config)
        self.labels = labels_of(self.train)
        self.data = fingerprint([self.train, self.test])
        self.missing = 0

    def settings(self, cell: Cell) -> tuple[dict[str, Any], tiny.TinyConfig]:
        """A cell's method, and its resolved training configuration."""
        method = dict(METHODS[cell.method])
        for name in ("alpha", "eps", "epochs"):
            if getattr(cell, name) is not None:
                method[name] = getattr(cell, name)
        known = {field.name for field in dataclasses.fields(tiny.TinyConfig)}
        values = {name: getattr(self.config, name) for name in known} | {name: v for name, v in method.items() if name in known}
        run = tiny.TinyConfig(**values | {"seed": cell.seed})
        run.check()
        return method, run

    def folder(self, cell: Cell) -> tuple[Path, dict[str, Any]]:
        """Where a cell lives, and everything that decides its result. Settings at which a method is another one share its cell."""
        method, run = self.settings(cell)
        default = {f.name: f.default for f in dataclasses.fields(run)}
        decides = {name: v for name, v in dataclasses.asdict(run).items() if name in DECIDES or v != default[name]}
        for name in ("train", "test", "out", "report_to", "log_every", "seeds", "eval_every", "pack_tokens", "packs", "preset", "min_mass"):
            decides.pop(name, None)
        if run.model:  # a model of one's own is not made from these
            for name in ("hidden", "layers", "vocabulary"):
                decides.pop(name)
        method = {name: method[name] for name in ("untrained", "calibrate", "votes_as") if name in method}
        if method.get("votes_as") == "smoothed":
            method["smoothing"] = self.config.smoothing
        decides |= {"data": self.data, "votes": cell.votes, "train_items": cell.items, "repeat": cell.repeat, **method}
        return self.out / "cells" / hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16], decides

    def items(self, cell: Cell) -> list[Item]:
        """The training items of a cell: votes are drawn before items, so that fewer items are a part of more."""
        items = draw_votes(self.train, cell.votes, cell.seed) if cell.votes else self.train
        return some_of(items, cell.items, cell.seed)

    def load(self, cell: Cell) -> dict[str, Any] | None:
        """A finished cell: {"predicted": (N, C), "seconds", ...}, trained now if it is not there; None if it may not be."""
        folder, decides = self.folder(cell)
        if not (folder / "cell.json").exists():
            if self.config.report:
                self.missing += 1
                return None
            self.make(cell, folder, decides)
        found = json.loads((folder / "cell.json").read_text(encoding="utf-8"))
        rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
        if [row["id"] for row in rows] != [item.id for item in self.test]:
            raise InputError(f"{folder}: its predictions are not those of the test items; remove the folder")
        found["predicted"] = torch.tensor([row["predicted"] for row in rows], dtype=torch.float64)
        return found

    def make(self, cell: Cell, folder: Path, decides: dict[str, Any]) -> None:
        import transformers

        transformers.utils.logging.disable_progress_bar()
        method, run = self.settings(cell)
        run.out = str(folder)
        items, began = self.items(cell), time.perf_counter()
        base = run.model
        if not base:  # the tokenizer is made from all training prompts, so cells of one seed share first weights
            home = self.out / "base" / fingerprint([self.train, [cell.seed, run.hidden, run.layers, run.vocabulary]])
            base = str(home) if (home / "model.safetensors").exists() else tiny.build_base(home, self.train, run, cell.seed)
        judge = distjudge.load_judge(
            base,
            self.labels,
            spellings=distjudge.parse_spellings(run.spellings),
            lora_rank=run.lora_rank,
            lora_alpha=run.lora_alpha,
            four_bit=run.four_bit,
            max_length=run.max_length,
            top_k=run.top_k,
            seed=run.seed,
        )
        items, test = distjudge.keep_short(judge, items, run.overlong, "training"), distjudge.keep_short(judge, self.test, "error", "test")
        if run.model:
            distjudge.check_mass(judge, items, run.min_mass)
        held: list[Item] = []
        if method.get("calibrate"):
            items, held = distjudge.split_items(items, 0.1, run.seed)
        if method.get("votes_as") == "smoothed":
            items = smoothed(items, self.config.smoothing)
        print(f"[{time.strftime('%H:%M:%S')}] {cell.method}, seed {cell.seed}, {len(items)} items, {cell.votes or 'all'} votes", flush=True)
        clock = Clock()
        if not method.get("untrained"):
            distjudge.train(judge, items, run, callbacks=[clock.callback()])
        logq = distjudge.judge_items(judge, test)[0].double().log()
        temperature = None
        if held:
            temperature = fit_temperature(distjudge.judge_items(judge, held)[0].double().log(), counts_of(held))
            logq = (logq / temperature).log_softmax(1)
        folder.mkdir(parents=True, exist_ok=True)
        rows = zip(test, logq.exp().tolist(), strict=True)
        distjudge.write_lines(folder / "predictions.jsonl", [json.dumps({"id": item.id, "predicted": q}) for item, q in rows])
        distjudge.write_json(
            folder / "cell.json",
            {  # last: a folder with it is finished
                "method": cell.method,
                "settings": decides,
                "items": len(items),
                "epochs": run.epochs,
                "train_seconds": clock.seconds,
                "seconds": time.perf_counter() - began,
                "temperature": temperature,
                "device": str(judge.device),
                "versions": distjudge.versions(),
            },
        )
        for name in ("checkpoints", "fold-0", "fold-1"):
            shutil.rmtree(folder / name, ignore_errors=True)


class Clock:
    """The seconds that the last training of a cell took, from its first step to its last."""

    def __init__(self) -> None:
        self.began = self.seconds = 0.0

    def callback(self) -> Any:
        import transformers

        clock = self

        class Callback(transformers.TrainerCallback):
            def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
                clock.began = time.perf_counter()

            def on_train_end(self, *args: Any, **kwargs: Any) -> None:
                clock.seconds = time.perf_counter() - clock.began

        return Callback()


def fingerprint(parts: list) -> str:
    """A hash of items (id, prompt, votes) or plain values."""
    plain = [[(p.id, p.prompt, p.counts, p.truth, p.group) if isinstance(p, Item) else p for p in part] for part in parts]
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()[:16]


def fit_temperature(logq: torch.Tensor, counts: torch.Tensor) -> float:
    """The T for which softmax(log q / T) has the least cross-entropy with the votes: golden section in log T, 1/20 to 20."""
    p = counts / counts.sum(1, keepdim=True)
    cost = lambda log_t: kl_loss((logq / torch.tensor(log_t).exp()).log_softmax(1), p).mean().item()  # noqa: E731
    return float(torch.tensor(distjudge.golden_section(cost, -3.0, 3.0)).exp())


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------
class Table:
    """The numbers of a study, tidy, and as Markdown."""

    def __init__(self, shop: Workshop):
        self.shop, self.rows = shop, []
        config = shop.config
        self.groups = [item.group for item in shop.test]
        self.study, self.draws = config.study, config.draws
        self.name = (
            Path(config.train[0]).parent.name if Path(config.train[0]).stem in ("train", "test", "valid") else Path(config.train[0]).stem
        )

    def add(self, method: str, metric: str, value: float | None, **more: Any) -> None:
        self.rows.append({"study": self.study, "data": self.name, "method": method, "metric": metric, "value": value, **more})

    def compare(self, found: dict[str, list[torch.Tensor]], **at: Any) -> None:
        """Rows for methods, each with predictions (N, C) a seed: every metric, its interval, and its difference from the first method."""
        scores = {m: [distjudge.item_scores(q, self.shop.test, self.shop.config.ordered) for q in qs] for m, qs in found.items() if qs}
        first = next(iter(scores), None)
        for method, runs in scores.items():
            for metric in runs[0]:
                own = torch.stack([run[metric] for run in runs])
                for seed, one in enumerate(own):
                    mean = distjudge.correlation(one.mean(0)) if one.dim() == 2 else one.mean()
                    self.add(method, metric, None if mean.isnan() else mean.item(), seed=self.shop.config.seed + seed, **at)
                self.summary(method, metric, own, first, torch.stack([run[metric] for run in scores[first]]), **at)

    def summary(self, method: str, metric: str, own: torch.Tensor, first: str, other: torch.Tensor, **at: Any) -> None:
        whole = bootstrap(own, groups=self.groups, draws=self.draws)
        values = [row["value"] for row in self.rows[-len(own) :] if row["value"] is not None]
        row = {
            "seed": "all",
            "low": whole["low"],
            "high": whole["high"],
            "std": float(torch.tensor(values).std()) if len(values) > 1 else None,
        }
        if method != first:
            runs = min(len(own), len(other))
            if len(other) == 1 and len(own) > 1:  # what has no seed is compared with each
                other, runs = other.expand_as(own), len(own)
            if len(own) == 1 and len(other) > 1:
                own, runs = own.expand_as(other), len(other)
            row |= self.gap(own[:runs], other[:runs], first)
        self.add(method, metric, whole["mean"], **row, **at)

    def gap(self, own: torch.Tensor, other: torch.Tensor, against: str) -> dict[str, Any]:
        """The columns of a difference between scores (S, N), paired by seed and item."""
        gap = bootstrap(own, other, groups=self.groups, draws=self.draws)
        columns = {"difference": gap["mean"], "difference_low": gap["low"], "difference_high": gap["high"], "p": gap["p"]}
        return {"against": against} | columns

    def references(self, train: list[Item], **at: Any) -> dict[str, list[torch.Tensor]]:
        """The rival without a model, and the floor as rows; the marginal's predictions come back for compare()."""
        test = self.shop.test
        truth = distjudge.truths_of(test)
        if truth is not None:
            own = distjudge.item_scores(truth, test, self.shop.config.ordered)
            for metric, score in own.items():
                whole = bootstrap(score[None], groups=self.groups, draws=self.draws)
                self.add("noise floor (the truth)", metric, whole["mean"], seed="all", low=whole["low"], high=whole["high"], **at)
        elif (floor := noise_floor(test)) is not None:
            self.add("noise floor (estimated)", "kl", floor, seed="all", **at)
        return {"marginal": [marginal_distribution(train).expand(len(test), -1)]}

    def bins(self, found: dict[str, list[torch.Tensor]], **at: Any) -> None:
        """KL by human entropy, in shares of log C: of the truth where known, else of the votes. Means and intervals a bin."""
        test = self.shop.test
        truth = distjudge.truths_of(test)
        p = counts_of(test) if truth is None else truth
        p = p / p.sum(1, keepdim=True)
        entropy = distjudge.entropy(p) / torch.tensor(float(p.shape[1])).log()
        edges = [0.0, 0.25, 0.5, 0.75, 1.0]
        for low, high in itertools.pairwise(edges):
            chosen = ((entropy > low) | ((low == 0) & (entropy >= 0))) & (entropy <= high + 1e-9)
            if chosen.sum() < 10:
                continue
            names = [g for g, c in zip(self.groups, chosen.tolist(), strict=True) if c]
            for method, qs in found.items():
                if qs:
                    own = torch.stack([distjudge.kl_divergence(p, q)[chosen] for q in qs])
                    whole = bootstrap(own, groups=names, draws=self.draws)
                    self.add(
                        method,
                        "kl" if truth is None else "kl_truth",
                        whole["mean"],
                        seed="all",
                        low=whole["low"],
                        high=whole["high"],
                        entropy=f"{low:g}-{high:g}",
                        **at,
                    )

    def markdown(self, metrics: list[str], keys: tuple[str, ...] = ()) -> list[str]:
        """Summary rows as a table: the value with its interval, and a star where the difference from the first method is not 0."""
        rows = [r for r in self.rows if r["seed"] == "all" and not r.get("entropy")]
        here = [m for m in metrics if any(r["metric"] == m for r in rows)]
        lines = [
            "| " + " | ".join([*keys, "method", *(METRICS.get(m, m) for m in here)]) + " |",
            "| --- " * (len(keys) + 1 + len(here)) + "|",
        ]
        places = list(dict.fromkeys((*(r.get(k) for k in keys), r["method"]) for r in rows))
        for place in places:
            cells = []
            for metric in here:
                found = [r for r in rows if (*(r.get(k) for k in keys), r["method"]) == place and r["metric"] == metric]
                cells.append(shown(found[0]) if found else "–")
            lines.append("| " + " | ".join([*("" if v is None else f"{v}" for v in place), *cells]) + " |")
        return lines

    def write(self, lines: list[str], draw: Any) -> None:
        config, out = self.shop.config, Path(self.shop.config.out)
        out.mkdir(parents=True, exist_ok=True)
        part = out / f"{self.study}.csv.part"
        with open(part, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            for row in self.rows:
                writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
        part.replace(out / f"{self.study}.csv")
        cells = [json.loads(p.read_text(encoding="utf-8")) for p in sorted((out / "cells").glob("*/cell.json"))]
        changed = {
            f.name: getattr(config, f.name)
            for f in dataclasses.fields(config)
            if f.name not in ("out", "study", "train", "test", "report")
            and getattr(config, f.name) != (f.default if f.default is not dataclasses.MISSING else f.default_factory())
        }
        foot = [
            f"{len(self.shop.train)} training and {len(self.shop.test)} test items of {self.name}; "
            f"{config.seeds} seed{'s' if config.seeds > 1 else ''} from {config.seed}"
            + (f"; settings that are not the defaults: {changed}" if changed else "")
            + "."
        ]
        if cells:
            foot.append(
                f"{sum(c['seconds'] for c in cells) / 60:.0f} minutes for the {len(cells)} cells of the folder on {cells[0]['device']}; "
                + ", ".join(f"{k} {v}" for k, v in cells[0]["versions"].items())
                + "."
            )
        if self.shop.missing:
            foot.append(f"**{self.shop.missing} cells are not finished and not in this table.**")
        distjudge.write_lines(out / f"{self.study}.md", [*lines, "", *foot])
        print("\n".join([*lines, "", *foot]))
        written = [out / f"{self.study}.csv", out / f"{self.study}.md"]
        written += figures.save(draw(self.rows), out / self.study) if draw else []
        print("\nwrote " + ", ".join(str(path) for path in written))


def shown(row: dict[str, Any]) -> str:
    if row["value"] is None:
        return "–"
    star = (
        "*"
        if row.get("difference") is not None and row["difference_low"] is not None and row["difference_low"] * row["difference_high"] > 0
        else ""
    )
    return f"{row['value']:.3f}{star}" + ("" if row.get("low") is None else f" [{row['low']:.3f}, {row['high']:.3f}]")


# ---------------------------------------------------------------------------------------------------------------------
# Studies
# ---------------------------------------------------------------------------------------------------------------------
def seeds(config: StudyConfig) -> range:
    return range(config.seed, config.seed + config.seeds)


def predictions(shop: Workshop, methods: list[str], **at: Any) -> dict[str, list[torch.Tensor]]:
    """Predictions of each method, a tensor a seed. Methods vary fastest: a study that is stopped has whole seeds."""
    found: dict[str, list[torch.Tensor]] = {method: [] for method in methods}
    for seed in seeds(shop.config):
        cells = {method: shop.load(Cell(method, seed, **at)) for method in methods}
        if all(cells.values()):  # a seed counts when all methods have it: they are compared in pairs
            for method, cell in cells.items():
                found[method].append(cell["predicted"])
    return found


def compare_methods(shop: Workshop, methods: list[str]) -> None:
    """main, ablation, ood, methods."""
    config, table = shop.config, Table(shop)
    votes = config.votes or (0,)
    everything = {}
    for seed in seeds(config):  # in this order, so that stopping early leaves whole seeds
        for n in votes:
            for method in methods:
                shop.load(Cell(method, seed, n, config.train_items))
    shop.missing = 0
    for n in votes:
        at = {"votes": n} if n else {}
        found = predictions(shop, methods, votes=n, items=config.train_items)
        everything[n] = found | table.references(shop.items(Cell(methods[0], config.seed, n, config.train_items)), **at)
        table.compare(everything[n], **at)
        table.bins(everything[n], **at)
    metrics = ["kl", "kl_truth", "accuracy", "js_divergence", "entropy_correlation", "rps"]
    lines = [
        f"Differences from *{methods[0]}* whose 95 % interval leaves out 0 are starred.",
        "",
        *table.markdown(metrics, ("votes",) if config.votes else ()),
        "",
        *difference_lines(table, methods[0], bool(config.votes)),
    ]
    floor = [r for r in table.rows if r["method"] == "noise floor (estimated)"]
    if floor:
        lines += ["", f"KL to votes less its floor of {floor[0]['value']:.3f} estimates KL to the unknown truth; it shifts all rows alike."]
    table.write(lines, figures.draw_methods)


def difference_lines(table: Table, first: str, by_votes: bool) -> list[str]:
    rows = [r for r in table.rows if r["seed"] == "all" and not r.get("entropy") and r.get("difference") is not None]
    metric = figures.measure(rows)
    lines = [
        f"{METRICS[metric]}, difference from {first} (nats; negative is better):",
        "",
        f"| {'votes | ' if by_votes else ''}method | difference | 95 % interval | p |",
        "| --- " * (5 if by_votes else 4) + "|",
    ]
    for r in rows:
        if r["metric"] == metric and r["difference_low"] is not None:
            lines.append(
                f"| {str(r.get('votes', '')) + ' | ' if by_votes else ''}{r['method']} | {r['difference']:+.4f} | "
                f"[{r['difference_low']:+.4f}, {r['difference_high']:+.4f}] | {r['p']:.4f} |"
            )
    return lines


def sweep(shop: Workshop, methods: list[str]) -> None:
    config, table = shop.config, Table(shop)
    votes = config.votes[0] if config.votes else 0
    grid = {(a, e): [] for e in config.epsilons for a in config.alphas}
    for seed in seeds(config):
        for alpha, eps in grid:
            cell = shop.load(Cell(methods[0], seed, votes, config.train_items, alpha=alpha, eps=eps if alpha else 0.0))
            if cell:
                grid[alpha, eps].append(cell["predicted"])
    table.compare(table.references(shop.items(Cell(methods[0], config.seed, votes, config.train_items))))
    for (alpha, eps), qs in grid.items():
        if qs:
            table.compare({methods[0]: qs}, alpha=alpha, eps=eps)
    table.write(table.markdown(["kl", "kl_truth", "accuracy"], ("eps", "alpha")), figures.draw_sweep)


def perturb(p: torch.Tensor, delta: float, draw: torch.Generator) -> torch.Tensor:
    """Moves each row of p by delta in l2 toward a uniformly random point of the simplex that is at least so far away."""
    target, left = p.clone(), torch.full((len(p),), delta > 0)
    while left.any():
        z = -torch.rand(p.shape, generator=draw, dtype=p.dtype).clamp_min(1e-12).log()
        z = z / z.sum(1, keepdim=True)
        target[left] = z[left]
        left = (target - p).norm(dim=1) < delta
    gap = target - p
    return p + delta * gap / gap.norm(dim=1, keepdim=True).clamp_min(1e-12)


def robustness(shop: Workshop, methods: list[str]) -> None:
    config, table = shop.config, Table(shop)
    votes = config.votes[0] if config.votes else 0
    found = predictions(shop, methods, votes=votes, items=config.train_items)
    found |= table.references(shop.items(Cell(methods[0], config.seed, votes, config.train_items)))
    truth = distjudge.truths_of(shop.test)
    if truth is not None:
        found["noise floor (the truth)"] = [truth]
    counts = counts_of(shop.test)
    p = counts / counts.sum(1, keepdim=True)
    for delta in config.deltas:
        draw = torch.Generator().manual_seed(config.seed)
        moved = [perturb(p, delta, draw) for _ in range(config.perturbations if delta else 1)]
        scores = {
            m: torch.stack([torch.stack([distjudge.kl_divergence(t, q) for t in moved]).mean(0) for q in qs])
            for m, qs in found.items()
            if qs
        }
        first = next(iter(scores), None)
        for method, own in scores.items():
            for seed, one in enumerate(own):
                table.add(method, "kl", one.mean().item(), seed=config.seed + seed, delta=delta)
            table.summary(method, "kl", own, first, scores[first], delta=delta)
    table.write(
        [
            f"KL to test targets moved by delta, {config.perturbations} random moves an item; stars: against *{methods[0]}*.",
            "",
            *table.markdown(["kl"], ("delta",)),
        ],
        figures.draw_robustness,
    )


def budget(shop: Workshop, methods: list[str]) -> None:
    config, table = shop.config, Table(shop)
    most = config.train_items or len(shop.train)
    spread = {1: most, 3: most // 3, 5: most // 5}
    for n, items in spread.items():
        epochs = config.epochs * (most / items if config.budget_equal == "steps" else 1)
        at = {"votes": n, "items": items}
        found = predictions(shop, methods, votes=n, items=items, epochs=epochs)
        table.compare(found | table.references(shop.items(Cell(methods[0], config.seed, n, items)), **at), **at)
    table.write(
        [
            f"{most} annotations spent three ways, equal {config.budget_equal}; stars: against *{methods[0]}* in the same row group.",
            "",
            *table.markdown(["kl", "kl_truth", "accuracy"], ("items", "votes")),
        ],
        figures.draw_budget,
    )


def length(shop: Workshop, methods: list[str]) -> None:
    config, table, votes = shop.config, Table(shop), shop.config.votes or (0,)
    found = {n: {epochs: {method: [] for method in methods} for epochs in config.lengths} for n in votes}
    for seed in seeds(config):  # in this order, so that stopping early leaves whole seeds
        for n in votes:
            cells = {
                (epochs, method): shop.load(Cell(method, seed, n, config.train_items, epochs=epochs))
                for epochs in config.lengths
                for method in methods
            }
            if all(cells.values()):  # a seed counts when all lengths and methods have it
                for (epochs, method), cell in cells.items():
                    found[n][epochs][method].append(cell["predicted"])
    half = {item.id for item in distjudge.split_items(shop.test, 0.5, config.seed)[0]}  # by group
    here = torch.tensor([item.id in half for item in shop.test])
    picked: dict[tuple[int, str], list[float]] = {}
    for n in votes:
        at = {"votes": n} if n else {}
        for epochs, qs in found[n].items():
            table.compare(qs, epochs=epochs, **at)
        chosen: dict[str, list[torch.Tensor]] = {method: [] for method in methods}
        for method in methods:
            for runs in zip(*(found[n][epochs][method] for epochs in config.lengths), strict=True):  # a seed each
                scores = torch.stack([distjudge.item_scores(q, shop.test, config.ordered)["kl"] for q in runs])
                best = [int(scores[:, part].mean(1).argmin()) for part in (~here, here)]  # for the one half the other decides
                chosen[method].append(torch.where(here[:, None], runs[best[0]], runs[best[1]]))
                picked.setdefault((n, method), []).extend(config.lengths[k] for k in best)
        table.compare(chosen | table.references(shop.items(Cell(methods[0], config.seed, n, config.train_items)), **at), **at)
        if chosen[methods[0]]:
            against_chosen(table, found[n], methods, chosen[methods[0]], **at)
    table.write(length_lines(table, methods, picked), figures.draw_length)


def against_chosen(table: Table, found: dict[float, dict[str, list]], methods: list[str], best: list[torch.Tensor], **at: Any) -> None:
    """Rows with seed "fixed": each other method, with nothing chosen, against the first method with its length chosen by votes.

    Intervals take that choice as given: the bootstrap does not make it again.
    """
    metric = figures.measure(table.rows)
    scores = lambda qs: torch.stack([distjudge.item_scores(q, table.shop.test, table.shop.config.ordered)[metric] for q in qs])  # noqa: E731
    first = scores(best)
    for epochs, qs in found.items():
        for method in methods[1:]:
            own = scores(qs[method])
            gap = table.gap(own, first, f"{methods[0]}, chosen")
            table.add(method, metric, float(own.mean()), seed="fixed", epochs=epochs, **gap, **at)


def length_lines(table: Table, methods: list[str], picked: dict[tuple[int, str], list[float]]) -> list[str]:
    rows = [r for r in table.rows if r["seed"] == "all"]
    metric, lengths = figures.measure(rows), table.shop.config.lengths
    rows = [r for r in rows if r["metric"] == metric and not (metric == "kl_truth" and r["method"].startswith("noise"))]
    lines = [
        f"{METRICS[metric]}, nats, by epochs; *chosen*: for one half of the test items the epochs at which the same judge is nearest to "
        f"the votes of the other half. Stars: against *{methods[0]}* in the same column and with as many votes.",
        "",
        f"| votes | method | {' | '.join(f'{epochs:g}' for epochs in lengths)} | chosen | epochs chosen | difference, chosen |",
        "| --- " * (5 + len(lengths)) + "|",
    ]
    for n in dict.fromkeys(r.get("votes", 0) for r in rows):
        own = [r for r in rows if r.get("votes", 0) == n]
        for method in dict.fromkeys(r["method"] for r in own):
            cells = {r.get("epochs"): r for r in own if r["method"] == method}
            times = picked.get((n, method), [])
            gap = cells.get(None, {})
            lines.append(
                f"| {n or 'all'} | {method} | {' | '.join(shown(cells[e]) if e in cells else '–' for e in (*lengths, None))} | "
                + (", ".join(f"{e:g} ({times.count(e)} x)" for e in lengths if e in times) or "–")
                + (f" | {gap['difference']:+.4f} [{gap['difference_low']:+.4f}, {gap['difference_high']:+.4f}], p {gap['p']:.4f} |"
                   if gap.get("difference") is not None else " | – |")
            )
    fixed = [r for r in table.rows if r["seed"] == "fixed" and r["difference_low"] is not None]  # none of one group of items
    if not fixed:
        return lines
    lines += [
        "",
        f"{METRICS[metric]}, nats: difference of a method *at a length that nobody chose* from *{methods[0]}* at the length chosen for it; "
        "starred where its interval leaves out 0.",
        "",
        f"| votes | method | {' | '.join(f'{epochs:g}' for epochs in lengths)} |",
        "| --- " * (2 + len(lengths)) + "|",
    ]
    for n, method in dict.fromkeys((r.get("votes", 0), r["method"]) for r in fixed):
        gaps = {r["epochs"]: r for r in fixed if (r.get("votes", 0), r["method"]) == (n, method)}
        cells = [
            f"{r['difference']:+.4f}{'*' * (low * high > 0)} [{low:+.4f}, {high:+.4f}]"
            for r in (gaps[epochs] for epochs in lengths)
            for low, high in [(r["difference_low"], r["difference_high"])]
        ]
        lines.append(f"| {n or 'all'} | {method} | {' | '.join(cells)} |")
    return lines


def cost(shop: Workshop, methods: list[str]) -> None:
    """Cells of their own, the methods taking turns, so that a busy minute is shared; the first seed warms up and is not counted."""
    config, table = shop.config, Table(shop)
    times: dict[str, list[float]] = {method: [] for method in methods}
    for turn in range(config.seeds + 1):
        for method in methods:
            cell = shop.load(Cell(method, config.seed, config.votes[0] if config.votes else 0, config.train_items, repeat=turn + 1))
            if cell and turn:
                times[method].append(cell["train_seconds"] / cell["epochs"])
                number = cell["items"]
    lines = ["| method | seconds an epoch, median (least to most) | items a second | times the first |", "| --- | --- | --- | --- |"]
    first = None
    for method, found in times.items():
        if not found:
            continue
        middle = float(torch.tensor(found, dtype=torch.float64).quantile(0.5))
        first = first or middle
        for turn, seconds in enumerate(found):
            table.add(method, "seconds_per_epoch", seconds, seed=turn)
        table.add(method, "seconds_per_epoch", middle, seed="all", low=min(found), high=max(found))
        table.add(method, "items_per_second", number / middle, seed="all")
        lines.append(f"| {method} | {middle:.2f} ({min(found):.2f} to {max(found):.2f}) | {number / middle:.1f} | {middle / first:.3f} |")
    table.write(lines, figures.draw_cost)


def adversary(shop: Workshop, methods: list[str]) -> None:
    """Five steps against the exact worst case, on test votes and the predictions of judges, by how far people agree."""
    config, table = shop.config, Table(shop)
    votes = config.votes or (0,)
    lines = [
        "Gain: the mean of KL(p' || q) - KL(p || q), nats. Missed: items where the steps end over 1e-6 below the maximum. Last column: "
        "how far at most a proven upper bound lies above the value found.",
        "",
        "| q | votes | items | number | gain, 5 steps | gain, exact | reached | missed | missed, mean | bound above |",
        "| --- " * 10 + "|",
    ]
    for name, cell in {"untrained": "untrained", "trained judge": methods[0]}.items():
        for n in votes:
            loaded = [shop.load(Cell(cell, seed, n, config.train_items)) for seed in seeds(config)]
            qs = [c["predicted"] for c in loaded if c]
            if not qs:
                continue
            test = draw_votes(shop.test, n, config.seed + 1) if n else shop.test
            place = {item.id: i for i, item in enumerate(shop.test)}
            counts = counts_of(test)
            p = (counts / counts.sum(1, keepdim=True)).repeat(len(qs), 1)
            logq = torch.cat([q[[place[item.id] for item in test]] for q in qs]).clamp_min(1e-12).log()
            size = counts.sum(1).repeat(len(qs))
            before = kl_loss(logq, p)
            steps = kl_loss(logq, distjudge.worst_case(logq, p, config.eps, config.steps, config.step_size)) - before
            exact = kl_loss(logq, distjudge.worst_case_exact(p, logq, config.eps)) - before
            above = distjudge.worst_case_bound(p, logq, config.eps, exact + before) - before - exact
            kinds = {"one vote": size == 1, "unanimous": (p.max(1).values == 1) & (size > 1), "disputed": p.max(1).values < 1}
            for kind, here in kinds.items():
                if not here.any():
                    continue
                missed = (exact - steps)[here] > 1e-6
                values = {
                    "gain_steps": steps[here].mean(),
                    "gain_exact": exact[here].mean(),
                    "missed_share": missed.double().mean(),
                    "missed_mean": (exact - steps)[here][missed].mean(),
                    "bound_above": above[here].max(),
                }
                v = {k: None if x.isnan() else x.item() for k, x in values.items()}  # the mean of none
                for metric, value in v.items():
                    table.add(f"{name}, {kind}", metric, value, seed="all", votes=n)
                reached = f"{100 * v['gain_steps'] / v['gain_exact']:.1f} %" if v["gain_exact"] > 1e-9 else "–"
                lines.append(
                    f"| {name} | {n or 'all'} | {kind} | {int(here.sum())} | {v['gain_steps']:.4f} | {v['gain_exact']:.4f} | {reached} | "
                    f"{100 * v['missed_share']:.1f} % | {'–' if v['missed_mean'] is None else format(v['missed_mean'], '.4f')} | "
                    f"{v['bound_above']:.0e} |"
                )
    table.write(lines, figures.draw_adversary)


STUDIES = {
    "main": compare_methods,
    "ablation": compare_methods,
    "ood": compare_methods,
    "methods": compare_methods,
    "sweep": sweep,
    "robustness": robustness,
    "budget": budget,
    "length": length,
    "cost": cost,
    "adversary": adversary,
}


def main(config: StudyConfig) -> None:
    config.check()
    if config.preset or config.prior != "none":
        raise InputError("preset, prior: each row has its own; --methods names rows")
    methods = list(config.methods or ROWS[config.study])
    if unknown := [m for m in methods if m not in METHODS]:
        raise InputError(f"methods: {', '.join(unknown)}: not among {', '.join(METHODS)}")
    for name, low in (("seeds", 1), ("draws", 100), ("perturbations", 1), ("train_items", 0)):
        if getattr(config, name) < low:
            raise InputError(f"{name}: must be {low} or more, not {getattr(config, name)}")
    if any(v < 1 for v in config.votes):
        raise InputError(f"votes: must be 1 or more, not {min(config.votes)}")
    if not config.lengths or min(config.lengths) <= 0 or len(set(config.lengths)) != len(config.lengths):
        raise InputError("lengths: must be different numbers of epochs above 0")
    if not 0 <= config.smoothing < 1:
        raise InputError(f"smoothing: must be 0 or more and below 1, not {config.smoothing}")
    STUDIES[config.study](Workshop(config), methods)


if __name__ == "__main__":
    distjudge.cli(main, StudyConfig)
