# SPDX-License-Identifier: Apache-2.0
"""recipes/long_history.py from its command line, on users whose histories are long for their catalogue."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib", reason="the recipe draws with matplotlib")

import patchkern as pk
from patchkern.budget.search import SearchCost, UserTooLarge
from patchkern.budget.search_plan import SearchPlan
from patchkern.data import Interactions, leave_one_out, open_dataset, synthetic, write_parquet
from patchkern.evaluation.metrics import evaluate
from patchkern.models.scratch import fit_tokenizer, scratch_model, scratch_prompt
from recipes import long_history, long_history_report
from recipes.item_models import catalog_of_ids
from recipes.training_run import write_arguments

SMALL = ["--k", "3", "--num_beams", "4", "--device", "cpu", "--dtype", "float32"]
TINY = ["--shape", "tiny", *SMALL]


@pytest.fixture(scope="module", autouse=True)
def tinier_models() -> None:
    """As they are: their bytes are compared."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("long") / "data"
    write_parquet(leave_one_out(synthetic(60, 300, mean_length=80.0, num_genres=4)), path)
    return str(path)


def _model(data: Interactions) -> pk.PatchedCausalLM:
    """The recipe's own: everything in it is repeatable."""
    tokenizer = fit_tokenizer(data.titles.values(), 4096)
    catalog = pk.Catalog.from_titles(data.titles, tokenizer)
    return pk.PatchedCausalLM(scratch_model(tokenizer, "tiny"), catalog, scratch_prompt(tokenizer))


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[SearchPlan]:
    """Every plan that is made from now on."""
    made: list[SearchPlan] = []
    plan = SearchCost.plan

    def recorded(*args: Any, **kwargs: Any) -> SearchPlan:
        made.append(plan(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(SearchCost, "plan", recorded)
    return made


def test_its_numbers_are_the_librarys(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], plans: list[SearchPlan]
) -> None:
    arguments = ["--data", folder, "--min_items", "100", "--users", "5", "--budget", "1GiB", *TINY]
    results = long_history.main([*arguments, "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "BACKEND native" in printed or "BACKEND reference" in printed
    assert [result.name for result in results] == ["text", "items", "sessions"]

    data = open_dataset(folder)
    users = np.flatnonzero(data.histories.lengths > 100)[:5]
    histories, model = data.histories.take(users), _model(data)
    rows = list(csv.DictReader((tmp_path / "long_history.csv").open(encoding="utf-8")))
    for number, (result, row) in enumerate(zip(results, rows, strict=True)):
        policy = long_history.POLICIES[result.name]
        layout = pk.build_layout(model.catalog, histories, policy, model.prompt)
        assert result.items.tolist() == histories.lengths.tolist(), "whole histories"
        assert result.rows.tolist() == layout.cu_seqlens.diff().tolist()
        assert float(row["rows_per_user"]) == pytest.approx(result.rows.mean())
        assert result.predicted == int(row["predicted_bytes"]) == plans[4 * number + 1].peak, "recommend's own plan"
        assert result.users_at_once == int(row["users_at_once"]) == 5
        assert sum(p.nbytes for p in model.parameters()) < result.measured <= result.predicted
        assert result.measured > 0.8 * result.predicted
        assert float(row["speed_up"]) == pytest.approx(results[0].seconds / result.seconds)
        (line,) = [line for line in printed.splitlines() if line.startswith(f"| {long_history.NAMES[result.name]} ")]
        cells = [cell.strip() for cell in line.split("|")[2:-1]]
        assert cells[:3] == [f"{histories.lengths.mean():.1f}", f"{result.rows.mean():.1f}", f"{result.rows.max()}"]
        assert cells[-2:] == ["5", f"{result.longest:,}"]
    assert results[0].measured > results[1].measured > results[2].measured
    assert results[0].longest < results[1].longest < results[2].longest
    assert "HR@" not in printed and rows[0]["hr"] == ""
    assert (tmp_path / "long_history.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.part"))


def test_longest_history_fits_and_one_item_more_does_not(folder: str, tmp_path: Path) -> None:
    arguments = ["--data", folder, "--min_items", "100", "--users", "2", "--policies", "items", "--budget", "8MiB"]
    (result,) = long_history.main([*arguments, *TINY, "--output", str(tmp_path)])
    data = open_dataset(folder)
    users = np.flatnonzero(data.histories.lengths > 100)[:2]
    items = np.tile(data.histories.take(users).items, 100)
    assert result.limit == "memory" and result.items.sum() < result.longest < items.size
    assert long_history_report.speed_up(result, [result]) is None, "text was not measured"
    model, policy = _model(data), long_history.POLICIES["items"]
    (found,) = model.recommend([items[-result.longest :]], policy, k=3, num_beams=4, memory_budget="8MiB")
    assert len(found) == 3
    with pytest.raises(UserTooLarge, match=f"the latest .* {result.longest} under ItemPatches"):
        model.recommend([items[-result.longest - 1 :]], policy, k=3, num_beams=4, memory_budget="8MiB")


def test_trained_model_is_compared_at_equal_memory(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = open_dataset(folder)
    model = _model(data)
    model.save_pretrained(tmp_path / "model")
    fit_tokenizer(data.titles.values(), 4096).save_pretrained(tmp_path / "model")
    weights = sum(parameter.nbytes for parameter in model.parameters())
    budget = weights + 1_500_000
    arguments = ["--data", folder, "--min_items", "100", "--users", "5", *SMALL]
    arguments += ["--checkpoint", str(tmp_path / "model")]
    results = long_history.main([*arguments, "--budget", f"{budget}B", "--output", str(tmp_path)])

    users = np.flatnonzero(data.histories.lengths > 100)[:5]
    samples = data.samples("test")
    chosen = np.isin(samples.users, users)
    samples = type(samples)(samples.users[chosen], samples.positions[chosen])
    whole, targets = data.before(samples), data.targets(samples)
    options: dict[str, Any] = {"k": 3, "num_beams": 4, "memory_budget": budget}
    for result in results:
        policy, accuracy = long_history.POLICIES[result.name], result.accuracy
        assert accuracy is not None and result.measured <= result.predicted <= budget
        starts = whole.lengths - accuracy.items
        kept = whole.between(np.arange(len(whole)), starts, whole.lengths)
        unseen = [np.setdiff1d(data.item_ids, history) for history in whole]
        lists = model.recommend(kept, policy, allowed_items=unseen, **options)
        expected = evaluate(lists, targets, [3], catalog=model.catalog)
        assert accuracy.evaluation.ranks.tolist() == expected.ranks.tolist()
        # no shorter than they have to be
        longer = whole.between(np.arange(len(whole)), np.maximum(starts - 1, 0), whole.lengths)
        if starts.any():
            with pytest.raises(UserTooLarge):
                model.recommend(longer, policy, allowed_items=unseen, **options)
    text, _, sessions = results
    assert text.accuracy is not None and sessions.accuracy is not None
    assert text.accuracy.items.max() < whole.lengths.max(), "the budget is too small for all of them as text"
    assert sessions.accuracy.items.tolist() == whole.lengths.tolist()
    assert text.items.sum() < sessions.items.sum() == data.histories.take(users).items.size

    assert " HR@3 |" in capsys.readouterr().out
    for row, result in zip(
        csv.DictReader((tmp_path / "long_history.csv").open(encoding="utf-8")), results, strict=True
    ):
        assert result.accuracy is not None
        assert float(row["hr"]) == pytest.approx(result.accuracy.evaluation.hr(3))
        assert int(row["samples"]) == len(whole)


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        (["--budget", "2MiB"], UserTooLarge, "memory_budget: expected at least .* Of this user's .* items the latest"),
        (["--budget", "40 G"], ValueError, "--budget: expected bytes, such as .*\"40GiB\".*, got '40 G'"),
        (["--min_items", "9999"], ValueError, "--min_items: expected fewer than some user's interactions, got 9999"),
        (["--checkpoint", "nowhere"], FileNotFoundError, "--checkpoint: expected a model saved by patchkern"),
        (["--tokenizer", "nowhere"], FileNotFoundError, "--tokenizer: expected the folder of a model, .*'nowhere'"),
        (["--device", "nonsense"], ValueError, "--device: expected one that torch can use here, got 'nonsense'"),
        (["--output", __file__], OSError, "--output: expected a place for long_history.csv that can be written, got"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_written(
    flags: list[str], error: type[Exception], message: str, folder: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        long_history.main(["--data", folder, "--min_items", "100", *SMALL, "--output", str(tmp_path / "run"), *flags])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_beams", "2"], "--num_beams: expected at least k=3"),
        (["--k", "0", "--num_beams", "0"], "--k: expected at least 1, got 0"),
        (["--checkpoint", "run", "--shape", "tiny"], "--shape: expected none with --checkpoint, which has its own"),
        (["--checkpoint", "run", "--tokenizer", "x"], "--tokenizer: expected none with --checkpoint, which has its"),
        (["--item_text", "title"], "--item_text: expected only with --checkpoint, as random weights read titles"),
    ],
)
def test_flags_that_do_not_go_together(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        long_history.parse([*SMALL, *flags])
    assert message in capsys.readouterr().err


def test_a_run_is_read_as_it_was_trained(tmp_path: Path) -> None:
    """Of what it reads of items, and only where it learned the titles that are searched."""
    data = synthetic(20, 30, num_genres=3)
    texts = {item: f"{title} (film)" for item, title in data.titles.items()}
    tokenizer = fit_tokenizer(texts.values(), 300)
    model = pk.PatchedCausalLM(
        scratch_model(tokenizer, "tiny"),
        pk.Catalog.from_titles(data.titles, tokenizer, texts),
        scratch_prompt(tokenizer),
        pk.TextOnly(),
        item_head=True,
    )
    model.save_pretrained(tmp_path / "checkpoint-1", tokenizer=tokenizer)
    write_arguments(tmp_path, {"item_text": "title (kind)"})
    args = long_history.parse([*SMALL, "--checkpoint", str(tmp_path)])
    assert args.item_text == "title (kind)"
    read = long_history.load_model(args, replace(data, texts=texts), torch.device("cpu"))
    assert read.catalog.token_fingerprint == model.catalog.token_fingerprint
    model.learned = ("items",)
    model.save_pretrained(tmp_path / "checkpoint-1", tokenizer=tokenizer)
    with pytest.raises(ValueError, match="--checkpoint: expected a run that learned titles, which are searched, got"):
        long_history.load_model(args, replace(data, texts=texts), torch.device("cpu"))
    ids = pk.ItemModel(catalog_of_ids(data.titles), pk.ItemPatches(), width=8, heads=1, max_positions=40)
    ids.save_pretrained(tmp_path / "ids")
    args.checkpoint = str(tmp_path / "ids")
    with pytest.raises(ValueError, match="--checkpoint: expected a run that learned titles, which are searched, got"):
        long_history.load_model(args, data, torch.device("cpu"))


def test_synthetic_users_are_long_enough_without_any_data() -> None:
    args = long_history.parse([])
    data = long_history.load_data(args)
    assert long_history.long_users(data, args).size >= 20


def test_1b_has_its_own_sizes_and_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_key_value_heads": 2}
    for name, value in {**sizes, "num_attention_heads": 4, "vocab_size": 5000}.items():
        assert name in long_history.LLAMA_1B
        monkeypatch.setitem(long_history.LLAMA_1B, name, value)
    args = long_history.parse(["--shape", "1b", "--dtype", "bfloat16"])
    model = long_history.load_model(args, synthetic(20, 30, num_genres=3), torch.device("cpu"))
    shapes = {tuple(parameter.shape) for parameter in model.parameters()}
    assert shapes == {(5000, 16), (16, 16), (8, 16), (32, 16), (16, 32), (16,)}
    assert model.hf_model.dtype == torch.bfloat16


@pytest.mark.parametrize(("total", "fraction"), [(80, 0.5), (24, 1.0)])
def test_budget_caps_a_larger_gpu(total: int, fraction: float, monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        total_memory = total * 2**30

    set_to: list[Any] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *args: set_to.append(args))
    device = torch.device("cuda:0")
    long_history.cap(40 * 2**30, device)
    assert set_to == [(fraction, device)]


@pytest.mark.gpu
def test_on_a_gpu(folder: str, tmp_path: Path) -> None:
    arguments = ["--data", folder, "--min_items", "100", "--users", "5", "--shape", "tiny", "--budget", "2GiB"]
    try:
        results = long_history.main([*arguments, "--device", "cuda", "--output", str(tmp_path)])
        total = torch.cuda.get_device_properties(0).total_memory
        assert torch.cuda.get_per_process_memory_fraction(0) == pytest.approx(min(1.0, 2**31 / total))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, 0)
    assert [result.name for result in results] == ["text", "items", "sessions"]
    assert all(result.measured > 0 for result in results)
