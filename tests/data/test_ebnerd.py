# SPDX-License-Identifier: Apache-2.0
"""EB-NeRD: clicks of histories and impressions, each once; what is another layout is refused by file and column."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from patchkern.data import leave_last_out, open_dataset

pa = pytest.importorskip("pyarrow", reason="needs pyarrow")
pq = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")


def at(*seconds: int) -> list[Any]:
    return [np.datetime64("2023-05-18T07:00:00", "us") + np.timedelta64(second, "s") for second in seconds]


ARTICLES: dict[str, Any] = {
    "article_id": pa.array([11, 12, 13, 14, 15], pa.int32()),
    "title": ["Sol og sommer", "Kampen", " ", "Valget", "Vejret"],
    "subtitle": ["I dag", None, "x", "Live", "Regn"],
    "category_str": ["vejr", "sport", "sport", "politik", "vejr"],
    "topics": [["Vejr", "Ferie"], [], [], ["Valg"], []],
    "premium": [False] * 5,
}
LISTS = {"article_id_fixed": pa.list_(pa.int32()), "impression_time_fixed": pa.list_(pa.timestamp("us"))}
TRAIN_HISTORY = {
    "user_id": pa.array([7, 9], pa.uint32()),
    "article_id_fixed": [[11, 12], [14]],
    "impression_time_fixed": [at(-900, -800), at(-5)],
    "read_time_fixed": [[1.0, 2.0], [3.0]],
}
TRAIN_BEHAVIORS: dict[str, Any] = {
    "impression_id": pa.array([1, 2, 3], pa.uint32()),
    "article_id": pa.array([None, None, 11], pa.int32()),
    "impression_time": pa.array(at(100, 50, 60), pa.timestamp("us")),
    "article_ids_inview": [[14, 12], [12, 15], [15]],
    "article_ids_clicked": [[14], [12, 15], []],
    "user_id": pa.array([7, 9, 9], pa.uint32()),
}
# user 7 again, up to the second part: its click of the first part's impressions, at the time of the article's page
LATER_HISTORY = {
    "user_id": pa.array([7], pa.uint32()),
    "article_id_fixed": [[12, 14]],
    "impression_time_fixed": [at(-800, 103)],
}
LATER_BEHAVIORS = {
    "impression_time": pa.array(at(700_000, 700_001), pa.timestamp("us")),
    "article_ids_clicked": [[15], [13, 99]],
    "user_id": pa.array([7, 8], pa.uint32()),
}


def write(path: Path, columns: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({name: pa.array(column, LISTS.get(name)) if isinstance(column, list) else column
                             for name, column in columns.items()}), path)  # fmt: skip


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "ebnerd_demo"
    write(folder / "articles.parquet", ARTICLES)
    write(folder / "train" / "history.parquet", TRAIN_HISTORY)
    write(folder / "train" / "behaviors.parquet", TRAIN_BEHAVIORS)
    write(folder / "validation" / "history.parquet", LATER_HISTORY)
    write(folder / "validation" / "behaviors.parquet", LATER_BEHAVIORS)
    return folder


def test_a_bundle(bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "patchkern.data"):
        data = open_dataset(bundle, item_text="title (category_str, topics, subtitle)", tie_seed=None)
    assert "1 with an item without title, 1 with an item that" in caplog.text
    assert data.name == "ebnerd_demo" and data.user_ids.tolist() == [7, 9] and data.ratings is None
    # user 7: both histories with (12, -800) once, no click of train's impressions, one of validation's
    assert [history.tolist() for history in data.histories] == [[11, 12, 14, 15], [14, 12, 15]]
    start = int(at(0)[0].astype("datetime64[s]").astype(np.int64))
    assert (data.histories.timestamps - start).tolist() == [-900, -800, 103, 700_000, -5, 50, 50]
    assert list(data.titles) == [11, 12, 14, 15]
    assert data.texts is not None and data.texts[11] == "Sol og sommer (vejr, Vejr, Ferie, I dag)"
    assert data.texts[12] == "Kampen (sport)"


def test_one_part_and_its_splits(bundle: Path) -> None:
    for file in (bundle / "validation").iterdir():
        file.unlink()
    (bundle / "validation").rmdir()
    data = leave_last_out(open_dataset(bundle / "articles.parquet"))
    assert data.histories[0].tolist() == [11, 12, 14]
    assert data.targets(data.samples("test", min_history=1)).tolist()[0] == 14


def without(columns: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: column for key, column in columns.items() if key != name}


@pytest.mark.parametrize(
    ("file", "columns", "message"),
    [
        ("articles.parquet", without(ARTICLES, "title"), r"articles.parquet: expected a column 'title'"),
        ("train/history.parquet", without(TRAIN_HISTORY, "user_id"), r"history.parquet: expected a column 'user_id'"),
        ("train/behaviors.parquet", without(TRAIN_BEHAVIORS, "article_ids_clicked"), "column 'article_ids_clicked'"),
        ("train/behaviors.parquet", TRAIN_BEHAVIORS | {"impression_time": pa.array([1, 2, 3])},
         r"behaviors.parquet: impression_time: expected timestamps, got int64"),
        ("train/behaviors.parquet", TRAIN_BEHAVIORS | {"article_ids_clicked": pa.array([1, 2, 3])},
         r"behaviors.parquet: article_ids_clicked: expected a column of lists, got one of int64"),
        ("train/behaviors.parquet", TRAIN_BEHAVIORS | {"user_id": pa.array([7, None, 9])},
         r"behaviors.parquet: user_id\[1\]: expected no missing value"),
        ("train/behaviors.parquet", TRAIN_BEHAVIORS | {"user_id": pa.array(["a", "b", "c"])}, "expected integers, got"),
        ("train/history.parquet", TRAIN_HISTORY | {"article_id_fixed": [[11], [14]]},
         "expected as many impression_time_fixed as article_id_fixed"),
        ("train/history.parquet", TRAIN_HISTORY | {"article_id_fixed": [[11, None], [14]]}, "got one at position 1"),
    ],
)  # fmt: skip
def test_other_layouts_are_refused(bundle: Path, file: str, columns: dict[str, Any], message: str) -> None:
    write(bundle / file, columns)
    with pytest.raises((TypeError, ValueError), match=message):
        open_dataset(bundle)


@pytest.mark.parametrize("file", ["articles.parquet", "validation/history.parquet", "train/history.parquet"])
def test_a_missing_file(bundle: Path, file: str) -> None:
    (bundle / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"{file}: expected a bundle of EB-NeRD"):
        open_dataset(bundle)


def test_a_field_that_no_article_has(bundle: Path) -> None:
    with pytest.raises(ValueError, match=r"articles.parquet: expected a column 'brand', got article_id, title"):
        open_dataset(bundle, item_text="title (brand)")
    with pytest.raises(TypeError, match=r"premium, row 0: expected text, a number or a list of these, got bool"):
        open_dataset(bundle, item_text="title (premium)")
