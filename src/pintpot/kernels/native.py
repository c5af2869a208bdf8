"""The compiled kernels: finding the library, loading it at first use, and which tensors it serves.

The library (``csrc/``) is built with the package. Without it everything runs by the plain torch definitions, and one
warning says so. Two environment variables are for tests: ``PINTPOT_KERNELS`` is ``off`` or the file of another build,
and ``PINTPOT_ISA`` asks for one of the instruction sets.
"""

from __future__ import annotations

import ctypes
import functools
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pintpot.core.errors import CompositionError, PintpotError, ShapeError

PLAIN = "plain torch"
"""What ``path`` says where there is no library."""

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The numbers by which the library knows dtypes."""

LIBRARY = torch.library.Library("pintpot", "FRAGMENT")
"""Where the operations are registered; lives as long as the program."""

_CONTRADICTION = 2
"""What an operation returns that finds its arrays to contradict one another."""

_FILE = Path(__file__).with_name("libpintpot.so")
_MISSING = (
    "Pintpot's compiled kernels are missing, and plain torch does their work (the same results, slower, with more"
    " temporary memory). To build them, install a C++ compiler (g++ or clang++), and then Pintpot again."
)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The loaded library; None, after one warning, where it is missing."""
    asked = os.environ.get("PINTPOT_KERNELS", "")
    if asked == "off":
        return None
    try:
        found = ctypes.CDLL(str(Path(asked) if asked else _FILE))
    except OSError:
        warnings.warn(_MISSING, stacklevel=2)
        return None
    found.pintpot_path.restype = ctypes.c_char_p
    found.pintpot_use_runtime.argtypes = [ctypes.c_void_p]
    found.pintpot_use_runtime.restype = None
    found.pintpot_use_runtime(_openmp())
    return found


@torch.compiler.assume_constant_result
def path() -> str:
    """The instruction set that the kernels use here, or ``PLAIN`` without them.

    It is ``avx512`` or ``avx2`` on x86-64, ``dotprod`` on 64-bit ARM, and ``generic`` wherever there is none of them.
    """
    found = library()
    return PLAIN if found is None else found.pintpot_path().decode()


@torch.compiler.assume_constant_result
def built() -> bool:
    """Whether there is a library."""
    return library() is not None


def serves(*tensors: Tensor | None) -> bool:
    """Whether the compiled kernels take these tensors: contiguous, on the CPU, and no gradient is to flow to them.

    Fake tensors are judged as the real ones that they stand for, so that a rehearsal takes the path of the run.
    """
    return takes("cpu", *tensors) and built()


def takes(device_type: str, *tensors: Tensor | None) -> bool:
    """Whether tensors are contiguous and on devices of this type, and no gradient is to flow to them."""
    given = [tensor for tensor in tensors if tensor is not None]
    if any(t.device.type != device_type or t.layout is not torch.strided or not t.is_contiguous() for t in given):
        return False
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in given))


def call(name: str, arguments: ctypes.Structure) -> None:
    """Run a function of the library; other Python threads run meanwhile.

    Raises:
        PintpotError: when it found no memory for its small buffers.
        ShapeError: when what the tensors say contradicts their sizes.
    """
    found = library()
    if found is None:
        raise PintpotError(_MISSING, hint="reinstall Pintpot with a C++ compiler")
    status = getattr(found, f"pintpot_{name}")(ctypes.byref(arguments))
    if status == _CONTRADICTION:
        raise ShapeError(
            f"{name}: the stored tensors contradict one another",
            hint="pass those that were stored together; `pintpot check` tells whether a folder is damaged",
        )
    if status:
        raise PintpotError(f"no memory for the buffers of {name}", hint="give the process more memory")


def register(schema: str, run: Callable[..., Any], shape: Callable[..., Any]) -> None:
    """Register an operation as ``torch.ops.pintpot.*``.

    Args:
        schema: name, arguments and results.
        run: does it, for tensors on the CPU.
        shape: the results' shapes and dtypes, for tensors without values; it refuses what ``run`` cannot take.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, run, "CPU")
    torch.library.register_fake(f"pintpot::{name}", shape, lib=LIBRARY)

    def refuse(info: Any, in_dims: Any, *args: Any) -> Any:
        raise CompositionError(
            f"pintpot::{name} cannot be used under torch.vmap",
            hint="call it once with all leading dimensions, which it takes",
        )

    torch.library.register_vmap(f"pintpot::{name}", refuse)


def _openmp() -> int | None:
    """The address of ``GOMP_parallel`` in the OpenMP runtime that torch uses, if it uses one."""
    for file in (Path(torch.__file__).parent / "lib" / "libtorch_cpu.so", None):
        try:
            # A library gives the symbols of all that it is linked with.
            function = ctypes.CDLL(None if file is None else str(file)).GOMP_parallel
        except (OSError, AttributeError):
            continue
        return ctypes.cast(function, ctypes.c_void_p).value
    return None
