"""One self-contained HTML page about one run or several: metrics with intervals and floors, figures, and every item to browse.

    python plots/report.py runs/first                                     # writes runs/first/report.html
    python plots/report.py runs/full runs/single runs/gpt --out compare.html --names full single gpt-4o
    python plots/report.py runs/old --items test.jsonl                    # texts and groups, where predictions.jsonl holds none

The page asks for nothing from anywhere, and its policy forbids it to; what people wrote is shown as text. Runs that are
compared must have the same labels, and the same votes for the items that they share. Intervals are 95 % percentile intervals of a
bootstrap that draws groups of items ("group"; an item without one is a group of its own), as a whole, with replacement.
"""
import base64
import dataclasses
import hashlib
import html
import io
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import tyro

import distjudge
from distjudge import InputError, Item
from plots import figures

COLOURS = ("#e08214", "#2f9e77", "#b5579d", "#8c6bb1", "#a6761d", "#d6604d")
METRICS = {  # the names of evaluate(), and what they mean to a reader
    "kl": ("KL to the votes, nats", "lower is better"), "kl_truth": ("KL to the truth, nats", "lower is better"),
    "accuracy": ("accuracy", "top label = majority label"), "js_divergence": ("Jensen-Shannon divergence, nats", "lower is better"),
    "total_variation": ("total variation", "lower is better"), "brier": ("Brier score", "lower is better"),
    "emd": ("earth mover's distance", "lower is better"), "rps": ("ranked probability score", "lower is better"),
    "label_mass": ("label mass", "probability that the answer is a label at all")}
FLOORS = {"kl_noise_floor": "noise floor of KL: what the true distributions would score", "kl_marginal": "KL of the training marginal"}
FIRST = ("recipe", "model", "base_url", "answered_by", "train", "test", "files", "items", "labels", "alpha", "eps", "radius", "epochs",
         "learning_rate", "batch_size", "grad_accum", "lora_rank", "four_bit", "seed")


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
    title: str = ""
    """Title of the page."""
    draws: int = 1000
    """Draws of the bootstrap."""
    seed: int = 0
    """Seed of the bootstrap."""
    max_chars: int = 4000
    """Longer texts are cut in the page, and marked as cut; 0 cuts nothing."""


@dataclasses.dataclass
class Loaded:
    """A run folder: figures.Run, its rows and config, and the scores of each item, {metric: (N,)}."""

    name: str
    run: figures.Run
    rows: list[dict[str, Any]]
    config: dict[str, Any]
    scores: dict[str, torch.Tensor]


def item_scores(run: figures.Run, label_mass: Sequence[float | None], ordered: bool | None) -> dict[str, torch.Tensor]:
    """distjudge.item_scores of a run folder, but for the correlations, and the label masses: (N,) float64 each."""
    truths = [None] * len(run.ids) if run.truth is None else [dict(zip(run.labels, row, strict=True)) for row in run.truth.tolist()]
    items = [Item(name, "", dict(zip(run.labels, votes, strict=True)), truth=truth)
             for name, votes, truth in zip(run.ids, run.votes.tolist(), truths, strict=True)]
    found = distjudge.item_scores(run.q / run.q.sum(1, keepdim=True), items, ordered)
    scores = {name: score for name, score in found.items() if score.dim() == 1}
    if None not in label_mass:
        scores["label_mass"] = torch.tensor(label_mass, dtype=torch.float64)
    return scores


def intervals(values: torch.Tensor, groups: Sequence[Any], draws: int, seed: int) -> list[tuple[float, float]]:
    """95 % percentile intervals of the means of the columns of values (N, M), drawing whole groups with replacement."""
    number = {group: k for k, group in enumerate(dict.fromkeys(groups))}
    at = torch.tensor([number[group] for group in groups])
    sums = torch.zeros(len(number), values.shape[1] + 1, dtype=torch.float64)
    sums.index_add_(0, at, torch.cat([values.double(), torch.ones(len(values), 1, dtype=torch.float64)], dim=1))
    draw = torch.Generator().manual_seed(seed)
    means = []
    for _ in range(draws):
        drawn = sums[torch.randint(len(number), (len(number),), generator=draw)].sum(0)
        means.append(drawn[:-1] / drawn[-1])
    low, high = torch.stack(means).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    return list(zip(low.tolist(), high.tolist(), strict=True))


def load(config: ReportConfig) -> list[Loaded]:
    texts: dict[str, dict[str, Any]] = {}
    for path in config.items:
        for where, row, problem in distjudge.read_rows(path):
            parsed = distjudge.parse_row(row)[0] if not problem else {}
            if problem or not parsed["id"]:
                raise InputError(f"{where}: {problem or 'id: missing, and no prompt to make one from'}")
            texts[parsed["id"]] = {"prompt": parsed["prompt"], "group": parsed["group"]}
    names = config.names or tuple(Path(run).resolve().name for run in config.runs)
    if len(names) != len(config.runs):
        raise InputError(f"names: {len(names)} for {len(config.runs)} runs")
    if len(set(names)) != len(names):
        names = tuple(str(run) for run in config.runs)
    if not config.runs or len(config.runs) > len(COLOURS):
        raise InputError(f"runs: 1 to {len(COLOURS)} run folders, not {len(config.runs)}")
    loaded: list[Loaded] = []
    for folder, name in zip(config.runs, names, strict=True):
        run, path = figures.load_run(Path(folder)), Path(folder) / "predictions.jsonl"
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if len(set(run.ids)) != len(run.ids):
            raise InputError(f"{path}: an id stands there twice")
        try:
            settings = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            settings = {}
        except ValueError as error:
            raise InputError(f"{Path(folder) / 'config.json'}: broken JSON: {error}") from None
        first = loaded[0] if loaded else None
        if first and run.labels != first.run.labels:
            raise InputError(f"{path}: labels {distjudge.listed(run.labels)} are not those of {config.runs[0]}, "
                             f"{distjudge.listed(first.run.labels)}")
        for row in rows:
            row |= {field: value for field, value in texts.get(row["id"], {}).items() if value is not None}
        others = {row["id"]: row["counts"] for other in loaded for row in other.rows}
        if differs := [row["id"] for row in rows if row["id"] in others and others[row["id"]] != row["counts"]]:
            raise InputError(f"{path}: item '{distjudge.short(differs[0])}': its votes are not those it has in another run")
        scores = item_scores(run, [row.get("label_mass") for row in rows], settings.get("ordered"))
        loaded.append(Loaded(name, run, rows, settings, scores))
    return loaded


# --- the page ----------------------------------------------------------------------------------------------------------------
class Markup(str):
    """HTML made here, which is not escaped again."""


def tag(name: str, *content: Any, **attributes: str) -> Markup:
    """An HTML element; its content is escaped unless it is Markup."""
    inner = "".join(part if isinstance(part, Markup) else html.escape(str(part)) for part in content)
    named = "".join(f' {key.rstrip("_")}="{html.escape(value)}"' for key, value in attributes.items())
    return Markup(f"<{name}{named}>{inner}</{name}>")


def table(head: Sequence[Any], rows: Sequence[Sequence[Any]], kind: str) -> Markup:
    """A table; the first cell of a row is its heading."""
    top = [tag("thead", tag("tr", *(tag("th", cell) for cell in head)))] if head else []
    lines = [tag("tr", tag("th", row[0]), *(tag("td", cell) for cell in row[1:])) for row in rows]
    return tag("div", tag("table", *top, tag("tbody", *lines), class_=kind), class_="wide")


def group_of(row: dict[str, Any]) -> Any:
    return row.get("group", ("item", row["id"]))


def metrics_table(loaded: Sequence[Loaded], config: ReportConfig) -> Markup:
    """Means of the metrics with their intervals, a column a run, and the floors."""
    columns = []
    for one in loaded:
        values = torch.stack(list(one.scores.values()), dim=1)
        ends = intervals(values, [group_of(row) for row in one.rows], config.draws, config.seed)
        columns.append({name: f"{values[:, k].mean():.3f} [{ends[k][0]:.3f}, {ends[k][1]:.3f}]" for k, name in enumerate(one.scores)})
    rows = [[Markup(html.escape(title) + tag("small", hint)), *(column.get(name, "–") for column in columns)]
            for name, (title, hint) in METRICS.items() if any(name in column for column in columns)]
    for k, (name, title) in enumerate(FLOORS.items(), 1):  # right under the KL
        values = [one.run.metrics.get(name) for one in loaded]
        rows.insert(k, [title, *("–" if value is None else f"{value:.3f}" for value in values)])
    rows.append(["items (groups)", *(f"{len(one.rows):,} ({len(set(map(group_of, one.rows))):,})" for one in loaded)])
    return table(["", *(one.name for one in loaded)], rows, "metrics")


def differences_table(loaded: Sequence[Loaded], config: ReportConfig) -> Markup:
    """Each run minus the first, item by item on the items both have, with the interval of the mean difference."""
    first, rows = loaded[0], []
    place = {row["id"]: i for i, row in enumerate(first.rows)}
    for one in loaded[1:]:
        both = [(place[row["id"]], i) for i, row in enumerate(one.rows) if row["id"] in place]
        cells = ["–"] * 3
        if both:
            a, b = (torch.tensor(side) for side in zip(*both, strict=True))
            gaps = torch.stack([one.scores[name][b] - first.scores[name][a] for name in ("kl", "accuracy", "total_variation")], dim=1)
            ends = intervals(gaps, [group_of(one.rows[i]) for i in b.tolist()], config.draws, config.seed)
            cells = [f"{gap:+.3f} [{low:+.3f}, {high:+.3f}]" for gap, (low, high) in zip(gaps.mean(0).tolist(), ends, strict=True)]
        rows.append([f"{one.name} − {first.name}", *cells, f"{len(both):,}"])
    return table(["", "KL, nats", "accuracy", "total variation", "items in common"], rows, "metrics")


def settings_part(one: Loaded) -> Markup:
    """What was trained on what: the settings that matter first, all of them to unfold."""
    def show(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else str(value)

    known = [name for name in FIRST if one.config.get(name) not in (None, "", [])]
    rest = [name for name in one.config if name not in known]
    parts = [table([], [[name, show(one.config[name])] for name in known], "settings")]
    if not known:
        parts = [tag("p", "This folder has no config.json.")]
    if rest:
        all_of_them = table([], [[name, show(one.config[name])] for name in rest], "settings")
        parts.append(tag("details", tag("summary", "all settings and versions"), all_of_them))
    return tag("section", tag("h3", one.name), *parts)


def figures_part(one: Loaded) -> Markup:
    pictures = []
    names = [*figures.USUAL, *["simplex"] * (len(one.run.labels) == 3), *["curves"] * any("loss" in row for row in one.run.log)]
    for name, draw in ((name, figures.FIGURES[name]) for name in names):
        figure, buffer = draw(one.run), io.BytesIO()
        figure.savefig(buffer, format="png", dpi=120)
        figures.plt.close(figure)
        data = base64.b64encode(buffer.getvalue()).decode()
        pictures.append(Markup(f'<img class="{name}" alt="{html.escape(f"{name} of {one.name}")}" src="data:image/png;base64,{data}">'))
    return tag("section", tag("h3", one.name), tag("div", *pictures, class_="figures"))


def page_data(loaded: Sequence[Loaded], max_chars: int) -> dict[str, Any]:
    """What the list of items is made from: one array an item, predictions in the order of the runs."""
    items: dict[str, dict[str, Any]] = {}
    for k, one in enumerate(loaded):
        for i, row in enumerate(one.rows):
            item = items.setdefault(row["id"], {"id": row["id"], "counts": one.run.votes[i].tolist(), "text": "", "cut": 0, "group": None,
                                                "truth": None, "q": [None] * len(loaded), "mass": [None] * len(loaded),
                                                "flipped": [None] * len(loaded), "kl": [None] * len(loaded)})
            text = row.get("prompt") or ""
            cut = max(0, len(text) - max_chars) if max_chars else 0
            item["text"], item["cut"] = (text[: len(text) - cut], cut) if text else (item["text"], item["cut"])
            item["group"] = row.get("group", item["group"])
            item["truth"] = one.run.truth[i].tolist() if one.run.truth is not None else item["truth"]
            item["q"][k] = [round(x, 5) for x in one.run.q[i].tolist()]
            item["mass"][k], item["flipped"][k] = row.get("label_mass"), row.get("flipped")
            item["kl"][k] = round(one.scores["kl"][i].item(), 5)
    return {"labels": loaded[0].run.labels, "runs": [one.name for one in loaded], "items": list(items.values())}


def embed(data: Any) -> str:
    """JSON that can stand inside a script element, whatever people wrote."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    text = text if distjudge.is_text(text) else json.dumps(data, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def make_page(loaded: Sequence[Loaded], config: ReportConfig) -> str:
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    script = template.split("<script>")[1].split("</script>")[0]
    hashed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()  # the policy lets this script run and no other
    title = config.title or "Judges and votes: " + ", ".join(one.name for one in loaded)
    note = (f"Means over items; in brackets 95 % intervals of a bootstrap over groups of items ({config.draws:,} draws, seed "
            f"{config.seed}). A KL to votes means little without its noise floor.")
    results = [tag("h1", title), tag("p", note, class_="note"), metrics_table(loaded, config)]
    if len(loaded) > 1:
        results += [tag("h2", "Compared item by item"), differences_table(loaded, config)]
    results += [tag("h2", "What was trained on what"), *(settings_part(one) for one in loaded)]
    results += [tag("h2", "Figures"), *(figures_part(one) for one in loaded)]
    filled = {"policy": f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{hashed}'; base-uri 'none'",
              "title": html.escape(title), "results": "".join(results), "data": embed(page_data(loaded, config.max_chars)),
              "colours": f"--human:{figures.HUMAN};" + "".join(f"--run{k}:{colour};" for k, colour in enumerate(COLOURS))}
    pieces = re.split(r"\{\{(\w+)\}\}", template)  # each placeholder once, and nothing that was put in is read again
    return "".join(filled[piece] if k % 2 else piece for k, piece in enumerate(pieces))


def main(config: ReportConfig) -> None:
    if config.draws < 20:
        raise InputError(f"draws: must be 20 or more, not {config.draws}")
    if config.max_chars < 0:
        raise InputError(f"max_chars: must be 0 or more, not {config.max_chars}")
    loaded = load(config)
    out = Path(config.out or Path(config.runs[0]) / "report.html")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(make_page(loaded, config), encoding="utf-8", errors="replace")
    print(f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    distjudge.cli(main, ReportConfig)
