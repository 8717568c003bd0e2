# SPDX-License-Identifier: Apache-2.0
"""How to train within a budget of memory: the rows that are computed at once, and what else must change.

`patchkern.budget.training_cost` has the formula.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig

from patchkern.batch.arguments import check_count, check_number
from patchkern.budget.counted_memory import MemoryRows
from patchkern.budget.counted_pass import check_weights_dtype, place_of
from patchkern.budget.search import parse_bytes
from patchkern.budget.search_plan import in_units
from patchkern.budget.step import Lora, PassShape
from patchkern.budget.training_cost import OPTIMIZERS, Choice, TrainingBytes, TrainingCost
from patchkern.ops.checks import check_flag


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
    head: str = "titles",
    n_items: int | None = None,
    logit_rows: int | None = None,
    item_rows: int | None = None,
    memory: MemoryRows | None = None,
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
        model: a `PatchedCausalLM`, an `ItemModel` or a `RecurrentMemory`; or a transformers causal LM, with adapters or
            without, or its configuration.
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
        memory: of ``rows_per_pass``, both stages together, how many are of which kind where a `RecurrentMemory` is
            trained (`MemoryRows.of` says it of a pass); fewer in proportion where fewer rows fit.
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
    for name, flag in (
        ("checkpointing", checkpointing),
        ("accumulates", accumulates),
        ("prefixes", prefixes),
        ("sharded", sharded),
    ):
        check_flag(name, flag)
    check_number("label_smoothing", label_smoothing, minimum=0, below=1)
    check_weights_dtype(dtype)
    place = place_of(model, device)
    logit_rows = _labelled("logit_rows", logit_rows, rows_per_pass, head != "items")
    item_rows = _labelled("item_rows", item_rows, rows_per_pass, head != "titles")
    _check_memory(model, memory, rows_per_pass)
    n_items = _items_of(model, n_items, head)
    longest = rows_per_pass if longest is None else longest
    check_count("longest", longest, minimum=1)
    inner = getattr(model, "hf_model", model)
    if lora is not None and hasattr(inner, "peft_config"):
        raise ValueError(f"lora: expected None, as the model has adapters, got {lora!r}")
    if lora is not None and not isinstance(lora, Lora):
        check_count("lora", lora, minimum=1)
        lora = Lora(lora)
    cost = TrainingCost(
        model,
        PassShape(rows_per_pass, logit_rows, item_rows, longest, memory),
        dtype=dtype,
        autocast=autocast,
        accumulates=accumulates,
        smoothing=label_smoothing > 0,
        n_items=n_items,
        prefixes=prefixes,
        world_size=world_size,
        sharded=sharded,
        on_cuda=place.type == "cuda",
    )
    asked = Choice(checkpointing, optimizer, lora)

    tried: list[tuple[Choice, int]] = []
    least = min(least_rows, rows_per_pass)
    for choice in _choices(asked, inner):
        rows = rows_per_pass
        if budget is not None:
            rows = cost.most_rows(choice, budget, least, rows_per_pass)
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
    needed = cost.needed(rows, choice)  # first: what a row keeps is known from it
    kept, recomputed = (cost.row_bytes(choice._replace(checkpointing=on)) for on in (False, True))
    return TrainingPlan(rows, choice, needed, budget, kept, recomputed, tuple(tried), (rows_per_pass, asked))


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


def _check_memory(model: Any, memory: MemoryRows | None, rows: int) -> None:
    if memory is None:
        if hasattr(model, "planner_of"):
            raise ValueError(
                "memory: expected the rows of each kind in a pass of a RecurrentMemory (MemoryRows.of), got None"
            )
        return
    if not isinstance(memory, MemoryRows):
        raise TypeError(f"memory: expected MemoryRows or None, got {type(memory).__name__}")
    for name, count in memory._asdict().items():
        check_count(f"memory.{name}", count, minimum=0)
    if memory.reference >= rows:
        raise ValueError(f"memory: expected fewer reference rows than rows_per_pass, {rows}, got {memory.reference}")


def _items_of(model: Any, given: int | None, head: str) -> int | None:
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
    # peft adapts what generates text, which a model of item ids does not
    takes_lora = isinstance(hf_model, PretrainedConfig) or hasattr(hf_model, "prepare_inputs_for_generation")
    if asked.lora is None and takes_lora and not hasattr(hf_model, "peft_config"):
        choices.append(asked._replace(checkpointing=True, lora=Lora()))
    return list(dict.fromkeys(choices))
