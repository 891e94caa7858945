"""After training: a plain model folder or a GGUF file of a judge, its model card, an upload to a model hub.

    python recipes/export.py --run runs/first --export merged             # runs/first/merged, a model folder in 16 bits
    vllm serve runs/first/merged --served-model-name judge
    python recipes/api.py --items test.jsonl --base_url http://localhost:8000/v1 --model judge --render runs/first/merged

    python recipes/export.py --run runs/first --export gguf               # runs/first/gguf/*.gguf, for llama.cpp and Ollama
    python recipes/export.py --run runs/first --export gguf --llama_cpp llama.cpp       # the same without Unsloth, on a CPU too
    python recipes/export.py --run runs/first --push_to_hub me/judge      # the run folder; a new repository is private

Commands that end in distjudge.run() do the same with flags of these names, --export and --push_to_hub, and look before training
whether it can be done. Every call writes the model card, README.md, into the run folder.

merged           the adapters added to the base's own 16-bit weights (float32 where it is stored and run so), as transformers, vLLM and
                 llama.cpp's convert_hf_to_gguf.py read them. A judge trained on 4-bit weights is merged into the unquantized base, never
                 into the rounded weights. A run whose weights were all trained is written in the same form.
gguf             through Unsloth's save_pretrained_gguf, which needs CUDA; llama.cpp is built before training where it is missing.
                 With --llama_cpp, a clone of llama.cpp (not built), merged as above and written by its convert_hf_to_gguf.py, which
                 needs the packages gguf and sentencepiece. Compared through llama-cpp-python, without which it is refused; prompts that
                 the file's own tokenizer reads otherwise than the judge are a warning: send it token ids.
gguf-unchecked   the same, but the file is not compared with anything: measure it with recipes/api.py before you trust it.

What is compared. Label probabilities of the first --compare test items (of three prompts of ours in a folder without predictions.jsonl),
read back from the files written; a folder that fails is deleted, and the command ends in one line and exit code 1:

    largest difference in a probability       bound
    merged, of the base with its adapter      1e-4 in float32, 0.05 where weights are stored or run in 16 bits
    merged, of the judge itself               the same; of a judge on 4-bit weights, 0.1 in total variation, the mean over items:
                                              other base weights judge otherwise, and metrics.json then speaks of the 4-bit judge only
    gguf, of the judge itself                 0.05; of a judge on 4-bit weights 0.1 as above

and export.json says how large it was, beside what training changed: a merge that lost the adapter would be off by that. The bounds in
16 and 4 bits are chosen, not measured on a large model: no GPU has run this yet.
"""
import contextlib
import dataclasses
import gc
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import distjudge
from distjudge import ExportError, InputError, Judge, load_judge, write_json

PROBES = ["Is this fine?", "Rate the answer. It was good, and the service was bad.", "One more: 12345."]
EXACT, ROUNDED, OTHER_BASE = 1e-4, 0.05, 0.1
CONVERTER, CONVERTED = "convert_hf_to_gguf.py", ("f32", "f16", "bf16", "q8_0")
BY_32 = ("q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")  # weights at a time
QUANTIZED = ("q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "iq4_xs", "q3_k_l", "q3_k_m", "q3_k_s", "iq3_m", "iq3_s", "q2_k", *BY_32)
# by llama-cpp-python; those left out need importances measured on a text
PRIVATE = ["checkpoints/*", "fold-*/*", "*.part", "*.part/*", "adapter/README.md",  # of this machine only
           "predictions.jsonl", "plots/bars.*"]  # test items


@dataclasses.dataclass
class ExportConfig:
    run: str
    """The run folder of a trained judge."""
    export: Literal["none", "merged", "gguf", "gguf-unchecked"] = "none"
    """What to make: a model folder in 16 bits, a GGUF file compared with the judge, or one that is not."""
    out: str = ""
    """Where it goes; it must not exist yet. Default: merged or gguf in the run folder."""
    dtype: Literal["as stored", "bfloat16", "float16", "float32"] = "as stored"
    """merged: precision of the weights. As stored: the base's own."""
    quantization: str = "q8_0"
    """gguf: how llama.cpp stores the weights (f16, q8_0, q4_k_m, ...)."""
    llama_cpp: str = ""
    """gguf: a clone of llama.cpp, whose converter is used in place of Unsloth."""
    compare: int = 32
    """How many items to compare."""
    device: str = ""
    """Where to load the judge: cpu, cuda. Default: CUDA where there is one."""
    push_to_hub: str = ""
    """Upload the run folder, but for checkpoints and the test items' texts and votes, to this repository (NAME or OWNER/NAME)."""


# --- before training: what could not be done after it --------------------------------------------------------------------
def check(export: str, push: str, model: str, adapters: bool, backend: str = "auto", quantization: str = "q8_0",
          llama_cpp: str = "") -> None:
    """Raises InputError for an export or an upload of a judge of this model that cannot work; builds llama.cpp for GGUF if need be.

    model: folder, hub id or saved judge; adapters: whether LoRA adapters are trained, not the weights.
    """
    if export not in ("none", "merged", "gguf", "gguf-unchecked"):
        raise InputError(f"export: must be none, merged, gguf or gguf-unchecked, not {export}")
    base = base_of(model)
    if export != "none":
        use, why = distjudge.choose_backend(backend, trained=not adapters)  # first: Unsloth wants to be imported before transformers
        if not Path(base).is_dir():
            _check_name(base, "export: the judge's base is not a folder that is there")
        if export.startswith("gguf"):
            _check_gguf(export, use, why, quantization, llama_cpp)
        if adapters and _is_quantized(base):
            raise InputError(f"export: {base} holds quantized weights, and adapters are merged into 16-bit ones: train on a "
                             "repository with those (--four_bit rounds them while loading)")
        _check_memory(export, base, adapters)
    if push:
        _check_push(push)
        if Path(base).is_dir() and adapters and export != "merged":
            raise InputError(f"push_to_hub: others do not have the base model, {base}: give its hub id, or add --export merged")


def base_of(model: str) -> str:
    with contextlib.suppress(OSError, ValueError, KeyError):
        return json.loads((Path(model) / "judge.json").read_text(encoding="utf-8"))["base"]
    return model


def _is_quantized(base: str) -> bool:
    from transformers import AutoConfig

    try:
        return getattr(AutoConfig.from_pretrained(base, trust_remote_code=False), "quantization_config", None) is not None
    except (OSError, ValueError, KeyError):  # load_judge() says what is wrong with it
        return False


def _room() -> tuple[int, int]:
    """Main memory and, beside it, the memory of the card, in bytes; 0 where there is no card."""
    import psutil

    return psutil.virtual_memory().total, torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0


def _check_memory(export: str, base: str, adapters: bool) -> None:
    """Raises InputError where not even the weights of the merged model would fit: the system would kill the process after the training."""
    try:
        outline = distjudge.load_model(base, False, "cpu", 0, True, "transformers", "an outline", 0, weights=False)
    except InputError:  # load_judge() says it
        return
    weights = outline.num_parameters()
    main, card = _room()
    needs, beside = weights * (2 if card and adapters else 4), 0.6 * weights  # the judge stays on the card, in 4 bits at the least
    if needs > max(main, card - beside):
        beside_it = f" and {card / 2**30:.1f} on the card, where the judge stays" if card else ""
        raise InputError(f"export: {export} holds all {weights / 1e9:.1f} billion weights, {needs / 2**30:.1f} GiB, and there are "
                         f"{main / 2**30:.1f} GiB of main memory{beside_it}: train without it, and run recipes/export.py on the run folder "
                         "on a larger machine")


def _check_gguf(export: str, use: str, why: str, quantization: str, llama_cpp: str) -> None:
    if use != "unsloth" and not llama_cpp:
        raise InputError(f"export: gguf goes through Unsloth, which cannot be used ({why}): give recipes/export.py the trained run and "
                         "--llama_cpp, a clone of llama.cpp")
    installed = importlib.util.find_spec("llama_cpp") is not None
    if export == "gguf" and not installed:
        raise InputError("export: gguf is compared with the judge through llama-cpp-python, which is not installed: pip install "
                         "llama-cpp-python, or --export gguf-unchecked and compare it yourself")
    if llama_cpp:
        return _check_converter(Path(llama_cpp) / CONVERTER, quantization, installed)
    from unsloth.save import ALLOWED_QUANTS
    from unsloth_zoo.llama_cpp import check_llama_cpp, install_llama_cpp

    if quantization not in ALLOWED_QUANTS:
        raise InputError(f"quantization: must be one of {', '.join(ALLOWED_QUANTS)}, not {quantization}")
    try:
        check_llama_cpp()
    except Exception:  # it says that in several ways
        print("export: building llama.cpp, which makes GGUF files; this takes some minutes")
        try:
            install_llama_cpp(gpu_support=False)
        except Exception as error:
            raise InputError(f"export: gguf needs llama.cpp, which could not be built: {distjudge.first_line(error)}") from None


def _check_converter(script: Path, quantization: str, installed: bool) -> None:
    if not script.is_file():
        raise InputError(f"llama_cpp: {script} is not there: git clone https://github.com/ggml-org/llama.cpp, and give that folder")
    if importlib.util.find_spec("sentencepiece") is None:  # imported for every kind of tokenizer, but only then
        raise InputError(f"llama_cpp: {CONVERTER} needs sentencepiece, which is not installed: pip install gguf sentencepiece")
    _converted(script, "--help", error=InputError)
    if quantization not in CONVERTED + QUANTIZED * installed:
        without = "" if installed else "without llama-cpp-python "
        raise InputError(f"quantization: must be {without}one of {', '.join(CONVERTED + QUANTIZED * installed)}, not {quantization}")


def _converted(script: Path, *arguments: str, error: type[Exception] = ExportError) -> None:
    """Runs llama.cpp's converter; raises the error with the last line it wrote if it fails."""
    done = subprocess.run([sys.executable, str(script), *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise error(f"llama_cpp: {script.name} failed: {distjudge.short(_said(done), 300)}")


def _said(done: subprocess.CompletedProcess[str], otherwise: str = "") -> str:
    """The last line that a failed process wrote; its exit code if there is none, or if it was killed and the line is of before that."""
    lines = [line.strip().removeprefix("error: ") for line in done.stderr.splitlines() if line.strip()]
    return lines[-1] if lines and done.returncode > 0 else f"{otherwise}exit code {done.returncode}"


def _check_name(name: str, what: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(f"{what}: {distjudge.first_line(error)}") from None


def _check_push(name: str) -> None:
    """One call to the hub: is there a token, whose is it, and may it write to that owner's repositories?"""
    try:
        from huggingface_hub import HfApi, get_token
    except ImportError:
        raise InputError("push_to_hub: needs huggingface_hub: pip install huggingface_hub") from None
    _check_name(name, "push_to_hub")
    if not get_token():
        raise InputError("push_to_hub: no token: run `hf auth login`, or set HF_TOKEN")
    try:
        who = HfApi().whoami()
    except Exception as error:  # a wrong token, no network, offline mode: each an exception of its own
        raise InputError(f"push_to_hub: the hub does not answer to the token: {distjudge.first_line(error)}") from None
    token = (who.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise InputError(f"push_to_hub: the token of {who['name']} may only read: make one that may write")
    owners = [who["name"], *(org["name"] for org in who.get("orgs") or ())]
    if "/" in name and name.split("/")[0] not in owners:
        raise InputError(f"push_to_hub: {name}: the token is that of {who['name']}, which may write to {', '.join(owners)}")


# --- after it ---------------------------------------------------------------------------------------------------------------
def finish(judge: Judge | None, folder: Path, export: str = "none", push: str = "", *, trained: bool = False, out: Path | None = None,
           dtype: str = "as stored", quantization: str = "q8_0", compare: int = 32, llama_cpp: str = "") -> None:
    """Exports the judge saved in a run folder, writes the folder's card, and uploads it.

    trained: the judge is new, and merged/ and gguf/ of the one that was in the folder before go. Raises ExportError, leaving no
    exported files, if they judge otherwise than the judge by more than the bounds above; the card is written all the same. Unsloth
    patches the classes that a merge needs as they are: a judge on it is given up, with its memory, and merged by another process.
    """
    for name in ("merged", "gguf") if trained else ():
        shutil.rmtree(folder / name, ignore_errors=True)
    try:
        if export == "merged" and judge.backend == "unsloth":
            judge.model = None
            _merge_elsewhere(folder, out or folder / "merged", dtype, compare)
        elif export == "merged":
            export_merged(judge, folder, out or folder / "merged", dtype, compare)
        elif export != "none":
            export_gguf(judge, folder, out or folder / "gguf", quantization, compare, export == "gguf", llama_cpp)
    except (InputError, OSError, RuntimeError) as error:  # out of memory is a RuntimeError
        if trained:  # the judge is saved, and its user should know that
            raise ExportError(f"export: {distjudge.first_line(error)}; the judge itself is saved in {folder}") from error
        raise
    finally:
        (folder / "README.md").write_text(model_card(folder), encoding="utf-8")
    if push:
        print(f"uploaded to {upload(folder, push)}")


def _merge_elsewhere(folder: Path, out: Path, dtype: str, compare: int) -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    options = {"--run": folder, "--export": "merged", "--out": out, "--dtype": dtype, "--compare": compare}
    command = [sys.executable, __file__, *(str(word) for option in options.items() for word in option)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise ExportError(_said(done, f"{out}: merging it ended with "))


def _weights_of(folder: Path) -> str:
    """A hash of a judge's weights, of the checksums in judge.json: an export belongs to these and to no others."""
    sums = _read(folder / "judge.json").get("sha256") or distjudge.checksums(folder)  # older judges have none
    return hashlib.sha256(json.dumps({name: sums[name] for name in sorted(sums) if name.endswith(".safetensors")}).encode()).hexdigest()


@contextlib.contextmanager
def _whole_or_gone(folder: Path) -> Iterator[Path]:
    """A folder under a temporary name, renamed at the end, deleted if anything goes wrong before that."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        part.rename(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _prompts(folder: Path, judge: Judge, compare: int) -> list[str]:
    path = folder / "predictions.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    found = [row["prompt"] for row in rows[:compare] if row.get("prompt")]
    return [prompt for prompt in found if len(judge.encoder(prompt)) <= judge.max_length] or PROBES


def _own(judge: Judge, prompts: Sequence[str]) -> tuple[torch.Tensor, float | None]:
    """The judge's probabilities (N, C), and the most that training changed in one; None where all weights were trained."""
    own = judge.score(prompts)[0].exp()
    if not hasattr(judge.model, "peft_config"):
        return own, None
    with judge.model.disable_adapter():
        return own, (judge.score(prompts)[0].exp() - own).abs().max().item()


def _within(what: str, found: torch.Tensor, reference: torch.Tensor, bound: float, mean: bool = False) -> float:
    """Raises ExportError if probabilities (N, C) differ by more than the bound: the largest, or the mean total variation."""
    gap = (found - reference).abs()
    off = (gap.sum(1).mean() / 2 if mean else gap.max()).item()
    if not off <= bound:  # NaN is not
        measure = "in total variation on average" if mean else "in a probability"
        raise ExportError(f"{what} by up to {off:.3g} {measure}, and {bound:g} is allowed; what was written is deleted")
    return off


def export_merged(judge: Judge, folder: Path, out: Path, dtype: str = "as stored", compare: int = 32) -> None:
    """Writes the judge saved in `folder` as a plain model folder, reads it back and compares; see above for the bounds."""
    prompts = _prompts(folder, judge, compare)
    own, tuning = _own(judge, prompts)
    with _whole_or_gone(out) as part:
        report = _merge(judge, folder, out, part, dtype, prompts, own, tuning)
        _report(part, folder, report)
    _say(out, report)


def _merge(judge: Judge, folder: Path, out: Path, part: Path, dtype: str, prompts: Sequence[str], own: torch.Tensor,
           tuning: float | None) -> dict[str, Any]:
    """Writes the merged model into `part`, which will be `out` or be made into it."""
    four_bit = bool(getattr(judge.model, "is_loaded_in_4bit", False))
    adapter = hasattr(judge.model, "peft_config")
    stored = _stored_type(judge.base) if dtype == "as stored" else getattr(torch, dtype)
    runs_in, device = judge.model.get_input_embeddings().weight.dtype, judge.device
    if dtype == "as stored" and stored.itemsize > runs_in.itemsize:  # what was rounded when it was loaded does not come back
        stored = runs_in
    needs = 3 * getattr(judge.model, "get_base_model", lambda: judge.model)().num_parameters() * runs_in.itemsize // 2
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < needs:
        device = torch.device("cpu")
        print("export: the 16-bit model does not fit beside the judge on the card; it is merged and compared on the CPU")

    def plain(path: str | Path) -> Judge:
        model = distjudge.load_model(str(path), False, str(device), len(judge.tokenizer), True, "transformers", "plain", judge.max_length,
                                      dtype=runs_in)
        return distjudge.make_judge(model, distjudge.load_tokenizer(str(part)), judge.labels, base=judge.base, spellings=judge.spellings,
                                    lora_rank=0, max_length=judge.max_length, top_k=judge.top_k)

    judge.tokenizer.save_pretrained(part)
    whole = plain(judge.base if adapter else folder / "model")
    if adapter:
        from peft import PeftModel

        whole.model = PeftModel.from_pretrained(whole.model, str(folder / "adapter")).eval()
    reference = whole.score(prompts)[0].exp()
    if adapter:
        whole.model = whole.model.merge_and_unload(safe_merge=True)
    whole.model.to(stored).save_pretrained(part)
    del whole
    gc.collect()
    read_back = plain(part)
    if read_back.tokens.sequences != judge.tokens.sequences:
        raise ExportError(f"{out}: the labels' tokens are not those of the judge; what was written is deleted")
    found = read_back.score(prompts)[0].exp()
    bound = EXACT if stored == runs_in == torch.float32 else ROUNDED
    to_base = _within(f"{out}: the merged model differs from its base with the adapter", found, reference, bound)
    about = "on 4-bit weights" if four_bit else "itself"
    allowed = (OTHER_BASE, True) if four_bit else (bound,)
    to_judge = _within(f"{out}: the merged model differs from the judge {about}", found, own, *allowed)
    report = {"form": "merged", "dtype": str(stored).removeprefix("torch."), "compared_items": len(prompts),
              "changed_by_training": tuning, "difference_to_base_with_adapter": to_base, "bound": bound}
    return report | _to_judge(to_judge, four_bit, bound)


def _to_judge(off: float | None, four_bit: bool, bound: float) -> dict[str, Any]:
    if four_bit:
        return {"mean_total_variation_to_the_4_bit_judge": off, "bound_to_the_4_bit_judge": OTHER_BASE}
    return {"difference_to_the_judge": off, "bound_to_the_judge": bound}


def _stored_type(base: str) -> torch.dtype:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    found = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None) or torch.bfloat16
    return getattr(torch, found) if isinstance(found, str) else found


def export_gguf(judge: Judge, folder: Path, out: Path, quantization: str = "q8_0", compare: int = 32, checked: bool = True,
                llama_cpp: str = "") -> None:
    """Writes one .gguf file, through Unsloth or a clone of llama.cpp, of 16-bit weights merged first, and compares it; see above."""
    prompts, four_bit = _prompts(folder, judge, compare), bool(getattr(judge.model, "is_loaded_in_4bit", False))
    own, tuning = _own(judge, prompts)
    with _whole_or_gone(out) as part:
        if llama_cpp:
            file = _gguf_by_llama_cpp(judge, folder, out, part, quantization, prompts, own, tuning, Path(llama_cpp) / CONVERTER)
        else:
            file = _gguf_by_unsloth(judge, part, quantization)
        report = {"form": "gguf", "written_by": CONVERTER if llama_cpp else "Unsloth", "quantization": quantization,
                  "compared_items": len(prompts) if checked else 0, "changed_by_training": tuning}
        off = None
        if checked:
            found, same = gguf_logprobs(file, judge, prompts)
            allowed = (OTHER_BASE, True) if four_bit else (ROUNDED,)
            off = _within(f"{out}: the GGUF file differs from the judge", found.exp(), own, *allowed)
            report["prompts_tokenized_alike"] = same
            if same < len(prompts):
                distjudge.log.warning("%s: llama.cpp tokenizes %d of %d prompts otherwise than the judge does: send it token ids", out,
                                      len(prompts) - same, len(prompts))
        report |= _to_judge(off, four_bit, ROUNDED)
        _report(part, folder, report)
    _say(out, report)
    if not checked:
        distjudge.log.warning("%s: not compared with the judge (gguf-unchecked)", out)


def _gguf_by_unsloth(judge: Judge, part: Path, quantization: str) -> Path:
    from unsloth.save import patch_saving_functions  # an adapter loaded by PEFT has only its base's methods

    try:
        made = patch_saving_functions(judge.model).save_pretrained_gguf(
            str(part / "weights"), tokenizer=judge.tokenizer, quantization_method=quantization)
        files = [Path(file) for file in made["gguf_files"]]
    except Exception as error:  # llama.cpp, the disk, the network
        raise ExportError(f"gguf: Unsloth could not write the file: {distjudge.first_line(error)}") from error
    if not files or not all(file.is_file() for file in files):
        raise ExportError(f"gguf: Unsloth says it wrote {', '.join(map(str, files)) or 'nothing'}, which is not there")
    for file in files:
        shutil.move(file, part / file.name)
    for path in (part / "weights", part / "weights_gguf"):
        shutil.rmtree(path, ignore_errors=True)
    return part / files[0].name


def _gguf_by_llama_cpp(judge: Judge, folder: Path, out: Path, part: Path, quantization: str, prompts: Sequence[str], own: torch.Tensor,
                       tuning: float | None, script: Path) -> Path:
    merged, file = part / "weights", part / f"model.{quantization.upper()}.gguf"
    from_pieces = getattr(judge.tokenizer.backend_tokenizer.model, "byte_fallback", False)  # as in SentencePiece's
    pieces = _file_of_base(judge.base, "tokenizer.model") if from_pieces else None
    own_config = _file_of_base(judge.base, "tokenizer_config.json")
    text = judge.model.config.get_text_config()
    if quantization in QUANTIZED and quantization not in BY_32 and (text.hidden_size % 256 or text.intermediate_size % 256):
        distjudge.log.warning("gguf: %s takes weights by 256, which the model's sizes, %d and %d, are not made of: llama.cpp stores "
                              "some in larger types", quantization, text.hidden_size, text.intermediate_size)
    stored = _merge(judge, folder, out, merged, "as stored", prompts, own, tuning)["dtype"]
    gc.collect()  # before another process takes as much
    # the converter goes by what transformers 5 no longer writes: which tokens are control tokens, SentencePiece's file, Phi-4's class
    added = {id: {name: getattr(token, name) for name in ("content", "lstrip", "normalized", "rstrip", "single_word", "special")}
             for id, token in judge.tokenizer.added_tokens_decoder.items()}
    config = _read(merged / "tokenizer_config.json") | {"added_tokens_decoder": added}
    if own_config and _read(own_config).get("tokenizer_class") == "GPT2Tokenizer":
        config["tokenizer_class"] = "GPT2Tokenizer"
    write_json(merged / "tokenizer_config.json", config)
    if pieces:
        shutil.copy(pieces, merged)
    first = quantization if quantization in CONVERTED else {"float16": "f16", "bfloat16": "bf16"}.get(stored, "f32")
    source = file if first == quantization else part / "unquantized.gguf"
    _converted(script, str(merged), "--outfile", str(source), "--outtype", first)
    shutil.rmtree(merged)
    if source != file:
        _quantize(source, file, quantization)
        source.unlink()
    return file


def _quantize(source: Path, file: Path, quantization: str) -> None:
    import llama_cpp

    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)  # else a line for every tensor
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{quantization.upper()}")
    if failed := llama_cpp.llama_model_quantize(str(source).encode(), str(file).encode(), options):
        raise ExportError(f"gguf: llama.cpp could not quantize the file to {quantization} (exit code {failed})")


def _file_of_base(base: str, name: str) -> Path | None:
    """A file of the base model's folder or repository; None where it has none. ExportError if that cannot be known."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import RemoteEntryNotFoundError

    if Path(base).is_dir():
        return Path(base, name) if Path(base, name).is_file() else None
    found = try_to_load_from_cache(base, name)  # a path, a mark that the repository has no such file, or None
    if found is None:
        try:
            found = hf_hub_download(base, name)
        except RemoteEntryNotFoundError:
            return None
        except Exception as error:  # offline mode, no network, no access
            raise ExportError(f"gguf: whether {base} has a file {name}, which llama.cpp would need, cannot be known; go online "
                              f"for it once: {distjudge.first_line(error)}") from error
    return Path(found) if isinstance(found, str) else None


def gguf_logprobs(path: Path, judge: Judge, prompts: Sequence[str]) -> tuple[torch.Tensor, int]:
    """Label log-probabilities (N, C) of a GGUF file, by llama-cpp-python, from the token ids that the judge itself reads; and how
    many of the N rendered prompts the tokenizer in the file turns into the same ids."""
    from llama_cpp import Llama

    encoded, tokens = judge.encode(prompts), judge.tokens
    longest = max(map(len, encoded)) + max(len(ids) for _, ids in tokens.sequences)
    try:
        llama = Llama(model_path=str(path), n_ctx=longest, logits_all=True, verbose=False)
    except ValueError as error:  # it says no more than that
        version = importlib.metadata.version("llama-cpp-python")
        raise ExportError(f"gguf: llama-cpp-python {version} cannot read the file that was made: its llama.cpp may be older than the "
                          "converter, or memory is short") from error
    rows, same = [], 0
    for prompt, ids in zip(prompts, encoded, strict=True):
        same += llama.tokenize(judge.encoder.render(prompt).encode(), add_bos=not judge.tokenizer.chat_template, special=True) == ids
        scores = []
        for n, (_, sequence) in enumerate(tokens.sequences):
            if n == 0 or tokens.whole:  # else all are read at the same place
                llama.reset()
                llama.eval([*ids, *sequence[:-1]])
                logq = torch.as_tensor(llama.scores[len(ids) - 1 : len(ids) - 1 + len(sequence)]).double().log_softmax(1)
            scores.append(sum(logq[k, token] for k, token in enumerate(sequence)))
        owner, each = torch.tensor(tokens.owner), torch.stack(scores)
        rows.append(torch.stack([each[owner == c].logsumexp(0) for c in range(len(judge.labels))]))
    return torch.stack(rows).log_softmax(1).float(), same


def _report(part: Path, folder: Path, about: dict[str, Any]) -> None:
    write_json(part / "export.json", about | {"judge": _weights_of(folder), "versions": distjudge.versions()})


def _say(out: Path, about: dict[str, Any]) -> None:
    print(f"wrote {out}")
    for name, value in about.items():
        if isinstance(value, float):
            print(f"  {name.replace('_', ' ')}: {value:.3g}")


def upload(folder: Path, name: str) -> str:
    """Uploads a run folder but for PRIVATE; returns the repository's address. Raises ExportError, and the folder stays whole."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        repo = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=repo.repo_id, folder_path=folder, ignore_patterns=PRIVATE, commit_message="Judge trained with distjudge")
    except Exception as error:  # the network, a full disk, a refusal: each an exception of its own
        raise ExportError(f"push_to_hub: {name}: {distjudge.first_line(error)}; {folder} is whole, and `python recipes/export.py "
                          f"--run {folder} --push_to_hub {name}` tries again") from error
    return str(repo)


# --- the model card ---------------------------------------------------------------------------------------------------------
CARD_METRICS = {
    "kl": "KL(votes ‖ judge), nats", "kl_noise_floor": "*noise floor*: KL(votes ‖ truth), estimated",
    "kl_marginal": "*marginal*: KL(votes ‖ training votes' mean)", "kl_truth": "KL(truth ‖ judge), nats",
    "accuracy": "accuracy: top label = majority label", "js_divergence": "Jensen-Shannon divergence, nats",
    "total_variation": "total variation", "brier": "Brier score", "emd": "earth mover's distance", "rps": "ranked probability score",
    "entropy_correlation": "correlation of entropies", "mean_correlation": "correlation of mean ratings", "label_mass": "label mass, mean",
    "label_mass_min": "label mass, least"}
NOT_SETTINGS = {"train", "test", "out", "model", "labels", "versions", "items", "votes", "prompt_hash", "resume", "report_to",
                "push_to_hub"}


def model_card(folder: Path) -> str:
    """The model card of a run folder, Markdown: what judges, what it learned from, how well it judges, how to ask it.

    Names files, not the folders they lie in, and shows no item. What the folder does not hold (test items, say) is left out.
    """
    saved, config, metrics = (_read(folder / f"{name}.json") for name in ("judge", "config", "metrics"))
    base, adapter = saved["base"], saved["weights"] == "adapter"
    local = Path(base).is_dir()
    shown_base = Path(base).name if local else base or "not named"
    head = {"library_name": "peft" if adapter else "transformers", **({} if local or not base else {"base_model": base}),
            "tags": ["distjudge", "llm-as-a-judge", "label-distribution"]}
    how = "LoRA adapters" if adapter else "all weights trained"
    return "\n".join([
        "---", *(f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in head.items()), "---", "",
        "# A judge that answers with the distribution of human votes", "",
        f"Given a prompt, it gives the probabilities of {len(saved['labels'])} labels, trained to be the shares of people who would choose",
        "each of them. Trained with distjudge, by the method of *Distributional LLM-as-a-Judge* (NeurIPS 2025, arXiv 2505.12301).", "",
        f"- base model: {_cell(shown_base)}{' (a local folder)' if local else ''}, {how}{', on 4-bit (NF4) weights' * saved['four_bit']}",
        f"- labels: {', '.join(map(_cell, saved['labels']))}",
        f"- longest prompt: {saved['max_length']} tokens, chat template included", "",
        *_data_lines(config), *_metrics_lines(folder, metrics, config), *_prompt_lines(folder, saved),
        "## How to load", "", "The folder of this card, here `RUN`, is all it takes (`huggingface_hub.snapshot_download` fetches one):", "",
        "```python", "import distjudge", "", 'judge = distjudge.load_judge("RUN")', "judge.predict([prompt])      # (1, "
        f"{len(saved['labels'])}) probabilities, in the order of the labels above", "```", "", *_peft_lines(adapter, shown_base),
        *_export_lines(folder), *_settings_lines(config),
        "## Limits", "",
        "It repeats the judgments of the people it learned from, on prompts like theirs, with the instructions used here. Its label mass",
        "says whether the model, free to say anything, would answer with a label: training does not teach it to. Licences of the base",
        "model and of the data apply.", ""])


def _fence(text: str, least: int) -> str:
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))


def _cell(text: Any) -> str:
    """Text from elsewhere as one cell of a table: as code, so that it is nothing else."""
    shown = " ".join(str(text).split()).replace("|", "\\|")
    mark, pad = _fence(shown, 1), " " if "`" in shown else ""
    return f"{mark}{pad}{shown}{pad}{mark}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", "| --- " * len(head) + "|", *(f"| {' | '.join(row)} |" for row in rows), ""]


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise InputError(f"{path}: broken JSON: {error}") from None


def _data_lines(config: dict[str, Any]) -> list[str]:
    if not config:
        return []
    rows = []
    for side in ("train", "test"):
        files = config[side] or config["train"]
        split = "" if config["test"] else ", a part of it"
        votes = config.get("votes", {}).get(side)
        rows.append([side, ", ".join(_cell(Path(name).name) for name in files) + split if files else "not named",
                     f"{config['items'][side]:,}", "–" if votes is None else f"{votes:,.0f}"])
    return ["## Data", "", *_table(["", "files", "items", "votes"], rows)]


def _metrics_lines(folder: Path, metrics: dict[str, Any], config: dict[str, Any]) -> list[str]:
    """The metrics, with 95 % intervals where predictions.jsonl is there to draw from."""
    path, ends = folder / "predictions.jsonl", {}
    if not metrics:
        return []
    if path.is_file():
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        labels = list(rows[0]["predicted"])
        items = [distjudge.Item(row["id"], "", {label: row["counts"][label] for label in labels}, row.get("group"), truth=row.get("truth"))
                 for row in rows]
        q = [[row["predicted"][label] for label in labels] for row in rows]
        for name, scores in distjudge.item_scores(q, items, config.get("ordered")).items():
            found = distjudge.bootstrap(scores[None], groups=[item.group for item in items])
            ends[name] = "–" if found["low"] is None else f"{found['low']:.3f} to {found['high']:.3f}"
    known = {name: metrics[name] for name in CARD_METRICS if metrics.get(name) is not None}
    shown = [[CARD_METRICS[name], f"{value:.3f}", ends.get(name, "–")] for name, value in known.items()]
    return ["## Metrics", "", *_table([f"on {metrics['items']:,} test items", "", "95 % interval"], shown),
            "Intervals are of a bootstrap over groups of items: they speak of new items, not of training again. KL to votes cannot",
            "fall much below its noise floor, for the votes scatter around the truth.", ""]


def _prompt_lines(folder: Path, saved: dict[str, Any]) -> list[str]:
    tokenizer = distjudge.load_tokenizer(str(folder / "tokenizer"))
    prompt = f"{saved['frame']['before']}{{prompt}}{saved['frame']['after']}"
    how = ("Each label is scored as a whole, closed by the end of the turn, and scores are normalised over the labels." if saved["whole"]
           else "Labels are read where the answer begins, by a softmax over their first tokens; spellings of one label are added up.")
    rows = [[_cell(saved["labels"][label]), " ".join(_cell(repr(tokenizer.decode([token]))) for token in ids), " ".join(map(str, ids))]
            for label, ids in saved["sequences"]]
    return ["## Prompt and label tokens", "", _fence(prompt, 3), prompt, _fence(prompt, 3), "",
            "What stands for `{prompt}` is encoded as text: control tokens written in it stay characters. " + how, "",
            *_table(["label", "tokens", "ids"], rows)]


def _peft_lines(adapter: bool, base: str) -> list[str]:
    return ["or, with PEFT alone, the model whose last position gives the labels' logits:", "", "```python",
            "from peft import PeftModel", "from transformers import AutoModelForCausalLM", "",
            f"base = AutoModelForCausalLM.from_pretrained({json.dumps(base)})", 'model = PeftModel.from_pretrained(base, "RUN/adapter")',
            "```", ""] if adapter else []


def _export_lines(folder: Path) -> list[str]:
    lines = []
    for name in ("merged", "gguf"):
        report = _read(folder / name / "export.json")
        if report.get("judge") == _weights_of(folder):  # else it was made of another one
            rows = [[field.replace("_", " "), f"{value:.3g}" if isinstance(value, float) else _cell(value)]
                    for field, value in report.items() if field not in ("judge", "versions") and value is not None]
            compared = "Its label probabilities, read back from the files, were compared with the judge's."
            lines += [f"## {_cell(name)}", "", compared if report["compared_items"] else "**Not compared with the judge.**", "",
                      *_table(["", ""], rows)]
    return lines


def _settings_lines(config: dict[str, Any]) -> list[str]:
    if not config:
        return []
    rows = [[name, _cell(json.dumps(value, ensure_ascii=False))] for name, value in config.items() if name not in NOT_SETTINGS]
    versions = ", ".join(f"{name} {version}" for name, version in config["versions"].items())
    return ["## Settings and versions", "", *_table(["setting", "value"], rows), f"{versions}.", ""]


def main(config: ExportConfig) -> None:
    folder = Path(config.run)
    if not (folder / "judge.json").is_file():
        raise InputError(f"{config.run}: not a run folder with a judge: judge.json is missing")
    out = Path(config.out) if config.out else folder / config.export.removesuffix("-unchecked")
    if config.export != "none" and out.exists():
        raise InputError(f"{out}: exists already")
    if config.llama_cpp and not config.export.startswith("gguf"):
        raise InputError(f"llama_cpp: is for --export gguf, not {config.export}")
    if config.dtype != "as stored" and config.export != "merged":
        raise InputError(f"dtype: is for --export merged, not {config.export}")
    if config.compare < 1:
        raise InputError(f"compare: must be 1 or more, not {config.compare}")
    adapters = (folder / "adapter").is_dir()
    backend = "unsloth" if config.export.startswith("gguf") and not config.llama_cpp else "transformers"
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError("device: there is no CUDA device")
    check(config.export, config.push_to_hub, config.run, adapters, "auto" if backend == "unsloth" else backend, config.quantization,
          config.llama_cpp)
    judge: Any = load_judge(config.run, device=config.device or None, backend=backend) if config.export != "none" else None
    finish(judge, folder, config.export, config.push_to_hub, out=out, dtype=config.dtype, quantization=config.quantization,
           compare=config.compare, llama_cpp=config.llama_cpp)
    print(f"wrote {folder / 'README.md'}")


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    distjudge.cli(main, ExportConfig)
