# SPDX-License-Identifier: Apache-2.0
"""Ways to a training step: the obvious one, patchkern's, and with every target of whole users."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import patchkern as pk
from bench.workloads import Workload
from patchkern.batch.policy_kinds import Level
from patchkern.training.passes import cut_to_passes

# targets of a user in one pass: the slow way and the fast one
PROVIDERS = {"one": ("reference", "patchkern"), "all": ("one per pass", "all per pass")}
TOLERANCE = 1e-4  # of losses and gradient norms of two providers, relative


def make_model(hidden_size: int, layers: int, vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden_size // 64),
        num_key_value_heads=max(1, hidden_size // 256),
        max_position_embeddings=131_072,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def take_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, losses: Iterable[Tensor]
) -> tuple[list[float], float]:
    """The losses, one for each pass, of one optimisation step, and the norm of its gradient."""
    values = []
    for loss in losses:
        loss.backward()
        values.append(loss.item())
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.3)
    optimizer.step()
    optimizer.zero_grad()
    return values, norm.item()


def reference_batch(
    model: LlamaForCausalLM,
    workload: Workload,
    histories: pk.Histories,
    targets: np.ndarray | None,
    policy: pk.Policy,
) -> tuple[Tensor, Tensor, Tensor]:
    """Item by item, padded on the right: embeddings (B, L, D), attention mask (B, L) and labels (B, L)."""
    catalog, prompt = workload.catalog, workload.prompt
    device = model.device
    kept = histories.latest(policy.max_items)
    levels = policy.levels(kept)
    titles = [[catalog.tokens(item).tolist() for item in catalog.index_of(history).tolist()] for history in kept]
    responses: list[list[int]] = [[] for _ in range(len(kept))]
    if targets is not None:
        answers_of = catalog.index_of(targets).tolist()
        responses = [[*catalog.tokens(item).tolist(), *prompt.response_end] for item in answers_of]

    # One look-up per batch: one per title would make the backward pass a dense (V, D) gradient for each of them.
    runs: list[Sequence[int]] = [prompt.prefix, prompt.separator, prompt.suffix]
    runs += [title for history in titles for title in history] + responses
    ids = torch.tensor([token for run in runs for token in run], device=device)
    embedded = iter(model.get_input_embeddings()(ids).split([len(run) for run in runs]))
    prefix, separator, suffix = next(embedded), next(embedded), next(embedded)
    rows = [[next(embedded) for _ in history] for history in titles]
    answers = [next(embedded) for _ in responses]

    sequences, labels = [], []
    for user, history in enumerate(rows):
        level = levels[kept.offsets[user] : kept.offsets[user + 1]]
        parts = [prefix]
        session: list[Tensor] = []
        for i, title in enumerate(history):
            last = i + 1 == len(history)
            if level[i] == Level.TEXT:
                parts.append(title)
            else:
                session.append(title.mean(dim=0))
                if not last and level[i + 1] == Level.JOIN:
                    continue
                parts.append(torch.stack(session).mean(dim=0, keepdim=True))
                session = []
            if not last:
                parts.append(separator)
        sequences.append(torch.cat([*parts, suffix, answers[user]]))
        unlabelled = len(sequences[-1]) - len(responses[user])
        labels.append(torch.tensor([-100] * unlabelled + responses[user]))
    inputs = nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    wanted = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    mask = (torch.arange(inputs.shape[1]) < lengths[:, None]).long()
    return inputs, mask.to(device), wanted.to(device)


def reference_loss(
    model: LlamaForCausalLM, workload: Workload, histories: pk.Histories, targets: np.ndarray, policy: pk.Policy
) -> Tensor:
    """Padded, and all logits."""
    inputs, mask, wanted = reference_batch(model, workload, histories, targets, policy)
    logits = model(inputs_embeds=inputs, attention_mask=mask, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), wanted[:, 1:].flatten(), ignore_index=-100)


def patchkern_loss(
    model: pk.PatchedCausalLM, workload: Workload, histories: pk.Histories, targets: np.ndarray, policy: pk.Policy
) -> Tensor:
    return model(pk.build_layout(workload.catalog, histories, policy, workload.prompt, targets)).loss


def whole_users(
    workload: Workload, count: int, seed: int, most_items: int | None = None
) -> tuple[pk.Histories, np.ndarray]:
    """Random users and the range of their targets: every interaction with at least 3 before it."""
    lengths = workload.histories.lengths
    short = np.flatnonzero(lengths <= (lengths.max() if most_items is None else most_items))
    histories = workload.histories.take(np.random.default_rng(seed).choice(short, count, replace=False))
    return histories, np.stack([np.full(count, 3), histories.lengths - 1], axis=1)


def every_sample(histories: pk.Histories, ranges: np.ndarray) -> tuple[pk.Histories, np.ndarray]:
    """A sample for each target: the history before it, and the target."""
    users, positions = every_target(ranges)
    return histories.before(users, positions), histories.at(users, positions)


def every_target(ranges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Users and positions of the targets in these ranges, one range for each user."""
    users = np.repeat(np.arange(len(ranges)), np.maximum(ranges[:, 1] - ranges[:, 0] + 1, 0))
    return users, np.concatenate([np.arange(first, last + 1) for first, last in ranges])


def sample_rows(
    workload: Workload, histories: pk.Histories, targets: np.ndarray, policy: pk.Policy
) -> tuple[np.ndarray, np.ndarray]:
    """``(S,)`` rows of every sample, and those of them that are supervised."""
    catalog, prompt = workload.catalog, workload.prompt
    answers = catalog.lengths[catalog.index_of(targets)] + len(prompt.response_end)
    return pk.row_counts(catalog, histories, policy, prompt) + answers, answers


def in_passes(rows: np.ndarray, rows_per_pass: int) -> list[np.ndarray]:
    """Consecutive samples or runs of about so many rows."""
    return np.split(np.arange(rows.size), np.flatnonzero(np.diff(rows.cumsum() // rows_per_pass)) + 1)


def one_per_pass(
    model: pk.PatchedCausalLM,
    workload: Workload,
    histories: pk.Histories,
    ranges: np.ndarray,
    policy: pk.Policy,
    rows_per_pass: int,
) -> Iterator[Tensor]:
    before, targets = every_sample(histories, ranges)
    rows, answers = sample_rows(workload, before, targets, policy)
    for part in in_passes(rows, rows_per_pass):
        layout = pk.build_layout(workload.catalog, before.take(part), policy, workload.prompt, targets[part])
        yield model(layout, num_items_in_batch=int(answers.sum())).loss


def all_per_pass(
    model: pk.PatchedCausalLM,
    workload: Workload,
    histories: pk.Histories,
    ranges: np.ndarray,
    policy: pk.Policy,
    rows_per_pass: int,
    head: str = "titles",
) -> Iterator[Tensor]:
    catalog, prompt = workload.catalog, workload.prompt

    def count_rows(users: np.ndarray, ranges: np.ndarray) -> np.ndarray:
        return pk.training_rows(catalog, histories.take(users), policy, prompt, ranges, head=head)

    # as in training: the targets of a long user are several runs, each with a trunk of its own
    users, positions = every_target(ranges)
    supervised = positions.size
    if head == "titles":
        answers = catalog.lengths[catalog.index_of(histories.at(users, positions))]
        supervised = int((answers + len(prompt.response_end)).sum())
    longest = int(count_rows(users, np.stack([positions, positions], axis=1)).max())
    cut = np.array(cut_to_passes(users, positions, count_rows, max(rows_per_pass, longest)))
    users, runs, rows = cut[:, 0], cut[:, 1:3], cut[:, 3]
    for part in in_passes(rows, rows_per_pass):
        layout = pk.build_training_layout(catalog, histories.take(users[part]), policy, prompt, runs[part], head=head)
        yield model(layout, num_items_in_batch=supervised).loss


# Each yields shares of a step's loss, one for each pass.
PASSES: dict[str, Callable[..., Iterator[Tensor]]] = {
    "reference": lambda *batch, **_: iter([reference_loss(*batch)]),
    "patchkern": lambda *batch, **_: iter([patchkern_loss(*batch)]),
    "one per pass": one_per_pass,
    "all per pass": all_per_pass,
}


def rows_per_target(workload: Workload, policy: pk.Policy) -> dict[str, float]:
    """Of all users, none left out."""
    histories = workload.histories
    ranges = np.stack([np.full(len(histories), 3), histories.lengths - 1], axis=1)
    together = pk.training_rows(workload.catalog, histories, policy, workload.prompt, ranges).sum()
    alone = 0
    for users in np.array_split(np.arange(len(histories)), 100):  # the samples of all would be gigabytes
        samples = every_sample(histories.take(users), ranges[users])
        alone += sample_rows(workload, *samples, policy)[0].sum()
    count = np.maximum(histories.lengths - 3, 0).sum()
    return {"one per pass": float(alone / count), "all per pass": float(together / count)}
