# SPDX-License-Identifier: Apache-2.0
"""A model in training or evaluation mode for a while."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any


@contextmanager
def in_mode(model: Any, training: bool) -> Generator[None, None, None]:
    """The model in that mode, and then every module of it in its own again, whatever happened.

    A module may be in another mode than the model, such as one that is frozen.
    """
    before, modes = model.training, [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        model.train(before)  # of which some modules take note
        for module, mode in modes:
            module.training = mode
