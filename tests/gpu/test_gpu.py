"""What needs CUDA: flex_attention, bfloat16, running out of memory for real, Unsloth's shared-prefix kernel. Skipped elsewhere."""
import importlib.util
import os

import pytest
import torch

import distjudge
from distjudge import Config, load_judge, train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
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


@pytest.mark.parametrize(("implementation", "dtype", "tolerance"), [("sdpa", torch.float32, 1e-4), ("flex_attention", torch.float32, 1e-3),
                                                                    ("sdpa", torch.bfloat16, 0.1), ("flex_attention", torch.bfloat16, 0.1)])
@pytest.mark.parametrize("labels", [["yes", "no"], ["1", "10", "2"]])
def test_packs_equal_one_at_a_time(model, implementation, dtype, tolerance, labels):
    judge = load_judge(model, labels)
    judge.model.to(dtype)
    judge.packs = False
    single = torch.cat([judge.score([text])[0] for text in TEXTS])
    judge.model.get_base_model().set_attn_implementation(implementation)
    judge.packs = True
    assert (judge.score(TEXTS)[0] - single).abs().max() < tolerance


@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention"])
def test_gradients_of_packs(model, implementation):
    grads = []
    for packs in (False, True):
        judge = load_judge(model, ["yes", "no"], lora_rank=0)
        judge.packs = packs
        if packs:
            judge.model.set_attn_implementation(implementation)
        for members in judge.plan(judge.encode(TEXTS)) if packs else [[i] for i in range(len(TEXTS))]:
            logq, _ = distjudge.label_logprobs(judge.model, judge.batch([judge.encode(TEXTS)[i] for i in members]), judge.tokens)
            logq[:, 0].sum().backward()
        grads.append(torch.cat([w.grad.flatten() for w in judge.model.parameters() if w.grad is not None]))
    assert (grads[0] - grads[1]).abs().max() < 1e-3 * grads[0].abs().max()


def test_running_out_of_memory_makes_packs_smaller(model, votes, tmp_path):
    judge = load_judge(model, ["1", "2", "3"])
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**24) / torch.cuda.get_device_properties(0).total_memory)
    try:
        items = distjudge.load_items([{"id": i, "prompt": f"{i} " + "soup " * 300, "counts": {"1": 1, "2": 2, "3": 0}} for i in range(24)])
        judge.pack_tokens = 100_000
        train(judge, items, Config(out=str(tmp_path), batch_size=24, epochs=1.0, pack_tokens=100_000))
        assert judge.pack_tokens < 100_000
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


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
"""
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": os.getcwd()})
    assert done.returncode == 0, done.stderr[-3000:]
