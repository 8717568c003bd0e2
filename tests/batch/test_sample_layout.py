# SPDX-License-Identifier: Apache-2.0
"""What `build_layout` refuses, by name and before anything is made."""

from __future__ import annotations

from typing import Any

import cases
import numpy as np
import pytest
from error_cases import CATALOG, HISTORIES, LAYOUT_ARGUMENTS, PROMPT, OwnPolicy, refused

import patchkern as pk
from patchkern.batch.policy_kinds import Level


def test_unknown_item_id() -> None:
    refused(
        pk.build_layout,
        ValueError,
        r"histories: expected item ids of the catalog, got 21 at position 1",
        CATALOG,
        [[10, 21]],
        pk.TextOnly(),
        PROMPT,
    )
    named = cases.make_catalog({"a": [1]})
    refused(pk.build_layout, ValueError, r"histories: .*got 'b' at position 0", named, [["b"]], pk.TextOnly(), PROMPT)
    refused(
        pk.build_layout,
        TypeError,
        r"histories: expected integer item ids as in the catalog, got string ids",
        CATALOG,
        [["10"]],
        pk.TextOnly(),
        PROMPT,
    )
    refused(
        pk.build_layout,
        TypeError,
        r"histories: expected string item ids as in the catalog, got integer ids",
        named,
        [[10]],
        pk.TextOnly(),
        PROMPT,
    )


def test_target_not_in_the_catalog() -> None:
    refused(
        pk.build_layout,
        ValueError,
        r"targets: expected item ids of the catalog, got 11 at position 2",
        CATALOG,
        HISTORIES,
        pk.TextOnly(),
        PROMPT,
        [10, 20, 11],
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"catalog": None}, TypeError, r"catalog: expected a Catalog, got NoneType"),
        ({"catalog": {10: "a"}}, TypeError, r"catalog: expected a Catalog, got dict"),
        ({"histories": "abc"}, TypeError, r"histories: .*got str"),
        ({"histories": None}, TypeError, r"histories: .*got NoneType"),
        ({"histories": 5}, TypeError, r"histories: .*got int"),
        ({"histories": [10, 20]}, TypeError, r"histories\[0\]: expected a sequence of item ids, got int"),
        ({"histories": [[10], "20"]}, TypeError, r"histories\[1\]: expected a sequence of item ids, got str"),
        ({"histories": [[10.5]]}, TypeError, r"histories.*float64"),
        ({"histories": [[10], ["a"]]}, TypeError, r"histories: expected item ids of one kind"),
        ({"histories": [[10, "a"]]}, TypeError, r"histories\[0\]: expected values of one kind, got int and str"),
        ({"histories": [[[10, 20]]]}, ValueError, r"histories\[0\]: .*\(1, 2\)"),
        ({"histories": [[None]]}, TypeError, r"histories\[0\]: .*NoneType"),
        ({"histories": {0: 10}}, TypeError, r"histories\[0\]: expected a sequence of item ids, got int"),
        ({"policy": None}, TypeError, r"policy: expected a policy .*got NoneType"),
        ({"policy": pk.TextOnly}, TypeError, r"policy: expected a policy .*got type"),
        ({"policy": 5}, TypeError, r"policy: expected a policy .*got int"),
        ({"prompt": None}, TypeError, r"prompt: expected a Prompt, got NoneType"),
        ({"prompt": ([1], [2], [3], [4])}, TypeError, r"prompt: expected a Prompt, got tuple"),
        ({"targets": 10}, TypeError, r"targets: expected one item id per user, got int"),
        ({"targets": "abc"}, TypeError, r"targets: expected one item id per user, got str"),
        ({"targets": {10, 20, 30}}, TypeError, r"targets: expected one item id per user, got set"),
        ({"targets": []}, ValueError, r"targets: expected one item id per user \(3\), got 0"),
        ({"targets": [10, 20]}, ValueError, r"targets: expected one item id per user \(3\), got 2"),
        ({"targets": ["a", "b", "c"]}, TypeError, r"targets: expected integer item ids"),
        ({"targets": [10.0, 20.0, 30.0]}, TypeError, r"targets: .*float"),
        ({"targets": [10, 20, None]}, TypeError, r"targets: .*NoneType"),
        ({"targets": [[10], [20], [30]]}, (TypeError, ValueError), r"targets: .*list"),
        ({"targets": np.asarray([[10], [20], [30]])}, ValueError, r"targets: .*\(3, 1\)"),
    ],
)
def test_build_layout_refuses(change: dict[str, Any], error: Any, message: str) -> None:
    refused(pk.build_layout, error, message, **(LAYOUT_ARGUMENTS | change))


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        (None, r"policy: expected levels of dtype uint8 and shape \(4,\), got NoneType"),
        ([0, 0, 0, 0], r"policy: .*got list"),
        (np.zeros(4, np.int64), r"policy: expected levels of dtype uint8 .*, got int64 \(4,\)"),
        (np.zeros(3, np.uint8), r"policy: .*got uint8 \(3,\)"),
        (np.zeros((4, 1), np.uint8), r"policy: .*got uint8 \(4, 1\)"),
        (np.asarray([0, 0, 0, 4], np.uint8), r"policy: expected levels 0 to 3, got 4"),
        (np.asarray([2, 0, 0, 0], np.uint8), r"policy: expected every JOIN to follow a patch"),
        (np.asarray([0, 2, 0, 0], np.uint8), r"policy: expected every JOIN to follow a patch"),
        (np.asarray([1, 1, 1, 2], np.uint8), r"policy: expected every JOIN to follow a patch item of the same user"),
    ],
)
def test_own_policies_are_checked(levels: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        pk.build_layout(CATALOG, HISTORIES, OwnPolicy(levels), PROMPT)


def test_own_policy_may_join_after_a_join() -> None:
    levels = np.asarray([Level.PATCH, Level.JOIN, Level.JOIN, Level.PATCH], np.uint8)
    assert pk.build_layout(CATALOG, HISTORIES, OwnPolicy(levels), pk.Prompt()).hi.tolist() == [3, 4]
