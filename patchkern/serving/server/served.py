# SPDX-License-Identifier: Apache-2.0
"""The model that is served, with its catalogue: what one reload replaces by another."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from patchkern.batch.expert_layout import expert_row_counts
from patchkern.batch.experts import Experts
from patchkern.batch.histories import Histories
from patchkern.batch.memory_layout import MemoryRowCounts, memory_row_counts
from patchkern.batch.policy_kinds import AnyPolicy
from patchkern.batch.preference_memory import PreferenceMemory
from patchkern.batch.row_counts import row_counts
from patchkern.models.files import read_description
from patchkern.models.folders import current
from patchkern.models.item_model import ItemModel
from patchkern.models.patched_lm import PatchedCausalLM
from patchkern.models.recurrent import RecurrentMemory
from patchkern.ops.backends import usable_device
from patchkern.search.protocol import SearchModel, policy_of
from patchkern.search.user_cache import UserCache
from patchkern.serving.server.catalog_source import read_catalog
from patchkern.serving.server.kept_users import KeptUsers
from patchkern.serving.server.priors import PriorFiles, Priors
from patchkern.serving.server.titles import TitleIndex
from patchkern.serving.user_states import UserStates
from patchkern.training.checkpoints import find_model

SEARCHES = {"items": "items", "beam": "titles"}  # the fast one first, and what a model must have learned for each

_numbers = itertools.count(1)


class Served:
    """A model and what is kept beside it.

    Args:
        model: with a policy.
        cache_bytes: for the prompts of users who give their ``user_id``; 0: none are kept.
        search: where a request does not say; the item head where the model has one, else titles.
        states: the compressed users of a model with experts or a memory, by their ``user_id``; None: none are kept.
        priors: what every list goes by beside the model.

    Attributes:
        number: 1, 2, ... in the order in which models were read.
        titles: one per item, in catalogue order; the ids where the catalogue has none.

    Raises:
        ValueError: a model without policy, or one that cannot be searched like that.
    """

    def __init__(
        self,
        model: SearchModel,
        cache_bytes: int = 0,
        search: str | None = None,
        states: UserStates | None = None,
        priors: Priors | None = None,
    ) -> None:
        self.number = next(_numbers)
        self.model = model
        self.policy: AnyPolicy = policy_of(model, None)
        able = {"items": model.item_head is not None, "beam": "titles" in model.learns}
        self.searches = tuple(name for name in SEARCHES if able[name])
        if search is not None and search not in self.searches:
            raise ValueError(f"search: expected one of {', '.join(self.searches)} for this model, got {search!r}")
        learned = [name for name in self.searches if SEARCHES[name] in model.learned]
        self.search = search or (learned or self.searches)[0]
        self.cache = UserCache(model, cache_bytes) if cache_bytes else None
        self.states, self.priors = states, priors or Priors()
        catalog = model.catalog
        titles = catalog.item_ids.tolist() if catalog.titles is None else catalog.titles
        self.titles = tuple(str(title).encode("utf-8", "replace").decode() for title in titles)
        self.index = TitleIndex(self.titles)

    def __repr__(self) -> str:
        priors = "".join(f" + {weight:g} {type(prior).__name__}" for prior, weight in zip(*self.priors, strict=True))
        able = " or ".join(self.searches)
        return (
            f"model {self.number}: {type(self.model).__name__}{priors} on {self.model.device}, {self.policy}, "
            f"{len(self.titles):,} items, found by {able}"
        )

    def rows(self, histories: Histories, search: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """``(B,)`` rows that every user's prompt keeps, and those that are computed for its learned rows and dropped.

        Raises:
            TypeError, ValueError: of policies that go by time, or by rows.
        """
        model, head = self.model, "items" if search == "items" else "titles"
        if isinstance(self.policy, Experts):
            counts = expert_row_counts(model.catalog, histories, self.policy, model.prompt, head)
            return counts.read, counts.compressed
        if isinstance(self.policy, PreferenceMemory):
            memory = memory_row_counts(
                model.catalog, histories, self.policy, model.prompt, head, one_time=self._one_time
            )
            return memory.read, memory.absorbed
        rows = row_counts(model.catalog, histories, self.policy, model.prompt)
        return rows - (len(model.prompt.suffix) if head == "items" else 0), np.zeros_like(rows)

    def planned(
        self, rows: NDArray[np.int64], compressed: NDArray[np.int64], items: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64] | MemoryRowCounts, NDArray[np.int64] | None]:
        """What `SearchCost.plan` takes as rows, and beside them.

        Args:
            rows, compressed: ``(B,)`` of `rows`.
            items: ``(B,)`` how many every history has.
        """
        if isinstance(self.policy, PreferenceMemory):
            vectors = self.policy.memory_rows(self.policy.absorbed(items))
            return MemoryRowCounts(rows, compressed, vectors, self._one_time), None
        return rows, compressed if compressed.any() else None

    @property
    def _one_time(self) -> bool:
        return isinstance(self.model, RecurrentMemory) and self.model.one_time


@dataclass(frozen=True)
class Source:
    """Where a model comes from, the first time and at every reload.

    Attributes:
        run: a folder that patchkern saved, or a run of the trainer, whose last checkpoint is taken.
        catalog: a file of titles, see `patchkern.serving.server.catalog_source`; None: the model's own catalogue.
        renamed: "allow" a catalogue in which more than a tenth of the items have other titles.
        device, dtype: as of torch; None: a GPU where there is one, and the dtype that was saved.
        search, cache_bytes: as of `Served`.
        users: where compressed users are kept; None: nowhere.
        priors: files of them; None: there are none.

    Raises:
        ValueError: a device that torch cannot compute on here.
    """

    run: str
    catalog: str | None = None
    renamed: str = "error"
    device: str | None = None
    dtype: str | None = None
    search: str | None = None
    cache_bytes: int = 0
    users: KeptUsers | None = None
    priors: PriorFiles | None = None

    def __post_init__(self) -> None:
        if self.device is not None:
            usable_device(self.device)

    def read(self) -> Served:
        """The model as it is on disk now.

        Raises:
            FileNotFoundError, ImportError, TypeError, ValueError: as of ``from_pretrained``; no policy was saved; a
                prior of another catalogue.
        """
        folder = Path(current(find_model(self.run, "RUN")))
        description = read_description(folder)
        catalog = None if self.catalog is None else read_catalog(self.catalog, folder, description)
        kind: Any = PatchedCausalLM if "titles" in description.learns else ItemModel
        kind = RecurrentMemory if description.memory is not None else kind
        options = {} if self.dtype is None else {"dtype": getattr(torch, self.dtype)}
        model = kind.from_pretrained(folder, catalog, renamed=self.renamed, **options)
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = model.to(device).eval()
        states = None if self.users is None else self.users.of(model)
        priors = None if self.priors is None else self.priors.of(model.catalog)
        return Served(model, self.cache_bytes, self.search, states, priors)
