# SPDX-License-Identifier: Apache-2.0
"""One row for all that is old: borders, shared passes, files."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from item_model_cases import HISTORIES, make_model

import patchkern as pk
from patchkern.batch.policy_dict import policy_from_dict, policy_to_dict


def test_old_items_are_one_row_and_recent_ones_each_their_own() -> None:
    policy = pk.MeanOfOld(keep=1, block=4)
    experts = pk.Experts(pk.ItemPatches(0, None), count=1, keep=1, block=4)
    for length in range(14):
        levels = policy.levels(pk.Histories.from_sequences([list(range(length))]))
        old = int(experts.cuts(np.array(length)))
        assert levels.tolist() == [1] * min(old, 1) + [2] * max(old - 1, 0) + [1] * (length - old)


def test_targets_of_a_pass_are_read_as_samples_are() -> None:
    model = make_model()
    policy = pk.MeanOfOld(keep=2, block=3)
    ranges = [[0, len(items) - 1] for items in HISTORIES]
    layout = pk.build_training_layout(model.catalog, HISTORIES, policy, model.prompt, ranges, head="items")
    assert layout.prefix is None, "an item is predicted from a row of its trunk"
    got = model.item_states(layout)
    alone = [items[:position] for items in HISTORIES for position in range(len(items))]
    expected = model.item_states(pk.build_layout(model.catalog, alone, policy, model.prompt))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_it_is_written_down_and_checked() -> None:
    policy = pk.MeanOfOld(keep=0, block=7)
    assert policy_from_dict(json.loads(json.dumps(policy_to_dict(policy)))) == policy
    for wrong in ({"keep": -1}, {"block": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            pk.MeanOfOld(**wrong)
