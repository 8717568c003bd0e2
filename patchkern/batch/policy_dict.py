# SPDX-License-Identifier: Apache-2.0
"""Policies as JSON-ready descriptions, in which models keep them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np

from patchkern.batch.experts import Experts
from patchkern.batch.mean_of_old import MeanOfOld
from patchkern.batch.policies import (
    FitRows,
    ItemDropout,
    ItemPatches,
    RandomItemPatches,
    SessionPatches,
    TextOnly,
    TimeSessions,
)
from patchkern.batch.policy_kinds import AnyPolicy
from patchkern.batch.preference_memory import PreferenceMemory

_KINDS = (
    TextOnly,
    ItemPatches,
    SessionPatches,
    RandomItemPatches,
    ItemDropout,
    TimeSessions,
    FitRows,
    Experts,
    MeanOfOld,
    PreferenceMemory,
)
_POLICIES: dict[str, Any] = {policy.__name__: policy for policy in _KINDS}


def policy_to_dict(policy: AnyPolicy) -> dict[str, Any]:
    """A JSON-ready description of one of the library's policies."""
    if not isinstance(policy, _KINDS):
        raise TypeError(f"policy: expected one of {', '.join(_POLICIES)}, got {type(policy).__name__}")
    arguments = {
        field.name: _described(getattr(policy, field.name))
        for field in fields(policy)
        # as it was before there was such a thing
        if not field.kw_only or getattr(policy, field.name) != field.default
    }
    return {"name": type(policy).__name__, **arguments}


def policy_from_dict(description: Mapping[str, Any]) -> AnyPolicy:
    """The inverse of `policy_to_dict`."""
    if not isinstance(description, Mapping):
        raise TypeError(f"description: expected a mapping, got {type(description).__name__}")
    arguments = {
        name: policy_from_dict(value) if isinstance(value, Mapping) else value for name, value in description.items()
    }
    name = arguments.pop("name", None)
    if name not in _POLICIES:
        raise ValueError(f"description: expected a name among {', '.join(_POLICIES)}, got {name!r}")
    policy: AnyPolicy = _POLICIES[name](**arguments)
    return policy


def _described(value: Any) -> Any:
    if isinstance(value, _KINDS):
        return policy_to_dict(value)
    return value.item() if isinstance(value, np.generic) else value
