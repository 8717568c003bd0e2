# SPDX-License-Identifier: Apache-2.0
"""Which items the targets of a pass share under `patchkern.Experts`, and where experts stand: items, not yet rows."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from patchkern.batch.arrangement import running
from patchkern.batch.experts import Experts
from patchkern.batch.planning import Int64

Bools = NDArray[np.bool_]


class Trunks(NamedTuple):
    """Runs of items that targets share.

    Attributes:
        user, start, end: ``(N,)`` items ``start..end - 1`` of the user.
        follows: ``(N,)`` how many groups of experts stand before it for what its rows do not see.
        is_whole: ``(N,)`` whether it is the user's history from its first item on, and no experts stand before it.
        is_read: ``(N,)`` whether targets are predicted from it; a trunk that is not is there to be compressed.
    """

    user: Int64
    start: Int64
    end: Int64
    follows: Int64
    is_whole: Bools
    is_read: Bools


class Groups(NamedTuple):
    """``(G,)`` groups of experts: each stands for items of trunk ``of`` before ``upto``, ahead of trunk ``before``."""

    of: Int64
    upto: Int64
    before: Int64


class Samples(NamedTuple):
    """``(S,)`` targets: each is predicted from a trunk's items before ``split`` and items of its own after."""

    user: Int64
    position: Int64
    trunk: Int64
    split: Int64


Shared = tuple[Trunks, Groups, Samples]


def shared_items(policy: Experts, user: Int64, position: Int64, draw: int | None, all_rows: bool) -> Shared:
    """The trunks of samples, the experts between them, and which sample belongs to which.

    Args:
        policy: any.
        user, position: ``(S,)`` the samples, users ascending.
        draw: with one part, at how many of its borders a user's history is cut; None: all.
        all_rows: whether every row of a trunk is learned from, so that histories are whole also where no sample asks.
    """
    if policy.parts == "blocks":
        return _in_blocks(policy, user, position)
    return _as_one(policy, user, position, None if not policy.has_one_form else draw, all_rows)


def _as_one(policy: Experts, user: Int64, position: Int64, draw: int | None, all_rows: bool) -> Shared:
    """A trunk of all items per user, one per drawn border, and one of first items where those have another form."""
    users, whole = _distinct(user)
    cut = policy.cuts(position)
    late = np.flatnonzero(cut > 0)
    borders, border = np.unique(np.stack([whole[late], cut[late]], axis=1), axis=0, return_inverse=True)
    drawn = _drawn(borders[:, 0], draw, policy.seed)
    owner, at = borders[drawn].T
    early = np.zeros(0, np.int64) if policy.has_one_form else np.unique(whole[cut == 0])
    # which trunk each sample reads: the whole one, that of its border, or that of first items
    trunk, start = whole.copy(), np.zeros_like(position)
    behind = late[drawn[border.reshape(-1)]]
    trunk[behind] = users.size + (np.cumsum(drawn) - 1)[border.reshape(-1)][drawn[border.reshape(-1)]]
    start[behind] = cut[behind]
    if not policy.has_one_form:
        trunk[cut == 0] = users.size + owner.size + np.searchsorted(early, whole[cut == 0])
    split = _splits(policy, position, start)
    kinds = np.repeat([0, 1, 2], [users.size, owner.size, early.size])
    end = np.zeros(kinds.size, np.int64)
    np.maximum.at(end, trunk, split)
    if policy.count:
        np.maximum.at(end, owner, at)  # what is compressed
    if all_rows and policy.has_one_form:
        np.maximum.at(end, whole, _splits(policy, position, np.zeros_like(position)))
    begin = np.where(kinds == 1, np.concatenate([np.zeros(users.size, np.int64), at, early]), 0)
    trunks = Trunks(
        user=users[np.concatenate([np.arange(users.size), owner, early])],
        start=begin,
        end=np.maximum(end, begin),
        follows=(kinds == 1).astype(np.int64),
        is_whole=kinds == 0,
        is_read=(kinds > 0) | policy.has_one_form,
    )
    groups = Groups(owner, at, users.size + np.arange(owner.size))
    return trunks, groups if policy.count else _none(groups), Samples(user, position, trunk, split)


def _in_blocks(policy: Experts, user: Int64, position: Int64) -> Shared:
    """A trunk per block, and one more to be compressed where old items have another form."""
    users, whole = _distinct(user)
    block = policy.cuts(position) // policy.block
    last = np.zeros(users.size, np.int64)
    np.maximum.at(last, whole, block)
    first = running(last + 1)
    owner = np.repeat(np.arange(users.size), last + 1)
    nth = np.arange(owner.size) - first[owner]
    start = nth * policy.block
    split = _splits(policy, position, block * policy.block)
    trunk = first[whole] + block
    end = start.copy()
    np.maximum.at(end, trunk, split)
    old = np.flatnonzero(nth < last[owner])
    groups = Groups(old, start[old] + policy.block, old + 1)
    trunks = Trunks(users[owner], start, end, nth, np.zeros(owner.size, np.bool_), np.ones(owner.size, np.bool_))
    if not policy.count:
        return trunks, _none(groups), Samples(user, position, trunk, split)
    if policy.has_one_form:
        end[old] = groups.upto
    else:
        more = Trunks(users[owner[old]], start[old], groups.upto, nth[old], np.zeros(old.size, np.bool_), old < 0)
        trunks = Trunks(*(np.concatenate(pair) for pair in zip(trunks, more, strict=True)))
        groups = groups._replace(of=owner.size + np.arange(old.size))
    return trunks, groups, Samples(user, position, trunk, split)


def _distinct(user: Int64) -> tuple[Int64, Int64]:
    users, whole = np.unique(user, return_inverse=True)
    return users, whole.reshape(-1)


def _splits(policy: Experts, position: Int64, start: Int64) -> Int64:
    """Up to which item a sample's history, read from ``start`` on, has rows that others share."""
    return start + policy.recents.trunks(position - start)[1]


def _drawn(user: Int64, draw: int | None, seed: int) -> Bools:
    """``draw`` of every user's borders; ``user`` is ascending."""
    if draw is None:
        return np.ones(user.size, np.bool_)
    order = np.lexsort((np.random.default_rng(seed).random(user.size), user))
    rank = np.empty(user.size, np.int64)
    rank[order] = np.arange(user.size) - np.searchsorted(user, user)
    return rank < draw


def _none(groups: Groups) -> Groups:
    return Groups(*(column[:0] for column in groups))
