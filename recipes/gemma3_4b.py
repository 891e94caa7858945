"""Train a judge on Gemma 3 4B (instruction-tuned) in 4 bits.

    python recipes/gemma3_4b.py --train votes.jsonl --dry_run  # what would happen; no weights, no GPU
    python recipes/gemma3_4b.py --train votes.jsonl            # 8:2 split by group; --test names test items
    python recipes/gemma3_4b.py --train votes.jsonl --model models/gemma-3-4b-it

Memory in GiB, estimated (--dry_run does that for your items) and not measured on a GPU yet: 4.7 for NLI
prompts, 5.5 for SummEval's with their articles; 4.5 and 4.8 with --pack_tokens 1.

The weights are gated: accept the Gemma terms on the hub and log in (hf auth login) first. Only the language
model is used and gets adapters; the vision tower is loaded and stays idle (0.2 GiB). Activations do not fit
into float16: on a card without bfloat16 transformers computes in float32, slowly, and Unsloth in float32
where float16 does not fit. A folder with the text model alone (Gemma3ForCausalLM) works too.
"""

import common

Recipe = common.recipe(__file__, "google/gemma-3-4b-it")

if __name__ == "__main__":
    common.main(Recipe)
