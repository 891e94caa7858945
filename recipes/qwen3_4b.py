"""Train a judge on Qwen3-4B in 4 bits.

    python recipes/qwen3_4b.py --train votes.jsonl --dry_run  # what would happen; no weights, no GPU
    python recipes/qwen3_4b.py --train votes.jsonl            # 8:2 split by group; --test names test items
    python recipes/qwen3_4b.py --train votes.jsonl --model models/Qwen3-4B

Memory in GiB, estimated (--dry_run does that for your items): 4.2 for NLI prompts, 5.1 for SummEval's with
their articles; 4.0 and 4.3 with --pack_tokens 1. An H200 held 3.1 for NLI prompts (measured).

The judge answers without thinking: its prompt ends in the empty <think></think> of enable_thinking=False,
and labels are read behind it. Digits are single tokens: "10" begins like "1", and such labels are read
whole. Apache-2.0.
"""

import common

Recipe = common.recipe(__file__, "Qwen/Qwen3-4B")

if __name__ == "__main__":
    common.main(Recipe)
