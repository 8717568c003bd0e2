# SPDX-License-Identifier: Apache-2.0
"""Which copy of the package runs, and what it says of extension modules that are not there."""

from __future__ import annotations

import re
import shutil
import sys
import sysconfig
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging_cases import BUILD, install

import patchkern as pk
from patchkern import _build

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the package, in which nothing was built; no other copy is installed."""
    folder = tmp_path / "copy" / "patchkern"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    monkeypatch.setattr(_build, "_FOLDER", folder)
    monkeypatch.setattr(_build, "distributions", lambda name: [])
    return folder


SUFFIX = f".cpython-39-{sysconfig.get_config_var('MULTIARCH') or 'darwin'}.so"


@pytest.mark.parametrize("is_source", [False, True])
@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "patchkern._native has not been built: "),
        ({"_build_info.json": '{"native": true, "reason": ""}'}, "patchkern._native was built, but its file is gone: "),
        (
            {f"_native{SUFFIX}": "", "_build_info.json": '{"native": true, "reason": ""}'},
            "patchkern._native was built for another Python than this "
            f"{sys.implementation.cache_tag} (_native{SUFFIX}): ",
        ),
        ({"_build_info.json": '{"native": false, "reason": "the package was built with PATCHKERN_NATIVE=0"}'}, None),
    ],
    ids=["never built", "file gone", "another Python", "left out"],
)
def test_a_missing_module_has_a_true_reason(
    copy: Path, is_source: bool, files: dict[str, str], reason: str | None
) -> None:
    for name, text in files.items():
        (copy / name).write_text(text)
    if is_source:
        (copy.parent / "setup.py").touch()
    with pytest.raises(ImportError) as caught:
        _build.load("_native")
    said = str(caught.value)
    if reason is None:
        assert said == "the package was built with PATCHKERN_NATIVE=0"
    elif is_source:
        assert said == reason + BUILD.format(root=copy.parent)
    else:
        assert said == f"{reason}{copy} is no complete installation, let pip install the package again"


def test_a_module_that_does_not_load_says_why(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (copy / "_native.abi3.so").touch()
    monkeypatch.delitem(sys.modules, "patchkern._native", raising=False)
    monkeypatch.setattr(pk, "__path__", [str(copy)])
    with pytest.raises(ImportError, match=r"^patchkern\._native does not load: .*_native\.abi3\.so: file too short"):
        _build.load("_native")


@pytest.mark.parametrize("editable", [False, True])
def test_a_clone_names_the_installed_copy_that_it_hides(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, editable: bool
) -> None:
    (copy.parent / "setup.py").touch()
    site = tmp_path / "site"
    installed = install(site, tmp_path / "other clone" if editable else None)
    monkeypatch.setattr(_build, "distributions", lambda name: distributions(name=name, path=[str(site)]))
    assert _build.shadowed_copy() == installed
    where = f", or run elsewhere, where the copy in {installed.parent} is found"
    for module in ("_native", "_cuda"):
        assert _build.missing_reason(module).endswith(": " + BUILD.format(root=copy.parent) + where)


def test_an_editable_install_hides_nothing(copy: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shutil.rmtree(copy)
    assert install(tmp_path / "site", copy.parent) == copy
    found = list(distributions(name="patchkern", path=[str(tmp_path / "site")]))
    monkeypatch.setattr(_build, "distributions", lambda name: found)
    assert len(found) == 1 and _build.shadowed_copy() is None


def test_benchmarks_and_recipes_take_the_installed_copy_first() -> None:
    """Where nothing is installed they take the clone they are in."""
    changes = []
    for script in (*REPOSITORY.glob("bench/*.py"), *REPOSITORY.glob("recipes/*.py")):
        changes += re.findall(r"sys\.path\.\w+\(.*?\)\)", script.read_text())
    assert set(changes) == {"sys.path.append(str(Path(__file__).resolve().parents[1]))"}
