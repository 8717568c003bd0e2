# SPDX-License-Identifier: Apache-2.0
"""What is measured of `pool_rows`: its backends, PyTorch's own ways to the same rows, and whether each is right."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import patchkern as pk
from patchkern.ops import backends, reference

REPEATS = 10
_UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float64: 2.0**-53}
# Errors in units of 4 roundings of the dtype, where a provider rounds more than once.
_LOOSE_FORWARD = {"embedding_bag": 2.0, "loop": 2.0, "segment_reduce": 8.0, "+table": 2.0}
_LOOSE_BACKWARD = 32.0  # a separator adds thousands of rows that largely cancel
_LOOSE_EMBEDDING_BAG_BACKWARD = 200.0  # which adds them one after the other

Calls = dict[str, Callable[[], Tensor]]


# ------------------------------------------------------------------ the same rows by other means


class Bags:
    """The layout as `F.embedding_bag` takes it: one weighted bag of tokens per row."""

    def __init__(self, layout: pk.PatchLayout, dtype: torch.dtype, device: torch.device) -> None:
        transpose = transpose_of(layout)
        rows = transpose.rows.numpy()
        tokens = np.repeat(transpose.tokens.numpy(), np.diff(transpose.offsets.numpy()))
        order = np.argsort(rows, kind="stable")
        self.tokens = torch.from_numpy(tokens[order].astype(np.int64)).to(device)
        self.weights = (1.0 / torch.from_numpy(transpose.divisors.numpy()[order]).double()).to(device, dtype)
        counts = np.bincount(rows, minlength=layout.num_rows)
        self.offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(counts)[:-1]])).to(device)

    def pool(self, weight: Tensor, sparse: bool = False) -> Tensor:
        return F.embedding_bag(
            self.tokens, weight, self.offsets, mode="sum", per_sample_weights=self.weights, sparse=sparse
        )


class Segments:
    """Gather, mean per title, gather, mean per session: PyTorch calls over indices that were worked out beforehand."""

    def __init__(self, layout: pk.PatchLayout, device: torch.device) -> None:
        lo, hi = layout.lo.long(), layout.hi.long()
        literal = lo < 0
        spans = [torch.arange(int(a), int(b)) for a, b in zip(lo[~literal], hi[~literal], strict=True)]
        sizes, lengths = (hi - lo)[~literal], layout.offsets.diff().long()
        titles, patches = torch.arange(lengths.shape[0]), torch.arange(sizes.shape[0])
        self.literal_rows = torch.nonzero(literal)[:, 0].to(device)
        self.literal_tokens = (-1 - lo[literal]).to(device)
        self.patch_rows = torch.nonzero(~literal)[:, 0].to(device)
        self.token_ids = layout.token_ids.long().to(device)
        self.title_offsets = layout.offsets.long().to(device)
        self.title_of_token = titles.repeat_interleave(lengths).to(device)
        self.lengths = lengths.to(device)
        self.title_of_member = layout.items[torch.cat(spans)].long().to(device) if spans else self.token_ids
        self.patch_offsets = F.pad(sizes.cumsum(0), (1, 0)).to(device)
        self.patch_of_member = patches.repeat_interleave(sizes).to(device)
        self.sizes = sizes.to(device)

    def index_add(self, weight: Tensor) -> Tensor:
        """Sums in float32, as index_add_ has no other accumulator."""
        width = weight.shape[1]
        titles = weight.new_zeros(self.lengths.shape[0], width, dtype=torch.float32)
        titles.index_add_(0, self.title_of_token, weight[self.token_ids].float())
        titles /= self.lengths[:, None]
        patches = weight.new_zeros(self.sizes.shape[0], width, dtype=torch.float32)
        patches.index_add_(0, self.patch_of_member, titles[self.title_of_member])
        return self._place(weight, patches / self.sizes[:, None])

    def segment_reduce(self, weight: Tensor) -> Tensor:
        if not self.patch_rows.shape[0]:
            return self._place(weight, weight[:0])
        titles = torch.segment_reduce(weight[self.token_ids], "mean", offsets=self.title_offsets, unsafe=True)
        members = titles[self.title_of_member]
        return self._place(weight, torch.segment_reduce(members, "mean", offsets=self.patch_offsets, unsafe=True))

    def _place(self, weight: Tensor, patches: Tensor) -> Tensor:
        rows = self.literal_rows.shape[0] + self.patch_rows.shape[0]
        out = weight.new_empty(rows, weight.shape[1])
        out[self.literal_rows] = weight[self.literal_tokens]
        out[self.patch_rows] = patches.to(weight.dtype)
        return out


class Loop:
    """One PyTorch call per title and per session: what one writes first."""

    def __init__(self, layout: pk.PatchLayout, device: torch.device) -> None:
        self.spans = list(zip(layout.lo.tolist(), layout.hi.tolist(), strict=True))
        self.items, self.offsets = layout.items.tolist(), layout.offsets.tolist()
        self.token_ids = layout.token_ids.long().to(device)
        literal = layout.lo < 0
        self.literal_rows = torch.nonzero(literal)[:, 0].to(device)
        self.literal_tokens = (-1 - layout.lo[literal]).long().to(device)

    def pool(self, weight: Tensor) -> Tensor:
        out = weight.new_empty(len(self.spans), weight.shape[1])
        out[self.literal_rows] = weight[self.literal_tokens]
        for row, (lo, hi) in enumerate(self.spans):
            if lo >= 0:
                cuts = ((self.offsets[item], self.offsets[item + 1]) for item in self.items[lo:hi])
                titles = [weight[self.token_ids[begin:end]].mean(0) for begin, end in cuts]
                out[row] = torch.stack(titles).mean(0) if len(titles) > 1 else titles[0]
        return out


def pool_by_reference(layout: pk.PatchLayout, weight: Tensor) -> Tensor:
    """The reference backend without the op around it, so that torch.compile sees inside."""
    out = weight.new_empty(layout.num_rows, weight.shape[1])
    rows = (layout.lo, layout.hi, layout.items, layout.token_ids, layout.offsets)
    reference.pool_rows(weight, *rows, None, None, 1.0, out)
    return out


# ------------------------------------------------------------------ providers


def kernels(device: torch.device, dtype: torch.dtype) -> list[str]:
    """The backends with kernels for tensors of this kind."""

    def fits(name: str) -> bool:
        try:
            return backends.choose(name, device, dtype) != "reference"
        except ValueError:
            return False

    return [name for name in pk.backends() if fits(name)]


def transpose_of(layout: pk.PatchLayout) -> Any:
    transpose = layout.with_transpose().transpose
    if transpose is None:
        raise RuntimeError("with_transpose returned a layout without one")
    return transpose


def backends_forward(weight: Tensor, layout: pk.PatchLayout, item_patches: pk.ItemTable, out: Tensor) -> Calls:
    """Each backend with kernels: into ``out``, as autograd calls it, and with the item patches at hand."""
    calls: Calls = {}
    for name in kernels(weight.device, weight.dtype):
        pool = functools.partial(pk.pool_rows, weight, layout, backend=name)
        calls[name] = functools.partial(pool, out=out)
        calls[f"{name}+alloc"] = pool
        calls[f"{name}+table"] = functools.partial(pool, out=out, table=item_patches)
    return calls


def peers_forward(
    weight: Tensor, layout: pk.PatchLayout, compiled: Mapping[str, Callable[..., Tensor]] | None = None
) -> Calls:
    """PyTorch's ways, with every index worked out beforehand, and the reference backend.

    Args:
        compiled: names of some of them -> what torch.compile made of it.
    """
    bags, segments = Bags(layout, weight.dtype, weight.device), Segments(layout, weight.device)
    there = layout.to(weight.device)
    calls: Calls = {
        "embedding_bag": lambda: bags.pool(weight),
        "index_add": lambda: segments.index_add(weight),
        "segment_reduce": lambda: segments.segment_reduce(weight),
        "reference": lambda: pk.pool_rows(weight, there, backend="reference"),
    }
    for name, call in (compiled or {}).items():
        calls[name] = functools.partial(call, segments if name.startswith("index_add") else there, weight)
    return calls


def backends_backward(grad: Tensor, layout: pk.PatchLayout, count: int) -> Calls:
    """Each backend with kernels: the gradient of the ``count`` embeddings, compact and dense."""
    calls: Calls = {}
    for name in kernels(grad.device, grad.dtype):
        gradient = functools.partial(pk.pool_rows_grad, grad, layout, count, backend=name)
        calls[f"{name} compact"] = functools.partial(gradient, dense=False)
        calls[f"{name} dense"] = gradient
    return calls


def peers_backward(weight: Tensor, layout: pk.PatchLayout, grad: Tensor) -> Calls:
    """The backward pass of `F.embedding_bag`, dense and sparse."""
    bags = Bags(layout, weight.dtype, weight.device)
    leaf = weight.detach().requires_grad_()
    pooled = {kind: bags.pool(leaf, sparse=kind == "sparse") for kind in ("dense", "sparse")}

    def gradient(kind: str) -> Tensor:
        return torch.autograd.grad(pooled[kind], leaf, grad, retain_graph=True)[0]

    return {f"embedding_bag {kind}": functools.partial(gradient, kind) for kind in pooled}


# ------------------------------------------------------------------ whether they are right


def wrong(got: Tensor, exact: Tensor, dtype: torch.dtype, loose: float) -> str | None:
    """Why a result must not be timed: its error has to look like roundings of the dtype, and nothing else."""
    error = (got.double() - exact).abs().max().item()
    allowed = loose * 4 * _UNIT_ROUNDOFF[dtype] * max(exact.abs().max().item(), 1e-30)
    return None if error <= allowed else f"wrong result, error {error:.3g}, allowed {allowed:.3g}"


def forward_error(weight: Tensor, layout: pk.PatchLayout) -> Callable[[str, Tensor], str | None]:
    """Compares a provider's rows with those of the reference in float64."""
    tokens, compact = layout.compact()
    device = weight.device
    exact = pk.pool_rows(weight[tokens.to(device)].double(), compact.to(device), backend="reference")

    def error(name: str, got: Tensor) -> str | None:
        loose = next((factor for end, factor in _LOOSE_FORWARD.items() if name.endswith(end)), 1.0)
        return wrong(got, exact, weight.dtype, loose)

    return error


def backward_error(grad: Tensor, layout: pk.PatchLayout, count: int) -> Callable[[str, Tensor], str | None]:
    """Compares a provider's gradient, dense or compact, with that of the reference in float64."""
    exact = pk.pool_rows_grad(grad.double(), layout, count, dense=False, backend="reference").values()
    tokens = transpose_of(layout).tokens.long()

    def error(name: str, got: Tensor) -> str | None:
        if got.is_sparse:
            wide = got._values().double()
            got = torch.sparse_coo_tensor(got._indices(), wide, got.shape, check_invariants=False).coalesce().values()
        else:
            got = got[tokens]
        loose = _LOOSE_EMBEDDING_BAG_BACKWARD if name.startswith("embedding_bag") else _LOOSE_BACKWARD
        return wrong(got, exact, grad.dtype, loose)

    return error


def least_bytes(layout: pk.PatchLayout, row_bytes: int) -> dict[str, int]:
    """What a forward pass cannot avoid to move: rows, distinct embeddings and the layout; and the same with a table."""
    written = layout.num_rows * row_bytes
    plan = index_bytes(layout.lo, layout.hi, layout.items)
    literals = torch.unique(layout.lo[layout.lo < 0]).shape[0]
    titles = layout.title_index.shape[0]
    tokens = transpose_of(layout).tokens.shape[0]
    return {
        "least_bytes": written + tokens * row_bytes + plan + index_bytes(layout.token_ids, layout.offsets),
        "least_bytes_table": written + (literals + titles) * row_bytes + plan + index_bytes(layout.title_index),
    }


def index_bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def repeats(call: Callable[[], Tensor]) -> bool:
    """Whether `REPEATS` runs give the same bits."""

    def bits(result: Tensor) -> Tensor:
        values = result._values() if result.is_sparse else result
        return values.contiguous().view(torch.int16 if values.element_size() == 2 else torch.int32)

    first = bits(call()).clone()
    return all(torch.equal(bits(call()), first) for _ in range(REPEATS - 1))
