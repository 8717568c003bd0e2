# SPDX-License-Identifier: Apache-2.0
"""The file that a fitted prior is kept in: tensors over some items of a catalogue, which a later catalogue may lack."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from patchkern.batch.catalog import Catalog
from patchkern.batch.catalog_diff import SHARE_OF_RENAMED

FORMAT_VERSION = 1
Shapes = Mapping[str, tuple[Any, tuple[str, ...]]]
KINDS = ("linear_prior", "transition_prior")


class Content(NamedTuple):
    """What a file holds.

    Attributes:
        settings: arguments that the prior was fitted with.
        tensors: by name, as they were saved; ``n`` is how many items they are of.
        kept: ``(m,)`` those of the ``n`` items that the catalogue has.
        place: ``(m,)`` where in the catalogue these are.
    """

    settings: dict[str, Any]
    tensors: dict[str, NDArray[Any]]
    kept: NDArray[np.int64]
    place: NDArray[np.int64]


def write(
    path: str | os.PathLike[str],
    kind: str,
    settings: Mapping[str, Any],
    tensors: Mapping[str, NDArray[Any]],
    catalog: Catalog,
    items: NDArray[np.int64],
) -> None:
    """One safetensors file, with the ids of ``items``, hashes of their titles and the catalogue's.

    Args:
        kind: one of `KINDS`.
        items: ``(n,)`` places in the catalogue of what ``tensors`` are about.

    Raises:
        ImportError: safetensors is missing.
    """
    description = {
        "format_version": FORMAT_VERSION,
        "settings": dict(settings),
        "catalog": catalog.fingerprint,
        "titles": _kind_of_titles(catalog),
        "item_ids": catalog.item_ids[items].tolist(),
    }
    # safetensors writes the memory of an array as it lies, which of a transposed one is another
    whole = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        _safetensors().numpy.save_file(
            {**whole, "titles": _titles(catalog, items)}, temporary, {kind: json.dumps(description)}
        )
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def kind_of(path: str | os.PathLike[str]) -> str:
    """Which of `KINDS` a file holds.

    Raises:
        FileNotFoundError: there is none.
        ImportError: safetensors is missing.
        ValueError: another file.
    """
    name, safetensors = _existing(path), _safetensors()
    try:
        with safetensors.safe_open(name, "numpy") as file:
            found = file.metadata() or {}
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{name}: not a prior that this version reads: {error}") from error
    for kind in KINDS:
        if kind in found:
            return kind
    raise ValueError(f"{name}: not a prior that this version reads: expected one of {', '.join(KINDS)}")


def read(
    path: str | os.PathLike[str],
    kind: str,
    settings: type[Any],
    shapes: Shapes,
    catalog: Catalog,
) -> Content:
    """What `write` wrote, for the same catalogue or a later one; items are matched by their ids.

    Args:
        kind: that it must be.
        settings: a dataclass that takes the settings.
        shapes: dtype and shape of each tensor; a letter stands for a length, the same wherever it occurs, ``n`` for
            that of the items.

    Raises:
        FileNotFoundError: there is none.
        ImportError: safetensors is missing.
        TypeError, ValueError: not such a file, or a damaged one; a catalogue that shares no item with it, or in which
            more than a tenth of those items have other titles.
    """
    if not isinstance(catalog, Catalog):
        raise TypeError(f"catalog: expected a Catalog, got {type(catalog).__name__}")
    name, safetensors = _existing(path), _safetensors()
    expected = {**shapes, "titles": (np.int64, ("n",))}
    try:
        with safetensors.safe_open(name, "numpy") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in expected}
        description = json.loads(metadata[kind])
        if description["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format_version: expected {FORMAT_VERSION}, got {description['format_version']}")
        lengths = {"n": len(description["item_ids"])}
        for key, (dtype, letters) in expected.items():
            found = tensors[key]
            if found.ndim == len(letters):
                for letter, length in zip(letters, found.shape, strict=True):
                    lengths.setdefault(letter, length)
            shape = tuple(lengths.get(letter, letter) for letter in letters)
            if found.dtype != dtype or found.shape != shape:
                raise ValueError(f"{key}: expected {np.dtype(dtype)} {shape}, got {found.dtype} {found.shape}")
        settings(**description["settings"])
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{name}: not a {kind.replace('_', ' ')} that this version reads: {error}") from error
    kept, place = _matched(name, description, tensors["titles"], catalog)
    return Content(description["settings"], tensors, kept, place)


def _matched(
    name: str, description: dict[str, Any], titles: NDArray[np.int64], catalog: Catalog
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    ids = np.array(description["item_ids"], catalog.item_ids.dtype.kind if not description["item_ids"] else None)
    same_kind = ids.dtype.kind == catalog.item_ids.dtype.kind
    place = catalog.find(ids).astype(np.int64) if same_kind else np.full(ids.size, -1)
    kept = np.flatnonzero(place >= 0)
    if ids.size and not kept.size:
        raise ValueError(f"catalog: expected items that {name!r} knows, such as {ids.item(0)!r}, got none")
    place = place[kept]
    if catalog.fingerprint != description["catalog"] and _kind_of_titles(catalog) == description["titles"]:
        other = np.flatnonzero(_titles(catalog, place) != titles[kept])
        if other.size > SHARE_OF_RENAMED * kept.size:
            raise ValueError(
                f"catalog: expected items with the titles that {name!r} was fitted on, got other titles for "
                f"{other.size} of {kept.size} item ids that are the same, such as {ids[kept].item(other[0])!r}"
            )
    return kept, place


def _kind_of_titles(catalog: Catalog) -> str:
    return "tokens" if catalog.titles is None else "text"


def _titles(catalog: Catalog, items: NDArray[np.int64]) -> NDArray[np.int64]:
    """``(n,)`` a hash of each title: of its text, which no tokenizer changes, or of its tokens where there is none."""
    texts = catalog.titles
    encoded = (
        catalog.tokens(item).tobytes() if texts is None else texts[item].encode("utf-8", "surrogatepass")
        for item in items.tolist()
    )
    hashes = b"".join(hashlib.blake2b(title, digest_size=8).digest() for title in encoded)
    return np.frombuffer(hashes, "<i8").astype(np.int64)


def _existing(path: str | os.PathLike[str]) -> str:
    name = os.fspath(path)
    if not Path(path).is_file():
        raise FileNotFoundError(f"path: expected a file, got {name!r}")
    return name


def _safetensors() -> ModuleType:
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            "a prior's file needs safetensors, which is not installed: pip install safetensors"
        ) from error
    return safetensors
