# SPDX-License-Identifier: Apache-2.0
"""Items that are dropped: what is left is the text of the others, in samples and in trunks with branches."""

from __future__ import annotations

from dataclasses import replace

import cases
import numpy as np
import pytest

import patchkern as pk
from patchkern.batch.policy_dict import policy_from_dict, policy_to_dict
from patchkern.batch.policy_kinds import Level

LENGTHS = [40, 0, 3, 17, 1]


@pytest.mark.parametrize("probability", [0.0, 0.4, 1.0])
def test_a_dropped_item_leaves_nothing(probability: float) -> None:
    policy = pk.ItemDropout(probability, keep_text=3, max_items=25, seed=7)
    batch = cases.make_batch(policy, LENGTHS)
    cut = pk.Histories.from_sequences(batch.histories).latest(25)
    kept = policy.levels(cut) == Level.TEXT
    left = [items[kept[begin:end]] for items, begin, end in zip(cut, cut.offsets[:-1], cut.offsets[1:], strict=True)]
    for before, after in zip(cut, left, strict=True):
        assert after[-3:].tolist() == before[-3:].tolist()[-after.size :], "the latest three stay"
        assert probability != 1.0 or after.size == min(before.size, 3)
    assert probability != 0.0 or kept.all()
    expected = replace(batch, histories=[items.tolist() for items in left], policy=pk.TextOnly(None)).layout()
    layout = batch.layout()
    for name in ("lo", "hi", "cu_seqlens", "position_ids", "labels"):
        assert getattr(layout, name).tolist() == getattr(expected, name).tolist(), name
    catalog, histories, _, prompt, _ = batch.arguments()
    rows = pk.build_layout(catalog, histories, policy, prompt).cu_seqlens.diff()
    assert pk.row_counts(catalog, histories, policy, prompt).tolist() == rows.tolist()


@pytest.mark.parametrize("head", ["titles", "items"])
@pytest.mark.parametrize("probability", [0.5, 1.0])
@pytest.mark.parametrize("keep_text", [0, 2])
def test_targets_of_a_trunk_read_what_was_drawn_for_it(probability: float, keep_text: int, head: str) -> None:
    """As the prompt of a user whose history lacks the dropped items."""
    policy = pk.ItemDropout(probability, keep_text, None, seed=2)
    batch = cases.make_batch(policy, [12], with_targets=False)
    catalog, (history,), _, prompt, _ = batch.arguments()
    layout = pk.build_training_layout(catalog, [history], policy, prompt, [[8, 11]], head=head)
    dropped = policy.levels(pk.Histories.from_sequences([history[:11]])) == Level.DROP
    trunk = 11 - keep_text
    for number, position in enumerate(range(8, 12)):
        split = position - keep_text
        read = [item for item, gone in zip(history[:split], dropped[:trunk], strict=False) if not gone]
        alone = pk.build_layout(catalog, [read + history[split:position]], pk.TextOnly(None), prompt, head=head)
        cu = layout.cu_seqlens.tolist()
        if head == "titles":
            span = number + 1
            rows = [*cases.rows_before(layout, span), *range(cu[span], cu[span + 1])][: alone.num_rows]
        else:
            last = int(layout.item_rows[number])
            span = next(place for place in range(len(cu) - 1) if cu[place] <= last < cu[place + 1])
            rows = [*cases.rows_before(layout, span), *range(cu[span], last + 1)]
        assert layout.lo[rows].tolist() == alone.lo.tolist()
        assert layout.position_ids[rows].tolist() == alone.position_ids.tolist()


def test_training_rows_count_them() -> None:
    policy = pk.ItemDropout(1.0, keep_text=2, max_items=None)  # the one draw that does not depend on the batch
    catalog, histories, _, prompt, _ = cases.make_batch(policy, [30, 6], with_targets=False).arguments()
    ranges = np.array([[5, 29], [0, 5]])
    counted = pk.training_rows(catalog, histories, policy, prompt, ranges)
    layout = pk.build_training_layout(catalog, histories, policy, prompt, ranges)
    assert counted.sum() == layout.num_rows


def test_it_is_described_and_checked() -> None:
    policy = pk.ItemDropout(0.25, keep_text=1, max_items=9, seed=4)
    assert policy_from_dict(policy_to_dict(policy)) == policy
    with pytest.raises(ValueError, match=r"probability: expected a number in 0\.\.1, got 1\.5"):
        pk.ItemDropout(1.5)
    with pytest.raises(ValueError, match=r"keep_text: .*got -1"):
        pk.ItemDropout(keep_text=-1)
