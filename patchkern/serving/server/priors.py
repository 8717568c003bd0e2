# SPDX-License-Identifier: Apache-2.0
"""What is known of users and items beside the model: files of fitted priors, and how much each of them counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from patchkern.batch.catalog import Catalog
from patchkern.search.linear_prior import LinearPrior
from patchkern.search.prior import TransitionPrior
from patchkern.search.prior_file import kind_of

_KINDS: dict[str, Any] = {"linear_prior": LinearPrior, "transition_prior": TransitionPrior}


class Priors(NamedTuple):
    """As `recommend` takes them.

    Attributes:
        prior: callables.
        weight: of each.
    """

    prior: tuple[Any, ...] = ()
    weight: tuple[float, ...] = ()


@dataclass(frozen=True)
class PriorFiles:
    """Files that ``LinearPrior.save`` and ``TransitionPrior.save`` wrote, read again with every model.

    Attributes:
        paths: of the files.
        weights: of each; none: 1 for all.

    Raises:
        FileNotFoundError: one of the files is not there.
        ValueError: weights below 0, or too many or too few of them.
    """

    paths: Sequence[str] = ()
    weights: Sequence[float] = ()

    def __post_init__(self) -> None:
        for path in self.paths:
            if not Path(path).is_file():
                raise FileNotFoundError(f"prior: expected a file that a prior's save wrote, got {path!r}")
        if self.weights and len(self.weights) != len(self.paths):
            raise ValueError(f"prior_weight: expected one for each prior ({len(self.paths)}), got {len(self.weights)}")
        for weight in self.weights:
            if not 0 <= weight < math.inf:
                raise ValueError(f"prior_weight: expected a finite number of at least 0, got {weight}")

    def of(self, catalog: Catalog) -> Priors:
        """For the items of a catalogue.

        Raises:
            FileNotFoundError, ImportError, ValueError: naming the file; among them that it belongs to another
                catalogue.
        """
        priors = tuple(_KINDS[kind_of(path)].load(path, catalog) for path in self.paths)
        return Priors(priors, tuple(self.weights) or (1.0,) * len(priors))
