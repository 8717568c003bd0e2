# SPDX-License-Identifier: Apache-2.0
"""From data as it was read to data that a model can be trained on: filters, then a split. And the flags for it."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence
from typing import Any

from patchkern.batch.arguments import check_count, check_number
from patchkern.data import filters
from patchkern.data.formats import open_dataset
from patchkern.data.interactions import MIN_HISTORY, Interactions, check_interactions
from patchkern.data.samples import Samples
from patchkern.data.splits import leave_last_out, temporal_split
from patchkern.data.synthetic import synthetic

logger = logging.getLogger("patchkern.data")

# of the PatchRec paper
RATED_ABOVE = 3.0
MIN_INTERACTIONS = 21

# items of each user that are tested on
LEAVE_OUT = {"leave_one_out": 1, "leave_two_out": 2}
SPLIT_BY = ("time", *LEAVE_OUT)


def prepare(
    interactions: Interactions,
    *,
    min_rating: float | None = None,
    min_interactions: int | None = None,
    k_core: int | None = None,
    split_by: str | None = None,
    ratio: Sequence[float] = (48, 1, 1),
    report: Callable[[str], None] = logger.info,
) -> Interactions:
    """Filter and split; what is not given is as in the PatchRec paper. Data that has splits keeps them, and is filtered
    only by what is given.

    Args:
        min_rating: keep interactions rated so or better; None: above 3. Without ratings, all.
        k_core: then the part in which all users and items have so many interactions; None: no such filter.
        min_interactions: then users with at least so many; None: 21, and with a ``k_core`` no further filter.
        split_by: then the split: "time", of all interactions in the ``ratio``; "leave_one_out" or "leave_two_out", of
            each user's last ones (`leave_last_out`). None: the splits that the data has, else by time, else, without
            timestamps, "leave_one_out".
        ratio: of the split by time.
        report: gets a line for each filter: what it is, and how many interactions and users it kept.

    Raises:
        ValueError: nothing is left; the message says which filter took what and what changes it.

    Examples:
        >>> from patchkern.data import from_tables, prepare
        >>> interactions = {"user": [1] * 5 + [2] * 2, "item": [7, 8, 9, 7, 8, 9, 7], "time": range(7)}
        >>> data = from_tables(interactions, {"item": [7, 8, 9], "title": ["Alien", "Aliens", "The Third Man"]})
        >>> data = prepare(data, min_interactions=3, split_by="leave_one_out")
        >>> data.user_ids.tolist(), data.targets(data.samples("test")).tolist()
        ([1], [8])
    """
    check_interactions(interactions)
    if min_rating is not None:
        check_number("min_rating", min_rating)
    for name, least in (("min_interactions", min_interactions), ("k_core", k_core)):
        if least is not None:
            check_count(name, least, minimum=0)
    if split_by is not None and split_by not in SPLIT_BY:
        raise ValueError(f"split_by: expected one of {', '.join(SPLIT_BY)}, got {split_by!r}")
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
    if has_splits and split_by is None:
        return data
    split_by = split_by or ("leave_one_out" if data.histories.timestamps is None else "time")
    return temporal_split(data, ratio) if split_by == "time" else leave_last_out(data, LEAVE_OUT[split_by])


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


def add_arguments(parser: Any, *, default: str | None = None, item_text: bool = False) -> None:
    """``--data`` and the flags of `prepare`, for a parser or a group of one; ``--data`` is required without default.

    Args:
        item_text: also ``--item_text``, for what gives `Interactions.texts` to its catalogue.
    """
    parser.add_argument(
        "--data", required=default is None, default=default, help='"synthetic" or a path that open_dataset reads'
    )
    if item_text:
        parser.add_argument(
            "--item_text",
            help='what the model reads of an item: "title (brand, categories)", of fields that the data has; it '
            "generates the title alone (default: as the run that it comes from, else the title)",
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
    parser.add_argument(
        "--split_by",
        choices=SPLIT_BY,
        help="48:1:1 of all interactions in order of time, or of each user the last one or two for the test and as "
        "many before them for validation (default: time; data that has splits: its own)",
    )


def load(arguments: argparse.Namespace, **synthetic_options: Any) -> Interactions:
    """The data set that the flags of `add_arguments` name, prepared; what each filter keeps is printed."""
    item_text = getattr(arguments, "item_text", None)
    if arguments.data == "synthetic":
        if item_text is not None:
            raise ValueError("--item_text: expected none with --data synthetic, whose items have titles alone")
        data = synthetic(**synthetic_options)
    else:
        data = open_dataset(arguments.data, **({} if item_text is None else {"item_text": item_text}))
    return prepared(data, arguments)


def prepared(data: Interactions, arguments: argparse.Namespace) -> Interactions:
    """`prepare` as the flags of `add_filters` say; what each filter keeps is printed."""
    chosen = {name: getattr(arguments, name) for name in ("min_rating", "min_interactions", "k_core", "split_by")}
    return prepare(data, **chosen, report=lambda line: print(line, flush=True))


def _most(data: Interactions, flag: str) -> str:
    if flag == "min_rating" and data.ratings is not None:
        return f"The best rating is {data.ratings.max():g}"
    return f"The most of a user is {int(data.histories.lengths.max())}"
