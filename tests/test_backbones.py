"""The recipes of real backbones: their architectures at full size without weights, and small random ones.

No model hub is needed: published dimensions (config.json) beside a tokenizer stand for each model. Qwen2.5's
and Mistral v0.3's tokenizers are their own, Qwen3's is Qwen2.5's with its four more tokens; the other models
have stand-ins, so that their counts of tokens are not the real ones.
"""

import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import distjudge
from distjudge import Config, InputError, load_judge

import common
import pytest
import torch
import transformers
from conftest import ROOT, SIZES, write_rows

PUBLISHED = """
qwen7b    Qwen2   7.62  qwen2.5    152064 3584 18944 28 28  4  32768
llama8b   Llama   8.03  llama3_1   128256 4096 14336 32 32  8 131072
qwen3_4b  Qwen3   4.02  qwen3      151936 2560  9728 36 32  8  40960
qwen3_8b  Qwen3   8.19  qwen3      151936 4096 12288 36 32  8  40960
gemma3_4b Gemma3  4.30  gemma3     262208 2560 10240 34  8  4 131072
mistral7b Mistral 7.25  mistral_v3  32768 4096 14336 32 32  8  32768
phi4      Phi3    14.7  mistral_v3 100352 5120 17920 40 40 10  16384
smollm    Llama   0.135 mistral_v3  49152  576  1536 30  9  3   8192
"""  # recipe, architecture, billions of weights, tokenizer, and COLUMNS
COLUMNS = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
COLUMNS = [*COLUMNS.split(), "max_position_embeddings"]
BACKBONES = {recipe: rest for recipe, *rest in map(str.split, PUBLISHED.strip().splitlines())}
TIED = {"tie_word_embeddings": True}
ALSO = {"qwen3_4b": TIED, "smollm": TIED}  # the rest are defaults of transformers
ALSO |= {"mistral7b": {"sliding_window": None}, "gemma3_4b": {"sliding_window": 1024}}
VISION = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
VISION |= {"image_size": 896, "patch_size": 14, "vision_use_head": False}
TOKENIZERS = {  # made of which, its own tokens; its template has the same name
    "qwen3": ("qwen2.5", "<tool_response> </tool_response> <think> </think>"),
    "llama3_1": ("cl100k", "<|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|>"),
    "gemma3": ("qwen2.5", "<bos> <start_of_turn> <end_of_turn>"),
}
SMALL = SIZES | dict(initializer_range=0.1, pad_token_id=0, bos_token_id=None, eos_token_id=3)


def fast(*names):
    """The recipes, all but these marked slow."""
    return [name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in BACKBONES]


def settings_of(name):
    """The settings of a recipe's page."""
    return importlib.import_module(name).Recipe


def save_tokenizer(kind, tokenizers_dir, folder):
    base, control = TOKENIZERS.get(kind, (kind, ""))
    tokenizer, control = transformers.AutoTokenizer.from_pretrained(tokenizers_dir(base)), control.split()
    tokenizer.add_tokens(control, special_tokens=kind != "qwen3")
    if kind in TOKENIZERS:
        tokenizer.chat_template = tokenizers_dir(f"chat_templates/{kind}.jinja").read_text()
    if kind in ("llama3_1", "gemma3"):
        tokenizer.bos_token, tokenizer.eos_token = control[0], control[-1]
    tokenizer.save_pretrained(folder)


def config_of(name, sizes, vision=VISION):
    architecture = BACKBONES[name][0]
    if architecture == "Gemma3":
        image_tokens = min(256, (vision["image_size"] // vision["patch_size"]) ** 2)
        sizes = {"text_config": sizes, "vision_config": vision, "mm_tokens_per_image": image_tokens}
    return getattr(transformers, f"{architecture}Config")(**sizes)


def small_model(name, folder, tokenizer, unused=5, **sizes):
    """Random weights in a recipe's architecture; `unused` rows of the vocabulary have no token, as often."""
    shape = SMALL | ALSO.get(name, {}) | sizes | {"vocab_size": len(tokenizer) + unused}
    shape |= {"head_dim": 16} if name.startswith(("qwen3", "gemma3")) else {}
    if name == "gemma3_4b":
        layers = {"layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 16}
        shape = layers | shape | {"sliding_window": 64}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = config_of(name, shape, vision | {"image_size": 28, "patch_size": 14})
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def outline(tmp_path_factory, tokenizers_dir):
    """A function that saves config.json and tokenizer of a recipe's model, at its true size."""

    def save(name):
        _, _, tokenizer, *sizes = BACKBONES[name]
        folder, sizes = tmp_path_factory.mktemp(name), dict(zip(COLUMNS, map(int, sizes), strict=True))
        config_of(name, sizes | ALSO.get(name, {})).save_pretrained(folder)
        save_tokenizer(tokenizer, tokenizers_dir, folder)
        return folder

    return save


@pytest.fixture
def nli(tmp_path):
    """A file of NLI-shaped items: one instruction, premises of two or three hypotheses."""
    rows, ask = [], "Does the premise entail the hypothesis? Answer entailment, neutral or contradiction.\n\n"
    for i in range(24):
        prompt = f"{ask}Premise: {'A man rides. ' * (i // 3 + 1)}\nHypothesis: Number {i} sleeps."
        counts = {"entailment": i % 3, "neutral": 2, "contradiction": i % 2}
        rows.append({"id": str(i), "prompt": prompt, "counts": counts, "group": str(i // 3)})
    return str(write_rows(tmp_path / "votes.jsonl", rows))


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """A recipe's command line, in this process; returns the page it printed, a text a name."""
    monkeypatch.chdir(tmp_path)

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        common.main(settings_of(name))
        lines = [line for line in capsys.readouterr().out.splitlines() if line[11:12] == " "]
        return {line[:11].strip(): line[12:] for line in lines}

    return run


@pytest.mark.parametrize("name", fast("mistral7b"))
def test_a_dry_run_says_what_a_run_would_do(name, outline, nli, call, tmp_path, monkeypatch):
    command = [name, "--train", nli, "--model", outline(name), "--dry_run"]
    names = "backend model weights trained optimizer passes labels items tokens memory steps"
    said = call(*command)
    assert list(said) == names.split() and not (tmp_path / "runs").exists()  # nothing is written
    billions = float(said["model"].split(": ")[1].split()[0])
    assert billions == pytest.approx(float(BACKBONES[name][1]), rel=0.005)
    on = "a CPU" if name == "smollm" and not torch.cuda.is_available() else "CUDA"
    assert f"none of them loaded, planned for {on}" in said["model"]
    assert said["optimizer"].startswith("AdamW" if name == "smollm" else "8-bit AdamW")
    assert "no card here to compare with" in said["memory"] or on == "a CPU" or torch.cuda.is_available()
    targets = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    targets = "down_proj, gate_up_proj, o_proj, qkv_proj" if name == "phi4" else targets
    assert said["trained"].endswith(f"LoRA of rank 16 on {targets}")
    endings = {"qwen2.5": "assistant\n", "mistral_v3": "[/INST]", "llama3_1": "<|end_header_id|>\n\n"}
    endings |= {"qwen3": "<think>\n\n</think>\n\n", "gemma3": "<start_of_turn>model\n"}
    frame = distjudge.PromptEncoder(distjudge.load_tokenizer(str(command[4]))).frame
    assert frame["after"].endswith(endings[BACKBONES[name][2]])
    if name == "mistral7b":
        trained = 16 * 32 * (2 * 8192 + 2 * 5120 + 3 * 18_432)  # rank, layers, inputs and outputs
        assert said["trained"].startswith(f"{trained:,} weights in float32")
        assert "packs of at most 4,096 tokens (asked for), attention by SDPA in blocks" in said["passes"]
        spelled = "entailment: 'ent', neutral: 'neutral', contradiction: 'contrad'"
        assert f"by the first token of the answer: {spelled}" in said["labels"]
        command.append("--no_gradient_checkpointing")
        needed = float(re.search(r"about (\S+) GiB", call(*command)["memory"])[1])
        for card, fits in ((24, "as it is: "), (needed - 0.1, "--"), (2, "nothing does: ")):
            planned = call(*command, "--card_gib", card)
            assert f"of {card:.1f} (--card_gib)" in planned["memory"] and planned["fits"].startswith(fits)
            least = float(re.search(r"(\S+) GiB", planned["fits"])[1])
            assert (least <= card) == (card > 2) and least <= needed
        rows = [{"prompt": f"Rate {i}.", "counts": {"1": 1, "2": i % 2, "10": 1}} for i in range(10)]
        write_rows(Path(nli), rows)
        assert "2: '▁' '2' '</s>', 10: '▁' '1' '0' '</s>'" in call(*command)["labels"]
        monkeypatch.setattr(common, "FIRST", False)
        assert call(*command) == {}  # of several processes the first does the talking


@pytest.mark.slow
def test_help_is_the_page_and_the_settings(tmp_path):
    command = [sys.executable, str(ROOT / "recipes" / "mistral7b.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    shown = " ".join(done.stdout.replace("│", " ").split())  # without frame and line breaks
    assert done.returncode == 0 and "closed by </s>" in shown and "--dry_run" in shown
    assert "Model folder or hub id. (default: mistralai/Mistral-7B-Instruct-v0.3)" in shown


def test_the_page_counts_what_training_computes(tiny_model, votes, tmp_path, monkeypatch):
    """An outline counts what a loaded model counts, and training takes the passes that were planned."""
    config = common.RunConfig(out=str(tmp_path), lora_rank=4, epochs=1.0, save_every=0, pack_tokens=60)
    items, batch, computed = votes(20), distjudge.Judge.batch, []
    judges = [load_judge(tiny_model, ["1", "2", "3"], lora_rank=4, weights=w) for w in (True, False)]
    for judge in judges:
        judge.pack_tokens = config.pack_tokens
    loaded, outlined = (common.plan_lines(judge, items, items, config) for judge in judges)
    outlined["model"] = outlined["model"].replace(", none of them loaded, planned for a CPU", "")
    assert outlined == loaded

    def spied(judge, *arguments):
        computed.append(batch(judge, *arguments))
        return computed[-1]

    monkeypatch.setattr(distjudge.Judge, "batch", spied)
    distjudge.train(judges[0], items, config)
    passes = [made["input_ids"].numel() for made in computed]
    encoded = judge.encode([item.prompt for item in items])
    counted = [sum(map(len, encoded)), sum(passes), len(passes), max(passes)]
    assert [int(n.replace(",", "")) for n in re.findall(r"\d[\d,]*", loaded["tokens"])] == counted
    monkeypatch.setenv("WORLD_SIZE", "8")  # of each step of 8 items, or 4, the first process has one
    alone = [len(encoded[i]) for i in distjudge.epoch_order(encoded, config, 0)[::8]]
    assert common.first_epoch(judge, encoded, config)[0] == alone


def test_presets_come_before_flags(monkeypatch):
    seen = []
    monkeypatch.setattr(common, "run", seen.append)

    def parse(*arguments):
        monkeypatch.setattr(sys, "argv", ["qwen7b.py", "--train", "a.jsonl", *arguments])
        common.main(settings_of("qwen7b"))
        assert seen[-1].four_bit and seen[-1].batch_size == 16 and seen[-1].train == ("a.jsonl",)
        return tuple(getattr(seen[-1], name) for name in ("preset", "alpha", "eps", "teacher", "schedule"))

    assert parse("--preset", "kl", "--alpha", "0.9") == ("kl", 0.9, 0.0, 0.0, "linear")
    assert parse("--alpha", "0.9", "--preset=paper") == ("paper", 0.9, 0.25, 0.0, "linear")
    assert parse("--preset", "teacher") == ("teacher", 1.0, 0.0, 5.0, "constant")
    assert parse() == ("default", 0.8, 0.25, 0.0, "linear")
    for preset in distjudge.PRESETS.values():
        Config(**preset).check()
    for wrong in (["--preset", "nonesuch"], ["--preset"]):
        with pytest.raises(SystemExit, match="2"):
            parse(*wrong)


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "gemma3_text", "phi3"])
def test_activations_are_what_autograd_saves(architecture, tiny_tokenizer):
    """Counted by autograd's own hooks over a packed pass: Qwen2 in float32, the others in 16 bits."""
    shape = SMALL | dict(hidden_size=96, intermediate_size=272, num_hidden_layers=3, num_attention_heads=4)
    shape |= dict(vocab_size=len(tiny_tokenizer), num_key_value_heads=2, max_position_embeddings=2048)
    shape |= {"head_dim": 24} if architecture in ("qwen3", "gemma3_text") else {}
    dtype, size = (torch.float32, 4) if architecture == "qwen2" else (torch.bfloat16, 2)
    shape = transformers.AutoConfig.for_model(architecture, **shape)
    model = transformers.AutoModelForCausalLM.from_config(shape, dtype=dtype)
    judge = distjudge.make_judge(model, tiny_tokenizer, ["yes", "no"], lora_rank=8, max_length=1000)
    prompts = ["Is this fine? " * 20 + word + " good service bad" * 50 for word in "abcd"]
    batch, saved = judge.batch(judge.encode(prompts)), {}
    own = {w.untyped_storage().data_ptr() for w in [*judge.model.parameters(), *judge.model.buffers()]}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    judge.model.train()
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        distjudge.label_logprobs(judge.model, batch, judge.tokens)[0].sum()
    measured = sum(t.untyped_storage().nbytes() for t in saved.values())
    tokens = batch["input_ids"].numel()
    mlp = 3 * size * tokens * 272
    estimate = common.estimate_memory(judge, Config(), batch)["activations"] - mlp
    assert measured == pytest.approx(estimate, rel=0.03), (measured, estimate)
    config = Config(gradient_checkpointing=True)
    recomputed = common.estimate_memory(judge, config, batch)["activations"] - mlp
    assert recomputed == pytest.approx(estimate / 3 + 3 * size * tokens * 96)


def test_weights_are_what_bitsandbytes_holds(tmp_path, tiny_tokenizer, monkeypatch):
    pytest.importorskip("bitsandbytes")
    model, held = small_model("qwen7b", tmp_path, tiny_tokenizer, hidden_size=128, intermediate_size=256), 0
    judge = load_judge(model, ["yes", "no"], four_bit=True, lora_rank=4)
    for weight in judge.model.parameters():
        held += 0 if weight.requires_grad else weight.nbytes
        if state := getattr(weight, "quant_state", None):
            held += state.absmax.nbytes + state.state2.absmax.nbytes
    batch = judge.batch(judge.encode(["Is it?"]))
    estimate = common.estimate_memory(judge, Config(four_bit=True), batch)
    assert estimate["weights"] == pytest.approx(held, rel=1e-4)
    trained = sum(p.numel() for p in judge.model.parameters() if p.requires_grad)
    assert estimate["training"] == 16 * trained  # on a CPU: weights, gradients and both moments in float32
    monkeypatch.setattr(distjudge, "optimizer_is_8bit", lambda judge: True)
    assert common.estimate_memory(judge, Config(teacher=5.0), batch)["training"] == 14 * trained


@pytest.mark.parametrize("stored", [False, True])
def test_gradients_pass_through_4_bit_weights(stored, tmp_path, tiny_tokenizer, monkeypatch):
    """Against differences of the loss. Where a CPU has bfloat16, bitsandbytes would pack the weights."""
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    model = small_model("llama8b", tmp_path / "model", tiny_tokenizer, hidden_size=64, num_hidden_layers=3)
    if stored:  # a base that exists in 4 bits only
        settings = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        base = transformers.AutoModelForCausalLM.from_pretrained(model, quantization_config=settings)
        base.save_pretrained(model)
    judge = load_judge(model, ["yes", "no"], four_bit=not stored, lora_rank=4, device="cpu")
    assert judge.model.is_loaded_in_4bit
    assert not any(getattr(m, "support_avx512bf16_for_cpu", False) for m in judge.model.modules())
    draw = torch.Generator().manual_seed(0)
    for weight in filter(lambda weight: weight.requires_grad, judge.model.parameters()):
        weight.data += 0.1 * torch.randn(weight.shape, generator=draw)
    batch = judge.batch(judge.encode(["Is this fine?", "good soup"]))

    def loss():
        return distjudge.label_logprobs(judge.model, batch, judge.tokens)[0][:, 0].sum()

    judge.score(["Is this fine?"])
    judge.model.train()
    loss().backward()
    first = [w for name, w in judge.model.named_parameters() if w.requires_grad and "layers.0." in name]
    slope, step, ends = sum((w.grad * w.grad).sum().item() for w in first), 1e-3, []
    moves = [step * w.grad / slope**0.5 for w in first]
    with torch.no_grad():
        for sign in (1, -2):
            for weight, move in zip(first, moves, strict=True):
                weight += sign * move
            ends.append(loss().item())
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(slope**0.5, rel=0.02)


def test_smollms_epochs_and_rate_go_by_the_number_of_items(nli, tiny_model, call):
    for items, epochs, rate in ((50, 8, 1e-3), (300, 4, 1e-3), (4000, 2, 1e-3), (4001, 2, 3e-4)):
        config = settings_of("smollm")()
        config.settle(items)
        assert (config.epochs, config.learning_rate) == (epochs, rate)
        config = settings_of("smollm")(epochs=1.0, learning_rate=0.0)
        config.settle(items)
        assert (config.epochs, config.learning_rate) == (1, 0)
    page = call("smollm", "--train", nli, "--model", tiny_model, "--dry_run")
    assert "learning rate 0.001, linear" in page["optimizer"] and page["steps"].endswith("in 8 epochs")


def test_what_a_run_came_to_beside_the_mean_and_a_stopped_run_that_is_not_lost(tiny_model, nli, tmp_path):
    metrics = {"items": 9, "kl": 0.5, "kl_marginal": 0.6, "kl_noise_floor": None, "accuracy": 0.5}
    metrics |= {"people": 5.0, "people_low": 3.0, "people_high": None, "people_marginal": 2.04}
    said = common.outcome(metrics, "runs/x")
    assert "worth 5.0 [3.0, inf] people (the mean of the training votes, whatever the item: 2.0)" in said
    assert "no nearer" not in said and "no nearer to the votes" in common.outcome(metrics | {"kl": 0.6}, "x")
    # the mean is as near as the votes can tell; or there is one vote an item, and nothing is known
    assert "the item: inf)" in common.outcome(metrics | {"people_marginal": None}, "x")
    unknown = dict.fromkeys(("people", "people_low", "people_marginal"))
    assert "worth – people" in (said := common.outcome(metrics | unknown, "x")) and "the item: –)" in said
    config = common.RunConfig(
        train=(nli,), model=str(tiny_model), out=str(tmp_path), min_mass=0, batch_size=9
    )
    (tmp_path / "checkpoints").mkdir()
    left = tmp_path / "checkpoints" / f"step-{12:09d}-{'0' * 64}.pt"
    left.touch()
    with pytest.raises(InputError, match="holds a run that was stopped after step 12: --resume goes on; or"):
        common.run(config)
    assert left.exists()
    (tmp_path / "metrics.json").touch()
    os.utime(tmp_path / "metrics.json", (0, 0))  # an earlier run was whole, and one after it was stopped
    with pytest.raises(InputError, match="holds a run that was stopped after step 12"):
        common.run(config)
    (tmp_path / "metrics.json").touch()  # a whole run is made again
    assert common.run(config)["items"] and not left.exists()


def test_a_model_that_says_other_things_is_refused(tiny_model, nli, tmp_path, monkeypatch, capsys, caplog):
    """Random weights put a few thousandths on three labels of 500 tokens."""
    settings = {"train": (nli,), "model": str(tiny_model), "answer": 0.0, "out": str(tmp_path / "run")}
    config = common.RunConfig(**settings)
    said = r"labels hold 0\.\d\d% of the model's probability on the first 16 items .* than min_mass 0\.01"
    with pytest.raises(InputError, match=said):
        common.run(config)
    assert not (tmp_path / "run").exists() and "passes" in capsys.readouterr().out  # the page came first
    judge, items = load_judge(tiny_model, ["yes", "no"]), distjudge.load_items(nli)[:4]
    stays, learns = "so it will stay without --answer 1", "training teaches it to answer with one"
    cases = (0.3, 0.0, 0.01, stays), (0.7, 0.0, 0.01, ""), (0.3, 0.0, 0.0, stays), (0.001, 1.0, 0.01, learns)
    for mass, answer, least, warned in cases:
        monkeypatch.setattr(judge, "score", lambda prompts, mass=mass: (None, torch.full((4,), mass)))
        caplog.clear()
        said = common.check_mass(judge, items, answer, least)
        assert said.startswith(f"{mass:.2%} of the model's probability on the first 4 items")
        assert warned in caplog.text and bool(caplog.text) == bool(warned)
    with pytest.raises(InputError, match=r"min_mass: must be between 0 and 1, not 1\.5"):
        common.run(dataclasses.replace(config, min_mass=1.5))


@pytest.mark.parametrize("name", fast("gemma3_4b", "phi4"))
def test_every_recipe_trains(name, nli, call, tmp_path, tiny_tokenizer):
    """Its own settings, 4-bit weights included, on a small model: losses fall, the judge comes back."""
    pytest.importorskip("bitsandbytes")
    model = small_model(name, tmp_path / "model", tiny_tokenizer)
    settings = "--min_mass 0 --epochs 8 --learning_rate 0.01 --batch_size 10 --save_every 0 --eps 0"
    said, out = call(name, "--train", nli, "--model", model, *settings.split()), tmp_path / "runs" / name
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in log if "loss" in row]
    assert len(losses) == 16 and sum(losses[-4:]) < 0.95 * sum(losses[:4]), losses
    assert "of the model's probability" in said["label mass"]
    rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    judge = load_judge(out)
    assert bool(getattr(judge.model, "is_loaded_in_4bit", False)) == (name != "smollm")
    again = judge.predict([row["prompt"] for row in rows])
    assert again.tolist() == [pytest.approx(list(row["predicted"].values()), abs=1e-5) for row in rows]
    adapted = {key for key, weight in judge.model.named_parameters() if weight.requires_grad}
    assert adapted and not any("vision" in key for key in adapted)


@pytest.mark.parametrize("name", BACKBONES)
def test_a_recipe_is_a_page_that_says_what_it_needs(name):
    text, config_class = (ROOT / "recipes" / f"{name}.py").read_text(), settings_of(name)
    assert len(text.splitlines()) <= 28 and text.count("def ") == 0
    doc = " ".join(importlib.import_module(name).__doc__.split())
    assert f"python recipes/{name}.py --train votes.jsonl --dry_run" in doc
    assert "estimated" in doc and "measured" in doc
    config_class().check()
    assert set(vars(config_class)["__annotations__"]) <= {field.name for field in dataclasses.fields(Config)}
    assert config_class().out == f"runs/{name}"
