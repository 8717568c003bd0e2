# SPDX-License-Identifier: Apache-2.0
"""Which reader a data set is for, recognised by its file names."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

from patchkern.data import amazon, ebnerd, goodreads, merrec, movielens, parquet, steam, tables
from patchkern.data._text import one_file
from patchkern.data.interactions import Interactions
from patchkern.data.recbole import read_recbole


def open_dataset(path: str | PathLike[str], **options: Any) -> Interactions:
    """Read a data set of any supported format, recognised by its file names.

    Args:
        path: a folder, or the file of interactions in it.
        options: keyword arguments of the format's reader.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: no known format, or several in one folder; the message says what was looked for. Or what the reader
            raises.

    Examples:
        >>> from patchkern.data import open_dataset, synthetic, write_parquet
        >>> write_parquet(synthetic(num_users=50, num_items=40, num_genres=4), "users")
        >>> open_dataset("users").num_users
        50
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"path: expected a folder or file of data, found nothing at {path}")
    folder = path if path.is_dir() else path.parent

    def holds(*names: str) -> bool:
        return path.name in names if path.is_file() else any((path / name).is_file() for name in names)

    known: dict[str, tuple[Any, Callable[..., Interactions], Path]] = {
        "parquet": (holds(parquet.HISTORIES), parquet.read_parquet, folder),
        "two tables": (holds(parquet.INTERACTIONS), tables.read_tables, folder),
        "MovieLens": (holds(*movielens.FILES), movielens.read_movielens, path),
        "RecBole": (path.suffix == ".inter" or (path.is_dir() and one_file(path, ["*.inter"])), read_recbole, path),
        "Goodreads": (_is_goodreads(path), goodreads.read_goodreads, path),
        "Amazon Reviews 2023": (amazon.is_amazon(path), amazon.read_amazon, path),
        "Steam": (steam.is_steam(path), steam.read_steam, path),
        "EB-NeRD": (ebnerd.is_ebnerd(path), ebnerd.read_ebnerd, path),
        "MerRec": (merrec.is_merrec(path), merrec.read_merrec, path),
    }
    found = {name: (read, where) for name, (there, read, where) in known.items() if there}
    if len(found) > 1:
        raise ValueError(f"path: expected one data set in {path}, found {' and '.join(found)}; give the path of a file")
    if not found:
        raise ValueError(
            f"path: expected a data set in {path}, found none of: {parquet.HISTORIES} (parquet), "
            f"{parquet.INTERACTIONS} (two tables), {', '.join(movielens.FILES)} (MovieLens), *.inter (RecBole), "
            f"{goodreads.INTERACTIONS_FILES[0]}[.gz] (Goodreads), {amazon.META_FILES[0]}[.gz] beside the category's "
            f"reviews (Amazon Reviews 2023), {steam.REVIEWS_FILES[0]}[.gz] (Steam), {ebnerd.ARTICLES} beside "
            f"{ebnerd.PARTS[0]}/{ebnerd.BEHAVIORS} (EB-NeRD), 000000000000.parquet (MerRec)"
        )
    ((read, where),) = found.values()
    return read(where, **options)


def _is_goodreads(path: Path) -> bool:
    if path.is_dir():
        return one_file(path, goodreads.INTERACTIONS_FILES) is not None
    return any(path.match(pattern) for pattern in goodreads.INTERACTIONS_FILES)
