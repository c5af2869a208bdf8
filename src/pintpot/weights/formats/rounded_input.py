"""A weight whose input is rounded to few bits before the product, as hardware with integer products needs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from pintpot.weights.formats._base import file_name
from pintpot.weights.formats.wrapped import Wrapped, passed_through


@file_name("rounded_input")
@dataclass(frozen=True, kw_only=True)
class RoundedInput(Wrapped):
    """``inner`` times the input on a symmetric grid whose scales follow the input's largest number.

    The gradient passes through the rounding.

    Attributes:
        inner: the format of the weight; its tensors are stored as they are.
        bits: of the input, 2 to 8.
        group_size: in-features of a token that share a scale; -1 for all.
    """

    prefix: ClassVar[str] = ""
    bits: int = 8
    group_size: int = -1

    def changed(self, input: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """The rounded input."""
        return passed_through(input, round_input(input.detach(), self.bits, self.group_size))


def round_input(input: Tensor, bits: int, group_size: int = -1) -> Tensor:
    """Numbers (..., I) on a symmetric grid of so many bits, with one scale for each group of a token."""
    columns = input.shape[-1]
    size = columns if group_size == -1 else min(group_size, columns)
    grouped = functional.pad(input.float(), (0, -columns % size)).unflatten(-1, (-1, size))
    half = (1 << (bits - 1)) - 1
    scale = grouped.abs().amax(-1, keepdim=True).div_(half).clamp_(min=torch.finfo(torch.float32).tiny)
    return (grouped / scale).round_().mul_(scale).flatten(-2)[..., :columns].to(input.dtype)
