"""Train a judge on SmolLM2-135M-Instruct on a laptop CPU, or on the 360M model.

    python recipes/smollm.py --train votes.jsonl --dry_run        # what would happen; needs no weights
    python recipes/smollm.py --train votes.jsonl                  # 8:2 split by group; --test names test items
    python recipes/smollm.py --train votes.jsonl --model HuggingFaceTB/SmolLM2-360M-Instruct --out runs/smollm360
    python recipes/smollm.py --train votes.jsonl --model models/SmolLM2-135M-Instruct

Memory, estimated (--dry_run does that for your items) and not measured: 2.1 GiB for NLI prompts, 3.4 for SummEval's with their
articles, in packs of at most 1,024 tokens; 1.8 and 3.3 with --pack_tokens 1, every prompt a pass of its own.

Weights are float32 on a CPU and 16 bits on CUDA, adapters always float32. Digits are single tokens, so that "10" begins like "1" and
such labels are read whole. Apache-2.0.
"""
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import distjudge


@dataclasses.dataclass
class SmolLMConfig(distjudge.Config):
    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    """Hub id, or a folder with the model's files: config.json, safetensors, tokenizer.json."""
    out: str = "runs/smollm"
    """The run folder; what is in it is overwritten."""


if __name__ == "__main__":
    distjudge.cli(distjudge.run, SmolLMConfig)
