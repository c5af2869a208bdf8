"""The compiled operations on weights that are looked up, which ``tables.py`` defines.

Each checks the sizes of its tensors, since the library only has their addresses. None keeps or changes its inputs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from pintpot.core.errors import ShapeError
from pintpot.kernels import native
from pintpot.kernels.layout import packed_size
from pintpot.kernels.tables import BASES

INT64 = ctypes.c_int64
POINTER = ctypes.c_void_p
STORED_TOGETHER = "pass the tensors and sizes that were stored together"


class _Operand(ctypes.Structure):
    _fields_ = [
        *((name, POINTER) for name in ("input", "output")),
        *((name, INT64) for name in ("dtype", "count", "threads")),
    ]


class _Book(ctypes.Structure):
    _fields_ = [*((name, POINTER) for name in ("index", "high", "entries")), ("bits", INT64)]


class _Codebook(ctypes.Structure):
    _fields_ = [
        *((name, _Book) for name in ("main", "residual")),
        *((name, INT64) for name in ("dtype", "rows", "columns", "vector")),
        ("operand", _Operand),
    ]


class _SignRank(ctypes.Structure):
    _fields_ = [
        *((name, POINTER) for name in ("signs", "left", "right")),
        *((name, INT64) for name in ("dtype", "rows", "columns", "rank")),
        ("operand", _Operand),
    ]


class _Ternary(ctypes.Structure):
    _fields_ = [
        *((name, POINTER) for name in ("packed", "scale")),
        *((name, INT64) for name in ("dtype", "rows", "columns", "group", "per_byte")),
        ("operand", _Operand),
    ]


Stored = Sequence[Tensor | None]
"""Index, high and entries of a codebook, and of a residual one where there is one."""


def _operand(input: Tensor | None, output: Tensor) -> _Operand:
    count = output.shape[0] if input is None else input.shape[:-1].numel()
    pointers = None if input is None else input.data_ptr(), output.data_ptr()
    return _Operand(*pointers, native.DTYPES[output.dtype], count, torch.get_num_threads())


def _check_input(input: Tensor, features: int) -> None:
    if input.dtype not in native.DTYPES or input.shape[-1] != features:
        raise ShapeError(
            f"an input {tuple(input.shape)} ({input.dtype}) has not the {features} features of the weight",
            hint="pass float32, bfloat16 or float16 of as many features",
        )


def _bits(entries: Tensor) -> int:
    return entries.shape[0].bit_length() - 1


def _check_books(stored: Stored, columns: int) -> tuple[Tensor, Tensor]:
    """The first index and entries, of codebooks that fit together."""
    index, entries = (stored[0], stored[2]) if len(stored) in (3, 6) else (None, None)
    if index is None or entries is None:
        raise ShapeError("a codebook is an index, high bits or None, and entries", hint=STORED_TOGETHER)
    if columns < 1 or entries.dim() != 2 or entries.shape[1] < 1 or entries.dtype not in native.DTYPES:
        raise ShapeError(
            f"entries {tuple(entries.shape)} ({entries.dtype}) are none of {columns} columns", hint=STORED_TOGETHER
        )
    rows, count = index.shape[0], -(-columns // entries.shape[1])
    for part in (stored[:3], stored[3:] or stored[:3]):
        if not _is_book(part, rows, count, entries):
            raise ShapeError(
                f"{[None if tensor is None else tuple(tensor.shape) for tensor in part]} are no codebook of"
                f" {rows} rows of {count} vectors",
                hint=STORED_TOGETHER,
            )
    return index, entries


def _is_book(part: Stored, rows: int, count: int, like: Tensor) -> bool:
    index, high, entries = part
    if index is None or entries is None or entries.dtype != like.dtype:
        return False
    bits = _bits(entries)
    if not 1 <= bits <= 16 or entries.shape != (1 << bits, like.shape[1]) or (high is None) != (bits <= 8):
        return False
    low = index.shape == (rows, packed_size(count, min(bits, 8))) and index.dtype == torch.uint8
    return low and (high is None or (high.shape == (rows, packed_size(count, bits - 8)) and high.dtype == torch.uint8))


def _run_codebook(name: str, stored: Stored, columns: int, operand: _Operand) -> None:
    index, entries = _check_books(stored, columns)
    sizes = native.DTYPES[entries.dtype], index.shape[0], columns, entries.shape[1]
    native.call(name, _Codebook(_book(stored[:3]), _book(stored[3:]), *sizes, operand))


def _book(part: Stored) -> _Book:
    pointers = (None if tensor is None else tensor.data_ptr() for tensor in part)
    return _Book(*pointers, bits=_bits(part[2]) if part and part[2] is not None else 0)


def _codebook_decode(books: Stored, columns: int, dtype: torch.dtype) -> Tensor:
    out = _codebook_decode_shape(books, columns, dtype)
    _run_codebook("codebook_decode", books, columns, _operand(None, out))
    return out


def _codebook_decode_shape(books: Stored, columns: int, dtype: torch.dtype) -> Tensor:
    index, _ = _check_books(books, columns)
    return index.new_empty((index.shape[0], columns), dtype=dtype)


def _codebook_matmul(input: Tensor, books: Stored) -> Tensor:
    out = _codebook_matmul_shape(input, books)
    _run_codebook("codebook_matmul", books, input.shape[-1], _operand(input, out))
    return out


def _codebook_matmul_shape(input: Tensor, books: Stored) -> Tensor:
    index, _ = _check_books(books, input.shape[-1])
    _check_input(input, input.shape[-1])
    return input.new_empty((*input.shape[:-1], index.shape[0]))


def _codebook_matmul_transposed(input: Tensor, books: Stored, columns: int) -> Tensor:
    out = _codebook_matmul_transposed_shape(input, books, columns)
    _run_codebook("codebook_matmul_transposed", books, columns, _operand(input, out))
    return out


def _codebook_matmul_transposed_shape(input: Tensor, books: Stored, columns: int) -> Tensor:
    index, _ = _check_books(books, columns)
    _check_input(input, index.shape[0])
    return input.new_empty((*input.shape[:-1], columns))


def _check_signs(signs: Tensor, left: Tensor, right: Tensor) -> None:
    rank, columns = right.shape
    shaped = rank > 0 and columns > 0 and left.shape == (signs.shape[0], rank)
    shaped = shaped and signs.shape[1:] == (packed_size(columns, 1),)
    if not shaped or signs.dtype != torch.uint8 or left.dtype != right.dtype or left.dtype not in native.DTYPES:
        raise ShapeError(
            f"{tuple(left.shape)} and {tuple(right.shape)} are no factors of signs {tuple(signs.shape)}",
            hint=STORED_TOGETHER,
        )


def _run_signs(name: str, stored: tuple[Tensor, Tensor, Tensor], operand: _Operand) -> None:
    signs, left, right = stored
    pointers = (tensor.data_ptr() for tensor in stored)
    sizes = native.DTYPES[left.dtype], signs.shape[0], right.shape[1], right.shape[0]
    native.call(name, _SignRank(*pointers, *sizes, operand))


def _sign_rank_decode(signs: Tensor, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    out = _sign_rank_decode_shape(signs, left, right, dtype)
    _run_signs("sign_rank_decode", (signs, left, right), _operand(None, out))
    return out


def _sign_rank_decode_shape(signs: Tensor, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    _check_signs(signs, left, right)
    return signs.new_empty((signs.shape[0], right.shape[1]), dtype=dtype)


def _sign_rank_matmul(input: Tensor, signs: Tensor, left: Tensor, right: Tensor) -> Tensor:
    out = _sign_rank_matmul_shape(input, signs, left, right)
    _run_signs("sign_rank_matmul", (signs, left, right), _operand(input, out))
    return out


def _sign_rank_matmul_shape(input: Tensor, signs: Tensor, left: Tensor, right: Tensor) -> Tensor:
    _check_signs(signs, left, right)
    _check_input(input, right.shape[1])
    return input.new_empty((*input.shape[:-1], signs.shape[0]))


def _check_ternary(packed: Tensor, scale: Tensor, per_byte: int, group_size: int, columns: int) -> None:
    shaped = (
        columns > 0
        and group_size > 0
        and per_byte in BASES
        and packed.shape == (packed.shape[0], -(-columns // max(1, per_byte)))
        and scale.shape == (packed.shape[0], -(-columns // max(1, group_size)))
    )
    if not shaped or packed.dtype != torch.uint8 or scale.dtype not in native.DTYPES:
        raise ShapeError(
            f"{tuple(packed.shape)} and scales {tuple(scale.shape)} are no ternary numbers of {columns} columns,"
            f" {per_byte} in a byte, in groups of {group_size}",
            hint=STORED_TOGETHER,
        )


def _run_ternary(
    name: str, stored: tuple[Tensor, Tensor], per_byte: int, group_size: int, columns: int, operand: _Operand
) -> None:
    packed, scale = stored
    sizes = native.DTYPES[scale.dtype], packed.shape[0], columns, group_size, per_byte
    native.call(name, _Ternary(packed.data_ptr(), scale.data_ptr(), *sizes, operand))


def _ternary_decode(
    packed: Tensor, scale: Tensor, per_byte: int, group_size: int, columns: int, dtype: torch.dtype
) -> Tensor:
    out = _ternary_decode_shape(packed, scale, per_byte, group_size, columns, dtype)
    _run_ternary("ternary_decode", (packed, scale), per_byte, group_size, columns, _operand(None, out))
    return out


def _ternary_decode_shape(
    packed: Tensor, scale: Tensor, per_byte: int, group_size: int, columns: int, dtype: torch.dtype
) -> Tensor:
    _check_ternary(packed, scale, per_byte, group_size, columns)
    return packed.new_empty((packed.shape[0], columns), dtype=dtype)


def _ternary_matmul(input: Tensor, packed: Tensor, scale: Tensor, per_byte: int, group_size: int) -> Tensor:
    out = _ternary_matmul_shape(input, packed, scale, per_byte, group_size)
    _run_ternary("ternary_matmul", (packed, scale), per_byte, group_size, input.shape[-1], _operand(input, out))
    return out


def _ternary_matmul_shape(input: Tensor, packed: Tensor, scale: Tensor, per_byte: int, group_size: int) -> Tensor:
    _check_ternary(packed, scale, per_byte, group_size, input.shape[-1])
    _check_input(input, input.shape[-1])
    return input.new_empty((*input.shape[:-1], packed.shape[0]))


_SIGNS = "Tensor signs, Tensor left, Tensor right"
_TERNARY = "Tensor packed, Tensor scale, int per_byte, int group_size"

_OPERATIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "codebook_decode(Tensor?[] books, int columns, ScalarType dtype) -> Tensor": (
        _codebook_decode,
        _codebook_decode_shape,
    ),
    "codebook_matmul(Tensor input, Tensor?[] books) -> Tensor": (_codebook_matmul, _codebook_matmul_shape),
    "codebook_matmul_transposed(Tensor input, Tensor?[] books, int columns) -> Tensor": (
        _codebook_matmul_transposed,
        _codebook_matmul_transposed_shape,
    ),
    f"sign_rank_decode({_SIGNS}, ScalarType dtype) -> Tensor": (_sign_rank_decode, _sign_rank_decode_shape),
    f"sign_rank_matmul(Tensor input, {_SIGNS}) -> Tensor": (_sign_rank_matmul, _sign_rank_matmul_shape),
    f"ternary_decode({_TERNARY}, int columns, ScalarType dtype) -> Tensor": (_ternary_decode, _ternary_decode_shape),
    f"ternary_matmul(Tensor input, {_TERNARY}) -> Tensor": (_ternary_matmul, _ternary_matmul_shape),
}

for _schema, (_run, _shape) in _OPERATIONS.items():
    native.register(_schema, _run, _shape)


@register_flop_formula([torch.ops.pintpot.sign_rank_matmul, torch.ops.pintpot.ternary_matmul])
def _matmul_flops(input: torch.Size, packed: torch.Size, *rest: object, **named: object) -> int:
    """A product and a sum for each number of the matrix and each input."""
    return 2 * input.numel() * packed[0]


@register_flop_formula(torch.ops.pintpot.codebook_matmul)
def _codebook_flops(input: torch.Size, books: Sequence[torch.Size], *rest: object, **named: object) -> int:
    return 2 * input.numel() * books[0][0]


@register_flop_formula(torch.ops.pintpot.codebook_matmul_transposed)
def _transposed_flops(input: torch.Size, books: object, columns: int, *rest: object, **named: object) -> int:
    return 2 * input.numel() * columns
