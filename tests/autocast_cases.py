# SPDX-License-Identifier: Apache-2.0
"""What autocast does on a CUDA device, done on a CPU, whose own autocast computes less in float32."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

# of torch's list "CUDA Ops that autocast to float32", what a model may call and the CPU's autocast leaves as it is
IN_FLOAT32 = [
    "cumprod",
    "cumsum",
    "exp",
    "expm1",
    "layer_norm",
    "linalg_vector_norm",
    "log",
    "log1p",
    "log_softmax.int",
    "logsumexp",
    "native_layer_norm",
    "pow.Scalar",
    "pow.Tensor_Scalar",
    "pow.Tensor_Tensor",
    "reciprocal",
    "rms_norm",
    "rsqrt",
    "softmax.int",
    "softplus",
    "sum",
    "sum.dim_IntList",
]
AS_IT_IS = ["index_copy"]  # the CPU's promotes what differs in dtype


@contextmanager
def like_cuda() -> Generator[None]:
    """Where it is open, ``torch.autocast("cpu", ...)`` chooses dtypes as ``torch.autocast("cuda", ...)`` does."""
    with torch.library._scoped_library("aten", "IMPL") as library, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")  # that one is replaced is the purpose
        for names, cast in ((IN_FLOAT32, _to_float32), (AS_IT_IS, lambda value: value)):
            for name in names:
                base, _, overload = name.partition(".")
                operator = getattr(getattr(torch.ops.aten, base), overload or "default")
                library.impl(name, _autocast(operator, cast), "AutocastCPU", allow_override=True)
        yield


def _to_float32(value: Any) -> Any:
    half = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if half else value


def _autocast(operator: Any, cast: Callable[[Any], Any]) -> Callable[..., Any]:
    def run(*arguments: Any, **options: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)):
            return operator(*tree_map(cast, arguments), **tree_map(cast, options))

    return run
