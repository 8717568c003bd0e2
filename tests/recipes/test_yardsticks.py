# SPDX-License-Identifier: Apache-2.0
"""The table of what needs no network."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from patchkern.data import synthetic, write_parquet
from recipes.yardsticks import PRIORS, TOGETHER, main


def test_the_table_has_a_row_for_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pyarrow", reason="needs pyarrow")
    write_parquet(synthetic(120, 300), tmp_path / "data")
    for seen in ("left_out", "allowed"):
        main([str(tmp_path / "data"), "--limit", "40", "--seen_items", seen])
        lines = capsys.readouterr().out.strip().splitlines()
        assert len({line.count("|") for line in lines}) == 1
        rates = [float(re.findall(r"0\.\d{4}", line)[2]) for line in lines[2:]]  # HR@20
        assert len(rates) == 2 + len(PRIORS) + len(TOGETHER) and min(rates[1:]) > rates[0] > 0
    with pytest.raises(SystemExit):
        main([str(tmp_path / "data"), "--limit", "0"])
