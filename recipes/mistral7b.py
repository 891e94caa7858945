"""Train a judge on Mistral-7B-Instruct-v0.3 in 4 bits.

    python recipes/mistral7b.py --train votes.jsonl --dry_run  # what would happen; no weights, no GPU
    python recipes/mistral7b.py --train votes.jsonl            # 8:2 split by group; --test names test items
    python recipes/mistral7b.py --train votes.jsonl --model models/Mistral-7B-Instruct-v0.3

Memory in GiB, estimated (--dry_run does that for your items) and not measured on a GPU yet: 5.8 for NLI
prompts, 7.2 for SummEval's with their articles; 5.7 and 6.1 with --pack_tokens 1.

Behind [/INST] every word begins with a space of its own. Digits all begin with that same token, so ratings
are read as whole labels, closed by </s>; words are read by their first token. v0.3 has no sliding window.
Apache-2.0.
"""

import common

Recipe = common.recipe(__file__, "mistralai/Mistral-7B-Instruct-v0.3")

if __name__ == "__main__":
    common.main(Recipe)
