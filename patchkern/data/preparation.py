# SPDX-License-Identifier: Apache-2.0
"""From data as it was read to data that a model can be trained on: filters, then a split. And the flags for it."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence
from typing import Any

from patchkern.data import filters
from patchkern.data.formats import open_dataset
from patchkern.data.interactions import MIN_HISTORY, Interactions, Samples
from patchkern.data.splits import leave_one_out, temporal_split
from patchkern.data.synthetic import synthetic

logger = logging.getLogger("patchkern.data")

# of the PatchRec paper
RATED_ABOVE = 3.0
MIN_INTERACTIONS = 21


def prepare(
    interactions: Interactions,
    *,
    min_rating: float | None = None,
    min_interactions: int | None = None,
    k_core: int | None = None,
    ratio: Sequence[float] = (48, 1, 1),
    report: Callable[[str], None] = logger.info,
) -> Interactions:
    """Filter and split; what is not given is as in the PatchRec paper. Data that has splits keeps them, and is filtered
    only by what is given.

    Args:
        min_rating: keep interactions rated so or better; None: above 3. Without ratings, all.
        k_core: then the part in which all users and items have so many interactions; None: no such filter.
        min_interactions: then users with at least so many; None: 21, and with a ``k_core`` no further filter.
        ratio: then the split of all interactions by time; data without timestamps is split by `leave_one_out`.
        report: gets a line for each filter: what it is, and how many interactions and users it kept.

    Raises:
        ValueError: nothing is left; the message says which filter took what and what changes it.
    """
    has_splits = bool(interactions.ranges)
    if not has_splits and min_interactions is None and k_core is None:
        min_interactions = MIN_INTERACTIONS
    steps: list[tuple[str, str, Callable[[Interactions], Interactions]]] = []
    if min_rating is not None:
        rated = float(min_rating)
        steps.append((f"rated {rated:g} or better", "min_rating", lambda data: filters.rating_at_least(data, rated)))
    elif interactions.ratings is not None and not has_splits:
        steps.append(
            (f"rated above {RATED_ABOVE:g}", "min_rating", lambda data: filters.rating_above(data, RATED_ABOVE))
        )
    if k_core is not None:
        core = k_core
        steps.append((f"users and items with {core} interactions", "k_core", lambda data: filters.k_core(data, core)))
    if min_interactions is not None:
        count = min_interactions
        steps.append(
            (f"users with {count} interactions", "min_interactions", lambda data: filters.min_interactions(data, count))
        )
    lines = []
    data = interactions
    for what, flag, apply in steps:
        kept = apply(data)
        lines.append(
            f"{what}: {kept.num_interactions:,} of {data.num_interactions:,} interactions and {kept.num_users:,} of "
            f"{data.num_users:,} users kept ({flag})"
        )
        if data.num_interactions and not kept.num_interactions:
            raise ValueError(
                f"interactions: no interaction is left of {interactions.name!r}: {'; '.join(lines)}. "
                f"{_most(data, flag)}; another {flag} (--{flag}) keeps more"
            )
        report(lines[-1])
        data = kept
    if has_splits:
        return data
    return leave_one_out(data) if data.histories.timestamps is None else temporal_split(data, ratio)


def samples_of(interactions: Interactions, split: str) -> Samples:
    """The samples of a split, of which there must be some.

    Raises:
        ValueError: there is none; the message says what a sample needs and which flags keep more.
    """
    samples = interactions.samples(split)
    if not samples.users.size:
        longest = int(interactions.histories.lengths.max(initial=0))
        raise ValueError(
            f"samples: expected some in the {split} split of {interactions.name!r}, got none: a sample is an item with "
            f"{MIN_HISTORY} others before it, {interactions.num_users:,} users have up to {longest} items in all "
            "splits; smaller --min_rating, --min_interactions or --k_core keep more"
        )
    return samples


def add_arguments(parser: Any, *, default: str | None = None) -> None:
    """``--data`` and the flags of `prepare`, for a parser or a group of one; ``--data`` is required without default."""
    parser.add_argument(
        "--data", required=default is None, default=default, help='"synthetic" or a path that open_dataset reads'
    )
    add_filters(parser)


def add_filters(parser: Any) -> None:
    """The flags of `prepare`."""
    parser.add_argument("--min_rating", type=float, help="keep interactions rated so or better (default: above 3)")
    parser.add_argument(
        "--min_interactions",
        type=int,
        help=f"then users with so many (default: {MIN_INTERACTIONS}; with --k_core, or data that has splits: any)",
    )
    parser.add_argument("--k_core", type=int, help="of users and items, before --min_interactions (default: none)")


def load(arguments: argparse.Namespace, **synthetic_options: Any) -> Interactions:
    """The data set that the flags of `add_arguments` name, prepared; what each filter keeps is printed."""
    if arguments.data == "synthetic":
        data = synthetic(**synthetic_options)
    else:
        data = open_dataset(arguments.data)
    return prepared(data, arguments)


def prepared(data: Interactions, arguments: argparse.Namespace) -> Interactions:
    """`prepare` as the flags of `add_filters` say; what each filter keeps is printed."""
    chosen = {name: getattr(arguments, name) for name in ("min_rating", "min_interactions", "k_core")}
    return prepare(data, **chosen, report=lambda line: print(line, flush=True))


def _most(data: Interactions, flag: str) -> str:
    if flag == "min_rating" and data.ratings is not None:
        return f"The best rating is {data.ratings.max():g}"
    return f"The most of a user is {int(data.histories.lengths.max())}"
