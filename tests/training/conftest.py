# SPDX-License-Identifier: Apache-2.0
"""Two processes for all tests that are about several: starting them is what takes time."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import process_cases
import pytest
import torch.distributed as dist

TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where one process, and then two that torchrun starts, have left what they did, see `process_cases`.

    Started once, also where pytest-xdist runs tests in several workers, whose folders lie in one.
    """
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo backend")
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "two-processes"
    log = folder / "log"
    try:
        folder.mkdir()
    except FileExistsError:  # another worker's
        end = time.monotonic() + 500
        while not log.exists() and time.monotonic() < end:
            time.sleep(0.5)
    else:
        (folder / "log.part").write_text(_start(folder))
        os.replace(folder / "log.part", log)
    assert log.read_text().startswith("0\n"), log.read_text()[-4000:]
    return folder


def _start(folder: Path) -> str:
    """How it ended."""
    process_cases.alone(folder)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    done = subprocess.run(
        [*command, str(TESTS / "process_cases.py"), str(folder)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=450,
    )
    return f"{done.returncode}\n{done.stderr}"
