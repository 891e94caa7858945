"""Train a judge on SmolLM2-135M-Instruct on a laptop CPU, or on the 360M model.

    python recipes/smollm.py --train votes.jsonl --dry_run  # what would happen; no weights
    python recipes/smollm.py --train votes.jsonl            # 8:2 split by group; --test names test items
    python recipes/smollm.py --train votes.jsonl --model HuggingFaceTB/SmolLM2-360M-Instruct --out runs/360m

Memory in GiB, estimated (--dry_run does that for your items) and not measured: 2.1 for NLI prompts, 3.5 for
SummEval's with their articles; 1.9 and 3.4 with --pack_tokens 1.

Weights are float32 on a CPU and 16 bits on CUDA, adapters always float32. On a CPU with AMX or
AVX512-BF16, products with the weights are in bfloat16: training is 1.5 to 1.7 times as fast, judging 1.6 to
2.2 times (--no_bf16: float32). Rate and epochs go by the number of items, as chosen on EmoBank with 100 to
8,000 of them (recipes/README.md); the paper's 5e-5 is for 7B and 10,000 items. Digits are single tokens: "10"
begins like "1", and such labels are read whole. Apache-2.0.
"""

import common

Recipe = common.recipe(__file__, "HuggingFaceTB/SmolLM2-135M-Instruct", common.BySizeConfig)

if __name__ == "__main__":
    common.main(Recipe)
