# SPDX-License-Identifier: Apache-2.0
"""What an exported folder holds besides the checkpoint, as the plugin and its clients read it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from patchkern.batch.arguments import check_count
from patchkern.batch.catalog import Catalog
from patchkern.batch.policy_kinds import AnyPolicy
from patchkern.batch.prompt import Prompt
from patchkern.models import files

FOLDER = "patchkern"
"""in an exported folder: what is not vLLM's to read, out of the way of its search for weights"""

HEADS = ("titles", "items")


class Served(NamedTuple):
    """A model as vLLM serves it: ids below ``vocab_size`` are tokens, the ``n_items`` after them are items."""

    folder: Path
    """of ours, inside the exported one"""
    catalog: Catalog
    prompt: Prompt
    policy: AnyPolicy | None
    vocab_size: int
    head: str
    """what is predicted: "titles", token by token, or "items", at once"""
    item_embeddings: bool
    identity: str
    """the catalogue's fingerprint: a request that names another one is of another folder"""


def read_served(folder: str | os.PathLike[str], config: Mapping[str, Any] | None = None) -> Served:
    """Read an exported folder.

    Args:
        folder: what `patchkern.serving.vllm.export_model` wrote.
        config: its configuration's ``patchkern``, where it is known; else it is read.

    Raises:
        FileNotFoundError, ValueError: not such a folder, or one whose parts do not belong together.
    """
    path = Path(folder)
    own = path / FOLDER
    if config is None:
        try:
            config = json.loads((path / "config.json").read_text(encoding="utf-8")).get("patchkern")
        except (OSError, ValueError, AttributeError) as error:
            raise ValueError(f"folder: expected an exported model in {os.fspath(folder)!r}: {error}") from error
    if not isinstance(config, Mapping) or not own.is_dir():
        raise ValueError(
            f"folder: expected an exported model in {os.fspath(folder)!r} (python -m patchkern.serving export), got "
            "something else"
        )
    catalog, _ = files.choose_catalog(own, None)
    description = files.read_description(own)
    try:
        vocab_size, head, identity = config["vocab_size"], config["head"], config["catalog"]
        check_count("vocab_size", vocab_size, minimum=1)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"folder: expected a configuration that this version reads, got one without {error}"
        ) from error
    if head not in HEADS:
        raise ValueError(f"head: expected one of {', '.join(HEADS)}, got {head!r}")
    if identity != catalog.fingerprint:
        raise ValueError(
            "folder: expected the catalogue that its config.json tells of, got another one; export it anew"
        )
    return Served(
        own,
        catalog,
        description.prompt,
        description.policy,
        vocab_size,
        head,
        description.item_embeddings,
        identity,
    )
