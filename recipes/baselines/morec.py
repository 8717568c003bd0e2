# SPDX-License-Identifier: Apache-2.0
"""MoRec (Yuan et al., 2023): items are what a sentence encoder makes of their titles, projected; else as in SASRec."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

TITLES_AT_ONCE = 128


def title_vectors(encoder: str, titles: Sequence[str]) -> Tensor:
    """``(n, E)`` float32 of length 1: what a sentence encoder makes of each title.

    Args:
        encoder: a folder in the form of transformers, or a hub id. The mean of the tokens' states is taken, or the
            first where sentence-transformers' file beside the model says so.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        tokenizer, model = AutoTokenizer.from_pretrained(encoder), AutoModel.from_pretrained(encoder)
    except (OSError, ValueError) as error:
        raise ValueError(f"--encoder: expected a sentence encoder's folder or hub id, got {encoder!r}") from error
    pooling = Path(encoder) / "1_Pooling" / "config.json"
    first = pooling.is_file() and json.loads(pooling.read_text(encoding="utf-8")).get("pooling_mode_cls_token", False)
    found = []
    with torch.inference_mode():
        for begin in range(0, len(titles), TITLES_AT_ONCE):
            words = tokenizer(
                list(titles[begin : begin + TITLES_AT_ONCE]), padding=True, truncation=True, return_tensors="pt"
            )
            states = model.eval()(**words).last_hidden_state
            mask = words["attention_mask"].unsqueeze(2)
            pooled = states[:, 0] if first else (states * mask).sum(1) / mask.sum(1)
            found.append(nn.functional.normalize(pooled.float(), dim=1))
    return torch.cat(found).clone()


class ProjectedTitles(nn.Module):
    """The table of item vectors, ``(n, D)``: a trained projection of fixed vectors of their titles.

    Args:
        titles: ``(n, E)``, brought to a mean of 0 and a standard deviation of 1 here, as encoders' vectors share most
            of what they say.
    """

    titles: Tensor

    def __init__(self, titles: Tensor, width: int) -> None:
        super().__init__()
        spread = titles.std(dim=0, correction=0) if len(titles) > 1 else torch.zeros(titles.shape[1])
        self.register_buffer("titles", (titles - titles.mean(dim=0)) / (spread + 1e-6))
        self.project = nn.Sequential(nn.Linear(titles.shape[1], 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self) -> Tensor:
        vectors: Tensor = self.project(self.titles)
        return vectors
