"""Losses: values by hand, zeros and one-hot targets, ties, gradients, arguments that are no distributions."""

import math

import distjudge
from distjudge import ce_loss, hybrid_loss, kl_loss, majority, rps_loss, shrink_votes, worst_case

import pytest
import torch

T = torch.tensor


def test_kl_by_hand():
    q = T([[0.25, 0.5, 0.25], [0.2, 0.3, 0.5], [0.1, 0.1, 0.8]], dtype=torch.float64)
    p = T([[0.5, 0.25, 0.25], [0.2, 0.3, 0.5], [0.0, 1.0, 0.0]], dtype=torch.float64)
    expected = [0.5 * math.log(2) - 0.25 * math.log(2), 0.0, math.log(10)]
    assert kl_loss(q.log(), p).tolist() == pytest.approx(expected, abs=1e-12)


def test_zeros_cost_nothing_unless_people_chose_the_label():
    logq = T([[0.0, -math.inf], [0.0, -math.inf]])
    assert kl_loss(logq, T([[1.0, 0.0], [0.5, 0.5]])).tolist() == [0.0, math.inf]
    assert ce_loss(logq, T([[1.0, 0.0], [0.2, 0.8]])).tolist() == [0.0, math.inf]


def test_ties_share_the_majority():
    p = T([[0.4, 0.4, 0.2], [0.6, 0.2, 0.2], [1 / 3, 1 / 3, 1 / 3]])
    assert torch.allclose(majority(p), T([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [1 / 3] * 3]))
    rounded = T([[0.45 - 1e-8, 0.45, 0.1]], dtype=torch.float64)
    assert majority(rounded).tolist() == [[0.5, 0.5, 0.0]]
    q, swapped = T([[0.5, 0.25, 0.25]]), [1, 0, 2]
    assert ce_loss(q.log(), p[:1]).item() == pytest.approx((math.log(2) + math.log(4)) / 2)
    assert ce_loss(q.log(), p[:1]) == ce_loss(q[:, swapped].log(), p[:1, swapped])


def test_hybrid_is_the_weighted_sum_and_only_kl_sees_the_worst_case():
    p, worst, logq = T([[0.6, 0.4]]), T([[0.45, 0.55]]), T([[0.3, 0.7]]).log()
    kl, ce = kl_loss(logq, worst).item(), -math.log(0.3)
    assert ce_loss(logq, p).item() == pytest.approx(ce)
    assert hybrid_loss(logq, p, 0.8, worst).item() == pytest.approx(0.8 * kl + 0.2 * ce)
    assert torch.equal(hybrid_loss(logq, p, 0.0, worst), ce_loss(logq, p))
    assert torch.equal(hybrid_loss(logq, p, 1.0), kl_loss(logq, p))


def test_a_new_loss_is_one_function_and_one_entry(monkeypatch, tiny_model, votes, tmp_path):
    p, worst, logq = T([[0.6, 0.3, 0.1]]), T([[0.5, 0.3, 0.2]]), T([[0.3, 0.3, 0.4]]).log()
    with pytest.raises(distjudge.InputError, match="loss: must be one of kl, not rps"):
        distjudge.Config(loss="rps").check()
    monkeypatch.setitem(distjudge.LOSSES, "rps", rps_loss)
    mixed = 0.8 * rps_loss(logq, worst) + 0.2 * ce_loss(logq, p)
    assert torch.allclose(hybrid_loss(logq, p, 0.8, worst, loss="rps"), mixed)
    judge, items = distjudge.load_judge(tiny_model, ["1", "2", "3"], lora_rank=2), votes(4)
    logq, p = judge.score([i.prompt for i in items])[0], distjudge.shares_of(items).float()
    settings = {"loss": "rps", "alpha": 1.0, "eps": 0.0, "epochs": 1.0, "batch_size": 4, "answer": 0.0}
    log = distjudge.train(judge, items, distjudge.Config(out=str(tmp_path), **settings))
    assert log[0]["loss"] == pytest.approx(rps_loss(logq, p).mean().item(), rel=1e-5)


def test_a_loss_that_gives_no_number_an_item_is_refused(monkeypatch):
    p, logq = T([[0.6, 0.3, 0.1]] * 3), T([[0.3, 0.3, 0.4]] * 3).log()
    for reduce in (torch.sum, torch.mean, lambda x: x):  # a sum would be added to every item's cross-entropy
        monkeypatch.setitem(distjudge.LOSSES, "own", lambda q, p, reduce=reduce: reduce((q.exp() - p) ** 2))
        message = r"'own' gives a tensor \(.*, not one number an item"
        with pytest.raises(distjudge.InputError, match=message):
            hybrid_loss(logq, p, 0.8, loss="own")


def test_rps_by_hand_and_as_the_mean_over_votes_less_its_least():
    q = T([[0.5, 0.25, 0.25], [0.2, 0.3, 0.5]], dtype=torch.float64)
    p = T([[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]], dtype=torch.float64)
    assert rps_loss(q.log(), p).tolist() == pytest.approx([0.5**2 + 0.25**2, 0.2**2 + 0.0**2])
    for i in range(2):  # vote by vote: sum_k (Q_k - [vote <= k])^2
        score = lambda c, i=i: sum((q[i, : k + 1].sum() - int(c <= k)) ** 2 for k in range(2))  # noqa: E731
        least = sum(p[i, : k + 1].sum() * (1 - p[i, : k + 1].sum()) for k in range(2))
        over_votes = sum(p[i, c] * score(c) for c in range(3))
        assert rps_loss(q.log(), p)[i].item() == pytest.approx((over_votes - least).item())
    assert rps_loss(q.log(), q).tolist() == pytest.approx([0, 0])
    assert rps_loss(T([[0.0, -math.inf]]), T([[0.0, 1.0]])).item() == 1
    logq, far, near = T([[0.8, 0.1, 0.1]]).log(), T([[0.0, 0.0, 1.0]]), T([[0.0, 1.0, 0.0]])
    assert rps_loss(logq, far) > rps_loss(logq, near)


def test_shrunk_votes_by_hand():
    shrunk = shrink_votes(T([[1.0, 0, 0], [50, 50, 0]]), 2 * T([[0.5, 0.25, 0.25]]))
    assert torch.allclose(shrunk, T([[2, 0.5, 0.5], [51, 50.5, 0.5]]) / T([[3.0], [102]]))
    assert torch.equal(shrink_votes(T([[1, 0, 0], [50, 50, 0]]), 2 * T([[0.5, 0.25, 0.25]])), shrunk)


LOGQ, P = T([[0.5, 0.25, 0.25]] * 2).log(), T([[0.6, 0.4, 0.0], [1.0, 0.0, 0.0]])
LOSSES = {"kl_loss": kl_loss, "ce_loss": ce_loss, "rps_loss": rps_loss}
LOSSES |= {"hybrid_loss": lambda logq, p: hybrid_loss(logq, p, 0.8)}
LOSSES |= {"worst_case": lambda logq, p: worst_case(logq, p, 0.25)}
LOGITS, COUNTS = T([[2.0, -1.0, 0.5]] * 2), T([[3.0, 2.0, 0.0], [5.0, 0.0, 0.0]])
WRONG = {
    "raw logits": (LOGITS, P, "logq: wanted are log-probabilities .* a row .2.0, -1.0, 0.5."),
    "probabilities for log-probabilities": (LOGQ.exp(), P, "logq: wanted are log-probabilities"),
    "counts": (LOGQ, COUNTS, "p: wanted are probabilities .* a row .3.0, 2.0, 0.0."),
    "swapped": (P, LOGQ, r"logq: wanted are .* the order is \(logq, p\)"),
    "negative shares": (LOGQ, T([[1.2, -0.2, 0.0]] * 2), "p: wanted are probabilities"),
    "2 % too much": (LOGQ, 1.02 * P, "p: wanted are probabilities"),
    "not numbers": (LOGQ, T([[math.nan, 0.5, 0.5]] * 2), "p: wanted are probabilities"),
    "other shapes": (LOGQ, P[:1], r"\(B, C\) both, not \(2, 3\) and \(1, 3\)"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", LOSSES)
def test_what_is_no_distribution_is_refused(name, wrong):
    assert torch.isfinite(LOSSES[name](LOGQ, P)).all()
    logq, p, message = WRONG[wrong]
    with pytest.raises(ValueError, match=message):
        LOSSES[name](logq, p)
