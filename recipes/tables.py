# SPDX-License-Identifier: Apache-2.0
"""Tables of what is reported."""

from __future__ import annotations

from collections.abc import Sequence


def markdown_table(rows: Sequence[Sequence[str]], left: bool = False) -> list[str]:
    """A Markdown table, the first row its header, that is also readable in a terminal; numbers stand right."""
    widths = [max(3, *(len(row[column]) for row in rows)) for column in range(len(rows[0]))]
    cells = [
        [cell.ljust(width) if left or not column else cell.rjust(width) for column, (cell, width) in
         enumerate(zip(row, widths, strict=True))]
        for row in rows
    ]  # fmt: skip
    rule = ["-" * width if left or not column else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    return ["| " + " | ".join(row) + " |" for row in [cells[0], rule, *cells[1:]]]
