# SPDX-License-Identifier: Apache-2.0
"""The build: what is in the wheel, what the extension modules link, and what happens without a compiler."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch
from packaging_cases import BUILD, checked, environment, install, run

import patchkern as pk
from patchkern import _build

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPOSITORY = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())


@pytest.fixture(scope="session")
def module() -> Path:
    """The native module of the package under test."""
    return file_of("_native")


@pytest.fixture(scope="session")
def cuda_module() -> Path:
    """The CUDA module of the package under test."""
    return file_of("_cuda")


def file_of(module: str) -> Path:
    try:
        return Path(str(_build.load(module).__file__))
    except ImportError as error:
        pytest.skip(str(error))


# ------------------------------------------------------------------ the sources


def test_native_sources_include_no_torch_header() -> None:
    sources = [path for path in (REPOSITORY / "csrc").iterdir() if path.suffix in (".h", ".cpp", ".cu", ".cuh")]
    assert sources
    for source in sources:
        includes = re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)', source.read_text(), re.MULTILINE)
        foreign = [header for header in includes if re.match(r"(torch|ATen|c10|caffe2)\b", header)]
        assert not foreign, f"{source.name} includes {foreign}"


def test_kernels_and_layout_know_no_python() -> None:
    for source in (REPOSITORY / "csrc").iterdir():
        if source.name not in ("bind.h", "bindings.cpp", "bindings_cuda.cpp"):
            assert not re.search(r"#\s*include\s*[<\"](bind|Python)\.h", source.read_text()), source.name


def test_setup_imports_neither_torch_nor_a_downloader() -> None:
    imported: set[str] = set()
    for node in ast.walk(ast.parse((REPOSITORY / "setup.py").read_text())):
        if isinstance(node, ast.Import):
            imported.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
    assert imported <= {*sys.stdlib_module_names, "setuptools"}
    assert not imported & {"urllib", "http", "socket", "ftplib", "ctypes"}


def test_torch_is_no_build_requirement() -> None:
    names = {re.match(r"[\w-]+", line)[0] for line in PYPROJECT["build-system"]["requires"]}  # type: ignore[index]
    assert names == {"setuptools", "ninja"}


def test_version_is_said_once() -> None:
    assert pk.__version__ == PYPROJECT["project"]["version"]
    assert f"## [{pk.__version__}]" in (REPOSITORY / "CHANGELOG.md").read_text()


def test_constraints_pin_every_requirement_for_every_python() -> None:
    pinned: dict[str, set[str]] = {}
    for line in (REPOSITORY / "constraints.txt").read_text().splitlines():
        if not line.startswith("#"):
            pin = re.fullmatch(r'([a-z0-9.-]+)==[\w.]+( ; python_version (?:<|>=) "3.11")?', line)
            assert pin, f"not an exact pin: {line}"
            pinned.setdefault(pin[1], set()).add((pin[2] or "").strip(" ;"))
    everywhere = [{""}, {'python_version < "3.11"', 'python_version >= "3.11"'}]
    project = PYPROJECT["project"]
    wanted = PYPROJECT["build-system"]["requires"] + project["dependencies"]
    for name, extra in project["optional-dependencies"].items():
        wanted += extra if name != "flash" else []  # chosen by the CUDA that is there, and built against its torch
    for requirement in wanted:
        name = re.match(r"[\w-]+", requirement)[0]  # type: ignore[index]
        if name not in ("patchkern", "triton"):  # torch for CUDA requires one triton and no other
            assert pinned.get(name) in everywhere, f"{requirement} is not pinned for every Python"


def test_install_page_names_every_extra_and_switch() -> None:
    page = (REPOSITORY / "docs" / "install.md").read_text()
    sources = [REPOSITORY / "setup.py", *(REPOSITORY / "patchkern").rglob("*.py")]
    switches = {name for source in sources for name in re.findall(r"PATCHKERN_[A-Z]\w+", source.read_text())}
    assert {"PATCHKERN_NATIVE", "PATCHKERN_BACKEND"} <= switches
    extras = {f"| `{name}` |" for name in PYPROJECT["project"]["optional-dependencies"]}
    assert [name for name in sorted(switches | extras) if name not in page] == []


# ------------------------------------------------------------------ the native module


ALLOWED = r"(libstdc\+\+|libgcc_s|libc|libm|libpthread|libdl|librt|ld-linux[\w-]*|libasan|libubsan)\.so\.\d+"
needs_readelf = pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf is not installed")


@needs_readelf
@pytest.mark.parametrize("fixture", ["module", "cuda_module"])
def test_modules_link_the_c_library_only(fixture: str, request: pytest.FixtureRequest) -> None:
    """No libtorch, and no CUDA runtime beside torch's."""
    linked = re.findall(r"\(NEEDED\).*\[(.+)\]", checked("readelf", "-d", request.getfixturevalue(fixture)))
    assert linked
    assert [name for name in linked if not re.fullmatch(ALLOWED, name)] == []


@needs_readelf
@pytest.mark.parametrize("fixture", ["module", "cuda_module"])
def test_modules_ask_for_no_symbol_of_torch_or_cuda_and_offer_their_entry_only(
    fixture: str, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(fixture)
    symbols = checked("readelf", "-W", "--dyn-syms", path)
    assert "PyModule" in symbols or "Py_" in symbols
    assert re.findall(r"UND \S*(?:torch|c10|2at\d|caffe|cuda|cublas)\S*", symbols) == []
    offered = re.findall(r"(?:FUNC|OBJECT) +GLOBAL +DEFAULT +\d+ (\S+)", symbols)
    assert offered == [f"PyInit_{path.name.partition('.')[0]}"]


FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))


@pytest.mark.skipif(FREE_THREADED, reason="a free-threaded Python has no stable ABI")
@pytest.mark.parametrize("fixture", ["module", "cuda_module"])
def test_modules_are_for_every_python(fixture: str, request: pytest.FixtureRequest) -> None:
    assert request.getfixturevalue(fixture).suffixes == [".abi3", ".so"]


WITHOUT_TORCH = """
import importlib.util, sys
sys.modules["torch"] = None  # importing it is an error from here on
import numpy as np

spec = importlib.util.spec_from_file_location("patchkern._native", sys.argv[1])
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)

def at(array):
    return array.ctypes.data

weight = np.random.default_rng(0).standard_normal((7, 41)).astype(np.float32)
titles = [[2, 3, 3], [4], [0, 6]]
token_ids = np.array(sum(titles, []), np.int32)
offsets = np.array([0, 3, 4, 6], np.int32)
items = np.array([2, 0, 1], np.int32)
lo = np.array([-1 - 5, 0, 1, 0], np.int32)  # token 5; item 2; items 0 and 1 pooled; all three pooled
hi = np.array([0, 1, 3, 3], np.int32)
mean = [weight[title].mean(0) for title in titles]
wanted = np.stack([weight[5], mean[2], (mean[0] + mean[1]) / 2, (mean[2] + mean[0] + mean[1]) / 3])

levels = native.isa_levels()
assert levels, "no instruction set"
for isa in levels:
    out = np.full((4, 41), np.nan, np.float32)
    status = native.pool_rows(0, at(weight), 7, 41, 41, at(lo), at(hi), 4, at(items), 3, at(token_ids), 6,
                              at(offsets), 3, 0, 0, 0, 0, 1.0, at(out), 41, 2, isa)
    assert status == (0, 0), status
    np.testing.assert_allclose(out, wanted, rtol=2e-6, atol=2e-6)
print("pooled with", *levels)
"""


def test_native_module_pools_numpy_memory_without_torch(module: Path) -> None:
    """No torch in the process at all: nothing in one build can depend on which version there is."""
    said = checked(sys.executable, "-c", WITHOUT_TORCH, module, env=environment())
    assert said.startswith("pooled with baseline")


LOAD_CUDA = """
import importlib.util, sys
sys.modules["torch"] = None
spec = importlib.util.spec_from_file_location("patchkern._cuda", sys.argv[1])
cuda = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cuda)
print(cuda.runtime_version(), cuda.driver_version(), cuda.error_string(35), sep="\\n")
"""


def test_cuda_module_loads_without_torch_or_a_driver(cuda_module: Path) -> None:
    runtime, driver, message = checked(sys.executable, "-c", LOAD_CUDA, cuda_module, env=environment()).splitlines()
    release = re.search(r"cuda_(\d+)\.(\d+)\.", _build.build_info()["nvcc"])
    assert release is not None
    assert int(runtime) == 1000 * int(release[1]) + 10 * int(release[2])
    assert int(driver) >= 0
    assert "driver version is insufficient" in message


# ------------------------------------------------------------------ building


def build_native(folder: Path, **changes: str | None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", folder / "lib", "--build-temp", folder / "temp"]
    return run(*command, cwd=REPOSITORY, env=environment(**changes))


WITHOUT = "the package was built without a C++ compiler: "


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"CXX": "/nowhere/c++"}, WITHOUT + "CXX=/nowhere/c++ was not found"),
        ({"PATH": "/nowhere"}, WITHOUT + "none of c++, g++, clang++ was found"),
        ({"PATCHKERN_NATIVE": "0"}, "the package was built with PATCHKERN_NATIVE=0"),
    ],
    ids=["CXX missing", "PATH empty", "switched off"],
)
def test_native_can_be_left_out(tmp_path: Path, changes: dict[str, str], why: str) -> None:
    package = tmp_path / "lib" / "patchkern"
    package.mkdir(parents=True)
    for old in ("_native.abi3.so", "_native.cpython-39-darwin.so"):
        (package / old).touch()
    done = build_native(tmp_path, **changes)
    assert done.returncode == 0, done.stdout
    assert [path.name for path in package.iterdir()] == ["_build_info.json"]
    info = json.loads((package / "_build_info.json").read_text())
    assert (info["native"], info["reason"]) == (False, why)
    assert f"is left out: {why}" in done.stdout


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"PATCHKERN_NATIVE": "1", "CXX": "/nowhere/c++"}, "no C++ compiler: CXX=/nowhere/c++ was not found"),
        ({"PATCHKERN_NATIVE": "1", "PATH": "/nowhere"}, "no C++ compiler: none of c++, g++, clang++ was found"),
        ({"PATCHKERN_NATIVE": "yes"}, "PATCHKERN_NATIVE must be auto, 0 or 1, got 'yes'"),
        ({"CXX": "false"}, "cannot be built: PATCHKERN_NATIVE=0 builds the package without it"),
        ({"PATCHKERN_CUDA": "1", "CUDACXX": "/nowhere/nvcc"}, "no CUDA compiler: /nowhere/nvcc was not found"),
        (
            {"PATCHKERN_CUDA": "1", "CUDA_HOME": "/nowhere", "PATH": str(Path(shutil.which("c++") or "").parent)},
            "no CUDA compiler: /nowhere/bin/nvcc or nvcc was not found",
        ),
        (
            {"PATCHKERN_CUDA": "1", "PATCHKERN_NATIVE": "0", "CXX": "/nowhere/c++"},
            "no CUDA compiler: nvcc needs a C++ compiler, and CXX=/nowhere/c++ was not found",
        ),
        ({"PATCHKERN_CUDA": "on"}, "PATCHKERN_CUDA must be auto, 0 or 1, got 'on'"),
        (
            {"PATCHKERN_CUDA": "auto", "CUDACXX": "false", "PATCHKERN_CUDA_ARCHS": "90", "PATCHKERN_NATIVE": "0"},
            "cannot be built: PATCHKERN_CUDA=0 builds the package without it",
        ),
        (
            {"PATCHKERN_CUDA": "auto", "CUDACXX": "false"},
            "false --list-gpu-arch failed: PATCHKERN_CUDA=0 builds the package without it",
        ),
        (
            {"PATCHKERN_CUDA": "auto", "CUDACXX": "true", "PATCHKERN_CUDA_ARCHS": "hopper"},
            "PATCHKERN_CUDA_ARCHS must be numbers like 80;90, got 'hopper'",
        ),
        ({"PATCHKERN_CUDA": "auto", "CUDACXX": "true"}, "true knows none of the GPUs 80, 90, 100"),
    ],
    ids=[
        "CXX missing",
        "PATH empty",
        "bad switch",
        "compiler fails",
        "CUDACXX missing",
        "no nvcc anywhere",
        "nvcc without C++",
        "bad CUDA switch",
        "nvcc fails",
        "nvcc cannot list",
        "bad archs",
        "nvcc too old",
    ],
)
def test_build_fails_loudly(tmp_path: Path, changes: dict[str, str], message: str) -> None:
    done = build_native(tmp_path, **changes)
    assert done.returncode != 0
    last = done.stdout.splitlines()[-1]
    assert message in last
    assert re.search(r"PATCHKERN_\w+", last), f"{last} names no switch"
    assert not list(tmp_path.glob("lib/**/*.so"))


FAKE_NVCC = """#!/bin/sh
case "$1" in
  --version) echo 'Cuda compilation tools'; echo 'Build cuda_12.4.r12.4/compiler.1'; exit;;
  --list-gpu-arch) printf 'compute_80\\ncompute_90\\n'; exit;;
esac
echo "$@" >> "$(dirname "$0")/calls"
while [ "$1" != -o ]; do [ "$1" = -MF ] && echo 'nothing:' > "$2"; shift; done
touch "$2"
"""


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("variable", ["CUDACXX", "CUDA_HOME", "CUDA_PATH", "PATH"])
def test_nvcc_is_found_and_told_the_gpus_it_knows(variable: str, tmp_path: Path) -> None:
    """With an nvcc that only writes down what it was told."""
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(FAKE_NVCC)
    nvcc.chmod(0o755)
    package = tmp_path / "lib" / "patchkern"
    package.mkdir(parents=True)
    (package / "_cuda.cpython-39-darwin.so").touch()  # of an older build: it must go, or a Python would find it first
    home, path = str(tmp_path / "cuda"), os.pathsep.join([str(nvcc.parent), os.environ["PATH"]])
    where = {"CUDACXX": str(nvcc), "CUDA_HOME": home, "CUDA_PATH": home, "PATH": path}[variable]
    done = build_native(tmp_path, **{variable: where, "PATCHKERN_CUDA": "auto", "PATCHKERN_NATIVE": "0"})
    assert done.returncode == 0, done.stdout
    info = json.loads((package / "_build_info.json").read_text())
    assert info["cuda"] and info["cuda_reason"] == "" and not info["native"]
    assert info["archs"] == ["80", "90"] and info["nvcc"] == "Build cuda_12.4.r12.4/compiler.1"
    assert [path.name.partition(".")[0] for path in package.glob("*.so")] == ["_cuda"]
    calls = (nvcc.parent / "calls").read_text().splitlines()
    kernels = [call for call in calls if ".cu " in call]
    assert len(kernels) == 2 and len(calls) == 4
    for call in kernels:
        assert re.findall(r",code=(\S+)", call) == ["sm_80", "sm_90", "compute_90"]
    assert "-cudart static" in calls[-1] and "-shared" in calls[-1]


def test_archs_are_chosen_by_the_environment(tmp_path: Path) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(FAKE_NVCC)
    nvcc.chmod(0o755)
    archs = {"PATCHKERN_CUDA_ARCHS": "sm_120, 86"}
    done = build_native(tmp_path, PATCHKERN_CUDA="1", PATCHKERN_NATIVE="0", CUDACXX=str(nvcc), **archs)
    assert done.returncode == 0, done.stdout
    assert "code=sm_86 -gencode=arch=compute_120,code=sm_120 -gencode=arch=compute_120,code=compute_120" in done.stdout


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources without any build output."""
    folder = tmp_path_factory.mktemp("source")
    for part in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / part, folder)
    leave = shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__")
    for part in ("patchkern", "csrc"):
        shutil.copytree(REPOSITORY / part, folder / part, ignore=leave)
    return folder


@pytest.fixture(scope="session")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source]
    checked(*pip, env=environment(PATCHKERN_NATIVE="1", CXXFLAGS="-O0"))  # quickly
    (built,) = folder.iterdir()
    return built


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_wheel_holds_the_package_and_its_native_module(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
    python = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "patchkern").rglob("*.py")}
    assert python <= names
    beside = {name for name in names - python if ".dist-info/" not in name}
    suffix = sysconfig.get_config_var("EXT_SUFFIX") if FREE_THREADED else ".abi3.so"
    files = ("py.typed", "_build_info.json", f"_native{suffix}", "serving/server/page.html")
    assert beside == {f"patchkern/{name}" for name in files}
    if not FREE_THREADED:
        assert "-cp310-abi3-" in wheel.name
    required = re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", metadata, re.MULTILINE)
    assert sorted(required) == ["numpy", "torch", "tqdm"]
    assert re.findall(r"^Project-URL: (\w+), https://", metadata, re.MULTILINE) == list(PYPROJECT["project"]["urls"])


USE = """
import warnings, patchkern as pk, torch
from patchkern import _build
catalog = pk.Catalog.from_token_ids([1, 2, 3], [0, 2, 3])
prompt = pk.Prompt(prefix=[4], separator=[5], suffix=[6], response_end=[7])
layout = pk.build_layout(catalog, [[0, 1, 0]], pk.ItemPatches(keep_text=1, max_items=5), prompt)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        rows = pk.pool_rows(torch.eye(8), layout)
assert rows[1].tolist() == [0, 0.5, 0.5, 0, 0, 0, 0, 0], rows
print(pk.__file__, len(caught), *pk.backends()["native"], sep="\\n")
"""


def use(target: Path, cwd: Path) -> tuple[str, int, bool, str]:
    """Use the package installed under ``target``: its file, the warnings, and the native backend's status."""
    said = checked(sys.executable, "-c", USE, cwd=cwd, env=environment(PYTHONPATH=str(target)))
    file, warned, usable, reason = said.strip().splitlines()
    return file, int(warned), usable == "True", reason


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_installed_wheel_runs_on_the_native_backend(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    checked(sys.executable, "-m", "pip", "install", "--no-deps", "--target", target, wheel, env=environment())
    file, warned, usable, reason = use(target, tmp_path)
    assert Path(file).parent == target / "patchkern"
    assert (usable, warned) == (True, 0), reason


@pytest.mark.slow
@pytest.mark.skipif("PATCHKERN_OTHER_PYTHON" not in os.environ, reason="PATCHKERN_OTHER_PYTHON names no interpreter")
def test_installed_wheel_runs_under_another_torch(wheel: Path, tmp_path: Path) -> None:
    """PATCHKERN_OTHER_PYTHON: an interpreter of any version in an environment with another torch."""
    other = os.environ["PATCHKERN_OTHER_PYTHON"]
    target = tmp_path / "site"
    checked(sys.executable, "-m", "pip", "install", "--no-deps", "--target", target, wheel, env=environment())
    with_path = environment(PYTHONPATH=str(target))
    version = checked(other, "-c", "import torch; print(torch.__version__)", cwd=tmp_path, env=with_path).strip()
    assert version != torch.__version__
    said = checked(other, "-c", USE, cwd=tmp_path, env=with_path).splitlines()
    assert said[:3] == [str(target / "patchkern" / "__init__.py"), "0", "True"]


@pytest.mark.slow
def test_package_built_without_a_compiler_runs_and_says_why(source: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(source, tmp_path / "source", ignore=shutil.ignore_patterns("build", "*.egg-info"))
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--target", tmp_path / "site"]
    checked(*pip, copy, env=environment(CXX="/nowhere/c++"))
    file, warned, usable, reason = use(tmp_path / "site", tmp_path)
    assert Path(file).parent == tmp_path / "site" / "patchkern"
    assert (usable, warned) == (False, 1)
    assert reason == WITHOUT + "CXX=/nowhere/c++ was not found"


# ------------------------------------------------------------------ python -m patchkern


def test_report_in_a_clone_where_nothing_was_built(source: Path, tmp_path: Path) -> None:
    """Another copy is installed. Its modules are not borrowed, and the advice is not what was just done."""
    site = install(tmp_path / "site").parent
    said = checked(sys.executable, "-m", "patchkern", cwd=source, env=environment(PYTHONPATH=str(site)))
    lines = said.splitlines()
    assert f"patchkern     {pk.__version__} from the source folder {source}" in lines
    assert f"not used      the copy in {site}, which is found later" in lines
    advice = f"{BUILD.format(root=source)}, or run elsewhere, where the copy in {site} is found"
    assert f"native build  none: patchkern._native has not been built: {advice}" in lines
    assert f"native        not usable: patchkern._native has not been built: {advice}" in lines
    assert f"cuda          not usable: patchkern._cuda has not been built: {advice}" in lines
    assert "pip install ." not in said


# ------------------------------------------------------------------ python -m patchkern

REPORT = """
import runpy, sys
for name in ("transformers", "tokenizers", "pyarrow", "peft", "accelerate", "safetensors", "matplotlib"):
    sys.modules[name] = None  # as if it were not installed
runpy.run_module("patchkern", run_name="__main__")
"""


def test_report_says_what_a_bug_report_needs_with_torch_and_numpy_alone() -> None:
    lines = checked(sys.executable, "-c", REPORT, cwd=REPOSITORY, env=environment()).splitlines()
    said = {line[:14].strip(): line[14:] for line in lines}
    assert said["patchkern"] == f"{pk.__version__} {_build.origin()}"
    assert said["python"].startswith(".".join(map(str, sys.version_info[:3])))
    for name in (
        "torch",
        "numpy",
        "triton",
        "transformers",
        "platform",
        "cpu",
        "cpu features",
        "threads",
        "native isa",
        "cuda build",
    ):
        assert said[name]
    for backend, status in pk.backends().items():
        assert status.reason in said[backend]
