"""Train a judge on Qwen2.5-7B-Instruct in 4 bits: one of the paper's two backbones.

    python recipes/qwen7b.py --train votes.jsonl --dry_run  # what would happen; no weights, no GPU
    python recipes/qwen7b.py --train votes.jsonl            # 8:2 split by group; --test names test items
    python recipes/qwen7b.py --train votes.jsonl --model models/Qwen2.5-7B-Instruct

Memory in GiB, estimated (--dry_run does that for your items): 7.2 for NLI prompts, 8.3 for SummEval's with
their articles; 7.0 and 7.3 with --pack_tokens 1. An H200 held 6.5 for NLI prompts (measured).

The chat template begins with Qwen's own system turn. Digits are single tokens: "10" begins like "1", and
such labels are read whole. Apache-2.0.
"""

import common

Recipe = common.recipe(__file__, "Qwen/Qwen2.5-7B-Instruct")

if __name__ == "__main__":
    common.main(Recipe)
