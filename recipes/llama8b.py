"""Train a judge on Llama-3.1-8B-Instruct in 4 bits: one of the paper's two backbones.

    python recipes/llama8b.py --train votes.jsonl --dry_run  # what would happen; no weights, no GPU
    python recipes/llama8b.py --train votes.jsonl            # 8:2 split by group; --test names test items
    python recipes/llama8b.py --train votes.jsonl --model models/Llama-3.1-8B-Instruct

Memory in GiB, estimated (--dry_run does that for your items): 7.3 for NLI prompts, 8.5 for SummEval's with
their articles; 7.2 and 7.5 with --pack_tokens 1. An H200 held 6.3 for NLI prompts (measured).

The weights are gated: accept the Llama 3.1 Community License on the hub and log in (hf auth login) first.
The chat template tells the date. It is always 26 Jul 2024 here, so that a prompt does not change with the
day. Numbers of up to three digits are single tokens.
"""

import common

Recipe = common.recipe(__file__, "meta-llama/Llama-3.1-8B-Instruct")

if __name__ == "__main__":
    common.main(Recipe)
