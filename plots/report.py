"""One self-contained HTML page about one run or several: metrics, floors, figures, and every item to browse.

    python plots/report.py runs/first                                      # writes runs/first/report.html
    python plots/report.py runs/full runs/gpt --out compare.html --names full gpt-4o
    python plots/report.py runs/first --items test.jsonl                   # texts, where the run has none

The page loads nothing from anywhere, and its policy forbids it to. What people wrote is shown as text.
Runs that are compared must have the same labels, and the same votes for the items they share. Intervals are
95 % intervals of distjudge.bootstrap: it draws whole groups of items, an item without a group on its own.
"""

import base64
import dataclasses
import hashlib
import io
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import distjudge
from distjudge import InputError, short

import jinja2
import torch
import tyro

from plots import figures
from plots.figures import Run, interval

COLOURS = ("#e08214", "#2f9e77", "#b5579d", "#8c6bb1", "#a6761d", "#d6604d")
METRICS = {  # the names of distjudge.item_scores, and what they mean to a reader
    "kl": ("KL to the votes, nats", "lower is better"),
    "kl_truth": ("KL to the truth, nats", "lower is better"),
    "accuracy": ("accuracy", "top label = majority label"),
    "js_divergence": ("Jensen-Shannon divergence, nats", "lower is better"),
    "total_variation": ("total variation", "lower is better"),
    "brier": ("Brier score", "lower is better"),
    "emd": ("earth mover's distance", "lower is better"),
    "rps": ("ranked probability score", "lower is better"),
    "mean_correlation": ("correlation of mean ratings", "over items; higher is better"),
    "entropy_correlation": ("correlation of entropies", "over items; higher is better"),
    "label_mass": ("label mass", "probability that the answer is a label at all"),
}
FLOORS = {  # by their names in metrics.json
    "kl_noise_floor": "noise floor of KL: what the true distributions would score",
    "kl_marginal": "KL of the training marginal",
}
MAX_CHARS = 4000  # longer texts are cut in the page, and marked as cut
WORTH = "as near to everybody's opinion as a panel of so many; higher is better"


@dataclasses.dataclass
class ReportConfig:
    runs: tyro.conf.Positional[tuple[str, ...]]
    """Run folders; the first is the one others are compared with."""
    out: str = ""
    """The page. Default: report.html in the first run folder."""
    items: tuple[str, ...] = ()
    """Item files for the texts and groups of items, by id."""
    names: tuple[str, ...] = ()
    """What to call the runs. Default: the names of their folders."""
    ordered: bool = False
    """The labels are words that form a scale, in label order. Numbers are taken as one anyway."""
    draws: int = 1000
    """Draws of the bootstrap."""


def load(config: ReportConfig) -> list[Run]:
    """Reads the runs, with the prompts, and groups where there are none, of --items, and adds the scores.

    Raises InputError for runs that cannot be compared.
    """
    if not 1 <= len(config.runs) <= len(COLOURS):
        raise InputError(f"runs: 1 to {len(COLOURS)} run folders, not {len(config.runs)}")
    names = config.names or tuple(Path(run).resolve().name for run in config.runs)
    if len(names) != len(config.runs):
        raise InputError(f"names: {len(names)} for {len(config.runs)} runs")
    names = names if config.names or len(set(names)) == len(names) else config.runs
    if len(set(names)) < len(names):
        raise InputError(f"names: {distjudge.listed(names)} names a run twice")
    runs, votes, texts = [], {}, {}
    for folder, name in zip(config.runs, names, strict=True):
        one, path = figures.load_run(folder), short(Path(folder) / "predictions.jsonl", 200)
        one.name = name
        runs.append(one)
        if len({item.id for item in one.items}) != len(one.items):
            raise InputError(f"{path}: an id stands there twice")
        if one.labels != (first := runs[0].labels):
            theirs = f"{short(config.runs[0])}, {distjudge.listed(first)}"
            raise InputError(f"{path}: labels {distjudge.listed(one.labels)} are not those of {theirs}")
        if config.items and not texts:
            given = distjudge.load_items(*config.items, labels=first, votes=False)
            texts = {item.id: item for item in given}
        if config.ordered:
            one.scores = distjudge.item_scores(one.q, one.items, ordered=True)
        masses = [row.get("label_mass") for row in one.rows]
        if None not in masses:
            one.scores["label_mass"] = torch.tensor(masses, dtype=torch.float64)
        for k, item in enumerate(one.items):
            if votes.setdefault(item.id, item.counts) != item.counts:
                why = "its votes are not those it has in another run"
                raise InputError(f"{path}: item '{short(item.id)}': {why}")
            if text := texts.get(item.id):
                own = {"prompt": item.prompt or text.prompt, "group": item.group or text.group}
                one.items[k] = dataclasses.replace(item, **own)
    if texts and not texts.keys() & votes.keys():
        raise InputError(f"{short(', '.join(config.items), 200)}: items: no id is one of the runs'")
    return runs


def mean_of(one: Run, metric: str, draws: int, first: Run | None = None) -> str:
    """The mean of a metric, or what it is above that of `first` on the items both have, with its interval."""
    place = {item.id: i for i, item in enumerate((first or one).items)}
    both = [i for i, item in enumerate(one.items) if item.id in place]
    also = [(first or one).items[place[one.items[i].id]].group for i in both]
    if not both or any(run and metric not in run.scores for run in (one, first)):
        return "–"
    other = first and first.scores[metric][None, [place[one.items[i].id] for i in both]]
    groups = [one.items[i].group or group for i, group in zip(both, also, strict=True)]
    found = distjudge.bootstrap(one.scores[metric][None, both], other, groups, draws)
    found.pop("p")
    if first or found["low"] is None:
        return interval(**found, digits="+.3f" if first else ".3f")
    return interval(found["mean"], *(distjudge.within(metric, found[end]) for end in ("low", "high")))


def metrics_rows(judged: list[Run], draws: int, first: Run | None = None) -> list[tuple]:
    """(title, hint, a cell a run): the metrics, the floors right under the KL, and the number of items.

    With `first`: what the metrics are above those of `first`, item by item, on the items both have.
    """
    rows = []
    if not first:
        worth = [distjudge.survey_equivalence(one.q, one.items, draws) for one in judged]
        rows.append(("worth, in people", WORTH, [interval(**found, digits=".1f") for found in worth]))
    for metric, (title, hint) in METRICS.items():
        if any(metric in one.scores for one in ([first] if first else judged)):
            rows.append((title, hint, [mean_of(one, metric, draws, first) for one in judged]))
        for name, floor in FLOORS.items() if metric == "kl" and not first else ():
            rows.append((floor, "", [interval(one.metrics.get(name), None, None) for one in judged]))
    if first:
        ids = [{item.id for item in one.items} for one in (first, *judged)]
        return [*rows, ("items in common", "", [f"{len(own & ids[0]):,}" for own in ids[1:]])]
    groups = [len(distjudge.group_numbers([i.group for i in one.items]).unique()) for one in judged]
    sizes = [f"{len(one.items):,} ({n:,})" for one, n in zip(judged, groups, strict=True)]
    return [*rows, ("items (groups)", "", sizes)]


def settings_rows(judged: list[Run]) -> list[tuple[str, str, list[str]]]:
    """As metrics_rows: those in which the runs differ come first, with a hint that says so."""
    rows = []
    for name in dict.fromkeys(name for one in judged for name in one.settings if name != "out"):
        values = [one.settings.get(name, "–") for one in judged]
        cells = [v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in values]
        rows.append((name, "differs" if len(set(cells)) > 1 else "", cells))
    return sorted(rows, key=lambda row: not row[1])


def pictures_of(one: Run) -> dict[str, str]:
    """The figures that can be drawn of a run, {name: PNG in base64}."""
    pictures = {}
    for name, draw in figures.FIGURES.items():
        try:
            figure, buffer = draw(one), io.BytesIO()
        except InputError:  # no triangle for this number of labels, or no log
            continue
        figure.savefig(buffer, format="png", dpi=120)
        figures.plt.close(figure)
        pictures[name] = base64.b64encode(buffer.getvalue()).decode()
    return pictures


def page_data(judged: list[Run]) -> dict[str, Any]:
    """What the list of items is made from: predictions and scores of an item in the order of the runs."""
    items: dict[str, dict[str, Any]] = {}
    for k, one in enumerate(judged):
        scored = zip(one.items, one.rows, one.q.tolist(), one.scores["kl"].tolist(), strict=True)
        for item, row, q, kl in scored:
            new = {field: [None] * len(judged) for field in ("q", "mass", "flipped", "kl")}
            new |= {"id": item.id, "counts": list(item.counts.values())}
            entry = items.setdefault(item.id, new | dict.fromkeys(("text", "group", "truth")))
            entry["text"], entry["group"] = entry["text"] or item.prompt, entry["group"] or item.group
            entry["truth"] = list(item.truth.values()) if item.truth else entry["truth"]
            entry["q"][k], entry["kl"][k] = [round(x, 5) for x in q], round(kl, 5)
            entry["mass"][k], entry["flipped"][k] = row.get("label_mass"), row.get("flipped")
    for entry in items.values():
        text = entry["text"]
        entry["text"] = text[:MAX_CHARS]
        entry["cut"] = len(text) - len(entry["text"])
    labels, runs = judged[0].labels, [one.name for one in judged]
    return {"labels": labels, "runs": runs, "items": list(items.values())}


def make_page(judged: list[Run], config: ReportConfig) -> str:
    """Fills report.html, which escapes what it is given."""
    pages = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True)
    pages.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    source = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    script = source.split("<script>")[1].split("</script>")[0]  # the policy lets this script run and no other
    return pages.get_template("report.html").render(
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        colours={"human": figures.HUMAN} | {f"run{k}": colour for k, colour in enumerate(COLOURS)},
        names=[one.name for one in judged],
        draws=config.draws,
        metrics=metrics_rows(judged, config.draws),
        differences=metrics_rows(judged[1:], config.draws, judged[0]) if len(judged) > 1 else [],
        settings=settings_rows(judged),
        pictures=[pictures_of(one) for one in judged],
        data=page_data(judged),
    )


def main(config: ReportConfig) -> None:
    if config.draws < 40:
        raise InputError(f"draws: must be 40 or more, not {config.draws}")
    if not config.runs:
        raise InputError("runs: name a run folder, before --items and --names")
    out = Path(config.out or Path(config.runs[0]) / "report.html")
    if out.suffix != ".html" or out.is_dir():
        raise InputError(f"out: {out}: must be a file that ends with .html")
    page = make_page(load(config), config)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8", errors="replace")
    print(f"wrote {short(out, 1000)} ({out.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    distjudge.cli(main, ReportConfig)
