"""Draw predicted against human distributions from a run folder.

    python plots/figures.py runs/tiny/full-0                      # the first three figures into runs/tiny/full-0/plots
    python plots/figures.py runs/first --out paper --show kl      # one of them, somewhere else

    bars.png          votes and predictions of items: most agreed on, most disputed, worst predicted
    calibration.png   predicted probability of a label against the share of votes it got
    kl.png            histogram of KL(human || model) over items, with the mean, the noise floor and the marginal's mean
    simplex.png       with three labels: votes and predictions in a triangle (--show simplex)
    curves.png        training loss by step, and KL on the test items where --eval_every was set (--show curves)

and the same as .svg.
"""
import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import tyro

import distjudge
from distjudge import InputError

HUMAN, MODEL, TRUTH, NEUTRAL = "#4878a8", "#e08214", "#222222", "#777777"
# an opaque white ground, for dark pages; Okabe and Ito's colours, which the colour-blind tell apart, and a marker or hatch beside each
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31"]
MARKERS, LINES = "osD^vPX*", ["-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (7, 2))]
plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 150, "savefig.bbox": "tight",
                     "figure.facecolor": "white", "axes.facecolor": "white", "savefig.facecolor": "white", "savefig.transparent": False,
                     "axes.grid": True, "grid.color": "#e4e4e4", "grid.linewidth": 0.6, "axes.axisbelow": True,
                     "svg.hashsalt": "distjudge"})


@dataclasses.dataclass
class Run:
    """What the figures need of a run folder: labels (C), votes p and predictions q (N, C) float64, ids, counts, metrics."""

    labels: list[str]
    ids: list[str]
    votes: torch.Tensor
    q: torch.Tensor
    truth: torch.Tensor | None
    metrics: dict
    log: list[dict] = dataclasses.field(default_factory=list)

    @property
    def p(self) -> torch.Tensor:
        return self.votes / self.votes.sum(1, keepdim=True)

    @property
    def kl(self) -> torch.Tensor:
        return distjudge.kl_divergence(self.p, self.q)


def load_run(folder: Path) -> Run:
    """Reads predictions.jsonl and metrics.json. Raises InputError naming file and line for a folder without them."""
    path = Path(folder) / "predictions.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        metrics = json.loads((Path(folder) / "metrics.json").read_text(encoding="utf-8"))
        path_log = Path(folder) / "log.jsonl"
        log = [json.loads(line) for line in path_log.read_text(encoding="utf-8").splitlines()] if path_log.exists() else []
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: not a run folder: {error}") from None
    if not rows:
        raise InputError(f"{path}: no predictions")
    labels = list(rows[0]["predicted"])
    try:
        table = lambda field: torch.tensor([[r[field][label] for label in labels] for r in rows], dtype=torch.float64)  # noqa: E731
        truth = table("truth") if "truth" in rows[0] else None
        return Run(labels, [r["id"] for r in rows], table("counts"), table("predicted"), truth, metrics, log)
    except KeyError as error:
        raise InputError(f"{path}: a line lacks {error}") from None


def draw_bars(run: Run, each: int = 4) -> plt.Figure:
    """Rows of small bar charts: the items with the least and the most entropy of votes, and those with the largest KL."""
    entropy = distjudge.entropy(run.p)
    kinds = {"most agreed on": entropy.argsort(stable=True), "most disputed": (-entropy).argsort(stable=True),
             "worst predicted": (-run.kl).argsort(stable=True)}
    each = min(each, len(run.ids))
    figure, axes = plt.subplots(3, each, figsize=(2.3 * each, 5.6), sharey=True, squeeze=False, layout="constrained")
    at = torch.arange(len(run.labels))
    for row, (kind, order) in zip(axes, kinds.items(), strict=True):
        for ax, i in zip(row, order[:each].tolist(), strict=True):
            ax.bar(at - 0.2, run.p[i], 0.4, color=HUMAN, label="votes")
            ax.bar(at + 0.2, run.q[i], 0.4, color=MODEL, label="judge")
            if run.truth is not None:
                ax.plot(at, run.truth[i], "o", color=TRUTH, markersize=3, label="truth")
            ax.set_xticks(at, [distjudge.short(label, 12) for label in run.labels], rotation=0 if max(map(len, run.labels)) < 5 else 20)
            ax.set_title(f"{distjudge.short(run.ids[i], 22)}\nKL {run.kl[i]:.2f}, {run.votes[i].sum():g} votes", fontsize=8)
            ax.set_ylim(0, 1.02)
        row[0].set_ylabel(f"{kind}\nprobability")
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper right", ncols=len(names), frameon=False)
    return figure


def draw_calibration(run: Run, bins: int = 10) -> plt.Figure:
    """Mean share of votes against mean predicted probability, over all items and labels, in bins of equal width.

    Bars are 95 % intervals of the mean (1.96 standard errors); a bin needs 5 (item, label) pairs to be shown.
    """
    q, p = run.q.flatten(), run.p.flatten()
    place = (q * bins).long().clamp_max(bins - 1)
    xs, ys, errors, sizes = [], [], [], []
    for b in range(bins):
        inside = place == b
        if inside.sum() >= 5:
            xs.append(q[inside].mean().item())
            ys.append(p[inside].mean().item())
            errors.append(1.96 * p[inside].std().item() / math.sqrt(int(inside.sum())))
            sizes.append(int(inside.sum()))
    figure, ax = plt.subplots(figsize=(4.2, 4.2), layout="constrained")
    ax.plot([0, 1], [0, 1], color=NEUTRAL, linewidth=1, linestyle="--", label="calibrated")
    ax.errorbar(xs, ys, yerr=errors, color=MODEL, marker="o", markersize=4, capsize=2, label="judge, 95 % interval")
    for x, y, n in zip(xs, ys, sizes, strict=True):
        ax.annotate(f"{n}", (x, y), textcoords="offset points", xytext=(6, -9), fontsize=7, color=NEUTRAL)
    ax.set(xlabel="predicted probability of a label", ylabel="share of votes the label got", xlim=(0, 1), ylim=(0, 1))
    ax.legend(frameon=False, loc="upper left")
    return figure


def draw_kl(run: Run) -> plt.Figure:
    """Histogram of KL(human || model) in nats, an item each, with three means: the judge, its floor, the marginal."""
    figure, ax = plt.subplots(figsize=(6, 3.4), layout="constrained")
    ax.hist(run.kl.numpy(), bins=40, color=MODEL, alpha=0.55)
    lines = [("judge", run.kl.mean().item(), MODEL, "-"), ("noise floor", run.metrics.get("kl_noise_floor"), TRUTH, ":"),
             ("training marginal", run.metrics.get("kl_marginal"), HUMAN, "--")]
    for name, value, colour, style in lines:
        if value is not None:
            ax.axvline(value, color=colour, linestyle=style, linewidth=1.8, label=f"{name}: mean {value:.3f}")
    ax.set(xlabel="KL(human || model) of an item, nats", ylabel="items")
    ax.legend(frameon=False)
    return figure


def draw_simplex(run: Run) -> plt.Figure:
    """Three labels: each item's votes and prediction as points of a triangle, side by side, darker where people disagree more.

    Raises InputError for another number of labels.
    """
    if len(run.labels) != 3:
        raise InputError(f"simplex: a triangle takes three labels, not {len(run.labels)}")
    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(3) / 2]], dtype=torch.float64)
    entropy = distjudge.entropy(run.p) / math.log(3)
    shown = {"votes": run.p, "judge": run.q} | ({"truth": run.truth} if run.truth is not None else {})
    figure, axes = plt.subplots(1, len(shown), figsize=(3.4 * len(shown), 3.3), squeeze=False, layout="constrained")
    jitter = 0.012 * torch.randn(len(run.p), 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for ax, (name, points) in zip(axes[0], shown.items(), strict=True):
        at = points @ corners + (jitter if name == "votes" else 0)  # panels of five have few possible shares
        ax.fill(*corners.T, facecolor="none", edgecolor=NEUTRAL, linewidth=1)
        dots = ax.scatter(*at.T, c=entropy, cmap="cividis_r", vmin=0, vmax=1, s=9, alpha=0.75, linewidths=0)
        for corner, label, where in zip(corners, run.labels, ((-6, -11), (6, -11), (0, 5)), strict=True):
            ax.annotate(distjudge.short(label, 16), corner, xytext=where, textcoords="offset points", ha="center", fontsize=8)
        ax.set_title(name, fontsize=9)
        ax.set_aspect("equal")
        ax.axis("off")
    figure.colorbar(dots, ax=axes, label="entropy of the votes / log 3", shrink=0.7)
    return figure


def draw_curves(run: Run) -> plt.Figure:
    """Training loss a logged step and, with --eval_every, KL on the test items, nats. Raises InputError for a run without a log."""
    if not any("loss" in row for row in run.log):
        raise InputError("curves: no log.jsonl with losses in the run folder")
    figure, ax = plt.subplots(figsize=(5, 3.2), layout="constrained")
    for i, (name, key) in enumerate({"training loss": "loss", "KL to test votes": "eval_kl", "KL to test truth": "eval_kl_truth"}.items()):
        points = [(row["step"], row[key]) for row in run.log if key in row]
        if points:
            ax.plot(*zip(*points, strict=True), color=COLOURS[i], linestyle=LINES[i], marker=MARKERS[i] if len(points) < 30 else None,
                    markersize=4, label=name)
    if run.metrics.get("kl_noise_floor") is not None:
        ax.axhline(run.metrics["kl_noise_floor"], color=TRUTH, linestyle=":", linewidth=1, label="noise floor of the votes")
    ax.set(xlabel="step", ylabel="nats")
    ax.legend(frameon=False)
    return figure


FIGURES = {"bars": draw_bars, "calibration": draw_calibration, "kl": draw_kl, "simplex": draw_simplex, "curves": draw_curves}
USUAL = ("bars", "calibration", "kl")


def save(figure: plt.Figure, path: Path) -> list[Path]:
    """Writes path.png and path.svg (the same bytes each time) and closes the figure."""
    paths = [path.with_suffix(".png"), path.with_suffix(".svg")]
    for target in paths:
        figure.savefig(target, metadata={"Date": None} if target.suffix == ".svg" else None)
    plt.close(figure)
    return paths


def draw_all(folder: str | Path, out: str | Path | None = None, names: tuple[str, ...] = USUAL) -> list[Path]:
    """Draws the named figures of a run folder as PNG and SVG files into `out` (the run folder's plots/); returns their paths."""
    run, out = load_run(Path(folder)), Path(out or Path(folder) / "plots")
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for name in names:
        paths += save(FIGURES[name](run), out / name)
    return paths


@dataclasses.dataclass
class FiguresConfig:
    run: tyro.conf.Positional[str]
    """The run folder."""
    out: str | None = None
    """Where the figures go. Default: plots/ in the run folder."""
    show: tuple[Literal["bars", "calibration", "kl", "simplex", "curves"], ...] = USUAL
    """Which figures."""


def main(config: FiguresConfig) -> None:
    for path in draw_all(config.run, config.out, config.show):
        print(path)


if __name__ == "__main__":
    distjudge.cli(main, FiguresConfig)
