# SPDX-License-Identifier: Apache-2.0
"""Training a recommender, epoch by epoch; each draws from a seed of its own, so that a killed run goes on alike."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch

from patchkern.data import Samples
from recipes.baselines import losses
from recipes.baselines.batches import Batch, TrainingHistories
from recipes.baselines.networks import Recommender
from recipes.baselines.runs import Run
from recipes.baselines.scoring import Ranker
from recipes.baselines.settings import Settings


class Training:
    """A model on its way.

    Args:
        histories: what it learns from.
        ranker, samples: how it is validated, after every epoch, by NDCG@20.
        settings: of the training.
        seed: of everything that is drawn.
        bf16: products of the softmax in bfloat16.
    """

    def __init__(
        self,
        model: Recommender,
        histories: TrainingHistories,
        ranker: Ranker,
        samples: Samples,
        settings: Settings,
        *,
        seed: int,
        bf16: bool,
    ) -> None:
        self.model, self.histories, self.ranker, self.samples = model, histories, ranker, samples
        self.settings, self.seed, self.bf16 = settings, seed, bf16
        self.optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=settings.learning_rate,
            betas=(0.9, settings.beta2),
            weight_decay=settings.weight_decay,
        )

    def run(self, run: Run) -> dict[str, Any]:
        """Train, going on from what is kept in the run's folder, where the best weights are kept.

        Returns:
            ``epochs``: loss and validation of each; ``steps``, ``targets``; ``seconds`` and ``cpu_seconds`` of the
            training, ``validation_seconds``.
        """
        record = run.load_state(self.model, self.optimizer) or {
            "epochs": [],
            "steps": 0,
            "targets": 0,
            "seconds": 0.0,
            "cpu_seconds": 0.0,
            "validation_seconds": 0.0,
        }
        while not self._done(record):
            begin = time.perf_counter(), time.process_time()
            loss = self._epoch(record)
            record["seconds"] += time.perf_counter() - begin[0]
            record["cpu_seconds"] += time.process_time() - begin[1]
            begin = time.perf_counter(), 0.0
            found, nll = self.ranker.measure(self.model, self.samples)
            record["validation_seconds"] += time.perf_counter() - begin[0]
            measures = {"loss": loss, "NDCG@20": found.ndcg(20), "HR@20": found.hr(20), "NLL": nll}
            before = [epoch["NDCG@20"] for epoch in record["epochs"]]
            record["epochs"].append(measures)
            if measures["NDCG@20"] > max(before, default=-1.0):
                run.keep_best(self.model)
            run.keep_state(self.model, self.optimizer, record)
            told = ", ".join(f"{name} {value:.4f}" for name, value in measures.items() if name != "loss")
            number = f"{len(record['epochs'])}/{self.settings.epochs}"
            print(f"epoch {number}: loss {loss:.4f}, validation {told}, {record['seconds']:.1f} s", flush=True)
        return record

    def _done(self, record: dict[str, Any]) -> bool:
        values = [epoch["NDCG@20"] for epoch in record["epochs"]]
        waited = len(values) - 1 - values.index(max(values)) if values else 0
        patience = self.settings.patience
        return len(values) >= self.settings.epochs or (patience is not None and waited >= patience)

    def _epoch(self, record: dict[str, Any]) -> float:
        """Learn from every target once; the mean loss."""
        done = len(record["epochs"])
        random = np.random.default_rng([self.seed, done])
        torch.manual_seed(int(random.integers(2**63)))
        count, batches = self.histories.batches(self.settings, random)
        self.model.train()
        total, targets = 0.0, 0
        for number, batch in enumerate(batches):
            self._set_rate(record["steps"], (done + number / count) / self.settings.epochs)
            loss = self._step(batch)
            total, targets = total + loss * len(batch.targets), targets + len(batch.targets)
            record["steps"] += 1
        record["targets"] += targets
        return total / targets

    def _step(self, batch: Batch) -> float:
        batch = Batch(*(tensor.to(self.model.bias.device) for tensor in batch))
        states, vectors = self.model(batch.histories)
        predicting = states.flatten(0, 1)[batch.rows]
        if self.settings.loss == "softmax":
            loss = losses.softmax(predicting, vectors, self.model.bias, batch.targets, bf16=self.bf16)
        else:
            loss = losses.binary(predicting, vectors, self.model.bias, batch.targets)
        self.optimizer.zero_grad()
        loss.backward()
        if self.settings.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.optimizer.step()
        return float(loss.detach())

    def _set_rate(self, steps: int, progress: float) -> None:
        """A linear warm-up, and a cosine from the rate down to its last share."""
        settings = self.settings
        falling = settings.last_rate + (1 - settings.last_rate) * (1 + math.cos(math.pi * progress)) / 2
        warm = min(1.0, (steps + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * warm * falling
