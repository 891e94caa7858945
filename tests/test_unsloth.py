"""The interface of the pinned Unsloth, on a CPU: what we call exists and means what we think. Needs the full kit."""
import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = ("distjudge.py", "recipes/export.py", "tests/gpu/report.py")
CHECK = """
import unsloth  # first: it patches the others
import torch
from unsloth.utils.prefix_grouper_kernel import _make_mask_mod
from unsloth.models.llama import LlamaModel_fast_forward
import distjudge

lists = [[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 3, 5, 6], [1, 9], [8], [8, 1]]
for chosen in ([0, 1, 2], [0, 1, 2, 3, 4, 5], [4]):
    pack = distjudge.build_pack(lists, chosen, two_levels=True)
    ends, positions = torch.tensor(pack.ends), torch.tensor(pack.positions)
    seg = distjudge.unsloth_segments(ends, positions)
    at = torch.arange(len(pack.ids))
    theirs = _make_mask_mod(seg.group_of_kv, seg.is_prefix, seg.suffix_of_kv)(None, None, at[:, None], at[None, :])
    ours = (at[None, :] <= at[:, None]) & (at[:, None] < ends[None, :])
    assert seg.T == len(pack.ids) and torch.equal(theirs, ours), (theirs, ours)
assert LlamaModel_fast_forward.__module__ == "unsloth.models.llama"
print("the masks agree")
"""


CALLS = """
import unsloth  # first
import importlib, inspect, json, sys

through_kwargs = {}
for module, name, method, positional, keywords in json.loads(sys.argv[1]):
    target = getattr(importlib.import_module(module), name)
    target = getattr(target, method) if method else target
    signature = inspect.signature(target)
    signature.bind(*[None] * positional, **dict.fromkeys(keywords))  # a TypeError names what it does not take
    unnamed = set(keywords) - set(signature.parameters)
    through_kwargs.setdefault(f"{name}.{method}".rstrip("."), set()).update(unnamed)
print(json.dumps({name: sorted(unnamed) for name, unnamed in through_kwargs.items()}))
"""
MEANING = """
import unsloth  # first
import inspect, sys
import peft, torch, transformers
from unsloth import FastLanguageModel
from unsloth.models import llama, mistral, qwen3
from unsloth.save import ALLOWED_QUANTS, patch_saving_functions, unsloth_save_pretrained_gguf

# the value that recomputes activations Unsloth's way is the default of its own functions
for function in (FastLanguageModel.from_pretrained, FastLanguageModel.get_peft_model, FastLanguageModel.patch_peft_model):
    assert inspect.signature(function).parameters["use_gradient_checkpointing"].default == "unsloth", function
# packs get through to attention where add_label_readout puts them
for module in (llama, mistral, qwen3):
    assert "resolve_prefix_seg_info(kwargs" in inspect.getsource(module), module
# an adapter that PEFT attached has only its base's way to GGUF, which would write the base; patched, it has its own
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                                               num_attention_heads=2, num_key_value_heads=2))
model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
assert not hasattr(model, "save_pretrained_gguf") or model.save_pretrained_gguf.__self__ is not model
patched = patch_saving_functions(model)
assert patched is model and model.save_pretrained_gguf.__self__ is model
assert model.save_pretrained_gguf.__func__ is unsloth_save_pretrained_gguf
inspect.signature(model.save_pretrained_gguf).bind("folder", tokenizer=None, quantization_method="q8_0")
assert '"gguf_files"' in inspect.getsource(unsloth_save_pretrained_gguf) and {"q8_0", "q4_k_m", "f16"} <= set(ALLOWED_QUANTS)
print("as we think")
"""


def calls_of_unsloth(path):
    """What a file of ours imports from Unsloth and how it calls it: [module, name, method or "", positional arguments, keywords]."""
    tree, found = ast.parse(path.read_text(encoding="utf-8")), []
    for function in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]:
        names = {alias.name: node.module for node in ast.walk(function) if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("unsloth")
                 for alias in node.names}
        for name, module in names.items():
            found.append([module, name, "", None, []])
        dicts = {target.id: [key.value for key in node.value.keys if isinstance(key, ast.Constant)] for node in ast.walk(function) if isinstance(node, (ast.Assign, ast.AnnAssign))
                 and isinstance(node.value, ast.Dict) for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
                 if isinstance(target, ast.Name)}
        for call in [node for node in ast.walk(function) if isinstance(node, ast.Call)]:
            method = call.func.attr if isinstance(call.func, ast.Attribute) else ""
            owner = call.func.value if method else call.func
            if isinstance(owner, ast.Name) and owner.id in names:
                keywords = [k for word in call.keywords for k in ([word.arg] if word.arg else dicts[word.value.id])]
                found.append([names[owner.id], owner.id, method, len(call.args), keywords])
    return found


@pytest.fixture(scope="module")
def in_unsloth(tmp_path_factory):
    """What each piece of code above prints, all run in one process of their own, for Unsloth patches what it imports and takes its time."""
    if importlib.util.find_spec("unsloth") is None:
        pytest.skip("needs the full kit: pip install -r requirements.txt")
    folder = tmp_path_factory.mktemp("unsloth")
    calls = [call for name in OURS for call in calls_of_unsloth(ROOT / name) if call[3] is not None]
    code = "import contextlib, io, json, sys, traceback\nimport unsloth\nprinted = {}\nfor name, code in json.loads(sys.argv[2]).items():\n" \
           "    with contextlib.redirect_stdout(io.StringIO()) as out:\n        try:\n            exec(code, {})\n" \
           "        except BaseException:\n            print(traceback.format_exc())\n    printed[name] = out.getvalue()\nprint(json.dumps(printed))"
    pieces = json.dumps({"masks": CHECK, "calls": CALLS, "meaning": MEANING})
    environment = os.environ | {"UNSLOTH_ALLOW_CPU": "1", "UNSLOTH_DISABLE_STATISTICS": "1", "UNSLOTH_COMPILE_LOCATION": str(folder), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, json.dumps(calls), pieces], capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_calls_are_found_in_our_code():
    calls = [call for name in OURS for call in calls_of_unsloth(ROOT / name)]
    made: dict[tuple[str, str], set[str]] = {}
    for _, name, method, positional, keywords in calls:
        if positional is not None:
            made.setdefault((name, method), set()).update(keywords)
    assert {"r", "lora_alpha", "target_modules", "random_state", "use_gradient_checkpointing"} <= made["FastLanguageModel", "get_peft_model"]
    assert {"max_seq_length", "load_in_4bit", "device_map", "use_exact_model_name"} <= made["FastLanguageModel", "from_pretrained"]
    assert ("FastLanguageModel", "patch_peft_model") in made and ("build_seg_info_multigroup", "") in made and ("install_llama_cpp", "") in made


def test_unsloth_takes_every_call_of_ours(in_unsloth):
    """The calls are read from our code, the signatures from the installed Unsloth: a renamed function or parameter fails here."""
    assert "Traceback" not in in_unsloth["calls"], in_unsloth["calls"]
    found = json.loads(in_unsloth["calls"].splitlines()[-1])
    # what no parameter names goes on to transformers' from_pretrained
    assert {name: unnamed for name, unnamed in found.items() if unnamed} == {"FastLanguageModel.from_pretrained": ["use_safetensors"]}


def test_unsloth_means_what_we_think(in_unsloth):
    assert "as we think" in in_unsloth["meaning"], in_unsloth["meaning"]


def test_unsloth_groups_make_our_mask(in_unsloth):
    assert "the masks agree" in in_unsloth["masks"], in_unsloth["masks"]
