# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy over a catalogue of items, a few rows at a time: the logits of a batch are never stored whole.

Of M states and n items, (M, n) logits and their gradient would be the largest tensors of a training step by far. A
chunk of rows is scored, normalised, and turned into its part of every gradient before the next: what is kept from the
forward pass has the sizes of the inputs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from patchkern.batch.arguments import check_number

# A chunk's logits stay in the caches of a CPU, and fill a GPU.
_CPU_ELEMENTS, _GPU_ELEMENTS = 1 << 19, 1 << 26
_LEAST_ROWS = 64  # below that, a product with the items is bound by reading them


def item_softmax(
    states: Tensor,
    items: Tensor,
    bias: Tensor,
    labels: Tensor,
    *,
    log_weights: Tensor | None = None,
    smoothing: float = 0.0,
    chunk_rows: int | None = None,
) -> Tensor:
    """Cross-entropy of items given states, summed over the states; differentiable in states, items and bias.

    The score of item i for state m is ``<states[m], items[i]> + bias[i]``. Equivalent to
    ``torch.nn.functional.cross_entropy(states @ items.T + bias, labels, reduction="sum")``, and as exact: sums are in
    float32 (float64 for float64), products in the dtype of ``states``, or of autocast. Differentiable once.

    Args:
        states: ``(M, D)`` floating-point.
        items: ``(n, D)`` in the dtype of ``states``: all items, or `sample_items` of them.
        bias: ``(n,)``.
        labels: ``(M,)`` int64, which of the n follows.
        log_weights: ``(n,)`` `SampledItems.log_weights`; None: the n items are all there are.
        smoothing: share of every label's weight that goes to all n items alike.
        chunk_rows: states scored at once; by default what suits the device.

    Returns:
        A number, float32 or float64.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Examples:
        >>> import torch
        >>> from patchkern.ops.item_softmax import item_softmax
        >>> states, items, bias = torch.eye(3), torch.eye(3), torch.zeros(3)
        >>> round(float(item_softmax(states, items, bias, torch.tensor([0, 1, 2]))), 4)
        1.6543
    """
    states, items = (_autocast(tensor) for tensor in (states, items))
    _check(states, items, bias, labels, log_weights)
    check_number("smoothing", smoothing, minimum=0, below=1)
    if smoothing and log_weights is not None:
        raise ValueError(f"smoothing: expected 0 with log_weights, got {smoothing}")
    if chunk_rows is None:
        elements = _CPU_ELEMENTS if states.device.type == "cpu" else _GPU_ELEMENTS
        chunk_rows = max(elements // max(items.shape[0], 1), _LEAST_ROWS)
    elif isinstance(chunk_rows, bool) or not isinstance(chunk_rows, int) or chunk_rows < 1:
        raise ValueError(f"chunk_rows: expected an integer of at least 1, got {chunk_rows!r}")
    loss: Tensor = _ItemSoftmax.apply(states, items, bias, labels, log_weights, float(smoothing), chunk_rows)
    return loss


class SampledItems(NamedTuple):
    """Items that stand for a whole catalogue in `item_softmax`."""

    items: Tensor
    """``(n,)`` int64, catalogue positions, ascending: all labels and those that were drawn"""
    log_weights: Tensor
    """``(n,)`` float64, log of how many items each stands for, -inf for a label that was not drawn"""
    labels: Tensor
    """``(M,)`` int64, where in ``items`` each label is"""


def sample_items(bias: Tensor, labels: Tensor, count: int, generator: torch.Generator | None = None) -> SampledItems:
    """Draw items for a softmax over a large catalogue, corrected by the probability with which each is drawn.

    Half of the draws, with replacement, are uniform, and half follow the softmax of ``bias``, which learns how often
    items are taken. With log q subtracted from its score, the sum over the drawn items' exponentials is an unbiased
    estimate of the sum over the catalogue (logQ correction); a state's own label is counted once, exactly.

    Args:
        bias: ``(N,)`` of all items.
        labels: ``(M,)`` int64, catalogue positions.
        count: draws, at least 1.
        generator: of the draws, on the device of ``bias``; torch's own by default.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"count: expected an integer of at least 1, got {count!r}")
    n_items, device = bias.shape[0], bias.device
    if not n_items:
        raise ValueError("bias: expected that of one item or more, got none")
    _check_labels(labels, n_items)
    popular = torch.softmax(bias.detach().double(), dim=0)
    uniform = torch.rand(count - count // 2, dtype=torch.float64, device=device, generator=generator) * n_items
    running = popular.cumsum(0)  # multinomial takes no more than 2**24 categories
    points = torch.rand(count // 2, dtype=torch.float64, device=device, generator=generator) * running[-1]
    drawn = torch.cat([uniform.long(), torch.searchsorted(running, points, right=True)]).clamp_(max=n_items - 1)
    items, place = torch.unique(torch.cat([labels, drawn]), return_inverse=True)
    times = torch.zeros(items.shape[0], dtype=torch.float64, device=device)
    times.index_add_(0, place[labels.shape[0] :], times.new_ones(count))
    expected = (count - count // 2) / n_items + (count // 2) * popular[items]
    return SampledItems(items, torch.log(times) - torch.log(expected), place[: labels.shape[0]])


class _ItemSoftmax(torch.autograd.Function):
    """Gradients are made with the loss: computing the logits again would cost what they cost."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        items: Tensor,
        bias: Tensor,
        labels: Tensor,
        log_weights: Tensor | None,
        smoothing: float,
        chunk_rows: int,
    ) -> Tensor:
        wide = torch.promote_types(states.dtype, torch.float32)
        wants = ctx.needs_input_grad[:3]
        of_states, of_items, of_bias = (
            torch.zeros_like(tensor, dtype=wide) if want else None
            for tensor, want in zip((states, items, bias), wants, strict=True)
        )
        loss = torch.zeros((), dtype=wide, device=states.device)
        base, weights = bias.to(wide), None if log_weights is None else log_weights.to(wide)
        for first in range(0, states.shape[0], chunk_rows):
            rows, label = states[first : first + chunk_rows], labels[first : first + chunk_rows, None]
            logits = (rows @ items.T).to(wide).add_(base)
            own = logits.gather(1, label)
            if weights is not None:
                logits.add_(weights).scatter_(1, label, own)
            shares = torch.softmax(logits, dim=1)
            # of the sum of exponentials, without a second pass over them: the largest share is at least 1 / n
            total = logits.amax(dim=1, keepdim=True).sub_(shares.amax(dim=1, keepdim=True).log_())
            loss += (total - own).sum()
            if smoothing:
                loss += smoothing * (own - logits.mean(dim=1, keepdim=True)).sum()
            del logits
            if not any(wants):
                continue
            slope = shares.sub_(smoothing / items.shape[0]) if smoothing else shares  # of the loss by the logits
            slope.scatter_add_(1, label, slope.new_full((), smoothing - 1).expand_as(label))
            if of_bias is not None:
                of_bias += slope.sum(dim=0)
            slope = slope.to(states.dtype)
            if of_states is not None:
                of_states[first : first + chunk_rows] = slope @ items
            if of_items is not None:
                of_items += slope.T @ rows
            del shares, slope  # the next chunk takes their memory, which is in the caches
        grads = (of_states, of_items, of_bias)
        ctx.save_for_backward(*(grad for grad in grads if grad is not None))
        ctx.dtypes = [tensor.dtype for tensor in (states, items, bias)]
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        saved = iter(ctx.saved_tensors)
        found = [
            (next(saved) * grad).to(dtype) if want else None
            for want, dtype in zip(ctx.needs_input_grad[:3], ctx.dtypes, strict=True)
        ]
        return *found, None, None, None, None


def _autocast(tensor: Tensor) -> Tensor:
    """In the dtype that torch's own products would have it in, which leave float64 alone."""
    if not isinstance(tensor, Tensor) or tensor.dtype == torch.float64:
        return tensor
    kind = tensor.device.type
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return tensor
    return tensor.to(torch.get_autocast_dtype(kind)) if tensor.is_floating_point() else tensor


def _check(states: Any, items: Any, bias: Any, labels: Any, log_weights: Any) -> None:
    named = {"states": states, "items": items, "bias": bias, "labels": labels}
    named |= {} if log_weights is None else {"log_weights": log_weights}
    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
        if value.device != states.device:
            raise ValueError(f"{name}: expected device {states.device}, as states, got {value.device}")
    if states.dim() != 2 or not states.is_floating_point():
        raise ValueError(f"states: expected (M, D) floating-point, got {states.dtype} {tuple(states.shape)}")
    n_items = items.shape[0] if items.dim() else 0
    shapes = {"items": (n_items, states.shape[1]), "bias": (n_items,), "labels": (states.shape[0],)}
    shapes |= {} if log_weights is None else {"log_weights": (n_items,)}
    for name, shape in shapes.items():
        if tuple(named[name].shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(named[name].shape)}")
    if items.dtype != states.dtype:
        raise TypeError(f"items: expected dtype {states.dtype}, as states, got {items.dtype}")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels: expected int64, got {labels.dtype}")
    _check_labels(labels, n_items)


def _check_labels(labels: Tensor, n_items: int) -> None:
    """Raise a ValueError unless all are among the items; a GPU, which would have to be waited for, says so itself."""
    if labels.device.type == "cpu" and labels.numel():
        wrong = torch.nonzero((labels < 0) | (labels >= n_items))
        if wrong.numel():
            at = int(wrong[0])
            raise ValueError(f"labels[{at}]: expected one of the {n_items} items, got {int(labels[at])}")
