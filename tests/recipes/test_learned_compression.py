# SPDX-License-Identifier: Apache-2.0
"""The table of what compression is worth: every kind of row, in seconds; going on; the numbers of evaluate.py."""

from __future__ import annotations

from pathlib import Path

import pytest

import patchkern as pk
from patchkern.data import open_dataset
from patchkern.evaluation.metrics import evaluate
from recipes import learned_compression, per_sample

ROWS = ["recent", "recent-1", "mean-1", "experts", "memory", "memory-once"]


def test_the_table(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--data", folder, "--output_dir", str(tmp_path), "--width", "8", "--layers", "1", "--heads", "1"]
    flags += ["--epochs", "0.5", "--block", "4", "--keep", "2", "--targets_per_step", "60", "--rows_per_pass", "900"]
    flags += ["--seeds", "0", "--rows"]
    numbers = learned_compression.main([*flags, *ROWS[:1]])
    assert list(numbers) == ROWS[:1]
    written = (tmp_path / "recent-0" / "result.json").stat().st_mtime_ns
    numbers = learned_compression.main([*flags, *ROWS])
    assert list(numbers) == ROWS
    assert (tmp_path / "recent-0" / "result.json").stat().st_mtime_ns == written, "what is finished stays"
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert sum(line.startswith(tuple(f"| {name}:" for name in ROWS)) for line in lines) == len(ROWS)
    assert any(line.startswith("| memory - mean-1") for line in lines)

    data = open_dataset(folder)
    samples = data.samples("test")
    memory = pk.RecurrentMemory.from_pretrained(tmp_path / "memory-0" / "model")
    assert memory.policy == pk.PreferenceMemory(pk.ItemPatches(0, None), 4, 4)
    for name, once in (("memory", False), ("memory-once", True)):
        memory.one_time = once
        lists = memory.recommend(data.before(samples), k=20, exclude_seen=True)
        found = evaluate(lists, data.targets(samples), (20,), catalog=memory.catalog)
        assert numbers[name]["HR@20"] == pytest.approx(found.hr(20))
    absorbed = memory.policy.absorbed(data.before(samples).lengths)
    assert numbers["memory"]["bytes"] == pytest.approx((absorbed > 0).mean() * 4 * 8 * 4)
    assert numbers["recent"]["bytes"] == 0 < numbers["experts"]["bytes"]
    assert numbers["recent-1"]["rows"] < numbers["memory"]["rows"] < numbers["recent-1"]["rows"] + 4.1
    kept = per_sample.read(tmp_path / "memory-0" / "test.csv")
    assert len(kept.samples) == samples.users.size

    capsys.readouterr()
    with pytest.raises(ValueError, match="output_dir: expected the arguments of the runs there, got other epochs"):
        learned_compression.main([*flags, "recent", "--epochs", "3"])
    for wrong, message in (("nothing", "expected some of full, recent"), ("memory-once", "expected memory beside")):
        with pytest.raises(SystemExit):
            learned_compression.main([*flags, wrong])
        assert message in capsys.readouterr().err
