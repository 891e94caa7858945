"""Train a judge on Phi-4 (14.7 billion weights) in 4 bits.

    python recipes/phi4.py --train votes.jsonl --dry_run  # what would happen; no weights, no GPU
    python recipes/phi4.py --train votes.jsonl            # 8:2 split by group; --test names test items
    python recipes/phi4.py --train votes.jsonl --model models/phi-4

Memory in GiB, estimated (--dry_run does that for your items) and not measured on a GPU yet: 11.0 for NLI
prompts, 12.1 for SummEval's with their articles; 10.7 and 11.2 with --pack_tokens 1.

Queries, keys and values are one matrix (qkv_proj), and so are gate and up (gate_up_proj): each gets one
adapter. Numbers of up to three digits are single tokens. Prompts may have up to 16,384 tokens. MIT licence.
"""

import common

Recipe = common.recipe(__file__, "microsoft/phi-4", pack_tokens=2048)

if __name__ == "__main__":
    common.main(Recipe)
