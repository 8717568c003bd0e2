# SPDX-License-Identifier: Apache-2.0
"""What a model in training is worth: its loss and its recommendations on samples that it does not learn from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from patchkern.batch.arguments import check_count
from patchkern.batch.histories import Histories
from patchkern.batch.policy_kinds import AnyPolicy, cut_every_of
from patchkern.batch.sample_layout import build_layout
from patchkern.data.samples import Samples
from patchkern.evaluation.metrics import Evaluation, evaluate
from patchkern.search.arguments import known_histories
from patchkern.search.filters import ItemFilter
from patchkern.search.prompts import vectors_of
from patchkern.training.modes import in_mode
from patchkern.training.protocol import TrainableModel

KS = (10, 20)
"""List lengths that are counted."""


@dataclass(frozen=True)
class Measured:
    """What a model did on some of the samples.

    Attributes:
        loss: summed over their supervised tokens, or items.
        num_tokens: how many those are.
        evaluation: of the recommendations, by item.
    """

    loss: float
    num_tokens: int
    evaluation: Evaluation


class Validation:
    """Samples to validate a model on, and how to recommend for them.

    Args:
        model: what ``options`` are tried on, with no user at all.
        histories: the users' items, oldest first.
        samples: ``(users, positions)``, ``(S,)`` int64 each, as in `Histories.before`.
        policy: how histories are compressed.
        limit: of more samples take so many, evenly spread over them; None: all.
        options: for `PatchedCausalLM.recommend`, but for the policy, ``k`` and ``unknown``; by default items already
            seen are excluded. With ``search="items"`` the loss is that of the item head, per item.

    Raises:
        TypeError, ValueError: no samples, a sample outside its history, an option that `recommend` does not take, or a
            user for whom it would leave too few items.
    """

    def __init__(
        self,
        model: TrainableModel,
        histories: Histories,
        samples: tuple[NDArray[np.int64], NDArray[np.int64]],
        policy: AnyPolicy,
        limit: int | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        users, positions = Samples.of(samples, histories, "eval_samples")
        if users.size == 0:
            raise ValueError("eval_samples: expected at least one, got none")
        if limit is not None:
            check_count("eval_limit", limit, minimum=1)
            users, positions = Samples(users, positions).spread(limit)
        fixed = {"policy", "k", "unknown"}.intersection(options or {})
        if fixed:
            raise ValueError(f"eval_options: expected none that the training decides, got {', '.join(sorted(fixed))}")
        self.histories, self.users, self.positions, self.policy = histories, users, positions, policy
        self.k = min(max(KS), len(model.catalog))
        self.options = {"exclude_seen": True, **(options or {})}
        self.head = "items" if self.options.get("search") == "items" else "titles"
        num_beams = self.options.get("num_beams", max(KS))
        if num_beams < self.k and self.head == "titles":
            raise ValueError(f"eval_options: num_beams: expected at least k={self.k}, got {num_beams}")
        # what would fail in the middle of the training fails now
        self._recommend(model, np.zeros(0, np.int64))
        names = users.tolist()
        every, _ = known_histories(model.catalog, histories.before(users, positions), "error", names)
        model.catalog.index_of(histories.at(users, positions), "eval_samples")
        if self.options.get("short") != "allow":
            allowed, exclude_seen = self.options.get("allowed_items"), self.options["exclude_seen"]
            ItemFilter(model.catalog, every, allowed, exclude_seen, names).check(self.k)

    def __len__(self) -> int:
        return int(self.users.size)

    def __getitem__(self, number: int) -> tuple[int, int]:
        """User and position of a sample."""
        return int(self.users[number]), int(self.positions[number])

    def _recommend(self, model: TrainableModel, samples: NDArray[np.int64]) -> list[list[tuple[Any, float]]]:
        histories = self.histories.before(self.users[samples], self.positions[samples])
        return model.recommend(histories, self.policy, self.k, **self.options)

    def measure(self, model: TrainableModel, samples: Iterable[int], batch_size: int) -> Measured:
        """Loss and recommendations on some of the samples; the model is left in the mode that it was in.

        Args:
            model: of the catalogue that the histories' items are from.
            samples: their numbers.
            batch_size: samples whose loss is computed at once; those searched at once are an option of `recommend`.
        """
        chosen = np.fromiter(samples, np.int64)
        targets = self.histories.at(self.users[chosen], self.positions[chosen])
        loss, num_tokens = 0.0, 0
        with in_mode(model, training=False):
            for start in range(0, chosen.size, batch_size):
                part = slice(start, start + batch_size)
                users, positions = self.users[chosen[part]], self.positions[chosen[part]]
                histories = self.histories.before(users, positions, self.policy.max_items, cut_every_of(self.policy))
                layout = build_layout(
                    model.catalog, histories, self.policy, model.prompt, targets[part], head=self.head
                )
                labels = layout.item_labels if self.head == "items" else layout.logit_labels
                with torch.no_grad():
                    tokens = 0 if labels is None else labels.numel()
                    vectors = vectors_of(model, layout, histories, self.policy)
                    loss += float(model(layout, vectors=vectors).loss) * tokens
                num_tokens += tokens
            lists = self._recommend(model, chosen)
        return Measured(loss, num_tokens, evaluate(lists, targets, KS, catalog=model.catalog))


def summary(parts: Iterable[Measured]) -> dict[str, float]:
    """``loss``, ``HR@k``, ``NDCG@k`` and ``MRR@k`` over the samples of all parts."""
    parts = list(parts)
    ranks, ambiguous = (
        np.concatenate([getattr(part.evaluation, name) for part in parts]) for name in ("ranks", "ambiguous")
    )
    whole = Evaluation("strict", KS, ranks, ambiguous)
    result = {"loss": sum(part.loss for part in parts) / sum(part.num_tokens for part in parts)}
    return result | {name: whole.estimate(values).mean for name, values in whole.per_sample().items()}
