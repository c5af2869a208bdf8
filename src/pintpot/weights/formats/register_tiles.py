"""A grid whose codes lie as the threads of a GPU take them into their registers (``kernels/tiles.py``).

Bytes of a weight (O, I), with N = ceil(I / G) groups a row: ``ceil(I / 16) * ceil(O / 16) * 32 * bits + O * (2 * N +
packed_size(N, bits))``, the last summand only for asymmetric grids. Where O and I are multiples of 16 these are the
bytes of the grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pintpot.kernels import dequantize_tiles, pack_tiles, tiles_matmul
from pintpot.kernels.tiles import TILE, tiles_shape
from pintpot.weights.formats._base import file_name, multiply_by_strips
from pintpot.weights.formats.relaid_grid import RelaidGrid


@file_name("register_tiles")
@dataclass(frozen=True, kw_only=True)
class RegisterTiles(RelaidGrid):
    """A grid as tiles of 16 x 16 codes, each cut up for 32 threads."""

    codes: ClassVar[str] = "tiles"
    tile_rows: ClassVar[int] = TILE
    tile_dim: ClassVar[int] = 1

    def codes_shape(self, out_features: int, in_features: int) -> tuple[int, ...]:
        """Of ``tiles``."""
        return tiles_shape(out_features, in_features, self.bits)

    def pack_codes(self, codes: Tensor) -> Tensor:
        """Codes uint8 (rows, I) in tiles."""
        return pack_tiles(codes, self.bits)

    def decode(self, tensors: Mapping[str, Tensor], in_features: int, dtype: torch.dtype) -> Tensor:
        """The numbers (O, I) that stored tensors stand for, in ``dtype``."""
        return dequantize_tiles(
            tensors["tiles"],
            tensors["scale"],
            tensors.get("zero"),
            bits=self.bits,
            group_size=self.group(in_features),
            in_features=in_features,
            dtype=dtype,
        )

    def matmul(self, input: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """``input`` (..., I) times the transposed weight: by the kernel for GPUs where it serves, or by strips."""
        product = tiles_matmul(
            input,
            tensors["tiles"],
            tensors["scale"],
            tensors.get("zero"),
            bits=self.bits,
            group_size=self.group(input.shape[-1]),
        )
        return multiply_by_strips(self, input, tensors) if product is None else product

    def row_bytes(self, in_features: int, dtype: torch.dtype) -> int:
        """Bytes of temporaries in decoding one row: codes on their way, its numbers, and scale and zero at each."""
        return in_features * (4 + 3 * dtype.itemsize)
