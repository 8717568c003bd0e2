# SPDX-License-Identifier: Apache-2.0
"""A training step of a model followed on fake tensors, and what it holds counted: no memory, and about a second.

The step is the model's own: its forward pass under autocast, its loss, and what autograd makes of them, recomputation
included. Two things are stood in for: rows are not pooled but made, and the gradient of the embedding with them;
attention is `patchkern.budget.counted_attention`.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from patchkern.budget.counted_attention import CountedAttention
from patchkern.budget.counted_items import CountedItems, IndexedRows
from patchkern.budget.counted_memory import CountedMap, CountedMemory, MemoryRows
from patchkern.budget.counted_pass import on_meta, without_memory
from patchkern.budget.counted_sums import is_in_place, sole_references
from patchkern.budget.live_bytes import LiveBytes
from patchkern.budget.step import HeldBytes, Lora, PassShape, StepBytes, StepKind
from patchkern.ops.last_layer import decoder_of, feed_forward, for_rows, last_layer, recomputes
from patchkern.ops.span_rows import are_few
from patchkern.ops.vector_dropout import drop_vectors

_ROW_INTEGERS = 64  # bytes of a row of the layout, of its transpose, of positions and masks of integers
_TITLE_INTEGERS = 12  # bytes of a token of the titles that a layout has as patches, and of its transpose


class _Timeline(LiveBytes):
    """`LiveBytes` after every operator."""

    def __init__(self) -> None:
        super().__init__()
        self.part = "activations"
        self.held: list[tuple[int, ...]] = []
        self._sole = sole_references()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if is_in_place(func, args, self._sole):
            func = torch.ops.aten.add_.Tensor
        return super().__torch_dispatch__(func, types, args, kwargs)

    def after_operator(self) -> None:
        self.held.append(tuple(self.live_of.get(part, 0) for part in HeldBytes._fields))


class FakeModel:
    """A causal language model without its memory, in training.

    Args:
        model: a transformers model or its configuration, with adapters or without, or what has one as its ``hf_model``.
        dtype: of the weights; the model's own where not given.
        lora: put adapters around it.
        n_items: give it an item head for so many.
        memory: give it the map of a `patchkern.RecurrentMemory`, where its rows have positions.
    """

    def __init__(
        self, model: Any, dtype: torch.dtype | None, lora: Lora | None, n_items: int | None, memory: bool = False
    ) -> None:
        self._mode = FakeTensorMode()
        inner = getattr(model, "hf_model", model)
        if lora is not None:
            inner, dtype = _adapted(without_memory(inner, dtype, on_meta), lora), None
        self.hf_model = without_memory(inner, dtype, self._fake).train()
        embedding = getattr(model, "item_embedding", None)
        self.item_embedding: nn.Parameter | None = None
        if embedding is not None:
            self.item_embedding = nn.Parameter(self._fake(embedding.shape, embedding.dtype))
        self._vector_dropout: float = getattr(model, "vector_dropout", 0.0)
        catalog = getattr(model, "catalog", None)
        self._titles = (0, 1) if catalog is None else (int(catalog.inputs.offsets[-1]), len(catalog))
        self.item_head: CountedItems | None = None
        of_map = None
        with self._mode:
            width = self._output_weight.shape[1]
            if n_items is not None:
                by_id = getattr(getattr(model, "item_head", None), "scores_by", None)
                self.item_head = CountedItems(n_items, width, self.hf_model.dtype, by_id)
            if memory and getattr(model, "placed", True):
                of_map = CountedMap(width, self.hf_model.dtype)
        self.memory = CountedMemory(of_map)

    def _fake(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        with self._mode:
            return torch.empty(shape, dtype=dtype)

    def parameters(self) -> list[nn.Parameter]:
        """All of them, each once."""
        own = [] if self.item_embedding is None else [self.item_embedding]
        beside = [part for part in (self.item_head, self.memory.map) if part is not None]
        return [*self.hf_model.parameters(), *own, *(parameter for part in beside for parameter in part.parameters())]

    @property
    def weights(self) -> int:
        """Bytes of parameters and buffers."""
        return sum(x.nbytes for x in (*self.parameters(), *self.hf_model.buffers()))

    @property
    def _embedding_hooks(self) -> dict[int, Any]:
        hooks: dict[int, Any] = self.hf_model.get_input_embeddings()._forward_hooks
        return hooks

    def count_step(self, shape: PassShape, kind: StepKind) -> StepBytes:
        """Follow a forward and a backward pass of so many rows, and of twice as many.

        Raises:
            ValueError: a model that does not run on fake tensors.
        """
        return self._count(shape, kind, backward=True)

    def kept_per_row(self, shape: PassShape, kind: StepKind) -> int:
        """`StepBytes.kept_per_row`, for which forward passes are enough; raises the same."""
        return self._count(shape, kind, backward=False).kept_per_row

    def _count(self, shape: PassShape, kind: StepKind, *, backward: bool) -> StepBytes:
        (first, end), (second, _) = (self._follow(shape.times(n), kind, backward) for n in (1, 2))
        if first.shape != second.shape:
            raise ValueError(
                f"model: expected one that runs the same operators for {shape.rows} rows and for {2 * shape.rows}, to "
                f"count its memory; {type(self.hf_model).__name__} runs {len(first)} and {len(second)}"
            )
        return StepBytes(shape.rows, first, second, end)

    def _follow(self, shape: PassShape, kind: StepKind, backward: bool) -> tuple[NDArray[np.int64], int]:
        """``(operators, 4)`` bytes after each, and at which the layers' forward pass ends."""
        hooks_before = dict(self._embedding_hooks)
        _set_checkpointing(self.hf_model, kind.checkpointing)
        counter = _Timeline()
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        hooks: list[Any] = []
        layers_end = 0
        states: list[Tensor] = []

        def gradient_is_there(parameter: Tensor) -> None:
            if kind.sharded:
                parameter.grad = None
            elif parameter.grad is not None:
                counter.move(parameter.grad, "gradients")

        def logits_begin(module: nn.Module, inputs: Any, output: Any) -> None:
            nonlocal layers_end
            layers_end = len(counter.held) - 1
            counter.part = "logits"
            states.append(output[0])
            hooks.append(output[0].register_hook(logits_end))

        def logits_end(gradient: Tensor) -> None:
            counter.part = "activations"

        hooks += [parameter.register_post_accumulate_grad_hook(gradient_is_there) for parameter in trainable]
        hooks.append(decoder_of(self.hf_model).register_forward_hook(logits_begin))
        collected = gc.isenabled()
        gc.disable()  # whose moments are not the same from step to step
        try:
            with self._mode, counter:
                if kind.accumulates and not kind.sharded:
                    with counter.within("gradients"):
                        for parameter in trainable:
                            parameter.grad = torch.empty_like(parameter)
                layout = torch.empty(self._layout_bytes(shape), dtype=torch.uint8)
                loss = self._loss(shape, kind, counter, states)
                if backward:
                    loss.backward()
                del loss, layout  # which the backward pass of the rows needs last
        except (RuntimeError, NotImplementedError, TypeError) as error:
            raise ValueError(
                f"model: expected one whose training step runs on fake tensors, to count its memory; "
                f"{type(self.hf_model).__name__} does not: {error}"
            ) from error
        finally:
            if collected:
                gc.enable()
            for hook in hooks:
                hook.remove()
            for parameter in trainable:
                parameter.grad = None
            # transformers puts one there with checkpointing, and leaves it
            self._embedding_hooks.clear()
            self._embedding_hooks.update(hooks_before)
        return np.array(counter.held, dtype=np.int64), layers_end

    def _loss(self, shape: PassShape, kind: StepKind, counter: LiveBytes, states: list[Tensor]) -> Tensor:
        """``states`` is where the decoder's hidden states (1, T, D) come."""
        autocast: Any = contextlib.nullcontext()
        if kind.autocast is not None:
            autocast = torch.autocast("cpu", kind.autocast)
        if shape.memory is not None:  # whose references and updates are read as well
            kind = replace(kind, labelled_alone=False)
        with autocast:
            if shape.memory is None or shape.memory.reference == 0:
                losses = self._pass_losses(shape, kind, counter, states)
            else:
                losses = self._memory_losses(shape, shape.memory, kind, counter, states)
        states.clear()
        return sum(losses[1:], start=losses[0])

    def _layout_bytes(self, shape: PassShape) -> int:
        """Integers of a pass: of its rows, and of the titles of items that stand as one row."""
        count = shape.rows * _ROW_INTEGERS
        if shape.item_rows or shape.memory is not None:
            tokens, items = self._titles
            layouts = 1 if shape.memory is None else 2
            count += layouts * _TITLE_INTEGERS * -(-tokens * min(shape.rows, items) // items)
        return count

    def _memory_losses(
        self, shape: PassShape, memory: MemoryRows, kind: StepKind, counter: LiveBytes, states: list[Tensor]
    ) -> list[Tensor]:
        """Of the two passes of a `patchkern.RecurrentMemory`, and between them."""
        first = PassShape(memory.reference, 0, memory.reference_items, shape.longest)
        losses = self._pass_losses(first, kind, counter, states)
        references = self.memory.references(states.pop()[0], memory)
        counter.part = "activations"
        memories = self.memory.read(references, memory)
        second = shape._replace(rows=shape.rows - memory.reference, memory=None)
        losses += self._pass_losses(second, kind, counter, states, memories)
        return [*losses, self.memory.distance(states[0][0], references, memory)]

    def _pass_losses(
        self,
        shape: PassShape,
        kind: StepKind,
        counter: LiveBytes,
        states: list[Tensor],
        memories: Tensor | None = None,
    ) -> list[Tensor]:
        """Of one forward pass, in which some rows may be memories."""

        def integers(*size: int) -> Tensor:
            return torch.empty(size, dtype=torch.int64)

        labels = integers(1, shape.logit_rows)
        inputs: dict[str, Any] = {"position_ids": integers(1, shape.rows), "logits_to_keep": integers(shape.logit_rows)}
        if shape.logit_rows and not kind.smoothing:
            inputs |= {"labels": labels, "shift_labels": labels}
        attention = CountedAttention(counter, kind.prefixes, shape.longest, kind.on_cuda)
        losses = []
        own: Tensor | None = self.item_embedding
        if own is not None and self._vector_dropout:
            own = drop_vectors(own, self._vector_dropout)
        rows = self._rows(shape.rows, own)
        if memories is not None:
            rows = self.memory.placed(rows, memories)
        with self._last_layer(shape, kind):
            output = self.hf_model(inputs_embeds=rows[None], use_cache=False, span_cache=attention, **inputs)
        if shape.logit_rows and kind.smoothing:
            losses.append(F.cross_entropy(output.logits[0].float(), labels[0], label_smoothing=0.1))
        elif shape.logit_rows:
            losses.append(output.loss)
        if shape.item_rows and kind.chunks is not None and self.item_head is not None:
            of_items = IndexedRows.apply(states[-1][0], shape.item_rows)
            losses.append(self.item_head.loss(of_items, self._output_weight, own, kind.chunks))
        return losses

    def chooses(self, shape: PassShape, rows: int) -> bool:
        """Whether labels are few in so many rows like these, as `patchkern.models.wanted_rows` asks."""
        labelled = -(-(shape.logit_rows + shape.item_rows) * rows // shape.rows)
        width = self.hf_model.config.get_text_config().hidden_size
        return are_few(torch.empty(rows, width, device="meta"), labelled)

    def _last_layer(self, shape: PassShape, kind: StepKind) -> contextlib.AbstractContextManager[None]:
        """Where it is open, it computes what it must."""
        decoder = decoder_of(self.hf_model)
        layer = last_layer(decoder) if kind.labelled_alone and not kind.sharded else None
        network = None if layer is None or recomputes(decoder, layer) else feed_forward(layer)
        if network is None:
            return contextlib.nullcontext()
        return for_rows(network, torch.empty(max(shape.logit_rows + shape.item_rows, 1), dtype=torch.int64))

    @property
    def _output_weight(self) -> Tensor:
        output = self.hf_model.get_output_embeddings()
        if hasattr(output, "modules_to_save"):  # a whole copy that peft trains
            output = output.modules_to_save[self.hf_model.active_adapter]
        weight: Tensor = output.weight
        return weight

    def _rows(self, count: int, own: Tensor | None) -> Tensor:
        embedding = self.hf_model.get_input_embeddings()
        is_weight = isinstance(embedding, nn.Embedding)
        if is_weight and not embedding._forward_hooks:
            rows: Tensor = IndexedRows.apply(embedding.weight, count)
        else:  # called on the batch's distinct tokens
            tokens = torch.empty(1, count, dtype=torch.int64)
            if is_weight:
                table: Tensor = IndexedRows.apply(embedding.weight, tokens.shape[1])
                for hook in embedding._forward_hooks.values():
                    hook(embedding, (tokens,), table)
            else:
                table = embedding(tokens)[0]
            rows = IndexedRows.apply(table, count)
        if own is not None:
            rows = rows.add_(IndexedRows.apply(own, count).to(rows.dtype))
        return rows


def _adapted(hf_model: Any, lora: Lora) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ValueError(f"lora: expected peft to be installed, to plan with adapters: {error}") from error
    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    return get_peft_model(hf_model, LoraConfig(r=lora.rank, target_modules=targets, task_type="CAUSAL_LM"))


def _set_checkpointing(hf_model: Any, on: bool) -> None:
    name = "activation" if hasattr(hf_model, "activation_checkpointing_enable") else "gradient"
    getattr(hf_model, f"{name}_checkpointing_{'enable' if on else 'disable'}")()
