"""Calibrate a judge on votes that it was not trained on; see what its sets and its doubts are worth.

    python recipes/calibrate.py --run runs/first --items votes.jsonl    # kept in runs/first/judge.json
    python recipes/calibrate.py --run runs/first --items runs/first/predictions.jsonl   # on its test items
    python recipes/calibrate.py --run runs/first --remove               # the judge is again as it was trained
    python recipes/calibrate.py --predictions predictions.jsonl         # of any judge: numbers, nothing kept

From then on the judge answers with softmax(log q / temperature + bias a label), wherever it is loaded, and
recipes/judge.py writes conformal sets in place of credible ones and has --route. Printed are, on votes that
were not fitted on: metrics before and after; what sets hold of new people's votes, and how large they are
(half of the groups calibrate, the other half is tested); and the error on the items that the judge keeps when
people see those it is least sure of. That is drawn too, in plots/ of the run folder or in --out. Squared
error is |q - p|^2 over labels, less what the noise of p, the votes, adds. recipes/README.md has more.
"""

import collections
import dataclasses
import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import distjudge
from distjudge import InputError, Item

import pandas
import scipy.optimize
import torch

from recipes.systems import matched, predictions_in, read_predictions, refuse_trained_on

LEVELS, KEPT = (50, 80, 90, 95), (100, 95, 90, 80, 70, 60, 50)  # percent
SHOWN = "people kl kl_corrected accuracy total_variation brier emd entropy_correlation mean_correlation"


@dataclasses.dataclass
class CalibrateConfig:
    run: str = ""
    """The run folder of a judge."""
    items: tuple[str, ...] = ()
    """Items with votes, which the judge was not trained on."""
    predictions: str = ""
    """In place of both: the predictions.jsonl of a run or of api.py."""
    remove: bool = False
    """Take the calibration away from the run folder."""
    draws: int = 200
    """How often groups are halved for the table of sets."""
    out: str = ""
    """The folder for kept.png. Default: plots/ in the run folder; with --predictions it is not drawn."""


# --- the calibration and the sets ------------------------------------------------------------------------
def fit_calibration(logq: Any, counts: Any) -> tuple[float, torch.Tensor]:
    """Temperature T and bias b (C,), sum 0, for which softmax(log q / T + b) is nearest to the votes.

    logq: a judge's log-probabilities (N, C); counts: votes (N, C). Least mean KL(votes as shares || judge),
    convex in (1 / T, b), T from 0.05 to 100. The judge's own answers count as one item more, so that a label
    without votes stays possible. Source: vector scaling, one slope for all labels (Guo et al. 2017, arXiv
    1706.04599).
    """
    logq, counts = (torch.as_tensor(x).detach().cpu().double() for x in (logq, counts))
    votes = counts.sum(1, keepdim=True)
    n, middle = len(logq), logq.mean(0)
    target = (n * counts / votes + logq.softmax(1)) / (n + 1)
    x, scale = logq - middle, (logq - middle).std().item() or 1.0  # so that all unknowns are of a size

    def loss(unknown: Any) -> tuple[float, Any]:
        slope, bias = unknown[0] / scale, torch.from_numpy(unknown[1:])
        r = (slope * x + bias).log_softmax(1)
        gap = (r.exp() - target) / n
        gradient = torch.cat([(gap * x).sum()[None] / scale, gap.sum(0)])
        return -(target * r).sum().item() / n, gradient.numpy()

    bounds = [(0.01 * scale, 20 * scale), *[(None, None)] * len(middle)]
    options = {"maxiter": 10_000, "ftol": 1e-15, "gtol": 1e-9}
    usual = {"jac": True, "method": "L-BFGS-B", "bounds": bounds, "options": options}
    found = scipy.optimize.minimize(loss, [scale, *middle], **usual).x
    slope = found[0] / scale
    bias = torch.from_numpy(found[1:]) - slope * middle
    return float(1 / slope), bias - bias.mean()


def calibrate(items: Sequence[Item], logq: torch.Tensor) -> tuple[dict[str, Any], torch.Tensor]:
    """A judge's calibration by items that it was not trained on, and their probabilities (N, C), float64.

    It holds temperature and bias, see fit_calibration(); conformal, see conformal_limits(); entropies, nats,
    the quantiles of its answers' for 0, 1, ..., 100 %; and how many items, groups and votes it rests on.
    logq: the judge's own log-probabilities (M, C) of the items' prompts, both orders of a pair. The
    probabilities are cross-fitted: each fifth of the groups is corrected by what the others' votes say, so
    they say what the correction is worth. Where that is nothing in mean KL, temperature and bias stay 1 and
    0. Limits and entropies come from them too. Raises InputError for fewer than two groups; the command needs
    three, for it halves them.
    """
    counts, rows = distjudge.counts_of(items), []
    for item, own in zip(items, counts, strict=True):
        rows += [own, own[list(item.swap.labels)]] if item.swap else [own]
    votes, prompts = torch.stack(rows), torch.tensor([len(item.prompts) for item in items])
    group, logq = distjudge.group_numbers([item.group for item in items]), logq.double().log_softmax(1)
    if (size := int(group.max()) + 1) < 2:
        raise InputError(f"{items[0].where}: calibration needs votes on items of three groups or more")
    shuffled_groups = torch.randperm(size, generator=torch.Generator().manual_seed(0))
    fold = (shuffled_groups % 5)[group].repeat_interleave(prompts)
    apart, p = torch.empty_like(logq), distjudge.shares_of(items)
    for k in fold.unique().tolist():
        temperature, bias = fit_calibration(logq[fold != k], votes[fold != k])
        apart[fold == k] = logq[fold == k] / temperature + bias
    plain, q = (distjudge.average_items(items, x)[0] for x in (logq, apart.log_softmax(1)))
    temperature, bias = fit_calibration(logq, votes)
    if distjudge.kl_divergence(p, q).mean() >= distjudge.kl_divergence(p, plain).mean():
        temperature, bias, q = 1.0, torch.zeros_like(bias), plain
    limits = conformal_limits(mass_ahead(q, distjudge.labels_of(items)), counts, group)
    entropies = distjudge.entropy(q).quantile(torch.linspace(0, 1, 101, dtype=torch.float64)).tolist()
    calibration = {"temperature": temperature, "bias": bias.tolist(), "conformal": limits}
    calibration |= {"entropies": entropies, "items": len(items), "groups": size}
    return calibration | {"votes": counts.sum().item()}, q


def mass_ahead(q: Any, labels: Sequence[str] = ()) -> torch.Tensor:
    """How much probability a growing set holds before it takes each label: (N, C) -> (N, C), float64.

    It takes the likeliest label first, then the next. With labels that are numbers it takes the likelier
    neighbour of what it holds, so that it is an interval.

    >>> mass_ahead([[0.5, 0.125, 0.375]], ["1", "2", "3"])
    tensor([[0.0000, 0.5000, 0.6250]], dtype=torch.float64)
    """
    q = key = torch.as_tensor(q).double()
    place = along = torch.arange(q.shape[1])
    if labels and distjudge.are_numeric(labels):
        along = torch.tensor([float(label) for label in labels], dtype=torch.float64).argsort()
        q = q[:, along]
        far = place - q.argmax(1, keepdim=True)
        # a label waits for those between it and the likeliest: the least of them decides
        up, down = q.where(far >= 0, math.inf), q.where(far <= 0, math.inf).flip(1)
        key = torch.minimum(up.cummin(1).values, down.cummin(1).values.flip(1)) - 1e-12 * far.abs()
    order = key.argsort(dim=1, descending=True, stable=True)
    ranked = q.gather(1, order)
    return torch.empty_like(q).scatter(1, along[order], ranked.cumsum(1) - ranked)


def conformal_limits(ahead: torch.Tensor, counts: torch.Tensor, group: torch.Tensor) -> list[float]:
    """How much mass_ahead() of it a label may have to be in a set of 1, 2, ..., 100 %.

    ahead: mass_ahead() (N, C); counts: votes (N, C) that the judge has not seen; group: group_numbers().
    The vote of a new person on a random item of a new group is in such a set at least that often, over many
    draws of groups to calibrate on; all that is needed is that groups come in no order (are exchangeable).
    Groups weigh alike, items of a group and votes of an item too, and the new group may need all labels.
    With K groups up to level / K more are held than promised. Exact for q that does not depend on the counts.
    Source: Lee, Barber and Willett 2023 (arXiv 2306.06342), split conformal prediction for grouped data.
    """
    weight = counts / counts.sum(1, keepdim=True) / group.bincount()[group][:, None] / (group.max() + 2)
    limits, order = ahead.flatten().sort()
    levels = torch.arange(1, 101, dtype=torch.float64) / 100 - 1e-9
    place = torch.searchsorted(weight.flatten()[order].cumsum(0), levels)
    return torch.cat([limits, limits.new_ones(1)])[place].tolist()


def label_sets(
    q: Any, labels: Sequence[str], level: float = 0.9, limits: Sequence[float] = ()
) -> list[list[str]]:
    """For each row of q (N, C) a set that holds `level` of the votes, in label order -> N lists.

    Without limits a credible set: the fewest labels that hold `level` of the probability; of labels that tie,
    the first. With the limits of a calibrated judge, its "conformal", a conformal set: it holds a new
    person's vote as often, see conformal_limits(). Then level is rounded up to a whole percent, the likeliest
    label is in each set, and labels that are numbers give intervals. InputError unless 0 < level <= 1.

    >>> label_sets([[0.3, 0.1, 0.6]], ["a", "b", "c"], 0.9)
    [['a', 'c']]
    """
    if not 0 < level <= 1:
        raise InputError(f"level: must be above 0 and at most 1, not {level}")
    if limits:
        inside = mass_ahead(q, labels) <= limits[math.ceil(100 * level - 1e-6) - 1] + 1e-6
    else:
        inside = mass_ahead(q) < max(level - 1e-6, 1e-12)
    return [list(itertools.compress(labels, row)) for row in inside.tolist()]


# --- the command ------------------------------------------------------------------------------------------
def save(calibration: dict[str, Any] | None, run: Path) -> None:
    """Puts a calibration into judge.json of a saved judge, for the one there; None takes that out."""
    with distjudge.locked(run):
        saved = distjudge.read_saved(run)
        saved.pop("calibration", None)
        distjudge.write_saved(run, saved | ({"calibration": calibration} if calibration else {}))


def judge_items(config: CalibrateConfig) -> tuple[list[Item], torch.Tensor]:
    """Items, and the judge's own log-probabilities of their prompts. Raises InputError if it knows them."""
    judge = distjudge.load_judge(config.run)
    judge.calibration = None
    items = distjudge.load_items(*config.items, labels=judge.labels)
    refuse_trained_on(config.run, items)
    distjudge.keep_short(judge, items, "error", "calibration", "leave such items out")
    return items, judge.score([prompt for item in items for prompt in item.prompts], progress=True)[0]


def predictions_of(path: str) -> tuple[list[Item], torch.Tensor]:
    """Items and log-probabilities (N, C) from a file of predictions; these are raised to 1e-6 first."""
    path = predictions_in(path)
    predicted = read_predictions(path)
    items = distjudge.load_items(path, labels=distjudge.labels_of([*predicted.values()]))
    items = [dataclasses.replace(item, swap=None) for item in items]  # predictions are of both orders already
    return items, torch.from_numpy(matched(items, predicted, path)).clamp_min(1e-6).log()


def sets(items: Sequence[Item], logq: torch.Tensor, draws: int) -> pandas.DataFrame:
    """Share of votes held and mean size of credible and conformal sets, means over draws."""
    parts, found = logq.split([len(item.prompts) for item in items]), collections.defaultdict(list)
    group, labels = distjudge.group_numbers([item.group for item in items]), distjudge.labels_of(items)
    generator = torch.Generator().manual_seed(0)
    for _ in range(draws):
        half = torch.randperm(int(group.max()) + 1, generator=generator)[group] % 2
        mine, new = ([i for i, side in enumerate(half.tolist()) if side == k] for k in (0, 1))
        held, own = [items[i] for i in new], torch.cat([parts[i] for i in new])
        fitted = calibrate([items[i] for i in mine], torch.cat([parts[i] for i in mine]))[0]
        raw, q = (distjudge.average_items(held, x)[0] for x in (own, distjudge.corrected(own, fitted)))
        weight, p = 1 / group.bincount()[group[new]].double(), distjudge.shares_of(held)
        for level in LEVELS:
            kinds = {"credible": label_sets(raw, labels, level / 100)}
            kinds["credible, calibrated"] = label_sets(q, labels, level / 100)
            kinds["conformal"] = label_sets(q, labels, level / 100, fitted["conformal"])
            for kind, chosen in kinds.items():
                inside = torch.tensor([[label in one for label in labels] for one in chosen]).double()
                both = torch.stack([(p * inside).sum(1), inside.sum(1)], 1)
                found[f"{level} %", kind].append((weight @ both / weight.sum()).tolist())
    rows = [(*key, *torch.tensor(values).mean(0).tolist()) for key, values in found.items()]
    table = pandas.DataFrame(rows, columns=["promised", "sets", "votes held", "labels"])
    return table.set_index("promised").round(3)


def kept(items: Sequence[Item], q: torch.Tensor) -> pandas.DataFrame:
    """Mean error on the shares of items that the judge is surest of, by two ways of being sure.

    Items with fewer than two votes, or parts of votes, have no squared error and are left out of it.
    """
    errors = {"squared error": distjudge.squared_distance(q, distjudge.counts_of(items))[0]}
    errors["KL to votes"] = distjudge.kl_divergence(distjudge.shares_of(items), q)
    sure = {"entropy": distjudge.entropy(q), "expected squared error": 1 - (q**2).sum(1)}
    table = pandas.DataFrame(index=[f"{share} %" for share in KEPT])
    for (name, error), (by, doubt) in itertools.product(errors.items(), sure.items()):
        most = [doubt.argsort(stable=True)[: max(1, len(q) * share // 100)] for share in KEPT]
        table[f"{name}, by {by}"] = [error[some].nanmean().item() for some in most]
    return table.round(4)


def main(config: CalibrateConfig) -> None:
    run = Path(config.run)
    given = {name for name in ("run", "items", "remove", "predictions") if getattr(config, name)}
    if given not in ({"run", "items"}, {"run", "remove"}, {"predictions"}):
        raise InputError("name a judge with --run and its --items (or --remove), or --predictions alone")
    if config.run and not (run / "judge.json").is_file():
        raise InputError(f"{config.run}: no judge in this folder")
    if config.draws < 1:
        raise InputError(f"draws: must be 1 or more, not {config.draws}")
    if config.remove:
        save(None, run)
        print(f"{config.run}: no calibration any more; the judge answers as it was trained")
        return
    items, logq = predictions_of(config.predictions) if config.predictions else judge_items(config)
    calibration, after = calibrate(items, logq)
    before, table = distjudge.average_items(items, logq)[0], kept(items, after)
    worth = [distjudge.survey_equivalence(q, items, 0)["mean"] for q in (before, after)]  # inf: no end
    pairs = zip((before, after), worth, strict=True)
    found = [distjudge.evaluate(q, items) | {"people": n} for q, n in pairs]
    scores = pandas.DataFrame(found, ["before", "after"]).T
    scores = scores[scores.index.isin(SHOWN.split())].astype(float).round(4)
    tables = {"metrics, on votes not fitted on": scores, "sets": sets(items, logq, config.draws)}
    surest = "kept: the items it is surest of; squared errors less the votes' noise, so they can be below 0"
    tables[surest] = table
    pairs = zip(distjudge.labels_of(items), calibration["bias"], strict=True)
    bias = ", ".join(f"{distjudge.short(label, 20)} {b:+.2f}" for label, b in pairs)
    what = "calibrated on {votes:,g} votes on {items:,} items in {groups:,} groups: temperature "
    print(f"{what.format(**calibration)}{calibration['temperature']:.3f}, bias {bias}")
    if calibration["temperature"] == 1 and not any(calibration["bias"]):
        print("no correction helps on votes that were not fitted on: the answers stay as they were")
    if calibration["groups"] < 50:
        print("these are few groups: with fewer than fifty the fit and the sets are rough")
    for name, found in tables.items():
        print(f"\n{name}\n{found.to_string(na_rep='–')}")
    if config.run:
        save(calibration, run)
        print(f"\nkept in {run / 'judge.json'}; predictions.jsonl and metrics.json stay as they were")
    if config.run or config.out:
        from plots import figures

        out = Path(config.out or run / "plots")
        shown = table.filter(like="squared error,").set_axis(KEPT)
        ax = shown.plot(figsize=(5.5, 3.4), style=["o-", "s--"], xlim=(102, 48))
        ax.set_ylim(bottom=min(0, shown.min(axis=None)))
        ax.set(xlabel="% of items that the judge keeps", ylabel="squared error above the votes' noise")
        print(f"drew {figures.save(ax.figure, out / 'kept')[0]}")


if __name__ == "__main__":
    distjudge.cli(main, CalibrateConfig)
