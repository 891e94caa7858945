"""Train a judge on Phi-4 (14.7 billion weights) in 4 bits.

    python recipes/phi4.py --train votes.jsonl --dry_run        # what would happen; needs neither weights nor a GPU
    python recipes/phi4.py --train votes.jsonl                  # 8:2 split by group; --test names test items
    python recipes/phi4.py --train votes.jsonl --model models/phi-4

Memory, estimated (--dry_run does that for your items) and not yet measured on a GPU: 11.0 GiB for NLI prompts, 12.1 for SummEval's
with their articles, 16 items a step; 10.7 and 11.2 with --pack_tokens 1, every prompt a pass of its own.

Queries, keys and values are one matrix (qkv_proj), and so are gate and up (gate_up_proj): each gets one adapter. Numbers of up to three
digits are single tokens. The model takes prompts of up to 16,384 tokens. MIT licence.
"""
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import distjudge


@dataclasses.dataclass
class Phi4Config(distjudge.FourBitConfig):
    model: str = "microsoft/phi-4"
    """Hub id, or a folder with the model's files: config.json, safetensors, tokenizer.json."""
    out: str = "runs/phi4"
    """The run folder; what is in it is overwritten."""
    pack_tokens: int = 2048
    """Tokens a forward pass, at most; what sets the memory needed beside the weights. A longer prompt gets a pass of its own."""


if __name__ == "__main__":
    distjudge.cli(distjudge.run, Phi4Config)
