"""The whole way on real weights: train, judge, export, serve. DISTJUDGE_SMOLLM2 names the model's folder."""

import json
import os
import re
from pathlib import Path

import conftest
import pytest
import torch
from conftest import ROOT, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.slow
NLI = "Does the premise entail the hypothesis? Answer entailment, neutral or contradiction.\n\nPremise: {}"


def call(script, *arguments, code=0):
    """A command line; returns what it printed, stderr last."""
    done = conftest.call(f"recipes/{script}", *arguments, code=code)
    assert not re.search("kernels|Ignoring|Traceback", done.stdout + done.stderr)  # nothing looks broken
    return done.stdout + done.stderr


def plain(folder, prompts):
    """Label log-probabilities (N, 5) over the whole vocabulary, with transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = [tokenizer.encode(label, add_special_tokens=False)[0] for label in "12345"]
    options, rows = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}, []
    for prompt in prompts:
        asked = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], **options)
        with torch.no_grad():
            rows.append(model(**asked).logits[0, -1].double().log_softmax(0)[ids])
    return torch.stack(rows)


def predictions(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    mass = torch.tensor([row["label_mass"] for row in rows], dtype=torch.float64)
    return torch.tensor([list(row["predicted"].values()) for row in rows], dtype=torch.float64), mass


@pytest.fixture(scope="module")
def weights():
    folder = Path(os.environ.get("DISTJUDGE_SMOLLM2", "-"))
    if not (folder / "model.safetensors").is_file():
        pytest.skip("needs DISTJUDGE_SMOLLM2, the folder of SmolLM2-135M-Instruct")
    return folder


@pytest.fixture(scope="module")
def trained(weights, tmp_path_factory):
    """(folder of the work, test rows, what smollm.py printed): 48 reviews of the sample, 12 steps."""
    work = tmp_path_factory.mktemp("real")
    panel = [json.loads(line) for line in (ROOT / "data" / "panel.jsonl").open()]
    split = {name: [row for row in panel if row["split"] == name] for name in ("train", "test")}
    rows = split["test"][:16]
    train, test = write_rows(work / "train.jsonl", split["train"][:48]), write_rows(work / "test.jsonl", rows)
    flags = ["--train", train, "--test", test, "--epochs", "2", "--out", work / "run"]
    said = call("smollm.py", "--model", weights, *flags)
    return work, rows, said


def test_training_teaches_to_answer_with_a_label(weights, trained):
    work, _, said = trained
    first = [json.loads(line)["prompt"] for line in (work / "train.jsonl").open()][:16]
    before = plain(weights, first).exp().sum(1).mean().item()
    warned = re.search(r"([\d.]+)% of the model's probability on the first 16 items", said, re.I)
    assert "label mass: under a half, the model would rather say something else" in said
    assert float(warned[1]) / 100 == pytest.approx(before, abs=1e-4) and before < 0.5
    metrics = json.loads((work / "run" / "metrics.json").read_text())
    assert metrics["label_mass"] > 0.9 and metrics["label_mass_min"] > 0.8 and metrics["kl"] < 1


def test_without_the_answer_term_a_model_that_says_other_things_is_refused(weights, tmp_path):
    counts = {"entailment": 1, "neutral": 3, "contradiction": 1}
    asked = [NLI.format(f"A man rides.\nHypothesis: Number {i} sleeps.") for i in range(8)]
    votes = write_rows(tmp_path / "votes.jsonl", [{"prompt": prompt, "counts": counts} for prompt in asked])
    flags = ["--train", votes, "--model", weights, "--out", tmp_path / "run", "--answer", "0"]
    assert "than min_mass 0.01" in call("smollm.py", *flags, code=2) and not (tmp_path / "run").exists()


def test_the_merged_model_is_the_judge(weights, trained):
    work, rows, _ = trained
    call("judge.py", "--run", work / "run", "--items", work / "test.jsonl", "--out", work / "judged.jsonl")
    q, mass = predictions(work / "judged.jsonl")
    call("export.py", "--run", work / "run", "--export", "merged")
    merged, base = (plain(path, [row["prompt"] for row in rows]) for path in (work / "run/merged", weights))
    assert (q - merged.softmax(1)).abs().max() < 1e-5 and (mass - merged.exp().sum(1)).abs().max() < 1e-5
    assert (q - base.softmax(1)).abs().max() > 0.1


@pytest.mark.parametrize(("kind", "most"), [("f16", 5e-3), ("q8_0", 0.05)])
def test_a_gguf_file_judges_as_the_judge_does(kind, most, llama_cpp_clone, trained, tmp_path):
    flags = ["--export", "gguf", "--llama_cpp", llama_cpp_clone, "--quantization", kind]
    said = call("export.py", "--run", trained[0] / "run", *flags, "--out", tmp_path / "gguf")
    report = json.loads((tmp_path / "gguf" / "export.json").read_text())
    assert report["GGUF file against the judge"]["largest difference in a probability"] < most
    assert report["prompts_tokenized_alike"] == report["compared_items"] == 16 and "fallback" not in said
    assert report["changed_by_training"] > 0.1
