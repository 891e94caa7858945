"""The README's own code runs: the two ways to take only the losses, and a loss of one's own."""

import functools
import json
import re

import distjudge

import pytest
import torch
from conftest import ROOT, call

LABELS = ["1", "2", "3"]


def block(words):
    """The one Python block of the README that holds these words, as a namespace."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (code,) = [code for code in blocks if words in code]
    found = {}
    exec(code, found)
    return found


@pytest.fixture
def parts(tiny_model, votes):
    """A judge, its items, its label tokens' ids, and the paper's loss as our own training computes it."""
    judge, items = distjudge.load_judge(tiny_model, LABELS, lora_rank=0), votes(6)
    logq, p = judge.score([i.prompt for i in items])[0], distjudge.shares_of(items).float()
    expected = distjudge.hybrid_loss(logq, p, 0.8, distjudge.worst_case(logq, p, 0.25)).mean().item()
    return judge, items, [ids[0] for _, ids in judge.tokens.sequences], expected


def padded(judge, items, side):
    rows = [torch.tensor(row) for row in judge.encode([item.prompt for item in items])]
    pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True, padding_side=side)
    return {"input_ids": pad(rows), "attention_mask": pad([torch.ones_like(row) for row in rows])}


def test_ten_lines_for_a_loop_of_one_s_own(parts):
    judge, items, label_ids, expected = parts
    inputs, counts = padded(judge, items, "left"), distjudge.counts_of(items).float()
    mask = inputs["attention_mask"]
    inputs["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
    loss = block("def loss_of")["loss_of"](judge.model, inputs, counts, label_ids)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    loss.backward()
    assert sum(w.grad.abs().sum() for w in judge.model.parameters() if w.grad is not None) > 0


@pytest.mark.parametrize("kind", ["transformers", "trl"])
def test_twenty_lines_for_a_trainer(parts, tmp_path, kind):
    """The first loss of transformers' Trainer and of TRL's SFTTrainer is ours, and training lowers it."""
    judge, items, label_ids, expected = parts
    library = pytest.importorskip(kind)
    base = {"transformers": "Trainer", "trl": "SFTTrainer"}[kind]
    settings_of = getattr(library, {"transformers": "TrainingArguments", "trl": "SFTConfig"}[kind])
    mixin = block("class VotesMixin")["VotesMixin"]
    trainer_class = type("MyTrainer", (mixin, getattr(library, base)), {"label_ids": label_ids})
    rows, counts = judge.encode([item.prompt for item in items]), distjudge.counts_of(items).tolist()
    data = [{"input_ids": row, "votes": n} for row, n in zip(rows, counts, strict=True)]

    def collate(batch):
        chosen = [items[rows.index(row["input_ids"])] for row in batch]
        return padded(judge, chosen, "right") | {"votes": torch.tensor([row["votes"] for row in batch])}

    more = {"per_device_train_batch_size": 6, "num_train_epochs": 8, "learning_rate": 1e-3, "use_cpu": True}
    more |= {"logging_steps": 1, "report_to": "none", "remove_unused_columns": False, "save_strategy": "no"}
    more |= {"dataset_kwargs": {"skip_prepare_dataset": True}, "bf16": False} if kind == "trl" else {}
    if kind == "trl":
        import datasets

        data, more["max_length"] = datasets.Dataset.from_list(data), None
    args = {"model": judge.model, "args": settings_of(output_dir=str(tmp_path), **more)}
    args |= {"train_dataset": data, "data_collator": collate}
    trainer = trainer_class(**args, **({"processing_class": judge.tokenizer} if kind == "trl" else {}))
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[0] == pytest.approx(expected, rel=2e-3) and losses[-1] < 0.9 * losses[0]


def test_your_own_votes_as_the_readme_has_them(tmp_path):
    """The table, the prompt and the first command of the README make items."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table, prompt = re.findall(r"```text\n(.*?)```", text, re.DOTALL)
    (tmp_path / "votes.csv").write_text(table)
    (tmp_path / "prompt.txt").write_text(prompt)
    (command,) = re.findall(r"^python data/prepare.py own .*$", text, re.MULTILINE)
    call("data/prepare.py", *command.split()[2:], cwd=tmp_path)
    rows = [json.loads(line) for path in (tmp_path / "votes/own").glob("*.jsonl") for line in path.open()]
    lines = {"Answer: Boil it for five minutes.", "Answer: It depends on the pot."}
    assert {row["prompt"].splitlines()[-1] for row in rows} == lines
    assert sorted(sum(row["counts"].values()) for row in rows) == [1, 2]


def test_files_and_flags_that_the_readmes_name_are_there():
    for readme in ROOT.glob("**/README.md"):
        if {"runs", ".venv", "votes"} & set(readme.relative_to(ROOT).parts):
            continue
        text = readme.read_text(encoding="utf-8")
        for script in re.findall(r"(?:recipes|data|plots|tests)/[\w/]+\.(?:py|sh|ipynb|jsonl|txt)", text):
            there = script.startswith("data/prompts") or (ROOT / script).exists()
            assert there, f"{readme}: {script}"
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert (readme.parent / link).exists(), f"{readme}: {link}"
