# SPDX-License-Identifier: Apache-2.0
"""A model in a GGUF file, whose quantised weights become ordinary ones."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

SUFFIX = ".gguf"


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Whether a path is that of a GGUF file, by its name."""
    return Path(path).suffix.lower() == SUFFIX


def read_gguf(path: str | os.PathLike[str], dtype: torch.dtype = torch.float32, **hf_kwargs: Any) -> PreTrainedModel:
    """The model of a GGUF file as if it had never been quantised: it can be trained, and saved as a folder.

    Args:
        path: of the file.
        dtype: of the weights; float32 holds the file's values as they are.
        hf_kwargs: for ``AutoModelForCausalLM.from_pretrained``.

    Raises:
        FileNotFoundError: no such file.
        ImportError: the package gguf is missing.
        ValueError: not a GGUF file, or of an architecture that transformers does not read.
    """
    folder, file = _located(path)
    try:
        read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=dtype, **hf_kwargs)
    except (ValueError, KeyError, OSError) as error:
        raise ValueError(f"{os.fspath(path)}: not a GGUF file that transformers reads: {error}") from error
    # what transformers reads from a GGUF file it refuses to save: the same weights in a model that knows of none
    settings = read.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(name, None)
    with torch.random.fork_rng(devices=[]):  # of weights that are replaced
        model = type(read)(type(read.config)(**settings))
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = read.generation_config
    model.config._name_or_path = model.name_or_path = os.fspath(path)
    return model.eval()


def read_gguf_tokenizer(path: str | os.PathLike[str], **hf_kwargs: Any) -> Any:
    """The tokenizer of a GGUF file, with its chat template; raises as `read_gguf`."""
    folder, file = _located(path)
    try:
        return AutoTokenizer.from_pretrained(folder, gguf_file=file, **hf_kwargs)
    except (ValueError, KeyError, OSError) as error:
        raise ValueError(f"{os.fspath(path)}: not a GGUF file that transformers reads: {error}") from error


def _located(path: str | os.PathLike[str]) -> tuple[str, str]:
    """Folder and name of the file, once it is there and can be read."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path: expected a GGUF file, found none at {os.fspath(path)!r}")
    if find_spec("gguf") is None:
        raise ImportError(f"{os.fspath(path)} is a GGUF file; install gguf to read it: pip install 'patchkern[gguf]'")
    return os.fspath(path.parent), path.name
