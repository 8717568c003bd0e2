# SPDX-License-Identifier: Apache-2.0
"""Users whose old items are compressed once, kept in a store, and gone on from when a block of new ones is full."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator, Sequence
from contextlib import closing, contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from patchkern.batch.arguments import check_count
from patchkern.batch.columns import is_sequence
from patchkern.batch.experts import Experts
from patchkern.batch.histories import Histories, HistoriesLike
from patchkern.batch.policy_kinds import AnyPolicy
from patchkern.batch.preference_memory import PreferenceMemory
from patchkern.models.recurrent import RecurrentMemory
from patchkern.search.arguments import check_leniency, known_histories, users_named
from patchkern.search.model_state import model_state
from patchkern.search.protocol import SearchModel, check_model, policy_of
from patchkern.search.summary import Summary, first_few
from patchkern.serving.compressor import Compressor, Known, Tensors
from patchkern.serving.expert_rows import ExpertRows
from patchkern.serving.identity import Pasts, compressing_parts, model_identity, user_key
from patchkern.serving.memory_rows import MemoryRows
from patchkern.serving.records import UserRecord, pack, record_bytes, unpack
from patchkern.serving.stores.opening import SERVERS, open_store
from patchkern.serving.stores.protocol import StoreError, UserStore
from patchkern.serving.stores.sqlite_store import SqliteStore, forget_log

_AT_ONCE = 256  # users whose values are looked at together
_COPIED = 64  # values that are copied from store to store together


class Updated(NamedTuple):
    """What `UserStates.update` did, in users."""

    recent: int
    """without old items: there is nothing to keep of them"""
    unchanged: int
    """nothing more is old than what was compressed"""
    extended: int
    """gone on from what was kept"""
    compressed: int
    """from the beginning: new ones, those whose past changed, and with ``parts="one"`` all whose border moved"""
    deleted: int
    """others, to make room, as far as the store knows"""


class _User(NamedTuple):
    """A user with old items, as an update or a search sees it."""

    name: Hashable
    key: bytes
    past: NDArray[Any]  # catalogue positions of the old items
    at: int  # which history


class UserStates:
    """Compressed users, kept in a store and updated one event at a time.

    Of each user the store has the keys and values of its experts (or its memory), how many items these have absorbed,
    and a hash of them in order. A history whose old items are others is compressed anew, never read wrongly; a store
    of another model, prompt or policy is refused. Several processes may share a store.

    Args:
        model: what compresses and reads.
        policy: under which; the model's own where None.
        store: where users are kept. None: in memory; a path: an lmdb file, or an SQLite file if it ends in ``.sqlite``;
            ``"redis://host:port"``: a server; or a store of `patchkern.serving.stores`, with a byte budget for example.

    Raises:
        ImportError: a package that the store needs is missing.
        StoreError: the store cannot be opened, or is another model's; naming it.
        TypeError, ValueError: naming the argument, what was expected and what came.

    Examples:
        >>> import patchkern as pk
        >>> catalog = pk.Catalog.from_token_ids(range(9), range(10))
        >>> policy = pk.Experts(pk.ItemPatches(keep_text=0, max_items=None), count=2, block=3, parts="blocks")
        >>> prompt = pk.Prompt(prefix=[9], experts=[10, 11])
        >>> model = pk.ItemModel(catalog, policy, prompt=prompt, width=8, heads=2)
        >>> states = pk.UserStates(model)
        >>> states.update(["ada"], [[1, 2, 3, 4]])
        Updated(recent=0, unchanged=0, extended=0, compressed=1, deleted=0)
        >>> states.update(["ada"], [[1, 2, 3, 4, 5, 6, 7]])
        Updated(recent=0, unchanged=0, extended=1, compressed=0, deleted=0)
        >>> lists = model.recommend([[1, 2, 3, 4, 5, 6, 7, 8]], k=3, user_states=states, user_ids=["ada"])
    """

    def __init__(
        self, model: SearchModel, policy: AnyPolicy | None = None, store: UserStore | str | PathLike[str] | None = None
    ) -> None:
        check_model(model)
        self.model = model
        self._compressor: Compressor = compressor_of(model, policy)
        with model.searching():
            self._state = model_state(model)
        self._prompt = model.prompt
        self._pasts = Pasts(model.catalog, model.item_embedding is not None)
        self._identity = model_identity(model, self._compressor.policy)
        self.store = open_store(store)
        try:
            self._claim(self.store)
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        """Users kept."""
        return len(self.store)

    def __contains__(self, user_id: Hashable) -> bool:
        with self.store.reading([user_key(user_id, "user_id")]) as (value,):
            return value is not None

    @property
    def bytes_per_user(self) -> int:
        """Bytes that are kept of a user, a header of fixed size included; with ``parts="blocks"`` of one block.

        With `Experts` the model compresses a block to say so.
        """
        return record_bytes(self._compressor.like(self._compressor.block))

    def update(
        self,
        user_ids: Sequence[Hashable] | None,
        histories: HistoriesLike,
        *,
        batch_size: int = 64,
        unknown: str = "error",
    ) -> Updated:
        """Keep users as their histories are now; nothing is computed for those whose border has not moved.

        Every ``batch_size`` users that were compressed are stored together, and stay whatever comes after.

        Args:
            user_ids: ``B`` integers, strings or bytes; None: the keys of a mapping, else 0, 1, 2, ...
            histories: B users, each from its first item on.
            batch_size: users compressed together.
            unknown: ``"error"`` or ``"drop"``, as in `recommend`: items that the catalogue does not hold are left out,
                as if they had never been there, and a `PartialListsWarning` counts them.

        Raises:
            StoreError: a value in the store is torn, or there is no room; naming it.
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        check_count("batch_size", batch_size, minimum=1)
        check_leniency("error", unknown)
        given = Histories.coerce(histories)
        names = users_named(histories, len(given), user_ids)
        keys = _keys(names)
        given, dropped = known_histories(self.model.catalog, given, unknown, names)
        users = self._users(names, keys, given)
        counts = {"recent": len(given) - len(users), "unchanged": 0, "extended": 0, "compressed": 0, "deleted": 0}
        last = {user.key: at for at, user in enumerate(users)}
        users = [user for at, user in enumerate(users) if last[user.key] == at]
        with self.model.searching():
            self._check_state(model_state(self.model))
            waiting: list[tuple[_User, Known | None]] = []
            for first in range(0, len(users), _AT_ONCE):
                some = users[first : first + _AT_ONCE]
                waiting += self._outdated(some)
                ready = len(waiting) // batch_size * batch_size
                if first + _AT_ONCE >= len(users):
                    ready = len(waiting)
                for begin in range(0, ready, batch_size):
                    batch = waiting[begin : min(begin + batch_size, ready)]
                    counts["deleted"] += self._store(given, batch)
                    extended = sum(known is not None for _, known in batch)
                    counts["extended"] += extended
                    counts["compressed"] += len(batch) - extended
                del waiting[:ready]
        counts["unchanged"] = len(users) - counts["extended"] - counts["compressed"]
        lacking = np.flatnonzero(dropped)
        examples = first_few(names[user] for user in lacking)
        Summary(
            len(given),
            unknown_items=int(dropped.sum()),
            users_with_unknown_items=lacking.size,
            unknown_examples=examples,
        ).warn()
        return Updated(**counts)

    def delete(self, user_ids: Sequence[Hashable]) -> int:
        """Forget users; returns how many of them were there."""
        if not is_sequence(user_ids):  # a name would be so many users as it has letters
            raise TypeError(f"user_ids: expected a sequence of names, got {type(user_ids).__name__}")
        return self.store.delete(_keys(user_ids))

    def save(self, path: str | PathLike[str]) -> None:
        """Write all users into a file of their own, in place of what it had: lmdb, or SQLite for ``.sqlite``.

        Raises:
            StoreError: it cannot be written.
            TypeError, ValueError: it is no file's path, or the store's own.
        """
        path, own = _file(path), getattr(self.store, "path", None)
        if own is not None and own.resolve() == path.resolve():
            raise ValueError(f"path: expected another file than the store's own, got {os.fspath(path)!r}")
        temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
        try:
            with closing(open_store(temporary)) as target:
                self._claim(target)
                _copy(self.store, target)
            if isinstance(target, SqliteStore):
                forget_log(path)  # of what was there, or it would be taken for this file's
            temporary.replace(path)
        except OSError as error:
            raise StoreError(f"{path}: {error}") from error
        finally:
            for left in temporary.parent.glob(f"{temporary.name}*"):
                left.unlink()

    def load(self, path: str | PathLike[str]) -> None:
        """Read all users of a file that `save` has written, in place of those of the same names.

        Raises:
            FileNotFoundError: there is no such file.
            StoreError: it is no store, or another model's; naming it.
            TypeError, ValueError: it is no file's path.
        """
        path = _file(path)
        if not path.is_file():
            raise FileNotFoundError(f"path: expected a file with users, found none at {os.fspath(path)!r}")
        with closing(open_store(path)) as source:
            self._claim(source)
            _copy(source, self.store)

    def close(self) -> None:
        """Close the store."""
        self.store.close()

    # ------------------------------------------------------------------ for a search

    def check(self, model: SearchModel, policy: AnyPolicy, seen: Any) -> None:
        """Raise a ValueError unless this is what compressed the users, and as it was.

        Args:
            seen: what `patchkern.search.model_state.model_state` says of the model inside its ``searching()``.
        """
        if model is not self.model:
            raise ValueError("user_states: expected those made for this model, got another model's")
        self._check_state(seen)
        if compressor_of(model, policy).policy != self._compressor.policy:
            raise ValueError(
                f"user_states: expected those made under this policy, {self._compressor.policy}, got {policy}"
            )

    @contextmanager
    def reading(self, names: Sequence[Hashable], histories: Histories) -> Iterator[list[Tensors | None]]:
        """What is kept of users whose old items are these histories' old items: views, valid inside the context.

        None for those without old items, and those who must be compressed first.
        """
        keys = [user_key(name, "user_ids") for name in names]
        users = self._users(names, keys, histories)
        with self.store.reading([user.key for user in users]) as values:
            found = {
                user.at: record.tensors  # not by key: a name may be there again, with another history
                for user, record in zip(users, map(self._record, users, values), strict=True)
                if record is not None and self._is_of(record, user, len(user.past))
            }
            yield [found.get(at) for at in range(len(names))]

    # ------------------------------------------------------------------ inside

    def _check_state(self, seen: Any) -> None:
        prompt = self.model.prompt
        is_other = prompt is not self._prompt and compressing_parts(prompt) != compressing_parts(self._prompt)
        if seen != self._state or is_other:
            raise ValueError(
                "user_states: expected the model as it was when they were made, got one that was changed since; make "
                "new ones, which see whether the store's users are of that model"
            )

    def _claim(self, store: UserStore) -> None:
        claimed = store.claim(self._identity)
        if claimed != self._identity:
            where = getattr(store, "path", None) or getattr(store, "name", type(store).__name__)
            raise StoreError(
                f"store: expected one of this model, prompt and policy ({self._identity.hex()}), got one of another "
                f"({claimed.hex()}): {where}"
            )

    def _users(self, names: Sequence[Hashable], keys: Sequence[bytes], histories: Histories) -> list[_User]:
        """Those with old items."""
        cuts = self._compressor.cuts(histories.lengths)
        index = self.model.catalog.index_of(histories.items, "histories")
        starts, with_old = histories.offsets, np.flatnonzero(cuts).tolist()
        return [_User(names[at], keys[at], index[starts[at] : starts[at] + cuts[at]], at) for at in with_old]

    def _record(self, user: _User, value: memoryview | None) -> UserRecord | None:
        return None if value is None else unpack(value, self._identity, f"user {user.name!r}")

    def _is_of(self, record: UserRecord, user: _User, cut: int) -> bool:
        """Has the record absorbed the first ``cut`` items of the user's past, and no others?"""
        return record.cut == cut <= len(user.past) and record.items == self._pasts.hash_of(user.past[:cut])

    def _outdated(self, users: list[_User]) -> list[tuple[_User, Known | None]]:
        """Those to be compressed, and what can be gone on from."""
        found: list[tuple[_User, Known | None]] = []
        with self.store.reading([user.key for user in users]) as values:
            for user, value in zip(users, values, strict=True):
                record = self._record(user, value)
                if record is None or not self._is_of(record, user, record.cut):
                    found.append((user, None))
                elif record.cut < len(user.past):
                    known = None
                    if self._compressor.extends:
                        known = Known(record.cut, tuple(tensor.clone() for tensor in record.tensors))
                    found.append((user, known))
        return found

    def _store(self, histories: Histories, batch: list[tuple[_User, Known | None]]) -> int:
        own = histories.take([user.at for user, _ in batch])
        compressed = self._compressor.compress(own, [known for _, known in batch])
        return self.store.put(
            {
                user.key: pack(UserRecord(len(user.past), self._pasts.hash_of(user.past), tensors), self._identity)
                for (user, _), tensors in zip(batch, compressed, strict=True)
            }
        )


def _keys(user_ids: Sequence[Hashable]) -> list[bytes]:
    return [user_key(name, f"user_ids[{at}]") for at, name in enumerate(user_ids)]


def _file(path: str | PathLike[str]) -> Path:
    if not isinstance(path, (str, PathLike)):
        raise TypeError(f"path: expected the path of a file, got {type(path).__name__}")
    if os.fspath(path).startswith(SERVERS):
        raise ValueError(f"path: expected the path of a file, got a server's address: {path!r}")
    return Path(path)


def _copy(source: UserStore, target: UserStore) -> None:
    keys = list(source)
    for first in range(0, len(keys), _COPIED):
        some = keys[first : first + _COPIED]
        with source.reading(some) as values:
            target.put({key: value for key, value in zip(some, values, strict=True) if value is not None})


def compressor_of(model: SearchModel, policy: AnyPolicy | None) -> Compressor:
    """How a model compresses pasts under a policy, its own where None."""
    chosen = policy_of(model, policy)
    if isinstance(chosen, Experts):
        return ExpertRows(model, chosen)
    if isinstance(chosen, PreferenceMemory) and isinstance(model, RecurrentMemory):
        return MemoryRows(model, chosen)
    raise TypeError(
        "policy: expected one that compresses what is old, Experts, or PreferenceMemory for a RecurrentMemory, got "
        f"{type(chosen).__name__} for {type(model).__name__}"
    )
