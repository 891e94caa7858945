"""recipes/systems.py: estimates by hand and against a peer, coverage on simulated panels, the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import systems
from systems import METHODS, Panel, SystemsConfig, compare, estimate, holm, interval, win

import distjudge

SCRIPT = Path(systems.__file__)
SCALE = np.arange(1.0, 6)[:, None]
ABOVE = np.tril(np.ones((5, 5)), -1) + np.eye(5) / 2
SHIFTS = (0.0, 0.3)


def opinions(latent):
    """Distributions (N, 5) of votes on items with latent quality (N,)."""
    density = np.exp(-((SCALE[:, 0] - 3 - latent[:, None]) ** 2) / 0.98)
    return density / density.sum(1, keepdims=True)


def simulated(rng, groups=100, rated=10, each=1, judge="good", apart=False, votes=5):
    """Items of two systems with effects of group, of group and system, and of item; 1 to `votes` votes.

    The first `rated` groups have votes; apart: so many items of each system, anywhere.
    """
    group = np.repeat(np.arange(groups), 2 * each)
    system = np.tile(np.repeat([0, 1], each), groups)
    normal = lambda spread, size=len(group): spread * rng.standard_normal(size)  # noqa: E731
    latent = np.array(SHIFTS)[system] + normal(0.5, groups)[group] + normal(0.4)
    latent += normal(0.3, (groups, 2))[group, system]
    error = normal(0.3, groups)[group] + normal(0.3)
    seen = {"good": latent + error, "biased": 0.6 * latent + error + 1 - 0.8 * system, "bad": 3 * error}[judge]
    counts = rng.multinomial(rng.integers(1, votes + 1, len(group)), opinions(latent))
    hidden = group >= rated
    if apart:
        hidden = np.ones(len(group), dtype=bool)
        for s in (0, 1):
            hidden[rng.choice(np.flatnonzero(system == s), rated, replace=False)] = False
    return Panel([*"12345"], ["a", "b"], system, group, np.where(hidden[:, None], 0, counts), opinions(seen))


def truth():
    """Mean ratings, their difference and the win probability of the two simulated systems, by quadrature."""
    x, w = np.polynomial.hermite_e.hermegauss(60)
    shares = [w @ opinions(shift + x * 0.5**0.5) / w.sum() for shift in SHIFTS]
    means = [float(p @ SCALE[:, 0]) for p in shares]
    return {"mean": means, "difference": [means[0] - means[1]], "win": [float(shares[0] @ ABOVE @ shares[1])]}


def checked(draws, **settings):
    """{(method, quantity): (coverage, mean width)} over simulated panels."""
    known, rng, found = truth(), np.random.default_rng(0), {}
    for _ in range(draws):
        panel = simulated(rng, **settings)
        means, shares = estimate(panel, SCALE)[0], estimate(panel, np.eye(5))[0]
        for how in METHODS:
            slopes = {"mean": [[1, 0], [0, 1]], "difference": [[1, -1]]}
            got = {name: [interval(means[how], np.c_[s], -9, 9) for s in of] for name, of in slopes.items()}
            got["win"] = [win(shares[how], 0, 1)]
            for name, cells in got.items():
                for cell, true in zip(cells, known[name], strict=True):
                    hit = cell["low"] <= true <= cell["high"]
                    found.setdefault((how, name), []).append((hit, cell["high"] - cell["low"]))
    return {key: tuple(np.mean(values, axis=0)) for key, values in found.items()}


CASES = {
    "10 groups": {"rated": 10},
    "20 groups": {"rated": 20},
    "60 of 300 groups": {"rated": 60, "groups": 300},
    "10 groups of 4 items": {"rated": 10, "each": 4},
    "10 of 20 groups": {"rated": 10, "groups": 20, "each": 3},
    "items anywhere": {"rated": 10, "apart": True},
    "a biased judge": {"rated": 20, "judge": "biased"},
    "a bad judge, 10 groups": {"rated": 10, "judge": "bad"},
    "a bad judge, 20 groups": {"rated": 20, "judge": "bad"},
    "one vote an item": {"rated": 20, "votes": 1},
}


def check_intervals(case, draws, low, high):
    found = checked(draws, **CASES[case])
    for how, name in found:
        coverage, width = found[how, name]
        if how != "judge":
            assert low <= coverage <= high, (case, how, name, coverage)
        if how == "ppi":  # the judge helps, or at least costs little
            most = 1.05 if "bad" in case else 0.95
            assert width <= most * found["votes", name][1], (case, name)
    if case == "a biased judge":
        assert found["judge", "mean"][0] < 0.5 and found["judge", "difference"][0] < 0.1


@pytest.mark.parametrize("case", ["10 groups of 4 items", "items anywhere", "a biased judge"])
def test_intervals_hold(case):
    check_intervals(case, 200, 0.91, 0.99)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_intervals_hold_in_1000_draws(case):
    check_intervals(case, 1000, 0.93, 0.97)
