"""Measure this machine: the exact projection against a general convex solver.

    python recipes/bench.py --out runs/bench          # needs cvxpy (tests/requirements.txt); about a minute

Both sides project the same points onto E(p) = {x in the simplex: ||x - p|| <= eps}, alternating, `repeats` times; the
figures are medians, with the smallest and largest. The solver (CVXPY with Clarabel at its default tolerances) is given its
best case: the problem is compiled once and only its parameters change; solving it afresh, as plain use does, is timed
too. Writes bench.json and bench.md into --out.
"""
import dataclasses
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import distjudge


@dataclasses.dataclass
class BenchConfig:
    out: str = "runs/bench"
    """The folder for bench.json and bench.md."""
    labels: tuple[int, ...] = (3, 5, 10)
    """Numbers of labels."""
    batch: int = 1024
    """Items a call of the batched projection (it is also timed with one)."""
    solved: int = 40
    """Points given to the solver a repeat."""
    repeats: int = 7
    """Repeats of each measurement."""
    seed: int = 0
    """Seed of the points."""


def milliseconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return 1000 * (time.perf_counter() - start)


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def points(labels: int, n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Panels of five votes and, from each, the point that one step of the adversary against a random judge asks for."""
    draw = torch.Generator().manual_seed(seed)
    votes = torch.randint(labels, (n, 5), generator=draw)
    p = torch.nn.functional.one_hot(votes, labels).double().mean(1)
    logq = torch.randn(n, labels, generator=draw, dtype=torch.float64).log_softmax(1)
    return p + 0.2 * (p.clamp_min(1e-12).log() - logq + 1), p


def bench_projection(labels: int, config: BenchConfig) -> dict:
    """Milliseconds a projection: ours one by one and batched, the solver compiled once and afresh; largest difference."""
    import cvxpy

    eps = 0.25
    y, p = points(labels, config.batch, config.seed)
    x, y_, p_ = cvxpy.Variable(labels), cvxpy.Parameter(labels), cvxpy.Parameter(labels)
    compiled = cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(x - y_)), [x >= 0, cvxpy.sum(x) == 1, cvxpy.norm(x - p_) <= eps])
    solved = torch.empty(config.solved, labels, dtype=torch.float64)

    def solver(fresh: bool) -> None:
        for i in range(config.solved):
            if fresh:
                limits = [x >= 0, cvxpy.sum(x) == 1, cvxpy.norm(x - p[i].numpy()) <= eps]
                cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(x - y[i].numpy())), limits).solve(solver=cvxpy.CLARABEL)
            else:
                y_.value, p_.value = y[i].numpy(), p[i].numpy()
                compiled.solve(solver=cvxpy.CLARABEL)
            solved[i] = torch.from_numpy(x.value)

    ours = distjudge.project_ball
    ways = {"ours, batched": (lambda: ours(y, p, eps), config.batch),
            "ours, one by one": (lambda: [ours(y[i:i + 1], p[i:i + 1], eps) for i in range(config.solved)], config.solved),
            "solver, compiled once": (lambda: solver(False), config.solved), "solver, afresh": (lambda: solver(True), config.solved)}
    times: dict[str, list[float]] = {way: [] for way in ways}
    for repeat in range(config.repeats + 1):
        for way, (action, n) in ways.items():
            taken = milliseconds(action) / n
            if repeat:  # the first is a warm-up
                times[way].append(taken)
    difference = (solved - ours(y, p, eps)[: config.solved]).abs().max().item()
    return {"labels": labels, "ms_a_projection": {way: spread(values) for way, values in times.items()}, "largest_difference": difference}


def machine() -> dict:
    import cvxpy

    return {"machine": platform.machine(), "cores": os.cpu_count(), "torch_threads": torch.get_num_threads(), **distjudge.versions(),
            "cvxpy": cvxpy.__version__}


def main(config: BenchConfig) -> None:
    try:
        import cvxpy  # noqa: F401
    except ImportError:
        raise distjudge.InputError("bench: the solver is missing: pip install -r tests/requirements.txt") from None
    rows = [bench_projection(labels, config) for labels in config.labels]
    ways = list(rows[0]["ms_a_projection"])
    lines = [f"| labels | {' | '.join(ways)} | batched against compiled solver | largest difference |", "| --- " * (len(ways) + 3) + "|"]
    for row in rows:
        times = row["ms_a_projection"]
        cells = [f"{times[way]['median']:.4g} ms ({times[way]['min']:.3g} to {times[way]['max']:.3g})" for way in ways]
        ratio = times["solver, compiled once"]["median"] / times["ours, batched"]["median"]
        lines.append(f"| {row['labels']} | {' | '.join(cells)} | {ratio:,.0f} x | {row['largest_difference']:.1e} |")
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    distjudge.write_json(out / "bench.json", {"machine": machine(), "config": dataclasses.asdict(config), "projection": rows})
    distjudge.write_lines(out / "bench.md", lines)
    print("\n".join(lines))


if __name__ == "__main__":
    distjudge.cli(main, BenchConfig)
