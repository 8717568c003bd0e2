# SPDX-License-Identifier: Apache-2.0
"""Amazon Reviews 2023: reviews as JSON lines or as CSV of ids alone, items as JSON lines, plain or gzip, streamed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

from patchkern.data._delimited import columns_of, equally_long, number_of, read_quoted
from patchkern.data._objects import read_objects
from patchkern.data._rows import Rows
from patchkern.data._text import check_id, malformed, one_file
from patchkern.data._titles import Titles
from patchkern.data.interactions import Interactions
from patchkern.data.item_text import ItemText

SYSTEM = "You recommend products."
INSTRUCTION = (
    "A customer has bought [HISTORY_SEQUENCE]. Name one product for this customer to buy next: its title only, no "
    "explanation."
)
META_FILES = ("meta_*.jsonl", "meta_*.jsonl.gz")
REVIEWS = ("{}.jsonl", "{}.jsonl.gz", "{}.csv", "{}.csv.gz")

_PARTS = ("train", "valid", "test")


def read_amazon(
    path: str | PathLike[str],
    items: str | PathLike[str] | None = None,
    *,
    rating_above: float | None = None,
    item_field: str = "parent_asin",
    item_text: str | None = None,
    tie_seed: int | None = 0,
) -> Interactions:
    """Read reviews and the titles of the products in them.

    Both files are streamed: memory holds some 32 bytes per review, the ids, and titles and texts of the products that
    occur. Reviews of a product without title, or that the file of products lacks, are left out; how many is logged.

    Args:
        path: a folder with ``meta_CATEGORY.jsonl[.gz]`` and the reviews of that category: ``CATEGORY.jsonl[.gz]``, or
            ``CATEGORY.csv[.gz]`` as of the folders ``rating_only``; or the file of reviews.
        items: the file of products; None: the one beside the reviews.
        rating_above: keep only reviews rated strictly above it, while streaming.
        item_field: ``parent_asin``, which the file of products knows, or a field of the reviews that holds such ids.
        item_text: what a model reads of a product, such as "title (store, categories)" or "title (details.Brand)":
            fields of the file of products, see `Interactions.texts`.
        tie_seed: of the order within one instant, see `Interactions.from_columns`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a malformed line, with its file and number; several files that match; one part of a split.
    """
    reviews, meta = _files(Path(path), items)
    rows = Rows(reviews, rated=True)
    lines = _csv(reviews, item_field) if _category(reviews, ".csv") is not None else _json(reviews, item_field)
    for user, item, time, rating in lines:
        if rating_above is None or rating > rating_above:
            rows.add(user, item, time, rating)
    titles = Titles(meta, ItemText.parse(item_text))
    for number, record in read_objects(meta, ("parent_asin", "title")):
        product, title = record.get("parent_asin"), record.get("title")
        if not isinstance(product, str) or not (title is None or isinstance(title, str)):
            malformed(meta, number, "an object with text as parent_asin and title", f"{product!r}, {title!r}")
        if product in rows.items:
            titles.add(number, product, " ".join((title or "").split()), record)
    return rows.interactions(
        titles, "ms", tie_seed, {}, name=reviews.name.partition(".")[0], system=SYSTEM, instruction=INSTRUCTION
    )


def is_amazon(path: Path) -> bool:
    """Whether a folder, or a file of reviews, is of this format."""
    if path.is_dir():
        return one_file(path, META_FILES) is not None
    names = {_category(path, ending) for ending in (".csv", ".jsonl")} - {None}
    return any(path.with_name(f"meta_{str(name).partition('.')[0]}.jsonl{gz}").is_file()
               for name in names for gz in ("", ".gz"))  # fmt: skip


def _files(path: Path, items: str | PathLike[str] | None) -> tuple[Path, Path]:
    """The files of reviews and of products."""
    if path.is_dir():
        meta = Path(items) if items is not None else one_file(path, META_FILES)
        if meta is None or not meta.is_file():
            raise FileNotFoundError(f"{meta or path}: expected a file like {' or '.join(META_FILES)}, found none")
        category = meta.name.removeprefix("meta_").partition(".")[0]
        patterns = [pattern.format(category) for pattern in REVIEWS]
        reviews = one_file(path, patterns)
        if reviews is None:
            reviews = one_file(path, [f"{category}.test.csv", f"{category}.test.csv.gz"])
        if reviews is None:
            raise FileNotFoundError(f"{path}: expected one of {', '.join(patterns)} beside {meta.name}, found none")
    else:
        reviews = path
        category = reviews.name.partition(".")[0]
        meta = Path(items) if items is not None else one_file(path.parent, [f"meta_{category}.jsonl*"])
        if meta is None or not meta.is_file():
            raise FileNotFoundError(f"{meta or path}: expected meta_{category}.jsonl[.gz] beside it, found none")
    part = reviews.name.split(".")[1:2]
    if part and part[0] in _PARTS:
        raise ValueError(
            f"{reviews}: expected all reviews of {category} in one file, got a part of a split; give {category}.csv of "
            "the folder rating_only, and split it by time or leave the last ones out"
        )
    return reviews, meta


def _category(path: Path, ending: str) -> str | None:
    """The name of a file with this ending, without it."""
    name = path.name.removesuffix(".gz")
    return name.removesuffix(ending) if name.endswith(ending) else None


def _json(path: Path, item_field: str) -> Iterator[tuple[str, str, int, float]]:
    expected = f"an object with text as user_id and {item_field}, an integer as timestamp and a number as rating"
    for number, record in read_objects(path, ("user_id", item_field, "timestamp", "rating")):
        user, item, time = record.get("user_id"), record.get(item_field), record.get("timestamp")
        rating: Any = record.get("rating")
        if not isinstance(user, str) or not isinstance(item, str) or type(time) is not int or not _is_rating(rating):
            malformed(path, number, expected, f"{user!r}, {item!r}, {time!r}, {rating!r}")
        if abs(time) >= 1 << 62:
            malformed(path, number, "milliseconds since 1970 as timestamp", repr(time))
        check_id(path, number, "user_id", user)
        yield user, check_id(path, number, item_field, item), time, float(rating)


def _csv(path: Path, item_field: str) -> Iterator[tuple[str, str, int, float]]:
    rows = read_quoted(path, ",")
    names = ("user_id", item_field, "timestamp", "rating")
    _, header = next(rows, (1, [""]))
    columns = columns_of(path, header, names, names)
    for number, values in equally_long(path, rows, len(header)):
        user, item, time, rating = (values[column or 0] for column in columns)
        milliseconds = number_of(path, number, "timestamp", time)
        if not isinstance(milliseconds, int):
            malformed(path, number, "milliseconds since 1970 as timestamp", time)
        check_id(path, number, "user_id", user)
        yield (
            user,
            check_id(path, number, item_field, item),
            milliseconds,
            float(number_of(path, number, "rating", rating)),
        )


def _is_rating(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value)
