"""Draw predicted against human distributions from run folders.

    python plots/figures.py runs/tiny/full-0                              # the first three, into its plots/
    python plots/figures.py runs/tiny/full-0 --show kl --format pdf --out paper
    python plots/figures.py runs/tiny/single_point-0 runs/tiny/full-0     # one figure that compares them

    bars           votes and predictions of items: most agreed on, most disputed, worst predicted
    calibration    predicted probability of a label against the share of votes it got
    kl             histogram of KL(votes || judge) over items, with the noise floor and the marginal's mean
    simplex        with three labels: votes and predictions in a triangle
    curves         training loss by step, and KL on the test items where --eval_every was set
    compare        of several run folders with the same test items: means of KL, and four items

Figures are .png files. Their titles name the judge and the data.
"""

import dataclasses
import functools
import math
import os
import re
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import distjudge
from distjudge import InputError, Item, short

import matplotlib.pyplot as plt
import pandas
import torch
import tyro

HUMAN, MODEL, TRUTH, NEUTRAL = "#4878a8", "#e08214", "#222222", "#777777"
# Okabe and Ito's colours, which the colour-blind tell apart, with a marker and a line style beside each
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31"]
MARKERS = "osD^vPX*"
LINES = ["-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (7, 2))]
plt.switch_backend("Agg")  # files only, no windows
plt.rc("font", size=9)
plt.rc("text", parse_math=False)  # a "$" in a text or label is a dollar
plt.rc("axes", titlesize=9, grid=True, axisbelow=True, prop_cycle=plt.cycler(color=COLOURS, linestyle=LINES))
plt.rc("axes.spines", top=False, right=False)
plt.rc("legend", frameon=False)
plt.rc("grid", color="#e4e4e4", linewidth=0.6)
plt.rc("figure", dpi=150, facecolor="white")  # an opaque ground, for dark pages
plt.rc("figure.constrained_layout", use=True)
plt.rc("savefig", bbox="tight")
plt.rc("svg", hashsalt="distjudge")  # the same file each time


@dataclasses.dataclass
class Run:
    """A run folder: items with their votes, the judge's q (N, C) float64; of files what is there.

    rows: the lines of predictions.jsonl. settings: config.json. name: that of the folder. p and truth are as
    q; kl: KL(p || q) of each item, nats. scores: distjudge.item_scores(), and what report.py adds.
    """

    items: list[Item]
    q: torch.Tensor
    metrics: dict = dataclasses.field(default_factory=dict)
    log: list[dict] = dataclasses.field(default_factory=list)
    rows: list[dict] = dataclasses.field(default_factory=list)
    settings: dict = dataclasses.field(default_factory=dict)
    name: str = ""
    scores: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.labels, self.p = distjudge.labels_of(self.items), distjudge.shares_of(self.items)
        self.truth, self.kl = distjudge.truths_of(self.items), distjudge.kl_divergence(self.p, self.q)

    @property
    def title(self) -> str:
        """Which judge on which data, for the title of a figure."""
        files = next((own for key in ("test", "files", "train") if (own := self.settings.get(key))), [])
        data = ", ".join(Path(file).name for file in ([files] if isinstance(files, str) else files))
        return short(f"{self.name} on {len(self.items):,} items" + (f" of {data}" if data else ""), 90)

    @functools.cached_property
    def pieces(self) -> list[str]:
        return pieces([item.prompt for item in self.items], 90)


def interval(mean: float | None, low: float | None, high: float | None, digits: str = ".3f") -> str:
    """A mean with its interval, as far as there are any: None and NaN are none."""
    mean, low, high = (math.nan if x is None else x for x in (mean, low, high))
    ends = "" if math.isnan(low) else f" [{low:{digits}}, {high:{digits}}]"
    said = "–" if math.isnan(mean) else f"{mean:{digits}}{ends}"
    return said.replace("inf", "∞").replace("-0.000", "0.000")


def pieces(prompts: list[str], width: int) -> list[str]:
    """Each prompt in a line of at most `width` characters that says which it is.

    It is what stands between the words with which all prompts begin and end; if they begin differently, the
    end, for the text that is judged comes last.
    """

    def common(texts: list[str]) -> str:
        return re.match(r"(.*\s)?", os.path.commonprefix(texts), re.DOTALL)[0]  # noqa: RUF071

    first, last = len(common(prompts)), len(common([prompt[::-1] for prompt in prompts]))
    own = [" ".join((prompt[first : len(prompt) - last] or prompt).split()) for prompt in prompts]
    if first and len(set(prompts)) > 1:
        return [short(text, width) for text in own]
    return [short(text if len(text) <= width else "..." + text[3 - width :], width) for text in own]


def load_run(folder: str | Path) -> Run:
    """Reads predictions.jsonl, metrics.json and, if there, log.jsonl and config.json. Raises InputError."""
    home, named = Path(folder), short(folder, 200)

    def values(row: dict, field: str) -> dict[str, float]:
        if more := sorted(set(row[field]) - set(rows[0]["predicted"])):
            raise InputError(f"{row['where']}: {field}: unknown label {distjudge.listed(more)}")
        return {label: row[field][label] for label in rows[0]["predicted"]}

    try:
        rows = distjudge.rows_of(home / "predictions.jsonl")
        metrics = distjudge.read_json(home / "metrics.json")
        log = distjudge.rows_of(home / "log.jsonl") if (home / "log.jsonl").exists() else []
        settings = distjudge.read_json(home / "config.json") if (home / "config.json").exists() else {}
        if not rows:
            raise InputError("no predictions")
        items = []
        for row in rows:
            text = distjudge.prompt_text(row["prompt"]) if row.get("prompt") else ""
            truth = values(row, "truth") if row.get("truth") else None
            known = {"group": row.get("group"), "truth": truth, "where": row["where"]}
            items.append(Item(row["id"], text, values(row, "counts"), **known))
        q = torch.tensor([[*values(row, "predicted").values()] for row in rows], dtype=torch.float64)
        distjudge.check_voted(items)
        scores = distjudge.item_scores(q, items)  # refuses what is no distribution
        return Run(items, q, metrics, log, rows, settings, home.resolve().name, scores)
    except KeyError as error:
        raise InputError(f"{named}/predictions.jsonl: a line lacks {error}") from None
    except (OSError, TypeError, ValueError) as error:
        raise InputError(f"{named}: no run folder that can be used: {error}") from None


def name_labels(ax: plt.Axes, labels: list[str]) -> None:
    """Labels under bars at 0, 1, 2, ..., turned where they are long."""
    turned = {"rotation": 25, "ha": "right", "rotation_mode": "anchor"} if max(map(len, labels)) > 4 else {}
    ax.set_xticks(range(len(labels)), [short(label, 14) for label in labels], **turned)
    ax.grid(visible=False, axis="x")


def add_legend(figure: Any, place: str, columns: int = 1) -> None:
    """One legend for all panels of a figure or a part of one, outside of them."""
    handles = [ax.get_legend_handles_labels() for ax in figure.axes]
    named = {label: handle for own in handles for handle, label in zip(*own, strict=True)}
    figure.legend(named.values(), named.keys(), loc=f"outside {place}", ncols=columns)


def draw_item(ax: plt.Axes, run: Run, i: int, judges: dict[str, torch.Tensor], about: str) -> None:
    """Bars of an item's votes and of each judge's (N, C), dots of its truth; above, its text and `about`."""
    at, width = torch.arange(len(run.labels)), 0.8 / (1 + len(judges))
    colours = [HUMAN, *([MODEL] if len(judges) == 1 else [COLOURS[1:][k % 7] for k in range(len(judges))])]
    for k, (name, values) in enumerate({"votes": run.p, **judges}.items()):
        place = at + (k - len(judges) / 2) * width
        ax.bar(place, values[i], width, color=colours[k], label=name)
    if run.truth is not None:
        ax.plot(at, run.truth[i], "o", color=TRUTH, markersize=3, label="truth")
    name_labels(ax, run.labels)
    text = textwrap.wrap(run.pieces[i], 36, max_lines=2, placeholder=" ...")
    ax.set_title("\n".join([*text, about]), fontsize=7.5)
    ax.set_ylim(0, 1.02)


def draw_bars(run: Run, each: int = 4) -> plt.Figure:
    """Small bar charts of items in rows: the least and the most entropy of votes, and the largest KL."""
    entropy, each = distjudge.entropy(run.p), min(each, len(run.items))
    kinds = {"most agreed on": entropy, "most disputed": -entropy, "worst predicted": -run.kl}
    figure, axes = plt.subplots(3, each, figsize=(2.4 * each, 6.4), sharey=True, squeeze=False)
    for row, (kind, value) in zip(axes, kinds.items(), strict=True):
        for ax, i in zip(row, value.argsort(stable=True)[:each].tolist(), strict=True):
            about = f"{short(run.items[i].id, 22)}: KL {run.kl[i]:.2f}, {run.items[i].votes:g} votes"
            draw_item(ax, run, i, {"judge": run.q}, about)
        row[0].set_ylabel(f"{kind}\nprobability")
    add_legend(figure, "lower right", 3)
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
    ax.legend(loc="upper left")
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
    ax.legend()
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
    """Training loss by step and, with --eval_every, KL on the test items beside it, nats.

    Of a long run at most `most` means of equally many steps are drawn. Raises InputError without a log.
    """
    log = pandas.DataFrame(run.log, columns=["step", "loss", "eval_kl", "eval_kl_truth"], dtype=float)
    if log["loss"].isna().all():
        raise InputError("curves: no log.jsonl with losses in the run folder")
    number = 1 + int(log["eval_kl"].notna().any())
    figure, axes = plt.subplots(1, number, figsize=(4.2 * number, 3.2), squeeze=False)
    for key, name in {"loss": "loss", "eval_kl": "KL to votes", "eval_kl_truth": "KL to truth"}.items():
        points = log[["step", key]].dropna().reset_index(drop=True)
        block = math.ceil(len(points) / most)
        if block > 1:
            points, name = points.groupby(points.index // block).mean(), f"{name}, means of {block} steps"
        if len(points):
            marker = "o" if len(points) < 30 else None
            axes[0, int(key != "loss")].plot(*points.values.T, marker=marker, markersize=4, label=name)
    floor = run.metrics.get("kl_noise_floor")
    if floor is not None and number == 2:  # the floor of KL to votes: the training loss is another measure
        axes[0, 1].axhline(floor, color=COLOURS[0], linestyle=":", label="noise floor of KL to votes")
    for ax, title in zip(axes[0], ("training loss", "KL on test items"), strict=False):
        ax.set(xlabel="step", ylabel="nats", title=title)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.legend()
    return figure


def draw_compare(runs: dict[str, Run]) -> plt.Figure:
    """Above, mean KL of each run with its 95 % interval over groups of items; below, four items.

    They are the most agreed on, the most disputed, and two on which the judges differ most (the mutual
    information of judge and label). Raises InputError for runs of other items.
    """
    first, votes = next(iter(runs.values())), lambda run: [(i.id, [*i.counts.items()]) for i in run.items]
    if other := [name for name, run in runs.items() if votes(run) != votes(first)]:
        what = "its items, in their order, labels or votes are not those of"
        raise InputError(f"{short(other[0])}: {what} {short(first.name)}")
    q = torch.stack([run.q for run in runs.values()])
    groups = [item.group for item in first.items]
    names = [short(name, 30) for name in runs]
    names = names if len({*names}) == len(names) else pieces([*runs], 30)
    if len({*names}) < len(names):  # they differ in the middle
        names = [short(f"{n}: {name}", 30) for n, name in enumerate(runs, 1)]
    entropy, apart = distjudge.entropy(first.p), distjudge.entropy(q.mean(0)) - distjudge.entropy(q).mean(0)
    most = [value.argsort(stable=True).tolist() for value in (entropy, -entropy, -apart)]
    chosen = list(dict.fromkeys([most[0][0], most[1][0], *most[2]]))[:4]
    targets = {"votes": first.p} | ({} if first.truth is None else {"truth": first.truth})
    figure, at = plt.figure(figsize=(10, 5.6)), range(len(runs))
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.6))
    above = top.subplots(1, len(targets), sharey=True, squeeze=False)[0]
    for ax, (kind, target) in zip(above, targets.items(), strict=True):
        found = [distjudge.bootstrap(distjudge.kl_divergence(target, own)[None], groups=groups) for own in q]
        found = pandas.DataFrame(found, dtype=float)
        ax.hlines(at, found["low"], found["high"], color=NEUTRAL)
        ax.scatter(found["mean"], at, color=[COLOURS[1:][k % 7] for k in at], zorder=3)
        ax.set_yticks(at, names)
        ax.set(xlabel=f"KL({kind} || judge), nats: mean, 95 % interval over items", ylim=(len(at), -1))
    if (floor := first.metrics.get("kl_noise_floor")) is not None:
        above[0].axvline(floor, color=TRUTH, linestyle=":", label=f"noise floor {floor:.3f}")
        above[0].legend()
    below = bottom.subplots(1, len(chosen), sharey=True, squeeze=False)[0]
    kinds = ("most agreed on", "most disputed", "judges differ", "judges differ")
    for ax, i, kind in zip(below, chosen, kinds, strict=False):
        draw_item(ax, first, i, dict(zip(names, q, strict=True)), f"{short(first.items[i].id, 20)}: {kind}")
    below[0].set_ylabel("probability")
    add_legend(bottom, "lower center", 6)
    return figure


USUAL = {"bars": draw_bars, "calibration": draw_calibration, "kl": draw_kl}
FIGURES = USUAL | {"simplex": draw_simplex, "curves": draw_curves}


def save(figure: plt.Figure, path: Path, title: str = "", formats: Iterable[str] = ()) -> list[Path]:
    """Writes path.png and each other path.FORMAT, under a title, in a folder it makes; closes the figure."""
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=9, fontweight="bold")
    path.parent.mkdir(parents=True, exist_ok=True)
    paths = [path.with_suffix(f".{kind}") for kind in dict.fromkeys(["png", *formats])]
    for one in paths:
        figure.savefig(one)
    plt.close(figure)
    return paths


def draw_all(
    folder: str | Path, out: str | Path = "", names: Iterable[str] = USUAL, formats: Iterable[str] = ()
) -> list[Path]:
    """Draws the named figures of a run folder into `out`, by default its plots/; returns the files' paths."""
    run, out = load_run(folder), Path(out or Path(folder) / "plots")
    return [path for name in names for path in save(FIGURES[name](run), out / name, run.title, formats)]


def compare(runs: dict[str, str | Path], out: str | Path, formats: Iterable[str] = ()) -> Path:
    """Draws run folders, {name: folder}, in one figure; returns its path, compare.png in the folder `out`."""
    loaded = {name: load_run(folder) for name, folder in runs.items()}
    title = dataclasses.replace(next(iter(loaded.values())), name=f"{len(runs)} judges").title
    return save(draw_compare(loaded), Path(out) / "compare", title, formats)[0]


@dataclasses.dataclass
class FiguresConfig:
    runs: tyro.conf.Positional[tuple[str, ...]]
    """The run folder; several are compared in one figure."""
    out: str = ""
    """Where the figures go. Default: plots/ in the run folder; of several, beside the first."""
    show: tuple[Literal[tuple(FIGURES)], ...] = tuple(USUAL)
    """Which figures of one run."""
    format: tuple[Literal["svg", "pdf", "eps"], ...] = ()
    """Other formats beside .png."""


def main(config: FiguresConfig) -> None:
    if not config.runs:
        raise InputError("runs: name a run folder")
    if len(config.runs) > len(COLOURS) - 1 or len(set(config.runs)) < len(config.runs):
        raise InputError(f"runs: at most {len(COLOURS) - 1} can be compared, each named once")
    if len(config.runs) > 1 and config.show != FiguresConfig.show:
        raise InputError("show: is for one run; of several, compare.png is drawn")
    if len(config.runs) == 1:
        drawn = draw_all(config.runs[0], config.out, config.show, config.format)
    else:
        named = {Path(run).resolve().name: run for run in config.runs}
        if len(named) < len(config.runs):
            named = {run: run for run in config.runs}
        out = config.out or Path(config.runs[0]).resolve().parent / "plots"
        drawn = [compare(named, out, config.format)]
    for path in drawn:
        print(short(path, 1000))


if __name__ == "__main__":
    distjudge.cli(main, FiguresConfig)
