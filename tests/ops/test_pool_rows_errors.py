# SPDX-License-Identifier: Apache-2.0
"""Every wrong argument is a TypeError or ValueError that names it, says what was expected and what came, and comes
before anything is written."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import cases
import numpy as np
import oracle
import pytest
import torch

import patchkern as pk
from patchkern.batch.policies import Level, policy_from_dict, policy_to_dict

TITLES: dict[Any, oracle.Title] = {10: [1, 2], 20: [3], 30: [4, 5, 6]}
CATALOG = cases.make_catalog(TITLES)
PROMPT = cases.make_prompt(oracle.Parts([7], [8], [9], [10]))
HISTORIES = [[10, 20, 30], [], [30]]
TARGETS = [20, 10, 30]
VOCABULARY = 11
LAYOUT_ARGUMENTS: dict[str, Any] = {
    "catalog": CATALOG,
    "histories": HISTORIES,
    "policy": pk.TextOnly(),
    "prompt": PROMPT,
    "targets": TARGETS,
}


def weight_of(**options: Any) -> torch.Tensor:
    return torch.ones(VOCABULARY, 8, **options)


def refused(call: Callable[..., Any], error: type[Exception], message: str, *arguments: Any, **options: Any) -> None:
    with pytest.raises(error, match=message) as caught:
        call(*arguments, **options)
    assert type(caught.value) in (TypeError, ValueError)


# ------------------------------------------------------------------ the promised lines


def test_unknown_item_id() -> None:
    refused(
        pk.build_layout,
        ValueError,
        r"histories: expected item ids of the catalog, got 21 at position 1",
        CATALOG,
        [[10, 21]],
        pk.TextOnly(),
        PROMPT,
    )
    named = cases.make_catalog({"a": [1]})
    refused(pk.build_layout, ValueError, r"histories: .*got 'b' at position 0", named, [["b"]], pk.TextOnly(), PROMPT)
    refused(
        pk.build_layout,
        TypeError,
        r"histories: expected integer item ids as in the catalog, got string ids",
        CATALOG,
        [["10"]],
        pk.TextOnly(),
        PROMPT,
    )
    refused(
        pk.build_layout,
        TypeError,
        r"histories: expected string item ids as in the catalog, got integer ids",
        named,
        [[10]],
        pk.TextOnly(),
        PROMPT,
    )


def test_target_not_in_the_catalog() -> None:
    refused(
        pk.build_layout,
        ValueError,
        r"targets: expected item ids of the catalog, got 11 at position 2",
        CATALOG,
        HISTORIES,
        pk.TextOnly(),
        PROMPT,
        [10, 20, 11],
    )


@pytest.mark.parametrize(
    ("policy", "prompt", "largest"),
    [
        (pk.TextOnly(), PROMPT, 10),
        (pk.ItemPatches(0), pk.Prompt(), 6),
        (pk.TextOnly(), pk.Prompt(suffix=(400,)), 400),
    ],
)
def test_token_id_outside_the_weight(backend: str, policy: Any, prompt: pk.Prompt, largest: int) -> None:
    layout = pk.build_layout(CATALOG, HISTORIES, policy, prompt, TARGETS)
    weight, message = torch.ones(largest, 8), rf"weight: expected more than {largest} rows .*, got {largest}"
    out = torch.full((layout.num_rows, 8), 777.0)
    refused(pk.pool_rows, ValueError, message, weight, layout, backend=backend, out=out)
    refused(
        pk.compress_batch,
        ValueError,
        message,
        weight,
        CATALOG,
        HISTORIES,
        policy,
        prompt,
        TARGETS,
        backend=backend,
        out=out,
    )
    assert (out == 777.0).all()
    assert pk.pool_rows(torch.ones(largest + 1, 8), layout, backend=backend).shape == (layout.num_rows, 8)


def test_empty_title() -> None:
    refused(
        pk.Catalog.from_token_ids,
        ValueError,
        r"titles: expected at least one .*got none for item 20",
        [1, 2],
        [0, 1, 1, 2],
        [10, 20, 30],
    )
    refused(
        pk.Catalog.from_titles,
        ValueError,
        r"titles: expected at least one .*got none for item 'b'",
        {"a": "x", "b": ""},
        lambda title: [len(title)] * len(title),
    )


def test_offsets_that_fall() -> None:
    refused(
        pk.Catalog.from_token_ids,
        ValueError,
        r"offsets: expected non-decreasing offsets, got 2 then 1 at 1",
        [1, 2, 3],
        [0, 2, 1, 3],
    )
    refused(
        pk.Histories,
        ValueError,
        r"offsets: expected non-decreasing offsets, got 2 then 1 at 1",
        [1, 2, 3],
        [0, 2, 1, 3],
    )


def test_nan_probability() -> None:
    refused(pk.RandomItemPatches, ValueError, r"probability: expected a number in 0\.\.1, got nan", float("nan"))
    refused(pk.RandomItemPatches, ValueError, r"probability: .*got nan", np.float32("nan"))


def test_more_recommendations_than_items() -> None:
    transformers = pytest.importorskip("transformers", reason="runs a transformers model")
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = pk.PatchedCausalLM(transformers.LlamaForCausalLM(config), CATALOG, PROMPT)
    refused(
        model.recommend,
        ValueError,
        r"k: expected at most 3, the items of the catalog, got 4",
        HISTORIES,
        pk.TextOnly(),
        k=4,
        num_beams=4,
    )
    for k, error in ((0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError), ("2", TypeError)):
        refused(model.recommend, error, r"k: expected", HISTORIES, pk.TextOnly(), k=k)


# ------------------------------------------------------------------ weight


WRONG_WEIGHTS = {
    "list": ([[1.0] * 8] * VOCABULARY, TypeError, r"weight: expected a tensor, got list"),
    "array": (np.ones((VOCABULARY, 8), np.float32), TypeError, r"weight: expected a tensor, got ndarray"),
    "module": (torch.nn.Embedding(VOCABULARY, 8), TypeError, r"weight: expected a tensor, got Embedding"),
    "none": (None, TypeError, r"weight: expected a tensor, got NoneType"),
    "int64": (weight_of(dtype=torch.int64), TypeError, r"weight: expected float32, .*, got torch.int64"),
    "bool": (weight_of(dtype=torch.bool), TypeError, r"weight: .*got torch.bool"),
    "complex64": (weight_of(dtype=torch.complex64), TypeError, r"weight: .*got torch.complex64"),
    "float8": (weight_of().to(torch.float8_e4m3fn), TypeError, r"weight: .*got torch.float8_e4m3fn"),
    "1-D": (torch.ones(VOCABULARY), ValueError, r"weight: expected shape \(rows, D\).*, got \(11,\)"),
    "3-D": (torch.ones(1, VOCABULARY, 8), ValueError, r"weight: expected shape .*, got \(1, 11, 8\)"),
    "0-D": (torch.tensor(1.0), ValueError, r"weight: expected shape .*, got \(\)"),
    "no columns": (torch.ones(VOCABULARY, 0), ValueError, r"weight: expected shape .*D >= 1, got \(11, 0\)"),
    "transposed": (
        torch.ones(8, VOCABULARY).t(),
        ValueError,
        r"weight: expected contiguous rows .*got stride \(1, 11\)",
    ),
    "every second column": (torch.ones(VOCABULARY, 16)[:, ::2], ValueError, r"weight: .*got stride \(16, 2\)"),
    "sparse": (weight_of().to_sparse(), ValueError, r"weight: expected a dense tensor, got layout torch.sparse_coo"),
    "meta": (weight_of(device="meta"), ValueError, r"layout: expected it on weight's device, meta, got cpu"),
    "no rows": (torch.ones(0, 8), ValueError, r"weight: expected more than 10 rows .*, got 0"),
}


@pytest.mark.parametrize("name", WRONG_WEIGHTS)
def test_wrong_weight(backend: str, name: str) -> None:
    weight, error, message = WRONG_WEIGHTS[name]
    layout = pk.build_layout(CATALOG, HISTORIES, pk.TextOnly(), PROMPT, TARGETS)
    if name != "meta":  # planned on the CPU, then sent to the weight's device: that is right
        refused(
            pk.compress_batch,
            error,
            message,
            weight,
            CATALOG,
            HISTORIES,
            pk.TextOnly(),
            PROMPT,
            TARGETS,
            backend=backend,
        )
    refused(pk.pool_rows, error, message, weight, layout, backend=backend)


# ------------------------------------------------------------------ out


def wrong_outs(rows: int) -> dict[str, tuple[Any, type[Exception], str]]:
    filled = torch.full((rows, 8), 777.0)
    return {
        "list": ([[1.0] * 8], TypeError, r"out: expected a tensor, got list"),
        "dtype": (filled.double(), TypeError, r"out: expected weight's dtype, torch.float32, got torch.float64"),
        "int": (filled.int(), TypeError, r"out: expected float32, .*got torch.int32"),
        "rows": (filled[1:], ValueError, rf"out: expected shape \({rows}, 8\), got \({rows - 1}, 8\)"),
        "width": (filled[:, 1:], ValueError, rf"out: expected shape \({rows}, 8\), got \({rows}, 7\)"),
        "1-D": (filled[0], ValueError, r"out: expected shape .*, got \(8,\)"),
        "transposed": (torch.ones(8, rows).t(), ValueError, r"out: expected contiguous rows .*got stride \(1, \d+\)"),
        "overlapping": (
            torch.ones(1, 8).expand(rows, 8),
            ValueError,
            r"out: expected rows that do not overlap, got .*\(0, 1\)",
        ),
        "half overlapping": (
            torch.ones(rows * 4 + 8).as_strided((rows, 8), (4, 1)),
            ValueError,
            r"out: .*got stride \(4, 1\)",
        ),
        "device": (filled.to("meta"), ValueError, r"out: expected weight's device, cpu, got meta"),
        "leaf": (filled.clone().requires_grad_(), ValueError, r"out: expected a tensor that requires no gradient"),
    }


@pytest.mark.parametrize("name", wrong_outs(4))
def test_wrong_out(backend: str, name: str) -> None:
    layout = pk.build_layout(CATALOG, HISTORIES, pk.TextOnly(), PROMPT, TARGETS)
    out, error, message = wrong_outs(layout.num_rows)[name]
    before = out.clone() if isinstance(out, torch.Tensor) and out.device.type == "cpu" else None
    refused(pk.pool_rows, error, message, weight_of(), layout, backend=backend, out=out)
    refused(
        pk.compress_batch,
        error,
        message,
        weight_of(),
        CATALOG,
        HISTORIES,
        pk.TextOnly(),
        PROMPT,
        TARGETS,
        backend=backend,
        out=out,
    )
    assert before is None or torch.equal(out, before)


def test_out_in_the_weight_itself(backend: str) -> None:
    layout = pk.build_layout(CATALOG, [[10]], pk.TextOnly(), PROMPT)
    weight = weight_of()
    refused(
        pk.pool_rows,
        ValueError,
        r"out: expected memory of its own, got weight's",
        weight,
        layout,
        backend=backend,
        out=weight[: layout.num_rows],
    )
    assert (weight == 1).all()


def test_out_where_a_gradient_is_recorded(backend: str) -> None:
    layout = pk.build_layout(CATALOG, [[10]], pk.TextOnly(), PROMPT)
    out = torch.full((layout.num_rows, 8), 777.0)
    refused(
        pk.pool_rows,
        ValueError,
        r"out: expected None where a gradient is recorded",
        weight_of(requires_grad=True),
        layout,
        backend=backend,
        out=out,
    )
    assert (out == 777.0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"catalog": TITLES}, r"catalog: expected a Catalog, got dict"),
        ({"histories": [[10, 21]]}, r"histories: .*got 21"),
        ({"policy": "text"}, r"policy: expected a policy with max_items and levels, got str"),
        ({"prompt": [7]}, r"prompt: expected a Prompt, got list"),
        ({"targets": [10, 20, 11]}, r"targets: .*got 11"),
        ({"targets": [10]}, r"targets: expected one item id per user \(3\), got 1"),
        ({"backend": "fast"}, r"backend: .*got 'fast'"),
    ],
)
def test_nothing_is_written_before_an_error(change: dict[str, Any], message: str) -> None:
    arguments = {"weight": weight_of(), **LAYOUT_ARGUMENTS}
    rows = pk.compress_batch(**arguments).inputs_embeds.shape[0]
    arguments["out"] = torch.full((rows, 8), 777.0)
    with pytest.raises((TypeError, ValueError), match=message):
        pk.compress_batch(**(arguments | change))
    assert (arguments["out"] == 777.0).all()


# ------------------------------------------------------------------ build_layout


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"catalog": None}, TypeError, r"catalog: expected a Catalog, got NoneType"),
        ({"catalog": {10: "a"}}, TypeError, r"catalog: expected a Catalog, got dict"),
        ({"histories": "abc"}, TypeError, r"histories: .*got str"),
        ({"histories": None}, TypeError, r"histories: .*got NoneType"),
        ({"histories": 5}, TypeError, r"histories: .*got int"),
        ({"histories": [10, 20]}, TypeError, r"histories\[0\]: expected a sequence of item ids, got int"),
        ({"histories": [[10], "20"]}, TypeError, r"histories\[1\]: expected a sequence of item ids, got str"),
        ({"histories": [[10.5]]}, TypeError, r"histories.*float64"),
        ({"histories": [[10], ["a"]]}, TypeError, r"histories: expected item ids of one kind"),
        ({"histories": [[10, "a"]]}, TypeError, r"histories\[0\]: expected item ids of one kind, got str and int"),
        ({"histories": [[[10, 20]]]}, ValueError, r"histories\[0\]: .*\(1, 2\)"),
        ({"histories": [[None]]}, TypeError, r"histories: .*NoneType"),
        ({"histories": {0: [10]}}, TypeError, r"histories: .*got dict"),
        ({"policy": None}, TypeError, r"policy: expected a policy .*got NoneType"),
        ({"policy": pk.TextOnly}, TypeError, r"policy: expected a policy .*got type"),
        ({"policy": 5}, TypeError, r"policy: expected a policy .*got int"),
        ({"prompt": None}, TypeError, r"prompt: expected a Prompt, got NoneType"),
        ({"prompt": ([1], [2], [3], [4])}, TypeError, r"prompt: expected a Prompt, got tuple"),
        ({"targets": 10}, TypeError, r"targets: expected one item id per user, got int"),
        ({"targets": "abc"}, TypeError, r"targets: expected one item id per user, got str"),
        ({"targets": {10, 20, 30}}, TypeError, r"targets: expected one item id per user, got set"),
        ({"targets": []}, ValueError, r"targets: expected one item id per user \(3\), got 0"),
        ({"targets": [10, 20]}, ValueError, r"targets: expected one item id per user \(3\), got 2"),
        ({"targets": ["a", "b", "c"]}, TypeError, r"targets: expected integer item ids"),
        ({"targets": [10.0, 20.0, 30.0]}, TypeError, r"targets: .*float"),
        ({"targets": [10, 20, None]}, TypeError, r"targets: .*NoneType"),
        ({"targets": [[10], [20], [30]]}, (TypeError, ValueError), r"targets: .*list"),
        ({"targets": np.asarray([[10], [20], [30]])}, ValueError, r"targets: .*\(3, 1\)"),
    ],
)
def test_build_layout_refuses(change: dict[str, Any], error: Any, message: str) -> None:
    refused(pk.build_layout, error, message, **(LAYOUT_ARGUMENTS | change))


class OwnPolicy:
    max_items = None

    def __init__(self, levels: Any) -> None:
        self.made = levels

    def levels(self, histories: pk.Histories) -> Any:
        return self.made


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        (None, r"policy: expected levels of dtype uint8 and shape \(4,\), got NoneType"),
        ([0, 0, 0, 0], r"policy: .*got list"),
        (np.zeros(4, np.int64), r"policy: expected levels of dtype uint8 .*, got int64 \(4,\)"),
        (np.zeros(3, np.uint8), r"policy: .*got uint8 \(3,\)"),
        (np.zeros((4, 1), np.uint8), r"policy: .*got uint8 \(4, 1\)"),
        (np.asarray([0, 0, 0, 3], np.uint8), r"policy: expected levels 0, 1 and 2, got 3"),
        (np.asarray([2, 0, 0, 0], np.uint8), r"policy: expected every JOIN to follow a patch"),
        (np.asarray([0, 2, 0, 0], np.uint8), r"policy: expected every JOIN to follow a patch"),
        (np.asarray([1, 1, 1, 2], np.uint8), r"policy: expected every JOIN to follow a patch item of the same user"),
    ],
)
def test_own_policies_are_checked(levels: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        pk.build_layout(CATALOG, HISTORIES, OwnPolicy(levels), PROMPT)


def test_own_policy_may_join_after_a_join() -> None:
    levels = np.asarray([Level.PATCH, Level.JOIN, Level.JOIN, Level.PATCH], np.uint8)
    assert pk.build_layout(CATALOG, HISTORIES, OwnPolicy(levels), pk.Prompt()).hi.tolist() == [3, 4]


# ------------------------------------------------------------------ policies


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: pk.TextOnly(max_items=0), ValueError, r"max_items: .*got 0"),
        (lambda: pk.TextOnly(max_items=-5), ValueError, r"max_items: .*got -5"),
        (lambda: pk.TextOnly(max_items=1.5), TypeError, r"max_items: expected an integer, got float"),
        (lambda: pk.TextOnly(max_items="all"), TypeError, r"max_items: expected an integer, got str"),
        (lambda: pk.TextOnly(max_items=True), TypeError, r"max_items: expected an integer, got bool"),
        (lambda: pk.TextOnly(max_items=10**30), ValueError, r"max_items: .*got 10{30}"),
        (lambda: pk.ItemPatches(keep_text=-1), ValueError, r"keep_text: .*got -1"),
        (lambda: pk.ItemPatches(keep_text=None), TypeError, r"keep_text: expected an integer, got NoneType"),
        (lambda: pk.ItemPatches(keep_text=2.0), TypeError, r"keep_text: expected an integer, got float"),
        (lambda: pk.ItemPatches(keep_text=10**30), ValueError, r"keep_text: .*got 10{30}"),
        (lambda: pk.ItemPatches(max_items=0), ValueError, r"max_items: .*got 0"),
        (lambda: pk.SessionPatches(group_size=0), ValueError, r"group_size: .*got 0"),
        (lambda: pk.SessionPatches(group_size="5"), TypeError, r"group_size: expected an integer, got str"),
        (lambda: pk.SessionPatches(group_size=10**30), ValueError, r"group_size: .*got 10{30}"),
        (lambda: pk.SessionPatches(max_items=0), ValueError, r"max_items: .*got 0"),
        (lambda: pk.SessionPatches(align="middle"), ValueError, r'align: expected "end" or "start", got \'middle\''),
        (lambda: pk.SessionPatches(align=None), ValueError, r"align: .*got None"),
        (lambda: pk.RandomItemPatches(probability=1.5), ValueError, r"probability: expected .* 0\.\.1, got 1.5"),
        (lambda: pk.RandomItemPatches(probability=-0.1), ValueError, r"probability: .*got -0.1"),
        (lambda: pk.RandomItemPatches(probability=float("inf")), ValueError, r"probability: .*got inf"),
        (lambda: pk.RandomItemPatches(probability="half"), TypeError, r"probability: expected a number, got str"),
        (lambda: pk.RandomItemPatches(probability=None), TypeError, r"probability: expected a number, got NoneType"),
        (lambda: pk.RandomItemPatches(probability=True), TypeError, r"probability: expected a number, got bool"),
        (lambda: pk.RandomItemPatches(seed=-1), ValueError, r"seed: .*got -1"),
        (lambda: pk.RandomItemPatches(seed=0.5), TypeError, r"seed: expected an integer, got float"),
        (lambda: policy_from_dict({"name": "Patches"}), ValueError, r"description: .* TextOnly.*, got 'Patches'"),
        (lambda: policy_from_dict({}), ValueError, r"description: .*got None"),
        (lambda: policy_from_dict({"name": "TextOnly", "keep": 5}), TypeError, r"keep"),
        (lambda: policy_to_dict(OwnPolicy(None)), TypeError, r"policy: expected one of TextOnly.*, got OwnPolicy"),
    ],
)
def test_policies_refuse(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    refused(make, error, message)


# ------------------------------------------------------------------ backends


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("fast", ValueError, r"backend: expected auto, .*, got 'fast'"),
        ("", ValueError, r"backend: expected auto, .*, got ''"),
        ("Native", ValueError, r"backend: .*got 'Native'"),
        (None, TypeError, r"backend: expected a string, got NoneType"),
        (1, TypeError, r"backend: expected a string, got int"),
    ],
)
def test_unknown_backend(name: Any, error: type[Exception], message: str) -> None:
    layout = pk.build_layout(CATALOG, HISTORIES, pk.TextOnly(), PROMPT, TARGETS)
    refused(pk.pool_rows, error, message, weight_of(), layout, backend=name)
    refused(pk.pool_rows_grad, error, message, torch.ones(layout.num_rows, 8), layout, VOCABULARY, backend=name)
    refused(pk.compress_batch, error, message, weight_of(), CATALOG, HISTORIES, pk.TextOnly(), PROMPT, backend=name)


def test_environment_names_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = pk.build_layout(CATALOG, HISTORIES, pk.TextOnly(), PROMPT, TARGETS)
    expected = pk.pool_rows(weight_of(), layout)
    monkeypatch.setenv("PATCHKERN_BACKEND", "reference")
    assert torch.equal(pk.pool_rows(weight_of(), layout), expected)
    monkeypatch.setenv("PATCHKERN_BACKEND", "fast")
    refused(pk.pool_rows, ValueError, r"PATCHKERN_BACKEND: expected auto, .*, got 'fast'", weight_of(), layout)
    # An explicit argument wins.
    assert torch.equal(pk.pool_rows(weight_of(), layout, backend="reference"), expected)


def run_python(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", program],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_without_the_native_module() -> None:
    """A fact with a reason and one warning; the reference backend and the NumPy planner do the work."""
    program = """
import sys
sys.modules["patchkern._native"] = None
import torch, patchkern as pk
status = pk.backends()
assert not status["native"].usable and status["native"].reason, status
assert status["reference"].usable
catalog = pk.Catalog.from_token_ids([0, 1, 2], [0, 2, 3])
weight = torch.tensor([[2.0], [4.0], [8.0]])
for _ in range(3):
    batch = pk.compress_batch(weight, catalog, [[0, 1]], pk.ItemPatches(0), pk.Prompt(), targets=[1])
assert batch.inputs_embeds.tolist() == [[3.0], [8.0], [8.0]], batch.inputs_embeds
try:
    pk.pool_rows(weight, batch.layout, backend="native")
except ValueError as error:
    print("refused:", error)
"""
    done = run_python(program)
    assert done.returncode == 0, done.stderr
    assert "refused: backend: expected a usable backend, got 'native': " in done.stdout
    assert done.stderr.count("slow reference backend") == 1, done.stderr


def test_an_instruction_set_this_cpu_lacks() -> None:
    if not pk.backends()["native"].usable:
        pytest.skip(f"the native backend is not usable: {pk.backends()['native'].reason}")
    program = """
import torch, patchkern as pk
print(pk.backends()["native"])
layout = pk.build_layout(pk.Catalog.from_token_ids([0], [0, 1]), [[0]], pk.TextOnly(), pk.Prompt())
for backend in ("auto", "native"):
    try:
        print(pk.pool_rows(torch.ones(1, 1), layout, backend=backend))
    except ValueError as error:
        print("refused:", error)
"""
    done = run_python(program, PATCHKERN_ISA="mmx")
    assert done.returncode == 0, done.stderr
    assert "usable=False" in done.stdout and "PATCHKERN_ISA: expected auto, " in done.stdout
    assert "refused: backend: expected a usable backend, got 'native': PATCHKERN_ISA" in done.stdout
    assert done.stderr.count("slow reference backend") == 1, done.stderr


# ------------------------------------------------------------------ pool_rows, pool_rows_grad, layouts


def test_wrong_layout_argument(backend: str) -> None:
    for layout in (None, [1], CATALOG, torch.zeros(3)):
        message = rf"layout: expected a PatchLayout, got {type(layout).__name__}"
        refused(pk.pool_rows, TypeError, message, weight_of(), layout, backend=backend)
        refused(pk.pool_rows_grad, TypeError, message, torch.ones(3, 8), layout, VOCABULARY, backend=backend)


def test_layout_on_another_device() -> None:
    layout = pk.build_layout(CATALOG, HISTORIES, pk.TextOnly(), PROMPT, TARGETS)
    refused(
        pk.pool_rows,
        ValueError,
        r"layout: expected it on weight's device, cpu, got meta",
        weight_of(),
        layout.to("meta"),
    )
    refused(
        pk.pool_rows_grad,
        ValueError,
        r"grad_rows: expected it on the layout's device, meta, got cpu",
        torch.ones(layout.num_rows, 8),
        layout.to("meta"),
        VOCABULARY,
    )
    without = pk.build_layout(CATALOG, HISTORIES, pk.TextOnly(), PROMPT).to("meta")
    refused(without.with_transpose, ValueError, r"layout: expected one on the CPU to build its transpose, got meta")


def test_wrong_gradient(backend: str) -> None:
    layout = pk.build_layout(CATALOG, HISTORIES, pk.TextOnly(), PROMPT, TARGETS)
    rows = layout.num_rows
    for grad_rows, error, message in (
        ([[1.0]], TypeError, r"grad_rows: expected a tensor, got list"),
        (torch.ones(rows, 8, dtype=torch.int64), TypeError, r"grad_rows: expected float32, .*, got torch.int64"),
        (
            torch.ones(rows - 1, 8),
            ValueError,
            rf"grad_rows: expected one row per layout row \({rows}\), got {rows - 1}",
        ),
        (torch.ones(rows), ValueError, r"grad_rows: expected shape"),
        (torch.ones(8, rows).t(), ValueError, r"grad_rows: expected contiguous rows"),
    ):
        refused(pk.pool_rows_grad, error, message, grad_rows, layout, VOCABULARY, backend=backend)
    grad_rows = torch.ones(rows, 8)
    for embeddings, error, message in (
        (10, ValueError, r"num_embeddings: expected more than the largest token id, 10, got 10"),
        (-1, ValueError, r"num_embeddings: .*got -1"),
        (11.0, TypeError, r"num_embeddings: expected an integer, got float"),
        (None, TypeError, r"num_embeddings: expected an integer, got NoneType"),
        (True, TypeError, r"num_embeddings: expected an integer, got bool"),
    ):
        refused(pk.pool_rows_grad, error, message, grad_rows, layout, embeddings, backend=backend)
    without = pk.build_layout(CATALOG, HISTORIES, pk.TextOnly(), PROMPT)
    refused(
        pk.pool_rows_grad,
        ValueError,
        r"layout: expected one with a transpose, got none",
        torch.ones(without.num_rows, 8),
        without,
        VOCABULARY,
    )


def made_by_hand() -> pk.PatchLayout:
    """Rows: literal 7, the patch of [1, 2], the session {[1, 2], [3]}, literal 9."""
    layout = pk.PatchLayout(
        lo=torch.tensor([-8, 0, 1, -10], dtype=torch.int32),
        hi=torch.tensor([0, 1, 3, 0], dtype=torch.int32),
        items=torch.tensor([0, 0, 1], dtype=torch.int32),
        token_ids=torch.tensor([1, 2, 3], dtype=torch.int32),
        offsets=torch.tensor([0, 2, 3], dtype=torch.int32),
        title_index=torch.tensor([0, 1], dtype=torch.int32),
        cu_seqlens=torch.tensor([0, 3, 4], dtype=torch.int32),
        max_seqlen=3,
        position_ids=torch.tensor([0, 1, 2, 0]),
        labels=torch.tensor([-100, -100, -100, -100]),
        logit_rows=torch.tensor([1]),
        logit_labels=torch.tensor([5]),
        history_tokens=5,
        history_rows=2,
        max_token_id=9,
    )
    return layout.with_transpose()


def test_layouts_made_by_hand_work(backend: str) -> None:
    rows = [[[7]], [[1, 2]], [[1, 2], [3]], [[9]]]
    layout = made_by_hand()
    weight = cases.make_weight(VOCABULARY, 8)
    oracle.assert_pooled(pk.pool_rows(weight, layout, backend=backend), weight, rows)
    grad = pk.pool_rows_grad(weight[:4], layout, VOCABULARY, backend=backend)
    oracle.assert_gradient(grad, weight[:4], rows, VOCABULARY)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"lo": [-8, 0, 1, -10]}, TypeError, r"lo: expected a tensor, got list"),
        ({"lo": None}, TypeError, r"lo: expected a tensor, got NoneType"),
        ({"lo": torch.tensor([-8, 0, 1, -10])}, TypeError, r"lo: expected dtype torch.int32, got torch.int64"),
        ({"lo": int32(-8, 0, 1, -10).reshape(2, 2)}, ValueError, r"lo: expected a 1-D tensor, got shape \(2, 2\)"),
        ({"lo": torch.zeros(8, dtype=torch.int32)[::2]}, ValueError, r"lo: expected a contiguous tensor, got stride"),
        ({"lo": int32(-8, 0, 1)}, ValueError, r"hi: expected 3 entries .*, got 4"),
        ({"lo": int32(-8, 0, 3, -10)}, ValueError, r"lo\[2\]: expected a value in .*\.\.2, got 3"),
        ({"lo": int32(-(2**31), 0, 1, -10)}, ValueError, r"lo\[0\]: .*got -2147483648"),
        ({"hi": int32(0, 1, 4, 0)}, ValueError, r"hi\[2\]: expected a value in 0\.\.3, got 4"),
        ({"hi": int32(0, 0, 3, 0)}, ValueError, r"hi\[1\]: expected more than lo for a patch, got 0"),
        ({"hi": int32(0, 1, 3, 2)}, ValueError, r"hi\[3\]: expected 0 for a literal, got 2"),
        ({"hi": int32(0, 1, 3)}, ValueError, r"hi: expected 4 entries"),
        ({"items": int32(0, 0, 2)}, ValueError, r"items\[2\]: expected a value in 0\.\.1, got 2"),
        ({"items": int32(0, -1, 1)}, ValueError, r"items\[1\]: .*got -1"),
        ({"token_ids": int32(1, -2, 3)}, ValueError, r"token_ids\[1\]: .*got -2"),
        ({"token_ids": torch.ones(3)}, TypeError, r"token_ids: expected dtype torch.int32, got torch.float32"),
        ({"offsets": int32(0, 3, 2)}, ValueError, r"offsets: expected offsets from 0 to 3, got \[0, 2\]"),
        ({"offsets": int32(0, 4, 3)}, ValueError, r"offsets\[2\]: expected non-decreasing offsets"),
        ({"offsets": int32(0, 3, 3)}, ValueError, r"offsets: expected at least one token per title, .* title 1"),
        ({"offsets": int32(0, 3)}, ValueError, r"offsets: expected 3 entries .*, got 2"),
        ({"title_index": int32(0)}, ValueError, r"offsets: expected 2 entries .*, got 3"),
        ({"cu_seqlens": int32(0, 5, 4)}, ValueError, r"cu_seqlens\[2\]: expected non-decreasing offsets"),
        ({"cu_seqlens": int32(1, 3, 4)}, ValueError, r"cu_seqlens: expected offsets from 0 to 4, got \[1, 4\]"),
        ({"cu_seqlens": int32()}, ValueError, r"cu_seqlens: expected offsets from 0 to 4"),
        ({"max_seqlen": 4}, ValueError, r"max_seqlen: expected the longest user's rows, 3, got 4"),
        ({"max_seqlen": 3.0}, TypeError, r"max_seqlen: expected an integer, got float"),
        ({"max_token_id": 8}, ValueError, r"max_token_id: expected the largest token id, 9, got 8"),
        ({"max_token_id": True}, TypeError, r"max_token_id: expected an integer, got bool"),
        ({"position_ids": torch.tensor([0, 1])}, ValueError, r"position_ids: expected 4 entries .*, got 2"),
        ({"position_ids": int32(0, 1, 2, 0)}, TypeError, r"position_ids: expected dtype torch.int64"),
        ({"labels": None}, ValueError, r"labels: expected labels, logit_rows and logit_labels together or none"),
        ({"labels": torch.tensor([1])}, ValueError, r"labels: expected 4 entries .*, got 1"),
        ({"logit_rows": torch.tensor([4])}, ValueError, r"logit_rows\[0\]: expected a value in 0\.\.3, got 4"),
        ({"logit_rows": torch.tensor([-1])}, ValueError, r"logit_rows\[0\]: .*got -1"),
        ({"logit_labels": torch.tensor([1, 2])}, ValueError, r"logit_labels: expected 1 entries .*, got 2"),
        ({"history_rows": None}, TypeError, r"history_rows: expected an integer, got NoneType"),
        ({"prefix": [[0, 0]]}, TypeError, r"prefix: expected a tensor, got list"),
        ({"prefix": int32(0, 0)}, ValueError, r"prefix: expected shape \(2, 2\), one range per span .*, got \(2,\)"),
        ({"prefix": torch.zeros(2, 2)}, TypeError, r"prefix: expected dtype torch.int32, got torch.float32"),
        ({"prefix": int32(0, 0, 0, 0).reshape(2, 2).T}, ValueError, r"prefix: expected a contiguous tensor"),
        ({"prefix": int32(0, 0, 2, 1).reshape(2, 2)}, ValueError, r"prefix\[1\]: expected a range .*, got \[2, 1\]"),
        ({"prefix": int32(0, 0, -1, 1).reshape(2, 2)}, ValueError, r"prefix\[1\]: expected a range"),
        ({"prefix": int32(0, 1, 0, 0).reshape(2, 2)}, ValueError, r"prefix\[0\]: .* before its span, in 0\.\.0, got"),
        ({"prefix": int32(0, 0, 0, 1).reshape(2, 2)}, ValueError, r"max_prefix: expected .*, 1, got 0"),
        ({"max_prefix": 2}, ValueError, r"max_prefix: expected the longest prefix's rows, 0, got 2"),
        ({"lo": int32(-8, 0, 1, -10).to_sparse()}, ValueError, r"lo: expected a dense tensor .*torch.sparse_coo"),
        ({"transpose": (1, 2)}, TypeError, r"transpose: expected a Transpose, got tuple"),
        ({"title_index": int32(0, -1)}, ValueError, r"title_index\[1\]: expected a value in 0\.\..*, got -1"),
        ({"catalog_fingerprint": 7}, TypeError, r"catalog_fingerprint: expected a string or None, got int"),
        (
            {"lo": int32(-8, 0, 1, -10).to("meta")},
            ValueError,
            r"lo: expected a dense tensor with values, got .* on meta",
        ),
    ],
)
def test_layouts_made_by_hand_are_checked(change: dict[str, Any], error: type[Exception], message: str) -> None:
    refused(dataclasses.replace, error, message, made_by_hand(), **change)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tokens": [1]}, TypeError, r"transpose.tokens: expected a tensor, got list"),
        ({"tokens": int32(1, 2, 3, 7, 10)}, ValueError, r"transpose.tokens\[4\]: expected a value in 0\.\.9, got 10"),
        ({"tokens": int32(-1, 2, 3, 7, 9)}, ValueError, r"transpose.tokens\[0\]: .*got -1"),
        ({"tokens": int32(1, 3, 2, 7, 9)}, ValueError, r"transpose.tokens: expected ascending token ids"),
        ({"tokens": int32(1, 1, 2, 3, 7)}, ValueError, r"transpose.tokens: expected ascending token ids"),
        ({"tokens": int32(1, 2)}, ValueError, r"transpose.offsets: expected 3 entries"),
        ({"offsets": int32(0, 2, 1, 5, 6, 7)}, ValueError, r"transpose.offsets\[2\]: expected non-decreasing"),
        (
            {"offsets": int32(0, 2, 2, 5, 6, 7)},
            ValueError,
            r"transpose.offsets: expected at least one contribution per token",
        ),
        ({"rows": int32(1, 2, 1, 2, 2, 0, 4)}, ValueError, r"transpose.rows\[6\]: expected a value in 0\.\.3, got 4"),
        ({"divisors": int32(2, 4, 2, 4, 0, 1, 1)}, ValueError, r"transpose.divisors\[4\]: .*got 0"),
        ({"divisors": int32(2)}, ValueError, r"transpose.divisors: expected \d entries .*, got 1"),
    ],
)
def test_transposes_made_by_hand_are_checked(change: dict[str, Any], error: type[Exception], message: str) -> None:
    layout = made_by_hand()
    assert layout.transpose is not None
    transpose = dataclasses.replace(layout.transpose, **change)
    refused(dataclasses.replace, error, message, layout, transpose=transpose)


def test_layouts_overwritten_later_are_refused() -> None:
    """The tensors of a layout can be written to after its checks; the kernel looks again and writes nothing."""
    if not pk.backends()["native"].usable:
        pytest.skip(f"the native backend is not usable: {pk.backends()['native'].reason}")
    for name, value in (("lo", -50), ("hi", 9), ("items", 7), ("token_ids", 99), ("offsets", 77)):
        layout = made_by_hand()
        getattr(layout, name)[1] = value
        out = torch.full((4, 8), 777.0)
        refused(
            pk.pool_rows,
            ValueError,
            rf"{name}\[\d\]: expected|lo\[1\]: expected",
            weight_of(),
            layout,
            backend="native",
            out=out,
        )
        assert (out == 777.0).all()
