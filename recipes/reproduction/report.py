# SPDX-License-Identifier: Apache-2.0
"""What is written for each table and figure, from what the folder holds."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from patchkern.data import samples_of
from recipes.reproduction import figures, paper
from recipes.reproduction.figures import Point
from recipes.reproduction.names import (
    FORMS,
    GROUP_SIZES,
    KEEP_TEXT,
    LATEST,
    PEERS,
    PRIORS,
    YARDSTICKS,
    label,
)
from recipes.reproduction.plan import Planner
from recipes.reproduction.steps import Folder
from recipes.reproduction.tables import MAIN, Entry, Table, compared, entries, write
from recipes.tables import markdown_table

Found = Mapping[tuple[str, str, str], Entry]
PATCHES = ("text", "pretrain", "items", "sessions")
STAGES = ("text", "items", "sessions")
STRICT = "left_out"


def report(folder: Folder, planner: Planner, tables: list[str], chosen: list[str]) -> list[Path]:
    """The files of these tables and figures that the folder has numbers for."""
    found = entries(folder)
    written = [_TABLES[table](folder, planner, found) for table in tables]
    written += [_FIGURES[figure](folder, planner, found) for figure in chosen]
    return [path for path in written if path is not None]


# ------------------------------------------------------------------ tables


def _table_1(folder: Folder, planner: Planner, found: Found) -> Path:
    reader = planner.reader
    data = reader.data
    values: dict[str, Any] = {
        "users": data.num_users,
        "items": data.num_items,
        "interactions": data.num_interactions,
        "longest history": int(data.histories.lengths.max()),
        **{f"{split} samples": int(data.samples(split).users.size) for split in ("train", "val", "test")},
        "density": round(data.num_interactions / (data.num_users * data.num_items), 5),
        "mean title tokens": round(float(reader.catalog.lengths.mean()), 2),
    }
    name, rows, tidy = planner.options.name, [["", planner.options.name, "paper"]], []
    for measure, value in values.items():
        theirs = paper.number("1", name, "", measure)
        shown = f"{value:,}" if isinstance(value, int) else f"{value:g}"
        rows.append([measure, shown, "" if theirs is None else f"{theirs:g}"])
        tidy.append({"table": "1", "data": name, "measure": measure, "value": value, "paper": _shown(theirs)})
    notes = [
        "Titles in the tokens of the model that was named; the paper's are of Llama-3's tokenizer (--tokenizer).",
        paper.note("1", name),
    ]
    return write(folder, "table-1", [Table("1", f"{name}: the data", rows, notes, tidy)])


def _table_2(folder: Folder, planner: Planner, found: Found) -> Path | None:
    systems = [*YARDSTICKS, *(f"{peer}-paper" for peer in PEERS), *PATCHES]
    pairs = [("items", "text"), ("sessions", "text"), ("items", "pretrain")]
    return _compared(folder, planner, "2", systems, found, pairs)


def _table_3(folder: Folder, planner: Planner, found: Found) -> Path | None:
    systems = [f"{kind}{way}" for kind in ("items", "sessions") for way in ("", "-direct", "-longer")]
    pairs = [(kind, f"{kind}{way}") for kind in ("items", "sessions") for way in ("-direct", "-longer")]
    return _compared(folder, planner, "3", systems, found, pairs)


def _table_4(folder: Folder, planner: Planner, found: Found) -> Path | None:
    systems = ["text", "items", "items-direct", "dropout", "latest"]
    pairs = [("items", "dropout"), ("items-direct", "dropout"), ("items-direct", "latest"), ("text", "dropout")]
    return _compared(folder, planner, "4", systems, found, pairs)


def _compared(
    folder: Folder, planner: Planner, number: str, systems: list[str], found: Found, pairs: list[tuple[str, str]]
) -> Path | None:
    reader, policies = planner.reader, planner.policies([name for name in systems if planner.is_ours(name)])
    past = reader.data.before(samples_of(reader.data, "test").spread(reader.limit))
    extra = {
        "rows a prompt": {name: f"{reader.prompts(past, policy).mean():.1f}" for name, policy in policies.items()},
        "compression": {name: f"{reader.nominal_compression(policy):.2f}" for name, policy in policies.items()},
    }
    data = planner.options.name
    tables = [compared(number, form, systems, found, data, extra, pairs) for form in FORMS]
    kept = [table for table in tables if table is not None]
    return write(folder, f"table-{number}", kept) if kept else None


def _table_all(folder: Folder, planner: Planner, found: Found) -> Path | None:
    """Systems alone and with priors, in the two strict forms, and what they cost; it has measured times."""
    records = folder.records()
    systems = list(dict.fromkeys(system for system, _, _ in found if "@" not in system))
    systems.sort(key=lambda system: _order(system))
    header = ["", f"{MAIN}", "NDCG@20", f"{MAIN} with priors", "NDCG@20", f"{MAIN}, seen allowed"]
    rows, tidy = [[*header, "trained, CPU s", "users/s"]], []
    for system in systems:
        columns = [(STRICT, "", MAIN), (STRICT, "", "NDCG@20"), (STRICT, "-".join(PRIORS), MAIN)]
        columns += [(STRICT, "-".join(PRIORS), "NDCG@20"), ("allowed", "", MAIN)]
        cells = [
            found[system, form, priors].cell(measure) if (system, form, priors) in found else None
            for form, priors, measure in columns
        ]
        if not any(cells):
            continue
        seconds, speed = _seconds(system, records), _speed(system, records)
        rows.append([label(system), *("" if cell is None else str(cell) for cell in cells), seconds, speed])
        line: dict[str, Any] = {"data": planner.options.name, "system": system}
        for name, cell in zip(header[1:], cells, strict=True):
            line[name] = "" if cell is None else cell.mean
        tidy.append(line | {"trained, CPU s": seconds.replace(",", ""), "users/s": speed.replace(",", "")})
    if not tidy:
        return None
    sizes = next(iter(found.values())).first
    notes = [
        f"{len(sizes.samples):,} test samples of {np.unique(sizes.users).size:,} users, by item; items of the whole "
        "history left out but in the last column of hit rates. Mean ± standard deviation of the seeds (standard error "
        "over users). CPU seconds of training with the stages before it, mean of the seeds; a run that was resumed "
        "has none.",
    ]
    return write(folder, "all", [Table("all", planner.options.name, rows, notes, tidy)], "measured")


def _order(system: str) -> tuple[int, str]:
    if system in YARDSTICKS:
        return 0, str(YARDSTICKS.index(system))
    ours = system.split("-")[0] in {"text", "pretrain", "items", "sessions", "dropout", "latest"}
    return (2 if ours else 1), system


def _seconds(system: str, records: Mapping[str, Mapping[str, Any]]) -> str:
    """Of training and the stages before it; of fitting, where there is nothing to train."""
    fitted = records.get(f"{system}.{STRICT}", {}).get("fit_seconds")
    if fitted is not None:
        return f"{fitted:.1f}"
    sums = []
    for key, record in records.items():
        if key.rpartition("-s")[0] == system and key.rpartition("-s")[2].isdigit():
            chain = [record]
            while (start := _start(chain[-1]["command"])) in records:
                chain.append(records[start])
            whole = all(each["attempts"] == 1 for each in chain)
            sums.append(sum(each["cpu_seconds"] for each in chain) if whole else float("nan"))
    return f"{np.mean(sums):,.0f}" if sums and np.isfinite(sums).all() else ""


def _start(command: str) -> str:
    return command.partition("--from ")[2].partition(" ")[0].strip("'").rpartition("/")[2]


def _speed(system: str, records: Mapping[str, Mapping[str, Any]]) -> str:
    speeds = [
        record["users_per_second"]
        for key, record in records.items()
        if re.fullmatch(rf"{re.escape(system)}(-s\d+)?(\.{STRICT}(\+priors)?)?", key) and record["users_per_second"]
    ]
    return f"{np.mean(speeds):,.0f}" if speeds else ""


def _shown(value: float | None) -> float | str:
    return "" if value is None else value


# ------------------------------------------------------------------ figures


def _point(found: Found, system: str, x: float, form: str = STRICT, named: str = "") -> list[Point]:
    if (system, form, "") not in found:
        return []
    cell = found[system, form, ""].cell(MAIN)
    return [Point(x, cell.mean, cell.error, named)]


def _figure_1(folder: Folder, planner: Planner, found: Found) -> Path | None:
    reader = planner.reader
    past = reader.data.before(samples_of(reader.data, "test").spread(reader.limit))
    rows = {name: float(reader.prompts(past, policy).mean()) for name, policy in planner.policies(STAGES).items()}
    series = {
        FORMS[form]: [point for name in rows for point in _point(found, name, rows[name], form, name)] for form in FORMS
    }
    return figures.draw(folder, "figure-1", f"{planner.options.name}: hit rate and rows", "rows a prompt", MAIN, series)


def _figure_2(folder: Folder, planner: Planner, found: Found) -> Path | None:
    most = planner.reader.max_items
    series = {
        label(name): [
            point
            for count in (*LATEST, most)
            for point in _point(found, name if count == most else f"{name}@{count}", count)
        ]
        for name in ("text", "items")
    }
    return figures.draw(
        folder, "figure-2", f"{planner.options.name}: longer histories", "latest items that are read", MAIN, series
    )


def _sweep(
    folder: Folder, planner: Planner, found: Found, figure: str, system: str, ending: str, own: int, values: Any, x: str
) -> Path | None:
    points = [
        point
        for value in sorted({*values, own})
        for point in _point(_first_seed(found, system), system if value == own else f"{system}-{ending}{value}", value)
    ]
    return figures.draw(folder, f"figure-{figure}", f"{planner.options.name}: {x}", x, MAIN, {label(system): points})


def _first_seed(found: Found, system: str) -> Found:
    """A sweep is of one seed."""
    changed = dict(found)
    for form in FORMS:
        if (system, form, "") in found:
            entry = found[system, form, ""]
            first = next(iter(entry.files))
            changed[system, form, ""] = Entry(system, form, "", {first: entry.files[first]})
    return changed


def _figure_5(folder: Folder, planner: Planner, found: Found) -> Path | None:
    own = planner.settings.keep_text
    return _sweep(folder, planner, found, "5", "items", "keep", own, KEEP_TEXT, "latest items that stay text")


def _figure_6(folder: Folder, planner: Planner, found: Found) -> Path | None:
    own = planner.settings.group_size
    return _sweep(folder, planner, found, "6", "sessions", "group", own, GROUP_SIZES, "items of a session")


def _figure_7(folder: Folder, planner: Planner, found: Found) -> Path | None:
    """Measured speed: users a second, and training's targets."""
    records, reader = folder.records(), planner.reader
    targets = samples_of(reader.data, "train").users.size
    searched, trained = [], []
    for name, policy in planner.policies(STAGES).items():
        ratio = reader.nominal_compression(policy)
        for seed in planner.options.seeds[:1]:
            search, train = records.get(f"{name}-s{seed}.{STRICT}"), records.get(f"{name}-s{seed}")
            if search and search.get("users_per_second"):
                searched.append(Point(ratio, search["users_per_second"], label=name))
            if train and train["attempts"] == 1:
                count = targets * planner.options.epochs / train["seconds"]
                trained.append(Point(ratio, count, label=name))
    name = planner.options.name
    figures.draw(
        folder, "figure-7-training", f"{name}: training", "compression ratio", "targets a second",
        {"targets": trained}, "measured",
    )  # fmt: skip
    return figures.draw(
        folder,
        "figure-7",
        f"{name}: recommending",
        "compression ratio",
        "users a second",
        {"users": searched},
        "measured",
    )


def _figure_8(folder: Folder, planner: Planner, found: Found) -> Path | None:
    path = folder / "measured/long/long_history.csv"
    if not path.is_file():
        return None
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.reader(file))
    text = ["### Whole histories of the users with the most interactions", "", *markdown_table(lines, left=True)]
    return folder.write("measured/figure-8.md", "\n".join([*text, "", "![](long/long_history.png)", ""]))


_TABLES = {"1": _table_1, "2": _table_2, "3": _table_3, "4": _table_4, "all": _table_all}
_FIGURES = {"1": _figure_1, "2": _figure_2, "5": _figure_5, "6": _figure_6, "7": _figure_7, "8": _figure_8}
