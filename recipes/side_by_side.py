# SPDX-License-Identifier: Apache-2.0
"""Work in processes of its own, several at a time, where one that fails ends none of the others."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Mapping
from multiprocessing.connection import wait
from typing import Any

import torch


def side_by_side(work: Callable[..., None], tasks: Mapping[str, tuple[Any, ...]], processes: int) -> list[str]:
    """Call ``work(*task)`` for every task, each in a process of its own, so many at a time.

    A process has its share of this one's threads, and ends when this one is gone. What it fails with is printed with
    the task's name, by which the process is called.

    Args:
        work: found by its name in a module, as are the tasks' values.
        tasks: arguments by name.
        processes: at most, at once.

    Returns:
        The names of those that failed.
    """
    context = multiprocessing.get_context("spawn")  # a fork may not use the GPU, nor threads that are at work
    threads = max(torch.get_num_threads() // processes, 1)
    waiting = list(tasks.items())
    running: dict[int, Any] = {}
    failed = []
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                name, task = waiting.pop(0)
                process = context.Process(target=_alone, args=(threads, work, *task), name=name)
                process.start()
                running[process.sentinel] = process
            for sentinel in wait(list(running)):
                process = running.pop(sentinel)  # type: ignore[arg-type]
                process.join()
                if process.exitcode:
                    failed.append(process.name)
                print(f"{process.name}: {f'failed ({process.exitcode})' if process.exitcode else 'done'}", flush=True)
    finally:
        for process in running.values():
            process.terminate()
    return failed


def _alone(threads: int, work: Callable[..., None], *task: Any) -> None:
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    work(*task)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
