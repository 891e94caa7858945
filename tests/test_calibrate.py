"""Calibration: fits by hand, coverage of simulated panels, a calibrated judge."""

import json
import math
import re

import distjudge
from distjudge import InputError, Item

import calibrate as recipe
import export
import judge as judging
import numpy as np
import pytest
import systems
import torch
from make_panel import make_panel

from plots import figures

LABELS = ["1", "2", "3"]
log_q = lambda *shape, seed=0: torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()  # noqa: E731


def items_of(counts, labels=LABELS, groups=None, turned=None):
    swap = turned and distjudge.Swap("turned", turned)
    named = [dict(zip(labels, map(float, row), strict=True)) for row in counts]
    groups = groups or [None] * len(named)
    return [Item(f"{i}", f"{i}", own, groups[i], swap=swap) for i, own in enumerate(named)]


# --- the fit ---
def test_temperature_and_bias_by_hand():
    one = torch.full((5, 3), 1 / 3).log()
    temperature, bias = recipe.fit_calibration(one, [[1, 2, 0]] * 5)  # five items and the judge's own answer
    assert temperature == 1 and bias.softmax(0).tolist() == pytest.approx([6 / 18, 11 / 18, 1 / 18], abs=1e-6)
    logq = 4 * log_q(400, 4)
    votes = (logq / 3 + torch.tensor([0.5, 0.0, -1.0, 0.5])).softmax(1)
    temperature, bias = recipe.fit_calibration(logq, 7 * votes)
    assert temperature == pytest.approx(3, rel=0.01)
    assert bias.tolist() == pytest.approx([0.5, 0, -1, 0.5], abs=0.01)
    assert recipe.fit_calibration(logq, logq.softmax(1))[0] == pytest.approx(1, abs=1e-5)
    assert recipe.fit_calibration(logq, (-logq).softmax(1))[0] == pytest.approx(100)  # no lower slope
    same = 1e-6 * logq  # a judge that says nearly the same of all items: no votes make its noise a verdict
    assert recipe.fit_calibration(same, votes)[0] == pytest.approx(0.05)


def test_each_item_is_corrected_by_other_groups_and_a_useless_correction_is_left_out():
    torch.manual_seed(0)
    logq = 3 * log_q(60, 3)
    counts = torch.distributions.Multinomial(20, probs=(logq / 3).softmax(1)).sample()
    groups = [f"g{i // 4}" for i in range(60)]
    found, apart = recipe.calibrate(items_of(counts.tolist(), groups=groups), logq)
    assert [found[name] for name in ("items", "groups", "votes")] == [60, 15, 1200]
    assert 2 < found["temperature"] < 4
    changed = counts.clone()
    changed[:4] = torch.tensor([20.0, 0, 0])  # one group's votes do not touch its own probabilities
    other = recipe.calibrate(items_of(changed.tolist(), groups=groups), logq)[1]
    same = (other - apart).abs().sum(1) < 1e-12
    assert same[:4].all() and 12 <= same.sum() < 60
    counts = torch.distributions.OneHotCategorical(logits=logq[:8]).sample()  # eight votes teach nothing
    found, apart = recipe.calibrate(items_of(counts.tolist()), logq[:8])
    assert found["temperature"] == 1 and set(found["bias"]) == {0.0}
    assert apart.tolist() == [pytest.approx(row) for row in logq[:8].softmax(1).tolist()]
    with pytest.raises(InputError, match="three groups or more"):
        recipe.calibrate(items_of([[1, 0, 0]] * 3, groups=["g"] * 3), logq[:3])


def test_both_orders_of_a_pair_count_with_their_labels():
    items = items_of([[5, 1, 2], [1, 6, 1], [2, 2, 3], [0, 4, 1]], ["a", "b", "tie"], turned=(1, 0, 2))
    logq = log_q(4, 3).repeat_interleave(2, 0)
    logq[1::2] = logq[1::2][:, [1, 0, 2]]  # a judge that does not mind the order
    found, apart = recipe.calibrate(items, logq + torch.tensor([1.0, 0, 0]))  # but prefers the first
    turned = distjudge.counts_of(items).repeat_interleave(2, 0)
    turned[1::2] = turned[1::2][:, [1, 0, 2]]
    temperature, bias = recipe.fit_calibration(logq + torch.tensor([1.0, 0, 0]), turned)
    assert found["temperature"] == pytest.approx(temperature) and apart.shape == (4, 3)
    assert found["bias"] == pytest.approx(bias.tolist(), abs=1e-6)


# --- sets ---
def test_growing_sets_are_the_fewest_labels_or_an_interval():
    ahead = recipe.mass_ahead([[0.5, 0.125, 0.375]], LABELS)
    assert ahead.tolist() == [[0, 0.5, 0.625]]
    assert recipe.mass_ahead([[0.5, 0.125, 0.375]], ["1", "3", "2"]).tolist() == [[0, 0.875, 0.5]]
    assert recipe.mass_ahead([[0.5, 0.125, 0.375]], ["a", "b", "c"]).tolist() == [[0, 0.875, 0.5]]
    for row in (4 * log_q(200, 6)).softmax(1).tolist():
        low = high = row.index(max(row))
        expected, total = {low: 0.0}, row[low]
        while len(expected) < 6:
            left, right = row[low - 1] if low else -1, row[high + 1] if high < 5 else -1
            low, high, taken = (low - 1, high, low - 1) if left > right else (low, high + 1, high + 1)
            expected[taken], total = total, total + row[taken]
        ahead = recipe.mass_ahead([row], "123456")[0].tolist()
        assert ahead == pytest.approx([expected[c] for c in range(6)], abs=1e-6)  # float32


def test_limits_by_hand():
    """Three groups of 1/4 each: the first has two items of 1/8, one with both labels; the new one has 1/4."""
    ahead = torch.tensor([[0, 0.5], [0, 0.4], [0, 0.3], [0, 0.2]])
    counts = torch.tensor([[1, 1], [2, 0], [0, 1], [1, 3]])
    limits = recipe.conformal_limits(ahead, counts, torch.tensor([0, 0, 1, 2]))
    steps = {25: 0, 26: 0.2, 43: 0.2, 44: 0.3, 68: 0.3, 69: 0.5, 75: 0.5, 76: 1, 100: 1}
    assert {level: round(limits[level - 1], 6) for level in steps} == steps and len(limits) == 100
    q, limits = [[0.7, 0.2, 0.1], [0.3, 0.3, 0.4]], [0.0] * 50 + [0.5] * 40 + [0.75] * 9 + [1.0]
    sets = lambda level: recipe.label_sets(q, LABELS, level, limits)  # noqa: E731
    assert sets(0.5) == [["1"], ["3"]] and sets(0.9) == [["1"], ["2", "3"]]
    assert sets(0.901) == [["1", "2"], LABELS] == sets(0.91) and sets(1.0) == [LABELS] * 2
    with pytest.raises(InputError, match="level"):
        sets(1.1)


POOL = [list(row["truth"].values()) for row in make_panel(2000, 1, 1, 5)]
CASES = {"40 groups": (40, 1, 5, "12345"), "10 groups": (10, 1, 5, "12345")}
CASES |= {"4 items a group": (40, 4, 3, "12345"), "one vote, no scale": (40, 1, 1, "abcde")}


def simulated_coverage(draws, groups, each, votes, labels):
    """Mean coverage of new votes at 80, 90, 95 %, by a biased judge that is too sure of itself."""
    pool, found = torch.tensor(POOL, dtype=torch.float64), []
    draw, numpy_draw = torch.Generator().manual_seed(0), np.random.default_rng(0)
    for _ in range(draws):
        truth = pool[torch.randint(len(pool), (2 * groups * each,), generator=draw)].clamp_min(1e-4)
        moved = 0.7 * torch.randn(2 * groups, 5, generator=draw).repeat_interleave(each, 0)  # by group
        truth = (truth.log() + moved).softmax(1)
        error = 0.5 * torch.randn(len(truth), 5, generator=draw) + torch.linspace(-0.5, 0.5, 5)
        logq, size = (2 * truth.log() + error).log_softmax(1), groups * each
        counts = numpy_draw.multinomial(votes, truth[:size].numpy())
        items = items_of(counts, labels, [f"g{i // each}" for i in range(size)])
        calibration = recipe.calibrate(items, logq[:size])[0]
        ahead = recipe.mass_ahead(distjudge.corrected(logq[size:], calibration).exp(), labels)
        inside = [ahead <= calibration["conformal"][level - 1] + 1e-6 for level in (80, 90, 95)]
        found.append([(truth[size:] * one).sum(1).mean().item() for one in inside])
    return np.mean(found, axis=0)


DRAWS = [(100, "40 groups", 0.02)]
DRAWS += [pytest.param(1000, case, 0.01, marks=pytest.mark.slow) for case in CASES]


@pytest.mark.parametrize(("draws", "case", "slack"), DRAWS)
def test_conformal_sets_hold_new_votes_as_often_as_promised(draws, case, slack):
    found = simulated_coverage(draws, *CASES[case])
    print(f"\n| {case} | {draws} draws | {' | '.join(f'{x:.1%}' for x in found)} |", end="")
    room = 1 / (CASES[case][0] + 1) + slack  # one group of so many is the new one
    for promised, held in zip((0.8, 0.9, 0.95), found, strict=True):
        assert promised - slack <= held <= promised + room


# --- a judge and its calibration ---
@pytest.fixture
def run(votes, tiny_model, tmp_path, monkeypatch):
    """A run folder; items.jsonl beside it has votes that it was not trained on."""
    monkeypatch.chdir(tmp_path)
    for name, seed, n in (("train", 0, 24), ("test", 1, 8), ("items", 2, 20)):
        texts = {i.id: f"{name} {i.prompt}" for i in votes(n, seed=seed)}
        rows = [{"prompt": texts[i.id], "counts": i.counts} for i in votes(n, seed=seed)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    usual = {"train": ("train.jsonl",), "test": ("test.jsonl",), "model": str(tiny_model), "epochs": 1}
    distjudge.run(distjudge.Config(**usual, lora_rank=2, learning_rate=0.01, out="run"))
    return tmp_path / "run"


def main(**settings):
    recipe.main(recipe.CalibrateConfig(**settings))


def read(path):
    return json.loads(path.read_text())


def test_a_calibrated_judge_answers_so_wherever_it_is_loaded(run, caplog):
    prompts = [json.loads(line)["prompt"] for line in (run / "predictions.jsonl").read_text().splitlines()]
    own = distjudge.load_judge(run).score(prompts)[0].double().numpy()
    assert "calibrated" not in caplog.text
    main(run="run", items=("items.jsonl",), draws=1)
    about, judge = read(run / "judge.json")["calibration"], distjudge.load_judge(run)
    assert f"calibrated on {about['votes']:g} votes on 20 items" in caplog.text
    q = np.exp(own / about["temperature"] + about["bias"])
    assert judge.predict(prompts) == pytest.approx(q / q.sum(1, keepdims=True), abs=1e-6)
    corrected = distjudge.corrected(torch.tensor(own), about).exp().numpy()
    assert corrected == pytest.approx(judge.predict(prompts), abs=1e-6)
    assert abs(judge.predict(prompts) - np.exp(own)).max() > 0.01
    distjudge.save_judge(judge, "copy")
    assert distjudge.load_judge("copy").calibration == about
    distjudge.train(judge, distjudge.load_items("test.jsonl"), distjudge.Config(out="more", epochs=0.5))
    assert judge.calibration is None


def test_a_run_s_own_test_items_calibrate_it(run, capsys, caplog):
    main(run="run", items=("run/predictions.jsonl",), draws=1)
    assert "not checked" not in capsys.readouterr().err
    assert read(run / "judge.json")["calibration"]["items"] == 8
    assert "corrected by the votes on 8 items. Metrics above are of before" in export.model_card(run)
    caplog.clear()
    assert systems.predictions_in("run") == systems.predictions_in("run/predictions.jsonl")
    assert caplog.text.count("run/predictions.jsonl: is of the judge before its calibration") == 2
    rows = enumerate((run.parent / "test.jsonl").read_text().splitlines())
    lines = [json.dumps(json.loads(line) | {"system": "ab"[i % 2]}) for i, line in rows]
    (run.parent / "systems.jsonl").write_text("\n".join(lines))
    systems.read_panel(systems.SystemsConfig(items="systems.jsonl", run="run", out="x"))
    assert "not checked that the 8 items it was calibrated on are others" in capsys.readouterr().err
    turns = [{"role": "system", "content": "Be fair."}, {"role": "user", "content": "Good soup?"}]
    talks = distjudge.load_items([{"id": "t", "prompt": turns, "counts": dict.fromkeys(LABELS, 1)}])
    distjudge.write_results(distjudge.load_judge(run), talks, [], distjudge.Config(out="run"), "run")
    assert distjudge.load_items("run/predictions.jsonl")[0].prompt == talks[0].prompt
    assert figures.load_run("run").pieces == [json.dumps(turns)]


def test_the_command_calibrates_and_takes_it_back(run, capsys):
    before, trained = read(run / "judge.json"), (run.parent / "train.jsonl").read_text()
    main(run="run", items=("items.jsonl",), draws=2)
    said, after = capsys.readouterr(), read(run / "judge.json")
    assert "not checked" not in said.err and "metrics, on votes not fitted on" in said.out
    assert after["calibration"]["items"] == 20 and (run / "plots" / "kept.png").is_file()
    text = (run / "judge.json").read_text()
    (run / "judge.json").write_text(text.replace('"items": 20', '"items": 21'))
    with pytest.raises(InputError, match=r"judge.json: has changed"):
        distjudge.load_judge(run)
    (run / "judge.json").write_text(text)
    (run.parent / "used.jsonl").write_text(trained)
    with pytest.raises(InputError, match=r"used.jsonl:.*: prompt: also in the training items, at") as error:
        main(run="run", items=("used.jsonl",))
    assert "; 24 training items are such; give items that the judge has not seen" in str(error.value)
    main(run="run", remove=True)
    plain = read(run / "judge.json")
    assert distjudge.load_judge(run).calibration is None and "calibration" not in plain
    assert {**before, "calibration": 0, "digest": 0} == {**plain, "calibration": 0, "digest": 0}
    (run / "config.json").unlink()
    main(run="run", items=("items.jsonl",), draws=1, out="there")
    assert "not checked that the judge was trained on none" in capsys.readouterr().err


def test_judging_writes_conformal_sets_and_marks_what_people_should_see(run, capsys):
    def judged(**settings):
        usual = {"run": "run", "items": "items.jsonl", "out": "o.jsonl"}
        judging.main(judging.JudgeConfig(**usual | settings))
        return [json.loads(line) for line in open("o.jsonl", encoding="utf-8")]

    main(run="run", items=("items.jsonl",), draws=1)
    calibration = distjudge.load_judge(run).calibration
    rows = judged(route=0.4, level=0.5)
    for row in rows:
        q = [list(row["predicted"].values())]
        assert row["conformal_set"] == recipe.label_sets(q, LABELS, 0.5, calibration["conformal"])[0]
        assert row["to_people"] == (row["entropy"] >= calibration["entropies"][60])
        assert "credible_set" not in row
    marked = sum(row["to_people"] for row in rows)
    assert f"{marked} of 20 are for people to look at" in capsys.readouterr().err
    for settings in ({"route": 0.5, "level": 0.5}, {"level": 0.5}):
        with pytest.raises(InputError, match=r"o.jsonl:1: is not the judgment"):
            judged(**settings)
    (run.parent / "in.csv").write_text("prompt\nIs it fine?\n")
    judging.main(judging.JudgeConfig(run="run", items="in.csv", out="out.csv", route=1.0))
    head, cells = (run.parent / "out.csv").read_text().splitlines()
    assert head.endswith("judge_conformal_set,judge_label_mass,judge_to_people")
    assert cells.endswith(("True", "False"))
    main(run="run", remove=True)
    with pytest.raises(InputError, match=r"o.jsonl:1: is not"):  # an uncalibrated judge is another
        judged(level=0.5)
    with pytest.raises(InputError, match="route: run is not calibrated"):
        judged(route=0.4, out="p.jsonl")


def test_errors_kept_by_hand():
    items = items_of([[2, 0, 0], [1, 1, 2], [1, 0, 0]])
    q = torch.tensor([[0.8, 0.2, 0], [0.4, 0.3, 0.3], [0.6, 0.4, 0]], dtype=torch.float64)
    # (0.04 + 0.04) - 0; (.0225 + .0025 + .04) - (1 - .375) / 3; one vote: none
    both = (0.08 + 0.065 - 0.625 / 3) / 2
    table = recipe.kept(items, q)
    assert table["squared error, by entropy"]["100 %"] == pytest.approx(both, abs=1e-4)
    assert table["squared error, by entropy"]["50 %"] == pytest.approx(0.08)  # the surest one
    assert table["KL to votes, by entropy"]["50 %"] == pytest.approx(math.log(1 / 0.8), abs=1e-4)


def test_groups_weigh_alike_in_the_table_of_sets():
    """One large group where the judge is wrong and forty items of their own where it is right."""
    items = items_of([[0, 0, 3]] * 40 + [[3, 0, 0]] * 40, groups=["big"] * 40 + [None] * 40)
    table = recipe.sets(items, torch.tensor([[0.98, 0.01, 0.01]] * 80).log().double(), 20)
    held = table[table.sets == "credible"]["votes held"]
    assert held["50 %"] > 0.95 and held["95 %"] > 0.95  # a mean over items would be 2 / 3


def test_the_table_of_sets_tells_the_model_from_the_calibrated_judge():
    """The model says 0.4, 0.3, 0.3 where people say 0.8, 0.1, 0.1."""
    items = items_of([[8, 1, 1]] * 80)
    table = recipe.sets(items, torch.tensor([[0.4, 0.3, 0.3]] * 80).log().double(), 5).loc[["50 %", "80 %"]]
    size = {kind: table[table.sets == kind]["labels"].tolist() for kind in set(table.sets)}
    # one label holds 80 % of the votes; the model's own answers would need all three for that
    assert size == {"credible": [2, 3], "credible, calibrated": [1, 2], "conformal": [1, 1]}


def test_predictions_of_any_judge(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    q = (2 * log_q(30, 3)).softmax(1)
    rows = [{"id": f"{i}", "prompt": f"{i}?", "counts": {"1": 2, "2": 1, "3": i % 3}} for i in range(30)]
    for row, own in zip(rows, q.tolist(), strict=True):
        row["predicted"] = dict(zip(LABELS, own, strict=True))
    path = tmp_path / "predictions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(predictions="predictions.jsonl", draws=3)
    said = capsys.readouterr().out
    assert "calibrated on" in said and "conformal" in said and "these are few groups" in said
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    table = recipe.sets(*recipe.predictions_of("predictions.jsonl"), 3)
    assert len(table) == 12 and table["votes held"].between(0, 1).all()
    assert table["labels"].between(1, 3).all()
    paired = rows[0] | {"swap": {"prompt": "0 turned?", "labels": {}}}  # its prediction is of both orders
    path.write_text("".join(json.dumps(row) + "\n" for row in [paired, *rows[1:]]))
    assert recipe.sets(*recipe.predictions_of("predictions.jsonl"), 3).equals(table)
    del rows[3]["predicted"]["2"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=r"predictions.jsonl:4: item '3': predicted: shares must add up"):
        main(predictions="predictions.jsonl")
    same = {"counts": dict.fromkeys(LABELS, 10), "predicted": dict.fromkeys(LABELS, 1 / 3)}
    path.write_text("".join(json.dumps(row | same) + "\n" for row in rows))
    main(predictions="predictions.jsonl", draws=1)
    assert re.search(r"^people +inf +inf$", capsys.readouterr().out, re.M)  # as near as votes can tell


def test_settings_that_cannot_be():
    both = {"run": "x", "remove": True, "items": ("y",)}
    mixed = {"run": "x", "predictions": "y"}, {"items": ("x",), "predictions": "y"}
    mixed += {"run": "x", "items": ("y",), "predictions": "y"}, {"remove": True, "predictions": "y"}
    for settings in ({}, *mixed, {"run": "x"}, both):
        with pytest.raises(InputError, match="name a judge with --run"):
            main(**settings)
    with pytest.raises(InputError, match="x: no judge in this folder"):
        main(run="x", remove=True)
    with pytest.raises(InputError, match="draws: must be 1 or more, not 0"):
        main(predictions="y", draws=0)
