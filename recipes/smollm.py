"""Train a judge on SmolLM2-135M-Instruct on a laptop CPU, or on the 360M model.

    python recipes/smollm.py --train votes.jsonl --dry_run  # what would happen; no weights
    python recipes/smollm.py --train votes.jsonl            # 8:2 split by group; --test names test items
    python recipes/smollm.py --train votes.jsonl --model HuggingFaceTB/SmolLM2-360M-Instruct --out runs/360m

Memory in GiB, estimated (--dry_run does that for your items) and not measured: 2.1 for NLI prompts, 3.5 for
SummEval's with their articles; 1.9 and 3.4 with --pack_tokens 1.

Weights are float32 on a CPU and 16 bits on CUDA, adapters always float32. On a CPU with AMX, products with
the weights are in bfloat16: training is 1.5 times as fast, judging about twice (--no_bf16: float32). Rate and
epochs go by the number of items, as chosen on EmoBank with 100 to 8,000 of them (recipes/README.md); the
paper's 5e-5 is for 7B and 10,000 items. Digits are single tokens: "10" begins like "1", and such labels are
read whole. Apache-2.0.
"""

import dataclasses

import common


@dataclasses.dataclass
class SmolConfig(common.RunConfig):
    epochs: float | None = None
    """Passes over the training items. Default: 1,200 / items, but 2 at least and 8 at most."""
    learning_rate: float | None = None
    """Peak learning rate of AdamW. Default: 1e-3 up to 4,000 training items, 3e-4 for more."""

    def settle(self, items: int) -> None:
        if self.epochs is None:
            self.epochs = min(8.0, max(2.0, 1200 / items))
        if self.learning_rate is None:
            self.learning_rate = 1e-3 if items <= 4000 else 3e-4


Recipe = common.recipe(__file__, "HuggingFaceTB/SmolLM2-135M-Instruct", SmolConfig)

if __name__ == "__main__":
    common.main(Recipe)
