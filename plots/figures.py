"""Draw predicted against human distributions from a run folder.

    python plots/figures.py runs/tiny/full-0                    # the first three, into its plots/
    python plots/figures.py runs/first --out paper --show kl    # one of them, somewhere else

    bars           votes and predictions of items: most agreed on, most disputed, worst predicted
    calibration    predicted probability of a label against the share of votes it got
    kl             histogram of KL(votes || judge) over items, with the noise floor and the marginal's mean
    simplex        with three labels: votes and predictions in a triangle
    curves         training loss by step, and KL on the test items where --eval_every was set

Each is written as .png and .svg.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib.pyplot as plt
import pandas
import torch
import tyro

import distjudge
from distjudge import InputError, short

HUMAN, MODEL, TRUTH, NEUTRAL = "#4878a8", "#e08214", "#222222", "#777777"
# Okabe and Ito's colours, which the colour-blind tell apart, with a marker and a line style beside each
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31"]
MARKERS = "osD^vPX*"
LINES = ["-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (7, 2))]
plt.switch_backend("Agg")  # files only, no windows
plt.rc("font", size=9)
plt.rc("axes", titlesize=9, grid=True, axisbelow=True, prop_cycle=plt.cycler(color=COLOURS, linestyle=LINES))
plt.rc("axes.spines", top=False, right=False)
plt.rc("grid", color="#e4e4e4", linewidth=0.6)
plt.rc("figure", dpi=150, facecolor="white")  # an opaque ground, for dark pages
plt.rc("figure.constrained_layout", use=True)
plt.rc("savefig", bbox="tight")
plt.rc("svg", hashsalt="distjudge")  # the same file each time


@dataclasses.dataclass
class Run:
    """A run folder. votes, predictions q and truth: (N, C) float64. rows: the lines of predictions.jsonl."""

    labels: list[str]
    ids: list[str]
    votes: torch.Tensor
    q: torch.Tensor
    truth: torch.Tensor | None
    metrics: dict
    log: list[dict] = dataclasses.field(default_factory=list)
    rows: list[dict] = dataclasses.field(default_factory=list)

    @property
    def p(self) -> torch.Tensor:
        return self.votes / self.votes.sum(1, keepdim=True)

    @property
    def kl(self) -> torch.Tensor:
        return distjudge.kl_divergence(self.p, self.q)


def read_lines(path: Path) -> Iterator[dict]:
    """The rows of a .jsonl file. Raises InputError naming file and line."""
    for where, row, problem in distjudge.read_rows(path):
        if problem:
            raise InputError(f"{where}: {problem}")
        yield row


def load_run(folder: str | Path) -> Run:
    """Reads predictions.jsonl, metrics.json and log.jsonl, if it is there. Raises InputError."""
    path, log = Path(folder) / "predictions.jsonl", Path(folder) / "log.jsonl"
    try:
        rows = list(read_lines(path))
        metrics = json.loads((Path(folder) / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # an InputError is a ValueError
        raise InputError(f"{folder}: not a run folder: {error}") from None
    if not rows:
        raise InputError(f"{path}: no predictions")

    def table(field: str) -> torch.Tensor:
        return torch.tensor([[row[field][label] for label in labels] for row in rows], dtype=torch.float64)

    try:
        labels, ids = list(rows[0]["predicted"]), [row["id"] for row in rows]
        votes, q = table("counts"), table("predicted")
        truth = table("truth") if all("truth" in row for row in rows) else None
    except KeyError as error:
        raise InputError(f"{path}: a line lacks {error}") from None
    return Run(labels, ids, votes, q, truth, metrics, list(read_lines(log)) if log.exists() else [], rows)


def name_labels(ax: plt.Axes, labels: list[str]) -> None:
    """Labels under bars at 0, 1, 2, ..., turned where they are long."""
    turned = {"rotation": 25, "ha": "right", "rotation_mode": "anchor"} if max(map(len, labels)) > 4 else {}
    ax.set_xticks(range(len(labels)), [short(label, 14) for label in labels], **turned)
    ax.grid(visible=False, axis="x")


def draw_bars(run: Run, each: int = 4) -> plt.Figure:
    """Small bar charts of items in rows: the least and the most entropy of votes, and the largest KL."""
    entropy, each = distjudge.entropy(run.p), min(each, len(run.ids))
    kinds = {"most agreed on": entropy, "most disputed": -entropy, "worst predicted": -run.kl}
    figure, axes = plt.subplots(3, each, figsize=(2.3 * each, 5.6), sharey=True, squeeze=False)
    at = torch.arange(len(run.labels))
    for row, (kind, value) in zip(axes, kinds.items(), strict=True):
        for ax, i in zip(row, value.argsort(stable=True)[:each].tolist(), strict=True):
            ax.bar(at - 0.2, run.p[i], 0.4, color=HUMAN, label="votes")
            ax.bar(at + 0.2, run.q[i], 0.4, color=MODEL, label="judge")
            if run.truth is not None:
                ax.plot(at, run.truth[i], "o", color=TRUTH, markersize=3, label="truth")
            name_labels(ax, run.labels)
            title = f"{short(run.ids[i], 22)}\nKL {run.kl[i]:.2f}, {run.votes[i].sum():g} votes"
            ax.set_title(title, fontsize=8)
            ax.set_ylim(0, 1.02)
        row[0].set_ylabel(f"{kind}\nprobability")
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper right", ncols=len(names), frameon=False)
    return figure


def draw_calibration(run: Run, bins: int = 10) -> plt.Figure:
    """Mean share of votes against mean predicted probability, all items and labels, in bins of equal width.

    Bars are 95 % intervals of the mean (1.96 standard errors); a bin needs 5 (item, label) pairs to be shown.
    """
    pairs = pandas.DataFrame({"q": run.q.flatten(), "p": run.p.flatten()})
    by_bin = pairs.groupby((pairs.q * bins).astype(int).clip(upper=bins - 1))
    points = by_bin.agg(x=("q", "mean"), y=("p", "mean"), error=("p", "sem"), n=("p", "size")).query("n >= 5")
    figure, ax = plt.subplots(figsize=(4.2, 4.2))
    ax.plot([0, 1], [0, 1], color=NEUTRAL, linewidth=1, linestyle="--", label="calibrated")
    label = "judge, 95 % interval"
    ax.errorbar(points.x, points.y, 1.96 * points.error, fmt="o-", color=MODEL, markersize=4, label=label)
    for x, y, n in zip(points.x, points.y, points.n, strict=True):
        ax.annotate(n, (x, y), (6, -9), textcoords="offset points", fontsize=7, color=NEUTRAL)
    ax.set(xlabel="predicted probability of a label", ylabel="share of votes the label got")
    ax.set(xlim=(0, 1), ylim=(0, 1))
    ax.legend(frameon=False, loc="upper left")
    return figure


def draw_kl(run: Run) -> plt.Figure:
    """Histogram of the items' KL(votes || judge), nats, with three means: judge, noise floor, marginal."""
    figure, ax = plt.subplots(figsize=(6, 3.4))
    ax.hist(run.kl.numpy(), bins=40, color=MODEL, alpha=0.55)
    floor, marginal = run.metrics.get("kl_noise_floor"), run.metrics.get("kl_marginal")
    means = [("judge", run.kl.mean(), MODEL, "-"), ("noise floor", floor, TRUTH, ":")]
    for name, mean, colour, style in [*means, ("training marginal", marginal, HUMAN, "--")]:
        if mean is not None:
            ax.axvline(mean, color=colour, linestyle=style, linewidth=1.8, label=f"{name}: mean {mean:.3f}")
    ax.set(xlabel="KL(votes || judge) of an item, nats", ylabel="items")
    ax.legend(frameon=False)
    return figure


def draw_simplex(run: Run) -> plt.Figure:
    """Three labels: each item's votes and prediction as points of a triangle, darker where people disagree.

    Raises InputError for another number of labels.
    """
    if len(run.labels) != 3:
        raise InputError(f"simplex: a triangle takes three labels, not {len(run.labels)}")
    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(3) / 2]], dtype=torch.float64)
    disputed = distjudge.entropy(run.p) / math.log(3)
    shown = {"votes": run.p, "judge": run.q} | ({"truth": run.truth} if run.truth is not None else {})
    figure, axes = plt.subplots(1, len(shown), figsize=(3.4 * len(shown), 3.3))
    noise = 0.012 * torch.randn(len(run.p), 2, generator=torch.Generator().manual_seed(0)).double()
    for ax, (name, points) in zip(axes, shown.items(), strict=True):
        at = points @ corners + (noise if name == "votes" else 0)  # panels of five have few possible shares
        ax.fill(*corners.T, facecolor="none", edgecolor=NEUTRAL, linewidth=1)
        dots = ax.scatter(*at.T, c=disputed, cmap="cividis_r", vmin=0, vmax=1, s=9, alpha=0.75, linewidths=0)
        for corner, label, offset in zip(corners, run.labels, ((-6, -13), (6, -13), (0, 8)), strict=True):
            ax.annotate(short(label, 16), corner, offset, textcoords="offset points", ha="center", fontsize=8)
        ax.set_title(name, pad=14)
        ax.axis("off")
        ax.set(aspect="equal", xlim=(-0.05, 1.05), ylim=(-0.05, 0.91))
    figure.colorbar(dots, ax=axes, label="entropy of the votes / log 3", shrink=0.7)
    return figure


def draw_curves(run: Run, most: int = 100) -> plt.Figure:
    """Training loss and, with --eval_every, KL on the test items, nats by step.

    Of a long run at most `most` means of equally many steps are drawn. Raises InputError without a log.
    """
    if not any("loss" in row for row in run.log):
        raise InputError("curves: no log.jsonl with losses in the run folder")
    names = {"loss": "training loss", "eval_kl": "KL to test votes", "eval_kl_truth": "KL to test truth"}
    figure, ax = plt.subplots(figsize=(5, 3.2))
    for key, name in names.items():
        points = torch.tensor([(row["step"], row[key]) for row in run.log if key in row], dtype=torch.float64)
        if len(points) > most:
            block = math.ceil(len(points) / most)
            points = torch.stack([part.mean(0) for part in points.split(block)])
            name += f", means of {block} steps"
        if len(points):
            ax.plot(*points.T, marker="o" if len(points) < 30 else None, markersize=4, label=name)
    floor = run.metrics.get("kl_noise_floor")
    if floor is not None and any("eval_kl" in row for row in run.log):  # no floor of a mixed training loss
        ax.axhline(floor, color=TRUTH, linestyle=":", linewidth=1, label="noise floor of the votes")
    ax.set(xlabel="step", ylabel="nats")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend(frameon=False)
    return figure


USUAL = {"bars": draw_bars, "calibration": draw_calibration, "kl": draw_kl}
FIGURES = USUAL | {"simplex": draw_simplex, "curves": draw_curves}


def save(figure: plt.Figure, path: Path) -> list[Path]:
    """Writes path.png and path.svg (the same bytes each time) and closes the figure."""
    paths = [path.with_suffix(".png"), path.with_suffix(".svg")]
    figure.savefig(paths[0])
    figure.savefig(paths[1], metadata={"Date": None})
    plt.close(figure)
    return paths


def draw_all(folder: str | Path, out: str | Path = "", names: Iterable[str] = USUAL) -> list[Path]:
    """Draws the named figures of a run folder into `out`, by default its plots/; returns the files' paths."""
    run, out = load_run(folder), Path(out or Path(folder) / "plots")
    out.mkdir(parents=True, exist_ok=True)
    return [path for name in names for path in save(FIGURES[name](run), out / name)]


@dataclasses.dataclass
class FiguresConfig:
    run: tyro.conf.Positional[str]
    """The run folder."""
    out: str = ""
    """Where the figures go. Default: plots/ in the run folder."""
    show: tuple[Literal["bars", "calibration", "kl", "simplex", "curves"], ...] = tuple(USUAL)
    """Which figures."""


def main(config: FiguresConfig) -> None:
    for path in draw_all(config.run, config.out, config.show):
        print(path)


if __name__ == "__main__":
    distjudge.cli(main, FiguresConfig)
