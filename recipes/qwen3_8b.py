"""Train a judge on Qwen3-8B in 4 bits.

    python recipes/qwen3_8b.py --train votes.jsonl --dry_run        # what would happen; needs neither weights nor a GPU
    python recipes/qwen3_8b.py --train votes.jsonl                  # 8:2 split by group; --test names test items
    python recipes/qwen3_8b.py --train votes.jsonl --model models/Qwen3-8B

Memory, estimated (--dry_run does that for your items) and not yet measured on a GPU: 7.7 GiB for NLI prompts, 8.9 for SummEval's with
their articles, 16 items a step; 7.5 and 7.9 with --pack_tokens 1, every prompt a pass of its own.

The judge answers without thinking: its prompt ends in the empty <think></think> that the chat template writes for enable_thinking=False,
and labels are read behind it. Digits are single tokens, so that "10" begins like "1" and such labels are read whole. Apache-2.0.
"""
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import distjudge


@dataclasses.dataclass
class Qwen3Config8B(distjudge.FourBitConfig):
    model: str = "Qwen/Qwen3-8B"
    """Hub id, or a folder with the model's files: config.json, safetensors, tokenizer.json."""
    out: str = "runs/qwen3_8b"
    """The run folder; what is in it is overwritten."""


if __name__ == "__main__":
    distjudge.cli(distjudge.run, Qwen3Config8B)
