"""After training: merged models and GGUF files against the judge, the model card, the upload."""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import sys
import time
import types
from pathlib import Path
from unittest.mock import Mock

import distjudge
from distjudge import Config, InputError, load_judge

import export
import huggingface_hub
import pytest
import torch
from conftest import change_json
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

PROMPTS = ["Rate 1: good soup", "Rate 2: bad service and bad soup"]
LARGEST = "largest difference in a probability"
TO_BASE, TO_JUDGE = "merged weights against their base with the adapter", "merged weights against the judge"
TO_4_BIT, GGUF = "merged weights against the 4-bit judge", "GGUF file against the judge"


def do(folder, form="none", **settings):
    """export.py on a run folder; returns export.json, if one was made."""
    export.main(export.ExportConfig(run=str(folder), export=form, **settings))
    return export.read(folder / form.removesuffix("-unchecked") / "export.json")


COMMAND, FAILURES = (export.main, export.ExportConfig), (export.ExportError,)


def save_tuned(base, folder, labels=("1", "2", "3"), **options):
    """Saves a judge whose adapters are not zero, as if it had been trained."""
    judge, draw = load_judge(base, labels, **{"lora_rank": 4} | options), torch.Generator().manual_seed(0)
    for weight in judge.model.parameters() if hasattr(judge.model, "peft_config") else ():
        if weight.requires_grad:
            weight.data += 0.1 * torch.randn(weight.shape, generator=draw)
    distjudge.save_judge(judge, folder)
    return judge


def plain(model, judge, prompts=PROMPTS):
    """Label probabilities with nothing of ours but the token ids: the logits of the last position."""
    ids = [sequence[0] for _, sequence in judge.tokens.sequences]
    with torch.no_grad():
        rows = [model(input_ids=torch.tensor([row])).logits[0, -1, ids] for row in judge.encode(prompts)]
    return torch.stack(rows).float().softmax(-1)


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory):
    """A run folder of a LoRA judge that training changed, exported as a merged model; and its metrics."""
    folder, rows = tmp_path_factory.mktemp("export"), []
    for i in range(36):
        row = {"id": i, "prompt": f"Rate {i}: {'good' if i % 2 else 'bad'} soup", "group": f"g{i // 2}"}
        counts, split = {"1": 3 * (i % 2), "2": 1, "3": i % 3}, "train" if i < 24 else "test"
        rows.append(json.dumps(row | {"counts": counts, "split": split}))
    (folder / "votes.jsonl").write_text("\n".join(rows))
    settings = {"learning_rate": 2e-2, "epochs": 3.0, "lora_rank": 4, "save_every": 0.0}
    votes, out = (str(folder / "votes.jsonl"),), folder / "run"
    base = shutil.copytree(tiny_model, folder / "base")
    metrics = distjudge.run(Config(train=votes, out=str(out), model=str(base), **settings))
    (base / "tokenizer.model").write_text("pieces")  # for llama.cpp's converter, as the next
    change_json(base / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    do(out, "merged")
    return out, metrics


@pytest.fixture
def copy(run, tmp_path):
    """The run folder, without its export, to be changed."""
    return Path(shutil.copytree(run[0], tmp_path / "run", ignore=lambda *_: ["merged"]))


# --- merged -----------------------------------------------------------------------------------------------
def test_a_merged_model_is_the_judge_and_says_how_far_it_is_off(run):
    folder, judge = run[0], load_judge(run[0], bf16=False)
    merged = plain(AutoModelForCausalLM.from_pretrained(folder / "merged"), judge)
    assert (merged - torch.as_tensor(judge.predict(PROMPTS))).abs().max() < 1e-5
    assert AutoTokenizer.from_pretrained(folder / "merged").chat_template == judge.tokenizer.chat_template
    report = export.read(folder / "merged" / "export.json")
    assert report["compared_items"] == 12 and report["dtype"] == "float32"
    assert report["changed_by_training"] > 0.05
    assert max(report[to][LARGEST] for to in (TO_BASE, TO_JUDGE)) < report[TO_BASE]["bound"] == 1e-4
    assert report[TO_JUDGE]["bound"] == 1e-4 and not (folder / "merged.part").exists()


def test_a_prompt_may_hold_any_line_separator(copy, tiny_model):
    row = {"id": "1", "prompt": "One\u2028two\u0085three", "counts": {"1": 1, "2": 1}}
    row |= {"predicted": {"1": 0.5, "2": 0.5}}
    (copy / "predictions.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    judge = distjudge.load_judge(tiny_model, ["1", "2"], lora_rank=0)
    assert export.prompts_of(copy, judge) == [row["prompt"]]
    assert "| `kl` |" in export.metrics_section(copy)


def test_16_bits_are_allowed_their_rounding_and_no_more(copy, tiny_model, tmp_path):
    """A judge in float32 of a base stored in 16 bits; as on a GPU, a judge in 16 bits of one in float32."""
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "base")
    save_tuned(tmp_path / "base", tmp_path / "stored")
    stored, judge = do(tmp_path / "stored", "merged"), load_judge(copy, bf16=False)
    judge.model.to(torch.bfloat16)
    export.export_judge(judge, export.ExportConfig(run="", export="merged"), copy, copy / "merged")
    for report in (stored, export.read(copy / "merged" / "export.json")):
        assert report["dtype"] == "bfloat16" and report[TO_BASE]["bound"] == report[TO_JUDGE]["bound"] == 0.05
        assert 1e-6 < report[TO_JUDGE][LARGEST] < 0.05 and report[TO_BASE][LARGEST] < 0.05
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("base", "stored/merged")]
    assert stored["compared_items"] == len(export.PROBES) and sizes[1] < 1.1 * sizes[0]


def test_a_merge_that_loses_the_adapter_is_deleted(copy, monkeypatch, ended):
    """Exit code 1, one line, no folder, and a card that speaks of no export."""
    monkeypatch.setattr(PeftModel, "merge_and_unload", lambda self, **_: self.unload(), raising=False)
    code, said = ended(*COMMAND, "--run", copy, "--export", "merged", failures=FAILURES)
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code == 1 and len(lines) == 1
    assert f"{TO_BASE}: {LARGEST} 0." in lines[0] and "0.0001 is allowed" in lines[0]
    assert not list(copy.glob("merged*")) and "## `merged`" not in (copy / "README.md").read_text()


def test_a_judge_on_4_bit_weights_is_merged_into_the_unrounded_base(tiny_model, tmp_path, monkeypatch):
    """The result is that base with the adapter; the gap to the 4-bit judge is reported, and bounded."""
    pytest.importorskip("bitsandbytes")
    judge = save_tuned(tiny_model, tmp_path, four_bit=True)
    report = do(tmp_path, "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert (plain(merged, judge) - plain(base, judge)).abs().max() > 0.01
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert (plain(merged, judge) - plain(adapted, judge)).abs().max() < 1e-5
    own = torch.as_tensor(judge.predict(export.PROBES))
    gap = (plain(merged, judge, export.PROBES) - own).abs().sum(1).mean().item() / 2
    assert report[TO_4_BIT]["mean total variation"] == pytest.approx(gap, abs=1e-6)
    assert 1e-5 < gap < report[TO_4_BIT]["bound"] == 0.1
    assert report[TO_BASE][LARGEST] < report[TO_BASE]["bound"] == 1e-4
    monkeypatch.setitem(export.BOUNDS, "fewer bits", (export.MEAN, gap / 2))
    with pytest.raises(export.ExportError, match="the 4-bit judge: mean total variation"):
        do(tmp_path, "merged", out=str(tmp_path / "again"))
    assert not list(tmp_path.glob("again*"))


def test_a_run_of_all_weights_and_labels_that_would_break_the_page(tiny_model, tmp_path):
    labels = ["a|b", "```", "<b>no</b>"]
    save_tuned(tiny_model, tmp_path, labels, lora_rank=0)
    report, card = do(tmp_path, "merged"), (tmp_path / "README.md").read_text()
    assert not {"changed_by_training", TO_BASE} & set(report) and report[TO_JUDGE][LARGEST] < 1e-6
    base, tokens = card.split("\n````\n")[1::2][:2]  # longer fences than what they hold
    assert "all weights trained\nlabels: a|b, ```, <b>no</b>\n" in base
    assert [line.split(": '")[0] for line in tokens.splitlines()] == labels
    assert "<b>" not in card.replace(base, "").replace(tokens, "")
    assert "## Metrics" not in card and "## Data" not in card  # not a run


# --- what cannot be done ------------------------------------------------------------------------------------
CANNOT = {
    "--export gguf": "export: gguf needs llama-cpp-python, not installed here",
    "--export gguf-unchecked": "llama_cpp: gguf needs a clone of llama.cpp: git clone https://",
    "--export merged --llama_cpp .": "llama_cpp: is for --export gguf, not merged",
    "--export merged --quantization f16": "quantization: is for --export gguf, not merged",
    "--out elsewhere": "out: the model card goes into the run folder",
    "--export gguf-unchecked --llama_cpp .": "convert_hf_to_gguf.py is not there: git clone",
    "--export merged --out {run}": "exists already",
    "--export onnx": "onnx",
    "--push_to_hub me/judge": "push_to_hub: others do not have the base model",
    "--push_to_hub me/judge --export merged --out {run}/m": "base: leave out --out",
    "--push_to_hub me/judge --export merged": "push_to_hub: no token",
    "--run {run}/adapter": "not a run folder: there is no judge.json",
}


@pytest.mark.parametrize(("flags", "words"), CANNOT.items())
def test_what_cannot_be_done_is_said_at_once(flags, words, copy, monkeypatch, ended):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    monkeypatch.setattr(export, "load_judge", lambda *_, **__: pytest.fail("the model was loaded"))
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    before = sorted(copy.rglob("*"))
    code, said = ended(*COMMAND, "--run", copy, *flags.format(run=copy).split(), failures=FAILURES)
    assert code == 2 and words in " ".join(said.split()) and sorted(copy.rglob("*")) == before


def test_a_base_that_cannot_be_merged_into(tiny_model, tmp_path):
    base, run = shutil.copytree(tiny_model, tmp_path / "base"), tmp_path / "run"
    save_tuned(base, run)
    quantized = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    change_json(base / "config.json", quantization_config=quantized)
    with pytest.raises(InputError, match="holds quantized weights"):
        do(run, "merged")
    shutil.rmtree(base)
    with pytest.raises(InputError, match="base: model: cannot be loaded"):
        do(run, "merged")
    (run / "judge.json").write_text("{")
    with pytest.raises(InputError, match=r"judge\.json: broken JSON"):
        do(run, "merged")


def test_a_machine_too_small_to_merge_is_told_at_once(tmp_path, monkeypatch):
    """Free Colab has 12.7 GiB and a card of 15: 7.6 billion weights are 14.2 GiB in 16 bits, 28.4 in 32."""
    sizes = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "vocab_size": 152064}
    Qwen2Config(**sizes, num_attention_heads=28, num_key_value_heads=4).save_pretrained(tmp_path)
    fit = {(31, 15, True): "cpu", (12.7, 24, True): "cuda", (31, 0, False): "cpu"}
    for main, card, adapters in (*fit, (12.7, 15, True), (12.7, 0, True), (12.7, 24, False)):
        monkeypatch.setattr(export, "room", lambda here=(main, card): [size * 2**30 for size in here])
        needs, place = "14.2" if adapters and card else "28.4", fit.get((main, card, adapters))
        words = f"needs {needs} GiB for 7.6 billion weights, and there are 12.7 of main memory"
        with contextlib.nullcontext() if place else pytest.raises(InputError, match=words):
            assert export.check_base(str(tmp_path), adapters) == place


# --- GGUF: llama.cpp is played, but for the last test -------------------------------------------------------
class Llama:
    """llama_cpp.Llama as far as it is used, computing with the model of a judge."""

    judge = None

    def __init__(self, model_path, n_ctx, logits_all, verbose):
        assert Path(model_path).read_bytes()[:4] == b"GGUF" and logits_all and not verbose
        self.n_ctx = n_ctx
        torch.set_num_threads(1)  # in a fork, torch's other threads are gone

    def tokenize(self, text, add_bos, special):
        return self.judge.tokenizer(text.decode(), add_special_tokens=add_bos)["input_ids"]

    def reset(self):
        self.ids = []

    def eval(self, tokens):
        self.ids += tokens
        assert len(self.ids) <= self.n_ctx
        with torch.no_grad():
            self.scores = self.judge.model(input_ids=torch.tensor([self.ids])).logits[0].float().numpy()


CONVERT = """
import json, sys
from pathlib import Path
if "--help" not in sys.argv:
    folder = Path(sys.argv[1])
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert (folder / "model.safetensors").is_file() and config["added_tokens_decoder"]["0"]["special"]
    assert config["tokenizer_class"] == "GPT2Tokenizer" and (folder / "tokenizer.model").is_file()
    Path(sys.argv[3]).write_text("GGUF " + sys.argv[5])
"""


def play(monkeypatch, name, **content):
    monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(__spec__="played", **content))


@pytest.fixture
def clone(copy, tmp_path, monkeypatch):
    """A clone of llama.cpp whose converter looks at what it is given; llama-cpp-python is played."""

    def quantize(source, out, options):
        Path(out.decode()).write_bytes(Path(source.decode()).read_bytes() + bytes([options.ftype]))

    options = {"LLAMA_FTYPE_MOSTLY_Q4_K_M": 15, "llama_model_quantize_default_params": types.SimpleNamespace}
    play(monkeypatch, "llama_cpp", Llama=Llama, llama_model_quantize=quantize, **options)
    play(monkeypatch, "sentencepiece")
    monkeypatch.setattr(Llama, "judge", load_judge(copy, bf16=False))
    monkeypatch.setattr(export, "START", "fork")  # what is played is there too
    (tmp_path / "convert_hf_to_gguf.py").write_text(CONVERT)
    return str(tmp_path)


@pytest.mark.parametrize(("kind", "content"), [("q8_0", b"GGUF q8_0"), ("q4_k_m", b"GGUF auto\x0f")])
def test_a_gguf_file_is_compared_and_kept(kind, content, copy, clone, monkeypatch, capsys, caplog):
    first = json.loads((copy / "predictions.jsonl").read_text().splitlines()[0])["prompt"].encode()
    alike = Llama.tokenize
    odd = lambda self, text, **options: [0] if first in text else alike(self, text, **options)  # noqa: E731
    monkeypatch.setattr(Llama, "tokenize", odd)
    report, name = do(copy, "gguf", quantization=kind, llama_cpp=clone), f"model.{kind.upper()}.gguf"
    assert sorted(path.name for path in (copy / "gguf").iterdir()) == ["export.json", name]
    assert (copy / "gguf" / name).read_bytes() == content and report["quantization"] == kind
    unit = LARGEST if kind == "q8_0" else "mean total variation"
    assert report[GGUF][unit] < 1e-5 and report[GGUF]["bound"] == 0.1 and report[TO_BASE][LARGEST] < 1e-4
    assert report["compared_items"] == 12 and report["prompts_tokenized_alike"] == 11
    assert "llama.cpp tokenizes 1 of 12 prompts otherwise than the judge does" in caplog.text
    assert GGUF in capsys.readouterr().out
    assert "## `gguf`\n\nRead back and compared with the judge" in (copy / "README.md").read_text()


def test_a_gguf_file_that_is_not_compared(copy, clone, monkeypatch, caplog):
    monkeypatch.setattr(Llama, "__init__", lambda *_, **__: pytest.fail("compared"))
    export.main(export.ExportConfig(run=str(copy), export="gguf-unchecked", llama_cpp=clone))
    assert export.read(copy / "gguf" / "export.json")["compared_items"] == 0
    assert "not compared with the judge" in caplog.text
    assert "**Not compared with** the judge" in (copy / "README.md").read_text()


def test_a_gguf_files_whole_labels(tiny_model, tmp_path, clone, monkeypatch):
    """Labels of which some begin alike are scored over all their tokens, as the judge does."""
    judge = load_judge(tiny_model, ["1", "10", "2"], lora_rank=4)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(Llama, "judge", judge)
    found = export.gguf_logprobs(tmp_path / "m.gguf", judge, PROMPTS)[0]
    assert judge.tokens.whole and (found - judge.score(PROMPTS)[0]).abs().max() < 1e-4


def test_what_llama_cpp_cannot_do_is_said_and_leaves_nothing(copy, clone, tiny_model, monkeypatch):
    script, find = Path(clone, "convert_hf_to_gguf.py"), importlib.util.find_spec

    def refused(error, words, kind="q8_0", form="gguf", missing="", code=CONVERT):
        hide = lambda name: None if name == missing else find(name)  # noqa: E731
        monkeypatch.setattr(importlib.util, "find_spec", hide)
        script.write_text(code)
        with pytest.raises(error, match=words):
            do(copy, form, quantization=kind, llama_cpp=clone)
        assert not list(copy.glob("gguf*"))

    refused(InputError, "must be one of f32, f16, bf16, q8_0, q4_k_m, not iq2_xxs", "iq2_xxs")
    refused(InputError, "bf16, q8_0, not q4_k_m", "q4_k_m", "gguf-unchecked", missing="llama_cpp")
    refused(InputError, "sentencepiece: pip install gguf sentencepiece", missing="sentencepiece")
    refused(InputError, "failed: ModuleNotFoundError: No module named 'no_such'", code="import no_such")
    killed = "import os, sys\nprint('45 %', file=sys.stderr, flush=True)\nos.kill(os.getpid(), 9)"
    refused(InputError, "convert_hf_to_gguf.py failed: exit code -9$", code=killed)
    unknown = "import sys\nsys.exit('BPE is not known' if '--outfile' in sys.argv else 0)"
    refused(export.ExportError, "failed: BPE is not known", code=unknown)
    monkeypatch.setattr(sys.modules["llama_cpp"], "llama_model_quantize", lambda *_: 1)
    refused(export.ExportError, r"could not quantize the file to q4_k_m .exit code 1", "q4_k_m")
    with monkeypatch.context() as patch:
        patch.setattr(Llama, "eval", lambda *_: time.sleep(0.2) or os.kill(os.getpid(), signal.SIGKILL))
        refused(export.ExportError, "^gguf: llama.cpp crashed .exit code -9.$")
        patch.setattr(Llama, "eval", lambda *_: 1 / 0)
        refused(export.ExportError, "^gguf: llama.cpp crashed .division by zero.$")
    monkeypatch.setattr(Llama, "judge", load_judge(tiny_model, ["1", "2", "3"]))  # the adapter is lost
    refused(export.ExportError, f"{GGUF}: {LARGEST} 0.*, and 0.1 is allowed: deleted")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "most"), [("f16", 1e-3), ("q8_0", 0.01), ("q4_k_m", 0.05)])
@pytest.mark.parametrize("name", "qwen7b llama8b qwen3_4b qwen3_8b gemma3_4b phi4 smollm".split())
def test_a_gguf_file_judges_as_the_judge_does(name, kind, most, llama_cpp_clone, tokenizers_dir, tmp_path):
    """llama.cpp itself, on a LoRA judge of a small random model; the base alone would be off by over 0.1."""
    import llama_cpp
    from test_backbones import BACKBONES, save_tokenizer, small_model

    tokens = "llama3_1" if name == "phi4" else BACKBONES[name][2]  # both are made of cl100k
    save_tokenizer(tokens, tokenizers_dir, tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    sizes = {"hidden_size": 256, "intermediate_size": 256, "initializer_range": 0.03}
    if name == "gemma3_4b":  # llama.cpp has its pattern of six layers built in
        sizes["layer_types"] = ["sliding_attention"] * 2
    unused = 0 if name in ("gemma3_4b", "smollm") else 5  # not in what llama.cpp makes of their stand-ins
    base = small_model(name, tmp_path / "base", tokenizer, unused, **sizes)
    if kind == "q4_k_m":  # of 16-bit weights, as they are published
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    if name == "phi4":
        change_json(base / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    save_tuned(base, tmp_path / "run", ("entailment", "neutral", "contradiction"))
    report = do(tmp_path / "run", "gguf", llama_cpp=llama_cpp_clone, quantization=kind)
    moved = report["changed_by_training"]
    off = report[GGUF]["mean total variation" if kind == "q4_k_m" else LARGEST]
    print(f"\n{name} {kind}: changed by {moved:.3f}, off by {off:.2g}")
    assert moved > 0.1 and off < most
    assert report["prompts_tokenized_alike"] == report["compared_items"] == 3
    file = str(next((tmp_path / "run" / "gguf").glob("*.gguf")))
    stored = int(llama_cpp.Llama(file, n_ctx=64, verbose=False).metadata["general.file_type"])
    assert stored == getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")


# --- the model card -----------------------------------------------------------------------------------------
def test_the_card_says_what_the_folder_holds_and_its_code_runs(run, monkeypatch):
    monkeypatch.setattr(distjudge, "multiplies_bf16", lambda device: False)  # PEFT alone is in float32
    folder, metrics = run
    card, judge = (folder / "README.md").read_text(), load_judge(folder)
    head = card.split("---")[1]
    assert "library_name: peft" in head and "base_model" not in head  # a local folder is no hub id
    row = next(line for line in card.splitlines() if line.startswith("| `kl` |"))
    _, _, value, interval, _ = row.split("|")
    low, high = map(float, interval.split(" to "))
    assert float(value) == pytest.approx(metrics["kl"], abs=5e-4) and low < float(value) < high
    settings = json.loads(card.split("## Data and settings\n\n```\n")[1].split("```")[0])
    items = distjudge.load_items(folder.parent / "votes.jsonl")
    assert settings["train"] == ["votes.jsonl"] and settings["items"] == {"train": 24, "test": 12}
    assert settings["votes"]["train"] == sum(item.votes for item in items[:24])
    assert settings["learning_rate"] == 0.02 and settings["versions"]["torch"] == torch.__version__
    assert "<|user|>{prompt}<|end|><|judge|>" in card
    for label, ids in judge.tokens.sequences:
        assert f"\n{judge.labels[label]}: '{judge.labels[label]}' [{ids[0]}]\n" in card
    assert str(folder.parent) not in card and "soup" not in card  # no path of this machine, no item
    # both ways to load, with the card's names filled in; PEFT's is the judge, and not its base
    scope = {"prompt": PROMPTS[0]}
    blocks = [block.split("```")[0] for block in card.split("```python\n")[1:]]
    for block in blocks:
        exec(block.replace('"RUN', f'"{folder}').replace('"BASE"', f'"{folder.parent / "base"}"'), scope)
    own = torch.as_tensor(judge.predict(PROMPTS))
    # others lack the base: without the merged model the card says so
    assert "`merged`, in the folder of this card, is" in card and scope["judge"].base != judge.base
    assert (torch.as_tensor(scope["judge"].predict(PROMPTS)) - own).abs().max() < 1e-5
    monkeypatch.setattr(export, "export_of", lambda folder, name: {})
    alone = export.model_card(folder)
    assert "Its base model must be where it was" in alone and 'load_judge("RUN")' in alone
    assert len(blocks) == 2 and (plain(scope["model"], scope["judge"]) - own).abs().max() < 1e-5
    with scope["model"].disable_adapter():
        assert (plain(scope["model"], scope["judge"]) - own).abs().max() > 0.05


# --- the upload ---------------------------------------------------------------------------------------------
def test_upload_without_what_is_private_or_of_another_judge(run, tmp_path, monkeypatch, capsys):
    folder, create, upload = shutil.copytree(run[0], tmp_path / "run"), Mock(), Mock()
    create.return_value.repo_id = "me/judge"
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_this_test")
    private = {"checkpoints/step-1/a.pt", "gguf.part/b.gguf", "plots/bars.png", "adapter/README.md"}
    for name in (*private, "plots/kl.png", "gguf/old.gguf"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    (folder / "gguf" / "export.json").write_text('{"judge": "another"}')
    fitted = {"calibration": {"temperature": 2.0, "bias": [0.0, 0.0], "items": 9}}
    # what was exported stays this judge's
    distjudge.write_saved(folder, distjudge.read_saved(folder) | fitted)
    do(folder, push_to_hub="judge")
    create.assert_called_once_with("judge", private=True, exist_ok=True)
    asked, shown = upload.call_args.kwargs, capsys.readouterr()
    assert set(asked) == {"repo_id", "folder_path", "ignore_patterns"}  # no token: the client has its own
    here = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.*") if path.is_file()}
    sent = {*huggingface_hub.utils.filter_repo_objects(here, ignore_patterns=asked["ignore_patterns"])}
    assert {"README.md", "judge.json", "metrics.json", "plots/kl.png", "merged/model.safetensors"} <= sent
    assert "adapter/adapter_model.safetensors" in sent and asked["folder_path"] == folder
    assert not sent & {*private, "predictions.jsonl", "gguf/export.json", "gguf/old.gguf"}
    content = b"".join(here[name].read_bytes() for name in sent)
    assert b"good soup" not in content and b"hf_secret" not in content and b"## `gguf`" not in content
    assert "uploaded to me/judge" in shown.out and "hf_secret" not in shown.out + shown.err
    before = sorted(folder.rglob("*"))
    for step, error in ((upload, export.ExportError), (create, InputError)):
        step.side_effect = OSError("403 Forbidden: over your quota\nRequest id 12")
        with pytest.raises(error, match="judge: 403 Forbidden: over your quota"):
            do(folder, push_to_hub="judge")
    assert sorted(folder.rglob("*")) == before
