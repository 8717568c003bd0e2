# SPDX-License-Identifier: Apache-2.0
"""What a history is under `Experts`, written row by row from the rule, and what a layout says of the same rows."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

import patchkern as pk

N_ITEMS = 12
TITLES = [[item % 5 + 1] * (item % 3 + 1) + [item + 20] for item in range(N_ITEMS)]
CATALOG = pk.Catalog.from_token_ids(np.concatenate(TITLES), np.cumsum([0, *map(len, TITLES)]))
PROMPT = pk.Prompt(prefix=[100, 101], separator=[102], suffix=[103, 104], response_end=[105])
IDS = [110, 111, 112]
TEXT, PATCH, SESSIONS = pk.TextOnly(None), pk.ItemPatches(0, None), pk.SessionPatches(2, None, align="start")
TAIL, NO_TEXT = pk.ItemPatches(2, None), pk.SessionPatches(2, None, align="start", keep_text=0, keep_items=1)

POLICIES: dict[str, pk.Experts] = {
    "one, items": pk.Experts(PATCH, count=2, keep=3, block=4, boundaries=None),
    "one, text": pk.Experts(TEXT, count=1, keep=1, block=3, boundaries=None),
    "one, nothing kept": pk.Experts(PATCH, count=2, keep=0, block=3, boundaries=None),
    "one, text last": pk.Experts(TAIL, count=3, keep=3, block=5, boundaries=None),
    "one, sessions": pk.Experts(SESSIONS, count=2, keep=2, block=4, boundaries=None),
    "one, sessions without text": pk.Experts(NO_TEXT, count=2, keep=2, block=4, boundaries=None),
    "one, two forms": pk.Experts(PATCH, recent=TEXT, count=2, keep=2, block=4),
    "one, sessions and text": pk.Experts(SESSIONS, recent=TAIL, count=1, keep=3, block=2),
    "one, drawn": pk.Experts(PATCH, count=2, keep=2, block=3, boundaries=1, seed=5),
    "one, none": pk.Experts(PATCH, count=0, keep=2, block=3, boundaries=None),
    "blocks, items": pk.Experts(PATCH, count=2, block=4, parts="blocks"),
    "blocks, text": pk.Experts(TEXT, count=1, block=3, parts="blocks"),
    "blocks, sessions": pk.Experts(SESSIONS, count=2, block=4, parts="blocks"),
    "blocks, sessions without text": pk.Experts(PATCH, recent=NO_TEXT, count=1, block=4, parts="blocks"),
    "blocks, two forms": pk.Experts(PATCH, recent=TEXT, count=2, block=3, parts="blocks"),
    "blocks, none": pk.Experts(PATCH, count=0, block=3, parts="blocks"),
}


def prompt_of(policy: pk.Experts, prompt: pk.Prompt = PROMPT) -> pk.Prompt:
    first = max(IDS[0], prompt.max_token_id + 1)
    return prompt.with_special(experts=range(first, first + policy.count))


class Row(NamedTuple):
    """One row as the rule has it: what it is made of, where it stands, and which earlier rows it sees."""

    content: tuple[Any, ...]
    position: int
    sees: tuple[int, ...]


def rows_of(
    items: list[int], policy: pk.Experts, catalog: pk.Catalog, prompt: pk.Prompt, ending: list[int], full: bool = False
) -> list[Row]:
    """A user's rows in the order in which they are read; ``ending``: tokens after the history.

    ``full``: nothing is compressed, whatever the policy says of old items.
    """
    old, block = 0, policy.block
    while len(items) - old - block >= policy.least_recent and not full:
        old += block
    size = block if policy.parts == "blocks" else old
    segments = [(begin, begin + size, True) for begin in range(0, old, size or 1)]
    segments.append((old, len(items), False))
    if policy.count == 0 and not full:
        segments = segments[-1:]
    rows: list[Row] = []
    position, bank = 0, []  # rows that everything later sees
    for token in prompt.prefix:
        rows.append(Row(("token", token), position, tuple(range(len(rows)))))
        bank.append(len(rows) - 1)
        position += 1
    for begin, end, compressed in segments:
        own: list[int] = []
        contents: list[tuple[Any, ...]] = []
        for nth, entry in enumerate(entries_of(items[begin:end], policy, compressed)):
            if nth:
                contents += [("token", token) for token in prompt.separator]
            contents += entry_contents(entry, catalog)
        if not compressed:
            contents += [("token", token) for token in ending]
        experts = [("token", token) for token in prompt.experts[: policy.count]] if compressed else []
        for content in contents + experts:
            rows.append(Row(content, position, (*bank, *own)))
            own.append(len(rows) - 1)
            position += 1
        bank += own[len(contents) :]
    return rows


def entries_of(items: list[int], policy: pk.Experts, compressed: bool) -> list[tuple[str, list[int]]]:
    """Text and patches of a part."""
    inner = policy.policy if compressed else policy.recents
    if isinstance(inner, pk.SessionPatches):
        g, n = inner.group_size, len(items)
        text, patches = (g if kept is None else kept for kept in (inner.keep_text, inner.keep_items))
        pooled = n if compressed else max(n - text - patches, 0) // g * g
        entries = [("patch", items[at : at + g]) for at in range(0, pooled, g)]
        border = max(n - text, pooled)
        return entries + [("patch", [i]) for i in items[pooled:border]] + [("text", [i]) for i in items[border:]]
    if isinstance(inner, pk.TextOnly):
        return [("text", [item]) for item in items]
    tail = 0 if compressed else inner.keep_text
    patched = max(len(items) - tail, 0)
    return [("patch", [item]) for item in items[:patched]] + [("text", [item]) for item in items[patched:]]


def entry_contents(entry: tuple[str, list[int]], catalog: pk.Catalog) -> list[tuple[Any, ...]]:
    kind, items = entry
    if kind == "patch":
        return [("patch", *items)]
    begin, end = catalog.inputs.offsets[items[0] : items[0] + 2]
    return [("token", int(token)) for token in catalog.inputs.token_ids[begin:end]]


def signatures(rows: list[Row]) -> list[int]:
    """A hash of everything that decides what a model makes of each row."""
    found: list[int] = []
    for row in rows:
        found.append(hash((row.content, row.position, tuple(sorted(found[seen] for seen in row.sees)))))
    return found


def rows_in(layout: pk.PatchLayout) -> list[Row]:
    """A layout's rows; what each sees is numbered over all of them, and may come later."""
    cu_seqlens = layout.cu_seqlens.tolist()
    ranges = np.zeros((layout.num_users, 0, 2)) if layout.ranges is None else layout.ranges.numpy()
    rows = []
    for span, (begin, end) in enumerate(zip(cu_seqlens, cu_seqlens[1:], strict=False)):
        shared = [row for low, high in ranges[span].tolist() for row in range(int(low), int(high))]
        assert len(set(shared)) == len(shared)
        for row in range(begin, end):
            low, high = int(layout.lo[row]), int(layout.hi[row])
            titles = layout.title_index[layout.items[low:high].long()].tolist() if low >= 0 else []
            content = ("token", -1 - low) if low < 0 else ("patch", *titles)
            rows.append(Row(content, int(layout.position_ids[row]), (*shared, *range(begin, row))))
    return rows


def layout_signatures(layout: pk.PatchLayout) -> list[int]:
    """`signatures` of a layout's rows, in its order."""
    rows = rows_in(layout)
    found: dict[int, int] = {}
    waiting = list(range(len(rows)))
    while waiting:
        left = []
        for row in waiting:
            if all(seen in found for seen in rows[row].sees):
                own = rows[row]
                found[row] = hash((own.content, own.position, tuple(sorted(found[seen] for seen in own.sees))))
            else:
                left.append(row)
        assert len(left) < len(waiting), "rows that see each other"
        waiting = left
    return [found[row] for row in range(len(rows))]
