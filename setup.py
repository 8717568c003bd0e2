# SPDX-License-Identifier: Apache-2.0
"""Builds `patchkern._native` with ninja. Everything else about the package is in pyproject.toml.

PATCHKERN_NATIVE=auto (default) builds the module when there is a C++ compiler, 1 requires it, 0 leaves it out.
CXX names the compiler, CXXFLAGS adds flags. A compiler that is found and then fails is an error, never a fallback.
What was built, or why nothing was, is written to patchkern/_build_info.json.
"""

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path(__file__).resolve().parent / "csrc"
SOURCES = ["bindings.cpp", "layout.cpp", "pool_rows_cpu.cpp"]
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-pthread", "-fvisibility=hidden", "-Wall", "-Wextra"]
COMPILERS = ["c++", "g++", "clang++"]

# The CPU kernels are compiled once per instruction set; pool_rows_cpu.cpp picks one at run time.
KERNELS = "pool_rows_kernels.cpp"
KERNEL_FLAGS = {"baseline": ""}
if platform.machine() in ("x86_64", "AMD64"):
    KERNEL_FLAGS["avx2"] = "-mavx2 -mfma -mf16c"
    KERNEL_FLAGS["avx512"] = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c"


def find_compiler() -> "tuple[list[str], str]":
    """The compiler's command, or an empty one and the reason why there is none."""
    switch = os.environ.get("PATCHKERN_NATIVE", "auto")
    if switch not in ("auto", "0", "1"):
        raise SystemExit(f"PATCHKERN_NATIVE must be auto, 0 or 1, got {switch!r}")
    if switch == "0":
        return [], "the package was built with PATCHKERN_NATIVE=0"
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [[name] for name in COMPILERS]:
        if shutil.which(command[0]):
            return command, ""
    missing = f"CXX={shlex.join(named)} was not found" if named else f"none of {', '.join(COMPILERS)} was found"
    if switch == "1":
        raise SystemExit(f"PATCHKERN_NATIVE=1, but there is no C++ compiler: {missing}")
    return [], f"the package was built without a C++ compiler: {missing}"


def write_ninja(folder: Path, library: str, cxx: "list[str]", cxxflags: "list[str]") -> None:
    """Write folder/build.ninja: one object per source and instruction set, linked into one module."""
    import pybind11

    def command(*parts: str) -> str:
        return shlex.join(parts).replace("$", "$$")

    def path(p: Path) -> str:
        return str(p).replace("$", "$$").replace(":", "$:").replace(" ", "$ ")

    includes = [f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]
    units = [(name, Path(name).stem, includes if name == "bindings.cpp" else []) for name in SOURCES]
    for isa, flags in KERNEL_FLAGS.items():
        units.append((KERNELS, f"{Path(KERNELS).stem}_{isa}", [f"-DPK_ISA={isa}", *flags.split()]))
    shared = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]

    lines = [
        "rule compile",
        f"  command = {command(*cxx)} -MMD -MF $out.d {command(*FLAGS)} $unit {command(*cxxflags)} -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {command(*cxx, *shared, '-pthread', *cxxflags)} $in -o $out",
    ]
    for source, stem, flags in units:
        lines += [f"build {stem}.o: compile {path(CSRC / source)}", f"  unit = {command(*flags)}"]
    lines += [f"build {library}: link {' '.join(f'{stem}.o' for _, stem, _ in units)}", ""]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text("\n".join(lines))


class BuildNative(build_ext):
    """Compile with ninja: parallel, and only what changed."""

    def run(self) -> None:
        library = Path(self.get_ext_filename("patchkern._native")).name
        target = Path("patchkern") if self.inplace else Path(self.build_lib, "patchkern")
        target.mkdir(parents=True, exist_ok=True)
        cxx, reason = find_compiler()
        info: dict[str, object] = {"native": bool(cxx), "reason": reason}
        if cxx:
            cxxflags = shlex.split(os.environ.get("CXXFLAGS", ""))
            # An editable install gets a new temporary folder each time; a fixed one keeps its builds incremental.
            fixed = Path("build", f"native-{sysconfig.get_config_var('SOABI')}")
            folder = fixed if self.inplace else Path(self.build_temp)
            write_ninja(folder, library, cxx, cxxflags)
            subprocess.run([sys.executable, "-m", "ninja", "-C", str(folder)], check=True)
            shutil.copy2(folder / library, target / f"{library}.tmp")
            os.replace(target / f"{library}.tmp", target / library)  # a running process may have the old one mapped
            version = subprocess.run([*cxx, "--version"], check=True, capture_output=True, text=True).stdout
            info.update(compiler=version.splitlines()[0], flags=FLAGS + cxxflags, isa=list(KERNEL_FLAGS))
        else:
            print(f"warning: patchkern._native is left out: {reason}", file=sys.stderr)
            (target / library).unlink(missing_ok=True)
        (target / "_build_info.json").write_text(json.dumps(info, indent=1) + "\n")


setup(
    ext_modules=[Extension("patchkern._native", [f"csrc/{name}" for name in [*SOURCES, KERNELS]], optional=True)],
    cmdclass={"build_ext": BuildNative},
)
