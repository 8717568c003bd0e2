# SPDX-License-Identifier: Apache-2.0
"""Lists and targets in the format of TREC, which ranx, ir-measures, pytrec_eval and trec_eval read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import ArrayLike

from patchkern.batch.columns import id_array
from patchkern.batch.histories import Histories
from patchkern.evaluation.lists import are_lists, items_of


def write_run(
    path: str | os.PathLike[str],
    recommendations: Sequence[Sequence[Any]],
    queries: ArrayLike | None = None,
    tag: str = "patchkern",
) -> None:
    """Write lists as a run: a line ``query Q0 item rank score tag`` per entry.

    The score only repeats the order, ``1 / rank``: those tools sort by it, and have their own way with equal ones. They
    count items; `patchkern.evaluation.evaluate` takes items of one title for each other.

    Args:
        path: written under a temporary name and renamed.
        recommendations: as in `patchkern.evaluation.evaluate`.
        queries: ``(B,)`` distinct ids of the samples; None: 0, 1, ...
        tag: names the recommender.

    Raises:
        TypeError, ValueError: ids or a tag with white space, which the format has no room for, or not one per list; an
            item twice in a list.
    """
    names = _names("queries", queries, len(recommendations))
    (label,) = check_words("tag", [tag])
    lines = (
        f"{name} Q0 {item} {rank} {1 / rank:.9g} {label}"
        for user, (name, row) in enumerate(zip(names, recommendations, strict=True))
        for rank, item in enumerate(_distinct(items_of(row, user), user), 1)
    )
    _write(Path(path), lines)


def write_qrels(
    path: str | os.PathLike[str], targets: ArrayLike | Sequence[Any], queries: ArrayLike | None = None
) -> None:
    """Write what users took as relevance judgements: a line ``query 0 item 1`` per target.

    Args:
        path, queries: as in `write_run`.
        targets: one item id per sample, or a sequence of them.

    Raises:
        TypeError, ValueError: as of `write_run`.
    """
    each: Any = targets if are_lists(targets) else id_array(targets, "targets").reshape(-1, 1)
    lists = Histories.coerce(each, "targets")
    names = _names("queries", queries, len(lists))
    words = (check_words("items", row.tolist()) for row in lists)
    _write(Path(path), (f"{name} 0 {item} 1" for name, row in zip(names, words, strict=True) for item in row))


def check_words(argument: str, ids: Iterable[Any]) -> list[str]:
    """Ids as text, none of them empty or with white space.

    Raises:
        ValueError: there is one; the message names ``argument``.
    """
    words = [str(word) for word in ids]
    wrong = next((word for word in words if len(word.split()) != 1 or word != word.strip()), None)
    if wrong is not None:
        raise ValueError(f"{argument}: expected ids without white space for a file of TREC, got {wrong!r}")
    return words


def _names(argument: str, ids: ArrayLike | None, count: int) -> list[str]:
    names = check_words(argument, range(count) if ids is None else id_array(ids, argument).tolist())
    if len(names) != count or len(set(names)) != count:
        raise ValueError(f"{argument}: expected {count} distinct ids, one per list, got {len(set(names))}")
    return names


def _distinct(items: list[Any], user: int) -> list[str]:
    words = check_words("items", id_array(items, f"recommendations[{user}]").tolist())
    if len(set(words)) < len(words):
        again = next(word for place, word in enumerate(words) if word in words[:place])
        raise ValueError(
            f"recommendations[{user}]: expected distinct items, as a run ranks each once, got {again!r} again"
        )
    return words


def _write(path: Path, lines: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(f"{line}\n" for line in lines)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
