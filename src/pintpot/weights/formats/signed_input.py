"""A weight of whose input only the signs count, as hardware with products of single bits needs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pintpot.weights.formats._base import Format, Storage, Tensors, file_name, prefixed
from pintpot.weights.formats.sign_rank import SignRank
from pintpot.weights.formats.wrapped import Wrapped


@file_name("signed_input")
@dataclass(frozen=True, kw_only=True)
class SignedInput(Wrapped):
    """``inner`` times ``scale * sign(input + shift)``, zero as positive, with one scale and a shift a channel.

    A scale of zero leaves the input as it is. That is what ``encode`` writes, because a weight does not tell what its
    input will be; ``encode_with`` takes them. The gradient passes where the shifted input is at most the scale.

    Attributes:
        inner: the format of the weight.
    """

    inner: Format = field(default_factory=SignRank)

    def own_storage(self, in_features: int) -> Storage:
        """``input_scale`` float32 (1,) and ``input_shift`` float32 (I,)."""
        return {"input_scale": ((1,), torch.float32), "input_shift": ((in_features,), torch.float32)}

    def changed(self, input: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """The scaled signs."""
        scale, shift = tensors["input_scale"].to(input.dtype), tensors["input_shift"].to(input.dtype)
        return torch.where(scale > 0, sign_of_input(input + shift, scale), input)

    def encode(self, weight: Tensor) -> Tensors:
        """The inner tensors, and a scale of zero."""
        shift = torch.zeros(weight.shape[-1], device=weight.device)
        return self.encode_with(self.inner.encode(weight), shift[:1], shift)

    def encode_with(self, inner: Tensors, scale: Tensor, shift: Tensor) -> Tensors:
        """Given inner tensors, a scale (1,) and shifts (I,)."""
        own = {"input_scale": scale, "input_shift": shift}
        return {**prefixed("inner_", inner), **{name: t.detach().float().clone() for name, t in own.items()}}


def sign_of_input(input: Tensor, scale: Tensor) -> Tensor:
    """``scale`` (1,) times the signs of an input (..., I), zero as positive.

    The gradient passes to inputs of at most the scale; that of the scale is divided by the root of the number of inputs
    (Esser et al. 2019, arXiv:1902.08153, for steps of one bit).
    """
    signs: Tensor = _SignOfInput.apply(input, scale)
    return signs


class _SignOfInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(input, scale)
        return torch.where(input >= 0, scale, -scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        input, scale = ctx.saved_tensors
        to_scale = torch.where(input >= 0, gradients[0], -gradients[0]).sum() / input.numel() ** 0.5
        return gradients[0] * (input.abs() <= scale), to_scale.reshape(1)
