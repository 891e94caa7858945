"""evaluate(): each metric against SciPy or a value by hand; the noise floor against known truths."""

import dataclasses
import math

import distjudge
from distjudge import InputError, bootstrap, evaluate, item_scores, load_items, noise_floor

import numpy
import pytest
import torch
from scipy import stats
from scipy.spatial.distance import jensenshannon

survey_equivalence = distjudge.survey_equivalence


def panel(counts, truth=None):
    labels = [str(c + 1) for c in range(len(counts[0]))]
    named = lambda row: dict(zip(labels, row, strict=True))  # noqa: E731
    rows = [{"id": i, "prompt": f"p{i}", "counts": named(row)} for i, row in enumerate(counts)]
    for i, t in enumerate(truth if truth is not None else []):
        rows[i]["truth"] = dict(zip(labels, t, strict=True))
    return load_items(rows)


@pytest.fixture(scope="module")
def case():
    draw = numpy.random.default_rng(0)
    counts = draw.multinomial(5, [0.1, 0.2, 0.4, 0.3], size=40)
    q = draw.dirichlet([1, 1, 1, 1], size=40)
    return panel(counts.tolist()), counts / 5, q


def test_against_scipy(case):
    items, p, q = case
    got = evaluate(q, items, draws=0)
    rows = range(len(p))
    values, entropies = [1, 2, 3, 4], (stats.entropy(p, axis=1), stats.entropy(q, axis=1))
    expected = {
        "kl": numpy.mean(stats.entropy(p, q, axis=1)),
        "js_divergence": numpy.mean([jensenshannon(p[i], q[i]) ** 2 for i in rows]),
        "entropy_correlation": stats.pearsonr(*entropies)[0],
        "emd": numpy.mean([stats.wasserstein_distance(values, values, p[i], q[i]) for i in rows]),
        "mean_correlation": stats.pearsonr(p @ values, q @ values)[0],
        "total_variation": numpy.mean([0.5 * abs(p[i] - q[i]).sum() for i in rows]),
    }
    brier = rps = 0.0
    for i, item in enumerate(items):
        for c, n in enumerate(item.counts.values()):
            hit = numpy.eye(4)[c]
            brier += n / 5 * ((q[i] - hit) ** 2).sum() / len(items)
            rps += n / 5 * ((q[i].cumsum() - hit.cumsum()) ** 2).sum() / len(items)
    expected |= {"brier": brier, "rps": rps}  # means over single votes
    assert {name: got[name] for name in expected} == pytest.approx(expected)


def test_by_hand_with_ties_zeros_and_the_floor():
    items = panel([[2, 2, 0], [3, 1, 0], [0, 4, 0]])
    q = [[0.5, 0.3, 0.2], [0.4, 0.4, 0.2], [1.0, 0.0, 0.0]]
    got = evaluate(q, items, label_mass=[0.5, 0.9, 1.0], draws=0)
    assert got["accuracy"] == pytest.approx(1 / 3)  # a tie among people, a tie of the judge, a miss
    second = 0.75 * math.log(0.75 / 0.4) + 0.25 * math.log(0.25 / 0.4)
    assert got["kl"] == pytest.approx((0.5 * math.log(0.5 / 0.3) + second + math.log(1e6)) / 3)
    assert (got["label_mass"], got["label_mass_min"]) == pytest.approx((0.8, 0.5))
    assert got["items"] == 3 and got["kl_truth"] is None and got["kl_noise_floor"] is None
    assert evaluate(torch.tensor(q, dtype=torch.float64), items, draws=0) == evaluate(q, items, draws=0)


def test_marginal_comes_from_the_training_items_and_is_the_best_constant():
    train, test = panel([[3, 1], [1, 1]]), panel([[1, 0], [1, 1]])
    assert distjudge.shares_of(train).mean(0).tolist() == pytest.approx([0.625, 0.375])
    by_hand = (-math.log(0.625) + 0.5 * math.log(0.5 / 0.625) + 0.5 * math.log(0.5 / 0.375)) / 2
    q = [[0.5, 0.5]] * 2
    assert evaluate(q, test, train_items=train, draws=0)["kl_marginal"] == pytest.approx(by_hand)
    own = evaluate(q, test, draws=0)["kl_marginal"]
    others = [evaluate([[a, 1 - a]] * 2, test, draws=0)["kl"] for a in (0.6, 0.7, 0.74, 0.76, 0.8)]
    assert own < by_hand and own <= min(others) + 1e-12


def simulated(kind, size, seed):
    """True distributions (size, C) of one kind: nominal, or ordinal ones that no Dirichlet fits."""
    draw = numpy.random.default_rng(seed)
    if kind == "dirichlet":
        return draw.dirichlet(4 * numpy.array([0.1, 0.15, 0.3, 0.25, 0.2]), size)
    if kind == "latent":  # a normal opinion about each item, cut by thresholds
        cuts = stats.norm.cdf((numpy.linspace(-1.5, 1.5, 4) - draw.normal(size=(size, 1))) / 0.5)
        return numpy.diff(cuts, axis=1, prepend=0, append=1)
    sure = 0.93 * (draw.random((size, 1)) < 0.6)  # a mixture: most items are nearly unanimous
    return sure * numpy.eye(5)[draw.integers(5, size=size)] + (1 - sure) * draw.dirichlet([2] * 5, size)


def test_noise_floor_of_known_truths_is_what_they_score():
    items = panel([[1, 1], [2, 0]], truth=[[0.5, 0.5], [0.5, 0.5]])
    assert noise_floor(items) == pytest.approx(0.5 * math.log(2))
    half, by_hand = evaluate([[0.5, 0.5]] * 2, items), math.log(0.5) - 0.5 * math.log(0.8 * 0.2)
    assert half["kl_corrected"] == pytest.approx(0) and half["kl_truth"] == 0
    assert evaluate([[0.8, 0.2]] * 2, items, draws=0)["kl_truth"] == pytest.approx(by_hand)


@pytest.mark.parametrize("kind", ["dirichlet", "latent", "mixture"])
@pytest.mark.parametrize(("votes", "near"), [(3, 0.045), (5, 0.02), (20, 0.01), (100, 0.002), (1000, 0.0003)])
def test_noise_floor_without_truths_finds_what_the_truths_would_score(kind, votes, near):
    truth = simulated(kind, 2000, 3)
    counts = numpy.random.default_rng(4).multinomial(votes, truth)
    actual = stats.entropy(counts / votes, truth, axis=1).mean()
    assert noise_floor(panel(counts.tolist())) == pytest.approx(actual, abs=near)


def test_noise_floor_is_undefined_for_single_votes_and_takes_any_number():
    assert noise_floor(panel([[1, 0], [0, 1]])) is None
    assert noise_floor(panel([[10**8, 10**8], [3 * 10**8, 10**8]])) == pytest.approx(0, abs=1e-6)
    mixed = panel([[3, 2], [1, 4], [5, 0], [1, 0]] * 50)  # with single votes, and in any order
    assert noise_floor(mixed) == pytest.approx(noise_floor(mixed[::-1])) and noise_floor(mixed) > 0


def test_people_by_hand():
    """sum p^2 is estimated by 1/3 and 1: ||q - p||^2 by 0.5 - 2 * 0.5 + 1/3 and 0.625 - 2 * 0.25 + 1."""
    items = panel([[2, 2], [3, 0], [0, 1]])  # the single vote does not count
    first, second = 0.5 - 2 * 0.5 + 1 / 3, 0.25**2 + 0.75**2 - 2 * 0.25 + 1
    found = survey_equivalence([[0.5, 0.5], [0.25, 0.75], [1, 0]], items)
    assert found["mean"] == pytest.approx((2 / 3 + 0) / (first + second))
    q, several = [[0.5, 0.5], [0.25, 0.75], [1, 0]], [[[0.5, 0.5], [0.25, 0.75], [1, 0]]] * 2
    assert survey_equivalence(several, items)["mean"] == found["mean"]
    got = evaluate(q, items, draws=0)
    assert got["people"] == found["mean"] and got["people_low"] is None
    mean = evaluate(q, items, train_items=panel([[3, 1]]), draws=0)["people_marginal"]
    assert mean == survey_equivalence([[0.75, 0.25]] * 3, items)["mean"]
    with pytest.raises(InputError, match="row 1 is no distribution"):
        survey_equivalence([[0.5, 0.5], [0.7, 0.7], [1, 0]], items)


def test_people_of_groups_are_as_sure_as_their_groups():
    """Each item three times in a group says no more than once alone; three times in no group says more."""
    rows = [{"prompt": f"p{i}", "counts": {"1": 10 + 10 * (i % 3), "2": 20}} for i in range(12)] * 3
    grouped = load_items([row | {"id": i, "group": row["prompt"]} for i, row in enumerate(rows)])
    q = [[0.1 + 0.02 * (i % 12), 0.9 - 0.02 * (i % 12)] for i in range(36)]
    alone = [dataclasses.replace(item, group=None) for item in grouped]
    low = lambda some: 1 / survey_equivalence(q[: len(some)], some)["low"]  # noqa: E731
    once, groups, apart = map(low, (alone[:12], grouped, alone))
    assert groups == pytest.approx(once) and apart < 0.95 * once


def test_people_where_votes_cannot_say():
    nothing = {"mean": None, "low": None, "high": None}
    half = [[0.5, 0.5], [0.5, 0.5]]
    assert survey_equivalence(half, panel([[1, 0], [0, 1]])) == nothing  # single votes
    weighted = [distjudge.Item(x, x, {"1": 1.5, "2": 0.5}) for x in "ab"]
    assert survey_equivalence(half, weighted) == nothing and evaluate(half, weighted)["people"] is None
    assert survey_equivalence(half, panel([[3, 0], [0, 4]])) == nothing  # nobody ever disagrees
    better = panel([[1, 1]] * 4 + [[2, 0], [0, 2]])  # nearer to the votes than people are: 1 / n is negative
    found, got = survey_equivalence([[0.5, 0.5]] * 6, better), evaluate([[0.5, 0.5]] * 6, better)
    assert found["mean"] == found["high"] == math.inf and found["low"] > 0
    assert got["people"] is got["people_high"] is None and got["people_low"] == found["low"]


def worth(kind, votes, size, seed, noise, group=1):
    """A judge whose errors are its group's: how many people it is worth, in truth and by the votes."""
    truth, draw = simulated(kind, size, seed), numpy.random.default_rng(seed + 1)
    said = draw.dirichlet([1] * 5, size // group).repeat(group, 0)
    q = (1 - noise) * truth + noise * said
    items = panel(draw.multinomial(votes, truth).tolist())
    names = [None if group == 1 else i // group for i in range(size)]
    items = [dataclasses.replace(item, group=name) for item, name in zip(items, names, strict=True)]
    return (1 - (truth**2).sum(1)), ((q - truth) ** 2).sum(1), survey_equivalence(q, items, 400)


@pytest.mark.parametrize("kind", ["dirichlet", "latent", "mixture"])
@pytest.mark.parametrize("votes", [2, 5, 20])
def test_people_are_those_of_the_truth(kind, votes):
    one, error, found = worth(kind, votes, 6000, 7, 0.5)
    actual = one.mean() / error.mean()
    assert found["low"] < actual < found["high"] and found["mean"] == pytest.approx(actual, rel=0.12)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "votes", "group"), [("latent", 5, 1), ("mixture", 2, 1), ("latent", 5, 5)])
def test_coverage_of_the_interval_of_people(kind, votes, group):
    one, error, _ = worth(kind, votes, 50_000, 99, 0.4, group)
    actual, trials = one.mean() / error.mean(), 300
    found = [worth(kind, votes, 200, 1000 + 2 * i, 0.4, group)[2] for i in range(trials)]
    covered = sum(f["low"] <= actual <= f["high"] for f in found) / trials
    print(kind, votes, group, actual, covered)  # pytest -s shows it
    assert 0.915 <= covered <= 0.985


def test_ordered_follows_the_values_of_numeric_labels_or_steps():
    half = [[0.5, 0.5]] * 2
    emd = lambda items, **more: evaluate(half, items, draws=0, **more).get("emd")  # noqa: E731
    both = lambda a, b: [{"prompt": x, "counts": {a: int(x == "x"), b: int(x == "y")}} for x in "xy"]  # noqa: E731
    far, words = load_items(both("1", "10")), load_items(both("bad", "good"))
    assert emd(far) == pytest.approx(4.5) and emd(far, ordered=False) is None
    assert emd(words) is None and emd(words, ordered=True) == pytest.approx(0.5)


def test_ordered_metrics_do_not_depend_on_the_order_of_the_columns():
    rows = [{"prompt": f"{c}", "counts": dict(zip("123", c, strict=True))} for c in ([0, 1, 1], [4, 0, 1])]
    q, mixed = [[0.0, 0.0, 1.0], [0.2, 0.5, 0.3]], [2, 0, 1]
    straight = evaluate(q, load_items(rows), draws=0)
    turned = load_items(rows, labels=["3", "1", "2"])
    assert straight == pytest.approx(evaluate([[row[c] for c in mixed] for row in q], turned, draws=0))
    assert evaluate(q[:1], load_items(rows[:1]), draws=0)["emd"] == pytest.approx(0.5)


def test_what_is_no_distribution_is_refused():
    wrong = [
        ([[0.5, 0.5]], "shape"),
        ([[0.5, 0.5], [0.7, 0.7]], "row 1 is no distribution"),
        ([[0.5, 0.5], [1.2, -0.2]], "row 1"),
        ([[math.nan, 0.5], [1, 0]], "row 0"),
    ]
    for q, words in wrong:
        with pytest.raises(InputError, match=words):
            evaluate(q, panel([[1, 1], [2, 0]]))
    rounded = evaluate([[0.5004, 0.5004]], panel([[1, 1]]), draws=0)
    assert rounded["kl"] == pytest.approx(0)  # predictions rounded a little are normalised


def bootstrap_t(x, statistic, error, draws=1500):
    """Bootstrap-t in NumPy: an interval of a statistic of rows x with a given standard error."""
    draw, whole, t = numpy.random.default_rng(0), statistic(x), []
    for _ in range(draws):
        again = x[draw.integers(len(x), size=len(x))]
        t.append((statistic(again) - whole) / max(error(again), error(x) / 5))
    return whole - error(x) * numpy.quantile(t, [0.975, 0.025])


def test_bootstrap_agrees_with_a_bootstrap_t_in_numpy(case):
    items, _, q = case
    scores = item_scores(q, items)

    def error_of_r(x):  # the influence function of Pearson's r
        z, r = stats.zscore(x), stats.pearsonr(*x.T)[0]
        return numpy.sqrt(((z.prod(1) - r / 2 * (z**2).sum(1)) ** 2).mean() / len(x))

    def error_of_ratio(x):
        a, b = x.T
        return numpy.sqrt(((a - b * a.mean() / b.mean()) ** 2).mean() / len(x)) / b.mean()

    ratio, both = torch.stack([scores["kl"], scores["brier"]], 1), scores["mean_correlation"]
    for ours, x, statistic, error in (
        (scores["kl"], scores["kl"], numpy.mean, lambda x: x.std() / math.sqrt(len(x))),
        (both, both[:, :2], lambda x: stats.pearsonr(*x.T)[0], error_of_r),
        (ratio, ratio, lambda x: x[:, 0].mean() / x[:, 1].mean(), error_of_ratio),
    ):
        found = bootstrap(ours[None], draws=4000)
        theirs = bootstrap_t(x.numpy(), statistic, error)
        assert found["mean"] == pytest.approx(statistic(x.numpy()))
        width = theirs[1] - theirs[0]
        assert (found["low"], found["high"]) == pytest.approx(tuple(theirs), abs=0.08 * width)


def test_two_groups_by_hand():
    """Draws are 0, 1/2 and 1. One item twice has no error of its own: a fifth of the sample's."""
    found = bootstrap(torch.tensor([[0.0, 1.0]]))
    assert (found["low"], found["high"]) == pytest.approx((0.5 - 2.5, 0.5 + 2.5), abs=1e-12)


@pytest.mark.parametrize("runs", [2, 3, 5])
def test_few_runs_are_as_uncertain_as_student_says(runs):
    """Items all alike: only the runs differ, and the interval is that of a t test of their means."""
    means = torch.arange(runs, dtype=torch.float64) ** 2
    found = bootstrap(means[:, None].expand(runs, 40), draws=20_000)
    half = stats.t.ppf(0.975, runs - 1) * means.std() / math.sqrt(runs)
    assert (found["high"] - found["low"]) / 2 == pytest.approx(half.item(), rel=0.06)


@pytest.mark.parametrize("draws", [50, 99, 300, 1999])
def test_p_and_interval_agree(draws):
    data = torch.Generator().manual_seed(1)
    for shift in torch.linspace(0, 1, 60).tolist():
        runs = 1 + int(10 * shift) % 3
        found = bootstrap(torch.rand(runs, 12, generator=data).double() ** 3 - shift, draws=draws)
        assert (found["p"] < 0.05) == (found["low"] > 0 or found["high"] < 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "groups", "least"),
    [(k, g, x) for k, x in (("normal", 0.92), ("skewed", 0.90), ("uneven", 0.87)) for g in (5, 10, 20, 30)],
)
def test_coverage_with_few_groups(kind, groups, least):
    """Group effects normal or exponential (true mean 1), sizes even or from 1 to 12 items."""
    draw, trials, covered = torch.Generator().manual_seed(groups), 600, 0
    for _ in range(trials):
        effect = torch.randn(groups, generator=draw) + 1
        if kind != "normal":
            effect = -torch.rand(groups, generator=draw).log()
        size = torch.full((groups,), 3)
        if kind == "uneven":
            size = torch.randint(1, 13, (groups,), generator=draw)
        name = torch.arange(groups).repeat_interleave(size)
        found = bootstrap(effect[name][None].double(), groups=name.tolist(), draws=400)
        covered += found["low"] <= 1 <= found["high"]
    print(kind, groups, covered / trials)  # pytest -s shows it
    assert least <= covered / trials <= 0.985


def crossed(draws, runs, items, item_sd, run_sd, rest_sd, group=1):
    """Differences of two methods, true mean 0: effects of the item (or its group) and the run, a rest."""
    draw = torch.Generator().manual_seed(11)
    normal = lambda *size: torch.randn(*size, generator=draw, dtype=torch.float64)  # noqa: E731
    of_items = item_sd * normal(draws, 1, items // group).repeat_interleave(group, 2)
    return of_items + run_sd * normal(draws, runs, 1) + rest_sd * normal(draws, runs, items)


@pytest.mark.parametrize(
    ("runs", "item_sd", "run_sd", "group"),
    [(1, 1.0, 0.0, 1), (5, 1.0, 0.0, 1), (5, 0.05, 0.3, 1), (3, 1.0, 0.1, 1), (5, 1.0, 0.05, 4)],
)
def test_coverage_of_the_intervals_and_size_of_the_test(runs, item_sd, run_sd, group):
    trials, items = 300, 60
    sample = crossed(trials, runs, items, item_sd, run_sd, 0.5, group)
    groups = [i // group for i in range(items)]
    found = [bootstrap(one, groups=groups, draws=300) for one in sample]
    share = lambda found: sum(f["low"] <= 0 <= f["high"] for f in found) / trials  # noqa: E731
    covered = share(found)
    rejected = sum(f["p"] < 0.05 for f in found) / trials
    # 95 % nominal; three standard errors of 300 trials are 3.8 points;
    assert 0.915 <= covered <= 0.99 and 0.01 <= rejected <= 0.085
    if group > 1:  # taken as single items, grouped ones look more certain than they are
        assert share([bootstrap(one, draws=300) for one in sample]) < covered - 0.1


def test_bootstrap_of_what_is_alike_without_two_groups_or_with_other_shapes():
    base = torch.rand(5, 200, generator=torch.Generator().manual_seed(0)).double()
    gap = bootstrap(base + 0.1, base)
    assert bootstrap(base, base)["p"] == 1 and gap["p"] < 0.01 and gap["high"] - gap["low"] < 1e-9
    one = torch.ones(2, 3)
    assert bootstrap(one, groups=["a", "a", "a"]) == {"mean": 1.0, "low": None, "high": None, "p": None}
    assert bootstrap(one, groups=[None, "a", "a"])["low"] == 1.0
    constant = item_scores([[0.5, 0.5]] * 3, panel([[1, 1], [2, 0], [0, 2]]))["entropy_correlation"]
    assert bootstrap(constant[None])["mean"] is None
    assert bootstrap(one, groups=numpy.array(["a", "a", "b"]))["low"] == 1.0
    for wrong in ((torch.ones(3),), (one, torch.ones(2, 4)), (torch.ones(2, 5, 3),)):
        with pytest.raises(ValueError, match="scores"):
            bootstrap(*wrong)


def test_training_items_with_labels_in_another_order_are_refused():  # else the wrong columns would be read
    rows = [{"prompt": "p", "counts": {"a": 3, "b": 1}}]
    items, turned = (distjudge.load_items(rows, labels=labels) for labels in (["a", "b"], ["b", "a"]))
    assert evaluate([[0.5, 0.5]], items, train_items=items, draws=0)["kl_marginal"] == pytest.approx(0)
    nobody = [*items, distjudge.Item("none", "none", {"a": 0, "b": 0}, where="x.jsonl:9")]
    with pytest.raises(distjudge.InputError, match=r"x.jsonl:9: item 'none': has no votes"):
        evaluate([[0.5, 0.5]] * len(nobody), nobody)
    with pytest.raises(distjudge.InputError, match=r"train_items: labels {b, a} are not {a, b}"):
        evaluate([[0.5, 0.5]], items, train_items=turned, draws=0)
