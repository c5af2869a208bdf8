"""Weights that are looked up: entries of codebooks, signs with magnitudes of low rank, ternary numbers.

Each has two operations: ``*_decode``, back to numbers, and ``*_matmul``, times an input. On the CPU, compiled, the
second takes up to ``FEW_ROWS`` rows of input and makes a small tile of the weight dense at a time; otherwise it is the
product with the decoded weight.

Shapes: O out-features, I in-features, V vector length, B bits of an index, N = ceil(I / V) vectors or ceil(I / G)
groups of G in-features a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from pintpot.kernels import native
from pintpot.kernels.grid import FEW_ROWS
from pintpot.kernels.packing import unpack

BASES = {5: 3, 4: 4}
"""By the ternary numbers in a byte: the base in which the byte is their value."""


class Book(NamedTuple):
    """A codebook and the indices into it.

    Attributes:
        low: uint8 (O, packed_size(N, min(B, 8))), the lowest eight bits of each index.
        high: uint8 (O, packed_size(N, B - 8)), the bits above; None up to eight bits.
        entries: float (2^B, V).
    """

    low: Tensor
    high: Tensor | None
    entries: Tensor

    @property
    def bits(self) -> int:
        """B."""
        return self.entries.shape[0].bit_length() - 1


def few_rows(flat: Tensor, *stored: Tensor | None) -> bool:
    """Whether the compiled products take an input (rows, features) and stored tensors."""
    few = 0 < flat.shape[0] <= FEW_ROWS and flat.dtype in native.DTYPES
    return few and flat.shape[1] > 0 and native.serves(flat, *stored)


def codebook_decode(books: Sequence[Book], columns: int, dtype: torch.dtype) -> Tensor:
    """The entries that the indices name, those of all codebooks added.

    Args:
        books: one, or one and a second for what it leaves over, of the same shapes but B.
        columns: I; the last vector of a row may be longer than what is left of it.
        dtype: in which entries are added.

    Returns:
        (O, I) in ``dtype``.
    """
    if dtype in native.DTYPES and columns and native.serves(*_tensors(books)):
        dense: Tensor = torch.ops.pintpot.codebook_decode(_tensors(books), columns, dtype)
        return dense
    return codebook_decode_definition(books, columns, dtype)


def codebook_decode_definition(books: Sequence[Book], columns: int, dtype: torch.dtype) -> Tensor:
    """What ``codebook_decode`` does, in plain torch."""
    dense: Tensor | None = None
    for book in books:
        count = -(-columns // book.entries.shape[1])
        index = unpack(book.low, min(book.bits, 8), count).to(torch.int32)
        if book.high is not None:
            index += unpack(book.high, book.bits - 8, count).to(torch.int32) << 8
        part = functional.embedding(index, book.entries.to(dtype))
        dense = part if dense is None else dense.add_(part)
    assert dense is not None
    return dense.flatten(1)[:, :columns]


def codebook_matmul(input: Tensor, books: Sequence[Book]) -> Tensor:
    """``input`` (rows, I) times the transposed weight: (rows, O) in the dtype of ``input``."""
    if few_rows(input, *_tensors(books)):
        product: Tensor = torch.ops.pintpot.codebook_matmul(input, _tensors(books))
        return product
    return input @ codebook_decode(books, input.shape[1], input.dtype).t()


def codebook_matmul_transposed(input: Tensor, books: Sequence[Book], columns: int) -> Tensor:
    """``input`` (rows, O) times the weight itself: (rows, columns) in the dtype of ``input``, where columns is I."""
    if columns and few_rows(input, *_tensors(books)):
        product: Tensor = torch.ops.pintpot.codebook_matmul_transposed(input, _tensors(books), columns)
        return product
    return input @ codebook_decode(books, columns, input.dtype)


def sign_rank_decode(signs: Tensor, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Signs times the product of two factors, which is computed in float32.

    Args:
        signs: uint8 (O, packed_size(I, 1)); a bit that is set is a positive sign.
        left: float (O, rank).
        right: float (rank, I).
        dtype: of the result.

    Returns:
        (O, I) in ``dtype``.
    """
    if dtype in native.DTYPES and right.numel() and native.serves(signs, left, right):
        dense: Tensor = torch.ops.pintpot.sign_rank_decode(signs, left, right, dtype)
        return dense
    return sign_rank_decode_definition(signs, left, right, dtype)


def sign_rank_decode_definition(signs: Tensor, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """What ``sign_rank_decode`` does, in plain torch."""
    magnitudes = left.float() @ right.float()
    signed = unpack(signs, 1, right.shape[1]).view(torch.int8).mul_(2).sub_(1)
    return magnitudes.mul_(signed).to(dtype)


def sign_rank_matmul(input: Tensor, signs: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``input`` (rows, I) times the transposed weight: (rows, O) in the dtype of ``input``."""
    if few_rows(input, signs, left, right):
        product: Tensor = torch.ops.pintpot.sign_rank_matmul(input, signs, left, right)
        return product
    return input @ sign_rank_decode(signs, left, right, input.dtype).t()


def ternary_decode(
    packed: Tensor, scale: Tensor, *, per_byte: int, group_size: int, columns: int, dtype: torch.dtype
) -> Tensor:
    """The numbers -1, 0 and 1 times the scales of their groups.

    Args:
        packed: uint8 (O, ceil(I / per_byte)): digits 0, 1 and 2, the first of a byte the lowest.
        scale: float (O, N).
        per_byte: 5, digits of base 3, or 4, of base 4.
        group_size: G.
        columns: I.
        dtype: of the result; scales are rounded to it.

    Returns:
        (O, I) in ``dtype``.
    """
    if dtype in native.DTYPES and columns and native.serves(packed, scale):
        dense: Tensor = torch.ops.pintpot.ternary_decode(packed, scale, per_byte, group_size, columns, dtype)
        return dense
    return ternary_decode_definition(packed, scale, per_byte, group_size, columns, dtype)


def ternary_decode_definition(
    packed: Tensor, scale: Tensor, per_byte: int, group_size: int, columns: int, dtype: torch.dtype
) -> Tensor:
    """What ``ternary_decode`` does, in plain torch."""
    values = ternary_values(packed, per_byte, columns).to(dtype)
    if columns % group_size == 0:
        values.unflatten(-1, (-1, group_size)).mul_(scale.to(dtype)[..., None])
        return values
    return values.mul_(scale.to(dtype).repeat_interleave(group_size, dim=-1)[..., :columns])


def ternary_values(packed: Tensor, per_byte: int, columns: int) -> Tensor:
    """The values -1, 0 and 1 of packed bytes, int8 (O, I)."""
    base = BASES[per_byte]
    digits = torch.stack([packed // base**i % base for i in range(per_byte)], -1).flatten(-2)
    return digits[..., :columns].view(torch.int8).sub_(1)


def ternary_matmul(input: Tensor, packed: Tensor, scale: Tensor, *, per_byte: int, group_size: int) -> Tensor:
    """``input`` (rows, I) times the transposed weight: (rows, O) in the dtype of ``input``."""
    if few_rows(input, packed, scale):
        product: Tensor = torch.ops.pintpot.ternary_matmul(input, packed, scale, per_byte, group_size)
        return product
    sizes = {"per_byte": per_byte, "group_size": group_size, "columns": input.shape[1]}
    return input @ ternary_decode(packed, scale, **sizes, dtype=input.dtype).t()


def _tensors(books: Sequence[Book]) -> list[Tensor | None]:
    return [tensor for book in books for tensor in book]
