# SPDX-License-Identifier: Apache-2.0
"""Which trainings and evaluations each table and figure needs, as steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import patchkern as pk
from patchkern.data import samples_of
from patchkern.models.scratch import SIZES
from patchkern.training import SETTINGS, Settings
from recipes.commands import as_flags
from recipes.reproduction.cost import Reader
from recipes.reproduction.names import (
    FORMS,
    GROUP_SIZES,
    KEEP_TEXT,
    LATEST,
    PEERS,
    PRIORS,
    TRAININGS,
    YARDSTICKS,
    Training,
)
from recipes.reproduction.steps import FOLDER, REPOSITORY, Step, Work, distinct

PEER_SCRIPT = "recipes/baselines/train.py"


@dataclass(frozen=True)
class Options:
    """What was asked for, but for the tables and figures."""

    data_flags: tuple[str, ...]
    name: str
    model: str
    head: str = "titles"
    scale: str = "small"
    seeds: tuple[int, ...] = (0,)
    epochs: float = 1.0
    limit: int | None = None
    forms: tuple[str, ...] = tuple(FORMS)
    rows_per_pass: int = 4096
    bf16: bool = False
    systems: tuple[str, ...] = ()
    peers: tuple[str, ...] = PEERS
    peer_epochs: int | None = None
    further: tuple[str, ...] = ()
    settings: str | None = None
    keep_text: int | None = None
    group_size: int | None = None


class Planner:
    """Steps for tables and figures of one data set and model."""

    def __init__(self, options: Options, reader: Reader) -> None:
        self.options, self.reader = options, reader
        self.settings = self._settings()

    def plan(self, tables: Sequence[str], figures: Sequence[str]) -> list[Step]:
        steps: list[Step] = []
        for table in tables:
            steps += getattr(self, f"_table_{table}")()
        for figure in figures:
            steps += getattr(self, f"_figure_{figure}")()
        # seed by seed, so that a run that is cut off has some whole comparisons
        return sorted(distinct(steps), key=lambda step: step.seed)

    # -------------------------------------------------------------- tables

    def _table_1(self) -> list[Step]:
        return []

    def _table_2(self) -> list[Step]:
        own = self._systems(("text", "pretrain", "items", "sessions"))
        return [*self._alone(), *self._peers(("paper",)), *own]

    def _table_3(self) -> list[Step]:
        names = ("items", "sessions", "items-direct", "sessions-direct", "items-longer", "sessions-longer")
        return self._systems(names, self._strict)

    def _table_4(self) -> list[Step]:
        return self._systems(("items", "items-direct", "dropout", "latest", "text"), self._strict)

    def _table_all(self) -> list[Step]:
        own = self._systems(("text", "items", "sessions"), ("left_out", "allowed"), priors=True)
        return [*self._alone(), *self._peers(("paper", "tuned")), *own]

    # -------------------------------------------------------------- figures

    def _figure_1(self) -> list[Step]:
        return self._systems(("text", "items", "sessions"))

    def _figure_2(self) -> list[Step]:
        """The models of table 2, given ever longer histories."""
        steps = self._systems(("text", "items"), self._strict)
        for name in ("text", "items"):
            for latest in LATEST if not self.options.systems or name in self.options.systems else ():
                steps += self._evaluated(name, self.options.seeds, self._strict, latest=latest)
        return steps

    def _figure_5(self) -> list[Step]:
        names = [f"items-keep{count}" for count in KEEP_TEXT if count != self.settings.keep_text]
        return self._systems(["items", *names], self._strict, self.options.seeds[:1])

    def _figure_6(self) -> list[Step]:
        names = [f"sessions-group{size}" for size in GROUP_SIZES if size != self.settings.group_size]
        return self._systems(["sessions", *names], self._strict, self.options.seeds[:1])

    def _figure_7(self) -> list[Step]:
        return self._systems(("text", "items", "sessions"), self._strict)

    def _figure_8(self) -> list[Step]:
        chosen = self.options
        users = () if chosen.limit is None else ("--users", str(min(chosen.limit, 58)))
        arguments = ["--output", f"{FOLDER}/measured/long", *users]
        if chosen.model in SIZES:
            arguments += ["--shape", chosen.model, "--budget", "2GiB"]
        if "ml-1m" in chosen.name:  # others have too few users above 500 interactions
            arguments += chosen.data_flags
        outputs = ("measured/long/long_history.csv", "measured/long/long_history.png")
        return [Step("long", "recipes/long_history.py", tuple(arguments), Work("other"), outputs)]

    # -------------------------------------------------------------- steps

    @property
    def _strict(self) -> tuple[str, ...]:
        return tuple(form for form in self.options.forms if form != "paper") or self.options.forms

    def _systems(
        self,
        names: Iterable[str],
        forms: Sequence[str] | None = None,
        seeds: Sequence[int] | None = None,
        priors: bool = False,
    ) -> list[Step]:
        """Trained, and evaluated in each form."""
        chosen = self.options.seeds if seeds is None else seeds
        steps: list[Step] = []
        for name in names:
            if self.options.systems and name not in self.options.systems:
                continue
            steps += self._trained(name, chosen)
            steps += self._evaluated(name, chosen, self.options.forms if forms is None else forms, priors=priors)
        return steps

    def _trained(self, name: str, seeds: Sequence[int]) -> list[Step]:
        training = self.training(name)
        before = [] if training.start is None else self._trained(training.start, seeds)
        return [*before, *(self._train(training, seed) for seed in seeds)]

    def _train(self, training: Training, seed: int) -> Step:
        chosen, key = self.options, f"{training.name}-s{seed}"
        epochs = chosen.epochs * training.times
        flags: dict[str, Any] = {
            "stage": training.stage,
            "seed": seed,
            "output_dir": f"{FOLDER}/runs/{key}",
            "num_train_epochs": f"{epochs:g}",
            "save_strategy": "steps",
            "save_steps": 0.2,
            "save_total_limit": 1,
            "bf16": chosen.bf16,
            "disable_tqdm": True,
            "keep_text": training.keep_text,
            "group_size": training.group_size,
            "max_items": training.max_items,
            "item_dropout": training.dropped,
        }
        if training.stage == "sessions":  # in the published form, whatever the settings prefer
            size = training.group_size or self.settings.group_size
            flags |= {"align": "end", "sessions_keep_text": size}
        if training.start is None:
            flags |= {"model": chosen.model, "head": chosen.head}
        else:
            flags["from"] = f"{FOLDER}/runs/{training.start}-s{seed}"
        if chosen.scale == "paper":
            flags |= {"targets_per_pass": "one", "per_device_train_batch_size": 8, "gradient_accumulation_steps": 8}
        else:
            flags["rows_per_pass"] = chosen.rows_per_pass
        switches = ["--resume"]
        if chosen.head != "titles" and training.start is None:
            switches.append("--item_embeddings")
        if chosen.head == "items" and training.start is None and chosen.model in SIZES:
            switches.append("--no_separator")
        arguments = (*chosen.data_flags, *chosen.further, *as_flags(flags), *switches)
        work = self.reader.training(self.policy(training), training.stage, epochs)
        return Step(key, "recipes/train.py", arguments, work, (f"runs/{key}/arguments.json",))

    def _evaluated(
        self, name: str, seeds: Sequence[int], forms: Sequence[str], *, latest: int | None = None, priors: bool = False
    ) -> list[Step]:
        policy = self.policy(self.training(name), latest)
        shown = name if latest is None else f"{name}@{latest}"
        steps = []
        for form in forms:
            if form == "paper" and self.options.head == "items":
                continue  # there are no titles to search for
            work = self.reader.search(policy, form)
            with_priors = priors and form == "left_out"
            if with_priors:
                work = replace(work, rows=work.rows * 2)
            for seed in seeds:
                key = f"{shown}-s{seed}.{form}"
                flags: dict[str, Any] = {
                    "output": f"{FOLDER}/csv/{key}.csv",
                    "limit": self.options.limit,
                    "max_items": latest,
                }
                switches = []
                if form == "paper":
                    flags["metric"] = "paper"
                if form == "left_out":
                    switches.append("--exclude_seen")
                if form != "paper" and self.options.head != "titles":
                    flags["search"] = "items"
                if with_priors:
                    switches += ["--prior", *PRIORS]
                arguments = (f"{FOLDER}/runs/{name}-s{seed}", *self.options.data_flags, *as_flags(flags), *switches)
                outputs = [f"csv/{key}.csv"]
                if with_priors:
                    key += "+priors"
                    outputs.append(f"csv/{shown}-s{seed}.{form}-{'-'.join(PRIORS)}.csv")
                steps.append(Step(key, "recipes/evaluate.py", arguments, work, tuple(outputs)))
        return steps

    def _alone(self) -> list[Step]:
        """Yardsticks, and priors without a model."""
        steps = []
        for form in self._strict:
            for system in YARDSTICKS:
                key = f"{system}.{form}"
                flags = {"system": system, "seen_items": form, "limit": self.options.limit}
                arguments = (*self.options.data_flags, *as_flags(flags), "--output", f"{FOLDER}/csv/{key}.csv")
                steps.append(Step(key, "recipes/reproduction/alone.py", arguments, Work("other"), (f"csv/{key}.csv",)))
        return steps

    def _peers(self, settings: Sequence[str]) -> list[Step]:
        """Of each setting, with all seeds where it is the tuned one."""
        if not (REPOSITORY / PEER_SCRIPT).is_file():
            return []
        steps, chosen = [], self.options
        for setting in settings:
            for model in chosen.peers:
                for seed in chosen.seeds:
                    key = f"{model}-{setting}-s{seed}"
                    flags = {
                        "model": model,
                        "setting": setting,
                        "seed": seed,
                        "output_dir": f"{FOLDER}/runs/{key}",
                        "bf16": str(chosen.bf16).lower(),
                        "limit": chosen.limit,
                        "num_train_epochs": chosen.peer_epochs,
                    }
                    names = {"left_out": f"{key}.left_out", "allowed": f"{key}.allowed"}
                    switches = ["--resume", "--seen_items", *names]
                    collected = [(f"runs/{key}/test-{seen}.csv", f"csv/{own}.csv") for seen, own in names.items()]
                    if setting == "tuned":
                        switches += ["--prior", *PRIORS]
                        ending = f"-{'-'.join(PRIORS)}.csv"
                        collected.append((f"runs/{key}/test-left_out{ending}", f"csv/{key}.left_out{ending}"))
                    arguments = (*chosen.data_flags, *as_flags(flags), *switches)
                    outputs = tuple(target for _, target in collected)
                    steps.append(Step(key, PEER_SCRIPT, arguments, Work("other"), outputs, tuple(collected)))
        return steps

    # -------------------------------------------------------------- what is read

    def training(self, name: str) -> Training:
        if name in TRAININGS:
            return TRAININGS[name]
        if name == "dropout":
            return Training(name, "sft", dropped=self.dropped_share())
        if name == "latest":
            return Training(name, "sft", max_items=self.latest_items())
        kind, _, count = name.partition("-keep")
        if kind == "items" and count:
            return Training(name, "items", "pretrain", keep_text=int(count))
        kind, _, count = name.partition("-group")
        if kind == "sessions" and count:
            return Training(name, "sessions", "pretrain", group_size=int(count))
        raise ValueError(f"name: expected a training that is known, got {name!r}")

    def policy(self, training: Training, latest: int | None = None) -> Any:
        """How its histories are read when it is evaluated."""
        settings = replace(
            self.settings,
            keep_text=training.keep_text or self.settings.keep_text,
            group_size=training.group_size or self.settings.group_size,
            sessions_keep_text=None,
            align="end",
        )
        max_items = latest or training.max_items or self.reader.max_items
        if training.dropped is not None:
            return pk.ItemDropout(training.dropped, settings.keep_text, max_items)
        return settings.policy(training.stage, max_items)

    def policies(self, names: Iterable[str]) -> dict[str, Any]:
        return {name: self.policy(self.training(name)) for name in names}

    def is_ours(self, name: str) -> bool:
        """Whether it is a model that reads rows."""
        return name not in YARDSTICKS and not name.endswith(("-paper", "-tuned"))

    def model_options(self) -> dict[str, Any]:
        """How `recipes.models.load_model` makes the model that is trained."""
        items = self.options.head != "titles"
        return {
            "item_head": items,
            "item_embeddings": items,
            "dropout": self.settings.dropout,
            "separator": self.options.head != "items",
        }

    def dropped_share(self) -> float:
        """Of the items that would be patches: dropped, they leave as many rows as their patches."""
        keep, most = self.settings.keep_text, self.reader.max_items
        past = self.reader.data.before(samples_of(self.reader.data, "train").spread(2000))
        patches = self.reader.prompts(past, pk.ItemPatches(keep, most)).sum()
        text, none = (self.reader.prompts(past, pk.ItemDropout(share, keep, most)).sum() for share in (0.0, 1.0))
        return round(float((text - patches) / (text - none)), 3) if text > none else 0.0

    def latest_items(self) -> int:
        """Of text: as many of the latest items as take the rows of item patches."""
        past = self.reader.data.before(samples_of(self.reader.data, "train").spread(2000))
        wanted = self.reader.prompts(past, pk.ItemPatches(self.settings.keep_text, self.reader.max_items)).sum()
        counts = range(1, self.reader.max_items + 1)
        return min(counts, key=lambda count: abs(self.reader.prompts(past, pk.TextOnly(count)).sum() - wanted))

    def _settings(self) -> Settings:
        """As recipes/train.py chooses them."""
        chosen = self.options
        name = chosen.settings
        if name is None and chosen.model in SIZES:
            name = "scratch" if chosen.head == "titles" else "scratch-head"
        name = name or next((known for known in SETTINGS if chosen.name.startswith(known)), None)
        if name is None:
            raise ValueError(f"--settings: expected one of {', '.join(SETTINGS)}, as none is known for {chosen.name!r}")
        given = {"keep_text": chosen.keep_text, "group_size": chosen.group_size}
        return replace(SETTINGS[name], **{key: value for key, value in given.items() if value is not None})  # type: ignore[arg-type]
