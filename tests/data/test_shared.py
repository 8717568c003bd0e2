# SPDX-License-Identifier: Apache-2.0
"""Real data: counts, titles, splits from raw files, compression ratios and yardsticks, against known values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from patchkern.data import Interactions, open_dataset, prepare
from patchkern.data.__main__ import main
from patchkern.evaluation import Ranking, most_popular, transitions

COUNTS = {
    # users, items, interactions, longest history, samples in train, val, test
    "ml-1m": (6038, 3883, 575_281, 1435, 534_185, 11_492, 11_494),
    "ml-100k": (682, 1682, 51_824, 378, 47_749, 1005, 1024),
}


@pytest.fixture(scope="module", params=sorted(COUNTS))
def data(request: pytest.FixtureRequest, shared_data: Path) -> Interactions:
    pytest.importorskip("pyarrow", reason="needs pyarrow")
    folder = shared_data / request.param
    if not folder.is_dir():
        pytest.skip(f"real data not found: {folder.name}")
    return open_dataset(folder)


@pytest.fixture(scope="module")
def raw(shared_data: Path) -> Interactions:
    folder = shared_data / "ml-100k-raw"
    if not folder.is_dir():
        pytest.skip(f"real data not found: {folder.name}")
    return open_dataset(folder)


def counts(data: Interactions) -> tuple[int, ...]:
    samples = [data.samples(split).users.size for split in ("train", "val", "test")]
    return (data.num_users, data.num_items, data.num_interactions, int(data.histories.lengths.max()), *samples)


def test_counts(data: Interactions) -> None:
    assert counts(data) == COUNTS[data.name]
    assert data.system is not None and data.instruction is not None
    if data.name == "ml-1m":
        assert int((data.histories.lengths > 500).sum()) == 58


def test_raw_counts(raw: Interactions) -> None:
    assert (raw.num_users, raw.num_items, raw.num_interactions) == (943, 1682, 100_000)
    assert counts(prepare(raw)) == COUNTS["ml-100k"]


def test_raw_gives_the_same_users_splits_and_titles(raw: Interactions, shared_data: Path) -> None:
    """Item sets are equal per user and split; only the order within one instant differs. Raw ids are one higher."""
    pytest.importorskip("pyarrow", reason="needs pyarrow")
    ours, theirs = prepare(raw), open_dataset(shared_data / "ml-100k")

    def parts(data: Interactions, shift: int) -> set[tuple[frozenset[int], ...]]:
        return {
            tuple(
                frozenset((data.histories[user][slice(*data.ranges[split][user])] - shift).tolist())
                for split in ("train", "val", "test")
            )
            for user in range(data.num_users)
        }

    assert parts(ours, 1) == parts(theirs, 0) and len(parts(ours, 1)) == 682
    differing = {item: title for item, title in raw.titles.items() if theirs.titles[item - 1] != title}
    assert differing == {1300: "'Til There Was You"}


PRINTED = {
    # mean title length, and nominal ratios at 100 items: item patches, then session patches of one group size
    "ml-1m": ("3.94", {"ItemPatches(keep_text=5)": 3.44, "SessionPatches(group_size=5)": 9.23}),
    "ml-100k": ("3.86", {"ItemPatches(keep_text=5)": 3.38, "SessionPatches(group_size=20)": 3.85}),
}


def test_command_prints_counts_and_compression_ratios(
    data: Interactions, shared_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers", reason="needs transformers")
    main([str(shared_data / data.name), "--tokenizer", str(shared_data / "llama3-tokenizer")])
    lines = capsys.readouterr().out.splitlines()
    printed = "\n".join(lines)
    for count in COUNTS[data.name]:
        assert f" {count:,}" in printed
    mean_title, ratios = PRINTED[data.name]
    assert any(line.split()[:3] == ["mean", "title", mean_title] for line in lines)
    for policy, expected in ratios.items():
        nominal, measured = map(float, next(line for line in lines if policy in line).split()[1:])
        assert nominal == expected
        # Short histories and popular titles compress a little less than the nominal history.
        assert 0.85 * expected < measured < expected


def hit_rates(ranking: Ranking, targets: np.ndarray) -> tuple[float, float]:
    return round(ranking.hit_rate(targets, 10), 4), round(ranking.hit_rate(targets, 20), 4)


def test_yardsticks(data: Interactions) -> None:
    """As published beside the data, but for transitions on ml-1m: those found 0.0966 and 0.1470 there."""
    samples = data.samples("test")
    targets = data.targets(samples)
    expected = {
        "ml-100k": ((0.0381, 0.0703), (0.0615, 0.1064), (0.1123, 0.1885)),
        "ml-1m": ((0.0211, 0.0390), (0.0298, 0.0509), (0.0967, 0.1508)),
    }[data.name]
    got = (
        hit_rates(most_popular(data, samples), targets),
        hit_rates(most_popular(data, samples, unseen=True), targets),
        hit_rates(transitions(data, samples), targets),
    )
    assert got == expected
