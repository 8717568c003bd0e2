# SPDX-License-Identifier: Apache-2.0
"""The benchmarks from their command lines, on sizes that take a moment: no typing error should wait for a GPU."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

import patchkern as pk
from bench import bench_dispatch, bench_pool_rows, gpu, output, pool_rows_providers, timing, workloads

TINY = ["--device", "cpu", "--batches", "1", "--widths", "8", "--dtypes", "bfloat16", "--seconds", "0"]
BENCH = Path(timing.__file__).parent
PLOTS = ["plot", "plot_history_lengths", "plot_scaling"]
SCRIPTS = [*(path.stem for path in sorted(BENCH.glob("bench_*.py"))), "gpu", *PLOTS]
POOL_ROWS = [*TINY, "--policies", "items", "--compile", "eager", "--loop", "--peak_mib", "1"]


@pytest.fixture(autouse=True)
def a_small_world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Results go aside, data is made up, and interpreted kernels, which take minutes, are left to the other tests."""
    workload = workloads.stand_in()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pool_rows_providers, "kernels", lambda device, dtype: ["native"])
    monkeypatch.setattr(workloads, "ml1m", lambda: workload)


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# ------------------------------------------------------------------ timing


class Device:
    """A device that works off what is enqueued, and whose clock counts 2 ms a sweep and 5 ms a kernel."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def event(self, enable_timing: bool) -> Any:
        device = self

        class Event:
            def record(self) -> None:
                self.at = device.now

            def elapsed_time(self, other: Any) -> float:
                return float(other.at - self.at)

        return Event()


def test_events_leave_out_the_sweep_and_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()

    def sweep(self: torch.Tensor) -> torch.Tensor:
        device.now += 2
        device.log.append("sweep")
        return self

    def kernel(name: str, milliseconds: float) -> Callable[[], None]:
        def call() -> None:
            device.log.append(name)
            # the first two calls compile
            device.now += milliseconds if device.log.count(name) > 2 else 1000

        return call

    monkeypatch.setattr(torch.cuda, "Event", device.event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.Tensor, "zero_", sweep)
    monkeypatch.setattr(timing, "_cache_bytes", lambda device: 1024)
    calls = {"fast": kernel("fast", 5), "slow": kernel("slow", 20)}
    times = timing.measure_cuda(calls, torch.device("cpu"), seconds=0, min_rounds=7)
    assert times.seconds["fast"].tolist() == [0.005] * 7 and times.seconds["slow"].tolist() == [0.02] * 7
    assert times.ratio("slow", "fast") == (4, 4, 4)
    assert device.log[0::2] == ["sweep"] * 18  # one before every call
    orders = {tuple(device.log[i + 1 : i + 4 : 2]) for i in range(0, len(device.log), 4)}
    assert orders == {("fast", "slow"), ("slow", "fast")}


def test_tables_say_where_they_come_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHKERN_COMMIT", "abc1234")
    timing._software.cache_clear()
    results = timing.Table(tmp_path / "some.csv")
    results.add("provider", "mode", "time", "ms", (1.0, 2.0, 3.0), {"rows": 4})
    results.write()
    timing._software.cache_clear()
    (row,) = table(tmp_path / "some.csv")
    assert tuple(row) == timing.COLUMNS
    assert (row["p50"], json.loads(row["config"]), row["commit"]) == ("2", {"rows": 4}, "abc1234")
    assert row["torch"] == torch.__version__ and bool(row["gpu"]) == torch.cuda.is_available()


# ------------------------------------------------------------------ where results go


def test_a_result_replaces_only_what_is_named(tmp_path: Path, capsys: Any) -> None:
    for name in ("some.csv", "some-2.csv", "some-3.csv"):
        path = output.prepare(None, "some.csv")
        assert path.resolve() == tmp_path / "runs/bench" / name
        assert capsys.readouterr().out == f"results go to runs/bench/{name}\n"
        path.write_text(name)
    assert [path.read_text() for path in sorted(Path("runs/bench").iterdir())] == [
        *("some-2.csv", "some-3.csv", "some.csv")
    ]
    named = Path("runs/bench/some.csv")
    assert output.prepare(named, "other.csv") == named and named.read_text() == "some.csv"
    assert capsys.readouterr().out.endswith("some.csv, which is replaced\n")
    assert output.prepare(Path("new/one.csv"), "other.csv") == Path("new/one.csv")
    assert capsys.readouterr().out == "results go to new/one.csv\n" and not list(Path("new").iterdir())


def test_what_cannot_be_written_is_said_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="--output: cannot write to file: "):
        output.prepare(Path("file/some.csv"), "some.csv")
    with pytest.raises(SystemExit, match="--output: expected a file, got the folder"):
        output.prepare(tmp_path, "some.csv")


def test_a_run_without_results_leaves_none() -> None:
    empty, full = (output.prepare(None, name) for name in ("empty.csv", "full.csv"))
    full.write_text("row")
    output._remove_empty(empty)
    output._remove_empty(full)
    assert full.exists() and not empty.exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_says_where_its_results_go(script: str, capsys: Any) -> None:
    module = pytest.importorskip(f"bench.{script}", exc_type=ImportError)
    with pytest.raises(SystemExit) as stopped:
        module.main(["--help"])
    assert stopped.value.code == 0
    _, option, described = " ".join(capsys.readouterr().out.split()).rpartition("--output F")
    assert option and "runs/bench/" in described.partition(")")[0] and "replaced" in described


# ------------------------------------------------------------------ the scripts


MODES = {
    "forward": {
        *("copy", "native", "native+alloc", "native+table", "embedding_bag", "index_add", "segment_reduce"),
        *("reference", "index_add compiled", "reference compiled", "loop"),
    },
    "backward": {
        *("copy", "zeros", "native compact", "native dense", "native dense into grad"),
        *("embedding_bag dense", "embedding_bag sparse"),
    },
}


@pytest.mark.unpoisoned("tracing would record the filling")
def test_pool_rows(tmp_path: Path) -> None:
    bench_pool_rows.main(POOL_ROWS)
    rows = table(tmp_path / "runs/bench/pool_rows.csv")
    timed = {
        mode: {row["provider"] for row in rows if (row["mode"], row["metric"]) == (mode, "time")} for mode in MODES
    }
    assert timed == MODES
    figures = {(row["provider"], row["mode"], row["metric"]): float(row["p50"]) for row in rows}
    time_of_native = 1e-3 * figures["native", "forward", "time"]
    config = next(json.loads(row["config"]) for row in rows if row["provider"] == "native")
    assert figures["native", "forward", "least bytes"] == pytest.approx(
        config["least_bytes"] / time_of_native / 1e9, rel=1e-3
    )
    assert figures["native compact", "backward", "bitwise equal in 10 runs"] == 1
    assert {"speed-up over loop", "speed-up over index_add compiled", "fraction of peak"} <= {
        row["metric"] for row in rows
    }


def test_least_bytes_by_hand() -> None:
    """Rows 9 | patch of (5, 6) | 6 | 9: embeddings 5, 6 and 9, or with a table 6, 9 and one of its rows."""
    catalog = pk.Catalog.from_token_ids([5, 6, 6], [0, 2, 3])
    prompt = pk.Prompt(prefix=[9], separator=[], suffix=[9], response_end=[])
    layout = pk.build_layout(catalog, [[0, 1]], pk.ItemPatches(keep_text=1), prompt)
    lo, hi, items, token_ids, offsets, title_index = 4, 4, 1, 2, 2, 1
    assert pool_rows_providers.least_bytes(layout, row_bytes=100) == {
        "least_bytes": 100 * (4 + 3) + 4 * (lo + hi + items + token_ids + offsets),
        "least_bytes_table": 100 * (4 + 2 + 1) + 4 * (lo + hi + items + title_index),
    }


def test_what_is_wrong_or_breaks_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(self: Any, weight: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("not on this device")

    right = pool_rows_providers.Segments.index_add
    monkeypatch.setattr(pool_rows_providers.Segments, "index_add", lambda self, weight: right(self, weight) * 1.1)
    monkeypatch.setattr(pool_rows_providers.Loop, "pool", breaks)
    with pytest.raises(SystemExit) as stopped:
        bench_pool_rows.main([*POOL_ROWS, "--compile", "off"])
    complaint = str(stopped.value)
    assert "index_add forward: wrong result" in complaint and "loop forward: RuntimeError: not on" in complaint
    rows = table(tmp_path / "runs/bench/pool_rows.csv")
    assert not [row for row in rows if "index_add" in row["provider"] + row["metric"] or "loop" in row["provider"]]
    assert [row for row in rows if row["metric"] == "speed-up over embedding_bag"]


def test_dispatch(tmp_path: Path) -> None:
    bench_dispatch.main(TINY)
    modes = {row["mode"] for row in table(tmp_path / "runs/bench/dispatch.csv")}
    assert modes == {"transfer", "pool_rows", "pool_rows_grad"}


def test_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    from bench import bench_end_to_end

    workload = workloads.stand_in()
    short = np.flatnonzero(workload.histories.lengths < 30)[:100]
    workload = workload._replace(histories=workload.histories.take(short))
    monkeypatch.setattr(bench_end_to_end, "ml1m", lambda: workload)
    models = bench_end_to_end.Models("small", torch.float32, torch.device("cpu"), workload)
    shared = zip(models.padded.parameters(), models.packed.hf_model.parameters(), strict=True)
    assert all(ours is theirs for ours, theirs in shared)
    assert models.padded.config._attn_implementation == "sdpa" != models.packed.config._attn_implementation

    small = ["--shape", "small", "--dtype", "float32", "--policies", "sessions", "--batches", "1", "--seconds", "0"]
    small += ["--training_batches", "1", "--users", "1", "--rounds", "1"]
    bench_end_to_end.main(["--device", "cpu", *small])
    rows = {(row["provider"], row["mode"], row["metric"]) for row in table(tmp_path / "runs/bench/end_to_end.csv")}
    assert ("compress_batch", "share", "fraction of forward") in rows
    assert ("patchkern", "inference", "speed-up") in rows and ("patchkern", "training", "speed-up") in rows
    assert ("all per pass", "passes", "arithmetic of a stage") in rows
    assert ("all per pass", "passes", "speed-up") in rows and ("one per pass", "passes", "projected stage") in rows


def test_attention(tmp_path: Path) -> None:
    from bench import bench_attention

    tiny = ["--providers", "patchkern", "sdpa per span", "--scale", "100", "--seconds", "0"]
    bench_attention.main([*tiny, "--output", "attention_tiny.csv"])
    rows = [row for row in table(tmp_path / "attention_tiny.csv") if row["metric"] == "speed-up over sdpa per span"]
    assert [row["mode"] for row in rows] == 3 * ["forward", "forward+backward"]


def test_attention_that_is_wrong_or_breaks_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench import bench_attention

    def breaks(inputs: Any) -> torch.Tensor:
        raise RuntimeError("not on this device")

    broken = {"sdpa per span": lambda inputs: 1.1 * bench_attention.per_span(inputs), "flex": breaks}
    monkeypatch.setattr(bench_attention, "PROVIDERS", bench_attention.PROVIDERS | broken)
    one = ["--cases", "20 hypotheses of 3 rows", "--scale", "100", "--seconds", "0", "--heads", "4", "1"]
    with pytest.raises(SystemExit) as stopped:
        bench_attention.main(one)
    assert "sdpa per span: off by 1.0e-01" in str(stopped.value) and "flex: RuntimeError: not on" in str(stopped.value)
    timed = [row for row in table(tmp_path / "runs/bench/attention.csv") if row["mode"] != "mask"]
    assert {row["provider"] for row in timed} == {"patchkern"}
    assert {json.loads(row["config"])["heads"] for row in timed} == {4}


def test_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    from bench import bench_memory

    workload = workloads.stand_in()
    short = np.flatnonzero(workload.histories.lengths < 30)[:100]
    workload = workload._replace(histories=workload.histories.take(short))
    monkeypatch.setattr(bench_memory, "ml1m", lambda: workload)
    cases = (bench_memory.Case(head="items"), bench_memory.Case(0.5, True, lora=True, branches=False))
    monkeypatch.setattr(bench_memory, "CASES", cases)
    tiny = ["--shape", "small", "--rows", "600", "--users", "3", "--budgets", "1GiB", "--workers", "1"]
    bench_memory.main(tiny)
    found = {(row["mode"], row["metric"]): float(row["p50"]) for row in table(tmp_path / "runs/bench/memory.csv")}
    assert found["training", "predicted / measured"] >= 1 and found["search", "predicted / measured"] >= 1
    assert 0 < found["search", "measured / budget"] <= 1 and ("training", "reserved / measured") not in found
    monkeypatch.setattr(bench_memory, "CASES", cases[:1])
    monkeypatch.setattr(bench_memory, "predict", lambda *_, **__: 1 << 20)
    with pytest.raises(SystemExit, match=r"predicted too low:\nall parameters, items, .* rows, training: 0.0"):
        bench_memory.main([*tiny, "--parts", "training"])


def test_item_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    from bench import bench_item_head

    workload = workloads.stand_in(4096)
    short = np.flatnonzero(workload.histories.lengths < 30)[:20]
    workload = workload._replace(histories=workload.histories.take(short))
    monkeypatch.setattr(bench_item_head, "ml1m", lambda vocab_size: workload)
    tiny = ["--users", "2", "--search_users", "2", "--rounds", "1", "--seconds", "0", "--catalogue_items", "300"]
    bench_item_head.main([*tiny, "--hidden_size", "64", "--layers", "1", "--threads", "1"])
    rows = {(row["provider"], row["mode"], row["metric"]) for row in table(tmp_path / "runs/bench/item-head.csv")}
    assert ("items", "training", "speed-up over titles") in rows
    assert ("items", "search", "speed-up over beam") in rows and ("product", "catalogue", "time") in rows
    wrong = bench_item_head.dense_scores
    monkeypatch.setattr(bench_item_head, "dense_scores", lambda *given: wrong(*given).flip(1))
    for part in ("training", "search", "catalogue"):
        with pytest.raises(SystemExit, match="nothing was timed"):
            bench_item_head.main([*tiny, "--parts", part, "--threads", "1"])


@pytest.mark.slow
def test_serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fastapi", reason="needs fastapi, of the extra serving")
    from bench import bench_serving

    workload = workloads.stand_in(4096)
    short = np.flatnonzero(workload.histories.lengths < 30)[:40]
    workload = workload._replace(histories=workload.histories.take(short))
    monkeypatch.setattr(bench_serving, "ml1m", lambda vocab_size: workload)
    tiny = [
        "--users",
        "6",
        "--requests",
        "12",
        "--rounds",
        "1",
        "--clients",
        "3",
        "--hidden_size",
        "64",
        "--layers",
        "1",
    ]
    bench_serving.main([*tiny, "--seconds", "3", "--mixed_clients", "3", "--reloads", "1"])
    rows = {(row["provider"], row["mode"], row["metric"]): row for row in table(tmp_path / "runs/bench/serving.csv")}
    assert ("batched", "titles, 3 clients", "speed-up over one at a time") in rows
    assert ("one at a time", "item ids, 3 clients", "p95 of latency") in rows
    assert float(rows["server", "mixed", "reloads"]["p50"]) == 1
    right = bench_serving.kinds_of

    def of_others(*given: Any) -> Any:
        return {mode: kind._replace(expected=kind.expected[::-1]) for mode, kind in right(*given).items()}

    monkeypatch.setattr(bench_serving, "kinds_of", of_others)
    with pytest.raises(SystemExit, match="in place of a list of its own"):
        bench_serving.main([*tiny, "--parts", "mixed"])


def test_user_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    from bench import bench_user_states

    monkeypatch.setattr(bench_user_states, "ml1m", workloads.stand_in)
    tiny = ["--users", "20", "--batch", "8", "--seconds", "0", "--items", "118", "--events", "4"]
    tiny += ["--hidden_size", "64", "--layers", "1", "--together", "3"]
    bench_user_states.main(tiny)
    rows = {(row["provider"], row["mode"], row["metric"]) for row in table(tmp_path / "runs/bench/user-states.csv")}
    for store in ("memory", "sqlite"):
        assert {(store, mode, "speed") for mode in ("put", "get", "get, copied")} <= rows
    assert ("sqlite", "put", "bytes per user on the disk") in rows
    for name in ("experts, one", "experts, blocks", "memory, overwrite", "memory, append"):
        assert (name, "update", "speed-up over anew") in rows and (name, "list, cached", "time") in rows
        for own in (name, f"{name}, together"):
            assert (own, "list, cached", "speed-up over whole history, cached") in rows
    assert ("whole history", "list, cached", "speed-up over list, anew") in rows
    right, expected = bench_user_states.unpack, bench_user_states.alike
    monkeypatch.setattr(bench_user_states, "unpack", lambda *given: right(*given)._replace(cut=0))
    monkeypatch.setattr(bench_user_states, "alike", lambda found, other: expected(found, dict.fromkeys(other, 0.0)))
    for part in bench_user_states.PARTS:
        with pytest.raises(SystemExit, match="nothing was timed"):
            bench_user_states.main([*tiny, "--parts", part])


def test_history_lengths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    from bench import bench_history_lengths, plot_history_lengths

    monkeypatch.setattr(bench_history_lengths, "ml1m", workloads.stand_in)
    path = tmp_path / "lengths.csv"
    tiny = ["--lengths", "100", "150", "--seconds", "0", "--hidden_size", "64", "--output", str(path)]
    forms = ("items", "experts, one", "memory, append")
    bench_history_lengths.main([*tiny, "--models", "item ids", "--forms", *forms])
    bench_history_lengths.main([*tiny, "--limit", "0", "--forms", "text", "items", "--add"])
    rows = [(row["mode"], row["provider"], row["metric"], json.loads(row["config"])) for row in table(path)]
    known = {row[:3] for row in rows}
    of_ids = {("item ids", form, metric) for form in forms for metric in ("read", "event", "kept", "peak, planned")}
    assert of_ids | {("item ids", form, "event, mean") for form in forms[1:]} <= known
    # the lines of the first call were kept, but for one, which was written anew and stopped after its first length
    assert ("item ids", "memory, append", "exponent of kept") in known
    stopped = {row[:2]: row[3] for row in rows if row[2] == "line ends"}
    assert stopped.keys() == {("language model", "text"), ("language model", "items"), ("item ids", "items")}
    assert all(config["items"] == 150 and "would take" in config["why"] for config in stopped.values())
    assert not any(row[0] == "item ids" and row[1] == "items" and "exponent" in row[2] for row in rows)
    monkeypatch.setattr(bench_history_lengths, "alike", lambda found, expected: found is expected)
    with pytest.raises(SystemExit, match="nothing was timed"):
        bench_history_lengths.main([*tiny, "--forms", "items"])
    plot_history_lengths.main([str(path)])
    assert (tmp_path / "runs/bench/history-lengths.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="bench_history_lengths"):
        plot_history_lengths.read(plot_history_lengths.PUBLISHED.with_name("search.csv"))


def test_history_work() -> None:
    """What is counted, against rows written out one by one."""
    from bench.history_work import COSTS, Rows, exponent, spans

    rows = Rows(beginning=3, item=2, fresh=5, learned=4, keep=1, block=10)
    assert spans([2, 3], [10, 0]).tolist() == [5, 2 * 11 + 4.5]
    assert COSTS["whole"].read(rows, 100).tolist() == [203, 203**2 / 2]
    assert COSTS["whole"].event(rows, 100).tolist() == [5, 5 * (203 + 2.5)]
    recent = 2 * (1 + 4.5)
    blocks = [recent + 9 * 24, recent * (3 + 36 + recent / 2) + sum(24 * (3 + 4 * j + 12) for j in range(9))]
    assert COSTS["blocks"].read(rows, 100).tolist() == pytest.approx(blocks)
    assert [COSTS[kind].kept(rows, 100) for kind in ("one", "blocks", "overwrite", "append")] == [4, 36, 4, 36]
    updates = [3 + 4 * j + 20 + 4 for j in range(9)] + [3 + 36 + recent]
    appended = [sum(updates), sum(count**2 / 2 for count in updates)]
    assert COSTS["append"].read(rows, 100).tolist() == pytest.approx(appended)
    assert COSTS["append"].event(rows, 100)[0] == 3 + 36 + recent
    assert exponent([1, 10, 30, 100], [7, 100, 900, 10_000]) == pytest.approx(2)


def test_scale(tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("pyarrow")
    from bench import bench_scale, scale

    tiny = ["--items", "300", "500", "--users", "2", "--events", "60", "--rows", "40", "60", "--seconds", "0"]
    bench_scale.main(tiny)
    path = tmp_path / "runs/bench/scale.csv"
    assert {row["provider"] for row in table(path)} >= {*bench_scale.PARTS} - {"stores"} | {"memory", "sqlite"}
    rates = scale.Rates(path)
    # by hand: 32 rows of the prompt and one of the suffix, with 60 items
    assert rates("planning", "items, 500 items", "rows") == 93 and rates("forward", "60 rows", "time") > 0
    assert rates("planning", "items", "rows of one more event") == 1
    capsys.readouterr()
    scale.main([str(path), "--users", "1000"])
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("## ")] == [
        f"## {name}" for name in scale.TABLES
    ]


@pytest.mark.slow
def test_attention_against_a_compiled_mask(tmp_path: Path) -> None:
    from bench import bench_attention

    bench_attention.main(["--scale", "20", "--seconds", "0"])
    modes = {(row["provider"], row["mode"]) for row in table(tmp_path / "runs/bench/attention.csv")}
    assert {("flex", "forward"), ("flex", "mask")} <= modes and ("flex", "forward+backward") not in modes


def test_out_of_memory_is_a_result(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from bench import bench_end_to_end

    def too_large(histories: Any, targets: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("no room")

    results = timing.Table(tmp_path / "oom.csv")
    steps = {"reference": too_large, "patchkern": lambda histories, targets: torch.zeros(1)}
    config = {"device": "cpu", "batch": 2}
    samples = workloads.stand_in().samples
    bench_end_to_end.compare(results, "training", steps, lambda seed: samples(2, seed), "samples", 2, config)
    assert [(row["provider"], row["metric"]) for row in results.rows] == [
        ("reference", "out of memory"),
        ("patchkern", "speed"),
    ]


def test_plot_of_the_published_tables(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from bench import plot

    for path in plot.PUBLISHED.parent.glob("pool_rows*.csv"):
        plot.main([str(path), "--width", "2048", "--dtype", "bfloat16", "--output", f"{path.stem}.png"])
        assert (tmp_path / f"{path.stem}.png").read_bytes()[:4] == b"\x89PNG"
    points, machine = plot.read(plot.PUBLISHED, 2048, "bfloat16")
    copy = next(point for point in points if point.provider == "copy" and point.policy == "text")
    assert copy.megabytes == pytest.approx(2 * 24016 * 2048 * 2 / 1e6) and copy.low <= copy.rate <= copy.high
    assert "torch" in machine
    with pytest.raises(ValueError, match="width 3"):
        plot.read(plot.PUBLISHED, 3, None)


def test_plot_of_the_scaling(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from bench import plot_scaling

    plot_scaling.main([])
    assert (tmp_path / "runs/bench/search-scaling.png").read_bytes()[:4] == b"\x89PNG"
    points, _ = plot_scaling.read(plot_scaling.PUBLISHED)
    assert {point.rows for point in points["prompt"]} == {point.rows for point in points["step, 20 beams"]}
    assert all(point.p20 <= point.p50 <= point.p80 for found in points.values() for point in found)
    with pytest.raises(ValueError, match="scaling"):
        plot_scaling.read(plot_scaling.PUBLISHED.with_name("search-peers.csv"))


# ------------------------------------------------------------------ the suites

# beside test_pool_rows, each: test_NAME[provider] and test_paired
SUITES = {"layout": "plan", "attention": "attention", "search": "search", "training": "step"}


def run_suites(*options: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """As from a command line: kernels are not interpreted, and no worker of this run is known."""
    unset = ("TRITON_INTERPRET", "PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (path and str(path), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "bench/", *options]
    return subprocess.run(command, cwd=gpu.REPOSITORY, env=environment, capture_output=True, text=True)


def test_suites_run_and_what_is_wrong_fails(tmp_path: Path) -> None:
    """Every entry once; and one provider is off by a tenth."""
    pytest.importorskip("pytest_benchmark")
    pytest.importorskip("transformers")
    (tmp_path / "a_wrong_provider.py").write_text(
        "from bench.pool_rows_providers import Segments\n"
        "right = Segments.index_add\n"
        "Segments.index_add = lambda self, weight: 1.1 * right(self, weight)\n"
    )
    report = tmp_path / "report.xml"
    options = ("-p", "a_wrong_provider", "--benchmark-disable", f"--junitxml={report}")
    done = run_suites(*options, path=tmp_path)
    assert "index_add: wrong result" in done.stdout, done.stdout + done.stderr
    cases = [*ElementTree.parse(report).iter("testcase")]
    failed = {case.attrib["name"] for case in cases if len(case)}
    assert failed == {f"test_forward[{case}-index_add]" for case in ("items-bfloat16", "sessions-float32")}
    entries = {(case.attrib["classname"].rpartition(".")[2], case.attrib["name"].partition("[")[0]) for case in cases}
    assert entries == {
        *(("test_pool_rows", name) for name in ("test_forward", "test_backward", "test_paired")),
        *((f"test_{suite}", f"test_{name}") for suite, name in SUITES.items()),
        *((f"test_{suite}", "test_paired") for suite in SUITES),
    }


def test_suites_are_not_timed_under_xdist() -> None:
    pytest.importorskip("pytest_benchmark")
    done = run_suites("-n", "2")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR and "nothing can be timed under pytest-xdist" in done.stderr


@pytest.mark.parametrize("disabled", [False, True])
def test_paired_entries_count_baselines(monkeypatch: pytest.MonkeyPatch, disabled: bool) -> None:
    from bench import conftest
    from bench.suites import entry

    class Benchmark:
        """What `Entry` uses of pytest-benchmark's fixture, with the clock that `paired` gives it."""

        def __init__(self) -> None:
            self.disabled, self.group, self.taken = disabled, "", list[float]()

        def pedantic(self, target: Callable[[], object], rounds: int = 1) -> None:
            clock = entry.paired.mark.kwargs["timer"]
            for _ in range(rounds):
                before = clock()
                target()
                self.taken.append(clock() - before)

    asked: list[float] = []

    def measure(calls: timing.Calls, seconds: float, min_rounds: int, clock: Any = None) -> timing.Timing:
        asked.append(seconds)
        return timing.Timing({name: np.array(calls[name](), dtype=float) for name in calls})

    monkeypatch.setattr(timing, "measure", measure)
    benchmark: Any = Benchmark()
    entry.Entry(benchmark, max_time=2.0, min_rounds=3).pair("op", lambda: [1, 2, 8], "peer", lambda: [2, 8, 4])
    assert benchmark.taken == pytest.approx([0] if disabled else [0.5, 0.25, 2])
    assert asked == ([] if disabled else [2])
    assert conftest.pytest_benchmark_scale_unit("seconds", [{"group": benchmark.group}]) == ("baseline", 1)
    assert conftest.pytest_benchmark_scale_unit("seconds", [{"group": "op"}]) is None


# ------------------------------------------------------------------ everything in one go


def test_steps_end_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(command: str, seconds: float = 20.0, minutes: float = 1.0) -> str:
        return gpu.perform(gpu.Step("step", minutes, command, ""), False, tmp_path, seconds)[0]

    assert ended("{python} -c 'print(\"{out}\")'") == "ok"
    assert str(tmp_path) in (tmp_path / "gpu.log").read_text()
    assert ended("{python} -c 'raise SystemExit(3)'") == "exit status 3"
    start = time.monotonic()
    assert ended("{python} -c 'import time; time.sleep(60)'", minutes=1 / 60) == "ran past its limit"
    assert time.monotonic() - start < 20
    monkeypatch.setattr(gpu, "find_sanitizer", lambda: "")
    assert ended("{sanitizer} true").startswith("not run")


def test_results_of_a_gpu_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OUT", raising=False)
    folders = [gpu.default_folder(dry=False).resolve() for _ in range(2)]
    assert folders == [tmp_path / "runs/bench/gpu", tmp_path / "runs/bench/gpu-2"]
    monkeypatch.setenv("OUT", "asked")
    assert gpu.default_folder(dry=False) == Path("asked")
    assert gpu.default_folder(dry=True) == gpu.REPOSITORY / "build/gpu-dry-run"


def test_no_step_prevents_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    steps = tuple(
        gpu.Step(name, 1, "", f"{{python}} -c 'raise SystemExit({code})'") for name, code in (("a", 1), ("b", 0))
    )
    monkeypatch.setattr(gpu, "STEPS", steps)
    assert gpu.main(["--dry_run", "--output", str(tmp_path)]) == 1
    summary = capsys.readouterr().out.partition("=== summary")[2].splitlines()
    assert [line.split()[0] for line in summary[1:3]] == ["a", "b"]
    assert summary[1].endswith("exit status 1") and summary[2].endswith("ok")
    assert gpu.main(["--dry_run", "--output", str(tmp_path), "--only", "b"]) == 0
    assert gpu.main(["--dry_run", "--output", str(tmp_path), "--minutes", "0"]) == 1


def test_targets_are_told_met_from_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = timing.Table(tmp_path / "pool_rows_cuda.csv")
    for policy, value in (("text", 0.95), ("items", 0.5)):
        config = {"policy": policy, "batch": 64, "dtype": "bfloat16"}
        results.add("cuda", "forward", "fraction of peak", "ratio", (value,) * 3, config)
    results.write()
    assert gpu.targets(tmp_path) == [
        "cuda, forward, fraction of peak >= 0.9: text/64/b16 0.95, items/64/b16 0.5 MISSED",
    ]


def test_targets_of_tables_with_other_configurations(tmp_path: Path) -> None:
    memory = timing.Table(tmp_path / "search_memory_cuda.csv")
    memory.add("beam", "search", "measured / budget", "ratio", (1.2,) * 3, {"shape": "1b", "budget": "6GiB"})
    memory.write()
    assert gpu.targets(tmp_path) == ["beam, search, measured / budget <= 1: 6GiB 1.2 MISSED"]


def test_steps_are_commands_that_exist() -> None:
    for step in gpu.STEPS:
        for command in (step.command, step.dry):
            filled = command.format(python=sys.executable, sanitizer="compute-sanitizer", out="out", ml1m="")
            words = gpu.shlex.split(filled)
            scripts = [word for word in words if word.endswith(".py")]
            assert all((gpu.REPOSITORY / script).exists() for script in scripts), command
    assert np.unique([step.name for step in gpu.STEPS]).size == len(gpu.STEPS)
