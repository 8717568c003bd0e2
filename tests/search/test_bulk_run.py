# SPDX-License-Identifier: Apache-2.0
"""Parts that are written in any order, by any run object, are what `recommend_to_disk` writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from training_cases import make_data, make_model

import patchkern as pk

pytest.importorskip("pyarrow", reason="needs pyarrow")

HISTORIES, _ = make_data()
NAMES = [f"user {user}" for user in range(len(HISTORIES))]


@pytest.fixture(scope="module")
def model() -> pk.PatchedCausalLM:
    return make_model(item_head=True)[0].eval()


def make_run(model: pk.PatchedCausalLM, folder: Path, **options: object) -> pk.BulkRun:
    options = {"users": 12, "users_per_part": 5, "source": {"histories": "twelve"}, **options}
    return pk.BulkRun(model, folder, pk.ItemPatches(1, 10), k=4, search="items", **options)


def write(run: pk.BulkRun, part: int) -> None:
    users = np.arange(12)[run.range(part)]
    run.write(part, HISTORIES.take(users), [NAMES[user] for user in users])


def test_parts_in_any_order_are_one_call(model: pk.PatchedCausalLM, tmp_path: Path) -> None:
    run = make_run(model, tmp_path / "bulk")
    assert "12 users in 3 parts" in repr(run)
    with run.writing():
        assert run.missing() == [0, 1, 2]
        write(run, 2)
        other = make_run(model, tmp_path / "bulk", users_per_part=5)  # as in another process
        write(other, 0)
        assert run.missing() == [1] and run.missing((0, 2)) == [] and run.missing((1, 2)) == [1]
        with pytest.raises(FileNotFoundError, match=r"1 are missing, the first is part-00001\.parquet"):
            pk.read_recommendations(tmp_path / "bulk")
        (tmp_path / "bulk" / ".part-00001.parquet.7.tmp").write_bytes(b"of a killed process")
        assert run.missing() == [1]
        write(run, 1)
    options = {"k": 4, "search": "items", "users_per_part": 5, "user_ids": NAMES}
    pk.recommend_to_disk(model, HISTORIES, tmp_path / "call", pk.ItemPatches(1, 10), **options)
    names, lists = pk.read_recommendations(tmp_path / "bulk")
    expected = pk.read_recommendations(tmp_path / "call")
    assert names.tolist() == expected[0].tolist() == NAMES and lists == expected[1]
    assert not list((tmp_path / "bulk").glob(".*"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"num_beams": 0}, "num_beams: .*got 0"), ({"memory_budget": "much"}, "memory_budget: .*much")],
)
def test_what_no_search_takes_is_known_before_the_folder_is(
    wrong: dict[str, object], message: str, model: pk.PatchedCausalLM, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        make_run(model, tmp_path / "bulk", **wrong)
    assert not (tmp_path / "bulk").exists()


def test_lists_as_arrow(model: pk.PatchedCausalLM, tmp_path: Path) -> None:
    lists = model.recommend(HISTORIES, pk.ItemPatches(1, 10), k=4, search="items")
    table = pk.recommendation_table(NAMES, lists, model.catalog)
    assert table.column_names == ["user", "items", "scores"] and table["user"].to_pylist() == NAMES
    assert table["items"].to_pylist() == [[item for item, _ in user] for user in lists]
    assert table["scores"].to_pylist() == [[score for _, score in user] for user in lists]
    options = {"k": 4, "search": "items", "users_per_part": 5, "user_ids": NAMES, "batch_size": 64}
    pk.recommend_to_disk(model, HISTORIES, tmp_path, pk.ItemPatches(1, 10), **options)
    read = pk.read_recommendations(tmp_path, format="arrow")
    assert read.schema == table.schema and read["items"].to_pylist() == table["items"].to_pylist()
    pk.recommend_to_disk(model, [], tmp_path / "nobody", pk.ItemPatches(1, 10), k=4)
    assert pk.read_recommendations(tmp_path / "nobody", format="arrow").num_rows == 0
    assert pk.recommendation_table([], [], model.catalog).num_rows == 0
    with pytest.raises(ValueError, match="format: expected lists or arrow, got 'csv'"):
        pk.read_recommendations(tmp_path, format="csv")  # type: ignore[call-overload]


def test_numbers_of_numpy_and_torch_describe_a_run(model: pk.PatchedCausalLM, tmp_path: Path) -> None:
    prior = torch.linspace(-1, 0, len(model.catalog)).to(torch.bfloat16)
    options = {"users_per_part": np.int64(5), "users": np.int64(12), "source": {"rows": np.int64(3)}, "prior": prior}
    run = make_run(model, tmp_path, **options)
    with run.writing():
        for part in np.array(run.missing()):
            write(run, part)
    assert make_run(model, tmp_path, **options, batch_size=2).missing() == []
    with pytest.raises(ValueError, match="expected a part of the run"):
        make_run(model, tmp_path, **{**options, "prior": -prior}).missing()
    compiled = torch.compile(model, backend="eager")  # whose parameters have other names
    assert make_run(compiled, tmp_path, **options).missing() == []


@pytest.mark.parametrize("part", [-1, 3, True])
def test_parts_that_there_are_not(model: pk.PatchedCausalLM, part: int, tmp_path: Path) -> None:
    run = make_run(model, tmp_path)
    for call in (lambda: run.range(part), lambda: run.write(part, HISTORIES.take([0, 1]))):
        with pytest.raises((TypeError, ValueError), match="part: expected an integer"):
            call()


def test_what_is_refused(model: pk.PatchedCausalLM, tmp_path: Path) -> None:
    run = make_run(model, tmp_path)
    with run.writing():
        write(run, 0)
        with pytest.raises(ValueError, match="histories: expected those of 2 users, got 12"):
            run.write(2, HISTORIES)
        with pytest.raises(ValueError, match="user_ids: expected one per user"):
            run.write(2, HISTORIES.take(np.arange(2)), NAMES)
        other = make_run(model, tmp_path, source={"histories": "others"})
        with pytest.raises(ValueError, match="expected a part of the run in run"):
            other.missing()
    with pytest.raises(ValueError, match="got another histories"), other.writing():
        pass
    with pytest.raises(ValueError, match="users: expected an integer in 0"):
        make_run(model, tmp_path, users=-1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'beams'"):
        make_run(model, tmp_path, beams=3)
    with pytest.raises(TypeError, match="user_ids: expected by `write`"):
        make_run(model, tmp_path, user_ids=NAMES)
