"""Draw the figure of a study from its table.

    python plots/study.py runs/study/sweep.csv                    # writes sweep.png beside it
    python plots/study.py runs/study/*.csv --out paper --latex    # and sweep.tex: its tables for a paper

recipes/study.py calls this. Error bars are the 95 % intervals of the table (of cost: from the least time to
the most). The .tex file is made of the .md file beside the .csv file, and needs the LaTeX package booktabs.
"""

import dataclasses
import itertools
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import distjudge
from distjudge import InputError, short

import matplotlib.pyplot as plt
import pandas as pd
import tyro

from plots.figures import COLOURS, HUMAN, LINES, MARKERS, NEUTRAL, TRUTH, add_legend, save

COLUMNS = (
    "study data votes items epochs alpha eps delta entropy method seed metric value std low high "
    "against difference difference_low difference_high p"
).split()
WORDS = ("study", "data", "entropy", "method", "seed", "metric", "against")  # the other columns are numbers
NAMES = {"kl": "KL(votes || judge), nats", "kl_truth": "KL(truth || judge), nats"}


def read_table(path: str | Path) -> pd.DataFrame:
    """The rows of a study's CSV file: COLUMNS, numbers as floats. Raises InputError naming the file."""
    kinds = {name: str if name in WORDS else float for name in COLUMNS}
    try:
        rows = pd.read_csv(path, dtype=kinds, keep_default_na=False, na_values=[""], encoding="utf-8")
        if missing := {"study", "method", "seed", "metric", "value"} - set(rows):
            raise InputError(f"no column {', '.join(sorted(missing))}")
        if not set(rows["study"][:1]) & set(DRAW):
            raise InputError("no rows of a study")
    except (OSError, ValueError) as error:
        raise InputError(f"{short(path, 200)}: not a study's table: {short(error, 200)}") from None
    return rows.reindex(columns=COLUMNS)


def measure(rows: pd.DataFrame) -> str:
    """The metric to show: KL to the truth where it is known, else to the votes."""
    return "kl_truth" if (rows["metric"] == "kl_truth").any() else "kl"


def overall(rows: pd.DataFrame, metric: str, floor: bool = True) -> pd.DataFrame:
    """The rows over all seeds of one metric; with or without a noise floor, which no truth has to itself."""
    rows = rows[(rows["seed"] == "all") & (rows["metric"] == metric) & rows["value"].notna()]
    floors = rows["method"].str.startswith("noise floor")
    return rows if floor and metric != "kl_truth" else rows[~floors]


def looks(names: Iterable[Any]) -> dict[Any, dict]:
    """One colour, marker and dash for each name, the same in every panel."""
    styles = plt.cycler(color=COLOURS, marker=[*MARKERS], linestyle=LINES)
    return dict(zip(dict.fromkeys(names), styles(), strict=False))


def draw_points(ax: plt.Axes, at: Any, rows: pd.DataFrame, across: bool = False, **look: Any) -> None:
    """Values with their intervals, at heights `at` if across, else above `at`."""
    ends = [(rows["value"] - rows["low"]).clip(lower=0), (rows["high"] - rows["value"]).clip(lower=0)]
    x, y, side = (rows["value"], at, "xerr") if across else (at, rows["value"], "yerr")
    ax.errorbar(x, y, **{side: ends}, capsize=2, linewidth=1.2, elinewidth=0.8, markersize=4.5, **look)


def draw_lines(ax: plt.Axes, rows: pd.DataFrame, x: str, by: str, look: dict, name: str = "{}") -> None:
    """Values against the column x, a line for each value of the column `by`, whiskers beside each other."""
    step = (rows[x].max() - rows[x].min()) / max(rows[x].nunique() - 1, 1) or 1
    for i, (kind, style) in enumerate(look.items()):
        own = rows[rows[by] == kind].sort_values(x)
        apart = 0.3 * step * ((i + 0.5) / len(look) - 0.5)
        draw_points(ax, own[x] + apart, own, label=name.format(kind), **style)


def by_votes(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The rows for each number of votes, by the title of their panel."""
    groups = rows.assign(votes=rows["votes"].fillna(0)).groupby("votes", sort=False)
    titles = {0: "all votes", 1: "1 vote an item"}
    return {titles.get(n, f"{n:g} votes an item"): own for n, own in groups}


def draw_methods(rows: pd.DataFrame) -> plt.Figure:
    """Above, KL of each method, a panel for each number of votes; below, KL by human entropy."""
    metric = measure(rows)
    rows = overall(rows, metric)
    whole, names = rows[rows["entropy"].isna()], list(dict.fromkeys(rows["method"]))
    judges = overall(whole[whole["method"] != "marginal"], metric, floor=False)
    first, best = judges["method"].iloc[0], judges.groupby("method")["value"].mean().sort_values().index
    look = looks([first, *best.drop(first)[:4], "marginal"])
    votes, high = by_votes(whole), 0.6 + 0.21 * len(names)
    size = (2.2 + 2.7 * len(votes), 3.6 + high)
    shape = {"squeeze": False, "sharey": "row", "height_ratios": [high, 2.6]}
    figure, axes = plt.subplots(2, len(votes), figsize=size, **shape)
    binned, kinds = by_votes(rows[rows["entropy"].notna()]), sorted(rows["entropy"].dropna().unique())
    for (above, below), (title, here) in zip(axes.T, votes.items(), strict=True):
        for name, own in here.groupby("method"):
            style = look.get(name, {"color": HUMAN, "marker": "o"})
            draw_points(above, [names.index(name)], own, across=True, **style | {"linestyle": "none"})
        for value in here.loc[here["method"] == first, "value"]:
            above.axvline(value, color=NEUTRAL, linewidth=0.8, linestyle=":")
        above.set_yticks(range(len(names)), names)
        above.set(xlabel=NAMES[metric], title=title)
        if title in binned:
            here = binned[title].assign(at=binned[title]["entropy"].map(kinds.index))
            draw_lines(below, here, "at", "method", look)
        below.set_xticks(range(len(kinds)), kinds)
        below.set_xlabel("entropy of people's answers / log C")
        below.set_title("where people agree (left) and disagree (right)", fontsize=8)
    axes[0, 0].invert_yaxis()
    axes[1, 0].set(ylabel=NAMES[metric], ylim=(0, None))
    add_legend(figure, "lower center", 3)
    return figure


def draw_grid(rows: pd.DataFrame, x: str, by: str, label: str, name: str = "{}") -> plt.Figure:
    """KL against the column x, a line for each value of the column `by`, a panel for each kind of KL."""
    metrics = [m for m in NAMES if m in set(rows["metric"][rows[x].notna()])]
    figure, axes = plt.subplots(1, len(metrics), figsize=(1.6 + 4.6 * len(metrics), 3.6), squeeze=False)
    for ax, metric in zip(axes[0], metrics, strict=True):
        here = overall(rows, metric)
        points = here[here[x].notna()]
        draw_lines(ax, points, x, by, looks(points[by]), name)
        flat = here[here[x].isna() & (by != "method")]  # else they are lines among the others
        for _, row in flat.iterrows():
            floor = row["method"] != "marginal"
            style = {"color": TRUTH, "linestyle": ":"} if floor else {"color": NEUTRAL, "linestyle": "--"}
            ax.axhline(row["value"], linewidth=1.1, label=row["method"], **style)
        ax.set(xlabel=label, ylabel=NAMES[metric])
    add_legend(figure, "right upper")
    return figure


def draw_budget(rows: pd.DataFrame) -> plt.Figure:
    """KL of each way to spend the annotations, a line a method."""
    rows = rows[rows["entropy"].isna() & ~rows["method"].str.startswith("noise floor")]
    ways = rows[["votes", "items"]].drop_duplicates().sort_values("votes").reset_index(drop=True)
    figure = draw_grid(rows.merge(ways.reset_index(names="way")), "way", "method", "items × votes")
    for ax in figure.axes:
        ax.set_xticks(ways.index, [f"{items:g} × {votes:g}" for votes, items in ways.values])
    return figure


def draw_length(rows: pd.DataFrame) -> plt.Figure:
    """KL by epochs, a panel for each number of votes; hollow, at the right: the epochs chosen."""
    metric = measure(rows)
    rows = overall(rows[rows["method"] != "marginal"], metric, floor=False)
    lengths, look = sorted(rows["epochs"].dropna().unique()), looks(rows["method"])
    hollow = {name: style | {"linestyle": "none", "mfc": "none"} for name, style in look.items()}
    votes = by_votes(rows)
    figure, axes = plt.subplots(1, len(votes), figsize=(1.6 + 2.9 * len(votes), 3.3), squeeze=False)
    for ax, (title, here) in zip(axes[0], votes.items(), strict=True):
        here = here.assign(at=here["epochs"].map(lengths.index, na_action="ignore").fillna(len(lengths)))
        draw_lines(ax, here[here["epochs"].isna()], "at", "method", hollow)
        draw_lines(ax, here[here["epochs"].notna()], "at", "method", look)
        ax.axvline(len(lengths) - 0.5, color=NEUTRAL, linewidth=0.6)
        ax.set_xticks(range(len(lengths) + 1), [*(f"{e:g}" for e in lengths), "chosen"])
        ax.set(xlabel="epochs", title=title, ylim=(0, None))
    axes[0, 0].set_ylabel(NAMES[metric])
    add_legend(figure, "lower center", len(look))
    return figure


def draw_cost(rows: pd.DataFrame) -> plt.Figure:
    """Seconds an epoch: median, and from least to most."""
    rows = overall(rows, "seconds_per_epoch")
    figure, ax = plt.subplots(figsize=(5.5, 0.8 + 0.4 * len(rows)))
    draw_points(ax, rows["method"], rows, across=True, color=COLOURS[0], marker="o", linestyle="none")
    ax.invert_yaxis()
    ax.set(xlabel="seconds an epoch", xlim=(0, None))
    return figure


DRAW = dict.fromkeys(("main", "ablation", "ood", "methods"), draw_methods) | {
    "sweep": partial(draw_grid, x="alpha", by="eps", label="alpha, weight of KL", name="eps = {:g}"),
    "robustness": partial(draw_grid, x="delta", by="method", label="delta, l2 distance the target is moved"),
    "budget": draw_budget,
    "length": draw_length,
    "cost": draw_cost,
}


def title_of(rows: pd.DataFrame) -> str:
    """Study, data and seeds, with a warning where intervals over seeds are rough."""
    seeds = len(set(rows["seed"]) - {"all"})
    if rows["study"][0] == "cost":
        return f"cost on {short(rows['data'][0], 40)}, {seeds} turns: median, least and most"
    few = ": intervals leave out chance in training" if seeds == 1 else ": intervals are rough" * (seeds < 5)
    return f"{rows['study'][0]} on {short(rows['data'][0], 40)}, {seeds} seed{'s' * (seeds > 1)}{few}"


def draw(table: str | Path, out: str | Path | None = None) -> Path:
    """Draws a study's CSV file, as a PNG file beside it or in the folder `out`; returns its path."""
    rows, path = read_table(table), Path(out or Path(table).parent) / f"{Path(table).stem}.png"
    return save(DRAW[rows["study"][0]](rows), path, title_of(rows))[0]


def write_latex(table: str | Path, out: str | Path | None = None) -> Path:
    """Writes the tables of a study's .md file as STUDY.tex, with booktabs; returns its path."""
    source = Path(table).with_suffix(".md")
    lines = source.read_text(encoding="utf-8").splitlines()
    blocks = [list(own) for is_row, own in itertools.groupby(lines, lambda x: x.startswith("|")) if is_row]
    tables = []
    for head, _, *body in blocks:
        names, *cells = ([cell.strip() for cell in line.split("|")[1:-1]] for line in (head, *body))
        tables.append(pd.DataFrame(cells, columns=names).to_latex(index=False, escape=True))
    path = Path(out or source.parent) / f"{source.stem}.tex"
    distjudge.write_lines(path, ["\n".join(tables).replace("–", "--").replace("∞", "$\\infty$")])
    return path


@dataclasses.dataclass
class PlotConfig:
    tables: tyro.conf.Positional[tuple[str, ...]]
    """CSV files that recipes/study.py wrote."""
    out: str | None = None
    """Where the figures go. Default: beside the table."""
    latex: bool = False
    """Write its tables for a paper, too, as a .tex file."""


def main(config: PlotConfig) -> None:
    names = [Path(table).stem for table in config.tables]
    if not names or (config.out and len(set(names)) < len(names)):
        raise InputError("name tables, and with --out no two of the same name: one would replace the other")
    for table in config.tables:
        print(short(draw(table, config.out), 1000))
        if config.latex:
            print(short(write_latex(table, config.out), 1000))


if __name__ == "__main__":
    distjudge.cli(main, PlotConfig)
