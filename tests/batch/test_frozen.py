# SPDX-License-Identifier: Apache-2.0
"""What was checked stays true: arrays are the library's own, and public objects survive pickling and copying."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import cases
import numpy as np
import pytest
import torch

import patchkern as pk
from patchkern.batch.frozen import freeze, frozen, is_immutable
from patchkern.data import synthetic

ROUND_TRIPS: dict[str, Callable[[Any], Any]] = {
    **{f"pickle-{n}": lambda x, n=n: pickle.loads(pickle.dumps(x, protocol=n)) for n in (2, 4, 5)},  # type: ignore[misc]
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
}


def arrays_of(thing: pk.Catalog | pk.Histories) -> dict[str, np.ndarray]:
    names = (
        ("token_ids", "offsets", "item_ids") if isinstance(thing, pk.Catalog) else ("items", "offsets", "timestamps")
    )
    return {name: getattr(thing, name) for name in names}


def given() -> dict[str, tuple[Callable[..., Any], list[np.ndarray]]]:
    """Constructors, and arrays whose dtypes they keep, which is where a reference would be kept too."""
    tokens, offsets = np.array([1, 2, 3, 4], np.int32), np.array([0, 1, 4], np.int32)
    return {
        "catalog": (pk.Catalog.from_token_ids, [tokens, offsets, np.array([7, 9])]),
        "catalog of names": (pk.Catalog.from_token_ids, [tokens, offsets, np.array(["x", "y"])]),
        "histories": (pk.Histories, [np.array([7, 9, 9, 7]), offsets.astype(np.int64), np.array([1, 2, 3, 4])]),
        "histories of names": (pk.Histories, [np.array(["x", "y", "y", "x"]), offsets.astype(np.int64)]),
    }


@pytest.mark.parametrize("name", given())
def test_a_later_write_of_the_caller_changes_nothing(name: str) -> None:
    make, arrays = given()[name]
    made = make(*arrays)
    before = {name: copy.deepcopy(array) for name, array in arrays_of(made).items()}
    for array in arrays:
        array.fill(array[1])
    for kind, array in arrays_of(made).items():
        assert np.array_equal(array, before[kind])
        if array is not None:
            with pytest.raises(ValueError, match="read-only"):
                array[0] = array[0]


def test_a_read_only_view_of_what_can_be_written_is_copied() -> None:
    offsets = np.array([0, 2])
    for hide in (lambda x: x.view(), lambda x: np.frombuffer(memoryview(x).toreadonly(), x.dtype), torch.from_numpy):
        items = np.array([5, 6])
        view = hide(items)
        if isinstance(view, np.ndarray):
            view.flags.writeable = False
        histories = pk.Histories(view, offsets)
        items[:] = 1
        assert histories.items.tolist() == [5, 6]


def test_what_nobody_can_write_to_is_not_copied() -> None:
    pa = pytest.importorskip("pyarrow")
    items, offsets = freeze(np.arange(6)), freeze(np.array([0, 6]))
    histories = pk.Histories(items, offsets)
    assert histories.items is items and histories.offsets is offsets
    assert pk.Histories(histories.items, histories.offsets).items is items
    for immutable in (np.frombuffer(bytes(48), np.int64), pa.array([1, 2, 3, 4, 5, 6]).to_numpy()):
        assert np.shares_memory(pk.Histories(immutable, offsets).items, immutable)
    taken = histories.take([0])
    assert is_immutable(taken.items) and is_immutable(taken.offsets)


def test_what_the_library_makes_itself_is_frozen_where_it_lies() -> None:
    histories = pk.Histories.from_sequences([[1, 2, 3], [4]])
    blurred = histories.jittered(1.0, [3, 1], np.random.default_rng(0))
    for made in (histories, histories.latest(2), histories.before([0], [2]), blurred):
        assert is_immutable(made.items) and is_immutable(made.offsets)
    assert blurred.offsets is histories.offsets


@pytest.mark.parametrize("shift", range(8))
def test_misaligned_memory_is_copied(shift: int) -> None:
    memory = np.zeros(8 * 8 + 8, np.uint8)
    array = memory[shift : shift + 64].view(np.int64)
    array[:] = np.arange(8)
    for source in (array, array[::2], array.astype(">i8")):
        own = frozen(source.astype(np.int64, copy=False), source)
        assert own.flags.aligned and own.flags.c_contiguous and not own.flags.writeable
        assert own.tolist() == source.tolist() and not np.shares_memory(own, memory)


def test_layouts_of_misaligned_tensors_hold_copies() -> None:
    layout = cases.make_batch(pk.SessionPatches(2), [9, 3]).layout(transpose=True)
    memory = np.zeros(layout.lo.nbytes + 4, np.uint8)
    odd = torch.from_numpy(memory[1 : 1 + layout.lo.nbytes].view(np.int32))
    odd.copy_(layout.lo)
    assert odd.data_ptr() % 4
    made = pk.PatchLayout(**{**vars(layout), "lo": odd})
    assert made.lo.data_ptr() % 4 == 0 and torch.equal(made.lo, layout.lo) and made.hi is layout.hi


# ------------------------------------------------------------------ pickles and copies


def public_objects() -> dict[str, Any]:
    batch = cases.make_batch(pk.SessionPatches(2), [9, 3])
    catalog, histories, policy, prompt, _ = batch.arguments()
    weight = torch.ones(cases.VOCABULARY, 4)
    return {
        "Catalog": catalog,
        "Catalog of texts": pk.Catalog.from_titles({"a": "x", "b": "yy"}, lambda text: [len(text)]),
        "Histories": pk.Histories([1, 2, 3], [0, 1, 3], timestamps=[5, 6, 7]),
        "Prompt": prompt,
        **{str(policy): policy for policy in (pk.TextOnly(), pk.ItemPatches(2), policy, pk.RandomItemPatches(0.5))},
        "PatchLayout": batch.layout(transpose=True).with_identities(),
        "PackedBatch": pk.compress_batch(weight, catalog, histories, policy, prompt),
        "ItemTable": pk.item_table(catalog, weight),
        "Interactions": synthetic(12, 30),
    }


def content(thing: Any) -> Any:
    """What is in it, comparable; caches and look-up tables aside."""
    if isinstance(thing, (torch.Tensor, np.ndarray)):
        return type(thing), str(thing.dtype), thing.tolist()
    if isinstance(thing, (pk.Catalog, pk.Histories)):
        return type(thing), content(arrays_of(thing)), content(getattr(thing, "titles", None))
    if isinstance(thing, dict) or type(thing).__name__ == "mappingproxy":
        return {key: content(value) for key, value in thing.items()}
    if isinstance(thing, (list, tuple)):
        return [content(value) for value in thing]
    return (type(thing), content(vars(thing))) if hasattr(thing, "__dict__") and not isinstance(thing, type) else thing


@pytest.mark.parametrize("way", ROUND_TRIPS)
@pytest.mark.parametrize("name", public_objects())
def test_public_objects_come_back_as_they_were(name: str, way: str) -> None:
    thing = public_objects()[name]
    again = ROUND_TRIPS[way](thing)
    assert again is not thing and content(again) == content(thing)
    if isinstance(again, (pk.Catalog, pk.Histories)):
        assert all(array is None or is_immutable(array) for array in arrays_of(again).values())
    if isinstance(again, pk.Catalog):
        assert again.index_of(again.item_ids).tolist() == list(range(len(again)))
        assert again.fingerprint == thing.fingerprint
    if name == "Interactions":
        with pytest.raises(TypeError, match="does not support item assignment"):
            again.titles[0] = "other"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("offsets", np.array([0, 2, 1, 4], np.int32)),
        ("token_ids", np.array([1, -2, 3, 4], np.int32)),
        ("item_ids", np.array([1, 1, 2])),
        ("titles", ("a",)),
    ],
)
def test_a_catalogue_is_checked_when_it_is_unpickled(field: str, value: Any) -> None:
    catalog = pk.Catalog.from_token_ids([1, 2, 3, 4], [0, 1, 2, 4], titles=["a", "b", "c"])
    setattr(catalog, field, value)
    with pytest.raises(ValueError, match=field):
        pickle.loads(pickle.dumps(catalog))


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("offsets", np.array([0, 3, 2]), ValueError),
        ("timestamps", np.array([1]), ValueError),
        ("items", np.zeros(2), TypeError),
    ],
)
def test_histories_are_checked_when_they_are_unpickled(field: str, value: Any, error: type[Exception]) -> None:
    histories = pk.Histories([1, 2], [0, 1, 2], timestamps=[5, 6])
    setattr(histories, field, value)
    with pytest.raises(error, match=field):
        pickle.loads(pickle.dumps(histories))
    with pytest.raises(TypeError, match="in the pickle"):
        histories.__setstate__({})


@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        ("hi", torch.zeros(1, dtype=torch.int32), ValueError, "hi: expected"),
        ("items", torch.tensor([10**6], dtype=torch.int32), ValueError, "items"),
        ("offsets", torch.zeros(3, dtype=torch.int64), TypeError, "offsets: expected dtype"),
        ("lo", None, TypeError, "lo: expected a tensor"),
        ("max_token_id", 0, ValueError, "max_token_id"),
        ("transpose", "x", TypeError, "transpose: expected a Transpose"),
        ("unheard_of", 1, ValueError, "unheard_of"),
    ],
)
def test_a_layout_is_checked_when_it_is_unpickled(field: str, value: Any, error: type[Exception], message: str) -> None:
    layout = cases.make_batch(pk.SessionPatches(2), [9, 3]).layout(transpose=True)
    vars(layout)[field] = value
    with pytest.raises(error, match=message):
        pickle.loads(pickle.dumps(layout))


# ------------------------------------------------------------------ what is looked at before every call


def changed(change: Callable[[pk.PatchLayout], object]) -> pk.PatchLayout:
    layout = pickle.loads(pickle.dumps(cases.make_batch(pk.SessionPatches(2), [9, 3]).layout(transpose=True)))
    change(layout)
    assert isinstance(layout, pk.PatchLayout)
    return layout


@pytest.mark.parametrize("engine", ["reference", "native"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.hi.resize_(3), "hi: expected one per row"),
        (lambda x: x.items.untyped_storage().resize_(4), "items: expected .* bytes behind the tensor, got 4"),
        (lambda x: x.lo.untyped_storage().resize_(0), "lo: expected .* bytes behind the tensor, got 0"),
        (lambda x: vars(x).update(token_ids=x.token_ids.long()), "token_ids: expected dtype torch.int32"),
        (lambda x: vars(x).update(offsets=x.offsets[:0]), "offsets: expected at least one entry"),
        (lambda x: vars(x).update(items=torch.stack([x.items, x.items], 1)[:, 0]), "items: expected a contiguous"),
        (lambda x: vars(x).update(hi=x.hi.to("meta")), "layout: expected all tensors on one device, got cpu, meta"),
    ],
)
def test_resized_layouts_are_refused(change: Callable[..., object], message: str, engine: str) -> None:
    if not pk.backends()[engine].usable:
        pytest.skip(pk.backends()[engine].reason)
    layout = changed(change)
    out = torch.full((layout.lo.numel(), 4), 777.0)
    with pytest.raises((TypeError, ValueError), match=message):
        pk.pool_rows(torch.ones(cases.VOCABULARY, 4), layout, backend=engine, out=out)
    assert (out == 777.0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.offsets.resize_(2), "token_offsets: expected one more than tokens"),
        (lambda x: x.divisors.resize_(2), "divisors: expected one per contribution"),
        (lambda x: x.rows.untyped_storage().resize_(4), "rows: expected .* bytes behind the tensor"),
    ],
)
def test_resized_transposes_are_refused(change: Callable[..., object], message: str) -> None:
    layout = changed(lambda x: change(x.transpose))
    with pytest.raises(ValueError, match=message):
        pk.pool_rows_grad(torch.ones(layout.num_rows, 4), layout, cases.VOCABULARY)


def test_out_shares_no_memory_with_what_is_read() -> None:
    layout = changed(lambda x: None)
    memory = np.zeros(4 * layout.num_rows, np.float32)
    out = torch.from_numpy(memory).view(-1, 4)
    # another tensor and another storage, but the same memory
    vars(layout)["items"] = torch.from_numpy(memory[5 : 5 + len(layout.items)].view(np.int32))
    with pytest.raises(ValueError, match="out: expected memory of its own, got items's"):
        pk.pool_rows(torch.ones(cases.VOCABULARY, 4), layout, out=out)


def test_a_weight_whose_memory_was_freed_is_refused() -> None:
    weight = torch.ones(cases.VOCABULARY, 4)
    weight.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"weight: expected .* bytes behind the tensor, got 0"):
        pk.pool_rows(weight, changed(lambda x: None))


def test_an_exchanged_catalogue_is_never_read_beyond_its_end() -> None:
    catalog, histories, policy, prompt, _ = cases.make_batch(pk.SessionPatches(2), [9, 3]).arguments()
    catalog = copy.copy(catalog)
    catalog.token_ids = catalog.token_ids[:4]
    with pytest.raises((ValueError, IndexError)):
        pk.build_layout(catalog, histories, policy, prompt)
