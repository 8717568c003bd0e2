# SPDX-License-Identifier: Apache-2.0
"""A probe of a model: are the users of a packed batch computed as if each were alone?

Users of a few random rows go through the model. When some change, the others must stay as they are, bit for bit;
packed, each must be what the model's own plain forward makes of it; and a branch must be the sample it stands for.

The model itself is run, as it is (adapters, quantised weights, code of its own), but only as far as the last layer that
is of a new kind: in most models that is the first. Forward hooks are left out, and what a forward may change (random
state, buffers, training mode) is put back.
"""

from __future__ import annotations

import itertools
import re
from collections import OrderedDict
from collections.abc import Iterator, Set
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from patchkern.batch.layout import PatchLayout
from patchkern.models import attention
from patchkern.ops.last_layer import decoder_of
from patchkern.ops.packed import packed_kwargs

# Wrong positions or masks change rows by tenths; rounding changes them, relative to their length, by far less.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}

_STATEFUL = re.compile(r"Mamba|SSM|Rwkv|LSTM|Recurrent|Rglru|Delta|LinearAttention|Lightning|ShortConv")
_EXPERTS = re.compile(r"Expert|MoE|Moe")
_NUMBERING = re.compile(r"(layer|block)_?(idx|id|index|number)|idx|training")


class Refused(Exception):
    """Why users are not kept apart."""


class NotYet(Exception):
    """Why nothing can be said of the model as it is now."""


class _Enough(BaseException):  # no `except Exception` of a model may catch it
    def __init__(self, rows: Tensor) -> None:
        self.rows = rows


class _Layout(NamedTuple):
    """What `packed_kwargs` asks of a layout."""

    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    prefix: Tensor | None
    max_prefix: int
    logit_rows: None = None
    logit_labels: None = None


class _Spans(NamedTuple):
    """The probe's spans, one after the other. One with a prefix goes on after so many rows of the second span."""

    lengths: tuple[int, ...]
    prefixes: tuple[int, ...]

    def kwargs(self, device: torch.device) -> dict[str, Any]:
        """Keyword arguments of the model for the spans, packed."""
        positions = [torch.arange(n, device="cpu") + p for n, p in zip(self.lengths, self.prefixes, strict=True)]
        ends = torch.tensor(self.ends(), dtype=torch.int32, device=device)
        prefix = None
        if any(self.prefixes):
            ranges = [[self.ends()[1], self.ends()[1] + p] if p else [0, 0] for p in self.prefixes]
            prefix = torch.tensor(ranges, dtype=torch.int32, device=device)
        layout = _Layout(torch.cat(positions).to(device), ends, max(self.lengths), prefix, max(self.prefixes))
        return packed_kwargs(cast(PatchLayout, layout))

    def ends(self) -> list[int]:
        return [0, *itertools.accumulate(self.lengths)]

    def samples(self, rows: Tensor) -> Tensor:
        """(S, n, D), each span after its prefix, as a model sees a user alone. What follows it must change nothing."""
        longest = max(map(sum, zip(self.lengths, self.prefixes, strict=True)))
        samples = rows[:longest].repeat(len(self.lengths), 1, 1)
        trunk = self.ends()[1]
        for sample, start, n, p in zip(samples, self.ends(), self.lengths, self.prefixes, strict=False):
            sample[:p] = rows[trunk : trunk + p]
            sample[p : p + n] = rows[start : start + n]
        return samples


_USERS = _Spans((6, 5, 4), (0, 0, 0))
_BRANCHES = _Spans((6, 5, 4, 3, 4), (0, 0, 3, 5, 0))


def probe(hf_model: PreTrainedModel, device: torch.device) -> str | None:
    """Try the model on a few tiny users.

    Returns:
        None where also branches (spans with prefixes) are computed as samples of their own are, else why not.

    Raises:
        Refused: users are not kept apart, with the reason.
        NotYet: the model's weights are not what they will be.
    """
    with _undisturbed(hf_model, device):
        if implementation_of(hf_model) != attention.NAME:
            _try(hf_model, _USERS, device)
            return None  # such layouts are refused by the attention's name
        try:
            _try(hf_model, _BRANCHES, device)
        except Refused as error:
            _try(hf_model, _USERS, device)
            return str(error)
        return None


def _try(hf_model: PreTrainedModel, spans: _Spans, device: torch.device) -> None:
    try:
        _compare(hf_model, spans, device)
    except (Refused, NotYet, torch.OutOfMemoryError):
        raise
    except Exception as error:
        try:  # weights of several dtypes run under autocast only, and so does flash attention on float32
            with torch.autocast(device.type, torch.bfloat16):
                _compare(hf_model, spans, device)
        except (Refused, NotYet, torch.OutOfMemoryError):
            raise
        except Exception:
            text = str(error).strip().partition("\n")[0]
            raise Refused(f"a packed batch fails in it ({type(error).__name__}: {text})") from error


def _compare(hf_model: PreTrainedModel, spans: _Spans, device: torch.device) -> None:
    text_part = _text_part(base_of(hf_model))
    tokens = base_of(hf_model).get_input_embeddings()(torch.arange(8, device=device)[None])[0]
    generator = torch.Generator().manual_seed(0)
    # as long as tokens are, so that positions that are added to them weigh what they do in use
    scale = float(tokens.float().std().nan_to_num()) or 1.0
    shape = (2, sum(spans.lengths), tokens.shape[-1])
    rows, others = (torch.randn(shape, generator=generator, device="cpu") * scale).to(device, tokens.dtype)
    of_span = torch.from_numpy(np.repeat(np.arange(len(spans.lengths)), spans.lengths))
    changes = (of_span == 0) | (of_span == len(spans.lengths) - 1)

    last = set() if is_sharded(hf_model) else _kinds_of_layers(base_of(hf_model))
    kwargs = spans.kwargs(device)
    samples = _run(hf_model, last, spans.samples(rows), use_cache=False)
    packed = _run(hf_model, last, rows[None], **kwargs)[0]
    changed = _run(hf_model, last, torch.where(changes[:, None].to(device), others, rows)[None], **kwargs)[0]
    alone = torch.cat([s[p : p + n] for s, n, p in zip(samples, spans.lengths, spans.prefixes, strict=True)])
    if not bool(packed.isfinite().all() & alone.isfinite().all()):
        raise NotYet("its weights give numbers that are not finite")

    tolerance = _tolerance(hf_model, device, packed.dtype)
    stateful = _stateful(text_part)
    because = "" if stateful is None else f" ({stateful} carries rows of one user into the next)"
    # how many rows an expert computes at a time depends on the other users, and so does its rounding
    may_round = stateful is None and any(_EXPERTS.search(type(module).__name__) for module in text_part.modules())
    moved = float(_distance(changed, packed)[~changes].max())
    if moved > (tolerance if may_round else 0.0):
        raise Refused(f"other users' rows change a user's, by up to {moved:.1e} of their length{because}")
    apart = _distance(packed, alone)
    if float(apart.max()) > tolerance:
        is_branch = spans.prefixes[int(of_span[int(apart.argmax())])] > 0
        what = "a branch differs from its sample" if is_branch else "a user differs from the same user alone"
        raise Refused(f"{what}, by up to {float(apart.max()):.1e} of its rows' length{because}")


def _distance(rows: Tensor, others: Tensor) -> Tensor:
    """(n,) how far each row is from the other, relative to the other's length."""
    difference, others = (x.flatten(1).to(torch.promote_types(x.dtype, torch.float32)) for x in (rows - others, others))
    return difference.norm(dim=1) / others.norm(dim=1).clamp_min(torch.finfo(others.dtype).tiny)


def _tolerance(hf_model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> float:
    dtypes = [dtype, hf_model.dtype]
    if torch.is_autocast_enabled(device.type):
        dtypes.append(torch.get_autocast_dtype(device.type))
    if getattr(base_of(hf_model), "is_quantized", False):
        dtypes.append(torch.bfloat16)
    if implementation_of(hf_model) == "eager":
        dtypes.append(torch.float32)  # of its softmax in transformers, also in float64
    if device.type != "cpu" and torch.float32 in dtypes:
        dtypes.append(torch.float16)  # TensorFloat-32 rounds as coarsely
    return max(_TOLERANCE.get(dtype, _TOLERANCE[torch.bfloat16]) for dtype in dtypes)


def _run(hf_model: PreTrainedModel, last: Set[nn.Module], rows: Tensor, **kwargs: Any) -> Tensor:
    """(B, n, ...) on the CPU, what the model makes of (B, n, D): hidden states once ``last`` have run, else logits."""
    waiting = set(last)

    def stop(layer: nn.Module, inputs: Any, output: Any) -> None:
        waiting.discard(layer)
        hidden = output[0] if isinstance(output, tuple) else output
        if not waiting and isinstance(hidden, Tensor) and hidden.shape[:2] == rows.shape[:2]:
            raise _Enough(hidden)

    with ExitStack() as hooks:
        for layer in last:
            hooks.callback(layer.register_forward_hook(stop).remove)
        try:
            logits: Tensor = hf_model(inputs_embeds=rows.clone(), **kwargs).logits
        except _Enough as enough:
            return enough.rows.cpu()
    return logits.cpu()


def _kinds_of_layers(base: PreTrainedModel) -> set[nn.Module]:
    """The first layer of each kind: of the same modules with the same settings, and the same entry in the config."""
    stacks = list(_stacks(_text_part(base)))
    if len(stacks) != 1:
        return set()
    layers = list(stacks[0])
    config = [
        value
        for value in vars(base.config.get_text_config()).values()
        if isinstance(value, (list, tuple)) and len(value) == len(layers)
    ]
    first: dict[Any, nn.Module] = {}
    for index, layer in enumerate(layers):
        entries = tuple(value[index] for value in config if isinstance(value[index], (bool, int, str)))
        modules = tuple((name, type(module), _settings(module)) for name, module in layer.named_modules())
        first.setdefault((entries, modules), layer)
    return set(first.values())


def _stacks(module: nn.Module) -> Iterator[nn.ModuleList]:
    """The outermost lists of modules."""
    for child in module.children():
        if isinstance(child, nn.ModuleList) and len(child):
            yield child
        else:
            yield from _stacks(child)


def _settings(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    replaced = vars(module).get("forward")  # by whoever patches or wraps single modules
    settings = [
        (name, value)
        for name, value in vars(module).items()
        if isinstance(value, (bool, int, str, type(None))) and name[0] != "_" and not _NUMBERING.fullmatch(name)
    ]
    return (*settings, ("forward", getattr(replaced, "__qualname__", type(replaced).__name__)))


@contextmanager
def _undisturbed(hf_model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode without gradients, compilation and forward hooks; afterwards all is as it was.

    Sharded parameters are gathered by hooks, which then stay.
    """
    sharded = is_sharded(hf_model)
    modules = list(hf_model.modules())
    state = [(module, dict(vars(module)), dict(module._buffers)) for module in modules]
    small = [(b, b._version, b.clone()) for b in hf_model.buffers() if b.numel() <= 4096 and not b.is_inference()]
    own: dict[str, Any] = {"devices": []} if device.type == "cpu" else {"devices": [device], "device_type": device.type}
    with torch.random.fork_rng(**own):  # the CPU's generator is always forked
        try:
            for module in modules:
                module.training = False
                if not sharded:
                    module._forward_hooks = OrderedDict()
                    module._forward_pre_hooks = OrderedDict()
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                yield
        finally:
            for module, attributes, buffers in state:
                for name in [] if sharded else vars(module).keys() - attributes.keys():
                    del vars(module)[name]
                vars(module).update({k: v for k, v in attributes.items() if not sharded or k == "training"})
                module._buffers.clear()
                module._buffers.update(buffers)
            with torch.no_grad():
                for buffer, version, value in small:
                    if buffer._version != version:
                        buffer.copy_(value)


# ------------------------------------------------------------------ what a model is


def base_of(hf_model: Any) -> PreTrainedModel:
    base: PreTrainedModel = hf_model.get_base_model() if hasattr(hf_model, "get_base_model") else hf_model
    return base


def implementation_of(hf_model: Any) -> str:
    return str(base_of(hf_model).config.get_text_config()._attn_implementation)


def is_sharded(hf_model: nn.Module) -> bool:
    if any(isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in hf_model.parameters()):
        return True
    return any(type(module).__name__ == "FullyShardedDataParallel" for module in hf_model.modules())


def _stateful(model: nn.Module) -> str | None:
    """The class of a module that carries something from row to row other than by attention."""
    modules = [module for module in model.modules() if not isinstance(module, PreTrainedModel)]
    convolving = (m for m in modules if any(isinstance(child, nn.Conv1d) for child in m.children()))
    named = (m for m in modules if _STATEFUL.search(type(m).__name__))
    return next((type(module).__name__ for module in itertools.chain(convolving, named)), None)


def _text_part(base: PreTrainedModel) -> nn.Module:
    """The model without its head, and without the towers of other modalities."""
    return decoder_of(base) if hasattr(base, "get_decoder") else base
