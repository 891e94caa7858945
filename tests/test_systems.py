"""recipes/systems.py: estimates by hand and by the paper's formula, coverage on panels, the command."""

import collections
import itertools
import json

import distjudge

import numpy as np
import pytest
import scipy.stats
import systems
from conftest import call
from systems import METHODS, Estimate, Panel, SystemsConfig, compare, estimate, holm, interval, win

SCALE = np.arange(1.0, 6)[:, None]
ABOVE = np.tril(np.ones((5, 5)), -1) + np.eye(5) / 2
SHIFTS = (0.0, 0.3)


def opinions(latent):
    """Distributions (N, 5) of votes on items with latent quality (N,)."""
    density = np.exp(-((SCALE[:, 0] - 3 - latent[:, None]) ** 2) / 0.98)
    return density / density.sum(1, keepdims=True)


def simulated(rng, groups=100, rated=10, each=1, judge="good", apart=False, votes=5):
    """Items of two systems; `rated` groups, or so many items of each (apart), have 1 to `votes` votes."""
    group = np.repeat(np.arange(groups), 2 * each)
    system = np.tile(np.repeat([0, 1], each), groups)
    normal = lambda spread, size=2 * each * groups: spread * rng.standard_normal(size)  # noqa: E731
    latent = np.array(SHIFTS)[system] + normal(0.5, groups)[group] + normal(0.4)
    latent += normal(0.3, (groups, 2))[group, system]
    error = normal(0.3, groups)[group] + normal(0.3)
    seen = {"good": latent + error, "biased": 0.6 * latent + error + 1 - 0.8 * system, "bad": 3 * error}
    counts = rng.multinomial(rng.integers(1, votes + 1, len(group)), opinions(latent))
    hidden = group >= rated
    if apart:
        hidden = np.ones(len(group), dtype=bool)
        for s in (0, 1):
            hidden[rng.choice(np.flatnonzero(system == s), rated, replace=False)] = False
    counts[hidden] = 0
    return Panel([*"12345"], ["a", "b"], system, group, counts, opinions(seen[judge]))


def true_shares():
    """The shares of votes (2, 5) of the two simulated systems, by quadrature."""
    x, w = np.polynomial.hermite_e.hermegauss(60)
    return np.stack([w @ opinions(shift + x * 0.5**0.5) / w.sum() for shift in SHIFTS])


def checked(panels, shares, title):
    """{(method, quantity): (coverage, mean width)} of panels with known shares (S, 5), also printed."""
    found, about, units, means = collections.defaultdict(list), [], np.eye(len(shares)), shares @ SCALE[:, 0]
    for panel in panels:
        (by_mean, more), (by_share, _) = estimate(panel, SCALE), estimate(panel, np.eye(5))
        about.append((more["weight"], more["worth"]))
        for how in METHODS:
            cells = [("mean", interval(by_mean[how], u[:, None], 1, 5), u @ means) for u in units]
            for a, b in itertools.combinations(range(len(units)), 2):
                gap = interval(by_mean[how], (units[a] - units[b])[:, None], -4, 4)
                cells.append(("difference", gap, means[a] - means[b]))
                cells.append(("win", win(by_share[how], a, b, SCALE[:, 0]), shares[a] @ ABOVE @ shares[b]))
            for name, cell, true in cells:
                found[how, name].append((cell["low"] <= true <= cell["high"], cell["high"] - cell["low"]))
    found = {key: np.mean(values, axis=0) for key, values in found.items()}
    for how in METHODS:
        cells = [f"{held:.1%} | {width:.3f}" for (at, _), (held, width) in found.items() if at == how]
        print(f"\n| {title} | {METHODS[how]} | {' | '.join(cells)} |", end="")
    print(" weight {:.2f}, worth {:.0f}".format(*np.mean(about, axis=0)))
    return found


CASES = {
    "10 groups": {"rated": 10},
    "20 groups": {"rated": 20},
    "60 of 300 groups": {"rated": 60, "groups": 300},
    "10 groups of 4 items": {"rated": 10, "each": 4},
    "10 of 20 groups": {"rated": 10, "groups": 20, "each": 3},
    "items anywhere": {"rated": 10, "apart": True},
    "a biased judge": {"rated": 20, "judge": "biased"},
    "a bad judge, 5 groups": {"rated": 5, "judge": "bad"},
    "a bad judge, 20 groups": {"rated": 20, "judge": "bad"},
    "one vote an item": {"rated": 20, "votes": 1},
}


QUICK = ("10 groups of 4 items", "items anywhere", "a biased judge", "a bad judge, 5 groups")
DRAWS = [(case, 200) for case in QUICK]
DRAWS += [pytest.param(case, 1000, marks=pytest.mark.slow) for case in CASES]


@pytest.mark.parametrize(("case", "draws"), DRAWS)
def test_intervals_hold(case, draws):
    rng, (low, high) = np.random.default_rng(0), (0.91, 0.99) if draws < 1000 else (0.93, 0.97)
    found = checked((simulated(rng, **CASES[case]) for _ in range(draws)), true_shares(), case)
    for (how, name), (coverage, width) in found.items():
        assert how == "judge" or low <= coverage <= high, (case, how, name, coverage)
        most = 1.03 if "bad" in case else 0.96  # the judge helps, or at least costs little
        assert how != "ppi" or width <= most * found["votes", name][1], (case, name)
    if case == "a biased judge":
        assert found["judge", "mean"][0] < 0.5 and found["judge", "difference"][0] < 0.1


def plain(seed, n=300, more=900):
    """One system, one vote an item, no groups, the first n rated: panel, ratings, the judge's means."""
    rng, at = np.random.default_rng(seed), np.arange(n + more)
    latent = rng.standard_normal(n + more)
    counts = rng.multinomial(1, opinions(latent))
    counts[n:] = 0
    q = opinions(latent + 0.5 * rng.standard_normal(n + more))
    return Panel([*"12345"], ["a"], 0 * at, at, counts, q), counts[:n] @ SCALE[:, 0], q @ SCALE[:, 0]


def test_the_formula_of_ppi():
    """Angelopoulos, Duchi and Zrnic 2023, section 4: estimate and variance, with our shrunk weight."""
    (panel, y, f), n, more, slopes = plain(0), 300, 900, []
    e, about = estimate(panel, SCALE)
    assert about["vote_sd"] is None  # no item has two votes
    for left_out in (range(0), *np.arange(n)[:, None]):
        here = np.delete(np.arange(n), left_out)
        slopes.append(np.cov(y[here], f[here])[0, 1] / f[here].var(ddof=1))
    error = (n - 1) / n * sum((slope - slopes[0]) ** 2 for slope in slopes[1:])
    shrunk = slopes[0] - 1.967930**2 / 2 * error / slopes[0]  # t of 299 degrees of freedom
    assert about["weight"] == pytest.approx(shrunk) and 0.95 < shrunk / slopes[0] < 0.999
    weight = shrunk * more / (n + more)  # ours leans on all items, theirs on the unrated ones
    variance = (y - weight * f[:n]).var(ddof=1) / n + weight**2 * f[n:].var(ddof=1) / more
    found = interval(e["ppi"], np.ones((1, 1)), 1, 5)
    assert found["estimate"] == pytest.approx(y.mean() + weight * (f[n:].mean() - f[:n].mean()))
    assert found["se"] == pytest.approx(variance**0.5, rel=0.01)  # ours knows that the weight was tuned
    for how, values in {"votes": y, "judge": f}.items():
        cell = interval(e[how], np.ones((1, 1)), 1, 5)
        assert cell["estimate"] == pytest.approx(values.mean())
        assert cell["se"] == pytest.approx(values.std(ddof=1) / len(values) ** 0.5)
    assert about["worth"] == pytest.approx(y.var(ddof=1) / variance, rel=0.02)


def test_items_with_more_votes_weigh_more():
    """Panels of 1 and of 30 votes: noise and spread are found, and the error is the least possible."""
    rng, n, pick = np.random.default_rng(0), 4000, np.arange(4000) % 2
    high = rng.random(n) < 0.5  # votes are 2 or 4, 4 in an item with probability 0.75 or 0.25
    counts, votes = np.zeros((n, 5)), np.where(pick, 30, 1)
    up = rng.binomial(votes, np.where(high, 0.75, 0.25))
    counts[:, 1], counts[:, 3] = votes - up, up
    panel = Panel([*"12345"], ["a"], 0 * pick, np.arange(n), counts, np.full((n, 5), 0.2))
    e, about = estimate(panel, SCALE)
    spread, noise = 0.25, 0.75
    assert about["item_sd"] ** 2 == pytest.approx(spread, rel=0.05)
    assert about["vote_sd"] ** 2 == pytest.approx(noise, rel=0.02)
    best = (1 / (spread + noise / votes)).sum() ** -0.5
    equal = (spread + noise / votes).sum() ** 0.5 / n
    assert best < 0.9 * equal and about["weight"] == 0 and about["worth"] == n  # such a judge says nothing
    for how in ("votes", "ppi"):
        assert interval(e[how], np.ones((1, 1)), 1, 5)["se"] == pytest.approx(best, rel=0.03)


def test_a_hand_made_panel():
    """Two systems rated in three groups, one vote each: 1 2 3 and 3 4 5; the judge alike of all."""
    counts = np.eye(5)[[0, 1, 2, 2, 3, 4]]
    system, group = np.repeat([0, 1], 3), np.tile(np.arange(3), 2)
    table = compare(Panel([*"12345"], ["a", "b"], system, group, counts, counts * 0 + 0.2))
    cell = table["systems"]["a"]["mean"]["ppi"]
    half = 4.302653 / 3**0.5  # t of 2 degrees of freedom
    assert [cell[key] for key in ("estimate", "low", "high")] == pytest.approx([2, 1, 2 + half], rel=1e-5)
    pair = table["pairs"][0]
    gap = pair["mean"]["votes"]  # -2 in each group: no spread, so 1 - 0.025^(1/3) of the scale's 8
    assert gap["high"] == pytest.approx(-2 + 8 * (1 - 0.025 ** (1 / 3))) and gap["low"] == -4
    assert pair["mean"]["ppi"]["p_holm"] == 2 * (1 - 2 / 8) ** 3 and table["systems"]["a"]["rank"] == [1, 2]
    assert pair["win"]["votes"]["estimate"] == pytest.approx((0 + 0 + 0.5) / 9)  # 3 against 3 is the only tie
    assert pair["win"]["judge"]["estimate"] == pytest.approx(0.5)
    assert list(table["systems"]) == ["b", "a"]
    turned = compare(Panel([*"54321"], ["a", "b"], system, group, counts[:, ::-1], counts * 0 + 0.2))
    assert turned["pairs"][0]["win"]["votes"] == pytest.approx(pair["win"]["votes"])  # 5 beats 4 in any order


def test_no_estimate_is_beyond_its_interval():
    """The judge's part can take the share of a rare label below 0, where no bar can be drawn."""
    parts = np.array([[[0.01, 0]], [[-0.01, 0]]])
    e = Estimate(np.array([[-0.01, 1.01]]), parts, np.full((2, 1), 2), np.array([2]))
    cell = interval(e, np.array([[1.0, 0]]), 0, 1)
    assert cell["estimate"] == cell["low"] == 0 < cell["high"] < 1


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 1]) == pytest.approx([0.04, 0.09, 0.09, 1]) and holm([]) == []


def rows_of(panel, labels="12345"):
    """A panel as lines of items and of predictions."""
    items, judged = [], []
    for i, (s, g) in enumerate(zip(panel.system, panel.group, strict=True)):
        votes, q = (dict(zip(labels, x[i].tolist(), strict=True)) for x in (panel.counts, panel.q))
        items.append({"id": f"i{i}", "prompt": f"Rate {i}.", "system": "ab"[s], "group": f"g{g}"})
        items[-1] |= {"counts": votes} if panel.rated[i] else {}
        judged.append({"id": f"i{i}", "predicted": q, "label_mass": 1})
    return items, judged


def write(folder, **files):
    for name, rows in files.items():
        distjudge.write_lines(folder / f"{name}.jsonl", map(json.dumps, rows))


def test_a_difference_in_which_all_groups_agree_is_sure():
    """The interval is the rule of three's. p is under 0.05 where it leaves out 0."""
    for n in range(2, 20):
        group, system = np.repeat(np.arange(n), 2), np.tile([0, 1], n)
        counts = np.where(system[:, None] == [0, 1], 3, 0)  # A always yes, B always no
        panel = Panel(["yes", "no"], ["A", "B"], system, group, counts, np.full((2 * n, 2), 0.5))
        gap = compare(panel)["pairs"][0]["share of yes"]["ppi"]
        assert gap["se"] == 0 and gap["p_holm"] == pytest.approx(min(1, 2 * 0.5**n))
        assert (gap["p_holm"] < 0.05) == (gap["high"] < 0 or gap["low"] > 0)


def test_the_command(tmp_path):
    panel = simulated(np.random.default_rng(0), groups=40, rated=12)
    items, judged = rows_of(panel)
    write(tmp_path, items=items, judged=judged[::-1])  # matched by id, whatever the order
    given = "--items items.jsonl --predictions judged.jsonl --out out".split()
    done = call(systems.__file__, *given, cwd=tmp_path)
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    expected = compare(panel)
    assert table["pairs"][0]["win"]["ppi"] == pytest.approx(expected["pairs"][0]["win"]["ppi"])
    gap = table["pairs"][0]["mean"]["ppi"]  # of one difference Holm's p is its own
    assert gap["p_holm"] == pytest.approx(2 * scipy.stats.t.sf(abs(gap["estimate"] / gap["se"]), gap["df"]))
    assert table["systems"]["b"]["mean"]["ppi"] == pytest.approx(expected["systems"]["b"]["mean"]["ppi"])
    assert table["systems"]["a"]["rated"] == 12 and table["systems"]["a"]["items"] == 40
    assert f"as sure as with {table['worth']:.0f} rated items alone" in done.stdout
    assert (tmp_path / "out" / "table.txt").read_text() == done.stdout
    assert (tmp_path / "out" / "forest.png").stat().st_size > 10_000
    with pytest.raises(distjudge.InputError, match="holds other files, such as "):
        systems.main(SystemsConfig("items.jsonl", str(tmp_path), predictions="judged.jsonl"))
    with pytest.raises(distjudge.InputError, match=r"judged.csv: is a table, .* --out judged.jsonl"):
        systems.read_predictions("judged.csv")


def test_labels_that_are_no_numbers_and_a_judge_that_is_run(tmp_path, saved_run):
    items = [{"prompt": f"soup {i}", "writer": "ab"[i % 2], "group": i // 2} for i in range(16)]
    for i, row in enumerate(items[:10]):
        row["annotations"] = ["yes", "no", "yes"][: 1 + i % 3]
    write(tmp_path, items=items)
    where = {"items": str(tmp_path / "items.jsonl"), "run": str(saved_run), "out": str(tmp_path / "out")}
    systems.main(SystemsConfig(**where, field="writer"))
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    assert table["tested"] == ["share of yes"] and "win" not in table["pairs"][0]
    for row in table["systems"].values():
        assert "rank" not in row and "mean" not in row
        for how in METHODS:
            assert sum(row[f"share of {name}"][how]["estimate"] for name in ("yes", "no")) == pytest.approx(1)
    yes = distjudge.load_judge(saved_run).predict([row["prompt"] for row in items[::2]])[:, 0].mean()
    assert table["systems"]["a"]["share of yes"]["judge"]["estimate"] == pytest.approx(yes, abs=1e-6)


BAD = [
    ("items", 2, {"system": None}, "items.jsonl:3: system: the name of a system must be text"),
    ("items", 0, {"counts": {"9": 1}}, r"items.jsonl:1: item 'i0': counts: unknown label \{9\}"),
    ("items", 9, {"system": "new"}, "items.jsonl: system 'new' has rated items in 0 groups"),
    ("judged", 4, {"id": "x"}, "items.jsonl:5: item 'i4': .*judged.jsonl has no prediction of this id"),
    ("judged", 4, {"prompt": "Rate 5."}, "items.jsonl:5: item 'i4': .*no prediction of this id and prompt"),
    ("judged", 1, {"predicted": {"1": 1}}, "judged.jsonl:2: item 'i1': predicted: labels"),
    ("judged", 1, {"predicted": None}, "judged.jsonl:2: predicted: a prediction needs id"),
    ("judged", 0, {"predicted": {"1": 3, **dict.fromkeys("2345", 0)}}, "'i0': predicted: shares .* not to 3"),
]


@pytest.mark.parametrize(("file", "row", "fields", "message"), BAD)
def test_bad_input(tmp_path, file, row, fields, message):
    items, judged = rows_of(simulated(np.random.default_rng(0), groups=5, rated=3))
    {"items": items, "judged": judged}[file][row] |= fields
    write(tmp_path, items=items, judged=judged)
    where = {"items": str(tmp_path / "items.jsonl"), "predictions": str(tmp_path / "judged.jsonl")}
    with pytest.raises(distjudge.InputError, match=message):
        systems.main(SystemsConfig(**where, out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
    with pytest.raises(distjudge.InputError, match=r"--run, or .*--predictions"):
        systems.main(SystemsConfig(**where, run="r", out=str(tmp_path / "out")))


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.05, 0.1, 0.2])
def test_on_real_votes(share, data_dir):
    """SummEval's coherence, one expert's ratings, and the other two as the judge: 1,000 draws of articles.

    Prints how often intervals hold what all of that expert's ratings say. A share of the articles is rated.
    """
    files = sorted(data_dir("summeval").glob("M*.jsonl"))
    rows = [json.loads(line) for path in files for line in path.read_text(encoding="utf-8").splitlines()]
    said = np.array([[vote["coherence"] for vote in row["expert_annotations"]] for row in rows])
    votes = (said[..., None] == SCALE[:, 0]).astype(float)
    names, system = np.unique([row["model_id"] for row in rows], return_inverse=True)
    group = np.unique([row["id"] for row in rows], return_inverse=True)[1]
    whole = Panel([*"12345"], [*names], system, group, votes[:, 0], votes[:, 1:].mean(1))
    groups = group.max() + 1
    rng, shares = np.random.default_rng(0), estimate(whole, np.eye(5))[0]["votes"].value

    def redrawn():
        where = [np.flatnonzero(whole.group == g) for g in rng.integers(groups, size=groups)]
        at, group = np.concatenate(where), np.repeat(np.arange(groups), [*map(len, where)])
        counts = np.where((group < round(share * groups))[:, None], whole.counts[at], 0)
        return Panel(whole.labels, whole.systems, whole.system[at], group, counts, whole.q[at])

    found = checked((redrawn() for _ in range(1000)), shares, f"{share:.0%} rated")
    for (how, name), (held, width) in found.items():
        assert how == "judge" or held > 0.9
        assert how != "ppi" or share < 0.1 or width < found["votes", name][1]
