# SPDX-License-Identifier: Apache-2.0
"""The chunked softmax over items against PyTorch's over whole logits, and the sampled one against what it estimates."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from patchkern.ops.item_softmax import item_softmax, sample_items


def make(m: int = 23, n: int = 41, width: int = 6, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """States, items and bias that want gradients, and labels of which some are repeated."""
    draw = torch.Generator().manual_seed(m + n)
    parts = [torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((m, width), (n, width), (n,))]
    labels = torch.randint(0, n, (m,), generator=draw)
    return *(part.to(dtype).requires_grad_() for part in parts), labels


def gradients(loss: Tensor, *parts: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, parts))


# ------------------------------------------------------------------ the whole catalogue


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("chunk_rows", [1, 7, 1000, None])
def test_value_and_gradients_are_those_of_cross_entropy(chunk_rows: int | None, smoothing: float) -> None:
    states, items, bias, labels = make()
    got = item_softmax(states, items, bias, labels, smoothing=smoothing, chunk_rows=chunk_rows)
    logits = states @ items.T + bias
    expected = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=0)
    of_ours, of_theirs = (gradients(0.37 * loss, states, items, bias) for loss in (got, expected))
    for ours, theirs in zip(of_ours, of_theirs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), ()], ids=str)
def test_gradients_only_where_they_are_wanted(wanted: tuple[int, ...]) -> None:
    *parts, labels = make()
    expected = gradients(item_softmax(*parts, labels), *parts)
    for place, part in enumerate(parts):
        part.requires_grad_(place in wanted)
    loss = item_softmax(*parts, labels, chunk_rows=5)
    assert loss.requires_grad == bool(wanted)
    if wanted:
        for place, got in zip(wanted, gradients(loss, *(parts[place] for place in wanted)), strict=True):
            torch.testing.assert_close(got, expected[place], rtol=0, atol=1e-12)


def test_extreme_scores_are_exact() -> None:
    """Of scores in the thousands; the exponentials of none of them are finite in float64."""
    states, items, bias, labels = make()
    loss = item_softmax(states * 1e4, items, bias, labels)
    expected = F.cross_entropy(1e4 * states @ items.T + bias, labels, reduction="sum")
    assert loss.isfinite()
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)


def test_no_states() -> None:
    states, items, bias, labels = make(m=0)
    loss = item_softmax(states, items, bias, labels)
    assert not loss.any() and loss.dtype == torch.float64
    for part, grad in zip((states, items, bias), gradients(loss, states, items, bias), strict=True):
        assert grad.shape == part.shape and not grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_sums_are_in_float32(dtype: torch.dtype) -> None:
    """Products round to the dtype; that 3,000 losses of about ten add up exactly shows that sums do not."""
    states, items, bias, labels = make(3000, 41, dtype=dtype)
    loss = item_softmax(states, items, bias, labels, chunk_rows=64)
    assert loss.dtype == torch.float32
    logits = (states @ items.T).double() + bias.double()
    expected = F.cross_entropy(logits, labels, reduction="sum")
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6 if dtype != torch.float32 else 1e-5, atol=0)
    assert all(grad.dtype == dtype for grad in gradients(loss, states, items, bias))


def test_autocast_decides_the_dtype_of_products() -> None:
    states, items, bias, labels = make(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = item_softmax(states, items, bias, labels)
    grads = gradients(loss, states, items, bias)
    rounded = [part.detach().bfloat16().requires_grad_() for part in (states, items)]
    expected = item_softmax(*rounded, bias, labels)
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)
    assert [grad.dtype for grad in grads] == [torch.float32] * 3
    for got, wanted in zip(grads, gradients(expected, *rounded, bias), strict=True):
        assert torch.equal(got, wanted.float())


def test_autocast_leaves_float64_as_it_is() -> None:
    states, items, bias, labels = make()
    with torch.autocast("cpu", torch.bfloat16):
        loss = item_softmax(states, items, bias, labels)
    assert torch.equal(loss, item_softmax(states, items, bias, labels))


# ------------------------------------------------------------------ some of it


def partition(states: Tensor, items: Tensor, bias: Tensor, labels: Tensor, count: int, seed: int) -> Tensor:
    """``(M,)`` the sampled estimate of the sum over all items' exponentials, from the loss itself."""
    sampled = sample_items(bias, labels, count, torch.Generator().manual_seed(seed))
    logs = []
    for row, label in zip(states, labels.tolist(), strict=True):
        where = sampled.labels[labels == label][:1]
        loss = item_softmax(
            row[None], items[sampled.items], bias[sampled.items], where, log_weights=sampled.log_weights
        )
        logs.append(loss + row @ items[label] + bias[label])
    return torch.stack(logs).exp()


@pytest.mark.parametrize("count", [8, 25])
def test_the_estimate_of_the_partition_function_is_unbiased(count: int) -> None:
    """Whatever the bias says of an item, and whether or not it is the label of another state."""
    states, items, bias, labels = (part.detach() for part in make(m=4, n=30, width=3))
    bias[:3] += 2.0  # drawn often
    truth = (states @ items.T + bias).exp().sum(dim=1)
    estimates = torch.stack([partition(states, items, bias, labels, count, seed) for seed in range(500)])
    error = estimates.std(dim=0) / math.sqrt(len(estimates))
    assert ((estimates.mean(dim=0) - truth).abs() <= 4 * error).all()
    # not because the errors are large
    assert (error <= 0.1 * truth).all()


def test_a_label_is_counted_once() -> None:
    """Also where it was drawn, however often; and that of another state only if it was drawn."""
    states, items, bias, _ = (part.detach() for part in make(m=2, n=5))
    labels = torch.tensor([1, 4])
    for seed in range(40):
        sampled = sample_items(bias, labels, 3, torch.Generator().manual_seed(seed))
        assert sampled.items[sampled.labels].tolist() == labels.tolist()
        assert sampled.items.tolist() == sorted(set(sampled.items.tolist()))
        for state, where in zip(states, sampled.labels, strict=True):
            loss = item_softmax(
                state[None],
                items[sampled.items],
                bias[sampled.items],
                where[None],
                log_weights=sampled.log_weights,
            )
            weights = sampled.log_weights.exp()
            weights[where] = 1.0
            scores = items[sampled.items] @ state + bias[sampled.items]
            expected = (weights * scores.exp()).sum().log() - scores[where]
            torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)


def test_weights_are_the_inverse_of_how_often_an_item_is_drawn() -> None:
    bias, labels, count = torch.tensor([3.0, 0.0, -2.0, 1.0]), torch.tensor([2]), 5
    popular = torch.softmax(bias.double(), dim=0)
    expected = 3 / 4 + 2 * popular  # three uniform draws, two by the bias
    drawn, times = torch.zeros(4, dtype=torch.float64), 1000
    for seed in range(times):
        sampled = sample_items(bias, labels, count, torch.Generator().manual_seed(seed))
        number = sampled.log_weights.exp() * expected[sampled.items]
        torch.testing.assert_close(number, number.round(), rtol=0, atol=1e-9)
        assert round(float(number.sum())) == count
        drawn[sampled.items] += number
    error = (expected / times).sqrt()
    assert ((drawn / times - expected).abs() <= 4 * error).all()


def test_a_label_that_was_not_drawn_weighs_nothing_elsewhere() -> None:
    states, items, bias, labels = make(m=2, n=1000)
    sampled = sample_items(bias, labels, 1, torch.Generator().manual_seed(0))
    assert (sampled.log_weights[sampled.labels] == -math.inf).all() and sampled.items.numel() == 3
    loss = item_softmax(
        states, items[sampled.items], bias[sampled.items], sampled.labels, log_weights=sampled.log_weights
    )
    (of_items,) = gradients(loss, items)
    # every state's own label and the draw; the label of the other state has nothing from it
    alone = [
        item_softmax(
            states[[row]],
            items[sampled.items],
            bias[sampled.items],
            sampled.labels[[row]],
            log_weights=sampled.log_weights,
        )
        for row in range(2)
    ]
    (of_first,) = gradients(alone[0], items)
    assert loss.isfinite() and not of_first[labels[1]].any() and of_first[labels[0]].any()
    torch.testing.assert_close(of_items, of_first + gradients(alone[1], items)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunk_rows", [1, 7, None])
def test_sampled_gradients_are_those_of_weighted_logits(chunk_rows: int | None) -> None:
    states, items, bias, labels = make(n=300)
    sampled = sample_items(bias, labels, 64, torch.Generator().manual_seed(1))
    got = item_softmax(
        states,
        items[sampled.items],
        bias[sampled.items],
        sampled.labels,
        log_weights=sampled.log_weights,
        chunk_rows=chunk_rows,
    )
    logits = states @ items[sampled.items].T + bias[sampled.items]
    own = F.one_hot(sampled.labels, len(sampled.items)).bool()
    weighted = torch.where(own, logits, logits + sampled.log_weights)
    expected = F.cross_entropy(weighted, sampled.labels, reduction="sum")
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    for ours, theirs in zip(gradients(got, states, items, bias), gradients(expected, states, items, bias), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"states": [[1.0]]}, TypeError, "states: expected a tensor, got list"),
        ({"items": None}, TypeError, "items: expected a tensor, got NoneType"),
        ({"states": torch.zeros(3)}, ValueError, r"states: expected \(M, D\) floating-point, got torch.float32 \(3,\)"),
        ({"states": torch.zeros(3, 2, dtype=torch.int64)}, ValueError, r"states: expected \(M, D\) floating-point"),
        ({"items": torch.zeros(4, 3)}, ValueError, r"items: expected shape \(4, 2\), got \(4, 3\)"),
        ({"items": torch.zeros(4, 2).double()}, TypeError, "items: expected dtype torch.float32, as states, got"),
        ({"items": torch.zeros(4, 2, device="meta")}, ValueError, "items: expected device cpu, as states, got meta"),
        ({"bias": torch.zeros(3)}, ValueError, r"bias: expected shape \(4,\), got \(3,\)"),
        ({"labels": torch.zeros(2, dtype=torch.int64)}, ValueError, r"labels: expected shape \(3,\), got \(2,\)"),
        ({"labels": torch.zeros(3, dtype=torch.int32)}, TypeError, "labels: expected int64, got torch.int32"),
        ({"log_weights": torch.zeros(3)}, ValueError, r"log_weights: expected shape \(4,\), got \(3,\)"),
        ({"smoothing": 1.0}, ValueError, "smoothing: expected a finite number of at least 0 and below 1, got 1.0"),
        ({"smoothing": -0.1}, ValueError, "smoothing: expected a finite number of at least 0"),
        ({"smoothing": "0.1"}, TypeError, "smoothing: expected a number, got str"),
        ({"labels": torch.tensor([0, 4, 1])}, ValueError, r"labels\[1\]: expected one of the 4 items, got 4"),
        ({"labels": torch.tensor([-100, 0, 1])}, ValueError, r"labels\[0\]: expected one of the 4 items, got -100"),
        ({"smoothing": 0.1, "log_weights": torch.zeros(4)}, ValueError, "smoothing: expected 0 with log_weights"),
        ({"chunk_rows": 0}, ValueError, "chunk_rows: expected an integer of at least 1, got 0"),
        ({"chunk_rows": True}, ValueError, "chunk_rows: expected an integer of at least 1, got True"),
    ],
)
def test_wrong_arguments(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"states": torch.zeros(3, 2), "items": torch.zeros(4, 2), "bias": torch.zeros(4)}
    given |= {"labels": torch.zeros(3, dtype=torch.int64)} | changed
    parts = [given.pop(name) for name in ("states", "items", "bias", "labels")]
    with pytest.raises(error, match=message):
        item_softmax(*parts, **given)


@pytest.mark.parametrize("count", [0, True, 1.5])
def test_wrong_counts(count: Any) -> None:
    with pytest.raises(ValueError, match="count: expected an integer of at least 1, got"):
        sample_items(torch.zeros(3), torch.tensor([0]), count)


def test_labels_that_are_no_items() -> None:
    with pytest.raises(ValueError, match=r"labels\[0\]: expected one of the 3 items, got 5"):
        sample_items(torch.zeros(3), torch.tensor([5]), 2)
    with pytest.raises(ValueError, match="bias: expected that of one item or more, got none"):
        sample_items(torch.zeros(0), torch.zeros(0, dtype=torch.int64), 2)
