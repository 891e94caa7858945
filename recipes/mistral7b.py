"""Train a judge on Mistral-7B-Instruct-v0.3 in 4 bits.

    python recipes/mistral7b.py --train votes.jsonl --dry_run        # what would happen; needs neither weights nor a GPU
    python recipes/mistral7b.py --train votes.jsonl                  # 8:2 split by group; --test names test items
    python recipes/mistral7b.py --train votes.jsonl --model models/Mistral-7B-Instruct-v0.3

Memory, estimated (--dry_run does that for your items) and not yet measured on a GPU: 5.8 GiB for NLI prompts, 7.2 for SummEval's with
their articles, 16 items a step; 5.7 and 6.1 with --pack_tokens 1, every prompt a pass of its own.

Behind [/INST] the tokenizer begins every word with a space of its own: digits all begin with that same token, so ratings are read as whole
labels, closed by </s>; words are read by their first token. v0.3 has no sliding window. Apache-2.0.
"""
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import distjudge


@dataclasses.dataclass
class Mistral7BConfig(distjudge.FourBitConfig):
    model: str = "mistralai/Mistral-7B-Instruct-v0.3"
    """Hub id, or a folder with the model's files: config.json, safetensors, tokenizer.json."""
    out: str = "runs/mistral7b"
    """The run folder; what is in it is overwritten."""


if __name__ == "__main__":
    distjudge.cli(distjudge.run, Mistral7BConfig)
