"""The interface of the pinned Unsloth, on a CPU: what we call exists and means what we think."""

import ast
import importlib.util
import json
import os
import subprocess
import sys

import distjudge

import pytest
import torch
from conftest import ROOT

OURS = ("distjudge.py", "tests/gpu/report.py")
ASSIGNMENTS = (ast.Assign, ast.AnnAssign, ast.AugAssign)
CHECKS = """
import unsloth  # first: it patches the others
import importlib, inspect, json, sys
import torch
from unsloth import FastLanguageModel
from unsloth.models import llama, mistral, qwen3
from unsloth.utils.prefix_grouper_kernel import _make_mask_mod
import distjudge

# our calls: signatures take them; what no parameter names is printed
through_kwargs = {}
for module, name, method, positional, keywords in json.loads(sys.argv[1]):
    target = getattr(importlib.import_module(module), name)
    signature = inspect.signature(getattr(target, method) if method else target)
    signature.bind(*[None] * positional, **dict.fromkeys(keywords))  # a TypeError names what it does not take
    if unnamed := sorted(set(keywords) - set(signature.parameters)):
        through_kwargs.setdefault(f"{name}.{method}", set()).update(unnamed)
print(json.dumps({name: sorted(unnamed) for name, unnamed in through_kwargs.items()}))

# its groups of prefixes make our mask, in attention that gets them where add_label_readout puts them
lists = [[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 3, 5, 6], [1, 9], [8], [8, 1]]
for chosen in ([0, 1, 2], [0, 1, 2, 3, 4, 5], [4]):
    pack = distjudge.build_pack(lists, chosen, two_levels=True)
    ends, at = torch.tensor(pack.ends), torch.arange(len(pack.ids))
    seg = distjudge.unsloth_segments(ends, torch.tensor(pack.positions))
    mask = _make_mask_mod(seg.group_of_kv, seg.is_prefix, seg.suffix_of_kv)
    theirs = mask(None, None, at[:, None], at[None, :])
    ours = (at[None, :] <= at[:, None]) & (at[:, None] < ends[None, :])
    assert seg.T == len(pack.ids) and torch.equal(theirs, ours), (theirs, ours)
assert llama.LlamaModel_fast_forward.__module__ == "unsloth.models.llama"
for module in (llama, mistral, qwen3):
    assert "resolve_prefix_seg_info(kwargs" in inspect.getsource(module), module

# the value that recomputes activations Unsloth's way is the default of its own functions
for name in ("from_pretrained", "get_peft_model", "patch_peft_model"):
    parameters = inspect.signature(getattr(FastLanguageModel, name)).parameters
    assert parameters["use_gradient_checkpointing"].default == "unsloth", name
"""


def calls_of_unsloth(path):
    """A file's calls of what it imports from Unsloth: [module, name, method or "", arguments, keywords]."""
    found = []
    for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(function, ast.FunctionDef):
            continue
        names, dicts, nodes = {}, [], list(ast.walk(function))
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("unsloth"):
                names |= {alias.name: node.module for alias in node.names}
            elif isinstance(node, ASSIGNMENTS) and isinstance(node.value, ast.Dict):
                target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                keys = [key.value for key in node.value.keys if isinstance(key, ast.Constant)]
                dicts.append((ast.unparse(target), node.lineno, keys))
        for call in [node for node in nodes if isinstance(node, ast.Call)]:
            owner, _, method = ast.unparse(call.func).partition(".")
            if owner in names:
                words = [word.arg for word in call.keywords if word.arg]
                passed = {ast.unparse(word.value) for word in call.keywords if not word.arg}
                assert passed <= {name for name, _, _ in dicts}, ast.unparse(call)
                for name, line, keys in dicts:
                    words += keys if name in passed and line < call.lineno else []
                found.append([names[owner], owner, method, len(call.args), words])
    return found


@pytest.fixture(scope="module")
def calls():
    return [call for name in OURS for call in calls_of_unsloth(ROOT / name)]


def test_the_calls_are_found_in_our_code(calls):
    made = {}
    for _, name, method, _, keywords in calls:
        made.setdefault((name, method), set()).update(keywords)
    lora = {"r", "lora_alpha", "target_modules", "random_state", "use_gradient_checkpointing"}
    assert lora <= made["FastLanguageModel", "get_peft_model"]
    loading = {"max_seq_length", "load_in_4bit", "device_map", "use_exact_model_name", "use_safetensors"}
    assert loading | {"offload_embedding"} <= made["FastLanguageModel", "from_pretrained"]
    others = {("FastLanguageModel", "patch_peft_model"), ("FastBaseModel", "post_patch_model")}
    others |= {("build_seg_info_multigroup", "")}
    assert others <= set(made)


def test_the_label_mass_keeps_its_gradient_where_checkpoint_is_replaced(tiny_model, monkeypatch):
    """Unsloth's recomputes with the gradients of a function's arguments, not of what it closes over."""
    plain = torch.utils.checkpoint.checkpoint
    replaced = lambda function, *tensors, **_: plain(function, *tensors, use_reentrant=True)  # noqa: E731
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", replaced)
    monkeypatch.setattr(distjudge, "SLICE", 100)
    judge = distjudge.load_judge(tiny_model, ["yes", "no"], lora_rank=0)
    judge.packs = False
    batch, weights = judge.batch(judge.encode(["Good soup."])), list(judge.model.parameters())
    _, log_mass = distjudge.label_logprobs(judge.model, batch, judge.tokens, with_mass=True)
    logits = judge.model(input_ids=batch["input_ids"]).logits[0, -1]
    expected = logits.log_softmax(-1)[judge.tokens.token_ids].logsumexp(-1)
    assert log_mass.item() == pytest.approx(expected.item(), abs=1e-5)
    pairs = zip(torch.autograd.grad(log_mass, weights), torch.autograd.grad(expected, weights), strict=True)
    assert all((a - b).norm() <= 1e-4 * b.norm() for a, b in pairs)


class FailsBackward(torch.autograd.Function):
    """What a kernel does whose backward pass asks for more shared memory than the card has."""

    @staticmethod
    def forward(ctx, hidden):
        return hidden.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("out of resource: shared memory, Required: 106496, Hardware limit: 101376")


@pytest.mark.parametrize("fails", [True, False])
def test_packs_whose_backward_pass_fails_are_run_as_rows(tiny_model, tiny_tokenizer, caplog, fails):
    """It is tried at load, not found in training: Unsloth's attention of packs is compiled both ways."""

    def hook(layer, args, kwargs, hidden):
        packed = hasattr(kwargs["attention_mask"], "blocks")
        return FailsBackward.apply(hidden) if fails and packed else hidden

    model = distjudge.load_model(str(tiny_model), device="cpu")
    model.backend = "unsloth"
    model.model.layers[0].register_forward_hook(hook, with_kwargs=True)
    judge = distjudge.make_judge(model, tiny_tokenizer, ["yes", "no"], lora_rank=0)
    said = "cannot be run on packed prompts (out of resource: shared memory"
    assert judge.packs != fails and (said in caplog.text) == fails
    assert all(weight.grad is None for weight in model.parameters()) and not model.training


def test_unsloth_takes_our_calls_and_means_what_we_think(calls, tmp_path):
    """In a process of its own, for it patches what it imports. A renamed function or parameter fails here."""
    if importlib.util.find_spec("unsloth") is None:
        pytest.skip("needs the full kit: pip install -r requirements.txt")
    environment = {"UNSLOTH_ALLOW_CPU": "1", "UNSLOTH_DISABLE_STATISTICS": "1", "PYTHONPATH": str(ROOT)}
    environment |= {"UNSLOTH_COMPILE_LOCATION": str(tmp_path)}
    command = [sys.executable, "-c", CHECKS, json.dumps(calls)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | environment)
    assert done.returncode == 0, done.stderr[-3000:]
    through = {"FastLanguageModel.from_pretrained": ["use_safetensors"]}  # on to transformers' own
    assert json.loads(done.stdout.splitlines()[-1]) == through
