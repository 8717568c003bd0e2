# SPDX-License-Identifier: Apache-2.0
r"""The same users through vLLM as text, items and sessions, side by side in one run. In vLLM's environment, with it:

    .venv-vllm/bin/python bench/bench_vllm.py                    # minutes; make test-vllm makes the environment
    .venv-vllm/bin/python bench/bench_vllm.py --output bench/results/vllm.csv
    .venv-vllm/bin/python bench/bench_vllm.py --users 4 --rounds 1 --layers 1      # does it run at all

"first visit": users of ml-1m (or its stand-in) with --max_items items of history each, whom vLLM has not seen: nothing
is in the prefix cache. One token and its 20 best log-probabilities are asked for. "text" is token ids of titles, "item
tokens" ids with one for every item but the latest five, "item rows" the same prompts as embeddings; "session rows"
sessions of five as embeddings, "session slots" as rows of the model's own table, written before each call, for ids like
those of items. "item tokens, title" goes on to the title that is most probable token by token, with masks over the
catalogue.

"next visit": one item more, with the prompts of the visit before in vLLM's prefix cache, where histories are cut to
--max_items as they come or 20 at a time (cut_every). "patchkern" is one forward pass over the same prompts, packed, in
this library alone.

Times are those of one core's own work, so that other programs do not count. Providers take turns; ratios are taken
within a turn. Before any time is printed, all ways of the same prompt must give
the log-probabilities of `PatchedCausalLM` within 1e-5.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))  # an installed patchkern comes first

import patchkern as pk
from bench import output
from bench.timing import Table, measure
from bench.workloads import Workload, ml1m
from patchkern.models.scratch import fit_tokenizer, scratch_model
from patchkern.serving.vllm.export import export_model
from patchkern.serving.vllm.item_tokens import item_token_ids
from patchkern.serving.vllm.prompt_rows import PromptRows
from patchkern.serving.vllm.requests import LOGITS_PROCESSOR, request_args
from patchkern.serving.vllm.served import Served, read_served

VOCABULARY = 2048
TOLERANCE = 1e-5
Prompts = list[dict[str, Any]]


class Engine:
    """vLLM in this process, over an exported folder."""

    def __init__(self, folder: Path, longest: int) -> None:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ["OMP_NUM_THREADS"] = "1"
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # so that slots can be written without a second process
        from vllm import LLM, SamplingParams

        self._params = SamplingParams
        self._llm = LLM(
            str(folder),
            dtype="float32",
            max_model_len=longest,
            block_size=32,
            enable_prompt_embeds=True,
            logits_processors=[LOGITS_PROCESSOR],
            logprobs_mode="processed_logits",
            max_logprobs=VOCABULARY,
        )

    def first_tokens(self, prompts: Prompts, logprobs: int = 20) -> list[Any]:
        """The outputs of one token each."""
        params = self._params(temperature=0.0, max_tokens=1, logprobs=logprobs, detokenize=False)
        return list(self._llm.generate(prompts, params, use_tqdm=False))

    def titles(self, prompts: Prompts, served: Served, depth: int) -> list[Any]:
        end = list(served.prompt.response_end)
        params = self._params(
            temperature=0.0,
            max_tokens=depth,
            logprobs=1,
            detokenize=False,
            stop_token_ids=end,
            extra_args=request_args(served),
        )
        return list(self._llm.generate(prompts, params, use_tqdm=False))

    def forget(self) -> None:
        self._llm.reset_prefix_cache()

    def write_slots(self, rows: Tensor) -> None:
        """Put rows where those of the first items are."""

        def write(model: Any) -> None:
            model.model.embed_tokens.items.weight.data[: len(rows)] = rows

        self._llm.apply_model(write)


def make_model(workload: Workload, args: argparse.Namespace, folder: Path) -> pk.PatchedCausalLM:
    """A small model with random weights that are far from uniform, exported to ``folder``."""
    tokenizer = fit_tokenizer(workload.catalog.titles or ["no titles"], VOCABULARY)
    hf_model = scratch_model(
        tokenizer,
        hidden_size=args.hidden_size,
        intermediate_size=3 * args.hidden_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden_size // 64,
        tie_word_embeddings=False,
        vocab_size=VOCABULARY,
        initializer_range=0.05,
    )
    model = pk.PatchedCausalLM(hf_model, workload.catalog, workload.prompt, pk.TextOnly()).eval()
    model.save_pretrained(folder / "run", tokenizer=tokenizer)
    export_model(folder / "run", folder / "served")
    return model


def as_slots(layout: pk.PatchLayout, rows: Tensor, vocab_size: int) -> tuple[Prompts, Tensor]:
    """Prompts whose patches are ids of slots, by content, and the rows of those slots."""
    hashes, patch = pk.row_hashes(layout), layout.lo.numpy() >= 0
    _, first, slot = np.unique(hashes[patch], return_index=True, return_inverse=True)
    ids = -1 - layout.lo.numpy().astype(np.int64)
    ids[patch] = vocab_size + slot
    users = np.split(ids, layout.cu_seqlens.numpy()[1:-1])
    return [{"prompt_token_ids": user.tolist()} for user in users], rows[torch.from_numpy(patch)][first]


def check(model: pk.PatchedCausalLM, layout: pk.PatchLayout, outputs: list[Any]) -> None:
    """Exit unless an engine's log-probabilities over the vocabulary are the model's."""
    with torch.no_grad():
        expected = model(layout).logits.log_softmax(-1)
    for user, one in enumerate(outputs):
        found = one.outputs[0].logprobs[0]
        got = torch.tensor([found[token].logprob for token in range(VOCABULARY)])
        error = float((got - expected[user]).abs().max())
        if not error < TOLERANCE:
            sys.exit(f"vLLM's log-probabilities are off by {error} for user {user}")


def first_visit(
    workload: Workload, model: pk.PatchedCausalLM, served: Served, engine: Engine, rows: PromptRows, args: Any
) -> tuple[dict[str, Callable[[], object]], dict[str, float]]:
    """Calls, and the rows of a user in each."""
    histories, _ = workload.samples(4 * args.users)
    long_enough = np.flatnonzero(histories.lengths >= args.max_items)
    histories = histories.take(long_enough[: args.users])
    policies: dict[str, pk.Policy] = {
        "text": pk.TextOnly(args.max_items),
        "item tokens": pk.ItemPatches(5, args.max_items),
        "session rows": pk.SessionPatches(5, args.max_items),
    }
    layouts = {
        name: pk.build_layout(workload.catalog, histories, policy, workload.prompt) for name, policy in policies.items()
    }
    prompts: dict[str, Prompts] = {
        name: [{"prompt_token_ids": ids.tolist()} for ids in item_token_ids(layout, workload.catalog, VOCABULARY)]
        for name, layout in layouts.items()
        if name != "session rows"
    }
    layouts["item rows"] = layouts["item tokens"]
    for name in ("item rows", "session rows"):
        prompts[name] = [{"prompt_embeds": one} for one in rows(layouts[name])]
    layouts["session slots"] = layouts["session rows"]
    prompts["session slots"], slots = as_slots(
        layouts["session rows"], torch.cat(rows(layouts["session rows"])), VOCABULARY
    )
    items = pk.item_table(workload.catalog, rows.weight).rows[: len(slots)]

    def visit(name: str, logprobs: int = 20) -> list[Any]:
        engine.forget()
        return engine.first_tokens(prompts[name], logprobs)

    def visit_by_slots(logprobs: int = 20) -> list[Any]:
        engine.write_slots(slots)
        found = visit("session slots", logprobs)
        engine.write_slots(items)
        return found

    def titles() -> list[Any]:
        engine.forget()
        return engine.titles(prompts["item tokens"], served, int(workload.catalog.lengths.max()) + 1)

    def packed(name: str) -> Tensor:
        with torch.no_grad():
            return model(layouts[name]).logits

    calls: dict[str, Callable[[], object]] = {
        name: partial(visit, name) for name in ("text", "item tokens", "item rows", "session rows")
    }
    for name in calls:
        check(model, layouts[name], visit(name, VOCABULARY))
    check(model, layouts["session slots"], visit_by_slots(VOCABULARY))
    calls["session slots"] = visit_by_slots
    calls["item tokens, title"] = titles
    for name in ("text", "item tokens", "session rows"):
        calls[f"patchkern, {name}"] = partial(packed, name)
    counts = {name: layout.num_rows / args.users for name, layout in layouts.items()}
    counts |= {f"patchkern, {name}": counts[name] for name in policies} | {"item tokens, title": counts["item tokens"]}
    return calls, counts


def next_visit(
    workload: Workload, engine: Engine, args: argparse.Namespace, table: Table, config: dict[str, Any]
) -> None:
    """Time and cached rows of a prompt one item after another that vLLM has seen."""
    whole = workload.histories.take(np.flatnonzero(workload.histories.lengths >= args.max_items + 40)[: args.users])
    users = np.arange(len(whole))
    for every in (1, 20):
        policy = pk.ItemPatches(5, args.max_items, cut_every=every)
        prompts = []
        for more in range(args.rounds + 2):
            before = whole.before(users, np.full(len(whole), args.max_items + 5 + more))
            layout = pk.build_layout(workload.catalog, before, policy, workload.prompt)
            ids = item_token_ids(layout, workload.catalog, VOCABULARY)
            prompts.append([{"prompt_token_ids": user.tolist()} for user in ids])
        engine.forget()
        visits, cached, seconds = iter(prompts), [], []
        engine.first_tokens(next(visits))
        for visit in visits:
            begin = time.process_time()
            outputs = engine.first_tokens(visit)
            seconds.append(time.process_time() - begin)
            cached.append(
                sum(one.num_cached_tokens for one in outputs) / sum(len(one.prompt_token_ids) for one in outputs)
            )
        rates = np.quantile(len(whole) / np.array(seconds), (0.2, 0.5, 0.8))
        provider = f"item tokens, cut_every={every}"
        table.add(provider, "next visit", "users", "1/s", tuple(rates.tolist()), config)
        shares = np.quantile(cached, (0.2, 0.5, 0.8))
        table.add(provider, "next visit", "rows in the prefix cache", "share", tuple(shares.tolist()), config)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n", 1)[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--users", type=int, default=32)
    parser.add_argument("--max_items", type=int, default=100, help="items of a history")
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    output.add_option(parser, "vllm.csv")
    args = parser.parse_args(argv)
    if importlib.util.find_spec("vllm") is None:
        print("vLLM is not installed here; make test-vllm makes an environment that has it")
        return
    path = output.prepare(args.output, "vllm.csv")
    torch.set_num_threads(1)
    workload = ml1m(VOCABULARY)
    with tempfile.TemporaryDirectory() as temporary:
        model = make_model(workload, args, Path(temporary))
        folder = Path(temporary) / "served"
        served, rows = read_served(folder), PromptRows(folder)
        engine = Engine(folder, longest=4096)
        table = Table(path)
        calls, counts = first_visit(workload, model, served, engine, rows, args)
        shape = {"users": args.users, "items": args.max_items, "hidden": args.hidden_size, "layers": args.layers}
        config = {"data": workload.name, "vocabulary": VOCABULARY, **shape}
        timing = measure(calls, 0, args.rounds, args.rounds, clock=time.process_time)
        for name in calls:
            p20, p50, p80 = timing.quantiles(name)
            rates = (args.users / p80, args.users / p50, args.users / p20)
            table.add(name, "first visit", "users", "1/s", rates, {**config, "rows": counts[name]})
            if name not in ("text", "patchkern, text"):
                base = "patchkern, text" if name.startswith("patchkern") else "text"
                table.add(name, "first visit", f"users of {base}", "x", timing.ratio(base, name), config)
        next_visit(workload, engine, args, table, config)
        table.write()


if __name__ == "__main__":
    main()
