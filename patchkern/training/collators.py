# SPDX-License-Identifier: Apache-2.0
"""Slots and passes to batches, in the data-loader worker: integers only."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchkern.batch.catalog import Catalog
from patchkern.batch.experts import Experts
from patchkern.batch.histories import Histories
from patchkern.batch.joined_layout import join_layouts
from patchkern.batch.layout import PatchLayout
from patchkern.batch.memory_layout import MemoryPlanner
from patchkern.batch.policies import ItemDropout, RandomItemPatches, TextOnly
from patchkern.batch.policy_kinds import AnyPolicy, Level, Levels, cut_every_of
from patchkern.batch.preference_memory import PreferenceMemory
from patchkern.batch.prompt import Prompt
from patchkern.batch.sample_layout import build_layout
from patchkern.batch.training_layout import build_training_layout, training_rows
from patchkern.training.passes import Pass, Slot
from patchkern.training.protocol import TrainableModel


@dataclass(frozen=True)
class RawAndPatched:
    """Patch pre-training: the first half of the users as text, the second half as `RandomItemPatches`."""

    probability: float
    max_items: int | None = 100
    seed: int = 0
    cut_every: int = 1

    def levels(self, histories: Histories) -> Levels:
        levels = RandomItemPatches(self.probability, self.max_items, self.seed).levels(histories)
        levels[: histories.offsets[len(histories) // 2]] = Level.TEXT
        return levels


@dataclass(frozen=True)
class LayoutCollator:
    """Slots to a batch ``{"layout": PatchLayout, "labels": (K,) int64, "samples": ...}``, in the data-loader worker.

    ``samples`` says where it is from: the samples' users and positions, ``(n,)`` int64 each.

    Attributes:
        pretrain_steps: feed each sample twice, as text and as patches with a probability that rises from 0 by
            1 / ``pretrain_steps`` a step; None: once, as ``policy`` says.
        seed: of the draws, the policy's too.
        supervise_history: label the history's text too, see `PatchLayout.supervise_literals`.
        item_embeddings: plan what a model with item embeddings needs, see `PatchLayout.with_identities`.
        head: of `build_layout`: with "items" ``labels`` are catalogue positions, with "both" those are ``item_labels``.
    """

    catalog: Catalog
    histories: Histories
    policy: AnyPolicy
    prompt: Prompt
    pretrain_steps: int | None = None
    seed: int = 0
    supervise_history: bool = False
    item_embeddings: bool = False
    head: str = "titles"

    def __call__(self, slots: list[Slot]) -> dict[str, Any]:
        policy = _drawn_anew(self.policy, self.seed, slots[0].number)
        users, positions = (np.array([slot[field] for slot in slots]) for field in (2, 3))
        if self.pretrain_steps is not None:
            users, positions = np.tile(users, 2), np.tile(positions, 2)
            share, draw = slots[0].step / self.pretrain_steps, _draw(self.seed, slots[0].number)
            policy = RawAndPatched(share, policy.max_items, draw, cut_every_of(policy))
        histories = self.histories.before(users, positions, policy.max_items, cut_every_of(policy))
        targets = self.histories.at(users, positions)
        layout = build_layout(self.catalog, histories, policy, self.prompt, targets, head=self.head)
        if self.supervise_history:
            layout = layout.supervise_literals()
        if self.item_embeddings:
            layout = layout.with_identities()
        return _batch(layout, (users, positions))


@dataclass(frozen=True)
class PassCollator:
    """A `Pass` to a batch of trunks and branches, as `LayoutCollator` makes one of samples.

    ``samples`` has the users and, ``(n, 2)``, from which to which positions their targets are.

    In patch pre-training every user has two trunks side by side, the text and one draw of patches, each with all the
    user's targets. What a policy draws, such as the borders at which `Experts` cut histories, is drawn anew for every
    pass.

    An item is predicted from the row of the one before it, so that histories that are cut cost rows by themselves: for
    "items" they begin at multiples of ``max_items``, which reads at most two rows a target, and else of 50 items. Where
    the policy has a ``cut_every``, they begin where it cuts them: every target is learned as it is read.
    """

    catalog: Catalog
    histories: Histories
    policy: AnyPolicy
    prompt: Prompt
    pretrain_steps: int | None = None
    seed: int = 0
    supervise_history: bool = False
    item_embeddings: bool = False
    head: str = "titles"
    jitter: float = 0.0

    def __call__(self, passes: list[Pass]) -> dict[str, Any]:
        (one,) = passes
        policies = [_drawn_anew(self.policy, self.seed, one.number)]
        if self.pretrain_steps is not None:
            cut: dict[str, Any] = {"max_items": self.policy.max_items, "cut_every": cut_every_of(self.policy)}
            patched = RandomItemPatches(one.step / self.pretrain_steps, seed=_draw(self.seed, one.number), **cut)
            policies = [TextOnly(**cut), patched]
        histories = _jittered(self.histories.take(one.users), one, self.jitter, self.seed)
        layout = join_layouts(
            [
                build_training_layout(
                    self.catalog, histories, policy, self.prompt, one.ranges, transpose=False, **self._planned
                )
                for policy in policies
            ]
        )
        layout = layout.with_transpose()
        if self.supervise_history:
            layout = layout.supervise_literals()
        if self.item_embeddings:
            layout = layout.with_identities()
        return _batch(layout, (one.users, one.ranges))

    def rows(self, users: NDArray[np.int64], ranges: NDArray[np.int64]) -> NDArray[np.int64]:
        """``(n,)`` the most rows that each user takes; with draws made anew, more than it is likely to take."""
        histories = self.histories.take(users)

        def of(policy: AnyPolicy) -> NDArray[np.int64]:
            return training_rows(self.catalog, histories, policy, self.prompt, ranges, **self._planned)

        if self.pretrain_steps is not None:
            return 2 * of(TextOnly(self.policy.max_items, cut_every=cut_every_of(self.policy)))
        if isinstance(self.policy, (RandomItemPatches, ItemDropout)):
            probability = self.policy.probability
            most, least = (of(replace(self.policy, probability=p)) for p in (0.0, 1.0))
            return _likely_most(most, most - least, probability, self._rows_each)
        return of(self.policy)

    @property
    def _rows_each(self) -> float:
        """What an item adds as text, if longer ones count more often by as much."""
        rows = self.catalog.inputs.lengths + len(self.prompt.separator)
        return float((rows**2).sum() / max(rows.sum(), 1))

    @property
    def _planned(self) -> dict[str, Any]:
        if self.head != "items" or self.policy.max_items is None or cut_every_of(self.policy) > 1:
            return {"head": self.head}
        return {"head": self.head, "block_size": self.policy.max_items}


@dataclass(frozen=True)
class MemoryCollator:
    """A `Pass` to a batch of both stages of a recurrent memory, as `PassCollator` makes one of trunks and branches.

    Attributes:
        planner: of the model.
        reference: label stage 1 too.
        seed, item_embeddings, head, jitter: as of `PassCollator`.
    """

    planner: MemoryPlanner
    histories: Histories
    reference: bool = False
    seed: int = 0
    item_embeddings: bool = False
    head: str = "titles"
    jitter: float = 0.0

    def __call__(self, passes: list[Pass]) -> dict[str, Any]:
        (one,) = passes
        histories = _jittered(self.histories.take(one.users), one, self.jitter, self.seed)
        batch = self.planner.training(histories, one.ranges, head=self.head, reference=self.reference)
        batch = batch.planned(identities=self.item_embeddings)
        return {**_batch(batch.stage2, (one.users, one.ranges)), "layout": batch}

    def rows(self, users: NDArray[np.int64], ranges: NDArray[np.int64]) -> NDArray[np.int64]:
        """``(n,)`` rows that each user takes, both stages together."""
        return self.planner.rows(self.histories.take(users), ranges, head=self.head, reference=self.reference)


def pass_collator(
    model: TrainableModel,
    histories: Histories,
    policy: AnyPolicy,
    *,
    pretrain: bool = False,
    seed: int = 0,
    supervise_history: bool = False,
    head: str = "titles",
    jitter: float = 0.0,
) -> PassCollator | MemoryCollator:
    """What makes a model's batches of passes.

    Raises:
        ValueError: a `PreferenceMemory` for a model without a memory, or the other way around; what a memory cannot
            learn from.
    """
    planner_of = getattr(model, "planner_of", None)
    if isinstance(policy, PreferenceMemory) != (planner_of is not None):
        raise ValueError(
            "policy: expected a PreferenceMemory with a RecurrentMemory, and with it alone, got "
            f"{type(policy).__name__} with {type(model).__name__}"
        )
    item_embeddings = model.item_embedding is not None
    if planner_of is None:
        steps = 1 if pretrain else None  # how many there are is known once passes are packed
        kept = (model.catalog, histories, policy, model.prompt)
        return PassCollator(*kept, steps, seed, supervise_history, item_embeddings, head, jitter)
    for name, switch in (("pretrain", pretrain), ("supervise_history", supervise_history)):
        if switch:
            raise ValueError(f"{name}: expected False with a RecurrentMemory, got True")
    reference = bool(getattr(model, "reference_loss", 0.0))
    return MemoryCollator(planner_of(policy), histories, reference, seed, item_embeddings, head, jitter)


def _likely_most(
    most: NDArray[np.int64], drawn: NDArray[np.int64], probability: float, rows_each: float
) -> NDArray[np.int64]:
    """``(n,)`` rows, of which each draw saves some of ``drawn``: three standard deviations above what is expected.

    They depend on nothing but what is drawn from, and grow with it, so that passes can be packed by them.
    """
    deviation = np.sqrt(probability * (1 - probability) * rows_each * drawn)
    expected = most - probability * drawn
    return np.minimum(most, np.ceil(expected + 3 * deviation).astype(np.int64))


def _drawn_anew(policy: AnyPolicy, seed: int, number: int) -> AnyPolicy:
    """The policy with draws of a batch's own, the same whenever that batch is made."""
    if isinstance(policy, (Experts, RandomItemPatches, ItemDropout)):
        return replace(policy, seed=_draw(seed, number))
    return policy


def _draw(seed: int, number: int) -> int:
    return int(np.random.SeedSequence((seed, number)).generate_state(1)[0])


def _jittered(histories: Histories, one: Pass, jitter: float, seed: int) -> Histories:
    """The histories of a pass, their order blurred anew."""
    if not jitter:
        return histories
    return histories.jittered(jitter, one.ranges[:, 1] + 1, np.random.default_rng((seed, one.number)))


def _batch(layout: PatchLayout, samples: tuple[NDArray[np.int64], NDArray[np.int64]]) -> dict[str, Any]:
    # Trainer counts the supervised tokens of accumulated batches from their labels
    labels = layout.item_labels if layout.logit_labels is None else layout.logit_labels
    return {"layout": layout, "labels": labels, "item_labels": layout.item_labels, "samples": samples}
