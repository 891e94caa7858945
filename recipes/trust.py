"""How far may a judge be trusted? A page about its predictions beside people's votes.

    python recipes/trust.py --predictions runs/first --out trust                           # a run folder
    python recipes/trust.py --predictions judged.jsonl --out trust                         # judge.py's output
    python recipes/trust.py --predictions runs/gpt --items test.jsonl --by source --out trust

--predictions: the folder of a run or of api.py, or a file of lines {"id", "predicted": {label: probability}}.
The votes stand there too ("counts", "annotations" or "distribution"), or in --items, by id. trust.txt,
trust.json and trust.png in --out say how many people the judge is worth, beside one person; whether it is
too lenient; and where it fails: slices by what it says, how sure it is, groups, and the fields of --by. Items
of one group count as one draw. The judge must not have been trained on these items.
"""

import contextlib
import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import distjudge
from distjudge import InputError, Item, short

import numpy as np
import pandas
import torch
from scipy.special import stdtr

from recipes.systems import holm, matched, predictions_in, publish, read_predictions

FILES = ("trust.txt", "trust.json", "trust.png")
FEW = 10  # a slice of fewer items is left out
TESTED = 5  # with fewer groups no verdict is given
SHOWN = 8  # slices of a field that the page shows, the worst ones
SURE = 0.05  # p of what is called sure
NO_END = "no end"  # a worth that votes cannot tell from the truth's; None: nothing is known
Fields = Mapping[str, Sequence[Any]]  # N values for each name
PAGE = """{items} items, {votes:,.0f} votes. In brackets: 95 % intervals, each by itself.

Worth in people: {worth}
So many people together come as near to what everybody thinks as the judge does. The {two_votes} items with
two whole votes or more tell it. One that says the mean of all these votes of every item: {mean}

One person, measured as the judge is: against another's vote (Brier score, lower is better), and against the
majority of the others, each voter left out in turn (accuracy).
{ceiling}
Accuracy, judge less one person: {gain}

What the judge says more often or less often than people. p is Holm's over all rows; the verdict goes by it.
{verdict}{shares}

Where it fails more than elsewhere (p under {sure}, Holm over all slices): {fails}
Distance: squared, from what everybody thinks, estimated without the noise of votes; so it may be below 0.
Excess: distance above that of all other items. Left out are slices of fewer than {few} items, and here (not
in trust.json) those behind the worst {shown} of a field.
{worst}"""


@dataclasses.dataclass
class TrustConfig:
    predictions: str
    """A run folder, or a file of predictions, .jsonl or .jsonl.gz."""
    out: str
    """The folder for the page and the figure."""
    items: str = ""
    """A file with the votes. Default: they stand beside the predictions."""
    by: tuple[str, ...] = ()
    """Fields of the items to make slices by. Numbers of more than eight kinds are cut into quarters."""


# --- measures ----------------------------------------------------------------------------------------------
def left_out(q: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """How often the judge, and a person, say what most of the others say: (N, 2).

    Each voter is left out in turn: others (N, C, C) is the majority without a vote for each label. Labels
    that tie share it. NaN under two votes, or with parts of votes. Source: Resnick et al. (2021).
    """
    most = lambda x: distjudge.majority(torch.as_tensor(x)).numpy()  # noqa: E731
    m, says, others = counts.sum(1, keepdims=True), most(q), most(counts[:, None] - np.eye(counts.shape[1]))
    told = (m >= 2) & (counts == counts.round()).all(1, keepdims=True)
    hits = np.stack([np.einsum("nvc,nc->nv", others, says), np.einsum("nvv->nv", others)], 1)
    return np.where(told, (hits * np.where(counts >= 1, counts / m, 0)[:, None]).sum(2), np.nan)


def excess(error: np.ndarray, inside: np.ndarray, cluster: np.ndarray) -> tuple[float, float]:
    """How much larger the mean error (N,) is inside a slice than outside, and p of "not larger", one-sided.

    Errors of one cluster (N,) are one draw: the standard error is that of Liang and Zeger (1986), and t has
    as many degrees of freedom as the side with fewer clusters, less one. p is 1 where a side has but one.
    """
    (here, there), size = (error[inside].mean(), error[~inside].mean()), (inside.sum(), (~inside).sum())
    part = np.where(inside, (error - here) / size[0], (there - error) / size[1])
    k = min(len(np.unique(cluster[inside])), len(np.unique(cluster[~inside])))
    se = (k / max(1, k - 1) * (np.bincount(cluster, part) ** 2).sum()) ** 0.5
    return here - there, float(stdtr(k - 1, (there - here) / se)) if k > 1 and se else 1.0


def slices_of(values: Sequence[Any]) -> dict[str, np.ndarray]:
    """{name: which of the N items} for each value of a field; numbers of more than 8 kinds in quarters."""
    column = pandas.Series(list(values), dtype=object)
    with contextlib.suppress(ValueError, TypeError):  # a table's numbers are text in its items
        column = pandas.to_numeric(column)
    column = column.convert_dtypes()
    if pandas.api.types.is_numeric_dtype(column) and column.nunique() > 8:
        column = column.astype(float)
        quarter = pandas.qcut(column, 4, labels=False, duplicates="drop")
        ends = column.groupby(quarter).agg(["min", "max"])
        column = quarter.map({k: f"{low:.6g} to {high:.6g}" for k, low, high in ends.itertuples()})
    at, names = pandas.factorize(column.astype(object).map(str, na_action="ignore"))
    return {name: at == k for k, name in enumerate(names)}


def slices(distance: np.ndarray, cluster: np.ndarray, fields: Fields) -> list[dict[str, Any]]:
    """Slices of FEW items or more, by field the worst first, with Holm's p of "errors are not larger there".

    distance (N,): errors, NaN where unknown. In slices by "group" items are the draws, else clusters (N,).
    """
    told, found = np.isfinite(distance), []
    for field, values in fields.items():
        at = pandas.factorize((np.arange(len(told)) if field == "group" else cluster)[told])[0]
        for name, inside in slices_of(values).items():
            if FEW <= (inside & told).sum() < told.sum():
                gap, p = excess(distance[told], inside[told], at)
                row = {"field": field, "slice": name, "items": int((inside & told).sum()), "inside": inside}
                found.append(row | {"distance": distance[inside & told].mean(), "excess": gap, "p_holm": p})
    for row, p in zip(found, holm([row["p_holm"] for row in found]), strict=True):
        row["p_holm"] = p
    return sorted(found, key=lambda row: (list(fields).index(row["field"]), -row["distance"]))


# --- the page ----------------------------------------------------------------------------------------------
def measure(q: np.ndarray, items: Sequence[Item], fields: Fields, draws: int = 2000) -> dict[str, Any]:
    """What trust.json holds, of predictions (N, C) beside items with votes: None is unknown, see NO_END."""
    labels, counts, p = distjudge.labels_of(items), distjudge.counts_of(items), distjudge.shares_of(items)
    distance, apart = (x.numpy() for x in distjudge.squared_distance(torch.from_numpy(q), counts))
    hits, p = left_out(q, counts.numpy()), p.numpy()

    def mean(*scores: np.ndarray) -> dict[str, float | None]:
        """Of items where it is known; of two scores the difference."""
        known = np.isfinite(scores[0])
        groups = [item.group for item, here in zip(items, known, strict=True) if here]
        both = [torch.as_tensor(score[known])[None] for score in scores]
        nothing = dict.fromkeys(("mean", "low", "high", "p"))
        return distjudge.bootstrap(*both, groups=groups, draws=draws) if groups else nothing

    def people(which: np.ndarray, alone: bool = False) -> dict[str, float | str | None]:
        some = [dataclasses.replace(items[i], **{"group": None} if alone else {}) for i in which.nonzero()[0]]
        worth = distjudge.survey_equivalence(q[which], some, draws)
        return {end: NO_END if x == math.inf else x for end, x in worth.items()}

    group = distjudge.group_numbers([item.group for item in items]).numpy()
    out = {"items": len(items), "votes": counts.sum().item(), "two_votes": int(np.isfinite(distance).sum())}
    out["groups"] = int(group.max()) + 1
    out["people"] = people(np.full(len(items), True))
    constant = distjudge.survey_equivalence(np.tile(p.mean(0), (len(p), 1)), items, 0)["mean"]
    out["people_mean"] = NO_END if constant == math.inf else constant
    out["brier"] = {"judge": mean(distance + apart), "one person": mean(2 * apart), "everybody": mean(apart)}
    share = lambda hit: {end: x and distjudge.within("accuracy", x) for end, x in mean(hit).items()}  # noqa: E731
    out["accuracy"] = {"judge": share(hits[:, 0]), "one person": share(hits[:, 1]), "gain": mean(*hits.T)}
    columns = {"mean rating": np.array(labels, dtype=float)} if distjudge.are_numeric(labels) else {}
    columns |= {f"share of {label}": np.eye(len(labels))[k] for k, label in enumerate(labels)}
    out["shifts"] = {}
    for name, column in columns.items():
        row = {"judge": float((q @ column).mean()), "people": float((p @ column).mean())}
        out["shifts"][name] = row | {"shift": mean(q @ column, p @ column)}
    # few groups' p are too small: with two of them twelve times as often under 0.008 as by chance
    is_tested = out["groups"] >= TESTED
    single = [(is_tested and row["shift"]["p"]) or 1.0 for row in out["shifts"].values()]
    for row, p_holm in zip(out["shifts"].values(), holm(single), strict=True):
        row["p_holm"] = p_holm
    out["slices"] = slices(distance, group, fields)
    for k, row in enumerate(out["slices"]):
        inside, earlier = row.pop("inside"), [other["field"] for other in out["slices"][:k]]
        if earlier.count(row["field"]) < SHOWN:
            row["people"] = people(inside, alone=row["field"] == "group")
    return out


def said(x: Mapping[str, float | str | None], form: str = ".3f") -> str:
    """A mean and its interval, so far as they are known."""
    shown = {end: at if at in (None, NO_END) else format(at, form) for end, at in x.items()}
    interval = " [{low}, {high}]".format_map(shown) if x["low"] is not None else ""
    return "unknown" if x["mean"] is None else shown["mean"] + interval


def page(found: Mapping[str, Any]) -> list[str]:
    """trust.txt: the measures in plain words."""
    shares, ceiling, worst, verdict = [], [], [], ""
    for who, score in found["brier"].items():
        hits = found["accuracy"].get(who)
        ceiling.append({"": who, "Brier score": said(score), "accuracy": said(hits) if hits else ""})
    for name, row in found["shifts"].items():
        shift = {"shift": said(row["shift"], "+.3f"), "p (Holm)": row["p_holm"]}
        shares.append({"": short(name, 30), "judge": row["judge"], "people": row["people"]} | shift)
    for row in found["slices"]:
        if "people" in row:
            where = {key: short(row[key], 24) for key in ("field", "slice", "items")}
            numbers = {"distance": row["distance"], "excess": row["excess"], "p (Holm)": row["p_holm"]}
            worst.append(where | {"people": said(row["people"], ".1f")} | numbers)
    if "mean rating" in found["shifts"]:
        row, words = found["shifts"]["mean rating"], "neither lenient nor strict, as far as votes tell"
        if found["groups"] < TESTED:
            words = "lenient, strict or neither: so few groups cannot tell"
        elif row["p_holm"] < SURE:
            words = "too lenient" if row["shift"]["mean"] > 0 else "too strict"
        verdict = f"If a high rating is a good one, the judge is {words}.\n"
    told = {"worth": said(found["people"], ".1f"), "gain": said(found["accuracy"]["gain"], "+.3f")}
    told["mean"] = said({"mean": found["people_mean"], "low": None}, ".1f")
    for name, rows in {"ceiling": ceiling, "shares": shares, "worst": worst}.items():
        text = pandas.DataFrame(rows).to_string(index=False, float_format="{:.3f}".format)
        told[name] = text if rows else "No slice is large enough."
    fails = [f"{short(r['field'])} {short(r['slice'])}" for r in found["slices"] if r["p_holm"] < SURE]
    told |= {"verdict": verdict, "fails": "; ".join(fails) or "nowhere seen"}
    return PAGE.format(**found, **told, sure=SURE, few=FEW, shown=SHOWN).split("\n")


def draw(found: Mapping[str, Any], path: Path) -> None:
    """The worth of the judge with its interval, over all items and by slice."""
    from matplotlib import ticker

    from plots.figures import HUMAN, MODEL, NEUTRAL, TRUTH, plt, save

    rows = [("all items", found["people"], MODEL)]
    for row in found["slices"]:
        name = f"{short(row['field'], 20)}: {short(row['slice'], 24)}"
        rows += [(name, row["people"], TRUTH if row["p_holm"] < SURE else NEUTRAL)] if "people" in row else []
    known = [1, *(x for _, worth, _ in rows for x in worth.values() if x not in (None, NO_END))]
    least, most = min(known) / 1.5, max(known) * 1.5
    figure, ax = plt.subplots(figsize=(6, max(2.5, 0.8 + 0.24 * len(rows))))
    for k, (_, worth, colour) in enumerate(rows):
        mean, *ends = (most if worth[end] == NO_END else worth[end] for end in ("mean", "low", "high"))
        if mean is not None:
            ax.plot(mean, k, ">" if mean == most else "o", color=colour, ms=4)
            ax.plot([end or mean for end in ends], [k, k], "-", color=colour)
    ax.axvline(1, color=HUMAN, linestyle=":")
    ax.set(xscale="log", xlim=(least, most), xlabel="worth in people (dotted: one; black: fails more)")
    ax.xaxis.set(major_locator=ticker.LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_formatter="")
    ax.set_yticks(range(len(rows)), [name for name, _, _ in rows], fontsize=7)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    save(figure, path)


def main(config: TrustConfig) -> None:
    distjudge.check_out(config.out, *FILES)
    path = predictions_in(config.predictions)
    voted = config.items or path
    predicted = read_predictions(path)
    rows, labels = distjudge.rows_of(voted, prompt="-"), distjudge.labels_of([*predicted.values()])
    items = distjudge.load_items(rows or voted, labels=labels, votes=False)
    pairs = [(i, row) for i, row in zip(items, rows, strict=True) if i.votes and i.id in predicted]
    if not pairs:
        none = "no item has both votes and a prediction; name the file of votes with --items"
        raise InputError(f"{short(voted, 1000)}: {none}")
    rated = [item for item, _ in pairs]
    q = matched(rated, predicted, path)
    fields = {"judge says": [labels[c] for c in q.argmax(1)]}
    entropies = [round(h, 6) for h in distjudge.entropy(q).tolist()]  # equal ones stay in one quarter
    fields |= {"judge's entropy": entropies, "group": [item.group for item in rated]}
    for name in config.by:
        fields[name] = [row.get(name) for _, row in pairs]
        if all(map(distjudge.is_missing, fields[name])):
            raise InputError(f"{short(voted, 1000)}: by: no item has a field '{short(name)}'")
    found, left = measure(q, rated, fields), len(items) - len(rated)
    lines = [f"How far may it be trusted? {short(path, 1000)}", *page(found)]
    if (groups := found["groups"]) < 30:
        narrow = f"intervals are too narrow. Under {TESTED} there is no verdict."
        lines.append(f"These are {groups} groups: {narrow}")
    lines += [f"{left} items without votes or without a prediction are left out."] if left else []
    publish(config, FILES, lines, found | {"left_out": left}, draw)


if __name__ == "__main__":
    distjudge.cli(main, TrustConfig)
