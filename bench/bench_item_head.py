# SPDX-License-Identifier: Apache-2.0
r"""The item head against titles, in training and in recommending, and its product against an exact index.

    python bench/bench_item_head.py                            # minutes
    python bench/bench_item_head.py --parts catalogue --threads 1 2
    python bench/bench_item_head.py --output bench/results/item-head.csv
    python bench/bench_item_head.py --users 2 --rounds 1 --seconds 0 --catalogue_items 500    # does it run at all

"training": every target of the same users of ml-1m (or its stand-in) in one optimisation step, in passes of about
--rows_per_pass rows, of a model as one trains it from scratch. "titles" under item patches with five items as text, as
published; "titles, patches alone" under the policy of "items", which has no text: what is left of the difference is the
head's. Histories are not cut.

"titles, sessions" and "items, sessions" are the same under sessions: as published, and without text. "bare" has no
separators between items either, as the small models with an item head of docs/accuracy.md (``--no_separator``).

"search": the same users' lists of 20, "beam" with 20 beams and "items", which is ``search="items"``; "items, same
prompts" reads the five items as text that the beam reads, and with "stored prompts" both have a `UserCache` that holds
them: what is left is the search itself. "sessions" and "bare": as in training.

"catalogue": one user and 200,000 items. "product" is what follows the forward pass: the scores of all items, made to
log-probabilities, and the 20 best that the user has not seen; "faiss IndexFlatIP" the 20 best inner products, with the
bias as one more number of every vector, no probabilities and nothing left out. "recommend" is the whole call.

Providers take turns in one run, and ratios are taken within a turn. Before any time is printed, the losses, the scores
and the lists must be those of the definition, computed densely.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.append(str(Path(__file__).resolve().parents[1]))  # an installed patchkern comes first

import patchkern as pk
from bench import output
from bench.bench_search import random_titles
from bench.timing import Table, measure
from bench.training_providers import TOLERANCE, all_per_pass, make_model, take_step, whole_users
from bench.workloads import Workload, ml1m
from patchkern.search.filters import ItemFilter
from patchkern.search.item_search import best_items

PARTS = ("training", "search", "catalogue")
PATCHES, PUBLISHED = pk.ItemPatches(0, None), pk.ItemPatches(5, None)
SESSIONS, SESSIONS_PUBLISHED = pk.SessionPatches(5, None, "start", keep_text=0), pk.SessionPatches(5, None)
K = 20


class Reading(NamedTuple):
    """How a provider reads histories."""

    policy: pk.Policy
    head: str  # or the search
    bare: bool = False

    def of(self, workload: Workload) -> Workload:
        """The workload with the prompt that this reads."""
        return workload._replace(prompt=replace(workload.prompt, separator=())) if self.bare else workload

    def __str__(self) -> str:
        return f"{self.policy}{', no separators' if self.bare else ''}"


def make_patched(workload: Workload, args: argparse.Namespace) -> pk.PatchedCausalLM:
    hf_model = make_model(args.hidden_size, args.layers, args.vocab_size)
    model = pk.PatchedCausalLM(hf_model, workload.catalog, workload.prompt, PATCHES, item_head=True)
    with torch.no_grad():
        model.item_head.bias.normal_(generator=torch.Generator().manual_seed(0))  # type: ignore[union-attr]
    return model


def dense_scores(model: pk.PatchedCausalLM, states: Tensor) -> Tensor:
    """``(M, n_items)`` log-probabilities by the definition, from whole logits, vectors and all."""
    head, weight = model.item_head, model.hf_model.get_output_embeddings().weight
    if head is None:
        raise TypeError("model: expected one with an item head")
    tokens, offsets = (
        torch.from_numpy(np.array(x, np.int64)) for x in (model.catalog.token_ids, model.catalog.offsets)
    )
    vectors = F.embedding_bag(tokens, weight, offsets[:-1], mode="mean")
    return (states @ head.transform.weight.T * head.log_temperature.exp() @ vectors.T + head.bias).log_softmax(1)


def states_of(model: pk.PatchedCausalLM, histories: Any, policy: pk.Policy) -> Tensor:
    """``(B, D)`` of the users' last rows, by transformers, from the rows of each user alone."""
    plain = copy.deepcopy(model.hf_model).eval()
    plain.set_attn_implementation("sdpa")
    found = []
    with torch.no_grad():
        for history in pk.Histories.coerce(histories):
            layout = pk.build_layout(model.catalog, [history.tolist()], policy, model.prompt, head="items")
            found.append(plain.model(inputs_embeds=model.embed(layout)[None]).last_hidden_state[0, -1])
    return torch.stack(found)


# ------------------------------------------------------------------ training


def training(table: Table, args: argparse.Namespace) -> None:
    workload = ml1m(args.vocab_size)
    histories, ranges = whole_users(workload, args.users, 0, args.most_items)
    count = int((ranges[:, 1] - ranges[:, 0] + 1).sum())
    everybody = workload.histories
    of_all = np.stack([np.full(len(everybody), 3), everybody.lengths - 1], axis=1)
    providers = {
        "titles": Reading(PUBLISHED, "titles"),
        "titles, patches alone": Reading(PATCHES, "titles"),
        "titles, patches alone, bare": Reading(PATCHES, "titles", bare=True),
        "items": Reading(PATCHES, "items"),
        "items, bare": Reading(PATCHES, "items", bare=True),
        "titles, sessions": Reading(SESSIONS_PUBLISHED, "titles"),
        "items, sessions": Reading(SESSIONS, "items"),
        "items, sessions, bare": Reading(SESSIONS, "items", bare=True),
    }
    calls: dict[str, Callable[[], object]] = {}
    for name, reading in providers.items():
        read = reading.of(workload)
        if reading.head == "items":
            check_loss(read, reading.policy, args)
        model = make_patched(read, args)
        if reading.head == "titles":
            model.item_head = None
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        batch = (read, histories, ranges, reading.policy, args.rows_per_pass, reading.head)
        calls[name] = partial(one_step, model, optimizer, *batch)
    timing = measure(calls, args.seconds, args.rounds, 100)
    config = {"data": workload.name, "users": args.users, "targets": count, "most_items": args.most_items}
    config |= {name: getattr(args, name) for name in ("hidden_size", "layers", "vocab_size", "rows_per_pass")}
    for name, reading in providers.items():
        own, prompt = config | {"policy": str(reading)}, reading.of(workload).prompt
        rows = pk.training_rows(workload.catalog, everybody, reading.policy, prompt, of_all, head=reading.head).sum()
        rows_each = float(rows / np.maximum(everybody.lengths - 3, 0).sum())
        table.add(name, "training", "rows per target, all users", "rows", (rows_each,) * 3, own)
        p20, p50, p80 = (count / seconds for seconds in timing.quantiles(name))
        table.add(name, "training", "speed", "targets/s", (p80, p50, p20), own)
    for slow, fast in (
        ("titles", "items"),
        ("titles, patches alone", "items"),
        ("titles", "items, bare"),
        ("titles, patches alone, bare", "items, bare"),
        ("titles, sessions", "items, sessions"),
        ("titles, sessions", "items, sessions, bare"),
    ):
        table.add(fast, "training", f"speed-up over {slow}", "x", timing.ratio(slow, fast), config)


def one_step(model: pk.PatchedCausalLM, optimizer: torch.optim.Optimizer, *batch: Any) -> float:
    losses, _ = take_step(model, optimizer, all_per_pass(model, *batch))
    return sum(losses)


def check_loss(workload: Workload, policy: pk.Policy, args: argparse.Namespace) -> None:
    model = make_patched(workload, args).eval()
    (history,), (target,) = workload.samples(1)[0].latest(20), workload.samples(1)[1]
    users = [[*history.tolist(), target]]
    ranges = [[len(history) - 2, len(history)]]
    layout = pk.build_training_layout(workload.catalog, users, policy, workload.prompt, ranges, head="items")
    before = [users[0][:position] for position in range(len(history) - 2, len(history) + 1)]
    labels = workload.catalog.index_of([users[0][len(part)] for part in before])
    with torch.no_grad():
        got = float(model(layout).loss)
        scores = dense_scores(model, states_of(model, before, policy))
        expected = float(F.nll_loss(scores, torch.from_numpy(labels.astype(np.int64))))
    if not np.isclose(got, expected, rtol=TOLERANCE, atol=0):
        sys.exit(f"training: expected a loss of {expected} under {policy}, got {got}; nothing was timed")


# ------------------------------------------------------------------ search


def search(table: Table, args: argparse.Namespace) -> None:
    workload = ml1m(args.vocab_size)
    histories = workload.samples(args.search_users)[0].latest(100)
    text, patches, sessions = pk.ItemPatches(5, 100), pk.ItemPatches(0, 100), replace(SESSIONS, max_items=100)
    providers = {
        "beam": Reading(text, "beam"),
        "items": Reading(patches, "items"),
        "items, same prompts": Reading(text, "items"),
        "items, bare": Reading(patches, "items", bare=True),
        "beam, stored prompts": Reading(text, "beam"),
        "items, stored prompts": Reading(patches, "items"),
        "beam, sessions": Reading(replace(SESSIONS_PUBLISHED, max_items=100), "beam"),
        "items, sessions": Reading(sessions, "items"),
        "items, sessions, bare": Reading(sessions, "items", bare=True),
    }
    calls: dict[str, Callable[[], object]] = {}
    for name, reading in providers.items():
        model = make_patched(reading.of(workload), args).eval()
        if reading.head == "items":
            check_lists(model, histories.take(np.arange(min(4, len(histories)))), reading.policy, "search")
        cache = pk.UserCache(model, 1 << 28) if "stored" in name else None
        calls[name] = partial(model.recommend, histories, reading.policy, K, K, reading.head, user_cache=cache)
    timing = measure(calls, args.seconds, args.rounds, 100)
    config = {"data": workload.name, "users": len(histories), "k": K, "items": len(workload.catalog)}
    config |= {name: getattr(args, name) for name in ("hidden_size", "layers", "vocab_size")}
    for name, reading in providers.items():
        p20, p50, p80 = (len(histories) / seconds for seconds in timing.quantiles(name))
        table.add(name, "search", "speed", "users/s", (p80, p50, p20), config | {"policy": str(reading)})
    for slow, fast in (
        ("beam", "items"),
        ("beam", "items, same prompts"),
        ("beam", "items, bare"),
        ("beam, stored prompts", "items, stored prompts"),
        ("beam, sessions", "items, sessions"),
        ("beam", "items, sessions"),
        ("beam, sessions", "items, sessions, bare"),
        ("beam", "items, sessions, bare"),
    ):
        table.add(fast, "search", f"speed-up over {slow}", "x", timing.ratio(slow, fast), config)


def check_lists(model: pk.PatchedCausalLM, histories: pk.Histories, policy: pk.Policy, part: str) -> None:
    expected = dense_scores(model, states_of(model, histories, policy)).detach()
    k = min(K, len(model.catalog))
    for history, user, row in zip(
        histories, model.recommend(histories, policy, k, search="items"), expected, strict=True
    ):
        places = torch.from_numpy(model.catalog.index_of([item for item, _ in user]).astype(np.int64))
        scores = torch.tensor([score for _, score in user], dtype=row.dtype)
        best = row.topk(k).values
        if not (
            torch.allclose(scores, best, rtol=0, atol=1e-3) and torch.allclose(row[places], best, rtol=0, atol=1e-3)
        ):
            where = f"{policy}, after {len(history)} items"
            sys.exit(f"{part}: other items than the definition's under {where}; nothing was timed")


# ------------------------------------------------------------------ one user, many items


def catalogue(table: Table, args: argparse.Namespace) -> None:
    plain = ml1m(args.vocab_size)
    titles = random_titles(args.catalogue_items, np.unique(plain.catalog.token_ids), longest=11)
    histories = pk.Histories(np.random.default_rng(0).integers(0, len(titles), 100), [0, 100])
    workload = Workload("random titles", titles, plain.prompt, histories)
    model = make_patched(workload, args).eval()
    check_lists(model, histories, PATCHES, "catalogue")
    state = states_of(model, histories, PATCHES)
    unseen = ItemFilter(titles, histories, None, exclude_seen=True)
    everybody = np.zeros(1, np.int64)
    k = min(K, len(titles) - 100)

    def product() -> object:
        with torch.no_grad():
            return best_items(model.item_scores(state), everybody, unseen, None, k, normalize=False)

    calls: dict[str, Callable[[], object]] = {
        "product": product,
        "recommend": lambda: model.recommend(histories, PATCHES, k, search="items", exclude_seen=True),
    }
    peer = exact_index(model, state, k)
    if peer is not None:
        calls["faiss IndexFlatIP"] = peer
    config = {"items": len(titles), "users": 1, "k": k, "history": 100, "policy": str(PATCHES)}
    config |= {name: getattr(args, name) for name in ("hidden_size", "layers", "vocab_size")}
    for threads in args.threads:
        torch.set_num_threads(threads)
        if peer is not None:
            importlib.import_module("faiss").omp_set_num_threads(threads)
        timing = measure(calls, args.seconds, args.rounds)
        for name in calls:
            p20, p50, p80 = (1e3 * seconds for seconds in timing.quantiles(name))
            table.add(name, "catalogue", "time", "ms", (p20, p50, p80), config)
        if peer is not None:
            ratio = timing.ratio("product", "faiss IndexFlatIP")
            table.add("product", "catalogue", "time / faiss IndexFlatIP", "x", ratio, config)


def exact_index(model: pk.PatchedCausalLM, state: Tensor, k: int) -> Callable[[], object] | None:
    """A call that finds the k best items; None where faiss is not installed."""
    try:
        faiss: Any = importlib.import_module("faiss")
    except ImportError:
        print("faiss IndexFlatIP: not run, faiss-cpu is not installed", flush=True)
        return None
    head = model.item_head
    if head is None:
        raise TypeError("model: expected one with an item head")
    with torch.no_grad():
        vectors = head.vectors(model.hf_model.get_output_embeddings().weight, model.item_embedding)
        searched = torch.cat([vectors, head.bias[:, None]], dim=1).numpy()
        query = torch.cat([head.queries(state), state.new_ones(1, 1)], dim=1).numpy()
    index = faiss.IndexFlatIP(searched.shape[1])
    index.add(np.ascontiguousarray(searched))
    scores = dense_scores(model, state).detach()[0]
    found = torch.from_numpy(index.search(query, k)[1][0])
    if not torch.allclose(scores[found], scores.topk(k).values, rtol=0, atol=1e-3):
        sys.exit("catalogue: faiss finds other items; nothing was timed")
    return lambda: index.search(query, k)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--users", type=int, default=8, help="whose targets are learned in one step")
    parser.add_argument("--most_items", type=int, default=300, help="in training: leave out users who have more")
    parser.add_argument("--search_users", type=int, default=64)
    parser.add_argument("--rows_per_pass", type=int, default=4096)
    parser.add_argument("--catalogue_items", type=int, default=200_000)
    parser.add_argument("--vocab_size", type=int, default=4096, help="of a tokenizer fitted to the titles")
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="more rounds while there is time")
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[1, 2], help="of torch; the first for training, search"
    )
    output.add_option(parser, "item-head.csv")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads[0])
    table = Table(output.prepare(args.output, "item-head.csv"))
    parts = {"training": training, "search": search, "catalogue": catalogue}
    for part in args.parts:
        torch.set_num_threads(args.threads[0])
        parts[part](table, args)
        table.write()


if __name__ == "__main__":
    main()
