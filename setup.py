"""Builds the compiled kernels (src/pintpot/kernels/csrc) with the package; all else is in pyproject.toml.

The library has a plain C interface and is loaded with ctypes, so that one build serves every version of Python and of
torch. Where there is no compiler, or it fails, the package is installed without it and runs its plain torch code.
``CXX``, ``CXXFLAGS`` and ``LDFLAGS`` are those of the environment.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

SOURCES = Path("src/pintpot/kernels/csrc")
FLAGS = [
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-pthread", "-Wall", "-Wextra"),
    # gcc 12 warns of the undefined vectors in its own headers; clang does not know one of these warnings.
    *("-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-unknown-warning-option"),
    # Results are the same on all compilers, and those of the definitions: nothing is contracted or reordered.
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
]
PATHS = {"generic": []}
"""The instruction sets that the kernels are compiled for, with the compiler's options; chosen between at run time."""
if platform.machine().lower() in ("x86_64", "amd64"):
    PATHS["avx2"] = ["-march=x86-64-v3"]
    PATHS["avx512"] = ["-march=x86-64-v4", "-mavx512vnni", "-mprefer-vector-width=512"]
elif platform.machine() == "aarch64":
    PATHS["dotprod"] = ["-march=armv8.2-a+dotprod"]


def compiler() -> list[str]:
    """The command of the C++ compiler.

    Raises:
        CompileError: when there is none.
    """
    asked = shlex.split(os.environ.get("CXX", ""))
    found = asked or [name for name in ("c++", "g++", "clang++") if shutil.which(name)][:1]
    if not found:
        raise CompileError("no C++ compiler (c++, g++ or clang++) was found")
    return found


class BuildKernels(build_ext):
    """Compiles the sources once for each instruction set, and links them into one library."""

    def get_ext_filename(self, fullname: str) -> str:
        """A plain name: nothing in the library depends on the version of Python."""
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        """Build the library.

        Raises:
            CompileError: when it cannot be built. The extension is optional, so that this ends as a warning.
        """
        target = Path(self.get_ext_fullpath(ext.name)).absolute()
        objects = Path(self.build_temp).absolute() / "pintpot_kernels"
        for folder in (target.parent, objects):
            folder.mkdir(parents=True, exist_ok=True)
        common = [*compiler(), *FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]
        commands = {
            objects / f"kernels_{name}.o": [*options, f"-DPINTPOT_ISA={name}", "-c", str(SOURCES / "kernels.cpp")]
            for name, options in PATHS.items()
        }
        commands |= {objects / f"{name}.o": ["-c", str(SOURCES / f"{name}.cpp")] for name in ("dispatch", "parallel")}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, ([*common, *rest, "-o", str(file)] for file, rest in commands.items())))
        linker = shlex.split(os.environ.get("LDFLAGS", ""))
        _run([*common, "-shared", *map(str, commands), *linker, "-o", str(target)])


class PlainWheel(bdist_wheel):
    """A wheel for this platform and every version of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """``py3-none-<platform>``."""
        return ("py3", "none", super().get_tag()[2])


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise CompileError(f"{command[0]} cannot be run: {error}") from error
    if done.stderr:
        print(done.stderr, file=sys.stderr)
    if done.returncode:
        raise CompileError(f"{command[0]} failed with status {done.returncode}")


setup(
    ext_modules=[
        Extension(
            "pintpot.kernels.libpintpot",
            sources=[str(file) for file in sorted(SOURCES.glob("*.cpp"))],
            depends=[str(file) for file in sorted(SOURCES.glob("*.h"))],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlainWheel},
)
