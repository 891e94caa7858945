"""Draw predicted against human distributions from a run folder.

    python plots/figures.py runs/tiny/full-0                      # all three figures into runs/tiny/full-0/plots
    python plots/figures.py runs/first --out paper --show kl      # one of them, somewhere else

    bars.png          votes and predictions of items: most agreed on, most disputed, worst predicted
    calibration.png   predicted probability of a label against the share of votes it got
    kl.png            histogram of KL(human || model) over items, with the mean, the noise floor and the marginal's mean
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
plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 150, "savefig.bbox": "tight"})


@dataclasses.dataclass
class Run:
    """What the figures need of a run folder: labels (C), votes p and predictions q (N, C) float64, ids, counts, metrics."""

    labels: list[str]
    ids: list[str]
    votes: torch.Tensor
    q: torch.Tensor
    truth: torch.Tensor | None
    metrics: dict

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
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: not a run folder: {error}") from None
    if not rows:
        raise InputError(f"{path}: no predictions")
    labels = list(rows[0]["predicted"])
    try:
        table = lambda field: torch.tensor([[r[field][label] for label in labels] for r in rows], dtype=torch.float64)  # noqa: E731
        truth = table("truth") if "truth" in rows[0] else None
        return Run(labels, [r["id"] for r in rows], table("counts"), table("predicted"), truth, metrics)
    except KeyError as error:
        raise InputError(f"{path}: a line lacks {error}") from None


def draw_bars(run: Run, each: int = 4) -> plt.Figure:
    """Rows of small bar charts: the items with the least and the most entropy of votes, and those with the largest KL."""
    entropy = -torch.xlogy(run.p, run.p).sum(1)
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
            ax.set_xticks(at, [distjudge._short(label, 12) for label in run.labels], rotation=0 if max(map(len, run.labels)) < 5 else 20)
            ax.set_title(f"{distjudge._short(run.ids[i], 22)}\nKL {run.kl[i]:.2f}, {run.votes[i].sum():g} votes", fontsize=8)
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


FIGURES = {"bars": draw_bars, "calibration": draw_calibration, "kl": draw_kl}


def draw_all(folder: str | Path, out: str | Path | None = None, names: tuple[str, ...] = tuple(FIGURES)) -> list[Path]:
    """Draws the named figures of a run folder as PNG files into `out` (the run folder's plots/); returns their paths."""
    run, out = load_run(Path(folder)), Path(out or Path(folder) / "plots")
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for name in names:
        figure = FIGURES[name](run)
        paths.append(out / f"{name}.png")
        figure.savefig(paths[-1])
        plt.close(figure)
    return paths


@dataclasses.dataclass
class FiguresConfig:
    run: tyro.conf.Positional[str]
    """The run folder."""
    out: str | None = None
    """Where the figures go. Default: plots/ in the run folder."""
    show: tuple[Literal["bars", "calibration", "kl"], ...] = ("bars", "calibration", "kl")
    """Which figures."""


def main(config: FiguresConfig) -> None:
    for path in draw_all(config.run, config.out, config.show):
        print(path)


if __name__ == "__main__":
    distjudge.cli(main, FiguresConfig)
