# SPDX-License-Identifier: Apache-2.0
"""A small beam search over the catalogue, against the constrained beam search of transformers."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import patchkern as pk
from bench.suites.entry import Entry, paired
from bench.workloads import Workload

pytest.importorskip("transformers")
from bench.search_peers import by_generate, plain_model, right_and_no_better
from bench.training_providers import make_model

USERS, WIDTH = 4, 5


class Searches:
    """Each gives every user's scores, best first."""

    def __init__(self, workload: Workload) -> None:
        model = pk.PatchedCausalLM(make_model(64, 2, 4096).eval(), workload.catalog, workload.prompt)
        plain, policy = plain_model(model), pk.ItemPatches(keep_text=5, max_items=50)
        histories, _ = workload.samples(USERS)

        def recommend() -> list[list[float]]:
            lists = model.recommend(histories, policy, k=WIDTH, num_beams=WIDTH)
            return [[score for _, score in user] for user in lists]

        self.group = f"search, {USERS} users, width {WIDTH}"
        self.calls: dict[str, Callable[[], list[list[float]]]] = {
            "patchkern": recommend,
            "generate": lambda: by_generate(model, plain, histories, policy, WIDTH),
        }
        self.every = model.score_items(histories, policy)

    def checked(self, provider: str) -> Callable[[], object]:
        right_and_no_better(provider, self.calls[provider](), self.calls["patchkern"](), self.every)
        return self.calls[provider]


@pytest.fixture(scope="module")
def searches(small_vocabulary: Workload) -> Searches:
    return Searches(small_vocabulary)


@pytest.mark.parametrize("provider", ["patchkern", "generate"])
def test_search(searches: Searches, provider: str, entry: Entry) -> None:
    entry.time(searches.group, searches.checked(provider))


@paired
def test_paired(searches: Searches, entry: Entry) -> None:
    entry.pair(searches.group, searches.checked("patchkern"), "generate", searches.checked("generate"))
