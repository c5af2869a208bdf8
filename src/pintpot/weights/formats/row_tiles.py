"""A grid whose codes lie in tiles of 16 rows, so that products with few inputs have a row in each lane of a vector.

Bytes of a weight (O, I), with N = ceil(I / G) groups a row: ``ceil(O / 16) * ceil(I / 32) * 64 * bits + O * N * 2``,
and ``O * N`` more for asymmetric grids. Where O is a multiple of 16 and I of 32, these are the bytes of the grid, but
for zeros, which have a byte each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

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
from pintpot.weights.formats._base import Format, Storage, Tensors, file_name
from pintpot.weights.formats.bit_planes import PACKED_AT_ONCE
from pintpot.weights.formats.grid import Grid


@file_name("row_tiles")
@dataclass(frozen=True, kw_only=True)
class RowTiles(Format):
    """The numbers of a ``Grid`` with the same fields, bit for bit; only their order in memory is another.

    Attributes:
        bits: width of a code, 1 to 8.
        group_size: in-features that share a scale, a multiple of 32; -1 for a whole row.
        symmetric: the zero is fixed at ``2 ** (bits - 1)`` and not stored.
        scale_dtype: ``"float16"`` or ``"bfloat16"``.
        int8_inputs: round few rows of input to 8 bits, relative to the largest number of up to 128 columns.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = False
    scale_dtype: str = "float16"
    int8_inputs: bool = False

    def __post_init__(self) -> None:
        if self.group_size != -1 and self.group_size % BLOCK:
            raise ShapeError(
                f"tiles of rows have groups of a multiple of {BLOCK}, not of {self.group_size}",
                hint="keep other groups in a grid",
            )
        self.grid()

    def grid(self) -> Grid:
        """The grid of the same numbers, which refuses fields that make none."""
        return Grid(**{name: value for name, value in asdict(self).items() if name != "int8_inputs"})

    def storage(self, out_features: int, in_features: int) -> Storage:
        """``tiles``, ``scale`` (O * N,) and, if asymmetric, ``zero`` (O * N,), a byte each."""
        scale, dtype = self.grid().storage(out_features, in_features)["scale"]
        stored: Storage = {
            "tiles": (row_tiles_shape(out_features, in_features, self.bits), torch.uint8),
            "scale": ((scale[0] * scale[1],), dtype),
        }
        if not self.symmetric:
            stored["zero"] = (stored["scale"][0], torch.uint8)
        return stored

    def encode(self, weight: Tensor) -> Tensors:
        """Round to nearest, as the grid does."""
        return self.relaid(self.grid().encode(weight), weight.shape[1])

    def relaid(self, tensors: Mapping[str, Tensor], in_features: int) -> Tensors:
        """From the stored tensors of the grid."""
        packed, (rows, groups) = tensors["packed"], tensors["scale"].shape
        tiles = packed.new_empty(row_tiles_shape(rows, in_features, self.bits))
        step = max(1, PACKED_AT_ONCE // (ROWS * in_features))
        starts = range(0, tiles.shape[0], step)
        # Without values the first strip stands for all: they cost alike.
        for start in starts[:1] if packed.is_meta or is_fake(packed) else starts:
            codes = unpack(packed[start * ROWS : (start + step) * ROWS], self.bits, in_features)
            tiles[start : start + step] = pack_row_tiles(codes, self.bits)
        stored = {"tiles": tiles, "scale": by_tiles(tensors["scale"])}
        if "zero" in tensors:
            stored["zero"] = by_tiles(unpack(tensors["zero"], self.bits, groups))
        return stored

    def decode(self, tensors: Mapping[str, Tensor], in_features: int, dtype: torch.dtype) -> Tensor:
        """The numbers (O, I) that stored tensors stand for, in ``dtype``."""
        return dequantize_row_tiles(
            tensors["tiles"],
            tensors["scale"],
            tensors.get("zero"),
            group_size=self.grid().group(in_features),
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
        group_size = self.grid().group(flat.shape[1])
        return row_tiles_matmul(flat, *stored, group_size=group_size, digits=int(self.int8_inputs))

    def row_bytes(self, in_features: int, dtype: torch.dtype) -> int:
        """Bytes of temporaries in decoding one row: with the compiled kernel its numbers alone."""
        if native.library() is not None:
            return in_features * dtype.itemsize
        # In plain torch its codes twice, and scale and zero at each column.
        return in_features * (4 + 3 * dtype.itemsize)

    def rows(self, tensors: Mapping[str, Tensor], rows: slice) -> Tensors:
        """The tiles, scales and zeros of the rows, which begin with a tile."""
        groups = groups_of(tensors["tiles"], self.group_size)
        across, each = slice(rows.start // ROWS, -(-rows.stop // ROWS)), slice(rows.start * groups, rows.stop * groups)
        return {name: tensor[across if name == "tiles" else each] for name, tensor in tensors.items()}

    def rows_together(self) -> int:
        """Those of a tile."""
        return ROWS

    def out_features(self, tensors: Mapping[str, Tensor]) -> int:
        """O, which the scales tell; tiles are padded."""
        return tensors["scale"].shape[0] // groups_of(tensors["tiles"], self.group_size)
