"""Merge a trained judge's adapters into its model, to serve it with vLLM, llama.cpp or anything else that takes a model folder.

    python recipes/merge.py --run runs/first --out runs/first/merged
    vllm serve runs/first/merged --served-model-name judge
    python recipes/api.py --items test.jsonl --base_url http://localhost:8000/v1 --model judge --render runs/first/merged

Writes weights (safetensors), tokenizer and chat template as a model hub has them, judges a few prompts before and after,
and prints the largest difference in nats. A run whose weights were all trained is copied in the same form.
"""
import dataclasses
import sys
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import distjudge
from distjudge import InputError, Judge, load_judge

PROBES = ["Is this fine?", "Rate the answer. It was good, and the service was bad.", "One more: 12345."]


@dataclasses.dataclass
class MergeConfig:
    run: str
    """The run folder of a trained judge."""
    out: str
    """The folder for the merged model; it must not exist yet."""
    dtype: Literal["as loaded", "bfloat16", "float16", "float32"] = "as loaded"
    """Precision of the weights saved. As loaded: float32 on a CPU, bfloat16 on CUDA."""


def merge(judge: Judge) -> None:
    """Merges the adapters into the weights, in place. Raises InputError for 4-bit weights: rounded again, they would judge otherwise."""
    if getattr(judge.model, "is_loaded_in_4bit", False):
        raise InputError("run: its weights are 4-bit; merging would round them again: serve base and adapter/ apart (vllm --enable-lora)")
    if hasattr(judge.model, "peft_config"):
        judge.model = judge.model.merge_and_unload()


def main(config: MergeConfig) -> None:
    if not (Path(config.run) / "judge.json").is_file():
        raise InputError(f"{config.run}: not a run folder with a judge: judge.json is missing")
    if Path(config.out).exists():
        raise InputError(f"{config.out}: exists already")
    judge = load_judge(config.run)
    before, _ = judge.score(PROBES)
    merge(judge)
    if config.dtype != "as loaded":
        judge.model.to(getattr(torch, config.dtype))
    judge.model.save_pretrained(config.out)
    judge.tokenizer.save_pretrained(config.out)
    after, mass = load_judge(config.out, judge.labels, spellings=judge.spellings, max_length=judge.max_length, lora_rank=1).score(PROBES)
    print(f"wrote {config.out}\nlargest difference between the judge and its merged model on {len(PROBES)} prompts: "
          f"{(after - before).abs().max():.2g} nats; label mass {mass.min():.3f} to {mass.max():.3f}")


if __name__ == "__main__":
    distjudge.cli(main, MergeConfig)
