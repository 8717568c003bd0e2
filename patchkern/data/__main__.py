# SPDX-License-Identifier: Apache-2.0
"""Counts of a data set: ``python -m patchkern.data PATH [--tokenizer FOLDER]``.

With a tokenizer (transformers form, read from disk), also the lengths of titles and the compression ratios.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from patchkern.batch.catalog import Catalog
from patchkern.batch.histories import Histories
from patchkern.batch.policies import ItemPatches, SessionPatches
from patchkern.batch.policy_kinds import Level, Policy
from patchkern.data import Interactions, open_dataset
from patchkern.data.interactions import positions_of
from patchkern.data.preparation import add_filters, prepared


@dataclass(frozen=True)
class Compression:
    """Compression ratios of a policy: title tokens of the kept items over the rows that stand for them."""

    nominal: float
    """of one history of exactly ``max_items`` items whose titles all have the catalogue's mean length, rounded to two
    decimals: how the paper's table is computed"""
    measured: float
    """over all samples: sum of tokens over sum of rows"""


def compression(interactions: Interactions, catalog: Catalog, policy: Policy) -> Compression:
    """Nominal compression ratio of a policy that has a ``max_items``, and that measured on the test split."""
    if policy.max_items is None:
        raise ValueError("policy: expected a policy with max_items, got None")
    mean_title = round(float(catalog.lengths.mean()), 2)
    one = Histories(np.zeros(policy.max_items, np.int64), np.array([0, policy.max_items]))
    nominal = mean_title * policy.max_items / float(_rows(policy.levels(one), np.array(mean_title)).sum())
    histories = interactions.before(interactions.samples("test"), policy.max_items)
    tokens = catalog.lengths[catalog.index_of(histories.items)]
    rows = _rows(policy.levels(histories), tokens)
    return Compression(nominal, float(tokens.sum() / rows.sum()) if rows.size else float("nan"))


def _rows(levels: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Rows that each item adds to the batch."""
    return np.where(levels == Level.TEXT, tokens, np.where(levels == Level.PATCH, 1, 0))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m patchkern.data", description=__doc__.splitlines()[0])
    parser.add_argument("path", help="folder or file of a data set")
    parser.add_argument("--tokenizer", help="folder of a transformers tokenizer")
    parser.add_argument("--keep_text", type=int, default=5, help="of item patches (default: %(default)s)")
    parser.add_argument("--group_size", type=int, nargs="+", default=[5, 20], help="of session patches (default: 5 20)")
    parser.add_argument("--max_items", type=int, default=100, help="latest items of a history (default: %(default)s)")
    add_filters(parser)
    arguments = parser.parse_args(argv)
    if arguments.tokenizer is not None and not Path(arguments.tokenizer).is_dir():
        parser.error(f"--tokenizer: expected the folder of one, got {arguments.tokenizer!r}")

    data = open_dataset(arguments.path)
    if not data.ranges:
        print(f"raw data: {data.num_users:,} users, {data.num_items:,} items, {data.num_interactions:,} interactions")
    data = prepared(data, arguments)
    taken = np.unique(positions_of(data.item_ids, data.histories.items)).size
    print(f"{data.name}")
    print(f"  users            {data.num_users:>10,}")
    print(f"  items            {data.num_items:>10,}   ({taken:,} of them in a history)")
    print(f"  interactions     {data.num_interactions:>10,}")
    print(f"  longest history  {int(data.histories.lengths.max(initial=0)):>10,}")
    for split in data.ranges:
        print(f"  {split + ' samples':<16} {data.samples(split).users.size:>10,}")
    if arguments.tokenizer is None:
        return

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer, local_files_only=True, trust_remote_code=False)
    catalog = Catalog.from_titles(data.titles, tokenizer)
    print(f"  mean title       {float(catalog.lengths.mean()):>10.2f}   tokens per item of the catalogue")
    policies: list[Policy] = [ItemPatches(keep_text=arguments.keep_text, max_items=arguments.max_items)]
    policies += [SessionPatches(group_size=size, max_items=arguments.max_items) for size in arguments.group_size]
    print(f"\n  compression ratio at {arguments.max_items} items    nominal  test samples")
    for policy in policies:
        ratio = compression(data, catalog, policy)
        size = f"keep_text={policy.keep_text}" if isinstance(policy, ItemPatches) else f"group_size={policy.group_size}"  # type: ignore[attr-defined]
        print(f"  {type(policy).__name__ + '(' + size + ')':<32} {ratio.nominal:>8.2f} {ratio.measured:>13.2f}")


if __name__ == "__main__":
    main()
