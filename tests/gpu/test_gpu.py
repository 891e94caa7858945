"""What needs CUDA: flex_attention, bfloat16, running out of memory for real, Unsloth's shared-prefix kernel. Skipped elsewhere."""
import importlib.util
import os

import pytest
import torch

import distjudge
from distjudge import Config, load_judge, train

REHEARSED = bool(os.environ.get("DISTJUDGE_REHEARSE"))  # run on a CPU, so that the tests are known to run: see tests/test_gpu_report.py
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not (torch.cuda.is_available() or REHEARSED), reason="needs CUDA")]
TEXTS = ["Rate this. Soup: good. Service: bad.", "Rate this. Soup: good. Service: fine.", "Rate this. Soup: bad.", "Rate that.", "word " * 150]


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("gpu_model")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tiny_tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
                                 num_key_value_heads=2, initializer_range=0.1, max_position_embeddings=4096)).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def on(judge, implementation):
    getattr(judge.model, "get_base_model", lambda: judge.model)().set_attn_implementation(implementation)
    assert judge.model.config.get_text_config()._attn_implementation == implementation


IMPLEMENTATIONS = [distjudge.BLOCKS, "sdpa", "flex_attention"]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("labels", [["yes", "no"], ["1", "10", "2"]])
def test_packs_equal_one_at_a_time(model, implementation, dtype, tolerance, labels):
    judge = load_judge(model, labels)
    judge.model.to(dtype)
    judge.packs = False
    single = torch.cat([judge.score([text])[0] for text in TEXTS])
    on(judge, implementation)
    judge.packs = True
    assert (judge.score(TEXTS)[0] - single).abs().max() < tolerance


def test_the_bfloat16_tolerance_would_see_a_wrong_mask(model, monkeypatch):
    """A pack in which every prompt sees all that stands before it is off by more than the tolerance, and fails the check at load."""
    judge = load_judge(model, ["yes", "no"])
    judge.packs = False
    single = torch.cat([judge.score([text])[0] for text in TEXTS])
    judge.packs, plain = True, distjudge.tree_mask
    monkeypatch.setattr(distjudge, "tree_mask", lambda config, dtype, ends, positions: plain(config, dtype, torch.full_like(ends, len(ends)), positions))
    assert (judge.score(TEXTS)[0] - single).abs().max() > 0.05
    assert not distjudge.check_packs(judge)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_packs_of_many_lengths(model, implementation):
    """A new shape every pass, as in training: no limit of recompilations, no stale mask."""
    judge = load_judge(model, ["yes", "no"])
    texts = [f"{n} " + "soup " * (7 * n % 60) for n in range(60)]
    judge.packs = False
    single = judge.score(texts)[0]
    on(judge, implementation)
    judge.packs, judge.pack_tokens = True, 300
    assert len(judge.plan(judge.encode(texts))) > 4
    assert (judge.score(texts)[0] - single).abs().max() < 0.1


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_of_packs(model, implementation):
    grads = []
    for packs in (False, True):
        judge = load_judge(model, ["yes", "no"], lora_rank=0)
        judge.packs = packs
        if packs:
            on(judge, implementation)
        for members in judge.plan(judge.encode(TEXTS)) if packs else [[i] for i in range(len(TEXTS))]:
            logq, _ = distjudge.label_logprobs(judge.model, judge.batch([judge.encode(TEXTS)[i] for i in members]), judge.tokens)
            logq[:, 0].sum().backward()
        grads.append(torch.cat([w.grad.flatten() for w in judge.model.parameters() if w.grad is not None]))
    assert (grads[0] - grads[1]).abs().max() < 1e-3 * grads[0].abs().max()


def test_running_out_of_memory_makes_packs_smaller(model, tmp_path, caplog):
    """The same losses and weights with memory for all items of a step at once and for a few."""
    items = distjudge.load_items([{"id": i, "prompt": f"{i} " + "soup " * 300, "counts": {"1": 1, "2": 2, "3": i % 3}} for i in range(24)])
    after = []
    for scarce in (False, True):
        judge = load_judge(model, ["1", "2", "3"], lora_rank=4)
        torch.cuda.empty_cache()
        if scarce:
            allowed = torch.cuda.memory_reserved() + 2**26
            torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.get_device_properties(0).total_memory)
        try:
            log = train(judge, items, Config(out=str(tmp_path), batch_size=24, epochs=2.0, learning_rate=1e-3, log_every=1, pack_tokens=100_000))
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        after.append(([row["loss"] for row in log if "loss" in row], torch.cat([w.detach().flatten() for w in judge.model.parameters() if w.requires_grad])))
    assert "no item is lost" in caplog.text
    assert after[0][0] == pytest.approx(after[1][0], abs=0.02) and (after[0][1] - after[1][1]).abs().max() < 5e-3


@pytest.mark.skipif(importlib.util.find_spec("unsloth") is None, reason="needs Unsloth")
def test_unsloth_takes_our_packs(model):
    """In a process of its own, for Unsloth patches what it imports."""
    import subprocess
    import sys

    check = f"""
import unsloth
from unsloth import FastLanguageModel
import torch, distjudge
model, tokenizer = FastLanguageModel.from_pretrained({str(model)!r}, load_in_4bit=False, max_seq_length=4096, dtype=torch.bfloat16)
judge = distjudge.make_judge(model, tokenizer, ["yes", "no"], lora_rank=0)
assert judge.model.two_levels and judge.packs, (judge.model.two_levels, judge.packs)
texts = {TEXTS!r}
model = FastLanguageModel.get_peft_model(model, r=4, lora_alpha=8, use_gradient_checkpointing="unsloth")
judge.model = model
model.train()
grads = []
for packs in (True, False):
    judge.packs = packs
    encoded = judge.encode(texts)
    model.zero_grad()
    for members in [list(range(len(texts)))] if packs else [[i] for i in range(len(texts))]:
        logq, _ = distjudge.label_logprobs(model, judge.batch([encoded[i] for i in members]), judge.tokens)
        logq[:, 0].sum().backward()
    grads.append(torch.cat([w.grad.float().flatten() for w in model.parameters() if w.grad is not None]))
cosine = torch.nn.functional.cosine_similarity(*grads, dim=0).item()
assert cosine > 0.99, cosine
"""
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": os.getcwd()})
    assert done.returncode == 0, done.stderr[-3000:]


TRAINS_IN_4_BITS = """
{first}
import distjudge
import json, sys, torch
from pathlib import Path

folder = Path({folder!r})
rows = [{{"id": i, "prompt": f"Rate {{i}}: " + ("good " if i % 2 else "bad ") * 20, "counts": {{"1": 3 * (i % 2), "2": 1, "3": 3 - 3 * (i % 2)}}}} for i in range(64)]
(folder / "votes.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
distjudge.run(distjudge.Config(train=(str(folder / "votes.jsonl"),), out=str(folder / "run"), model={model!r}, four_bit=True, backend={backend!r},
                               learning_rate=5e-3, epochs=6.0, lora_rank=8, prior={prior!r}, min_mass=0.0, export="merged"))
log = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
losses = [row["loss"] for row in log if "loss" in row]
report = json.loads((folder / "run" / "merged" / "export.json").read_text())
judge = distjudge.load_judge(folder / "run", backend={backend!r})
assert judge.backend == {backend!r} and judge.model.is_loaded_in_4bit
assert {{w.dtype for w in judge.model.parameters() if w.requires_grad}} == {{torch.float32}}  # adapters
assert losses[-1] < losses[0], losses  # means of ten steps each
assert report["changed_by_training"] > 4 * report["difference_to_base_with_adapter"], report
print(report)
"""


@pytest.mark.parametrize("prior", ["none", "teacher"])
@pytest.mark.parametrize("backend", ["transformers", "unsloth"])
def test_a_4_bit_judge_trains_reloads_and_is_merged_into_16_bits(model, tmp_path, backend, prior):
    """The whole of run() under each backend, in a process of its own; the merge is compared by the export itself."""
    import subprocess
    import sys

    if backend == "unsloth" and importlib.util.find_spec("unsloth") is None:
        pytest.skip("needs Unsloth")
    code = TRAINS_IN_4_BITS.format(first="import unsloth" if backend == "unsloth" else "", folder=str(tmp_path), model=str(model), backend=backend, prior=prior)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": os.getcwd()})
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.skipif(importlib.util.find_spec("unsloth") is None, reason="needs Unsloth")
def test_unsloth_judges_as_transformers_does(model, tmp_path):
    """One saved judge whose adapters do something, loaded under both backends: the same probabilities, to 0.05 in bfloat16."""
    import subprocess
    import sys

    judge = load_judge(model, ["yes", "no"], backend="transformers", lora_rank=4)
    before = torch.as_tensor(judge.predict(TEXTS))
    with torch.no_grad():
        for name, weight in judge.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.2, generator=torch.Generator(weight.device).manual_seed(0))
    distjudge.save_judge(judge, tmp_path)
    expected = torch.as_tensor(judge.predict(TEXTS))
    assert (expected - before).abs().max() > 0.1  # or a lost adapter would pass
    code = f"import distjudge, json; print(json.dumps(distjudge.load_judge({str(tmp_path)!r}, backend='unsloth').predict({TEXTS!r}).tolist()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": os.getcwd()})
    assert done.returncode == 0, done.stderr[-3000:]
    import json

    assert (torch.tensor(json.loads(done.stdout.splitlines()[-1])) - expected).abs().max() < 0.05
