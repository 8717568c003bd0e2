# SPDX-License-Identifier: Apache-2.0
"""What a packed batch must be, written as the plainest Python loops, from the definitions alone.

Nothing here imports patchkern or shares an idea with its planner. A title is a list of token ids, a row is a list of
titles (`[[t]]` for a literal, `[title]` for an item patch, `[title, title, ...]` for a session patch), a batch is a
list of users, a user a list of rows. The value of a row is the mean over its titles of the mean over their tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

Title = list[int]
Row = list[Title]
Entry = tuple[str, list[int]]  # ("text" | "item" | "session", positions in the history)

IGNORE = -100


# ------------------------------------------------------------------ which item becomes what


def cut(history: Sequence[Any], max_items: int | None) -> list[Any]:
    """The latest `max_items` of a history, oldest first."""
    history = list(history)
    return history if max_items is None else history[max(0, len(history) - max_items) :]


def text_only(length: int) -> list[Entry]:
    return [("text", [i]) for i in range(length)]


def item_patches(length: int, keep_text: int) -> list[Entry]:
    return [("item" if i < length - min(keep_text, length) else "text", [i]) for i in range(length)]


def session_patches_end(length: int, group_size: int, text: int, patches: int) -> list[Entry]:
    """Sessions counted back from the item patches; only the oldest may be short."""
    entries: list[Entry] = []
    position = length
    for _ in range(text):
        if position > 0:
            position -= 1
            entries.append(("text", [position]))
    for _ in range(patches):
        if position > 0:
            position -= 1
            entries.append(("item", [position]))
    while position > 0:
        start = max(0, position - group_size)
        entries.append(("session", list(range(start, position))))
        position = start
    return entries[::-1]


def session_patches_start(length: int, group_size: int, text: int, patches: int) -> list[Entry]:
    """Sessions are the complete groups counted from the first item that end at or before `length - text - patches`."""
    entries: list[Entry] = []
    position = 0
    while position + group_size <= length - text - patches:
        entries.append(("session", list(range(position, position + group_size))))
        position += group_size
    while position < length:
        entries.append(("text" if position >= length - text else "item", [position]))
        position += 1
    return entries


def chosen_patches(chosen: Sequence[bool]) -> list[Entry]:
    """Item patches where `chosen`, text elsewhere: what a random policy draws."""
    return [("item" if patch else "text", [i]) for i, patch in enumerate(chosen)]


# ------------------------------------------------------------------ the rows of a batch


@dataclass(frozen=True)
class Parts:
    """The prompt: four lists of token ids."""

    prefix: Title
    separator: Title
    suffix: Title
    response_end: Title


@dataclass
class User:
    """One user of the packed batch."""

    rows: list[Row]
    labels: list[int]  # one per row; IGNORE outside the response
    title_tokens: int  # title tokens of the kept items
    history_rows: int  # rows that stand for them, separators not counted


def literals(tokens: Sequence[int]) -> list[Row]:
    return [[[token]] for token in tokens]


def user_rows(titles: Sequence[Title], entries: Sequence[Entry], prompt: Parts, target: Title | None = None) -> User:
    """`prefix | entry separator entry ... entry | suffix | target | response_end`; `titles` of the kept items."""
    rows = literals(prompt.prefix)
    history_rows = 0
    for number, (kind, positions) in enumerate(entries):
        if number > 0:
            rows += literals(prompt.separator)
        if kind == "text":
            new = literals(titles[positions[0]])
        else:
            new = [[titles[i] for i in positions]]
        rows += new
        history_rows += len(new)
    rows += literals(prompt.suffix)
    labels = [IGNORE] * len(rows)
    if target is not None:
        response = list(target) + list(prompt.response_end)
        rows += literals(response)
        labels += response
        if labels:
            labels[0] = IGNORE  # no row of the user's own stands before the first, so nothing can predict it
    return User(rows, labels, sum(len(title) for title in titles), history_rows)


def compression_ratio(users: Sequence[User]) -> float:
    return sum(user.title_tokens for user in users) / sum(user.history_rows for user in users)


def contributions(rows: Sequence[Row]) -> list[tuple[int, int, int]]:
    """Every (token, row, divisor) of the gradient transpose, sorted: the row's gradient / divisor goes to the token."""
    found = []
    for number, row in enumerate(rows):
        for title in row:
            for token in title:
                found.append((token, number, len(title) * len(row)))
    return sorted(found)


# ------------------------------------------------------------------ reading a layout back


def decode(layout: Any) -> list[list[Row]]:
    """The rows that a layout describes, from the meaning of its arrays: a list of users, each a list of rows."""
    lo, hi = layout.lo.tolist(), layout.hi.tolist()
    items, tokens, offsets = layout.items.tolist(), layout.token_ids.tolist(), layout.offsets.tolist()
    cu_seqlens = layout.cu_seqlens.tolist()
    rows: list[Row] = []
    for first, last in zip(lo, hi, strict=True):
        if first < 0:
            rows.append([[-1 - first]])
        else:
            rows.append([tokens[offsets[item] : offsets[item + 1]] for item in items[first:last]])
    return [rows[start:end] for start, end in zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True)]


# ------------------------------------------------------------------ values and gradients, float64


def pool(weight: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
    """(T, D) float64: each row the mean of its titles' means."""
    table = weight.detach().to(torch.float64).numpy()
    out = np.zeros((len(rows), table.shape[1]))
    for number, row in enumerate(rows):
        total = np.zeros(table.shape[1])
        for title in row:
            title_sum = np.zeros(table.shape[1])
            for token in title:
                title_sum += table[token]
            total += title_sum / len(title)
        out[number] = total / len(row)
    return torch.from_numpy(out)


def pool_gradient(grad_rows: torch.Tensor, rows: Sequence[Row], num_embeddings: int) -> torch.Tensor:
    """(V, D) float64: the gradient of `pool` in its weight."""
    grads = grad_rows.detach().to(torch.float64).numpy()
    out = np.zeros((num_embeddings, grads.shape[1]))
    for number, row in enumerate(rows):
        for title in row:
            for token in title:
                out[token] += grads[number] / (len(title) * len(row))
    return torch.from_numpy(out)


def torch_path(weight: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
    """(T, D) in the weight's dtype: how one would write it in PyTorch, a `mean` per title and a `mean` over them."""
    if not rows:
        return weight.new_zeros((0, weight.shape[1]))
    return torch.stack([torch.stack([weight[title].mean(0) for title in row]).mean(0) for row in rows])


# ------------------------------------------------------------------ how far from exact a result may be

UNIT_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
}
HALF_SMALLEST = {  # half the spacing of subnormal numbers: the absolute error of rounding to something tiny
    torch.float64: 2.0**-1075,
    torch.float32: 2.0**-150,
    torch.bfloat16: 2.0**-134,
    torch.float16: 2.0**-25,
}


def rounding_floor(
    exact: torch.Tensor,
    magnitude: torch.Tensor,
    roundings: torch.Tensor,
    dtype: torch.dtype,
    truncates: bool = False,
) -> torch.Tensor:
    """The error that no implementation can be blamed for: accumulate in float32 (float64 for float64), round once.

    `exact` is the float64 result, `magnitude` the same sum over absolute values, `roundings` the number of operations
    behind each element (broadcast against it). The standard bound of a floating-point sum in any order is
    `roundings * u * magnitude` with the unit roundoff `u` of the accumulator; the store adds the output dtype's own
    rounding, relative `u_out` or half a subnormal. For float64 the oracle rounds as often as the kernel: twice that.
    A second rounding to a 16-bit dtype in between (of the item means, say) exceeds this bound. A store that `truncates`
    errs by a whole unit in the last place.
    """
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    summed = 1.01 * roundings * UNIT_ROUNDOFF[accumulator] * magnitude + HALF_SMALLEST[accumulator] * roundings
    stored = (2 if truncates else 1) * (UNIT_ROUNDOFF[dtype] * (exact.abs() + summed) + HALF_SMALLEST[dtype])
    return (2.0 if dtype == torch.float64 else 1.0) * (summed + stored)


def assert_pooled(
    got: torch.Tensor, weight: torch.Tensor, rows: Sequence[Row], scale: float = 1.0, truncates: bool = False
) -> None:
    """`got` is `scale * pool(weight, rows)` within the error a correct implementation can have.

    Two bounds. Element by element, `rounding_floor`. Over the tensor, the project's rule: the worst error is at most
    twice the worst error of `torch_path`, PyTorch in the same dtype, plus that floor.

    `truncates`: the store cuts bits off where it should round, which errs by a whole unit in the last place.
    """
    assert got.dtype == weight.dtype and got.shape == (len(rows), weight.shape[1])
    got, weight = got.cpu(), weight.cpu()
    exact = scale * pool(weight, rows)
    magnitude = abs(scale) * pool(weight.abs(), rows)
    roundings = torch.tensor([[float(max(map(len, row)) + len(row) + 4)] for row in rows], dtype=torch.float64)
    floor = rounding_floor(exact, magnitude, roundings.reshape(-1, 1), weight.dtype, truncates)
    _assert_within(got, exact, floor, torch_path(weight, rows) * scale)


def assert_gradient(
    got: torch.Tensor,
    grad_rows: torch.Tensor,
    rows: Sequence[Row],
    num_embeddings: int,
    scale: float = 1.0,
    before: torch.Tensor | None = None,
    truncates: bool = False,
) -> None:
    """`got` is `scale * pool_gradient(grad_rows, rows)`, added to `before` if there is one; see `assert_pooled`.

    Rows of tokens that are not in the batch are exactly as before.
    """
    assert got.dtype == grad_rows.dtype and got.shape == (num_embeddings, grad_rows.shape[1])
    got, grad_rows = got.cpu(), grad_rows.cpu()
    before = torch.zeros_like(got) if before is None else before.cpu()
    exact = scale * pool_gradient(grad_rows, rows, num_embeddings) + before.double()
    magnitude = abs(scale) * pool_gradient(grad_rows.abs(), rows, num_embeddings) + before.double().abs()
    count = torch.zeros(num_embeddings, 1, dtype=torch.float64)
    for token, _, _ in contributions(rows):
        count[token] += 1
    absent = count.reshape(-1) == 0
    assert torch.equal(got[absent], before[absent]), (
        "the gradient of a token that is not in the batch must be untouched"
    )
    weight = torch.zeros(num_embeddings, grad_rows.shape[1], dtype=grad_rows.dtype, requires_grad=True)
    (path,) = torch.autograd.grad(torch_path(weight, rows), weight, grad_rows) if rows else (torch.zeros_like(weight),)
    floor = rounding_floor(exact, magnitude, count + 4, grad_rows.dtype, truncates)
    _assert_within(got, exact, floor, path * scale + before)


def _assert_within(got: torch.Tensor, exact: torch.Tensor, floor: torch.Tensor, path: torch.Tensor) -> None:
    error = (got.to(torch.float64) - exact).abs()
    assert not torch.isnan(error).any(), "NaN: a value was never written"
    if error.numel() == 0:
        return
    excess = error - floor
    worst = int(excess.argmax())
    row, column = divmod(worst, exact.shape[1])
    assert excess.max() <= 0, (
        f"{got.dtype} [{row}, {column}]: got {got[row, column].item()!r}, exact {exact[row, column].item()!r}, "
        f"error {error[row, column].item():.3g}, allowed {floor[row, column].item():.3g}"
    )
    reference = (path.detach().to(torch.float64) - exact).abs()
    assert error.max() <= 2 * reference.max() + floor.max(), "worse than twice the error of the same-dtype PyTorch path"
