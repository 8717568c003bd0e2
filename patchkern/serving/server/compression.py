# SPDX-License-Identifier: Apache-2.0
"""How a history was compressed, for people."""

from __future__ import annotations

from patchkern.batch.histories import Histories
from patchkern.batch.policies import Level, levels_of
from patchkern.batch.sample_layout import build_layout
from patchkern.serving.server.schema import Compressed, Entry, Item
from patchkern.serving.server.served import Served

_KINDS = {Level.TEXT: "text", Level.PATCH: "item", Level.DROP: "dropped"}


def compressed(served: Served, history: Histories) -> Compressed:
    """Of one user: which items became what, oldest first, and how many rows that took."""
    model, policy = served.model, served.policy
    kept = history.latest(policy.max_items)
    index = model.catalog.index_of(kept.items, "histories")
    tokens = model.catalog.inputs.lengths[index]
    levels = levels_of(policy, kept, tokens, model.prompt)
    entries: list[Entry] = []
    for level, place, length in zip(levels.tolist(), index.tolist(), tokens.tolist(), strict=True):
        item = Item(item=model.catalog.item_ids.item(place), title=served.titles[place])
        if level == Level.JOIN:
            session = entries[-1]
            session.kind, session.tokens = "session", session.tokens + length
            session.items.append(item)
            continue
        rows = {Level.TEXT: length, Level.PATCH: 1}.get(level, 0)
        entries.append(Entry(kind=_KINDS[Level(level)], rows=rows, tokens=length, items=[item]))  # type: ignore[arg-type]
    layout = build_layout(model.catalog, history, policy, model.prompt)
    return Compressed(
        given=len(history.items),
        items=len(kept.items),
        tokens=layout.history_tokens,
        rows=layout.history_rows,
        ratio=layout.compression_ratio,
        prompt_rows=layout.num_rows,
        entries=entries,
    )
