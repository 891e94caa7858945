"""Unsloth's own code without a GPU: Triton's interpreter, and a stand-in for what a CUDA driver answers.

test_unsloth_cpu.py starts this file in a process of its own, with ENVIRONMENT:

    python tests/unsloth_cpu.py '{"model": FOLDER, "work": FOLDER, "four_bit": true}'

Nothing of Unsloth's mathematics is replaced: its forwards, Triton kernels, fused LoRA, NF4 kernel and prefix
segments run. measure() and trained() are run under transformers too, by the test itself.
"""

import contextlib
import functools
import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "recipes")]

import distjudge

import torch

ENVIRONMENT = {"TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}
ENVIRONMENT |= {"HF_HUB_OFFLINE": "1", "HF_DEACTIVATE_ASYNC_LOAD": "1", "OMP_NUM_THREADS": "1"}
SOUPS = ("good. Service: bad.", "good. Service: fine.", "bad.")
TEXTS = [*(f"Rate this. Soup: {soup}" for soup in SOUPS), "Rate that."]
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 1, "max_position_embeddings": 2048, "initializer_range": 0.1}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 1024}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "llama": ("Llama", {"rope_parameters": LLAMA3}),
    "smollm": ("Llama", {"tie_word_embeddings": True}),
    "mistral": ("Mistral", {"head_dim": 32, "sliding_window": None}),
    "phi4": ("Phi3", {"pad_token_id": 0, "sliding_window": None}),
    "gemma3": ("Gemma3Text", {"head_dim": 32, "sliding_window": 64, "query_pre_attn_scalar": 32}),
}


def save_model(name: str, tokenizer: Any, folder: Path) -> None:
    """A small model of random weights, stored in 16 bits; Gemma 3 with its vision tower."""
    import transformers as T

    kind, changes = MODELS[name]
    sizes = SIZES | {"vocab_size": len(tokenizer), "tie_word_embeddings": False} | changes
    torch.manual_seed(0)
    if name == "gemma3":
        layers = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
        text = T.Gemma3TextConfig(**sizes | layers)
        small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
        vision = T.SiglipVisionConfig(**small, num_attention_heads=2, image_size=28, patch_size=14)
        ids = {"image_token_index": 10, "boi_token_index": 11, "eoi_token_index": 12}
        whole = T.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **ids)
        model = T.Gemma3ForConditionalGeneration(whole)
    else:
        model = getattr(T, f"{kind}ForCausalLM")(getattr(T, f"{kind}Config")(**sizes))
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# --- what is measured, under Unsloth and under transformers ----------------------------------------------
def load(model: str, backend: str, **settings: Any) -> distjudge.Judge:
    """A judge whose adapters do something: drawn at random, in the order of their names."""
    judge = distjudge.load_judge(model, ["yes", "no", "maybe"], lora_rank=4, backend=backend, **settings)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in sorted(judge.model.named_parameters()):
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=draw) * (0.2 if "lora_B" in name else 0.1))
    return judge


def measure(judge: distjudge.Judge, packs: bool) -> dict[str, Any]:
    """Label log-probabilities and masses of judging; gradients of both, the whole vocabulary's among them."""
    judge.packs = packs
    logq, mass = judge.score(TEXTS)
    judge.model.train()
    judge.model.zero_grad()
    encoded = judge.encode(TEXTS)
    for members in [range(len(TEXTS))] if packs else [[i] for i in range(len(TEXTS))]:
        batch = judge.batch([encoded[i] for i in members])
        q, log_mass = distjudge.label_logprobs(judge.model, batch, judge.tokens, with_mass=True)
        (-q[:, 0] - log_mass).sum().backward()
    judge.model.eval()
    trained = {name: w for name, w in judge.model.named_parameters() if w.requires_grad}
    gradients = {name: w.grad.float().clone() for name, w in trained.items()}
    return {"logq": logq, "log_mass": mass.log(), "gradients": gradients}


def trained(judge: distjudge.Judge, out: Path, **settings: Any) -> dict[str, Any]:
    """Losses of three steps over packs, and how often a layer ran: twice a pass where it is recomputed."""
    votes = {"good good": {"yes": 3, "no": 2, "maybe": 1}, "bad bad": {"yes": 0, "no": 2, "maybe": 1}}
    rows = [{"prompt": f"Rate {i}: {text}", "counts": votes[text]} for i in range(4) for text in votes]
    runs: list[int] = []
    layer = judge.model.get_base_model().get_decoder().layers[0]
    layer.mlp.register_forward_pre_hook(lambda *call: runs.append(1))
    config = distjudge.Config(out=str(out), batch_size=8, epochs=3.0, learning_rate=5e-3, **settings)
    losses = [row["loss"] for row in distjudge.train(judge, distjudge.load_items(rows), config)]
    return {"losses": losses, "layer_runs": len(runs)}


# --- the stand-in ------------------------------------------------------------------------------------------
class OnCPU(torch.overrides.TorchFunctionMode):
    """What is made on CUDA, or moved there, is made on the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = {name: value for name, value in (kwargs or {}).items() if name != "pin_memory"}
        if function is torch.device:
            return function(*args, **kwargs)
        if "device" in kwargs:
            number = isinstance(kwargs["device"], int)
            kwargs["device"] = torch.device("cpu") if number else self.here(kwargs["device"])
        return function(*map(self.here, args), **kwargs)

    @staticmethod
    def here(value: Any) -> Any:
        named = str(value) if isinstance(value, (str, torch.device)) else ""
        return torch.device("cpu") if named.split(":")[0] == "cuda" else value


def stand_in() -> None:
    """One card, as old as a T4, for Triton's interpreter cannot compute in bfloat16."""
    import torch.nn.attention.flex_attention as flex
    from triton.backends.nvidia import driver

    class Done:
        """A device, stream or event: what is asked of it has been done."""

        cuda_stream = idx = 0

        __init__ = __exit__ = synchronize = wait = record = lambda self, *args, **kwargs: None
        wait_stream = wait_event = record_event = synchronize
        __enter__ = query = lambda self: self

    card = types.SimpleNamespace(name="rehearsal", major=7, minor=5, total_memory=2**34)
    card.multi_processor_count, card.warp_size = 1, 32
    answers: dict[str, Any] = {"is_available": True, "device_count": 1, "current_device": 0}
    answers |= {"get_device_properties": card, "get_device_capability": (7, 5), "set_rng_state": None}
    answers |= {"get_rng_state": torch.empty(0, dtype=torch.uint8), "is_current_stream_capturing": False}
    answers |= {"mem_get_info": (2**34, 2**34), "empty_cache": None, "synchronize": None}
    answers |= {f"{peak}memory_{kind}": 0 for peak in ("", "max_") for kind in ("allocated", "reserved")}
    answers |= {"reset_peak_memory_stats": None, "default_stream": Done(), "current_stream": Done()}
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *args, answer=answer, **kwargs: answer)
    torch.cuda.device = torch.cuda.Stream = torch.cuda.Event = Done
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    not_capturing = types.SimpleNamespace(is_capturing=lambda: False)
    torch.accelerator.current_stream = lambda device=None: not_capturing
    torch._C._cuda_getCurrentRawStream = lambda index=0: 0
    driver.libcuda_dirs = list  # else Unsloth would run ldconfig
    OnCPU().__enter__()
    flex._validate_device = lambda *tensors: None  # its eager form has a backward pass on a CPU too

    import bitsandbytes.functional as bnb

    def absent(*args: Any) -> None:
        raise AssertionError("a CUDA kernel of bitsandbytes was called, not its twin in Triton")

    kinds = [f"cdequantize_blockwise_{kind}" for kind in ("fp32", "fp16_nf4", "bf16_nf4", "fp32_nf4")]
    absent.restype = None
    for symbol in (*kinds, "cgemm_4bit_inference_naive_fp16", "cgemm_4bit_inference_naive_bf16"):
        setattr(bnb.lib, symbol, absent)


# --- the rehearsal -----------------------------------------------------------------------------------------
def everything_seen(ends: torch.Tensor, positions: torch.Tensor) -> Any:
    """The mutant of unsloth_segments(): one prefix, in which every prompt sees those before it."""
    from unsloth.utils.prefix_grouper_kernel import build_seg_info_multigroup

    return build_seg_info_multigroup([(len(ends), [])], ends.device)[0]


def dequantized(judge: distjudge.Judge, model: Path, folder: Path) -> float:
    """Saves the weights that 4 bits hold, as bitsandbytes reads them; how far Unsloth's kernel is from it."""
    from bitsandbytes import functional
    from safetensors.torch import save_file
    from unsloth.kernels.utils import fast_dequantize

    weights, off = {}, [0.0]
    for name, weight in judge.model.get_base_model().named_parameters():
        if "lora_" not in name:
            plain = weight.detach()
            if state := getattr(weight, "quant_state", None):
                plain = functional.dequantize_4bit(weight.data, state)
                off.append((fast_dequantize(weight, state) - plain).abs().max().item())
            weights[name.replace(".base_layer", "")] = plain.float().contiguous().clone()
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return max(off)


def rehearse(model: str, work: str, four_bit=False, mutant=False, float32=False) -> dict[str, Any]:
    # near those that training ends at: from 65,536 the first steps would go into halving it
    torch.amp.GradScaler = functools.partial(torch.amp.GradScaler, init_scale=256.0)
    if float32:
        distjudge.half_precision = lambda device: torch.float32
    distjudge.SLICE = 200  # of a small vocabulary, several
    if mutant:
        distjudge.unsloth_segments = everything_seen
    out, judge = Path(work), load(model, "unsloth", four_bit=four_bit)
    base = judge.model.get_base_model()
    found: dict[str, Any] = {"backend": judge.backend, "packs": judge.packs, "two_levels": base.two_levels}
    found |= {"autocast": distjudge.autocast_type(judge), "offloads": base._unsloth_offload_embedding_mode}
    found["four_bit"] = bool(getattr(base, "is_loaded_in_4bit", False))
    found |= {"packed": measure(judge, True), "single": measure(judge, False)}
    if mutant:
        return found
    if four_bit:
        found["nf4_kernel_off"] = dequantized(judge, Path(model), out / "dequantized")
    judge.packs = found["packs"]
    found["plain"] = trained(judge, out / "plain")
    judge = load(model, "unsloth", four_bit=four_bit, gradient_checkpointing=True)
    found["recomputed step"] = measure(judge, found["packs"])
    found["recomputed"] = trained(judge, out / "run", gradient_checkpointing=True)
    found["after"] = judge.score(TEXTS)[0]
    distjudge.save_judge(judge, out / "run")
    found["again"] = distjudge.load_judge(out / "run", backend="unsloth").score(TEXTS)[0]
    return found


if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    stand_in()
    torch.save(rehearse(**settings), Path(settings["work"]) / "found.pt")
