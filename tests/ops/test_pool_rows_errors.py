# SPDX-License-Identifier: Apache-2.0
"""What `pool_rows` and its gradient refuse: a TypeError or ValueError that names the argument, says what was
expected and what came, and comes before anything is written."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import cases
import numpy as np
import pytest
import torch
from error_cases import (
    CATALOG,
    HISTORIES,
    LAYOUT_ARGUMENTS,
    PROMPT,
    TARGETS,
    TITLES,
    VOCABULARY,
    made_by_hand,
    refused,
    weight_of,
)

import patchkern as pk


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
        ({"histories": [[10, 21], [10], [10]]}, r"histories: .*got 21"),
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


# ------------------------------------------------------------------ scale, and a gradient to add to


WRONG_SCALES = {
    "nan": (float("nan"), ValueError, "scale: expected a finite number, .*, got nan"),
    "inf": (float("-inf"), ValueError, "scale: expected a finite number, .*, got -inf"),
    "beyond float32": (
        1e39,
        ValueError,
        r"scale: expected a finite number, at most 3.403e\+38 for torch.float32, got 1e\+39",
    ),
    "bool": (True, TypeError, "scale: expected a number, got bool"),
    "string": ("2", TypeError, "scale: expected a number, got str"),
    "none": (None, TypeError, "scale: expected a number, got NoneType"),
    "tensor": (torch.tensor(2.0), TypeError, "scale: expected a number, got Tensor"),
}


@pytest.mark.parametrize("name", WRONG_SCALES)
def test_wrong_scale(name: str) -> None:
    scale, error, message = WRONG_SCALES[name]
    layout = cases.make_batch(pk.SessionPatches(3), [9]).layout()
    weight = cases.make_weight(cases.VOCABULARY, 8)
    with pytest.raises(error, match=message):
        pk.pool_rows(weight, layout, scale=scale)
    with pytest.raises(error, match=message):
        pk.pool_rows_grad(weight[: layout.num_rows], layout, cases.VOCABULARY, scale=scale)
    assert pk.pool_rows(weight.double(), layout, scale=1e39).isfinite().all()


def test_wrong_gradient_to_add_to() -> None:
    layout = cases.make_batch(pk.SessionPatches(3), [9]).layout()
    grad_rows = cases.make_weight(layout.num_rows, 8)
    count = cases.VOCABULARY
    cut = torch.ones(layout.num_rows + count, 8)
    wrong: list[tuple[Any, type[Exception], str]] = [
        ([[0.0]], TypeError, "out: expected a tensor, got list"),
        (torch.zeros(count, 7), ValueError, r"out: expected shape \(97, 8\), got \(97, 7\)"),
        (torch.zeros(count - 1, 8), ValueError, r"out: expected shape \(97, 8\), got \(96, 8\)"),
        (
            torch.zeros(count, 8).double(),
            TypeError,
            "out: expected grad_rows's dtype, torch.float32, got torch.float64",
        ),
        (torch.zeros(count, 8, device="meta"), ValueError, "out: expected grad_rows's device, cpu, got meta"),
        (torch.zeros(8, count).t(), ValueError, r"out: expected contiguous rows .* got stride \(1, 97\)"),
        (torch.zeros(1, 8).expand(count, 8), ValueError, "out: expected rows that do not overlap"),
        (torch.zeros(count, 8, requires_grad=True), ValueError, "out: expected a tensor that requires no gradient"),
        (cut[layout.num_rows - 1 : -1], ValueError, "out: expected memory of its own, got grad_rows's"),
    ]
    for out, error, message in wrong:
        given = cut[: layout.num_rows] if out is wrong[-1][0] else grad_rows
        with pytest.raises(error, match=message):
            pk.pool_rows_grad(given, layout, count, out=out)
    assert cut.eq(1).all()
    with pytest.raises(ValueError, match=r"out: expected None for a compact gradient \(dense=False\), got a tensor"):
        pk.pool_rows_grad(grad_rows, layout, count, dense=False, out=torch.zeros(count, 8))
