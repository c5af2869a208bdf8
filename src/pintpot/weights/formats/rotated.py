"""A weight whose input channels are mixed by a Hadamard transform before another format holds it, and so its input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pintpot.core.errors import ShapeError
from pintpot.kernels import native
from pintpot.kernels.hadamard import hadamard, power_of_two
from pintpot.weights.formats._base import Storage, Tensors, file_name
from pintpot.weights.formats.wrapped import Wrapped


@file_name("rotated")
@dataclass(frozen=True, kw_only=True)
class Rotated(Wrapped):
    """``W = inner @ H`` with ``H`` symmetric and orthonormal: outliers of the weight and of the input are spread.

    Attributes:
        inner: the format of ``W @ H``.
        block: in-features that are mixed with each other, a power of 2.
    """

    block: int = 64

    def storage(self, out_features: int, in_features: int) -> Storage:
        """The inner tensors.

        Raises:
            ShapeError: when the block is no power of 2, or does not divide I.
        """
        if self.block < 1 or self.block & (self.block - 1) or in_features % self.block:
            raise ShapeError(
                f"{in_features} in-features are not mixed in blocks of {self.block}",
                hint=f"use a power of 2 that divides them, at most {power_of_two(in_features)}",
            )
        return super().storage(out_features, in_features)

    def encode(self, weight: Tensor) -> Tensors:
        """The inner tensors of the mixed weight."""
        return super().encode(self.mix(weight))

    def mix(self, numbers: Tensor) -> Tensor:
        """Numbers (..., I) times ``H``; twice is what they were."""
        return hadamard(numbers, self.block)

    def changed(self, input: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """The mixed input."""
        return self.mix(input)

    def decode(self, tensors: Mapping[str, Tensor], in_features: int, dtype: torch.dtype) -> Tensor:
        """The numbers of the weight itself, mixed back in float32."""
        return self.mix(super().decode(tensors, in_features, torch.float32)).to(dtype)

    def row_bytes(self, in_features: int, dtype: torch.dtype) -> int:
        """The inner format's and the mixed row, which plain torch makes in halves that it puts together."""
        mixed = 4 if native.built() else 12
        return self.inner.row_bytes(in_features, torch.float32) + mixed * in_features
