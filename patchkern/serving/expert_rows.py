# SPDX-License-Identifier: Apache-2.0
"""Keys and values of users' experts, as `UserStates` keeps them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from patchkern.batch.experts import Experts
from patchkern.batch.histories import Histories
from patchkern.batch.policy_dict import policy_to_dict
from patchkern.budget.search import CHUNKS
from patchkern.search.experts import compress
from patchkern.search.protocol import SearchModel
from patchkern.serving.compressor import Known, Tensors

# of a pass: what a long past takes besides keys and values is then bounded, and no slower
_CHUNK_ROWS = CHUNKS[0]
# of a policy, what does not change what old items are compressed to
_OF_NO_MATTER = {"recent", "boundaries", "seed"}


class ExpertRows:
    """The `patchkern.serving.compressor.Compressor` of `patchkern.Experts`.

    A user's tensors are, layer by layer, the keys and the values of its experts, ``(Hkv, rows, d)``, with ``count``
    rows for each part.
    """

    def __init__(self, model: SearchModel, policy: Experts) -> None:
        policy.check_prompt(model.prompt)
        self._model, self._experts = model, policy
        self.policy = {name: value for name, value in policy_to_dict(policy).items() if name not in _OF_NO_MATTER}
        self.extends = policy.parts == "blocks"
        self.block = policy.block

    def cuts(self, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        cuts = self._experts.cuts(lengths)
        return np.where(self._experts.compressed_parts(cuts) > 0, cuts, 0)

    def like(self, old: int) -> Tensors:
        if not self._experts.count:
            return ()
        # a configuration does not tell every family's keys and values
        anybody = Histories(np.repeat(self._model.catalog.item_ids[:1], old), [0, old])
        (kept,) = compress(self._model, anybody, self._experts, None, chunk_rows=_CHUNK_ROWS)
        return tuple(tensor.to("meta") for tensor in kept)

    def compress(self, histories: Histories, known: Sequence[Known | None]) -> list[Tensors]:
        users = np.arange(len(histories))
        old = histories.between(users, np.zeros_like(users), self.cuts(histories.lengths))
        before = [None if one is None else one.tensors for one in known] if self.extends else None
        return compress(self._model, old, self._experts, before, chunk_rows=_CHUNK_ROWS)
