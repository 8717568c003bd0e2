# SPDX-License-Identifier: Apache-2.0
"""Counting memory: what a pass on meta or fake tensors would hold, and what a real run held at most."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import profiler
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

_GROUPED_MM = getattr(getattr(torch.ops.aten, "_grouped_mm", None), "default", None)


class LiveBytes(TorchDispatchMode):
    """While it is active, count the bytes that the tensors made since would hold, as long as they are referenced.

    Tensors of the meta device and fake ones are counted, by storage, so that a view costs nothing. What an operator
    only needs while it runs is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        """bytes referenced now"""
        self.peak = 0
        """the most of `live` since the start"""
        self._counted: dict[int, str] = {}
        self.part = ""
        """what tensors that are made now belong to"""
        self.live_of: dict[str, int] = {}
        """`live` by part"""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # two of three calls ask for it
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 0  # what a model asks the values of its inputs, positions for instance, has no answer here
        if func is _GROUPED_MM:
            func = _grouped_product
        kwargs = kwargs or {}
        arguments = {tensor.untyped_storage()._cdata for tensor in _counted_tensors((args, *kwargs.values()))}
        result = func(*args, **kwargs)
        for tensor in _counted_tensors((result,)):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._counted and key not in arguments:
                self._counted[key] = self.part
                self._add(self.part, storage.nbytes())
                weakref.finalize(storage, self._free, key, storage.nbytes())
        self.peak = max(self.peak, self.live)
        self.after_operator()
        return result

    def after_operator(self) -> None:
        """For those who want to know more than the peak."""

    def move(self, tensor: Tensor, part: str) -> None:
        """Let a tensor that was counted belong to another part from now on."""
        storage = tensor.untyped_storage()
        before = self._counted.get(storage._cdata)
        if before is not None:
            self._counted[storage._cdata] = part
            self._add(before, -storage.nbytes())
            self._add(part, storage.nbytes())

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        """Tensors that are made meanwhile belong to ``part``."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    def _add(self, part: str, size: int) -> None:
        self.live += size
        self.live_of[part] = self.live_of.get(part, 0) + size

    def _free(self, key: int, size: int) -> None:
        self._add(self._counted.pop(key), -size)


def _grouped_product(a: Tensor, b: Tensor, offs: Any = None, *_: Any, **__: Any) -> Tensor:
    """Of experts. For tensors without memory torch knows it in bfloat16 alone, and devices multiply every type."""
    groups = () if a.ndim != b.ndim else offs.shape if a.ndim == 2 else a.shape[:1]
    return a.new_empty((*groups, a.shape[-2], b.shape[-1]))


def _counted_tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Of what an operator takes or returns: tensors, and lists of them."""
    for value in values:
        if isinstance(value, Tensor):
            if _is_counted(value):
                yield value
        elif isinstance(value, (list, tuple)):
            yield from _counted_tensors(value)


def _is_counted(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor) or tensor.is_meta


class Peak:
    """What `peak_memory` found."""

    bytes = 0
    """the most that was allocated at once, beyond what was allocated before"""


@contextmanager
def peak_memory(device: torch.device | str) -> Iterator[Peak]:
    """Measure the most that a block of code allocates on a device at once; exact, and the same in every run.

    On CUDA this is ``torch.cuda.max_memory_allocated``. On the CPU every allocation and release of torch is recorded by
    its profiler, which slows small operators down: do not time the same run. Records are added up every few
    hundred calls of modules, so that a long search takes no more memory for them than a short one.
    """
    gc.collect()  # or what was left before, a model for instance, might be collected in the block and taken off
    device = torch.device(device)
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        torch.cuda.synchronize(device)
        peak.bytes = torch.cuda.max_memory_allocated(device) - before
        return
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else some builds announce every start on stderr
    recorder = _Recorder(peak)
    recorder.start()
    hook = register_module_forward_pre_hook(recorder.count_call)
    try:
        yield peak
    finally:
        hook.remove()
        recorder.stop()


class _Recorder:
    """The profiler, stopped and started again now and then."""

    CALLS = 500
    """of modules, while one profiler runs; each keeps a few hundred bytes for every operator"""

    def __init__(self, peak: Peak) -> None:
        self._peak = peak
        self._live = 0
        self._thread = threading.get_ident()

    def start(self) -> None:
        self._calls = 0
        self._profile = profiler.profile(use_kineto=False, profile_memory=True)
        self._profile.__enter__()

    def stop(self) -> None:
        self._profile.__exit__(None, None, None)
        record: Any = self._profile.kineto_results
        for event in record.events():
            if event.name() == "[memory]":
                self._live += event.nbytes()
                self._peak.bytes = max(self._peak.bytes, self._live)

    def count_call(self, module: nn.Module, inputs: Any) -> None:
        """A module begins: no operator is running, unless autograd computes it again."""
        if threading.get_ident() != self._thread or torch._C._current_graph_task_id() != -1:
            return
        self._calls += 1
        if self._calls >= self.CALLS:
            self.stop()
            self.start()
