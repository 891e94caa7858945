"""Numbers stay numbers: losses, adversary and metrics in every precision, judgments, runs that diverge.

Valid are p in the simplex up to its type's rounding, and log-probabilities that add up to 1. KL and
cross-entropy to a label that the model rules out (-inf) and people chose are infinite by definition: there it
is only drawn where p is zero. Everywhere else nothing may be NaN or infinite. The slow tests draw many more.
"""

import json
import math

import distjudge
from distjudge import ce_loss, hybrid_loss, kl_loss, project_ball, project_simplex, rps_loss, worst_case

import pytest
import torch
from calibrate import label_sets
from hypothesis import given, settings
from hypothesis import strategies as st

T = torch.tensor
LOW = (torch.float32, torch.bfloat16, torch.float16)
HUGE = 1e4  # the largest |log-probability| drawn but for infinity; float16 ends at 65,504


def few_and_many(few, many):
    return pytest.mark.parametrize("examples", [few, pytest.param(many, marks=pytest.mark.slow)])


def drawn(examples, *strategies):
    """Runs the decorated function on so many examples; the same ones every time."""
    same = settings(max_examples=examples, deadline=None, derandomize=True)
    return lambda check: same(given(*strategies)(check))()


def integer(draw, below):
    return int(torch.randint(below, (), generator=draw))


def targets(draw, rows, labels):
    """Distributions, float64: few votes, one-hot, uniform, tied, nearly sure, with tiny entries."""
    counts = torch.zeros(rows, labels, dtype=torch.float64)
    for i in range(rows):
        kind, at = integer(draw, 6), integer(draw, labels)
        if kind == 0:
            counts[i, at] = 1
        elif kind == 1:
            counts[i] = 1
        elif kind == 2:
            counts[i, [at, (at + 1) % labels]] = 1
        elif kind == 3:
            counts[i] = 10.0 ** -torch.randint(3, 60, (labels,), generator=draw)
            counts[i, at] = 1
        elif kind == 4:
            counts[i, at], counts[i, at - 1] = 1 - 2.0**-24, 2.0**-24
        else:
            counts[i] = torch.bincount(torch.randint(labels, (1 + at,), generator=draw), minlength=labels)
    return counts / counts.sum(1, keepdim=True)


def predictions(draw, rows, labels):
    """Log-probabilities, float64: unsure, sure, beyond underflow, uniform, one-hot, tiny but for one."""
    logq = torch.zeros(rows, labels, dtype=torch.float64)
    for i in range(rows):
        kind, at = integer(draw, 6), integer(draw, labels)
        noise = torch.randn(labels, generator=draw, dtype=torch.float64)
        scores = (1.0, 30.0, HUGE, 0.0)[min(kind, 3)] * noise
        logq[i] = scores.log_softmax(0).clamp_min(-HUGE)
        if kind == 4:
            logq[i], logq[i, at] = -HUGE, 0.0
        elif kind == 5:
            logq[i], logq[i, at] = -104.0, 0.0  # exp underflows in float32
    return logq


generators = st.integers(0, 10**9).map(lambda seed: torch.Generator().manual_seed(seed))
cases = st.tuples(generators, st.integers(1, 4), st.integers(2, 12), st.sampled_from(LOW))
radii = st.sampled_from([0.0, 1e-30, 1e-8, 0.01, 0.25, 0.9, 1.5, 1e3, "an item"])


def radius_of(eps, draw, rows):
    some = torch.rand(rows, generator=draw) * (torch.rand(rows, generator=draw) < 0.7)
    return some if eps == "an item" else eps


def finite(x):
    return bool(torch.isfinite(torch.as_tensor(x)).all())


def ruled_out(draw, logq, p):
    """The same with -inf for some labels that nobody chose; the others still add up to 1."""
    some = (p == 0) & (logq < -9) & (torch.rand(p.shape, generator=draw) < 0.5)
    return logq.masked_fill(some, -math.inf)


# --- losses, and votes with a teacher's -------------------------------------------------------------------
@few_and_many(30, 5000)
def test_losses_and_their_gradients_are_finite(examples):
    @drawn(examples, cases, st.sampled_from([0.0, 0.3, 0.8, 1.0]), st.booleans())
    def check(case, alpha, ruling_out):
        draw, rows, labels, dtype = case
        p = targets(draw, rows, labels).to(dtype)
        logq = predictions(draw, rows, labels).to(dtype)
        logq = (ruled_out(draw, logq, p) if ruling_out else logq).requires_grad_()
        other = p if ruling_out else p.roll(1, 0)
        plain = [loss(logq, p) for loss in (kl_loss, ce_loss, rps_loss)]
        for loss in (*plain, hybrid_loss(logq, p, alpha, other)):
            assert loss.shape == (rows,) and loss.dtype == torch.float32 and finite(loss)
            assert (loss > -0.05).all()  # rounded probabilities do not add up to 1 exactly
            (grad,) = torch.autograd.grad(loss.sum(), logq, retain_graph=True)
            assert grad.dtype == dtype and finite(grad)
        r = distjudge.majority(p)
        assert finite(r) and (r >= 0).all() and ((r.float().sum(1) - 1).abs() < 0.05).all()


LOSSES = [  # and what the largest gradient is worth, for so many labels
    (lambda logq, p, worst: kl_loss(logq, p), lambda labels: 1),
    (lambda logq, p, worst: ce_loss(logq, p), lambda labels: 1),
    (lambda logq, p, worst: rps_loss(logq, p), lambda labels: labels),
    (lambda logq, p, worst: hybrid_loss(logq, p, 0.8, worst), lambda labels: 1),
]


@few_and_many(20, 2000)
def test_gradients_through_the_softmax_are_finite_and_those_of_float64(examples):
    """In the scores z: within 4 units of the type's rounding, times the labels for RPS."""

    @drawn(examples, cases, st.sampled_from([0.01, 1.0, 10.0, 300.0]))
    def check(case, scale):
        draw, rows, labels, dtype = case
        p, worst = (targets(draw, rows, labels).to(dtype) for _ in range(2))
        z = (scale * torch.randn(rows, labels, generator=draw)).to(dtype)
        for loss, size in LOSSES:
            grads = []
            for kind in (dtype, torch.float64):
                at = z.to(kind).requires_grad_()
                total = loss(at.log_softmax(1), p.to(kind), worst.to(kind)).sum()
                grads.append(torch.autograd.grad(total, at)[0].double())
            assert finite(grads[0])
            assert (grads[0] - grads[1]).abs().max() <= 4 * torch.finfo(dtype).eps * size(labels), loss


@pytest.mark.parametrize("labels", [2, 3, 5, 12])
def test_gradients_are_those_of_finite_differences(labels):
    """float64, central, to 1e-5, in scores and log-probabilities; one-hot, ties and zeros among them."""
    draw = torch.Generator().manual_seed(labels)
    uniform = torch.full((1, labels), 1 / labels, dtype=torch.float64)
    corners = [torch.eye(labels, dtype=torch.float64)[:2], uniform]
    p, worst = torch.cat([*corners, targets(draw, 3, labels)]), targets(draw, 6, labels)
    z = (2 * torch.randn(6, labels, generator=draw, dtype=torch.float64)).requires_grad_()
    logq = z.detach().log_softmax(1).requires_grad_()
    for loss, _ in LOSSES:
        of_scores = lambda z, loss=loss: loss(z.log_softmax(1), p, worst)  # noqa: E731
        assert torch.autograd.gradcheck(of_scores, z, eps=1e-6, atol=1e-5)
        of_logs = lambda logq, loss=loss: loss(logq, p, worst)  # noqa: E731
        assert torch.autograd.gradcheck(of_logs, logq, eps=1e-6, atol=1e-5)


def test_a_term_without_weight_is_left_out_also_where_it_is_infinite():
    logq, p, model_says = T([[0.0, -math.inf, -math.inf]]), T([[0.6, 0.4, 0.0]]), T([[1.0, 0.0, 0.0]])
    assert hybrid_loss(logq, p, 0.0).item() == 0.0 and kl_loss(logq, p).item() == math.inf
    sure = T([[0.0, 1.0, 0.0]])
    assert hybrid_loss(logq, sure, 1.0, model_says).item() == 0.0 and ce_loss(logq, sure).item() == math.inf
    assert rps_loss(logq, sure).item() == 1.0


@few_and_many(20, 3000)
def test_shrunk_votes_are_finite(examples):
    sizes, weights = [1, 5, 300, 60_000, 10**9], [0.0, 1e-9, 0.01, 1.0, 50.0, 1e4]

    @drawn(examples, cases, st.sampled_from(sizes), st.sampled_from(weights))
    def check(case, most, k):
        draw, rows, labels, dtype = case
        most = min(most, 60_000) if dtype == torch.float16 else most
        counts = torch.randint(0, most + 1, (rows, labels), generator=draw)
        counts *= torch.rand(rows, labels, generator=draw) < 0.5
        counts[torch.arange(rows), torch.randint(labels, (rows,), generator=draw)] += 1
        shrunk = distjudge.shrink_votes(counts.to(dtype), (k * targets(draw, rows, labels)).to(dtype))
        assert shrunk.dtype == dtype and finite(shrunk) and (shrunk >= 0).all()
        assert ((shrunk.double().sum(1) - 1).abs() <= labels * torch.finfo(dtype).eps).all()


# --- adversary --------------------------------------------------------------------------------------------
def near(x, p, eps, dtype, labels):
    """A distribution within eps of p, up to the rounding of x and p."""
    slack = 2 * labels * torch.finfo(dtype).eps
    assert x.dtype == dtype and finite(x) and (x >= 0).all()
    assert ((x.double().sum(1) - 1).abs() <= slack).all()
    assert ((x.double() - p.double()).norm(dim=1) <= torch.as_tensor(eps, dtype=torch.float64) + slack).all()


@few_and_many(30, 5000)
def test_projections_are_finite(examples):
    @drawn(examples, cases, radii, st.sampled_from([0.0, 1e-30, 1.0, 6e4]))
    def check(case, eps, size):
        draw, rows, labels, dtype = case
        p = targets(draw, rows, labels).to(dtype)
        y = (size * (2 * torch.rand(rows, labels, generator=draw) - 1)).to(dtype)
        eps = radius_of(eps, draw, rows)
        near(project_ball(y, p, eps), p, eps, dtype, labels)
        near(project_simplex(y), p, 2.0, dtype, labels)
        if dtype == torch.float32:
            near(project_ball(y * 1e33, p, eps), p, eps, dtype, labels)


@few_and_many(25, 4000)
def test_the_adversary_is_finite(examples):
    """Near p, whatever is ruled out; the loss there is finite where log q is, and no less than at p."""

    @drawn(examples, cases, radii, st.integers(0, 8), st.sampled_from([0.001, 0.05, 10.0]), st.booleans())
    def check(case, eps, steps, step_size, ruling_out):
        draw, rows, labels, dtype = case
        p, logq = targets(draw, rows, labels).to(dtype), predictions(draw, rows, labels).to(dtype)
        eps = radius_of(eps, draw, rows)
        if ruling_out:
            out = torch.rand(rows, labels, generator=draw) < 0.5
            out &= (logq < logq.max(1, keepdim=True).values) & (logq < -9)  # the rest still adds up to 1
            logq = logq.masked_fill(out, -math.inf)
        x = worst_case(logq, p, eps, steps, step_size)
        near(x, p, eps, dtype, labels)
        assert ruling_out or finite(hybrid_loss(logq, p, 0.8, x))
        if dtype == torch.float32 and not ruling_out:
            before, after = (kl_loss(logq.double(), at.double()) for at in (p, x))
            assert (after - before >= -1e-5 * (1 + logq.abs().amax(1))).all()


# --- metrics ----------------------------------------------------------------------------------------------
SCALES = [[str(c) for c in range(1, 13)], [f"-{10**15 - c}.5" for c in range(12)]]
SCALES += [[f"{c / 10:.1f}" for c in range(12)], list("abcdefghijkl")]


def numbers(found):
    return all(value is None or math.isfinite(value) for value in found.values())


@few_and_many(12, 2000)
def test_metrics_are_numbers_or_none(examples):
    votes = st.sampled_from([1, 5, 10**9 - 1])

    @drawn(examples, cases, st.integers(1, 5), votes, st.sampled_from(SCALES), st.booleans())
    def check(case, number, most, scale, known):
        draw, _, count, dtype = case
        labels, at = scale[:count], torch.randint(count, (number,), generator=draw)
        counts = torch.randint(0, most + 1, (number, count), generator=draw)
        counts *= torch.rand(number, count, generator=draw) < 0.4
        counts[torch.arange(number), at] += 1
        named = lambda row: dict(zip(labels, row, strict=True))  # noqa: E731
        votes = enumerate(counts.tolist())
        rows = [{"prompt": f"p{i}", "counts": named(row), "group": i // 2} for i, row in votes]
        if known:
            truths = targets(draw, number, count).tolist()
            rows = [row | {"truth": named(truth)} for row, truth in zip(rows, truths, strict=True)]
        items = distjudge.load_items(rows, labels=labels)
        q = predictions(draw, number, count).exp().to(dtype)
        if ((q.double().sum(1) - 1).abs() > 1e-3).any():
            with pytest.raises(distjudge.InputError, match="is no distribution"):
                distjudge.evaluate(q, items)
            q = q.double() / q.double().sum(1, keepdim=True)
        metrics = distjudge.evaluate(q, items, label_mass=torch.zeros(number), draws=50)
        assert numbers(metrics), metrics
        json.dumps(metrics, allow_nan=False)
        for name, score in distjudge.item_scores(q, items).items():
            assert len(score) == number and finite(score), name
            found = distjudge.bootstrap(score[None], groups=[item.group for item in items], draws=100)
            assert numbers(found), (name, found)
        assert finite(distjudge.entropy(q)) and all(label_sets(q, labels, 1.0))


def test_labels_of_more_digits_than_a_float_holds_are_names():
    """As numbers they would be infinite, or run into one another."""
    assert distjudge.are_numeric(["1", "-20.5", "123456789012345"])
    assert not distjudge.are_numeric(["1", "9" * 400])
    assert not distjudge.are_numeric(["12345678901234567", "12345678901234568"])
    rows = [{"prompt": f"p{i}", "counts": {"1": 1 + i, "9" * 400: 1}} for i in range(2)]
    items = distjudge.load_items(rows)
    assert numbers(distjudge.evaluate([[0.5, 0.5], [1.0, 0.0]], items))


# --- judgments --------------------------------------------------------------------------------------------
ENDS = ("good.", "bad", "fine and good and bad " * 6)
TEXTS = [f"Rate this. {start} {end}" for start in ("Soup:", "Service: the service was", "") for end in ENDS]
TEXTS += ["No", "soup " * 40]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.02}  # nats, in the log-probability of a label


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("labels", [["yes", "no", "maybe"], ["1", "10", "2"]])
def test_a_judgment_depends_on_its_item_alone(tiny_model, labels, dtype):
    """Alone, in every batch size, in another order, in padded rows and in packs: within TOLERANCE."""
    judge = distjudge.load_judge(tiny_model, labels, lora_rank=0)
    judge.model.to(dtype)
    alone = torch.cat([judge.score([text])[0] for text in TEXTS])
    encoded = judge.encode(TEXTS)
    shuffle = torch.randperm(len(TEXTS), generator=torch.Generator().manual_seed(0)).tolist()
    furthest = 0.0
    for packs in (True, False):
        judge.packs = packs
        for order in (list(range(len(TEXTS))), shuffle):
            for size in range(1, len(TEXTS) + 1):
                for k in range(0, len(order), size):
                    members = order[k : k + size]
                    batch = judge.batch([encoded[i] for i in members])
                    with torch.no_grad():
                        logq = distjudge.label_logprobs(judge.model, batch, judge.tokens)[0]
                    furthest = max(furthest, float((logq - alone[members]).abs().max()))
    print(f"{dtype}, labels {labels}: {furthest:.2g} nats")  # pytest -s shows it
    assert furthest <= TOLERANCE[dtype]
    assert (alone.std(0) > 3 * TOLERANCE[dtype]).any()  # and items do differ by more than that


# --- runs that diverge ------------------------------------------------------------------------------------
DIVERGE = "--learning_rate 1e30 --schedule constant --save_every 1 --batch_size 4".split()


@pytest.mark.parametrize("lora_rank", ["0", "4"])
def test_a_learning_rate_without_measure_ends_in_one_line(ended, tiny_model, items_file, tmp_path, lora_rank):
    flags = ["--train", items_file(24)[1], "--model", tiny_model, "--out", tmp_path / "run", *DIVERGE]
    code, said = ended(distjudge.run, distjudge.Config, "--lora_rank", lora_rank, *flags)
    line = said.strip().splitlines()[-1]
    assert code == 1 and line.startswith("error: the ") and " not finite " in line and ", for item" in line
    assert line.endswith("; last good checkpoint: none")  # the first step's weights are in none that counts
    assert not (tmp_path / "run" / "judge.json").exists() and not (tmp_path / "run" / "metrics.json").exists()


def test_a_judge_whose_weights_are_no_numbers_does_not_judge(tiny_model):
    judge = distjudge.load_judge(tiny_model, ["yes", "no"], lora_rank=0)
    judge.model.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="the model gives NaN for 1 of 1 prompts"):
        judge.predict(["Hi"])


@pytest.mark.parametrize(("save_every", "kept"), [(1.0, r"step-000000002-\w{64}\.pt"), (0.0, "none")])
def test_weights_that_are_no_numbers_are_never_saved(tiny_model, votes, tmp_path, save_every, kept):
    """Neither into a checkpoint nor, after the last step, by a run that looks finished."""
    last = 3
    judge = distjudge.load_judge(tiny_model, ["1", "2", "3"], lora_rank=4)
    weight = next(w for w in judge.model.parameters() if w.requires_grad)

    def poison(step):
        if step == last - 1:  # the gradient of the step that follows
            weight.register_hook(lambda grad: grad * math.nan)

    config = distjudge.Config(out=str(tmp_path), batch_size=4, epochs=1.0, save_every=save_every)
    words = rf"weights are not finite after step {last}, of items i\d+, .*; last good checkpoint: .*{kept}$"
    with pytest.raises(FloatingPointError, match=words):
        distjudge.train(judge, votes(4 * last), config, on_step=poison)
    saved = distjudge.checkpoints_in(tmp_path / "checkpoints")
    assert len(saved) == 2 * bool(save_every)
    for path in saved:
        assert all(finite(weight) for weight in distjudge.load_checkpoint(path)["weights"].values())
