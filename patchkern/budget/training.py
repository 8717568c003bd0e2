# SPDX-License-Identifier: Apache-2.0
"""How much memory a training step needs, and how many rows at once fit into a budget.

The peak of a step that computes T rows, K of them with logits::

    peak = weights + optimizer + gathered + workspace + max(pass, gradients + temporaries)

- ``weights``, ``gradients``, ``optimizer``: of the parameters; adapters alone have the latter two under LoRA.
- ``pass``: activations, what attention keeps, logits, and the gradients that are there by then, at the worst moment of
  the forward and the backward pass. It is counted, in a pass of the very model at the very T and K, on fake tensors
  (`patchkern.budget.counted_step`): autocast's copies of the weights, recomputed layers, dropout's masks and adapters
  are in it as they are, for every architecture.
- ``gathered``: layers and gradients on their way between processes.
- ``workspace``: of cuBLAS, on CUDA.
- ``temporaries``: of the optimiser's own step.

All of it is what `torch` allocates (``torch.cuda.max_memory_allocated``). What a CUDA context takes, about half a
gibibyte, and what the allocator loses to fragmentation come on top: plan with nine tenths of a card.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from transformers import PretrainedConfig

from patchkern.batch.histories import check_count
from patchkern.budget.counted_items import Chunks
from patchkern.budget.counted_step import FakeModel, Lora, PassShape, StepBytes, StepKind
from patchkern.budget.search import in_units, parse_bytes

_CUBLAS_WORKSPACE = 64 << 20  # of cuBLAS and of cuBLASLt on Hopper, from the memory that PyTorch counts; less before
_MARGIN = 1.01  # of a pass, for what its operators take while they run
_EIGHT_BIT_BLOCK = 256  # numbers that share a factor of four bytes
_EIGHT_BIT_LEAST = 4096  # numbers of a parameter, below which its state stays in float32
_ROUND = 64  # rows per pass are planned in steps of so many

Head = Literal["titles", "items", "both"]

OPTIMIZERS = {
    "adamw": "fused",
    "adamw_torch_fused": "fused",
    "adamw_torch": "unfused",
    "adamw_8bit": "8bit",
    "adamw_bnb_8bit": "8bit",
    "sgd": "none",
}
"""Names that `plan_training` takes, those of `transformers.TrainingArguments.optim` among them."""


@dataclass(frozen=True)
class TrainingBytes:
    """Predicted bytes at the worst moment of a step, see this module."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    attention: int
    logits: int
    gathered: int
    workspace: int

    @property
    def peak(self) -> int:
        """The most that is allocated at once."""
        return sum(vars(self).values())


class Choice(NamedTuple):
    """How to train."""

    checkpointing: bool
    optimizer: str
    lora: Lora | None

    def __str__(self) -> str:
        adapted = "all parameters" if self.lora is None else f"LoRA of rank {self.lora.rank}"
        recomputed = ", activation checkpointing" if self.checkpointing else ""
        return f"{adapted}, {self.optimizer}{recomputed}"


@dataclass(frozen=True)
class TrainingPlan:
    """A step of training, and how to stay within a budget.

    Attributes:
        rows_per_pass: rows to compute at once: as many as were asked for, or as fit.
        choice: with which they fit: as asked, or with what had to change.
        needed: predicted bytes of such a pass.
        budget: bytes; None: no limit.
        row_bytes: of activations and attention that a row keeps from the forward to the backward pass, without
            activation checkpointing.
        row_bytes_checkpointed: the same with it.
        tried: rows per pass that fit with each choice that was tried, in this order; the last is the plan's.
        asked: rows and choice as asked.
    """

    rows_per_pass: int
    choice: Choice
    needed: TrainingBytes
    budget: int | None
    row_bytes: int
    row_bytes_checkpointed: int
    tried: tuple[tuple[Choice, int], ...]
    asked: tuple[int, Choice]

    @property
    def peak(self) -> int:
        """The most that is allocated at once, in bytes."""
        return self.needed.peak

    @property
    def flags(self) -> tuple[str, ...]:
        """What recipes/train.py must be told beyond what was asked, such as ``--rows_per_pass 4096``; none: nothing."""
        rows, asked = self.asked
        flags = [] if rows == self.rows_per_pass else [f"--rows_per_pass {self.rows_per_pass}"]
        if self.choice.checkpointing != asked.checkpointing:
            flags.append("--activation_checkpointing")
        if self.choice.optimizer != asked.optimizer:
            flags.append(f"--optim {self.choice.optimizer}")
        if self.choice.lora is not None and self.choice.lora != asked.lora:
            flags.append(f"--lora {self.choice.lora.rank}")
        return tuple(flags)

    def __str__(self) -> str:
        limit = "" if self.budget is None else f" of {in_units(self.budget)}"
        lines = [f"{self.rows_per_pass:,} rows per pass, {self.choice}: peak {in_units(self.peak)}{limit}"]
        lines += [f"  {name:<12}{in_units(count):>12}" for name, count in vars(self.needed).items() if count]
        lines.append(
            f"  a row keeps {in_units(self.row_bytes)}, {in_units(self.row_bytes_checkpointed)} with checkpointing"
        )
        if len(self.tried) > 1:
            lines += [f"  {rows:>9,} rows fit with {choice}" for choice, rows in self.tried]
        if self.flags:
            lines.append(f"  to fit: {' '.join(self.flags)}")
        return "\n".join(lines)


class TrainingTooLarge(ValueError):
    """No way of training fits into the budget.

    Attributes:
        needed: bytes for the fewest rows.
    """

    def __init__(self, message: str, needed: int) -> None:
        super().__init__(message)
        self.needed = needed


class TrainingCost:
    """The formula of this module, for one model and ``shape``; other arguments as of `plan_training`."""

    def __init__(
        self,
        model: Any,
        shape: PassShape,
        *,
        dtype: torch.dtype | None = None,
        autocast: torch.dtype | None = None,
        accumulates: bool = False,
        smoothing: bool = False,
        n_items: int | None = None,
        prefixes: bool = True,
        world_size: int = 1,
        sharded: bool = False,
        on_cuda: bool = False,
    ) -> None:
        self._fake = lru_cache(maxsize=None)(lambda lora: FakeModel(model, dtype, lora, n_items))
        self._shape, self._world_size = shape, world_size
        self._kind = StepKind(
            autocast,
            accumulates=accumulates,
            sharded=sharded,
            smoothing=smoothing,
            on_cuda=on_cuda,
            prefixes=prefixes,
            chunks=Chunks.of(shape.item_rows, n_items, on_cuda) if shape.item_rows and n_items else None,
        )
        self._counted = lru_cache(maxsize=None)(self._count)

    def needed(self, rows: int, choice: Choice) -> TrainingBytes:
        """Of a step of so many rows, logits and the longest prefix in proportion."""
        held = self._counted(choice.checkpointing, choice.lora).peak(rows)
        fake = self._fake(choice.lora)
        trainable = [parameter for parameter in fake.parameters() if parameter.requires_grad]
        gradients = sum(parameter.nbytes for parameter in trainable)
        state = self._state(fake, choice.optimizer)
        weights, gathered = fake.weights, 0
        if self._kind.sharded:
            gathered = self._gathered(fake)
            weights, state, gradients = (-(-x // self._world_size) for x in (weights, state, gradients))
            held = held._replace(gradients=gradients)
        elif self._world_size > 1:
            gathered = gradients
        workspace = _CUBLAS_WORKSPACE if self._kind.on_cuda else 0
        margin = math.ceil((held.total - held.gradients) * (_MARGIN - 1))
        in_pass = TrainingBytes(weights, held.gradients, state, *held[1:], gathered, workspace + margin)
        temporaries = self._temporaries(trainable, choice.optimizer)
        in_step = TrainingBytes(weights, gradients, state, 0, 0, 0, gathered, workspace + temporaries)
        return max(in_pass, in_step, key=lambda needed: needed.peak)

    def row_bytes(self, choice: Choice) -> int:
        """What a row keeps from the forward to the backward pass."""
        return self._counted(choice.checkpointing, choice.lora).kept_per_row

    def _count(self, checkpointing: bool, lora: Lora | None) -> StepBytes:
        fake: FakeModel = self._fake(lora)
        return fake.count_step(self._shape, replace(self._kind, checkpointing=checkpointing))

    def _state(self, fake: FakeModel, optimizer: str) -> int:
        kind = OPTIMIZERS[optimizer]
        if kind == "none":
            return 0
        trainable = [parameter for parameter in fake.parameters() if parameter.requires_grad]
        if kind != "8bit":
            return sum(2 * parameter.nbytes + 4 for parameter in trainable)
        embeddings = {
            id(parameter)
            for module in fake.hf_model.modules()
            if isinstance(module, nn.Embedding)
            for parameter in module.parameters()
        }  # whose state the Trainer keeps in float32
        total = 0
        for parameter in trainable:
            count = parameter.numel()
            if count < _EIGHT_BIT_LEAST or id(parameter) in embeddings:
                total += 8 * count
            else:
                total += 2 * (count + 4 * -(-count // _EIGHT_BIT_BLOCK))
        return total

    def _temporaries(self, trainable: list[nn.Parameter], optimizer: str) -> int:
        """Of an unfused step, a denominator for every parameter: one at a time on a CPU, all at once on CUDA."""
        if OPTIMIZERS[optimizer] != "unfused" or not trainable:
            return 0
        sizes = [parameter.nbytes for parameter in trainable]
        return sum(sizes) if self._kind.on_cuda else 2 * max(sizes)

    def _gathered(self, fake: FakeModel) -> int:
        """Everything outside the layers and two of those, once more while they are copied out, and their gradients."""
        layers = next((m for m in fake.hf_model.modules() if isinstance(m, nn.ModuleList) and len(m)), None)
        sizes = [sum(p.nbytes for p in layer.parameters()) for layer in layers or []]
        largest, root = max(sizes, default=0), fake.weights - sum(sizes)
        trainable = sum(p.nbytes for p in fake.parameters() if p.requires_grad) / max(fake.weights, 1)
        return math.ceil(2 * root + 3 * largest + trainable * (root + 2 * largest))


def plan_training(
    model: Any,
    rows_per_pass: int = 16384,
    budget: int | str | None = None,
    *,
    optimizer: str = "adamw",
    dtype: torch.dtype | None = None,
    autocast: torch.dtype | None = None,
    lora: int | Lora | None = None,
    checkpointing: bool = False,
    accumulates: bool = False,
    label_smoothing: float = 0.0,
    head: Head = "titles",
    n_items: int | None = None,
    logit_rows: int | None = None,
    item_rows: int | None = None,
    prefixes: bool = True,
    longest: int | None = None,
    world_size: int = 1,
    sharded: bool = False,
    least_rows: int = 2048,
    device: torch.device | str | None = None,
) -> TrainingPlan:
    """Predict the memory of a training step and, given a budget, choose the rows per pass that fit.

    Within a budget these are tried in turn: as asked; with activation checkpointing; with an 8-bit optimiser; with
    LoRA. The first with which ``least_rows`` fit is the plan, with as many rows as fit, at most ``rows_per_pass``.
    `TrainingPlan.flags` says what changed. A plan takes seconds, and no memory to speak of.

    Args:
        model: a `PatchedCausalLM`; or a transformers causal LM, with adapters or without, or its configuration.
        rows_per_pass: rows that are computed at once, as of `training.PatchTrainer`.
        budget: bytes, or a text such as "40GiB", for everything that torch allocates. None: no limit.
        optimizer: one of `OPTIMIZERS`, which has the names of ``TrainingArguments.optim``.
        dtype: of the weights; the model's own where not given.
        autocast: torch.bfloat16 or torch.float16 where matrix products are computed in it.
        lora: train adapters of this rank, in all linear layers, or of a `Lora`. Not for a model that has some.
        checkpointing: recompute activations in the backward pass.
        accumulates: a step consists of several passes, so that gradients are there when one begins.
        label_smoothing: of the loss.
        head: what is learned: "titles", "items" or "both". A model with an item head has it in any case.
        n_items: of the item head; the model's catalogue where not given.
        logit_rows: of ``rows_per_pass``, those with logits: response tokens, and the history's text where it is
            supervised too. Fewer in proportion where fewer rows fit. All where not given, none for items alone.
        item_rows: of ``rows_per_pass``, those that predict an item. All where not given, none for titles alone.
        prefixes: whether users' targets are branches of one pass over the history, as in `build_training_layout`.
        longest: rows of the longest user; a whole pass where not given. Matters on CPUs only.
        world_size: processes; with ``sharded`` they share weights, gradients and optimiser as FSDP2 does, else each has
            all of it, as in data parallelism.
        sharded: see there.
        least_rows: fewer rows a pass are too slow: rather change more.
        device: where the training runs; the model's, or the CPU for a configuration, where not given.

    Raises:
        TrainingTooLarge: not even ``least_rows`` (or ``rows_per_pass``, if that is less) fit with any choice.
        TypeError, ValueError: naming the argument.

    Examples:
        A model in the shape of Llama-3.2-1B, all parameters in float32 under bfloat16 autocast, on a card of 40 GB.

        >>> import torch
        >>> import patchkern as pk
        >>> from transformers import LlamaConfig
        >>> shape = dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32)
        >>> config = LlamaConfig(**shape, num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=True)
        >>> plan = pk.plan_training(config, 16384, "36GB", autocast=torch.bfloat16, logit_rows=4096, device="cuda")
        >>> plan.choice.checkpointing, plan.flags  # doctest: +ELLIPSIS
        (False, ('--rows_per_pass ...',))
    """
    budget = None if budget is None else parse_bytes("budget", budget)
    for name, value in (("rows_per_pass", rows_per_pass), ("world_size", world_size), ("least_rows", least_rows)):
        check_count(name, value, minimum=1)
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer: expected one of {', '.join(OPTIMIZERS)}, got {optimizer!r}")
    if autocast not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"autocast: expected torch.bfloat16, torch.float16 or None, got {autocast}")
    if head not in ("titles", "items", "both"):
        raise ValueError(f"head: expected 'titles', 'items' or 'both', got {head!r}")
    logit_rows = _labelled("logit_rows", logit_rows, rows_per_pass, head != "items")
    item_rows = _labelled("item_rows", item_rows, rows_per_pass, head != "titles")
    n_items = _items_of(model, n_items, head)
    longest = rows_per_pass if longest is None else longest
    inner = getattr(model, "hf_model", model)
    if lora is not None and hasattr(inner, "peft_config"):
        raise ValueError(f"lora: expected None, as the model has adapters, got {lora!r}")
    lora = Lora(lora) if isinstance(lora, int) else lora
    place = device or ("cpu" if isinstance(inner, PretrainedConfig) else inner.device)
    cost = TrainingCost(
        model,
        PassShape(rows_per_pass, logit_rows, item_rows, longest),
        dtype=dtype,
        autocast=autocast,
        accumulates=accumulates,
        smoothing=label_smoothing > 0,
        n_items=n_items,
        prefixes=prefixes,
        world_size=world_size,
        sharded=sharded,
        on_cuda=torch.device(place).type == "cuda",
    )
    asked = Choice(checkpointing, optimizer, lora)

    tried: list[tuple[Choice, int]] = []
    least = min(least_rows, rows_per_pass)
    for choice in _choices(asked, inner):
        rows = rows_per_pass
        if budget is not None:
            rows = _most_rows(partial(cost.needed, choice=choice), least, rows_per_pass, budget)
        tried.append((choice, rows))
        if rows:
            break
    else:
        least_needed = min(cost.needed(least, choice).peak for choice, _ in tried)
        raise TrainingTooLarge(
            f"budget: expected at least {least_needed} bytes for {least} rows per pass, whatever is chosen, got "
            f"{budget}",
            least_needed,
        )
    kept, recomputed = (cost.row_bytes(choice._replace(checkpointing=on)) for on in (False, True))
    asked_for = (rows_per_pass, asked)
    return TrainingPlan(rows, choice, cost.needed(rows, choice), budget, kept, recomputed, tuple(tried), asked_for)


def _labelled(name: str, given: int | None, rows: int, wanted: bool) -> int:
    if not wanted:
        if given:
            raise ValueError(f"{name}: expected None with this head, got {given}")
        return 0
    if given is None:
        return rows
    check_count(name, given, minimum=1)
    if given > rows:
        raise ValueError(f"{name}: expected at most rows_per_pass, {rows}, got {given}")
    return given


def _items_of(model: Any, given: int | None, head: Head) -> int | None:
    """Of the item head that there is, or is to be."""
    has_head = getattr(model, "item_head", None) is not None
    if head == "titles" and not has_head:
        return None
    if given is None and hasattr(model, "catalog"):
        return len(model.catalog)
    if given is None:
        raise ValueError(f"n_items: expected the items of the catalogue with head={head!r}, got None")
    check_count("n_items", given, minimum=1)
    return given


def _choices(asked: Choice, hf_model: Any) -> list[Choice]:
    choices = [asked, asked._replace(checkpointing=True)]
    if OPTIMIZERS[asked.optimizer] in ("fused", "unfused"):
        choices.append(choices[-1]._replace(optimizer="adamw_bnb_8bit"))
    if asked.lora is None and not hasattr(hf_model, "peft_config"):
        choices.append(asked._replace(checkpointing=True, lora=Lora()))
    return list(dict.fromkeys(choices))


def _most_rows(needed: Callable[[int], TrainingBytes], least: int, most: int, budget: int) -> int:
    """The most rows that fit, in steps of `_ROUND` from the fewest; 0 where those do not."""
    candidates = [*range(least, most, _ROUND), most]
    count = bisect_right(candidates, budget, key=lambda rows: needed(rows).peak)
    return candidates[count - 1] if count else 0
