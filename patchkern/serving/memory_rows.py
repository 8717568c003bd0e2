# SPDX-License-Identifier: Apache-2.0
"""Users' memories, as `UserStates` keeps them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from patchkern.batch.histories import Histories
from patchkern.batch.policy_dict import policy_to_dict
from patchkern.batch.preference_memory import PreferenceMemory
from patchkern.models.memories import Memories
from patchkern.models.recurrent import RecurrentMemory
from patchkern.serving.compressor import Known, Tensors


class MemoryRows:
    """The `patchkern.serving.compressor.Compressor` of `patchkern.RecurrentMemory`.

    A user's one tensor is its memory, ``(rows, D)``.
    """

    def __init__(self, model: RecurrentMemory, policy: PreferenceMemory) -> None:
        policy.check_prompt(model.prompt)
        self._model, self._memory, self._one_time = model, policy, model.one_time
        self.policy = policy_to_dict(policy) | {"one_time": model.one_time}
        self.extends = not model.one_time
        self.block = policy.block

    def cuts(self, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        return self._memory.absorbed(lengths)

    def like(self, old: int) -> Tensors:
        rows = int(self._memory.memory_rows(np.array(old)))
        return (torch.empty(rows, self._model.width, dtype=self._model.dtype, device="meta"),)

    def compress(self, histories: Histories, known: Sequence[Known | None]) -> list[Tensors]:
        nothing = self.like(0)[0].new_empty(0, self._model.width, device="cpu")
        before = [(nothing, 0) if one is None else (one.tensors[0], one.cut) for one in known]
        memories = self._model.compress(histories, Memories.of(before), self._memory, one_time=self._one_time)
        return [(vectors,) for vectors in memories.vectors.cpu().split(memories.rows.tolist())]
