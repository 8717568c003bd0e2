# SPDX-License-Identifier: Apache-2.0
"""The data that the recipes' tests train on."""

from __future__ import annotations

import pytest

from patchkern.data import synthetic, write_parquet


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Synthetic users in parquet files."""
    path = tmp_path_factory.mktemp("data") / "small"
    write_parquet(synthetic(60, 50, mean_length=20.0, num_genres=4), path)
    return str(path)
