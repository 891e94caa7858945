"""Losses: values by hand, zeros and one-hot targets, ties, gradients."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distjudge import ce_loss, hybrid_loss, kl_loss, majority

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
