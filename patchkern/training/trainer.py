# SPDX-License-Identifier: Apache-2.0
"""Training: `transformers.Trainer` over layouts."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, speed_metrics

from patchkern.batch.arguments import check_count, check_number
from patchkern.batch.experts import Experts
from patchkern.batch.histories import Histories
from patchkern.batch.planned_layout import check_head
from patchkern.batch.policy_kinds import AnyPolicy
from patchkern.batch.preference_memory import PreferenceMemory
from patchkern.data.samples import Samples
from patchkern.models.learned_rows import experts_are_trained
from patchkern.training.averaging import WeightAverage
from patchkern.training.collators import LayoutCollator, MemoryCollator, PassCollator, pass_collator
from patchkern.training.finite_losses import FiniteLosses
from patchkern.training.passes import PassDataset, SlotDataset
from patchkern.training.precision import share_at_rest
from patchkern.training.processes import check_processes, check_sharding
from patchkern.training.protocol import TrainableModel
from patchkern.training.saving import SavingTrainer
from patchkern.training.validation import Validation, summary

_HEAD = {"item_head", "item_embedding"}  # in the names of its parameters
_MANY_AT_REST = 0.1


class PatchTrainer(SavingTrainer):
    """`transformers.Trainer` for a `PatchedCausalLM`, an `ItemModel` or a `RecurrentMemory`.

    The loss of a step is the mean over all its supervised tokens, however the step is cut into batches and processes.
    Checkpoints are `PatchedCausalLM.save_pretrained` folders with the trainer's state beside the model, and appear
    under their name when they are complete; resuming from one continues the uninterrupted run, loss by loss.
    ``label_smoothing_factor`` smooths the losses of training, never those of evaluation. A loss that is NaN or infinite
    raises a `FloatingPointError` with the samples of its batch, on a GPU perhaps a step later, but before the next log,
    evaluation or checkpoint.

    With ``eval_samples``, `evaluate` recommends for them, so that transformers' own arguments and callbacks work on hit
    rates: ``eval_strategy="steps"``, ``metric_for_best_model="HR@20"``, ``load_best_model_at_end=True``,
    `EarlyStoppingCallback`; a resumed run remembers that callback's patience with
    ``restore_callback_states_from_checkpoint=True``. Processes in data parallelism share the samples.

    Args:
        model: its catalog and prompt are used; its policy where ``policy`` is None.
        args: as for any Trainer (`Settings.arguments` has the paper's); ``num_train_epochs`` and ``max_steps`` count
            passes over ``samples`` and optimisation steps. The run's ``epoch`` in the logs goes from 0 to 1; all the
            same, to evaluate, save or log every "epoch" means after every pass over ``samples``.
        histories: the users' items, oldest first.
        samples: ``(users, positions)``, ``(S,)`` int64 each: the target of a sample is the item of that user at that
            position, its history the items before; `patchkern.data.Samples` is one.
        policy: how histories are compressed; also kept as ``model.policy``.
        pretrain: patch pre-training: every sample twice in the same batch, as text and with each item a patch with
            probability step / steps.
        supervise_history: label the history's text as well as the response. Not the paper's objective, but a model
            that starts from random weights learns many times faster from it.
        jitter: blur the order of the items up to a pass's last target by so many positions, anew in every pass
            (`Histories.jittered`); for models from scratch, and with ``rows_per_pass`` only.
        head: what is learned: "titles"; "items", by the model's item head, a row or two a target; or "both". None: the
            first of what the model ``learns``, titles but for an `ItemModel`. A head without biases begins with how
            often the samples' items are taken (`CatalogHead.start_from_counts`).
        title_weight, item_weight: of the two losses, each a mean over its own labels of the step.
        rows_per_pass: learn all targets of a user in one pass, its history computed once (`build_training_layout`),
            in batches of at most so many rows; ``per_device_train_batch_size`` is not used then. None: a sample per
            target, as published.
        targets_per_step: with ``rows_per_pass``, the targets of an optimisation step over all processes, whatever their
            rows; ``gradient_accumulation_steps`` becomes what that takes. None: as many as its passes have.
        head_learning_rate: of the item head and the items' own vectors, on the same schedule; None: that of the rest.
        ema_decay: share of an exponential moving average of the trained weights that a step leaves. What is validated,
            saved and left in the model after training is then the average. Checkpoints have both, so that a resumed
            run is the uninterrupted one. Not under FSDP or DeepSpeed. None: no average.
        eval_samples: like ``samples``, to validate on.
        eval_limit: of more take so many, evenly spread over them; None: all.
        eval_options: for `PatchedCausalLM.recommend` in `evaluate`, such as ``search`` or ``memory_budget``; by
            default 20 beams, or ``search="items"`` where items alone are learned, and items already seen are excluded.
        kwargs: for `transformers.Trainer`, such as ``callbacks``, and ``processing_class``: a tokenizer, kept as
                ``model.tokenizer`` and saved with it.

    Raises:
        ValueError: no samples, a sample outside its history, no policy, or an argument that this trainer cannot serve.
    """

    model: Any  # a TrainableModel, and a module
    train_dataset: SlotDataset | PassDataset
    data_collator: LayoutCollator | PassCollator | MemoryCollator

    def __init__(
        self,
        model: TrainableModel,
        args: TrainingArguments,
        histories: Histories,
        samples: tuple[NDArray[np.int64], NDArray[np.int64]],
        policy: AnyPolicy | None = None,
        *,
        pretrain: bool = False,
        supervise_history: bool = False,
        rows_per_pass: int | None = None,
        targets_per_step: int | None = None,
        jitter: float = 0.0,
        head: str | None = None,
        title_weight: float = 1.0,
        item_weight: float = 1.0,
        head_learning_rate: float | None = None,
        ema_decay: float | None = None,
        eval_samples: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None,
        eval_limit: int | None = 1000,
        eval_options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        policy = model.policy if policy is None else policy
        if policy is None:
            raise ValueError("policy: expected one, here or in the model, got None")
        check_processes(args)
        if args.auto_find_batch_size:
            raise ValueError("args: expected auto_find_batch_size=False: the schedule depends on the batch size")
        _check_numbers(args)
        check_number("jitter", jitter, minimum=0)
        if jitter and rows_per_pass is None:
            raise ValueError(f"jitter: expected 0 without rows_per_pass, got {jitter}")
        head = model.learns[0] if head is None else head
        check_head(head)
        if head not in model.learns:
            raise ValueError(
                f"head: expected one of {', '.join(model.learns)} for {type(model).__name__}, got {head!r}"
            )
        if isinstance(policy, Experts):
            policy.check_head(head)
        if head != "titles" and model.item_head is None:
            raise ValueError(f'head: expected "titles" for a model without an item head, got {head!r}')
        sampled_above = math.inf if head == "titles" else model.item_head.sampled_above
        if args.label_smoothing_factor and len(model.catalog) > sampled_above:
            raise ValueError(
                f"label_smoothing_factor: expected 0 with more than {sampled_above:,} items, of which an item head "
                f"samples some, got {args.label_smoothing_factor}"
            )
        if head == "items" and supervise_history:
            raise ValueError('supervise_history: expected False with head="items", which learns no text')
        if supervise_history and model.catalog.texts is not None:
            raise ValueError(
                "supervise_history: expected False with input texts, which are in the history and are not generated"
            )
        for name, weight in (("title_weight", title_weight), ("item_weight", item_weight)):
            check_number(name, weight, minimum=0)
        if head_learning_rate is not None:
            check_number("head_learning_rate", head_learning_rate, minimum=0)
        self._weights = {"title_weight": title_weight, "item_weight": item_weight}
        if targets_per_step is not None:
            check_count("targets_per_step", targets_per_step, minimum=1)
            if rows_per_pass is None:
                raise ValueError(f"targets_per_step: expected None without rows_per_pass, got {targets_per_step}")
        users, positions = Samples.of(samples, histories)
        if users.size == 0:
            raise ValueError("samples: expected at least one, got none")
        tokenizer = kwargs.get("processing_class")
        if not (tokenizer is None or isinstance(tokenizer, PreTrainedTokenizerBase)):
            raise TypeError(f"processing_class: expected a transformers tokenizer, got {type(tokenizer).__name__}")
        if model.item_head is not None:
            model.item_head.requires_grad_(head != "titles")  # data parallelism waits for every gradient
        if head != "titles" and model.item_head is not None and not bool(model.item_head.bias.any()):
            taken = model.catalog.index_of(histories.at(users, positions), "samples")
            model.item_head.start_from_counts(np.bincount(taken, minlength=len(model.catalog)))
        model.policy = policy
        model.tokenizer = model.tokenizer if tokenizer is None else tokenizer

        args = copy.copy(args)
        # A layout cannot be scattered over GPUs by DataParallel; several of them need torchrun.
        args._n_gpu = min(args.n_gpu, 1)
        args.remove_unused_columns = False
        # Pinned memory is for copies to a device; without one torch warns of it.
        args.dataloader_pin_memory &= args.device.type != "cpu"
        if args.dataloader_pin_memory:
            # else each of a batch's tensors would wait until the device has done all that it was given before
            accelerator_config: Any = copy.copy(args.accelerator_config)
            accelerator_config.non_blocking = True
            args.accelerator_config = accelerator_config
        args.logging_nan_inf_filter = False  # it would wait for every loss, and log the average in its place
        if args.ddp_find_unused_parameters is None:
            # Trainer's own choice for a module it does not know is True, which is slow and breaks recomputation.
            args.ddp_find_unused_parameters = False
        seed = args.seed if args.data_seed is None else args.data_seed
        steps = args.max_steps if args.max_steps > 0 else None
        dataset: SlotDataset | PassDataset
        collator: LayoutCollator | PassCollator | MemoryCollator
        if rows_per_pass is None:
            if isinstance(policy, PreferenceMemory):
                raise ValueError("rows_per_pass: expected a number with a PreferenceMemory, got None")
            kept = (model.catalog, histories, policy, model.prompt)
            planned = (seed, supervise_history, model.item_embedding is not None, head)
            per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
            args.max_steps = steps or math.ceil(args.num_train_epochs * users.size / per_step)
            dataset = SlotDataset(users, positions, args.max_steps, per_step, seed)
            collator = LayoutCollator(*kept, args.max_steps if pretrain else None, *planned)
        else:
            check_count("rows_per_pass", rows_per_pass, minimum=1)
            args.per_device_train_batch_size = 1
            per_step = (1 if targets_per_step else args.gradient_accumulation_steps) * args.world_size
            # how many steps there are depends on the rows, and those on whether there are two trunks
            collator = pass_collator(
                model,
                histories,
                policy,
                pretrain=pretrain,
                seed=seed,
                supervise_history=supervise_history,
                head=head,
                jitter=jitter,
            )
            epochs = args.num_train_epochs
            dataset = PassDataset(
                users, positions, collator.rows, rows_per_pass, epochs, steps, per_step, seed, targets_per_step
            )
            args.gradient_accumulation_steps = dataset.passes_per_step // args.world_size
            args.max_steps = dataset.steps
            if isinstance(collator, PassCollator) and pretrain:
                collator = replace(collator, pretrain_steps=dataset.steps)
        _count_epochs_in_steps(args, args.max_steps * users.size // dataset.num_targets)
        if eval_samples is not None:
            eval_options = {"search": "items" if head == "items" else "beam", **(eval_options or {})}
            kwargs["eval_dataset"] = Validation(model, histories, eval_samples, policy, eval_limit, eval_options)
        learned = (isinstance(policy, Experts) and policy.count > 0) or isinstance(policy, PreferenceMemory)
        if learned and not experts_are_trained(model):
            warnings.warn(
                "model: expected experts whose embeddings are trained, got frozen ones, which compress nothing; an "
                "adapter has them among its trainable_token_indices where the prompt had them before it was made",
                stacklevel=2,
            )
        resting = share_at_rest((p for p in model.parameters() if p.requires_grad), args.learning_rate)
        if resting > _MANY_AT_REST:
            warnings.warn(
                f"learning_rate: {args.learning_rate:g} is too low to move {resting:.0%} of the model's bfloat16 "
                "weights, each of which rounds it away; float32 weights (dtype) with bf16=True are as fast",
                stacklevel=2,
            )
        self.head = head
        self._head_learning_rate = head_learning_rate
        self._losses = FiniteLosses()
        if ema_decay is not None:
            self.weight_average = WeightAverage(ema_decay, cast(nn.Module, model))
            kwargs["callbacks"] = [self.weight_average, *(kwargs.get("callbacks") or ())]
        super().__init__(
            model=cast(nn.Module, model),
            args=args,
            train_dataset=dataset,
            data_collator=collator,
            **kwargs,
        )
        check_sharding(args, self.accelerator, self.model)
        if ema_decay is not None and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError(f"ema_decay: expected None where processes share the model's parameters, got {ema_decay}")
        self.label_smoother = None  # it would compute a second loss; `compute_loss` has the model smooth its own

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As any Trainer; the model then knows what it `learned`, and recommends by that where nobody says how."""
        model: Any = self.accelerator.unwrap_model(self.model)
        weights = {"titles": self._weights["title_weight"], "items": self._weights["item_weight"]}
        model.learned = tuple(name for name, weight in weights.items() if weight and self.head in (name, "both"))
        return super().train(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        return SequentialSampler(dataset)

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """As any Trainer; with ``head_learning_rate``, the head's parameters are groups of their own."""
        made = self.optimizer is not None
        optimizer: Any = super().create_optimizer(model)
        if self._head_learning_rate is not None and not made:
            named = (self.model if model is None else model).named_parameters()
            head = {id(parameter) for name, parameter in named if _HEAD.intersection(name.split("."))}
            for group in list(optimizer.param_groups):
                own = [parameter for parameter in group["params"] if id(parameter) in head]
                if own:
                    group["params"] = [parameter for parameter in group["params"] if id(parameter) not in head]
                    optimizer.add_param_group({**group, "params": own, "lr": self._head_learning_rate})
        return optimizer

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The model's own loss, smoothed in training as ``label_smoothing_factor`` says."""
        smoothing = self.args.label_smoothing_factor if model.training else 0.0
        inputs = {name: value for name, value in inputs.items() if name not in ("samples", "item_labels")}
        return super().compute_loss(model, {**inputs, "smoothing": smoothing, **self._weights}, *args, **kwargs)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: Any) -> Any:
        """Where titles and items are learned, tokens and items are counted apart."""
        tokens = super()._get_num_items_in_batch(batch_samples, device)
        if tokens is None or self.head != "both":
            return tokens
        items = [{"labels": batch["item_labels"]} for batch in batch_samples]
        counts = (tokens, super()._get_num_items_in_batch(items, device))
        return torch.stack([torch.as_tensor(count, device=device) for count in counts])

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """As any Trainer; a loss that is not finite raises."""
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        self._losses.add(loss, self.state.global_step + 1, inputs.get("samples"))
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As any Trainer, once the losses so far are known to be finite."""
        self._losses.wait()
        super().log(logs, *args, **kwargs)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Recommend for ``eval_samples``: ``eval_HR@10``, ``eval_HR@20``, ``eval_NDCG@10``, ``eval_NDCG@20``, by item.

        ``eval_loss`` is the mean over all tokens of the targets' titles and response ends, or over the targets with
        ``search="items"``, without label smoothing, ``per_device_eval_batch_size`` samples at a time. Without
        ``eval_samples``, or given another ``eval_dataset``, as any Trainer.
        """
        samples = self.eval_dataset
        if eval_dataset is not None or not isinstance(samples, Validation):
            with self.averaged():
                return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        started = time.time()
        share = range(self.accelerator.process_index, len(samples), self.accelerator.num_processes)
        with self.whole_model() as model:
            parts = gather_object([samples.measure(model, share, self.args.per_device_eval_batch_size)])
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in summary(parts).items()}
        metrics |= speed_metrics(metric_key_prefix, started, num_samples=len(samples))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._losses.wait()
        super()._save_checkpoint(model, trial)


def _check_numbers(args: TrainingArguments) -> None:
    """What transformers takes as it comes, and a run would end with, or be another one."""
    if not args.max_steps > 0:
        check_number("num_train_epochs", args.num_train_epochs, above=0)
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        check_count(name, getattr(args, name), minimum=1)
    check_number("label_smoothing_factor", args.label_smoothing_factor, minimum=0, below=1)
    if args.fp16 and args.device.type == "cpu":
        raise ValueError("fp16: expected False on a CPU, which would compute in float32 all the same, got True")


def _count_epochs_in_steps(args: TrainingArguments, steps_per_epoch: int) -> None:
    """To `Trainer` the whole run is one epoch, which would leave one evaluation, at its end."""
    steps = min(max(steps_per_epoch, 1), args.max_steps)
    if args.eval_strategy == IntervalStrategy.EPOCH:
        args.eval_strategy, args.eval_steps = IntervalStrategy.STEPS, steps
        args.eval_delay *= steps
    if args.save_strategy == SaveStrategy.EPOCH:
        args.save_strategy, args.save_steps = SaveStrategy.STEPS, steps
    if args.logging_strategy == IntervalStrategy.EPOCH:
        args.logging_strategy, args.logging_steps = IntervalStrategy.STEPS, steps
