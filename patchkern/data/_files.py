# SPDX-License-Identifier: Apache-2.0
"""Reading text files line by line, with the file and the line in every complaint."""

from __future__ import annotations

import gzip
import io
import logging
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

logger = logging.getLogger("patchkern.data")

_GZIP_MAGIC = b"\x1f\x8b"
_LINES_AT_ONCE = 1 << 16
_MAX_SHOWN = 120
# Beyond this a float64 no longer tells neighbouring integers apart.
_MAX_EXACT = float(1 << 53)


def malformed(path: Path, line: int, expected: str, got: str) -> NoReturn:
    """Raise the one error that every reader raises for a line it cannot read."""
    shown = repr(got if len(got) <= _MAX_SHOWN else got[:_MAX_SHOWN] + "...")
    raise ValueError(f"{path}, line {line}: expected {expected}, got {shown}")


def read_lines(path: Path, encoding: str = "utf-8") -> Iterator[tuple[int, str]]:
    """``(line number from 1, line without its end)`` of a text file, plain or gzip; blank lines are skipped.

    The file is streamed.

    Raises:
        ValueError: bytes that are not ``encoding``, or a damaged gzip file.
    """
    with open(path, "rb") as raw:
        packed = raw.read(2) == _GZIP_MAGIC
    number = 0
    with gzip.open(path, "rb") if packed else open(path, "rb") as stream:
        try:
            for line in io.BufferedReader(stream, 1 << 20):
                number += 1
                try:
                    text = line.decode(encoding).rstrip("\r\n")
                except UnicodeDecodeError as error:
                    malformed(path, number, f"{encoding} text", str(error))
                if text.strip():
                    yield number, text
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path}: expected a whole gzip file, damaged after line {number}: {error}") from error


def guess_encoding(path: Path) -> str:
    """UTF-8 where the whole file is valid UTF-8, else latin-1: older MovieLens files are latin-1, newer ones UTF-8."""
    try:
        for _ in read_lines(path):
            pass
    except ValueError:
        return "latin-1"
    return "utf-8"


def read_numbers(path: Path, separator: str, columns: Sequence[str], skip: int = 0) -> dict[str, NDArray[np.float64]]:
    """Read a file of numbers only, ``columns`` by ``columns``, as float64 (exact for integers below 2^53).

    Args:
        separator: what stands between two values, of any length.
        columns: the names of all columns.
        skip: header lines to pass over.

    Raises:
        ValueError: the first line that does not hold exactly one finite number per column.
    """
    blocks = []
    lines = islice(read_lines(path, "ascii"), skip, None)
    while numbered := list(islice(lines, _LINES_AT_ONCE)):
        blocks.append(_block(path, numbered, separator, columns))
    table = np.concatenate(blocks) if blocks else np.zeros((0, len(columns)))
    return {name: table[:, i] for i, name in enumerate(columns)}


def as_integers(path: Path, name: str, values: NDArray[np.float64]) -> NDArray[np.int64]:
    """A column of whole numbers as int64.

    Raises:
        ValueError: a fraction, or a number too large to be exact.
    """
    wrong = np.flatnonzero((values != np.floor(values)) | (np.abs(values) > _MAX_EXACT))
    if wrong.size:
        raise ValueError(f"{path}, row {wrong[0] + 1}: expected a whole number as {name}, got {values[wrong[0]]}")
    return values.astype(np.int64)


def one_file(folder: Path, patterns: Iterable[str]) -> Path | None:
    """The only file in ``folder`` that matches one of the patterns, None if there is none.

    Raises:
        ValueError: several.
    """
    found = sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise ValueError(f"{folder}: expected one file like {' or '.join(patterns)}, got {names}")
    return found[0] if found else None


def canonical_ids(ids: Sequence[str]) -> NDArray[Any] | None:
    """``ids`` as int64 if each is written as an integer is (no sign, no leading zero), else None."""
    if all(i.isascii() and i.isdigit() and len(i) < 19 and (i[0] != "0" or i == "0") for i in ids):
        return np.array([int(i) for i in ids], np.int64)
    return None


def _block(path: Path, numbered: list[tuple[int, str]], separator: str, columns: Sequence[str]) -> NDArray[np.float64]:
    try:
        lines = [line.replace(separator, "\t") for _, line in numbered]
        block = np.loadtxt(lines, delimiter="\t", comments=None, ndmin=2)
        if block.shape == (len(numbered), len(columns)) and np.isfinite(block).all():
            return block
    except ValueError:
        pass
    expected = f"{len(columns)} numbers ({', '.join(columns)}) separated by {separator!r}"
    for number, line in numbered:
        try:
            values = [float(value) for value in line.split(separator)]
        except ValueError:
            malformed(path, number, expected, line)
        if len(values) != len(columns) or not np.isfinite(values).all():
            malformed(path, number, expected, line)
    raise ValueError(f"{path}, lines {numbered[0][0]} to {numbered[-1][0]}: expected {expected}")
