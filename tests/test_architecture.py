# SPDX-License-Identifier: Apache-2.0
"""The layers of the package, as the contract in pyproject.toml has them, and its front door."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import patchkern as pk

REPOSITORY = Path(__file__).resolve().parents[1]
LINT_IMPORTS = shutil.which("lint-imports", path=os.pathsep.join([str(Path(sys.executable).parent), os.defpath]))


def lint_imports(repository: Path) -> subprocess.CompletedProcess[str]:
    if LINT_IMPORTS is None:
        pytest.skip("import-linter is not installed")
    return subprocess.run(
        [LINT_IMPORTS, "--no-cache"],
        cwd=repository,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(repository)},
    )


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    shutil.copytree(
        REPOSITORY / "patchkern", tmp_path / "patchkern", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    return tmp_path


def test_arrows_point_down() -> None:
    result = lint_imports(REPOSITORY)
    assert result.returncode == 0, result.stdout
    assert "2 kept, 0 broken" in result.stdout


@pytest.mark.parametrize(
    ("module", "line", "said"),
    [
        (
            "batch/catalog.py",
            "from patchkern.ops.pool_rows import pool_rows",
            "patchkern.batch is not allowed",
        ),
        ("search/trie.py", "import patchkern.models.patched_lm", "patchkern.search is not allowed"),
        (
            "search/trie.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from patchkern.search.recommend import recommend",
            "no circles inside a wing",
        ),
        (
            "ops/reference.py",
            "def late():\n    from patchkern.search import trie",
            "patchkern.ops is not allowed",
        ),
    ],
    ids=["a layer up", "a model", "for types only", "inside a function"],
)
def test_a_forbidden_import_is_seen(clone: Path, module: str, line: str, said: str) -> None:
    file = clone / "patchkern" / module
    file.write_text(f"{file.read_text()}\n{line}\n")
    result = lint_imports(clone)
    assert result.returncode == 1
    assert said in " ".join(result.stdout.split())


def test_a_new_wing_must_be_given_its_place(clone: Path) -> None:
    (clone / "patchkern" / "attic").mkdir()
    (clone / "patchkern" / "attic" / "__init__.py").touch()
    assert lint_imports(clone).returncode == 1


def test_no_contract_has_exceptions() -> None:
    contracts = (
        (REPOSITORY / "pyproject.toml").read_text().partition("[tool.importlinter]")[2].partition("[tool.mypy]")[0]
    )
    assert "layers" in contracts and "ignore" not in contracts and "exclude" not in contracts


def test_dir_is_the_public_names() -> None:
    assert dir(pk) == sorted(pk.__all__)
    assert all(getattr(pk, name) is not None for name in pk.__all__)


WITHOUT_EXTRAS = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("transformers", "safetensors", "tokenizers", "accelerate", "pyarrow"):
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Absent())
import torch
import patchkern as pk

catalog = pk.Catalog.from_titles({7: "Alien", 8: "Aliens"}, lambda title: list(title.encode()))
prompt = pk.Prompt(prefix=[256], separator=[257], suffix=[258], response_end=[259])
batch = pk.compress_batch(torch.ones(260, 4), catalog, [[7, 8], [8]], pk.ItemPatches(1), prompt, targets=[8, 7])
print(len(dir(pk)), batch.inputs_embeds.shape[1])
"""


def test_the_core_needs_torch_and_numpy_alone() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_EXTRAS], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(len(pk.__all__)), "4"]
