# SPDX-License-Identifier: Apache-2.0
"""Variable-length kernels of others for spans without prefixes: ``flash_attn`` where it is installed, else torch's."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# q (T, H, d), k and v (T, Hkv, d), cu_seqlens, max_seqlen, scaling, dropout, window (left, right) -> (T, H, d)
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, int, "float | None", float, tuple[int, int]], Tensor]


def cuda_kernel(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Kernel | None:
    """The variable-length kernel that can run these tensors, or None."""
    supported = (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.dtype == key.dtype == value.dtype
        and query.shape[-1] == value.shape[-1] <= 256
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )
    if not supported:
        return None
    if (kernel := _flash_attn_kernel()) is not None:
        return kernel
    kernel = _torch_varlen_kernel() if query.shape[-1] % 8 == 0 else None  # flash_attn pads such heads, torch refuses
    if kernel is not None and dropout > 0:
        warnings.warn(
            "torch's varlen_attn has no attention dropout, so each user is attended separately, which is slow; "
            "set the model's attention dropout to 0 or install flash-attn",
            stacklevel=2,
        )
        return None
    return kernel


def repeats_keys() -> bool:
    """Whether `cuda_kernel` copies keys and values for every query head, since torch 2.11 does not group them."""
    varlen_attn = _torch_varlen() if _flash_attn_kernel() is None else None
    return varlen_attn is not None and not _takes_groups(varlen_attn)


@functools.cache
def _flash_attn_kernel() -> Kernel | None:
    try:
        from flash_attn import flash_attn_varlen_func
    except ModuleNotFoundError:
        return None
    except ImportError as error:
        warnings.warn(f"flash_attn is installed but does not load, torch's varlen_attn is used: {error}", stacklevel=2)
        return None

    def kernel(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu: Tensor,
        longest: int,
        scaling: float | None,
        dropout: float,
        window: tuple[int, int],
    ) -> Tensor:
        out: Tensor = flash_attn_varlen_func(
            q, k, v, cu, cu, longest, longest, dropout, softmax_scale=scaling, causal=True, window_size=window
        )
        return out

    return kernel


def _torch_varlen() -> Callable[..., Any] | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ModuleNotFoundError:
        return None
    parameters = inspect.signature(varlen_attn).parameters
    return varlen_attn if {"scale", "window_size"} <= parameters.keys() else None  # torch 2.10 has neither


def _takes_groups(varlen_attn: Callable[..., Any]) -> bool:
    return "enable_gqa" in inspect.signature(varlen_attn).parameters  # not yet in torch 2.11


@functools.cache
def _torch_varlen_kernel() -> Kernel | None:
    varlen_attn = _torch_varlen()
    if varlen_attn is None:
        return None
    takes_groups = _takes_groups(varlen_attn)

    def kernel(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu: Tensor,
        longest: int,
        scaling: float | None,
        dropout: float,
        window: tuple[int, int],
    ) -> Tensor:
        options: dict[str, Any] = {"scale": scaling, "window_size": window}
        groups = q.shape[1] // k.shape[1]
        if takes_groups:
            options["enable_gqa"] = groups > 1
        else:
            k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        out = varlen_attn(q, k, v, cu, cu, longest, longest, **options)
        return out if isinstance(out, Tensor) else out[0]

    return kernel
