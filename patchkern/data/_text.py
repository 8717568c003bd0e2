# SPDX-License-Identifier: Apache-2.0
"""The one way to open text: line by line, with the file and the line in every complaint."""

from __future__ import annotations

import codecs
import gzip
import io
import logging
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NoReturn

from patchkern.batch.columns import MAX_ID_LENGTH

logger = logging.getLogger("patchkern.data")

# A few kilobytes of gzip can hold a line of gigabytes.
MAX_LINE = 1 << 20

_GZIP_MAGIC = b"\x1f\x8b"
_MAX_SHOWN = 120
_MARK = "\ufeff"
# UTF-32 first: its little-endian mark begins with that of UTF-16
_OTHER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_SURROGATES = re.compile("[\udc80-\udcff]+")
_NO_LETTERS = re.compile(rb"[\x80-\x9f]")


def malformed(path: Path, line: int, expected: str, got: str) -> NoReturn:
    """Raise the one error that every reader raises for a line it cannot read."""
    shown = repr(got if len(got) <= _MAX_SHOWN else got[:_MAX_SHOWN] + "...")
    raise ValueError(f"{path}, line {line}: expected {expected}, got {shown}")


def check_id(path: Path, line: int, name: str, text: str) -> str:
    """An id as it is written, without white space around it, which a reader of its own would take for another id."""
    if not text or text != text.strip() or len(text) > MAX_ID_LENGTH or "\ufeff" in text:
        malformed(path, line, f"a {name} of 1 to {MAX_ID_LENGTH} characters without space around it", text)
    return text


def log_left_out(path: Path | str, counts: dict[str, int]) -> None:
    """One warning of the interactions that a reader left out, by reason."""
    reasons = [f"{count} {reason}" for reason, count in counts.items() if count]
    if reasons:
        logger.warning("%s: interactions left out: %s", path, ", ".join(reasons))


def read_lines(path: Path, *, latin1: bool = False) -> Iterator[tuple[int, str]]:
    """``(line number from 1, line without its end)`` of a text file, plain or gzip; empty lines are skipped.

    The file is streamed. A byte-order mark at its beginning is skipped.

    Args:
        latin1: lines that are not UTF-8 are latin-1, as in older files of some formats. A file that has both is read
            line by line, and a warning names how many lines are which.

    Raises:
        ValueError: a line in another encoding, too long, or with a carriage return or a byte-order mark within; a
            damaged gzip file.
    """
    return ((number, line.rstrip("\n")) for number, line in raw_lines(path, latin1=latin1) if line.strip(" \n"))


def raw_lines(path: Path, *, latin1: bool = False) -> Iterator[tuple[int, str]]:
    """As `read_lines`, every line, ended by a line feed unless it is the last: for what may go on over line ends."""
    old = new = first_old = 0
    for number, raw in _byte_lines(path):
        if b"\0" in raw:
            expected = "UTF-8 text without NUL characters (is it UTF-16, or no text?)"
            malformed(path, number, expected, raw.decode("latin-1").rstrip("\n"))
        try:
            line = raw.decode()
        except UnicodeDecodeError as error:
            if not latin1:
                malformed(path, number, "UTF-8 text", str(error))
            line = _from_latin1(path, number, raw)
            old, first_old = old + 1, first_old or number
        else:
            new += not line.isascii()
        if _MARK in line:
            if number == 1 and line[0] == _MARK:
                line = line[1:]
            if line.startswith(_MARK):
                malformed(path, number, "a byte-order mark at the beginning of the file only", line.rstrip("\n"))
        line = line[:-2] + "\n" if line.endswith("\r\n") else line
        if "\r" in line:
            malformed(path, number, "lines that end in a line feed, without carriage returns within", line.rstrip("\n"))
        yield number, line
    if old and new:
        logger.warning(
            "%s: %d lines are latin-1, the first is %d, and %d are UTF-8; each was read as what it is",
            path, old, first_old, new,
        )  # fmt: skip


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


def _byte_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with open(path, "rb") as raw:
        packed = raw.read(2) == _GZIP_MAGIC
    number = 0
    with gzip.open(path, "rb") if packed else open(path, "rb") as stream:
        try:
            lines = io.BufferedReader(stream, 1 << 20)
            while line := lines.readline(MAX_LINE + 1):
                number += 1
                if number == 1:
                    other = next((name for mark, name in _OTHER_MARKS.items() if line.startswith(mark)), None)
                    if other is not None:
                        raise ValueError(f"{path}: expected UTF-8 text, got the byte-order mark of {other}")
                if len(line) > MAX_LINE:
                    raise ValueError(f"{path}, line {number}: expected at most {MAX_LINE} bytes, got more")
                yield number, line
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path}: expected a whole gzip file, damaged after line {number}: {error}") from error


def _from_latin1(path: Path, number: int, raw: bytes) -> str:
    if _SURROGATES.sub("", raw.decode("utf-8", "surrogateescape")).isascii() and not _NO_LETTERS.search(raw):
        return raw.decode("latin-1")
    malformed(path, number, "a line that is UTF-8 or latin-1 throughout", raw.decode("latin-1").rstrip("\n"))
