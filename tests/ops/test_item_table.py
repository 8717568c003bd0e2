# SPDX-License-Identifier: Apache-2.0
"""Pooling with a table of item patches: the same rows, and never those of another weight, state or catalogue."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable
from typing import Any

import cases
import oracle
import pytest
import torch
from pool_cases import by_policy_and_dtype, hard_lengths

import patchkern as pk
from patchkern.ops import item_table

LENGTHS = [0, 1, 23, 2, 0, 32]

by_dtype = pytest.mark.parametrize("dtype", cases.DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def assert_pooled_twice(
    got: torch.Tensor, weight: torch.Tensor, rows: list[oracle.Row], scale: float, truncates: bool
) -> None:
    """Within what pooling may err by, plus what rounding every item patch that a row is the mean of may."""
    weight, got = weight.cpu(), got.cpu()
    exact, magnitude = oracle.pool(weight, rows) * scale, oracle.pool(weight.abs(), rows) * abs(scale)
    operations = torch.tensor([[float(max(map(len, row)) + len(row) + 4)] for row in rows], dtype=torch.float64)
    once = oracle.rounding_floor(exact, magnitude, operations, weight.dtype, truncates)
    patches = [oracle.pool(weight, [[title] for title in row]).abs().mean(0) for row in rows]
    rounded = oracle.rounding_floor(torch.stack(patches) * scale, magnitude, operations, weight.dtype, truncates)
    excess = (got.double() - exact).abs() - once - rounded - abs(scale) * oracle.HALF_SMALLEST[weight.dtype]
    assert excess.max() <= 0


# ------------------------------------------------------------------ the table


@by_dtype
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "column-slice"])
def test_rows_are_item_patches(backend: str, device: torch.device, dtype: torch.dtype, strided: bool) -> None:
    titles = cases.make_titles(23)
    catalog = cases.make_catalog(titles)
    weight = cases.make_weight(cases.VOCABULARY, 41, dtype, strided, device=device)
    table = pk.item_table(catalog, weight, backend=backend)
    assert isinstance(table, pk.ItemTable) and table.catalog_fingerprint == catalog.fingerprint
    assert table.rows.device == weight.device and not table.rows.requires_grad
    rows = [[title] for title in titles.values()]
    oracle.assert_pooled(table.rows, weight, rows, truncates=cases.truncates(backend, dtype))


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a few tokens, some smaller than a title: each item in exactly one."""
    catalog = cases.make_catalog(cases.make_titles(200, longest=30))
    weight = cases.make_weight(cases.VOCABULARY, 8)
    whole = pk.item_table(catalog, weight).rows
    for tokens in (1, 7, 31, 10_000):
        monkeypatch.setattr(item_table, "_CHUNK_BYTES", 4 * 8 * tokens)
        assert torch.equal(pk.item_table(catalog, weight).rows, whole)


def test_empty_and_tiny_catalogues() -> None:
    weight = cases.make_weight(5, 3)
    assert pk.item_table(pk.Catalog.from_token_ids([], [0]), weight).rows.shape == (0, 3)
    assert torch.equal(pk.item_table(pk.Catalog.from_token_ids([4], [0, 1]), weight).rows, weight[4:])


def test_a_line_says_what_it_is() -> None:
    catalog = cases.make_catalog(cases.make_titles(23))
    table = pk.item_table(catalog, cases.make_weight(cases.VOCABULARY, 1024, torch.bfloat16))
    assert repr(table) == "ItemTable(23 items, width 1,024, bfloat16 on cpu)"


# ------------------------------------------------------------------ pooling with it


@functools.cache
def table_of_23(backend: str, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, pk.ItemTable]:
    """A weight and the table of the catalogue that `make_batch` has, made once: by Triton's interpreter in a second."""
    weight = cases.make_weight(cases.VOCABULARY, 41, dtype, device=device)
    return weight, pk.item_table(cases.make_catalog(cases.make_titles(23)), weight, backend=backend)


@by_policy_and_dtype
def test_pooling_with_a_table(backend: str, device: torch.device, name: str, dtype: torch.dtype) -> None:
    """Text and item patches bit for bit; sessions within one rounding of each item patch."""
    batch = cases.make_batch(cases.POLICIES[name], hard_lengths(backend, dtype))
    weight, table = table_of_23(backend, device, dtype)
    layout = batch.layout(device)
    without = pk.pool_rows(weight, layout, backend=backend)
    out = torch.full_like(without, 777.0)
    got = pk.pool_rows(weight, layout, backend=backend, table=table, out=out)
    assert got is out
    alone = layout.hi - layout.lo.clamp(min=-1) == 1
    assert torch.equal(got[alone], without[alone])
    assert_pooled_twice(got, weight, batch.rows(), 1.0, cases.truncates(backend, dtype))


@by_dtype
@pytest.mark.parametrize("width", [1, 64, 1000])
def test_scale_and_width(backend: str, device: torch.device, width: int, dtype: torch.dtype) -> None:
    batch = cases.make_batch(pk.SessionPatches(3), hard_lengths(backend, dtype))
    weight = cases.make_weight(cases.VOCABULARY, width, dtype, device=device)
    table = pk.item_table(batch.catalog, weight, backend=backend)
    got = pk.pool_rows(weight, batch.layout(device), backend=backend, table=table, scale=-45.25)
    assert_pooled_twice(got, weight, batch.rows(), -45.25, cases.truncates(backend, dtype))


def test_special_values_are_copied(backend: str, device: torch.device) -> None:
    batch = cases.Batch({0: [0]}, [[0]], pk.ItemPatches(keep_text=0), cases.NO_PROMPT)
    weight = torch.ones(1, 4, device=device)
    table = pk.item_table(batch.catalog, weight, backend=backend)
    zero = 0.0 if cases.interpreted(backend) else -0.0  # sums in NumPy begin at 0.0
    table.rows.copy_(torch.tensor([[zero, 0.0, float("inf"), 1e-42]], device=device))
    got = pk.pool_rows(weight, batch.layout(device), backend=backend, table=table)
    assert torch.equal(got.view(torch.int32), table.rows.view(torch.int32))


def test_titles_are_not_read_again(backend: str, device: torch.device) -> None:
    """With a table, a patch depends on its row alone."""
    batch = cases.make_batch(pk.ItemPatches(keep_text=0), [9, 3], prompt=cases.NO_PROMPT, with_targets=False)
    weight = cases.make_weight(cases.VOCABULARY, 8, device=device)
    layout = batch.layout(device)
    table = pk.item_table(batch.catalog, weight, backend=backend)
    table.rows.copy_(torch.arange(len(batch.catalog), device=device)[:, None].expand_as(table.rows))
    got = pk.pool_rows(weight, layout, backend=backend, table=table)
    assert got[:, 0].tolist() == [float(item) for history in batch.histories for item in history]


def test_compress_batch_takes_a_table() -> None:
    batch = cases.make_batch(pk.SessionPatches(3), LENGTHS)
    catalog, weight = batch.catalog, cases.make_weight(cases.VOCABULARY, 8)
    table = pk.item_table(catalog, weight)
    packed = pk.compress_batch(weight, catalog, *batch.arguments()[1:], table=table, scale=2.0)
    assert torch.equal(packed.inputs_embeds, pk.pool_rows(weight, batch.layout(), table=table, scale=2.0))


@pytest.mark.parametrize("change", ["moved", "pickled", "compacted", "supervised", "transposed"])
def test_layouts_keep_their_catalogue(change: str) -> None:
    batch = cases.make_batch(pk.ItemPatches(2), LENGTHS)
    layout = batch.layout(transpose=False)
    changed = {
        "moved": lambda: layout.to("meta"),
        "pickled": lambda: pickle.loads(pickle.dumps(layout)),
        "compacted": lambda: layout.compact()[1],
        "supervised": layout.supervise_literals,
        "transposed": layout.with_transpose,
    }[change]()
    assert changed.catalog_fingerprint == batch.catalog.fingerprint


# ------------------------------------------------------------------ stale and foreign tables


def _other_shape(weight: torch.Tensor) -> torch.Tensor:
    return torch.cat([weight, weight])


def _written(weight: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        weight[3] = 0
    return weight


def _written_through_a_view(weight: torch.Tensor) -> torch.Tensor:
    weight.detach().view(-1)[5].fill_(1.0)
    return weight


def _trained(weight: torch.Tensor, **options: Any) -> torch.Tensor:
    weight.requires_grad_()
    weight.grad = torch.ones_like(weight)
    torch.optim.AdamW([weight], lr=0.1, **options).step()
    return weight


def _reseated(weight: torch.Tensor) -> torch.Tensor:
    weight.data = weight.data.clone()
    return weight


STALE: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "copy": (lambda weight: weight.clone(), "other memory"),
    "loaded again": (_reseated, "other memory"),
    "slice": (lambda weight: torch.cat([weight, weight], 1)[:, :8], "other memory"),
    "longer": (_other_shape, r"its weight's shape was torch.Size\(\[97, 8\]\), not torch.Size\(\[194, 8\]\)"),
    "narrower": (lambda weight: weight[:, :4], "its weight's shape was"),
    "dtype": (lambda weight: weight.bfloat16(), "its weight's dtype was torch.float32, not torch.bfloat16"),
    "written": (_written, "has been written to since"),
    "written through a view": (_written_through_a_view, "has been written to since"),
    "trained": (lambda weight: _trained(weight).requires_grad_(False), "has been written to since"),
    # its writes are not counted
    "fused optimizer": (
        lambda weight: _trained(weight, fused=True),
        "expected None for a weight that requires a gradient",
    ),
}


@pytest.mark.parametrize("name", STALE)
def test_stale_tables_are_refused(name: str) -> None:
    change, message = STALE[name]
    batch = cases.make_batch(pk.ItemPatches(2), LENGTHS)
    layout = batch.layout()
    weight = torch.nn.Parameter(cases.make_weight(cases.VOCABULARY, 8), requires_grad=False)
    table = pk.item_table(batch.catalog, weight)
    out = torch.full((layout.num_rows, 8), 777.0)
    for alias in (weight, weight.detach(), weight[:]):
        pk.pool_rows(alias, layout, table=table, out=out.clone())
    changed = change(weight)
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        pk.pool_rows(changed, layout, table=table, out=out.to(changed.dtype)[:, : changed.shape[1]])
    assert (out == 777).all()
    # made anew, it serves again
    anew = changed.requires_grad_(False)
    pk.pool_rows(anew, layout, table=pk.item_table(batch.catalog, anew))


def test_another_weight_in_the_same_place_is_not_mistaken() -> None:
    """A table keeps its weight's memory, so that a new weight cannot be allocated there unnoticed."""
    batch = cases.make_batch(pk.ItemPatches(2), [9])
    layout = batch.layout()
    table = pk.item_table(batch.catalog, cases.make_weight(4096, 64))
    for seed in range(20):
        with pytest.raises(ValueError, match="other memory"):
            pk.pool_rows(cases.make_weight(4096, 64, seed=seed), layout, table=table)


def test_a_table_of_another_catalogue_is_refused() -> None:
    batch = cases.make_batch(pk.ItemPatches(2), LENGTHS)
    weight = cases.make_weight(cases.VOCABULARY, 8)
    other = pk.item_table(cases.make_catalog(cases.make_titles(23, seed=1)), weight)
    with pytest.raises(ValueError, match="table: expected one of the layout's catalogue, got one of a catalogue with"):
        pk.pool_rows(weight, batch.layout(), table=other)
    # titles decide, not the object
    same = pk.item_table(cases.make_catalog(batch.titles), weight)
    pk.pool_rows(weight, batch.layout(), table=same)


def test_a_layout_made_by_hand_takes_no_table() -> None:
    batch = cases.make_batch(pk.ItemPatches(2), LENGTHS)
    weight = cases.make_weight(cases.VOCABULARY, 8)
    by_hand = pk.PatchLayout(**{**vars(batch.layout()), "catalog_fingerprint": None})
    with pytest.raises(ValueError, match="layout: expected one that knows its catalogue"):
        pk.pool_rows(weight, by_hand, table=pk.item_table(batch.catalog, weight))


def test_a_table_has_no_gradient() -> None:
    batch = cases.make_batch(pk.ItemPatches(2), LENGTHS)
    weight = cases.make_weight(cases.VOCABULARY, 8)
    table = pk.item_table(batch.catalog, weight)
    weight.requires_grad_()
    for mode in (torch.enable_grad(), torch.no_grad()):
        with mode, pytest.raises(ValueError, match="table: expected None for a weight that requires a gradient"):
            pk.pool_rows(weight, batch.layout(), table=table)
        with mode, pytest.raises(ValueError, match=r"weight: expected a frozen one, .*requires_grad_"):
            pk.item_table(batch.catalog, weight)


def test_inference_tensors_cannot_be_watched() -> None:
    batch = cases.make_batch(pk.ItemPatches(2), LENGTHS)
    weight = cases.make_weight(cases.VOCABULARY, 8)
    with torch.inference_mode():
        with pytest.raises(ValueError, match="weight: expected a tensor whose changes can be noticed"):
            pk.item_table(batch.catalog, weight.clone())
        # an ordinary weight may be used, and is watched, under inference mode
        table = pk.item_table(batch.catalog, weight)
        pk.pool_rows(weight, batch.layout(), table=table)
        weight.add_(1)
        with pytest.raises(ValueError, match="has been written to since"):
            pk.pool_rows(weight, batch.layout(), table=table)


@pytest.mark.unpoisoned("tracing would record the filling")
def test_torch_compile_refuses_a_table() -> None:
    batch = cases.make_batch(pk.ItemPatches(2), [9])
    weight, layout = cases.make_weight(cases.VOCABULARY, 8), batch.layout()
    table = pk.item_table(batch.catalog, weight)
    compiled = torch.compile(lambda w: pk.pool_rows(w, layout, table=table), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"table: expected None under torch.compile"):
        compiled(weight)


WRONG: dict[str, tuple[Any, str, type[Exception], str]] = {
    "list": ([[1.0]], "auto", TypeError, "weight: expected a tensor, got list"),
    "int64": (torch.ones(97, 8, dtype=torch.int64), "auto", TypeError, "weight: expected float32, .*, got torch.int64"),
    "1-D": (torch.ones(97), "auto", ValueError, r"weight: expected shape \(rows, D\)"),
    "too few rows": (
        torch.ones(5, 8),
        "auto",
        ValueError,
        "weight: expected more than 86 rows for the catalog's tokens",
    ),
    "backend": (torch.ones(97, 8), "fast", ValueError, "backend: expected auto, .*, got 'fast'"),
    "backend type": (torch.ones(97, 8), 3, TypeError, "backend: expected a string, got int"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str) -> None:
    weight, backend, error, message = WRONG[name]
    batch = cases.make_batch(pk.ItemPatches(2), [9])
    with pytest.raises(error, match=message):
        pk.item_table(batch.catalog, weight, backend=backend)


def test_wrong_tables() -> None:
    batch = cases.make_batch(pk.ItemPatches(2), [9])
    weight = cases.make_weight(cases.VOCABULARY, 8)
    for table in (weight, "table", batch.catalog):
        with pytest.raises(TypeError, match=f"table: expected an ItemTable or None, got {type(table).__name__}"):
            pk.pool_rows(weight, batch.layout(), table=table)  # type: ignore[arg-type]
