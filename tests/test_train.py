"""Training: the step's gradient, accumulation, seeds, the methods' meaning; a run folder from files to a loaded judge."""
import dataclasses
import json
import math

import numpy
import pytest
import torch

import distjudge
from distjudge import Config, InputError, load_judge, run, train

LABELS = ["1", "2", "3"]


def settings(tmp_path, **changes):
    plain = {"learning_rate": 1e-2, "epochs": 1.0, "warmup": 0.0, "schedule": "constant", "lora_rank": 4, "min_mass": 0.0}  # random weights
    return Config(out=str(tmp_path / "run"), **(plain | changes))


def weights(judge):
    return torch.cat([p.detach().flatten() for p in judge.model.parameters() if p.requires_grad])


def test_one_step_of_sgd_follows_the_objective_by_hand(tiny_model, votes, tmp_path):
    """One AdamW step from zero moments moves each weight by learning_rate * sign(gradient): the sign must be the objective's."""
    items = votes(6)
    judge = load_judge(tiny_model, LABELS, lora_rank=0)
    before = weights(judge)
    p = torch.tensor([item.distribution for item in items])
    batch = judge.batch(judge.encode([i.prompt for i in items]))
    logq, _ = distjudge.label_logprobs(judge.model, batch, judge.tokens)
    worst = distjudge.worst_case(logq, p, 0.25, 5, 0.05)
    (0.8 * (torch.xlogy(worst, worst) - worst * logq).sum(1) - 0.2 * (distjudge.majority(p) * logq).sum(1)).mean().backward()
    gradient = torch.cat([(torch.zeros_like(w) if w.grad is None else w.grad).flatten() for w in judge.model.parameters()])
    judge.model.zero_grad()
    log = train(judge, items, settings(tmp_path, lora_rank=0, batch_size=6, learning_rate=1e-4, max_grad_norm=0.0, log_every=1))
    expected = (0.8 * distjudge.kl_loss(logq, worst) + 0.2 * distjudge.ce_loss(logq, p)).mean().item()
    assert log[0]["loss"] == pytest.approx(expected, rel=1e-5)
    large = gradient.abs() > 1e-5
    assert large.float().mean() > 0.3
    assert torch.allclose((weights(judge) - before)[large], -1e-4 * gradient[large].sign(), atol=2e-6)


@pytest.mark.parametrize("labels", [LABELS, ["1", "10", "2"]])
def test_accumulated_gradients_are_those_of_one_large_batch(tiny_model, votes, tmp_path, labels):
    items = votes(22, labels)  # 22 = 8 + 8 + 6: the last step is a short one, and 3 does not divide 8
    after = []
    for batch_size, grad_accum in ((8, 1), (1, 8), (4, 2)):
        judge = load_judge(tiny_model, sorted(labels, key=float))
        train(judge, items, settings(tmp_path, batch_size=batch_size, grad_accum=grad_accum, epochs=2.0, learning_rate=1e-3))
        after.append(weights(judge))
    assert (after[0] - weights(load_judge(tiny_model, sorted(labels, key=float)))).abs().max() > 1e-3
    for other in after[1:]:
        assert torch.allclose(after[0], other, atol=2e-5)


def test_the_loss_is_the_mean_over_items_not_over_batches(tiny_model, votes, tmp_path):
    items = votes(7)
    judge = load_judge(tiny_model, LABELS)
    logq, _ = judge.score([item.prompt for item in items])
    p = torch.tensor([item.distribution for item in items])
    log = train(judge, items, settings(tmp_path, batch_size=3, grad_accum=3, alpha=1.0, eps=0.0, log_every=1))
    assert log[0]["loss"] == pytest.approx(distjudge.kl_loss(logq, p).mean().item(), rel=1e-5)


def test_two_runs_with_one_seed_agree_to_the_bit_and_other_seeds_do_not(tiny_model, votes, tmp_path):
    def trained(seed):
        judge = load_judge(tiny_model, LABELS, seed=seed)
        train(judge, votes(12), settings(tmp_path, batch_size=4, seed=seed))
        return weights(judge)
    assert torch.equal(trained(0), trained(0)) and not torch.equal(trained(0), trained(1))


def test_what_the_settings_mean(tiny_model, votes, tmp_path):
    """A judge trained to death finds the votes' shares with KL, the majority label without it."""
    items = distjudge.load_items([{"id": "a", "prompt": "good soup", "counts": {"1": 3, "2": 2, "3": 0}},
                                  {"id": "b", "prompt": "bad service", "counts": {"1": 0, "2": 2, "3": 8}}])
    prompts = [item.prompt for item in items]
    for alpha, expected in ((1.0, [[0.6, 0.4, 0.0], [0.0, 0.2, 0.8]]), (0.0, [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])):
        judge = load_judge(tiny_model, LABELS, lora_rank=0)
        train(judge, items, settings(tmp_path, lora_rank=0, epochs=80.0, alpha=alpha, eps=0.0, learning_rate=5e-3, batch_size=2))
        assert numpy.abs(judge.predict(prompts) - expected).max() < 0.05


def test_lora_trains_adapters_only_and_lora_rank_0_everything(tiny_model, votes, tmp_path):
    judge = load_judge(tiny_model, LABELS, lora_rank=2)
    frozen = [p.clone() for p in judge.model.parameters() if not p.requires_grad]
    start = weights(judge)
    train(judge, votes(6), settings(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(frozen, (p for p in judge.model.parameters() if not p.requires_grad), strict=True))
    assert not torch.equal(start, weights(judge)) and weights(judge).numel() < 0.3 * sum(p.numel() for p in frozen)
    assert all(p.requires_grad for p in load_judge(tiny_model, LABELS, lora_rank=0).model.parameters())


def test_gradient_checkpointing_changes_nothing(tiny_model, votes, tmp_path):
    after = []
    for checkpointing in (False, True):
        judge = load_judge(tiny_model, LABELS, lora_rank=0)
        train(judge, votes(8), settings(tmp_path, lora_rank=0, gradient_checkpointing=checkpointing, learning_rate=1e-3))
        after.append(weights(judge))
    assert torch.allclose(after[0], after[1], atol=1e-6)


def test_annotators_radius_reaches_the_loss(tiny_model, tmp_path):
    rows = [{"id": i, "prompt": f"soup {i}", "counts": {"1": 3 * n, "2": 2 * n, "3": n}} for i, n in enumerate((1, 100))]
    items = distjudge.load_items(rows)
    judge = load_judge(tiny_model, LABELS)
    logq, _ = judge.score([item.prompt for item in items])
    p = torch.tensor([item.distribution for item in items])
    radius = distjudge.annotator_radius(distjudge.counts_of(items), 0.25)
    assert radius[0] == pytest.approx(0.2, abs=0.05) and radius[1] < 0.05
    log = train(judge, items, settings(tmp_path, radius="annotators", alpha=1.0, log_every=1))
    assert log[0]["loss"] == pytest.approx(distjudge.kl_loss(logq, distjudge.worst_case(logq, p, radius)).mean().item(), rel=1e-5)


def test_judgments_after_training_in_bfloat16_are_those_after_loading(tiny_model, votes, tmp_path, monkeypatch):
    """Trainer leaves the model wrapped in autocast; the judge must not stay so."""
    import transformers

    plain = transformers.TrainingArguments
    monkeypatch.setattr(transformers, "TrainingArguments", lambda **settings: plain(**settings | {"bf16": True}))
    for lora_rank in (0, 4):
        judge = load_judge(tiny_model, LABELS, lora_rank=lora_rank)
        for _ in range(2):
            train(judge, votes(8), settings(tmp_path, lora_rank=lora_rank))
            distjudge.save_judge(judge, tmp_path / "run")
            assert numpy.abs(judge.predict(["good soup"]) - load_judge(tmp_path / "run").predict(["good soup"])).max() < 1e-6


def test_a_diverging_run_stops(tiny_model, votes, tmp_path):
    judge = load_judge(tiny_model, LABELS, lora_rank=0)
    with torch.no_grad():
        judge.model.lm_head.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="not finite at step 1"):
        train(judge, votes(4), settings(tmp_path, lora_rank=0))
    with pytest.raises(FloatingPointError, match="NaN"):
        judge.predict(["Hi"])


def test_training_refuses_other_labels_long_prompts_and_impossible_settings(tiny_model, votes, tmp_path):
    judge = load_judge(tiny_model, LABELS, max_length=20)
    with pytest.raises(InputError, match="are not the judge's"):
        train(judge, votes(4, ("a", "b", "c")), settings(tmp_path))
    long = distjudge.load_items([{"prompt": "soup " * 30, "counts": {"1": 1, "2": 0, "3": 0}}])
    with pytest.raises(InputError, match="longer than max_length 20"):
        train(judge, long, settings(tmp_path))
    for name, value in (("alpha", 1.1), ("eps", -1.0), ("batch_size", 0), ("learning_rate", math.nan), ("epochs", math.inf), ("epochs", 0)):
        with pytest.raises(InputError, match=f"^{name}: must be"):
            train(judge, votes(4), settings(tmp_path, **{name: value}))


    with pytest.raises(InputError, match="schedule: must be one of linear"):
        train(judge, votes(4), settings(tmp_path, schedule="no_such_schedule"))
    with pytest.raises(InputError, match="training settings: "):
        train(judge, votes(4), settings(tmp_path, report_to=("no_such_logger",)))


@pytest.fixture
def files(tmp_path, votes):
    def write(name, items):
        path = tmp_path / name
        path.write_text("".join(json.dumps({"id": i.id, "prompt": i.prompt, "counts": i.counts}) + "\n" for i in items))
        return str(path)
    items = votes(20)
    return write("train.jsonl", items[:14]), write("test.jsonl", items[14:])


def test_a_run_folder_holds_everything(tiny_model, files, tmp_path):
    config = settings(tmp_path, train=files[:1], test=files[1:], model=str(tiny_model), eval_every=2, log_every=1, batch_size=4)
    metrics = run(config)
    out = tmp_path / "run"
    assert {p.name for p in out.iterdir()} >= {"config.json", "judge.json", "adapter", "tokenizer", "predictions.jsonl", "metrics.json", "log.jsonl"}
    assert json.loads((out / "metrics.json").read_text()) == metrics and metrics["items"] == 6 and 0 < metrics["label_mass"] < 1
    saved = json.loads((out / "config.json").read_text())
    assert saved["labels"] == LABELS and saved["alpha"] == 0.8 and torch.__version__.startswith(saved["versions"]["torch"])
    assert saved["items"] == {"train": 14, "test": 6} and len(saved["prompt_hash"]) == 64
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if "loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in log if "eval_kl" in line] == [2, 4] and all("eval_accuracy" in line for line in log if "eval_kl" in line)
    rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    judge = load_judge(out)
    test = distjudge.load_items(files[1])
    assert [r["id"] for r in rows] == [item.id for item in test] and [r["counts"] for r in rows] == [item.counts for item in test]
    assert numpy.allclose([list(r["predicted"].values()) for r in rows], judge.predict([item.prompt for item in test]), atol=1e-6)
    assert log[-2]["eval_kl"] == pytest.approx(metrics["kl"], rel=1e-4)
    first = (out / "predictions.jsonl").read_bytes()
    run(config)
    assert (out / "predictions.jsonl").read_bytes() == first


def test_four_bit_run(tmp_path, files, tiny_tokenizer):
    pytest.importorskip("bitsandbytes")
    from transformers import Qwen2Config, Qwen2ForCausalLM

    Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tiny_tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
                                 num_key_value_heads=1)).save_pretrained(tmp_path / "m")
    tiny_tokenizer.save_pretrained(tmp_path / "m")
    config = settings(tmp_path, train=files[:1], test=files[1:], model=str(tmp_path / "m"), four_bit=True, epochs=12.0, log_every=1)
    run(config)
    losses = [row["loss"] for row in map(json.loads, (tmp_path / "run" / "log.jsonl").read_text().splitlines()) if "loss" in row]
    assert len(losses) == 24 and sum(losses[-8:]) < 0.95 * sum(losses[:8])


def test_overlong_items_stop_the_run_or_are_dropped_on_request(tiny_model, files, tmp_path, capsys):
    rows = open(files[0]).read() + json.dumps({"id": "long", "prompt": "soup " * 60, "counts": {"1": 1, "2": 0, "3": 0}}) + "\n"
    path = tmp_path / "with_long.jsonl"
    path.write_text(rows)
    config = settings(tmp_path, train=(str(path),), test=files[1:], model=str(tiny_model), max_length=50)
    with pytest.raises(InputError, match=r"with_long.jsonl:15: item 'long': prompt: \d+ tokens; 1 of 15 training items are longer than max_length 50"):
        run(config)
    run(dataclasses.replace(config, overlong="drop"))
    assert "dropped 1 of 15 training items longer than 50 tokens" in capsys.readouterr().out
    with pytest.raises(InputError, match="no training items are left"):
        run(dataclasses.replace(config, overlong="drop", max_length=2))


def test_where_test_items_come_from(files, tmp_path, votes):
    items, test = distjudge.load_data(Config(train=files[:1]))
    assert (len(items), len(test)) == (11, 3)
    with_split = tmp_path / "split.jsonl"
    with_split.write_text("".join(json.dumps({"id": i, "prompt": f"p{i}", "split": "test" if i % 3 == 0 else "train", "counts": {"a": 1, "b": 0}}) + "\n"
                                  for i in range(9)))
    items, test = distjudge.load_data(Config(train=(str(with_split),)))
    assert ([item.id for item in test], len(items)) == (["0", "3", "6"], 6)
    with pytest.raises(InputError, match="also in the training items"):
        distjudge.load_data(Config(train=files[:1], test=files[:1]))
    with pytest.raises(InputError, match=r"labels {a, b} differ from {1, 2, 3}"):
        distjudge.load_data(Config(train=files[:1], test=(str(with_split),)))
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"prompt": "other", "counts": {"b": 1, "a": 0}}))
    with pytest.raises(InputError, match="item '0': split: is test, but --test names the test items"):
        distjudge.load_data(Config(train=(str(with_split),), test=(str(other),)))
    one_sided = tmp_path / "one_sided.jsonl"
    one_sided.write_text("".join(json.dumps({"id": i, "prompt": f"p{i}", "group": "g", "split": split, "counts": {"a": 1, "b": 0}}) + "\n"
                                 for i, split in enumerate(("train", "test"))))
    with pytest.raises(InputError, match="group: also in the training items"):
        distjudge.load_data(Config(train=(str(one_sided),)))
    with pytest.raises(InputError, match="train: name a file"):
        distjudge.load_data(Config())
    assert distjudge.parse_spellings(["a=x, y,z"]) == {"a": ["x", " y", "z"]}
    with pytest.raises(InputError, match="not LABEL=TEXT"):
        distjudge.parse_spellings(["a:x"])


def pairs(n):
    words = ["soup", "good", "bad", "fine", "service", "word", "hot", "label"]
    rows = []
    for i in range(n):
        a, b = f"{words[i % 8]} {i}", f"{words[(3 * i + 1) % 8]} {i}"
        rows.append({"id": i, "prompt": f"yes: {a} no: {b}", "counts": {"yes": 1 + i % 4, "no": 1, "maybe": i % 2},
                     "swap": {"prompt": f"yes: {b} no: {a}", "labels": {"yes": "no", "no": "yes"}}})
    return rows


def test_pairs_are_trained_in_both_orders_and_judged_in_both(tiny_model, tmp_path):
    """Training on pairs is training on twice as many items, the votes of half of them turned round."""
    rows, weights = pairs(6), []
    apart = [{k: v for k, v in row.items() if k != "swap"} for row in rows]
    apart += [{"id": f"{r['id']} turned", "prompt": r["swap"]["prompt"], "counts": {"yes": r["counts"]["no"], "no": r["counts"]["yes"], "maybe": r["counts"]["maybe"]}}
              for r in rows]
    for data in (rows, apart):
        items = distjudge.load_items(data, labels=["yes", "no", "maybe"])
        judge = load_judge(tiny_model, ["yes", "no", "maybe"], lora_rank=4)
        train(judge, items, Config(out=str(tmp_path), learning_rate=1e-2, batch_size=4, epochs=2.0, shuffle="items"))
        weights.append(torch.cat([w.detach().flatten() for w in judge.model.parameters() if w.requires_grad]))
    assert torch.allclose(*weights, atol=1e-6)
    items = distjudge.load_items(rows, labels=["yes", "no", "maybe"])
    q, mass, found = distjudge.judge_items(judge, items)
    one, other = judge.predict([item.prompt for item in items]), judge.predict([item.swap.prompt for item in items])[:, [1, 0, 2]]
    assert torch.allclose(q, torch.tensor((one + other) / 2), atol=1e-6) and mass.shape == (6,)
    assert found["order_flips"] == pytest.approx((one.argmax(1) != other.argmax(1)).mean())
    assert found["order_variation"] == pytest.approx(abs(one - other).sum(1).mean() / 2, abs=1e-6) and found["order_variation"] > 1e-4
    metrics = distjudge.write_results(judge, items, items, Config(), tmp_path / "run")
    assert metrics["order_flips"] == found["order_flips"] and distjudge.judge_items(judge, distjudge.load_items(apart[:3], labels=["yes", "no", "maybe"]))[2] == {}
    alone = load_judge(tiny_model, ["yes", "no", "maybe"], lora_rank=4)
    log = train(alone, items, Config(out=str(tmp_path), batch_size=4, epochs=1.0, swap=False, log_every=1))
    assert len([row for row in log if "loss" in row]) == 2  # six items; with both orders there would be three steps


def test_a_run_tokenizes_every_prompt_once(tiny_model, votes, tmp_path, monkeypatch):
    items, asked = votes(12), []
    (tmp_path / "items.jsonl").write_text("".join(json.dumps({"id": i.id, "prompt": i.prompt, "counts": i.counts}) + "\n" for i in items))
    plain = distjudge.PromptEncoder._text
    monkeypatch.setattr(distjudge.PromptEncoder, "_text", lambda self, message: asked.append(message) or plain(self, message))
    distjudge.run(Config(train=(str(tmp_path / "items.jsonl"),), model=str(tiny_model), out=str(tmp_path / "run"), epochs=1.0, min_mass=0.0))
    times = {item.prompt: asked.count(item.prompt) for item in items}
    tested = {json.loads(line)["prompt"] for line in (tmp_path / "run" / "predictions.jsonl").open()}
    assert {prompt for prompt, n in times.items() if n > 1} <= tested and max(times.values()) == 2  # once more, to be judged at the end
