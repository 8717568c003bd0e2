# SPDX-License-Identifier: Apache-2.0
"""Recommendations for many users, on disk: written as they come, by one process or several, continued after a stop.

A folder holds ``run.json``, which says what is being computed, and ``part-00000.parquet``, ``part-00001.parquet`` and
so on, with a row per user, in the users' order: ``user``, ``items`` (list, best first) and ``scores`` (list). A part is
written under another name and renamed when it is complete, so that whatever is there is right; who may write which is
decided in `run_folder`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal, overload

from numpy.typing import NDArray

from patchkern.batch.arguments import check_count
from patchkern.batch.histories import Histories, HistoriesLike
from patchkern.batch.policy_kinds import AnyPolicy
from patchkern.data.parquet import import_pyarrow
from patchkern.search.batching import plan_users
from patchkern.search.bulk_run import COLUMNS, BulkRun, check_shard, names_of
from patchkern.search.fingerprints import described
from patchkern.search.protocol import SearchModel
from patchkern.search.run_folder import Part, Stamp, hash_of, parts_of, read_run, read_stamp
from patchkern.search.search_cost import search_cost
from patchkern.search.summary import Summary


def recommend_to_disk(
    model: SearchModel,
    histories: HistoriesLike,
    folder: str | PathLike[str],
    policy: AnyPolicy | None = None,
    *,
    user_ids: Sequence[Any] | NDArray[Any] | None = None,
    users_per_part: int = 4096,
    shard: tuple[int, int] | None = None,
    **arguments: Any,
) -> Path:
    """Recommend items to any number of users, part by part, without holding more than one part's results.

    A run that was stopped, at whatever moment, goes on where it was when it is called again with the same arguments.
    All users are checked before the first part is computed; what cannot be known before is what a callable prior
    returns.

    Several processes, also on several machines that see the folder, share a run when each is called with all users and
    with its ``shard``. Whatever would compute the same part twice is refused while the other process lives: a second
    call without a shard, one with a rank that is taken or with another number of shards. That rests on the file
    system's locks, which end with a process however it ends; on a network file system they need its lock service.

    Args:
        model: the model.
        histories: B users.
        folder: made if needed; empty, or with the beginning of the same run.
        policy: as in `PatchedCausalLM.recommend`; one of patchkern's own, which can be written down.
        user_ids: ``B`` integers or strings for the column ``user`` and for errors and warnings; where not given, the
            keys of a mapping, else 0, 1, 2, ...
        users_per_part: rows of a file; also how many users are lost, at most, when the run is stopped.
        shard: ``(rank, world)``: write parts ``rank``, ``rank + world``, ... only; the others are for calls with other
            ranks. A later call may have another ``world``. None: all parts.
        arguments: further ones of `PatchedCausalLM.recommend`, such as ``k`` and ``memory_budget``; the latter,
            ``batch_size``, ``progress`` and ``user_cache`` may be others when a run goes on. A callable, such as a
            ``prior``, is known by its ``fingerprint``, as those of `patchkern.search.prior` have one, else by its name.

    Returns:
        The folder. `read_recommendations` reads it back, `read_summary` says what its lists lack.

    Warns:
        PartialListsWarning: as `PatchedCausalLM.recommend`, once for all parts of this call, finished before or now.

    Raises:
        ImportError: pyarrow is missing.
        OSError: the folder cannot be written; before anything is computed.
        TypeError, ValueError: as of `PatchedCausalLM.recommend`; the folder holds another run or a part of one, and
            what differs; another process writes the same parts.

    Examples:
        >>> import patchkern as pk
        >>> from patchkern.models.scratch import from_scratch
        >>> titles = {7: "Alien", 8: "Aliens", 9: "The Third Man"}
        >>> model = pk.PatchedCausalLM(*from_scratch(titles, hidden_size=16, intermediate_size=32), pk.TextOnly())
        >>> folder = pk.recommend_to_disk(model, [[7, 8], [9, 7]], "lists", user_ids=["eve", "bob"], k=2)
        >>> users, lists = pk.read_recommendations(folder)
        >>> [(user, len(found)) for user, found in zip(users.tolist(), lists)]
        [('eve', 2), ('bob', 2)]
        >>> pk.read_recommendations(folder, format="arrow").column_names
        ['user', 'items', 'scores']
        >>> pk.read_summary(folder).users
        2
    """
    import_pyarrow()
    check_count("users_per_part", users_per_part, minimum=1)
    own_shard = check_shard(shard)
    if user_ids is None and isinstance(histories, Mapping):
        user_ids = list(histories)
    histories = Histories.coerce(histories)
    names = names_of(user_ids, len(histories))
    source = {
        "user_ids": described(names),
        "histories": described([histories.items, histories.offsets, histories.timestamps]),
    }
    bulk = BulkRun(
        model, folder, policy, users=len(histories), users_per_part=users_per_part, source=source, **arguments
    )
    nobody, prepared = bulk.nobody, bulk.prepared
    budget, batch_size = nobody.memory_budget, nobody.batch_size
    cost = None if budget is None else search_cost(model, prepared.size)
    for part in bulk.parts:
        asked = bulk.request(part, histories.take(part.users), names[part.users])
        plan_users(
            model, asked.histories, bulk.policy, prepared.depth, asked.names, cost, budget, batch_size, prepared.head
        )
    with bulk.writing(own_shard):
        for number in bulk.missing(own_shard):
            users = bulk.range(number)
            bulk.write(number, histories.take(bulk.parts[number].users), names[users], own_shard)
    nobody.warn(bulk.summary(own_shard))
    return bulk.folder


@overload
def read_recommendations(
    folder: str | PathLike[str], format: Literal["lists"] = "lists"
) -> tuple[NDArray[Any], list[list[tuple[Any, float]]]]: ...


@overload
def read_recommendations(folder: str | PathLike[str], format: Literal["arrow"]) -> Any: ...


def read_recommendations(folder: str | PathLike[str], format: str = "lists") -> Any:
    """What a whole run recommended, whichever processes wrote it, in the users' order.

    Args:
        folder: of `recommend_to_disk` or `BulkRun`.
        format: "lists": ``(B,)`` user ids and what `recommend` returned for each; "arrow": a ``pyarrow.Table`` of the
            columns ``user``, ``items`` and ``scores``.

    Raises:
        FileNotFoundError: no run, or one that has not ended; the message says how many parts are missing, and whose.
        ImportError: pyarrow is missing.
        ValueError: a file that is malformed or of another run; the message names it.
    """
    pa, pq = import_pyarrow()
    if format not in ("lists", "arrow"):
        raise ValueError(f"format: expected lists or arrow, got {format!r}")
    parts, _ = _whole_run(Path(folder))
    tables = []
    for part in parts:
        table = pq.read_table(part.path)
        if table.column_names != list(COLUMNS) or table.num_rows != part.users.size:
            raise ValueError(
                f"{part.path}: expected {part.users.size} rows of {', '.join(COLUMNS)}, got {table.num_rows} of "
                f"{', '.join(table.column_names)}"
            )
        tables.append(table.replace_schema_metadata(None))
    if not tables:
        lists_of = {name: pa.large_list(kind) for name, kind in (("items", pa.int64()), ("scores", pa.float64()))}
        tables.append(pa.schema({"user": pa.int64(), **lists_of}).empty_table())
    table = pa.concat_tables(tables)
    if format == "arrow":
        return table
    lists = zip(table["items"].to_pylist(), table["scores"].to_pylist(), strict=True)
    return table["user"].to_numpy(), [list(zip(items, scores, strict=True)) for items, scores in lists]


def read_summary(folder: str | PathLike[str]) -> Summary:
    """What the lists of a whole run lack, whichever processes wrote them; raises as `read_recommendations`."""
    _, stamps = _whole_run(Path(folder))
    return sum((stamp.summary for stamp in stamps), Summary())


def _whole_run(folder: Path) -> tuple[list[Part], list[Stamp]]:
    """The parts of a run that has ended, and what they say of themselves."""
    description = read_run(folder)
    run_hash = hash_of(description)
    parts = parts_of(folder, description["users"], description["users_per_part"])
    missing = [part for part in parts if not part.path.is_file()]
    stamps = [read_stamp(part, run_hash) for part in parts if part.path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"folder: expected {len(parts)} parts in {os.fspath(folder)!r}, {len(missing)} are missing, the first is "
            f"{missing[0].path.name}; {_whose(missing, stamps)} of recommend_to_disk goes on"
        )
    return parts, stamps


def _whose(missing: list[Part], stamps: list[Stamp]) -> str:
    """Which call has to be made again, as far as the parts that are there tell."""
    worlds = {stamp.shard[1] for stamp in stamps}
    if len(worlds) != 1 or worlds == {1}:
        return "the same call"
    (world,) = worlds
    ranks = sorted({part.number % world for part in missing})
    named = ", ".join(f"{sum(part.number % world == rank for part in missing)} of {(rank, world)}" for rank in ranks)
    return f"by shard: {named}; the same call with that shard"
