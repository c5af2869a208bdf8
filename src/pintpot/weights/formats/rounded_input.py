"""A weight whose input is rounded to few bits before the product, as hardware with integer products needs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from pintpot.weights.formats._base import Format, Storage, Tensors, file_name
from pintpot.weights.formats.grid import Grid


@file_name("rounded_input")
@dataclass(frozen=True, kw_only=True)
class RoundedInput(Format):
    """``inner`` times the input on a symmetric grid whose scales follow the input's largest number.

    The gradient passes through the rounding.

    Attributes:
        inner: the format of the weight; its tensors are stored as they are.
        bits: of the input, 2 to 8.
        group_size: in-features of a token that share a scale; -1 for all.
    """

    inner: Format = field(default_factory=Grid)
    bits: int = 8
    group_size: int = -1

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
        rounded = round_input(input.detach(), self.bits, self.group_size)
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


def round_input(input: Tensor, bits: int, group_size: int = -1) -> Tensor:
    """Numbers (..., I) on a symmetric grid of so many bits, with one scale for each group of a token."""
    columns = input.shape[-1]
    size = columns if group_size == -1 else min(group_size, columns)
    grouped = functional.pad(input.float(), (0, -columns % size)).unflatten(-1, (-1, size))
    half = (1 << (bits - 1)) - 1
    scale = grouped.abs().amax(-1, keepdim=True).div_(half).clamp_(min=torch.finfo(torch.float32).tiny)
    return (grouped / scale).round_().mul_(scale).flatten(-2)[..., :columns].to(input.dtype)
