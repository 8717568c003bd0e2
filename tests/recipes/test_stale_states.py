# SPDX-License-Identifier: Apache-2.0
"""States that are not updated: what is compressed and what is recent of a history with a gap, and the columns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import patchkern as pk
from patchkern.data import open_dataset
from recipes import learned_compression, stale_states

EXPERTS = pk.Experts(pk.ItemPatches(keep_text=0, max_items=None), count=2, keep=3, block=4)
MEMORY = pk.PreferenceMemory(pk.ItemPatches(keep_text=0, max_items=None), slots=2, block=4)


@pytest.mark.parametrize("policy", [EXPERTS, MEMORY], ids=["experts", "memory"])
@pytest.mark.parametrize("lag", [0, 1, 2, None])
def test_the_gap_is_between_the_state_and_the_recent_items(policy: pk.Experts, lag: int | None) -> None:
    histories = pk.Histories.from_sequences([range(n) for n in range(1, 40)])
    until = stale_states.compressed(policy, histories.lengths)
    assert until.max() > 8
    gapped = stale_states.gapped(histories, policy, lag)
    found = stale_states.compressed(policy, gapped.lengths)
    for before, after, old, now in zip(histories, gapped, until, found, strict=True):
        assert now == (0 if lag is None else max(old - 4 * lag, 0))
        assert after[:now].tolist() == list(range(now)), "the state is of the first items"
        assert after[now:].tolist() == before[old:].tolist(), "what is recent stays"


@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        (["--width", "8", "--layers", "1", "--heads", "1"], ["experts", "memory"]),
        (["--model", "tiny"], ["experts-blocks", "memory-append"]),
    ],
    ids=["item ids", "language model"],
)
def test_columns(
    kind: list[str], rows: list[str], folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--data", folder, "--output_dir", str(tmp_path), *kind]
    flags += ["--epochs", "0.5", "--block", "4", "--keep", "2", "--seeds", "0", "--rows"]
    learned_compression.main([*flags, *rows])
    capsys.readouterr()
    chosen = ["--data", folder, "--output_dir", str(tmp_path), "--lags", "1"]  # all rows that are there
    numbers = stale_states.main(chosen)
    assert [list(numbers[row]) for row in rows] == [["0", "1", "no state"]] * 2
    printed = capsys.readouterr().out
    assert all(f"| {row} " in printed for row in rows)

    data = open_dataset(folder)
    models = {row: stale_states.read_model(tmp_path / f"{row}-0" / "model") for row in rows}
    samples = stale_states.with_past(data, data.samples("test"), [model.policy for model in models.values()], 2)
    assert f", {samples.users.size} samples; columns: how many blocks of 4 items ago" in printed
    for row, model in models.items():
        lists = model.recommend(data.before(samples), k=20, exclude_seen=True, search="items")
        found = [target in dict(items) for target, items in zip(data.targets(samples), lists, strict=True)]
        assert numbers[row]["0"] == pytest.approx(np.mean(found)), "behind a new state, what is always recommended"
        stale = stale_states.gapped(data.before(samples), model.policy, 1)
        lists = model.recommend(stale, k=40, search="items")
        for number, items in enumerate(data.before(samples)):
            lists[number] = [item for item in lists[number] if item[0] not in set(items.tolist())][:20]
        found = [target in dict(items) for target, items in zip(data.targets(samples), lists, strict=True)]
        assert numbers[row]["1"] == pytest.approx(np.mean(found))

    with pytest.raises(ValueError, match="lags: expected some sample with 100 blocks of 4 items, got none"):
        stale_states.main([*chosen, "--lags", "99"])
    with pytest.raises(SystemExit):
        stale_states.main([*chosen, "--lags", "-1"])
    assert "--lags: expected numbers of at least 0, got -1" in capsys.readouterr().err
    other = next(row for row in stale_states.ROWS if row not in rows)
    for lacking, run in ((["--rows", other], f"{other}-0"), (["--seeds", "3"], "experts-3")):
        with pytest.raises(SystemExit):
            stale_states.main([*chosen, *lacking])
        told = f"--output_dir: expected runs of recipes/learned_compression.py, got no {tmp_path / run / 'model'}"
        assert told in capsys.readouterr().err
