"""A weight of which only the signs are stored, at one bit each, with one scale for all of them.

``W = scale * S``, with ``S`` of -1 and 1; the scale is the mean magnitude, which has the least squared error.

Bytes of a weight (O, I): ``O * packed_size(I, 1) + 4``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pintpot.kernels import pack, packed_size, unpack
from pintpot.weights.formats._base import Format, Storage, Tensors, file_name
from pintpot.weights.formats.sign_rank import SignRank

ONES = SignRank(rank=1)
"""Signs whose magnitudes are a product of two vectors: with vectors of ones, the product with the signs alone."""


@file_name("signs")
@dataclass(frozen=True, kw_only=True)
class Signs(Format):
    """Signs with one scale."""

    def storage(self, out_features: int, in_features: int) -> Storage:
        """``signs`` packed, and ``scale`` float32 (1,)."""
        return {
            "signs": ((out_features, packed_size(in_features, 1)), torch.uint8),
            "scale": ((1,), torch.float32),
        }

    def encode(self, weight: Tensor) -> Tensors:
        """The signs (zero counts as positive) and the mean magnitude."""
        scale = weight.abs().mean(dtype=torch.float32)
        return {"signs": pack((weight >= 0).to(torch.uint8), 1), "scale": scale.reshape(1)}

    def decode(self, tensors: Mapping[str, Tensor], in_features: int, dtype: torch.dtype) -> Tensor:
        """The scale with the signs."""
        signs = unpack(tensors["signs"], 1, in_features).view(torch.int8).mul_(2).sub_(1)
        return signs.to(dtype).mul_(tensors["scale"].to(dtype))

    def matmul(self, input: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """The product with the signs, times the scale."""
        signs = tensors["signs"]
        ones = {
            "left": signs.new_ones((signs.shape[0], 1), dtype=torch.float16),
            "right": signs.new_ones((1, input.shape[-1]), dtype=torch.float16),
        }
        return ONES.matmul(input, {"signs": signs, **ones}) * tensors["scale"].to(input.dtype)

    def rows(self, tensors: Mapping[str, Tensor], rows: slice) -> Tensors:
        """The signs of the rows, and the scale."""
        return {"signs": tensors["signs"][rows], "scale": tensors["scale"]}

    def workspace(self, out_features: int, in_features: int, dtype: torch.dtype) -> int:
        """That of the product with the signs and its two vectors of ones; the unscaled output is not counted."""
        return ONES.workspace(out_features, in_features, dtype) + 2 * (out_features + in_features)
