"""A symmetric grid whose scales are floats of 8 bits (e4m3), times one power of two for the whole weight.

Bytes of a weight (O, I), with N = ceil(I / G) groups a row: ``O * (packed_size(I, bits) + N) + 4``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pintpot.core.errors import ShapeError
from pintpot.kernels import dequantize, grid_matmul, pack, packed_size, workspace_bytes
from pintpot.weights.formats._base import Format, Storage, Tensors, file_name
from pintpot.weights.formats.grid import ENCODE_ELEMENTS, Grid

SMALLEST = 2.0**-9
"""The smallest positive number of e4m3."""
LARGEST = 448.0


@file_name("float8_scales")
@dataclass(frozen=True, kw_only=True)
class Float8Scales(Format):
    """Groups of signed integers with a scale in 8 bits.

    Attributes:
        bits: width of a code, 2 to 8.
        group_size: in-features that share a scale; -1 for a whole row. The last group may be shorter.
    """

    bits: int = 4
    group_size: int = 128

    def __post_init__(self) -> None:
        if self.bits < 2:
            raise ShapeError(f"signed integers have at least 2 bits, not {self.bits}", hint="choose bits from 2 to 8")
        self._grid()

    def _grid(self) -> Grid:
        """The same groups, which refuses what makes none."""
        return Grid(bits=self.bits, group_size=self.group_size, symmetric=True)

    def storage(self, out_features: int, in_features: int) -> Storage:
        """``packed``, ``scale`` (the bits of e4m3) and ``whole`` float32 (1,)."""
        return {
            "packed": ((out_features, packed_size(in_features, self.bits)), torch.uint8),
            "scale": ((out_features, self._grid().groups(in_features)), torch.uint8),
            "whole": ((1,), torch.float32),
        }

    def encode(self, weight: Tensor) -> Tensors:
        """Round to nearest; the power of two brings the largest scale near the largest number of e4m3."""
        rows, columns = weight.shape
        grid, half = self._grid(), (1 << (self.bits - 1)) - 1
        size, step = grid.group(columns), max(1, ENCODE_ELEMENTS // columns)
        parts = weight.split(step)
        ends = [functional.pad(p.abs(), (0, -columns % size)).unflatten(-1, (-1, size)).amax(-1) for p in parts]
        needed = torch.cat(ends).float() / half
        # A power of two, so that it rounds nothing.
        most = needed.amax().clamp(min=torch.finfo(torch.float32).tiny)
        whole = torch.exp2((most / LARGEST).log2().ceil().clamp(min=-100.0))
        scale = (needed / whole).clamp(SMALLEST, LARGEST).to(torch.float8_e4m3fn)
        packed = weight.new_empty((rows, packed_size(columns, self.bits)), dtype=torch.uint8)
        for start, part in zip(range(0, rows, step), parts, strict=True):
            by_column = grid.by_column(scale[start : start + step].float() * whole, columns)
            codes = (part.float() / by_column).round_().clamp_(-half - 1, half).add_(half + 1)
            packed[start : start + step] = pack(codes.to(torch.uint8), self.bits)
        return {"packed": packed, "scale": scale.view(torch.uint8), "whole": whole.reshape(1)}

    def decode(self, tensors: Mapping[str, Tensor], in_features: int, dtype: torch.dtype) -> Tensor:
        """The numbers (O, I) that stored tensors stand for, in ``dtype``."""
        return dequantize(
            tensors["packed"],
            _decoded(tensors),
            None,
            bits=self.bits,
            group_size=self._grid().group(in_features),
            in_features=in_features,
            dtype=dtype,
        )

    def matmul(self, input: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """``input`` (..., I) times the transposed weight: the grid's product, with scales made wide for a moment."""
        group = self._grid().group(input.shape[-1])
        return grid_matmul(input, tensors["packed"], _decoded(tensors), None, bits=self.bits, group_size=group)

    def workspace(self, out_features: int, in_features: int, dtype: torch.dtype) -> int:
        """Bytes of temporaries that ``matmul`` needs beside its output: the grid's, and the wide scales."""
        scales = out_features * self._grid().groups(in_features) * torch.float32.itemsize
        return scales + workspace_bytes(out_features, in_features, self._grid().group(in_features), dtype)

    def row_bytes(self, in_features: int, dtype: torch.dtype) -> int:
        """Bytes of temporaries in decoding one row: its codes, its numbers, and its scales."""
        return in_features * (1 + dtype.itemsize) + 2 * torch.float32.itemsize * self._grid().groups(in_features)

    def rows(self, tensors: Mapping[str, Tensor], rows: slice) -> Tensors:
        """The codes and scales of the rows, and the factor of all."""
        return {"packed": tensors["packed"][rows], "scale": tensors["scale"][rows], "whole": tensors["whole"]}


def _decoded(tensors: Mapping[str, Tensor]) -> Tensor:
    """The scales (O, N) in float32, which holds them exactly."""
    return tensors["scale"].view(torch.float8_e4m3fn).float().mul_(tensors["whole"])
