# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels on a GPU: what only a device can show."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import cases
import oracle
import pytest
import torch
from cuda_cases import bits, columns

import patchkern as pk
from patchkern.ops import cuda


def on_gpu(test: Callable[..., Any]) -> Callable[..., Any]:
    """For a test that needs the CUDA backend on a device."""
    reason = cuda.unusable_reason() if torch.cuda.is_available() else None
    return pytest.mark.gpu(pytest.mark.skipif(reason is not None, reason=str(reason))(test))


class Call(NamedTuple):
    """A batch on a device and outputs to write into: nothing is allocated or checked any more."""

    weight: torch.Tensor
    grad_rows: torch.Tensor
    layout: pk.PatchLayout
    rows: torch.Tensor
    grad: torch.Tensor

    def forward(self) -> None:
        arrays = (self.layout.lo, self.layout.hi, self.layout.items, self.layout.token_ids, self.layout.offsets)
        cuda.pool_rows(self.weight, *arrays, None, None, 1.0, self.rows)

    def backward(self) -> None:
        cuda.pool_rows_grad(self.grad_rows, *columns(self.layout), 1.0, self.grad, True, False)

    def both(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The bits of a fresh forward and backward."""
        self.rows.fill_(float("nan"))
        self.grad.zero_()
        self.forward()
        self.backward()
        return bits(self.rows).clone(), bits(self.grad).clone()


def gpu_call(device: str = "cuda", width: int = 512) -> tuple[Call, tuple[torch.Tensor, torch.Tensor]]:
    """A batch with long sessions and frequent tokens, and the results on `device`, held against the oracle's."""
    batch = cases.make_batch(pk.SessionPatches(group_size=50, max_items=None), [5, 23, 60, 400] * 4)
    layout = batch.layout().with_transpose()
    weight = cases.make_weight(cases.VOCABULARY, width, torch.bfloat16)
    grad_rows = cases.make_weight(layout.num_rows, width, torch.bfloat16, seed=1)
    call = Call(
        weight.to(device),
        grad_rows.to(device),
        layout.to(device),
        torch.empty(layout.num_rows, width, dtype=torch.bfloat16, device=device),
        torch.empty(cases.VOCABULARY, width, dtype=torch.bfloat16, device=device),
    )
    expected = call.both()
    oracle.assert_pooled(call.rows.cpu(), weight, batch.rows())
    oracle.assert_gradient(call.grad.cpu(), grad_rows, batch.rows(), cases.VOCABULARY)
    return call, expected


def assert_same(got: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


@on_gpu
def test_same_bits_in_ten_runs() -> None:
    call, expected = gpu_call()
    for _ in range(10):
        assert_same(call.both(), expected)


@on_gpu
def test_side_stream() -> None:
    """The kernels' own CUDA runtime works on a stream of torch's: in its order, and without waiting for it."""
    call, expected = gpu_call()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # what comes before on the stream
        weight = call.weight.clone()
        call.weight.zero_()
        call.forward()
        zeros = call.rows.clone()
        call.weight.copy_(weight)
        assert not stream.query(), "a launch waited for the stream"
        got = call.both()
    torch.cuda.current_stream().wait_stream(stream)
    assert not zeros.any()
    assert_same(got, expected)


@on_gpu
def test_other_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one CUDA device")
    assert torch.cuda.current_device() == 0
    _, expected = gpu_call("cuda:0")
    _, got = gpu_call("cuda:1")
    assert_same(tuple(part.cpu() for part in got), tuple(part.cpu() for part in expected))
    assert torch.cuda.current_device() == 0
    again, _ = gpu_call("cuda:0")  # after it, torch still works on the first
    with torch.cuda.device(1):
        assert_same(again.both(), expected)
        assert torch.cuda.current_device() == 1
        assert torch.ones(3, device="cuda").device.index == 1


@on_gpu
def test_cuda_graph_replays_on_changed_contents() -> None:
    call, expected = gpu_call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call.both()
    weight, grad_rows = call.weight.clone(), call.grad_rows.clone()
    call.weight.mul_(2)
    call.grad_rows.mul_(4)
    graph.replay()
    doubled, quadrupled = call.rows / 2, call.grad / 4
    assert_same((bits(doubled), bits(quadrupled)), expected)
    call.weight.copy_(weight)
    call.grad_rows.copy_(grad_rows)
    graph.replay()
    assert_same((bits(call.rows), bits(call.grad)), expected)


@on_gpu
@pytest.mark.unpoisoned(reason="filling memory would be more to allocate and to launch")
def test_no_wait_for_the_device_and_no_allocation_but_the_workspace() -> None:
    call, _ = gpu_call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        call.forward()
        forward = torch.cuda.memory_stats()["allocation.all.allocated"] - before
        call.backward()
        backward = torch.cuda.memory_stats()["allocation.all.allocated"] - before - forward
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (forward, backward) == (0, 2)


@on_gpu
def test_more_than_2_to_the_31_elements() -> None:
    """In the table, in the rows, and in both gradients."""
    width, count = 2048, 2**20 + 40
    free, _ = torch.cuda.mem_get_info()
    if free < 4 * width * count * 2 + 2**30:
        pytest.skip(f"needs 18 GiB of device memory, {free / 2**30:.0f} GiB are free")
    weight = torch.randint(-50, 50, (count, width), dtype=torch.int8, device="cuda").to(torch.bfloat16)
    tokens = torch.randperm(count, device="cuda").to(torch.int32)
    none, offsets = torch.zeros(0, dtype=torch.int32, device="cuda"), torch.zeros(1, dtype=torch.int32, device="cuda")
    out = torch.empty_like(weight)
    cuda.pool_rows(weight, -1 - tokens, torch.zeros_like(tokens), none, none, offsets, None, None, 1.0, out)
    for part in torch.arange(count, device="cuda").split(2**16):
        assert torch.equal(out[part], weight[tokens[part].long()])
    # the gradient of a permutation is the inverse permutation: back to where it came from
    contributing = torch.argsort(tokens).to(torch.int32)
    every = torch.arange(count, dtype=torch.int32, device="cuda")
    ends = torch.arange(count + 1, dtype=torch.int32, device="cuda")
    grad = torch.zeros_like(weight)
    cuda.pool_rows_grad(out, every, ends, contributing, torch.ones_like(every), 1.0, grad, True, False)
    assert torch.equal(grad, weight)


@on_gpu
def test_literals_are_copied_bit_for_bit_on_a_device() -> None:
    """The bits of NaN, too, which no arithmetic keeps."""
    weight = torch.randint(-(2**15), 2**15, (50, 512), dtype=torch.int16).view(torch.bfloat16).cuda()
    tokens = torch.randint(0, 50, (1000,), dtype=torch.int32).cuda()
    none, offsets = torch.zeros(0, dtype=torch.int32, device="cuda"), torch.zeros(1, dtype=torch.int32, device="cuda")
    out = torch.empty(1000, 512, dtype=torch.bfloat16, device="cuda")
    cuda.pool_rows(weight, -1 - tokens, torch.zeros_like(tokens), none, none, offsets, None, None, 1.0, out)
    assert torch.equal(bits(out), bits(weight[tokens.long()]))
