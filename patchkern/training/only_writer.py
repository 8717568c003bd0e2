# SPDX-License-Identifier: Apache-2.0
"""A run's folder, which one process at a time trains into."""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Generator
from contextlib import contextmanager

_held: dict[str, int] = {}  # descriptors of the folders that this process trains into


@contextmanager
def only_writer(folder: str | os.PathLike[str]) -> Generator[None, None, None]:
    """Hold a folder, which is made where there is none, until the end or until the process is gone, however it ends.

    Nothing is left in the folder. A process that holds it already may do so again.

    Raises:
        ValueError: another process holds it.
        OSError: no folder can be there.
    """
    path = os.path.realpath(folder)
    if path in _held:
        yield
        return
    os.makedirs(path, exist_ok=True)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _lock(descriptor, path)
        _held[path] = descriptor
        yield
    finally:
        _held.pop(path, None)
        _unlock(descriptor)
        os.close(descriptor)


def _lock(descriptor: int, path: str) -> None:
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # not a POSIX system
        return
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise ValueError(f"output_dir: expected a folder that no other process trains into, got {path!r}") from None
        warnings.warn(
            f"output_dir: the file system of {path!r} has no locks ({error}); a second process that trains into it "
            "would not be noticed",
            stacklevel=4,
        )


def _unlock(descriptor: int) -> None:
    """Whoever else has the descriptor by now, such as a program that was started meanwhile."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_UN)
    except (ImportError, OSError):
        pass


def _forget() -> None:
    """A worker that outlives its process, which was killed, must not keep the folder locked."""
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
