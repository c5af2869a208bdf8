"""A weight whose input channels are scaled before another format holds it; the input is divided by the same scales."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pintpot.weights.formats._base import Format, Storage, Tensors, file_name, prefixed, within
from pintpot.weights.formats.grid import SCALE_DTYPES, Grid


@file_name("scaled")
@dataclass(frozen=True, kw_only=True)
class Scaled(Format):
    """``W = inner * diag(input_scale)``: what ``inner`` holds is ``W / input_scale``.

    Attributes:
        inner: the format of the scaled weight.
        scale_dtype: of the scales, ``"float16"`` or ``"bfloat16"``.
    """

    inner: Format = field(default_factory=Grid)
    scale_dtype: str = "float16"

    def storage(self, out_features: int, in_features: int) -> Storage:
        """``input_scale`` (I,) and the inner tensors."""
        inner = prefixed("inner_", self.inner.storage(out_features, in_features))
        return {**inner, "input_scale": ((in_features,), SCALE_DTYPES[self.scale_dtype])}

    def encode(self, weight: Tensor) -> Tensors:
        """With scales of one."""
        return self.encode_with(weight, torch.ones(weight.shape[-1], device=weight.device))

    def encode_with(self, weight: Tensor, input_scale: Tensor) -> Tensors:
        """With given scales (I,), positive."""
        scale = input_scale.to(SCALE_DTYPES[self.scale_dtype])
        return {**prefixed("inner_", self.inner.encode(weight / scale.to(weight.dtype))), "input_scale": scale}

    def decode(self, tensors: Mapping[str, Tensor], in_features: int, dtype: torch.dtype) -> Tensor:
        """The inner numbers times the scales."""
        inner = self.inner.decode(within("inner_", tensors), in_features, dtype)
        return inner.mul_(tensors["input_scale"].to(dtype))

    def matmul(self, input: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """The inner product of the scaled input."""
        return self.inner.matmul(input * tensors["input_scale"].to(input.dtype), within("inner_", tensors))

    def workspace(self, out_features: int, in_features: int, dtype: torch.dtype) -> int:
        """That of the inner format; the scaled input is as large as the input, which is not counted either."""
        return self.inner.workspace(out_features, in_features, dtype)

    def rows(self, tensors: Mapping[str, Tensor], rows: slice) -> Tensors:
        """The inner tensors of the rows, and all scales."""
        inner = prefixed("inner_", self.inner.rows(within("inner_", tensors), rows))
        return {**inner, "input_scale": tensors["input_scale"]}

    def out_features(self, tensors: Mapping[str, Tensor]) -> int:
        """O of the inner tensors."""
        return self.inner.out_features(within("inner_", tensors))
