# SPDX-License-Identifier: Apache-2.0
"""evaluate.py on a tiny model of random weights, against the library called directly; compare.py on what it writes."""

from __future__ import annotations

import copy
import csv
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import patchkern as pk
from patchkern.data import Interactions, open_dataset, prepare, synthetic, write_parquet
from patchkern.evaluation import TRAINING_COUNTS, estimate, paired_difference, training_counts
from patchkern.evaluation.metrics import evaluate as count
from patchkern.models.scratch import fit_tokenizer, scratch_model, scratch_prompt
from patchkern.search.weights import fit_weights
from patchkern.training import target_nll
from recipes import cold_items, compare, evaluate, models, per_sample, ranking
from recipes.baselines.prior import NetworkPrior
from recipes.baselines.runs import Run, load_run
from recipes.baselines.scoring import Ranker
from recipes.baselines.train import main as train_baseline
from recipes.item_models import catalog_of_ids
from recipes.learned import with_learned_rows
from recipes.priors import names_of
from recipes.training_run import write_arguments

BASELINE = ["--width", "8", "--window", "6", "--bf16", "false", "--num_train_epochs", "1"]
SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Interactions]:
    path = tmp_path_factory.mktemp("data") / "small"
    write_parquet(synthetic(60, 50, mean_length=20.0, num_genres=4), path)
    return str(path), open_dataset(path)


@pytest.fixture(scope="module")
def plain(data: tuple[str, Interactions], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a transformers model, as any hub has it."""
    folder = tmp_path_factory.mktemp("models") / "plain"
    tokenizer = fit_tokenizer(data[1].titles.values(), 300)
    scratch_model(tokenizer, **SHAPE).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def run(data: tuple[str, Interactions], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, pk.PatchedCausalLM]:
    """A model that patchkern saved."""
    folder = tmp_path_factory.mktemp("runs") / "items"
    tokenizer = fit_tokenizer(data[1].titles.values(), 300)
    catalog = pk.Catalog.from_titles(data[1].titles, tokenizer)
    policy = pk.ItemPatches(1, max_items=None)
    model = pk.PatchedCausalLM(scratch_model(tokenizer, **SHAPE), catalog, scratch_prompt(tokenizer), policy).eval()
    model.save_pretrained(folder, tokenizer=tokenizer)
    return str(folder), model


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open()))


# ------------------------------------------------------------------ evaluate.py


def test_everything_at_once(
    data: tuple[str, Interactions],
    run: tuple[str, pk.PatchedCausalLM],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (source, interactions), (folder, model) = data, run
    output = tmp_path / "out.csv"
    priors = ["--prior", "transitions", "linear", "--prior_weight", "0.5", "2"]
    flags = ["--exclude_seen", "--slices", "--memory_budget", "2GiB", "--batch_size", "5", "--output", str(output)]
    results = evaluate.main([folder, "--data", source, *priors, *flags])
    printed = capsys.readouterr().out
    together = "+ transitions + linear (weight 0.5, 2)"
    assert list(results) == [
        *("this model", together, "transitions prior alone", "linear prior alone"),
        *("most popular", "most popular, unseen", "transitions, unseen"),
    ]
    samples = interactions.samples("test")
    histories, targets = interactions.before(samples), interactions.targets(samples)
    expected = count(model.recommend(histories, exclude_seen=True), targets, catalog=model.catalog, users=samples.users)
    (found,) = results["this model"]
    assert found.ranks.tolist() == expected.ranks.tolist()
    assert found.as_dict() == expected.as_dict(), "errors are over users"
    assert (
        found.as_dict()["HR@20 ±"]
        != count(model.recommend(histories, exclude_seen=True), targets, catalog=model.catalog).as_dict()["HR@20 ±"]
    )
    for name in results:
        assert f"\n{name} " in printed
    assert f"errors over {np.unique(samples.users).size} users" in printed.replace(
        "± one standard error over", "errors over"
    )

    first, second = (kind(interactions, model.catalog) for kind in (pk.TransitionPrior, pk.LinearPrior))
    lists = model.recommend(histories, exclude_seen=True, prior=lambda past: 0.5 * first(past) + 2 * second(past))
    assert results[together][0].ranks.tolist() == count(lists, targets, catalog=model.catalog).ranks.tolist()
    assert [int(row["rank"]) for row in rows_of(tmp_path / "out-transitions-linear.csv")] == (
        results[together][0].ranks.tolist()
    )

    rows = rows_of(output)
    nll = target_nll(model, interactions.histories, samples)
    assert [float(row["NLL title"]) for row in rows] == pytest.approx(nll.tolist(), abs=1e-4)
    assert [int(row["history_length"]) for row in rows] == histories.lengths.tolist()
    counts = training_counts(interactions, model.catalog)[model.catalog.index_of(targets)]
    assert [int(row["training_count"]) for row in rows] == counts.tolist()
    assert f"{estimate(nll, samples.users).mean:.4f} ± " in printed

    sliced = {
        (row["result"], row["by"], row["slice"], row["measure"]): row for row in rows_of(tmp_path / "out-slices.csv")
    }
    own = [row for key, row in sliced.items() if key[0] == together and key[3] == "HR@20"]
    parts = [row for row in own if row["by"].startswith("training")]
    assert [row["slice"] for row in parts] == ["0", "1-4", "5-19", "20+"] and len(parts) == len(TRAINING_COUNTS)
    assert sum(int(row["samples"]) for row in parts) == samples.users.size
    hits = sum(int(row["samples"]) * float(row["mean"] or 0) for row in parts)
    assert hits == pytest.approx(results[together][0].hits(20).sum())
    few = (counts >= 5) & (counts < 20)
    if few.any():
        assert float(sliced[together, "training interactions of the target", "5-19", "HR@20"]["mean"]) == (
            pytest.approx(results[together][0].take(few).hr(20))
        )
    assert "training interactions of the target (0: cold)" in printed and "HR@20 by history length" in printed
    assert not list(tmp_path.glob("*.part"))


def test_lists_for_other_tools(data: Any, run: Any, tmp_path: Path) -> None:
    (source, interactions), (folder, _) = data, run
    flags = ["--limit", "12", "--prior", "transitions", "--prior_weight", "2", "--output", str(tmp_path / "out.csv")]
    evaluate.main([folder, "--data", source, "--run", str(tmp_path / "lists"), *flags])
    rows = rows_of(tmp_path / "out.csv")
    lines = (tmp_path / "lists.qrels").read_text().splitlines()
    assert lines == [f"{number} 0 {row['target']} 1" for number, row in enumerate(rows)]
    found = [line.split() for line in (tmp_path / "lists").read_text().splitlines()]
    for number, row in enumerate(rows):
        own = [item for query, _, item, *_ in found if query == str(number)]
        same = {item for item, title in interactions.titles.items() if title == interactions.titles[int(row["target"])]}
        assert len(own) == 20 and (int(row["rank"]) > 0) == bool(same & set(map(int, own)))
    (first, *_) = (tmp_path / "lists-transitions-weight-2").read_text().splitlines()
    assert first.endswith(" 1 1 transitions-weight-2")


def test_a_limit_is_spread_over_all_samples(
    data: tuple[str, Interactions], run: tuple[str, pk.PatchedCausalLM], tmp_path: Path
) -> None:
    output = tmp_path / "few.csv"
    evaluate.main([run[0], "--data", data[0], "--limit", "9", "--output", str(output)])
    samples = data[1].samples("test")
    chosen = np.linspace(0, samples.users.size - 1, 9).astype(int)
    assert [int(row["user"]) for row in rows_of(output)] == data[1].user_ids[samples.users[chosen]].tolist()
    assert [int(row["position"]) for row in rows_of(output)] == samples.positions[chosen].tolist()


@pytest.mark.parametrize(
    ("flags", "policy"),
    [
        (["--policy", "text", "--max_items", "7"], pk.TextOnly(7)),
        (["--policy", "text", "--max_items", "7", "--cut_every", "3"], pk.TextOnly(7, cut_every=3)),
        (["--policy", "items", "--keep_text", "2"], pk.ItemPatches(2)),
        (["--policy", "sessions", "--group_size", "3"], pk.SessionPatches(3, align="start")),
    ],
)
def test_zero_shot(
    flags: list[str], policy: Any, data: tuple[str, Interactions], plain: str, run: Any, tmp_path: Path
) -> None:
    output = tmp_path / "zero.csv"
    (found,) = evaluate.main([plain, "--data", data[0], "--output", str(output), "--limit", "20", *flags])["this model"]
    samples = data[1].samples("test").spread(20)
    # the same weights, catalogue and prompt
    lists = run[1].recommend(data[1].before(samples), policy)
    expected = count(lists, data[1].targets(samples), catalog=run[1].catalog)
    assert found.ranks.tolist() == expected.ranks.tolist()
    assert not list(Path(plain).glob("*.csv"))


@pytest.mark.parametrize(
    ("trained", "flags", "policy"),
    [
        (pk.ItemPatches(1, 12), ["items"], pk.ItemPatches(1, 12)),
        (pk.ItemPatches(1, 12, cut_every=4), ["text"], pk.TextOnly(12, cut_every=4)),
        (pk.SessionPatches(3, None), ["sessions", "--max_items", "9"], pk.SessionPatches(3, 9)),
        (pk.SessionPatches(3, None), ["items"], pk.ItemPatches(5, None)),
        (pk.RandomItemPatches(0.3, 30), ["items", "--keep_text", "0"], pk.ItemPatches(0, 30)),
        (pk.Experts(pk.ItemPatches(0, None), count=2, keep=3), ["text"], pk.TextOnly(100)),
        (None, ["sessions"], pk.SessionPatches(align="start")),
    ],
)
def test_a_policy_is_as_trained_but_for_what_is_given(trained: Any, flags: list[str], policy: Any) -> None:
    args = evaluate.parse(["run", "--data", "synthetic", "--policy", *flags])
    assert evaluate.chosen_policy(SimpleNamespace(policy=trained), args) == policy


def test_a_run_knows_what_its_model_reads_of_an_item(data: Any, run: Any, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    write_arguments(tmp_path / "run", {"item_text": "title (year)"})
    for flags, expected in ([], "title (year)"), (["--item_text", "title"], "title"):
        args = evaluate.parse([str(tmp_path / "run"), "--data", "somewhere", *flags])
        assert args.item_text == expected
    runs = [str(tmp_path / "run"), run[0]]
    assert cold_items.parse([runs[0], "--data", "somewhere"]).item_text == "title (year)"
    with pytest.raises(SystemExit):
        cold_items.parse([*runs, "--data", "somewhere"])
    assert cold_items.parse([*runs, "--data", "somewhere", "--item_text", "title"]).item_text == "title"


def test_another_policy_than_the_model_was_saved_with(data: Any, run: Any, tmp_path: Path) -> None:
    flags = ["--data", data[0], "--limit", "12", "--output", str(tmp_path / "x.csv")]
    samples = data[1].samples("test").spread(12)

    def ranks(policy: Any) -> list[int]:
        lists = run[1].recommend(data[1].before(samples), policy)
        return count(lists, data[1].targets(samples), catalog=run[1].catalog).ranks.tolist()

    (found,) = evaluate.main([run[0], *flags, "--policy", "text", "--max_items", "5"])["this model"]
    assert found.ranks.tolist() == ranks(pk.TextOnly(5))
    (found,) = evaluate.main([run[0], *flags, "--keep_text", "3"])["this model"]
    assert found.ranks.tolist() == ranks(pk.ItemPatches(3, None))
    with pytest.raises(ValueError, match="--group_size: expected only with a policy that has it, got ItemPatches"):
        evaluate.main([run[0], *flags, "--group_size", "3"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["runs", "--nu_beams", "40"], "--nu_beams: expected --num_beams?"),
        (["runs", "--exclude-seen"], "--exclude-seen: expected --exclude_seen?"),
        (["runs", "--limit", "0"], "--limit: expected at least 1, got 0"),
        (["runs"], "--policy: expected one with a model that patchkern did not save"),
        (["runs", "--policy", "text", "--memory_budget", "much"], "--memory_budget: expected"),
        (["runs", "--prior_weight", "1"], "--prior_weight: expected a --prior that it weighs"),
        (["runs", "--prior", "linear", "linear"], "--prior: expected each once, got linear linear"),
        (["runs", "--prior", "liner"], "--prior: expected popularity, transitions, linear, or the folder of a run on"),
        (["runs", "--prior", "linear", "--prior_weight", "1", "2"], "expected one for each --prior (1), got 2"),
        (["runs", "--prior", "linear", "--prior_weight", "-1"], "--prior_weight: expected at least 0, got -1.0"),
        (["runs", "--prior", "linear", "--search", "diverse"], "--prior: expected none with --metric paper or"),
        (["runs", "--prior", "linear", "--split", "val"], "--prior_weight: expected with --split val"),
        (["runs", "--ks", "5", "0"], "--ks: expected numbers of at least 1, each once, got 5 0"),
        (
            ["runs", "--ks", "50", "--num_beams", "20"],
            "--num_beams: expected at least 50, the length of the lists, got 20",
        ),
        (["runs", "--metric", "paper", "--targets", "all"], "--metric paper: expected none of --exclude_seen"),
        (["runs", "--metric", "paper", "--search", "beam"], "--search: expected diverse with --metric paper, which de"),
        (["runs", "--fit_limit", "9"], "--fit_limit: expected only where the weight of a --prior is fitted"),
        (["runs", "--prior", "linear", "--prior_weight", "1", "--fit_limit", "9"], "--fit_limit: expected only where"),
    ],
)
def test_wrong_flags(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        evaluate.parse([*flags, "--data", "synthetic"])
    assert message in capsys.readouterr().err


def test_a_run_that_saved_nothing(tmp_path: Path) -> None:
    """As with --save_strategy no, or the network of another recipe: nothing to ask for a policy."""
    write_arguments(tmp_path / "run", {"stage": "items"})
    with pytest.raises(FileNotFoundError, match="checkpoint: expected a model saved by patchkern, or a run with check"):
        evaluate.main([str(tmp_path / "run"), "--data", "synthetic"])
    with pytest.raises(FileNotFoundError, match="runs: expected a model saved by patchkern, or a run with checkpoints"):
        cold_items.main([str(tmp_path / "run"), "--data", "synthetic"])
    with pytest.raises(FileNotFoundError, match="--model: expected a model saved by patchkern"):
        models.load_model(str(tmp_path / "run"), {})


# ------------------------------------------------------------------ the item head


@pytest.fixture(scope="module")
def head(data: Any, run: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, pk.PatchedCausalLM]:
    folder = tmp_path_factory.mktemp("runs") / "head"
    hf_model, policy = copy.deepcopy(run[1].hf_model), pk.ItemPatches(1, max_items=None)
    model = pk.PatchedCausalLM(hf_model, run[1].catalog, run[1].prompt, policy, item_head=True).eval()
    assert model.item_head is not None
    model.item_head.start_from_counts(training_counts(data[1], model.catalog))
    model.save_pretrained(folder, tokenizer=run[1].tokenizer or fit_tokenizer(data[1].titles.values(), 300))
    return str(folder), model


def test_everything_from_one_pass(data: Any, head: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (source, interactions), (folder, model) = data, head
    output = tmp_path / "items.csv"
    flags = ["--search", "items", "--exclude_seen", "--prior", "transitions", "linear", "--prior_weight", "0.5", "2"]
    results = evaluate.main([folder, "--data", source, "--output", str(output), *flags])
    samples = interactions.samples("test")
    histories, targets = interactions.before(samples), interactions.targets(samples)
    first, second = (kind(interactions, model.catalog) for kind in (pk.TransitionPrior, pk.LinearPrior))
    priors = {
        "this model": None,
        "+ transitions (weight 0.5)": lambda past: 0.5 * first(past),
        "+ linear (weight 2)": lambda past: 2 * second(past),
        "+ transitions + linear (weight 0.5, 2)": lambda past: 0.5 * first(past) + 2 * second(past),
    }
    assert list(results)[:4] == list(priors)
    log_probs = model.score_items(histories, head="items").astype(np.float64)
    index = model.catalog.index_of(targets)
    files = ["items", "items-transitions", "items-linear", "items-transitions-linear"]
    for (name, prior), file in zip(priors.items(), files, strict=True):
        lists = model.recommend(histories, search="items", exclude_seen=True, prior=prior)
        expected = count(lists, targets, catalog=model.catalog)
        assert results[name][0].ranks.tolist() == expected.ranks.tolist()
        scores = log_probs if prior is None else log_probs + prior(histories)
        nll = np.log(np.exp(scores).sum(axis=1)) - scores[np.arange(index.size), index]
        written = [float(row["NLL item"]) for row in rows_of(tmp_path / f"{file}.csv")]
        assert written == pytest.approx(nll.tolist(), abs=1e-4)
    alone = estimate(-first(histories)[np.arange(index.size), index], samples.users)
    printed = capsys.readouterr().out
    assert f"{alone}" in printed, "the prior's own likelihood"
    assert "NLL item" in printed and "NLL title" not in printed and "users/s" in printed


def test_a_search_for_titles_says_the_likelihood_of_items_too(data: Any, head: Any, tmp_path: Path) -> None:
    output = tmp_path / "titles.csv"
    evaluate.main([head[0], "--data", data[0], "--limit", "9", "--output", str(output)])
    samples = data[1].samples("test").spread(9)
    nll = target_nll(head[1], data[1].histories, samples, head="items")
    assert [float(row["NLL item"]) for row in rows_of(output)] == pytest.approx(nll.tolist(), abs=1e-4)


def test_weights_are_fitted_on_the_items_that_the_head_finds(data: Any, head: Any, tmp_path: Path) -> None:
    flags = ["--search", "items", "--prior", "popularity", "--exclude_seen", "--output", str(tmp_path / "fit.csv")]
    name = list(evaluate.main([head[0], "--data", data[0], *flags]))[1]
    val = data[1].samples("val")
    prior = pk.PopularityPrior(data[1], head[1].catalog)
    fit = pk.fit_prior_weight(
        head[1], data[1].before(val), data[1].targets(val), None, prior, search="items", exclude_seen=True
    )
    assert name == f"+ popularity (weight {fit.weight:g})"


def test_weights_of_several_priors_are_fitted_together(data: Any, head: Any, tmp_path: Path) -> None:
    flags = ["--search", "items", "--fit_limit", "12", "--limit", "5", "--exclude_seen"]
    output = ["--output", str(tmp_path / "fit.csv")]
    names = list(evaluate.main([head[0], "--data", data[0], "--prior", "popularity", "transitions", *flags, *output]))
    val = data[1].samples("val").spread(12)
    past, targets = data[1].before(val), head[1].catalog.index_of(data[1].targets(val))
    scores = head[1].score_items(past, head="items")
    scores[np.repeat(np.arange(12), past.lengths), head[1].catalog.index_of(past.items)] = -np.inf
    priors = [kind(data[1], head[1].catalog)(past) for kind in (pk.PopularityPrior, pk.TransitionPrior)]
    weights = fit_weights(np.stack([scores, *priors], axis=2), targets)
    assert names[3] == f"+ popularity + transitions (weight {', '.join(f'{weight:g}' for weight in weights)})"


def test_flags_that_would_not_be_heeded(data: Any, head: Any, tmp_path: Path) -> None:
    command = [head[0], "--data", data[0], "--search", "items", "--limit", "5", "--output", str(tmp_path / "a.csv")]
    for flag, value in ("memory_budget", "1GiB"), ("batch_size", "8"), ("num_beams", "40"):
        with pytest.raises(ValueError, match=rf"--{flag}: expected none with --search items, .* 4,096 rows"):
            evaluate.main([*command, f"--{flag}", value])
    with pytest.raises(ValueError, match="--run: expected another file than the CSV's, got"):
        evaluate.main([*command, "--run", str(tmp_path / "a.csv")])
    assert not list(tmp_path.iterdir())


def test_flags_of_other_models(data: Any, hstu: Any, tmp_path: Path) -> None:
    memory = pk.PreferenceMemory(pk.ItemPatches(0, None), slots=2, block=4)
    model = pk.ItemModel(catalog_of_ids(data[1].titles), width=8, heads=2, max_positions=80)
    with_learned_rows(model, memory, data[1], 0, {}).save_pretrained(tmp_path / "memory")
    command = ["--data", data[0], "--limit", "5", "--output", str(tmp_path / "a.csv")]
    evaluate.main([str(tmp_path / "memory"), *command, "--one_time"])
    with pytest.raises(ValueError, match="--one_time: expected a model with a memory, got RecurrentMemory and ItemPat"):
        evaluate.main([str(tmp_path / "memory"), *command, "--one_time", "--policy", "items"])
    with pytest.raises(ValueError, match="--item_text: expected none with ItemModel, which reads ids, got 'title'"):
        evaluate.main([hstu[0], *command, "--item_text", "title"])


def test_searching_items_needs_a_head(data: Any, run: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model: expected one with an item head"):
        evaluate.main([run[0], "--data", data[0], "--search", "items", "--output", str(tmp_path / "x.csv")])


# ------------------------------------------------------------------ trained models as priors


@pytest.fixture(scope="module")
def hstu(data: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, pk.ItemModel]:
    """Reads ids, and histories in another way than the language model: cut, as training in passes cuts them."""
    folder = tmp_path_factory.mktemp("runs") / "hstu" / "checkpoint-9"
    policy = pk.ItemPatches(0, max_items=6, cut_every=6)
    model = pk.ItemModel(
        catalog_of_ids(data[1].titles), policy, block="hstu", width=8, heads=2, max_positions=13, seed=1
    )
    with torch.no_grad():
        model.hf_model.items.weight.mul_(30)
    model.eval().save_pretrained(folder)
    return str(folder.parent), model


def test_trained_models_of_several_kinds(
    data: Any, head: Any, hstu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows against `recommend` with `ItemHeadPrior`, which computes every history anew."""
    monkeypatch.setattr(ranking, "SCORES_AT_ONCE", 50 * 37)  # several parts
    (source, interactions), (folder, model) = data, head
    baseline = tmp_path / "caser"
    train_baseline(["--model", "caser", "--data", source, "--output_dir", str(baseline), "--limit", "5", *BASELINE])
    priors = ["--prior", "linear", hstu[0], str(baseline), "--prior_weight", "0.5", "2", "3"]
    flags = ["--search", "items", "--exclude_seen", "--output", str(tmp_path / "out.csv")]
    results = evaluate.main([folder, "--data", source, *flags, *priors])

    samples = interactions.samples("test")
    histories, targets = interactions.before(samples), interactions.targets(samples)
    linear, other = pk.LinearPrior(interactions, model.catalog), pk.ItemHeadPrior(hstu[1])
    assert not np.allclose(other(histories), model.score_items(histories, head="items"), atol=0.1)
    network, settings = load_run(Run(baseline), model.catalog)
    logits = np.zeros((samples.users.size, 50))
    for chosen, scores in Ranker(interactions, model.catalog, settings.window).scores(network, samples):
        logits[chosen] = scores
    caser = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    expected = {
        "+ linear (weight 0.5)": 0.5 * linear(histories),
        "+ hstu (weight 2)": 2 * other(histories),
        "+ caser (weight 3)": 3 * caser,
    }
    expected["+ linear + hstu + caser (weight 0.5, 2, 3)"] = sum(expected.values())
    alone = ["linear prior alone", "hstu prior alone", "caser prior alone"]
    assert list(results)[:8] == ["this model", *expected, *alone]
    files = ["out-linear", "out-hstu", "out-caser", "out-linear-hstu-caser"]
    place = {tuple(items.tolist()): number for number, items in enumerate(histories)}
    assert len(place) == len(histories), "each history once, or a prior could not be looked up by it"
    for (name, table), file in zip(expected.items(), files, strict=True):
        prior = lambda past, table=table: table[[place[tuple(items.tolist())] for items in past]]  # noqa: E731
        lists = model.recommend(histories, search="items", exclude_seen=True, prior=prior)
        found = count(lists, targets, catalog=model.catalog)
        assert results[name][0].ranks.tolist() == found.ranks.tolist()
        assert [int(row["rank"]) for row in rows_of(tmp_path / f"{file}.csv")] == found.ranks.tolist()
    lists = hstu[1].recommend(histories, search="items", exclude_seen=True)
    assert results["hstu prior alone"][0].ranks.tolist() == count(lists, targets, catalog=model.catalog).ranks.tolist()

    # the other way round: that model as a prior of the network
    flags = ["--evaluate_only", "--data", source, "--output_dir", str(baseline)]
    ranked = train_baseline([*flags, "--prior", hstu[0], "--prior_weight", "2"])["left_out"]["+ hstu (weight 2)"]
    total = caser + 2 * other(histories)
    total[np.repeat(np.arange(len(histories)), histories.lengths), model.catalog.index_of(histories.items)] = -np.inf
    lists = model.catalog.item_ids[np.argsort(-total, axis=1, kind="stable")[:, :20]].tolist()
    assert ranked[0].ranks.tolist() == count(lists, targets, catalog=model.catalog).ranks.tolist()
    unknown = NetworkPrior(network, model.catalog, settings.window)(pk.Histories.coerce([[], histories.items[:2]]))
    bias = network.bias.detach().double()
    np.testing.assert_allclose(unknown[0], torch.log_softmax(bias, 0).numpy(), rtol=0, atol=1e-5)
    assert unknown.shape == (2, 50) and not np.allclose(unknown[1], unknown[0])


def test_the_weight_of_a_trained_model_is_fitted(data: Any, head: Any, hstu: Any, tmp_path: Path) -> None:
    flags = ["--search", "items", "--prior", hstu[0], "--fit_limit", "12", "--limit", "5"]
    name = list(evaluate.main([head[0], "--data", data[0], *flags, "--output", str(tmp_path / "fit.csv")]))[1]
    val = data[1].samples("val").spread(12)
    past, targets = data[1].before(val), head[1].catalog.index_of(data[1].targets(val))
    scores = [head[1].score_items(past, head="items"), pk.ItemHeadPrior(hstu[1])(past)]
    (weight,) = fit_weights(np.stack(scores, axis=2), targets)
    assert name == f"+ hstu (weight {weight:g})"


def test_a_search_for_titles_with_a_trained_model(data: Any, run: Any, head: Any, tmp_path: Path) -> None:
    flags = ["--prior", head[0], "--prior_weight", "0.5", "--limit", "9", "--output", str(tmp_path / "x.csv")]
    results = evaluate.main([run[0], "--data", data[0], *flags])
    samples = data[1].samples("test").spread(9)
    lists = run[1].recommend(data[1].before(samples), prior=pk.ItemHeadPrior(head[1]), prior_weight=0.5)
    expected = count(lists, data[1].targets(samples), catalog=run[1].catalog)
    assert results["+ head (weight 0.5)"][0].ranks.tolist() == expected.ranks.tolist()


def test_runs_that_cannot_be_priors(data: Any, run: Any, head: Any, tmp_path: Path) -> None:
    flags = ["--data", data[0], "--search", "items", "--prior_weight", "1", "--output", str(tmp_path / "x.csv")]
    titles = data[1].titles
    without, turned = (dict(list(titles.items())[:-1]), dict(reversed(titles.items())))
    for name, other, message in (
        (
            "fewer",
            without,
            r"--prior: expected a run over the 50 items of synthetic, got '.*fewer', over 49, 49 of these",
        ),
        (
            "turned",
            turned,
            "--prior: expected a run over the 50 items of synthetic, got '.*turned', over these in anoth",
        ),
    ):
        pk.ItemModel(catalog_of_ids(other), pk.ItemPatches(0), width=8, max_positions=9).save_pretrained(
            tmp_path / name
        )
        with pytest.raises(ValueError, match=message):
            evaluate.main([head[0], "--prior", str(tmp_path / name), *flags])
    pk.ItemModel(catalog_of_ids(titles), width=8, max_positions=9).save_pretrained(tmp_path / "unread")
    with pytest.raises(
        ValueError, match=r"--prior: expected .* with the policy it was trained with, got '.*unread', wi"
    ):
        evaluate.main([head[0], "--prior", str(tmp_path / "unread"), *flags])
    with pytest.raises(ValueError, match=f"--prior: expected .* with an item head .*, got '{run[0]}', without one"):
        evaluate.main([head[0], "--prior", run[0], *flags])
    assert not (tmp_path / "x.csv").exists()


def test_names_of_priors() -> None:
    assert names_of(["linear", "runs/hstu", "./runs/a/items", "runs/b/items/"]) == [
        "linear",
        "hstu",
        "a-items",
        "b-items",
    ]
    assert names_of(["runs/head/checkpoint-429", "runs/head"]) == ["head-checkpoint-429", "head"]


# ------------------------------------------------------------------ several targets


def test_all_targets_of_a_user_at_once(
    data: Any, head: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (source, _), (folder, model) = data, head
    flags = ["--split_by", "leave_two_out", "--targets", "all", "--ks", "40", "5", "--search", "items", "--slices"]
    prior = ["--prior", "transitions", "--prior_weight", "2"]
    output = tmp_path / "all.csv"
    files = ["--output", str(output), "--run", str(tmp_path / "lists")]
    results = evaluate.main([folder, "--data", source, *flags, *prior, *files])
    printed = capsys.readouterr().out
    two = prepare(open_dataset(source), split_by="leave_two_out")
    samples, targets = two.target_sets("test")
    assert samples.users.size and set(targets.lengths.tolist()) == {2}
    lists = model.recommend(two.before(samples), k=40, search="items")
    expected = count(lists, targets, ks=[5, 40], catalog=model.catalog, users=samples.users)
    (found,) = results["this model"]
    assert found.as_dict() == expected.as_dict() and "Recall@40" in found.as_dict()
    assert f"  {estimate(expected.recalls(5), samples.users)}" in printed
    assert "difference of Recall@40 on the same samples" in printed and "Recall@40 by history length" in printed
    assert "NLL" not in printed, "likelihoods are of one target"

    rows = rows_of(output)
    assert [row["target"].split() for row in rows] == [[str(item) for item in items.tolist()] for items in targets]
    assert [int(row["rank"]) for row in rows] == expected.first_ranks.tolist()
    # compare.py counts the file as evaluate did
    measures = per_sample.read(output).measures()
    for name in ("HR@5", "HR@40", "Recall@5", "Recall@40", "NDCG@5", "NDCG@40", "MRR@40"):
        assert measures[name].tolist() == pytest.approx(expected.per_sample()[name].tolist())
    counts = training_counts(two, model.catalog)[model.catalog.index_of(targets.items)].reshape(-1, 2)
    assert [int(row["training_count"]) for row in rows] == (counts.sum(axis=1) // 2).tolist()
    qrels = (tmp_path / "lists.qrels").read_text().splitlines()
    assert qrels == [f"{n} 0 {item} 1" for n, items in enumerate(targets) for item in items.tolist()]

    few = evaluate.main([folder, "--data", source, *flags, "--limit", "7", "--output", str(tmp_path / "few.csv")])
    chosen = np.linspace(0, samples.users.size - 1, 7).astype(int)
    assert few["this model"][0].as_dict() == expected.take(chosen).as_dict()


def test_list_lengths(data: Any, run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--data", data[0], "--limit", "9", "--output", str(tmp_path / "ks.csv")]
    (found,) = evaluate.main([run[0], *flags, "--ks", "5", "1", "30"])["this model"]
    samples = data[1].samples("test").spread(9)
    lists = run[1].recommend(data[1].before(samples), k=30, num_beams=30)
    expected = count(lists, data[1].targets(samples), ks=[1, 5, 30], catalog=run[1].catalog, users=samples.users)
    assert found.as_dict() == expected.as_dict()
    header = next(line.split() for line in capsys.readouterr().out.splitlines() if line.split()[:1] == ["HR@1"])
    assert header == [f"{measure}@{k}" for measure in ("HR", "NDCG") for k in (1, 5, 30)]
    assert {"hit@1", "hit@5", "hit@30"} <= set(rows_of(tmp_path / "ks.csv")[0])
    with pytest.raises(ValueError, match="--ks: expected at most the 50 items of synthetic, got 51"):
        evaluate.main([run[0], *flags, "--ks", "51"])


# ------------------------------------------------------------------ prompts that samples share


@pytest.mark.parametrize("policy", [pk.TextOnly(None), pk.ItemPatches(1, None), pk.SessionPatches(3, None, "start")])
def test_shared_prompts_change_nothing(policy: Any, data: Any, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In double precision the scores too, up to its rounding."""
    model = pk.PatchedCausalLM(run[1].hf_model.to(torch.float64), run[1].catalog, run[1].prompt, policy)
    samples = data[1].samples("test")
    monkeypatch.setattr(ranking, "SHARED_ENOUGH", 0.0)
    options = {"batch_size": 7, "k": 5, "num_beams": 5, "exclude_seen": True}
    caches = []
    make = pk.UserCache

    def kept(*arguments: Any) -> pk.UserCache:
        caches.append(make(*arguments))
        return caches[-1]

    monkeypatch.setattr(pk, "UserCache", kept)
    shared = ranking.recommend(model, data[1], samples, policy, **options)
    apart = model.recommend(data[1].before(samples), policy, **options)
    run[1].hf_model.to(torch.float32)
    (cache,) = caches
    assert 0 < cache.num_bytes <= cache.max_bytes
    assert [[item for item, _ in row] for row in shared] == [[item for item, _ in row] for row in apart]
    scores = [[[score for _, score in row] for row in lists] for lists in (shared, apart)]
    np.testing.assert_allclose(*scores, rtol=0, atol=1e-10)


def test_prompts_are_shared_where_that_pays(data: Any, run: Any) -> None:
    model, samples = run[1], data[1].samples("test")
    histories = data[1].before(samples)
    text = ranking.shared_rows(model, histories, pk.TextOnly(None))
    assert 0.5 < text < 1 and ranking.shared_rows(model, histories, pk.TextOnly(2)) < 0.1
    # by hand: what two samples one after the other begin with
    one, other = (pk.build_layout(model.catalog, histories.take([n]), pk.TextOnly(None), model.prompt) for n in (0, 1))
    rows = [pk.row_hashes(layout).tolist() for layout in (one, other)]
    same = next(n for n, (a, b) in enumerate(zip(*rows, strict=False)) if a != b)
    prefix = len(model.prompt.prefix)
    expected = (same - prefix) / (len(rows[1]) - prefix)
    assert ranking.shared_rows(model, histories.take([0, 1]), pk.TextOnly(None)) == pytest.approx(expected)

    def cache(policy: Any, batch_size: int = 8, budget: Any = None) -> Any:
        return ranking.prompt_cache(model, histories, policy, batch_size, budget)

    assert cache(pk.TextOnly(None)) is not None
    assert cache(pk.TextOnly(2)) is None, "nothing to share"
    assert cache(pk.TextOnly(None), batch_size=len(histories)) is None, "one batch"
    most = cache(pk.TextOnly(None)).max_bytes
    assert (
        cache(pk.TextOnly(None), budget=4 * most) is not None and cache(pk.TextOnly(None), budget=4 * most - 1) is None
    )


@pytest.mark.parametrize(("size", "width"), [(0, 3), (1, 3), (7, 3), (9, 3), (10, 4), (5, 64)])
def test_lanes_hold_every_sample_once_and_in_order(size: int, width: int) -> None:
    rounds = list(ranking.lanes(size, width))
    assert sorted(sample for _, chosen in rounds for sample in chosen.tolist()) == list(range(size))
    assert all(len(set(lane.tolist())) == lane.size <= width for lane, _ in rounds)
    last: dict[int, int] = {}
    for lane, chosen in rounds:
        for number, sample in zip(lane.tolist(), chosen.tolist(), strict=True):
            assert sample == last.get(number, sample - 1) + 1
            last[number] = sample


# ------------------------------------------------------------------ compare.py


def written(path: Path, users: list[Any], ranks: list[int], **changed: Any) -> Path:
    size = len(users)
    columns = {
        "user": users, "position": range(size), "target": [10 + n for n in range(size)], "rank": ranks,
        "hit@1": [int(rank == 1) for rank in ranks], "hit@3": [int(0 < rank <= 3) for rank in ranks],
        "NLL title": [0.5 * rank for rank in ranks], "history_length": [30] * size, "training_count": range(size),
        **changed,
    }  # fmt: skip
    per_sample.write(path, {name: np.array(list(column)) for name, column in columns.items()})
    return path


def test_two_files_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    users, ranks = ["a", "a", "b", "c"], ([1, 0, 3, 2], [1, 1, 0, 1])
    one, other = (written(tmp_path / f"{n}.csv", users, ranks[n]) for n in (0, 1))
    found = compare.main([str(one), str(other), "--slices"])
    assert list(found) == ["HR@1", "HR@3", "NDCG@3", "MRR@3", "NLL title"]
    first, second, difference = found["HR@1"]
    assert first == estimate([1, 0, 0, 0], users) and second == estimate([1, 1, 0, 1], users)
    assert difference == paired_difference([1, 1, 0, 1], [1, 0, 0, 0], users)
    gains = [[1, 0, 0.5, 1 / math.log2(3)], [1, 1, 0, 1]]
    assert found["NDCG@3"][2].mean == pytest.approx(np.mean(gains[1]) - np.mean(gains[0]))
    assert found["MRR@3"][0].mean == pytest.approx((1 + 1 / 3 + 1 / 2) / 4)
    assert found["NLL title"][2] == paired_difference([0.5, 0.5, 0, 0.5], [0.5, 0, 1.5, 1], users)
    printed = capsys.readouterr().out
    assert "4 samples of 3 users" in printed and f"| HR@1      | {first} | {second} | " in printed
    assert "history length 20-49: 4 samples of 3 users" in printed
    assert "training interactions of the target 1-4: 3 samples of 3 users" in printed


def test_one_users_samples_have_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = (written(tmp_path / f"{n}.csv", ["a", "a"], ranks) for n, ranks in enumerate([[1, 0], [1, 1]]))
    compare.main([str(one), str(other)])
    printed = capsys.readouterr().out
    assert "2 samples of 1 users" in printed and "nan" not in printed
    (line,) = [line for line in printed.splitlines() if line.startswith("| HR@1 ")]
    cells = [cell.strip() for cell in line.split("|")[2:-1]]
    assert cells == ["0.5000 (one user)", "1.0000 (one user)", "+0.5000 (one user)", ""]


def test_another_order_is_the_same(tmp_path: Path) -> None:
    one = written(tmp_path / "1.csv", [1, 1, 2], [1, 0, 2])
    other = written(tmp_path / "2.csv", [2, 1, 1], [2, 0, 1], position=[2, 1, 0], target=[12, 11, 10])
    assert all(difference.mean == 0 for _, _, difference in compare.main([str(one), str(other)]).values())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"target": [10, 11, 99]}, "1 only in .*2.csv, such as the one of user 2 at position 2, target 99; 1 only in "),
        ({"users": [1, 1, 3]}, "1 only in .*2.csv, such as the one of user 3 at position 2, target 12"),
        ({"position": [0, 0, 2], "target": [10, 10, 12]}, "expected every sample once, got the one of user 1 at posi"),
        ({"hit@1": ["x", "0", "0"]}, "2.csv: expected 9 values in line 2"),
    ],
)
def test_files_of_other_samples_are_refused(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    one = written(tmp_path / "1.csv", [1, 1, 2], [1, 0, 2])
    other = written(tmp_path / "2.csv", changed.pop("users", [1, 1, 2]), [1, 0, 2], **changed)
    with pytest.raises(ValueError, match=message):
        compare.main([str(one), str(other)])


def test_files_without_a_measure_in_common_are_refused(tmp_path: Path) -> None:
    columns = {"user": [1], "position": [0], "target": [9], "rank": [1], "history_length": [3], "training_count": [4]}
    for k in (5, 10):
        per_sample.write(tmp_path / f"{k}.csv", {n: np.array(c) for n, c in {**columns, f"hit@{k}": [1]}.items()})
    with pytest.raises(
        ValueError, match=r"10.csv: expected some measure of .*5.csv \(HR@5, NDCG@5, MRR@5\), got HR@10"
    ):
        compare.main([str(tmp_path / "5.csv"), str(tmp_path / "10.csv")])


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"x.csv: expected a file of evaluate.py, with user, .* got columns a, b"):
        per_sample.read(path)


def test_what_evaluate_writes_is_read(data: Any, run: Any, tmp_path: Path) -> None:
    output = tmp_path / "out.csv"
    flags = [
        "--data",
        data[0],
        "--prior",
        "popularity",
        "--prior_weight",
        "1",
        "--limit",
        "30",
        "--output",
        str(output),
    ]
    results = evaluate.main([run[0], *flags])
    found = compare.main([str(output), str(tmp_path / "out-popularity.csv")])
    (alone,), (together,) = list(results.values())[:2]
    for name, difference in together.minus(alone).items():
        if name in found:
            assert found[name][2].mean == pytest.approx(difference.mean)
            assert found[name][2].error == pytest.approx(difference.error)
    assert list(found) == ["HR@10", "HR@20", "NDCG@20", "MRR@20"], "a likelihood is only the model's own"
