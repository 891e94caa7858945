"""After training: merged models and GGUF files against the judge, the adapter in plain PEFT, the model card, the upload."""
import hashlib
import http.server
import importlib.machinery
import importlib.util
import json
import shutil
import sys
import threading
import types
from pathlib import Path

import export
import pytest
import torch

import distjudge
from distjudge import Config, ExportError, InputError, load_judge

PROMPTS = ["Rate 1: good soup", "Rate 2: bad service and bad soup"]


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory):
    """A run folder made by distjudge.run() with --export merged, and its metrics: a LoRA judge that training changed."""
    folder = tmp_path_factory.mktemp("export")
    rows = [{"id": i, "prompt": f"Rate {i}: {'good' if i % 2 else 'bad'} soup", "counts": {"1": 3 * (i % 2), "2": 1, "3": i % 3},
             "group": f"g{i // 2}", "split": "train" if i < 24 else "test"} for i in range(36)]
    (folder / "votes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = distjudge.run(Config(train=(str(folder / "votes.jsonl"),), out=str(folder / "run"), model=str(tiny_model), learning_rate=2e-2,
                                   epochs=3.0, lora_rank=4, export="merged", save_every=0.0))
    return folder / "run", metrics


@pytest.fixture
def copy(run, tmp_path):
    """The run folder, without its export, to be changed."""
    shutil.copytree(run[0], tmp_path / "run", ignore=lambda folder, names: ["merged"])
    return tmp_path / "run"


def plain_probabilities(model, judge, prompts):
    """Label probabilities with nothing of ours but the token ids: the logits of the last position."""
    ids = [sequence[0] for _, sequence in judge.tokens.sequences]
    with torch.no_grad():
        return torch.stack([model(input_ids=torch.tensor([row])).logits[0, -1, ids].float().softmax(0) for row in judge.encode(prompts)])


def test_the_adapter_reloads_with_plain_peft(run, tiny_model):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    judge = load_judge(run[0])
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    untrained = plain_probabilities(base, judge, PROMPTS)
    tuned = plain_probabilities(PeftModel.from_pretrained(base, run[0] / "adapter"), judge, PROMPTS)
    expected = torch.as_tensor(judge.predict(PROMPTS))
    assert (tuned - expected).abs().max() < 1e-5 and (untrained - expected).abs().max() > 0.05


def test_run_merges_compares_and_says_how_far_apart(run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, judge = run[0], load_judge(run[0])
    merged = plain_probabilities(AutoModelForCausalLM.from_pretrained(folder / "merged"), judge, PROMPTS)
    assert (merged - torch.as_tensor(judge.predict(PROMPTS))).abs().max() < 1e-5
    assert AutoTokenizer.from_pretrained(folder / "merged").chat_template == judge.tokenizer.chat_template
    report = json.loads((folder / "merged" / "export.json").read_text())
    assert report["compared_items"] == 12 and report["changed_by_training"] > 0.05 and report["dtype"] == "float32"
    assert max(report["difference_to_the_judge"], report["difference_to_base_with_adapter"]) < report["bound"] == 1e-4
    assert not (folder / "merged.part").exists()


def test_bfloat16_weights_are_allowed_their_rounding_and_no_more(copy):
    export.main(export.ExportConfig(run=str(copy), export="merged", dtype="bfloat16"))
    report = json.loads((copy / "merged" / "export.json").read_text())
    assert report["dtype"] == "bfloat16" and 1e-6 < report["difference_to_the_judge"] < report["bound"] == 0.05
    assert (copy / "merged" / "model.safetensors").stat().st_size < 0.6 * (Path(json.loads((copy / "judge.json").read_text())["base"]) / "model.safetensors").stat().st_size
    with pytest.raises(InputError, match="exists already"):
        export.main(export.ExportConfig(run=str(copy), export="merged"))


def test_a_judge_that_runs_in_16_bits_is_compared_in_16_bits(copy):
    """As on a GPU: base and merged model are loaded in the judge's own type, and no more than that is written."""
    judge = load_judge(copy)
    judge.model.to(torch.bfloat16)
    export.finish(judge, copy, "merged")
    report = json.loads((copy / "merged" / "export.json").read_text())
    assert report["dtype"] == "bfloat16" and report["bound"] == report["bound_to_the_judge"] == 0.05
    assert 1e-5 < max(report["difference_to_base_with_adapter"], report["difference_to_the_judge"]) < 0.05


def test_a_merge_that_loses_the_adapter_is_deleted(copy, monkeypatch, capsys):
    """The command line, in this process: exit code 1, one line, no folder, and a card that speaks of no export."""
    import peft

    monkeypatch.setattr(peft.PeftModel, "merge_and_unload", lambda self, **_: self.unload(), raising=False)
    monkeypatch.setattr(sys, "argv", ["export.py", "--run", str(copy), "--export", "merged"])
    with pytest.raises(SystemExit) as stopped:
        distjudge.cli(export.main, export.ExportConfig)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stopped.value.code == 1 and len(lines) == 1 and "differs from its base with the adapter" in lines[0] and "0.0001 is allowed" in lines[0]
    assert not list(copy.glob("merged*")) and "## `merged`" not in (copy / "README.md").read_text()


def test_a_judge_on_4_bit_weights_is_merged_into_the_unquantized_base(tiny_model, votes, tmp_path):
    """Not into the rounded ones: the result is the 16-bit base with the adapter, and the gap to the 4-bit judge is reported."""
    pytest.importorskip("bitsandbytes")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    items = votes(12)
    judge = load_judge(tiny_model, ["1", "2", "3"], four_bit=True, lora_rank=4)
    distjudge.train(judge, items, Config(out=str(tmp_path), learning_rate=2e-2, epochs=3.0, save_every=0.0))
    distjudge.save_judge(judge, tmp_path)
    export.finish(judge, tmp_path, "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    weight = "model.layers.0.self_attn.q_proj.weight"
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path / "adapter")
    assert (plain_probabilities(merged, judge, PROMPTS) - plain_probabilities(adapted, judge, PROMPTS)).abs().max() < 1e-5
    assert not torch.equal(merged.get_parameter(weight), AutoModelForCausalLM.from_pretrained(tiny_model).get_parameter(weight))
    report = json.loads((tmp_path / "merged" / "export.json").read_text())
    own = torch.as_tensor(judge.predict(export.PROBES))
    gap = (plain_probabilities(merged, judge, export.PROBES) - own).abs().sum(1).mean().item() / 2
    assert report["compared_items"] == 3 and report["mean_total_variation_to_the_4_bit_judge"] == pytest.approx(gap, abs=1e-6)
    assert 1e-5 < gap < report["bound_to_the_4_bit_judge"] and report["difference_to_base_with_adapter"] < report["bound"] == 1e-4


def test_a_judge_under_unsloth_is_merged_by_another_process(copy, monkeypatch):
    """Its process, played here, gets the same command line as a user would type; what it says is what the error says."""
    import tyro

    judge, asked = load_judge(copy), []
    judge.model.backend = "unsloth"

    def run_here(command, stderr, text):
        asked.append(tyro.cli(export.ExportConfig, args=command[2:]))
        export.main(asked[-1])
        return types.SimpleNamespace(returncode=0)

    monkeypatch.setattr(export.subprocess, "run", run_here)
    export.finish(judge, copy, "merged")
    assert Path(asked[0].out) == copy / "merged" and (copy / "merged" / "export.json").is_file() and judge.model is None
    monkeypatch.setattr(export.subprocess, "run", lambda *_, **__: types.SimpleNamespace(returncode=1, stderr="Loading\nerror: it differs by 0.3\n"))
    judge = load_judge(copy)
    judge.model.backend = "unsloth"
    with pytest.raises(ExportError, match=r"^it differs by 0\.3$"):
        export.finish(judge, copy, "merged")


def test_a_4_bit_judge_too_far_from_its_16_bit_base_is_an_error(tiny_model, tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    judge = load_judge(tiny_model, ["1", "2", "3"], four_bit=True, lora_rank=4)
    distjudge.save_judge(judge, tmp_path)
    monkeypatch.setattr(export, "OTHER_BASE", 1e-6)
    with pytest.raises(ExportError, match=r"differs from the judge on 4-bit weights by up to .* in total variation on average, and 1e-06"):
        export.finish(judge, tmp_path, "merged")
    assert not list(tmp_path.glob("merged*"))


def test_a_run_of_all_weights_is_written_in_the_same_form(tiny_model, tmp_path):
    judge = load_judge(tiny_model, ["1", "2", "3"], lora_rank=0)
    distjudge.save_judge(judge, tmp_path)
    export.finish(judge, tmp_path, "merged")
    report = json.loads((tmp_path / "merged" / "export.json").read_text())
    assert report["changed_by_training"] is None and report["difference_to_the_judge"] < 1e-6
    assert "all weights trained" in (tmp_path / "README.md").read_text()


def test_a_new_judge_does_not_keep_the_old_ones_export(run, tmp_path):
    shutil.copytree(run[0], tmp_path / "run")
    judge = load_judge(run[0])
    assert "## `merged`" in export.model_card(tmp_path / "run")
    with torch.no_grad():
        next(w for w in judge.model.parameters() if w.requires_grad).add_(1)
    distjudge.save_judge(judge, tmp_path / "run")
    assert "## `merged`" not in export.model_card(tmp_path / "run")  # it was made of other weights
    export.finish(judge, tmp_path / "run", trained=True)
    assert not (tmp_path / "run" / "merged").exists()


# --- before training -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("settings", "words"), [
    ({"export": "gguf"}, "export: gguf goes through Unsloth, which cannot be used .no CUDA device."),
    ({"export": "gguf-unchecked", "backend": "transformers"}, "which cannot be used .asked for."),
    ({"export": "onnx"}, "export: must be one of none, merged, gguf, gguf-unchecked, not onnx"),
    ({"push_to_hub": "me/judge"}, "push_to_hub: no token"),
    ({"push_to_hub": "a/b/c"}, "push_to_hub: "),
])
def test_what_cannot_be_done_is_said_before_training(settings, words, tiny_model, tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    monkeypatch.setattr(distjudge, "load_judge", lambda *_, **__: pytest.fail("the model was loaded"))
    (tmp_path / "v.jsonl").write_text("".join(json.dumps({"prompt": f"p{i}", "counts": {"1": 1, "2": i}}) + "\n" for i in range(9)))
    with pytest.raises(InputError, match=words):
        distjudge.run(Config(train=(str(tmp_path / "v.jsonl"),), out=str(tmp_path / "o"), model=str(tiny_model), **settings))


def test_quantized_weights_cannot_take_a_merge(tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "m")
    settings = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(settings | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}))
    with pytest.raises(InputError, match="holds quantized weights"):
        export.check("merged", "", str(tmp_path / "m"), adapters=True)


@pytest.mark.parametrize(("main", "card", "adapters", "fits"), [
    (12.7, 15, True, False), (12.7, 0, True, False), (31, 15, True, True), (12.7, 24, True, True), (12.7, 24, False, False), (31, 0, False, True)])
def test_a_machine_too_small_to_merge_is_told_before_training(main, card, adapters, fits, tmp_path, monkeypatch):
    """Free Colab has 12.7 GiB and a card of 15: a model of 7.6 billion weights is 14.2 GiB in 16 bits, and 28.4 in 32."""
    from transformers import Qwen2Config

    Qwen2Config(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, vocab_size=152064).save_pretrained(tmp_path)
    monkeypatch.setattr(export, "_room", lambda: (main * 2**30, card * 2**30))
    if fits:
        return export.check("merged", "", str(tmp_path), adapters, backend="transformers")
    needs = "14.2" if adapters and card else "28.4"
    with pytest.raises(InputError, match=rf"export: merged holds all 7\.6 billion weights, {needs} GiB, and there are 12\.7 GiB of main memory"):
        export.check("merged", "", str(tmp_path), adapters, backend="transformers")


@pytest.mark.parametrize(("answer", "name", "words"), [
    ({"name": "me", "auth": {"accessToken": {"role": "read"}}}, "me/judge", "the token of me may only read"),
    ({"name": "me", "orgs": [{"name": "lab"}]}, "you/judge", "which may write to me, lab"),
    (ConnectionError("no route to the hub\nand more"), "me/judge", "the hub does not answer to the token: no route to the hub$"),
])
def test_a_token_that_will_not_do(answer, name, words, monkeypatch):
    import huggingface_hub

    def whoami(self):
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    monkeypatch.setattr(huggingface_hub.HfApi, "whoami", whoami)
    with pytest.raises(InputError, match=words):
        export.check("none", name, "owner/model", adapters=True)


def test_an_adapter_without_its_base_is_not_uploaded(tiny_model, monkeypatch):
    monkeypatch.setattr(export, "_check_push", lambda name: None)
    with pytest.raises(InputError, match="others do not have the base model"):
        export.check("none", "me/judge", str(tiny_model), adapters=True)
    export.check("merged", "me/judge", str(tiny_model), adapters=True, backend="transformers")


def test_distjudge_alone_says_what_is_missing(tiny_model, tmp_path, monkeypatch):
    (tmp_path / "v.jsonl").write_text("".join(json.dumps({"prompt": f"p{i}", "counts": {"1": 1, "2": i}}) + "\n" for i in range(9)))
    monkeypatch.setattr(distjudge, "__file__", str(tmp_path / "distjudge.py"))
    with pytest.raises(InputError, match=r"need .*recipes.export\.py, which is not there"):
        distjudge.run(Config(train=(str(tmp_path / "v.jsonl"),), out=str(tmp_path / "o"), model=str(tiny_model), export="merged"))
    assert distjudge.after_training() is None


# --- GGUF: Unsloth is not here, so the boundary to it is played; llama.cpp's too, but for the last test -------------------
class Llama:
    """llama_cpp.Llama as far as it is used, computing with the model it is given; `offset` shifts one token's logit."""

    judge, offset = None, {}

    def __init__(self, model_path, n_ctx, logits_all, verbose):
        assert Path(model_path).suffix == ".gguf" and Path(model_path).is_file() and logits_all and not verbose
        self.n_ctx, self.ids = n_ctx, []

    def tokenize(self, text, add_bos, special):
        return self.judge.tokenizer(text.decode(), add_special_tokens=add_bos)["input_ids"]

    def reset(self):
        self.ids = []

    def eval(self, tokens):
        self.ids += tokens
        assert len(self.ids) <= self.n_ctx
        with torch.no_grad():
            self.scores = self.judge.model(input_ids=torch.tensor([self.ids])).logits[0].float()
        for token, by in self.offset.items():
            self.scores[:, token] += by
        self.scores = self.scores.numpy()


@pytest.fixture
def played(copy, monkeypatch):
    """The judge, Unsloth's save_pretrained_gguf with its real arguments and answer, and llama_cpp."""
    judge = load_judge(copy)

    def save_pretrained_gguf(save_directory, tokenizer=None, quantization_method="fast_quantized"):
        assert tokenizer is judge.tokenizer
        for name in (save_directory, save_directory + "_gguf"):
            Path(name).mkdir()
        file = Path(save_directory + "_gguf") / f"model.{quantization_method.upper()}.gguf"
        file.write_bytes(b"GGUF")
        return {"save_directory": save_directory, "gguf_directory": save_directory + "_gguf", "gguf_files": [str(file)]}

    def patch_saving_functions(model):
        model.save_pretrained_gguf = save_pretrained_gguf
        return model

    monkeypatch.setitem(sys.modules, "unsloth", types.ModuleType("unsloth"))
    monkeypatch.setitem(sys.modules, "unsloth.save", types.SimpleNamespace(patch_saving_functions=patch_saving_functions))
    module = importlib.util.module_from_spec(importlib.machinery.ModuleSpec("llama_cpp", None))
    module.Llama = Llama
    monkeypatch.setitem(sys.modules, "llama_cpp", module)
    monkeypatch.setattr(Llama, "judge", judge)
    return judge, copy


def test_a_gguf_file_is_compared_and_kept(played, capsys):
    judge, folder = played
    export.finish(judge, folder, "gguf")
    assert sorted(path.name for path in (folder / "gguf").iterdir()) == ["export.json", "model.Q8_0.gguf"]
    report = json.loads((folder / "gguf" / "export.json").read_text())
    assert report["compared_items"] == 12 and report["difference_to_the_judge"] < 1e-5 and report["quantization"] == "q8_0"
    assert report["prompts_tokenized_alike"] == 12
    assert "difference to the judge" in capsys.readouterr().out and "## `gguf`" in (folder / "README.md").read_text()


def test_a_gguf_file_that_judges_otherwise_is_deleted(played, monkeypatch):
    judge, folder = played
    monkeypatch.setattr(Llama, "offset", {judge.tokens.sequences[0][1][0]: 1.5})
    with pytest.raises(ExportError, match="the GGUF file differs from the judge by up to"):
        export.finish(judge, folder, "gguf")
    assert not list(folder.glob("gguf*"))


def test_an_unchecked_gguf_file_says_so(played, monkeypatch, caplog):
    judge, folder = played
    monkeypatch.setattr(Llama, "__init__", lambda *_, **__: pytest.fail("compared"))
    export.finish(judge, folder, "gguf-unchecked")
    assert "not compared with the judge" in caplog.text and "**Not compared with the judge.**" in (folder / "README.md").read_text()
    assert json.loads((folder / "gguf" / "export.json").read_text())["compared_items"] == 0


def test_a_gguf_files_whole_labels(tiny_model, tmp_path, monkeypatch):
    """Labels of which some begin alike are scored over all their tokens, as the judge does."""
    judge = load_judge(tiny_model, ["1", "10", "2"], lora_rank=4)
    assert judge.tokens.whole
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "llama_cpp", types.SimpleNamespace(Llama=Llama))
    monkeypatch.setattr(Llama, "judge", judge)
    assert (export.gguf_logprobs(tmp_path / "m.gguf", judge, PROMPTS)[0] - judge.score(PROMPTS)[0]).abs().max() < 1e-4


def test_a_gguf_file_with_another_tokenizer_says_so(played, monkeypatch, caplog):
    judge, folder = played
    first = json.loads((folder / "predictions.jsonl").read_text().splitlines()[0])["prompt"]
    alike = Llama.tokenize
    monkeypatch.setattr(Llama, "tokenize", lambda self, text, *, add_bos, special: [0] if first.encode() in text else alike(
        self, text, add_bos, special))
    export.finish(judge, folder, "gguf")
    assert json.loads((folder / "gguf" / "export.json").read_text())["prompts_tokenized_alike"] == 11
    assert "llama.cpp tokenizes 1 of 12 prompts otherwise than the judge does" in caplog.text


CONVERTER = """
import json, sys
from pathlib import Path
if "--help" not in sys.argv:
    assert (Path(sys.argv[1]) / "model.safetensors").is_file()
    assert json.loads((Path(sys.argv[1]) / "tokenizer_config.json").read_text())["added_tokens_decoder"]["0"]["special"]
    Path(sys.argv[3]).write_text("GGUF " + sys.argv[5])
"""


@pytest.fixture
def clone(played, tmp_path, monkeypatch):
    """A clone of llama.cpp whose converter looks at what it is given, and llama-cpp-python's quantizer: fails where it is told to."""
    (tmp_path / "convert_hf_to_gguf.py").write_text(CONVERTER)
    monkeypatch.setitem(sys.modules, "sentencepiece", importlib.util.module_from_spec(importlib.machinery.ModuleSpec("sentencepiece", None)))
    monkeypatch.setitem(sys.modules, "unsloth.save", None)
    llama_cpp = sys.modules["llama_cpp"]
    llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M, llama_cpp.llama_model_quantize_default_params = 15, types.SimpleNamespace
    llama_cpp.llama_model_quantize = lambda source, out, options: llama_cpp.failed or (
        Path(out.decode()).write_bytes(Path(source.decode()).read_bytes() + bytes([options.ftype])) and 0)
    llama_cpp.failed = 0
    return str(tmp_path)


@pytest.mark.parametrize("quantization", ["q8_0", "q4_k_m"])
def test_a_clone_of_llama_cpp_is_used_without_unsloth(played, clone, quantization):
    judge, folder = played
    export.check("gguf", "", str(folder), adapters=True, backend="transformers", quantization=quantization, llama_cpp=clone)
    export.finish(judge, folder, "gguf", quantization=quantization, llama_cpp=clone)
    name = f"model.{quantization.upper()}.gguf"
    assert sorted(path.name for path in (folder / "gguf").iterdir()) == ["export.json", name]
    assert (folder / "gguf" / name).read_bytes() == (b"GGUF q8_0" if quantization == "q8_0" else b"GGUF f32\x0f")
    report = json.loads((folder / "gguf" / "export.json").read_text())
    assert report["difference_to_the_judge"] < 1e-5 and report["written_by"] == "convert_hf_to_gguf.py"


def test_a_failed_quantization_leaves_nothing(played, clone, caplog):
    judge, folder = played
    sys.modules["llama_cpp"].failed = 1
    with pytest.raises(ExportError, match=r"gguf: llama.cpp could not quantize the file to q4_k_m .exit code 1"):
        export.finish(judge, folder, "gguf", quantization="q4_k_m", llama_cpp=clone)
    assert not list(folder.glob("gguf*")) and "q4_k_m takes weights by 256, which the model's sizes, 32 and 64, are not made of" in caplog.text


@pytest.mark.parametrize(("flags", "words"), [
    (["--export", "merged", "--llama_cpp", "."], "error: llama_cpp: is for --export gguf, not merged"),
    (["--export", "gguf", "--dtype", "float16"], "error: dtype: is for --export merged, not gguf")])
def test_flags_that_would_do_nothing_are_refused(flags, words, copy, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["export.py", "--run", str(copy), *flags])
    with pytest.raises(SystemExit, match="2"):
        distjudge.cli(export.main, export.ExportConfig)
    assert words in capsys.readouterr().err


def test_a_base_that_is_gone(copy):
    about = json.loads((copy / "judge.json").read_text())
    (copy / "judge.json").write_text(json.dumps(about | {"base": "/no/such/model"}))
    with pytest.raises(InputError, match=r"export: the judge's base is not a folder that is there: .*'/no/such/model'"):
        export.check("merged", "", str(copy), adapters=False, backend="transformers")


def test_what_the_converter_goes_by_comes_from_the_base(played, clone, tiny_model, tmp_path, monkeypatch):
    """SentencePiece's file, and the class of Phi-4's tokenizer: transformers 5 writes neither."""
    judge, folder = played
    base = shutil.copytree(tiny_model, tmp_path / "base")
    (base / "tokenizer.model").write_bytes(b"pieces")
    judge.tokenizer.backend_tokenizer.model.byte_fallback = True
    config = json.loads((base / "tokenizer_config.json").read_text()) | {"tokenizer_class": "GPT2Tokenizer"}
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    monkeypatch.setattr(judge, "base", str(base))
    Path(clone, "convert_hf_to_gguf.py").write_text(CONVERTER + """
    config = json.loads((Path(sys.argv[1]) / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "GPT2Tokenizer" and (Path(sys.argv[1]) / "tokenizer.model").read_bytes() == b"pieces"
""")
    export.finish(judge, folder, "gguf", llama_cpp=clone)


def test_a_file_of_the_base_on_a_hub_that_cannot_be_asked(monkeypatch):
    """Conftest switches the hub off: nothing is known of this repository, and that is not taken for `there is no such file`."""
    with pytest.raises(ExportError, match=r"gguf: whether no-such/repository has a file tokenizer.model, which llama.cpp would need, cannot be known"):
        export._file_of_base("no-such/repository", "tokenizer.model")


def test_what_a_clone_of_llama_cpp_cannot_do_is_said(played, clone, monkeypatch):
    judge, folder = played
    script = Path(clone, "convert_hf_to_gguf.py")

    def refused(words, quantization="q8_0", kind="gguf"):
        with pytest.raises(InputError, match=words):
            export.check(kind, "", str(folder), adapters=True, backend="transformers", quantization=quantization, llama_cpp=clone)

    refused(r"quantization: must be one of f32, f16, bf16, q8_0, q6_k, .*, not iq2_xxs", "iq2_xxs")
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "llama_cpp", None)
        without.setattr(importlib.util, "find_spec", lambda name, find=importlib.util.find_spec: None if name == "llama_cpp" else find(name))
        refused("which is not installed: pip install llama-cpp-python, or --export gguf-unchecked")
        refused("quantization: must be without llama-cpp-python one of f32, f16, bf16, q8_0, not q4_k_m", "q4_k_m", "gguf-unchecked")
    with monkeypatch.context() as without:
        without.setattr(importlib.util, "find_spec", lambda name, find=importlib.util.find_spec: None if name == "sentencepiece" else find(name))
        refused("needs sentencepiece, which is not installed: pip install gguf sentencepiece")
    script.write_text("import sys\nsys.exit(0 if '--help' in sys.argv else 'BPE pre-tokenizer was not recognized')")
    with pytest.raises(ExportError, match="failed: BPE pre-tokenizer was not recognized"):
        export.finish(judge, folder, "gguf", llama_cpp=clone)
    script.write_text("import os, sys\nprint('INFO: 45 %', file=sys.stderr, flush=True)\nos.kill(os.getpid(), 9)")
    refused("convert_hf_to_gguf.py failed: exit code -9$")
    script.write_text("import no_such_module")
    refused("convert_hf_to_gguf.py failed: ModuleNotFoundError: No module named 'no_such_module'")
    script.unlink()
    refused(r"llama_cpp: .*convert_hf_to_gguf\.py is not there: git clone")


# --- the model card ------------------------------------------------------------------------------------------------------
def test_the_card_says_what_the_folder_holds(run):
    folder, metrics = run
    card = (folder / "README.md").read_text()
    head = card.split("---")[1]
    assert 'library_name: "peft"' in head and "base_model" not in head  # a local folder is no hub id
    assert "| train | `votes.jsonl`, a part of it | 24 | " in card and "| test | `votes.jsonl`, a part of it | 12 | " in card
    items = distjudge.load_items(folder.parent / "votes.jsonl")
    assert f"| 24 | {sum(item.votes for item in items[:24]):.0f} |" in card
    row = next(line for line in card.splitlines() if line.startswith("| KL(votes ‖ judge)"))
    _, _, value, interval, _ = row.split("|")
    low, high = map(float, interval.split(" to "))
    assert float(value) == pytest.approx(metrics["kl"], abs=5e-4) and low < float(value) < high
    assert "<|user|>{prompt}<|end|><|judge|>" in card and "| learning_rate | `0.02` |" in card and f"torch {torch.__version__}" in card
    judge = load_judge(folder)
    for label, ids in judge.tokens.sequences:
        assert f"| `{judge.labels[label]}` | `'{judge.labels[label]}'` | {ids[0]} |" in card
    assert str(folder.parent) not in card and "soup" not in card  # no path of this machine, no item


def test_the_cards_code_runs(run, tmp_path, monkeypatch):
    """Both ways to load, as the card writes them, with its names filled in."""
    card, folder = (run[0] / "README.md").read_text(), run[0]
    blocks = [block.split("```")[0] for block in card.split("```python\n")[1:]]
    base = json.loads((folder / "judge.json").read_text())["base"]
    scope = {"prompt": PROMPTS[0]}
    for block in blocks:
        exec(block.replace('"RUN', f'"{folder}').replace(f'"{Path(base).name}"', f'"{base}"'), scope)
    assert len(blocks) == 2
    assert (plain_probabilities(scope["model"], scope["judge"], PROMPTS) - torch.as_tensor(scope["judge"].predict(PROMPTS))).abs().max() < 1e-5


def test_labels_that_would_break_a_table(tiny_tokenizer, tmp_path, tiny_model):
    judge = load_judge(tiny_model, ["a|b", "`x`", "<b>no</b>"], lora_rank=4)
    distjudge.save_judge(judge, tmp_path)
    card = export.model_card(tmp_path)
    rows = card.split("## Prompt and label tokens")[1].split("## How")[0].splitlines()
    assert r"`a\|b`" in card and "`` `x` ``" in card and "`<b>no</b>`" in card
    assert all(line.replace(r"\|", "").count("|") == 4 for line in rows if line.startswith("|"))
    assert "## Metrics" not in card and "## Data" not in card  # a judge that was saved without a run


# --- the upload, to a hub of our own -------------------------------------------------------------------------------------
class Hub(http.server.BaseHTTPRequestHandler):
    """As much of a model hub as an upload asks for; what it was given lies in `got`."""

    got = None

    def answer(self, content, status=200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_GET(self):
        self.got["tokens"].add(self.headers.get("Authorization"))
        if self.path == "/api/whoami-v2":
            self.answer({"name": "me", "orgs": [], "auth": {"accessToken": {"role": "write"}}})
        else:
            self.answer({"id": "me/judge", "sha": "0" * 40, "siblings": [], "tags": []})

    def do_POST(self):
        self.got["tokens"].add(self.headers.get("Authorization"))
        body = self.body()
        if self.path == "/api/repos/create":
            self.got["created"] = json.loads(body)
            self.answer({"url": f"http://{self.headers['Host']}/me/judge"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self.answer({"files": [{"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular", "shouldIgnore": False} for f in files]})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            self.answer({"transfer": "basic", "objects": [o | {"actions": {"upload": {"href": f"http://{self.headers['Host']}/store/{o['oid']}"}}} for o in objects]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                self.got["commit"].append(line)
            self.answer({"commitUrl": f"http://{self.headers['Host']}/me/judge/commit/{'1' * 40}", "commitOid": "1" * 40})
        else:
            self.answer({"warnings": [], "errors": []})

    def do_PUT(self):
        data = self.body()
        self.got["store"][self.path.rsplit("/", 1)[1]] = data
        self.answer({})

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(Hub, "got", {"tokens": set(), "commit": [], "store": {}, "created": None})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_upload_to_a_hub(run, tmp_path, hub, monkeypatch, capsys):
    """A real client against a server of ours: what arrives, what stays at home, where the token goes."""
    from huggingface_hub import constants

    for name, value in (("ENDPOINT", hub), ("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True)):
        monkeypatch.setattr(constants, name, value)
    for name, value in (("HF_TOKEN", "hf_secret_of_this_test"), ("NO_PROXY", "*")):
        monkeypatch.setenv(name, value)
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    settings = json.loads((folder / "judge.json").read_text())
    (folder / "judge.json").write_text(json.dumps(settings | {"base": "owner/base"}))  # a hub id: adapters of a local folder are refused
    (folder / "checkpoints" / "step-1").mkdir(parents=True)
    (folder / "checkpoints" / "step-1" / "weights.safetensors").write_bytes(b"x" * 99)
    export.main(export.ExportConfig(run=str(folder), push_to_hub="me/judge"))
    shown = capsys.readouterr()
    sent = {line["value"]["path"]: line["value"] for line in Hub.got["commit"] if line["key"] in ("file", "lfsFile")}
    assert {"README.md", "judge.json", "metrics.json", "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "merged/model.safetensors"} <= set(sent)
    assert not [path for path in sent if path.startswith("checkpoints") or "predictions" in path]
    weights = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    assert Hub.got["store"][sent["adapter/adapter_model.safetensors"]["oid"]] == weights and hashlib.sha256(weights).hexdigest() in Hub.got["store"]
    created = Hub.got["created"]
    assert (created.get("private") or created.get("visibility") == "private") and created["name"] == "judge"
    assert Hub.got["tokens"] - {None} == {"Bearer hf_secret_of_this_test"}  # some questions need none
    kept = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert b"hf_secret" not in kept and "hf_secret" not in shown.out + shown.err and "uploaded to" in shown.out


def test_a_refused_upload_leaves_the_folder_whole(copy, monkeypatch):
    import huggingface_hub

    def create_repo(self, *_, **__):
        raise OSError("403 Forbidden: you have exceeded your quota\nRequest id 12")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    before = sorted(copy.rglob("*"))
    with pytest.raises(ExportError, match=r"me/judge: 403 Forbidden: you have exceeded your quota; .* --push_to_hub me/judge` tries again"):
        export.finish(None, copy, push="me/judge")
    assert sorted(copy.rglob("*")) == before
