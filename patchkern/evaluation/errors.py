# SPDX-License-Identifier: Apache-2.0
"""How sure a mean over samples is, when the samples of one user are alike: errors over users."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from patchkern.batch.arguments import check_count
from patchkern.batch.columns import id_array

_SIGNS_AT_ONCE = 1 << 22


class Estimate(NamedTuple):
    """A mean over samples and its standard error, which is NaN with fewer than two users; without samples both are.

    As text it says "one user" in place of an error that one user's samples do not have.
    """

    mean: float
    error: float

    @property
    def spread(self) -> str:
        """The error as it is printed, or that one user has none."""
        return "(one user)" if np.isnan(self.error) and not np.isnan(self.mean) else f"± {self.error:.4f}"

    def __str__(self) -> str:
        return f"{self.mean:.4f} {self.spread}"


class Difference(NamedTuple):
    """By how much one recommender is above another on the same samples."""

    mean: float
    error: float
    """standard error over users: far smaller than that of either mean, as what the users have in common cancels"""
    p: float
    """how often a difference as large, in either direction, would come about by chance, which with one user is always;
    NaN where the mean is"""

    @property
    def change(self) -> str:
        """The mean and its error, as printed."""
        return f"{self.mean:+.4f} {Estimate(self.mean, self.error).spread}"

    @property
    def chance(self) -> str:
        """p, as printed; empty with one user."""
        return "" if np.isnan(self.error) else f"{self.p:.4f}"

    def __str__(self) -> str:
        return f"{self.change} (p {self.chance})" if self.chance else self.change


def estimate(values: ArrayLike, users: ArrayLike | None = None) -> Estimate:
    """Mean of ``(B,)`` values of samples, with its `standard_error`."""
    array = _per_sample(values)
    return Estimate(float(array.mean()) if array.size else float("nan"), standard_error(array, users))


def standard_error(values: ArrayLike, users: ArrayLike | None = None) -> float:
    """Standard error of the mean of ``(B,)`` values, clustered by user.

    With ``r[g]`` the sum over user g's samples of what each is above the mean, and G users,
    ``sqrt(G / (G - 1) * sum of r[g] ** 2) / B``. Users may have any number of samples. Where each has one, or none are
    given, it is the ordinary standard error. With few users it is itself uncertain, by about one part in
    ``sqrt(2 G)``, and rather too small than too large.

    Args:
        values: one number per sample.
        users: ``(B,)`` whose sample each is, any ids; None: everyone's own.

    Returns:
        NaN for fewer than two users.

    Raises:
        TypeError, ValueError: users that are not ids, one per value.

    Examples:
        Four samples of two users: one was always right, the other never.

        >>> from patchkern.evaluation import standard_error
        >>> hits = [1, 1, 0, 0]
        >>> round(standard_error(hits), 3), round(standard_error(hits, users=["a", "a", "b", "b"]), 3)
        (0.289, 0.5)
    """
    array = _per_sample(values)
    sums = _sums(array - array.mean(), users) if array.size else array
    if sums.size < 2:
        return float("nan")
    return float(np.sqrt(sums.size / (sums.size - 1) * np.square(sums).sum()) / array.size)


def paired_difference(
    one: ArrayLike, other: ArrayLike, users: ArrayLike | None = None, *, draws: int = 10_000, seed: int = 0
) -> Difference:
    """Mean of ``one - other`` over the same samples, with its error over users and a test by randomisation.

    The test asks how the difference would be spread if it were chance which of the two recommenders a user's numbers
    are of: all of a user's samples change sides together, ``draws`` times. It needs no normal distribution, so it holds
    for few users too.

    Args:
        one, other: ``(B,)`` values of the two, sample by sample.
        users: as in `standard_error`.
        draws: of the test; the smallest ``p`` is ``1 / (1 + draws)``.
        seed: of the draws.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Examples:
        Three more hits of six samples: as large a difference comes about by chance every fourth time.

        >>> from patchkern.evaluation import paired_difference
        >>> print(paired_difference([1, 1, 1, 0, 1, 1], [0, 1, 0, 0, 0, 1]))
        +0.5000 ± 0.2236 (p 0.2545)
    """
    a, b = np.asarray(one, np.float64), np.asarray(other, np.float64)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"other: expected one value per sample of one, shape {a.shape}, got shape {b.shape}")
    check_count("draws", draws, minimum=1)
    mean, error = estimate(a - b, users)
    sums = _sums(a - b, users)
    if not sums.size or np.isnan(mean):
        return Difference(mean, error, float("nan"))
    # what is equal but for the order of the additions counts as equal
    reached = abs(sums.sum()) - 1e-9 * np.abs(sums).sum()
    rng = np.random.default_rng(seed)
    step = max(_SIGNS_AT_ONCE // sums.size, 1)
    larger = 0
    for first in range(0, draws, step):
        signs = 1 - 2.0 * rng.integers(0, 2, (min(step, draws - first), sums.size), np.int8)
        larger += int((np.abs(signs @ sums) >= reached).sum())
    return Difference(mean, error, (1 + larger) / (1 + draws))


def user_numbers(users: ArrayLike, size: int) -> NDArray[np.int64]:
    """``(B,)`` users from 0, for one id per sample."""
    ids = id_array(users, "users")
    if ids.shape != (size,):
        raise ValueError(f"users: expected one per sample ({size}), got shape {ids.shape}")
    return np.unique(ids, return_inverse=True)[1].astype(np.int64, copy=False)


def _per_sample(values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, np.float64)
    if array.ndim != 1:
        raise ValueError(f"values: expected one number per sample, got shape {array.shape}")
    return array


def _sums(values: NDArray[np.float64], users: ArrayLike | None) -> NDArray[np.float64]:
    """``(G,)`` sum of each user's values."""
    if users is None or not values.size:
        return values
    return np.bincount(user_numbers(users, values.size), values).astype(np.float64, copy=False)
