"""A weight of -1, 0 and 1 with a scale a group: five numbers in a byte, or four.

Bytes of a weight (O, I), with N = ceil(I / G) groups a row: ``O * (ceil(I / per_byte) + 2 * N)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pintpot.core.errors import ShapeError
from pintpot.kernels.tables import BASES, few_rows, ternary_decode, ternary_matmul
from pintpot.weights.formats._base import Format, Storage, Tensors, decodes_in_place, file_name
from pintpot.weights.formats.grid import SCALE_DTYPES


@file_name("ternary")
@dataclass(frozen=True, kw_only=True)
class Ternary(Format):
    """Numbers of three values with a scale for each group of in-features.

    Attributes:
        group_size: in-features that share a scale; -1 for a whole row. The last group may be shorter.
        per_byte: numbers in a byte: 5 (1.6 bits each), or 4 (2 bits each, taken apart without division).
        scale_dtype: ``"float16"`` or ``"bfloat16"``.
    """

    group_size: int = -1
    per_byte: int = 5
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        if self.per_byte not in BASES:
            raise ShapeError(f"a byte holds 4 or 5 ternary numbers, not {self.per_byte}", hint="per_byte=5 or 4")
        if self.group_size != -1 and self.group_size < 1:
            raise ShapeError(
                f"group_size must be positive, or -1 for whole rows, not {self.group_size}", hint="for instance 128"
            )
        if self.scale_dtype not in SCALE_DTYPES:
            raise ShapeError(
                f"scales cannot be stored as {self.scale_dtype!r}", hint=f"one of: {', '.join(SCALE_DTYPES)}"
            )

    def group(self, in_features: int) -> int:
        """In-features that share a scale, for rows of this length."""
        return in_features if self.group_size == -1 else min(self.group_size, in_features)

    def storage(self, out_features: int, in_features: int) -> Storage:
        """``packed`` and ``scale`` (O, N)."""
        groups = -(-in_features // self.group(in_features))
        return {
            "packed": ((out_features, -(-in_features // self.per_byte)), torch.uint8),
            "scale": ((out_features, groups), SCALE_DTYPES[self.scale_dtype]),
        }

    def encode(self, weight: Tensor) -> Tensors:
        """The numbers with the least squared error, exactly."""
        scale = self.fit(weight.float())
        return self.store(self.round(weight.float(), scale), scale)

    def fit(self, weight: Tensor) -> Tensor:
        """The scale of each group with the least squared error, float32 (O, N), as the stored dtype holds it.

        The best numbers that are not zero are the largest, for some count of them, and their scale is the mean of their
        magnitudes; the best count has the largest ``sum ** 2 / count``.

        Args:
            weight: float32 (O, I).
        """
        size = self.group(weight.shape[-1])
        groups = functional.pad(weight.abs(), (0, -weight.shape[-1] % size)).unflatten(-1, (-1, size))
        sums = groups.sort(-1, descending=True).values.cumsum(-1)
        counts = torch.arange(1, size + 1, device=weight.device, dtype=torch.float32)
        best = (sums.square() / counts).argmax(-1, keepdim=True)
        scale = (sums.gather(-1, best) / counts[best]).squeeze(-1)
        dtype = SCALE_DTYPES[self.scale_dtype]
        return scale.clamp(max=torch.finfo(dtype).max).to(dtype).float()

    def round(self, weight: Tensor, scale: Tensor) -> Tensor:
        """The nearest of -1, 0 and 1 for scales (O, N): int8 (O, I)."""
        by_column = self.by_column(scale, weight.shape[-1])
        large = 2 * weight.abs() > by_column
        return (weight.sign() * large).to(torch.int8)

    def by_column(self, of_groups: Tensor, in_features: int) -> Tensor:
        """One number a group, (..., N), at each of its columns, (..., I)."""
        return of_groups.repeat_interleave(self.group(in_features), dim=-1)[..., :in_features]

    def store(self, values: Tensor, scale: Tensor) -> Tensors:
        """The stored tensors of values -1, 0 and 1, (O, I), and scales (O, N)."""
        digits = functional.pad((values + 1).to(torch.uint8), (0, -values.shape[-1] % self.per_byte))
        weights = BASES[self.per_byte] ** torch.arange(self.per_byte, device=values.device, dtype=torch.int32)
        packed = (digits.unflatten(-1, (-1, self.per_byte)) * weights).sum(-1)
        return {"packed": packed.to(torch.uint8), "scale": scale.to(SCALE_DTYPES[self.scale_dtype])}

    def decode(self, tensors: Mapping[str, Tensor], in_features: int, dtype: torch.dtype) -> Tensor:
        """The numbers (O, I) that stored tensors stand for, in ``dtype``."""
        sizes = {"per_byte": self.per_byte, "group_size": self.group(in_features), "columns": in_features}
        return ternary_decode(tensors["packed"], tensors["scale"], **sizes, dtype=dtype)

    def multiplies_packed(self) -> bool:
        """It does."""
        return True

    def multiply_few(self, flat: Tensor, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """With a small tile of the numbers at a time."""
        stored = tensors["packed"], tensors["scale"]
        if not few_rows(flat, *stored):
            return None
        return ternary_matmul(flat, *stored, per_byte=self.per_byte, group_size=self.group(flat.shape[1]))

    def row_bytes(self, in_features: int, dtype: torch.dtype) -> int:
        """The numbers alone where they are decoded by a compiled kernel.

        Otherwise these (twice with an odd last group) and the digits of a byte each, once apart and once in order.
        """
        if decodes_in_place(dtype):
            return in_features * dtype.itemsize
        size = self.group(in_features)
        return in_features * (2 + dtype.itemsize * (1 if in_features % size == 0 else 2))
