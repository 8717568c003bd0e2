# SPDX-License-Identifier: Apache-2.0
"""The paper's numbers, as far as they could be read, and where from."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("paper.json")


@cache
def paper() -> dict[str, Any]:
    """What is in paper.json."""
    found: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return found


def number(table: str, data: str, system: str, measure: str) -> float | None:
    """The paper's, None where it was not found."""
    for entry in paper()["numbers"]:
        if (entry["table"], entry["data"], entry["system"], entry["measure"]) == (table, data, system, measure):
            return float(entry["value"])
    return None


def known(table: str, data: str) -> list[str]:
    """The measures of a table of which at least one number was found."""
    chosen = (entry["measure"] for entry in paper()["numbers"] if (entry["table"], entry["data"]) == (table, data))
    return list(dict.fromkeys(chosen))


def note(table: str, data: str) -> str:
    """What the paper's columns are, and what is not in them."""
    status = paper()["status"]
    ways = {entry["status"] for entry in paper()["numbers"] if (entry["table"], entry["data"]) == (table, data)}
    if not ways:
        return f"Paper: {status['not found']}."
    how = "; ".join(status[way] for way in sorted(ways))
    return f"Paper: {how}. Empty: not found."
