"""Train a judge on Gemma 3 4B (instruction-tuned) in 4 bits.

    python recipes/gemma3_4b.py --train votes.jsonl --dry_run        # what would happen; needs neither weights nor a GPU
    python recipes/gemma3_4b.py --train votes.jsonl                  # 8:2 split by group; --test names test items
    python recipes/gemma3_4b.py --train votes.jsonl --model models/gemma-3-4b-it

Memory, estimated (--dry_run does that for your items) and not yet measured on a GPU: 4.7 GiB for NLI prompts, 5.5 for SummEval's with
their articles, 16 items a step; 4.5 and 4.8 with --pack_tokens 1, every prompt a pass of its own.

The weights are gated: accept the Gemma terms on the hub and log in (hf auth login) first. The model can see; the judge reads text only:
prompts go through the language model inside, adapters are on that alone, and the vision tower is loaded and stays idle (0.2 GiB in 4
bits). Five layers of six see 1,024 tokens back. Its activations do not fit into float16: on a card without bfloat16 it
computes in float32, slowly. A folder with the text model alone (Gemma3ForCausalLM) works too.
"""
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import distjudge


@dataclasses.dataclass
class Gemma3Config4B(distjudge.FourBitConfig):
    model: str = "google/gemma-3-4b-it"
    """Hub id, or a folder with the model's files: config.json, safetensors, tokenizer.json."""
    out: str = "runs/gemma3_4b"
    """The run folder; what is in it is overwritten."""


if __name__ == "__main__":
    distjudge.cli(distjudge.run, Gemma3Config4B)
