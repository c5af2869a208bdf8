"""A grid of integers with a scale and a zero a group.

A grid stores an unsigned code of 1 to 8 bits for each number, and for each group of in-features a scale and (unless
symmetric) an integer zero of the same width; a number is ``(code - zero) * scale``.

Bytes of a weight (O, I), with N = ceil(I / G) groups a row:
``O * (packed_size(I, bits) + 2 * N + packed_size(N, bits))``, the last summand only for asymmetric grids.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pintpot.core.errors import ShapeError
from pintpot.kernels import dequantize, grid_matmul, pack, packed_size, workspace_bytes
from pintpot.weights.formats._base import Storage, Tensors, file_name
from pintpot.weights.formats.grouped import SCALE_DTYPES as SCALE_DTYPES
from pintpot.weights.formats.grouped import SMALLEST, Grouped

ENCODE_ELEMENTS = 1 << 20
"""Numbers that ``Grid.encode`` holds in float32 at a time (a few temporaries of 4 MiB each)."""


@file_name("grid")
@dataclass(frozen=True, kw_only=True)
class Grid(Grouped):
    """Groups of integers with a scale and a zero.

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
        if not 1 <= self.bits <= 8:
            raise ShapeError(f"a grid has 1 to 8 bits, not {self.bits}", hint="choose bits between 1 and 8")
        self.check_groups()

    def storage(self, out_features: int, in_features: int) -> Storage:
        """Shape and dtype of ``packed``, ``scale`` and, if asymmetric, ``zero``."""
        groups = self.groups(in_features)
        stored: Storage = {
            "packed": ((out_features, packed_size(in_features, self.bits)), torch.uint8),
            "scale": ((out_features, groups), SCALE_DTYPES[self.scale_dtype]),
        }
        if not self.symmetric:
            stored["zero"] = ((out_features, packed_size(groups, self.bits)), torch.uint8)
        return stored

    def encode(self, weight: Tensor) -> Tensors:
        """Round to nearest between the smallest and the largest number of each group (both widened to hold 0)."""
        rows, columns = weight.shape
        stored = {
            name: weight.new_empty(shape, dtype=dtype) for name, (shape, dtype) in self.storage(rows, columns).items()
        }
        step = max(1, ENCODE_ELEMENTS // columns)
        for start in range(0, rows, step):
            block = slice(start, min(start + step, rows))
            for name, tensor in self._encode_rows(weight[block].float()).items():
                stored[name][block] = tensor
        return stored

    def _encode_rows(self, weight: Tensor) -> Tensors:
        scale, zero = self.fit(weight)
        return self.store(self.round(weight, scale, zero), scale, zero)

    def fit(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero of each group that reach from its smallest to its largest number (both widened to hold 0).

        Args:
            weight: float32 (O, I).

        Returns:
            float32 (O, N) each: numbers that the scale's dtype holds exactly, and integers (the middle if symmetric).
        """
        size = self.group(weight.shape[-1])
        # Padding with zeros changes no group's range, because every range holds 0.
        padded = functional.pad(weight, (0, -weight.shape[-1] % size)).unflatten(-1, (-1, size))
        return self.settle(padded.amin(-1).clamp(max=0), padded.amax(-1).clamp(min=0))

    def settle(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero of groups that are to reach from ``low`` (at most 0) to ``high`` (at least 0); see ``fit``."""
        top = (1 << self.bits) - 1
        dtype = SCALE_DTYPES[self.scale_dtype]
        # Symmetric codes reach from -2^(b-1) to 2^(b-1) - 1; one bit alone has no positive code.
        half = max(1, (1 << (self.bits - 1)) - 1)
        scale = torch.maximum(-low, high) / half if self.symmetric else (high - low) / top
        # A range too small for the scale's dtype takes its smallest number, not zero.
        smallest = torch.where(scale > 0, SMALLEST[self.scale_dtype], 1.0)
        scale = torch.maximum(scale, smallest).clamp(max=torch.finfo(dtype).max).to(dtype).float()
        middle = 1 << (self.bits - 1)
        zero = torch.full_like(scale, middle) if self.symmetric else (-low / scale).round().clamp(0, top)
        return scale, zero

    def round(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The nearest codes, uint8 (O, I), for scales and zeros (O, N)."""
        columns = weight.shape[-1]
        codes = weight / self.by_column(scale, columns)
        return codes.round_().add_(self.by_column(zero, columns)).clamp_(0, (1 << self.bits) - 1).to(torch.uint8)

    def value(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The numbers (O, I) that codes stand for, float32."""
        columns = codes.shape[-1]
        return (codes.float() - self.by_column(zero, columns)).mul_(self.by_column(scale, columns))

    def store(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensors:
        """The stored tensors of codes with their scales and zeros, as ``fit`` and ``round`` give them."""
        stored = {"packed": pack(codes, self.bits), "scale": scale.to(SCALE_DTYPES[self.scale_dtype])}
        if not self.symmetric:
            stored["zero"] = pack(zero.to(torch.uint8), self.bits)
        return stored

    def decode(self, tensors: Mapping[str, Tensor], in_features: int, dtype: torch.dtype) -> Tensor:
        """The numbers (O, I) that stored tensors stand for, in ``dtype``."""
        return dequantize(
            tensors["packed"],
            tensors["scale"],
            tensors.get("zero"),
            bits=self.bits,
            group_size=self.group(in_features),
            in_features=in_features,
            dtype=dtype,
        )

    def matmul(self, input: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """``input`` (..., I) times the transposed weight, in bounded workspace."""
        return grid_matmul(
            input,
            tensors["packed"],
            tensors["scale"],
            tensors.get("zero"),
            bits=self.bits,
            group_size=self.group(input.shape[-1]),
        )

    def multiplies_packed(self) -> bool:
        """It does."""
        return True

    def workspace(self, out_features: int, in_features: int, dtype: torch.dtype) -> int:
        """Bytes of temporaries that ``matmul`` needs beside its output."""
        return workspace_bytes(out_features, in_features, self.group(in_features), dtype)
