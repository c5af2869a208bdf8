"""A grid whose codes lie in tiles of 16 rows, so that products with few inputs have a row in each lane of a vector.

Bytes of a weight (O, I), with N = ceil(I / G) groups a row: ``ceil(O / 16) * ceil(I / 32) * 64 * bits + O * N * 2``,
and ``O * N`` more for asymmetric grids. Where O is a multiple of 16 and I of 32, these are the bytes of the grid, but
for zeros, which have a byte each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pintpot.core.errors import ShapeError
from pintpot.kernels import native, unpack
from pintpot.kernels.row_tiles import (
    BLOCK,
    ROWS,
    by_tiles,
    dequantize_row_tiles,
    groups_of,
    pack_row_tiles,
    row_tiles_matmul,
    row_tiles_serve,
    row_tiles_shape,
)
from pintpot.weights.formats._base import Storage, Tensors, file_name
from pintpot.weights.formats.relaid_grid import RelaidGrid


@file_name("row_tiles")
@dataclass(frozen=True, kw_only=True)
class RowTiles(RelaidGrid):
    """A grid as tiles of 16 rows; groups are multiples of 32 in-features, or whole rows.

    Attributes:
        int8_inputs: round few rows of input to 8 bits, relative to the largest number of up to 128 columns.
    """

    codes: ClassVar[str] = "tiles"
    tile_rows: ClassVar[int] = ROWS

    int8_inputs: bool = False

    def __post_init__(self) -> None:
        if self.group_size != -1 and self.group_size % BLOCK:
            raise ShapeError(
                f"tiles of rows have groups of a multiple of {BLOCK}, not of {self.group_size}",
                hint="keep other groups in a grid",
            )
        super().__post_init__()

    def codes_shape(self, out_features: int, in_features: int) -> tuple[int, ...]:
        """Of ``tiles``."""
        return row_tiles_shape(out_features, in_features, self.bits)

    def pack_codes(self, codes: Tensor) -> Tensor:
        """Codes uint8 (rows, I) in tiles."""
        return pack_row_tiles(codes, self.bits)

    def storage(self, out_features: int, in_features: int) -> Storage:
        """``tiles``, ``scale`` (O * N,) and, if asymmetric, ``zero`` (O * N,), a byte each."""
        stored = super().storage(out_features, in_features)
        (rows, groups), dtype = stored["scale"]
        stored["scale"] = (rows * groups,), dtype
        if not self.symmetric:
            stored["zero"] = (rows * groups,), torch.uint8
        return stored

    def relaid(self, tensors: Mapping[str, Tensor], in_features: int) -> Tensors:
        """From the stored tensors of the grid."""
        stored, groups = super().relaid(tensors, in_features), tensors["scale"].shape[1]
        stored["scale"] = by_tiles(stored["scale"])
        if "zero" in stored:
            stored["zero"] = by_tiles(unpack(stored["zero"], self.bits, groups))
        return stored

    def decode(self, tensors: Mapping[str, Tensor], in_features: int, dtype: torch.dtype) -> Tensor:
        """The numbers (O, I) that stored tensors stand for, in ``dtype``."""
        return dequantize_row_tiles(
            tensors["tiles"],
            tensors["scale"],
            tensors.get("zero"),
            group_size=self.group(in_features),
            in_features=in_features,
            dtype=dtype,
        )

    def multiplies_packed(self) -> bool:
        """Where the processor has integer products for it."""
        return native.path() == "avx512"

    def multiply_few(self, flat: Tensor, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """See ``Format.multiply_few``."""
        stored = tensors["tiles"], tensors["scale"], tensors.get("zero")
        if not row_tiles_serve(flat, *stored):
            return None
        group_size = self.group(flat.shape[1])
        return row_tiles_matmul(flat, *stored, group_size=group_size, digits=int(self.int8_inputs))

    def row_bytes(self, in_features: int, dtype: torch.dtype) -> int:
        """Bytes of temporaries in decoding one row: with the compiled kernel its numbers alone."""
        if native.built():
            return in_features * dtype.itemsize
        # In plain torch its codes twice, and scale and zero at each column.
        return in_features * (4 + 3 * dtype.itemsize)

    def rows(self, tensors: Mapping[str, Tensor], rows: slice) -> Tensors:
        """The tiles, scales and zeros of the rows, which begin with a tile."""
        groups = groups_of(tensors["tiles"], self.group_size)
        across, each = slice(rows.start // ROWS, -(-rows.stop // ROWS)), slice(rows.start * groups, rows.stop * groups)
        return {name: tensor[across if name == "tiles" else each] for name, tensor in tensors.items()}

    def out_features(self, tensors: Mapping[str, Tensor]) -> int:
        """O, which the scales tell; tiles are padded."""
        return tensors["scale"].shape[0] // groups_of(tensors["tiles"], self.group_size)
