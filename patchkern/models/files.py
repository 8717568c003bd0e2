# SPDX-License-Identifier: Apache-2.0
"""A model's folder: what `save_pretrained` writes beside transformers' own files, and reads back."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from patchkern.batch.catalog import Catalog
from patchkern.batch.policies import AnyPolicy, policy_from_dict, policy_to_dict
from patchkern.batch.prompt import Prompt

FORMAT_VERSION = 1
DESCRIPTION = "patchkern.json"
ITEM_EMBEDDINGS = "item_embeddings.safetensors"
_ADAPTER = "adapter_config.json"


class Description(NamedTuple):
    """What ``patchkern.json`` says of a model."""

    prompt: Prompt
    policy: AnyPolicy | None
    item_embeddings: bool


def write(
    folder: str | os.PathLike[str],
    hf_model: Any,
    catalog: Catalog,
    prompt: Prompt,
    policy: AnyPolicy | None,
    item_embedding: Tensor | None,
    hf_kwargs: dict[str, Any],
) -> None:
    """Write a model aside and rename what was written, ``patchkern.json`` last."""
    description = {
        "format_version": FORMAT_VERSION,
        "prompt": prompt.to_dict(),
        "policy": None if policy is None else policy_to_dict(policy),
        "item_embeddings": item_embedding is not None,
        # in the prompt already; for readers who are not patchkern
        "special_token_ids": {
            "history_start": list(prompt.prefix[-1:]),
            "history_separator": list(prompt.separator),
            "history_end": list(prompt.suffix[:1]),
            "response_end": list(prompt.response_end),
        },
    }
    target = Path(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        hf_model.save_pretrained(aside, **hf_kwargs)
        if item_embedding is not None:
            item_ids = json.dumps(catalog.item_ids.tolist())
            tensors = {"item_embedding": item_embedding.detach().cpu().contiguous()}
            save_file(tensors, aside / ITEM_EMBEDDINGS, {"format": "pt", "item_ids": item_ids})
        (aside / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        _replace_folder(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _replace_folder(aside: Path, target: Path) -> None:
    """Move the files of ``aside`` into ``target``, the description last; drop weights of an earlier model."""
    files = [path.relative_to(aside) for path in aside.rglob("*") if path.is_file()]
    (target / DESCRIPTION).unlink(missing_ok=True)
    weights = ("model*.safetensors", "model.safetensors.index.json", "adapter_model.safetensors", _ADAPTER)
    for pattern in (*weights, ITEM_EMBEDDINGS):
        for stale in target.glob(pattern):
            if stale.relative_to(target) not in files:
                stale.unlink()
    for file in sorted(files, key=lambda file: file.name == DESCRIPTION):
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        os.replace(aside / file, target / file)


def read_description(folder: str | os.PathLike[str]) -> Description:
    """What `write` said of the model in ``patchkern.json``.

    Raises:
        FileNotFoundError, ValueError: there is none, or not one that this version reads.
    """
    path = Path(folder) / DESCRIPTION
    if not path.is_file():
        raise FileNotFoundError(
            f"folder: expected {DESCRIPTION} in {os.fspath(path.parent)!r}; was it saved by patchkern?"
        )
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        version = description["format_version"]
        if version != FORMAT_VERSION:
            raise ValueError(f"format_version: expected {FORMAT_VERSION}, got {version!r}")
        policy = description["policy"]
        prompt = Prompt.from_dict(description["prompt"])
        has_embeddings = bool(description.get("item_embeddings", False))
        return Description(prompt, None if policy is None else policy_from_dict(policy), has_embeddings)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{os.fspath(path)}: not a description that this version of patchkern reads: {error}"
        ) from error


def read_hf_model(folder: str | os.PathLike[str], base_model: PreTrainedModel | None, hf_kwargs: dict[str, Any]) -> Any:
    """The transformers model of a folder, or the adapter in it on its base."""
    if (Path(folder) / _ADAPTER).is_file():
        return _load_adapter(folder, base_model, hf_kwargs)
    if base_model is not None:
        raise ValueError(f"base_model: expected None, because {os.fspath(folder)!r} holds a whole model")
    return AutoModelForCausalLM.from_pretrained(folder, **hf_kwargs)


def _load_adapter(folder: str | os.PathLike[str], base_model: PreTrainedModel | None, hf_kwargs: dict[str, Any]) -> Any:
    try:
        from peft import AutoPeftModelForCausalLM, PeftModel
    except ImportError as error:
        raise ImportError(f"{os.fspath(folder)!r} holds a peft adapter; install peft to read it") from error
    if base_model is None:
        return AutoPeftModelForCausalLM.from_pretrained(folder, **hf_kwargs)
    return PeftModel.from_pretrained(base_model, folder, **hf_kwargs)


def read_item_embeddings(folder: str | os.PathLike[str], catalog: Catalog, width: int) -> Tensor:
    """``(n_items, width)`` saved vectors in catalogue order, each by its item's id; zeros for items that are new."""
    path = Path(folder) / ITEM_EMBEDDINGS
    if not path.is_file():
        raise FileNotFoundError(f"folder: expected {ITEM_EMBEDDINGS} in {os.fspath(path.parent)!r}")
    with safetensors.safe_open(path, "pt") as file:
        saved, item_ids = file.get_tensor("item_embedding"), json.loads(file.metadata()["item_ids"])
    if saved.shape[1] != width:
        raise ValueError(f"folder: expected item embeddings of width {width}, got {saved.shape[1]}")
    row_of = {item_id: row for row, item_id in enumerate(item_ids)}
    rows = torch.tensor([row_of.get(item_id, -1) for item_id in catalog.item_ids.tolist()], dtype=torch.long)
    known = rows >= 0
    if len(item_ids) and len(catalog) and not bool(known.any()):
        raise ValueError(
            f"catalog: expected items that {os.fspath(path)!r} has embeddings of, such as {item_ids[0]!r}, got none"
        )
    vectors: Tensor = saved.new_zeros(len(catalog), width)
    vectors[known] = saved[rows[known]]
    return vectors


# ------------------------------------------------------------------ tied weights in state dicts


def _tied(module: nn.Module) -> dict[str, str]:
    """For each parameter that has several names, its later names and the first: {later: first}."""
    first: dict[int, str] = {}
    names = module.named_parameters(remove_duplicate=False)
    return {name: first[id(p)] for name, p in names if first.setdefault(id(p), name) != name}


def drop_tied(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """safetensors, and so a plain `Trainer`, refuses to write one tensor under two names."""
    for name in _tied(module):
        state_dict.pop(prefix + name, None)


def restore_tied(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    for name, first in _tied(module).items():
        if prefix + first in state_dict:
            state_dict.setdefault(prefix + name, state_dict[prefix + first])
