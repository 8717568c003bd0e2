# SPDX-License-Identifier: Apache-2.0
"""Commands run in a clean environment, and what pip leaves behind."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

BUILD = "run `pip install -e .` in the source folder {root}"


def run(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command that may fail; its two streams end up in ``stdout``."""
    return subprocess.run(
        [str(part) for part in command], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options
    )


def checked(*command: str | Path, **options: Any) -> str:
    done = run(*command, **options)
    assert done.returncode == 0, done.stdout
    return done.stdout


def environment(**changes: str | None) -> dict[str, str]:
    """This process's environment with changes; None removes a variable."""
    names: dict[str, str | None] = dict(os.environ)
    names |= dict.fromkeys(("PATCHKERN_NATIVE", "CXX", "CXXFLAGS", "PYTHONPATH"))
    names |= dict.fromkeys(("PATCHKERN_CUDA_ARCHS", "CUDACXX", "CUDA_HOME", "CUDA_PATH"))
    names |= {"PATCHKERN_CUDA": "0", **changes}
    return {name: value for name, value in names.items() if value is not None}


def install(site: Path, copy: Path | None = None) -> Path:
    """Make what pip leaves behind: of an editable install of ``copy``, else of a wheel."""
    record = site / "patchkern-0.1.0.dist-info"
    record.mkdir(parents=True)
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: patchkern\nVersion: 0.1.0\n")
    if copy is not None:
        url = {"url": copy.as_uri(), "dir_info": {"editable": True}}
        (record / "direct_url.json").write_text(json.dumps(url))
    target = (copy or site) / "patchkern"
    target.mkdir(parents=True)
    (target / "__init__.py").touch()
    return target
