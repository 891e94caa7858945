"""The paper's studies on any backbone, and ours, each as one command with intervals and rivals.

    python recipes/study.py main                                  # the embedded sample, a model from nothing
    python recipes/study.py ablation --votes 5 --seeds 3          # the paper's Table 2
    python recipes/study.py methods --train a.jsonl --test b.jsonl --model Qwen/Qwen3-4B --lora_rank 16 \\
        --methods distribution teacher untrained "raw, calibrated" frozen

    main        Table 1: untrained, single-point, distributional judge; label smoothing, temperature scaling
    ablation    Table 2: the full method without adversary, without KL, without cross-entropy
    robustness  Table 3: KL when the test targets are moved by delta, at random inside the simplex
    budget      Table 4: one number of annotations spent as N x 1, N/3 x 3 and N/5 x 5
    ood         Table 6: trained on --train, tested on --test, which are kept apart
    cost        Table 7: seconds an epoch and items a second
    sweep       Figure 3: KL over alpha, one line an eps
    length      several numbers of epochs, and the number that other items' votes favour
    methods     a teacher and other losses against the paper's method

Tables and the figure are the paper's (arXiv 2505.12301); Table 5 is main on other data. "Without KL" is plain
cross-entropy; the paper ticks its adversary in that row. plots/study.py --latex makes the tables for a paper.
For a pretrained model there are rows that do not train it: "raw, calibrated" fits a temperature and a bias a
label to the training votes, "frozen" the label rows of the output layer.

Writes STUDY.csv (a row for each number), STUDY.md, STUDY.png and its settings, STUDY.json, into --out. Each
judge has a folder in --out/cells, named by a hash of everything that decides its result. What is there is not
made again: a study can be stopped and started again, and studies share cells. Intervals are 95 % bootstrap
intervals over groups of test items and, with several seeds, over seeds (see distjudge.bootstrap). A
difference is starred where its two-sided p is under 0.05.
"""

import dataclasses
import hashlib
import json
import math
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Literal

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import distjudge
from distjudge import Config, InputError, Item, Judge, bootstrap, counts_of, kl_divergence, kl_loss, labels_of

import common
import pandas as pd
import scipy.optimize
import tiny
import torch
import torch.nn.functional as F
import tyro
from calibrate import fit_calibration

from plots import study as figures
from plots.figures import interval

PAPER = {"alpha": 0.8, "eps": 0.25}
SINGLE = {"alpha": 0.0, "eps": 0.0}
KL = {"alpha": 1.0, "eps": 0.0}
METHODS: dict[str, dict[str, Any]] = {  # settings of Config, and what a study does beside training
    "untrained": {"untrained": True},
    "raw, calibrated": {"untrained": True, "fit": "calibration"},
    "frozen": {"untrained": True, "fit": "label rows"},
    "single-point": SINGLE,
    "label smoothing": KL | {"smoothed": 0.1},
    "temperature": SINGLE | {"tempered": True},
    "distribution": PAPER,
    "without adversary": PAPER | {"eps": 0.0},
    "without KL": SINGLE,
    "without CE": PAPER | {"alpha": 1.0},
    "KL alone": KL,
    "teacher": distjudge.PRESETS["teacher"],
    "running mean": distjudge.PRESETS["teacher"] | {"teacher": 1e-6},  # its weights, without its pull
    "no answer term": PAPER | {"answer": 0.0},
}
MAIN = ("single-point", "untrained", "label smoothing", "temperature", "distribution")
ROWS = {  # the methods a study compares by default; the first is what the others are compared with
    "main": MAIN,
    "ablation": ("distribution", "without adversary", "without KL", "without CE"),
    "sweep": ("distribution",),
    "robustness": ("single-point", "without adversary", "distribution", "teacher"),
    "budget": ("distribution", "KL alone", "teacher"),
    "length": ("distribution", "teacher", "KL alone"),
    "ood": MAIN,
    "cost": ("single-point", "without adversary", "distribution", "teacher"),
    "methods": ("distribution", "teacher", "KL alone", "without adversary", MAIN[0], *MAIN[2:4]),
}
METRICS = {"people": "worth, people", "kl": "KL to votes", "kl_truth": "KL to truth", "accuracy": "accuracy"}
METRICS |= {"js_divergence": "JS", "entropy_correlation": "entropy r", "rps": "RPS"}
PENALTIES = (1000.0, 300.0, 100.0, 30.0, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03)
MOVES = 50  # robustness: random moves an item
# settings that decide no result (of train and test the items do)
IDLE = ["train", "test", "out", "report_to", "seeds", "eval_every", "save_every", "resume", "pack_tokens"]
SHAPE = ["hidden", "layers", "vocabulary"]


@dataclasses.dataclass
class StudyConfig(tiny.TinyConfig):
    study: tyro.conf.Positional[Literal[tuple(ROWS)]] = "main"
    """What to compare; see above."""
    out: str = "runs/study"
    """The folder for table, figure and cells; studies may share one, and then share cells."""
    answer: float = 0.0
    """Weight of -log m, where m is the probability of a label at all; 0 as in the paper."""
    seeds: int = 5
    """How many seeds, from `seed` on: first weights, order and, with --votes, the votes themselves."""
    methods: tuple[Literal[tuple(METHODS)], ...] = ()
    """Rows of the table; the others are compared with the first. A row brings its own alpha and eps."""
    votes: tuple[int, ...] = ()
    """Train on so many votes an item: drawn from its truth if known, else from its votes without replacement
    (items with fewer are left out). Default: all votes as they are."""
    train_items: int = 0
    """Train on a random part of so many items; 0 is all."""
    alphas: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    """sweep: the weights of KL."""
    epsilons: tuple[float, ...] = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25)
    """sweep: the radii of the adversary."""
    deltas: tuple[float, ...] = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25)
    """robustness: how far, in l2, test targets are moved."""
    lengths: tuple[float, ...] = (4.0, 8.0, 16.0, 32.0)
    """length: the numbers of epochs, each with its own learning-rate schedule to the end."""
    overlap: Literal["error", "drop"] = "error"
    """ood: with a training item whose id, prompt or group is in the test set: stop, or leave it out."""
    draws: int = 2000
    """Bootstrap draws."""

    def check(self) -> None:
        super().check()
        for name, low in (("draws", 100), ("train_items", 0), ("votes", 1)):
            least = min(getattr(self, name), default=low) if name == "votes" else getattr(self, name)
            if least < low:
                raise InputError(f"{name}: must be {low} or more, not {least}")
        for name in ("alphas", "epsilons", "deltas"):
            if min(getattr(self, name), default=-1) < 0:
                raise InputError(f"{name}: must be numbers of 0 or more")
        single = {"votes": ("sweep", "robustness", "cost"), "methods": ("sweep",)}
        for name, studies in single.items():
            if self.study in studies and len(getattr(self, name)) > 1:
                raise InputError(f"{name}: {self.study} takes one")
        if self.study == "budget" and self.votes:
            raise InputError("votes: budget takes 1, 3 and 5 by itself")
        if not self.lengths or min(self.lengths) <= 0 or len(set(self.lengths)) != len(self.lengths):
            raise InputError("lengths: must be different numbers of epochs above 0")


# --- data ---
def read_items(config: StudyConfig) -> tuple[list[Item], list[Item]]:
    """Training and test items; for "ood" apart from each other by id, prompt and group."""
    if config.study != "ood":
        return distjudge.load_data(config)
    if not config.test:
        raise InputError("test: ood needs --train and --test, two data sets")
    labels = list(config.labels) or None
    train = distjudge.load_items(*config.train, labels=labels)
    test = distjudge.load_items(*config.test, labels=labels or labels_of(train), complete=labels is None)
    how = {"error": "refuse", "drop": "remove"}[config.overlap]
    kept, _ = distjudge.keep_apart(train, test, how, lambda prompt: " ".join(prompt.casefold().split()))
    if gone := len(train) - len(kept):
        print(f"left out {gone} of {len(train)} training items whose id, prompt or group is in the test set")
    if not kept:
        raise InputError(f"{config.train[0]}: every item is in the test set too")
    return kept, test


def draw_votes(items: list[Item], votes: int, seed: int) -> list[Item]:
    """The items with so many votes each: from their truth, or else without replacement from their votes."""
    draw, drawn = torch.Generator().manual_seed(10_007 * seed + votes), []
    known = all(item.truth for item in items)
    for item in items:
        if known:
            truth = torch.tensor(list(item.truth.values()))
            chosen = torch.multinomial(truth, votes, replacement=True, generator=draw).tolist()
        else:
            pool = [c for c, n in enumerate(item.counts.values()) for _ in range(round(n))]
            if len(pool) < votes:
                continue
            chosen = [pool[i] for i in torch.randperm(len(pool), generator=draw)[:votes].tolist()]
        counts = {label: chosen.count(c) for c, label in enumerate(item.counts)}
        drawn.append(dataclasses.replace(item, counts=counts))
    if not drawn:
        raise InputError(f"votes: no training item has {votes}")
    return drawn


def smoothed(items: list[Item], share: float) -> list[Item]:
    """The majority label with `share` of its probability spread over all labels, in place of the votes."""
    p = distjudge.shares_of(items)
    p = distjudge.majority(p) * (1 - share) + share / p.shape[1]
    shares = [dict(zip(labels_of(items), row, strict=True)) for row in p.tolist()]
    return [dataclasses.replace(item, counts=own) for item, own in zip(items, shares, strict=True)]


def fingerprint(*parts: Any) -> str:
    """A hash of plain values and of items, wherever their files lie."""
    text = json.dumps(parts, default=lambda item: dataclasses.asdict(item) | {"where": ""})
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# --- cells ---
@dataclasses.dataclass(frozen=True)
class Cell:
    """One judge to train: a method with one seed on so many votes and items, 0 being as they are."""

    method: str
    seed: int
    votes: int = 0
    items: int = 0
    alpha: float | None = None
    eps: float | None = None
    epochs: float | None = None
    repeat: int = 0


class Workshop:
    """Trains cells, or finds them trained."""

    def __init__(self, config: StudyConfig):
        self.config, self.out = config, Path(config.out)
        self.methods, self.votes = list(config.methods or ROWS[config.study]), config.votes or (0,)
        self.train, self.test = read_items(config)
        self.data, self.weights = fingerprint(self.train, self.test), ""
        self.means: dict[Any, torch.Tensor] = {}  # of the training votes, (S, C), by the keys of collect()
        self.sizes: set[int] = set()  # training items of a judge
        if config.model and Path(config.model, "judge.json").is_file():
            self.weights = fingerprint(distjudge.read_saved(Path(config.model)))
        elif config.model:
            distjudge.check_there(config.model)
            distjudge.choose_backend(config.backend, trained=not config.lora_rank)  # imports Unsloth first
            try:
                self.weights = distjudge.weights_fingerprint(config.model)
            except Exception as error:  # a damaged folder can fail in any way
                fault = distjudge.first_line(error)
                raise InputError(f"{config.model}: model: cannot be loaded: {fault}") from error

    def settings(self, cell: Cell) -> tuple[tiny.TinyConfig, dict[str, Any]]:
        """A cell's training configuration, and what is done beside training."""
        own = {"seed": cell.seed, "alpha": cell.alpha, "eps": cell.eps, "epochs": cell.epochs}
        method = METHODS[cell.method] | {name: value for name, value in own.items() if value is not None}
        known = [field.name for field in dataclasses.fields(tiny.TinyConfig)]
        run = tiny.TinyConfig(**{name: method.pop(name, getattr(self.config, name)) for name in known})
        if cell.repeat:  # it is timed, as a whole
            run.save_every, run.resume = 0.0, False
        run.check()
        return run, method

    def folder(self, cell: Cell) -> tuple[Path, dict[str, Any]]:
        """Where a cell lives, and everything that decides its result. Equal settings share a cell."""
        run, decides = self.settings(cell)
        decides |= {name: getattr(cell, name) for name in ("votes", "items", "repeat")} | {"data": self.data}
        decides |= {"weights": self.weights}
        idle = [*IDLE, *SHAPE] if run.model else IDLE  # a model of one's own has its shape
        idle = [name for name in idle if not (cell.repeat and name == "pack_tokens")]
        decides |= {name: value for name, value in dataclasses.asdict(run).items() if name not in idle}
        return self.out / "cells" / fingerprint(sorted(decides.items())), decides

    def items(self, cell: Cell) -> list[Item]:
        """The training items of a cell. Votes are drawn first, so that fewer items are a part of more."""
        items = draw_votes(self.train, cell.votes, cell.seed) if cell.votes else self.train
        order = torch.randperm(len(items), generator=torch.Generator().manual_seed(cell.seed))
        return [items[i] for i in sorted(order[: cell.items or None].tolist())]

    def collect(self, wanted: dict[Any, dict[str, Any]]) -> dict[Any, torch.Tensor]:
        """Predictions (S, N, C) of each cell, by S seeds."""
        seeds = range(self.config.seed, self.config.seed + self.config.seeds)
        some = {"items": self.config.train_items}
        made = self.made([Cell(**some | {"seed": n} | cell) for n in seeds for cell in wanted.values()])
        found, means = (torch.stack([cell[name] for cell in made]) for name in ("predicted", "mean"))
        self.means |= {key: means[k :: len(wanted)] for k, key in enumerate(wanted)}
        return {key: found[k :: len(wanted)] for k, key in enumerate(wanted)}

    def made(self, cells: list[Cell]) -> list[dict[str, Any]]:
        """The cell.json of each, with "predicted" (N, C); makes what is missing first.

        Says how many there are and, by the time they took so far, how long the rest may take.
        """
        folders = [self.folder(cell)[0] for cell in cells]
        todo = {f: c for f, c in zip(folders, cells, strict=True) if not (f / "cell.json").exists()}
        if todo:
            there = len(set(folders))
            print(f"{len(todo)} of {there} judges are to be made, each a folder in {self.out}/cells.")
            amid = "" if cells[0].repeat else " (--resume: amid the one it was at)"
            print(f"Ctrl-C stops; the same command goes on with the next{amid}.")
        began = time.perf_counter()
        for n, (folder, cell) in enumerate(todo.items()):
            minutes = (time.perf_counter() - began) / max(n, 1) * (len(todo) - n) / 60
            left = f", about {math.ceil(minutes)} min left" if n else ""
            self.make(cell, folder, f"[{time.strftime('%H:%M:%S')}] {n + 1} of {len(todo)}{left}:")
        found = [json.loads((folder / "cell.json").read_text(encoding="utf-8")) for folder in folders]
        for cell, folder in zip(found, folders, strict=True):
            rows = [row["predicted"] for _, row, _ in distjudge.read_rows(folder / "predictions.jsonl")]
            numbers = {"predicted": rows, "mean": cell["mean"]}
            cell |= {name: torch.tensor(some, dtype=torch.float64) for name, some in numbers.items()}
            self.sizes.add(cell["items"])
        return found

    def make(self, cell: Cell, folder: Path, number: str) -> None:
        run, beside = self.settings(cell)
        run.out = str(folder)
        items, began, ends, base = self.items(cell), time.perf_counter(), {}, run.model
        if not base:  # made from all training prompts, so that cells of one seed share first weights
            shape = [getattr(run, name) for name in SHAPE]
            base = str(self.out / "base" / fingerprint(self.train, cell.seed, shape))
            if not Path(base, "tokenizer.json").exists():  # the last file written
                tiny.build_base(Path(base), self.train, run, cell.seed)
        judge = tiny.load_base(base, labels_of(self.train), run)
        items = distjudge.keep_short(judge, items, run.overlong, "training")
        all_or_none = "{longer}leave them out: all judges answer the same test items"
        test = distjudge.keep_short(judge, self.test, "error", "test", all_or_none)
        if run.model:
            print("label mass: " + common.check_mass(judge, items, run.answer))
        mean = distjudge.shares_of(items).mean(0).tolist()
        items, held = distjudge.split_items(items, 0.1, run.seed) if "tempered" in beside else (items, [])
        if "smoothed" in beside:
            items = smoothed(items, beside["smoothed"])
        about = f"{cell.method}, seed {cell.seed}, {len(items)} items, {cell.votes or 'all'} votes"
        print(f"{number} {about}", flush=True)
        if "untrained" not in beside:
            distjudge.train(judge, items, run, on_step=lambda n: ends.update({n: time.perf_counter()}))
        fitted: dict[str, Any] = {"temperature": None}
        if "fit" in beside:
            q, fitted = fit_readout(judge, items, test, run, beside["fit"])
        else:
            q = distjudge.judge_items(judge, test)[0].double()
        if held:
            fitted["temperature"] = fit_temperature(distjudge.judge_items(judge, held)[0], counts_of(held))
            q = (q.log() / fitted["temperature"]).softmax(1)
        rows = [{"id": item.id, "predicted": row} for item, row in zip(test, q.tolist(), strict=True)]
        distjudge.write_lines(folder / "predictions.jsonl", map(json.dumps, rows))
        about = {"method": cell.method, "settings": self.folder(cell)[1], "items": len(items), "mean": mean}
        about |= {"train_seconds": train_seconds(began, ends), "seconds": time.perf_counter() - began}
        about |= {"device": str(judge.device), "versions": distjudge.versions()} | fitted
        distjudge.write_json(folder / "cell.json", about)  # last: a folder with it is finished
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def train_seconds(began: float, ends: dict[int, float]) -> float | None:
    """Seconds of training, from when each step ended. The first, which warms up, counts like the others.

    None without steps: an untrained model, or a run that was stopped after its last one.
    """
    if len(ends) < 2:
        return ends[max(ends)] - began if ends else None
    first, last = min(ends), max(ends)
    return (ends[last] - ends[first]) / (last - first) * last


def fit_temperature(q: torch.Tensor, counts: torch.Tensor) -> float:
    """The T, 1/20 to 20, for which softmax(log q / T) is nearest to the votes in KL. q, counts: (N, C)."""
    logq, p = q.double().log(), counts / counts.sum(1, keepdim=True)
    cost = lambda log_t: kl_loss((logq / math.exp(log_t)).log_softmax(1), p).mean().item()  # noqa: E731
    return math.exp(scipy.optimize.minimize_scalar(cost, bounds=(-3.0, 3.0)).x)


# --- models that are not trained ---
@torch.no_grad()
def read_hidden(judge: Judge, encoded: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities (M, C) of the labels and the hidden states (M, H) they are read from, in one pass."""
    states: list[torch.Tensor] = []
    keep = lambda decoder, inputs, output: states.append(output.last_hidden_state)  # noqa: E731
    hook, found = judge.model.get_decoder().register_forward_hook(keep), {}
    judge.model.eval()
    for members in judge.plan(encoded):
        batch = judge.batch([encoded[i] for i in members])
        logq = distjudge.label_logprobs(judge.model, batch, judge.tokens)[0]
        row, place = batch["answer_at"][batch["reads"][:: len(judge.tokens.sequences), 0]].T
        pairs = zip(logq.double().cpu(), states.pop()[row, place].double().cpu(), strict=True)
        found |= dict(zip(members, pairs, strict=True))
    hook.remove()
    logq, hidden = zip(*(found[i] for i in range(len(encoded))), strict=True)
    return torch.stack(logq), torch.stack(hidden)


def fit_readout(judge: Judge, items: list[Item], test: list[Item], run: Config, what: str) -> tuple:
    """Test items' probabilities (N, C) and a report of the fit to the training votes; the model is frozen.

    "calibration": a temperature and a bias a label. "label rows": the rows of the output layer, too, by a
    regression of vote shares on the hidden state before the answer, with a ridge, penalty / (2 N), toward the
    calibrated rows. It takes the one of PENALTIES by which rows fitted to four fifths of the items come
    nearest to the votes of the rest. Raises InputError then for labels that are read as whole words.
    """
    if judge.tokens.whole and what == "label rows":
        raise InputError("methods: frozen needs labels that differ in their first token; leave it out")
    began = time.perf_counter()
    parts = [distjudge.training_rows(judge, own)[:2] for own in distjudge.split_items(items, 0.2, run.seed)]
    counts, first = torch.cat([own for _, own in parts]).double(), len(parts[0][1])
    p, (logq, hidden) = counts / counts.sum(1, keepdim=True), read_hidden(judge, parts[0][0] + parts[1][0])
    read = time.perf_counter()
    (temperature, bias), middle, scale = fit_calibration(logq, counts), hidden.mean(0), hidden.std()
    inputs = lambda hidden: F.pad((hidden - middle) / scale, (0, 1), value=1.0)  # noqa: E731
    said = lambda logq, x, rows: (logq / temperature + bias + x @ rows).log_softmax(1)  # noqa: E731
    x, penalty = inputs(hidden), None
    rows = torch.zeros(x.shape[1], p.shape[1], dtype=x.dtype)  # what is added to the calibrated ones

    def fit(n: int, penalty: float) -> torch.Tensor:
        """Those of the first n items."""
        own = rows.clone().requires_grad_()
        solver = torch.optim.LBFGS([own], max_iter=500, line_search_fn="strong_wolfe")

        def cost() -> torch.Tensor:
            solver.zero_grad()
            value = kl_loss(said(logq[:n], x[:n], own), p[:n]).mean() + penalty / (2 * n) * (own**2).sum()
            value.backward()
            return value

        solver.step(cost)
        return own.detach()

    if what == "label rows":
        held = lambda penalty: said(logq[first:], x[first:], fit(first, penalty))  # noqa: E731
        penalty = min(PENALTIES, key=lambda one: kl_loss(held(one), p[first:]).mean().item())
        rows = fit(len(x), penalty)
    done = time.perf_counter()
    logq, hidden = read_hidden(judge, judge.encode([prompt for item in test for prompt in item.prompts]))
    q = distjudge.average_items(test, said(logq, inputs(hidden), rows))[0]
    seconds = {"train_seconds": done - began, "feature_seconds": read - began, "fit_seconds": done - read}
    return q, seconds | {"temperature": temperature, "bias": bias.tolist(), "penalty": penalty}


# --- tables ---
class Table:
    """The numbers of a study: rows of figures.COLUMNS."""

    def __init__(self, shop: Workshop):
        self.shop, self.config, self.test, self.rows = shop, shop.config, shop.test, []
        self.groups, self.draws = [item.group for item in shop.test], shop.config.draws
        self.sizes: dict[str, int] = {}  # items by human entropy
        first = Path(shop.config.train[0])
        name = first.name.split(".jsonl")[0]
        self.data = first.parent.name if name in ("train", "test", "valid") else name

    def add(self, method: str, metric: str, value: float | None, seed: Any = "all", **more: Any) -> None:
        row = {"study": self.config.study, "data": self.data, "method": method, "metric": metric}
        row |= {"value": value, "seed": str(seed)} | more
        self.rows.append(row | {"votes": row.get("votes") or None})

    def compare(self, found: dict[str, torch.Tensor], **at: Any) -> None:
        """Rows for methods with predictions (S, N, C) by S seeds: every metric, and the gap to the first."""
        for method, q in found.items():
            worth = distjudge.survey_equivalence(q, self.test, self.draws)
            if worth["mean"] is not None:
                self.add(method, "people", worth["mean"], low=worth["low"], high=worth["high"], **at)
        scores = {m: [distjudge.item_scores(one, self.test) for one in q] for m, q in found.items()}
        for metric in next(iter(scores.values()))[0]:
            own = {m: torch.stack([run[metric] for run in runs]) for m, runs in scores.items()}
            self.summarize(metric, own, self.groups, **at)

    def summarize(self, metric: str, scores: dict[str, torch.Tensor], groups: list, **at: Any) -> None:
        """Rows for one metric of methods with scores (S, N): a value for each seed, and the mean."""
        first = next(iter(scores))
        for method, own in scores.items():
            means = own.mean(1) if own.dim() == 2 else distjudge.correlation(own.mean(1))
            values = pd.Series(means.tolist())
            for seed, value in enumerate(values, self.config.seed):
                self.add(method, metric, value, seed, **at)
            found = bootstrap(own, groups=groups, draws=self.draws)
            more = {"std": values.std(), "low": found["low"], "high": found["high"]} | at
            if method != first:  # paired by seed and item; what has no seed meets each
                pairs = torch.broadcast_tensors(own, scores[first])
                gap = bootstrap(*pairs, groups=groups, draws=self.draws)
                more |= {"against": first, "difference": gap["mean"], "p": gap["p"]}
                more |= {"difference_low": gap["low"], "difference_high": gap["high"]}
            self.add(method, metric, found["mean"], **more)

    def references(self, key: Any, **at: Any) -> dict[str, torch.Tensor]:
        """Adds the noise floor's rows; returns the rival without a model, the mean of the training votes.

        key: of collect(), a judge trained on these votes; the rival has its seeds.
        """
        if (truth := distjudge.truths_of(self.test)) is not None:
            for metric, score in distjudge.item_scores(truth, self.test).items():
                own = {"noise floor (the truth)": score[None]}
                self.summarize(metric, own, self.groups, **at)
        elif (floor := distjudge.noise_floor(self.test)) is not None:
            self.add("noise floor (estimated)", "kl", floor, **at)
        return {"marginal": self.shop.means[key][:, None].expand(-1, len(self.test), -1)}

    def bins(self, found: dict[str, torch.Tensor], **at: Any) -> None:
        """KL by human entropy in quarters of log C, of the truth where known, else of the votes."""
        metric, p = "kl_truth", distjudge.truths_of(self.test)
        if p is None:
            metric, p = "kl", distjudge.shares_of(self.test)
        share = distjudge.entropy(p) / math.log(p.shape[1])
        quarter = torch.bucketize(share - 1e-9, torch.tensor([0.25, 0.5, 0.75], dtype=share.dtype))
        for n in range(4):
            here = (quarter == n).nonzero()[:, 0].tolist()
            groups, at["entropy"] = [self.groups[i] for i in here], f"{n / 4:g}-{(n + 1) / 4:g}"
            if len(here) >= 10:
                self.sizes[at["entropy"]] = len(here)
                kl = {m: kl_divergence(p, q)[:, here] for m, q in found.items()}
                self.summarize(metric, kl, groups, **at)

    def frame(self) -> pd.DataFrame:
        numbers = dict.fromkeys(set(figures.COLUMNS) - set(figures.WORDS), float)
        return pd.DataFrame(self.rows, columns=figures.COLUMNS).astype(numbers)

    def whole(self, *metrics: str, binned: bool = False) -> pd.DataFrame:
        """The rows over all seeds, of these metrics: over all items, or those by human entropy."""
        rows = self.frame()
        rows = rows[(rows["seed"] == "all") & (rows["entropy"].notna() == binned)]
        return rows[rows["metric"].isin(metrics)]

    def write(self, lines: list[str]) -> None:
        """Writes the .csv, .md and .png of the study, and prints the .md."""
        config, out, name = self.config, self.shop.out, str(self.shop.out / self.config.study)
        text = self.frame().to_csv(index=False, float_format="%.6g", lineterminator="\n")
        distjudge.write_lines(Path(f"{name}.csv"), [text.rstrip("\n")])
        told = {"study", "train", "test", "out"}
        changed = {k: v for k, v in vars(config).items() if k not in told and v != getattr(StudyConfig, k)}
        distjudge.write_json(Path(f"{name}.json"), dataclasses.asdict(config))
        most = " to ".join(map(str, sorted({min(self.shop.sizes), max(self.shop.sizes)})))
        foot = "Stars: the difference from the first method has a two-sided p under 0.05. "
        foot += f"{most} training and {len(self.test)} test items of {self.data}; {config.seeds} seeds from "
        foot += f"{config.seed}; not the defaults: {changed or 'none'}."
        cells = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(out.glob("cells/*/cell.json"))]
        minutes = sum(cell["seconds"] for cell in cells) / 60
        made = {", ".join([c["device"], *(f"{k} {v}" for k, v in c["versions"].items())]) for c in cells}
        foot += f" {minutes:.0f} minutes for the {len(cells)} cells of the folder, on "
        foot += "; and on ".join(sorted(made)) + "."
        distjudge.write_lines(Path(f"{name}.md"), [*lines, "", foot])
        print("\n".join([*lines, "", foot]))
        print(f"\nwrote {name}.csv, {name}.md, {figures.draw(f'{name}.csv')}")


def shown(row: dict[str, Any]) -> str:
    """A value with its interval, as far as there are any."""
    metric = row.get("metric")
    ends = (distjudge.within(metric, row[end]) for end in ("low", "high"))
    return interval(row["value"], *ends, ".1f" if metric == "people" else ".3f")


def shown_gap(row: dict[str, Any]) -> str:
    low, high = row["difference_low"], row["difference_high"]
    return f"{row['difference']:+.4f} [{low:+.4f}, {high:+.4f}], p {row['p']:.4f}"


def markdown(rows: pd.DataFrame, keys: list[str], across: str = "metric", text: Any = shown) -> list[str]:
    """A Markdown table: a line for each value of `keys` (if they have any), a column for each of `across`."""
    keys = [key for key in keys if rows[key].notna().any()]
    rows = rows.assign(star=rows["p"] < 0.05)
    plain = lambda v: v if isinstance(v, str) else "" if pd.isna(v) else f"{v:g}"  # noqa: E731
    columns = dict.fromkeys(map(plain, rows[across]))
    columns = [name for name in METRICS if name in columns] or columns
    head = [*keys, *(METRICS.get(column, column) for column in columns)]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for place, own in rows.groupby(keys, sort=False, dropna=False):
        cells = {plain(row[across]): text(row) + "*" * row["star"] for row in own.to_dict("records")}
        lines.append(f"| {' | '.join([*map(plain, place), *(cells.get(c, '–') for c in columns)])} |")
    return lines


def differences(table: Table) -> list[str]:
    """The table of what separates each method from the first."""
    rows = table.whole(figures.measure(table.frame()))
    rows = rows[rows["difference_low"].notna() & rows["epochs"].isna()]
    if rows.empty:  # one method, or items of one group
        return []
    about = f"Differences from {table.shop.methods[0]}, nats; negative is better:"
    return ["", about, "", *markdown(rows, ["votes", "method"], text=shown_gap)]


# --- studies ---
def compare_methods(shop: Workshop, ways: list[dict[str, Any]] | None = None, about: tuple = ()) -> None:
    """main, ablation, ood, methods: methods beside each other, by votes or other settings of a Cell."""
    table, ways = Table(shop), ways or [{"votes": n} for n in shop.votes]
    found = shop.collect({(k, m): way | {"method": m} for k, way in enumerate(ways) for m in shop.methods})
    for k, way in enumerate(ways):
        qs = {m: found[k, m] for m in shop.methods} | table.references((k, shop.methods[0]), **way)
        table.compare(qs, **way)
        table.bins(qs, **way)
    rows, binned = table.whole(*METRICS), table.whole(*METRICS, binned=True)
    keys = ["items", "votes", "method"]
    lines = [*about, *markdown(rows, keys), *differences(table)]
    if len(binned):
        what, sizes = METRICS[binned["metric"].iloc[0]], " + ".join(map(str, table.sizes.values()))
        about = f"{what} by the entropy of people's answers over log C, the most disputed last: {sizes} items"
        lines += ["", f"{about}, no column where they are fewer than 10"]
        lines += ["", *markdown(binned, keys, "entropy")]
        if METRICS["kl"] == what:
            biased = "sure judges look better in the first columns than they are, and worse in the last"
            lines += ["", f"The votes that choose a column also score it: {biased}."]
    if "noise floor (estimated)" in set(rows["method"]):
        lines += ["", "KL to votes less its noise floor estimates KL to the unknown truth."]
    table.write(lines)


def budget(shop: Workshop) -> None:
    most = min(shop.config.train_items or math.inf, len(shop.train))
    ways = [{"votes": n, "items": max(most // n, 1)} for n in (1, 3, 5)]
    for way in ways:
        if (there := len(shop.items(Cell("", shop.config.seed, **way)))) < way["items"]:
            few = f"{there} items have {way['votes']} votes, and {way['items']} are needed"
            raise InputError(f"budget: {few}: set --train_items to {there * way['votes']} or less")
    compare_methods(shop, ways, (f"{most} annotations spent three ways, equal epochs.", ""))


def sweep(shop: Workshop) -> None:
    config, table, n, method = shop.config, Table(shop), shop.votes[0], shop.methods[0]
    grid = {(a, e): {"alpha": a, "eps": e if a else 0.0} for e in config.epsilons for a in config.alphas}
    found = shop.collect({at: cell | {"method": method, "votes": n} for at, cell in grid.items()})
    table.compare(table.references(next(iter(grid)), votes=n))
    for (alpha, eps), q in found.items():
        table.compare({method: q}, alpha=alpha, eps=eps)
    table.write(markdown(table.whole("kl", "kl_truth", "accuracy"), ["eps", "alpha", "method"]))


def perturb(p: torch.Tensor, delta: float, draw: torch.Generator) -> torch.Tensor:
    """Moves each row of p by delta in l2 toward a random point of the simplex at least so far away."""
    if delta and (1 - 2 * p.min(1).values + (p**2).sum(1)).sqrt().min() <= delta:  # of the furthest corner
        raise InputError(f"deltas: nothing is {delta:g} away from some item's votes; name smaller ones")
    target, left = p.clone(), torch.full((len(p),), delta > 0)
    while left.any():
        z = -torch.rand(p.shape, generator=draw, dtype=p.dtype).clamp_min(1e-12).log()
        target[left] = (z / z.sum(1, keepdim=True))[left]
        left = (target - p).norm(dim=1) < delta
    gap = target - p
    return p + delta * gap / gap.norm(dim=1, keepdim=True).clamp_min(1e-12)


def robustness(shop: Workshop) -> None:
    config, table, n = shop.config, Table(shop), shop.votes[0]
    found = shop.collect({m: {"method": m, "votes": n} for m in shop.methods})
    found |= table.references(shop.methods[0], votes=n)
    truth, p = distjudge.truths_of(shop.test), distjudge.shares_of(shop.test)
    if truth is not None:
        found["noise floor (the truth)"] = truth[None]
    for delta in config.deltas:
        draw = torch.Generator().manual_seed(config.seed)
        moved = [perturb(p, delta, draw) for _ in range(MOVES if delta else 1)]
        scores = {m: sum(kl_divergence(t, q) for t in moved) / len(moved) for m, q in found.items()}
        table.summarize("kl", scores, table.groups, delta=delta)
    about = f"KL to test targets moved by delta, {MOVES} random moves an item."
    rows = table.whole("kl").dropna(subset="delta")
    table.write([about, "", *markdown(rows, ["delta", "method"])])


def length(shop: Workshop) -> None:
    """Each method at each number of epochs, and at that chosen for half the items by the others' votes."""
    config, table, lengths, picked = shop.config, Table(shop), shop.config.lengths, []
    runs = [(n, epochs, m) for n in shop.votes for epochs in lengths for m in shop.methods]
    found = shop.collect({(n, e, m): {"method": m, "votes": n, "epochs": e} for n, e, m in runs})
    half = {item.id for item in distjudge.split_items(shop.test, 0.5, config.seed)[0]}  # by group
    here = torch.tensor([item.id in half for item in shop.test])
    p = distjudge.shares_of(shop.test)
    for n in shop.votes:
        for epochs in lengths:
            table.compare({m: found[n, epochs, m] for m in shop.methods}, epochs=epochs, votes=n)
        chosen = {}
        for m in shop.methods:
            q, seeds = torch.stack([found[n, epochs, m] for epochs in lengths]), [*range(config.seeds)]
            kl = kl_divergence(p, q)  # by epochs, seed and item
            mine, other = (kl[:, :, part].mean(2).argmin(0).tolist() for part in (~here, here))
            chosen[m] = torch.where(here[:, None], q[mine, seeds], q[other, seeds])
            best = [lengths[k] for k in mine + other]
            times = ", ".join(f"{e:g} ({best.count(e)} x)" for e in lengths if e in best)
            picked.append(f"- {n or 'all'} votes, {m}: {times}")
        table.compare(chosen | table.references((n, lengths[0], shop.methods[0]), votes=n), votes=n)
    metric = figures.measure(table.frame())
    rows = table.whole(metric)
    rows = rows.assign(epochs=[f"{e:g}" if e == e else "chosen" for e in rows["epochs"]])
    lines = [
        f"{METRICS[metric]}, nats, by epochs. *chosen*: for each half of the test items the epochs at which",
        "the judge is nearest to the votes of the other half.",
        *["", *markdown(rows, ["votes", "method"], "epochs"), "", "Epochs chosen:", "", *picked],
        *differences(table),
    ]
    table.write(lines)


def cost(shop: Workshop) -> None:
    """Cells of their own. Methods take turns, so that a busy minute is shared; the first warms up."""
    config, table = shop.config, Table(shop)
    some, by_item = (config.seed, shop.votes[0], config.train_items), {}
    if idle := [m for m in shop.methods if METHODS[m].get("untrained")]:
        raise InputError(f"methods: cost times training, and {idle[0]} has none")
    turns = range(1, config.seeds + 2)
    found = shop.made([Cell(m, *some, repeat=turn) for turn in turns for m in shop.methods])
    for k, m in enumerate(shop.methods):
        warm = found[k :: len(shop.methods)][1:]
        own = [cell["train_seconds"] / cell["settings"]["epochs"] for cell in warm]
        for turn, seconds in enumerate(own):
            table.add(m, "seconds_per_epoch", seconds, turn)
        median, items = statistics.median(own), warm[0]["items"]  # a method may hold some back
        by_item[m] = median / items
        table.add(m, "seconds_per_epoch", median, low=min(own), high=max(own))
        table.add(m, "items_per_second", items / median)
        table.add(m, "times_the_first", by_item[m] / by_item[shop.methods[0]])
    rows = table.whole("seconds_per_epoch", "items_per_second", "times_the_first")
    table.write(["Median, and from least to most.", "", *markdown(rows, ["method"])])


STUDIES = dict.fromkeys(("main", "ablation", "ood", "methods"), compare_methods)
STUDIES |= {"sweep": sweep, "robustness": robustness, "budget": budget, "length": length, "cost": cost}


def main(config: StudyConfig) -> None:
    config.check()
    if config.teacher:
        raise InputError("teacher: each row has its own; --methods names rows")
    if (config.alpha, config.eps) != (StudyConfig.alpha, StudyConfig.eps):
        raise InputError("alpha, eps: each row has its own; sweep takes --alphas and --epsilons")
    distjudge.check_out(config.out, "cells", "base")
    shop = Workshop(config)
    (shop.out / "cells").mkdir(parents=True, exist_ok=True)
    STUDIES[config.study](shop)


if __name__ == "__main__":
    distjudge.cli(main, StudyConfig)
