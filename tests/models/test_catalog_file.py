# SPDX-License-Identifier: Apache-2.0
"""A catalogue's file: exact round trips, and no trust in what a file declares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import patchkern as pk
from patchkern.models.catalog_file import read_catalog, write_catalog

HARD = ["Heat", " ", "Amélie\n\t", "七人の侍", "👨‍👩‍👧", "a\0b", "\ud800 alone", "x" * 3000, "Heat"]


def tokens(title: str) -> list[int]:
    return [len(title), *map(ord, title[:3])]


@pytest.mark.parametrize("ids", ["integers", "large integers", "strings"])
@pytest.mark.parametrize("titles", [HARD, ["one"], []], ids=["hard", "one", "none"])
@pytest.mark.parametrize("texts", [True, False])
def test_round_trip(ids: str, titles: list[str], texts: bool, tmp_path: Path) -> None:
    names: dict[str, list[Any]] = {
        "integers": list(range(9, 0, -1)),
        "large integers": [-(2**63), 2**63 - 1, *range(7)],
        "strings": ["", "#1", "é", "日本", "👍", "\ud83d", "a\0b", "y" * 200, "1"],
    }
    item_ids = np.array(names[ids][: len(titles)], np.str_ if ids == "strings" else np.int64)
    flat = [token for title in titles for token in tokens(title)]
    offsets = np.cumsum([0, *(len(tokens(title)) for title in titles)])
    catalog = pk.Catalog(flat, offsets, item_ids, titles if texts else None)
    write_catalog(tmp_path / "c", catalog)
    again = read_catalog(tmp_path / "c")
    for name in ("token_ids", "offsets", "item_ids"):
        before, after = getattr(catalog, name), getattr(again, name)
        assert before.dtype.kind == after.dtype.kind and before.tolist() == after.tolist(), name
    assert (again.titles, again.fingerprint, again.max_token_id) == (
        catalog.titles,
        catalog.fingerprint,
        catalog.max_token_id,
    )
    assert again.index_of(item_ids).tolist() == list(range(len(titles)))


def test_early_files_have_no_ids_in_the_fingerprint(tmp_path: Path) -> None:
    catalog = pk.Catalog([5, 6, 7], [0, 1, 3], ["one", "two"], ["One", "Two"])
    write_catalog(tmp_path / "c", catalog)
    save_file(load_file(tmp_path / "c"), tmp_path / "early", {"fingerprint": catalog.token_fingerprint})
    assert read_catalog(tmp_path / "early").fingerprint == catalog.fingerprint


def damaged(change: dict[str, Any], metadata: dict[str, str] | None, path: Path) -> None:
    catalog = pk.Catalog([5, 6, 7], [0, 1, 3], ["one", "two"], ["One", "Two"])
    write_catalog(path, catalog)
    arrays = {name: array for name, array in (load_file(path) | change).items() if array is not None}
    save_file(arrays, path, {"fingerprint": catalog.fingerprint} if metadata is None else metadata)


@pytest.mark.parametrize(
    ("change", "metadata", "message"),
    [
        ({"token_ids": None}, None, "it has no 'token_ids'"),
        ({"item_ids_offsets": None}, None, "it has no 'item_ids_offsets'"),
        ({"token_ids": np.array([5, 6, 8], np.int32)}, None, "fingerprint: expected"),
        ({}, {}, "fingerprint: expected None"),
        ({"token_ids": np.array([5, 6, 7])}, None, "token_ids: expected int32 of one dimension, got int64"),
        ({"token_ids": np.zeros((3, 1), np.int32)}, None, "token_ids: expected int32 of one dimension"),
        ({"offsets": np.array([0, 1, 9], np.int32)}, None, "expected a last offset of 3, got 9"),
        ({"titles_offsets": np.array([0, 3, 2**62])}, None, "titles_offsets: expected a last offset of 6"),
        ({"titles_offsets": np.array([0, 9, 6])}, None, "titles_offsets: expected non-decreasing offsets"),
        ({"titles_offsets": np.array([0, 6])}, None, r"titles: expected one per item \(2\), got 1"),
        ({"titles_utf8": np.array([255] * 6, np.uint8)}, None, "can't decode"),
        ({"item_ids": np.array([1, 1])}, None, "item_ids: expected distinct ids"),
        ({"item_ids": np.array([1, 2])}, None, "fingerprint: expected"),
        ({"item_ids_utf8": np.frombuffer(b"onetwi", np.uint8)}, None, "fingerprint: expected"),
    ],
)
def test_damaged_files_are_named(
    change: dict[str, Any], metadata: dict[str, str] | None, message: str, tmp_path: Path
) -> None:
    damaged(change, metadata, tmp_path / "c")
    with pytest.raises(ValueError, match=f"{tmp_path / 'c'}: not a catalogue, or a damaged one: .*{message}"):
        read_catalog(tmp_path / "c")


def test_a_small_file_does_not_ask_for_much_memory(tmp_path: Path) -> None:
    ids = b"x" * 100_000 + b"".join(b"%05d" % n for n in range(10_000))
    ends = np.cumsum([0, 100_000, *[5] * 10_000])
    change = {"item_ids_utf8": np.frombuffer(ids, np.uint8), "item_ids_offsets": ends}
    damaged(change, None, tmp_path / "c")
    with pytest.raises(ValueError, match=r"item_ids: expected ids that are about equally long, got some .* 4,000,"):
        read_catalog(tmp_path / "c")


@pytest.mark.parametrize("keep", [0, 4, 40, -1])
def test_truncated_files_are_refused(keep: int, tmp_path: Path) -> None:
    damaged({}, None, tmp_path / "c")
    (tmp_path / "c").write_bytes((tmp_path / "c").read_bytes()[:keep])
    with pytest.raises(ValueError, match="not a catalogue, or a damaged one"):
        read_catalog(tmp_path / "c")
