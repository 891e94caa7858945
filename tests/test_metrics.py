"""evaluate(): each metric against SciPy or a value by hand; the noise floor against known truths."""

import math

import numpy
import pytest
import torch
from scipy import stats
from scipy.spatial.distance import jensenshannon

import distjudge
from distjudge import InputError, bootstrap, evaluate, fit_concentration, item_scores, load_items, noise_floor


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
    got = evaluate(q, items, floor_draws=0)
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
    got = evaluate(q, items, label_mass=[0.5, 0.9, 1.0], floor_draws=0)
    assert got["accuracy"] == pytest.approx(1 / 3)  # a tie among people, a tie of the judge, a miss
    second = 0.75 * math.log(0.75 / 0.4) + 0.25 * math.log(0.25 / 0.4)
    assert got["kl"] == pytest.approx((0.5 * math.log(0.5 / 0.3) + second + math.log(1e6)) / 3)
    assert (got["label_mass"], got["label_mass_min"]) == pytest.approx((0.8, 0.5))
    assert got["items"] == 3 and got["kl_truth"] is None and got["kl_noise_floor"] is None
    assert evaluate(torch.tensor(q), items, floor_draws=0) == evaluate(q, items, floor_draws=0)


def test_marginal_comes_from_the_training_items_and_is_the_best_constant():
    train, test = panel([[3, 1], [1, 1]]), panel([[1, 0], [1, 1]])
    assert distjudge.marginal_distribution(train).tolist() == pytest.approx([0.625, 0.375])
    by_hand = (-math.log(0.625) + 0.5 * math.log(0.5 / 0.625) + 0.5 * math.log(0.5 / 0.375)) / 2
    q = [[0.5, 0.5]] * 2
    assert evaluate(q, test, train_items=train, floor_draws=0)["kl_marginal"] == pytest.approx(by_hand)
    own = evaluate(q, test, floor_draws=0)["kl_marginal"]
    others = [evaluate([[a, 1 - a]] * 2, test, floor_draws=0)["kl"] for a in (0.6, 0.7, 0.74, 0.76, 0.8)]
    assert own < by_hand and own <= min(others) + 1e-12


def test_kl_to_a_known_truth():
    items = panel([[3, 1]], truth=[[0.5, 0.5]])
    by_hand = math.log(0.5) - 0.5 * math.log(0.8 * 0.2)
    assert evaluate([[0.8, 0.2]], items, floor_draws=0)["kl_truth"] == pytest.approx(by_hand)
    assert evaluate([[0.5, 0.5]], items, floor_draws=0)["kl_truth"] == 0


def test_noise_floor_of_known_truths_is_the_textbook_value():
    # one item, two votes, p = 1/2: panels (2,0), (0,2) cost log 2, panel (1,1) costs 0; half the draws each
    floor = noise_floor(panel([[1, 1]], truth=[[0.5, 0.5]]), draws=4_000)
    assert floor == pytest.approx(0.5 * math.log(2), rel=0.05)
    many = panel([[250, 250, 500]] * 20, truth=[[0.25, 0.25, 0.5]] * 20)
    assert noise_floor(many, draws=400) == pytest.approx((3 - 1) / (2 * 1000), rel=0.05)


@pytest.mark.parametrize("concentration", [1.0, 4.0])
def test_noise_floor_without_truths_finds_what_the_truths_would_score(concentration):
    draw = numpy.random.default_rng(3)
    truth = draw.dirichlet(concentration * numpy.array([0.2, 0.3, 0.5]), size=5000)
    counts = numpy.array([draw.multinomial(5, t) for t in truth])
    assert fit_concentration(torch.tensor(counts).double()) == pytest.approx(concentration, rel=0.1)
    actual = numpy.mean(stats.entropy(counts / 5, truth, axis=1))
    estimated = noise_floor(panel(counts.tolist()), draws=20)
    own_votes_as_truth = noise_floor(panel(counts.tolist(), truth=(counts / 5).tolist()), draws=20)
    assert estimated == pytest.approx(actual, rel=0.06)
    assert abs(own_votes_as_truth - actual) > 2 * abs(estimated - actual)


def test_noise_floor_is_seeded_undefined_for_single_votes_and_leaves_the_random_state_alone():
    items = panel([[3, 2], [1, 4], [5, 0]])
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert noise_floor(items, 20, seed=1) == noise_floor(items, 20, seed=1) != noise_floor(items, 20, seed=2)
    assert torch.equal(state, torch.get_rng_state())
    assert noise_floor(panel([[1, 0], [0, 1]])) is None and fit_concentration(torch.eye(3).double()) is None
    # large panels take no longer: a binomial draw's time does not grow with the votes
    assert noise_floor(panel([[10**8, 10**8], [3 * 10**8, 10**8]]), draws=2) < 1e-6


def test_ordered_follows_the_values_of_numeric_labels_or_steps():
    half = [[0.5, 0.5]] * 2
    emd = lambda items, **more: evaluate(half, items, floor_draws=0, **more).get("emd")  # noqa: E731
    both = lambda a, b: [{"prompt": x, "counts": {a: int(x == "x"), b: int(x == "y")}} for x in "xy"]  # noqa: E731
    far, words = load_items(both("1", "10")), load_items(both("bad", "good"))
    assert emd(far) == pytest.approx(4.5) and emd(far, ordered=False) is None
    assert emd(words) is None and emd(words, ordered=True) == pytest.approx(0.5)


def test_ordered_metrics_do_not_depend_on_the_order_of_the_columns():
    rows = [{"prompt": f"{c}", "counts": dict(zip("123", c, strict=True))} for c in ([0, 1, 1], [4, 0, 1])]
    q, mixed = [[0.0, 0.0, 1.0], [0.2, 0.5, 0.3]], [2, 0, 1]
    straight = evaluate(q, load_items(rows), floor_draws=0)
    turned = load_items(rows, labels=["3", "1", "2"])
    assert straight == pytest.approx(evaluate([[row[c] for c in mixed] for row in q], turned, floor_draws=0))
    assert evaluate(q[:1], load_items(rows[:1]), floor_draws=0)["emd"] == pytest.approx(0.5)


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
    rounded = evaluate([[0.5004, 0.5004]], panel([[1, 1]]), floor_draws=0)
    assert rounded["kl"] == pytest.approx(0)  # predictions rounded a little are normalised


def test_kl_corrected_estimates_kl_to_the_unknown_truth():
    draw = numpy.random.default_rng(5)
    truth = draw.dirichlet([0.8, 1.2, 2.0], size=4000)
    counts = numpy.array([draw.multinomial(3, t) for t in truth])
    q = 0.7 * truth + 0.3 * draw.dirichlet([1, 1, 1], size=4000)
    actual = stats.entropy(truth, q, axis=1).mean()
    got = evaluate(q, panel(counts.tolist()), floor_draws=20)
    assert got["kl"] > 3 * actual and got["kl_corrected"] == pytest.approx(actual, abs=0.012)
    assert got["kl_corrected"] == got["kl"] - got["kl_noise_floor"]
    assert evaluate(q[:5], panel(counts[:5].tolist()), floor_draws=0)["kl_corrected"] is None


def test_item_scores_average_to_the_metrics(case):
    items, _, q = case
    scores, metrics = item_scores(q, items), evaluate(q, items, floor_draws=0)
    assert {"kl", "accuracy", "emd", "rps"} <= set(scores)
    assert all(score.shape[0] == len(items) for score in scores.values())
    for name, score in scores.items():
        assert bootstrap(score[None], draws=100)["mean"] == pytest.approx(metrics[name], abs=1e-9), name


def test_bootstrap_agrees_with_scipy(case):
    items, _, q = case
    scores = item_scores(q, items)
    pearson = lambda a, b: stats.pearsonr(a, b)[0]  # noqa: E731
    paired = {"paired": True, "vectorized": False, "n_resamples": 1500}
    for name, columns, statistic, options, near in (
        ("kl", (scores["kl"],), numpy.mean, {"n_resamples": 4000}, 0.02),
        ("mean_correlation", scores["mean_correlation"].T[:2], pearson, paired, 0.05),
    ):
        ours = bootstrap(scores[name][None], draws=4000)
        draw = {"method": "percentile", "rng": numpy.random.default_rng(0)}
        theirs = stats.bootstrap([column.numpy() for column in columns], statistic, **draw, **options)
        assert (ours["low"], ours["high"]) == pytest.approx(theirs.confidence_interval, abs=near)
        assert ours["low"] < ours["mean"] < ours["high"]


def test_few_groups_spread_out_by_hand():
    """Of two items the draws are 0, 1/2 and 1; they spread out by sqrt(2 / 1)."""
    found, half = bootstrap(torch.tensor([[0.0, 1.0]])), math.sqrt(2) / 2
    assert (found["low"], found["high"]) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-12)


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
    # 95 % nominal; three standard errors of 300 trials are 3.8 points; fifteen groups make it a little short
    assert 0.90 <= covered <= 0.995 and 0.005 <= rejected <= 0.10
    if group > 1:  # taken as single items, grouped ones look more certain than they are
        assert share([bootstrap(one, draws=300) for one in sample]) < covered - 0.1


def test_seeds_that_differ_widen_the_interval_and_pairing_narrows_it():
    draw = torch.Generator().manual_seed(0)
    base = torch.randn(5, 200, generator=draw, dtype=torch.float64)
    alike, apart = base[:1].expand(5, -1), base[:1] + torch.linspace(-0.5, 0.5, 5)[:, None]
    width = lambda f: f["high"] - f["low"]  # noqa: E731
    assert width(bootstrap(apart)) > 3 * width(bootstrap(alike))
    gap = bootstrap(base + 0.1, base)
    assert gap["mean"] == pytest.approx(0.1) and width(gap) < 1e-9 and gap["p"] < 0.01
    assert width(bootstrap(base)) > 0.1
    assert bootstrap(base, base)["p"] == 1


def test_bootstrap_without_two_groups_or_with_other_shapes():
    one = torch.ones(2, 3)
    assert bootstrap(one, groups=["a", "a", "a"]) == {"mean": 1.0, "low": None, "high": None, "p": None}
    assert bootstrap(one, groups=[None, "a", "a"])["low"] == 1.0
    constant = item_scores([[0.5, 0.5]] * 3, panel([[1, 1], [2, 0], [0, 2]]))["entropy_correlation"]
    assert bootstrap(constant[None])["mean"] is None
    for wrong in ((torch.ones(3),), (one, torch.ones(2, 4))):
        with pytest.raises(ValueError, match="scores"):
            bootstrap(*wrong)


def test_training_items_with_labels_in_another_order_are_refused():
    """Their marginal would be read with the wrong columns."""
    rows = [{"prompt": "p", "counts": {"a": 3, "b": 1}}]
    items, turned = (distjudge.load_items(rows, labels=labels) for labels in (["a", "b"], ["b", "a"]))
    assert evaluate([[0.5, 0.5]], items, train_items=items, floor_draws=0)["kl_marginal"] == pytest.approx(0)
    with pytest.raises(distjudge.InputError, match=r"train_items: labels {b, a} are not {a, b}"):
        evaluate([[0.5, 0.5]], items, train_items=turned, floor_draws=0)
