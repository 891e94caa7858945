"""Projections against a convex solver, and the adversary's promises."""

import math

from distjudge import project_ball, project_simplex, worst_case

import cvxpy
import numpy
import pytest
import torch

T = torch.tensor


def distributions(draw, rows, labels, kind):
    """Random points of the simplex: dense, with zeros, one-hot, uniform."""
    p = -torch.rand(rows, labels, generator=draw, dtype=torch.float64).log()
    if kind == "sparse":
        p = p * (torch.rand(rows, labels, generator=draw) < 0.5)
        p[p.sum(1) == 0, 0] = 1
    elif kind == "one-hot":
        p = torch.nn.functional.one_hot(torch.randint(labels, (rows,), generator=draw), labels).double()
    elif kind == "uniform":
        p = torch.ones(rows, labels, dtype=torch.float64)
    return p / p.sum(1, keepdim=True)


def hard_cases(rows, seed):
    """(y, p, eps) of mixed kinds: random and degenerate points, radii from 0 to beyond the simplex."""
    draw = torch.Generator().manual_seed(seed)
    cases = []
    for labels in (2, 3, 5, 8):
        for kind in ("dense", "sparse", "one-hot", "uniform"):
            p = distributions(draw, rows, labels, kind)
            width = T([0.02, 0.3, 3.0, 30.0]).double()[torch.arange(rows) % 4, None]
            y = p + torch.randn(rows, labels, generator=draw, dtype=torch.float64) * width
            y[0] = p[0]  # nothing to do
            y[1] = 1.0  # a tie of all coordinates
            y[2] = p[2] + 5.0  # a shift alone
            y[3, :2] = y[3].max() + 1  # a tie at the top
            eps = torch.rand(rows, generator=draw, dtype=torch.float64)
            eps *= T([0.0, 0.05, 0.25, 2.0]).double()[torch.randint(4, (rows,), generator=draw)]
            cases.append((y, p, eps))
    return cases


def solver_projection(y, p, eps):
    """The same by a convex solver. Its default tolerance leaves x off by 5e-4: hence 1e-12."""
    x = cvxpy.Variable(len(y))
    limits = [x >= 0, cvxpy.sum(x) == 1] + ([cvxpy.norm(x - p) <= eps] if eps is not None else [])
    goal = cvxpy.Minimize(cvxpy.sum_squares(x - (y - y.mean())))  # a shift of y moves no minimum
    problem = cvxpy.Problem(goal, limits)
    problem.solve(solver=cvxpy.CLARABEL, tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12)
    return x.value


def test_projections_agree_with_a_convex_solver():
    """The same point within 5e-4, and never one further from y than the solver's."""
    compared = 0
    for y, p, eps in hard_cases(24, seed=0):
        ball, simplex = project_ball(y, p, eps), project_simplex(y)
        for i in range(len(y)):
            at = y[i].numpy() - y[i].mean().item()
            for ours, radius in ((ball[i].numpy(), float(eps[i])), (simplex[i].numpy(), None)):
                theirs = solver_projection(y[i].numpy(), p[i].numpy(), radius)
                assert numpy.abs(theirs - ours).max() < 5e-4
                assert ((ours - at) ** 2).sum() <= ((theirs - at) ** 2).sum() * (1 + 1e-12) + 1e-6
            compared += 1
    assert compared == 384


def test_projections_by_hand():
    corners = project_simplex(T([[0.6, 0.6], [2.0, 0.0], [-1.0, -3.0]]))
    assert corners.tolist() == [[0.5, 0.5], [1.0, 0.0], [1.0, 0.0]]
    p, y = T([[0.5, 0.5]]), T([[1.0, 0.0]])
    step = 0.1 / math.sqrt(2)
    assert project_ball(y, p, 0.1)[0].tolist() == pytest.approx([0.5 + step, 0.5 - step])
    assert project_ball(y, p, 0.0).tolist() == p.tolist()
    assert project_ball(y, p, 2.0).tolist() == [[1.0, 0.0]]
    both = project_ball(y.repeat(2, 1), p.repeat(2, 1), T([0.0, 0.1]))
    assert both[0].tolist() == [0.5, 0.5] and both[1].tolist() == pytest.approx([0.5 + step, 0.5 - step])
    # with p on an edge the way out of the simplex is cut: the third coordinate stays 0
    edge = project_ball(T([[0.8, 0.4, -9.0]]), T([[0.5, 0.5, 0.0]]), 0.1)
    assert edge[0].tolist() == pytest.approx([0.5 + step, 0.5 - step, 0.0])
    with pytest.raises(ValueError, match="eps must be 0 or more"):
        project_ball(y, p, -0.1)


def test_a_projection_is_exact_where_coordinates_reach_zero_one_by_one():
    """Against a bisection over t on x(t); Newton's method needs up to as many steps as there are labels."""
    p = torch.full((1, 12), 1 / 12, dtype=torch.float64)
    y = p + torch.arange(12, dtype=torch.float64) ** 2 / 50
    for eps in (0.02, 0.1, 0.3, 0.5, 0.7, 0.9):
        low, high = 0.0, 1.0
        for _ in range(60):
            t = (low + high) / 2
            within = (project_simplex(p + t * (y - p)) - p).norm() <= eps
            low, high = (t, high) if within else (low, t)
        assert (project_ball(y, p, eps) - project_simplex(p + low * (y - p))).abs().max() < 1e-9


def test_one_step_by_hand():
    p, logq = T([[0.5, 0.3, 0.2]], dtype=torch.float64), T([[0.2, 0.3, 0.5]], dtype=torch.float64).log()
    up = 0.05 * (p.log() - logq + 1)
    expected = p + up - up.mean()  # inside the ball and the simplex: only the sum is set right
    assert worst_case(logq, p, 1.0, steps=1).tolist()[0] == pytest.approx(expected[0].tolist(), abs=1e-12)
    assert worst_case(logq, p, 0.01, steps=1).sub(p).norm().item() == pytest.approx(0.01, abs=1e-9)


def test_a_one_hot_target_does_not_move_and_zeros_stay_zero():
    logq = T([[0.05, 0.05, 0.9], [0.3, 0.4, 0.3]]).log()
    p = T([[1.0, 0.0, 0.0], [0.6, 0.4, 0.0]])
    worst = worst_case(logq, p, 0.25)
    assert worst[0].tolist() == [1.0, 0.0, 0.0] and worst[1, 2] == 0 and worst[1, 0] > 0.6
    # unless the model rules the label out altogether: then the pull is stronger than the floor of log 0
    for ruled_out in (-200.0, -math.inf):
        assert worst_case(T([[0.0, ruled_out]]), T([[1.0, 0.0]]), 0.25)[0, 1] > 0


def test_no_gradient_flows_through_and_eps_zero_is_no_adversary():
    p = T([[0.6, 0.4]])
    z = torch.randn(1, 2, requires_grad=True)
    worst = worst_case(z.log_softmax(1), p, 0.25)
    assert not worst.requires_grad and torch.equal(worst_case(z.log_softmax(1), p, 0.0), p)
    mixed = worst_case(z.log_softmax(1).repeat(2, 1), p.repeat(2, 1), T([0.0, 0.25]))
    assert torch.equal(mixed[0], p[0]) and not torch.equal(mixed[1], p[0])
    draw, radius = torch.Generator().manual_seed(3), torch.zeros(200)
    many, radius[-1] = distributions(draw, 200, 7, "dense").float(), 0.25
    logq = torch.randn(200, 7, generator=draw).log_softmax(1)
    assert torch.equal(worst_case(logq, many, radius)[:-1], many[:-1])
