# SPDX-License-Identifier: Apache-2.0
"""An exponential moving average of the weights, which is validated and saved in their place."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import TrainerCallback

from patchkern.batch.arguments import check_number

_WEIGHTS = "trained_weights.pt"  # in a checkpoint, whose model is the average
_EXACT = (torch.float32, torch.float64)


class WeightAverage(TrainerCallback):
    """The average of a model's trained parameters: those after the first step, then moving on with every step.

    It is kept beside the model while that is trained, and replaces its weights at the end. Frozen parameters have none.
    In data parallelism every process has the same one.

    Args:
        decay: share of the average that a step leaves, between 0 and 1.
        model: to be trained.

    Raises:
        ValueError: another decay, or parameters of fewer bits than float32, in which an average stands still.
    """

    def __init__(self, decay: float, model: nn.Module) -> None:
        check_number("ema_decay", decay, above=0, below=1)
        for name, parameter in _trained(model).items():
            if parameter.dtype not in _EXACT:
                raise ValueError(
                    f"ema_decay: expected trained weights in float32, got {parameter.dtype} in {name}; float32 weights "
                    "(dtype) with bf16=True are as fast"
                )
        self.decay = decay
        self._weights: dict[str, nn.Parameter] = {}
        self._average: AveragedModel | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Begin, but where a checkpoint has said how to go on."""
        if self._average is None:
            self._begin(model)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move on."""
        if self._average is not None:
            self._average.update_parameters(nn.ParameterList(self._weights.values()))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The trained model is the average."""
        if self._average is not None:
            _copy(self._average.parameters(), self._weights.values())
        self.forget()

    def forget(self) -> None:
        """Leave the model as it is."""
        self._weights, self._average = {}, None

    @contextmanager
    def in_model(self) -> Generator[None, None, None]:
        """Meanwhile the model in training has the average, and afterwards its weights again, bit by bit."""
        if self._average is None or not int(self._average.n_averaged):
            yield
            return
        weights = [parameter.detach().clone() for parameter in self._weights.values()]
        _copy(self._average.parameters(), self._weights.values())
        try:
            yield
        finally:
            _copy(weights, self._weights.values())

    def save(self, folder: str) -> None:
        """Write the weights beside the model of a checkpoint, which is the average."""
        if self._average is not None:
            weights = {name: parameter.detach() for name, parameter in self._weights.items()}
            state = {"decay": self.decay, "steps": int(self._average.n_averaged), "weights": weights}
            torch.save(state, Path(folder, _WEIGHTS))

    def resume(self, folder: str, model: nn.Module) -> None:
        """Go on from a checkpoint whose model has been loaded; with that, where it was saved without weights.

        Raises:
            ValueError: it was saved with another decay.
        """
        average = self._begin(model)
        average.n_averaged.fill_(1)  # what was loaded counts
        path = Path(folder, _WEIGHTS)
        if path.is_file():
            state = torch.load(path, map_location="cpu", weights_only=True)
            if state["decay"] != self.decay:
                raise ValueError(f"ema_decay: expected that of the checkpoint, {state['decay']}, got {self.decay}")
            average.n_averaged.fill_(state["steps"])
            _copy((state["weights"][name] for name in self._weights), self._weights.values())

    def _begin(self, model: nn.Module) -> AveragedModel:
        self._weights = _trained(model)
        weights = nn.ParameterList(self._weights.values())
        self._average = AveragedModel(weights, multi_avg_fn=get_ema_multi_avg_fn(self.decay))
        return self._average


def has_average(folder: str) -> bool:
    """Whether the model of a checkpoint is an average, and training goes on from other weights."""
    return Path(folder, _WEIGHTS).is_file()


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _copy(values: Iterable[Tensor], parameters: Iterable[nn.Parameter]) -> None:
    with torch.no_grad():
        for value, parameter in zip(values, parameters, strict=True):
            parameter.copy_(value)
