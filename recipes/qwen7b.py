"""Train a judge on Qwen2.5-7B-Instruct in 4 bits: one of the paper's two backbones.

    python recipes/qwen7b.py --train votes.jsonl --dry_run        # what would happen; needs neither weights nor a GPU
    python recipes/qwen7b.py --train votes.jsonl                  # 8:2 split by group; --test names test items
    python recipes/qwen7b.py --train votes.jsonl --model models/Qwen2.5-7B-Instruct

Memory, estimated (--dry_run does that for your items) and not yet measured on a GPU: 7.2 GiB for NLI prompts, 8.3 for SummEval's with
their articles, 16 items a step; 7.0 and 7.3 with --pack_tokens 1, every prompt a pass of its own.

The chat template begins with Qwen's own system turn. Digits are single tokens, so that "10" begins like "1" and such labels are read
whole. Apache-2.0.
"""
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import distjudge


@dataclasses.dataclass
class Qwen7BConfig(distjudge.FourBitConfig):
    model: str = "Qwen/Qwen2.5-7B-Instruct"
    """Hub id, or a folder with the model's files: config.json, safetensors, tokenizer.json."""
    out: str = "runs/qwen7b"
    """The run folder; what is in it is overwritten."""


if __name__ == "__main__":
    distjudge.cli(distjudge.run, Qwen7BConfig)
