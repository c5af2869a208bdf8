"""A weight whose input is rounded on a grid that was fixed beforehand, as hardware with integer products needs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pintpot.core.errors import ShapeError
from pintpot.weights.formats._base import Storage, Tensors, file_name, prefixed
from pintpot.weights.formats.wrapped import Wrapped, passed_through


@file_name("static_input")
@dataclass(frozen=True, kw_only=True)
class StaticInput(Wrapped):
    """``inner`` times the input on a grid of equal steps that does not depend on the input.

    A step of zero leaves the input as it is. That is what ``encode`` writes, because a weight does not tell what its
    input will be; ``encode_with`` takes the steps. The gradient passes through the rounding.

    Attributes:
        inner: the format of the weight.
        bits: of the input, 2 to 16.
        symmetric: the input is a signed integer times the step; otherwise an unsigned one from which a zero is taken.
        per_channel: every in-feature has a step of its own, instead of one for all.
    """

    bits: int = 8
    symmetric: bool = True
    per_channel: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 16:
            raise ShapeError(
                f"an input has 2 to 16 bits, not {self.bits}", hint="choose bits between 2 and 16, for instance 8"
            )

    def own_storage(self, in_features: int) -> Storage:
        """``input_step`` float32 (1,) or (I,), and ``input_zero`` likewise if asymmetric."""
        return dict.fromkeys(self._own(), ((in_features if self.per_channel else 1,), torch.float32))

    def changed(self, input: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """The rounded input."""
        rounded = self.round(input.detach(), tensors["input_step"], tensors.get("input_zero"))
        return passed_through(input, rounded)

    def _own(self) -> tuple[str, ...]:
        return ("input_step",) if self.symmetric else ("input_step", "input_zero")

    def encode(self, weight: Tensor) -> Tensors:
        """The inner tensors, and steps of zero."""
        nothing = torch.zeros(weight.shape[-1] if self.per_channel else 1, device=weight.device)
        return self.encode_with(self.inner.encode(weight), nothing, nothing)

    def encode_with(self, inner: Tensors, step: Tensor, zero: Tensor | None = None) -> Tensors:
        """Given inner tensors, steps and, where there are any, zeros (1,) or (I,)."""
        own = dict(zip(self._own(), (step, zero), strict=False))
        return {
            **prefixed("inner_", inner),
            **{name: t.detach().float().clone() for name, t in own.items() if t is not None},
        }

    def fit(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Steps and zeros of the grids that reach from ``low`` (at most 0) to ``high`` (at least 0), float32."""
        top = (1 << self.bits) - 1
        if self.symmetric:
            step = torch.maximum(-low, high) / (top >> 1)
            return step, torch.zeros_like(step)
        step = (high - low) / top
        return step, (-low / step.clamp(min=torch.finfo(torch.float32).tiny)).round().clamp_(0, top)

    def round(self, input: Tensor, step: Tensor, zero: Tensor | None = None) -> Tensor:
        """The nearest numbers of the grid to an input (..., I), in its dtype."""
        low = -(1 << (self.bits - 1)) if self.symmetric else 0
        high = low + (1 << self.bits) - 1
        shift = 0.0 if zero is None else zero
        safe = torch.where(step > 0, step, 1.0)
        codes = (input.float() / safe).round_().add_(shift).clamp_(low, high)
        return torch.where(step > 0, (codes - shift) * safe, input.float()).to(input.dtype)
