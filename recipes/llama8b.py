"""Train a judge on Llama-3.1-8B-Instruct in 4 bits: one of the paper's two backbones.

    python recipes/llama8b.py --train votes.jsonl --dry_run        # what would happen; needs neither weights nor a GPU
    python recipes/llama8b.py --train votes.jsonl                  # 8:2 split by group; --test names test items
    python recipes/llama8b.py --train votes.jsonl --model models/Llama-3.1-8B-Instruct

Memory, estimated (--dry_run does that for your items) and not yet measured on a GPU: 7.3 GiB for NLI prompts, 8.5 for SummEval's with
their articles, 16 items a step; 7.2 and 7.5 with --pack_tokens 1, every prompt a pass of its own.

The weights are gated: accept the Llama 3.1 Community License on the hub and log in (hf auth login) first. The chat template tells the
date in its system turn; it is always 26 Jul 2024 here, so that a prompt does not change with the day. Numbers of up to three digits
are single tokens.
"""
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import distjudge


@dataclasses.dataclass
class Llama8BConfig(distjudge.FourBitConfig):
    model: str = "meta-llama/Llama-3.1-8B-Instruct"
    """Hub id, or a folder with the model's files: config.json, safetensors, tokenizer.json."""
    out: str = "runs/llama8b"
    """The run folder; what is in it is overwritten."""


if __name__ == "__main__":
    distjudge.cli(distjudge.run, Llama8BConfig)
