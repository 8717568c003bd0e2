# SPDX-License-Identifier: Apache-2.0
"""The page in a real browser: titles are typed, items recommended, and the history's rows shown."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from browser_cases import browser_page
from server_cases import ITEMS, TITLES, language_model

import patchkern as pk
from patchkern.serving.server.app import create_app
from patchkern.serving.server.limits import Limits
from patchkern.serving.server.served import Served
from patchkern.serving.server.service import Service

uvicorn = pytest.importorskip("uvicorn", reason="needs uvicorn, of the extra serving")

pytestmark = pytest.mark.slow

PASTE = """
    const clipboardData = new DataTransfer();
    clipboardData.setData("text", %s);
    document.querySelector("#query").dispatchEvent(new ClipboardEvent("paste", { cancelable: true, clipboardData }));
"""


@contextmanager
def listening(model: Any) -> Iterator[str]:
    """The address of a server on a port of its own."""
    app = create_app(Service(lambda: Served(model), Limits()))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        end = time.monotonic() + 60
        while not server.started:
            assert time.monotonic() < end
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join()


def test_a_person_types_titles_and_sees_what_comes_of_them(tmp_path: Path) -> None:
    titles = TITLES | {ITEMS[1]: "<b>Brazil</b> & 'others'"}  # which must be shown, not obeyed
    model, _ = language_model(pk.SessionPatches(2, None, align="start"), titles)
    with listening(model) as address, browser_page(tmp_path) as page:
        page.open(address)
        page.wait("document.querySelector('#search').options.length === 2")
        assert "40 titles" in page.run("document.querySelector('#about').textContent")
        page.run("document.querySelector('#query').focus()")
        chosen = []
        for typed, title in [("amel", "Amélie 0"), ("the brazil 5", "The Brazil 5"), ("& 'oth", titles[ITEMS[1]])]:
            page.type(typed)
            page.wait(f"document.querySelector('#suggestions li')?.textContent === {js(title)}")
            page.press("Enter")
            chosen.append(title)
            page.wait(f"document.querySelectorAll('#history li').length === {len(chosen)}")
        page.type("m")
        page.wait("document.querySelectorAll('#suggestions li').length > 2")
        second = page.run("document.querySelectorAll('#suggestions li')[1].textContent")
        page.press("ArrowDown")
        page.press("Enter")
        chosen.append(second)
        page.run(PASTE % js("alien 2\nalien 6\nnowhere"))
        chosen += ["Alien 2", "Alien 6"]
        page.wait("document.querySelector('#problem').textContent === 'Not found: nowhere'")
        page.wait(f"document.querySelectorAll('#entries li').length && {texts('#history span')}.length === 6")
        assert page.run(texts("#history span")) == chosen

        ids = [next(item for item in titles if titles[item] == title) for title in chosen]
        (expected,) = model.recommend([ids], k=10, search="items", exclude_seen=True)
        wanted = [titles[item] for item, _ in expected]
        page.wait(f"{js(wanted)}.join() === {texts('#items li span:nth-of-type(3)')}.join()")
        scores = [f"{score:.2f}".replace("-", "−") for _, score in expected]
        assert page.run(texts("#items li span:nth-of-type(4)")) == scores

        kinds = ["session", "item", "item", "text", "text"]
        page.wait(
            f"[...document.querySelectorAll('#entries li')].map(x => x.dataset.kind).join() === {js(','.join(kinds))}"
        )
        shown = page.run(texts("#entries li > span:nth-of-type(2)"))
        assert shown == [" · ".join(chosen[:2]), *chosen[2:]]
        layout = pk.build_layout(model.catalog, [ids], model.policy, model.prompt)
        facts = [6, layout.history_tokens, layout.history_rows, f"{layout.compression_ratio:.1f}×"]
        assert page.run(texts("#facts b")) == list(map(str, facts))
        assert page.run("document.querySelectorAll('#strip i').length") == layout.history_rows
        page.screenshot(tmp_path / "page.png")

        page.run("document.querySelector('#search').value = 'beam'; document.querySelector('#search').onchange()")
        (by_title,) = model.recommend([ids], k=10, search="beam", exclude_seen=True)
        wanted = [titles[item] for item, _ in by_title]
        page.wait(f"{js(wanted)}.join() === {texts('#items li span:nth-of-type(3)')}.join()")

        kept = page.run("location.href")
        page.open("about:blank")
        page.open(kept)  # a link to what was chosen
        page.wait(f"{texts('#history span')}.join() === {js(chosen)}.join()")
        page.run("document.querySelector('#clear').click()")
        page.wait("document.querySelector('#compressed').hidden && !document.querySelector('#history li')")
        page.run("document.querySelector('#example').click()")
        page.wait(
            "document.querySelectorAll('#history li').length === 24 && document.querySelectorAll('#items li').length"
        )
        assert page.errors == []


def js(value: Any) -> str:
    return json.dumps(value)


def texts(selector: str) -> str:
    """A script for the texts of all elements."""
    return f"[...document.querySelectorAll({js(selector)})].map(element => element.textContent)"
