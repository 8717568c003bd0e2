# SPDX-License-Identifier: Apache-2.0
"""Span attention over shared prefixes against one `scaled_dot_product_attention` per span over its prefix and itself.

    python bench/bench_attention.py

One layer, on the CPU, forward alone and with the gradients of all three inputs. The other provider joins each span's
prefix and own rows and masks their future, which is what a padded batch or a loop over hypotheses does, at its best:
without padding. Both are compared with the masked reference in float64 first, and nothing is timed if either is off.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import timing
from patchkern.attention import span_attention
from patchkern.ops.span_attention import reference

HEADS, KEY_HEADS, WIDTH = 8, 4, 64


class Case(NamedTuple):
    """Spans as lengths and prefix ranges of the batch's own rows."""

    lengths: list[int]
    prefix: list[tuple[int, int]]

    @property
    def integers(self) -> tuple[Tensor, Tensor]:
        cu_seqlens = torch.tensor([0, *itertools.accumulate(self.lengths)], dtype=torch.int32)
        return cu_seqlens, torch.tensor(self.prefix, dtype=torch.int32)


def cases(scale: int) -> dict[str, Case]:
    """A search's hypotheses, a history's targets, and a long prompt's next chunk; ``scale`` 1 is the usual size."""
    rows = 1000 // scale
    branches = [(0, rows * (n + 1) // 50) for n in range(50)]
    return {
        "20 hypotheses of 3 rows": Case([rows] + [3] * 20, [(0, 0)] + [(0, rows)] * 20),
        "50 branches of 40 rows": Case([rows] + [40] * 50, [(0, 0), *branches]),
        "next chunk of a prompt": Case([2 * rows, rows // 2], [(0, 0), (0, 2 * rows)]),
    }


def per_span(query: Tensor, key: Tensor, value: Tensor, case: Case) -> Tensor:
    """(1, T, H, d); keys and values of a prefix are joined to every span that sees them."""
    bounds = itertools.pairwise(itertools.accumulate(case.lengths, initial=0))
    out = []
    for (begin, end), (first, last) in zip(bounds, case.prefix, strict=True):
        rows, seen = end - begin, last - first
        q, k, v = query[:, :, begin:end], key[:, :, begin:end], value[:, :, begin:end]
        if seen == 0:
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            k, v = torch.cat([key[:, :, first:last], k], dim=2), torch.cat([value[:, :, first:last], v], dim=2)
            visible = torch.ones(rows, seen + rows, dtype=torch.bool).tril(seen)
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
        out.append(attended.transpose(1, 2))
    return torch.cat(out, dim=1)


Attention = Callable[[Tensor, Tensor, Tensor, Case], Tensor]


def spans(query: Tensor, key: Tensor, value: Tensor, case: Case) -> Tensor:
    cu_seqlens, prefix = case.integers
    return span_attention(query, key, value, cu_seqlens, prefix=prefix)


PROVIDERS: dict[str, Attention] = {"patchkern": spans, "sdpa per span": per_span}


def train(attend: Attention, inputs: Sequence[Tensor], case: Case, grad: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(attend(inputs[0], inputs[1], inputs[2], case), inputs, grad)


def check(inputs: Sequence[Tensor], case: Case, grad: Tensor) -> None:
    """Raise unless both providers are as close to float64 as float32 can be expected to be."""
    exact = [x.detach().double().requires_grad_() for x in inputs]
    rows = [x[0].transpose(0, 1) for x in exact]
    wanted = reference(rows[0], rows[1], rows[2], *case.integers, None, None, WIDTH**-0.5)[None]
    grads = torch.autograd.grad(wanted, exact, grad.double())
    for name, attend in PROVIDERS.items():
        got = [attend(inputs[0], inputs[1], inputs[2], case), *train(attend, inputs, case, grad)]
        for mine, true in zip(got, (wanted, *grads), strict=True):
            error = float((mine.detach() - true.detach()).abs().max() / true.detach().abs().max())
            if error > 1e-5:
                raise SystemExit(f"{name}: off by {error:.1e} of the largest value; nothing was timed")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--scale", type=int, default=1, help="divides the prefixes' lengths, for a quick look")
    parser.add_argument("--seconds", type=float, default=3.0, help="spent on each case and mode")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    table = timing.Table("attention")
    for name, case in cases(arguments.scale).items():
        print(f"\n{name}: {len(case.lengths)} spans, {sum(case.lengths)} rows")
        inputs = [torch.randn(1, heads, sum(case.lengths), WIDTH) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
        inputs = [x.requires_grad_() for x in inputs]
        grad = torch.randn(1, sum(case.lengths), HEADS, WIDTH)
        check(inputs, case, grad)
        config = {"case": name, "heads": HEADS, "key_heads": KEY_HEADS, "width": WIDTH, "rows": sum(case.lengths)}
        run_mode(table, "forward", {p: forward_call(a, inputs, case) for p, a in PROVIDERS.items()}, config, arguments)
        calls = {p: train_call(a, inputs, case, grad) for p, a in PROVIDERS.items()}
        run_mode(table, "forward+backward", calls, config, arguments)
    if arguments.scale == 1:
        table.write()


def forward_call(attend: Attention, inputs: Sequence[Tensor], case: Case) -> Callable[[], object]:
    def call() -> Tensor:
        with torch.no_grad():
            return attend(inputs[0], inputs[1], inputs[2], case)

    return call


def train_call(attend: Attention, inputs: Sequence[Tensor], case: Case, grad: Tensor) -> Callable[[], object]:
    return lambda: train(attend, inputs, case, grad)


def run_mode(
    table: timing.Table, mode: str, calls: timing.Calls, config: dict[str, object], arguments: argparse.Namespace
) -> None:
    timed = timing.measure(calls, seconds=arguments.seconds)
    for provider in calls:
        p20, p50, p80 = (1e3 * seconds for seconds in timed.quantiles(provider))
        table.add(provider, mode, "time", "ms", (p20, p50, p80), config)
    table.add("patchkern", mode, "speed-up", "x", timed.ratio("sdpa per span", "patchkern"), config)


if __name__ == "__main__":
    main()
