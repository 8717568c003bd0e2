# SPDX-License-Identifier: Apache-2.0
"""Where a model comes from: a folder, a GGUF file, or the hub."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from transformers import AutoModelForCausalLM, AutoTokenizer

from patchkern.models.gguf_file import is_gguf, read_gguf, read_gguf_tokenizer

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# one copy of the weights, and what describes them and the tokenizer
_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.md")
_ELSEWHERE = ("*/*",)


def locate(name: str | os.PathLike[str], argument: str = "name", **hub: Any) -> Path:
    """Where a model is: the folder or the GGUF file of that name, else the hub's copy of it, which is fetched.

    Args:
        name: a path, or a hub id such as "org/model".
        argument: that errors name.
        hub: for ``huggingface_hub.snapshot_download``, such as ``revision`` and ``token``.

    Raises:
        FileNotFoundError: it is neither here, nor could the hub be asked for it or has it.
    """
    path = Path(name)
    if path.is_dir() or (is_gguf(path) and path.is_file()):
        return path
    text = os.fspath(name)
    if is_gguf(path) or not _HUB_ID.fullmatch(text):
        raise FileNotFoundError(
            f"{argument}: expected the folder of a model, a GGUF file or a hub id (org/model), got {text!r}, which is "
            "none of these here"
        )
    try:
        return Path(snapshot_download(text, allow_patterns=list(_FILES), ignore_patterns=list(_ELSEWHERE), **hub))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise FileNotFoundError(
            f"{argument}: {text!r} is no folder here, and the hub did not give a model of that name "
            f"({type(error).__name__}): is a hub reachable, the name right, and access granted?"
        ) from error


def read_model(path: str | os.PathLike[str], **hf_kwargs: Any) -> Any:
    """The causal language model in a folder or a GGUF file, see `locate`; no code of others runs unless
    ``trust_remote_code`` says so."""
    if is_gguf(path):
        return read_gguf(path, **hf_kwargs)
    return AutoModelForCausalLM.from_pretrained(path, **{"trust_remote_code": False} | hf_kwargs)


def read_tokenizer(path: str | os.PathLike[str], **hf_kwargs: Any) -> Any:
    """The tokenizer in a folder or a GGUF file, see `locate`."""
    if is_gguf(path):
        return read_gguf_tokenizer(path, **hf_kwargs)
    return AutoTokenizer.from_pretrained(path, **{"trust_remote_code": False} | hf_kwargs)
