# SPDX-License-Identifier: Apache-2.0
"""What a request says of titles and items: plain values, in ``extra_args`` of vLLM or ``vllm_xargs`` over HTTP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchkern.serving.vllm.served import Served

LOGITS_PROCESSOR = "patchkern.serving.vllm.masks:ItemMasks"
"""what a server must be started with"""

CATALOG, ALLOWED, EXCLUDED, TITLE_AT = (f"patchkern_{name}" for name in ("catalog", "allowed", "excluded", "title_at"))


def request_args(
    served: Served,
    *,
    allowed: Sequence[int] | NDArray[np.integer[Any]] | None = None,
    excluded: Sequence[int] | NDArray[np.integer[Any]] | None = None,
    title_at: int | None = None,
) -> dict[str, Any]:
    """Ask for a title, or an item, of the catalogue: without these an engine answers with any text.

    Args:
        served: the exported folder; a server of another one answers nothing.
        allowed, excluded: catalogue positions; allowed ones that are excluded are not allowed.
        title_at: where in the prompt a title begins whose end is to be found; None: after the prompt.

    Examples:
        With vLLM in the same process, ``SamplingParams(extra_args=request_args(served, excluded=[3]), ...)``.
    """
    arguments: dict[str, Any] = {CATALOG: served.identity}
    for name, positions in ((ALLOWED, allowed), (EXCLUDED, excluded)):
        if positions is not None:
            array = np.asarray(positions)
            if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
                raise TypeError(f"{name.removeprefix('patchkern_')}: expected a list of catalogue positions")
            if array.size and not 0 <= int(array.min()) <= int(array.max()) < len(served.catalog):
                raise ValueError(
                    f"{name.removeprefix('patchkern_')}: expected catalogue positions in 0..{len(served.catalog) - 1}"
                )
            arguments[name] = array.tolist()
    if title_at is not None:
        arguments[TITLE_AT] = title_at
    return arguments


def check_args(arguments: Mapping[str, Any]) -> None:
    """Raise a ValueError, which a server answers with 400, unless the arguments are of the form of `request_args`."""
    ours = [name for name in arguments if name.startswith("patchkern_")]
    unknown = set(ours) - {CATALOG, ALLOWED, EXCLUDED, TITLE_AT}
    if unknown:
        raise ValueError(f"vllm_xargs: expected arguments that patchkern knows, got {', '.join(sorted(unknown))}")
    if ours and not isinstance(arguments.get(CATALOG), str):
        raise ValueError(f"{CATALOG}: expected the identity of the served catalogue, got {arguments.get(CATALOG)!r}")
    for name in (ALLOWED, EXCLUDED):
        given = arguments.get(name, [])
        if not (isinstance(given, list) and all(type(x) is int and x >= 0 for x in given)):
            raise ValueError(f"{name}: expected a list of catalogue positions, got {given!r:.80}")
    at = arguments.get(TITLE_AT, 0)
    if type(at) is not int or at < 0:
        raise ValueError(f"{TITLE_AT}: expected a place in the prompt, got {at!r}")
