# SPDX-License-Identifier: Apache-2.0
"""One process at a time trains into a folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from training_cases import make_trainer

from patchkern.training import only_writer as module
from patchkern.training.only_writer import only_writer

fcntl = pytest.importorskip("fcntl", reason="needs the locks of a POSIX system")

MESSAGE = "output_dir: expected a folder that no other process trains into, got '{}'"


def holder(folder: Path) -> subprocess.Popen[str]:
    """Another process that holds the folder until its input ends."""
    code = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], 0), fcntl.LOCK_EX); print(flush=True); input()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline()
    return process


def test_a_second_process_is_refused_while_there_is_a_first(tmp_path: Path) -> None:
    process = holder(tmp_path)
    try:
        with pytest.raises(ValueError, match=MESSAGE.format(tmp_path)), only_writer(tmp_path):
            pass
    finally:
        process.kill()
        process.wait()
    with only_writer(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_training_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=1)
    process = holder(tmp_path)
    try:
        with pytest.raises(ValueError, match=MESSAGE.format(tmp_path)):
            trainer.train()
    finally:
        process.kill()
        process.wait()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_again_in_one_process(tmp_path: Path) -> None:
    with only_writer(tmp_path / "new"), only_writer(tmp_path / "new"):
        other = os.open(tmp_path / "new", os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(other)


def test_a_forked_worker_holds_nothing(tmp_path: Path) -> None:
    with only_writer(tmp_path):
        child = os.fork()
        if child == 0:
            os._exit(len(module._held))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert module._held
