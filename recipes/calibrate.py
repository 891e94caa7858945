"""Calibrate a judge on votes that it was not trained on; see what its sets and its doubts are worth.

    python recipes/calibrate.py --run runs/first --items votes.jsonl    # kept in runs/first/judge.json
    python recipes/calibrate.py --run runs/first --remove               # the judge is again as it was trained
    python recipes/calibrate.py --predictions predictions.jsonl         # of any judge: numbers, nothing kept

From then on the judge answers with softmax(log q / temperature + bias a label), wherever it is loaded, and
recipes/judge.py writes conformal sets in place of credible ones and has --route. Printed are, on votes that
were not fitted on (each fifth of the groups is corrected by what the others' votes say):

    metrics    before and after
    sets       how many votes of new people they hold, and how large they are: half of the groups calibrate,
               the other half is tested, --draws times
    kept       the error on the share of items that the judge keeps when people see those it is least sure of

The last one is drawn too, in plots/ of the run folder or in --out. Squared error is |q - p|^2 over labels,
less what the noise of p, the votes, adds to it: an estimate of the distance to what all people think.
"""

import collections
import dataclasses
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import distjudge
from distjudge import InputError, Item

import pandas
import torch

from recipes.systems import matched, read_predictions

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


def judge_items(config: CalibrateConfig) -> tuple[list[Item], torch.Tensor]:
    """Items, and the judge's own log-probabilities of their prompts. Raises InputError if it knows them."""
    judge = distjudge.load_judge(config.run)
    judge.calibration = None
    items = distjudge.load_items(*config.items, labels=judge.labels)
    about, names = Path(config.run, "config.json"), [f.name for f in dataclasses.fields(distjudge.Config)]
    try:
        settings = distjudge.parse_json(about.read_bytes())[0]
        trained_by = distjudge.Config(**{name: settings[name] for name in names if name in settings})
        trained = distjudge.hold_out(distjudge.load_data(trained_by)[0], trained_by)[0]
    except (InputError, OSError) as error:
        why = distjudge.first_line(error)
        print(f"not checked that the judge was trained on none of these items: {why}", file=sys.stderr)
    else:
        distjudge.keep_apart(trained, items)
    distjudge.keep_short(judge, items, "error", "calibration")
    return items, judge.score([prompt for item in items for prompt in item.prompts], progress=True)[0]


def predictions_of(path: str) -> tuple[list[Item], torch.Tensor]:
    """Items and log-probabilities (N, C) from a file of predictions; these are raised to 1e-6 first."""
    predicted = read_predictions(path)
    items = distjudge.load_items(path, labels=distjudge.labels_of([*predicted.values()]))
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
        limits = distjudge.calibrate([items[i] for i in mine], torch.cat([parts[i] for i in mine]))[0]
        raw, q = (distjudge.average_items(held, x)[0] for x in (own, limits.apply(own)))
        weight, p = 1 / group.bincount()[group[new]].double(), distjudge.shares_of(held)
        for level in LEVELS:
            kinds = {"credible": distjudge.credible_sets(raw, labels, level / 100)}
            kinds["credible, calibrated"] = distjudge.credible_sets(q, labels, level / 100)
            kinds["conformal"] = distjudge.conformal_sets(q, labels, limits.conformal, level / 100)
            for kind, chosen in kinds.items():
                inside = torch.tensor([[label in one for label in labels] for one in chosen]).double()
                both = torch.stack([(p * inside).sum(1), inside.sum(1)], 1)
                found[f"{level} %", kind].append((weight @ both / weight.sum()).tolist())
    rows = [(*key, *torch.tensor(values).mean(0).tolist()) for key, values in found.items()]
    table = pandas.DataFrame(rows, columns=["promised", "sets", "votes held", "labels"])
    return table.set_index("promised").round(3)


def kept(items: Sequence[Item], q: torch.Tensor) -> pandas.DataFrame:
    """Mean error on the shares of items that the judge is surest of, by two ways of being sure.

    Items with fewer than two votes have no squared error and are left out of it.
    """
    p, counts = distjudge.shares_of(items), distjudge.counts_of(items)
    distance = distjudge.squared_distance(q, counts)[0]
    errors = {"squared error": distance.where(counts.sum(1) >= 2, torch.nan)}
    errors["KL to votes"] = distjudge.kl_divergence(p, q)
    sure = {"entropy": distjudge.entropy(q), "expected squared error": 1 - (q**2).sum(1)}
    table = pandas.DataFrame(index=[f"{share} %" for share in KEPT])
    for (name, error), (by, doubt) in itertools.product(errors.items(), sure.items()):
        most = [doubt.argsort(stable=True)[: max(1, len(q) * share // 100)] for share in KEPT]
        table[f"{name}, by {by}"] = [error[some].nanmean().item() for some in most]
    return table.round(4)


def main(config: CalibrateConfig) -> None:
    run = Path(config.run)
    sources = (config.run and config.items, config.run and config.remove, config.predictions)
    if sum(map(bool, sources)) != 1:
        raise InputError("name a judge with --run and its --items (or --remove), or --predictions alone")
    if config.run and not (run / "judge.json").is_file():
        raise InputError(f"{config.run}: no judge in this folder")
    if config.remove:
        distjudge.save_calibration(None, run)
        print(f"{config.run}: no calibration any more; the judge answers as it was trained")
        return
    items, logq = predictions_of(config.predictions) if config.predictions else judge_items(config)
    calibration, after = distjudge.calibrate(items, logq)
    before, table = distjudge.average_items(items, logq)[0], kept(items, after)
    scores = pandas.DataFrame([distjudge.evaluate(q, items) for q in (before, after)], ["before", "after"]).T
    scores = scores[scores.index.isin(SHOWN.split())].astype(float).round(4)
    tables = {
        "metrics, on votes not fitted on": scores,
        "sets": sets(items, logq, config.draws),
        "kept": table,
    }
    print(calibration.about(distjudge.labels_of(items)))
    for name, found in tables.items():
        print(f"\n{name}\n{found.to_string()}")
    if config.run:
        distjudge.save_calibration(calibration, run)
        print(f"\nkept in {run / 'judge.json'}; predictions.jsonl and metrics.json stay as they were")
    if config.run or config.out:
        from plots import figures

        out = Path(config.out or run / "plots")
        out.mkdir(parents=True, exist_ok=True)
        shown = table.filter(like="squared error,").set_axis(KEPT)
        ax = shown.plot(figsize=(5.5, 3.4), style=["o-", "s--"], xlim=(102, 48))
        ax.set_ylim(bottom=min(0, shown.min(axis=None)))
        ax.set(xlabel="% of items that the judge keeps", ylabel="squared error above the votes' noise")
        print(f"drew {figures.save(ax.figure, out / 'kept')[0]}")


if __name__ == "__main__":
    distjudge.cli(main, CalibrateConfig)
