# SPDX-License-Identifier: Apache-2.0
"""`Catalog` and `Histories`: titles by item id, ragged sequences, and what they refuse."""

from __future__ import annotations

import pickle
from typing import Any

import cases
import numpy as np
import pytest
from error_cases import refused
from hypothesis import given
from hypothesis import strategies as st

import patchkern as pk


def words(title: str) -> list[int]:
    return [len(word) for word in title.split()]


# ------------------------------------------------------------------ Catalog


def test_from_titles_with_a_callable() -> None:
    catalog = pk.Catalog.from_titles({3: "a bb", 1: "ccc", 7: "a bb"}, words)
    assert len(catalog) == 3
    assert catalog.token_ids.tolist() == [1, 2, 3, 1, 2] and catalog.token_ids.dtype == np.int32
    assert catalog.offsets.tolist() == [0, 2, 3, 5] and catalog.offsets.dtype == np.int32
    assert catalog.lengths.tolist() == [2, 1, 2]
    assert catalog.item_ids.tolist() == [3, 1, 7]
    assert catalog.titles == ("a bb", "ccc", "a bb")
    assert catalog.max_token_id == 3
    assert [catalog.tokens(index).tolist() for index in range(3)] == [[1, 2], [3], [1, 2]]
    assert catalog.index_of([7, 3, 3]).tolist() == [2, 0, 0] and catalog.index_of([7]).dtype == np.int32


def test_from_titles_with_the_llama_tokenizer(shared_data: Any) -> None:
    transformers = pytest.importorskip("transformers", reason="reads the Llama-3 tokenizer")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(shared_data / "llama3-tokenizer"))
    titles = {10: "Toy Story", 20: "Alien", 30: "Aliens", 40: " Seven  (a.k.a. Se7en) é"}
    catalog = pk.Catalog.from_titles(titles, tokenizer)
    for index, title in enumerate(titles.values()):
        tokens = catalog.tokens(index).tolist()
        assert tokens == tokenizer.encode(title, add_special_tokens=False)
        assert tokenizer.decode(tokens) == title
    assert tokenizer.bos_token_id not in catalog.token_ids


def test_mean_title_lengths_of_the_shared_data(shared_data: Any) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="reads parquet")
    transformers = pytest.importorskip("transformers", reason="reads the Llama-3 tokenizer")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(shared_data / "llama3-tokenizer"))
    for dataset, items, mean in (("ml-1m", 3883, 3.94), ("ml-100k", 1682, 3.86)):
        table = parquet.read_table(shared_data / dataset / "items.parquet").to_pydict()
        catalog = pk.Catalog.from_titles(dict(zip(table["item"], table["title"], strict=True)), tokenizer)
        assert len(catalog) == items and round(float(catalog.lengths.mean()), 2) == mean
        assert catalog.index_of(catalog.item_ids).tolist() == list(range(items))


@pytest.mark.parametrize("ids", ["int", "gaps", "str"])
def test_index_of_every_kind_of_id(ids: str) -> None:
    titles = cases.make_titles(50, ids=ids)
    catalog = cases.make_catalog(titles)
    names = list(titles)
    order = [13, 0, 49, 13, 7]
    wanted = [names[i] for i in order]
    assert catalog.index_of(wanted).tolist() == order
    assert catalog.index_of(np.asarray(wanted)).tolist() == order
    assert catalog.index_of(np.asarray(wanted, object)).tolist() == order
    assert catalog.index_of([]).tolist() == [] and catalog.index_of([]).dtype == np.int32
    assert catalog.index_of(catalog.item_ids).tolist() == list(range(50))


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64])
@pytest.mark.parametrize("step", [1, 10**6], ids=["table", "sparse"])
def test_index_of_every_integer_width(dtype: Any, step: int) -> None:
    """An id is found or refused by its value, whatever integer type it comes in."""
    limits = np.iinfo(dtype)
    for first in (-100, 0, 1, 100, 30_000, 2**31, 2**40):
        known = [first + step * i for i in range(250)]
        catalog = cases.make_catalog({item: [1] for item in known})
        for value in {limits.min, limits.max, 0, 1, 27, 127, first, first + step, first - 1, first + 249 * step + 1}:
            if not limits.min <= value <= limits.max:
                continue
            asked = np.asarray([value], dtype)
            if value in known:
                assert catalog.index_of(asked).tolist() == [known.index(value)]
            else:
                with pytest.raises(ValueError, match=rf"item_ids: expected .*, got {value}\b"):
                    catalog.index_of(asked)


@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.int32, np.uint64])
def test_item_ids_of_every_integer_width(dtype: Any) -> None:
    ids = np.asarray([127, 3, 0, 100] if np.iinfo(dtype).min == 0 else [127, -128, 0, 100], dtype)
    catalog = pk.Catalog.from_token_ids([1, 2, 3, 4], [0, 1, 2, 3, 4], ids)
    assert catalog.index_of(ids).tolist() == [0, 1, 2, 3]
    assert catalog.index_of(ids.astype(np.int64)).tolist() == [0, 1, 2, 3]


@given(data=st.data())
def test_index_of_is_a_dictionary(data: st.DataObject) -> None:
    ids = data.draw(
        st.lists(st.integers(-(2**40), 2**40), unique=True, max_size=30)
        | st.lists(st.integers(-50, 50), unique=True, max_size=30)
        | st.lists(st.text(max_size=5).filter(lambda text: not text.endswith("\0")), unique=True, max_size=30)
    )
    catalog = cases.make_catalog({item: [1] for item in ids})
    asked = data.draw(st.lists(st.sampled_from(ids), max_size=20)) if ids else []
    assert catalog.index_of(asked).tolist() == [ids.index(item) for item in asked]


def test_empty_catalog() -> None:
    for catalog in (pk.Catalog.from_token_ids([], [0]), pk.Catalog.from_titles({}, words)):
        assert len(catalog) == 0 and catalog.max_token_id == -1 and catalog.index_of([]).size == 0
        with pytest.raises(ValueError, match="item_ids"):
            catalog.index_of([0])


def test_a_line_says_what_they_are() -> None:
    assert repr(pk.Catalog.from_titles({7: "a b", 9: "c"}, words)) == "Catalog(2 items, 3 tokens, with titles)"
    assert repr(pk.Catalog.from_token_ids(range(2500), [0, 2500])) == "Catalog(1 items, 2,500 tokens)"
    assert repr(pk.Histories([7, 9, 7], [0, 2, 3])) == "Histories(2 users, 3 items)"
    assert repr(pk.Histories([], [0], timestamps=[])) == "Histories(0 users, 0 items, with timestamps)"


def test_catalog_pickles() -> None:
    catalog = cases.make_catalog(cases.make_titles(20, ids="str"))
    copy = pickle.loads(pickle.dumps(catalog))
    assert np.array_equal(copy.token_ids, catalog.token_ids) and copy.item_ids.tolist() == catalog.item_ids.tolist()
    assert copy.index_of(catalog.item_ids).tolist() == list(range(20))


def test_fingerprints_are_of_ids_and_tokens() -> None:
    titles = cases.make_titles(23)
    catalog = cases.make_catalog(titles)
    for again in (cases.make_catalog(titles), pickle.loads(pickle.dumps(catalog))):
        assert (again.fingerprint, again.token_fingerprint) == (catalog.fingerprint, catalog.token_fingerprint)
    # the same on every machine and in every version: files tell by it what they are of
    one = pk.Catalog.from_token_ids([3, 1, 2], [0, 1, 3])
    assert one.token_fingerprint == "ae164ba0741454dbb0dccc9375e4ef5f"
    assert one.fingerprint == "5634fb73be08d68e2b669702f6e3385d"
    others = [([3, 1, 2], [0, 2, 3]), ([3, 2, 1], [0, 1, 3]), ([3, 1], [0, 1, 2]), ([3, 1, 2], [0, 3]), ([], [0])]
    made = [catalog, one, *(pk.Catalog.from_token_ids(*other) for other in others)]
    assert len({x.token_fingerprint for x in made}) == len({x.fingerprint for x in made}) == len(others) + 2


def test_fingerprints_tell_ids_apart() -> None:
    """Of the same titles: exchanged ids, integers that strings spell, and strings that only together are the same."""
    ids = [[0, 1], [1, 0], ["0", "1"], ["a", "bc"], ["ab", "c"], ["", "abc"], ["abc", ""], ["\ud83d", "0"], [0, 256]]
    made = [pk.Catalog.from_token_ids([3, 1, 2], [0, 1, 3], names) for names in ids]
    assert len({x.fingerprint for x in made}) == len(ids) and len({x.token_fingerprint for x in made}) == 1
    wide = pk.Catalog.from_token_ids([3, 1, 2], [0, 1, 3], np.array(["a", "bc"], "<U40"))
    assert wide.fingerprint == made[3].fingerprint
    narrow = pk.Catalog.from_token_ids([3, 1, 2], [0, 1, 3], np.array([1, 0], np.uint8))
    assert narrow.fingerprint == made[1].fingerprint


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1, 2], [0, 1]), ValueError, r"offsets: .*2, got 1"),
        (([1, 2], [1, 2]), ValueError, r"offsets: .*start at 0, got 1"),
        (([1, 2], []), ValueError, r"offsets"),
        (([1, 2, 3], [0, 3, 2, 3]), ValueError, r"offsets: expected non-decreasing offsets, got 3 then 2"),
        (([1, 2], [0, 1, 1, 2]), ValueError, r"titles: expected at least one token per item, got none for item 1"),
        (([1, 2], [0, 1, 1, 2], ["a", "b", "c"]), ValueError, r"titles: .*got none for item .*b"),
        (([1, -2], [0, 2]), ValueError, r"token_ids\[1\]: expected a token id >= 0, got -2"),
        (([1, 2**31], [0, 2]), ValueError, r"token_ids: .*2147483648"),
        (([1, 2**31 - 1], [0, 2]), ValueError, r"token_ids: .*2147483647"),
        (([1.5, 2], [0, 2]), TypeError, r"token_ids: expected integers, got dtype float64"),
        ((["a"], [0, 1]), TypeError, r"token_ids: expected integers"),
        (([[1, 2]], [0, 2]), ValueError, r"token_ids: expected a 1-D array, got 2 dimensions"),
        (([1, 2], [0.0, 2.0]), TypeError, r"offsets: expected integers, got dtype float64"),
        (([1, 2], [0, 1, 2], [5]), ValueError, r"item_ids: expected one per title \(2\)"),
        (([1, 2], [0, 1, 2], [5, 5]), ValueError, r"item_ids: expected distinct ids, got .*5"),
        (([1, 2], [0, 1, 2], ["x", "x"]), ValueError, r"item_ids: expected distinct ids, got .*x"),
        (([1, 2], [0, 1, 2], [5, "x"]), TypeError, r"item_ids: .*got int, str"),
        (([1, 2], [0, 1, 2], [5.0, 6.0]), TypeError, r"item_ids: .*float"),
        (([1, 2], [0, 1, 2], [True, False]), TypeError, r"item_ids: .*bool"),
        (([1, 2], [0, 1, 2], None, ["only one"]), ValueError, r"titles: expected one per item \(2\), got 1"),
    ],
)
def test_from_token_ids_refuses(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pk.Catalog.from_token_ids(*arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((["a"], words), TypeError, r"titles: expected a mapping of item id to title, got list"),
        (({1: 5}, words), TypeError, r"titles\[1\]: expected a string, got int"),
        (({1: "a"}, None), TypeError, r"tokenizer: expected .*got NoneType"),
        (({1: "a", 2: ""}, words), ValueError, r"titles: expected at least one token per item, got none for item 2"),
        (({1: "a", "b": "b"}, words), TypeError, r"item_ids: .*got int, str"),
        (({1.5: "a"}, words), TypeError, r"item_ids: .*float"),
    ],
)
def test_from_titles_refuses(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pk.Catalog.from_titles(*arguments)


def test_index_of_refuses() -> None:
    numbers = cases.make_catalog({5: [1], 9: [2]})
    for unknown in (4, 6, 10, -1, 2**40, -(2**40)):
        with pytest.raises(ValueError, match=rf"targets: expected item ids of the catalog, got .*{unknown}\b"):
            numbers.index_of([5, unknown], "targets")
    names = cases.make_catalog({"a": [1], "b": [2]})
    with pytest.raises(ValueError, match=r"item_ids: .*got .*'c'"):
        names.index_of(["a", "c"])
    sparse = cases.make_catalog({5: [1], 10**12: [2]})
    for catalog in (numbers, sparse):
        for wrong in (["5"], [5.0], [True], [None], [5, "9"], [{}]):
            with pytest.raises((TypeError, ValueError), match="item_ids"):
                catalog.index_of(wrong)
    for wrong in ([5], [5.0], [None], [b"a"], [{}], [["a"], ["b", "c"]]):
        with pytest.raises((TypeError, ValueError), match="item_ids"):
            names.index_of(wrong)


# ------------------------------------------------------------------ Histories


def test_histories_from_sequences() -> None:
    histories = pk.Histories.from_sequences([[3, 1], [], (7,), np.asarray([4, 5, 6])])
    assert len(histories) == 4
    assert histories.items.tolist() == [3, 1, 7, 4, 5, 6]
    assert histories.offsets.tolist() == [0, 2, 2, 3, 6] and histories.offsets.dtype == np.int64
    assert histories.lengths.tolist() == [2, 0, 1, 3]
    assert [history.tolist() for history in histories] == [[3, 1], [], [7], [4, 5, 6]]
    assert histories[-1].tolist() == [4, 5, 6] and histories[1].size == 0
    assert np.shares_memory(histories[0], histories.items)
    with pytest.raises(IndexError):
        histories[4]


def test_no_histories() -> None:
    for histories in (pk.Histories.from_sequences([]), pk.Histories([], [0])):
        assert len(histories) == 0 and list(histories) == [] and histories.lengths.tolist() == []
        assert len(histories.latest(3)) == 0
        assert len(histories.take([])) == 0
        assert len(histories.before([], [])) == 0
        assert histories.at([], []).size == 0


ragged = st.lists(st.lists(st.integers(0, 99), max_size=12), max_size=8)


@given(sequences=ragged, max_items=st.none() | st.integers(1, 15))
def test_latest(sequences: list[list[int]], max_items: int | None) -> None:
    histories = pk.Histories.from_sequences(sequences)
    stamped = pk.Histories(histories.items, histories.offsets, np.arange(histories.items.size))
    cut = stamped.latest(max_items)
    expected = [sequence if max_items is None else sequence[-max_items:] for sequence in sequences]
    assert [history.tolist() for history in cut] == expected
    stamps = np.split(np.arange(histories.items.size), histories.offsets[1:-1]) if sequences else []
    assert cut.timestamps is not None
    assert cut.timestamps.tolist() == [
        stamp for stamps_of in stamps for stamp in (stamps_of if max_items is None else stamps_of[-max_items:]).tolist()
    ]


@given(data=st.data(), sequences=ragged.filter(bool), max_items=st.none() | st.integers(1, 15))
def test_samples(data: st.DataObject, sequences: list[list[int]], max_items: int | None) -> None:
    histories = pk.Histories.from_sequences(sequences)
    users = data.draw(st.lists(st.integers(0, len(sequences) - 1), max_size=10))
    positions = [data.draw(st.integers(0, len(sequences[user]))) for user in users]
    before = histories.before(users, positions, max_items)
    for sample, user, position in zip(before, users, positions, strict=True):
        items = sequences[user][:position]
        assert sample.tolist() == (items if max_items is None else items[-max_items:])
    inside = [
        (user, position) for user, position in zip(users, positions, strict=True) if position < len(sequences[user])
    ]
    targets = histories.at([user for user, _ in inside], [position for _, position in inside])
    assert targets.tolist() == [sequences[user][position] for user, position in inside]
    assert [history.tolist() for history in histories.take(users)] == [sequences[user] for user in users]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1, 2], [0, 1]), ValueError, r"offsets: expected a last offset of 2, got 1"),
        (([1, 2], [1, 2]), ValueError, r"offsets: expected offsets that start at 0, got 1"),
        (([1, 2], []), ValueError, r"offsets"),
        (([1, 2], [0, 3, 2]), ValueError, r"offsets: expected non-decreasing offsets, got 3 then 2"),
        (([1, 2], [0.0, 2.0]), TypeError, r"offsets: expected integers, got dtype float64"),
        (([1, 2], [[0, 2]]), ValueError, r"offsets: expected a 1-D array"),
        (([[1, 2]], [0, 2]), ValueError, r"items: expected a 1-D array"),
        (([1.0, 2.0], [0, 2]), TypeError, r"items: .*got dtype float64"),
        (([True, False], [0, 2]), TypeError, r"items: .*got dtype bool"),
        (([1, 2], [0, 2], [7]), ValueError, r"timestamps: expected one per item \(2\), got 1"),
        (([1, 2], [0, 2], ["a", "b"]), TypeError, r"timestamps: expected numbers or datetimes"),
    ],
)
def test_histories_refuse(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pk.Histories(*arguments)


@pytest.mark.parametrize(
    ("sequences", "error", "message"),
    [
        ("abc", TypeError, r"histories: .*got str"),
        (5, TypeError, r"histories: .*got int"),
        (None, TypeError, r"histories: .*got NoneType"),
        ({1: [2]}, TypeError, r"histories: .*got dict"),
        (["abc"], TypeError, r"histories\[0\]: expected a sequence of item ids, got str"),
        ([[1], 2], TypeError, r"histories\[1\]: expected a sequence of item ids, got int"),
        ([[1], None], TypeError, r"histories\[1\]: .*got NoneType"),
        ([[1], ["a"]], TypeError, r"histories: expected item ids of one kind"),
        ([[1.5]], TypeError, r"histories|items"),
        ([[[1, 2]]], ValueError, r"histories|items"),
        ([[[1, 2], [3]]], ValueError, r"histories|items"),
    ],
)
def test_sequences_refuse(sequences: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pk.Histories.from_sequences(sequences)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda h: h.take([2]), r"users\[0\]: expected an index in 0..1, got 2"),
        (lambda h: h.take([-1]), r"users\[0\]: expected an index in 0..1, got -1"),
        (lambda h: h.before([0], [3]), r"positions\[0\]: expected 0..2, got 3"),
        (lambda h: h.before([0], [-1]), r"positions\[0\]: expected 0..2, got -1"),
        (lambda h: h.before([0, 1], [0]), r"positions: expected one per user \(2\), got 1"),
        (lambda h: h.at([0], [2]), r"positions\[0\]: expected below 2, got 2"),
        (lambda h: h.latest(0), r"max_items"),
        (lambda h: h.latest(-3), r"max_items"),
        (lambda h: h.before([0], [1], 0), r"max_items"),
    ],
)
def test_samples_refuse(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(pk.Histories.from_sequences([[1, 2], [3]]))


def test_empty_title() -> None:
    refused(
        pk.Catalog.from_token_ids,
        ValueError,
        r"titles: expected at least one .*got none for item 20",
        [1, 2],
        [0, 1, 1, 2],
        [10, 20, 30],
    )
    refused(
        pk.Catalog.from_titles,
        ValueError,
        r"titles: expected at least one .*got none for item 'b'",
        {"a": "x", "b": ""},
        lambda title: [len(title)] * len(title),
    )


def test_offsets_that_fall() -> None:
    refused(
        pk.Catalog.from_token_ids,
        ValueError,
        r"offsets: expected non-decreasing offsets, got 2 then 1 at 1",
        [1, 2, 3],
        [0, 2, 1, 3],
    )
    refused(
        pk.Histories,
        ValueError,
        r"offsets: expected non-decreasing offsets, got 2 then 1 at 1",
        [1, 2, 3],
        [0, 2, 1, 3],
    )


@pytest.mark.parametrize("ids", [[3, 5, 9], [-7, 10**12, 4], ["a", "b", "c"]], ids=["table", "dict", "text"])
def test_find_says_what_there_is_not(ids: list[Any]) -> None:
    catalog = pk.Catalog.from_token_ids([1, 2, 3], range(4), ids)
    other: Any = "z" if isinstance(ids[0], str) else 4 if 4 not in ids else 6
    assert catalog.find([ids[2], other, ids[0]]).tolist() == [2, -1, 0]
    assert catalog.find(np.array([[other], [ids[1]]])).tolist() == [[-1], [1]]
    assert catalog.find([]).tolist() == []
