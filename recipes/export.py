"""After training: a plain model folder or a GGUF file of a judge, its model card, an upload to a hub.

    python recipes/export.py --run runs/first --export merged          # runs/first/merged, a model folder
    python recipes/export.py --run runs/first --export gguf --llama_cpp llama.cpp     # runs/first/gguf
    python recipes/export.py --run runs/first --push_to_hub me/judge   # the run folder; a new one is private
    python recipes/export.py --run runs/first                          # its model card, as every call does

    merged           the adapters are added to the base's own weights, in the type they are stored in; a
                     judge trained on 4-bit weights is merged into the base that was not rounded
    gguf             one file for llama.cpp and Ollama, by the converter of --llama_cpp, a clone that need not
                     be built (pip install gguf sentencepiece), and compared through llama-cpp-python
    gguf-unchecked   the same without the comparison; measure it with recipes/api.py before you trust it

What is written is read back and compared with the judge on 32 test items (three prompts of ours where there
are none). What is off by more than the bounds of recipes/README.md is deleted, with exit code 1. export.json
says how far it was off.
"""

import dataclasses
import gc
import importlib.util
import json
import logging
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import distjudge
from distjudge import InputError, Judge, first_line, load_judge, write_json

import torch

PROBES = ["Is this fine?", "Rate the answer. It was good, and the service was bad.", "One more: 12345."]
LARGEST, MEAN = "largest difference in a probability", "mean total variation"
# what the weights are held in: how far a judge may move. All but the first are chosen
BOUNDS = {"float32": (LARGEST, 1e-4), "16 bits": (LARGEST, 0.05)}
BOUNDS |= {"q8_0": (LARGEST, 0.1), "fewer bits": (MEAN, 0.1)}
START = "spawn"  # how a process of its own begins; a fork could hang, after torch's threads
CONVERTER, CONVERTED = "convert_hf_to_gguf.py", ("f32", "f16", "bf16", "q8_0")
TYPE = "LLAMA_FTYPE_MOSTLY_"  # of what llama-cpp-python can quantize to
# not uploaded: what is of this machine only, and what shows test items
PRIVATE = ["checkpoints/*", "*.part*", "adapter/README.md", "predictions.jsonl", "*.html"]
PRIVATE += ["plots/bars.*", "plots/compare.*"]


class ExportError(RuntimeError):
    """An export or an upload failed, or what was written judges otherwise. The judge is as it was."""


@dataclasses.dataclass
class ExportConfig:
    run: str
    """The run folder of a trained judge."""
    export: Literal["none", "merged", "gguf", "gguf-unchecked"] = "none"
    """What to make: a model folder, a GGUF file compared with the judge, or one that is not."""
    out: str = ""
    """Where it goes; it must not exist yet. Default: merged or gguf in the run folder."""
    quantization: str = "q8_0"
    """gguf: how llama.cpp stores the weights (f16, q8_0, q4_k_m, ...)."""
    llama_cpp: str = ""
    """gguf: a clone of llama.cpp, for its converter."""
    push_to_hub: str = ""
    """Upload the run folder, without test items and checkpoints, to this repository (NAME or OWNER/NAME)."""


def read(path: Path) -> dict[str, Any]:
    return distjudge.read_json(path) if path.is_file() else {}


def export_of(folder: Path, name: str) -> dict[str, Any]:
    """The export.json of merged/ or gguf/ in a run folder; {} if there is none, or one of another judge."""
    report = read(folder / name / "export.json")
    return report if report.get("judge") == identity(folder) else {}


def identity(folder: Path) -> str:
    """A hash of the judge of a run folder, whatever its calibration, which no export carries."""
    saved = read(folder / "judge.json")
    return distjudge.digest_of({name: saved[name] for name in saved if name not in ("digest", "calibration")})


# --- before the work: what cannot be done -----------------------------------------------------------------
def check(config: ExportConfig, folder: Path, out: Path) -> str:
    """Raises InputError for what cannot work. Returns where the merged model fits: cuda or cpu."""
    form, base, device = config.export, read(folder / "judge.json")["base"], "cpu"
    adapters = (folder / "adapter").is_dir()
    if "gguf" not in form and (config.llama_cpp or config.quantization != ExportConfig.quantization):
        name = "llama_cpp" if config.llama_cpp else "quantization"
        raise InputError(f"{name}: is for --export gguf, not {form}")
    if config.out and form == "none":
        raise InputError("out: the model card goes into the run folder; --export says what goes elsewhere")
    if form != "none":
        if out.exists():
            raise InputError(f"{out}: exists already")
        if form != "merged":
            check_gguf(config)
        device = check_base(base, adapters)
    if config.push_to_hub and adapters and Path(base).is_dir():
        if out != folder / "merged" and not export_of(folder, "merged"):
            remedy = "leave out --out" if form == "merged" else "add --export merged"
            raise InputError(f"push_to_hub: others do not have the base model, {base}: {remedy}")
    return device


def room() -> tuple[int, int]:
    """Bytes of main memory, and of memory free on the card; 0 where there is no card."""
    import psutil

    card = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
    return psutil.virtual_memory().total, card


def check_base(base: str, adapters: bool) -> str:
    """Raises InputError where the base is gone, quantized or too large. Returns where it fits."""
    outline = distjudge.load_model(base, device="cpu", weights=False)
    quantized = getattr(outline.config, "quantization_config", None)
    if quantized and adapters:
        raise InputError(f"export: {base} holds quantized weights, and adapters are merged into 16-bit ones")
    main, card = room()
    weights = outline.num_parameters()
    needs = weights * (2 if card and adapters else 4)
    if needs <= 0.9 * card:  # a tenth for what is computed with them
        return "cuda"
    if needs > main:  # the system would kill the process
        here = f"{main / 2**30:.1f} of main memory, {card / 2**30:.1f} on a card"
        there = f"{needs / 2**30:.1f} GiB for {weights / 1e9:.1f} billion weights"
        raise InputError(f"export: this needs {there}, and there are {here}: use a larger machine")
    return "cpu"


def check_gguf(config: ExportConfig) -> None:
    script, installed = Path(config.llama_cpp) / CONVERTER, importlib.util.find_spec("llama_cpp") is not None
    if config.export == "gguf" and not installed:
        raise InputError("export: gguf needs llama-cpp-python, not installed here; gguf-unchecked does not")
    if not config.llama_cpp or not script.is_file():
        where = f"{script} is not there" if config.llama_cpp else "gguf needs a clone of llama.cpp"
        raise InputError(f"llama_cpp: {where}: git clone https://github.com/ggml-org/llama.cpp")
    if importlib.util.find_spec("sentencepiece") is None:  # imported late, for every kind of tokenizer
        raise InputError(f"llama_cpp: {CONVERTER} needs sentencepiece: pip install gguf sentencepiece")
    convert(script, "--help", error=InputError)
    types = dir(importlib.import_module("llama_cpp")) if installed else []
    known = [*CONVERTED, *(name.removeprefix(TYPE).lower() for name in types if TYPE in name)]
    if config.quantization not in known:
        raise InputError(f"quantization: must be one of {', '.join(known)}, not {config.quantization}")


def convert(script: Path, *arguments: str, error: type[Exception] = ExportError) -> None:
    """Runs llama.cpp's converter. Raises the error with its last line, or with the exit code if killed."""
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    lines = done.stderr.strip().splitlines() if done.returncode > 0 else []
    if done.returncode:
        said = lines[-1] if lines else f"exit code {done.returncode}"
        raise error(f"llama_cpp: {script.name} failed: {distjudge.short(said, 300)}")


# --- the export -------------------------------------------------------------------------------------------
def export_judge(judge: Judge, config: ExportConfig, folder: Path, out: Path, device: str = "cpu") -> None:
    """Writes the judge saved in `folder` as config says, reads it back and compares it.

    The judge loses its model, which is loaded again to be merged. Raises ExportError and leaves no files if
    what was written judges otherwise by more than the bounds above.
    """
    form, model, prompts = config.export, judge.model, prompts_of(folder, judge)
    four_bit = getattr(model, "is_loaded_in_4bit", False)
    to = "the 4-bit judge" if four_bit else "the judge"
    own, n = judge.score(prompts)[0].exp(), len(prompts)
    report: dict[str, Any] = {"form": form, "compared_items": n}
    if hasattr(model, "peft_config"):
        with model.disable_adapter():
            report["changed_by_training"] = (judge.score(prompts)[0].exp() - own).abs().max().item()
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        runs_in, judge.model, model = model.get_input_embeddings().weight.dtype, None, None
        merged = part if form == "merged" else part / "weights"
        stored, reference, found = merge(judge, folder, merged, prompts, runs_in, device)
        report["dtype"] = str(stored).removeprefix("torch.")
        held = "float32" if stored == runs_in == torch.float32 else "16 bits"
        if "changed_by_training" in report:
            report |= compare("merged weights", "their base with the adapter", found, reference, held)
        report |= compare("merged weights", to, found, own, "fewer bits" if four_bit else held)
        if form != "merged":
            report["quantization"] = config.quantization
            file = make_gguf(judge, part, config)
            report["size"] = f"{file.stat().st_size / 1e6:,.0f} MB"  # k-quants keep some tensors larger
        if form == "gguf":
            found, same = gguf_logprobs(file, judge, prompts)
            held = config.quantization if config.quantization in BOUNDS else "16 bits"
            held = "fewer bits" if four_bit or config.quantization not in CONVERTED else held
            report |= compare("GGUF file", to, found.exp(), own, held) | {"prompts_tokenized_alike": same}
            if same < n:
                but = "otherwise than the judge does: send it token ids"
                distjudge.log.warning(f"{out}: llama.cpp tokenizes {n - same} of {n} prompts {but}")
        if form == "gguf-unchecked":
            report["compared_items"] = 0
            distjudge.log.warning(f"{out}: the file was not compared with the judge (gguf-unchecked)")
        about = {"judge": identity(folder), "versions": distjudge.versions()}
        write_json(part / "export.json", report | about)
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    print(f"wrote {out}", *(f"  {name}: {value}" for name, value in report.items()), sep="\n")


def prompts_of(folder: Path, judge: Judge) -> list[str]:
    path = folder / "predictions.jsonl"
    rows = distjudge.rows_of(path)[:32] if path.is_file() else []
    found = [distjudge.prompt_text(row["prompt"]) for row in rows]
    return [prompt for prompt in found if len(judge.encoder(prompt)) <= judge.max_length] or PROBES


def compare(what: str, to: str, found: torch.Tensor, own: torch.Tensor, held: str) -> dict[str, Any]:
    """How far probabilities (N, C) are apart, an entry of export.json. held: a key of BOUNDS.

    Raises ExportError above that bound.
    """
    gap, (unit, bound) = (found - own).abs(), BOUNDS[held]
    off = (gap.max() if unit == LARGEST else gap.sum(1).mean() / 2).item()
    if not off <= bound:  # NaN is not
        raise ExportError(f"{what} against {to}: {unit} {off:.3g}, and {bound:g} is allowed: deleted")
    return {f"{what} against {to}": {unit: off, "bound": bound}}


def merge(
    judge: Judge, folder: Path, part: Path, prompts: Sequence[str], runs_in: torch.dtype, device: str
) -> tuple[torch.dtype, torch.Tensor, torch.Tensor]:
    """Writes a plain model folder of the judge saved in `folder`, whose own model is not needed.

    Returns the type of the weights written, and label probabilities (N, C): of the base with the adapter, and
    of what was written, read back.
    """
    from transformers import AutoConfig

    def plain(path: str, adapter: Path | None = None) -> Judge:
        options = {"device": device, "dtype": runs_in, "max_length": judge.max_length}
        model, tokenizer = distjudge.load_model(path, **options), distjudge.load_tokenizer(str(part))
        about: dict[str, Any] = {"spellings": judge.spellings, "max_length": judge.max_length}
        return distjudge.make_judge(model, tokenizer, judge.labels, lora_rank=0, adapter=adapter, **about)

    gc.collect()
    judge.tokenizer.save_pretrained(part)
    base, adapter = read(folder / "judge.json")["base"], folder / "adapter"
    config = AutoConfig.from_pretrained(base)
    stored = config.dtype or config.get_text_config().dtype or torch.bfloat16
    stored = min(stored, runs_in, key=lambda kind: kind.itemsize)  # what loading rounded does not come back
    whole = plain(base, adapter) if adapter.is_dir() else plain(str(folder / "model"))
    reference = whole.score(prompts)[0].exp()
    model = whole.model.merge_and_unload(safe_merge=True) if adapter.is_dir() else whole.model
    model.to(stored).save_pretrained(part)
    del whole, model
    gc.collect()
    return stored, reference, plain(str(part)).score(prompts)[0].exp()


def make_gguf(judge: Judge, part: Path, config: ExportConfig) -> Path:
    """Turns the merged model in part/weights into a GGUF file.

    The converter goes by what transformers 5 does not write: which tokens are control tokens, and, from the
    base, SentencePiece's file and the class of Phi-4's tokenizer.
    """
    from huggingface_hub import snapshot_download

    names, merged = ["tokenizer.model", "tokenizer_config.json"], part / "weights"
    base = judge.base if Path(judge.base).is_dir() else snapshot_download(judge.base, allow_patterns=names)
    keys = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    added = judge.tokenizer.added_tokens_decoder.items()
    about = read(merged / names[1])
    about["added_tokens_decoder"] = {id: {key: getattr(token, key) for key in keys} for id, token in added}
    if read(Path(base, names[1])).get("tokenizer_class") == "GPT2Tokenizer":
        about["tokenizer_class"] = "GPT2Tokenizer"
    write_json(merged / names[1], about)
    if Path(base, names[0]).is_file():
        shutil.copy(Path(base, names[0]), merged)
    kind, script = config.quantization, Path(config.llama_cpp) / CONVERTER
    file = part / f"model.{kind.upper()}.gguf"
    whole, first = (file, kind) if kind in CONVERTED else (part / "whole.gguf", "auto")
    convert(script, str(merged), "--outfile", str(whole), "--outtype", first)
    shutil.rmtree(merged)
    if whole != file:
        apart(quantize, whole, file, kind)
        whole.unlink()
    return file


def apart(work: Callable[..., Any], *given: Any) -> Any:
    """work(*given) in a process of its own, which a crash inside llama.cpp ends. Raises ExportError."""
    quiet = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_DFL)}  # at Ctrl-C
    with ProcessPoolExecutor(1, multiprocessing.get_context(START), **quiet) as pool:
        found, (process,) = pool.submit(work, *given), multiprocessing.active_children()
    error = found.exception()
    if error and not isinstance(error, ExportError):
        how = f"exit code {process.exitcode}" if process.exitcode else first_line(error)
        raise ExportError(f"gguf: llama.cpp crashed ({how})") from None
    return found.result()


def quantize(source: Path, file: Path, kind: str) -> None:
    import llama_cpp

    logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL)  # else a line for every tensor
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, TYPE + kind.upper())
    if failed := llama_cpp.llama_model_quantize(str(source).encode(), str(file).encode(), options):
        raise ExportError(f"gguf: llama.cpp could not quantize the file to {kind} (exit code {failed})")


def gguf_logprobs(path: Path, judge: Judge, prompts: Sequence[str]) -> tuple[torch.Tensor, int]:
    """Label log-probabilities (N, C) of a GGUF file, from the token ids that the judge itself reads.

    Also returns how many rendered prompts the file's own tokenizer turns into the same ids. The judge's model
    is not needed. Raises ExportError if llama-cpp-python cannot read the file, or crashes.
    """
    encoded, tokens = judge.encode(prompts), judge.tokens
    texts = [judge.encoder.render(prompt).encode() for prompt in prompts]
    sequences = [ids for _, ids in tokens.sequences]
    add_bos = not judge.tokenizer.chat_template
    scores, same = apart(gguf_scores, path, texts, encoded, sequences, tokens.whole, add_bos)
    owner, scores = torch.tensor(tokens.owner), torch.tensor(scores, dtype=torch.float64)
    labels = [scores[:, owner == label].logsumexp(1) for label in range(len(judge.labels))]
    return torch.stack(labels, dim=1).log_softmax(1).float(), same


def gguf_scores(
    path: Path,
    texts: Sequence[bytes],
    encoded: Sequence[list[int]],
    sequences: Sequence[Sequence[int]],
    whole: bool,
    add_bos: bool,
) -> tuple[list[list[float]], int]:
    """For each prompt the log-probability of each spelling; and how many texts get the ids in `encoded`."""
    from llama_cpp import Llama

    longest = max(map(len, encoded)) + max(map(len, sequences))
    try:
        llama = Llama(model_path=str(path), n_ctx=longest, logits_all=True, verbose=False)
    except ValueError as error:  # it says no more than that
        why = "its llama.cpp may be older than the converter, or memory is short"
        raise ExportError(f"gguf: llama-cpp-python cannot read the file that was made: {why}") from error
    rows, same = [], 0
    for text, ids in zip(texts, encoded, strict=True):
        same += llama.tokenize(text, add_bos=add_bos, special=True) == ids
        rows.append([])
        for n, sequence in enumerate(sequences):
            if n == 0 or whole:  # else all are read at the same place
                llama.reset()
                llama.eval([*ids, *sequence[:-1]])
                logits = torch.as_tensor(llama.scores[len(ids) - 1 : len(ids) - 1 + len(sequence)])
                logq = logits.double().log_softmax(1)
            rows[-1].append(sum(logq[k, token].item() for k, token in enumerate(sequence)))
    return rows, same


# --- the upload -------------------------------------------------------------------------------------------
def open_repository(name: str) -> str:
    """Makes a private repository, or finds it. Raises InputError: no token, no right, no network."""
    from huggingface_hub import HfApi, get_token

    if not get_token():
        raise InputError("push_to_hub: no token: run `hf auth login`, or set HF_TOKEN")
    try:
        return HfApi().create_repo(name, private=True, exist_ok=True).repo_id
    except Exception as error:  # each reason is an exception of its own
        raise InputError(f"push_to_hub: {name}: {first_line(error)}") from None


def upload(folder: Path, repository: str) -> None:
    """Uploads a run folder without PRIVATE files and exports of earlier judges. ExportError if that fails."""
    from huggingface_hub import HfApi

    old = [f"{form}/*" for form in ("merged", "gguf") if not export_of(folder, form)]
    try:
        HfApi().upload_folder(repo_id=repository, folder_path=folder, ignore_patterns=PRIVATE + old)
    except Exception as error:  # the network, a full disk, a quota
        raise ExportError(f"push_to_hub: {repository}: {first_line(error)}; {folder} is whole") from error


# --- the model card -----------------------------------------------------------------------------------------
CARD = """---
library_name: {library}
{hub}tags: ["distjudge", "llm-as-a-judge", "label-distribution"]
---

# A judge that answers with the distribution of human votes

Given a prompt, it gives the probabilities of {n} labels, trained to be the shares of people who would choose
each. Trained with distjudge, as in *Distributional LLM-as-a-Judge* (NeurIPS 2025).

{about}

{metrics}## Prompt and label tokens

{frame}

What stands for `{{prompt}}` is encoded as text: control tokens written in it stay characters. Labels are read
{reading}. Each label, its tokens and their ids:

{tokens}

## How to load

{needed} (`huggingface_hub.snapshot_download` fetches one):

```python
import distjudge

judge = distjudge.load_judge({load})
judge.predict([prompt])      # (1, {n}) probabilities, in the order of the labels above
```

{peft}{more}## Limits

It repeats the judgments of the people it learned from, on prompts like theirs, with the same instructions.
Licences of the base model and of the data apply.
"""
METRICS = """## Metrics

| on {items:,} test items | | 95 % interval |
| --- | --- | --- |
{lines}
`kl` is KL(votes ‖ judge) in nats; it cannot fall much below `kl_noise_floor`, for votes scatter around the
truth. `kl_marginal` is that of the training votes' mean. Intervals: a bootstrap over groups of items.

"""
PEFT = """or, with PEFT alone and the base model, the model whose last position gives the labels' logits:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({})
model = PeftModel.from_pretrained(base, "RUN/adapter")
```

"""


def fenced(content: Any) -> str:
    """Text from elsewhere, or anything as JSON, as a block of code, so that it is nothing else."""
    text = content if isinstance(content, str) else json.dumps(content, indent=1, ensure_ascii=False)
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks}\n{text}\n{ticks}"


def model_card(folder: Path) -> str:
    """The model card of a run folder, in Markdown. Raises InputError for broken JSON.

    It names files, not the folders they lie in, and shows no item. What the folder does not hold is left out.
    """
    saved, tokenizer = read(folder / "judge.json"), distjudge.load_tokenizer(str(folder / "tokenizer"))
    base, adapter, local = saved["base"], saved["adapter"], Path(saved["base"]).is_dir()
    shown, labels = Path(base).name if local else base or "not named", saved["labels"]
    how = "LoRA adapters" if adapter else "all weights trained"
    about = f"base model: {shown}{' (a local folder)' * local}, {how}"
    about += f"{', on 4-bit (NF4) weights' * saved['four_bit']}\nlabels: {', '.join(labels)}"
    reading = "where the answer begins, by a softmax over their first tokens; spellings are added up"
    load, needed = '"RUN"', "The folder of this card, here `RUN`, is all it takes"
    if local and adapter:
        needed = "The folder of this card is `RUN`. Its base model must be where it was in training"
        if export_of(folder, "merged"):
            needed = "`merged`, in the folder of this card, is all it takes"
            spelled = f", spellings={saved['spellings']}" if saved["spellings"] else ""
            load = f'"RUN/merged", {labels}{spelled}'
    if any(len(ids) > 1 for _, ids in saved["sequences"]):
        reading = "as a whole, each closed by the end of the turn"
    piece, tokens = lambda token: repr(tokenizer.decode([token])), []
    for label, ids in saved["sequences"]:
        tokens.append(f"{labels[label]}: {' '.join(map(piece, ids))} {ids}")
    more, config = "", read(folder / "config.json")
    if fitted := saved.get("calibration"):
        more = f"## Calibration\n\nIts answers are corrected by the votes on {fitted['items']:,} items. "
        more += "Metrics above are of before. What reads the weights alone does not correct them.\n\n"
    for name in ("merged", "gguf"):
        if report := export_of(folder, name):
            said = "Read back and compared with" if report["compared_items"] else "**Not compared with**"
            own = {field: report[field] for field in report if field not in ("judge", "versions")}
            more += f"## `{name}`\n\n{said} the judge.\n\n{fenced(own)}\n\n"
    if config:
        own = {name: config[name] for name in config if name not in ("out", "model", "resume", "prompt_hash")}
        own |= {side: [Path(name).name for name in config.get(side, ())] for side in ("train", "test")}
        more += f"## Data and settings\n\n{fenced(own)}\n\n"
    return CARD.format(
        library="peft" if adapter else "transformers",
        hub="" if local or not base else f"base_model: {json.dumps(base)}\n",
        n=len(labels),
        about=fenced(f"{about}\nlongest prompt: {saved['max_length']} tokens, chat template included"),
        metrics=metrics_section(folder),
        frame=fenced(saved["frame"]["before"] + "{prompt}" + saved["frame"]["after"]),
        reading=reading,
        needed=needed,
        load=load,
        tokens=fenced("\n".join(tokens)),
        peft=PEFT.format(json.dumps("BASE" if local else shown)) * adapter,
        more=more,
    )


def metrics_section(folder: Path) -> str:
    """The metrics, with 95 % intervals where predictions.jsonl is there to draw from."""
    metrics, path, ends = read(folder / "metrics.json"), folder / "predictions.jsonl", {}
    if path.is_file():
        rows = distjudge.rows_of(path)
        items = [distjudge.Item(r["id"], "", r["counts"], r.get("group"), truth=r.get("truth")) for r in rows]
        scores = distjudge.item_scores([list(r["predicted"].values()) for r in rows], items)
        for name, values in scores.items():
            found = distjudge.bootstrap(values[None], groups=[item.group for item in items])
            if found["low"] is not None:
                low, high = distjudge.within(name, found["low"]), distjudge.within(name, found["high"])
                ends[name] = f"{low:.3f} to {high:.3f}"
    known = {name: value for name, value in metrics.items() if isinstance(value, float)}
    lines = [f"| `{name}` | {value:.3f} | {ends.get(name, '')} |\n" for name, value in known.items()]
    return METRICS.format(items=metrics["items"], lines="".join(lines)) if metrics else ""


def main(config: ExportConfig) -> None:
    folder, form = Path(config.run), config.export
    if "digest" not in read(folder / "judge.json"):
        raise InputError(f"{config.run}: not a run folder: there is no judge.json of distjudge in it")
    out = Path(config.out) if config.out else folder / form.removesuffix("-unchecked")
    device = check(config, folder, out)
    repository = open_repository(config.push_to_hub) if config.push_to_hub else ""
    if not sys.stderr.isatty():
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()  # of loading weights
    judge = load_judge(config.run, backend="transformers", bf16=False) if form != "none" else None
    try:
        if judge:
            if judge.calibration:
                distjudge.log.warning("%s cannot carry the calibration: it answers as before it", out)
                judge.calibration = None
            export_judge(judge, config, folder, out, device)
    finally:
        (folder / "README.md").write_text(model_card(folder), encoding="utf-8")
    print(f"wrote {folder / 'README.md'}")
    if repository:
        upload(folder, repository)
        print(f"uploaded to {repository}")


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    distjudge.cli(main, ExportConfig, failures=(ExportError,))
