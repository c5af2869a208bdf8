"""llama.cpp's formats, by its own quantiser: the library ``libggml-base.so`` of a build of llama.cpp under ``out/``.

The quantiser is called through ctypes, so that the matrices alone are judged, in the same forward pass as all others.
Blocks of the k-quants have 256 numbers; where a row is no multiple of that, they run on over the ends of rows
(llama.cpp itself would fall back to a larger format there).
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent / "out"

TYPES = {"Q8_0": 8, "Q6_K": 14, "Q5_K": 13, "Q4_K": 12, "Q4_0": 2, "Q3_K": 11, "Q2_K": 10}
"""The numbers of ``enum ggml_type``."""


class _Traits(ctypes.Structure):
    """``struct ggml_type_traits``."""

    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float_ref", ctypes.c_void_p),
    ]


@cache
def library() -> ctypes.CDLL | None:
    """The library, or None where there is no build."""
    found = sorted(ROOT.glob("**/libggml-base.so*"))
    if not found:
        return None
    loaded = ctypes.CDLL(str(found[0]))
    loaded.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
    loaded.ggml_quantize_chunk.restype = ctypes.c_size_t
    loaded.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
    ]
    return loaded


def packed_weight(weight: Tensor, kind: str, importance: Tensor | None = None) -> Tensor:
    """The bytes of a weight in a format, by llama.cpp's own quantiser.

    Args:
        weight: float32 (O, I), with a multiple of 256 numbers.
        kind: of ``TYPES``.
        importance: of each input (I,), as llama.cpp's importance matrix has it: mean of the squared input.

    Raises:
        ValueError: when the weight cannot be cut into blocks, or there is no library.
    """
    found = library()
    if found is None:
        raise ValueError(f"no libggml-base.so under {ROOT}")
    traits = found.ggml_get_type_traits(TYPES[kind]).contents
    numbers = weight.contiguous()
    if numbers.numel() % traits.blck_size:
        raise ValueError(f"{numbers.numel()} numbers are no multiple of {traits.blck_size}")
    packed = torch.empty(numbers.numel() // traits.blck_size * traits.type_size, dtype=torch.uint8)
    weighted = None if importance is None else importance.float().expand_as(numbers).contiguous()
    found.ggml_quantize_chunk(
        TYPES[kind],
        numbers.data_ptr(),
        packed.data_ptr(),
        0,
        1,
        numbers.numel(),
        None if weighted is None else weighted.data_ptr(),
    )
    return packed


def round_trip(weight: Tensor, kind: str, importance: Tensor | None = None) -> tuple[Tensor, int]:
    """A weight as it comes back from a format, and its bytes there; see ``packed_weight``."""
    packed = packed_weight(weight, kind, importance)
    back = torch.empty(weight.shape)
    found = library()
    assert found is not None
    found.ggml_get_type_traits(TYPES[kind]).contents.to_float(packed.data_ptr(), back.data_ptr(), back.numel())
    return back, packed.nbytes
