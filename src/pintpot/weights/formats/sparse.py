"""A weight of which only some blocks are stored: one bit a block says which, and another format holds their numbers.

A block is ``block_rows x block_columns`` numbers: single numbers (1 x 1), groups of in-features (1 x G), or tiles
(b x b). Rows of blocks either keep equally many blocks each, or share what the whole matrix keeps; either way the
bytes follow from the shape alone.

Bytes of a weight (O, I) with R x C blocks of b numbers: ``R * packed_size(C, 1)`` for the bitmap, and those of the
inner format for a matrix (R, k b) where each row keeps k blocks. Where the matrix keeps n in all, they lie one after
the other in rows of ``w = max(1, 256 // b)``: (ceil(n / w), w b).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pintpot.core.errors import ShapeError
from pintpot.core.values import has_values
from pintpot.kernels import GridNumbers, native, pack, packed_size, sparse_decode, sparse_matmul, sparse_matmul_serves
from pintpot.kernels.sparse import in_order
from pintpot.weights.formats._base import Format, Storage, Tensors, file_name, prefixed, within
from pintpot.weights.formats.dense import Dense
from pintpot.weights.formats.grid import Grid
from pintpot.weights.formats.selection import largest

RUN = 256
"""Numbers in a row of the inner format's matrix where rows of the weight share what is kept (or one block's)."""


@file_name("sparse")
@dataclass(frozen=True, kw_only=True)
class Sparse(Format):
    """A bitmap of blocks, and the numbers of those that are kept.

    Attributes:
        kept_fraction: share of the blocks that is kept; at least one of each row of blocks (or of all).
        block_rows: out-features of a block; they divide O.
        block_columns: in-features of a block; they divide I.
        balanced: every row of blocks keeps equally many.
        values: the format of the kept numbers, a block's row by row.
    """

    kept_fraction: float = 0.5
    block_rows: int = 1
    block_columns: int = 1
    balanced: bool = True
    values: Format = field(default_factory=lambda: Dense(dtype=torch.float16))

    def __post_init__(self) -> None:
        if not 0 < self.kept_fraction <= 1:
            raise ShapeError(
                f"kept_fraction is a share of the blocks, not {self.kept_fraction}", hint="choose one above 0, up to 1"
            )
        if self.block_rows < 1 or self.block_columns < 1:
            raise ShapeError(
                f"a block of {self.block_rows} x {self.block_columns} holds nothing", hint="choose sides of 1 or more"
            )

    @property
    def block(self) -> int:
        """Numbers in a block."""
        return self.block_rows * self.block_columns

    def grid(self, out_features: int, in_features: int) -> tuple[int, int]:
        """Rows and columns of blocks.

        Raises:
            ShapeError: when blocks do not divide the shape.
        """
        if out_features % self.block_rows or in_features % self.block_columns:
            raise ShapeError(
                f"blocks of {self.block_rows} x {self.block_columns} do not divide {out_features} x {in_features}",
                hint="choose sides that divide the weight's",
            )
        return out_features // self.block_rows, in_features // self.block_columns

    def kept(self, blocks: int) -> int:
        """How many of so many blocks are kept."""
        return max(1, int(self.kept_fraction * blocks + 0.5))

    def kept_blocks(self, rows: int, columns: int) -> int:
        """How many blocks of all are kept."""
        return rows * self.kept(columns) if self.balanced else self.kept(rows * columns)

    def held(self, rows: int, columns: int) -> tuple[int, int]:
        """Shape of the matrix that the inner format holds, for so many rows and columns of blocks."""
        width = self.kept(columns) if self.balanced else self._run
        return -(-self.kept_blocks(rows, columns) // width), width * self.block

    @property
    def _run(self) -> int:
        """Blocks in a row of the inner matrix where the whole matrix shares what is kept."""
        return max(1, RUN // self.block)

    def storage(self, out_features: int, in_features: int) -> Storage:
        """``bitmap`` uint8 (R, packed_size(C, 1)) and the inner tensors.

        Raises:
            ShapeError: when blocks do not divide the shape.
        """
        rows, columns = self.grid(out_features, in_features)
        inner = self.values.storage(*self.held(rows, columns))
        return {"bitmap": ((rows, packed_size(columns, 1)), torch.uint8), **prefixed("values_", inner)}

    def blocks(self, weight: Tensor) -> Tensor:
        """The numbers (O, I) by blocks, (R, C, b)."""
        rows, columns = self.grid(*weight.shape)
        if self.block_rows == 1:
            return weight.reshape(rows, columns, self.block)
        parts = weight.reshape(rows, self.block_rows, columns, self.block_columns)
        return parts.transpose(1, 2).reshape(rows, columns, self.block)

    def weight(self, blocks: Tensor) -> Tensor:
        """Numbers by blocks (R, C, b) in the order of the weight, (O, I)."""
        return in_order(blocks, self.block_rows, self.block_columns)

    def choose(self, score: Tensor) -> Tensor:
        """Which blocks to keep: those of the highest scores.

        Args:
            score: float32 (R, C).

        Returns:
            bool (R, C).
        """
        if not self.balanced:
            return largest(score, self.kept(score.numel()))
        best = score.topk(self.kept(score.shape[1])).indices
        return torch.zeros(score.shape, dtype=torch.bool, device=score.device).scatter_(1, best, True)

    def gather(self, blocks: Tensor, mask: Tensor) -> Tensor:
        """What belongs to the kept blocks, in the order in which it is stored.

        Args:
            blocks: (R, C, n), whatever there is of each block.
            mask: bool (R, C), as ``choose`` gives it.

        Returns:
            (rows, k n), as the inner format holds it; the last row is filled up.
        """
        count = self.kept_blocks(*mask.shape)
        places = mask.flatten().nonzero()[:, 0] if has_values(mask) else mask.new_zeros(count, dtype=torch.int64)
        rows, width = self.held(*mask.shape)
        filled = torch.cat([places, places[-1:].expand(rows * (width // self.block) - count)])
        return blocks.flatten(0, 1)[filled].reshape(rows, -1)

    def store(self, inner: Mapping[str, Tensor], mask: Tensor) -> Tensors:
        """The stored tensors of what the inner format made of ``gather``, and of the mask (R, C)."""
        return {"bitmap": pack(mask.to(torch.uint8), 1), **prefixed("values_", inner)}

    def encode(self, weight: Tensor) -> Tensors:
        """With the blocks of the largest norm."""
        return self.encode_with(weight, self.choose(self.blocks(weight.float()).square().sum(-1)))

    def encode_with(self, weight: Tensor, mask: Tensor) -> Tensors:
        """With the blocks of a mask, bool (R, C), of as many blocks as are kept."""
        return self.store(self.values.encode(self.gather(self.blocks(weight), mask)), mask)

    def decode(self, tensors: Mapping[str, Tensor], in_features: int, dtype: torch.dtype) -> Tensor:
        """The kept numbers at their places, and zeros."""
        inner = within("values_", tensors)
        if isinstance(self.values, Dense):
            numbers = inner["dense"]
        else:
            numbers = self.values.decode(inner, self._held_width(in_features), dtype)
        if "skipped" in tensors:
            numbers = numbers.flatten()[tensors["skipped"].shape[0] * self.block :]
        return sparse_decode(tensors["bitmap"], numbers, **self._sides, in_features=in_features, dtype=dtype)

    def matmul(self, input: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """``input`` (..., I) times the transposed weight; for few rows of input none of it is made dense."""
        values = self._stored_values(tensors, input.shape[-1])
        if values is None or not sparse_matmul_serves(input, tensors["bitmap"], values):
            return super().matmul(input, tensors)
        return sparse_matmul(input, tensors["bitmap"], values, **self._sides)

    def multiplies_packed(self) -> bool:
        """By dense numbers and by grids of them."""
        return isinstance(self.values, Dense | Grid)

    def _stored_values(self, tensors: Mapping[str, Tensor], in_features: int) -> Tensor | GridNumbers | None:
        """The kept numbers as the product takes them; None of a format that it does not take."""
        inner = within("values_", tensors)
        if isinstance(self.values, Dense):
            return inner["dense"]
        if not isinstance(self.values, Grid):
            return None
        width = self._held_width(in_features)
        return GridNumbers(
            packed=inner["packed"],
            scale=inner["scale"],
            zero=inner.get("zero"),
            bits=self.values.bits,
            group_size=self.values.group(width),
            width=width,
        )

    def _held_width(self, in_features: int) -> int:
        return self.held(1, in_features // self.block_columns)[1]

    @property
    def _sides(self) -> dict[str, int]:
        return {"block_rows": self.block_rows, "block_columns": self.block_columns}

    def rows(self, tensors: Mapping[str, Tensor], rows: slice) -> Tensors:
        """The bitmap's rows and the numbers kept in them; ``rows`` begin and end between blocks.

        Where rows share what is kept, the first row of numbers may begin with some of the rows before. A tensor
        ``skipped`` of as many entries says of how many blocks.
        """
        own = slice(rows.start // self.block_rows, -(-rows.stop // self.block_rows))
        bitmap, inner = tensors["bitmap"], within("values_", tensors)
        if self.balanced:
            return {"bitmap": bitmap[own], **prefixed("values_", self.values.rows(inner, own))}
        if not has_values(bitmap):
            # An even share, as nobody knows better.
            total, share = self.values.out_features(inner), own.stop - own.start
            kept = self.values.rows(inner, slice(0, -(-total * min(share, bitmap.shape[0]) // bitmap.shape[0])))
            return {"bitmap": bitmap[own], **prefixed("values_", kept)}
        first = _ones(bitmap[: own.start])
        last = first + _ones(bitmap[own])
        kept = self.values.rows(inner, slice(first // self._run, -(-last // self._run)))
        return {"bitmap": bitmap[own], **prefixed("values_", kept), "skipped": bitmap.new_empty(first % self._run)}

    def rows_together(self) -> int:
        """Those of a block."""
        return self.block_rows

    def out_features(self, tensors: Mapping[str, Tensor]) -> int:
        """O."""
        return int(tensors["bitmap"].shape[0]) * self.block_rows

    def row_bytes(self, in_features: int, dtype: torch.dtype) -> int:
        """The row itself, kept numbers that are not dense, and without the library the mask and more copies."""
        columns = in_features // self.block_columns
        kept = self.kept(columns) * self.block_columns
        if native.built():
            numbers = 0 if isinstance(self.values, Dense) else self.values.row_bytes(kept, dtype)
            return numbers + in_features * dtype.itemsize
        copies = 1 if self.block_rows == 1 else 2
        mask = -(-2 * columns // self.block_rows)
        return mask + self.values.row_bytes(kept, dtype) + copies * in_features * dtype.itemsize


def _ones(packed: Tensor) -> int:
    """How many bits are set."""
    pairs = packed - ((packed >> 1) & 0x55)
    fours = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return int(((fours + (fours >> 4)) & 0x0F).sum())
