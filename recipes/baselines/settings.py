# SPDX-License-Identifier: Apache-2.0
"""How each network is trained: well, or as the PatchRec paper's baselines were."""

from __future__ import annotations

from dataclasses import dataclass, replace
from difflib import get_close_matches

LATEST = 5
"""items that Caser looks at"""


@dataclass(frozen=True)
class Settings:
    """Of a network and of its training.

    Attributes:
        width: of item vectors.
        layers, heads: of the network, where it has any.
        dropout: of item vectors and inside the network.
        window: items that it looks at.
        tied: items are scored by the vectors that they are read by.
        loss: "softmax" over all items, or "binary": cross-entropy of the target against one random item.
        targets: of a window "all", or the "last" position alone, every target having a window of its own.
        batch: of a step: positions where all are targets, else samples.
        learning_rate, weight_decay, warmup_steps: of AdamW.
        beta2: of AdamW.
        last_rate: what the cosine ends with, as a share of the rate; 1: the rate stays.
        clip: of the gradient's norm; None: none.
        epochs: at most.
        patience: epochs without a better validation that end the training; None: all epochs.
    """

    width: int = 64
    layers: int = 2
    heads: int = 2
    dropout: float = 0.2
    window: int = 200
    tied: bool = True
    loss: str = "softmax"
    targets: str = "all"
    batch: int = 2048
    learning_rate: float = 2e-3
    weight_decay: float = 0.0
    beta2: float = 0.98
    warmup_steps: int = 100
    last_rate: float = 0.02
    clip: float | None = 1.0
    epochs: int = 20
    patience: int | None = None


_TUNED = Settings()
# The paper's repository has no baselines, so these are not known to be its values. Networks that predict at the last
# position, scored by a table of their own, are what its authors' earlier code for such baselines has; one random
# negative, batches of 256, a rate of 1e-3 and 64 dimensions are usual beside it; window and patience are chosen here.
_PAPER = Settings(
    layers=1,
    heads=1,
    dropout=0.1,
    window=50,
    tied=False,
    loss="binary",
    targets="last",
    batch=256,
    learning_rate=1e-3,
    beta2=0.999,
    warmup_steps=0,
    last_rate=1.0,
    clip=None,
    epochs=20,
    patience=3,
)

SETTINGS: dict[str, dict[str, Settings]] = {
    "tuned": {
        "sasrec": _TUNED,
        "gru4rec": replace(_TUNED, layers=1, window=50),
        "caser": replace(_TUNED, window=50),
        "linrec": _TUNED,
        "mamba4rec": replace(_TUNED, layers=1),
        "morec": _TUNED,
    },
    "paper": {
        "sasrec": replace(_PAPER, layers=2),
        "gru4rec": _PAPER,
        "caser": replace(_PAPER, window=LATEST),
        "linrec": replace(_PAPER, layers=2),
        "mamba4rec": _PAPER,
        "morec": replace(_PAPER, layers=2, tied=True),
    },
}


def settings_of(model: str, setting: str) -> Settings:
    """Raise a ValueError that names the nearest where there is no such model."""
    known = SETTINGS[setting]
    if model not in known:
        near = get_close_matches(model.lower(), known, n=1)
        meant = f"{near[0]}? All of them: " if near else ""
        raise ValueError(f"--model: expected {meant}{', '.join(known)}, got {model!r}")
    return known[model]
