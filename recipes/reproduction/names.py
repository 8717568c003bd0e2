# SPDX-License-Identifier: Apache-2.0
"""The names of tables, figures, systems and trainings."""

from __future__ import annotations

from dataclasses import dataclass

TABLES = ("1", "2", "3", "4", "all")
FIGURES = ("1", "2", "5", "6", "7", "8")
FORMS = {
    "paper": "the published search and counting, seen items allowed",
    "allowed": "by item, seen items allowed",
    "left_out": "by item, seen items left out",
}
PEERS = ("gru4rec", "caser", "sasrec", "linrec", "mamba4rec")
YARDSTICKS = ("popular", "transitions", "transitions-prior", "linear-prior")
PRIORS = ("transitions", "linear")
KEEP_TEXT = (1, 5, 10, 20)
GROUP_SIZES = (5, 10, 20)
LATEST = (5, 10, 20, 50)

LABELS = {
    "popular": "most popular",
    "transitions": "transitions",
    "transitions-prior": "`TransitionPrior` alone",
    "linear-prior": "`LinearPrior` alone",
    "text": "text (Vanilla)",
    "pretrain": "patch pre-training, read as item patches",
    "items": "item patches (PatchRec-I)",
    "sessions": "session patches (PatchRec-S)",
    "items-direct": "item patches, no pre-training",
    "sessions-direct": "session patches, no pre-training",
    "items-longer": "item patches, no pre-training, as many passes",
    "sessions-longer": "session patches, no pre-training, as many passes",
    "dropout": "text, older items dropped at random",
    "latest": "text, latest items alone",
}


@dataclass(frozen=True)
class Training:
    """A stage: the one that it starts from, and by how many epochs it is longer than others."""

    name: str
    stage: str
    start: str | None = None
    times: float = 1.0
    keep_text: int | None = None
    group_size: int | None = None
    max_items: int | None = None
    dropped: float | None = None


# In patch pre-training each sample is fed twice: a pass as text and one with patches.
TRAININGS = {
    "text": Training("text", "sft"),
    "pretrain": Training("pretrain", "pretrain"),
    "items": Training("items", "items", "pretrain"),
    "sessions": Training("sessions", "sessions", "pretrain"),
    "items-direct": Training("items-direct", "items"),
    "sessions-direct": Training("sessions-direct", "sessions"),
    "items-longer": Training("items-longer", "items", times=3.0),
    "sessions-longer": Training("sessions-longer", "sessions", times=3.0),
}

OURS = (*TRAININGS, "dropout", "latest")


def label(system: str) -> str:
    """What a table calls it."""
    if system in LABELS:
        return LABELS[system]
    name, _, latest = system.partition("@")
    if latest:
        return f"{label(name)}, latest {latest}"
    for setting, told in (("-paper", "as in the paper"), ("-tuned", "trained well")):
        if system.endswith(setting):
            return f"{_PEER_NAMES.get(system.removesuffix(setting), system.removesuffix(setting))}, {told}"
    for kind, told in (("items-keep", "item patches, latest {} as text"), ("sessions-group", "sessions of {} items")):
        if system.startswith(kind):
            return told.format(system.removeprefix(kind))
    return system


_PEER_NAMES = {
    "gru4rec": "GRU4Rec",
    "caser": "Caser",
    "sasrec": "SASRec",
    "linrec": "LinRec",
    "mamba4rec": "Mamba4Rec",
    "morec": "MoRec",
}
