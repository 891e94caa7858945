"""Draw the figure of a study from its table.

    python plots/study.py runs/study/sweep.csv                    # writes sweep.png and sweep.svg beside it
    python plots/study.py runs/study/*.csv --out paper

recipes/study.py calls this; use it to draw again. Error bars and bands are the 95 % intervals of the table.
"""

import csv
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib.pyplot as plt
import tyro

import distjudge
from distjudge import InputError
from plots.figures import COLOURS, HUMAN, LINES, MARKERS, NEUTRAL, TRUTH, save

NAMES = {"kl": "KL(votes || judge), nats", "kl_truth": "KL(truth || judge), nats"}
NUMBERS = ("value", "std", "low", "high", "difference", "difference_low", "difference_high", "p", "alpha", "eps", "delta", "votes", "items")


def summary(rows: list[dict], **where) -> list[dict]:
    """The rows over all seeds that are as named."""
    return [r for r in rows if r["seed"] == "all" and r["value"] is not None and all(r.get(k) == v for k, v in where.items())]


def measure(rows: list[dict]) -> str:
    return "kl_truth" if any(r["metric"] == "kl_truth" for r in rows) else "kl"


def title_of(votes: float | None) -> str:
    return "all votes" if votes in (None, "") else f"{votes:g} vote{'s' if votes > 1 else ''} an item"


def is_reference(row: dict) -> bool:
    return row["method"] == "marginal" or row["method"].startswith("noise floor")


def looks(names: list[str]) -> dict[str, dict]:
    """One colour, marker and dash for each method, the same in every panel."""
    return {
        n: {"color": COLOURS[i % 8], "marker": MARKERS[i % 8], "linestyle": LINES[i % 8], "markersize": 4.5} for i, n in enumerate(names)
    }


def bars(rows: list[dict]) -> list[list[float]] | None:
    if any(r.get("low") is None for r in rows):
        return None
    return [[max(0.0, r["value"] - r["low"]) for r in rows], [max(0.0, r["high"] - r["value"]) for r in rows]]


def reference_lines(ax: plt.Axes, rows: list[dict], metric: str, **where) -> None:
    """The marginal and, for KL to votes, the noise floor, as horizontal lines."""
    for r in summary(rows, metric=metric, **where):
        if is_reference(r) and not r.get("entropy") and (metric != "kl_truth" or r["method"] == "marginal"):
            floor = r["method"].startswith("noise")
            ax.axhline(r["value"], color=TRUTH if floor else NEUTRAL, linestyle=":" if floor else "--", linewidth=1.1, label=r["method"])


def draw_methods(rows: list[dict]) -> plt.Figure:
    """Above, KL of each method with its interval, a panel for each number of votes; below, KL by human entropy."""
    metric = measure(rows)
    whole = [
        r for r in summary(rows, metric=metric) if not r.get("entropy") and not (metric == "kl_truth" and r["method"].startswith("noise"))
    ]
    votes = list(dict.fromkeys(r.get("votes") for r in whole))
    names = list(dict.fromkeys(r["method"] for r in whole))
    first = next(r["method"] for r in whole if not is_reference(r))
    good = sorted(
        {n for n in names if n not in ("marginal", first)} - {n for n in names if n.startswith("noise")},
        key=lambda n: sum(r["value"] for r in whole if r["method"] == n),
    )
    lines = [first, *good[:4], "marginal"]
    look = looks(lines)
    figure, axes = plt.subplots(
        2,
        len(votes),
        figsize=(2.2 + 2.7 * len(votes), 2.2 + 0.21 * len(names) + 2.6),
        squeeze=False,
        layout="constrained",
        height_ratios=[0.6 + 0.21 * len(names), 2.6],
        sharey="row",
    )
    for column, n in enumerate(votes):
        ax = axes[0, column]
        here = {r["method"]: r for r in whole if r.get("votes") == n}
        for y, name in enumerate(names):
            if name in here:
                own = look.get(name, {"color": HUMAN, "marker": "o"}) | {"linestyle": "none", "markersize": 4.5}
                ax.errorbar(
                    here[name]["value"], y, xerr=[[v[0]] for v in bars([here[name]])] if bars([here[name]]) else None, capsize=2, **own
                )
        if first in here:
            ax.axvline(here[first]["value"], color=NEUTRAL, linewidth=0.8, linestyle=":")
        ax.set_yticks(range(len(names)), names)
        ax.invert_yaxis() if column == 0 else None
        ax.set(xlabel=NAMES[metric], title=title_of(n))
        ax = axes[1, column]
        for name in lines:
            points = [r for r in summary(rows, metric=metric, method=name) if r.get("entropy") and r.get("votes") == n]
            if points:
                ax.errorbar(
                    [r["entropy"] for r in points],
                    [r["value"] for r in points],
                    yerr=bars(points),
                    capsize=2,
                    linewidth=1.2,
                    label=name,
                    **look[name],
                )
        ax.set(xlabel="human entropy, share of log C", ylim=(0, None))
    axes[1, 0].set_ylabel(NAMES[metric])
    handles, labels = axes[1, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, max(1, len(labels))), frameon=False)
    return figure


def draw_lines(rows: list[dict], x: str, by: str, label: str, name=str) -> plt.Figure:
    """KL against the column `x`, a line for each value of the column `by`."""
    metrics = [m for m in ("kl", "kl_truth") if any(r["metric"] == m and r.get(x) not in (None, "") for r in rows)]
    figure, axes = plt.subplots(1, len(metrics), figsize=(1.4 + 4.6 * len(metrics), 3.6), squeeze=False, layout="constrained")
    for ax, metric in zip(axes[0], metrics, strict=True):
        points = [r for r in summary(rows, metric=metric) if r.get(x) not in (None, "")]
        kinds = list(dict.fromkeys(r[by] for r in points))
        look = looks([name(kind) for kind in kinds])
        for i, kind in enumerate(kinds):
            own = sorted((r for r in points if r[by] == kind), key=lambda r: r[x])
            span = max(r[x] for r in points) - min(r[x] for r in points)
            shift = (i - (len(kinds) - 1) / 2) * 0.006 * span  # so that error bars do not hide each other
            ax.errorbar(
                [r[x] + shift for r in own],
                [r["value"] for r in own],
                yerr=bars(own),
                capsize=2,
                linewidth=1.3,
                elinewidth=0.8,
                label=name(kind),
                **look[name(kind)],
            )
        if by != "method":  # else they are lines among the others
            reference_lines(ax, [r for r in rows if r.get(x) in (None, "")], metric)
        ax.set(xlabel=label, ylabel=NAMES[metric])
    named = {label: handle for ax in axes[0] for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named.keys(), loc="outside right upper", frameon=False)
    return figure


def draw_sweep(rows: list[dict]) -> plt.Figure:
    return draw_lines(rows, "alpha", "eps", "alpha, weight of KL", lambda eps: f"eps = {eps:g}")


def draw_robustness(rows: list[dict]) -> plt.Figure:
    return draw_lines(rows, "delta", "method", "delta, l2 distance the target is moved")


def draw_budget(rows: list[dict]) -> plt.Figure:
    """KL of each way to spend the annotations, a line a method."""
    metrics = [m for m in ("kl", "kl_truth") if any(r["metric"] == m for r in rows)]
    ways = sorted({(r["votes"], r["items"]) for r in rows})
    names = list(dict.fromkeys(r["method"] for r in rows if not r["method"].startswith("noise")))
    look, figure = looks(names), plt.figure(figsize=(4.4 * len(metrics) + 1.4, 3.4), layout="constrained")
    axes = figure.subplots(1, len(metrics), squeeze=False)
    for ax, metric in zip(axes[0], metrics, strict=True):
        for i, name in enumerate(names):
            points = sorted(summary(rows, metric=metric, method=name), key=lambda r: r["votes"])
            at = [ways.index((r["votes"], r["items"])) + 0.05 * (i - len(names) / 2) for r in points]
            ax.errorbar(at, [r["value"] for r in points], yerr=bars(points), capsize=2, linewidth=1.2, label=name, **look[name])
        ax.set_xticks(range(len(ways)), [f"{items:g} × {votes:g}" for votes, items in ways])
        ax.set(xlabel="items × votes", ylabel=NAMES[metric])
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False)
    return figure


def draw_length(rows: list[dict]) -> plt.Figure:
    """KL by epochs, a line a method and a panel for each number of votes; open marks at the right: epochs chosen on other items' votes."""
    metric = measure(rows)
    points = [r for r in summary(rows, metric=metric) if not is_reference(r)]
    votes, names = list(dict.fromkeys(r.get("votes") for r in points)), list(dict.fromkeys(r["method"] for r in points))
    lengths = sorted({r["epochs"] for r in points if r.get("epochs")})
    look = looks(names)
    figure, axes = plt.subplots(1, len(votes), figsize=(1.6 + 2.9 * len(votes), 3.3), squeeze=False, layout="constrained")
    for ax, n in zip(axes[0], votes, strict=True):
        for i, name in enumerate(names):
            own = sorted((r for r in points if r["method"] == name and r.get("votes") == n and r.get("epochs")), key=lambda r: r["epochs"])
            shift = 0.07 * (i - (len(names) - 1) / 2)
            at = [lengths.index(r["epochs"]) + shift for r in own]
            ax.errorbar(at, [r["value"] for r in own], yerr=bars(own), capsize=2, linewidth=1.2, elinewidth=0.8, label=name, **look[name])
            best = [r for r in points if r["method"] == name and r.get("votes") == n and not r.get("epochs")]
            hollow = look[name] | {"linestyle": "none", "markerfacecolor": "none", "capsize": 2, "elinewidth": 0.8}
            ax.errorbar([len(lengths) + shift] * len(best), [r["value"] for r in best], yerr=bars(best), **hollow)
        ax.axvline(len(lengths) - 0.5, color=NEUTRAL, linewidth=0.6)
        ax.set_xticks(range(len(lengths) + 1), [*(f"{e:g}" for e in lengths), "chosen"])
        ax.set(xlabel="epochs", title=title_of(n), ylim=(0, None))
    axes[0, 0].set_ylabel(NAMES[metric])
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


def draw_cost(rows: list[dict]) -> plt.Figure:
    """Seconds an epoch: median, and from least to most."""
    points = summary(rows, metric="seconds_per_epoch")
    figure, ax = plt.subplots(figsize=(5.5, 0.8 + 0.4 * len(points)), layout="constrained")
    ax.barh(
        [r["method"] for r in points],
        [r["value"] for r in points],
        color=COLOURS[5],
        edgecolor="black",
        linewidth=0.5,
        xerr=bars(points),
        capsize=3,
    )
    ax.invert_yaxis()
    ax.set(xlabel="seconds an epoch")
    return figure


def draw_adversary(rows: list[dict]) -> plt.Figure:
    """Mean gain of five steps beside that of the exact worst case."""
    places = list(dict.fromkeys((r["method"], r["votes"]) for r in rows))
    find = lambda place, metric: summary(rows, method=place[0], votes=place[1], metric=metric)[0]["value"]  # noqa: E731
    figure, ax = plt.subplots(figsize=(6.4, 0.9 + 0.42 * len(places)), layout="constrained")
    for shift, metric, name, colour, hatch in (
        (-0.2, "gain_steps", "five steps", COLOURS[5], ""),
        (0.2, "gain_exact", "exact", COLOURS[1], "//"),
    ):
        ax.barh(
            [i + shift for i in range(len(places))],
            [find(place, metric) for place in places],
            0.38,
            label=name,
            color=colour,
            hatch=hatch,
            edgecolor="black",
            linewidth=0.5,
        )
    ax.set_yticks(range(len(places)), [f"{name}, {f'{votes:g}' if votes else 'all'} votes" for name, votes in places])
    ax.invert_yaxis()
    ax.set(xlabel="KL(p' || q) - KL(p || q), nats, mean")
    ax.legend(frameon=False)
    return figure


DRAW = {
    "main": draw_methods,
    "ablation": draw_methods,
    "ood": draw_methods,
    "methods": draw_methods,
    "sweep": draw_sweep,
    "robustness": draw_robustness,
    "budget": draw_budget,
    "length": draw_length,
    "cost": draw_cost,
    "adversary": draw_adversary,
}


def read_table(path: str) -> list[dict]:
    """The rows of a study's CSV file, numbers as numbers. Raises InputError naming the file."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            row.update({k: float(row[k]) if row[k] else None for k in NUMBERS})
            row["epochs"] = float(row["epochs"]) if row.get("epochs") else None  # a column that older tables lack
    except (OSError, UnicodeDecodeError, KeyError, ValueError) as error:
        raise InputError(f"{path}: not a study's table: {error}") from None
    if not rows or rows[0]["study"] not in DRAW:
        raise InputError(f"{path}: not a study's table: {'its study is unknown' if rows else 'no rows'}")
    return rows


@dataclasses.dataclass
class PlotConfig:
    tables: tyro.conf.Positional[tuple[str, ...]]
    """CSV files that recipes/study.py wrote."""
    out: str | None = None
    """Where the figures go. Default: beside the table."""


def main(config: PlotConfig) -> None:
    for table in config.tables:
        rows = read_table(table)
        out = Path(config.out or Path(table).parent)
        out.mkdir(parents=True, exist_ok=True)
        for path in save(DRAW[rows[0]["study"]](rows), out / Path(table).stem):
            print(path)


if __name__ == "__main__":
    distjudge.cli(main, PlotConfig)
