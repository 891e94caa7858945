"""Losses: values by hand, zeros and one-hot targets, ties, gradients."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distjudge import ce_loss, hybrid_loss, kl_loss, majority, rps_loss, shrink_votes

T = torch.tensor


def test_kl_by_hand():
    q = T([[0.25, 0.5, 0.25], [0.2, 0.3, 0.5], [0.1, 0.1, 0.8]], dtype=torch.float64)
    p = T([[0.5, 0.25, 0.25], [0.2, 0.3, 0.5], [0.0, 1.0, 0.0]], dtype=torch.float64)
    expected = [0.5 * math.log(2) - 0.25 * math.log(2), 0.0, math.log(10)]
    assert kl_loss(q.log(), p).tolist() == pytest.approx(expected, abs=1e-12)


def test_kl_agrees_with_scipy():
    from scipy.stats import entropy

    draw = torch.Generator().manual_seed(0)
    p, q = (torch.rand(50, 4, generator=draw, dtype=torch.float64).pow(3) for _ in range(2))
    p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
    assert kl_loss(q.log(), p).tolist() == pytest.approx(entropy(p.numpy(), q.numpy(), axis=1).tolist(), abs=1e-12)


def test_zeros_cost_nothing_unless_people_chose_the_label():
    logq = T([[0.0, -math.inf], [0.0, -math.inf]])
    assert kl_loss(logq, T([[1.0, 0.0], [0.5, 0.5]])).tolist() == [0.0, math.inf]
    assert ce_loss(logq, T([[1.0, 0.0], [0.2, 0.8]])).tolist() == [0.0, math.inf]


def test_ties_share_the_majority():
    p = T([[0.4, 0.4, 0.2], [0.6, 0.2, 0.2], [1 / 3, 1 / 3, 1 / 3]])
    assert torch.allclose(majority(p), T([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [1 / 3] * 3]))
    q = T([[0.5, 0.25, 0.25]])
    assert ce_loss(q.log(), p[:1]).item() == pytest.approx((math.log(2) + math.log(4)) / 2)
    swapped = [1, 0, 2]
    assert ce_loss(q.log(), p[:1]) == ce_loss(q[:, swapped].log(), p[:1, swapped])


def test_hybrid_is_the_weighted_sum_and_only_kl_sees_the_worst_case():
    p, worst, logq = T([[0.6, 0.4]]), T([[0.45, 0.55]]), T([[0.3, 0.7]]).log()
    kl, ce = kl_loss(logq, worst).item(), -math.log(0.3)
    assert ce_loss(logq, p).item() == pytest.approx(ce)
    assert hybrid_loss(logq, p, 0.8, worst).item() == pytest.approx(0.8 * kl + 0.2 * ce)
    assert torch.equal(hybrid_loss(logq, p, 0.0, worst), ce_loss(logq, p))
    assert torch.equal(hybrid_loss(logq, p, 1.0), kl_loss(logq, p))


def test_gradient_of_kl_is_q_minus_p_also_at_one_hot_targets():
    p = T([[1.0, 0.0, 0.0], [0.2, 0.3, 0.5]], dtype=torch.float64)
    z = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    kl_loss(z.log_softmax(1), p).sum().backward()
    assert torch.allclose(z.grad, z.detach().softmax(1) - p, atol=1e-12)
    assert torch.autograd.gradcheck(lambda z: hybrid_loss(z.log_softmax(1), p, 0.7), (z.detach().requires_grad_(),))


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 7), st.integers(0, 10**6), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.sampled_from([1.0, 30.0]))
def test_finite_and_not_negative_in_every_precision(labels, seed, dtype, scale):
    draw = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 3, (8, labels), generator=draw)
    counts[:, seed % labels] += 1
    p = (counts / counts.sum(1, keepdim=True)).to(dtype)
    z = (scale * torch.randn(8, labels, generator=draw)).requires_grad_()
    logq = z.log_softmax(1).to(dtype)
    for loss in (kl_loss(logq, p), ce_loss(logq, p), hybrid_loss(logq, p, 0.5)):
        assert loss.shape == (8,) and torch.isfinite(loss).all() and (loss > -0.02).all()
    kl_loss(logq, p).sum().backward()
    assert torch.isfinite(z.grad).all()


def test_rps_by_hand_and_as_the_mean_over_votes_less_its_least():
    q = T([[0.5, 0.25, 0.25], [0.2, 0.3, 0.5]], dtype=torch.float64)
    p = T([[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]], dtype=torch.float64)
    assert rps_loss(q.log(), p).tolist() == pytest.approx([0.5**2 + 0.25**2, 0.2**2 + 0.0**2])
    for i in range(2):  # vote by vote: sum_k (Q_k - [vote <= k])^2
        votes = sum(p[i, c] * sum((q[i, : k + 1].sum() - int(c <= k)) ** 2 for k in range(2)) for c in range(3))
        least = sum(p[i, : k + 1].sum() * (1 - p[i, : k + 1].sum()) for k in range(2))
        assert rps_loss(q.log(), p)[i].item() == pytest.approx((votes - least).item())
    mixed = [2, 0, 1]
    assert torch.allclose(rps_loss(q[:, mixed].log(), p[:, mixed], order=[1, 2, 0]), rps_loss(q.log(), p))
    assert rps_loss(q.log(), q).tolist() == pytest.approx([0, 0]) and rps_loss(T([[0.0, -math.inf]]), T([[0.0, 1.0]])).item() == 1
    far, near = T([[0.0, 0.0, 1.0]]), T([[0.0, 1.0, 0.0]])
    assert rps_loss(T([[0.8, 0.1, 0.1]]).log(), far) > rps_loss(T([[0.8, 0.1, 0.1]]).log(), near)


def test_gradient_of_rps_is_right_and_finite_at_the_corners():
    p = T([[1.0, 0.0, 0.0], [0.2, 0.3, 0.5]], dtype=torch.float64)
    z = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: rps_loss(z.log_softmax(1), p), (z,))
    assert torch.autograd.gradcheck(lambda z: hybrid_loss(z.log_softmax(1), p, 0.7, None, 0.3), (z,))
    sure = T([[200.0, 0.0, -200.0]], requires_grad=True)
    rps_loss(sure.log_softmax(1), T([[0.0, 0.0, 1.0]])).sum().backward()
    assert torch.isfinite(sure.grad).all()


def test_hybrid_mixes_rps_with_kl_and_leaves_the_majority_alone():
    p, worst, logq = T([[0.6, 0.3, 0.1]]), T([[0.5, 0.3, 0.2]]), T([[0.3, 0.3, 0.4]]).log()
    distance = 0.25 * rps_loss(logq, worst) + 0.75 * kl_loss(logq, worst)
    assert torch.allclose(hybrid_loss(logq, p, 0.8, worst, rps=0.25), 0.8 * distance + 0.2 * ce_loss(logq, p))
    assert torch.equal(hybrid_loss(logq, p, 1.0, rps=1.0), rps_loss(logq, p))


def test_shrunk_votes_by_hand_and_their_gradient():
    assert torch.allclose(shrink_votes(T([[1.0, 0, 0], [50, 50, 0]]), 2 * T([[0.5, 0.25, 0.25]])), T([[2, 0.5, 0.5], [51, 50.5, 0.5]]) / T([[3.0], [102]]))
    counts, k = T([[1.0, 0, 0], [2, 2, 1]], dtype=torch.float64), 2.0
    m = T([[0.2, 0.3, 0.5]], dtype=torch.float64)
    z = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()

    def gradient(target):
        (grad,) = torch.autograd.grad(kl_loss(z.log_softmax(1), target).sum(), z)
        return grad

    q, p, w = z.detach().softmax(1), counts / counts.sum(1, keepdim=True), (counts.sum(1) / (counts.sum(1) + k))[:, None]
    assert torch.allclose(gradient(shrink_votes(counts, k * m)), w * (q - p) + (1 - w) * (q - m))
    assert torch.allclose(gradient(shrink_votes(counts, k * q)), w * gradient(p))  # the model's own prediction: a weight, no more
