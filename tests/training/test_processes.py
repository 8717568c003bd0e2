# SPDX-License-Identifier: Apache-2.0
"""Two processes of torchrun train as one does, whole or sharded, and either goes on where the other was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from process_cases import ALIKE, RESUMED, SHARDED, trainer_of
from training_cases import losses_of, make_trainer

import patchkern as pk

WAYS = [("data parallel", kind) for kind in ALIKE] + [("sharded", kind) for kind in SHARDED]


class Runs:
    """What one process did, and what two did."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.alone: dict[str, Any] = json.loads((folder / "alone.json").read_text())
        self.two: list[dict[str, Any]] = [json.loads((folder / f"rank-{n}.json").read_text()) for n in range(2)]

    def model(self, kind: str, way: str = "alone") -> Any:
        """The best of a run, else the last."""
        best = self.alone[kind]["best"]
        folder = self.folder / way / kind / ("checkpoint-4" if best is None else Path(best).name)
        kinds = {"memory": pk.RecurrentMemory, "item ids": pk.ItemModel}
        model = next((kinds[name] for name in kinds if kind.startswith(name)), pk.PatchedCausalLM)
        return model.from_pretrained(folder)


@pytest.fixture(scope="module")
def runs(two_processes: Path) -> Runs:
    return Runs(two_processes)


def check_equal(model: Any, expected: Any) -> None:
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in expected.named_parameters()]
    for (name, parameter), value in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(parameter, value, rtol=0, atol=2e-4, msg=name)


@pytest.mark.parametrize(("way", "kind"), WAYS)
def test_two_processes_train_as_one(way: str, kind: str, runs: Runs) -> None:
    one = runs.alone[kind]
    best = one["best"]
    folder = runs.folder / way / kind / ("checkpoint-4" if best is None else Path(best).name)
    for two in runs.two:
        found = two[kind if way == "data parallel" else f"{kind}, sharded"]
        assert (found["processes"], one["processes"]) == (2, 1) and found["sharded"] == (way == "sharded")
        assert len(found["losses"]) == 4 and found["losses"] == pytest.approx(one["losses"], rel=1e-5)
        assert len(found["evaluations"]) == len(one["evaluations"]) == (0 if best is None else 2)
        for got, expected in zip(found["evaluations"], one["evaluations"], strict=True):
            assert got == pytest.approx(expected, rel=1e-5)
        assert found["best"] == (best and str(folder)), "both processes know where it is in the end"
        assert found["off the best"] == (None if best is None else 0.0)
    check_equal(runs.model(kind, way), runs.model(kind))
    assert not list(folder.glob("*.bin")), "nothing is saved twice"
    assert not list(folder.parent.glob(".*")), "nothing is left"
    assert kind != "passes" or folder.name == "checkpoint-2"


@pytest.mark.parametrize("kind", SHARDED)
def test_each_process_holds_its_share(kind: str, runs: Runs) -> None:
    """Every layer is a unit that is gathered alone."""
    where = "model.hf_model" if kind.startswith("memory") else "hf_model"
    layers = {f"{where}.{'' if kind.endswith('item ids') else 'model.'}layers.{n}" for n in range(2)}
    for two in runs.two:
        whole, share = two[kind], two[f"{kind}, sharded"]
        assert layers < set(share["units"]) and "" in share["units"]
        # a parameter of one number is not halved
        assert share["weights"] == pytest.approx(whole["weights"] / 2, rel=0.01)
        assert share["optimizer"] == pytest.approx(whole["optimizer"] / 2, rel=0.01)


@pytest.mark.parametrize("sharded", [False, True])
def test_what_a_process_holds_is_planned(sharded: bool, runs: Runs) -> None:
    model = runs.model("both")
    plan = pk.plan_training(model, 64, optimizer="adamw_torch", head="both", world_size=2, sharded=sharded)
    for two in runs.two:
        found = two["both, sharded" if sharded else "both"]
        assert found["weights"] == pytest.approx(plan.needed.weights, rel=0.01)  # which has the buffers too
        assert found["optimizer"] == pytest.approx(plan.needed.optimizer, rel=0.01)


@pytest.mark.parametrize("kind", RESUMED)
def test_two_processes_go_on_where_one_was(kind: str, runs: Runs) -> None:
    for two in runs.two:
        for name in (f"{kind}, resumed", f"{kind}, sharded, resumed"):
            assert two[name]["losses"] == pytest.approx(runs.alone[kind]["losses"], rel=1e-5), name
    for way in ("resumed", "sharded and resumed"):
        check_equal(runs.model(kind, way), runs.model(kind))


@pytest.mark.parametrize(("way", "kind"), [(way, kind) for way in ("data parallel", "sharded") for kind in RESUMED])
def test_one_process_goes_on_where_two_were(way: str, kind: str, runs: Runs, tmp_path: Path) -> None:
    resumed = trainer_of(kind, tmp_path, 4)
    resumed.train(resume_from_checkpoint=str(runs.folder / way / kind / "checkpoint-2"))
    assert losses_of(resumed) == pytest.approx(runs.alone[kind]["losses"], rel=1e-5)
    check_equal(resumed.model, runs.model(kind))


def test_the_recipe_by_torchrun(runs: Runs) -> None:
    losses = [two["recipe"]["losses"] for two in runs.two]
    assert [two["recipe"]["processes"] for two in runs.two] == [2, 2]
    assert losses[0] == losses[1] and len(losses[0]) == 2
    model = pk.PatchedCausalLM.from_pretrained(runs.folder / "recipe" / "checkpoint-2")
    assert len(model.recommend([[]], k=3)[0]) == 3
    for two in runs.two:
        assert "fsdp: expected several processes with an accelerator each" in two["recipe, fsdp"]["error"]
    assert not (runs.folder / "refused").exists() or not list((runs.folder / "refused").iterdir())


# ------------------------------------------------------------------ what is refused


def test_sharding_that_fails_or_leaves_no_model(runs: Runs) -> None:
    for two in runs.two:
        kind, loading = two["refused"]
        assert kind.startswith("fsdp_config: expected state_dict_type FULL_STATE_DICT")
        assert loading.startswith("fsdp_config: expected cpu_ram_efficient_loading False")


def test_processes_that_do_not_know_of_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match=r"args: expected use_cpu=True .* as 4 processes were started"):
        make_trainer(tmp_path, use_cpu=False)
