# SPDX-License-Identifier: Apache-2.0
"""Recommendations on disk: what `recommend` returns, whole parts only, continued after a stop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import patchkern as pk
from patchkern.search import bulk_run
from patchkern.search.results import read_recommendations, recommend_to_disk

LENGTHS = [7, 3, 20, 1, 12, 5, 9]


@pytest.fixture
def model() -> pk.PatchedCausalLM:
    config = LlamaConfig(
        vocab_size=cases.VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
    )
    batch = cases.make_batch(pk.ItemPatches(2), LENGTHS)
    return pk.PatchedCausalLM(LlamaForCausalLM(config), batch.catalog, cases.make_prompt(batch.prompt), batch.policy)


@pytest.fixture
def histories() -> pk.Histories:
    return pk.Histories.from_sequences(cases.make_batch(pk.ItemPatches(2), LENGTHS).histories)


def close(got: list[Any], expected: list[Any]) -> None:
    """The same lists; a score may differ by what a user's neighbours in a batch change in its rounding."""
    assert [[item for item, _ in user] for user in got] == [[item for item, _ in user] for user in expected]
    for one, two in zip(got, expected, strict=True):
        assert [score for _, score in one] == pytest.approx([score for _, score in two], rel=1e-5)


@pytest.mark.parametrize("size", [1, 3, 100])
def test_what_is_read_is_what_recommend_returns(
    size: int, model: pk.PatchedCausalLM, histories: pk.Histories, tmp_path: Path
) -> None:
    folder = recommend_to_disk(model, histories, tmp_path / "new" / "run", users_per_part=size, k=4, num_beams=6)
    users, lists = read_recommendations(folder)
    assert users.tolist() == list(range(7))
    close(lists, model.recommend(histories, k=4, num_beams=6))
    parts = sorted(path.name for path in folder.iterdir())
    assert parts == [*(f"part-{number:05d}.parquet" for number in range(-(-7 // size))), "run.json"]


def test_user_ids_and_filters_go_along(model: pk.PatchedCausalLM, histories: pk.Histories, tmp_path: Path) -> None:
    items = model.catalog.item_ids.tolist()
    allowed: list[Any] = [
        [items[user : user + 9] for user in range(7)],
        np.arange(7 * len(items)).reshape(7, -1) % 3 > 0,
        torch.arange(len(items)) % 2 == 0,
        items[:9],
    ]
    for number, given in enumerate(allowed):
        options: dict[str, Any] = {"allowed_items": given, "k": 3, "num_beams": 5}
        names = [f"user {user}" for user in range(7)]
        folder = recommend_to_disk(
            model, histories, tmp_path / str(number), user_ids=names, users_per_part=2, **options
        )
        users, lists = read_recommendations(folder)
        assert users.tolist() == names
        close(lists, model.recommend(histories, **options))


def test_a_stopped_run_goes_on(
    model: pk.PatchedCausalLM, histories: pk.Histories, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    run = bulk_run.run

    def failing(request: Any, prepared: Any) -> Any:
        calls.append(len(request.histories))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run(request, prepared)

    monkeypatch.setattr(bulk_run, "run", failing)
    options: dict[str, Any] = {"users_per_part": 2, "k": 4, "num_beams": 6}
    with pytest.raises(KeyboardInterrupt):
        recommend_to_disk(model, histories, tmp_path, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part-00000.parquet", "part-00001.parquet", "run.json"]
    with pytest.raises(FileNotFoundError, match=r"expected 4 parts .*, 2 are missing, the first is part-00002"):
        read_recommendations(tmp_path)
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    recommend_to_disk(model, histories, tmp_path, **options)
    assert calls == [2, 2, 2, 2, 1]  # the third twice, the finished ones once
    assert all((tmp_path / name).read_bytes() == content for name, content in written.items())
    users, lists = read_recommendations(tmp_path)
    assert users.tolist() == list(range(7))
    close(lists, model.recommend(histories, k=4, num_beams=6))
    recommend_to_disk(model, histories, tmp_path, **options, memory_budget="1GiB", batch_size=2, progress=False)
    assert len(calls) == 5


def test_a_failing_write_leaves_nothing_behind(
    model: pk.PatchedCausalLM, histories: pk.Histories, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow.parquet as pq

    def failing(table: Any, file: Any) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(pq, "write_table", failing)
        with pytest.raises(OSError, match="no space left"):
            recommend_to_disk(model, histories, tmp_path, users_per_part=3, k=2, num_beams=2)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    recommend_to_disk(model, histories, tmp_path, users_per_part=3, k=2, num_beams=2)
    assert len(read_recommendations(tmp_path)[1]) == 7


def test_another_run_is_refused(model: pk.PatchedCausalLM, histories: pk.Histories, tmp_path: Path) -> None:
    options: dict[str, Any] = {"k": 2, "num_beams": 3}
    recommend_to_disk(model, histories, tmp_path, **options)

    def refused(what: str, *positional: Any, **changed: Any) -> None:
        with pytest.raises(ValueError, match=rf"folder: expected the run that was begun in .*, got another {what}"):
            recommend_to_disk(model, *(positional or (histories,)), tmp_path, **{**options, **changed})

    refused("arguments", k=3)
    refused("arguments", exclude_seen=True)
    refused("arguments", allowed_items=model.catalog.item_ids[:9])
    refused("policy", policy=pk.TextOnly())
    refused("users_per_part", users_per_part=3)
    refused("user_ids", user_ids=list("abcdefg"))
    refused("histories", histories.take([1, 0, 2, 3, 4, 5, 6]))
    with torch.no_grad():
        model.hf_model.lm_head.weight[5, 3] += 1
    refused("model")
    (tmp_path / "run.json").unlink()
    with pytest.raises(ValueError, match="got parts of an unknown run in it"):
        recommend_to_disk(model, histories, tmp_path, **options)


def test_wrong_arguments_bind_nobody(model: pk.PatchedCausalLM, histories: pk.Histories, tmp_path: Path) -> None:
    for wrong, error, message in (
        ({"k": 0}, ValueError, "k: expected"),
        ({"users_per_part": 0}, ValueError, "users_per_part: expected an integer in 1"),
        ({"user_ids": [1, 2]}, ValueError, r"user_ids: expected one per user \(7\), got 2"),
        ({"user_ids": np.zeros(7)}, TypeError, "user_ids: expected integers or strings, got dtype float64"),
        ({"policy": "text"}, TypeError, "policy"),
        ({"nonsense": 1}, TypeError, "nonsense"),
    ):
        with pytest.raises(error, match=message):
            recommend_to_disk(model, histories, tmp_path / "run", **{"k": 2, "num_beams": 2, **wrong})
    assert not (tmp_path / "run").exists()
    with pytest.raises(FileNotFoundError, match=r"folder: expected run\.json in"):
        read_recommendations(tmp_path / "run")


def test_no_users(model: pk.PatchedCausalLM, tmp_path: Path) -> None:
    users, lists = read_recommendations(recommend_to_disk(model, [], tmp_path))
    assert users.size == 0 and lists == []
    assert json.loads((tmp_path / "run.json").read_text())["users"] == 0
