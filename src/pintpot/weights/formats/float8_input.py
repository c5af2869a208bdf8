"""A weight whose input is rounded to floats of 8 bits (e4m3) before the product, as hardware for them needs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pintpot.kernels.rounding import FORMATS, round_to
from pintpot.weights.formats._base import file_name
from pintpot.weights.formats.wrapped import Wrapped, passed_through

LARGEST = 448.0
"""The largest number of e4m3."""


@file_name("float8_input")
@dataclass(frozen=True, kw_only=True)
class Float8Input(Wrapped):
    """``inner`` times the input in e4m3, with a scale for each token that brings its largest number to 448.

    The gradient passes through the rounding.

    Attributes:
        inner: the format of the weight; its tensors are stored as they are.
    """

    prefix: ClassVar[str] = ""

    def changed(self, input: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """The rounded input."""
        return passed_through(input, round_to_float8(input.detach()))


def round_to_float8(input: Tensor) -> Tensor:
    """The nearest numbers of e4m3 times a scale a token, for an input (..., I), in its dtype."""
    numbers = input.float()
    scale = (numbers.abs().amax(-1, keepdim=True) / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    return round_to(numbers / scale, FORMATS["e4m3"]).mul_(scale).to(input.dtype)
