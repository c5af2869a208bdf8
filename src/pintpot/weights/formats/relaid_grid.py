"""What formats share that hold the numbers of a grid in another order, for an operation that reads them so."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from pintpot.core.values import has_values
from pintpot.kernels import unpack
from pintpot.weights.formats._base import Storage, Tensors
from pintpot.weights.formats.grid import Grid
from pintpot.weights.formats.grouped import Grouped

PACKED_AT_ONCE = 1 << 18
"""Codes that are put into another order at a time."""
PACKING_BYTES = 9
"""Bytes of temporaries for each of them, about."""


@dataclass(frozen=True, kw_only=True)
class RelaidGrid(Grouped):
    """The numbers of a ``Grid`` with the same fields, bit for bit; only their order in memory is another.

    A base: a subclass says how the codes of some rows lie, in tiles of a number of rows.

    Attributes:
        bits: width of a code, 1 to 8.
        group_size: in-features that share a scale; -1 for a whole row. The last group may be shorter.
        symmetric: the zero is fixed at ``2 ** (bits - 1)`` and not stored.
        scale_dtype: ``"float16"`` or ``"bfloat16"``.
    """

    codes: ClassVar[str]
    """The name of the tensor of codes. It does not change."""
    tile_rows: ClassVar[int]
    """Rows that lie together."""
    tile_dim: ClassVar[int] = 0
    """The dimension of the codes along which there is one tile after the other."""

    bits: int = 4
    group_size: int = 128
    symmetric: bool = False
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        self.grid()

    def grid(self) -> Grid:
        """The grid of the same numbers, which refuses fields that make none."""
        return Grid(**{field.name: getattr(self, field.name) for field in fields(Grid)})

    @abstractmethod
    def codes_shape(self, out_features: int, in_features: int) -> tuple[int, ...]:
        """The shape of the codes of a weight (O, I)."""

    @abstractmethod
    def pack_codes(self, codes: Tensor) -> Tensor:
        """Codes uint8 (rows, I) in tiles."""

    def storage(self, out_features: int, in_features: int) -> Storage:
        """The codes, and the grid's ``scale`` and, if asymmetric, ``zero``."""
        stored = self.grid().storage(out_features, in_features)
        del stored["packed"]
        return {self.codes: (self.codes_shape(out_features, in_features), torch.uint8), **stored}

    def encode(self, weight: Tensor) -> Tensors:
        """Round to nearest, as the grid does."""
        return self.relaid(self.grid().encode(weight), weight.shape[1])

    def relaid(self, tensors: Mapping[str, Tensor], in_features: int) -> Tensors:
        """From the stored tensors of the grid; scales and zeros are the same tensors, not copies."""
        packed, rows = tensors["packed"], tensors["scale"].shape[0]
        codes = packed.new_empty(self.codes_shape(rows, in_features))
        step = max(1, PACKED_AT_ONCE // (self.tile_rows * in_features)) * self.tile_rows
        starts = range(0, rows, step)
        # Without values the first strip stands for all: they cost alike.
        for start in starts if has_values(packed) else starts[:1]:
            tiles = self.pack_codes(unpack(packed[start : start + step], self.bits, in_features))
            codes.narrow(self.tile_dim, start // self.tile_rows, tiles.shape[self.tile_dim]).copy_(tiles)
        return {self.codes: codes, **{name: tensor for name, tensor in tensors.items() if name != "packed"}}

    def rows(self, tensors: Mapping[str, Tensor], rows: slice) -> Tensors:
        """The tiles, scales and zeros of the rows, which begin with a tile."""
        first, last = rows.start // self.tile_rows, -(-rows.stop // self.tile_rows)
        whole = tensors[self.codes]
        tiles = whole[(slice(None),) * self.tile_dim + (slice(first, last),)]
        return {name: tiles if name == self.codes else tensor[rows] for name, tensor in tensors.items()}

    def rows_together(self) -> int:
        """Those of a tile."""
        return self.tile_rows

    def out_features(self, tensors: Mapping[str, Tensor]) -> int:
        """O, which the scales tell; tiles are padded."""
        return tensors["scale"].shape[0]
