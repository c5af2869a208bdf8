"""A grid of 1 to 4 bits whose codes lie as bit planes, so that products with few inputs look sums of inputs up.

Bytes of a weight (O, I), with N = ceil(I / G) groups a row and Q quads a row (four columns each, the last of a group
padded): ``ceil(O / 32) * 16 * bits * Q + O * (2 * N + packed_size(N, bits))``, the last summand only for asymmetric
grids. Where groups are multiples of 4, and O is one of 32, these are the bytes of the grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pintpot.core.errors import ShapeError
from pintpot.kernels import dequantize_planes, lut_matmul, native, pack_planes
from pintpot.kernels.grid import FEW_ROWS
from pintpot.kernels.lookup import MOST_BITS, TILE_ROWS, planes_shape
from pintpot.weights.formats._base import file_name, multiply_by_strips
from pintpot.weights.formats.grid import Grid
from pintpot.weights.formats.relaid_grid import RelaidGrid


@file_name("bit_planes")
@dataclass(frozen=True, kw_only=True)
class BitPlanes(RelaidGrid):
    """A grid of few bits as bit planes.

    Products with up to 8 rows of input round sums of four inputs to 8 bits (``kernels/lookup.py``, which says what that
    costs); those with more rows, and gradients, use the numbers themselves.
    """

    codes: ClassVar[str] = "planes"
    tile_rows: ClassVar[int] = TILE_ROWS

    def __post_init__(self) -> None:
        if self.bits > MOST_BITS:
            raise ShapeError(
                f"bit planes hold 1 to {MOST_BITS} bits, not {self.bits}", hint="keep wider codes in a grid"
            )
        super().__post_init__()

    @classmethod
    def of(cls, grid: Grid) -> BitPlanes | None:
        """The format that holds a grid's numbers; None where its codes are too wide."""
        return cls(**asdict(grid)) if grid.bits <= MOST_BITS else None

    def codes_shape(self, out_features: int, in_features: int) -> tuple[int, ...]:
        """Of ``planes``."""
        return planes_shape(out_features, in_features, self.bits, self.group(in_features))

    def pack_codes(self, codes: Tensor) -> Tensor:
        """Codes uint8 (rows, I) as planes."""
        return pack_planes(codes, self.bits, self.group(codes.shape[1]))

    def decode(self, tensors: Mapping[str, Tensor], in_features: int, dtype: torch.dtype) -> Tensor:
        """The numbers (O, I) that stored tensors stand for, in ``dtype``."""
        return dequantize_planes(
            tensors["planes"],
            tensors["scale"],
            tensors.get("zero"),
            bits=self.bits,
            group_size=self.group(in_features),
            in_features=in_features,
            dtype=dtype,
        )

    def matmul(self, input: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """``input`` (..., I) times the transposed weight: looked up for few rows, otherwise strips made dense."""
        few = 0 < input.shape[:-1].numel() <= FEW_ROWS
        if not few or (torch.is_grad_enabled() and input.requires_grad):
            return multiply_by_strips(self, input, tensors)
        return lut_matmul(
            input.contiguous(),
            tensors["planes"],
            tensors["scale"],
            tensors.get("zero"),
            bits=self.bits,
            group_size=self.group(input.shape[-1]),
        )

    def row_bytes(self, in_features: int, dtype: torch.dtype) -> int:
        """Bytes of temporaries in decoding one row: with the compiled kernel its numbers alone."""
        if native.built():
            return in_features * dtype.itemsize
        # In plain torch its codes, the nibbles and masks that they come from, and scales at each column.
        return in_features * (4 + 3 * dtype.itemsize)
