"""The recipes of real backbones: the real architectures at their true size without weights, and small random ones that train.

No model hub is needed: a folder with the published dimensions (config.json) beside a real tokenizer stands for each model. Qwen2.5's and
Mistral v0.3's tokenizers are their own; Qwen3's is Qwen2.5's with its four more tokens; Llama 3.1's and Phi-4's are cl100k, whose 100,256
ids both begin with, and their control tokens behind it; Gemma 3's and SmolLM2's could not be had: Qwen2.5's and Mistral's stand in
for them, with their own templates, so that their counts of tokens are not those of the real models.
"""
import dataclasses
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import distjudge
from distjudge import Config, InputError, estimate_memory, load_judge

ROOT = Path(__file__).resolve().parents[1]
ROPE = {"rope_type": "default", "rope_theta": 1e6}
CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m.role + SEP + m.content + '<|im_end|>' + END }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant' + SEP }}{% endif %}")
GEMMA_TEXT = dict(vocab_size=262_208, hidden_size=2560, intermediate_size=10_240, num_hidden_layers=34, num_attention_heads=8, num_key_value_heads=4,
                  head_dim=256, sliding_window=1024, max_position_embeddings=131_072)
VISION = dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, image_size=896, patch_size=14,
              vision_use_head=False)
BACKBONES = {  # recipe: (settings class, architecture, published dimensions, tokenizer, billions of weights as published)
    "qwen7b": ("Qwen7BConfig", "Qwen2", dict(vocab_size=152_064, hidden_size=3584, intermediate_size=18_944, num_hidden_layers=28, num_attention_heads=28,
               num_key_value_heads=4, max_position_embeddings=32_768, rope_parameters=ROPE, tie_word_embeddings=False), "qwen2.5", 7.62),
    "llama8b": ("Llama8BConfig", "Llama", dict(vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
                num_key_value_heads=8, max_position_embeddings=131_072, tie_word_embeddings=False,
                rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                 "original_max_position_embeddings": 8192}), "llama", 8.03),
    "qwen3_4b": ("Qwen3Config4B", "Qwen3", dict(vocab_size=151_936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
                 num_key_value_heads=8, head_dim=128, max_position_embeddings=40_960, rope_parameters=ROPE, tie_word_embeddings=True), "qwen3", 4.02),
    "qwen3_8b": ("Qwen3Config8B", "Qwen3", dict(vocab_size=151_936, hidden_size=4096, intermediate_size=12_288, num_hidden_layers=36, num_attention_heads=32,
                 num_key_value_heads=8, head_dim=128, max_position_embeddings=40_960, rope_parameters=ROPE, tie_word_embeddings=False), "qwen3", 8.19),
    "gemma3_4b": ("Gemma3Config4B", "Gemma3", dict(text_config=GEMMA_TEXT, vision_config=VISION, mm_tokens_per_image=256), "gemma", 4.30),
    "mistral7b": ("Mistral7BConfig", "Mistral", dict(vocab_size=32_768, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
                  num_key_value_heads=8, max_position_embeddings=32_768, rope_parameters=ROPE, sliding_window=None, tie_word_embeddings=False), "mistral_v3", 7.25),
    "phi4": ("Phi4Config", "Phi3", dict(vocab_size=100_352, hidden_size=5120, intermediate_size=17_920, num_hidden_layers=40, num_attention_heads=40,
             num_key_value_heads=10, max_position_embeddings=16_384, original_max_position_embeddings=16_384, pad_token_id=0, sliding_window=None,
             rope_parameters={"rope_type": "default", "rope_theta": 250_000.0}, tie_word_embeddings=False), "phi4", 14.7),
    "smollm": ("SmolLMConfig", "Llama", dict(vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
               num_key_value_heads=3, max_position_embeddings=8192, rope_parameters=ROPE, tie_word_embeddings=True), "smollm", 0.135),
}
SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512,
             initializer_range=0.1, pad_token_id=0, bos_token_id=None, eos_token_id=3)


def settings_of(name):
    return getattr(importlib.import_module(name), BACKBONES[name][0])


def save_tokenizer(kind, tokenizers_dir, folder):
    from transformers import AutoTokenizer

    base = {"qwen3": "qwen2.5", "gemma": "qwen2.5", "llama": "cl100k", "phi4": "cl100k", "smollm": "mistral_v3"}.get(kind, kind)
    tokenizer = AutoTokenizer.from_pretrained(tokenizers_dir(base))
    control = {"llama": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "phi4": ["<|im_start|>", "<|im_sep|>", "<|im_end|>"],
               "gemma": ["<bos>", "<start_of_turn>", "<end_of_turn>"], "smollm": ["<|im_start|>", "<|im_end|>"]}.get(kind, [])
    tokenizer.add_special_tokens({"additional_special_tokens": control})
    if kind == "qwen3":
        tokenizer.add_tokens(["<tool_response>", "</tool_response>", "<think>", "</think>"])
    if kind in ("llama", "gemma"):
        tokenizer.bos_token = control[0]
    if kind in ("llama", "phi4", "smollm"):
        tokenizer.eos_token = control[-1]
    template = {"llama": "llama3_1", "gemma": "gemma3", "qwen3": "qwen3"}.get(kind)
    if template:
        tokenizer.chat_template = tokenizers_dir(f"chat_templates/{template}.jinja").read_text()
    if kind in ("phi4", "smollm"):
        tokenizer.chat_template = CHATML.replace("SEP", "'<|im_sep|>'" if kind == "phi4" else r"'\n'").replace("END", "''" if kind == "phi4" else r"'\n'")
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="session")
def outline(tmp_path_factory, tokenizers_dir):
    """A function that saves config.json and tokenizer of a recipe's model, at its true size."""
    import transformers

    def save(name):
        _, architecture, dimensions, tokenizer, _ = BACKBONES[name]
        folder = tmp_path_factory.mktemp(name)
        getattr(transformers, f"{architecture}Config")(**dimensions).save_pretrained(folder)
        save_tokenizer(tokenizer, tokenizers_dir, folder)
        return folder
    return save


@pytest.fixture
def nli(tmp_path):
    """A file of NLI-shaped items: one instruction, premises of two or three hypotheses."""
    rows = [{"id": str(i), "prompt": f"Does the premise entail the hypothesis? Answer entailment, neutral or contradiction.\n\nPremise: {'A man rides. ' * (i // 3 + 1)}\n"
             f"Hypothesis: Number {i} sleeps.", "counts": {"entailment": i % 3, "neutral": 2, "contradiction": i % 2}, "group": str(i // 3)} for i in range(24)]
    (tmp_path / "votes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "votes.jsonl")


def call(name, monkeypatch, *arguments):
    """The recipe's command line, in this process."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
    distjudge.cli(distjudge.run, settings_of(name))


# --- dry runs ---------------------------------------------------------------------------------------------------------------
def test_a_dry_run_says_what_a_run_would_do(outline, nli, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    call("mistral7b", monkeypatch, "--train", nli, "--model", outline("mistral7b"), "--dry_run")
    lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert list(lines) == ["backend", "model", "weights", "trained", "optimizer", "passes", "labels", "items", "tokens", "memory", "time"]
    assert "7.25 billion weights, none of them loaded, planned for CUDA" in lines["model"]
    assert "adamw_8bit (weights are 4-bit on CUDA)" in lines["optimizer"] and "at most 4,096 tokens (asked for)" in lines["passes"]
    assert "41,943,040 weights in float32: LoRA of rank 16" in lines["trained"]  # 16 x 32 layers x (2 x 8192 + 2 x 5120 + 3 x 18432)
    assert "by the first token of the answer: entailment: 'ent', neutral: 'neutral', contradiction: 'contrad'" in lines["labels"]
    assert "no card here to compare with" in lines["memory"] or torch.cuda.is_available()
    assert not (tmp_path / "runs").exists()  # nothing is written


@pytest.mark.slow
def test_a_dry_run_as_users_call_it(outline, nli, tmp_path):
    rated = tmp_path / "rated.jsonl"
    rated.write_text("".join(json.dumps({"prompt": f"Rate {i}.", "counts": {"1": 1, "2": i % 2, "10": 1}}) + "\n" for i in range(10)))
    command = [sys.executable, ROOT / "recipes" / "mistral7b.py", "--train", rated, "--model", outline("mistral7b"), "--dry_run"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1: '▁' '1' '</s>', 2: '▁' '2' '</s>', 10: '▁' '1' '0' '</s>'" in done.stdout and not (tmp_path / "runs").exists()
    done = subprocess.run([*map(str, command[:2]), "--help"], capture_output=True, text=True, cwd=tmp_path)
    shown = " ".join(done.stdout.replace("│", " ").split())  # without the frame and the line breaks of a narrow terminal
    assert done.returncode == 0 and "closed by </s>" in shown and "(default: mistralai/Mistral-7B-Instruct-v0.3)" in shown


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKBONES)
def test_every_recipe_has_a_dry_run(name, outline, nli, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = outline(name)
    call(name, monkeypatch, "--train", nli, "--model", folder, "--dry_run")
    said = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    billions = float(said["model"].split(": ")[1].split()[0])
    assert billions == pytest.approx(BACKBONES[name][4], rel=0.005)
    assert "SDPA in blocks" in said["passes"] or "sdpa" in said["passes"]
    targets = {"phi4": "down_proj, gate_up_proj, o_proj, qkv_proj"}.get(name, "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj")
    assert said["trained"].endswith(targets)
    assert ("planned for a CPU" in said["model"]) == (name == "smollm" and not torch.cuda.is_available())
    tokenizer = distjudge.load_tokenizer(str(folder))
    frame = distjudge.PromptEncoder(tokenizer).frame
    ending = {"qwen3_4b": "<think>\n\n</think>\n\n", "qwen3_8b": "<think>\n\n</think>\n\n", "mistral7b": "[/INST]", "gemma3_4b": "<start_of_turn>model\n",
              "llama8b": "<|end_header_id|>\n\n", "phi4": "<|im_start|>assistant<|im_sep|>"}.get(name, "assistant\n")
    assert frame["after"].endswith(ending)


def test_an_outline_counts_what_a_loaded_model_counts(tiny_model, votes, tmp_path):
    config = Config(model=str(tiny_model), out=str(tmp_path), lora_rank=4)
    items, found = votes(12), []
    for weights in (True, False):
        judge = load_judge(tiny_model, ["1", "2", "3"], lora_rank=4, weights=weights)
        lines = distjudge.plan_lines(judge, items[:8], items[8:], config)
        lines["model"] = lines["model"].replace(", none of them loaded, planned for a CPU", "")
        found.append(lines)
    assert found[0] == found[1]
    assert f"{sum(len(i) for i in judge.encode([item.prompt for item in items[:8]])):,} an epoch" in found[0]["tokens"]
    with pytest.raises(InputError, match="dry_run"):
        distjudge.train(judge, items, dataclasses.replace(config, dry_run=True))


# --- the estimate of memory -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("architecture", "dtype"), [("Qwen2", "float32"), ("Qwen3", "bfloat16"), ("Gemma3Text", "bfloat16"), ("Phi3", "bfloat16")])
def test_activations_are_what_autograd_saves(architecture, dtype, tiny_tokenizer, monkeypatch):
    """Counted by autograd's own hooks over a packed pass, in the types that training computes in."""
    import transformers

    more = {"head_dim": 24} if architecture in ("Qwen3", "Gemma3Text") else {}
    shape = dict(SMALL, hidden_size=96, intermediate_size=272, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048)
    shape = getattr(transformers, f"{architecture}Config")(vocab_size=len(tiny_tokenizer), **shape, **more)
    model = transformers.AutoModelForCausalLM.from_config(shape, dtype=getattr(torch, dtype))
    judge = distjudge.make_judge(model, tiny_tokenizer, ["yes", "no"], lora_rank=8, max_length=1000)
    batch = judge.batch(judge.encode(["Is this fine? " * 20 + word + " good service bad" * 50 for word in "abcd"]))
    own = {w.untyped_storage().data_ptr() for w in [*judge.model.parameters(), *judge.model.buffers()]}
    saved = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor
    judge.model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        distjudge.label_logprobs(judge.model, batch, judge.tokens)[0].sum()
    measured, size = sum(t.untyped_storage().nbytes() for t in saved.values()), 2 if dtype == "bfloat16" else 4
    mlp = 3 * size * batch["input_ids"].numel() * 272
    estimate = estimate_memory(judge, Config(), batch)["activations"] - mlp
    assert measured == pytest.approx(estimate, rel=0.03), (measured, estimate)
    recomputed = estimate_memory(judge, Config(gradient_checkpointing=True), batch)["activations"] - mlp
    assert recomputed == pytest.approx(estimate / 3 + 3 * size * batch["input_ids"].numel() * 96)


def test_weights_are_what_bitsandbytes_holds(tmp_path, tiny_tokenizer):
    pytest.importorskip("bitsandbytes")
    from transformers import Qwen2Config, Qwen2ForCausalLM

    Qwen2ForCausalLM(Qwen2Config(**SMALL | dict(vocab_size=len(tiny_tokenizer), hidden_size=128, intermediate_size=256))).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    judge = load_judge(tmp_path, ["yes", "no"], four_bit=True, lora_rank=4)
    held = 0
    for weight in judge.model.parameters():
        if not weight.requires_grad:
            held += weight.numel() * weight.element_size()
        if state := getattr(weight, "quant_state", None):
            held += state.absmax.numel() * state.absmax.element_size() + state.state2.absmax.numel() * state.state2.absmax.element_size()
    estimate = estimate_memory(judge, Config(four_bit=True), judge.batch(judge.encode(["Is it?"])))
    assert estimate["weights"] == pytest.approx(held, rel=1e-4)
    trained = sum(p.numel() for p in judge.model.parameters() if p.requires_grad)
    assert estimate["training"] == 16 * trained  # on a CPU: weights, gradients and both moments in float32
    for mean in ({"average": 0.2}, {"prior": "teacher"}):
        assert estimate_memory(judge, Config(optimizer="adamw_8bit", **mean), judge.batch(judge.encode(["Is it?"])))["training"] == 14 * trained


@pytest.mark.parametrize("stored", [False, True])
def test_gradients_pass_through_4_bit_weights(stored, tmp_path, tiny_tokenizer, monkeypatch):
    """Against differences of the loss. Where a CPU multiplies in bfloat16, bitsandbytes would pack the weights when the judge is first read."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    model = small_model("llama8b", tmp_path / "model", tiny_tokenizer, hidden_size=64, num_hidden_layers=3)
    if stored:  # a base that exists in 4 bits only
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
        AutoModelForCausalLM.from_pretrained(model, quantization_config=config, device_map="cpu").save_pretrained(model)
    judge = load_judge(model, ["yes", "no"], four_bit=not stored, lora_rank=4, device="cpu")
    assert judge.model.is_loaded_in_4bit and not any(getattr(module, "support_avx512bf16_for_cpu", False) for module in judge.model.modules())
    trained, draw = [w for w in judge.model.parameters() if w.requires_grad], torch.Generator().manual_seed(0)
    for weight in trained:
        weight.data += 0.1 * torch.randn(weight.shape, generator=draw)
    batch = judge.batch(judge.encode(["Is this fine?", "good soup"]))

    def loss():
        return distjudge.label_logprobs(judge.model, batch, judge.tokens)[0][:, 0].sum()

    judge.score(["Is this fine?"])
    judge.model.train()
    loss().backward()
    first = [w for name, w in judge.model.named_parameters() if w.requires_grad and "layers.0." in name]
    slope, step = sum((w.grad * w.grad).sum().item() for w in first), 1e-3
    moves = [step * w.grad / slope**0.5 for w in first]
    with torch.no_grad():
        ends = []
        for sign in (1, -2):
            for weight, move in zip(first, moves, strict=True):
                weight += sign * move
            ends.append(loss().item())
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(slope**0.5, rel=0.02)


# --- label mass -------------------------------------------------------------------------------------------------------------
def test_a_model_that_would_say_something_else_is_refused(tiny_model, nli, votes, tmp_path, monkeypatch, capsys, caplog):
    """Random weights put a few thousandths on three labels of 500 tokens."""
    config = Config(train=(nli,), model=str(tiny_model), out=str(tmp_path / "run"))
    with pytest.raises(InputError, match=r"label mass: the labels hold 0\.\d\d% of the model's probability on the first 16 items .* less than min_mass 0.01"):
        distjudge.run(config)
    assert not (tmp_path / "run").exists() and "passes" in capsys.readouterr().out  # what it would have done is printed first
    judge, items = load_judge(tiny_model, ["1", "2", "3"]), votes(4)
    for mass, warned in ((0.3, True), (0.7, False)):
        monkeypatch.setattr(judge, "score", lambda prompts, mass=mass: (None, torch.full((len(prompts),), mass)))
        caplog.clear()
        assert f"{mass:.2%} of the model's probability on the first 4 items" in distjudge.check_mass(judge, items, 0.01)
        assert ("under a half" in caplog.text) == warned


# --- training ---------------------------------------------------------------------------------------------------------------
def small_model(name, folder, tokenizer, unused=5, **sizes):
    """Random weights in a recipe's architecture; `unused` rows of its vocabulary have no token, as in real models."""
    import transformers

    _, architecture, dimensions, _, _ = BACKBONES[name]
    more = {key: dimensions[key] for key in ("tie_word_embeddings", "sliding_window") if key in dimensions} | {"vocab_size": len(tokenizer) + unused}
    shape = SMALL | sizes | more | ({"head_dim": 16} if architecture in ("Qwen3", "Gemma3") else {})
    if architecture == "Gemma3":
        layers = {"layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 16}
        shape = {"text_config": layers | shape | {"sliding_window": 64}, "mm_tokens_per_image": 4,
                 "vision_config": dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)}
    torch.manual_seed(0)
    model = getattr(transformers, "Gemma3ForConditionalGeneration" if architecture == "Gemma3" else f"{architecture}ForCausalLM")
    model(getattr(transformers, f"{architecture}Config")(**shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in ("gemma3_4b", "phi4") else pytest.mark.slow) for name in BACKBONES])
def test_every_recipe_trains(name, nli, tmp_path, tiny_tokenizer, monkeypatch, capsys):
    """Its own settings, 4-bit weights included, on a small random model of its architecture: losses fall, the judge comes back."""
    pytest.importorskip("bitsandbytes")
    monkeypatch.chdir(tmp_path)
    model = small_model(name, tmp_path / "model", tiny_tokenizer)
    call(name, monkeypatch, "--train", nli, "--model", model, "--min_mass", 0, "--epochs", 8, "--learning_rate", 0.01, "--batch_size", 10, "--log_every", 1,
         "--save_every", 0, "--eps", 0)
    out = Path(settings_of(name)().out)
    losses = [row["loss"] for row in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if "loss" in row]
    assert len(losses) == 16 and sum(losses[-4:]) < 0.95 * sum(losses[:4]), losses
    assert "label mass" in capsys.readouterr().out
    rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    judge = load_judge(out)
    assert bool(getattr(judge.model, "is_loaded_in_4bit", False)) == (name != "smollm")
    again = judge.predict([row["prompt"] for row in rows])
    assert again.tolist() == [pytest.approx(list(row["predicted"].values()), abs=1e-5) for row in rows]
    adapted = {key for key, weight in judge.model.named_parameters() if weight.requires_grad}
    assert adapted and not any("vision" in key for key in adapted)


# --- llama.cpp itself, where there is one: git clone it, pip install llama-cpp-python gguf sentencepiece, DISTJUDGE_LLAMA_CPP=the clone ---
def save_sentencepiece(tokenizer, folder):
    """tokenizer.model, which Mistral's repository has beside tokenizer.json: the same vocabulary, merged in the same order."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.trainer_spec.model_type, model.trainer_spec.byte_fallback = model.trainer_spec.BPE, True
    model.normalizer_spec.add_dummy_prefix, model.normalizer_spec.remove_extra_whitespaces = True, False
    ranks = {"".join(pair): -rank for rank, pair in reversed([*enumerate(json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"])])}
    for k, piece in enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer)))):
        kind = "UNKNOWN" if piece == "<unk>" else "CONTROL" if k in tokenizer.added_tokens_decoder else "BYTE" if piece.startswith("<0x") else "NORMAL"
        model.pieces.add(piece=piece, score=ranks.get(piece, -1e6), type=getattr(model.SentencePiece, kind))
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "quantization"), [*((name, kind) for name in BACKBONES for kind in ("f16", "q8_0")), ("qwen7b", "q4_k_m")])
def test_a_gguf_file_judges_as_the_judge_does(name, quantization, llama_cpp_clone, tokenizers_dir, tmp_path, monkeypatch, capsys):
    """A LoRA judge of a small random model, exported by the command line; the same file of the base alone would be refused."""
    import export
    import llama_cpp
    from transformers import AutoModelForCausalLM, AutoTokenizer

    save_tokenizer(BACKBONES[name][3], tokenizers_dir, tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    sizes = {"layer_types": ["sliding_attention"] * 2} if name == "gemma3_4b" else {}  # llama.cpp has Gemma's pattern of six layers built in
    unused = 0 if name in ("gemma3_4b", "smollm") else 5  # not in what llama.cpp makes of their stand-ins for tokenizers
    base = small_model(name, tmp_path / "base", tokenizer, unused, hidden_size=256, intermediate_size=256, initializer_range=0.03, **sizes)
    if quantization == "q4_k_m":  # of 16-bit weights, as they are published
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    if name == "mistral7b":
        save_sentencepiece(tokenizer, base)
    if name == "phi4":
        config = json.loads((base / "tokenizer_config.json").read_text()) | {"tokenizer_class": "GPT2Tokenizer"}
        (base / "tokenizer_config.json").write_text(json.dumps(config))
    judge = load_judge(base, ["entailment", "neutral", "contradiction"], lora_rank=4)
    draw = torch.Generator().manual_seed(0)
    for weight in judge.model.parameters():
        if weight.requires_grad:
            weight.data += 0.03 * torch.randn(weight.shape, generator=draw)
    distjudge.save_judge(judge, tmp_path / "run")
    distjudge.save_judge(load_judge(base, judge.labels, lora_rank=0), tmp_path / "untrained")

    def gguf_of(run):
        monkeypatch.setattr(sys, "argv", ["export.py", "--run", str(run), "--export", "gguf", "--llama_cpp", llama_cpp_clone, "--quantization", quantization])
        distjudge.cli(export.main, export.ExportConfig)
        return next((run / "gguf").glob("*.gguf")), json.loads((run / "gguf" / "export.json").read_text())

    file, report = gguf_of(tmp_path / "run")
    off = report["difference_to_the_judge"]
    with capsys.disabled():
        print(f"\n{name} {quantization}: changed by training {report['changed_by_training']:.3f}, off by {off:.2g}")
    assert report["changed_by_training"] > 0.1 and off < {"f16": 1e-3, "q8_0": 0.01, "q4_k_m": 0.05}[quantization]
    assert report["prompts_tokenized_alike"] == report["compared_items"] == 3
    stored = int(llama_cpp.Llama(str(file), n_ctx=64, verbose=False).metadata["general.file_type"])
    assert stored == getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{quantization.upper()}")
    if quantization == "f16":
        untrained, _ = gguf_of(tmp_path / "untrained")
        found, _ = export.gguf_logprobs(untrained, judge, export.PROBES)
        assert (found.exp() - judge.score(export.PROBES)[0].exp()).abs().max() > export.ROUNDED
    for kind in export.QUANTIZED if (name, quantization) == ("qwen7b", "f16") else ():  # none needs anything but the file
        export._quantize(file, tmp_path / "other.gguf", kind)
        assert (tmp_path / "other.gguf").stat().st_size > 1e6


# --- the pages themselves ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", BACKBONES)
def test_a_recipe_is_a_page_that_says_what_it_needs(name):
    text = (ROOT / "recipes" / f"{name}.py").read_text()
    settings = settings_of(name)()
    assert len(text.splitlines()) <= 60 and text.count("def ") == 0
    doc = " ".join(importlib.import_module(name).__doc__.split())
    assert f"python recipes/{name}.py --train votes.jsonl --dry_run" in doc and "estimated" in doc and "measured" in doc
    settings.check()
    own = dataclasses.fields(type(settings))
    assert all(field.name in {f.name for f in dataclasses.fields(Config)} for field in own)  # defaults, and no settings of its own
    assert settings.out == f"runs/{name}"
