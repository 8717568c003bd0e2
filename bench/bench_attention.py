# SPDX-License-Identifier: Apache-2.0
"""Span attention over shared prefixes against what PyTorch has for it.

    python bench/bench_attention.py
    python bench/bench_attention.py --device cuda --dtype bfloat16 --heads 32 8     # Llama-3.2-1B's

One layer, forward alone and with the gradients of all three inputs. "sdpa per span" joins each span's prefix and own
rows and masks their future, which is what a padded batch or a loop over hypotheses does, at its best: without padding.
"flex" is a compiled `flex_attention` over a block mask of spans and prefixes; every batch needs a mask of its own, once
for all layers, which is timed apart. All are compared with the masked reference in float64 first: one that is off or
does not run is not timed, and the script fails in the end. On the CPU PyTorch has no backward pass for flex.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

sys.path.append(str(Path(__file__).resolve().parents[1]))  # an installed patchkern comes first

from bench import output, timing
from patchkern.ops.span_attention import span_attention
from patchkern.ops.span_attention_prefixed import reference

HEADS, KEY_HEADS, WIDTH = 8, 4, 64


class Case(NamedTuple):
    """Spans as lengths and prefix ranges of the batch's own rows."""

    lengths: list[int]
    prefix: list[tuple[int, int]]

    def integers(self, device: torch.device) -> tuple[Tensor, Tensor]:
        cu_seqlens = torch.tensor([0, *itertools.accumulate(self.lengths)], dtype=torch.int32)
        return cu_seqlens.to(device), torch.tensor(self.prefix, dtype=torch.int32).to(device)


def cases(scale: int) -> dict[str, Case]:
    """A search's hypotheses, a history's targets, and a long prompt's next chunk; ``scale`` 1 is the usual size."""
    rows, branch = 1000 // scale, -(-40 // scale)
    branches = [(0, rows * (n + 1) // 50) for n in range(50)]
    return {
        "20 hypotheses of 3 rows": Case([rows] + [3] * 20, [(0, 0)] + [(0, rows)] * 20),
        "50 branches of 40 rows": Case([rows] + [branch] * 50, [(0, 0), *branches]),
        "next chunk of a prompt": Case([2 * rows, rows // 2], [(0, 0), (0, 2 * rows)]),
    }


class Inputs(NamedTuple):
    """Of one layer, and what a model would make of the case once for all layers."""

    query: Tensor
    key: Tensor
    value: Tensor
    case: Case
    cu_seqlens: Tensor
    prefix: Tensor
    mask: BlockMask | None

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value


def make_inputs(
    case: Case, device: torch.device, dtype: torch.dtype, flex: bool, heads: tuple[int, int] = (HEADS, KEY_HEADS)
) -> Inputs:
    rows = sum(case.lengths)
    query, key, value = (
        torch.randn(1, count, rows, WIDTH, device=device, dtype=dtype, requires_grad=True)
        for count in (heads[0], heads[1], heads[1])
    )
    cu_seqlens, prefix = case.integers(device)
    mask = block_mask(cu_seqlens, prefix, rows) if flex else None
    return Inputs(query, key, value, case, cu_seqlens, prefix, mask)


def block_mask(cu_seqlens: Tensor, prefix: Tensor, rows: int) -> BlockMask:
    lengths = cu_seqlens.diff()
    span = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths, output_size=rows)
    first, last = (bound[span] for bound in prefix.unbind(1))

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = (span[query] == span[key]) & (key <= query)
        return own | ((key >= first[query]) & (key < last[query]))

    return create_block_mask(visible, None, None, rows, rows, device=span.device.type)


def spans(inputs: Inputs) -> Tensor:
    """(1, T, H, d), as all providers give it."""
    return span_attention(*inputs.tensors, inputs.cu_seqlens, prefix=inputs.prefix)


def per_span(inputs: Inputs) -> Tensor:
    """Keys and values of a prefix are joined to every span that sees them."""
    query, key, value = inputs.tensors
    bounds = itertools.pairwise(itertools.accumulate(inputs.case.lengths, initial=0))
    out = []
    for (begin, end), (first, last) in zip(bounds, inputs.case.prefix, strict=True):
        rows, seen = end - begin, last - first
        q, k, v = query[:, :, begin:end], key[:, :, begin:end], value[:, :, begin:end]
        if seen == 0:
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            k, v = torch.cat([key[:, :, first:last], k], dim=2), torch.cat([value[:, :, first:last], v], dim=2)
            if q.is_cuda:  # no kernel there takes both a mask and groups of heads
                k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
            visible = torch.ones(rows, seen + rows, dtype=torch.bool, device=q.device).tril(seen)
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
        out.append(attended.transpose(1, 2))
    return torch.cat(out, dim=1)


@functools.cache
def compiled_flex() -> Any:
    return torch.compile(flex_attention, dynamic=False)


def flex(inputs: Inputs) -> Tensor:
    out: Tensor = compiled_flex()(*inputs.tensors, block_mask=inputs.mask, enable_gqa=True)
    return out.transpose(1, 2)


Attention = Callable[[Inputs], Tensor]
PROVIDERS: dict[str, Attention] = {"patchkern": spans, "sdpa per span": per_span, "flex": flex}
# of the largest value; in bfloat16 some eight roundings, in float32 many small ones add up
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def infer(attend: Attention, inputs: Inputs) -> Tensor:
    return attend(inputs._replace(query=inputs.query.detach(), key=inputs.key.detach(), value=inputs.value.detach()))


def train(attend: Attention, inputs: Inputs, grad: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(attend(inputs), inputs.tensors, grad)


def learns(provider: str, device: torch.device) -> bool:
    return provider != "flex" or device.type != "cpu"


def check(providers: Sequence[str], inputs: Inputs, grad: Tensor) -> dict[str, str]:
    """Those that are not as close to float64 as their dtype can be expected to be, or do not run, and why."""
    exact = [x.detach().double().requires_grad_() for x in inputs.tensors]
    rows = [x[0].transpose(0, 1) for x in exact]
    ranges = inputs.prefix[:, None]
    wanted = reference(rows[0], rows[1], rows[2], inputs.cu_seqlens, ranges, None, None, WIDTH**-0.5)[None]
    grads = torch.autograd.grad(wanted, exact, grad.double())
    failures = {}
    for name in providers:
        try:
            got = [infer(PROVIDERS[name], inputs)]
            if learns(name, grad.device):
                got += train(PROVIDERS[name], inputs, grad)
        except Exception as exception:  # one provider that cannot run must not cost the others their numbers
            failures[name] = f"{type(exception).__name__}: {exception}".partition("\n")[0]
            continue
        errors = [
            float((mine.detach() - true.detach()).abs().max() / true.detach().abs().max())
            for mine, true in zip(got, (wanted, *grads), strict=False)
        ]
        if not all(error <= TOLERANCE[grad.dtype] for error in errors):
            failures[name] = f"off by {max(errors):.1e} of the largest value"
    return failures


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    parser.add_argument("--cases", nargs="+", choices=cases(1), default=list(cases(1)))
    parser.add_argument("--heads", type=int, nargs=2, default=[HEADS, KEY_HEADS], help="of queries and of keys")
    parser.add_argument("--scale", type=int, default=1, help="divides lengths, for a quick look")
    parser.add_argument("--seconds", type=float, default=3.0, help="spent on each case and mode")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    output.add_option(parser, "attention.csv")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    heads: tuple[int, int] = tuple(arguments.heads)
    measure = timing.measure if device.type == "cpu" else functools.partial(timing.measure_cuda, device=device)
    table = timing.Table(output.prepare(arguments.output, "attention.csv"))
    failures: list[str] = []
    every = cases(arguments.scale)
    for name in arguments.cases:
        case, rows = every[name], sum(every[name].lengths)
        print(f"\n{name}: {len(case.lengths)} spans, {rows} rows")
        inputs = make_inputs(case, device, dtype, "flex" in arguments.providers, heads)
        grad = torch.randn(1, rows, heads[0], WIDTH, device=device, dtype=dtype)
        wrong = check(arguments.providers, inputs, grad)
        failures += [f"{name}, {provider}: {reason}" for provider, reason in wrong.items()]
        providers = [provider for provider in arguments.providers if provider not in wrong]
        config = {"case": name, "heads": heads[0], "key_heads": heads[1], "width": WIDTH, "rows": rows}
        config |= {"dtype": arguments.dtype, "device": device.type}
        modes: dict[str, dict[str, Callable[[], object]]] = {
            "forward": {p: functools.partial(infer, PROVIDERS[p], inputs) for p in providers},
            "forward+backward": {
                p: functools.partial(train, PROVIDERS[p], inputs, grad) for p in providers if learns(p, device)
            },
        }
        if inputs.mask is not None:
            modes["mask"] = {"flex": functools.partial(block_mask, inputs.cu_seqlens, inputs.prefix, rows)}
        for mode, calls in modes.items():
            if not calls:
                continue
            timed = measure(calls, seconds=arguments.seconds)
            for provider in calls:
                p20, p50, p80 = (1e3 * seconds for seconds in timed.quantiles(provider))
                table.add(provider, mode, "time", "ms", (p20, p50, p80), config)
            for other in [name for name in calls if name != "patchkern" and "patchkern" in calls]:
                table.add("patchkern", mode, f"speed-up over {other}", "x", timed.ratio(other, "patchkern"), config)
        table.write()
    if failures:
        sys.exit("\n".join(["wrong or not run:", *failures]))


if __name__ == "__main__":
    main()
