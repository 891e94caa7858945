"""Which system is better, and how sure is that? From people's votes on some items and a judge's word on all.

    python recipes/systems.py --items items.jsonl --run runs/first --out systems
    python recipes/systems.py --items items.jsonl --predictions judged.jsonl --out systems   # of judge.py

A line of --items is an item with "system", the name of what wrote it, and votes if people rated it. "group"
names what was asked (an article, a question): items of one group count as one draw. Writes table.txt,
table.json and forest.png into --out: estimates by votes alone, by the judge alone (biased), and by both
(PPI++), with 95 % intervals. Two things must be true: the rated items are a random draw, and the judge was
trained on none of the items (which is checked with --run). recipes/README.md says what is estimated and how.
"""

import dataclasses
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import distjudge
from distjudge import InputError, Item, short

import numpy as np
import pandas
from scipy.special import stdtr, stdtrit

from recipes import sheets

FILES = ("table.txt", "table.json", "forest.png")
METHODS = {"votes": "votes alone", "judge": "judge alone (biased)", "ppi": "votes and judge (PPI++)"}
LEVEL = 0.95
PAIRS = "pairs (an interval is of one pair by itself, p of all pairs together)"
WORDS = (
    "With {rated} of {items} items rated and the judge, you are as sure as with {worth:.0f} rated items "
    "alone. The judge's weight is {weight:.2f}, from 0 (not heard) to 1. Alone it is off by {least:+.3f} to "
    "{most:+.3f}, says the estimate that corrects it. {sure} of {differences} differences are sure (Holm). "
    "Standard deviations: the items of a system {item_sd:.2f}, the judge about an item's mean "
    "{judge_error_sd:.2f}, a vote about it {noise}."
)


@dataclasses.dataclass
class SystemsConfig:
    items: str
    """Items of all systems, .jsonl or .jsonl.gz; votes on some."""
    out: str
    """The folder for the tables and the figure."""
    run: str = ""
    """The run folder of a judge, which then judges every item."""
    predictions: str = ""
    """Or a file with every item's prediction: judge.py's output, or predictions.jsonl of a run."""
    field: str = "system"
    """The field that names an item's system."""


@dataclasses.dataclass
class Panel:
    """Items of S systems in G groups. counts (N, C): votes, zeros where unrated; q (N, C): the judge."""

    labels: list[str]
    systems: list[str]
    system: np.ndarray
    group: np.ndarray
    counts: np.ndarray
    q: np.ndarray

    @property
    def rated(self) -> np.ndarray:
        return self.counts.sum(1) > 0

    def sums(self, values: np.ndarray, which: Any = slice(None)) -> np.ndarray:
        """Sums of values (n, K) of the items `which` by group and system: (G, S, K)."""
        out = np.zeros((self.group.max() + 1, len(self.systems), values.shape[1]))
        np.add.at(out, (self.group[which], self.system[which]), values)
        return out


# --- estimates ---------------------------------------------------------------------------------------------
@dataclasses.dataclass
class Estimate:
    """value (S, K). parts (G, S, K): each group's part of the error; a variance is the sum of their squares.

    strata (G, S): 2 is a group with rated items of the system, 0 one without any; n (S,): groups it rests on.
    """

    value: np.ndarray
    parts: np.ndarray
    strata: np.ndarray
    n: np.ndarray


def vote_noise(counts: np.ndarray, columns: np.ndarray) -> float:
    """Variance of one vote about its item's mean, columns (C, K) added up; 0 if no item has two votes."""
    counts = counts[counts.sum(1) > 1]
    m = counts.sum(1)
    mean = counts @ columns / m[:, None]
    return float((counts @ columns**2 - m[:, None] * mean**2).sum() / (m - 1).sum()) if len(m) else 0.0


def between(residuals: np.ndarray, system: np.ndarray, m: np.ndarray, noise: float) -> float:
    """Variance of residuals (n, K) within systems beyond the noise of their m votes, by moments, or 0."""
    size, members = np.bincount(system), np.eye(system.max() + 1)[system]
    means = members.T @ residuals / np.maximum(size, 1)[:, None]
    squares, free = ((residuals - means[system]) ** 2).sum(), len(m) - (size > 0).sum()
    return max(0.0, float(squares - noise * ((1 - 1 / size[system]) / m).sum()) / free) if free else 0.0


def tuned(w: np.ndarray, t: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The weight of the judge for all groups, then without each one: (1 + G,), between 0 and 1.

    w (G, S, 1), t, x (G, S, K): sums of weights, weighted ratings and weighted predictions. PPI++ makes the
    sum of the systems' variances least: cov(ratings, judge) / var(judge), both by groups. Few groups find
    such a weight by chance. So it is times 1 - (t se / weight)^2 / 2, or 0, where se is its jackknife error
    over groups and t Student's (a positive part as James and Stein's, with a larger constant).
    """
    (sw, st, sx, tx, wx, tw, ww, xx) = map(without_each, (w, t, x, t * x, w * x, t * w, w * w, x * x))
    y, f = st / sw, sx / sw
    cov = ((tx - y * wx - f * tw + y * f * ww) / sw**2).sum((1, 2))
    var = ((xx - 2 * f * wx + f * f * ww) / sw**2).sum((1, 2))
    weight = np.divide(cov, var, out=np.zeros_like(cov), where=var > 1e-12)
    free = (w > 0).any((1, 2)).sum() - 1
    error = free / (free + 1) * ((weight[1:] - weight[0]) ** 2).sum()
    weight = weight.clip(0, 1)
    lost = stdtrit(free, (1 + LEVEL) / 2) ** 2 / 2 * error / np.maximum(weight, 1e-9) ** 2
    return weight * (1 - lost).clip(0, 1)


def without_each(a: np.ndarray) -> np.ndarray:
    """The sum over groups of a (G, ...), then the sums without each group: (1 + G, ...)."""
    total = a.sum(0, keepdims=True)
    return np.concatenate([total, total - a])


def estimate(panel: Panel, columns: np.ndarray) -> tuple[dict[str, Estimate], dict[str, float]]:
    """The three estimates of the mean of columns (C, K) for each system, and what they rest on.

    PPI++ (Angelopoulos, Duchi and Zrnic 2023, arXiv 2311.01453) of means: votes + weight (judge on all -
    judge on rated items), one weight for all systems. An item counts 1 / (variance between items, or of the
    judge's error, + noise of its votes). The parts are those of a jackknife over groups, in strata of rated
    and unrated ones, with the weight tuned anew each time (Rust and Rao 1996, Stat. Methods Med. Res. 5).
    """
    rated, system = panel.rated, panel.system[panel.rated]
    counts, m = panel.counts[rated], panel.counts[rated].sum(1)
    y, f = counts @ columns / m[:, None], panel.q[rated] @ columns
    noise, size = vote_noise(counts, columns), panel.sums(np.ones((len(panel.q), 1)))
    strata = (size[..., 0] > 0).astype(int) + (panel.sums(m[:, None], rated)[..., 0] > 0)
    n, of = (strata == 2).sum(0), (strata > 0).sum(0)

    def sums(spread: float) -> tuple[np.ndarray, ...]:
        w = 1 / (spread + noise / m[:, None]) if noise else np.ones((len(m), 1))
        return panel.sums(w, rated), panel.sums(w * y, rated), panel.sums(w * f, rated)

    def means(total: np.ndarray, weight: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ratio of sums, and what each of so many groups adds to it."""
        mean = without_each(total) / without_each(weight)
        return mean, (mean[0] - mean[1:]) * ((groups - 1) / groups)[:, None]

    spread = between(y, system, m, noise)
    w, t, x = sums(spread)
    error = between(y - tuned(w, t, x)[0] * f, system, m, noise)
    votes, judge = means(t, w, n), means(panel.sums(panel.q @ columns), size, of)
    w, t, x = sums(error)
    weight, ours, theirs = tuned(w, t, x), means(t, w, n), means(x, w, n)
    moves = judge[0] - theirs[0]  # (1 + G, S, K): where the judge moves the estimate
    ppi = ours[0][0] + weight[0] * moves[0]
    parts = ours[1] + weight[0] * (judge[1] - theirs[1])
    parts += (weight[0] - weight[1:])[:, None, None] * moves[1:] * ((n - 1) / n)[:, None]
    out = {
        "votes": Estimate(votes[0][0], centred(votes[1], strata), strata, n),
        "judge": Estimate(judge[0][0], centred(judge[1], strata > 0), strata > 0, of),
        "ppi": Estimate(ppi, centred(parts, strata), strata, n),
    }
    v, p = ((out[name].parts ** 2).sum() for name in ("votes", "ppi"))
    about = {"weight": float(weight[0]), "rated": len(m), "worth": float(len(m) * v / p) if p else len(m)}
    about |= {"vote_sd": noise**0.5 if (m > 1).any() else None, "item_sd": spread**0.5}
    return out, about | {"judge_error_sd": between(y - f, system, m, noise) ** 0.5}


def centred(parts: np.ndarray, strata: np.ndarray) -> np.ndarray:
    """Parts (G, S, K) about the mean of their stratum, times sqrt(n / (n - 1)) of its n groups."""
    out = np.zeros_like(parts)
    for kind in np.unique(strata):
        here = (strata == kind)[..., None]
        size = here.sum(0)
        mean = np.where(size > 1, (parts * here).sum(0) / np.maximum(size, 1), 0)  # of one group: 0
        out += here * (parts - mean) * np.sqrt(size / np.maximum(size - 1, 1))
    return out


def interval(e: Estimate, slope: np.ndarray, least: float, most: float, value: float | None = None) -> dict:
    """A t-interval of e.value's product with slope (S, K), or of a `value` with that slope, cut to bounds.

    Degrees of freedom: Satterthwaite's over strata of groups, but not under those of the system with fewest
    groups. Where n groups are all alike, the share of others is under 1 - 0.025^(1/n) (the rule of three).
    """
    used = slope.any(1)
    parts, n = np.tensordot(e.parts[:, used], slope[used], 2), e.n[used].min()
    place = np.unique(e.strata[:, used] @ 3 ** np.arange(used.sum()), return_inverse=True)[1]
    size, by_stratum, se = np.bincount(place), np.bincount(place, parts**2), np.linalg.norm(parts)
    value = (e.value * slope).sum() if value is None else value
    if se > 1e-9 * (most - least):
        df = max(se**4 / (by_stratum**2 / np.maximum(size - 1, 1)).sum(), n - 1)
        half = stdtrit(df, (1 + LEVEL) / 2) * se
    else:
        se, df, half = 0, n - 1, (most - least) * (1 - ((1 - LEVEL) / 2) ** (1 / n))
    ends = np.clip([value, value - half, value + half], least, most)
    found = zip(("estimate", "low", "high", "se", "df"), (*ends, se, df), strict=True)
    return {name: float(x) for name, x in found}


def p_of_zero(found: dict[str, float], width: float) -> float:
    """Two-sided p of "it is 0", of what interval() found; width: how far apart its bounds are.

    It is under 0.05 where the interval, not yet cut to the bounds, leaves out 0.
    """
    if found["se"]:
        return 2 * stdtr(found["df"], -abs(found["estimate"]) / found["se"])
    return min(1.0, 2 * (1 - abs(found["estimate"]) / width) ** (found["df"] + 1))


def win(e: Estimate, a: int, b: int, values: np.ndarray) -> dict[str, float]:
    """The win probability from shares of labels of these values: sum of a_k b_l ([k > l] + [k = l] / 2)."""
    above = np.heaviside(np.subtract.outer(values, values), 0.5)
    slope = np.zeros_like(e.value)
    slope[a], slope[b] = above @ e.value[b], e.value[a] @ above
    return interval(e, slope, 0, 1, e.value[a] @ slope[a])


def holm(single: Sequence[float]) -> list[float]:
    """p-values corrected for being many (Holm 1979)."""
    p = pandas.Series(single, dtype=float).sort_values()
    return (p * np.arange(len(p), 0, -1)).cummax().clip(upper=1).sort_index().tolist()


def compare(panel: Panel) -> dict[str, Any]:
    """What table.json holds: systems, best first, and pairs by each of METHODS; ranks of numeric labels."""
    names, numeric = panel.systems, distjudge.are_numeric(panel.labels)
    units, columns = np.eye(len(names)), np.eye(len(panel.labels))
    shares, about = estimate(panel, columns)
    measures = {f"share of {label}": (shares, columns[k], 0, 1) for k, label in enumerate(panel.labels)}
    tested = list(measures)[: 1 if len(columns) == 2 else None]  # the other share is the rest
    if numeric:
        values = np.array(panel.labels, dtype=float)
        means, about = estimate(panel, values[:, None])
        tested, measures = ["mean"], {"mean": (means, np.ones(1), values.min(), values.max())} | measures

    def found(measure: str, contrast: np.ndarray) -> dict[str, dict[str, float]]:
        by_method, column, low, high = measures[measure]
        low, high = (low, high) if contrast.sum() else (low - high, high - low)
        return {how: interval(e, np.outer(contrast, column), low, high) for how, e in by_method.items()}

    rows, pairs = {}, []
    for s, name in enumerate(names):
        items, rated = int((panel.system == s).sum()), int((panel.rated & (panel.system == s)).sum())
        rows[name] = {"items": items, "rated": rated, "groups": int(shares["votes"].n[s])}
        rows[name] |= {"rank": [1, len(names)]} if numeric else {}
        rows[name] |= {measure: found(measure, units[s]) for measure in measures}
    for a, b in itertools.combinations(range(len(names)), 2):
        pairs.append({"a": names[a], "b": names[b]} | {m: found(m, units[a] - units[b]) for m in tested})
        pairs[-1] |= {"win": {how: win(e, a, b, values) for how, e in shares.items()}} if numeric else {}
    gaps = [(pair, pair[measure]["ppi"], measures[measure]) for pair in pairs for measure in tested]
    single = [p_of_zero(gap, 2 * (most - least)) for _, gap, (_, _, least, most) in gaps]
    for (pair, gap, _), p in zip(gaps, holm(single), strict=True):
        gap["p_holm"] = p
        if numeric and p < 1 - LEVEL:
            better, worse = (pair["a"], pair["b"]) if gap["estimate"] > 0 else (pair["b"], pair["a"])
            rows[better]["rank"][1] -= 1
            rows[worse]["rank"][0] += 1
    best_first = sorted(rows.items(), key=lambda named: -named[1][tested[0]]["ppi"]["estimate"])
    return {"labels": panel.labels, "tested": tested, **about, "systems": dict(best_first), "pairs": pairs}


# --- what is read -----------------------------------------------------------------------------------------
def predictions_in(path: str) -> str:
    """The file of predictions at a path: itself, or that of a run folder. Warns of a later calibration."""
    file = Path(path, "predictions.jsonl") if Path(path).is_dir() else Path(path)
    saved = file.with_name("judge.json")
    if saved.is_file() and file.name == "predictions.jsonl" and distjudge.read_json(saved).get("calibration"):
        remedy = "what it says now, recipes/judge.py writes"
        distjudge.log.warning("%s: is of the judge before its calibration; %s", short(file, 1000), remedy)
    return str(file)


def read_predictions(path: str) -> dict[str, Item]:
    """Predictions by id, as items with shares_of(); the prompt is "-" where a line has none."""
    if sheets.kind_of(path) in sheets.SUFFIXES:
        remedy = "judge again with --out judged.jsonl, and name that"
        raise InputError(f"{short(path, 1000)}: is a table, not predictions; {remedy}")
    made = []
    for row in distjudge.rows_of(path, prompt="-"):
        if distjudge.is_missing(row.get("id")) or not isinstance(row.get("predicted"), dict):
            needed = "a prediction needs id and predicted, {label: probability}"
            raise InputError(f"{row['where']}: predicted: {needed}")
        shares = {"distribution": row["predicted"], "votes": 10**9}  # too many to be rounded to whole votes
        made.append({field: row[field] for field in ("id", "prompt", "where")} | shares)
    try:
        return {item.id: item for item in distjudge.load_items(made or path)}
    except InputError as error:
        raise InputError(str(error).replace(": distribution: ", ": predicted: ")) from None


def matched(items: Sequence[Item], predicted: dict[str, Item], path: str) -> np.ndarray:
    """The predictions (N, C) of items. Raises InputError if one has none of its id and prompt."""
    for item in items:
        ready = predicted.get(item.id)
        if not ready or len({item.prompt, ready.prompt} - {"-"}) > 1:
            text = "has no prediction of this id and prompt; judge all items"
            raise InputError(f"{item.named}: {short(path, 1000)} {text}")
    return distjudge.shares_of([predicted[item.id] for item in items]).numpy()


def refuse_trained_on(run: str, items: Sequence[Item]) -> None:
    """InputError if a run's judge was trained on some of the items; says so where that cannot be checked."""
    about, names = Path(run, "config.json"), [f.name for f in dataclasses.fields(distjudge.Config)]
    try:
        settings = distjudge.parse_json(about.read_bytes())[0]
        trained_by = distjudge.Config(**{name: settings[name] for name in names if name in settings})
        trained = distjudge.load_data(trained_by)[0]
    except (InputError, OSError) as error:
        why = distjudge.first_line(error)
        print(f"not checked that the judge was trained on none of these items: {why}", file=sys.stderr)
    else:
        try:
            distjudge.keep_apart(trained, items)
        except InputError as error:
            number = sum(distjudge.keep_apart(trained, items, "remove")[1].values())
            remedy = f"{number:,} training items are such; give items that the judge has not seen"
            raise InputError(f"{str(error).splitlines()[0]}; {remedy}") from None


def read_panel(config: SystemsConfig) -> Panel:
    """Items, votes and predictions. Raises InputError, also for a system rated in fewer than two groups."""
    if bool(config.run) == bool(config.predictions):
        raise InputError("name a judge with --run, or a file of predictions with --predictions")
    judge = distjudge.load_judge(config.run) if config.run else None
    file = "" if judge else predictions_in(config.predictions)
    predicted = {} if judge else read_predictions(file)
    labels = judge.labels if judge else distjudge.labels_of([*predicted.values()])
    rows = distjudge.rows_of(config.items)
    items = distjudge.load_items(rows or config.items, labels=labels, votes=False)
    for row in rows:
        try:
            row[config.field] = distjudge.as_label(row.get(config.field))
        except ValueError as error:
            raise InputError(f"{row['where']}: {config.field}: the name of a system {error}") from None
    system, systems = pandas.factorize(np.array([row[config.field] for row in rows], dtype=object))
    group, counts = distjudge.group_numbers([item.group for item in items]), distjudge.counts_of(items)
    panel = Panel(labels, list(systems), system, group.numpy(), counts.numpy(), None)
    for s, name in enumerate(systems):
        if (n := len(np.unique(panel.group[(system == s) & panel.rated]))) < 2:
            few = f"has rated items in {n} groups, and an interval needs two"
            raise InputError(f"{short(config.items, 1000)}: {config.field} '{short(name)}' {few}")
    if judge:
        refuse_trained_on(config.run, items)
        if judge.calibration:
            some = f"the {judge.calibration['items']:,} items it was calibrated on"
            print(f"not checked that {some} are others than these", file=sys.stderr)
        distjudge.keep_short(judge, items, "error", "given", "leave such items out")
        panel.q = distjudge.judge_items(judge, items, progress=True)[0].numpy().astype(float)
    else:
        panel.q = matched(items, predicted, file)
    return panel


# --- what is shown ----------------------------------------------------------------------------------------
def tables(table: dict[str, Any]) -> list[str]:
    """Aligned text: for each measure that is tested the systems and the pairs."""
    show, lines = "{estimate:.3f} [{low:.3f}, {high:.3f}]".format_map, []
    for measure in table["tested"]:
        rows, gaps = [], []
        for name, row in table["systems"].items():
            rows.append({"system": short(name, 24)} | {key: row[key] for key in ("items", "rated", "groups")})
            rows[-1] |= {title: show(row[measure][how]) for how, title in METHODS.items()}
            rows[-1] |= {"rank": "{} to {}".format(*row["rank"])} if "rank" in row else {}
        for pair in table["pairs"]:
            gaps.append({"difference": f"{short(pair['a'], 24)} - {short(pair['b'], 24)}"})
            gaps[-1] |= {title: show(pair[measure][how]) for how, title in METHODS.items()}
            gaps[-1] |= {"p (Holm)": f"{pair[measure]['ppi']['p_holm']:.3f}"}
            gaps[-1] |= {"first wins (PPI++)": show(pair["win"]["ppi"])} if "win" in pair else {}
        for title, found in ((short(measure), rows), (f"{short(measure)}, {PAIRS}", gaps)):
            lines += [title, pandas.DataFrame(found).to_string(index=False), ""] if found else []
    return lines


def words(table: dict[str, Any]) -> str:
    """What the tables say, in a paragraph."""
    rows, measures = table["systems"].values(), table["tested"]
    off = [row[m]["judge"]["estimate"] - row[m]["ppi"]["estimate"] for row in rows for m in measures]
    sure = [pair[m]["ppi"]["p_holm"] < 1 - LEVEL for pair in table["pairs"] for m in measures]
    noise = "unknown (no item has two votes) and part of both" if table["vote_sd"] is None else ""
    said = {"noise": noise or f"{table['vote_sd']:.2f}", "items": sum(row["items"] for row in rows)}
    said |= {"least": min(off), "most": max(off), "sure": sum(sure), "differences": len(sure)}
    return WORDS.format(**table, **said)


def draw(table: dict[str, Any], path: Path) -> None:
    """A forest plot: each system's three intervals, the best on top; a panel a measure that is tested."""
    from plots.figures import HUMAN, MODEL, NEUTRAL, plt, save

    measures, names = table["tested"], [short(name, 24) for name in table["systems"]]
    size = (1.5 + 4 * len(measures), 1 + 0.45 * len(names))
    figure, axes = plt.subplots(1, len(measures), figsize=size, sharey=True, squeeze=False)
    looks = {"votes": ("s", HUMAN, -0.22), "judge": ("^", NEUTRAL, 0), "ppi": ("o", MODEL, 0.22)}
    for ax, measure in zip(axes[0], measures, strict=True):
        for how, (marker, colour, shift) in looks.items():
            x = pandas.DataFrame([row[measure][how] for row in table["systems"].values()])
            ends = [x.estimate - x.low, x.high - x.estimate]
            look = {"fmt": marker, "color": colour, "ms": 4, "label": METHODS[how]}
            ax.errorbar(x.estimate, x.index + shift, xerr=ends, **look)
        ax.set_xlabel(f"{short(measure, 40)}, 95 % intervals")
    axes[0, 0].set_yticks(range(len(names)), names)
    axes[0, 0].invert_yaxis()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    save(figure, path)


def publish(config: Any, files: Sequence[str], lines: Sequence[str], found: dict, draw: Callable) -> None:
    """Writes lines, what was found and its picture as three `files` into config.out, and prints the lines."""
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    with distjudge.locked(out):
        about = {"settings": dataclasses.asdict(config), "versions": distjudge.versions()}
        distjudge.write_lines(out / files[0], lines)
        distjudge.write_json(out / files[1], about | found)
        draw(found, out / files[2])
    print("\n".join(lines))


def main(config: SystemsConfig) -> None:
    distjudge.check_out(config.out, *FILES)
    table = compare(read_panel(config))
    lines = [*tables(table), words(table)]
    publish(config, FILES, lines, table | {"words": lines[-1]}, draw)


if __name__ == "__main__":
    distjudge.cli(main, SystemsConfig)
