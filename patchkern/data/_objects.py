# SPDX-License-Identifier: Apache-2.0
"""The one way to read an object per line: JSON, or the literal of a Python dictionary, which is never run."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from patchkern.data._text import malformed, read_lines

# as it would be written again: "007" and 7 are not the same id
_INTEGER = re.compile(r"0|[1-9][0-9]{0,17}", re.ASCII)
_LITERAL = re.compile(r"""[uU]?(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")""")
_BETWEEN = re.compile(r"[\s{}\[\](),:.+\-\w]*", re.ASCII)
# Python's parser may fail for good on thousands of brackets, or of signs, within each other
_MOST_BRACKETS = 200
_SIGNS = re.compile(r"[-+]\s*[-+]")


def read_objects(path: Path, fields: tuple[str, ...], *, python: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """The line number and the object of every line.

    Args:
        path: plain or gzip.
        fields: none of these may be in an object twice.
        python: lines may be literals of dictionaries instead, as Python prints them.

    Raises:
        ValueError: a line that is neither, or with a field twice.
    """
    names = [f'"{field}"' for field in fields]
    for number, line in read_lines(path):
        if python and line.lstrip().removeprefix("{").lstrip()[:1] not in ('"', "}"):
            yield number, _literal(path, number, line, fields)
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # a number of thousands of digits, brackets in brackets in brackets
            record = None
        if not isinstance(record, dict):
            malformed(path, number, "one JSON object", line)
        if any(line.count(name) > 1 for name in names):
            pairs = json.loads(line, object_pairs_hook=_Pairs)
            _check_once(path, number, line, fields, [key for key, _ in pairs])
        yield number, record


def integer_id(name: str, value: Any) -> int:
    """An id that is an integer, or the text of one.

    Raises:
        TypeError, ValueError: another.
    """
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise TypeError(f"{name} {value!r}")
    if not _INTEGER.fullmatch(str(value)):
        raise ValueError(f"{name} {value!r}")
    return int(value)


class _Pairs(list[Any]):
    """The members of a JSON object, those of the same name too."""


def _literal(path: Path, number: int, line: str, fields: tuple[str, ...]) -> dict[str, Any]:
    between = _LITERAL.sub("", line)
    brackets = sum(map(between.count, "([{"))
    tree: ast.expr | None = None
    record: Any = None
    try:
        if brackets > _MOST_BRACKETS or _SIGNS.search(between) or not _BETWEEN.fullmatch(between):
            raise ValueError
        tree = ast.parse(line.strip(), mode="eval").body
        record = ast.literal_eval(tree)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        record = None
    if not isinstance(tree, ast.Dict) or record is None or not all(isinstance(key, str) for key in record):
        malformed(path, number, "one JSON object, or the literal of a Python dictionary", line)
    _check_once(path, number, line, fields, [key.value for key in tree.keys if isinstance(key, ast.Constant)])
    return record


def _check_once(path: Path, number: int, line: str, fields: tuple[str, ...], keys: list[Any]) -> None:
    twice = [field for field in fields if keys.count(field) > 1]
    if twice:
        malformed(path, number, f"one {twice[0]}", line)
