"""Training: against a loop written out by hand; order, warm-up, clipping, teacher; run folders."""

import dataclasses
import functools
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import distjudge
from distjudge import Config, InputError, load_judge, run, train

import numpy
import pytest
import torch
from conftest import ROOT, write_rows

LABELS = ["1", "2", "3"]


def settings(tmp_path, **changes):
    plain = {"learning_rate": 1e-2, "epochs": 1.0, "schedule": "constant", "lora_rank": 4}
    return Config(**(plain | {"out": str(tmp_path / "run")} | changes))


def weights(judge):
    return torch.cat([p.detach().flatten() for p in judge.model.parameters() if p.requires_grad])


def by_hand(judge, items, config, steps):
    """The paper's method in plain PyTorch, one prompt at a time: losses and gradient norms."""
    trained = [w for w in judge.model.parameters() if w.requires_grad]
    matrices, vectors = ([w for w in trained if (w.dim() > 1) == large] for large in (True, False))
    decay = [{"params": matrices, "weight_decay": config.weight_decay}]
    decay += [{"params": vectors, "weight_decay": 0.0}]
    optimizer, found = torch.optim.AdamW(decay, lr=config.learning_rate), []
    p = distjudge.shares_of(items).float()
    r = torch.nn.functional.one_hot(p.argmax(1), p.shape[1]).float()
    assert (p == p.max(1, keepdim=True).values).sum() == len(p)  # no ties, which r would be wrong for
    rows = [judge.encoder(item.prompt) for item in items]
    columns = [ids[0] for _, ids in judge.tokens.sequences]
    for _ in range(steps):
        said = torch.stack([judge.model(input_ids=torch.tensor([ids])).logits[0, -1] for ids in rows])
        q, mass = said[:, columns].log_softmax(1), said.softmax(1)[:, columns].sum(1)
        worst = p.double()
        for _ in range(config.steps):
            up = worst + 0.05 * (worst.clamp_min(1e-12).log() - q.detach().double() + 1)
            worst = distjudge.project_ball(up, p.double(), config.eps)
        kl = (torch.xlogy(worst, worst) - worst * q).sum(1)
        loss = config.alpha * kl - (1 - config.alpha) * (r * q).sum(1) - config.answer * mass.log()
        loss = loss.mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.sqrt(sum((w.grad**2).sum() for w in trained if w.grad is not None))
        for w in trained:
            if w.grad is not None and norm > 1:
                w.grad /= norm
        optimizer.step()
        found.append((loss.item(), norm.item()))
    return zip(*found, strict=True)


@pytest.mark.parametrize("answer", [0.0, 0.5])
def test_training_is_that_of_a_loop_written_out_by_hand(tiny_model, tmp_path, answer):
    """Losses, gradient norms (clipped) and weights after five steps of all weights, with weight decay."""
    counts = [(4, 1, 0), (1, 4, 2), (0, 1, 5), (3, 0, 1), (2, 5, 1), (5, 0, 0)]
    named = [dict(zip(LABELS, c, strict=True)) for c in counts]
    items = distjudge.load_items([{"prompt": f"soup {i}", "counts": c} for i, c in enumerate(named)])
    judges = [load_judge(tiny_model, LABELS, lora_rank=0) for _ in range(2)]
    with torch.no_grad():
        for judge in judges:
            judge.model.lm_head.weight *= 4  # a model sure of itself: gradients longer than 1
    more = {"learning_rate": 1e-3, "weight_decay": 0.1, "steps": 3, "answer": answer}
    config = settings(tmp_path, lora_rank=0, batch_size=6, epochs=5.0, **more)
    log = train(judges[0], items, config)
    losses, norms = by_hand(judges[1], items, config, 5)
    assert [row["loss"] for row in log] == pytest.approx(losses, rel=1e-4)
    assert [row["grad_norm"] for row in log] == pytest.approx(norms, rel=1e-3)
    assert max(norms) > 1 and min(norms) < max(norms) / 1.05
    assert (weights(judges[0]) - weights(judges[1])).abs().max() < 2e-5
    assert (weights(judges[0]) - weights(load_judge(tiny_model, LABELS, lora_rank=0))).abs().max() > 1e-3


def test_a_short_last_step_is_the_mean_over_its_items_too(tiny_model, votes, tmp_path):
    judge, items = load_judge(tiny_model, LABELS), votes(6)
    p = distjudge.shares_of(items).float()
    logq, mass = judge.score([item.prompt for item in items])
    for answer in (1.0, 0.5):
        loss = (distjudge.kl_loss(logq, p) - answer * mass.log()).sum().item()
        more = {"alpha": 1.0, "eps": 0.0, "learning_rate": 0.0, "answer": answer}
        log = train(judge, items, settings(tmp_path, batch_size=4, **more))
        assert 4 * log[0]["loss"] + 2 * log[1]["loss"] == pytest.approx(loss, rel=1e-5)


def test_every_epoch_has_each_item_once_and_an_order_of_its_own(tiny_model, votes, tmp_path):
    judge, steps, items = load_judge(tiny_model, LABELS), [], votes(13)
    number = {tuple(ids): i for i, ids in enumerate(judge.encode([item.prompt for item in items]))}
    plan = judge.plan
    judge.plan = lambda encoded: steps.append([number[tuple(ids)] for ids in encoded]) or plan(encoded)
    train(judge, items, settings(tmp_path, batch_size=4, epochs=3.0))
    assert [len(step) for step in steps] == [4, 4, 4, 1] * 3
    epochs = [list(itertools.chain(*steps[k : k + 4])) for k in (0, 4, 8)]
    assert all(sorted(epoch) == list(range(13)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3 and list(range(13)) not in epochs


def test_every_seed_has_orders_and_weights_of_its_own(tiny_model):
    at = [(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    orders = {tuple(distjudge.epoch_order([[n] for n in range(20)], Config(seed=s), e)) for s, e in at}
    assert len(orders) == 4 and all(sorted(order) == list(range(20)) for order in orders)
    first, again, other = (weights(load_judge(tiny_model, LABELS, seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_warm_up_and_schedules_by_hand(tiny_model, votes, tmp_path):
    def rates(epochs=40.0, **changes):
        judge = load_judge(tiny_model, LABELS, lora_rank=2)
        log = train(judge, votes(2), settings(tmp_path, epochs=epochs, learning_rate=0.8, **changes))
        return [row["learning_rate"] for row in log]

    up = [0.0, 0.4]  # 3% of 40 steps, rounded up
    assert rates(schedule="linear") == pytest.approx([*up, *(0.8 * (1 - k / 38) for k in range(38))])
    down = [0.4 * (1 + math.cos(math.pi * k / 38)) for k in range(38)]
    assert rates(schedule="cosine") == pytest.approx([*up, *down])
    assert rates(schedule="constant") == [0.8] * 40
    short = [rates(epochs=n, schedule="linear") for n in (1.0, 2.0)]
    assert short == [[0.8], [0.0, 0.8]]  # one step alone has no warm-up


def test_the_teacher_is_a_mean_of_weights_and_its_votes_count(tmp_path, tiny_model, votes, monkeypatch):
    """Two items, one step an epoch: the target of each step, and the mean, worked by hand."""
    items, k = votes(2), 3.0
    judge = load_judge(tiny_model, LABELS, lora_rank=0)
    n = distjudge.counts_of(items).float()
    modes, said, seen = [], [], []
    plain = judge.judge_encoded

    def spy(encoded, *args, **kwargs):
        modes.append(judge.model.training)
        out = plain(encoded, *args, **kwargs)
        order = [judge.encode([item.prompt for item in items]).index(ids) for ids in encoded]
        said.append(torch.empty_like(out[0]).index_copy_(0, torch.tensor(order), out[0].exp()))
        return out

    monkeypatch.setattr(judge, "judge_encoded", spy)
    more = {"teacher": k, "alpha": 1.0, "eps": 0.0, "epochs": 4.0, "batch_size": 2, "learning_rate": 1e-3}
    config, targets = settings(tmp_path, lora_rank=0, **more), [n / n.sum(1, keepdim=True)]
    start = load_judge(tiny_model, LABELS, lora_rank=0)
    log = train(judge, items, config, on_step=lambda step: seen.append(weights(judge)))
    assert modes == [False] * 3  # from the second step on, dropout off
    mean, means = torch.zeros_like(seen[0]), []
    for step, w in enumerate(seen):
        mean = mean + 10 / (10 + step) * (w - mean)
        means.append(mean)
    assert torch.allclose(weights(judge), means[-1], atol=1e-7)  # the teacher gives the answers in the end
    assert not torch.allclose(weights(judge), seen[-1], atol=1e-5)
    targets += [(n + k * q) / (n.sum(1, keepdim=True) + k) for q in said]
    for step, w in enumerate([weights(start), *seen[:3]]):
        at = 0
        for p in start.model.parameters():
            p.data.copy_(w[at : at + p.numel()].view_as(p))
            at += p.numel()
        logq, mass = start.score([item.prompt for item in items])
        loss = distjudge.kl_loss(logq, targets[step]) - mass.log()
        assert log[step]["loss"] == pytest.approx(loss.mean().item(), rel=1e-4)


@pytest.mark.parametrize("pack_tokens", [0, 1])
def test_votes_are_moved_first_and_each_item_gets_its_own_teacher(tiny_model, votes, tmp_path, pack_tokens):
    """With steps of length zero the teacher says what the judge says: losses by hand, whatever the passes."""
    judge, items, k = load_judge(tiny_model, LABELS), votes(6), 3.0
    logq, n = judge.score([item.prompt for item in items])[0], distjudge.counts_of(items).float()
    p = n / n.sum(1, keepdim=True)
    worst = distjudge.worst_case(logq, p, 0.25)
    both = (n.sum(1, keepdim=True) * worst + k * logq.exp()) / (n.sum(1, keepdim=True) + k)
    more = {"learning_rate": 0.0, "epochs": 2.0, "batch_size": 6, "pack_tokens": pack_tokens}
    log = train(judge, items, settings(tmp_path, teacher=k, alpha=0.8, eps=0.25, answer=0.0, **more))
    for row, target in zip(log, (worst, both), strict=True):  # the first step has no teacher yet
        loss = distjudge.hybrid_loss(logq, p, 0.8, target).mean().item()
        assert row["loss"] == pytest.approx(loss, rel=1e-5)


def test_on_the_way_the_teacher_is_evaluated(tiny_model, votes, tmp_path):
    judge, items = load_judge(tiny_model, LABELS), votes(4)
    log = train(judge, items, settings(tmp_path, teacher=3.0, epochs=3.0, eval_every=1), eval_items=items)
    q = judge.predict([item.prompt for item in items])  # the teacher's, in the end
    kl = distjudge.evaluate(q, items, draws=0)["kl"]
    assert log[-1]["eval_kl"] == pytest.approx(kl, rel=1e-5) != log[0]["eval_kl"]


def test_a_step_has_dropout_and_the_judge_afterwards_has_none(tiny_model, votes, tmp_path):
    judge, modes = load_judge(tiny_model, LABELS), []
    judge.model.register_forward_pre_hook(lambda model, args: modes.append(model.training))
    train(judge, votes(4), settings(tmp_path))
    assert modes == [True] and not judge.model.training


def test_a_part_of_an_epoch_is_rounded_up_to_whole_steps(tiny_model, votes, tmp_path):
    steps = lambda epochs: len(train(judge, items, settings(tmp_path, batch_size=2, epochs=epochs)))  # noqa: E731
    judge, items = load_judge(tiny_model, LABELS, lora_rank=2), votes(5)
    assert [steps(0.1), steps(1.0), steps(1.5)] == [1, 3, 5]


def test_what_the_settings_mean(tiny_model, tmp_path):
    """A judge trained to death finds the votes' shares with KL, the majority label without it.

    With the answer term it says a label and nothing else; without it, it says what it said before.
    """
    counts = [("good soup", {"1": 3, "2": 2, "3": 0}), ("bad service", {"1": 0, "2": 2, "3": 8})]
    items = distjudge.load_items([{"prompt": text, "counts": c} for text, c in counts])
    expected = {1.0: [[0.6, 0.4, 0.0], [0.0, 0.2, 0.8]], 0.0: [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]}
    for alpha in expected:
        judge = load_judge(tiny_model, LABELS, lora_rank=0)
        more = {"lora_rank": 0, "epochs": 80.0, "eps": 0.0, "learning_rate": 5e-3, "batch_size": 2}
        train(judge, items, settings(tmp_path, alpha=alpha, answer=alpha, **more))
        logq, mass = judge.score([item.prompt for item in items])
        assert numpy.abs(logq.exp() - torch.tensor(expected[alpha])).max() < 0.05
        assert mass.min() > 0.98 if alpha else mass.max() < 0.5


def test_lora_trains_adapters_only_and_lora_rank_0_everything(tiny_model, votes, tmp_path):
    judge = load_judge(tiny_model, LABELS, lora_rank=2)
    frozen = [p.clone() for p in judge.model.parameters() if not p.requires_grad]
    start = weights(judge)
    train(judge, votes(6), settings(tmp_path))
    after = (p for p in judge.model.parameters() if not p.requires_grad)
    assert all(torch.equal(a, b) for a, b in zip(frozen, after, strict=True))
    assert not torch.equal(start, weights(judge))
    assert weights(judge).numel() < 0.3 * sum(p.numel() for p in frozen)
    assert all(p.requires_grad for p in load_judge(tiny_model, LABELS, lora_rank=0).model.parameters())


def test_judgments_after_training_in_16_bits(tiny_model, votes, tmp_path, monkeypatch):
    """Training computes in 16 bits; the judge must not stay so."""
    monkeypatch.setattr(distjudge, "autocast_type", lambda judge: torch.bfloat16)
    plain, modes = distjudge.label_logprobs, []
    spy = lambda *args, **kw: modes.append(torch.is_autocast_enabled("cpu")) or plain(*args, **kw)  # noqa: E731
    monkeypatch.setattr(distjudge, "label_logprobs", spy)
    for lora_rank in (0, 4):
        judge = load_judge(tiny_model, LABELS, lora_rank=lora_rank)
        train(judge, votes(8), settings(tmp_path, lora_rank=lora_rank))
        assert modes and all(modes)
        distjudge.save_judge(judge, tmp_path / "run")
        again = load_judge(tmp_path / "run").predict(["good soup"])
        assert numpy.abs(judge.predict(["good soup"]) - again).max() < 1e-6
        modes.clear()


def test_training_refuses_other_labels_long_prompts_and_loggers(tiny_model, votes, tmp_path):
    judge = load_judge(tiny_model, LABELS, max_length=20)
    with pytest.raises(InputError, match="are not the judge's"):
        train(judge, votes(4, ("a", "b", "c")), settings(tmp_path))
    turned = [dataclasses.replace(item, counts=dict(reversed(item.counts.items()))) for item in votes(4)]
    with pytest.raises(InputError, match=r"{3, 2, 1} are not the judge's {1, 2, 3}"):
        distjudge.judge_items(judge, turned)
    with pytest.raises(InputError, match="no items"):
        distjudge.judge_items(judge, [])
    for wrong, words in (({"batch_size": 2.5}, "whole number, not 2.5"), ({"out": "\udcff"}, "in UTF-8")):
        with pytest.raises(InputError, match=f"^{next(iter(wrong))}: .*{words}$"):
            train(judge, votes(4), settings(tmp_path, **wrong))
    with pytest.raises(InputError, match=r"report_to: must be a tuple, \('wandb',\)"):
        train(judge, votes(4), settings(tmp_path, report_to="wandb"))
    with pytest.raises(InputError, match="item 'i1': has no votes"):
        unjudged = dataclasses.replace(votes(2)[1], counts={"1": 0, "2": 0, "3": 0})
        train(judge, [*votes(1), unjudged], settings(tmp_path))
    long = distjudge.load_items([{"prompt": "soup " * 30, "counts": {"1": 1, "2": 0, "3": 0}}])
    with pytest.raises(InputError, match="longer than max_length 20"):
        train(judge, long, settings(tmp_path))
    for name in ("schedule", "overlong"):
        with pytest.raises(InputError, match=f"^{name}: must be one of"):
            train(judge, votes(4), settings(tmp_path, **{name: "no_such"}))
    for name, message in (("no_such_logger", "no_such_logger"), ("swanlab", "swanlab is not installed")):
        judge.calibration = {"temperature": 2.0, "bias": [0.0] * 3}
        with pytest.raises(InputError, match=f"report_to: .*{message}"):
            train(judge, votes(4), settings(tmp_path, report_to=(name,)))
        assert judge.calibration  # of weights that are still these


def test_a_logger_gets_every_step_and_is_closed(tiny_model, votes, tmp_path, monkeypatch):
    from accelerate import tracking

    class Notebook(tracking.GeneralTracker):
        name, requires_logging_directory, tracker, seen = "notebook", False, None, []

        def __init__(self, project, **kwargs):
            super().__init__()

        def store_init_configuration(self, values):
            self.seen.append(values)

        def log(self, values, step, **kwargs):
            self.seen.append((step, values["loss"]))

        def finish(self):
            self.seen.append("closed")

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "notebook", Notebook)
    log = train(load_judge(tiny_model, LABELS), votes(16), settings(tmp_path, report_to=("notebook",)))
    about, *rows, end = Notebook.seen
    assert about["learning_rate"] == "0.01" and about["report_to"] == "('notebook',)"
    assert rows == [(1, log[0]["loss"]), (2, log[1]["loss"])] and end == "closed"


@pytest.fixture
def files(tmp_path, votes):
    rows = [{"id": i.id, "prompt": i.prompt, "counts": i.counts} for i in votes(20)]
    return write_rows(tmp_path / "train.jsonl", rows[:14]), write_rows(tmp_path / "test.jsonl", rows[14:])


def test_a_folder_of_other_things_is_no_run_folder(tiny_model, files, votes, tmp_path):
    """A model's own folder, say: not a byte of it changes, by run() nor by train()."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    bytes_of = lambda: {path: path.read_bytes() for path in model.iterdir()}  # noqa: E731
    before, more = bytes_of(), {"train": files[:1], "test": files[1:], "model": str(model)}
    refused = pytest.raises(InputError, match=r"out: .*model holds other files, such as chat_template\.jinja")
    with refused:
        run(settings(tmp_path, **more, out=str(model)))
    with refused:
        train(load_judge(model, LABELS), votes(4), settings(tmp_path, out=str(model)))
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"out: .*file is a file, not a folder"):
        run(settings(tmp_path, **more, out=str(tmp_path / "file")))
    assert bytes_of() == before
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".hidden").touch()
    for _ in range(2):  # an empty folder, and then that of a run
        run(settings(tmp_path, **more))


HOLD = """
import sys, time
sys.path.insert(0, {root!r})
import distjudge
with distjudge.locked({path!r}):
    print("held", flush=True)
    time.sleep(600)
"""


def test_one_process_at_a_time_trains_in_a_folder(tiny_model, votes, tmp_path, monkeypatch):
    """The second is told whose it is; a process that is killed holds nothing."""
    judge, out = load_judge(tiny_model, LABELS), tmp_path / "run"
    out.mkdir()
    command = [sys.executable, "-c", HOLD.format(root=str(ROOT), path=str(out))]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        for _ in range(2):
            with pytest.raises(InputError, match=f"process {holder.pid} is writing to it"):
                train(judge, votes(4), settings(tmp_path))
        assert [path.name for path in out.iterdir()] == [".lock"]
        holder.kill()
    assert len(train(judge, votes(4), settings(tmp_path))) == 1
    assert not (out / ".lock").exists()
    # Windows lets nobody write to a locked file, nor remove it
    for method in ("write_text", "unlink"):
        monkeypatch.setattr(Path, method, Mock(side_effect=PermissionError(13, "denied")))
    with distjudge.locked(out):
        pass
    with distjudge.locked(out):
        pass


def test_a_run_folder_holds_everything(tiny_model, files, tmp_path):
    config = settings(tmp_path, train=files[:1], test=files[1:], model=str(tiny_model))
    config = dataclasses.replace(config, eval_every=2, batch_size=4)
    Path(files[0]).with_name("card.json").write_text('{"notes": ["Ann"], "own": {"text": "a"}}')
    metrics, out, test = run(config), tmp_path / "run", distjudge.load_items(files[1])
    trained = distjudge.shares_of(distjudge.load_items(files[0])).numpy()
    names = "config.json judge.json adapter tokenizer predictions.jsonl metrics.json log.jsonl".split()
    assert {path.name for path in out.iterdir()} >= set(names)
    assert json.loads((out / "metrics.json").read_text()) == metrics
    assert metrics["items"] == 6 and 0 < metrics["label_mass"] < 1
    mean = distjudge.evaluate(numpy.tile(trained.mean(0), (6, 1)), test, draws=0)["kl"]
    assert metrics["kl_marginal"] == pytest.approx(mean, abs=1e-6)
    assert json.loads((tmp_path / "run" / "card.json").read_text()) == {"own": {"text": "a"}}
    saved = json.loads((out / "config.json").read_text())
    assert saved["labels"] == LABELS and saved["alpha"] == 0.8 and len(saved["prompt_hash"]) == 64
    assert torch.__version__.startswith(saved["versions"]["torch"])
    assert saved["items"] == {"train": 14, "test": 6}
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [1, 2, 3, 4] and all("loss" in row for row in log)
    assert [row["epoch"] for row in log] == [0.25, 0.5, 0.75, 1.0]
    assert [row["step"] for row in log if "eval_kl" in row and "eval_accuracy" in row] == [2, 4]
    assert log[-1]["eval_kl"] == pytest.approx(metrics["kl"], rel=1e-4)
    rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert [(row["id"], row["counts"]) for row in rows] == [(item.id, item.counts) for item in test]
    predicted = load_judge(out).predict([item.prompt for item in test])
    assert numpy.allclose([list(row["predicted"].values()) for row in rows], predicted, atol=1e-6)
    first = (out / "predictions.jsonl").read_bytes()
    run(config)
    assert (out / "predictions.jsonl").read_bytes() == first


def test_overlong_items_stop_the_run_or_are_dropped_on_request(tiny_model, files, tmp_path, caplog):
    path = tmp_path / "with_long.jsonl"
    long = {"id": "long", "prompt": "soup " * 60, "counts": {"1": 1, "2": 0, "3": 0}}
    path.write_text(open(files[0]).read() + json.dumps(long) + "\n")
    config = settings(tmp_path, train=(str(path),), test=files[1:], model=str(tiny_model), max_length=50)
    said = r"with_long.jsonl:15: item 'long': prompt: \d+ tokens; 1 of 15 training items are longer than "
    more, drop = "raise --max_length or ", "use --overlong drop"
    for words, asked, most, remedy in ((60, 50, 50, more), (600, 2048, 512, "")):  # the model takes 512
        path.write_text(open(files[0]).read() + json.dumps(long | {"prompt": "soup " * words}) + "\n")
        with pytest.raises(InputError, match=rf"{said}max_length {most} \(.*\); {remedy}{drop}$"):
            run(dataclasses.replace(config, max_length=asked))
    path.write_text(open(files[0]).read() + json.dumps(long) + "\n")
    run(dataclasses.replace(config, overlong="drop"))
    assert "dropped 1 of 15 training items longer than 50 tokens" in caplog.text
    with pytest.raises(InputError, match="no training items are left"):
        run(dataclasses.replace(config, overlong="drop", max_length=2))
    with pytest.raises(InputError, match="1 of 15 test items are longer"):
        run(dataclasses.replace(config, train=files[1:], test=(str(path),)))
    swap = {"prompt": long["prompt"], "labels": {"1": "3", "3": "1"}}  # a pair's other order alone is long
    path.write_text(open(files[0]).read() + json.dumps(long | {"prompt": "soup", "swap": swap}) + "\n")
    with pytest.raises(InputError, match="1 of 15 training items are longer"):
        run(config)


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path):
    def lines():
        yield "half"
        raise OSError("no space left")

    distjudge.write_lines(tmp_path / "x", ["whole"])
    with pytest.raises(OSError, match="no space"):
        distjudge.write_lines(tmp_path / "x", lines())
    assert os.listdir(tmp_path) == ["x"] and (tmp_path / "x").read_text() == "whole\n"


ENDS = [(distjudge.Stopped("stopped", 15), 143, "stopped\n")]
ENDS.append((torch.OutOfMemoryError("one prompt is too long"), 1, "error: one prompt is too long\n"))


@pytest.mark.parametrize(("error", "code", "said"), ENDS)
def test_a_signal_and_too_little_memory_are_one_line_and_an_exit_code(ended, error, code, said):
    assert ended(Mock(side_effect=error), dataclasses.make_dataclass("Nothing", [])) == (code, said)


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path)
    with pytest.raises(InputError, match="checkpoints is a symbolic link, which is not followed"):
        distjudge.check_out(tmp_path / "run", "checkpoints")


def test_paths_are_taken_as_text():  # they go into config.json
    paths = Config(train=(Path("a"),), test=[Path("b")], model=Path("m"), out=Path("o"))
    assert paths == Config(train=("a",), test=("b",), model="m", out="o")


def test_where_test_items_come_from(files, tmp_path):
    items, test = distjudge.load_data(Config(train=files[:1]))
    assert (len(items), len(test)) == (11, 3)
    others = [distjudge.load_data(Config(train=files[:1], seed=seed))[1] for seed in range(1, 5)]
    assert any(other != test for other in others)
    row = lambda i, **more: {"id": i, "prompt": f"p{i}", "counts": {"a": 1, "b": 0}} | more  # noqa: E731
    rows = [row(i, split="train" if i % 3 else "test") for i in range(9)]
    split = write_rows(tmp_path / "split.jsonl", rows)
    items, test = distjudge.load_data(Config(train=(split,)))
    assert ([item.id for item in test], len(items)) == (["0", "3", "6"], 6)
    sides = zip(range(2), ("train", "test"), strict=True)
    one_group = write_rows(tmp_path / "group.jsonl", [row(i, split=side, group="g") for i, side in sides])
    other = write_rows(tmp_path / "other.jsonl", [{"prompt": "other", "counts": {"b": 1, "a": 0}}])
    for train_files, test_files, message in (
        (files[:1], files[:1], "also in the training items"),
        (files[:1], (split,), r"labels {a, b} differ from {1, 2, 3}"),
        ((split,), (other,), "item '0': split: is test, but --test names the test items"),
        ((other,), (split,), "item '1': split: is train, but --train names the train items"),
        ((one_group,), (), "group: also in the training items"),
    ):
        with pytest.raises(InputError, match=message):
            distjudge.load_data(Config(train=train_files, test=test_files))
    assert distjudge.parse_spellings(["a=x, y,z", "b=u", "a=w"]) == {"a": ["x", " y", "z", "w"], "b": ["u"]}


def pairs(n):
    words, rows = "soup good bad fine service word hot label".split(), []
    for i in range(n):
        a, b = f"{words[i % 8]} {i}", f"{words[(3 * i + 1) % 8]} {i}"
        swap = {"prompt": f"yes: {b} no: {a}", "labels": {"yes": "no", "no": "yes"}}
        counts = {"yes": 1 + i % 4, "no": 1, "maybe": i % 2}
        rows.append({"id": i, "prompt": f"yes: {a} no: {b}", "counts": counts, "swap": swap})
    return rows


def test_pairs_are_trained_in_both_orders_and_judged_in_both(tiny_model, tmp_path):
    """Training on pairs is training on twice as many items, the votes of half of them turned round."""
    labels, rows, trained = ["yes", "no", "maybe"], pairs(6), []
    load = functools.partial(distjudge.load_items, labels=labels)
    turn = lambda counts: {"yes": counts["no"], "no": counts["yes"], "maybe": counts["maybe"]}  # noqa: E731
    apart = [{k: v for k, v in row.items() if k != "swap"} for row in rows]
    apart += [{"id": f"{r['id']}t", "prompt": r["swap"]["prompt"], "counts": turn(r["counts"])} for r in rows]
    for data in (rows, apart):
        judge = load_judge(tiny_model, labels, lora_rank=4)
        train(judge, load(data), Config(out=str(tmp_path), learning_rate=1e-2, batch_size=4, epochs=2.0))
        trained.append(weights(judge))
    assert torch.allclose(*trained, atol=1e-6)
    items = load(rows)
    q, mass, found = distjudge.judge_items(judge, items)
    one = judge.predict([item.prompt for item in items])
    other = judge.predict([item.swap.prompt for item in items])[:, [1, 0, 2]]
    assert torch.allclose(q, torch.tensor((one + other) / 2), atol=1e-6)
    masses = [judge.score(prompts)[1] for prompts in zip(*(item.prompts for item in items), strict=True)]
    assert torch.allclose(mass, sum(masses) / 2, atol=1e-6) and (masses[0] - masses[1]).abs().max() > 1e-5
    assert found["order_flips"] == pytest.approx((one.argmax(1) != other.argmax(1)).mean())
    variation = abs(one - other).sum(1).mean() / 2
    assert found["order_variation"] == pytest.approx(variation, abs=1e-6) and variation > 1e-4
    truth = {"yes": 0.5, "no": 0.3, "maybe": 0.2}
    named = [dataclasses.replace(item, group="g", truth=truth) for item in items]
    metrics = distjudge.write_results(judge, named, items, Config(), tmp_path / "run")
    assert metrics["order_flips"] == found["order_flips"]
    written = distjudge.rows_of(tmp_path / "run" / "predictions.jsonl")
    assert all((row["group"], row["truth"]) == ("g", truth) for row in written) and len(written) == 6
    assert distjudge.judge_items(judge, load(apart[:3]))[2] == {}


def test_a_trainer_in_16_bits_before_ours_is_no_obstacle(tiny_model, tmp_path, files):
    """accelerate keeps one state a process: what a notebook trained before must not stop train()."""
    code = """
import sys, accelerate, distjudge
accelerate.Accelerator(mixed_precision="bf16", cpu=True)
items = distjudge.load_items(sys.argv[1])
judge = distjudge.load_judge(sys.argv[2], distjudge.labels_of(items), lora_rank=2)
print("trained", len(distjudge.train(judge, items, distjudge.Config(out=sys.argv[3], epochs=1.0))))
"""
    command = [sys.executable, "-c", code, files[0], str(tiny_model), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert "trained 2" in done.stdout, done.stderr[-2000:]


def test_a_run_tokenizes_every_prompt_once(tiny_model, items_file, tmp_path, monkeypatch):
    (items, path), asked = items_file(12), []
    plain = distjudge.messages_of
    monkeypatch.setattr(distjudge, "messages_of", lambda prompt: asked.append(prompt) or plain(prompt))
    distjudge.run(Config(train=(str(path),), model=str(tiny_model), out=str(tmp_path / "run"), epochs=1.0))
    times = {item.prompt: asked.count(item.prompt) for item in items}
    tested = {json.loads(line)["prompt"] for line in (tmp_path / "run" / "predictions.jsonl").open()}
    assert {prompt for prompt, n in times.items() if n > 1} <= tested  # once more, to be judged at the end
    assert max(times.values()) == 2
