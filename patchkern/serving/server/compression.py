# SPDX-License-Identifier: Apache-2.0
"""How a history was compressed, for people."""

from __future__ import annotations

from patchkern.batch.experts import Experts
from patchkern.batch.histories import Histories
from patchkern.batch.policy_kinds import AnyPolicy, Level, cut, levels_of
from patchkern.batch.preference_memory import PreferenceMemory
from patchkern.serving.server.schema import Compressed, Entry, Item
from patchkern.serving.server.served import Served

_KINDS = {Level.TEXT: "text", Level.PATCH: "item", Level.DROP: "dropped"}


def compressed(served: Served, history: Histories) -> Compressed:
    """Of one user: which items became what, oldest first, and how many rows that took."""
    kept = cut(history, served.policy)
    policy, old, learned = _recent_part(served.policy, kept)
    index = served.model.catalog.index_of(kept.items, "histories")
    tokens = served.model.catalog.inputs.lengths[index]
    items = [Item(item=served.model.catalog.item_ids.item(at), title=served.titles[at]) for at in index.tolist()]
    entries: list[Entry] = []
    if old:
        of_old = Entry(kind="memory", rows=learned, tokens=int(tokens[:old].sum()), items=items[:old])
        entries.append(of_old if learned else of_old.model_copy(update={"kind": "dropped"}))
    recent = kept.between([0], [old], kept.lengths)
    levels = levels_of(policy, recent, tokens[old:], served.model.prompt)
    for level, item, length in zip(levels.tolist(), items[old:], tokens[old:].tolist(), strict=True):
        if level == Level.JOIN:
            session = entries[-1]
            session.kind, session.tokens = "session", session.tokens + length
            session.items.append(item)
            continue
        rows = {Level.TEXT: length, Level.PATCH: 1}.get(level, 0)
        entries.append(Entry(kind=_KINDS[Level(level)], rows=rows, tokens=length, items=[item]))  # type: ignore[arg-type]
    read = [entry for entry in entries if entry.kind != "dropped"]
    all_tokens, all_rows = sum(entry.tokens for entry in read), sum(entry.rows for entry in read)
    return Compressed(
        given=len(history.items),
        items=sum(len(entry.items) for entry in read),
        tokens=all_tokens,
        rows=all_rows,
        ratio=all_tokens / all_rows if all_rows else 1.0,
        prompt_rows=int(served.rows(history, served.search)[0][0]),
        entries=entries,
    )


def _recent_part(policy: AnyPolicy, history: Histories) -> tuple[AnyPolicy, int, int]:
    """The policy of recent items, how many are old, and how many learned rows stand for these."""
    if isinstance(policy, Experts):
        cuts = policy.cuts(history.lengths)
        return policy.recents, int(cuts[0]), policy.count * int(policy.compressed_parts(cuts)[0])
    if isinstance(policy, PreferenceMemory):
        cuts = policy.absorbed(history.lengths)
        return policy.policy, int(cuts[0]), int(policy.memory_rows(cuts)[0])
    return policy, 0, 0
