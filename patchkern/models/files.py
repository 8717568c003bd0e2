# SPDX-License-Identifier: Apache-2.0
"""A model's folder: what `save_pretrained` writes beside transformers' own files, and reads back."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from patchkern.batch.arguments import check_count
from patchkern.batch.catalog import Catalog
from patchkern.batch.catalog_diff import CatalogDiff, compare
from patchkern.batch.policy_dict import policy_from_dict, policy_to_dict
from patchkern.batch.policy_kinds import AnyPolicy
from patchkern.batch.prompt import Prompt
from patchkern.models import sources
from patchkern.models.adapters import ADAPTER, ADAPTER_WEIGHTS, read_adapter
from patchkern.models.catalog_file import is_of, read_catalog, write_catalog
from patchkern.models.folders import current, replacing
from patchkern.ops.vector_dropout import check_vector_dropout

FORMAT_VERSION = 2  # 1 had neither the catalogue nor the size of the vocabulary
DESCRIPTION = "patchkern.json"
CATALOG = "catalog.safetensors"
ITEM_EMBEDDINGS = "item_embeddings.safetensors"
ITEM_HEAD = "item_head.safetensors"
MEMORY = "memory.safetensors"
_WEIGHTS = (
    *("model*.safetensors", "model.safetensors.index.json", ADAPTER_WEIGHTS, ADAPTER),
    *(ITEM_EMBEDDINGS, ITEM_HEAD, MEMORY),
)
_HEAD = "item_head."


class OwnTensors(NamedTuple):
    """What a `PatchedCausalLM` has beside the model that it wraps."""

    item_embedding: Tensor | None
    item_head: dict[str, Tensor]
    """by the parameters' names in the head; empty without one"""

    @classmethod
    def of(cls, source: nn.Module | Mapping[str, Tensor]) -> OwnTensors:
        """Those of a module, or in its state dict."""
        if isinstance(source, nn.Module):
            source = dict(source.named_parameters(remove_duplicate=False))
        head = {name.removeprefix(_HEAD): value for name, value in source.items() if name.startswith(_HEAD)}
        return cls(source.get("item_embedding"), head)


class Memory(NamedTuple):
    """What a `patchkern.RecurrentMemory` has beside the model that it wraps."""

    options: dict[str, Any]
    """the arguments that it is made with"""
    map: dict[str, Tensor]
    """the parameters of its map, by name; empty without one"""


class Description(NamedTuple):
    """What ``patchkern.json`` says of a model."""

    prompt: Prompt
    policy: AnyPolicy | None
    item_embeddings: bool
    vocabulary_size: int | None
    """rows of the model's embedding; None in folders of version 1"""
    catalog: str | None
    """the fingerprint of the catalogue beside it; None in folders of version 1, which have none"""
    tokenizer: bool
    item_head: bool
    vector_dropout: float
    learns: tuple[str, ...]
    """of a `PatchedCausalLM` or a `patchkern.ItemModel`, which tells them apart"""
    learned: tuple[str, ...]
    """which of "titles" and "items" its last training was for; empty where that is not known"""
    memory: dict[str, Any] | None
    """options of the `patchkern.RecurrentMemory` around it, or None"""


def write(
    folder: str | os.PathLike[str],
    hf_model: Any,
    learns: Sequence[str],
    catalog: Catalog,
    prompt: Prompt,
    policy: AnyPolicy | None,
    own: OwnTensors,
    tokenizer: Any,
    hf_kwargs: dict[str, Any],
    *,
    vector_dropout: float,
    learned: Sequence[str] = (),
    memory: Memory | None = None,
) -> None:
    """Write a model; its files take the places of those of an earlier one together, see `patchkern.models.folders`."""
    description = {
        "format_version": FORMAT_VERSION,
        "learns": list(learns),
        "learned": list(learned),
        "prompt": prompt.to_dict(),
        "policy": None if policy is None else policy_to_dict(policy),
        "item_embeddings": own.item_embedding is not None,
        "item_head": bool(own.item_head),
        "vector_dropout": vector_dropout,
        "memory": None if memory is None else memory.options,
        "vocabulary_size": hf_model.config.get_text_config().vocab_size,
        "catalog": {"file": CATALOG, "items": len(catalog), "fingerprint": catalog.fingerprint},
        "tokenizer": tokenizer is not None,
        # in the prompt already; for readers who are not patchkern
        "special_token_ids": {
            "history_start": list(prompt.prefix[-1:]),
            "history_separator": list(prompt.separator),
            "history_end": list(prompt.suffix[:1]),
            "response_end": list(prompt.response_end),
        },
    }
    with replacing(folder, DESCRIPTION, _WEIGHTS) as new:
        hf_model.save_pretrained(new, **hf_kwargs)
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        write_catalog(new / CATALOG, catalog)
        embedding = {} if own.item_embedding is None else {"item_embedding": own.item_embedding}
        for name, tensors in ((ITEM_EMBEDDINGS, embedding), (ITEM_HEAD, own.item_head)):
            if tensors:
                kept = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
                save_file(kept, new / name, {"format": "pt", "item_ids": json.dumps(catalog.item_ids.tolist())})
        if memory is not None and memory.map:
            kept = {key: value.detach().cpu().contiguous() for key, value in memory.map.items()}
            save_file(kept, new / MEMORY, {"format": "pt"})
        (new / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def is_model(folder: str | os.PathLike[str]) -> bool:
    """Whether `write` has written a model there."""
    return (current(folder) / DESCRIPTION).is_file()


def read_description(folder: str | os.PathLike[str]) -> Description:
    """What `write` said of the model in ``patchkern.json``.

    Raises:
        FileNotFoundError, ValueError: there is none, or not one that this version reads.
    """
    path = Path(folder) / DESCRIPTION
    if not path.is_file():
        # the last checkpoint of a run: numbers of more digits are larger
        inside = max(path.parent.glob(f"*/{DESCRIPTION}"), key=lambda one: (len(one.parent.name), one), default=None)
        hint = "was it saved by patchkern?" if inside is None else f"there is one in {os.fspath(inside.parent)!r}"
        raise FileNotFoundError(f"folder: expected {DESCRIPTION} in {os.fspath(path.parent)!r}; {hint}")
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        version = description["format_version"]
        if isinstance(version, bool) or version not in (1, FORMAT_VERSION):
            raise ValueError(
                f"format_version: expected 1 or {FORMAT_VERSION}, got {version!r}; newer folders need a newer patchkern"
            )
        policy = description["policy"]
        prompt = Prompt.from_dict(description["prompt"])
        size = None if version == 1 else description["vocabulary_size"]
        if size is not None:
            check_count("vocabulary_size", size, minimum=1)
        return Description(
            prompt,
            None if policy is None else policy_from_dict(policy),
            item_embeddings=bool(description.get("item_embeddings", False)),
            vocabulary_size=size,
            catalog=None if version == 1 else str(description["catalog"]["fingerprint"]),
            tokenizer=bool(description.get("tokenizer", False)),
            item_head=bool(description.get("item_head", False)),
            vector_dropout=check_vector_dropout(
                description.get("vector_dropout", 0.0), bool(description.get("item_embeddings", False))
            ),
            learns=tuple(description.get("learns", ("titles", "items", "both"))),
            learned=tuple(description.get("learned", ())),
            memory=_options(description.get("memory")),
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{os.fspath(path)}: not a description that this version of patchkern reads: {error}"
        ) from error


def _options(memory: Any) -> dict[str, Any] | None:
    if not (memory is None or isinstance(memory, dict)):
        raise TypeError(f"memory: expected an object or null, got {type(memory).__name__}")
    return memory


def read_memory(folder: str | os.PathLike[str], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The saved parameters of a memory's map, which have these shapes.

    Raises:
        FileNotFoundError, ValueError: there are none, or others.
    """
    path = Path(folder) / MEMORY
    if not path.is_file():
        raise FileNotFoundError(f"folder: expected {MEMORY} in {os.fspath(path.parent)!r}")
    try:
        saved = load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{os.fspath(path)}: not a memory's map that this version reads: {error}") from error
    found = {name: tuple(value.shape) for name, value in saved.items()}
    if found != dict(shapes):
        raise ValueError(f"{os.fspath(path)}: expected a memory's map of shapes {dict(shapes)}, got {found}")
    return saved


def choose_catalog(
    folder: str | os.PathLike[str], given: Catalog | None, renamed: Literal["error", "allow"] = "error"
) -> tuple[Catalog, CatalogDiff | None]:
    """The catalogue that a model was saved with, or the one given after a comparison with it, and what differs.

    Raises:
        FileNotFoundError, ValueError: none is given and none was saved, it cannot be read, or `CatalogDiff.check`.
    """
    if given is not None and not isinstance(given, Catalog):
        raise TypeError(f"catalog: expected a Catalog or None, got {type(given).__name__}")
    fingerprint = read_description(folder).catalog
    if fingerprint is None:
        if given is None:
            raise ValueError(
                f"catalog: expected one, because {os.fspath(folder)!r} was saved by an earlier version, without its "
                f"catalog; give the one that it was trained with: pk.Catalog.from_titles(titles, tokenizer)"
            )
        return given, None
    saved = read_catalog(Path(folder) / CATALOG)
    if not is_of(saved, fingerprint):
        raise ValueError(f"folder: expected the catalog that {DESCRIPTION} tells of in {CATALOG}, got another one")
    if given is None:
        return saved, None
    diff = compare(saved, given)
    diff.check(renamed)
    return given, diff


def read_tokenizer(folder: str | os.PathLike[str], description: Description, trust_remote_code: bool = False) -> Any:
    """The tokenizer that a model was saved with, None where it was saved without one."""
    if not description.tokenizer:
        return None
    return sources.read_tokenizer(folder, trust_remote_code=trust_remote_code)


def read_hf_model(
    folder: str | os.PathLike[str],
    base_model: PreTrainedModel | None,
    vocabulary_size: int | None,
    hf_kwargs: dict[str, Any],
) -> Any:
    """The transformers model of a folder, or the adapter in it on its base."""
    if (Path(folder) / ADAPTER).is_file():
        return read_adapter(folder, base_model, vocabulary_size, hf_kwargs)
    if base_model is not None:
        raise ValueError(f"base_model: expected None, because {os.fspath(folder)!r} holds a whole model")
    return sources.read_model(folder, **hf_kwargs)


def read_item_embeddings(folder: str | os.PathLike[str], catalog: Catalog, width: int) -> Tensor:
    """``(n_items, width)`` saved vectors in catalogue order, each by its item's id; zeros for items that are new."""
    saved, item_ids = _read_items(Path(folder) / ITEM_EMBEDDINGS, "item_embedding", 2)
    vectors = saved["item_embedding"]
    if vectors.shape[1] != width:
        raise ValueError(f"folder: expected item embeddings of width {width}, got {vectors.shape[1]}")
    return _by_item(vectors, item_ids, catalog, Path(folder) / ITEM_EMBEDDINGS)


def read_item_head(
    folder: str | os.PathLike[str], catalog: Catalog, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """The saved item head, its bias in catalogue order, each by its item's id; zeros for items that are new.

    Args:
        shapes: of its other parameters, by name.
    """
    path = Path(folder) / ITEM_HEAD
    saved, item_ids = _read_items(path, "bias", 1)
    if set(saved) != {"bias", *shapes}:
        raise ValueError(f"{os.fspath(path)}: not an item head that this version reads: it has {sorted(saved)}")
    for name, shape in shapes.items():
        if tuple(saved[name].shape) != shape:
            got = tuple(saved[name].shape)
            raise ValueError(f"folder: expected an item head of width {shape[-1]}, got shape {got}")
    return saved | {"bias": _by_item(saved["bias"], item_ids, catalog, path)}


def _read_items(path: Path, per_item: str, dims: int) -> tuple[dict[str, Tensor], list[Any]]:
    """The tensors of a file, and the ids of the items that the rows of ``per_item``, of ``dims`` dimensions, are of."""
    if not path.is_file():
        raise FileNotFoundError(f"folder: expected {path.name} in {os.fspath(path.parent)!r}")
    try:
        with safetensors.safe_open(path, "pt") as file:
            saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            item_ids = json.loads(file.metadata()["item_ids"])
        rows = saved[per_item]
        if not isinstance(item_ids, list) or rows.dim() != dims or rows.shape[0] != len(item_ids):
            raise ValueError(f"expected one row per item id, got shape {tuple(rows.shape)}")
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        what = "an item head" if path.name == ITEM_HEAD else "item embeddings"
        raise ValueError(f"{os.fspath(path)}: not {what} that this version reads: {error}") from error
    return saved, item_ids


def _by_item(saved: Tensor, item_ids: list[Any], catalog: Catalog, path: Path) -> Tensor:
    """The rows in catalogue order; zeros for items that are new."""
    row_of = {item_id: row for row, item_id in enumerate(item_ids)}
    places = [row_of.get(item_id, -1) for item_id in catalog.item_ids.tolist()]
    rows = torch.tensor(places, dtype=torch.long, device="cpu")
    known = rows >= 0
    if len(item_ids) and len(catalog) and not bool(known.any()):
        raise ValueError(
            f"catalog: expected items that {os.fspath(path)!r} knows, such as {item_ids[0]!r}, got none of them"
        )
    values = saved.new_zeros(len(catalog), *saved.shape[1:])
    values[known] = saved[rows[known]]
    return values


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
