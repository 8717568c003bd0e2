# SPDX-License-Identifier: Apache-2.0
"""recipes/baselines: networks against their definitions, training and resuming on tiny data, errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import patchkern as pk
from patchkern.data import Interactions, synthetic, write_parquet
from patchkern.evaluation import most_popular
from recipes import compare, per_sample
from recipes.baselines import losses
from recipes.baselines.batches import TrainingHistories, item_positions, sample_windows
from recipes.baselines.flags import parse
from recipes.baselines.linrec import LinearAttention, linear_attention
from recipes.baselines.mamba4rec import selective_scan
from recipes.baselines.networks import NETWORKS, Recommender
from recipes.baselines.runs import Run
from recipes.baselines.settings import SETTINGS, Settings
from recipes.baselines.train import main

TINY = Settings(width=16, layers=1, dropout=0.0, window=20)
FLAGS = ["--width", "16", "--layers", "1", "--window", "12", "--dropout", "0.1", "--bf16", "false"]


@pytest.fixture(scope="module")
def data() -> Interactions:
    return synthetic(80, 60, mean_length=18.0, num_genres=3)


@pytest.fixture(scope="module")
def source(data: Interactions, tmp_path_factory: pytest.TempPathFactory) -> str:
    pytest.importorskip("pyarrow", reason="needs pyarrow")
    path = tmp_path_factory.mktemp("data") / "small"
    write_parquet(data, path)
    return str(path)


@pytest.fixture(scope="module")
def catalog(data: Interactions) -> pk.Catalog:
    return pk.Catalog.from_titles(data.titles, lambda title: list(title.encode()))


@pytest.fixture(scope="module")
def encoder(data: Interactions, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a sentence encoder of random weights."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("encoder")
    words = sorted({word for title in data.titles.values() for word in title.lower().split()})
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(words) + 5, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    return str(folder)


# ------------------------------------------------------------------ networks


def recommender(name: str, settings: Settings = TINY) -> Recommender:
    titles = torch.randn(50, 12) if name == "morec" else None
    model = Recommender(name, 50, settings, titles)
    with torch.no_grad():  # no weight so small that it hides what it multiplies
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.double().eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_no_position_sees_a_later_one(name: str) -> None:
    model = recommender(name)
    histories = torch.randint(50, (3, 20))
    states, vectors = model(histories)
    assert states.shape == (3, 20, 16) and vectors.shape == (50, 16)
    for place in (1, 7, 19):
        changed = histories.clone()
        changed[:, place:] = (changed[:, place:] + 1 + torch.randint(49, (3, 20 - place))) % 50
        others, _ = model(changed)
        torch.testing.assert_close(others[:, :place], states[:, :place])
        assert (others[:, place] - states[:, place]).abs().amax(1).min() > 1e-6
        assert (others[:, -1] - states[:, -1]).abs().amax(1).min() > 1e-9


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("length", [1, 2, 13])
def test_padding_changes_nothing(name: str, length: int) -> None:
    model = recommender(name)
    histories = torch.randint(50, (2, length))
    padded = torch.cat([histories, torch.randint(50, (2, 20 - length))], dim=1)
    torch.testing.assert_close(model(padded)[0][:, :length], model(histories)[0])


@pytest.mark.parametrize("name", NETWORKS)
def test_the_first_item_is_remembered_where_the_network_can(name: str) -> None:
    model = recommender(name)
    histories = torch.randint(1, 50, (1, 20))
    changed = histories.clone()
    changed[0, 0] = 0
    with torch.no_grad():
        moved = float((model(changed)[0] - model(histories)[0])[0, -1].abs().max())
    assert (moved == 0) == (name == "caser")


@pytest.mark.parametrize("length", [1, 5, 8, 9, 23])
def test_the_scan_is_the_loop(length: int) -> None:
    torch.manual_seed(length)
    batch, channels, entries = 2, 3, 4
    shapes = [(length, batch, channels)] * 2 + [(channels, entries)] + [(length, batch, entries)] * 2
    inputs, steps, rates, write, read = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    steps, rates = F.softplus(steps), -F.softplus(rates)
    given = [tensor.requires_grad_() for tensor in (inputs, steps, rates, write, read)]

    def loop() -> torch.Tensor:
        state, outputs = torch.zeros(batch, channels, entries, dtype=torch.float64), []
        for time in range(length):
            decay = torch.exp(steps[time][:, :, None] * rates)
            state = decay * state + (steps[time] * inputs[time])[:, :, None] * write[time][:, None]
            outputs.append((state * read[time][:, None]).sum(2))
        return torch.stack(outputs)

    found, expected = selective_scan(*given), loop()
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(expected)
    grads = torch.autograd.grad(found, given, weights)
    for grad, own in zip(grads, torch.autograd.grad(expected, given, weights), strict=True):
        torch.testing.assert_close(grad, own)
    single = [tensor.detach().float() for tensor in given]
    torch.testing.assert_close(selective_scan(*single).double(), expected.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [1, 31, 32, 33, 70])
def test_linear_attention_is_its_quadratic_form(length: int) -> None:
    query, key, value = (torch.randn(2, 3, length, width, dtype=torch.float64) for width in (4, 4, 5))
    torch.testing.assert_close(linear_attention(query, key, value), torch.tril(query @ key.mT) @ value)
    torch.testing.assert_close(linear_attention(query, key, value, chunk=7), torch.tril(query @ key.mT) @ value)


def test_linrec_at_the_last_position_is_linrec() -> None:
    """Where keys are normalised over the whole history, as published."""
    attention = LinearAttention(TINY).double()
    vectors = torch.randn(2, 9, 16, dtype=torch.float64)
    query, key, value = attention.inputs(vectors).chunk(3, dim=2)
    mixed = []
    for part in (slice(0, 8), slice(8, 16)):  # two heads
        query_part, key_part = F.elu(query[:, :, part]), F.elu(key[:, :, part])
        query_part = query_part / query_part.norm(dim=2, keepdim=True)
        key_part = key_part / key_part.norm(dim=1, keepdim=True)
        mixed.append(query_part @ (key_part.mT @ value[:, :, part]))
    expected = attention.output(torch.cat(mixed, dim=2))
    torch.testing.assert_close(attention(vectors)[:, -1], expected[:, -1])


# ------------------------------------------------------------------ batches and losses


def test_every_item_but_the_first_is_a_target_once(data: Interactions, catalog: pk.Catalog) -> None:
    histories, random = TrainingHistories(data, catalog), np.random.default_rng(0)
    items = item_positions(data, catalog)
    ends = data.ranges["train"][:, 1]
    expected = sorted(
        item
        for begin, end in zip(data.histories.offsets[:-1], ends, strict=True)
        for item in items[begin + 1 : begin + end].tolist()
    )
    for window in (7, 500):
        settings = Settings(window=window, batch=300)
        count, batches = histories.batches(settings, random)
        found, sizes = [], []
        for batch in batches:
            sizes.append(batch.histories.numel())
            assert batch.histories.shape[1] <= window
            found += batch.targets.tolist()
            flat = batch.histories.flatten()[batch.rows]
            pairs = set(zip(flat.tolist(), batch.targets.tolist(), strict=True))
            followers = set(zip(items[:-1].tolist(), items[1:].tolist(), strict=True))
            assert pairs <= followers
        assert sorted(found) == expected and len(sizes) == count
        assert max(sizes) <= max(300, int(ends.max()))


def test_each_sample_has_a_window_of_its_own(data: Interactions, catalog: pk.Catalog) -> None:
    samples = data.samples("train")
    windows = sample_windows(data, item_positions(data, catalog), samples, 10)
    parts = windows.parts(64)
    assert sorted(np.concatenate(parts).tolist()) == list(range(samples.users.size))
    assert max(part.size for part in parts) == 64
    for part in parts[:: len(parts) // 3]:
        batch = windows.batch(part)
        own = data.before(samples.take(part), 10)
        lengths = torch.from_numpy(own.lengths)
        assert (batch.rows - torch.arange(part.size) * batch.histories.shape[1] == lengths - 1).all()
        for row, length, history in zip(batch.histories, lengths, range(part.size), strict=True):
            assert row[:length].tolist() == catalog.index_of(own[history]).tolist()
        assert batch.targets.tolist() == catalog.index_of(data.targets(samples.take(part))).tolist()


def test_losses_are_cross_entropies() -> None:
    states, vectors, bias = torch.randn(40, 8), torch.randn(30, 8), torch.randn(30)
    targets = torch.randint(30, (40,))
    scores = states @ vectors.T + bias
    found = losses.softmax(states, vectors, bias, targets, bf16=False)
    torch.testing.assert_close(found, F.cross_entropy(scores, targets))
    rounded = losses.softmax(states, vectors, bias, targets, bf16=True)
    assert 0 < abs(float(rounded - found)) < 0.05
    # of two items, the one drawn is the other
    both = losses.binary(states, vectors[:2], bias[:2], targets % 2)
    truth = F.one_hot(targets % 2, 2).float()
    torch.testing.assert_close(both, 2 * F.binary_cross_entropy_with_logits(scores[:, :2], truth))


# ------------------------------------------------------------------ the recipe


def test_both_settings_learn(data: Interactions, source: str, tmp_path: Path) -> None:
    samples = data.samples("test")
    popular = most_popular(data, samples, 10, unseen=True, max_items=None).hit_rate(data.targets(samples), 10)
    rates = {}
    for setting, more in (
        ("tuned", ["--num_train_epochs", "20", "--batch_size", "300"]),
        ("paper", ["--num_train_epochs", "8", "--batch_size", "32", "--learning_rate", "1e-2"]),
    ):
        for model in ("sasrec", "gru4rec"):
            where = ["--data", source, "--output_dir", str(tmp_path / f"{setting}-{model}")]
            found = main(["--model", model, "--setting", setting, *where, *FLAGS, *more])
            rates[setting, model] = found["left_out"]["this model"][0].hr(10)
    assert min(rates.values()) > popular + 0.2, (rates, popular)


@pytest.mark.parametrize("name", sorted(set(NETWORKS) - {"sasrec", "gru4rec", "morec"}))
def test_every_network_trains(name: str, source: str, tmp_path: Path) -> None:
    for setting in SETTINGS:
        folder = tmp_path / setting
        flags = ["--model", name, "--setting", setting, "--data", source, "--output_dir", str(folder)]
        shape = FLAGS if name != "caser" else FLAGS[:2] + FLAGS[4:]  # which has no layers to choose
        found = main([*flags, *shape, "--num_train_epochs", "2", "--batch_size", "100", "--limit", "20"])
        assert found["left_out"]["this model"][0].ranks.size == 20
        losses_of = [epoch["loss"] for epoch in record_of(folder)["epochs"]]
        assert losses_of[1] < losses_of[0]


def record_of(folder: Path) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(folder / "state.safetensors", framework="pt") as file:
        found: dict[str, Any] = json.loads(file.metadata()["record"])
    return found


def test_ranking_files_and_a_saved_run(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], encoder: str
) -> None:
    """MoRec, with an encoder that is given."""
    folder = tmp_path / "morec"
    flags = ["--data", source, "--output_dir", str(folder), "--seen_items", "left_out", "allowed"]
    priors = ["--prior", "transitions", "linear"]
    train = ["--model", "morec", "--encoder", encoder, "--num_train_epochs", "3", *FLAGS]
    found = main([*flags, *priors, *train])
    printed = capsys.readouterr().out
    assert "targets/s" in printed and "users/s" in printed and "s of a CPU" in printed
    assert list(found) == ["left_out", "allowed"]
    for seen, results in found.items():
        alone = folder / f"test-{seen}.csv"
        one = per_sample.read(alone)
        assert one.measures()["HR@20"].mean() == pytest.approx(results["this model"][0].hr(20))
        assert next(iter(results)) == "this model" and sum(name.startswith("+ ") for name in results) == 3
        assert (folder / f"test-{seen}-transitions-linear.csv").exists()
    compare.main([str(folder / "test-left_out.csv"), str(folder / "test-allowed.csv"), "--draws", "50"])
    again = main([*flags, "--evaluate_only", "--prior", "linear", "--prior_weight", "0"])
    for seen, results in again.items():
        zero = next(name for name in results if name.startswith("+ linear"))
        for name in ("this model", zero):
            assert (results[name][0].ranks == found[seen]["this model"][0].ranks).all()
    seen_items = found["left_out"]["this model"][0].ranks
    assert (seen_items >= found["allowed"]["this model"][0].ranks)[found["allowed"]["this model"][0].ranks == 0].all()


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_killed_run_goes_on_alike(setting: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flags(name: str) -> list[str]:
        return [
            *("--model", "gru4rec", "--setting", setting, "--data", source, "--output_dir", str(tmp_path / name)),
            *FLAGS, "--num_train_epochs", "4", "--limit", "20",
        ]  # fmt: skip

    main(flags("whole"))
    keep: Callable[..., None] = Run.keep_state
    calls = []

    def killed(*arguments: Any) -> None:
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt
        keep(*arguments)

    monkeypatch.setattr(Run, "keep_state", killed)
    with pytest.raises(KeyboardInterrupt):
        main(flags("killed"))
    monkeypatch.setattr(Run, "keep_state", keep)
    with pytest.raises(ValueError, match="--output_dir: expected a folder without a run, or --resume"):
        main(flags("killed"))
    with pytest.raises(ValueError, match="--resume: expected the arguments of the run so far, got other seed 0 -> 1"):
        main([*flags("killed"), "--resume", "--seed", "1"])
    main([*flags("killed"), "--resume"])
    one, two = record_of(tmp_path / "whole"), record_of(tmp_path / "killed")
    assert one["epochs"] == two["epochs"] and one["steps"] == two["steps"] and one["targets"] == two["targets"]
    assert (tmp_path / "whole" / "test-left_out.csv").read_text() == (
        tmp_path / "killed" / "test-left_out.csv"
    ).read_text()
    main([*flags("killed"), "--resume"])  # nothing is left to do
    assert record_of(tmp_path / "killed") == two


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "sasrek"], "--model: expected sasrec? All of them: sasrec, gru4rec"),
        (["--model", "unlike"], "--model: expected sasrec, gru4rec, caser"),
        ([], "--model: expected one of sasrec"),
        (["--model", "morec"], "--encoder: expected the folder or hub id of a sentence encoder"),
        (["--model", "sasrec", "--encoder", "x"], "--encoder: expected only with --model morec"),
        (["--model", "sasrec", "--heads", "3"], "--heads: expected a divisor of the width 64, got 3"),
        (["--model", "sasrec", "--dropout", "1"], "--dropout: expected at least 0 and below 1"),
        (["--model", "sasrec", "--window", "0"], "--window: expected at least 1, got 0"),
        (["--model", "sasrec", "--limit", "0"], "--limit: expected at least 1, got 0"),
        (["--model", "sasrec", "--learning_rate", "0"], "--learning_rate: expected above 0"),
        (["--model", "sasrec", "--prior_weight", "1"], "--prior_weight: expected a --prior that it weighs"),
        (["--model", "gru4rec", "--heads", "4"], "--heads: expected none with --model gru4rec"),
        (["--model", "caser", "--layers", "3"], "--layers: expected none with --model caser"),
        (["--model", "sasrec", "--setting", "paper", "--bf16", "true"], "--bf16: expected none with --setting paper"),
        (["--evaluate_only", "--resume"], "--evaluate_only: expected no --resume"),
        (["--evaluate_only", "--learning_rate", "0.1"], "--evaluate_only: expected no --learning_rate beside it"),
        (["--modle", "sasrec"], "--modle: expected --model?"),
    ],
)
def test_wrong_flags(flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*flags, "--data", "synthetic", "--output_dir", str(tmp_path / "run")])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_network_without_heads_has_any_width() -> None:
    assert parse("", ["--model", "gru4rec", "--width", "33", "--data", "synthetic", "--output_dir", "run"]).width == 33


def test_wrong_folders(source: str, tmp_path: Path, encoder: str) -> None:
    where = ["--data", source, "--output_dir", str(tmp_path / "run")]
    with pytest.raises(ValueError, match="--encoder: expected a sentence encoder's folder or hub id, got '/nowhere'"):
        main(["--model", "morec", "--encoder", "/nowhere", *where])
    with pytest.raises(ValueError, match="--output_dir: expected a run of recipes/baselines"):
        main(["--evaluate_only", *where])
    assert not (tmp_path / "run").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "arguments.json").write_text('{"stage": "sft"}')
    other = ["--data", source, "--output_dir", str(tmp_path / "other")]
    with pytest.raises(ValueError, match="--output_dir: expected a run of recipes/baselines"):
        main(["--evaluate_only", *other])
    with pytest.raises(ValueError, match="--resume: expected the arguments of the run so far, got other model None"):
        main(["--model", "caser", "--resume", *other])
    main(["--model", "gru4rec", *where, *FLAGS, "--num_train_epochs", "1", "--limit", "5"])
    with pytest.raises(
        ValueError,
        match=r"--output_dir: expected a run over the [\d,]+ items of the data, in their order, got .*, over others",
    ):
        main(["--evaluate_only", "--data", "synthetic", "--output_dir", str(tmp_path / "run")])
