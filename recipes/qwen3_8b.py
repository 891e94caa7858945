"""Train a judge on Qwen3-8B in 4 bits.

    python recipes/qwen3_8b.py --train votes.jsonl --dry_run  # what would happen; no weights, no GPU
    python recipes/qwen3_8b.py --train votes.jsonl            # 8:2 split by group; --test names test items
    python recipes/qwen3_8b.py --train votes.jsonl --model models/Qwen3-8B

Memory in GiB, estimated (--dry_run does that for your items) and not measured on a GPU yet: 7.7 for NLI
prompts, 8.9 for SummEval's with their articles; 7.5 and 7.9 with --pack_tokens 1.

The judge answers without thinking: its prompt ends in the empty <think></think> of enable_thinking=False,
and labels are read behind it. Digits are single tokens: "10" begins like "1", and such labels are read
whole. Apache-2.0.
"""

import common

Recipe = common.recipe(__file__, "Qwen/Qwen3-8B")

if __name__ == "__main__":
    common.main(Recipe)
