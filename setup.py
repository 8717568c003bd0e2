# SPDX-License-Identifier: Apache-2.0
"""Builds `patchkern._native` and `patchkern._cuda` with ninja. Everything else about the package is in pyproject.toml.

PATCHKERN_NATIVE=auto (default) builds the C++ module when there is a C++ compiler, 1 requires it, 0 leaves it out.
CXX names the compiler, CXXFLAGS adds flags.
PATCHKERN_CUDA=auto (default) builds the CUDA module when there is nvcc (CUDACXX, else that of CUDA_HOME or CUDA_PATH,
else that on the PATH), 1 requires it, 0 leaves it out. PATCHKERN_CUDA_ARCHS says for which GPUs; "80;90;100" is the
default, less those that nvcc does not know. The last one is there as PTX too, for newer GPUs.
A compiler that is found and then fails is an error, never a fallback; the last line says what leaves the module out.
What was built, or why it was not, is written to patchkern/_build_info.json.

The modules use CPython's limited API: one wheel serves every Python from 3.10 on. A free-threaded Python has no stable
ABI, so a build with one is for that Python alone.
"""

import itertools
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path(__file__).resolve().parent / "csrc"
COMPILERS = ["c++", "g++", "clang++"]
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-pthread", "-fvisibility=hidden", "-Wall", "-Wextra"]
SOURCES = ["bindings.cpp", "layout.cpp", "pool_rows_cpu.cpp", "span_attention_cpu.cpp"]

# The CPU kernels are compiled once per instruction set; pool_rows_cpu.cpp picks one at run time.
KERNELS = ["pool_rows_kernels.cpp", "span_attention_kernels.cpp"]
KERNEL_FLAGS = {"baseline": ""}
if platform.machine() in ("x86_64", "AMD64"):
    KERNEL_FLAGS["avx2"] = "-mavx2 -mfma -mf16c"
    KERNEL_FLAGS["avx512"] = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c"

CUDA_SOURCES = ["bindings_cuda.cpp", "pool_rows_fwd.cu", "pool_rows_bwd.cu"]
CUDA_FLAGS = ["-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall"]
CUDA_LINK = ["-shared", "-cudart", "static", "-Xlinker=--exclude-libs,ALL"]  # torch's own CUDA runtime is not disturbed
CUDA_ARCHS = ["80", "90", "100"]

STABLE_ABI = not sysconfig.get_config_var("Py_GIL_DISABLED")


def switch(name: str) -> str:
    """The value of PATCHKERN_NATIVE or PATCHKERN_CUDA."""
    value = os.environ.get(name, "auto")
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"{name} must be auto, 0 or 1, got {value!r}")
    return value


def find_compiler() -> "tuple[list[str], str]":
    """The C++ compiler's command, or an empty one and what was not found."""
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [[name] for name in COMPILERS]:
        if shutil.which(command[0]):
            return command, ""
    return [], f"CXX={shlex.join(named)} was not found" if named else f"none of {', '.join(COMPILERS)} was found"


def find_nvcc() -> "tuple[list[str], str]":
    """nvcc's command, or an empty one and what was not found."""
    compiler, missing = find_compiler()
    if not compiler:
        return [], f"nvcc needs a C++ compiler, and {missing}"
    named = shlex.split(os.environ.get("CUDACXX", ""))
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [named] if named else [[str(Path(home, "bin", "nvcc"))] for home in homes] + [["nvcc"]]
    for command in candidates:
        if shutil.which(command[0]):
            return command, ""
    return [], " or ".join(shlex.join(command) for command in candidates) + " was not found"


def chosen(name: str, what: str, found: "tuple[list[str], str]") -> "tuple[list[str], str]":
    """What was found, or nothing and why the package is built without."""
    value, (command, missing) = switch(name), found
    if value == "0":
        return [], f"the package was built with {name}=0"
    if not command and value == "1":
        raise SystemExit(f"{name}=1, but there is no {what}: {missing}")
    return command, "" if command else f"the package was built without a {what}: {missing}"


def left_out_by(name: str) -> str:
    return f"{name}=0 builds the package without it"


def version(compiler: "list[str]") -> str:
    return subprocess.run([*compiler, "--version"], check=True, capture_output=True, text=True).stdout


def cuda_archs(nvcc: "list[str]") -> "list[str]":
    """The GPUs to build for, oldest first."""
    named = re.split(r"[\s,;]+", os.environ.get("PATCHKERN_CUDA_ARCHS", "").strip())
    if named != [""]:
        archs = [name.removeprefix("sm_") for name in named]
        if not all(arch.isdigit() for arch in archs):
            raise SystemExit(f"PATCHKERN_CUDA_ARCHS must be numbers like 80;90, got {';'.join(named)!r}")
        return sorted(set(archs), key=int)
    listed = subprocess.run([*nvcc, "--list-gpu-arch"], capture_output=True, text=True)
    if listed.returncode != 0:
        print(listed.stderr, file=sys.stderr)
        raise SystemExit(f"{shlex.join(listed.args)} failed: {left_out_by('PATCHKERN_CUDA')}")
    if archs := [arch for arch in CUDA_ARCHS if f"compute_{arch}" in listed.stdout.split()]:
        return archs
    raise SystemExit(
        f"{shlex.join(nvcc)} knows none of the GPUs {', '.join(CUDA_ARCHS)}: PATCHKERN_CUDA_ARCHS names others, "
        + left_out_by("PATCHKERN_CUDA")
    )


class Unit(NamedTuple):
    source: str
    object: str
    flags: "list[str]"


class Module(NamedTuple):
    """An extension module: how to compile its units and how to link them, and the switch that leaves it out."""

    library: str
    switch: str
    compile: "list[str]"
    link: "list[str]"
    units: "list[Unit]"


INCLUDE = f"-I{sysconfig.get_path('include')}"


def native_module(library: str, cxx: "list[str]", cxxflags: "list[str]") -> Module:
    units = [Unit(name, f"{Path(name).stem}.o", [INCLUDE] if name == "bindings.cpp" else []) for name in SOURCES]
    for name, (isa, flags) in itertools.product(KERNELS, KERNEL_FLAGS.items()):
        units.append(Unit(name, f"{Path(name).stem}_{isa}.o", [f"-DPK_ISA={isa}", *flags.split()]))
    shared = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
    return Module(library, "PATCHKERN_NATIVE", [*cxx, *FLAGS, *cxxflags], [*cxx, *shared, "-pthread", *cxxflags], units)


def cuda_module(library: str, nvcc: "list[str]", archs: "list[str]") -> Module:
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    targets.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    units = [
        Unit(name, f"{Path(name).stem}.o", [INCLUDE] if name.endswith(".cpp") else targets) for name in CUDA_SOURCES
    ]
    host = shlex.split(os.environ.get("CXX", ""))
    ccbin = [f"-ccbin={host[0]}"] if len(host) == 1 else []
    return Module(library, "PATCHKERN_CUDA", [*nvcc, *ccbin, *CUDA_FLAGS], [*nvcc, *ccbin, *CUDA_LINK, *targets], units)


def write_ninja(folder: Path, modules: "list[Module]") -> None:
    """Write folder/build.ninja, which builds the modules' libraries there."""

    def command(*parts: str) -> str:
        return shlex.join(parts).replace("$", "$$")

    def path(p: Path) -> str:
        return str(p).replace("$", "$$").replace(":", "$:").replace(" ", "$ ")

    lines = []
    for number, module in enumerate(modules):
        lines += [
            f"rule compile{number}",
            f"  command = {command(*module.compile)} -MMD -MF $out.d $unit -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            f"rule link{number}",
            f"  command = {command(*module.link)} $in -o $out",
            f"build {module.library}: link{number} {' '.join(unit.object for unit in module.units)}",
        ]
        for unit in module.units:
            lines += [
                f"build {unit.object}: compile{number} {path(CSRC / unit.source)}",
                f"  unit = {command(*unit.flags)}",
            ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text("\n".join([*lines, ""]))


class BuildModules(build_ext):
    """Compile with ninja: parallel, and only what changed."""

    def run(self) -> None:
        target = Path("patchkern") if self.inplace else Path(self.build_lib, "patchkern")
        target.mkdir(parents=True, exist_ok=True)
        cxx, reason = chosen("PATCHKERN_NATIVE", "C++ compiler", find_compiler())
        nvcc, cuda_reason = chosen("PATCHKERN_CUDA", "CUDA compiler", find_nvcc())
        info: dict[str, object] = {
            "native": bool(cxx),
            "reason": reason,
            "cuda": bool(nvcc),
            "cuda_reason": cuda_reason,
        }
        native, cuda = (Path(self.get_ext_filename(extension.name)).name for extension in self.extensions)
        modules = []
        if cxx:
            cxxflags = shlex.split(os.environ.get("CXXFLAGS", ""))
            modules.append(native_module(native, cxx, cxxflags))
            info.update(flags=FLAGS + cxxflags, isa=list(KERNEL_FLAGS))
        if nvcc:
            archs = cuda_archs(nvcc)
            modules.append(cuda_module(cuda, nvcc, archs))
            info.update(archs=archs)
        for library, left_out in ((native, reason), (cuda, cuda_reason)):
            if left_out:
                print(f"warning: patchkern/{library} is left out: {left_out}", file=sys.stderr)
            for old in target.glob(f"{library.partition('.')[0]}.*.so"):
                if left_out or old.name != library:  # one for this Python alone would be found before the new one
                    old.unlink()
        if modules:
            # An editable install gets a new temporary folder each time; a fixed one keeps its builds incremental.
            fixed = Path("build", f"native-{sysconfig.get_config_var('SOABI')}")
            folder = fixed if self.inplace else Path(self.build_temp)
            write_ninja(folder, modules)
            for module in modules:
                ninja = [sys.executable, "-m", "ninja", "-C", str(folder), module.library]
                if subprocess.run(ninja).returncode != 0:
                    raise SystemExit(f"patchkern/{module.library} cannot be built: {left_out_by(module.switch)}")
                shutil.copy2(folder / module.library, target / f"{module.library}.tmp")
                # a running process may have the old one mapped
                os.replace(target / f"{module.library}.tmp", target / module.library)
        if cxx:
            info["compiler"] = version(cxx).splitlines()[0]
        if nvcc:
            info["nvcc"] = version(nvcc).splitlines()[-1]
        (target / "_build_info.json").write_text(json.dumps(info, indent=1) + "\n")


setup(
    ext_modules=[
        Extension(name, [f"csrc/{source}" for source in sources], optional=True, py_limited_api=STABLE_ABI)
        for name, sources in (("patchkern._native", [*SOURCES, *KERNELS]), ("patchkern._cuda", CUDA_SOURCES))
    ],
    cmdclass={"build_ext": BuildModules},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if STABLE_ABI else {},
)
