# SPDX-License-Identifier: Apache-2.0
"""recipes/batch_ray.py with an actor and then its driver killed; `make test-ray` installs what it needs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from bulk_cases import save_model, write_users

import patchkern as pk
from recipes import recommend

pytest.importorskip("ray", reason="needs ray[data]: make test-ray")

ROOT = Path(__file__).resolve().parents[2]
USERS, PARTS = 10_000, 100


def _flags(folder: Path, output: Path) -> list[str]:
    users = ["--users", str(folder / "users.parquet"), "--users_per_part", str(USERS // PARTS)]
    return [str(folder / "model"), *users, "--output", str(output), "--search", "items", "--k", "10", "--exclude_seen"]


def _start(folder: Path, output: Path) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "recipes" / "batch_ray.py"), *_flags(folder, output), "--actors", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_DEDUP_LOGS": "0"}
    log = (folder / "log").open("a")
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, text=True)


def _until(condition: Callable[[], bool], driver: subprocess.Popen[str], folder: Path) -> None:
    end = time.monotonic() + 200
    while not condition():
        assert driver.poll() is None and time.monotonic() < end, (folder / "log").read_text()[-4000:]
        time.sleep(0.02)


def _actors(driver: subprocess.Popen[str]) -> list[psutil.Process]:
    found = []
    for process in psutil.Process(driver.pid).children(recursive=True):
        try:
            name = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if "ray::" in name and "Recommender" in name:
            found.append(process)
    return found


def test_every_user_once_whoever_is_killed(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    write_users(tmp_path / "users.parquet", USERS, row_group_size=1000)
    output = tmp_path / "lists"

    def parts() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in output.glob("part-*.parquet")}

    driver = _start(tmp_path, output)
    _until(lambda: len(parts()) >= 5, driver, tmp_path)
    before = _actors(driver)
    assert len(before) == 2
    before[0].kill()
    count = len(parts())
    _until(lambda: len(parts()) >= count + 20, driver, tmp_path)
    theirs = psutil.Process(driver.pid).children(recursive=True)
    driver.kill()
    driver.wait()
    psutil.wait_procs(theirs, timeout=60)
    done = parts()
    assert count + 20 <= len(done) < PARTS
    with pytest.raises(FileNotFoundError, match="are missing"):
        pk.read_recommendations(output)

    again = _start(tmp_path, output)
    assert again.wait(timeout=300) == 0, (tmp_path / "log").read_text()[-4000:]
    computed = re.findall(r"^part \d+, \d+ of (\d+)$", (tmp_path / "log").read_text(), flags=re.MULTILINE)
    assert int(computed[-1]) == PARTS - len(done)
    assert done.items() <= parts().items(), "what was there is left alone"

    recommend.main(_flags(tmp_path, tmp_path / "one"))
    users, lists = pk.read_recommendations(output)
    assert users.tolist() == [f"u{user}" for user in range(USERS)]
    assert lists == pk.read_recommendations(tmp_path / "one")[1]
    assert pk.read_summary(output) == pk.read_summary(tmp_path / "one")
