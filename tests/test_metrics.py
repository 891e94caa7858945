"""evaluate(): each metric against SciPy or a value by hand; the noise floor against known truths."""
import math

import numpy
import pytest
import torch
from scipy import stats
from scipy.spatial.distance import jensenshannon

import distjudge
from distjudge import InputError, evaluate, fit_concentration, load_items, noise_floor


def panel(counts, truth=None):
    labels = [str(c + 1) for c in range(len(counts[0]))]
    rows = [{"id": i, "prompt": f"p{i}", "counts": dict(zip(labels, row, strict=True))} for i, row in enumerate(counts)]
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
    assert got["kl"] == pytest.approx(numpy.mean(stats.entropy(p, q, axis=1)))
    assert got["js_divergence"] == pytest.approx(numpy.mean([jensenshannon(p[i], q[i]) ** 2 for i in rows]))
    assert got["entropy_correlation"] == pytest.approx(stats.pearsonr(stats.entropy(p, axis=1), stats.entropy(q, axis=1))[0])
    assert got["emd"] == pytest.approx(numpy.mean([stats.wasserstein_distance([1, 2, 3, 4], [1, 2, 3, 4], p[i], q[i]) for i in rows]))
    assert got["mean_correlation"] == pytest.approx(stats.pearsonr(p @ [1, 2, 3, 4], q @ [1, 2, 3, 4])[0])
    assert got["total_variation"] == pytest.approx(numpy.mean([0.5 * abs(p[i] - q[i]).sum() for i in rows]))


def test_brier_and_rps_are_means_over_single_votes(case):
    items, _, q = case
    brier = rps = 0.0
    for i, item in enumerate(items):
        for c, n in enumerate(item.counts.values()):
            hit = numpy.eye(4)[c]
            brier += n / 5 * ((q[i] - hit) ** 2).sum() / len(items)
            rps += n / 5 * ((q[i].cumsum() - hit.cumsum()) ** 2).sum() / len(items)
    got = evaluate(q, items, floor_draws=0)
    assert (got["brier"], got["rps"]) == pytest.approx((brier, rps))


def test_by_hand_with_ties_zeros_and_the_floor():
    items = panel([[2, 2, 0], [3, 1, 0], [0, 4, 0]])
    q = [[0.5, 0.3, 0.2], [0.4, 0.4, 0.2], [1.0, 0.0, 0.0]]
    got = evaluate(q, items, label_mass=[0.5, 0.9, 1.0], floor_draws=0)
    assert got["accuracy"] == pytest.approx((0.5 + 0.5 + 0.0) / 3)  # a tie among people, a tie of the judge, a miss
    kl = [0.5 * math.log(0.5 / 0.5) + 0.5 * math.log(0.5 / 0.3), 0.75 * math.log(0.75 / 0.4) + 0.25 * math.log(0.25 / 0.4), math.log(1e6)]
    assert got["kl"] == pytest.approx(sum(kl) / 3)
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
    assert own < by_hand and all(own <= evaluate([[a, 1 - a]] * 2, test, floor_draws=0)["kl"] + 1e-12 for a in (0.6, 0.7, 0.74, 0.76, 0.8))


def test_kl_to_a_known_truth():
    items = panel([[3, 1]], truth=[[0.5, 0.5]])
    assert evaluate([[0.8, 0.2]], items, floor_draws=0)["kl_truth"] == pytest.approx(math.log(0.5) - 0.5 * math.log(0.8 * 0.2))
    assert evaluate([[0.5, 0.5]], items, floor_draws=0)["kl_truth"] == 0


def test_noise_floor_of_known_truths_is_the_textbook_value():
    # one item, two votes, p = 1/2: panels (2,0), (0,2) cost log 2, panel (1,1) costs 0, each with probability 1/2
    assert noise_floor(panel([[1, 1]], truth=[[0.5, 0.5]]), draws=4_000) == pytest.approx(0.5 * math.log(2), rel=0.05)
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
    assert noise_floor(panel([[1, 0], [0, 1]])) is None


def test_ordered_follows_the_values_of_numeric_labels_or_steps():
    far = load_items([{"prompt": "x", "counts": {"1": 1, "10": 0}}, {"prompt": "y", "counts": {"1": 0, "10": 1}}])
    assert evaluate([[0.5, 0.5]] * 2, far, floor_draws=0)["emd"] == pytest.approx(4.5)
    words = load_items([{"prompt": "x", "counts": {"bad": 1, "good": 0}}, {"prompt": "y", "counts": {"bad": 0, "good": 1}}])
    assert "emd" not in evaluate([[0.5, 0.5]] * 2, words, floor_draws=0)
    assert evaluate([[0.5, 0.5]] * 2, words, ordered=True, floor_draws=0)["emd"] == pytest.approx(0.5)
    assert "emd" not in evaluate([[0.5, 0.5]] * 2, far, ordered=False, floor_draws=0)


def test_ordered_metrics_do_not_depend_on_the_order_of_the_columns():
    rows = [{"prompt": "x", "counts": {"1": 0, "2": 1, "3": 1}}, {"prompt": "y", "counts": {"1": 4, "2": 0, "3": 1}}]
    q, mixed = [[0.0, 0.0, 1.0], [0.2, 0.5, 0.3]], [2, 0, 1]
    straight = evaluate(q, load_items(rows), floor_draws=0)
    other = evaluate([[row[c] for c in mixed] for row in q], load_items(rows, labels=["3", "1", "2"]), floor_draws=0)
    assert straight == pytest.approx(other) and evaluate(q[:1], load_items(rows[:1]), floor_draws=0)["emd"] == pytest.approx(0.5)


def test_predictions_rounded_a_little_are_normalised():
    assert evaluate([[0.5004, 0.5004]], panel([[1, 1]]), floor_draws=0)["kl"] == pytest.approx(0)


def test_noise_floor_of_large_panels_takes_no_longer():
    assert noise_floor(panel([[10**8, 10**8], [3 * 10**8, 10**8]]), draws=2) < 1e-6


def test_what_is_no_distribution_is_refused():
    items = panel([[1, 1], [2, 0]])
    for q, words in (([[0.5, 0.5]], "shape"), ([[0.5, 0.5], [0.7, 0.7]], "row 1 is no distribution"), ([[0.5, 0.5], [1.2, -0.2]], "row 1"),
                     ([[float("nan"), 0.5], [1, 0]], "row 0")):
        with pytest.raises(InputError, match=words):
            evaluate(q, items)
