# SPDX-License-Identifier: Apache-2.0
"""By what a store knows a model, a user and a past: equal in every process and on every machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchkern.batch.catalog import Catalog
from patchkern.batch.hashes import item_hashes
from patchkern.batch.prompt import Prompt
from patchkern.search.fingerprints import model_fingerprint
from patchkern.search.protocol import SearchModel
from patchkern.serving.records import HASH_BYTES
from patchkern.serving.stores.protocol import MAX_KEY_BYTES

# of a configuration, what says where a model comes from or how it is run, and not what it computes
_CIRCUMSTANCES = {"_name_or_path", "transformers_version", "architectures", "use_cache", "return_dict", "dtype"}
_KINDS = {int: b"i", str: b"s", bytes: b"b"}


def model_identity(model: SearchModel, policy: dict[str, Any]) -> bytes:
    """16 bytes that differ where a model or its policy compress users differently.

    Seen are the names, shapes and 4,096 values of every parameter, the configuration, what the prompt begins with and
    puts between entries, its learned rows, and the policy. Hooks and other code are not: a `UserStates` watches for
    those while it lives (`patchkern.search.model_state`).
    """
    seen = {
        "parameters": model_fingerprint(model),
        "config": {name: value for name, value in model.config.to_dict().items() if name not in _CIRCUMSTANCES},
        "prompt": compressing_parts(model.prompt),
        "policy": policy,
    }
    return _digest(json.dumps(seen, sort_keys=True, default=str).encode())


def compressing_parts(prompt: Prompt) -> dict[str, Any]:
    """What of a prompt decides what old items are compressed to, by name."""
    parts = prompt.to_dict()
    return {name: parts.get(name) for name in ("prefix", "separator", "experts")}


def user_key(user_id: Hashable, name: str) -> bytes:
    """What a store calls a user.

    Args:
        user_id: an integer, a string or bytes; those that are equal in Python have equal keys, and no others.
        name: of the argument, for errors.

    Raises:
        TypeError, ValueError: something else, or too long for a key.
    """
    given = user_id.item() if isinstance(user_id, np.generic) else user_id
    tag = _KINDS.get(type(given))
    if tag is None:
        raise TypeError(f"{name}: expected an integer, a string or bytes for a store, got {type(given).__name__}")
    key = tag + (given if isinstance(given, bytes) else str(given).encode("utf-8", "surrogatepass"))
    if len(key) > MAX_KEY_BYTES:
        raise ValueError(f"{name}: expected at most {MAX_KEY_BYTES - 1} bytes for a store, got {len(key) - 1}")
    return key


class Pasts:
    """Hashes of pasts: of what items are to a model, in order, and not of what a catalogue calls them.

    Args:
        catalog: of the model.
        by_item: where the model has a vector for every item, besides its title.
    """

    def __init__(self, catalog: Catalog, by_item: bool) -> None:
        self._items = item_hashes(catalog, by_item).astype("<u8")

    def hash_of(self, items: NDArray[Any]) -> bytes:
        """16 bytes for a sequence of catalogue positions, oldest first."""
        return _digest(self._items[items].tobytes())


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=HASH_BYTES).digest()
