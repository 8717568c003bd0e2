# SPDX-License-Identifier: Apache-2.0
"""What README and docs/ show as code runs as it stands, what they link to and name exists, and api.md is current."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import patchkern as pk

REPOSITORY = Path(__file__).resolve().parents[1]
README = REPOSITORY / "README.md"
DOCS = sorted((REPOSITORY / "docs").glob("*.md"))
PAGES = [README, *DOCS, *(REPOSITORY / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "recipes/LOG.md"))]
WEB = "https://github.com/patchkern/patchkern/blob/main/"


def name_of(page: Path) -> str:
    return page.relative_to(REPOSITORY).as_posix()


def code_blocks(page: Path, language: str = "python") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def without_code(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


# ------------------------------------------------------------------ code


def run(code: str, folder: Path, given: str = "") -> tuple[str, str]:
    """What a fresh interpreter prints, and its errors, that is given the code in an empty folder."""
    pytest.importorskip("transformers", reason="needs transformers")
    pytest.importorskip("pyarrow", reason="needs pyarrow")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=folder, env=environment, input=given, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_the_readmes_block_runs_as_it_stands(tmp_path: Path) -> None:
    (block,) = code_blocks(README)
    printed, _ = run(block, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    rates = dict(re.findall(r"^(model|most popular): +HR@10 (0\.\d+)", printed, flags=re.MULTILINE))
    assert float(rates["model"]) > float(rates["most popular"]), printed
    assert len(re.findall(r"^(?:latest|recommended): +\S", printed, flags=re.MULTILINE)) == 2, printed


# A page's blocks run one after the other in a process of their own. All are forked from one that has imported what
# takes seconds, and nothing of ours: a page says itself what it needs.
EVERY_PAGE = """
import json, os, sys
import pyarrow, transformers.trainer
for code, folder in json.load(sys.stdin):
    child = os.fork()
    if not child:
        os.chdir(folder)
        exec(compile(code, folder, "exec"), {"__name__": "__main__"})
        break
    if os.waitpid(child, 0)[1]:
        print("failed:", os.path.basename(folder), flush=True)
"""


def test_the_blocks_of_every_page_run(tmp_path: Path) -> None:
    # the reference shows signatures, which are no programs
    pages = {page.name: "\n".join(code_blocks(page)) for page in DOCS if page.name != "api.md" and code_blocks(page)}
    for name in pages:
        (tmp_path / name).mkdir()
    assert len(pages) > 5
    printed, errors = run(
        EVERY_PAGE, tmp_path, json.dumps([(code, str(tmp_path / name)) for name, code in pages.items()])
    )
    assert "failed:" not in printed, printed + errors


def test_the_equivalent_computes_the_same_rows() -> None:
    names: dict[str, Any] = {}
    exec(code_blocks(REPOSITORY / "docs" / "how-it-works.md")[0], names)
    catalog = pk.Catalog.from_token_ids([5, 6, 7, 8, 9, 5], [0, 2, 3, 6], item_ids=[10, 20, 30])
    prompt = pk.Prompt(prefix=[1], separator=[2], suffix=[3])
    layout = pk.build_layout(catalog, [[10, 20, 30] * 5, [], [30]], pk.SessionPatches(3, None), prompt)
    weight = torch.randn(16, 41)
    torch.testing.assert_close(pk.pool_rows(weight, layout), names["pool_rows"](weight, layout), rtol=1e-6, atol=1e-6)


def test_nothing_is_left_out_of_the_readmes_code() -> None:
    text = README.read_text(encoding="utf-8")
    assert not [block for block in re.findall(r"```.*?```", text, flags=re.DOTALL) if "..." in block]


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 160


# ------------------------------------------------------------------ links


def links(page: Path) -> list[str]:
    text = re.sub(r"`[^`\n]*`", "code", without_code(page))
    return re.findall(r"\]\(([^()\s]+)\)", text)


def anchors(page: Path) -> set[str]:
    """Those that GitHub makes of the headings."""
    seen: Counter[str] = Counter()
    found = set()
    for heading in re.findall(r"^#+ (.*)$", without_code(page), flags=re.MULTILINE):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        anchor = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        found.add(f"{anchor}-{seen[anchor]}" if seen[anchor] else anchor)
        seen[anchor] += 1
    return found


def targets(page: Path) -> Iterator[tuple[Path, str]]:
    """File and anchor of every link within the project."""
    for link in links(page):
        inside = link.startswith(WEB)
        if not inside and re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.removeprefix(WEB).partition("#")
        base = REPOSITORY if inside else page.parent
        yield (base / path).resolve() if path else page, anchor


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target, anchor in targets(page):
        assert target.exists(), f"{name_of(target)} does not exist"
        if anchor:
            assert anchor in anchors(target), f"{name_of(target)} has no heading #{anchor}"


def test_the_readmes_links_work_where_it_is_shown_alone() -> None:
    assert not [link for link in links(README) if not link.startswith("https://")]


@pytest.mark.parametrize("page", DOCS, ids=name_of)
def test_pages_are_linked_both_ways(page: Path) -> None:
    assert README in [target for target, _ in targets(page)]
    index = REPOSITORY / "docs" / "README.md"
    assert index in [target for target, _ in targets(README)]
    assert page == index or page in [target for target, _ in targets(index)]


# ------------------------------------------------------------------ names


def resolves(dotted: str) -> bool:
    """Whether a name is a module, or leads from one to something."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        module = ".".join(parts[:length])
        try:
            found: Any = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not module.startswith(error.name):
                pytest.skip(f"needs {error.name}")
            continue
        return all((found := getattr(found, part, None)) is not None for part in parts[length:])
    return False


# The changelog tells of names that were.
@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=name_of)
def test_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    dotted = set(re.findall(r"(?<![\w/.-])patchkern(?:\.[A-Za-z]\w*)+(?![\w/-])", text))
    dotted |= {f"patchkern.{name}" for name in re.findall(r"(?<![\w.])pk\.([A-Za-z]\w*)", text)}
    wrong = [name for name in sorted(dotted) if not name.endswith((".json", ".py")) and not resolves(name)]
    assert not wrong
    folders, kinds = "patchkern|bench|recipes|tests|csrc", "py|h|cu|md|csv|png"
    files = set(re.findall(rf"(?<![\w/.-])(?:{folders})/[\w/.-]+\.(?:{kinds})", text))
    assert not [file for file in sorted(files) if not (REPOSITORY / file).is_file()]


def test_the_reference_says_what_the_docstrings_say() -> None:
    pytest.importorskip("griffe", reason="needs griffe, which reads the docstrings")
    path = REPOSITORY / "docs" / "generate_api.py"
    spec = importlib.util.spec_from_file_location("generate_api", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    current = (REPOSITORY / "docs" / "api.md").read_text(encoding="utf-8") == module.render()
    assert current, "docs/api.md is not what the docstrings say; run `make docs`"
