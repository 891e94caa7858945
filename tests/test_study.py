"""The studies on tiny settings, in one process: what is trained, what is reused, what the tables say; and the helpers by hand."""
import csv
import dataclasses
import json
import math
from pathlib import Path

import pytest
import study
import torch

import distjudge
from distjudge import Config, InputError
from plots import figures
from plots import study as draw

LINES = (Path(__file__).resolve().parents[1] / "data" / "panel.jsonl").read_text().splitlines(keepends=True)
TINY = {"hidden": 16, "layers": 1, "epochs": 1.0, "batch_size": 16, "vocabulary": 320, "seeds": 2, "draws": 100}
TWO = ("single-point", "distribution")


def write_few(folder):
    (folder / "few.jsonl").write_text("".join(LINES[:60] + LINES[1200:1224]))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Shared, so that cells are; a test that needs the cells of a study runs it first, for another process may have run the others."""
    return write_few(tmp_path_factory.mktemp("studies"))


def run(folder, name, **settings):
    """Runs a study in the shared folder; returns its table, and how many cells it trained."""
    cells = folder / "out" / "cells"
    before = {p: p.stat().st_mtime_ns for p in cells.glob("*/cell.json")}
    study.main(study.StudyConfig(study=name, train=(str(folder / "few.jsonl"),), out=str(folder / "out"), **TINY | settings))
    kept = {p: p.stat().st_mtime_ns for p in cells.glob("*/cell.json") if p in before}
    assert kept == before  # what is there is not trained again
    return draw.read_table(str(folder / "out" / f"{name}.csv")), len(list(cells.glob("*/cell.json"))) - len(before)


def test_pairs_are_judged_in_both_orders(tmp_path):
    swap = {"1": "5", "2": "4", "3": "3", "4": "2", "5": "1"}
    rows = [json.loads(line) for line in LINES[:30] + LINES[1200:1210]]
    rows = [row | {"swap": {"prompt": row["prompt"] + " Other.", "labels": swap}} for row in rows]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    study.main(study.StudyConfig(study="main", train=(str(tmp_path / "pairs.jsonl"),), out=str(tmp_path), methods=("untrained",), **TINY | {"seeds": 1}))
    (base,), (cell,) = (tmp_path / "base").iterdir(), (tmp_path / "cells").iterdir()
    judge, items = distjudge.load_judge(str(base), list(swap), lora_rank=0), distjudge.load_items(rows)
    q = distjudge.judge_items(judge, items[30:])[0]
    got = torch.tensor([json.loads(line)["predicted"] for line in (cell / "predictions.jsonl").open()])
    one = judge.predict([item.prompt for item in items[30:]])
    assert torch.allclose(got, q, atol=1e-5) and (got - one).abs().max() > 1e-3


def find(rows, **where):
    return [r for r in rows if all(r[k] == v for k, v in where.items())]


def test_main_compares_rivals_and_is_resumed_cell_by_cell(tmp_path, capsys):
    folder = write_few(tmp_path)
    rows, trained = run(folder, "main", methods=TWO)
    assert trained == 4
    out = folder / "out"
    for cell in out.glob("cells/*/cell.json"):
        found = json.loads(cell.read_text())
        q = torch.tensor([json.loads(line)["predicted"] for line in (cell.parent / "predictions.jsonl").read_text().splitlines()])
        _, test = distjudge.load_data(Config(train=(str(folder / "few.jsonl"),)))
        here = find(rows, method=found["method"], seed=str(found["settings"]["seed"]), metric="kl", entropy="")
        assert here[0]["value"] == pytest.approx(distjudge.evaluate(q, test, floor_draws=0)["kl"], abs=1e-4)
    means = {m: find(rows, method=m, seed="all", metric="kl_truth", entropy="")[0] for m in ("single-point", "distribution", "marginal")}
    assert all(r["low"] < r["value"] < r["high"] for r in means.values())
    assert means["distribution"]["difference"] == pytest.approx(means["distribution"]["value"] - means["single-point"]["value"], abs=1e-4)
    assert means["distribution"]["against"] == "single-point" and means["single-point"]["difference"] is None
    assert "| distribution |" in (out / "main.md").read_text() and (out / "main.png").stat().st_size > 5000
    victim = next(out.glob("cells/*/cell.json"))
    victim.unlink()
    rows, trained = run(folder, "main", methods=TWO, report=True)
    assert trained == 0 and "1 cells are not finished" in capsys.readouterr().out
    assert len(find(rows, method="distribution", metric="kl", entropy="")) == 2  # the seed that all methods have, and the mean
    assert run(folder, "main", methods=TWO)[1] == 1


def test_other_studies_share_cells_and_write_tables_and_figures(folder):
    run(folder, "main", methods=TWO)
    rows, trained = run(folder, "sweep", alphas=(0.0, 0.8), epsilons=(0.25,))
    assert trained == 0 and {(r["alpha"], r["eps"]) for r in find(rows, method="distribution")} == {(a, 0.25) for a in (0.0, 0.8)}
    rows, trained = run(folder, "robustness", deltas=(0.0, 0.2), perturbations=5, methods=TWO)
    at = {d: find(rows, method="single-point", seed="all", delta=d)[0]["value"] for d in (0.0, 0.2)}
    kept = draw.read_table(str(folder / "out" / "main.csv"))
    assert trained == 0 and at[0.0] == pytest.approx(find(kept, method="single-point", seed="all", metric="kl", entropy="")[0]["value"], abs=1e-5)
    assert at[0.2] != at[0.0]
    rows, _ = run(folder, "adversary", seeds=1, votes=(1,))
    one = {r["metric"]: r["value"] for r in find(rows, method="trained judge, one vote")}
    assert one["gain_steps"] == 0 and one["gain_exact"] >= 0 and one["bound_above"] <= 1.1e-6
    for name in ("sweep", "robustness", "adversary"):
        assert (folder / "out" / f"{name}.png").stat().st_size > 5000 and (folder / "out" / f"{name}.svg").exists()


@pytest.mark.slow
def test_ablation_budget_and_cost(folder):
    run(folder, "main", methods=TWO)
    assert run(folder, "ablation")[1] == 2 * 2  # without KL is single-point, and distribution is there: two of the four are new
    rows, trained = run(folder, "budget", seeds=1)
    assert trained == 9 and {(r["votes"], r["items"]) for r in rows} == {(1, 60), (3, 20), (5, 12)}
    rows, _ = run(folder, "cost", seeds=1, methods=TWO)
    assert all(r["value"] > 0 for r in rows) and {r["method"] for r in rows} == set(TWO)
    for name in ("ablation", "budget", "cost"):
        assert (folder / "out" / f"{name}.png").stat().st_size > 5000 and (folder / "out" / f"{name}.svg").exists()


@pytest.mark.slow
def test_length_is_chosen_for_each_half_by_the_votes_of_the_other(tmp_path):
    folder = write_few(tmp_path)
    rows, trained = run(folder, "length", methods=TWO, lengths=(1.0, 6.0))
    assert trained == 8
    _, test = distjudge.load_data(Config(train=(str(folder / "few.jsonl"),)))
    here = {item.id for item in distjudge.split_items(test, 0.5, 0)[0]}
    kl = {}  # (method, seed, epochs): for each half, the mean KL to votes and to the truth
    for cell in (folder / "out").glob("cells/*/cell.json"):
        found = json.loads(cell.read_text())
        q = [json.loads(line)["predicted"] for line in (cell.parent / "predictions.jsonl").read_text().splitlines()]
        parts = [[i for i, item in enumerate(test) if (item.id in here) == side] for side in (True, False)]
        kl[found["method"], found["settings"]["seed"], found["epochs"]] = [
            [distjudge.kl_divergence(torch.tensor([list(p[i].values()) for i in part], dtype=torch.float64) / total, torch.tensor([q[i] for i in part], dtype=torch.float64))
             .mean().item() for p, total in (([item.counts for item in test], torch.tensor([[test[i].votes] for i in part])), ([item.truth for item in test], 1.0))]
            for part in parts]
    chosen = {}
    for method in TWO:
        for seed in (0, 1):
            best = [min((1.0, 6.0), key=lambda e: kl[method, seed, e][1 - side][0]) for side in (0, 1)]
            wanted = sum(kl[method, seed, best[side]][side][1] * n for side, n in ((0, len(here)), (1, len(test) - len(here)))) / len(test)
            (row,) = [r for r in find(rows, method=method, seed=str(seed), metric="kl_truth", entropy="") if r["epochs"] is None]
            assert row["value"] == pytest.approx(wanted, abs=1e-4)
            chosen[method, seed] = wanted
    for epochs in (1.0, 6.0):  # the second method with nothing chosen, against the first at its best
        (fixed,) = [r for r in rows if r["seed"] == "fixed" and r["epochs"] == epochs]
        own = [kl[TWO[1], seed, epochs][side][1] * n / len(test) for seed in (0, 1) for side, n in ((0, len(here)), (1, len(test) - len(here)))]
        assert fixed["method"] == TWO[1] and fixed["against"] == f"{TWO[0]}, chosen"
        assert fixed["difference"] == pytest.approx(sum(own) / 2 - (chosen[TWO[0], 0] + chosen[TWO[0], 1]) / 2, abs=1e-4)
    text = (folder / "out" / "length.md").read_text()
    assert "| votes | method | 1 | 6 | chosen | epochs chosen |" in text and text.count(" x)") >= 2
    assert (folder / "out" / "length.png").stat().st_size > 5000


@pytest.mark.slow
def test_every_change_of_the_method_trains(tmp_path):
    """On data where none is another by design: items in groups, and votes enough for a radius of their own."""
    folder = write_few(tmp_path)
    rows = [json.loads(line) | {"group": f"g{i // 6}"} for i, line in enumerate((folder / "few.jsonl").read_text().splitlines())]
    (folder / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    methods = ("distribution", "label smoothing", "temperature", "exact adversary", "exact adversary, KL ball", "exact adversary, TV", "annotators' radius",
               "RPS", "KL + RPS", "EB marginal", "EB group", "EB model", "EB cross-fitted", "EB + adversary", "EB + exact adversary", "EB + paper")
    rows, trained = run(folder, "methods", votes=(20,), seeds=1, epochs=4.0, learning_rate=0.01, methods=methods)
    assert trained == len(methods)
    values = {r["method"]: r["value"] for r in find(rows, metric="kl_truth", seed="0")}
    assert len(set(values.values())) == len(values)  # each is another method
    found = [json.loads(p.read_text()) for p in (folder / "out" / "cells").glob("*/cell.json")]
    assert {c["method"] for c in found if c["temperature"] is not None} == {"temperature"}


def test_ood_refuses_shared_items_and_drops_them_on_request(folder, tmp_path, capsys):
    rows = [json.loads(line) for line in LINES[:40]]
    for row in rows:
        row.pop("split")
    shared = rows[30] | {"id": "other", "prompt": rows[30]["prompt"].upper().replace(" ", "  ")}
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[:31]))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [rows[0], shared, *rows[31:]]))
    config = study.StudyConfig(study="ood", train=(str(tmp_path / "a.jsonl"),), test=(str(tmp_path / "b.jsonl"),), out=str(tmp_path / "out"), **TINY)
    with pytest.raises(InputError, match="also in the training items"):
        study.main(config)
    train, test = study.read_items(dataclasses.replace(config, overlap="drop"))
    assert len(train) == 29 and len(test) == 11 and "left out 2 of 31" in capsys.readouterr().out
    with pytest.raises(InputError, match="needs --train and --test"):
        study.read_items(dataclasses.replace(config, test=()))


def test_cells_are_known_by_what_decides_their_result(folder):
    base = study.StudyConfig(train=(str(folder / "few.jsonl"),), out=str(folder / "out"), **TINY)
    place = lambda cell, **changes: study.Workshop(dataclasses.replace(base, **changes)).folder(cell)[0].name  # noqa: E731
    cell = study.Cell("distribution", 0)
    same = place(cell)
    assert same == place(cell, seeds=9, draws=500, log_every=3) == place(study.Cell("distribution", 0, alpha=0.8, eps=0.25))
    others = [place(cell, **{name: value}) for name, value in (("epochs", 2.0), ("learning_rate", 0.1), ("hidden", 32), ("steps", 3))]
    others += [place(study.Cell("distribution", 1)), place(study.Cell("distribution", 0, votes=3)), place(study.Cell("single-point", 0))]
    assert len({same, *others}) == len(others) + 1


def test_votes_are_drawn_from_the_truth_or_without_replacement():
    items = distjudge.load_items([json.loads(line) for line in LINES[:200]])
    drawn = study.draw_votes(items, 400, seed=0)
    assert all(i.votes == 400 for i in drawn)
    far = max(abs(i.counts[c] / 400 - i.truth[c]) for i in drawn for c in i.truth)
    assert far < 0.12 and study.draw_votes(items, 3, 0) == study.draw_votes(items, 3, 0) != study.draw_votes(items, 3, 1)
    plain = [dataclasses.replace(i, truth=None) for i in items]
    some = study.draw_votes(plain, 4, seed=0)
    assert all(i.votes == 4 and all(i.counts[c] <= j.counts[c] for c in i.counts) for i, j in zip(some, plain, strict=True))
    assert [i.counts for i in study.draw_votes(plain, 5, seed=0)] == [i.counts for i in plain]
    with pytest.raises(InputError, match="no training item has 6"):
        study.draw_votes(plain, 6, seed=0)


def test_perturbed_targets_lie_in_the_simplex_at_their_distance():
    p = torch.tensor([[1.0, 0, 0, 0], [0.4, 0.3, 0.2, 0.1], [0.5, 0.5, 0, 0]], dtype=torch.float64).repeat(200, 1)
    moved = study.perturb(p, 0.2, torch.Generator().manual_seed(0))
    assert (moved >= 0).all() and torch.allclose(moved.sum(1), torch.ones(600).double())
    assert torch.allclose((moved - p).norm(dim=1), torch.full((600,), 0.2).double()) and len(moved.unique(dim=0)) == 600
    assert torch.equal(study.perturb(p, 0.0, torch.Generator()), p)


def test_temperature_and_smoothing():
    draw_ = torch.Generator().manual_seed(0)
    logq = torch.randn(400, 4, generator=draw_, dtype=torch.float64).log_softmax(1)
    counts = 100 * (logq / 2.5).softmax(1)  # people as if the judge were too sure by a factor of 2.5
    assert study.fit_temperature(logq, counts) == pytest.approx(2.5, abs=0.01)
    items = distjudge.load_items([{"prompt": "x", "counts": {"a": 2, "b": 1, "c": 0, "d": 0}}, {"prompt": "y", "counts": {"a": 0, "b": 2, "c": 2, "d": 0}}])
    first, tie = (list(i.counts.values()) for i in study.smoothed(items, 0.2))
    assert first == pytest.approx([0.85, 0.05, 0.05, 0.05]) and tie == pytest.approx([0.05, 0.45, 0.45, 0.05])


def test_what_does_not_fit_is_refused(folder):
    base = study.StudyConfig(train=(str(folder / "few.jsonl"),), out=str(folder / "out"), **TINY)
    for changes, words in (({"methods": ("magic",)}, "methods: magic"), ({"seeds": 0}, "seeds: must be 1"), ({"votes": (0,)}, "votes: must be 1"),
                           ({"smoothing": 1.0}, "smoothing"), ({"ball": "tv"}, "ball: the tv ball needs --adversary exact"), ({"concentration": -1.0}, "concentration"),
                           ({"adversary": "exact", "ball": "kl", "radius": "annotators"}, "radius: the annotators'"), ({"rps_weight": 2.0}, "rps_weight"), ({"prior": "x"}, "prior: must be one of")):
        with pytest.raises(InputError, match=words):
            study.main(dataclasses.replace(base, **changes))
    with pytest.raises(InputError, match="not a study's table"):
        draw.read_table(str(folder / "few.jsonl"))


def test_prior_votes_by_hand(capsys):
    rows = [{"prompt": "a", "counts": {"x": 1, "y": 0}, "group": "g"}, {"prompt": "b", "counts": {"x": 1, "y": 0}, "group": "g"}, {"prompt": "c", "counts": {"x": 0, "y": 1}}]
    items = distjudge.load_items(rows)
    assert not distjudge.prior_votes(items, Config()).any()
    prior = distjudge.prior_votes(items, Config(prior="marginal"))
    assert torch.allclose(prior, 2 * torch.tensor([[2 / 3, 1 / 3]]).double().expand(3, -1)) and "worth 2 votes (the default, for no item has two" in capsys.readouterr().out
    grouped = distjudge.prior_votes(items, Config(prior="group", concentration=1.0))
    k = distjudge.fit_concentration(torch.tensor([[2.0, 0], [0, 1]]).double())
    assert torch.allclose(grouped[0], (torch.tensor([2.0, 0]) + k * torch.tensor([2 / 3, 1 / 3])).double() / (2 + k), atol=1e-4) and torch.equal(grouped[0], grouped[1])
    several = distjudge.load_items([{"prompt": f"{i}", "counts": {"x": 3 * (i % 2), "y": 3 - 3 * (i % 2)}} for i in range(40)])
    assert distjudge.prior_votes(several, Config(prior="marginal")).sum(1)[0] < 0.1  # unanimous either way: the prior is worth nothing
    assert "fitted" in capsys.readouterr().out


def test_crossfit_predicts_each_half_from_the_other_and_puts_the_weights_back(tiny_model, votes, tmp_path):
    items = votes(12)
    judge = distjudge.load_judge(str(tiny_model), distjudge.labels_of(items), lora_rank=2)
    config = Config(out=str(tmp_path), epochs=2.0, learning_rate=0.05, prior="crossfit", eps=0.0, batch_size=4)
    before = {name: p.detach().clone() for name, p in judge.model.named_parameters() if p.requires_grad}
    untrained = torch.as_tensor(judge.predict([i.prompt for i in items])).double()
    means = distjudge.crossfit_means(judge, items, config)
    assert all(torch.equal(before[name], p) for name, p in judge.model.named_parameters() if p.requires_grad)
    assert torch.allclose(means.sum(1), torch.ones(12).double(), atol=1e-5) and (means - untrained).abs().max() > 1e-3
    half, other = distjudge.split_items(items, 0.5, config.seed)
    distjudge.train(judge, half, dataclasses.replace(config, prior="none"))
    again = torch.as_tensor(judge.predict([i.prompt for i in other])).double()
    assert torch.allclose(means[[items.index(i) for i in other]], again, atol=1e-5)


def test_memory_by_hand():
    memory = torch.zeros(3, 3)
    distjudge.remember(memory, [2, 0], torch.tensor([[0.5, 0.5], [1.0, 0.0]]), keep=0.5)
    assert memory.tolist() == [[0.5, 0, 0.5], [0, 0, 0], [0.25, 0.25, 0.5]]
    distjudge.remember(memory, [2], torch.tensor([[0.0, 1.0]]), keep=0.5)
    assert (memory[2, :-1] / memory[2, -1]).tolist() == pytest.approx([1 / 6, 5 / 6]) and memory[0].tolist() == [0.5, 0, 0.5]


def test_the_models_own_earlier_predictions_are_worth_k_votes(tiny_model, tmp_path, monkeypatch):
    """The targets of every step are recomputed from the predictions of the steps before; packs of two levels and small passes included."""
    shares = [[n, 9 - n] for n in range(10)] + [[1, 2]]  # each item is known by its votes, and one by their number
    items = distjudge.load_items([{"prompt": f"Item {n} of some", "counts": {"a": a, "b": b}} for n, (a, b) in enumerate(shares)])
    calls, plain = [], distjudge.hybrid_loss
    monkeypatch.setattr(distjudge, "hybrid_loss", lambda logq, p, alpha, worst, *more: calls.append((worst.clone(), logq.detach())) or plain(logq, p, alpha, worst, *more))
    judge = distjudge.load_judge(str(tiny_model), distjudge.labels_of(items), lora_rank=2)
    real, seen = distjudge.shrink_votes, []
    monkeypatch.setattr(distjudge, "annotator_radius", lambda votes, eps, prior: seen.append(votes.clone()) or torch.full_like(votes[:, 0], eps) * (prior is None))
    distjudge.train(judge, items, Config(out=str(tmp_path), epochs=3.0, learning_rate=0.05, batch_size=4, prior="model", concentration=2.0, pack_tokens=30,
                                         radius="annotators"))
    past, moved = {}, 0.0
    for votes, (target, logq) in zip(seen, calls, strict=True):
        worst = distjudge.worst_case(logq, votes / votes.sum(1, keepdim=True), 0.25)  # the adversary moves the votes, then predictions are added
        for v, w, t, said in zip(votes, worst, target, logq.exp(), strict=True):
            earlier = past.setdefault(tuple(v.tolist()), [])
            weights = torch.tensor([0.6**j for j in range(len(earlier))][::-1])
            mean = (weights[:, None] * torch.stack(earlier)).sum(0) / weights.sum() if earlier else torch.zeros(2)
            assert torch.allclose(t, real(v.sum() * w[None], 2 * mean[None])[0], atol=1e-5)
            moved = max(moved, (t - w).abs().max().item())
            earlier.append(said)
    assert [len(p) for p in past.values()] == [3] * 11 and moved > 0.1


def test_a_running_mean_spans_the_same_share_of_any_number_of_steps():
    for steps in (100, 1000):
        mean = {1: torch.zeros(steps), 10: torch.zeros(steps)}  # of unit vectors: how much of each step's weights is in the mean
        for power, weights in mean.items():
            for t in range(steps):
                weights += distjudge.running_rate(t, power) * (torch.eye(steps)[t] - weights)
        assert torch.allclose(mean[1], torch.full((steps,), 1 / steps), atol=1e-6)
        assert mean[10].sum() == pytest.approx(1, abs=1e-5) and mean[10][int(0.8 * steps) :].sum() == pytest.approx(1 - 0.8**10, abs=0.3 / steps**0.5)


def test_a_teacher_is_the_mean_of_the_weights_and_worth_k_votes(tiny_model, tmp_path, monkeypatch):
    """Every target is the votes and what the mean of all weights before predicts, computed here by another judge and in closed form."""
    import transformers

    items = distjudge.load_items([{"prompt": f"Item {n} of some", "counts": {"a": n, "b": 9 - n}} for n in range(9)])
    judge, other = (distjudge.load_judge(str(tiny_model), ["a", "b"], lora_rank=2) for _ in range(2))
    of = lambda j: [w for w in j.model.parameters() if w.requires_grad]  # noqa: E731
    seen, calls, plain = [], [], distjudge.hybrid_loss

    def mean(n):  # of the first n weights: step t counts 10 / (10 + t), times u / (10 + u) for every later step u
        share = [10 / (10 + t) * math.prod(u / (10 + u) for u in range(t + 1, n)) for t in range(n)]
        return [sum(s * w for s, w in zip(share, step, strict=True)) for step in zip(*seen[:n], strict=True)]

    class Keep(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            seen.append([w.detach().clone() for w in of(judge)])

        def on_pre_optimizer_step(self, *args, **kwargs):  # the teacher has gone from the weights' place before they are changed
            assert not seen or all(torch.equal(w, old) for w, old in zip(of(judge), seen[-1], strict=True))

    monkeypatch.setattr(distjudge, "hybrid_loss", lambda logq, p, alpha, worst, *more: calls.append((len(seen), p, worst)) or plain(logq, p, alpha, worst, *more))
    log = distjudge.train(judge, items, Config(out=str(tmp_path), epochs=4.0, learning_rate=0.05, batch_size=4, pack_tokens=30, eval_every=6.0,
                                               **distjudge.PRESETS["teacher"]), items, callbacks=[Keep()])
    assert len(seen) == 12 and {n for n, *_ in calls} == set(range(12)) and len(calls) > 12
    moved = 0.0
    for n, p, target in calls:
        if n < 1:  # before the first step there is no teacher
            assert torch.equal(target, p)
            continue
        with torch.no_grad():
            for weight, value in zip(of(other), mean(n), strict=True):
                weight.copy_(value)
        for votes, t in zip(p, target, strict=True):
            q = torch.as_tensor(other.predict([f"Item {round(9 * votes[0].item())} of some"])[0])
            assert torch.allclose(t, (9 * votes + 5 * q) / 14, atol=1e-5)
            moved = max(moved, (t - votes).abs().max().item())
    assert moved > 0.05
    assert all(torch.allclose(w, m, atol=1e-6) for w, m in zip(of(judge), mean(12), strict=True))  # the teacher gives the answers
    assert any((w - last).abs().max() > 1e-3 for w, last in zip(of(judge), seen[-1], strict=True))
    evaluated = [line["eval_kl"] for line in log if "eval_kl" in line]
    assert len(evaluated) == 2 and evaluated[1] == pytest.approx(distjudge.evaluate(judge.predict([i.prompt for i in items]), items)["kl"], abs=1e-6)


def test_the_mean_of_the_last_weights_takes_their_place(tiny_model, votes, tmp_path):
    import transformers

    items, seen = votes(16), []

    class Keep(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            seen.append([w.detach().clone() for w in judge.model.parameters() if w.requires_grad])

    config = Config(out=str(tmp_path), epochs=2.0, learning_rate=0.02, batch_size=4, average=0.5)  # eight steps, the last four
    judge = distjudge.load_judge(str(tiny_model), distjudge.labels_of(items), lora_rank=2)
    distjudge.train(judge, items, config, callbacks=[Keep()])
    expected = [torch.stack(last).mean(0) for last in zip(*seen[4:], strict=True)]
    got = [w for w in judge.model.parameters() if w.requires_grad]
    assert len(seen) == 8 and all(torch.allclose(e, g, atol=1e-6) for e, g in zip(expected, got, strict=True))
    assert any((g - last).abs().max() > 1e-4 for g, last in zip(got, seen[-1], strict=True))


def test_presets_come_before_flags(monkeypatch):
    seen = []
    for arguments in (["--preset", "kl", "--alpha", "0.9"], ["--preset=paper"], []):
        monkeypatch.setattr("sys.argv", ["x", *arguments])
        distjudge.cli(seen.append, Config)
    assert [(c.alpha, c.eps) for c in seen] == [(0.9, 0.0), (0.8, 0.25), (0.8, 0.25)] and [c.preset for c in seen] == ["kl", "paper", ""]
    for preset in distjudge.PRESETS.values():
        Config(**preset).check()


def test_simplex_and_training_curves(tmp_path):
    p = torch.tensor([[3.0, 1, 1], [5, 0, 0], [2, 2, 1]], dtype=torch.float64)
    log = [{"step": s, "loss": 1 / s} for s in (1, 2, 3)] + [{"step": 3, "eval_kl": 0.4}]
    run = figures.Run(["a", "b", "c"], list("xyz"), p, p / 5, None, {"kl_noise_floor": 0.1}, log)
    first = figures.draw_simplex(run).axes[1].collections[0].get_offsets()
    assert first[1].tolist() == pytest.approx([0, 0]) and first[0].tolist() == pytest.approx([0.2 * 1 + 0.2 * 0.5, 0.2 * 3**0.5 / 2])
    lines = figures.draw_curves(run).axes[0].lines
    assert lines[0].get_xydata().tolist() == [[1, 1], [2, 0.5], [3, pytest.approx(1 / 3)]] and len(lines) == 3
    with pytest.raises(InputError, match="takes three labels"):
        figures.draw_simplex(dataclasses.replace(run, labels=["a", "b"]))
    with pytest.raises(InputError, match="no log"):
        figures.draw_curves(dataclasses.replace(run, log=[]))
    saved = figures.save(figures.draw_curves(run), tmp_path / "c")
    assert saved[0].read_bytes().startswith(b"\x89PNG") and "<svg" in saved[1].read_text()


def test_tables_are_tidy(folder):
    run(folder, "main", methods=TWO)
    with open(folder / "out" / "main.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == study.COLUMNS and all(r["study"] == "main" and r["data"] == "few" for r in rows)
    keys = [(r["method"], r["seed"], r["metric"], r["entropy"]) for r in rows]
    assert len(set(keys)) == len(keys)
