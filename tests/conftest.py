"""What the tests share: small models on disk, a tokenizer of our own, and the data sets if there are any."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# on a busy machine models this small are several times faster on one thread, in commands the tests start too
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell has it ignored
sys.path[:0] = [str(ROOT), str(ROOT / "recipes"), str(ROOT / "data")]

import pytest
import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 1, "max_position_embeddings": 512}
DATA = Path(os.environ.get("DISTJUDGE_DATA") or ROOT.parent / "shared" / "data")


def call(script, *arguments, code=0, **options):
    """Runs a script of the kit in a process of its own; its exit code must be this."""
    command = [sys.executable, ROOT / script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == code, done.stderr[-3000:]
    return done


def write_rows(path, rows):
    """Writes rows as JSON lines, a text as the line it is; returns the path."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def change_json(path, **fields):
    """Changes fields of a JSON file; ... takes one out."""
    there = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({key: value for key, value in there.items() if value is not ...}))


def change_weights(path, change):
    """Replaces each tensor of a safetensors file by change(name, tensor); None takes it out."""
    from safetensors.torch import load_file, save_file

    changed = {name: change(name, tensor) for name, tensor in load_file(path).items()}
    save_file({k: w for k, w in changed.items() if w is not None}, path, metadata={"format": "pt"})


def need(path: Path) -> Path:
    if not path.exists():
        where = path.relative_to(path.parents[1])
        pytest.skip(f"needs {where}: set DISTJUDGE_DATA to the folder of data sets")
    return path


@pytest.fixture(scope="session")
def data_dir():
    return lambda name: need(DATA / name)


@pytest.fixture(scope="session")
def tokenizers_dir():
    """The folder of real tokenizers and chat templates beside the data sets."""
    return lambda name: need(DATA.parent / "tokenizers" / name)


@pytest.fixture(scope="session")
def llama_cpp_clone():
    """The folder of a clone of llama.cpp, with what its converter and the comparison need."""
    clone = os.environ.get("DISTJUDGE_LLAMA_CPP", "")
    if not Path(clone, "convert_hf_to_gguf.py").is_file():
        pytest.skip("needs DISTJUDGE_LLAMA_CPP, a clone of llama.cpp")
    for package in ("llama_cpp", "sentencepiece"):
        pytest.importorskip(package)
    return clone


@pytest.fixture(scope="session")
def tiny_tokenizer():
    from tiny import build_tokenizer

    words = ["Is this fine? Answer with a label: yes, no, maybe."]
    words += ["The soup was good and the service was bad.", "entailment neutral contradiction"]
    return build_tokenizer(words * 3 + [str(n) for n in range(11)], 500)


@pytest.fixture(scope="session")
def qwen2(tiny_tokenizer):
    """A factory of Qwen2 models with random weights, large enough for predictions to differ by prompt."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    def make(**changes):
        more = {"vocab_size": len(tiny_tokenizer), "tie_word_embeddings": False, "initializer_range": 0.1}
        torch.manual_seed(0)
        return Qwen2ForCausalLM(Qwen2Config(**(SIZES | more | changes)))

    return make


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, qwen2, tiny_tokenizer):
    """The folder of a small model."""
    folder = tmp_path_factory.mktemp("tiny_model")
    qwen2().save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


ARCHITECTURES = {
    "Qwen2": {},
    "Qwen3": {"head_dim": 16},
    "Llama": {"attention_bias": True},
    "Mistral": {"sliding_window": 8},
    "Phi3": {},
    "Gemma2": {"head_dim": 16, "final_logit_softcapping": 3.0, "sliding_window": 8},
    "Gemma3Text": {"head_dim": 16, "sliding_window": 8},
    "Cohere": {"logit_scale": 0.3},
    "Granite": {"logits_scaling": 7.0},
}


@pytest.fixture(scope="session", params=ARCHITECTURES)
def architecture(request, tmp_path_factory, tiny_tokenizer):
    """The folder of a small model of each kind, with weights large enough for opinions."""
    import transformers

    ids = {"vocab_size": len(tiny_tokenizer), "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 3}
    ids |= {"initializer_range": 0.2}
    kind = getattr(transformers, f"{request.param}Config")
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp(request.param)
    config = kind(**SIZES, **ids, **ARCHITECTURES[request.param])
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def saved_run(tiny_model, tmp_path_factory):
    """A run folder with a judge of tiny_model; not to be changed, but copied."""
    from distjudge import load_judge, save_judge

    folder = tmp_path_factory.mktemp("saved") / "run"
    save_judge(load_judge(tiny_model, ["yes", "no"], lora_rank=2), folder)
    return folder


@pytest.fixture
def votes():
    """A factory of n items over labels, with different prompts and votes."""
    import distjudge

    def make(n=8, labels=("1", "2", "3"), seed=0):
        draw = torch.Generator().manual_seed(seed)
        words = ["good", "bad", "soup", "service", "and", "the", "was", "fine"]
        rows = []
        for i in range(n):
            text = " ".join(words[j] for j in torch.randint(len(words), (3 + i % 5,), generator=draw))
            counts = torch.randint(0, 4, (len(labels),), generator=draw)
            counts[i % len(labels)] += 1
            named = dict(zip(labels, counts.tolist(), strict=True))
            rows.append({"id": f"i{i}", "prompt": f"Rate {i}: {text}", "counts": named})
        return distjudge.load_items(rows)

    return make


@pytest.fixture
def items_file(votes, tmp_path):
    """A factory of n items and a file of them."""

    def make(n):
        rows = [{"id": item.id, "prompt": item.prompt, "counts": item.counts} for item in votes(n)]
        return votes(n), write_rows(tmp_path / "items.jsonl", rows)

    return make


@pytest.fixture
def ended(monkeypatch, capsys):
    """Runs a command line that ends by itself, in this process: its exit code and what stands on stderr."""
    import distjudge

    def run(main, config, *flags, **options):
        monkeypatch.setattr(sys, "argv", ["command", *map(str, flags)])
        with pytest.raises(SystemExit) as caught:
            distjudge.cli(main, config, **options)
        return caught.value.code, capsys.readouterr().err

    return run
