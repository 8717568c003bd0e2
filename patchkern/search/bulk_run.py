# SPDX-License-Identifier: Apache-2.0
"""A run of recommendations, part by part: what is computed, which parts are there, and how one is computed and written.

`patchkern.search.results` has the calls for users who are all in memory; here they come part by part, in any order and
process.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchkern.batch.arguments import check_count
from patchkern.batch.catalog import Catalog
from patchkern.batch.columns import flat_array, is_sequence
from patchkern.batch.histories import Histories, HistoriesLike
from patchkern.batch.policy_dict import policy_to_dict
from patchkern.batch.policy_kinds import AnyPolicy
from patchkern.data.parquet import import_pyarrow
from patchkern.search.arguments import of_users
from patchkern.search.fingerprints import described, model_fingerprint
from patchkern.search.protocol import SearchModel, policy_of, usual_search
from patchkern.search.recommend import Prepared, Ranked, prepare, recommend, run
from patchkern.search.request import Request
from patchkern.search.run_folder import (
    FORMAT_VERSION,
    Part,
    Stamp,
    hash_of,
    parts_of,
    read_stamp,
    sweep,
    write_part,
    writing,
)
from patchkern.search.summary import Summary

COLUMNS = ("user", "items", "scores")
# arguments that may change when a run goes on
_FREE = {"memory_budget", "batch_size", "progress", "user_cache", "user_states"}
_OWN = {"model", "histories", "policy", "user_ids"}  # described by themselves
_OF_USERS = {"allowed_items", "prior"}  # arguments that may say something else for every user


class BulkRun:
    """What `patchkern.recommend_to_disk` does, for users who are read part by part: the same folder, in the same form.

    Part n is of the users ``n * users_per_part`` and following, in an order that whoever reads them knows. Each part is
    computed on its own, by whatever process, and is there when it is complete; computed twice, it is the same. So any
    scheduler can hand out the numbers of `missing` parts: torchrun (recipes/recommend.py), Ray (recipes/batch_ray.py),
    a queue.

    Args:
        model, folder, policy, users_per_part, arguments: as of `recommend_to_disk`.
        users: how many there are.
        source: what tells these users from others, such as ``{"histories": "users.parquet"}``; kept in ``run.json``,
            and compared when the run goes on.

    Attributes:
        nobody: the search for no user at all; what no search takes is refused by it, before the folder is touched.

    Raises:
        TypeError, ValueError: naming the argument.

    Examples:
        >>> import patchkern as pk
        >>> from patchkern.models.scratch import from_scratch
        >>> titles = {7: "Alien", 8: "Aliens", 9: "The Third Man"}
        >>> model = pk.PatchedCausalLM(*from_scratch(titles, hidden_size=16, intermediate_size=32), pk.TextOnly())
        >>> users = [[7, 8], [9, 7], [8]]
        >>> run = pk.BulkRun(model, "bulk", users=3, users_per_part=2, source={"histories": "of three"}, k=2)
        >>> with run.writing():
        ...     for part in run.missing():
        ...         run.write(part, users[run.range(part)])
        >>> pk.read_recommendations("bulk")[0]
        array([0, 1, 2])
    """

    def __init__(
        self,
        model: SearchModel,
        folder: str | PathLike[str],
        policy: AnyPolicy | None = None,
        *,
        users: int,
        source: Mapping[str, Any],
        users_per_part: int = 4096,
        **arguments: Any,
    ) -> None:
        import_pyarrow()
        if "user_ids" in arguments:
            raise TypeError("user_ids: expected by `write`, with the users of each part, got some for the whole run")
        check_count("users", users, minimum=0)
        check_count("users_per_part", users_per_part, minimum=1)
        users, users_per_part = int(users), int(users_per_part)
        self.model, self.folder, self.users = model, Path(folder), users
        self.policy = policy_of(model, policy)
        bound = inspect.signature(recommend).bind(model, [], self.policy, **arguments)
        bound.apply_defaults()
        if bound.arguments["search"] is None:
            bound.arguments["search"] = usual_search(model)
        self._arguments = {name: value for name, value in bound.arguments.items() if name not in _OWN}
        description = {
            "format_version": FORMAT_VERSION,
            "policy": policy_to_dict(self.policy),
            "users": users,
            "users_per_part": users_per_part,
            "arguments": {name: described(self._arguments[name]) for name in sorted(self._arguments.keys() - _FREE)},
            **source,
            "catalog": model.catalog.token_fingerprint,
            "items": described(model.catalog.item_ids),
            "prompt": model.prompt.to_dict(),
            "model": model_fingerprint(model),
        }
        self.description: dict[str, Any] = json.loads(json.dumps(description, default=described))
        self.hash = hash_of(self.description)
        self.parts = parts_of(self.folder, users, users_per_part)
        none = np.zeros(0, np.int64)
        self.nobody = self.request(Part(0, self.folder, none), Histories(model.catalog.item_ids[:0], [0]), none)

    def __repr__(self) -> str:
        return f"BulkRun({self.users:,} users in {len(self.parts):,} parts, {str(self.folder)!r})"

    def range(self, part: int) -> slice:
        """The users of a part."""
        users = self._part(part).users
        return slice(int(users[0]), int(users[-1]) + 1)

    def _part(self, number: int) -> Part:
        check_count("part", number, minimum=0, maximum=len(self.parts) - 1)
        return self.parts[number]

    def writing(self, shard: tuple[int, int] | None = None) -> AbstractContextManager[Any]:
        """While it is open, no other process writes the parts of this shard, ``(rank, world)``, or of any.

        Raises:
            OSError: the folder cannot be written.
            ValueError: the folder holds another run, and what differs; or another process writes what this one would.
        """
        return writing(self.folder, self.description, check_shard(shard))

    def missing(self, shard: tuple[int, int] | None = None) -> list[int]:
        """Numbers of the parts that are not there, of a shard or of all.

        Leftovers of killed processes are removed: only for who is `writing`, or hands out the work.

        Raises:
            ValueError: a part is of another run, or malformed; the message names the file.
        """
        rank, world = check_shard(shard)
        mine = self.parts[rank::world]
        sweep(mine)
        return [part.number for part in mine if self.stamp(part) is None]

    def stamp(self, part: Part) -> Stamp | None:
        """What a part that is there says of itself."""
        return read_stamp(part, self.hash) if part.path.exists() else None

    def summary(self, shard: tuple[int, int] | None = None) -> Summary:
        """Short lists and unknown items in the parts that are there, of a shard or of all."""
        rank, world = check_shard(shard)
        stamps = [self.stamp(part) for part in self.parts[rank::world]]
        return sum((stamp.summary for stamp in stamps if stamp is not None), Summary())

    def request(self, part: Part, histories: Histories, names: NDArray[Any]) -> Request:
        """The search for a part's users, checked."""
        own = {
            name: of_users(name, value, part.users, self.users)
            for name, value in self._arguments.items()
            if name in _OF_USERS
        }
        return Request(self.model, histories, self.policy, user_ids=names, **{**self._arguments, **own})

    @cached_property
    def prepared(self) -> Prepared:
        """What all parts' searches share."""
        return prepare(self.nobody)

    def write(
        self,
        part: int,
        histories: HistoriesLike,
        user_ids: Sequence[Any] | NDArray[Any] | None = None,
        shard: tuple[int, int] | None = None,
    ) -> None:
        """Recommend to a part's users and write it.

        Args:
            part: its number.
            histories: of the users of `range`.
            user_ids: of these users; where not given, 0, 1, 2, ... of all.
            shard: who writes it, for `patchkern.read_recommendations` to tell which are missing.

        Raises:
            FileNotFoundError: the folder is gone.
            TypeError, ValueError: as of `recommend`, naming the user; other than as many users.
        """
        chosen = self._part(part)
        known = Histories.coerce(histories)
        if len(known) != chosen.users.size:
            raise ValueError(f"histories: expected those of {chosen.users.size} users, got {len(known)}")
        names = chosen.users if user_ids is None else names_of(user_ids, chosen.users.size)
        lists, summary = run(self.request(chosen, known, names), self.prepared)
        table = recommendation_table(names, lists, self.model.catalog)
        write_part(chosen, table, Stamp(self.hash, chosen.number, check_shard(shard), summary))


def recommendation_table(user_ids: Sequence[Any] | NDArray[Any], lists: Sequence[Ranked], catalog: Catalog) -> Any:
    """What `recommend` returned as a ``pyarrow.Table``: ``user``, ``items`` and ``scores``, a row per user.

    Args:
        user_ids: ``B`` integers or strings.
        lists: per user ``(item_id, score)``, best first.
        catalog: of the items, which are integers or strings in it.

    Examples:
        >>> import patchkern as pk
        >>> catalog = pk.Catalog.from_token_ids(range(3), range(4), item_ids=[7, 8, 9])
        >>> table = pk.recommendation_table(["eve", "bob"], [[(8, -0.5), (9, -2.0)], [(7, -1.0)]], catalog)
        >>> table.to_pylist()[1]
        {'user': 'bob', 'items': [7], 'scores': [-1.0]}
    """
    pa, _ = import_pyarrow()
    offsets = pa.array(np.cumsum([0, *map(len, lists)]), pa.int64())
    kind = pa.string() if catalog.item_ids.dtype.kind == "U" else pa.int64()
    items = pa.array([item for user in lists for item, _ in user], kind)
    scores = pa.array([score for user in lists for _, score in user], pa.float64())
    columns = (
        pa.array(names_of(user_ids, len(lists))),
        pa.LargeListArray.from_arrays(offsets, items),
        pa.LargeListArray.from_arrays(offsets, scores),
    )
    return pa.table(dict(zip(COLUMNS, columns, strict=True)))


def check_shard(shard: Any) -> tuple[int, int]:
    """``(rank, world)``; of None, that of who writes everything."""
    if shard is None:
        return 0, 1
    if not is_sequence(shard) or len(shard) != 2:
        raise TypeError(f"shard: expected (rank, world) or None, got {shard!r}")
    rank, world = shard
    check_count("shard: world", world, minimum=1)
    check_count("shard: rank", rank, minimum=0, maximum=world - 1)
    return int(rank), int(world)


def names_of(user_ids: Any, n_users: int) -> NDArray[Any]:
    """``(B,)`` what users are called: 0, 1, 2, ... where nothing is given."""
    if user_ids is None:
        return np.arange(n_users)
    names = flat_array("user_ids", user_ids)
    if names.size != n_users:
        raise ValueError(f"user_ids: expected one per user ({n_users}), got {names.size}")
    if names.size and names.dtype.kind not in "iuU":
        raise TypeError(f"user_ids: expected integers or strings, got dtype {names.dtype}")
    return names
