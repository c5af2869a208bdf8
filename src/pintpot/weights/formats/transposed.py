"""A weight that another format holds transposed, so that its groups run along output channels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pintpot.weights.formats._base import Format, Storage, Tensors, file_name, prefixed, strips, within
from pintpot.weights.formats.grid import Grid


@file_name("transposed")
@dataclass(frozen=True, kw_only=True)
class Transposed(Format):
    """``inner`` holds the weight's transpose (I, O): a row of it is one input channel.

    Attributes:
        inner: the format of the transpose.
        out_features_held: O, which the stored tensors of the transpose do not tell.
    """

    inner: Format = field(default_factory=Grid)
    out_features_held: int = 0

    def storage(self, out_features: int, in_features: int) -> Storage:
        """The inner tensors of the transpose."""
        return prefixed("inner_", self.inner.storage(in_features, out_features))

    def encode(self, weight: Tensor) -> Tensors:
        """The inner tensors of the transpose."""
        return prefixed("inner_", self.inner.encode(weight.t().contiguous()))

    def decode(self, tensors: Mapping[str, Tensor], in_features: int, dtype: torch.dtype) -> Tensor:
        """The numbers (O, I), in memory of that order."""
        inner = self.inner.decode(within("inner_", tensors), self.out_features_held, dtype)
        return inner.t().contiguous()

    def out_features(self, tensors: Mapping[str, Tensor]) -> int:
        """O."""
        return self.out_features_held

    def multiplies_packed(self) -> bool:
        """Where the inner format is multiplied as it is."""
        return self.inner.multiplies_packed_transposed()

    def workspace(self, out_features: int, in_features: int, dtype: torch.dtype) -> int:
        """A strip of input channels."""
        return self.inner.workspace(in_features, out_features, dtype)

    def matmul(self, input: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """The sum over strips of input channels of their inputs times their part of the weight.

        Few rows of input are multiplied by the inner format, where it can.
        """
        flat = input.reshape(-1, input.shape[-1])
        inner = within("inner_", tensors)
        if torch.is_grad_enabled() and input.requires_grad:
            out: Tensor = _BySums.apply(flat, self, tuple(inner), *inner.values())
        else:
            out = _sum(flat, self, inner)
        return out.reshape(*input.shape[:-1], self.out_features_held)


def _sum(flat: Tensor, layout: Transposed, inner: Mapping[str, Tensor]) -> Tensor:
    few = layout.inner.multiply_few_transposed(flat, inner, layout.out_features_held)
    if few is not None:
        return few
    out = flat.new_zeros((flat.shape[0], layout.out_features_held))
    for columns in strips(layout.inner, flat.shape[1], layout.out_features_held, flat):
        out.addmm_(flat[:, columns], _part(layout, inner, columns, flat.dtype))
    return out


def _part(layout: Transposed, inner: Mapping[str, Tensor], columns: slice, dtype: torch.dtype) -> Tensor:
    return layout.inner.decode(layout.inner.rows(inner, columns), layout.out_features_held, dtype)


class _BySums(torch.autograd.Function):
    """Saves only the packed storage; backward decodes it again."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, layout: Transposed, names: tuple[str, ...], *stored: Tensor) -> Tensor:
        ctx.save_for_backward(*stored)
        ctx.layout, ctx.names, ctx.in_features = layout, names, flat.shape[1]
        return _sum(flat, layout, dict(zip(names, stored, strict=True)))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient, layout = gradients[0], ctx.layout
        inner = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        back = gradient.new_empty((gradient.shape[0], ctx.in_features))
        for columns in strips(layout.inner, ctx.in_features, layout.out_features_held, gradient):
            torch.mm(gradient, _part(layout, inner, columns, gradient.dtype).t(), out=back[:, columns])
        return back, *[None] * (2 + len(ctx.names))
