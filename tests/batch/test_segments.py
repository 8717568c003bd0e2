# SPDX-License-Identifier: Apache-2.0
"""Where histories are cut."""

from __future__ import annotations

import numpy as np
import pytest

from patchkern.batch.segments import cuts


@pytest.mark.parametrize(("keep", "block"), [(0, 1), (1, 4), (5, 3), (20, 50)])
def test_borders_only_move_forward_by_blocks(keep: int, block: int) -> None:
    lengths = np.arange(200)
    old = cuts(lengths, keep, block)
    assert set(np.diff(old)) <= {0, block}
    recent = lengths - old
    assert (recent[lengths >= keep] >= keep).all()
    assert (recent[lengths >= keep] <= keep + block - 1).all()
    assert (old[lengths < keep] == 0).all()
