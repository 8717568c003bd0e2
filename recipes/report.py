# SPDX-License-Identifier: Apache-2.0
"""The quickstart's report: what was recommended, how good it is, what it cost, and how to go on from here."""

from __future__ import annotations

import os
import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchkern.data import Interactions, Samples
from patchkern.data.synthetic_titles import genre_of
from patchkern.evaluation import Evaluation, estimate
from patchkern.search.prior_weight import PriorFit
from recipes import plots
from recipes.tables import markdown_table

KS = (10, 20)
LATEST = 10  # items of a history that are shown, and whose genres a recommendation should be of
SHOWN = 8  # recommendations per model

Lists = Sequence[Sequence[tuple[Any, float]]]
"""Per sample ``[(item id, score), ...]``, best first."""


@dataclass(frozen=True)
class Model:
    """One trained model and what it recommends, alone and with the prior; in the order they were trained."""

    name: str
    folder: Path
    reads: str
    """how it reads a history, in words"""
    after: str | None
    """the model that it goes on from"""
    rows: NDArray[np.int64]
    compression: float
    seconds: float
    targets: int
    users_per_second: float
    lists: Lists
    alone: Evaluation
    search: str
    """how it is searched, as of `recommend`"""
    fit: PriorFit | None = None
    with_prior: Evaluation | None = None


@dataclass(frozen=True)
class Report:
    """All that is reported of a run."""

    data: Interactions
    source: str
    """``"synthetic"`` or the folder of the data"""
    samples: Samples
    split: str
    yardsticks: Mapping[str, Evaluation]
    popular: Lists
    models: Sequence[Model]
    fitted_on: Samples | None
    """validation samples that the prior's weights were fitted on, if there is a prior"""
    num_examples: int
    command: Sequence[str]
    """arguments of the quickstart"""
    settings: Mapping[str, Any]
    backend: str
    whole_split: bool
    """were all samples of the split recommended to?"""

    @property
    def synthetic(self) -> bool:
        return self.source == "synthetic"

    def summary(self) -> list[str]:
        """The part that is also printed: findings, both tables, the examples."""
        return [*self._findings(), *self._quality(), *self._cost(), *self._examples()]

    def write(self, folder: Path) -> Path:
        """``report.md`` and its plots; the report appears last, complete."""
        points = [
            plots.Point(
                model.name,
                model.rows,
                _rate(model.alone),
                None if model.with_prior is None else _rate(model.with_prior),
                model.users_per_second,
            )
            for model in self.models
        ]
        plots.save(plots.accuracy(points, {name: found.hr(20) for name, found in self.yardsticks.items()}),
                   folder / "accuracy.png")  # fmt: skip
        plots.save(plots.cost(points), folder / "cost.png")
        lines = [*self._head(), *self.summary(), *self._next_steps(folder), *self._settings()]
        path, unfinished = folder / "report.md", folder / "report.md.part"
        unfinished.write_text("\n".join(lines), encoding="utf-8")
        unfinished.replace(path)
        return path

    # -------------------------------------------------------------- parts

    def _head(self) -> list[str]:
        data, count = self.data, self.samples.users.size
        lines = [
            f"# patchkern quickstart: {data.name}",
            "",
            f"{data.num_users:,} users, {data.num_items:,} items, {data.num_interactions:,} interactions. Small "
            "language models learned, from random weights, which item a user takes next. Here they recommend"
            f" 20 items each for {count:,} {self.split} samples: a sample is a user's whole history up to some moment, "
            "and a hit if the item taken next is among the recommended ones. Items already taken are left out.",
            "",
            "Who recommends (**bold**: with patchkern's compressed histories):",
            "",
        ]
        for model in self.models:
            after = f" Goes on from the trained {model.after}, so it has learned for longer." if model.after else ""
            lines.append(f"- {_bold(model)}: a language model that reads {model.reads}.{after}")
        if self.fitted_on:
            lines.append(
                "- *+ prior*: the same model, its probability of a title times the prior's probability of the item "
                "to the power of a weight. The prior (`pk.TransitionPrior`) knows no titles: it counts which items "
                "came soon after the user's latest ones in training, and mixes in popularity. It can be taken with "
                "any model."
            )
        lines.append(
            "- Yardsticks without any model: *most popular*, the same for everybody; *transitions*, the items that "
            "most often came soon after the user's latest ones"
            + ("; *prior alone*, those that the prior finds likeliest." if self.fitted_on else ".")
        )
        if self.synthetic:
            lines += [
                "",
                "The users are synthetic: each likes a few genres and goes on with series, nothing else. And the runs "
                "are short, and text learns slower. So this shows that everything works, not how good it is on real "
                "users: on ml-100k, trained for longer, the models of titles are equally good. How to take real data "
                "is said at the end.",
            ]
        return [*lines, ""]

    def _findings(self) -> list[str]:
        text, count = self.models[0], self.samples.users.size
        lines = ["## In short", ""]
        for model in self.models[1:]:
            fewer = text.rows.mean() / model.rows.mean()
            faster = model.users_per_second / text.users_per_second
            lines.append(
                f"- {_bold(model)} reads {model.rows.mean():.0f} rows per user where {text.name} reads "
                f"{text.rows.mean():.0f} ({fewer:.1f} times fewer), and recommends to {faster:.1f} times as many users "
                f"per second. HR@20 is {model.alone.hr(20):.3f} against {text.alone.hr(20):.3f}: "
                f"{_verdict(model.alone, text.alone)}."
            )
        counted = self.yardsticks["transitions"]
        for model in self.models:
            if model.search == "items":
                lines.append(
                    f"- {_bold(model)} alone against a count of transitions: HR@20 {model.alone.hr(20):.3f} against "
                    f"{counted.hr(20):.3f}: {_verdict(model.alone, counted)}. It learned from "
                    f"{model.targets / model.seconds:,.0f} targets a second, {text.name} from "
                    f"{text.targets / text.seconds:,.0f}."
                )
        if self.fitted_on:
            alone = self.yardsticks["prior alone"]
            found = [(model, model.with_prior) for model in self.models if model.with_prior is not None]
            model, best = max(found, key=lambda pair: pair[1].hr(20))
            lines.append(
                f"- The best with the prior is {_bold(model)}: HR@20 {best.hr(20):.3f} against {alone.hr(20):.3f} of "
                f"the prior alone: {_verdict(best, alone)}; against {model.alone.hr(20):.3f} of the model alone: "
                f"{_verdict(best, model.alone)}."
            )
        users = np.unique(self.samples.users).size
        lines.append(
            f"- ± is one standard error over the {users:,} users of the {count:,} samples; a difference counts from "
            "two of them."
        )
        return [*lines, ""]

    def _quality(self) -> list[str]:
        header = ["", *(f"{measure}@{k}" for measure in ("HR", "NDCG") for k in KS), "HR@20 ±"]
        if self.fitted_on:
            header += ["prior's weight", "as good"]
        rows = [[name, *_scores(found), *[""] * (len(header) - 6)] for name, found in self.yardsticks.items()]
        for model in self.models:
            rows.append([_bold(model), *_scores(model.alone), *[""] * (len(header) - 6)])
            if model.with_prior is not None and model.fit is not None and self.fitted_on is not None:
                low, high = equally_good(model.fit, self.fitted_on.users)
                weight = [f"{model.fit.weight:g}", f"{low:g} to {high:g}"]
                rows.append([f"{_bold(model)} + prior", *_scores(model.with_prior), *weight])
        lines = ["## How good are the recommendations?", "", *markdown_table([header, *rows]), ""]
        lines.append(
            "HR@k: the share of samples with the next item among the first k recommended. NDCG@k: the same, where a "
            "hit counts less the further down it stands. Higher is better. HR@20 ±: one standard "
            "error, over users."
        )
        if self.fitted_on:
            largest = max(max(model.fit.curve) for model in self.models if model.fit)
            lines += [
                "",
                f"The prior's weight is the one from 0 up with the best NDCG@20 on {self.fitted_on.users.size:,} "
                "validation samples. Between the weights under *as good* these samples see no difference (two standard "
                "errors), so that the number itself says little: 0 is the model alone, and at "
                f"{largest:g} the prior decides and the model only orders what the prior finds about equally likely.",
            ]
        return [*lines, "", "![HR@20 of each model, and its rows per user](accuracy.png)", ""]

    def _cost(self) -> list[str]:
        header = ["", "rows/user", "compression", "train s", "targets/s", "users/s"]
        rows = [
            [
                _bold(model),
                f"{model.rows.mean():.1f}",
                f"{model.compression:.2f}",
                f"{model.seconds:.0f}",
                f"{model.targets / model.seconds:.0f}",
                f"{model.users_per_second:.0f}",
            ]
            for model in self.models
        ]
        lines = ["## What do they cost?", "", *markdown_table([header, *rows]), ""]
        further = "".join(f" What {m.name} cost comes on top of {m.after}." for m in self.models if m.after)
        lines.append(
            "rows/user: embeddings that the model reads for one user, prompt and separators included. compression: "
            "title tokens per row that stands for them, without prompt and separators. train s: seconds of training; "
            f"targets/s: next items learned from per second.{further} users/s: users recommended to per second, 20 "
            "items each. Timings are of this machine, as busy as it was."
        )
        return [*lines, "", "![Rows per user; users per second](cost.png)", "",
                "In brackets: the tenth and the ninetieth of a hundred users.", ""]  # fmt: skip

    def _examples(self) -> list[str]:
        users = np.unique(self.samples.users, return_index=True)[1]
        shown = users[np.linspace(0, users.size - 1, min(self.num_examples, users.size)).astype(np.int64)]
        lines = ["## Some users", ""]
        if self.synthetic:
            fits = [f"{model.name} {self.genre_fit(model.lists):.0%}" for model in self.models]
            lines += [
                "The words of a title tell its genre. Of the ten best recommendations, so many are of a genre among "
                f"the user's latest {LATEST} items: {', '.join(fits)}; of the ten most popular "
                f"items that the user has not taken {self.genre_fit(self.popular):.0%}.",
                "",
            ]
        lines += ["Not picked, but evenly spread over the users. The item really taken next is in bold.", ""]
        return lines + [line for sample in shown.tolist() for line in self._example(sample)]

    def _example(self, sample: int) -> list[str]:
        """What the user of one sample took, what came next, and what each model would have said."""
        data, one = self.data, Samples(self.samples.users[[sample]], self.samples.positions[[sample]])
        history, target = data.before(one)[0].tolist(), data.targets(one)[0]
        latest = [data.titles[item] for item in history[-LATEST:]]
        lines = [f"### User {data.user_ids[self.samples.users[sample]]}, after {len(history)} items", ""]
        lines += [f"Took lately, oldest first: {' · '.join(latest)}", "", f"Took next: **{data.titles[target]}**", ""]
        columns = []
        for model in self.models:
            best = [item for item, _ in model.lists[sample][:SHOWN]]
            cells = [f"**{data.titles[item]}**" if item == target else data.titles[item] for item in best]
            columns.append([f"{model.name} recommends", *cells])
        numbers = ["", *map(str, range(1, SHOWN + 1))]
        if self.synthetic:
            numbers.append("genres")
            for model, column in zip(self.models, columns, strict=True):
                column.append(_genres(data.titles[item] for item, _ in model.lists[sample][:SHOWN]))
            lines[2] += f" ({_genres(latest)})"
        height = max(map(len, columns))
        table = [list(row) for row in zip(numbers[:height], *columns, strict=True)]
        return [*lines, *markdown_table(table, left=True), ""]

    def genre_fit(self, lists: Lists) -> float:
        """The share of the ten best items whose genre is among those of the user's latest `LATEST` items."""
        genre = {item: genre_of(title) for item, title in self.data.titles.items()}
        latest = self.data.before(self.samples, LATEST)
        fits = [
            genre[item] in {genre[past] for past in latest[sample].tolist()}
            for sample, best in enumerate(lists)
            for item, _ in best[:10]
        ]
        return float(np.mean(fits))

    def _next_steps(self, folder: Path) -> list[str]:
        python = _python()
        last = self.models[-1]
        commands = [("this report again", [python, "recipes/quickstart.py", *self.command])]
        evaluate = [python, "recipes/evaluate.py", str(last.folder), "--data", self.source, "--exclude_seen"]
        if last.search != "beam":
            evaluate += ["--search", last.search]
        if self.split != "test":
            evaluate += ["--split", self.split]
        if self.fitted_on:
            evaluate += ["--prior", "transitions", "--fit_limit", str(self.settings["fit_limit"])]
        same = "" if self.whole_split else ", on all samples"
        commands.append((f"the numbers of {last.name} again, one line per sample in a CSV{same}", evaluate))
        if self.synthetic:
            commands.append(("the same on data of your own; --help lists what can be set",
                             [python, "recipes/quickstart.py", "--data", "path/to/ml-100k"]))  # fmt: skip
        commands.append(("train stage by stage, larger models and pre-trained ones too",
                         [python, "recipes/train.py", "--help"]))  # fmt: skip
        lines = ["## Again, and on from here", "", "In the folder that this ran in:", "", "```sh"]
        for comment, command in commands:
            lines += [f"# {comment}", shlex.join(command)]
        return [
            *lines,
            "```",
            "",
            "Recommend from Python:",
            "",
            "```python",
            *self._snippet(last).splitlines(),
            "```",
            "",
        ]

    def _snippet(self, model: Model) -> str:
        names, read = ("synthetic", "synthetic()")
        if not self.synthetic:
            names, read = ("open_dataset, prepare", f"prepare(open_dataset({self.source!r}))")
        search = "" if model.search == "beam" else f", search={model.search!r}"
        return f"""\
import patchkern as pk
from patchkern.data import {names}

data, folder = {read}, {str(model.folder)!r}
model = pk.PatchedCausalLM.from_pretrained(folder)
history = data.histories[0]  # item ids, oldest first; or a list of your own
for item, score in model.recommend([history], k=5, exclude_seen=True{search})[0]:
    print(f"{{score:7.2f}}  {{data.titles[item]}}")
"""

    def _settings(self) -> list[str]:
        settings = ", ".join(f"{name} {value}" for name, value in sorted(self.settings.items()) if value is not None)
        return ["## Settings", "", settings, "", self.backend, ""]


def equally_good(fit: PriorFit, users: NDArray[np.int64] | None = None, k: int = 20) -> tuple[float, float]:
    """The weights next to the best, down and up, whose NDCG@k is within two standard errors of the best one's.

    Args:
        users: whose sample each is that was fitted on.
    """
    tried = list(fit.curve)
    best = tried.index(fit.weight)

    def good(place: int) -> bool:
        loss, error = estimate(fit.curve[fit.weight].gains(k) - fit.curve[tried[place]].gains(k), users)
        return loss <= 2 * error

    low = high = best
    while low > 0 and good(low - 1):
        low -= 1
    while high + 1 < len(tried) and good(high + 1):
        high += 1
    return tried[low], tried[high]


def _bold(model: Model) -> str:
    return model.name if model.compression == 1 else f"**{model.name}**"


def _rate(found: Evaluation) -> tuple[float, float]:
    return found.estimate(found.hits(20))


def _scores(found: Evaluation) -> list[str]:
    values = found.as_dict()
    return [f"{values[name]:.4f}" for measure in ("HR", "NDCG") for name in (f"{measure}@{k}" for k in KS)] + [
        "" if isnan(values["HR@20 ±"]) else f"{values['HR@20 ±']:.4f}"
    ]


def _verdict(one: Evaluation, other: Evaluation) -> str:
    found = one.estimate(one.hits(20) - other.hits(20))
    if isnan(found.error):
        return f"one user shows no difference ({found.mean:+.4f})"
    change = f"({found.mean:+.4f} {found.spread})"
    if not abs(found.mean) > 2 * found.error:
        of = f"{one.ranks.size:,} samples" if one.users is None else f"{one.num_users:,} users"
        return f"no difference that {of} could show {change}"
    return f"{'better' if found.mean > 0 else 'worse'} {change}"


def _genres(titles: Any) -> str:
    return ", ".join(f"{genre} {count}" for genre, count in Counter(map(genre_of, titles)).most_common())


def _python() -> str:
    """The interpreter as one would call it from here."""
    path = os.path.relpath(sys.executable)
    return "python" if path.startswith(os.pardir) else path
