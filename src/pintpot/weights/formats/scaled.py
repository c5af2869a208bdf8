"""A weight whose input channels are scaled before another format holds it; the input is divided by the same scales."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pintpot.weights.formats._base import Storage, Tensors, file_name
from pintpot.weights.formats.grid import SCALE_DTYPES
from pintpot.weights.formats.wrapped import Wrapped


@file_name("scaled")
@dataclass(frozen=True, kw_only=True)
class Scaled(Wrapped):
    """``W = inner * diag(input_scale)``: what ``inner`` holds is ``W / input_scale``.

    Attributes:
        inner: the format of the scaled weight.
        scale_dtype: of the scales, ``"float16"`` or ``"bfloat16"``.
    """

    scale_dtype: str = "float16"

    def own_storage(self, in_features: int) -> Storage:
        """``input_scale`` (I,)."""
        return {"input_scale": ((in_features,), SCALE_DTYPES[self.scale_dtype])}

    def changed(self, input: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """The input times the scales."""
        return input * tensors["input_scale"].to(input.dtype)

    def decode(self, tensors: Mapping[str, Tensor], in_features: int, dtype: torch.dtype) -> Tensor:
        """The inner numbers times the scales."""
        # Not in place: a dense inner format gives what it stores.
        return super().decode(tensors, in_features, dtype) * tensors["input_scale"].to(dtype)

    def encode(self, weight: Tensor) -> Tensors:
        """With scales of one."""
        return self.encode_with(weight, torch.ones(weight.shape[-1], device=weight.device))

    def encode_with(self, weight: Tensor, input_scale: Tensor) -> Tensors:
        """With given scales (I,), positive."""
        scale = input_scale.to(SCALE_DTYPES[self.scale_dtype])
        return {**super().encode(weight / scale.to(weight.dtype)), "input_scale": scale}
