# SPDX-License-Identifier: Apache-2.0
"""Rows per target of each form of prompt and history: what learning a whole data set costs, in rows of the model.

    python bench/bench_prompts.py --data path/to/ml-100k --model runs/pretrained/SmolLM2-135M-Instruct.Q4_1

"after": words stand on both sides of the history, as published; "before": the same words, all in front of it, in the
user's message; "list": in front of it too, and the history is the beginning of the answer, an item a line
(`Prompt.from_chat_template(history="last")`). Rows are counted for all targets of the training split: "one per pass", a
sample for each with a history of its own; "all per pass", a trunk and branches (`build_training_layout`); "item head",
the same with head="items". Integers only: nothing is timed. Without --data and --model, synthetic users and a tokenizer
fitted to their titles.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1]))  # an installed patchkern comes first

import patchkern as pk
from bench import output, timing
from patchkern.data import Interactions, samples_of
from patchkern.data.preparation import add_arguments, load
from patchkern.models.scratch import fit_tokenizer
from patchkern.models.sources import locate, read_tokenizer

SYSTEM = "You are a helpful assistant in movie recommendations."
ASKED = "recommend one movie for this user to watch next with its title only and without any explanation."
FORMS = {
    "after": pk.PromptWords(f"A user has watched [HISTORY_SEQUENCE]. Please {ASKED}", SYSTEM),
    "before": pk.PromptWords(f"Please {ASKED} The user has watched: [HISTORY_SEQUENCE]", SYSTEM),
    "list": pk.PromptWords("List the movies that one user watched and liked, one title a line.", SYSTEM, "last"),
}
POLICIES: dict[str, pk.TrunkPolicy] = {
    "text(100)": pk.TextOnly(100),
    "items(5)": pk.ItemPatches(5, 100),
    "items(0)": pk.ItemPatches(0, 100),
    "sessions(20)": pk.SessionPatches(20, 100),
    "sessions(20, from the start)": pk.SessionPatches(20, 100, align="start"),
    "sessions(20, no text)": pk.SessionPatches(20, 100, align="start", keep_text=0),
}
TEMPLATE = "{% for m in messages %}{{ m.role }}\n{{ m.content }}\n{% endfor %}assistant\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, default="synthetic")
    parser.add_argument("--model", help="whose tokenizer and chat template are taken: a folder, GGUF file or hub id")
    output.add_option(parser, "prompts.csv")
    arguments = parser.parse_args(argv)
    data = load(arguments)
    table = timing.Table(output.prepare(arguments.output, "prompts.csv"))
    if arguments.model is None:
        tokenizer: Any = fit_tokenizer(data.titles.values())
        tokenizer.chat_template = TEMPLATE
    else:
        tokenizer = read_tokenizer(locate(arguments.model, "--model"))
    prompts = {form: words.prompt(tokenizer) for form, words in FORMS.items()}
    catalog = pk.Catalog.from_titles(data.titles, tokenizer)
    for name, policy in POLICIES.items():
        for form, prompt in prompts.items():
            for provider, rows in counted(data, catalog, policy, prompt).items():
                config = {"data": data.name, "policy": name, "prompt": form, "suffix": len(prompt.suffix)}
                table.add(provider, f"{name}, {form}", "rows per target", "rows", (rows, rows, rows), config)
    table.write()


def counted(data: Interactions, catalog: pk.Catalog, policy: pk.TrunkPolicy, prompt: pk.Prompt) -> dict[str, float]:
    """Rows per target of the training split, by what learns them."""
    samples = samples_of(data, "train")
    users, first, count = np.unique(samples.users, return_index=True, return_counts=True)
    ranges = np.stack([samples.positions[first], samples.positions[first + count - 1]], axis=1)
    whole = (catalog, data.histories.take(users), policy, prompt, ranges)
    responses = catalog.lengths[catalog.index_of(data.targets(samples))] + len(prompt.response_end)
    alone = pk.row_counts(catalog, data.before(samples), policy, prompt) + responses
    rows = {
        "one per pass": alone.sum(),
        "all per pass": pk.training_rows(*whole).sum(),
        "item head": pk.training_rows(*whole, head="items").sum(),
    }
    return {provider: float(total) / samples.users.size for provider, total in rows.items()}


if __name__ == "__main__":
    main()
