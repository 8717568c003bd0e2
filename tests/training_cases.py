# SPDX-License-Identifier: Apache-2.0
"""A data set and a model that train in a second, and what a trainer logged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import patchkern as pk
from patchkern.models.patched_lm import PatchedCausalLM
from patchkern.models.scratch import fit_tokenizer, scratch_model, scratch_prompt
from patchkern.training import PatchTrainer, Settings
from patchkern.training.collators import PassCollator
from patchkern.training.passes import PassDataset

USERS, ITEMS = 12, 30
UNTUNED = Settings(learning_rate=1e-3, sessions_learning_rate=3e-4)
TITLES = {10 + item: f"{'ABC'[item % 3] * 3} of {item}" for item in range(ITEMS)}


def make_data() -> tuple[pk.Histories, tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    histories = pk.Histories.from_sequences([rng.integers(10, 10 + ITEMS, 6 + user).tolist() for user in range(USERS)])
    positions = [np.arange(3, length) for length in histories.lengths]
    return histories, (np.repeat(np.arange(USERS), histories.lengths - 3), np.concatenate(positions))


def held_out_samples() -> tuple[np.ndarray, np.ndarray]:
    """Samples to validate on, of users who have not seen 20 items or more."""
    return np.arange(USERS), 5 + np.arange(USERS) % 6


def make_model(
    tokenizer: Any = None, item_head: bool = False, vector_dropout: float | None = None, **config: Any
) -> tuple[PatchedCausalLM, Any]:
    """With ``vector_dropout`` also with item embeddings."""
    tokenizer = tokenizer or fit_tokenizer(TITLES.values(), 280)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, **config}
    catalog = pk.Catalog.from_titles(TITLES, tokenizer)
    hf_model = scratch_model(tokenizer, **shape)
    own = {} if vector_dropout is None else {"item_embeddings": True, "vector_dropout": vector_dropout}
    return PatchedCausalLM(hf_model, catalog, scratch_prompt(tokenizer), item_head=item_head, **own), tokenizer


def make_trainer(
    folder: Path | str,
    stage: str = "items",
    *,
    callbacks: Any = None,
    config: Any = None,
    rows_per_pass: int | None = None,
    targets_per_step: int | None = None,
    jitter: float = 0.0,
    validate: dict[str, Any] | None = None,
    head: str = "titles",
    weights: dict[str, float] | None = None,
    ema_decay: float | None = None,
    **arguments: Any,
) -> PatchTrainer:
    histories, samples = make_data()
    model, tokenizer = make_model(**{"item_head": head != "titles", **(config or {})})
    defaults = {
        "per_device_train_batch_size": 8,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
        "dataloader_pin_memory": False,
    }
    return PatchTrainer(
        model,
        UNTUNED.arguments(stage, folder, **{**defaults, **arguments}),
        histories,
        samples,
        UNTUNED.policy(stage, max_items=10),
        pretrain=stage == "pretrain",
        rows_per_pass=rows_per_pass,
        targets_per_step=targets_per_step,
        jitter=jitter,
        head=head,
        ema_decay=ema_decay,
        **(weights or {}),
        **({} if validate is None else {"eval_samples": held_out_samples(), **validate}),
        processing_class=tokenizer,
        callbacks=callbacks,
    )


def make_id_trainer(folder: Path | str, policy: Any = None, *, dropout: float = 0.2, **options: Any) -> PatchTrainer:
    """Of an `ItemModel`."""
    histories, samples = make_data()
    of_trainer = {
        name: options.pop(name) for name in ("rows_per_pass", "jitter", "head", "ema_decay") if name in options
    }
    if options.pop("validate", None) is not None:
        of_trainer["eval_samples"] = held_out_samples()
    catalog = pk.Catalog.from_token_ids(range(len(TITLES)), range(len(TITLES) + 1), list(TITLES))
    model = pk.ItemModel(catalog, width=16, dropout=dropout, max_positions=32)
    arguments = {"logging_steps": 1, "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "seed": 3}
    arguments |= {"per_device_train_batch_size": 8, "learning_rate": 1e-2, "max_grad_norm": 1.0, **options}
    settings = UNTUNED.arguments("items", folder, **arguments)
    return PatchTrainer(model, settings, histories, samples, policy or pk.ItemPatches(0, 10), **of_trainer)


def make_memory_trainer(folder: Path | str, titles: bool, **options: Any) -> PatchTrainer:
    """Of a `RecurrentMemory`, over a language model or a model of item ids."""
    histories, samples = make_data()
    of_trainer = {name: options.pop(name) for name in ("rows_per_pass", "head", "ema_decay") if name in options}
    policy = pk.PreferenceMemory(pk.ItemPatches(keep_text=0, max_items=None), slots=2, block=4)
    if titles:
        model: Any = make_model(item_head=True, vocab_size=290)[0]
        model.prompt, model.policy = model.prompt.with_special(experts=[288, 289]), policy
    else:
        prompt = pk.Prompt(prefix=[ITEMS]).with_special(experts=[ITEMS + 1, ITEMS + 2])
        catalog = pk.Catalog.from_token_ids(range(ITEMS), range(ITEMS + 1), list(TITLES))
        model = pk.ItemModel(catalog, policy, width=16, dropout=0.0, max_positions=32, prompt=prompt)
    arguments = {"logging_steps": 1, "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "seed": 3, **options}
    return PatchTrainer(
        pk.RecurrentMemory(model), UNTUNED.arguments("items", folder, **arguments), histories, samples, **of_trainer
    )


def evaluations_of(trainer: PatchTrainer) -> list[dict[str, float]]:
    """What `evaluate` logged, without the times."""
    logged = [entry for entry in trainer.state.log_history if "eval_HR@20" in entry]
    names = ("step", "eval_loss", "eval_HR@10", "eval_HR@20", "eval_NDCG@10", "eval_NDCG@20")
    return [{name: entry[name] for name in names} for entry in logged]


def losses_of(trainer: PatchTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


EARLY = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "metric_for_best_model": "HR@20",
    "load_best_model_at_end": True,
    "save_total_limit": 2,
    "restore_callback_states_from_checkpoint": True,
    "validate": {},
}


def make_passes(
    rows_per_pass: int,
    steps: int | None = None,
    pretrain: bool = False,
    per_step: int = 1,
    targets_per_step: int | None = None,
) -> PassDataset:
    histories, samples = make_data()
    model, _ = make_model()
    collator = PassCollator(model.catalog, histories, pk.ItemPatches(2, 10), model.prompt, 1 if pretrain else None)
    return PassDataset(*samples, collator.rows, rows_per_pass, 2.0, steps, per_step, 0, targets_per_step)
