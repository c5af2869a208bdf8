"""A grid whose codes lie as the threads of a GPU take them into their registers (``kernels/tiles.py``).

Bytes of a weight (O, I), with N = ceil(I / G) groups a row: ``ceil(I / 16) * ceil(O / 16) * 32 * bits + O * (2 * N +
packed_size(N, bits))``, the last summand only for asymmetric grids. Where O and I are multiples of 16 these are the
bytes of the grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from pintpot.kernels import dequantize_tiles, pack_tiles, tiles_matmul, unpack
from pintpot.kernels.tiles import TILE, tiles_shape
from pintpot.weights.formats._base import Format, Storage, Tensors, file_name, multiply_by_strips
from pintpot.weights.formats.bit_planes import PACKED_AT_ONCE
from pintpot.weights.formats.grid import Grid


@file_name("register_tiles")
@dataclass(frozen=True, kw_only=True)
class RegisterTiles(Format):
    """The numbers of a ``Grid`` with the same fields, bit for bit; only their order in memory is another.

    Attributes:
        bits: width of a code, 1 to 8.
        group_size: in-features that share a scale; -1 for a whole row. The last group may be shorter.
        symmetric: the zero is fixed at ``2 ** (bits - 1)`` and not stored.
        scale_dtype: ``"float16"`` or ``"bfloat16"``.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = False
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        self.grid()

    def grid(self) -> Grid:
        """The grid of the same numbers, which refuses fields that make none."""
        return Grid(**asdict(self))

    def storage(self, out_features: int, in_features: int) -> Storage:
        """``tiles``, and the grid's ``scale`` and, if asymmetric, ``zero``."""
        stored = self.grid().storage(out_features, in_features)
        del stored["packed"]
        return {"tiles": (tiles_shape(out_features, in_features, self.bits), torch.uint8), **stored}

    def encode(self, weight: Tensor) -> Tensors:
        """Round to nearest, as the grid does."""
        return self.relaid(self.grid().encode(weight), weight.shape[1])

    def relaid(self, tensors: Mapping[str, Tensor], in_features: int) -> Tensors:
        """From the stored tensors of the grid; scales and zeros are the same tensors, not copies."""
        packed, rows = tensors["packed"], tensors["scale"].shape[0]
        tiles = packed.new_empty(tiles_shape(rows, in_features, self.bits))
        step = max(1, PACKED_AT_ONCE // (TILE * in_features))
        starts = range(0, tiles.shape[1], step)
        # Without values the first strip stands for all: they cost alike.
        for start in starts[:1] if packed.is_meta or is_fake(packed) else starts:
            codes = unpack(packed[start * TILE : (start + step) * TILE], self.bits, in_features)
            tiles[:, start : start + step] = pack_tiles(codes, self.bits)
        return {"tiles": tiles, **{name: tensor for name, tensor in tensors.items() if name != "packed"}}

    def decode(self, tensors: Mapping[str, Tensor], in_features: int, dtype: torch.dtype) -> Tensor:
        """The numbers (O, I) that stored tensors stand for, in ``dtype``."""
        return dequantize_tiles(
            tensors["tiles"],
            tensors["scale"],
            tensors.get("zero"),
            bits=self.bits,
            group_size=self.grid().group(in_features),
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
            group_size=self.grid().group(input.shape[-1]),
        )
        return multiply_by_strips(self, input, tensors) if product is None else product

    def row_bytes(self, in_features: int, dtype: torch.dtype) -> int:
        """Bytes of temporaries in decoding one row: codes on their way, its numbers, and scale and zero at each."""
        return in_features * (4 + 3 * dtype.itemsize)

    def rows(self, tensors: Mapping[str, Tensor], rows: slice) -> Tensors:
        """The tiles, scales and zeros of the rows, which begin with a tile."""
        across = slice(rows.start // TILE, -(-rows.stop // TILE))
        return {name: t[:, across] if name == "tiles" else t[rows] for name, t in tensors.items()}

    def rows_together(self) -> int:
        """Those of a tile."""
        return TILE

    def out_features(self, tensors: Mapping[str, Tensor]) -> int:
        """O, which the scales tell; tiles are padded."""
        return tensors["scale"].shape[0]
