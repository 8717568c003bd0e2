# SPDX-License-Identifier: Apache-2.0
"""The examples in docstrings run as they stand: pasted into a fresh interpreter, they print what they say."""

from __future__ import annotations

import doctest
import importlib
import inspect
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import patchkern as pk
from patchkern import data, evaluation

pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("pyarrow", reason="needs pyarrow")

PACKAGE = Path(pk.__file__).parent
MODULES = [
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted(PACKAGE.rglob("*.py"))
    if ">>>" in path.read_text(encoding="utf-8")
]

# What users call first.
FIRST = [
    pk,
    pk.backends,
    pk.build_layout,
    pk.build_training_layout,
    pk.Catalog.from_titles,
    pk.Catalog.from_token_ids,
    pk.compress_batch,
    pk.fit_prior_weight,
    pk.FitRows,
    pk.Histories.from_sequences,
    pk.item_table,
    pk.ItemModel,
    pk.ItemPatches,
    pk.PatchedCausalLM,
    pk.PatchedCausalLM.recommend,
    pk.PatchedCausalLM.save_pretrained,
    pk.plan_memory,
    pk.Policy,
    pk.pool_rows,
    pk.Prompt,
    pk.Prompt.from_chat_template,
    pk.recommend_to_disk,
    pk.row_counts,
    pk.SessionPatches,
    pk.TextOnly,
    pk.TimeSessions,
    pk.training_rows,
    pk.TransitionPrior,
    data.from_tables,
    data.open_dataset,
    data.prepare,
    data.synthetic,
    evaluation.evaluate,
    evaluation.paired_difference,
    evaluation.transitions,
]


def examples_of(module: ModuleType) -> list[doctest.DocTest]:
    """They see nothing of their module: what they need they import."""
    found = doctest.DocTestFinder().find(module, globs={})
    return [test for test in found if test.examples]


@pytest.mark.unpoisoned("they run as they do for a user")
@pytest.mark.parametrize("name", MODULES)
def test_examples_print_what_they_say(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tests = examples_of(importlib.import_module(name))
    assert tests, "no docstring of the module has them"
    runner = doctest.DocTestRunner()
    report: list[str] = []
    for test in tests:
        runner.run(test, out=report.append)
    assert not report, "".join(report)


@pytest.mark.parametrize("described", FIRST, ids=lambda described: getattr(described, "__qualname__", "patchkern"))
def test_what_users_call_first_has_an_example(described: Any) -> None:
    assert doctest.DocTestParser().get_examples(inspect.getdoc(described) or "")
