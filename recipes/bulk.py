# SPDX-License-Identifier: Apache-2.0
"""Recommending to the users of a file, part by part: what recipes/recommend.py and recipes/batch_ray.py share."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

import patchkern as pk
from patchkern.batch.columns import id_array
from patchkern.models.files import read_description
from patchkern.models.folders import current
from patchkern.search.arguments import SEARCHES
from patchkern.training import find_model


class UserFile:
    """Users in parquet, a row each: read a range at a time, of the row groups that hold it.

    Args:
        path: a file, or a folder of them, which follow each other by name.
        user_column: of integers or strings.
        items_column: of lists of item ids, oldest first.

    Raises:
        FileNotFoundError: no such files.
        ValueError: no parquet, or a file without the columns.
    """

    def __init__(self, path: str, user_column: str = "user", items_column: str = "items") -> None:
        where = Path(path)
        self.paths = sorted(where.glob("*.parquet")) if where.is_dir() else [where]
        if not self.paths or not self.paths[0].is_file():
            raise FileNotFoundError(f"--users: expected a parquet file, or a folder of some, got {path!r}")
        self.columns = [user_column, items_column]
        hashed = hashlib.blake2b(repr(self.columns).encode(), digest_size=16)
        counts: list[int] = []
        self._groups: list[tuple[Path, int]] = []
        for file in self.paths:
            try:
                metadata = pq.read_metadata(file)
            except (pa.ArrowInvalid, OSError) as error:
                raise ValueError(f"--users: expected a parquet file, got {str(file)!r}: {error}") from error
            missing = {*self.columns}.difference(metadata.schema.to_arrow_schema().names)
            if missing:
                raise ValueError(f"--users: expected the column {sorted(missing)[0]!r} in {str(file)!r}, got none")
            for group in range(metadata.num_row_groups):
                described = metadata.row_group(group)
                counts.append(described.num_rows)
                self._groups.append((file, group))
                # sizes, places and bounds of its columns
                hashed.update(repr(described.to_dict()).encode())
            hashed.update(file.name.encode())
        self.fingerprint = hashed.hexdigest()
        self._first = np.cumsum([0, *counts])

    def __len__(self) -> int:
        return int(self._first[-1])

    def read(self, users: slice) -> tuple[pk.Histories, NDArray[Any]]:
        """The histories of a range of users, and their ids.

        Raises:
            TypeError, ValueError: a user without an id or a list; the message names the rows.
        """
        low = int(np.searchsorted(self._first, users.start, side="right")) - 1
        high = int(np.searchsorted(self._first, users.stop, side="left"))
        tables = [
            pq.ParquetFile(file).read_row_group(group, columns=self.columns) for file, group in self._groups[low:high]
        ]
        table = pa.concat_tables(tables).slice(users.start - int(self._first[low]), users.stop - users.start)
        user, items = self.columns
        try:
            return pk.Histories.from_arrow(table[items]), id_array(table[user], f"column {user!r}")
        except (TypeError, ValueError) as error:
            raise type(error)(f"--users: in the rows from {users.start} to {users.stop - 1}, {error}") from error


def add_flags(parser: argparse.ArgumentParser) -> None:
    """What is recommended, to whom, and where it goes."""
    parser.add_argument("checkpoint", help="a run of recipes/train.py, one of its checkpoints, or another saved model")
    parser.add_argument("--users", required=True, help="a parquet file, or a folder of some: a row per user")
    parser.add_argument("--output", required=True, help="the folder for the lists")
    parser.add_argument("--user_column", default="user", help="of their ids (default: %(default)s)")
    parser.add_argument("--items_column", default="items", help="of lists, oldest first (default: %(default)s)")
    parser.add_argument("--k", type=int, default=20, help="items per user (default: %(default)s)")
    parser.add_argument("--search", choices=SEARCHES, help="(default: beam, or items where the run learned no titles)")
    parser.add_argument("--num_beams", type=int, default=20, help="of all searches but items (default: %(default)s)")
    parser.add_argument("--exclude_seen", action="store_true", help="leave out items of the user's history")
    parser.add_argument("--users_per_part", type=int, default=4096, help="of a file of lists (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=64, help="users searched together (default: %(default)s)")
    parser.add_argument("--memory_budget", help='of the searches, such as "40GiB": fewer users together where needed')
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the weights")


def open_run(args: argparse.Namespace, device: str = "cpu") -> tuple[pk.BulkRun, UserFile]:
    """The run of these flags, and its users: the same in whatever process it is opened.

    Lists are shorter where fewer items are left, and items that the model does not know are dropped, so that no user
    costs the others theirs; `patchkern.read_summary` counts both.
    """
    if Path(args.output).resolve() == Path(args.users).resolve():
        raise ValueError(f"--output: expected another place than --users, whose files are read, got {args.output!r}")
    users = UserFile(args.users, args.user_column, args.items_column)
    folder = find_model(args.checkpoint, "checkpoint")
    saved = read_description(current(folder))
    titles = "titles" in saved.learns
    kind: Any = pk.PatchedCausalLM if titles else pk.ItemModel
    if saved.memory is not None:
        kind = pk.RecurrentMemory
    model = kind.from_pretrained(folder, dtype=getattr(torch, args.dtype)).to(device).eval()
    if len(users):  # wrong columns, and ids of another kind, are known before the run's folder is
        first, _ = users.read(slice(0, 1))
        model.catalog.find(first.items, f"--users: column {args.items_column!r}")
    run = pk.BulkRun(
        model,
        args.output,
        users=len(users),
        users_per_part=args.users_per_part,
        source={"histories": users.fingerprint},
        k=args.k,
        num_beams=args.num_beams,
        search=args.search,
        exclude_seen=args.exclude_seen,
        batch_size=args.batch_size,
        memory_budget=args.memory_budget,
        short="allow",
        unknown="drop",
    )
    return run, users
