"""The compiled operations on single numbers and blocks of them, which ``rounding.py`` and ``hadamard.py`` define."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from pintpot.core.errors import ShapeError
from pintpot.kernels import native

INT64 = ctypes.c_int64
POINTER = ctypes.c_void_p
_SETTINGS = ("digits", "least_exponent", "flushes", "mode")
_LIMITS = ("low", "high", "below", "above", "least", "most")
_MODES = 9


class _Rounding(ctypes.Structure):
    _fields_ = [
        *((name, POINTER) for name in ("input", "output")),
        *((name, INT64) for name in ("dtype", "count", *_SETTINGS, "seed", "stream", "threads")),
        *((name, ctypes.c_float) for name in _LIMITS),
    ]


class _Hadamard(ctypes.Structure):
    _fields_ = [
        *((name, POINTER) for name in ("input", "output")),
        *((name, INT64) for name in ("dtype", "count", "block", "threads")),
        ("scale", ctypes.c_float),
    ]


def _round_to(numbers: Tensor, settings: list[int], limits: list[float], draw: list[int]) -> Tensor:
    out = _round_to_shape(numbers, settings, limits, draw)
    sizes = native.DTYPES[numbers.dtype], numbers.numel()
    threads = torch.get_num_threads()
    native.call("round_to", _Rounding(numbers.data_ptr(), out.data_ptr(), *sizes, *settings, *draw, threads, *limits))
    return out


def _round_to_shape(numbers: Tensor, settings: list[int], limits: list[float], draw: list[int]) -> Tensor:
    counts = (len(settings), len(limits), len(draw)) == (len(_SETTINGS), len(_LIMITS), 2)
    if not counts or not 0 <= settings[3] < _MODES or not 1 <= settings[0] <= 23 or abs(settings[1]) > 126:
        raise ShapeError(f"{settings} with {limits} is no lattice", hint="call round_to with a format")
    return _like(numbers)


def _hadamard(numbers: Tensor, block: int) -> Tensor:
    out = _hadamard_shape(numbers, block)
    sizes = native.DTYPES[numbers.dtype], numbers.numel(), block
    native.call("hadamard", _Hadamard(numbers.data_ptr(), out.data_ptr(), *sizes, torch.get_num_threads(), block**-0.5))
    return out


def _hadamard_shape(numbers: Tensor, block: int) -> Tensor:
    if block < 1 or block & (block - 1) or numbers.shape[-1] % block:
        raise ShapeError(f"blocks of {block} in {numbers.shape[-1]} numbers", hint="use a power of 2 that divides them")
    return _like(numbers)


def _like(numbers: Tensor) -> Tensor:
    if numbers.dtype not in native.DTYPES or not numbers.is_contiguous():
        raise ShapeError(
            f"{numbers.dtype} numbers with strides {numbers.stride()} cannot be taken",
            hint="give contiguous float32, bfloat16 or float16",
        )
    return torch.empty_like(numbers)


native.register(
    "round_to(Tensor numbers, int[] settings, float[] limits, int[] draw) -> Tensor", _round_to, _round_to_shape
)
native.register("hadamard(Tensor numbers, int block) -> Tensor", _hadamard, _hadamard_shape)
