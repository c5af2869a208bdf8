"""A weight of which another format holds only the leading channels of each head; the others are zero."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from pintpot.core.errors import ShapeError
from pintpot.weights.formats._base import Format, Storage, Tensors, file_name, prefixed, within
from pintpot.weights.formats.dense import Dense


@file_name("leading")
@dataclass(frozen=True, kw_only=True)
class Leading(Format):
    """The first ``kept`` of every ``size`` channels.

    Attributes:
        inner: the format of the channels that are kept.
        size: channels of a head.
        kept: of them.
        inputs: whether heads are parts of the in-features, and not of the out-features.
    """

    inner: Format = field(default_factory=Dense)
    size: int = 1
    kept: int = 1
    inputs: bool = False

    def _inner(self, out_features: int, in_features: int) -> tuple[int, int]:
        channels = in_features if self.inputs else out_features
        if not 1 <= self.kept <= self.size or channels % self.size:
            raise ShapeError(
                f"{self.kept} of {self.size} channels cannot be kept of {channels}",
                hint="the channels must be whole heads, of which one or more stays",
            )
        left = channels // self.size * self.kept
        return (out_features, left) if self.inputs else (left, in_features)

    def storage(self, out_features: int, in_features: int) -> Storage:
        """The inner tensors of the channels that are kept.

        Raises:
            ShapeError: when the channels are not whole heads.
        """
        return prefixed("inner_", self.inner.storage(*self._inner(out_features, in_features)))

    def encode(self, weight: Tensor) -> Tensors:
        """The leading channels."""
        self.check(*weight.shape)
        side = 1 if self.inputs else 0
        heads = weight.unflatten(side, (-1, self.size))
        return prefixed("inner_", self.inner.encode(heads.narrow(side + 1, 0, self.kept).flatten(side, side + 1)))

    def decode(self, tensors: Mapping[str, Tensor], in_features: int, dtype: torch.dtype) -> Tensor:
        """The leading channels, and zeros."""
        columns = self._inner(self.size, in_features)[1]
        held = self.inner.decode(within("inner_", tensors), columns, dtype)
        return self._spread(held) if self.inputs else self._spread(held.t()).t().contiguous()

    def _spread(self, channels: Tensor) -> Tensor:
        """The last dimension with zeros after the channels of each head."""
        return functional.pad(channels.unflatten(-1, (-1, self.kept)), (0, self.size - self.kept)).flatten(-2)

    def matmul(self, input: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """The product of the channels that are kept."""
        inner = within("inner_", tensors)
        if self.inputs:
            return self.inner.matmul(input.unflatten(-1, (-1, self.size))[..., : self.kept].flatten(-2), inner)
        return self._spread(self.inner.matmul(input, inner))

    def workspace(self, out_features: int, in_features: int, dtype: torch.dtype) -> int:
        """That of the inner format; the kept channels of the input or output, once more, are not counted."""
        return self.inner.workspace(*self._inner(out_features, in_features), dtype)

    def out_features(self, tensors: Mapping[str, Tensor]) -> int:
        """O of the inner tensors, with the channels that are not stored."""
        held = self.inner.out_features(within("inner_", tensors))
        return held if self.inputs else held // self.kept * self.size
