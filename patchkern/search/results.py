# SPDX-License-Identifier: Apache-2.0
"""Recommendations for many users, on disk: written as they come, complete or not there, and continued after a stop.

A folder holds ``run.json``, which says what is being computed, and ``part-00000.parquet``, ``part-00001.parquet`` and
so on, with a row per user, in the users' order: ``user``, ``items`` (list, best first) and ``scores`` (list). A part is
written under another name and renamed when it is complete, so that whatever is there is right.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchkern.batch.histories import Histories, HistoriesLike, check_count, flat_array, is_sequence
from patchkern.batch.policies import AnyPolicy, policy_to_dict
from patchkern.data.parquet import import_pyarrow, replace_file
from patchkern.search.protocol import SearchModel, policy_of
from patchkern.search.recommend import recommend

RUN = "run.json"
FORMAT_VERSION = 1

_VALUES = 4096  # of each parameter, to know a model by
_FREE = {"memory_budget", "batch_size", "progress"}  # arguments that may change when a run goes on
_OF_USERS = {"allowed_items", "prior"}  # arguments that may say something else for every user


def recommend_to_disk(
    model: SearchModel,
    histories: HistoriesLike,
    folder: str | PathLike[str],
    policy: AnyPolicy | None = None,
    *,
    user_ids: Sequence[Any] | NDArray[Any] | None = None,
    users_per_part: int = 4096,
    **arguments: Any,
) -> Path:
    """Recommend items to any number of users, part by part, without holding more than one part's results.

    A run that was stopped, at whatever moment, goes on where it was when it is called again with the same arguments.

    Args:
        model: the model.
        histories: B users.
        folder: made if needed; empty, or with the beginning of the same run.
        policy: as in `PatchedCausalLM.recommend`; one of patchkern's own, which can be written down.
        user_ids: ``B`` integers or strings for the column ``user``; 0, 1, 2, ... where not given.
        users_per_part: rows of a file; also how many users are lost, at most, when the run is stopped.
        arguments: further ones of `PatchedCausalLM.recommend`, such as ``k`` and ``memory_budget``; the latter,
            ``batch_size`` and ``progress`` may be others when a run goes on. A callable, such as a ``prior``, is known
            by its ``fingerprint``, as those of `patchkern.search.prior` have one, else by its name.

    Returns:
        The folder. `read_recommendations` reads it back.

    Raises:
        ImportError: pyarrow is missing.
        TypeError, ValueError: as of `PatchedCausalLM.recommend`; or the folder holds another run, and what differs.

    Examples:
        >>> import patchkern as pk
        >>> from patchkern.models.scratch import from_scratch
        >>> titles = {7: "Alien", 8: "Aliens", 9: "The Third Man"}
        >>> model = pk.PatchedCausalLM(*from_scratch(titles, hidden_size=16, intermediate_size=32), pk.TextOnly())
        >>> folder = pk.recommend_to_disk(model, [[7, 8], [9, 7]], "lists", user_ids=["eve", "bob"], k=2)
        >>> users, lists = pk.read_recommendations(folder)
        >>> [(user, len(found)) for user, found in zip(users.tolist(), lists)]
        [('eve', 2), ('bob', 2)]
    """
    pa, pq = import_pyarrow()
    check_count("users_per_part", users_per_part, minimum=1)
    histories = Histories.coerce(histories)
    names = _names(user_ids, len(histories))
    policy = policy_of(model, policy)
    target = Path(folder)
    run = {
        "format_version": FORMAT_VERSION,
        "policy": policy_to_dict(policy),
        "users": len(histories),
        "users_per_part": users_per_part,
        "arguments": {name: _described(arguments[name]) for name in sorted(arguments.keys() - _FREE)},
        "user_ids": _described(names),
        "histories": _described([histories.items, histories.offsets, histories.timestamps]),
        "catalog": model.catalog.fingerprint,
        "prompt": model.prompt.to_dict(),
        "model": _fingerprint(model),
    }
    run = json.loads(json.dumps(run))
    _check_begun(target, run)
    of_users = {name: arguments.pop(name) for name in _OF_USERS & arguments.keys()}
    for path, users in _parts(target, len(histories), users_per_part):
        if path.is_file():
            continue
        own = {name: _part_of(name, value, users, len(histories)) for name, value in of_users.items()}
        ranked = recommend(model, histories.take(users), policy, **arguments, **own)
        _write_run(target, run)
        offsets = pa.array(np.cumsum([0, *map(len, ranked)]))
        items = pa.array([item for user in ranked for item, _ in user])
        scores = pa.array([score for user in ranked for _, score in user], pa.float64())
        columns = {
            "user": pa.array(names[users]),
            "items": pa.LargeListArray.from_arrays(offsets, items),
            "scores": pa.LargeListArray.from_arrays(offsets, scores),
        }
        table = pa.table(columns)
        replace_file(path, functools.partial(pq.write_table, table))
    _write_run(target, run)
    return target


def read_recommendations(folder: str | PathLike[str]) -> tuple[NDArray[Any], list[list[tuple[Any, float]]]]:
    """``(B,)`` user ids and what `recommend` returned for each.

    Raises:
        FileNotFoundError: no run, or one that has not ended; the message says how many parts are missing.
        ImportError: pyarrow is missing.
    """
    pa, pq = import_pyarrow()
    target = Path(folder)
    if not (target / RUN).is_file():
        raise FileNotFoundError(
            f"folder: expected {RUN} in {os.fspath(target)!r}; was it written by recommend_to_disk?"
        )
    run = json.loads((target / RUN).read_text(encoding="utf-8"))
    parts = [path for path, _ in _parts(target, run["users"], run["users_per_part"])]
    missing = [path.name for path in parts if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"folder: expected {len(parts)} parts in {os.fspath(target)!r}, {len(missing)} are missing, the first is "
            f"{missing[0]}; the same call of recommend_to_disk goes on"
        )
    if not parts:
        return np.zeros(0, np.int64), []
    table = pa.concat_tables([pq.read_table(path) for path in parts])
    lists = zip(table["items"].to_pylist(), table["scores"].to_pylist(), strict=True)
    return table["user"].to_numpy(), [list(zip(items, scores, strict=True)) for items, scores in lists]


def _parts(folder: Path, n_users: int, size: int) -> Iterator[tuple[Path, NDArray[np.int64]]]:
    for number, first in enumerate(range(0, n_users, size)):
        yield folder / f"part-{number:05d}.parquet", np.arange(first, min(first + size, n_users))


def _check_begun(folder: Path, run: dict[str, Any]) -> None:
    """Raise unless the folder is free or holds the beginning of this run."""
    if not (folder / RUN).is_file():
        if any(folder.glob("part-*.parquet")):
            raise ValueError(f"folder: expected an empty one or one with {RUN}, got parts of an unknown run in it")
        return
    begun = json.loads((folder / RUN).read_text(encoding="utf-8"))
    differing = [name for name in run if run[name] != begun.get(name)]
    if differing:
        raise ValueError(
            f"folder: expected the run that was begun in {os.fspath(folder)!r}, got another {', '.join(differing)}"
        )


def _write_run(folder: Path, run: dict[str, Any]) -> None:
    """Only once something was computed: a call with a wrong argument must not bind those after it."""
    if not (folder / RUN).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(run, indent=2) + "\n"
        replace_file(folder / RUN, lambda file: Path(file).write_text(text, encoding="utf-8"))


def _part_of(name: str, value: Any, users: NDArray[np.int64], n_users: int) -> Any:
    """The part of an argument that is about some users; what is about all of them stays."""
    is_array = isinstance(value, (np.ndarray, Tensor))
    if value.ndim != 2 if is_array else not (is_sequence(value) and len(value) and is_sequence(value[0])):
        return value
    if len(value) != n_users:
        raise ValueError(f"{name}: expected one row per user ({n_users}), got {len(value)}")
    return value[users] if is_array else [value[user] for user in users.tolist()]


def _names(user_ids: Any, n_users: int) -> NDArray[Any]:
    if user_ids is None:
        return np.arange(n_users)
    names = flat_array("user_ids", user_ids)
    if names.size != n_users:
        raise ValueError(f"user_ids: expected one per user ({n_users}), got {names.size}")
    if names.size and names.dtype.kind not in "iuU":
        raise TypeError(f"user_ids: expected integers or strings, got dtype {names.dtype}")
    return names


def _described(value: Any) -> Any:
    """The value itself where JSON has it, else a hash of its content."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if callable(value):
        return getattr(value, "fingerprint", None) or getattr(value, "__qualname__", type(value).__qualname__)
    hashed = hashlib.blake2b(digest_size=16)
    _hash_into(hashed, value)
    return hashed.hexdigest()


def _hash_into(hashed: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray) and value.dtype != object:
        hashed.update(f"{value.dtype.str}{value.shape}".encode())
        hashed.update(np.ascontiguousarray(value).tobytes())
    elif is_sequence(value) or (isinstance(value, np.ndarray) and value.ndim):
        hashed.update(f"[{len(value)}]".encode())
        for part in value:
            _hash_into(hashed, part)
    else:
        hashed.update(repr(value).encode())


def _fingerprint(model: SearchModel) -> str:
    """Names, shapes and a sample of the values of all parameters."""
    hashed = hashlib.blake2b(digest_size=16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            sample = parameter.reshape(-1)[:: max(1, parameter.numel() // _VALUES)].double()
            hashed.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
            hashed.update(sample.cpu().numpy().tobytes())
    return hashed.hexdigest()
