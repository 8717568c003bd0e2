# SPDX-License-Identifier: Apache-2.0
"""The data that the recipes' tests train on, and the size of what they train."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from patchkern.data import synthetic, write_parquet
from patchkern.models.scratch import SIZES


@pytest.fixture(scope="module", autouse=True)
def tinier_models() -> Iterator[None]:
    """`--model tiny` is narrower: no recipe depends on a width, and their time does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "tiny", {**SIZES["tiny"], "hidden_size": 64, "intermediate_size": 128})
        yield


@pytest.fixture
def one_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--model tiny` is wide, of one layer: a plan follows each operator of every layer many times, of any width."""
    monkeypatch.setitem(
        SIZES, "tiny", {**SIZES["tiny"], "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Synthetic users in parquet files."""
    path = tmp_path_factory.mktemp("data") / "small"
    write_parquet(synthetic(60, 50, mean_length=20.0, num_genres=4), path)
    return str(path)
