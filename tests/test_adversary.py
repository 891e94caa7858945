"""Projections against a convex solver, and the adversary's promises."""
import itertools
import math

import cvxpy
import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distjudge import annotator_radius, kl_loss, project_ball, project_simplex, worst_case, worst_case_bound, worst_case_exact

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
    """(y, p, eps) of mixed kinds: random and degenerate points, radii from 0 to more than the simplex is wide."""
    draw = torch.Generator().manual_seed(seed)
    cases = []
    for labels in (2, 3, 5, 8):
        for kind in ("dense", "sparse", "one-hot", "uniform"):
            p = distributions(draw, rows, labels, kind)
            y = p + torch.randn(rows, labels, generator=draw, dtype=torch.float64) * T([0.02, 0.3, 3.0, 30.0]).double()[torch.arange(rows) % 4, None]
            y[0] = p[0]                                  # nothing to do
            y[1] = 1.0                                   # a tie of all coordinates
            y[2] = p[2] + 5.0                            # a shift alone
            y[3, :2] = y[3].max() + 1                    # a tie at the top
            eps = torch.rand(rows, generator=draw, dtype=torch.float64) * T([0.0, 0.05, 0.25, 2.0]).double()[torch.randint(4, (rows,), generator=draw)]
            cases.append((y, p, eps))
    return cases


def solver_projection(y, p, eps):
    """The same by a general convex solver. Its default tolerance is on the objective, which leaves x off by 5e-4: hence 1e-12."""
    x = cvxpy.Variable(len(y))
    limits = [x >= 0, cvxpy.sum(x) == 1] + ([cvxpy.norm(x - p) <= eps] if eps is not None else [])
    problem = cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(x - (y - y.mean()))), limits)  # a shift of y moves no minimum
    problem.solve(solver=cvxpy.CLARABEL, tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12)
    return x.value


def test_projections_agree_with_a_convex_solver():
    """The same point within 5e-4, and never one further from y: where the two differ it is by the solver's tolerance."""
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_projections_are_in_the_set_idempotent_and_never_beaten(dtype):
    draw = torch.Generator().manual_seed(7)
    for y, p, eps in hard_cases(256, seed=1):
        y, p, eps = y.to(dtype), p.to(dtype), eps.to(dtype)
        x = project_ball(y, p, eps)
        assert x.dtype == dtype and (x >= 0).all()
        assert ((x.sum(1) - 1).abs() < 1e-6).all() and ((x - p).norm(dim=1) <= eps + 1e-6).all()
        assert (project_ball(x, p, eps) - x).abs().max() < 1e-6
        closest = (x - y).double().norm(dim=1)
        for _ in range(5):  # no other point of the set is nearer
            other = project_ball(p + 0.5 * torch.randn(p.shape, generator=draw, dtype=dtype), p, eps)
            assert ((other - y).double().norm(dim=1) >= closest - 1e-5 * (1 + closest)).all()


def test_projections_by_hand():
    assert project_simplex(T([[0.6, 0.6], [2.0, 0.0], [-1.0, -3.0]])).tolist() == [[0.5, 0.5], [1.0, 0.0], [1.0, 0.0]]
    p, y = T([[0.5, 0.5]]), T([[1.0, 0.0]])
    step = 0.1 / math.sqrt(2)
    assert project_ball(y, p, 0.1)[0].tolist() == pytest.approx([0.5 + step, 0.5 - step])
    assert project_ball(y, p, 0.0).tolist() == p.tolist()
    assert project_ball(y, p, 2.0).tolist() == [[1.0, 0.0]]
    both = project_ball(y.repeat(2, 1), p.repeat(2, 1), T([0.0, 0.1]))
    assert both[0].tolist() == [0.5, 0.5] and both[1].tolist() == pytest.approx([0.5 + step, 0.5 - step])
    # with p on an edge the way out of the simplex is cut: the third coordinate stays 0, the rest moves along the edge
    assert project_ball(T([[0.8, 0.4, -9.0]]), T([[0.5, 0.5, 0.0]]), 0.1)[0].tolist() == pytest.approx([0.5 + step, 0.5 - step, 0.0])
    with pytest.raises(ValueError, match="eps must be 0 or more"):
        project_ball(y, p, -0.1)


@settings(max_examples=150, deadline=None)
@given(st.integers(2, 8), st.integers(0, 10**6), st.sampled_from(["dense", "sparse", "one-hot", "uniform"]),
       st.floats(0, 1.5), st.integers(0, 8), st.sampled_from([0.01, 0.05, 1.0]), st.sampled_from([1.0, 20.0, 300.0]))
def test_the_adversary_stays_near_and_never_lowers_the_loss(labels, seed, kind, eps, steps, step_size, scale):
    draw = torch.Generator().manual_seed(seed)
    p = distributions(draw, 16, labels, kind).float()
    logq = (scale * torch.randn(16, labels, generator=draw)).log_softmax(1)
    worst = worst_case(logq, p, eps, steps, step_size)
    assert torch.isfinite(worst).all() and (worst >= 0).all() and ((worst.sum(1) - 1).abs() < 1e-6).all()
    assert ((worst - p).norm(dim=1) <= eps + 1e-6).all()
    assert (kl_loss(logq.double(), worst.double()) >= kl_loss(logq.double(), p.double()) - 1e-5 * (1 + scale)).all()


def test_each_step_of_the_ascent_is_worth_taking():
    draw = torch.Generator().manual_seed(0)
    p, logq = distributions(draw, 500, 3, "dense"), torch.randn(500, 3, generator=draw, dtype=torch.float64).log_softmax(1)
    losses = [kl_loss(logq, worst_case(logq, p, 0.25, steps)) for steps in range(8)]
    assert torch.equal(losses[0], kl_loss(logq, p))
    for before, after in itertools.pairwise(losses):
        assert (after >= before - 1e-12).all()
    assert (losses[5] > losses[0] + 1e-3).double().mean() > 0.99


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
    assert worst_case(T([[0.0, -200.0]]), T([[1.0, 0.0]]), 0.25)[0, 1] > 0


def test_no_gradient_flows_through_and_eps_zero_is_no_adversary():
    p = T([[0.6, 0.4]])
    z = torch.randn(1, 2, requires_grad=True)
    worst = worst_case(z.log_softmax(1), p, 0.25)
    assert not worst.requires_grad and torch.equal(worst_case(z.log_softmax(1), p, 0.0), p)
    mixed = worst_case(z.log_softmax(1).repeat(2, 1), p.repeat(2, 1), T([0.0, 0.25]))
    assert torch.equal(mixed[0], p[0]) and not torch.equal(mixed[1], p[0])


def test_annotator_radius_shrinks_with_votes_as_the_posterior_does():
    counts = T([[1.0, 0, 0], [5, 0, 0], [3, 2, 0], [60, 40, 0], [600, 400, 0]])
    radius = annotator_radius(counts, eps=10.0)
    draw = torch.distributions.Dirichlet(counts.double() + 1)
    torch.manual_seed(0)
    p = counts.double() / counts.double().sum(1, keepdim=True)
    simulated = (draw.sample((20_000,)) - p).pow(2).sum(-1).mean(0).sqrt()
    assert radius.tolist() == pytest.approx(simulated.tolist(), rel=0.02)
    assert radius[4].item() == pytest.approx(math.sqrt((1 - 0.6**2 - 0.4**2) / 1000), rel=0.01)  # (1 - ||p||^2) / N
    assert (radius[1:] < radius[:-1])[[0, 2, 3]].all()  # 5 agreeing votes after 1, 100 after 5, 1,000 after 100
    assert annotator_radius(counts, eps=0.25).tolist() == [0.25, 0.25, 0.25, radius[3].item(), radius[4].item()]


def test_annotator_radius_around_the_posterior_mean_is_its_standard_error():
    counts, prior = T([[1.0, 0, 0], [3, 2, 0], [60, 40, 0]]), 2 * T([[0.5, 0.3, 0.2]])
    torch.manual_seed(0)
    shape = (counts + prior).double()
    simulated = (torch.distributions.Dirichlet(shape).sample((20_000,)) - shape / shape.sum(1, keepdim=True)).pow(2).sum(-1).mean(0).sqrt()
    assert annotator_radius(counts, 10.0, prior).tolist() == pytest.approx(simulated.tolist(), rel=0.02)
    assert annotator_radius(counts, 0.1, prior)[0].item() == pytest.approx(0.1)


BALLS = ("l2", "tv", "kl")


def distance(x, p, ball):
    if ball == "l2":
        return (x - p).norm(dim=-1)
    return (x - p).abs().sum(-1) / 2 if ball == "tv" else torch.where(((x > 0) & (p == 0)).any(-1), math.inf, kl_loss(p.clamp_min(1e-300).log().expand_as(x), x))


def opponents(rows, labels, seed):
    """(p, logq, eps): votes of 1 to 7 people among others, judges from unsure to very sure, small and large balls."""
    draw = torch.Generator().manual_seed(seed)
    counts = torch.multinomial(torch.rand(rows, labels, generator=draw) ** 2 + 1e-3, 7, replacement=True, generator=draw)
    seen = torch.arange(7) < torch.randint(1, 8, (rows, 1), generator=draw)
    p = (torch.nn.functional.one_hot(counts, labels) * seen[..., None]).sum(1).double()
    p[::4] = torch.rand(len(p[::4]), labels, generator=draw, dtype=torch.float64)
    scale = T([0.5, 1.5, 5.0]).double()[torch.randint(3, (rows, 1), generator=draw)]
    logq = (scale * torch.randn(rows, labels, generator=draw, dtype=torch.float64)).log_softmax(1)
    return p / p.sum(1, keepdim=True), logq, T([0.03, 0.1, 0.25, 0.6, 1.2]).double()[torch.randint(5, (rows,), generator=draw)]


@pytest.mark.parametrize("ball", BALLS)
def test_the_exact_worst_case_is_in_the_ball_and_no_point_of_a_dense_grid_is_worse(ball):
    n = 150
    grid = T([[a, b, n - a - b] for a in range(n + 1) for b in range(n + 1 - a)], dtype=torch.float64) / n
    for i, (p, logq, eps) in enumerate(zip(*opponents(40, 3, seed=3), strict=True)):
        x = worst_case_exact(p[None], logq[None], eps, ball)
        assert (x >= 0).all() and abs(x.sum().item() - 1) < 1e-9 and distance(x, p[None], ball).item() <= eps + 1e-9, i
        best = kl_loss(logq.expand_as(grid), grid)[distance(grid, p, ball) <= eps].max() if (distance(grid, p, ball) <= eps).any() else 0.0
        assert kl_loss(logq[None], x).item() >= best - 1e-9, i
        fine = x + 3e-3 * torch.randn(200, 3, generator=torch.Generator().manual_seed(i), dtype=torch.float64)  # and none near it
        fine = project_simplex(fine)
        inside = distance(fine, p, ball) <= eps
        assert not inside.any() or kl_loss(logq.expand_as(fine), fine)[inside].max() <= kl_loss(logq[None], x).item() + 1e-9, i


@pytest.mark.parametrize("labels,rows", [(3, 16), (5, 5)])
def test_branch_and_bound_proves_the_l2_maximum(labels, rows):
    p, logq, eps = opponents(rows, labels, seed=labels)
    attained = kl_loss(logq, worst_case_exact(p, logq, eps))
    bound = worst_case_bound(p, logq, eps, attained)
    assert (bound >= attained).all() and (bound <= attained + 1e-6).all()
    too_low = kl_loss(logq, p) - 1.0  # the bound is one of the ball, not an echo of what it is given
    assert (worst_case_bound(p[:10], logq[:10], eps[:10], too_low[:10], rounds=5).nan_to_num(math.inf) > attained[:10] - 1e-9).all()


@pytest.mark.parametrize("ball", BALLS)
def test_a_general_solver_from_many_starts_finds_nothing_worse(ball):
    from scipy.optimize import minimize

    draw = numpy.random.default_rng(0)
    for p, logq, eps in zip(*opponents(6, 4, seed=9), strict=True):
        found = kl_loss(logq[None], worst_case_exact(p[None], logq[None], eps, ball)).item()
        a, b, on, best = p.numpy(), logq.numpy(), p.numpy() > 0, 0.0

        def cost(x, b=b):
            x = numpy.clip(x, 1e-12, 1)
            return -(x * (numpy.log(x) - b)).sum()

        def room(x, a=a, on=on, eps=float(eps)):
            x = numpy.clip(x, 1e-12, 1)
            if ball == "kl":
                return eps - (x[on] * numpy.log(x[on] / a[on])).sum()
            return eps**2 - ((x - a) ** 2).sum() if ball == "l2" else eps - numpy.abs(x - a).sum() / 2

        for _ in range(12):
            start = a + 0.9 * (draw.dirichlet(numpy.ones(4)) * on - a)
            limits = [(0, 1 if ball != "kl" or o else 0) for o in on]
            done = minimize(cost, start / start.sum(), bounds=limits, method="SLSQP", options={"maxiter": 60},
                            constraints=[{"type": "eq", "fun": lambda x: x.sum() - 1}, {"type": "ineq", "fun": room}])
            if abs(done.x.sum() - 1) < 1e-8 and room(done.x) > -1e-8:
                best = max(best, -done.fun)
        assert best > 0 and found >= best - 1e-6


@pytest.mark.parametrize("labels", [2, 3, 5])
def test_the_exact_worst_case_beats_the_steps_and_leaves_one_hot_targets(labels):
    p, logq, eps = opponents(200, labels, seed=20 + labels)
    exact, steps = (kl_loss(logq, f(p, logq, eps)) for f in (worst_case_exact, worst_case))
    assert (exact >= steps - 1e-9).all() and (exact > steps + 1e-4).any()
    p = torch.eye(3, dtype=torch.float64)[:1]
    logq = T([[0.6, 0.39, 0.01]], dtype=torch.float64).log()
    x = worst_case_exact(p, logq, 0.9)
    assert torch.equal(worst_case(logq, p, 0.9), p) and x[0, 2] > 0.5 and x[0, 0] < 0.5


@pytest.mark.parametrize("ball", BALLS)
def test_exact_at_the_limits(ball):
    p, logq, _ = opponents(50, 4, seed=5)
    assert torch.equal(worst_case_exact(p, logq, 0.0, ball), p)
    p = p + 0.01
    p = p / p.sum(1, keepdim=True)
    whole = worst_case_exact(p, logq, 100.0, ball)  # the whole simplex: the corner that the judge believes in least
    assert torch.allclose(whole, torch.nn.functional.one_hot(logq.argmin(1), 4).double())
    mixed = worst_case_exact(p[:2], logq[:2], T([0.0, 0.1]), ball)
    assert torch.equal(mixed[0], p[0]) and not torch.equal(mixed[1], p[1])
    z = torch.randn(2, 4, requires_grad=True)
    assert not worst_case_exact(p[:2].float(), z.log_softmax(1), 0.2, ball).requires_grad
    sure = worst_case_exact(T([[1.0, 0.0]]), T([[0.0, -math.inf]]), 0.25, ball)
    assert torch.isfinite(sure).all() and sure[0].sum().item() == pytest.approx(1)
    for wrong, words in (((p, logq, -0.1, ball), "eps must be"), ((p, logq, 0.1, "l1"), "ball must be"), ((p.repeat(1, 3), logq.repeat(1, 3), 0.1), "10 labels at most")):
        with pytest.raises(ValueError, match=words):
            worst_case_exact(*wrong)


def test_total_variation_by_hand():
    p, logq = T([[0.5, 0.3, 0.2]], dtype=torch.float64), T([[0.7, 0.2, 0.1]], dtype=torch.float64).log()
    # 0.25 may move: to label 3, from label 2 or from label 1; emptying the nearly empty one is worse for the judge
    options = T([[0.25, 0.3, 0.45], [0.45, 0.05, 0.5], [0.5, 0.05, 0.45]], dtype=torch.float64)
    ways = kl_loss(logq.expand_as(options), options)[[0, 2]]
    assert kl_loss(logq, worst_case_exact(p, logq, 0.25, "tv")).item() == pytest.approx(ways.max().item())


def test_kl_ball_is_an_exponential_tilt_while_small():
    p, logq = T([[0.5, 0.3, 0.2]], dtype=torch.float64), T([[0.2, 0.5, 0.3]], dtype=torch.float64).log()
    x = worst_case_exact(p, logq, 0.01, "kl")
    assert kl_loss(p.log(), x).item() == pytest.approx(0.01, abs=1e-9)
    ratio = (x / p).log() / (p.log() - logq - (p.log() - logq).mean())  # log(x / p) is linear in log(p / q)
    slope = ((x / p).log()[0, 0] - (x / p).log()[0, 1]) / ((p.log() - logq)[0, 0] - (p.log() - logq)[0, 1])
    other = ((x / p).log()[0, 1] - (x / p).log()[0, 2]) / ((p.log() - logq)[0, 1] - (p.log() - logq)[0, 2])
    assert ratio.shape == (1, 3) and slope.item() == pytest.approx(other.item()) and slope > 0
