"""A sparse weight in tiles: each kept number with its place in its tile, loaded as sparse and multiplied as dense.

This is the storage that Flash-LLM calls Tiled-CSL (Xia et al. 2023, arXiv:2309.10285): 16 bits for a number, 16 for
its place, and where each tile begins. Tiles lie row by row. How many numbers are kept is fixed for the whole weight,
not for a row or a tile.

Bytes of a weight (O, I) with n numbers kept, in ``T = ceil(O / tile_rows) * ceil(I / tile_columns)`` tiles:
``4 * n + 4 * (T + 1)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pintpot.core.errors import ShapeError
from pintpot.core.values import has_values
from pintpot.kernels import tiled_matmul, tiled_matmul_serves
from pintpot.kernels.tiled import MOST_PLACES
from pintpot.weights.formats._base import Format, Storage, Tensors, file_name
from pintpot.weights.formats.selection import largest


@file_name("tiled")
@dataclass(frozen=True, kw_only=True)
class Tiled(Format):
    """Kept numbers with their places in tiles.

    Attributes:
        out_features_held: O, which the stored tensors do not tell.
        kept_fraction: share of the numbers that is kept.
        tile_rows: out-features of a tile.
        tile_columns: in-features of a tile; with ``tile_rows`` at most 32768 numbers.
        dtype: of the kept numbers, of 16 bits.
    """

    out_features_held: int = 0
    kept_fraction: float = 0.2
    tile_rows: int = 128
    tile_columns: int = 64
    dtype: torch.dtype = torch.float16

    def __post_init__(self) -> None:
        if not 0 < self.kept_fraction <= 1:
            raise ShapeError(
                f"kept_fraction is a share of the numbers, not {self.kept_fraction}", hint="choose one above 0, up to 1"
            )
        if min(self.tile_rows, self.tile_columns) < 1 or self.tile_rows * self.tile_columns > MOST_PLACES:
            raise ShapeError(
                f"16 bits cannot tell the places of a tile of {self.tile_rows} x {self.tile_columns} apart",
                hint=f"choose sides of 1 or more, with a product of at most {MOST_PLACES}",
            )

    def tiles(self, in_features: int) -> tuple[int, int]:
        """Rows and columns of tiles."""
        return -(-self.out_features_held // self.tile_rows), -(-in_features // self.tile_columns)

    def kept(self, numbers: int) -> int:
        """How many of so many numbers are kept."""
        return max(1, int(self.kept_fraction * numbers + 0.5))

    def storage(self, out_features: int, in_features: int) -> Storage:
        """``values`` (n,), ``places`` int16 (n,) in their tiles, and ``starts`` int32 (T + 1,) of the tiles.

        Raises:
            ShapeError: when O is not the one held.
        """
        if out_features != self.out_features_held:
            raise ShapeError(
                f"tiles laid out for {self.out_features_held} out-features cannot hold {out_features}",
                hint="set out_features_held to the weight's",
            )
        rows, columns = self.tiles(in_features)
        kept = self.kept(out_features * in_features)
        return {
            "values": ((kept,), self.dtype),
            "places": ((kept,), torch.int16),
            "starts": ((rows * columns + 1,), torch.int32),
        }

    def encode(self, weight: Tensor) -> Tensors:
        """With the numbers of the largest magnitude."""
        return self.encode_with(weight, self.choose(weight.float().abs()))

    def choose(self, score: Tensor) -> Tensor:
        """Which numbers to keep, bool (O, I): those of the highest scores, float32 (O, I)."""
        return largest(score, self.kept(score.numel()))

    def encode_with(self, weight: Tensor, mask: Tensor) -> Tensors:
        """With the numbers of a mask, bool (O, I), of as many as are kept."""
        rows, columns = self.tiles(weight.shape[1])
        tile = self.tile_rows * self.tile_columns
        if not has_values(mask):
            places = mask.new_zeros(self.kept(mask.numel()), dtype=torch.int64)
        else:
            places = self._by_tile(mask).nonzero()[:, 0]
        first = torch.arange(rows * columns + 1, device=weight.device) * tile
        return {
            "values": self._by_tile(weight)[places].to(self.dtype),
            "places": (places % tile).to(torch.int16),
            "starts": torch.searchsorted(places, first).to(torch.int32),
        }

    def _by_tile(self, numbers: Tensor) -> Tensor:
        """(O, I) as one row of tiles, each row by row, padded with zeros."""
        rows, columns = self.tiles(numbers.shape[1])
        below, right = rows * self.tile_rows - numbers.shape[0], columns * self.tile_columns - numbers.shape[1]
        padded = functional.pad(numbers, (0, right, 0, below))
        return padded.view(rows, self.tile_rows, columns, self.tile_columns).transpose(1, 2).reshape(-1)

    def decode(self, tensors: Mapping[str, Tensor], in_features: int, dtype: torch.dtype) -> Tensor:
        """The kept numbers at their places, and zeros; of some rows of tiles with what pads the last below."""
        columns, tile = self.tiles(in_features)[1], self.tile_rows * self.tile_columns
        starts, values, places = tensors["starts"], tensors["values"], tensors["places"]
        count = starts.shape[0] - 1
        dense = torch.zeros(count * tile, dtype=dtype, device=values.device)
        if has_values(values):
            kept = slice(int(starts[0]), int(starts[-1]))
            tiles = torch.repeat_interleave(torch.arange(count, device=values.device), starts.diff())
            dense[places[kept].long().add_(tiles.mul_(tile))] = values[kept].to(dtype)
        parts = dense.view(-1, columns, self.tile_rows, self.tile_columns).transpose(1, 2)
        return parts.reshape(-1, columns * self.tile_columns)[: self.out_features_held, :in_features]

    def matmul(self, input: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """``input`` (..., I) times the transposed weight; for few rows of input without a dense tile."""
        stored = tensors["values"], tensors["places"], tensors["starts"]
        if not tiled_matmul_serves(input, *stored):
            return super().matmul(input, tensors)
        return tiled_matmul(
            input,
            *stored,
            out_features=self.out_features_held,
            tile_rows=self.tile_rows,
            tile_columns=self.tile_columns,
        )

    def multiplies_packed(self) -> bool:
        """It does."""
        return True

    def rows(self, tensors: Mapping[str, Tensor], rows: slice) -> Tensors:
        """Where the tiles of the rows begin, and all kept numbers; ``rows`` begin between tiles."""
        columns = (tensors["starts"].shape[0] - 1) // -(-self.out_features_held // self.tile_rows)
        first, last = rows.start // self.tile_rows, -(-rows.stop // self.tile_rows)
        return {**tensors, "starts": tensors["starts"][first * columns : last * columns + 1]}

    def out_features(self, tensors: Mapping[str, Tensor]) -> int:
        """O."""
        return self.out_features_held

    def rows_together(self) -> int:
        """Those of a tile."""
        return self.tile_rows

    def row_bytes(self, in_features: int, dtype: torch.dtype) -> int:
        """The row in tiles and in its own order, and for each kept number its tile and place (int64) and its value."""
        width = self.tiles(in_features)[1] * self.tile_columns
        return 2 * width * dtype.itemsize + self.kept(in_features) * (16 + dtype.itemsize)
