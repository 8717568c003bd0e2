# SPDX-License-Identifier: Apache-2.0
"""A folder's files are replaced together: killed at any step, a save leaves the older or the newer model."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import pytest
import torch
from model_cases import TITLES, tiny
from transformers.utils import logging

import patchkern as pk
from patchkern.models import folders
from patchkern.training import find_model

MEMORY = Path("/dev/shm")
STEPS = ("os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir")
FORK = multiprocessing.get_context("fork")  # a fresh interpreter for each kill would take most of the time

Save = Callable[[Path], None]


def write(text: str) -> Save:
    def save(folder: Path) -> None:
        with folders.replacing(folder, "last", ["weights*"]) as new:
            for name in ("last", "first", f"weights-{text}", "inside/deep"):
                (new / name).parent.mkdir(exist_ok=True)
                (new / name).write_text(text)

    return save


def read(folder: Path) -> dict[str, str]:
    place = folders.current(folder)
    return {str(path.relative_to(place)): path.read_text() for path in place.rglob("*") if path.is_file()}


def complete(text: str) -> dict[str, str]:
    return dict.fromkeys(["last", "first", f"weights-{text}", "inside/deep"], text)


def killed_at(step: int, save: Save, folder: Path) -> bool:
    """Whether the save reached its so many-th change of the file system, at which it is killed."""

    def child() -> None:
        left = step

        def count(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal left
            if event not in STEPS:  # os.kill is an event too
                return
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        save(folder)

    process = FORK.Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


@pytest.fixture(params=["plain", "link", "another file system"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    if request.param == "plain":
        yield tmp_path / "model"
        return
    other = request.param != "link"
    if other and not (os.access(MEMORY, os.W_OK) and MEMORY.stat().st_dev != tmp_path.stat().st_dev):
        pytest.skip(f"needs a second file system, {MEMORY} is none")
    place = Path(tempfile.mkdtemp(dir=MEMORY if other else tmp_path))
    (tmp_path / "model").symlink_to(place / "deep")  # which the first save makes
    yield tmp_path / "model"
    shutil.rmtree(place)


def test_killed_at_every_step_it_leaves_one_of_both(folder: Path) -> None:
    seen = set()
    for step in range(0, 1000, 4 if folder.is_symlink() else 1):
        write("old")(folder)
        assert read(folder) == complete("old")
        killed = killed_at(step, write("new"), folder)
        found = read(folder)
        assert {name: text for name, text in found.items() if not name.startswith(".")} == complete(found["last"])
        seen.add(found["last"])
        if not killed:
            break
    assert step > 20 and seen == {"old", "new"}
    assert found == complete("new")


def test_killed_while_it_ends_the_next_one_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write("old")(folder)
    (folder / "of others").write_text("stays")
    for step in range(0, 1000, 4):
        if not killed_at(step, write("new"), folder):
            break
        for again in (1, 6):
            killed_at(again, write("newest"), folder)
            assert folders.current(folder).joinpath("last").read_text() in ("old", "new")
        write("old")(folder)
        assert read(folder) == complete("old") | {"of others": "stays"}
    assert step > 20


def test_without_hard_links(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    write("old")(folder)
    monkeypatch.setattr(os, "link", refused)
    write("new")(folder)
    assert read(folder) == complete("new")


def test_failed_save_leaves_nothing_of_its_own(folder: Path) -> None:
    def fail() -> None:
        with pytest.raises(OSError, match="no space"), folders.replacing(folder, "last", []) as new:
            (new / "first").write_text("half")
            raise OSError("no space")

    fail()
    assert not folder.exists()
    write("old")(folder)
    fail()
    assert read(folder) == complete("old")


def test_only_one_saves_at_a_time(folder: Path) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def slow() -> None:
        with folders.replacing(folder, "last", []) as new:
            (new / "last").write_text("slow")
            entered.set()
            go_on.wait(60)

    thread = threading.Thread(target=slow)
    thread.start()
    entered.wait(60)
    try:
        with pytest.raises(BlockingIOError, match="folder: expected one that nobody else is saving to"):
            write("other")(folder)
    finally:
        go_on.set()
        thread.join()
    assert read(folder) == {"last": "slow"}


# ------------------------------------------------------------------ models


def make_model(seed: int) -> pk.PatchedCausalLM:
    """Weights, catalogue and prompt all tell which of the models it is."""
    titles = [tokens for item, tokens in enumerate(TITLES) if item % 2 == seed % 2]
    offsets = [sum(map(len, titles[:n])) for n in range(len(titles) + 1)]
    catalog = pk.Catalog.from_token_ids(list(chain(*titles)), offsets)
    prompt = pk.Prompt(prefix=[3, 4 + seed], separator=[6], suffix=[7, 8], response_end=[2])
    model = pk.PatchedCausalLM(tiny("llama"), catalog, prompt, item_embeddings=bool(seed))
    with torch.no_grad():
        model.hf_model.lm_head.weight.mul_(1 + seed)
    return model


def test_a_process_forked_meanwhile_does_not_keep_the_lock(folder: Path) -> None:
    with folders.replacing(folder, "last", []) as new:
        (new / "last").write_text("old")
        process = FORK.Process(target=time.sleep, args=(60,))
        process.start()
    write("new")(folder)
    assert read(folder) == complete("new")
    process.kill()
    process.join()


def test_models_survive_kills(folder: Path) -> None:
    check_kills(folder, 3)


@pytest.mark.slow
def test_models_survive_twenty_kills(folder: Path) -> None:
    check_kills(folder, 20)


def check_kills(folder: Path, kills: int) -> None:
    """Kill a process that saves one model and another over each other, at moments drawn by chance."""
    models = [make_model(seed) for seed in (0, 1)]
    started = time.perf_counter()
    for model in models:
        model.save_pretrained(folder)
    seconds = time.perf_counter() - started

    began = folder.parent / "began"

    def save_for_ever() -> None:
        # a progress bar's lock is shared with the parent, which would wait for it for ever after a kill
        logging.disable_progress_bar()
        began.touch()
        while True:
            for model in models:
                model.save_pretrained(folder)

    draw = random.Random(0)
    for _ in range(kills):
        process = FORK.Process(target=save_for_ever)
        began.unlink(missing_ok=True)
        process.start()
        while not began.exists():
            assert process.exitcode is None
            time.sleep(0.001)
        process.join(seconds * draw.uniform(0.1, 1.5))
        assert process.exitcode is None
        process.kill()
        process.join()
        loaded = pk.PatchedCausalLM.from_pretrained(find_model(folder))
        one = models[loaded.prompt == models[1].prompt]
        assert (loaded.prompt, loaded.catalog.fingerprint) == (one.prompt, one.catalog.fingerprint)
        assert loaded.state_dict().keys() == one.state_dict().keys()
        for name, value in loaded.state_dict().items():
            assert torch.equal(value, one.state_dict()[name]), name
