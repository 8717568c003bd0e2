# SPDX-License-Identifier: Apache-2.0
"""Which rows per pass fit a card: the table of docs/training.md, predicted for Llama-3.2-1B's shape, in half a minute.

    python bench/training_memory.py
    python bench/training_memory.py --cards 24 48 --logit_share 0.1

Nothing is measured, and no GPU needed: see `patchkern.budget.training_cost`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import LlamaConfig

sys.path.append(str(Path(__file__).resolve().parents[1]))  # an installed patchkern comes first

from patchkern.budget.step import Lora, PassShape
from patchkern.budget.training_cost import Choice, TrainingCost
from patchkern.models.scratch import LLAMA_1B

USABLE = 0.9  # of a card: the rest is for the CUDA context and for fragmentation
WAYS = {
    "all parameters, AdamW": ("adamw", None),
    "all parameters, 8-bit AdamW": ("adamw_bnb_8bit", None),
    "LoRA of rank 16, AdamW": ("adamw", Lora(16)),
}
_LEAST, _MOST = 256, 131_072


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cards", type=int, nargs="+", default=[24, 40, 80], help="memory in GB")
    parser.add_argument("--logit_share", type=float, default=0.25, help="of the rows, those with logits")
    args = parser.parse_args(argv)
    config = LlamaConfig(**LLAMA_1B, tie_word_embeddings=True, dtype="float32")
    shape = PassShape(4096, max(int(4096 * args.logit_share), 1), 0, 4096)
    cost = TrainingCost(config, shape, autocast=torch.bfloat16, on_cuda=True)
    print(f"| rows per pass | {' | '.join(f'{card} GB' for card in args.cards)} |")
    print(f"| --- |{' --: |' * len(args.cards)}")
    for name, (optimizer, lora) in WAYS.items():
        for checkpointing in (False, True):
            choice = Choice(checkpointing, optimizer, lora)
            fitting = [cost.most_rows(choice, int(USABLE * card * 1e9), _LEAST, _MOST) for card in args.cards]
            cells = " | ".join(f"{rows:,}" if rows else "none" for rows in fitting)
            print(f"| {name}{', checkpointing' if checkpointing else ''} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
