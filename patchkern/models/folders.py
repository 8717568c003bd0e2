# SPDX-License-Identifier: Apache-2.0
"""A folder whose files are replaced all together: a reader finds the older ones or the newer ones, whatever is killed.

New files are written into a hidden folder inside, which one rename declares complete; from then on `current` reads
them there, until each has taken its place and the hidden folder is gone. Nothing beside the folder is touched: it may
be a symbolic link, a mount point, or hold files of others, which stay.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_STAGE = ".patchkern-save-"  # being written, or of no use any more
_COMPLETE = ".patchkern-saved"  # all new files, not yet all in their places


def current(folder: str | os.PathLike[str]) -> Path:
    """Where the files of ``folder`` are: in it, or hidden in it where a `replacing` was killed while it ended."""
    complete = Path(folder) / _COMPLETE
    return complete if complete.is_dir() else Path(folder)


@contextmanager
def replacing(folder: str | os.PathLike[str], last: str, stale: Sequence[str]) -> Iterator[Path]:
    """A new folder to write to; what is in it replaces the files of ``folder`` when the block ends without an error.

    Args:
        folder: made if needed.
        last: the name of the file that takes its place after all others, for readers that know nothing of `current`.
        stale: patterns of files of earlier calls, deleted where this one did not write them.

    Raises:
        BlockingIOError: another process or thread is at it in the same folder.
    """
    target = Path(os.path.realpath(folder))  # also where a link points to a folder that is still to be made
    made = not target.exists()
    target.mkdir(parents=True, exist_ok=True)
    with _alone(target) as alone:
        if (target / _COMPLETE).is_dir():
            _take_places(target, last, stale)
        if alone:
            for left in target.glob(f"{_STAGE}*"):
                shutil.rmtree(left, ignore_errors=True)
        stage = Path(tempfile.mkdtemp(prefix=_STAGE, dir=target))
        try:
            new = stage / "new"
            new.mkdir()
            yield new
            os.rename(new, target / _COMPLETE)
            _take_places(target, last, stale)
        finally:
            shutil.rmtree(stage, ignore_errors=True)
            if made and not any(target.iterdir()):
                target.rmdir()


def _take_places(target: Path, last: str, stale: Sequence[str]) -> None:
    """Put the complete files into their places; killed and called again, it goes on."""
    complete = target / _COMPLETE
    names = [path.relative_to(complete) for path in complete.rglob("*") if path.is_file()]
    stage = Path(tempfile.mkdtemp(prefix=_STAGE, dir=target))
    try:
        shutil.copytree(complete, stage / "places", copy_function=_link)
        for pattern in stale:
            for old in target.glob(pattern):
                if old.relative_to(target) not in names:
                    old.unlink()
        for name in sorted(names, key=lambda name: name == Path(last)):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(stage / "places" / name, target / name)
        os.rename(complete, stage / "done")
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _link(source: str, destination: str) -> None:
    try:
        os.link(source, destination)
    except OSError:  # a file system without hard links
        shutil.copy2(source, destination)


@contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """Keep other processes and threads out; False where the file system has no locks. The system drops a lock with its
    process, so that one of a killed process keeps nobody out."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise BlockingIOError(
                    error.errno,
                    "folder: expected one that nobody else is saving to; of several processes only one saves "
                    "(is_main_process=False in the others)",
                    os.fspath(folder),
                ) from error
            locked = False
        try:
            yield locked
        finally:
            if locked:
                fcntl.flock(handle, fcntl.LOCK_UN)  # closing leaves it to processes that were forked meanwhile
    finally:
        os.close(handle)
