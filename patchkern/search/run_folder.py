# SPDX-License-Identifier: Apache-2.0
"""A folder that several processes may fill with one run, and only one run: who may write what, and what is whose.

``run.json`` says what is being computed. It is created once, complete and exclusively, before anything else is written;
whoever comes later compares. Every part carries the run's hash, so that a part of another run is noticed wherever it
comes from. Writers hold locks on ``run.json``, which end with their process, however it ends.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import struct
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from patchkern.data.parquet import import_pyarrow, replace_file
from patchkern.search.summary import Summary

RUN = "run.json"
FORMAT_VERSION = 2

_METADATA = b"patchkern"
_WORLDS = 1 << 32  # bytes of the file that stand for numbers of shards; the bytes after them for the shards


class Part(NamedTuple):
    """Some users of a run, and the file with their recommendations."""

    number: int
    path: Path
    users: NDArray[np.int64]


class Stamp(NamedTuple):
    """What a part says of itself."""

    run: str
    part: int
    shard: tuple[int, int]
    summary: Summary


def parts_of(folder: Path, n_users: int, users_per_part: int) -> list[Part]:
    """The parts of a run, whoever writes them."""
    starts = range(0, n_users, users_per_part)
    return [
        Part(number, folder / f"part-{number:05d}.parquet", np.arange(first, min(first + users_per_part, n_users)))
        for number, first in enumerate(starts)
    ]


def hash_of(run: dict[str, Any]) -> str:
    """Of all that ``run.json`` says."""
    return hashlib.blake2b(json.dumps(run, sort_keys=True).encode(), digest_size=16).hexdigest()


def read_run(folder: Path) -> dict[str, Any]:
    """What ``run.json`` says.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is malformed, or of another version; the message names the file.
    """
    path = folder / RUN
    if not path.is_file():
        raise FileNotFoundError(
            f"folder: expected {RUN} in {os.fspath(folder)!r}; was it written by recommend_to_disk?"
        )
    run = _parsed(path, path.read_bytes())
    if run.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{path}: expected format_version {FORMAT_VERSION}, got {run.get('format_version')!r}")
    for name, least in (("users", 0), ("users_per_part", 1)):
        value = run.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{path}: expected an integer of at least {least} as {name}, got {value!r}")
    return run


@contextlib.contextmanager
def writing(folder: Path, run: dict[str, Any], shard: tuple[int, int]) -> Iterator[None]:
    """Write into the folder as one of the shards of a run, its only one if ``shard`` is ``(0, 1)``.

    Raises:
        ValueError: the folder holds another run, and what differs; or another process writes what this one would.
    """
    path = folder / RUN
    if not path.exists() and any(folder.glob("part-*.parquet")):
        raise ValueError(f"folder: expected an empty one or one with {RUN}, got parts of an unknown run in it")
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        _create(path, json.dumps(run, indent=2) + "\n")
    descriptor = os.open(path, os.O_RDWR)
    try:
        begun = _parsed(path, os.pread(descriptor, os.fstat(descriptor).st_size, 0))
        differing = [name for name in {**run, **begun} if run.get(name) != begun.get(name)]
        if differing:
            raise ValueError(
                f"folder: expected the run that was begun in {os.fspath(folder)!r}, got another {', '.join(differing)}"
            )
        _lock(descriptor, folder, *shard)
        yield
    finally:
        os.close(descriptor)


def write_part(part: Part, table: Any, stamp: Stamp) -> None:
    """Write a ``pyarrow.Table`` as a part, under another name first."""
    _, pq = import_pyarrow()
    content = {**stamp._asdict(), "summary": stamp.summary.as_dict()}
    table = table.replace_schema_metadata({_METADATA: json.dumps(content).encode()})
    replace_file(part.path, functools.partial(pq.write_table, table))


def read_stamp(part: Part, run_hash: str) -> Stamp:
    """What a part says of itself.

    Raises:
        ValueError: it is no part of this run, or not in its place; the message names the file.
    """
    pa, pq = import_pyarrow()
    try:
        metadata = pq.read_metadata(part.path).metadata or {}
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{part.path}: expected a parquet file; removed, it is computed anew: {error}") from error
    if _METADATA not in metadata:
        raise ValueError(f"{part.path}: expected a part written by recommend_to_disk, got one without a run's hash")
    content = _parsed(part.path, metadata[_METADATA])
    try:
        rank, world = content["shard"]
        stamp = Stamp(content["run"], content["part"], (rank, world), Summary.from_dict(content["summary"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{part.path}: expected run, part, shard and summary in its metadata, got {content}"
        ) from error
    if stamp.run != run_hash:
        raise ValueError(
            f"{part.path}: expected a part of the run in {RUN} ({run_hash}), got one of another run ({stamp.run})"
        )
    if stamp.part != part.number:
        raise ValueError(f"{part.path}: expected part {part.number}, got part {stamp.part} under its name")
    return stamp


def sweep(parts: list[Part]) -> None:
    """Remove what writers of these parts left behind when they were killed; only for who holds their lock."""
    names = {part.path.name for part in parts}
    for folder in {part.path.parent for part in parts}:
        for path in folder.glob(".part-*.tmp"):
            found = re.fullmatch(r"\.(part-\d+\.parquet)\.\d+\.tmp", path.name)
            if found and found[1] in names:
                path.unlink(missing_ok=True)


def _parsed(path: Path, text: bytes) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON as recommend_to_disk writes it: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object as recommend_to_disk writes it, got {content!r}")
    return content


def _create(path: Path, text: str) -> None:
    """Make the file unless there is one, never half of it where the file system has hard links."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.link(temporary, path)
    except FileExistsError:
        pass
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK) or not temporary.exists():
            raise
        with contextlib.suppress(FileExistsError), path.open("x", encoding="utf-8") as file:
            file.write(text)
    finally:
        temporary.unlink(missing_ok=True)


# ------------------------------------------------------------------ locks


def _lock(descriptor: int, folder: Path, rank: int, world: int) -> None:
    """Lock a shard until the file is closed.

    Open-file-description locks of single bytes: unlike others they hold between threads too, and on NFS. All writers
    share the byte of their number of shards, while nobody may hold that of another; each has the byte of its shard.
    """
    try:
        import fcntl

        command, query = fcntl.F_OFD_SETLK, fcntl.F_OFD_GETLK
    except (ImportError, AttributeError):  # not Linux
        return

    def ask(command: int, kind: int, start: int, length: int) -> int:
        # struct flock: type, whence, start, length, pid
        return struct.unpack(
            "hhqqi4x", fcntl.fcntl(descriptor, command, struct.pack("hhqqi4x", kind, 0, start, length, 0))
        )[0]

    try:
        ask(command, fcntl.F_RDLCK, world, 1)
        around = (0, world), (world + 1, _WORLDS - world - 1)
        if any(ask(query, fcntl.F_WRLCK, *others) != fcntl.F_UNLCK for others in around):
            raise BlockingIOError
        ask(command, fcntl.F_WRLCK, _WORLDS + rank, 1)
    except OSError as error:
        if error.errno not in (None, errno.EACCES, errno.EAGAIN):
            warnings.warn(
                f"folder: the file system of {os.fspath(folder)!r} has no locks ({error}); a second process that "
                "writes into it would not be noticed",
                stacklevel=5,
            )
            return
        raise ValueError(
            f"folder: expected no other process to write the parts of shard {(rank, world)} in {os.fspath(folder)!r}, "
            "got one that does; processes that share a run are each called with shard=(rank, world), with the same "
            "world and a rank of their own"
        ) from None
