# SPDX-License-Identifier: Apache-2.0
"""A catalogue as a safetensors file: strings are UTF-8 bytes and offsets, nothing is unpickled."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from numpy.typing import NDArray
from safetensors.numpy import save_file

from patchkern.batch.arguments import check_offsets
from patchkern.batch.catalog import Catalog

_LARGEST = 1 << 28  # bytes
_NUMBERS = {
    **dict.fromkeys(("token_ids", "offsets", "text_token_ids", "text_token_offsets"), np.int32),
    "item_ids": np.int64,
}


def write_catalog(path: str | os.PathLike[str], catalog: Catalog) -> None:
    """Write item ids, titles and input texts if it has them, token ids and the fingerprint."""
    arrays: dict[str, NDArray[Any]] = {"token_ids": catalog.token_ids, "offsets": catalog.offsets}
    if catalog.item_ids.dtype.kind == "U":
        arrays |= _packed("item_ids", catalog.item_ids.tolist())
    else:
        arrays["item_ids"] = catalog.item_ids
    if catalog.titles is not None:
        arrays |= _packed("titles", catalog.titles)
    if catalog.texts is not None:
        arrays |= {"text_token_ids": catalog.texts.token_ids, "text_token_offsets": catalog.texts.offsets}
        if catalog.texts.titles is not None:
            arrays |= _packed("texts", catalog.texts.titles)
    save_file(
        {name: np.ascontiguousarray(array) for name, array in arrays.items()},
        path,
        {"fingerprint": catalog.fingerprint},
    )


def read_catalog(path: str | os.PathLike[str]) -> Catalog:
    """What `write_catalog` wrote; sizes that the file declares are compared with those it has before they are used.

    Raises:
        FileNotFoundError: there is none.
        ValueError: not such a file, or a damaged one.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"folder: expected {Path(path).name} in {os.fspath(Path(path).parent)!r}")
    try:
        with safetensors.safe_open(path, "numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            fingerprint = (file.metadata() or {}).get("fingerprint")
        for name, array in arrays.items():
            expected = _NUMBERS.get(name, np.uint8 if name.endswith("_utf8") else np.int64)
            if array.dtype != expected or array.ndim != 1:
                raise ValueError(
                    f"{name}: expected {np.dtype(expected)} of one dimension, got {array.dtype} {array.shape}"
                )
        ids: Any = arrays["item_ids"] if "item_ids" in arrays else _strings("item_ids", arrays)
        titles = _unpacked("titles", arrays) if "titles_utf8" in arrays else None
        texts = None
        if "text_token_ids" in arrays:
            written = _unpacked("texts", arrays) if "texts_utf8" in arrays else None
            texts = Catalog(arrays["text_token_ids"], arrays["text_token_offsets"], ids, written)
        catalog = Catalog(arrays["token_ids"], arrays["offsets"], ids, titles, texts)
        if not is_of(catalog, fingerprint):
            raise ValueError(f"fingerprint: expected {fingerprint}, as is written in it, got {catalog.fingerprint}")
    except KeyError as error:
        raise ValueError(f"{os.fspath(path)}: not a catalogue, or a damaged one: it has no {error}") from error
    except (ValueError, TypeError, safetensors.SafetensorError) as error:
        raise ValueError(f"{os.fspath(path)}: not a catalogue, or a damaged one: {error}") from error
    return catalog


def is_of(catalog: Catalog, fingerprint: str | None) -> bool:
    """Whether a fingerprint in a file is the catalogue's; in early files it is that of the token ids alone."""
    return fingerprint in (catalog.fingerprint, catalog.token_fingerprint)


def _packed(name: str, texts: Sequence[str]) -> dict[str, NDArray[Any]]:
    encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
    ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    return {f"{name}_utf8": np.frombuffer(b"".join(encoded), np.uint8), f"{name}_offsets": ends}


def _unpacked(name: str, arrays: dict[str, NDArray[Any]]) -> list[str]:
    content, offsets = arrays[f"{name}_utf8"], arrays[f"{name}_offsets"]
    check_offsets(f"{name}_offsets", offsets, content.size)
    whole, ends = content.tobytes(), offsets.tolist()
    return [whole[first:end].decode("utf-8", "surrogatepass") for first, end in zip(ends[:-1], ends[1:], strict=True)]


def _strings(name: str, arrays: dict[str, NDArray[Any]]) -> NDArray[np.str_]:
    """As an array, in which all are as wide as the longest: a small file must not ask for all memory by that."""
    texts = _unpacked(name, arrays)
    size = 4 * len(texts) * max(map(len, texts), default=0)
    if size > max(_LARGEST, 64 * arrays[f"{name}_utf8"].size):
        raise ValueError(
            f"{name}: expected ids that are about equally long, got some that need {size:,} bytes together"
        )
    return np.array(texts, np.str_)
