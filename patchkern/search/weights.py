# SPDX-License-Identifier: Apache-2.0
"""Weights of several scores in their sum, from what users took: steady, and the same on every call.

Knows no model and no search: `fit_weights` takes the scores of candidates, few or a whole catalogue.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from patchkern.batch.arguments import check_count

OBJECTIVES = ("ndcg", "nll")

MAX_WEIGHT = 128.0
"""Of a prior, in terms of the model's; from there on the model only orders what the priors find equally likely."""

Floats = NDArray[np.float64]

_PER_OCTAVE = 8
_GRID = MAX_WEIGHT * 2.0 ** (np.arange(-14 * _PER_OCTAVE, 1) / _PER_OCTAVE)
_SMOOTHING = 0.75  # octaves, a standard deviation
_SHRINKAGE = 1e-4  # of the likeliest weights, so that those stay finite that nothing bounds
_ROUNDS = 20
_CELLS_AT_ONCE = 1 << 20


def fit_weights(
    scores: ArrayLike, targets: ArrayLike, objective: str = "ndcg", k: int = 20, *, depth: int = 100
) -> Floats:
    """The weights of P priors beside a model, with which the sum of the scores ranks the targets best.

    ``"ndcg"``: NDCG@k is a step function of the weights, and its highest step often chance. So it is averaged over
    factors of a weight, Gaussian in the logarithm with a standard deviation of 0.75 octaves, and every weight in turn
    goes where that is largest, on a grid of 8 per octave from 1/128 to 128, until none moves; one for which the low end
    is best becomes 0, unless that is worse. They begin where ``"nll"`` ends.

    ``"nll"``: the weights of the likeliest softmax over the candidates, scores of the model weighted too: the mean
    negative log-probability of the targets is convex, and Newton's method finds its minimum over weights of at least 0.
    Returned in terms of the model's weight, since a common factor changes no order.

    Both look at what can come out at the top: the first ``depth`` candidates by the model and by every prior. The
    likelihood of a whole catalogue is decided far below, and its weights rank worse.

    Args:
        scores: ``(B, C, 1 + P)`` floats: of C candidates of B users, first the model's, then every prior's; -inf, in
            any of them, where a user has fewer candidates. Equal sums are ranked in this order.
        targets: ``(B,)`` the place of each user's target among the candidates, -1 where it is none of them; such users,
            and those whose target has -inf, tell nothing.
        objective: ``"ndcg"`` or ``"nll"``.
        k: of the NDCG.
        depth: at least ``k``, of every score.

    Returns:
        ``(P,)`` float64, from 0 to `MAX_WEIGHT`; zeros, and a warning, where no target is among the candidates.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective: expected one of {', '.join(OBJECTIVES)}, got {objective!r}")
    check_count("k", k, minimum=1)
    check_count("depth", depth, minimum=k)
    found = _Found.of(*shortlist(scores, targets, depth))
    n_priors = found.ahead.shape[2] - 1
    if not len(found.ahead):
        warnings.warn("targets: expected some among the candidates, got none, by which all weights are 0", stacklevel=2)
        return np.zeros(n_priors)
    if objective == "nll":
        return _in_terms_of_first(_likeliest(found))
    weights = np.ones(1) if n_priors == 1 else _in_terms_of_first(_likeliest(found))
    for _ in range(_ROUNDS):
        before = weights.copy()
        for prior in range(n_priors):
            weights[prior] = _best_on_grid(found, weights, prior, k)
        if np.array_equal(weights, before):
            break
    return weights


def shortlist(scores: ArrayLike, targets: ArrayLike, depth: int) -> tuple[Floats, NDArray[np.int64]]:
    """The first ``depth`` candidates of each user by any of the scores, in the order that they have.

    Args:
        scores, targets: as of `fit_weights`.

    Returns:
        ``(B, M, 1 + P)`` float64, -inf where a user has fewer than M; ``(B,)`` int64 the targets' places among these.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    given = np.asarray(scores)
    if given.dtype.kind != "f":
        raise TypeError(f"scores: expected floating-point numbers, got {given.dtype}")
    if given.ndim != 3 or given.shape[1] < 1 or given.shape[2] < 2:
        raise ValueError(f"scores: expected shape (B, C, 1 + P), C and P at least 1, got {given.shape}")
    if not (given < math.inf).all():
        raise ValueError("scores: expected finite numbers or -inf")
    place = np.asarray(targets)
    if place.dtype.kind not in "iu" and place.size:
        raise TypeError(f"targets: expected integers, got {place.dtype}")
    n_users, n_candidates, _ = given.shape
    if place.shape != (n_users,):
        raise ValueError(f"targets: expected one per user ({n_users}), got shape {place.shape}")
    if place.size and not -1 <= place.min() <= place.max() < n_candidates:
        raise ValueError(f"targets: expected -1..{n_candidates - 1}, got {place.min()}..{place.max()}")
    place = place.astype(np.int64)
    exists: NDArray[np.bool_] = np.all(given > -math.inf, axis=2)
    keep = exists.copy()
    if depth < n_candidates:
        keep[:] = False
        for column in range(given.shape[2]):
            ordered = np.where(exists, given[:, :, column], -math.inf)
            best = np.argpartition(-ordered, depth - 1, axis=1)[:, :depth]
            np.put_along_axis(keep, best, True, axis=1)
        keep &= exists
    users = np.arange(n_users)
    length = int(keep.sum(axis=1).max(initial=0))
    order = np.argsort(~keep, axis=1, kind="stable")
    within = (order == place[:, None]).argmax(axis=1)
    order = order[:, :length]
    short = np.take_along_axis(given, order[:, :, None], axis=1).astype(np.float64)
    short[~np.take_along_axis(keep, order, axis=1)] = -math.inf
    among = (place >= 0) & keep[users, place]
    return short, np.where(among, within, -1)


class _Found:
    """What was taken, against what else could have been: users without their target among the candidates tell nothing.

    Attributes:
        ahead: ``(B, C, 1 + P)`` by how much each candidate's scores exceed the target's.
        exists: ``(B, C)`` is there such a candidate?
        first: ``(B, C)`` is it ranked before the target where the sums are equal?
    """

    def __init__(self, ahead: Floats, exists: NDArray[np.bool_], first: NDArray[np.bool_]) -> None:
        self.ahead, self.exists, self.first = ahead, exists, first

    @classmethod
    def of(cls, scores: Floats, place: NDArray[np.int64]) -> _Found:
        told = np.flatnonzero(place >= 0)
        place, ahead = place[told], scores[told]
        exists: NDArray[np.bool_] = ahead[:, :, 0] > -math.inf
        ahead[~exists] = 0
        ahead -= ahead[np.arange(told.size), place][:, None]
        return cls(ahead, exists, np.arange(scores.shape[1]) < place[:, None])

    def parts(self) -> Iterator[slice]:
        step = max(_CELLS_AT_ONCE // max(self.exists.shape[1], 1), 1)
        return (slice(begin, begin + step) for begin in range(0, len(self.ahead), step))


def _best_on_grid(found: _Found, weights: Floats, prior: int, k: int) -> float:
    """Where the average of NDCG@k over factors of one weight is largest, the others being as they are."""
    others = np.append(1.0, weights)
    others[1 + prior] = 0
    grid = np.append(0.0, _GRID)
    curve = np.zeros(grid.size)
    for part in found.parts():
        base, slope = found.ahead[part] @ others, found.ahead[part, :, 1 + prior]
        base[~found.exists[part]] = -math.inf
        places = 1 + _ahead_on_grid(base, slope, found.first[part], grid)
        for at, place in enumerate(places.T):
            curve[at] += (1 / np.log2(1 + place[place <= k])).sum()
    distance = (np.arange(_GRID.size)[:, None] - np.arange(_GRID.size)) / (_PER_OCTAVE * _SMOOTHING)
    kernel = np.exp(-(distance**2) / 2)
    smooth = kernel @ curve[1:] / kernel.sum(axis=1)
    best = int(np.flatnonzero(smooth >= smooth.max() * (1 - 1e-12))[0])
    return 0.0 if best == 0 and curve[0] >= curve[1] else float(_GRID[best])


def _ahead_on_grid(base: Floats, slope: Floats, first: NDArray[np.bool_], grid: Floats) -> NDArray[np.int64]:
    """``(B, G)`` how many candidates are ranked before the target at each weight, ``(B, C)`` being what they are ahead.

    As the weight grows a candidate passes the target at most once, rounding included: where, is found by bisection.
    """
    users, size = len(base), grid.size
    falls = slope < 0
    low, passes = np.zeros(base.shape, np.int64), np.full(base.shape, size)
    for _ in range(size.bit_length()):
        middle = (low + passes) // 2
        total = base + grid[np.minimum(middle, size - 1)] * slope
        passed = (((total > 0) | ((total == 0) & first)) != falls) | (middle == size)
        low, passes = np.where(passed, low, middle + 1), np.where(passed, middle, passes)
    cell = np.arange(users)[:, None] * (size + 1) + passes
    change = np.bincount(cell.ravel(), np.where(falls, -1, 1).ravel(), users * (size + 1)).astype(np.int64)
    ahead: NDArray[np.int64] = falls.sum(axis=1)[:, None] + change.reshape(users, -1)[:, :size].cumsum(axis=1)
    return ahead


def _likeliest(found: _Found) -> Floats:
    """``(1 + P,)`` at least 0: the minimum of the negative log-likelihood, by Newton's method on those above 0."""
    size = np.sqrt((found.ahead**2).sum(axis=(0, 1)) / found.exists.sum())
    size[size == 0] = 1
    weights = 1 / size
    value, slope, curvature = _likelihood(found, weights, size)
    for _ in range(100):
        free = (weights > 0) | (slope < 0)
        if np.abs(slope[free] / size[free]).max(initial=0) < 1e-10:
            break
        step = np.zeros(weights.size)
        step[free] = -np.linalg.solve(curvature[np.ix_(free, free)], slope[free])
        for halved in range(40):
            tried = np.maximum(weights + step * 0.5**halved, 0)
            new = _likelihood(found, tried, size)
            if new[0] <= value + 1e-4 * slope @ (tried - weights):
                break
        else:  # no smaller in float64
            break
        weights, (value, slope, curvature) = tried, new
    return weights


def _likelihood(found: _Found, weights: Floats, size: Floats) -> tuple[float, Floats, Floats]:
    """The mean negative log-likelihood of the targets, shrinkage included; its gradient and its second derivative."""
    value, slope, curvature = 0.0, np.zeros(weights.size), np.zeros((weights.size, weights.size))
    for part in found.parts():
        ahead = found.ahead[part]
        logits = np.where(found.exists[part], ahead @ weights, -math.inf)
        top = logits.max(axis=1, keepdims=True)
        share = np.exp(logits - top)
        total = share.sum(axis=1, keepdims=True)
        share /= total
        value += float((np.log(total) + top).sum())
        mean = (share[:, None] @ ahead)[:, 0]
        slope += mean.sum(axis=0)
        flat = ahead.reshape(-1, weights.size)
        curvature += flat.T @ (share.reshape(-1, 1) * flat) - mean.T @ mean
    n, shrinkage = len(found.ahead), _SHRINKAGE * size**2
    value = value / n + float(shrinkage @ weights**2) / 2
    return value, slope / n + shrinkage * weights, curvature / n + np.diag(shrinkage)


def _in_terms_of_first(weights: Floats) -> Floats:
    """``(P,)`` of ``(1 + P,)``, the largest at most `MAX_WEIGHT`."""
    model = max(weights[0], weights[1:].max() / MAX_WEIGHT)
    return weights[1:] / model if model > 0 else np.zeros(weights.size - 1)
