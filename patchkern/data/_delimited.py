# SPDX-License-Identifier: Apache-2.0
"""The one way to read a table of text: columns by the header's names, as many values in every line, numbers exact."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchkern.data._text import malformed, raw_lines, read_lines

ID = r"(?:0|[1-9][0-9]{0,14})"  # below 2^53, as it would be written again
NUMBER = r"[-+]?(?:[0-9]{1,25}\.?[0-9]{0,25}|\.[0-9]{1,25})(?:[eE][-+]?[0-9]{1,2})?"

_LINES_AT_ONCE = 1 << 16
_LINES_OF_A_ROW = 1000
_INTEGER = re.compile(r"-?[0-9]{1,19}", re.ASCII)
_NUMBER = re.compile(NUMBER, re.ASCII)

NumberedRows = Iterator[tuple[int, list[str]]]


def read_plain(path: Path, separator: str, *, latin1: bool = False) -> NumberedRows:
    """The line number and the values of every line of a format that knows no quotes."""
    return ((number, line.split(separator)) for number, line in read_lines(path, latin1=latin1))


def read_quoted(path: Path, separator: str, *, latin1: bool = False, lenient: bool = False) -> NumberedRows:
    """Separated values, quoted where they hold a separator, a quote or a line end: the first line of each row.

    A quote that is not closed is refused, and so is a value of several lines with a separator in it: these may as well
    be rows of which one begins and another ends with a quote.

    Args:
        lenient: quotes around a part of a value only are text, else they are refused.
    """
    lines = raw_lines(path, latin1=latin1)
    for number, line in lines:
        if '"' not in line:
            if line.strip(" \n"):
                yield number, line.rstrip("\n").split(separator)
            continue
        values = _row([line], separator)
        if values is None and lenient and _closed(line, separator):
            values = line.rstrip("\n").split(separator)
        if values is None:
            values = _row(chain([line], (more for _, more in islice(lines, _LINES_OF_A_ROW))), separator)
        if values is None or any("\n" in value and separator in value for value in values):
            malformed(path, number, "a closing quote for each value that begins with one", line.rstrip("\n"))
        yield number, values


def columns_of(path: Path, header: Sequence[str], wanted: Iterable[str], needed: Iterable[str]) -> list[int | None]:
    """The position of every wanted column in a header, None for one that is missing and not needed.

    Raises:
        ValueError: a needed column is missing, or a wanted one is there twice; the message lists the header.
    """
    for name in needed:
        if name not in header:
            raise ValueError(f"{path}: expected a column {name!r}, got {', '.join(header)}")
    for name in wanted:
        if header.count(name) > 1:
            raise ValueError(f"{path}: expected one column {name!r}, got {', '.join(header)}")
    return [header.index(name) if name in header else None for name in wanted]


def equally_long(path: Path, rows: NumberedRows, count: int | None = None, separator: str = ",") -> NumberedRows:
    """The same rows; one that has not ``count`` values (None: as many as the first) is refused."""
    for number, values in rows:
        count = len(values) if count is None else count
        if len(values) != count:
            malformed(path, number, f"{count} values separated by {separator!r}", separator.join(values))
        yield number, values


def read_numbers(
    path: Path, separator: str, columns: Sequence[str], ids: Sequence[str], *, header: bool
) -> dict[str, NDArray[Any]]:
    """Read columns of numbers: those of ``ids`` as int64, all others as float64.

    Args:
        separator: what stands between two values, of any length; with a comma, values may be quoted.
        columns: names of the columns. Without a header these are all there are, in order.
        header: find the columns by the names in the first line; there may be more.

    Raises:
        ValueError: a missing column; the first line that does not hold exactly one finite number per column, or an id
            that is not written as an integer is.
    """
    lines = read_lines(path)
    names: Sequence[str] = columns
    if header:
        first = next(lines, (1, ""))
        names = next(_split([first], separator))
        if not set(columns) <= set(names):
            malformed(path, first[0], f"a header with {', '.join(columns)}", first[1])
    columns_of(path, names, columns, columns)
    kinds = {names.index(name): ID if name in ids else NUMBER for name in columns}
    expected = f"{len(columns)} numbers ({', '.join(columns)}) separated by {separator!r}"
    if len(names) > len(columns):
        expected = f"{len(names)} values separated by {separator!r}, with numbers as {', '.join(columns)}"
    expected += f", {' and '.join(ids)} without sign, point or leading zero"
    other = f"[^{re.escape(separator[0])}\n]*"
    line = re.escape(separator).join(kinds.get(column, other) for column in range(len(names)))
    wrong = re.compile(f"(?m)^(?!(?:{line})$)", re.ASCII)
    blocks = [np.zeros((len(columns), 0))]
    while numbered := list(islice(lines, _LINES_AT_ONCE)):
        texts = [text for _, text in numbered]
        if separator == "," and any('"' in text for text in texts):
            rows = list(_split(numbered, separator))
            # a comma within quotes would make two values of one
            own = [
                [value if column in kinds and "," not in value else "" for column, value in enumerate(row)]
                for row in rows
            ]
            texts = [",".join(row) for row in own]
        found = wrong.search("\n".join(texts))
        if found:
            number, text = numbered[found.string.count("\n", 0, found.start())]
            malformed(path, number, expected, text)
        values = np.loadtxt(
            texts if len(separator) == 1 else [text.replace(separator, "\t") for text in texts],
            delimiter=separator if len(separator) == 1 else "\t",
            comments=None, usecols=[names.index(name) for name in columns], ndmin=2, unpack=True,
        )  # fmt: skip
        blocks.append(values)
    table = np.concatenate(blocks, axis=1)
    return {
        name: column.astype(np.int64) if name in ids else column for name, column in zip(columns, table, strict=True)
    }


def number_of(path: Path, line: int, name: str, text: str) -> int | float:
    """A number as exact as it is written: an int where it is one, else a finite float."""
    text = text.strip(" ")
    if _INTEGER.fullmatch(text) and abs(int(text)) < 1 << 63:
        return int(text)
    if not _NUMBER.fullmatch(text):
        malformed(path, line, f"a number as {name}", text)
    return float(text)


def number_column(numbers: list[int | float]) -> NDArray[Any]:
    """int64 where all are integers, else float64."""
    return np.array(numbers, np.int64 if all(isinstance(number, int) for number in numbers) else np.float64)


def canonical_ids(ids: Sequence[str]) -> NDArray[np.int64] | None:
    """``ids`` as int64 if each is written as an integer is (no sign, no leading zero), else None."""
    if all(i.isascii() and i.isdigit() and len(i) < 19 and (i[0] != "0" or i == "0") for i in ids):
        return np.array([int(i) for i in ids], np.int64)
    return None


def _row(lines: Iterable[str], separator: str) -> list[str] | None:
    """The values of the first row, None where its quotes are not closed or are around a part of a value."""
    try:
        return next(csv.reader(lines, delimiter=separator, strict=True))
    except csv.Error:
        return None


def _split(numbered: Iterable[tuple[int, str]], separator: str) -> Iterator[list[str]]:
    """The values of lines that end where a row does."""
    for _, line in numbered:
        quoted = separator == "," and '"' in line
        yield (_row([line], separator) or [line]) if quoted else line.split(separator)


def _closed(line: str, separator: str) -> bool:
    """Is no value still within quotes at the line's end?"""
    marked = line.rstrip("\n") + separator + "end"
    return next(csv.reader([marked], delimiter=separator))[-1] == "end"
