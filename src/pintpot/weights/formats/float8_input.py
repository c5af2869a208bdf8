"""A weight whose input is rounded to floats of 8 bits (e4m3) before the product, as hardware for them needs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pintpot.weights.formats._base import Format, Storage, Tensors, file_name
from pintpot.weights.formats.grid import Grid

LARGEST = 448.0
"""The largest number of e4m3."""


@file_name("float8_input")
@dataclass(frozen=True, kw_only=True)
class Float8Input(Format):
    """``inner`` times the input in e4m3, with a scale for each token that brings its largest number to 448.

    The gradient passes through the rounding.

    Attributes:
        inner: the format of the weight; its tensors are stored as they are.
    """

    inner: Format = field(default_factory=Grid)

    def storage(self, out_features: int, in_features: int) -> Storage:
        """That of the inner format."""
        return self.inner.storage(out_features, in_features)

    def encode(self, weight: Tensor) -> Tensors:
        """That of the inner format."""
        return self.inner.encode(weight)

    def decode(self, tensors: Mapping[str, Tensor], in_features: int, dtype: torch.dtype) -> Tensor:
        """That of the inner format."""
        return self.inner.decode(tensors, in_features, dtype)

    def matmul(self, input: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """The inner product of the rounded input."""
        rounded = round_to_float8(input.detach())
        if input.requires_grad:
            rounded = input + (rounded - input.detach())
        return self.inner.matmul(rounded, tensors)

    def workspace(self, out_features: int, in_features: int, dtype: torch.dtype) -> int:
        """That of the inner format; the rounded input is as large as the input, which is not counted either."""
        return self.inner.workspace(out_features, in_features, dtype)

    def rows(self, tensors: Mapping[str, Tensor], rows: slice) -> Tensors:
        """That of the inner format."""
        return self.inner.rows(tensors, rows)

    def out_features(self, tensors: Mapping[str, Tensor]) -> int:
        """That of the inner format."""
        return self.inner.out_features(tensors)


def round_to_float8(input: Tensor) -> Tensor:
    """The nearest numbers of e4m3 times a scale a token, for an input (..., I), in its dtype."""
    numbers = input.float()
    scale = (numbers.abs().amax(-1, keepdim=True) / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    codes = (numbers / scale).clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return codes.float().mul_(scale).to(input.dtype)
