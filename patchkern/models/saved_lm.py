# SPDX-License-Identifier: Apache-2.0
"""Saving a model with its catalogue, prompt and policy, uploading it, and finding it again."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from patchkern.batch.catalog import Catalog
from patchkern.batch.policy_kinds import AnyPolicy
from patchkern.batch.prompt import Prompt
from patchkern.models import files
from patchkern.models.hub import upload
from patchkern.models.model_card import ModelCard
from patchkern.models.sources import locate


class SavedLM(nn.Module):
    """A module around a transformers model: what of it is saved, and where to."""

    hf_model: PreTrainedModel
    catalog: Catalog
    prompt: Prompt
    policy: AnyPolicy | None
    tokenizer: Any
    learns: tuple[str, ...]
    learned: tuple[str, ...] = ()
    """which of "titles" and "items" the last training was for, set by the trainer and saved; empty where none was"""

    vector_dropout: float = 0.0

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        state_dict: dict[str, Tensor] | None = None,
        is_main_process: bool = True,
        tokenizer: Any = None,
        **hf_kwargs: Any,
    ) -> None:
        """Write the model as transformers does (an adapter alone for a ``PeftModel``), and ``patchkern.json``.

        The catalogue goes to ``catalog.safetensors``, item embeddings to ``item_embeddings.safetensors``, with the item
        ids in its metadata.

        Everything is written into a hidden folder inside ``folder`` first, and read from there by `from_pretrained`
        until it has taken the places of an earlier model's files: a call that fails or is killed leaves the older or
        the newer model. What else is in the folder stays. A power cut can lose both.

        Args:
            folder: made if needed.
            state_dict: of this module, gathered; needed where the parameters are sharded.
            is_main_process: False writes nothing.
            tokenizer: a transformers tokenizer to save along; the model's own `tokenizer` by default.
            hf_kwargs: for the wrapped model's ``save_pretrained``.

        Raises:
            BlockingIOError: another process or thread is saving into the same folder.

        Examples:
            >>> import patchkern as pk
            >>> from patchkern.models.scratch import from_scratch
            >>> titles = {7: "Alien", 8: "Aliens", 9: "The Third Man"}
            >>> scratch = from_scratch(titles, hidden_size=16, intermediate_size=32)
            >>> pk.PatchedCausalLM(*scratch, pk.ItemPatches(keep_text=1)).save_pretrained("model")
            >>> model = pk.PatchedCausalLM.from_pretrained("model")
            >>> model.policy, model.catalog.titles
            (ItemPatches(keep_text=1, max_items=100), ('Alien', 'Aliens', 'The Third Man'))
        """
        self._save(folder, state_dict, is_main_process, tokenizer, hf_kwargs)

    def _save(
        self,
        folder: str | os.PathLike[str],
        state_dict: dict[str, Tensor] | None,
        is_main_process: bool,
        tokenizer: Any,
        hf_kwargs: dict[str, Any],
        memory: files.Memory | None = None,
    ) -> None:
        """`save_pretrained`; with a memory, as what `patchkern.RecurrentMemory` wraps."""
        if tokenizer is None:
            tokenizer = self.tokenizer
        elif not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise TypeError(f"tokenizer: expected a transformers tokenizer, got {type(tokenizer).__name__}")
        if state_dict is None and any(isinstance(parameter, DTensor) for parameter in self.parameters()):
            raise ValueError(
                "state_dict: expected one, because the parameters are sharded; gather it with "
                "torch.distributed.checkpoint.state_dict.get_model_state_dict and full_state_dict=True"
            )
        if not is_main_process:
            return
        own = files.OwnTensors.of(self if state_dict is None else state_dict)
        if state_dict is not None:
            hf_kwargs["state_dict"] = {
                name.removeprefix("hf_model."): value
                for name, value in state_dict.items()
                if name.startswith("hf_model.")
            }
        files.write(
            folder,
            self.hf_model,
            self.learns,
            self.catalog,
            self.prompt,
            self.policy,
            own,
            tokenizer,
            hf_kwargs,
            vector_dropout=self.vector_dropout,
            learned=self.learned,
            memory=memory,
        )

    def push_to_hub(self, repo_id: str, *, card: ModelCard | None = None, tokenizer: Any = None, **options: Any) -> str:
        """Save the model, with a card if one is given, and upload it to a hub.

        A folder that is there already is uploaded by `patchkern.models.hub.upload`, which has the other ``options``,
        such as ``private`` and ``token``.

        Returns:
            The commit's address.

        Raises:
            ConnectionError: no hub can be reached, or it refuses.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, tokenizer=tokenizer)
            if card is not None:
                card.write(self, folder)
            return upload(folder, repo_id, **options)


def open_saved(folder: str | os.PathLike[str], hf_kwargs: Mapping[str, Any]) -> tuple[Path, files.Description]:
    """Where the files of a saved model are, fetched from a hub if that has them, and what they say of it.

    Args:
        hf_kwargs: of a ``from_pretrained``, in which ``revision`` and ``token`` are for the hub.

    Raises:
        FileNotFoundError, ValueError: no folder, no hub that has one, or none that this version reads.
    """
    hub = {name: hf_kwargs[name] for name in ("revision", "token") if name in hf_kwargs}
    found = files.current(locate(folder, "folder", **hub))
    return found, files.read_description(found)
