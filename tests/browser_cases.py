# SPDX-License-Identifier: Apache-2.0
"""A browser without a window, spoken to over pipes in the DevTools protocol."""

from __future__ import annotations

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

SECONDS = 60


class Page:
    """A page of a browser that has loaded ``url``.

    Attributes:
        errors: what its scripts, its console or its security policy complained of.
    """

    def __init__(self, commands: int, events: int) -> None:
        self.errors: list[str] = []
        self._commands, self._events = commands, events
        self._unread = b""
        self._numbers = itertools.count(1)
        self._session: str | None = None
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self._call(f"{domain}.enable")

    def open(self, url: str) -> None:
        self._call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def run(self, script: str) -> Any:
        """The value of a script, which may be a promise."""
        said = self._call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in said, said["exceptionDetails"]
        return said["result"].get("value")

    def wait(self, condition: str) -> None:
        """Until a script's value is true."""
        end = time.monotonic() + SECONDS
        while not self.run(f"Boolean({condition})"):
            assert time.monotonic() < end, (
                f"never true: {condition}; the page says {self.run('document.body.innerText')}"
            )
            time.sleep(0.02)

    def type(self, text: str) -> None:
        """Into whatever has the focus."""
        self._call("Input.insertText", text=text)

    def press(self, key: str) -> None:
        for kind in ("rawKeyDown", "keyUp"):
            self._call("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot")["data"]))

    def _call(self, method: str, **params: Any) -> Any:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            said = self._read()
            if said.get("id") == number:
                assert "error" not in said, said["error"]
                return said["result"]
            if said.get("method") == "Runtime.exceptionThrown":
                self.errors.append(str(said["params"]["exceptionDetails"]))
            elif said.get("method") == "Log.entryAdded":
                self.errors.append(said["params"]["entry"]["text"])

    def _read(self) -> Any:
        while b"\0" not in self._unread:
            assert select.select([self._events], [], [], SECONDS)[0], "the browser does not answer"
            got = os.read(self._events, 1 << 16)
            assert got, "the browser has ended"
            self._unread += got
        message, _, self._unread = self._unread.partition(b"\0")
        return json.loads(message)


@contextmanager
def browser_page(profile: Path, width: int = 1200, height: int = 1000) -> Iterator[Page]:
    """A page of Chromium, or a skipped test where there is none."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("needs Chromium, as of Debian's package chromium")
    its_input, commands = os.pipe()
    events, its_output = os.pipe()
    arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run"]
    arguments += [f"--user-data-dir={profile}", f"--window-size={width},{height}", "--disable-background-networking"]
    # the browser reads from descriptor 3 and writes to 4
    shell = f'exec "$0" "$@" 3<&{its_input} 4>&{its_output}'
    process = subprocess.Popen(
        ["bash", "-c", shell, chromium, *arguments],
        pass_fds=(its_input, its_output),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(its_input)
    os.close(its_output)
    try:
        yield Page(commands, events)
    finally:
        process.terminate()
        process.wait(SECONDS)
        os.close(commands)
        os.close(events)
