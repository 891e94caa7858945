"""What needs CUDA: flex_attention, bfloat16, running out of memory for real, Unsloth. Skipped elsewhere."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import distjudge
from distjudge import Config, load_judge, train

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
REHEARSED = bool(os.environ.get("DISTJUDGE_REHEARSE"))  # on a CPU, see tests/test_gpu_report.py
NO_CUDA = not (torch.cuda.is_available() or REHEARSED)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(NO_CUDA, reason="needs CUDA")]
needs_unsloth = pytest.mark.skipif(importlib.util.find_spec("unsloth") is None, reason="needs Unsloth")
IMPLEMENTATIONS = [distjudge.BLOCKS, "sdpa", "flex_attention"]
TEXTS = ["Rate this. Soup: good. Service: bad.", "Rate this. Soup: good. Service: fine."]
TEXTS += ["Rate this. Soup: bad.", "Rate that.", "word " * 150]
SINGLY = [[i] for i in range(len(TEXTS))]


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("gpu_model")
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 2}
    sizes = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": len(tiny_tokenizer)}
    config = LlamaConfig(**heads, **sizes, initializer_range=0.1, max_position_embeddings=4096)
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def packed_by(judge, implementation):
    judge.packs = True
    getattr(judge.model, "get_base_model", lambda: judge.model)().set_attn_implementation(implementation)
    assert judge.model.config.get_text_config()._attn_implementation == implementation


def one_at_a_time(judge, texts):
    judge.packs = False
    return torch.cat([judge.score([text])[0] for text in texts])


def gradients(judge, groups):
    encoded = judge.encode(TEXTS)
    judge.model.zero_grad()
    for members in groups:
        batch = judge.batch([encoded[i] for i in members])
        distjudge.label_logprobs(judge.model, batch, judge.tokens)[0][:, 0].sum().backward()
    found = [weight.grad for weight in judge.model.parameters() if weight.grad is not None]
    return torch.cat([grad.float().flatten() for grad in found])


def in_process(code):
    """What a process of its own prints last, for Unsloth patches what it imports."""
    folders = map(str, (ROOT, ROOT / "recipes", ROOT / "tests" / "gpu"))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("labels", [["yes", "no"], ["1", "10", "2"]])
def test_packs_equal_one_at_a_time(model, implementation, dtype, tolerance, labels):
    judge = load_judge(model, labels, backend="transformers")
    judge.model.to(dtype)
    single = one_at_a_time(judge, TEXTS)
    packed_by(judge, implementation)
    assert (judge.score(TEXTS)[0] - single).abs().max() < tolerance


def test_the_bfloat16_tolerance_would_see_a_wrong_mask(model, monkeypatch):
    """Prompts that see all that stands before them are off by more, and fail the check at load."""
    judge, plain = load_judge(model, ["yes", "no"], backend="transformers"), distjudge.tree_mask
    single = one_at_a_time(judge, TEXTS)

    def all_before(config, dtype, ends, positions):
        return plain(config, dtype, torch.full_like(ends, len(ends)), positions)

    monkeypatch.setattr(distjudge, "tree_mask", all_before)
    judge.packs = True
    assert (judge.score(TEXTS)[0] - single).abs().max() > 0.05
    assert not load_judge(model, ["yes", "no"], backend="transformers").packs


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_packs_of_many_lengths(model, implementation):
    """A new shape every pass, as in training: no limit of recompilations, no stale mask."""
    judge = load_judge(model, ["yes", "no"], backend="transformers")
    texts = [f"{n} " + "soup " * (7 * n % 60) for n in range(60)]
    single = one_at_a_time(judge, texts)
    packed_by(judge, implementation)
    judge.pack_tokens = 300
    assert len(judge.plan(judge.encode(texts))) > 4
    assert (judge.score(texts)[0] - single).abs().max() < 0.1


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_of_packs(model, implementation):
    judge = load_judge(model, ["yes", "no"], lora_rank=0, backend="transformers")
    judge.packs = False
    single = gradients(judge, SINGLY)
    packed_by(judge, implementation)
    packed = gradients(judge, judge.plan(judge.encode(TEXTS)))
    assert (packed - single).abs().max() < 1e-3 * single.abs().max()


def test_running_out_of_memory_makes_packs_smaller(model, tmp_path, caplog):
    """The same losses and weights with memory for all items of a step at once and for a few."""
    rows = [{"prompt": f"{i} " + "soup " * 300, "counts": {"1": 1, "2": 2, "3": i % 3}} for i in range(24)]
    items, losses, weights = distjudge.load_items(rows), [], []
    settings = {"batch_size": 24, "epochs": 2.0, "learning_rate": 1e-3, "pack_tokens": 100_000}
    for scarce in (False, True):
        judge = load_judge(model, ["1", "2", "3"], lora_rank=4, backend="transformers")
        torch.cuda.empty_cache()
        if scarce:
            allowed = torch.cuda.memory_reserved() + 2**26
            whole = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(allowed / whole)
        try:
            log = train(judge, items, Config(out=str(tmp_path), **settings))
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        losses.append([row["loss"] for row in log])
        trained = [weight.detach().flatten() for weight in judge.model.parameters() if weight.requires_grad]
        weights.append(torch.cat(trained))
    assert "no item is lost" in caplog.text
    assert losses[0] == pytest.approx(losses[1], abs=0.02) and len(losses[0]) == 2
    assert (weights[0] - weights[1]).abs().max() < 5e-3


@needs_unsloth
def test_unsloth_takes_our_packs(model):
    cosine = in_process(f"""
import unsloth
import torch, distjudge, test_gpu
options = dict(backend="unsloth", lora_rank=4, gradient_checkpointing=True)
judge = distjudge.load_judge({str(model)!r}, ["yes", "no"], **options)
assert judge.model.two_levels and judge.packs, (judge.model.two_levels, judge.packs)
judge.model.train()
packed = test_gpu.gradients(judge, [list(range(len(test_gpu.TEXTS)))])
judge.packs = False
single = test_gpu.gradients(judge, test_gpu.SINGLY)
print(torch.nn.functional.cosine_similarity(packed, single, dim=0).item())
""")
    assert cosine > 0.99


@pytest.mark.parametrize("teacher", [0.0, 5.0])
@pytest.mark.parametrize("backend", ["transformers", pytest.param("unsloth", marks=needs_unsloth)])
def test_a_4_bit_judge_trains_reloads_and_is_merged_into_16_bits(model, tmp_path, backend, teacher):
    """The whole of run() under each backend; the merge is compared by the export itself."""
    with open(tmp_path / "votes.jsonl", "w") as file:
        for i in range(64):
            counts = {"1": 3 * (i % 2), "2": 1, "3": 3 - 3 * (i % 2)}
            prompt = f"Rate {i}: " + ("good " if i % 2 else "bad ") * 20
            file.write(json.dumps({"id": i, "prompt": prompt, "counts": counts}) + "\n")
    found = in_process(f"""
{"import unsloth" if backend == "unsloth" else ""}
import distjudge, export, json, torch
from pathlib import Path
folder, backend = Path({str(tmp_path)!r}), {backend!r}
settings = dict(learning_rate=5e-3, epochs=6.0, lora_rank=8, teacher={teacher})
run = dict(train=(str(folder / "votes.jsonl"),), out=str(folder / "run"), model={str(model)!r})
distjudge.run(distjudge.Config(**run, **settings, four_bit=True, backend=backend))
export.main(export.ExportConfig(run=str(folder / "run"), export="merged"))
judge = distjudge.load_judge(folder / "run", backend=backend)
trained = {{str(weight.dtype) for weight in judge.model.parameters() if weight.requires_grad}}
print(json.dumps([judge.backend, judge.model.is_loaded_in_4bit, list(trained)]))
""")
    assert found == [backend, True, ["torch.float32"]]  # adapters
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert sum(losses[-8:]) < sum(losses[:8])
    report = json.loads((tmp_path / "run" / "merged" / "export.json").read_text())
    merging = report["merged weights against their base with the adapter"]
    assert report["changed_by_training"] > 4 * merging["largest difference in a probability"]


@needs_unsloth
def test_unsloth_judges_as_transformers_does(model, tmp_path):
    """One saved judge whose adapters do something, loaded under both backends: to 0.05 in bfloat16."""
    judge = load_judge(model, ["yes", "no"], backend="transformers", lora_rank=4)
    before = torch.as_tensor(judge.predict(TEXTS))
    with torch.no_grad():
        for name, weight in judge.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.2, generator=torch.Generator(weight.device).manual_seed(0))
    distjudge.save_judge(judge, tmp_path)
    expected = torch.as_tensor(judge.predict(TEXTS))
    assert (expected - before).abs().max() > 0.1  # or a lost adapter would pass
    found = in_process(f"""
import distjudge, json
judge = distjudge.load_judge({str(tmp_path)!r}, backend="unsloth")
print(json.dumps(judge.predict({TEXTS!r}).tolist()))
""")
    assert (torch.tensor(found) - expected).abs().max() < 0.05
