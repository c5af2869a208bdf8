"""A grid of 1 to 4 bits whose codes lie as bit planes, so that products with few inputs look sums of inputs up.

Bytes of a weight (O, I), with N = ceil(I / G) groups a row and Q quads a row (four columns each, the last of a group
padded): ``ceil(O / 32) * 16 * bits * Q + O * (2 * N + packed_size(N, bits))``, the last summand only for asymmetric
grids. Where groups are multiples of 4, and O is one of 32, these are the bytes of the grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from pintpot.core.errors import ShapeError
from pintpot.kernels import dequantize_planes, lut_matmul, native, pack_planes, unpack
from pintpot.kernels.grid import FEW_ROWS
from pintpot.kernels.lookup import MOST_BITS, TILE_ROWS, planes_shape
from pintpot.weights.formats._base import Format, Storage, Tensors, file_name, multiply_by_strips
from pintpot.weights.formats.grid import Grid

PACKED_AT_ONCE = 1 << 18
"""Codes that are put into planes at a time."""
PACKING_BYTES = 9
"""Bytes of temporaries for each of them, about."""


@file_name("bit_planes")
@dataclass(frozen=True, kw_only=True)
class BitPlanes(Format):
    """The numbers of a ``Grid`` with the same fields, bit for bit; only their order in memory is another.

    Products with up to 8 rows of input round sums of four inputs to 8 bits (``kernels/lookup.py``, which says what that
    costs); those with more rows, and gradients, use the numbers themselves.

    Attributes:
        bits: width of a code, 1 to 4.
        group_size: in-features that share a scale; -1 for a whole row. The last group may be shorter.
        symmetric: the zero is fixed at ``2 ** (bits - 1)`` and not stored.
        scale_dtype: ``"float16"`` or ``"bfloat16"``.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = False
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        if self.bits > MOST_BITS:
            raise ShapeError(
                f"bit planes hold 1 to {MOST_BITS} bits, not {self.bits}", hint="keep wider codes in a grid"
            )
        self.grid()

    @classmethod
    def of(cls, grid: Grid) -> BitPlanes | None:
        """The format that holds a grid's numbers; None where its codes are too wide."""
        return cls(**asdict(grid)) if grid.bits <= MOST_BITS else None

    def grid(self) -> Grid:
        """The grid of the same numbers, which refuses fields that make none."""
        return Grid(**asdict(self))

    def storage(self, out_features: int, in_features: int) -> Storage:
        """``planes``, and the grid's ``scale`` and, if asymmetric, ``zero``."""
        grid = self.grid()
        stored = grid.storage(out_features, in_features)
        del stored["packed"]
        shape = planes_shape(out_features, in_features, self.bits, grid.group(in_features))
        return {"planes": (shape, torch.uint8), **stored}

    def encode(self, weight: Tensor) -> Tensors:
        """Round to nearest, as the grid does."""
        return self.relaid(self.grid().encode(weight), weight.shape[1])

    def relaid(self, tensors: Mapping[str, Tensor], in_features: int) -> Tensors:
        """From the stored tensors of the grid; scales and zeros are the same tensors, not copies."""
        packed, rows = tensors["packed"], tensors["scale"].shape[0]
        group = self.grid().group(in_features)
        planes = packed.new_empty(planes_shape(rows, in_features, self.bits, group))
        step = max(1, PACKED_AT_ONCE // (TILE_ROWS * in_features))
        starts = range(0, planes.shape[0], step)
        # Without values the first strip stands for all: they cost alike.
        for start in starts[:1] if packed.is_meta or is_fake(packed) else starts:
            codes = unpack(packed[start * TILE_ROWS : (start + step) * TILE_ROWS], self.bits, in_features)
            planes[start : start + step] = pack_planes(codes, self.bits, group)
        return {"planes": planes, **{name: tensor for name, tensor in tensors.items() if name != "packed"}}

    def decode(self, tensors: Mapping[str, Tensor], in_features: int, dtype: torch.dtype) -> Tensor:
        """The numbers (O, I) that stored tensors stand for, in ``dtype``."""
        return dequantize_planes(
            tensors["planes"],
            tensors["scale"],
            tensors.get("zero"),
            bits=self.bits,
            group_size=self.grid().group(in_features),
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
            group_size=self.grid().group(input.shape[-1]),
        )

    def row_bytes(self, in_features: int, dtype: torch.dtype) -> int:
        """Bytes of temporaries in decoding one row: with the compiled kernel its numbers alone."""
        if native.library() is not None:
            return in_features * dtype.itemsize
        # In plain torch its codes, the nibbles and masks that they come from, and scales at each column.
        return in_features * (4 + 3 * dtype.itemsize)

    def rows(self, tensors: Mapping[str, Tensor], rows: slice) -> Tensors:
        """The tiles, scales and zeros of the rows, which begin with a tile."""
        tiles = slice(rows.start // TILE_ROWS, -(-rows.stop // TILE_ROWS))
        return {name: tensor[tiles if name == "planes" else rows] for name, tensor in tensors.items()}

    def rows_together(self) -> int:
        """Those of a tile."""
        return TILE_ROWS

    def out_features(self, tensors: Mapping[str, Tensor]) -> int:
        """O, which the scales tell; planes are padded."""
        return tensors["scale"].shape[0]
