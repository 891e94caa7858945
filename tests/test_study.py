"""The studies on tiny settings: what is trained, what is reused, what tables say; and the helpers by hand."""

import dataclasses
import json
import math
import shutil
import sys
import types
from pathlib import Path

import distjudge
from distjudge import Config, InputError

import pandas as pd
import pytest
import study
import torch
from conftest import change_weights

from plots import figures
from plots import study as draw

SAMPLE = (Path(__file__).resolve().parents[1] / "data" / "panel.jsonl").read_text().splitlines()
ROWS = [json.loads(line) for line in SAMPLE]
FEW = ROWS[:60] + ROWS[1200:1224]  # to train on and to test on
TINY = {"hidden": 16, "layers": 1, "epochs": 1.0, "vocabulary": 320, "seeds": 2, "draws": 100}
TWO = ("single-point", "distribution")


def write_items(folder, rows=FEW, name="few"):
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Shared, so that cells are. A test that needs a study's cells runs it first: it may come alone."""
    return write_items(tmp_path_factory.mktemp("studies"))


def config_of(folder, name="main", **settings):
    files = {"train": (str(folder / "few.jsonl"),), "out": str(folder / "out")}
    return study.StudyConfig(study=name, **TINY | files | settings)


def run(folder, name, **settings):
    """Runs a study in the folder; returns its table, and how many cells it trained."""
    cells = folder / "out" / "cells"
    before = {p: p.stat().st_mtime_ns for p in cells.glob("*/cell.json")}
    study.main(config_of(folder, name, **settings))
    kept = {p: p.stat().st_mtime_ns for p in cells.glob("*/cell.json") if p in before}
    assert kept == before  # what is there is not trained again
    assert (folder / "out" / f"{name}.png").stat().st_size > 5000 and not list((folder / "out").glob("*.svg"))
    return draw.read_table(folder / "out" / f"{name}.csv"), len(list(cells.glob("*/cell.json"))) - len(before)


def find(rows, **where):
    """The rows that are as named; None: the column is empty there."""
    for name, value in where.items():
        rows = rows[rows[name].isna() if value is None else rows[name] == value]
    return rows.to_dict("records")


def cells_in(folder):
    """Each cell.json of a study's folder, with its predictions as a tensor."""
    for path in (folder / "out").glob("cells/*/cell.json"):
        lines = (path.parent / "predictions.jsonl").read_text().splitlines()
        predicted = torch.tensor([json.loads(line)["predicted"] for line in lines], dtype=torch.float64)
        yield json.loads(path.read_text()) | {"predicted": predicted}


def test_pairs_are_judged_in_both_orders_by_a_model_of_ones_own(tiny_model, tmp_path, capsys):
    swap = {"1": "5", "2": "4", "3": "3", "4": "2", "5": "1"}
    other = {row["id"]: {"prompt": row["prompt"] + " Other.", "labels": swap} for row in FEW}
    rows = [row | {"swap": other[row["id"]]} for row in FEW[:30] + FEW[60:70]]
    settings = {"model": str(tiny_model), "methods": ("untrained",), "seeds": 1}
    study.main(config_of(write_items(tmp_path, rows), **settings))
    assert "label mass: " in capsys.readouterr().out
    (cell,), items = cells_in(tmp_path), distjudge.load_items(rows)
    judge = distjudge.load_judge(str(tiny_model), list(swap), lora_rank=0)
    both, one = distjudge.judge_items(judge, items[30:])[0], judge.predict([i.prompt for i in items[30:]])
    assert torch.allclose(cell["predicted"], both.double(), atol=1e-5)
    assert (cell["predicted"] - one).abs().max() > 1e-3


def test_main_compares_rivals_and_is_resumed_cell_by_cell(tmp_path, capsys):
    folder = write_items(tmp_path)
    rows, trained = run(folder, "main", methods=TWO)
    assert trained == 4
    said = capsys.readouterr().out
    assert "4 of 4 judges are to be made, each a folder in " in said and "goes on with the next" in said
    assert "] 1 of 4: single-point" in said and "] 4 of 4, about 1 min left: distribution" in said
    _, test = distjudge.load_data(Config(train=(str(folder / "few.jsonl"),)))
    for cell in cells_in(folder):
        at = {"method": cell["method"], "seed": str(cell["settings"]["seed"]), "entropy": None}
        wanted = distjudge.evaluate(cell["predicted"], test, draws=0)
        for metric in ("kl", "kl_truth", "accuracy", "entropy_correlation", "rps"):
            assert find(rows, metric=metric, **at)[0]["value"] == pytest.approx(wanted[metric], abs=1e-4)
    whole = {r["method"]: r for r in find(rows, seed="all", metric="kl_truth", entropy=None)}
    first, second = whole["single-point"], whole["distribution"]
    assert all(whole[m]["low"] < whole[m]["value"] < whole[m]["high"] for m in (*TWO, "marginal"))
    assert second["difference"] == pytest.approx(second["value"] - first["value"], abs=1e-4)
    assert second["against"] == "single-point" and math.isnan(first["difference"])
    keys = rows[["method", "seed", "metric", "entropy"]]
    assert list(rows) == draw.COLUMNS and not keys.duplicated().any()
    assert set(rows["study"]) == {"main"} and set(rows["data"]) == {"few"}
    qs = [cell["predicted"] for cell in cells_in(folder) if cell["method"] == "single-point"]
    worth = distjudge.survey_equivalence(torch.stack(qs), test, 100)
    (people,) = find(rows, method="single-point", metric="people")
    assert [people[k] for k in ("value", "low", "high")] == pytest.approx(list(worth.values()), rel=1e-4)
    text = (folder / "out" / "main.md").read_text()
    assert text.startswith("| method | worth, people | KL to votes |") and "the most disputed last" in text
    assert f"| single-point | {worth['mean']:.1f} [{worth['low']:.1f}, " in text and "60 training" in text
    assert run(folder, "main", methods=TWO, seeds=1)[1] == 0  # a table of the seed that is finished
    next((folder / "out").glob("cells/*/cell.json")).unlink()
    assert run(folder, "main", methods=TWO)[1] == 1
    assert (folder / "out" / "main.md").read_text() == text


def test_other_studies_share_cells(folder, monkeypatch):
    kept, _ = run(folder, "main", methods=TWO)
    rows, trained = run(folder, "sweep", alphas=(0.0, 0.8), epsilons=(0.25,))
    points = find(rows, method="distribution", seed="all", metric="kl")
    assert trained == 0 and [(r["alpha"], r["eps"]) for r in points] == [(0.0, 0.25), (0.8, 0.25)]
    kl = {m: find(kept, method=m, seed="all", metric="kl", entropy=None)[0]["value"] for m in TWO}
    assert [r["value"] for r in points] == pytest.approx([kl[m] for m in TWO], abs=1e-5)
    line, *others = draw.DRAW["sweep"](rows).axes[0].containers
    assert line.lines[0].get_ydata().tolist() == [r["value"] for r in points] and not others
    moves, move = [], study.perturb
    monkeypatch.setattr(study, "perturb", lambda *given: moves.append(given[1]) or move(*given))
    monkeypatch.setattr(study, "MOVES", 5)
    rows, trained = run(folder, "robustness", deltas=(0.0, 0.2), methods=TWO)
    assert moves == [0.0] + 5 * [0.2]
    at = {d: find(rows, method="single-point", seed="all", delta=d)[0]["value"] for d in (0.0, 0.2)}
    assert trained == 0 and at[0.0] == pytest.approx(kl["single-point"], abs=1e-5) and at[0.2] != at[0.0]


@pytest.mark.slow
def test_ablation_budget_and_cost(folder):
    run(folder, "main", methods=TWO)
    assert run(folder, "ablation")[1] == 4  # without KL is single-point, distribution is there: two are new
    rows, trained = run(folder, "budget", seeds=1)
    ways = {(1.0, 60.0), (3.0, 20.0), (5.0, 12.0)}
    assert trained == 9 and set(zip(rows["votes"], rows["items"], strict=True)) == ways
    rows, _ = run(folder, "cost", seeds=1, methods=TWO)
    assert (rows["value"] > 0).all() and set(rows["method"]) == set(TWO)


@pytest.mark.slow
def test_length_is_chosen_for_each_half_by_the_votes_of_the_other(tmp_path):
    folder = write_items(tmp_path)
    rows, trained = run(folder, "length", methods=TWO, lengths=(1.0, 6.0))
    assert trained == 8
    _, test = distjudge.load_data(Config(train=(str(folder / "few.jsonl"),)))
    half = {item.id for item in distjudge.split_items(test, 0.5, 0)[0]}
    halves = [[i for i, item in enumerate(test) if (item.id in half) == side] for side in (True, False)]
    p, truth = distjudge.shares_of(test), distjudge.truths_of(test)
    kl = {}  # (method, seed, epochs): of each item, to its votes and to its truth
    for cell in cells_in(folder):
        at = (cell["method"], cell["settings"]["seed"], cell["settings"]["epochs"])
        kl[at] = [distjudge.kl_divergence(target, cell["predicted"]) for target in (p, truth)]
    for method in TWO:
        for seed in (0, 1):
            total = 0.0
            for mine, other in (halves, halves[::-1]):
                best = min((1.0, 6.0), key=lambda e: kl[method, seed, e][0][other].mean())
                total += kl[method, seed, best][1][mine].sum().item()
            (row,) = find(rows, method=method, seed=str(seed), metric="kl_truth", entropy=None, epochs=None)
            assert row["value"] == pytest.approx(total / len(test), abs=1e-4)
    text = (folder / "out" / "length.md").read_text()
    assert "| method | 1 | 6 | chosen |" in text and text.count(" x)") >= 2


@pytest.mark.slow
def test_every_method_trains_and_is_another_one(tmp_path):
    methods = [m for m in study.METHODS if m != "without KL"]  # that is single-point
    settings = {"seeds": 1, "epochs": 4.0, "learning_rate": 0.01, "methods": methods, "answer": 1.0}
    rows, trained = run(write_items(tmp_path), "methods", votes=(20,), **settings)
    assert trained == len(methods)
    own = find(rows, metric="kl_truth", seed="0", entropy=None)
    values = [row["value"] for row in own if row["method"] in methods]
    assert len(set(values)) == len(methods)
    fitted = {c["method"] for c in cells_in(tmp_path) if c["temperature"] is not None}
    assert fitted == {"temperature", "raw, calibrated", "frozen"}
    assert {c["items"] for c in cells_in(tmp_path) if c["method"] == "temperature"} == {54}


def test_calibration_and_frozen_rows_are_the_best_there_are(tiny_model, monkeypatch):
    """At the least ridge loss X^T (q - p) + penalty D = 0, X as the model itself has it, D the rows added."""
    rows, turned = ROWS[:40], "Turned round. " + ROWS[0]["prompt"]
    swap = {"prompt": turned, "labels": dict(zip("12345", "54321", strict=True))}
    items = distjudge.load_items(rows)
    judge = distjudge.load_judge(str(tiny_model), distjudge.labels_of(items), lora_rank=0)
    raw = distjudge.judge_items(judge, items)[0].double().log()
    counts = distjudge.counts_of(items) + 20 * (3 * raw).softmax(1)
    items = [
        dataclasses.replace(item, counts=dict(zip("12345", row, strict=True)))
        for item, row in zip(items, counts.tolist(), strict=True)
    ]
    temperature, bias = study.fit_calibration(raw, counts)
    assert 0.2 < temperature < 5  # else the answers themselves would not count
    calibrated, p = (raw / temperature + bias).log_softmax(1), distjudge.shares_of(items)
    q, about = study.fit_readout(judge, items, items, Config(), "calibration")
    assert torch.allclose(q.log(), calibrated, atol=1e-5)
    assert [about["temperature"], *about["bias"]] == pytest.approx([temperature, *bias.tolist()], rel=1e-4)
    monkeypatch.setattr(study, "PENALTIES", (1.0, 0.1))
    q, about = study.fit_readout(judge, items, items, Config(), "label rows")
    states = [
        judge.model(torch.tensor([i]), output_hidden_states=True).hidden_states[-1][0, -1]
        for i in judge.encode([item.prompt for item in items])
    ]
    x = torch.stack(states).detach().double()
    x = torch.nn.functional.pad((x - x.mean(0)) / x.std(), (0, 1), value=1.0)
    added = x.T @ (p - q) / about["penalty"]
    assert torch.allclose(q.log(), (calibrated + x @ added).log_softmax(1), atol=2e-4)
    assert (q.log() - calibrated).abs().max() > 0.1
    assert about["fit_seconds"] > 0 and about["feature_seconds"] > 0
    three = [{"swap": swap}, {}, {"prompt": turned}]
    three = [rows[0] | {"id": str(n)} | own for n, own in enumerate(three)]
    q, _ = study.fit_readout(judge, items, distjudge.load_items(three), Config(), "label rows")
    assert torch.allclose(q[0], (q[1] + q[2].flip(0)) / 2)
    whole = distjudge.load_judge(str(tiny_model), ["good", "good for"], lora_rank=0)
    with pytest.raises(InputError, match="frozen needs labels that differ in their first token"):
        study.fit_readout(whole, items, items, Config(), "label rows")


def test_ood_refuses_shared_items_and_drops_them_on_request(tmp_path, capsys):
    rows = [{k: v for k, v in row.items() if k != "split"} for row in ROWS[:40]]
    shared = rows[30] | {"id": "other", "prompt": rows[30]["prompt"].upper().replace(" ", "  ")}
    write_items(write_items(tmp_path, rows[:31]), [rows[0], shared, *rows[31:]], "b")
    config = config_of(tmp_path, "ood", test=(str(tmp_path / "b.jsonl"),))
    with pytest.raises(InputError, match="'other': prompt: also in the training items"):
        study.main(config)
    train, test = study.read_items(dataclasses.replace(config, overlap="drop"))
    assert len(train) == 29 and len(test) == 11 and "left out 2 of 31" in capsys.readouterr().out
    with pytest.raises(InputError, match="needs --train and --test"):
        study.read_items(dataclasses.replace(config, test=()))


def test_the_marginal_is_of_the_items_and_votes_that_each_seed_s_judge_had(tmp_path):
    """Ten of sixty prompts are too long, fifty votes of one person each are drawn anew by each seed."""
    long = [row | {"prompt": row["prompt"] + " soup" * 1000} for row in FEW[:10]]
    folder, settings = write_items(tmp_path, long + FEW[10:]), {"overlong": "drop", "max_length": 800}
    settings |= {"methods": ("untrained",), "votes": (1, 3), "train_items": 55}
    rows, trained = run(folder, "methods", **settings)
    shop = study.Workshop(config_of(folder, "methods", **settings))
    truth = distjudge.truths_of(shop.test)
    cells = {c["settings"]["seed"]: c for c in cells_in(folder) if c["settings"]["votes"] == 1}
    assert trained == 4 and not torch.equal(cells[0]["predicted"], cells[1]["predicted"])
    for seed in (0, 1):
        items = shop.items(study.Cell("untrained", seed, 1, 55))
        assert len(items) == 55 and all(item.votes == 1 for item in items)
        left = [item for item in items if "soup soup" not in item.prompt]
        assert cells[seed]["items"] == len(left) < 55
        wanted = distjudge.kl_divergence(truth, distjudge.shares_of(left).mean(0).expand_as(truth)).mean()
        (row,) = find(rows, method="marginal", seed=str(seed), metric="kl_truth", entropy=None, votes=1)
        assert row["value"] == pytest.approx(wanted.item(), abs=1e-5)
    sizes = sorted(cell["items"] for cell in cells_in(folder))[::3]
    said = " to ".join(map(str, dict.fromkeys(sizes)))
    assert f"{said} training and 24 test items" in (folder / "out" / "methods.md").read_text()


def test_cost_is_told_an_epoch_and_compared_an_item(folder, monkeypatch):
    shop, told = study.Workshop(config_of(folder, "cost", methods=TWO)), []
    seconds = [(100, 60), (100, 54), (4, 60), (8, 54), (6, 60), (10, 54)]  # in turns; the first warms up
    cells = [{"train_seconds": s, "items": n, "settings": {"epochs": 2.0}} for s, n in seconds]
    monkeypatch.setattr(shop, "made", lambda wanted: cells)
    monkeypatch.setattr(study.Table, "write", lambda table, lines: told.append(table.frame()))
    study.cost(shop)
    whole = {row["metric"]: row["value"] for row in find(told[0], method="distribution", seed="all")}
    assert whole == pytest.approx({"seconds_per_epoch": 4.5, "items_per_second": 12, "times_the_first": 2})
    run, place = shop.settings(study.Cell("distribution", 0, repeat=1))[0], shop.folder
    assert run.save_every == 0 and not run.resume
    again = study.Workshop(config_of(folder, "cost", pack_tokens=64)).folder
    timed, judged = study.Cell("distribution", 0, repeat=1), study.Cell("distribution", 0)
    assert place(timed)[0] != again(timed)[0] and place(judged)[0] == again(judged)[0]


def test_a_budget_is_what_there_is(folder, tmp_path):
    shop, asked = study.Workshop(config_of(folder, "budget", train_items=200)), []
    shop.collect = lambda wanted: asked.extend(cell["items"] for cell in wanted.values()) or sys.exit()
    with pytest.raises(SystemExit):
        study.budget(shop)
    assert sorted(set(asked)) == [12, 20, 60]
    three = {"1": 3, "2": 0, "3": 0, "4": 0, "5": 0}
    rows = [{k: v for k, v in row.items() if k != "truth"} for row in FEW]
    few = [*rows[:5], *(row | {"counts": three} for row in rows[5:60]), *rows[60:]]
    with pytest.raises(InputError, match="5 items have 5 votes, and 12 are needed: set --train_items to 25"):
        study.budget(study.Workshop(config_of(write_items(tmp_path, few), "budget")))


def test_cells_are_known_by_what_decides_their_result(folder, tmp_path, tiny_model):
    def place(cell, folder=folder, **changes):
        return study.Workshop(config_of(folder, **changes)).folder(cell)[0].name

    cell = study.Cell("distribution", 0)
    same = place(cell)
    assert same == place(study.Cell("distribution", 0, alpha=0.8, eps=0.25))
    idle = {"seeds": 9, "draws": 500, "eval_every": 3, "save_every": 0, "resume": True}
    assert all(same == place(cell, **{name: value}) for name, value in idle.items())
    assert same == place(cell, write_items(tmp_path))  # the same items elsewhere
    deciding = {"epochs": 2.0, "learning_rate": 0.1, "hidden": 32, "steps": 3, "weight_decay": 0.0}
    others = [place(cell, **{name: value}) for name, value in deciding.items()]
    methods = study.METHODS.keys() - {"distribution", "no answer term", "without KL"}
    cells = [("distribution", 1), ("distribution", 0, 3), *((method, 0) for method in methods)]
    others += [place(study.Cell(*own)) for own in cells]
    rows = [row | {"swap": {"prompt": f"Other {n}", "labels": {}}} for n, row in enumerate(FEW)]
    others.append(place(cell, write_items(tmp_path, rows)))
    assert len({same, *others}) == len(others) + 1
    shape = {"hidden": 32, "layers": 2, "vocabulary": 400}  # of no account with a model of one's own
    own, changed = str(tiny_model), shutil.copytree(tiny_model, tmp_path / "changed") / "model.safetensors"
    known = place(cell, model=own)
    assert known == place(cell, model=own, **shape) != same
    there = str(changed.parent)
    before = place(cell, model=there)
    change_weights(changed, lambda name, w: w + 1)
    assert place(cell, model=there) != before
    changed.write_bytes(b"broken")
    for name, words in ((there, "cannot be loaded"), (str(tmp_path / "gone"), "no such folder")):
        with pytest.raises(InputError, match=f"model: {words}"):
            place(cell, model=name)
    judge = distjudge.load_judge(own, list("12345"))
    distjudge.save_judge(judge, tmp_path / "judge")
    assert place(cell, model=str(tmp_path / "judge")) not in (known, before)
    assert len({same, *(place(cell, **{name: value}) for name, value in shape.items())}) == 4


def test_votes_are_drawn_from_the_truth_or_without_replacement():
    items = distjudge.load_items(ROWS[:200])
    drawn = study.draw_votes(items, 400, seed=0)
    assert all(i.votes == 400 for i in drawn)
    assert max(abs(i.counts[c] / 400 - i.truth[c]) for i in drawn for c in i.truth) < 0.12
    assert study.draw_votes(items, 3, 0) == study.draw_votes(items, 3, 0) != study.draw_votes(items, 3, 1)
    plain = [dataclasses.replace(i, truth=None) for i in items]
    some = study.draw_votes(plain, 4, seed=0)
    assert all(i.votes == 4 for i in some)
    assert all(i.counts[c] <= j.counts[c] for i, j in zip(some, plain, strict=True) for c in i.counts)
    assert [i.counts for i in study.draw_votes(plain, 5, seed=0)] == [i.counts for i in plain]
    with pytest.raises(InputError, match="no training item has 6"):
        study.draw_votes(plain, 6, seed=0)


def test_perturbed_targets_lie_in_the_simplex_at_their_distance():
    p = torch.tensor([[1.0, 0, 0, 0], [0.4, 0.3, 0.2, 0.1], [0.5, 0.5, 0, 0]]).double().repeat(200, 1)
    moved = study.perturb(p, 0.2, torch.Generator().manual_seed(0))
    assert (moved >= 0).all() and torch.allclose(moved.sum(1), torch.ones(600).double())
    assert torch.allclose((moved - p).norm(dim=1), torch.full((600,), 0.2).double())
    assert len(moved.unique(dim=0)) == 600
    assert torch.equal(study.perturb(p, 0.0, torch.Generator()), p)
    draw, even = torch.Generator().manual_seed(0), torch.tensor([[0.5, 0.5]]).double()
    assert (study.perturb(even, 0.7, draw) - even).norm() == pytest.approx(0.7)  # 0.707 is as far as it goes
    with pytest.raises(InputError, match=r"deltas: nothing is 0.75 away"):
        study.perturb(even, 0.75, draw)


def test_temperature_smoothing_and_seconds():
    logq = torch.randn(400, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).log_softmax(1)
    counts = 100 * (logq / 2.5).softmax(1)  # people as if the judge were too sure by a factor of 2.5
    assert study.fit_temperature(logq.exp(), counts) == pytest.approx(2.5, abs=0.01)
    votes = ({"a": 2, "b": 1, "c": 0, "d": 0}, {"a": 0, "b": 2, "c": 2, "d": 0})
    items = distjudge.load_items([{"prompt": str(i), "counts": counts} for i, counts in enumerate(votes)])
    first, tie = (list(i.counts.values()) for i in study.smoothed(items, 0.2))
    assert first == pytest.approx([0.85, 0.05, 0.05, 0.05]) and tie == pytest.approx([0.05, 0.45, 0.45, 0.05])
    assert study.train_seconds(100.0, {1: 130.0, 2: 132.0, 3: 134.0}) == 6.0  # the first step warms up
    assert study.train_seconds(100.0, {4: 130.0, 5: 132.0}) == 10.0  # of a run that went on after three steps
    assert [study.train_seconds(100.0, ends) for ends in ({1: 130.0}, {})] == [30.0, None]


def test_tables_by_hand():
    """Twelve sure items and twelve even ones; a judge that is right, and one that always says a quarter."""
    sides = [{"a": 4, "b": 0}, {"a": 2, "b": 2}]
    items = distjudge.load_items([{"prompt": str(i), "counts": sides[i // 12]} for i in range(24)])
    p = distjudge.counts_of(items) / 4
    right, wrong = 0.98 * p + 0.01, torch.tensor([0.25, 0.75], dtype=torch.float64).expand(24, -1)
    config = study.StudyConfig()
    means = {"key": torch.tensor([[0.75, 0.25], [0.5, 0.5]]).double()}
    shop = types.SimpleNamespace(test=items, train=items, config=config, means=means)
    table = study.Table(shop)
    table.compare({"right": torch.stack([right, right]), "wrong": wrong[None]}, votes=4)
    table.bins({"wrong": wrong[None]}, votes=0)
    gap = {"sure": math.log(4), "even": -math.log(0.75) / 2}  # KL of the wrong judge
    (mean,) = find(table.frame(), method="wrong", seed="all", metric="kl", entropy=None)
    (best,) = find(table.frame(), method="right", seed="all", metric="kl", entropy=None)
    assert mean["value"] == pytest.approx((gap["sure"] + gap["even"]) / 2) and mean["votes"] == 4
    assert best["value"] == pytest.approx(-math.log(0.99) / 2)
    assert best["std"] == 0 and math.isnan(mean["std"])
    assert mean["difference"] == pytest.approx(mean["value"] - best["value"]) and mean["against"] == "right"
    found = {r["entropy"]: r["value"] for r in find(table.frame(), votes=None, seed="all")}
    assert found == pytest.approx({"0-0.25": gap["sure"], "0.75-1": gap["even"]})
    rows = table.whole("kl").assign(difference_low=0.001, difference_high=0.2)
    starred = [study.markdown(rows.assign(p=p), ["method"])[-1].endswith("* |") for p in (0.0500, 0.0499)]
    assert starred == [False, True]  # p alone decides, as it is printed
    assert study.shown({"value": -1e-17, "low": -1e-9, "high": 0.25}) == "0.000 [0.000, 0.250]"
    many = {"metric": "people", "value": 4.25, "low": 2, "high": math.inf}
    assert study.shown(many) == "4.2 [2.0, ∞]" and study.shown(many | {"low": math.nan}) == "4.2"
    lines = study.markdown(table.whole("kl"), ["votes", "method"])
    values = [f"{r['value']:.3f} [{r['low']:.3f}, {r['high']:.3f}]" for r in (best, mean)]
    assert lines[0] == "| votes | method | KL to votes |"
    assert lines[2:] == [f"| 4 | right | {values[0]} |", f"| 4 | wrong | {values[1]}* |"]
    bound = {"metric": "accuracy", "value": 0.5, "low": -0.1, "high": 1.1}
    assert study.shown(bound) == "0.500 [0.000, 1.000]"
    marginal = table.references("key")["marginal"]
    assert marginal.shape == (2, 24, 2) and torch.equal(marginal[:, 5], means["key"])
    own = torch.rand(2, 24, generator=torch.Generator().manual_seed(0)).double()
    table.summarize("brier", {"one": own, "more": own + 1}, [None] * 24)  # paired by seed, as well as by item
    (gap,) = find(table.frame(), method="more", metric="brier", seed="all")
    assert [gap[f"difference{end}"] for end in ("", "_low", "_high")] == pytest.approx([1.0, 1.0, 1.0])


def test_what_does_not_fit_is_refused(folder):
    for name, value, words in (
        ("votes", (0,), "votes: must be 1"),
        ("lengths", (4.0, 4.0), "lengths: must be different"),
        ("draws", 9, "draws: must be 100"),
        ("deltas", (-0.1,), "deltas: must be numbers of 0 or more"),
        ("alphas", (), "alphas: must be numbers of 0 or more"),
        ("teacher", 5.0, "teacher: each row has its own"),
        ("alpha", 0.1, "alpha, eps: each row has its own; sweep takes"),
    ):
        with pytest.raises(InputError, match=words):
            study.main(config_of(folder, **{name: value}))
    few = {"votes": (5,), "train_items": 70}
    for name, settings, words in (
        ("sweep", {"votes": (1, 3)}, "votes: sweep takes one"),
        ("sweep", {"methods": TWO}, "methods: sweep takes one"),
        ("budget", few, "votes: budget takes 1, 3 and 5 by itself"),
    ):
        with pytest.raises(InputError, match=words):
            study.main(config_of(folder, name, **settings))
    with pytest.raises(InputError, match="methods: cost times training, and untrained has none"):
        study.main(config_of(folder, "cost", methods=("distribution", "untrained")))
    (folder / "other.csv").write_text("study,method,seed,metric,value\nmagic,a,0,kl,1\n")
    (folder / "words.csv").write_text("study,method,seed,metric,value\nmain,a,0,kl,many\n")
    for name in ("few.jsonl", "other.csv", "words.csv", "nowhere.csv"):
        with pytest.raises(InputError, match=f"{name}: not a study's table"):
            draw.read_table(folder / name)


def test_simplex_and_training_curves():
    votes = ({"a": 3, "b": 1, "c": 1}, {"a": 5, "b": 0, "c": 0}, {"a": 2, "b": 2, "c": 1})
    items = distjudge.load_items([{"prompt": str(n), "counts": own} for n, own in enumerate(votes)])
    log = [{"step": s, "loss": 1 / s} for s in (1, 2, 3)] + [{"step": 3, "eval_kl": 0.4}]
    run = figures.Run(items, distjudge.shares_of(items), {"kl_noise_floor": 0.1}, log)
    first = figures.draw_simplex(run).axes[1].collections[0].get_offsets()
    assert first[1].tolist() == pytest.approx([0, 0])
    assert first[0].tolist() == pytest.approx([0.2 * 1 + 0.2 * 0.5, 0.2 * 3**0.5 / 2])
    loss, kl = (axes.lines for axes in figures.draw_curves(run).axes)
    assert loss[0].get_xydata().tolist() == [[1, 1], [2, 0.5], [3, pytest.approx(1 / 3)]]
    assert len(loss) == 1 and [line.get_ydata()[0] for line in kl] == [0.4, 0.1]  # no floor under a loss
    run.log[:] = [{"step": s, "loss": s % 3} for s in range(250)]
    (line,) = figures.draw_curves(run).axes[0].lines
    assert line.get_xydata()[:2].tolist() == [[1, 1], [4, 1]] and len(line.get_xydata()) == 84
    run.log[:] = []
    with pytest.raises(InputError, match="takes three labels"):
        figures.draw_simplex(figures.Run(distjudge.load_items(FEW), torch.full((84, 5), 0.2)))
    with pytest.raises(InputError, match="no log"):
        figures.draw_curves(run)


def test_whiskers_stand_beside_each_other_and_a_table_for_a_paper(tmp_path):
    row = {"study": "main", "data": "few", "seed": "all", "metric": "kl"}
    row |= {"value": 0.5, "low": 0.4, "high": 0.6}
    bins = (None, "0-0.25", "0.25-0.5")
    rows = [row | {"method": m, "entropy": e} for m in ("first", "second", "marginal", "third") for e in bins]
    pd.DataFrame(rows).to_csv(tmp_path / "main.csv", index=False)
    lower = draw.draw_methods(draw.read_table(tmp_path / "main.csv")).axes[1]
    at = [x for bars in lower.containers for x in bars.lines[0].get_xdata()]
    assert sorted(at) == pytest.approx([e + x / 80 for e in (0, 1) for x in (-9, -3, 3, 9)])
    assert "agree" in lower.get_title()
    ends = [bars.lines[2][0].get_segments()[0][:, 1].tolist() for bars in lower.containers]
    assert ends == [pytest.approx([0.4, 0.6])] * 4
    titles = {1: ": intervals leave out chance in training", 4: "s: intervals are rough", 5: "s"}
    for seeds, said in titles.items():
        table = pd.DataFrame(row | {"seed": ["all", *map(str, range(seeds))]})
        assert draw.title_of(table) == f"main on few, {seeds} seed{said}"
    table = "| method | KL to votes |\n| --- | --- |\n| a_b | 0.500* [0.400, ∞] |\n| c |  |\n| d | – |"
    (tmp_path / "main.md").write_text(f"50 % of it\n\n{table}\n\nStars: none.\n", encoding="utf-8")
    draw.main(draw.PlotConfig((str(tmp_path / "main.csv"),), str(tmp_path / "out"), latex=True))
    text = (tmp_path / "out" / "main.tex").read_text(encoding="utf-8")
    assert text.startswith("\\begin{tabular}{ll}\n\\toprule\nmethod & KL to votes")
    assert "a\\_b & 0.500* [0.400, $\\infty$] \\\\\nc &  \\\\\nd & -- \\\\\n" in text and "Stars" not in text
    assert (tmp_path / "out" / "main.png").exists()
