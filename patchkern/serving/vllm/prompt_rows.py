# SPDX-License-Identifier: Apache-2.0
"""Prompts as rows of numbers, for what is no token: sessions. Made from an exported folder's embedding alone."""

from __future__ import annotations

import base64
import io
import json
import os
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from patchkern.batch.layout import PatchLayout
from patchkern.models.embedding import add_item_vectors
from patchkern.models.files import read_item_embeddings
from patchkern.ops.pool_rows import pool_rows
from patchkern.serving.vllm.item_tokens import check_plain
from patchkern.serving.vllm.served import Served, read_served

EMBEDDING = "model.embed_tokens.weight"
_INDEX = "model.safetensors.index.json"


class PromptRows:
    """Makes the rows of layouts as the served model would: the same bytes for the same items, which is what vLLM's
    prefix cache goes by.

    A server takes them (``--enable-prompt-embeds``) by ``torch.load``: keep it where nobody but your own processes can
    reach it. Rows and token ids must not be mixed in one prompt; these are rows alone.

    Args:
        folder: what `patchkern.serving.vllm.export_model` wrote.
        dtype: that the server runs in; the checkpoint's where not given.

    Raises:
        FileNotFoundError, ValueError: not an exported folder, or one without the embedding.
    """

    def __init__(self, folder: str | os.PathLike[str], dtype: torch.dtype | None = None) -> None:
        self.served: Served = read_served(folder)
        weight = _read(Path(folder), EMBEDDING)
        self.weight: Tensor = weight if dtype is None else weight.to(dtype)
        self._own: Tensor | None = None
        if self.served.item_embeddings:
            own = read_item_embeddings(self.served.folder, self.served.catalog, weight.shape[1])
            self._own = own.to(self.weight.dtype)

    def __call__(self, layout: PatchLayout) -> list[Tensor]:
        """Per user ``(rows, D)`` on the CPU.

        Args:
            layout: of `patchkern.build_layout` without targets, of this catalogue, any policy.

        Raises:
            TypeError, ValueError: as of `item_token_ids`, but for sessions, which are welcome.
        """
        if not isinstance(layout, PatchLayout):
            raise TypeError(f"layout: expected a PatchLayout, got {type(layout).__name__}")
        check_plain(layout, self.served.catalog)
        layout = layout.to("cpu")
        rows = pool_rows(self.weight, layout)
        if self._own is not None:
            add_item_vectors(rows, layout, self._own)
        # copies: a view would be sent with the whole batch behind it
        return [user.clone() for user in rows.split(layout.cu_seqlens.diff().tolist())]


def as_prompt_embeds(rows: Tensor) -> str:
    """Rows as the ``prompt_embeds`` of a request over HTTP."""
    buffer = io.BytesIO()
    torch.save(rows, buffer)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _read(folder: Path, name: str) -> Tensor:
    """A tensor of a checkpoint, whose files are one or several."""
    file = folder / "model.safetensors"
    if (folder / _INDEX).is_file():
        file = folder / json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].get(name, file.name)
    try:
        with safetensors.safe_open(file, "pt") as tensors:
            tensor: Tensor = tensors.get_tensor(name)
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"folder: expected {name} in {os.fspath(file)!r}: {error}") from error
    return tensor
