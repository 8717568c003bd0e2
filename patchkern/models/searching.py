# SPDX-License-Identifier: Apache-2.0
"""A transformers model made ready for a search, and whom that would disturb."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from patchkern.models.attention import NAME


def lock_of(config: PretrainedConfig) -> threading.RLock:
    """Held while a model with this configuration, and so with its attention, is in the state for a search.

    It is no attribute of the model, so that models can be copied and pickled.
    """
    lock = _locks.get(id(config))
    if lock is None:
        made = threading.RLock()
        lock = _locks.setdefault(id(config), made)
        if lock is made:
            weakref.finalize(config, _locks.pop, id(config), None)
    return lock


_locks: dict[int, threading.RLock] = {}


def without_searches(config: PretrainedConfig) -> AbstractContextManager[Any]:
    """Where it is open, no other thread searches with a model of this configuration; a compiler does not see it."""
    return nullcontext() if torch.compiler.is_compiling() else lock_of(config)


def recompute_without_searches(hf_model: Any) -> None:
    """Let backward passes compute activations again only while no other thread searches.

    They would be those of the search's mode and attention. Each layer waits on its own, in whatever thread autograd
    computes it. Where activations are kept, and called again, this changes nothing.
    """
    for module in hf_model.modules():
        checkpoint = getattr(module, "_gradient_checkpointing_func", None)
        if checkpoint is not None and not isinstance(checkpoint, _WithoutSearches):
            module._gradient_checkpointing_func = _WithoutSearches(checkpoint, hf_model.config)


class _WithoutSearches:
    """A checkpoint function, of functions that are computed and recomputed `without_searches`."""

    def __init__(self, checkpoint: Callable[..., Any], config: PretrainedConfig) -> None:
        self._checkpoint, self._config = checkpoint, config

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self._checkpoint(functools.partial(_alone, self._config, function), *args, **kwargs)


def _alone(config: PretrainedConfig, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with without_searches(config):
        return function(*args, **kwargs)


class Searching:
    """See `patchkern.search.protocol.SearchModel.searching`, for a `patchkern.PatchedCausalLM`.

    Other threads that want to search with the model, to pass through it, to compute activations again in a backward
    pass, or to change its mode through it, wait.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._state = _switched(model)

    def __enter__(self) -> None:
        next(self._state)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                _check_unchanged(self._model)
        finally:
            self.close()

    def close(self) -> None:
        self._state.close()


def _switched(model: Any) -> Generator[None, None, None]:
    """Where it is suspended, the model is ready for a search; closing it restores everything."""
    with lock_of(model.config):
        training = [module for module in model.modules() if module.training]
        attention = [(config, config._attn_implementation) for config in _configs(model)]
        has_grad = torch.is_grad_enabled()

        def restore() -> None:
            for config, name in attention:  # the outer before those inside it, which it would overwrite
                config._attn_implementation = name
            for module in training:
                module.training = True
            torch.set_grad_enabled(has_grad)

        try:
            try:
                for module in training:
                    module.training = False
                if any(name != NAME for _, name in attention):
                    model.hf_model.set_attn_implementation(NAME)
                torch.set_grad_enabled(False)
                yield
            finally:
                restore()
        finally:
            restore()  # once more, for an interrupt may have come during the first time


def _configs(model: Any) -> list[PretrainedConfig]:
    """All that say which attention a part of the model uses, each after those that contain it."""
    found: dict[int, PretrainedConfig] = {}
    waiting = [model.config, *(part.config for part in model.modules() if isinstance(part, PreTrainedModel))]
    while waiting:
        config = waiting.pop(0)
        if id(config) not in found:
            found[id(config)] = config
            parts = (getattr(config, name, None) for name in config.sub_configs)
            waiting = [*(part for part in parts if isinstance(part, PretrainedConfig)), *waiting]
    return list(found.values())


def _check_unchanged(model: Any) -> None:
    attention = model.config._attn_implementation
    if attention != NAME or any(module.training for module in model.modules()):
        raise RuntimeError(
            "model: expected its mode and attention to stay as they are during a search, got another thread that "
            "changed those of the wrapped model; change them through the PatchedCausalLM, which waits, or search a copy"
        )
