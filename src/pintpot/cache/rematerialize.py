"""Keys and values made anew from what attention is given, by the model's own projections."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pintpot.cache._base import Call, LayerSizes, Place
from pintpot.cache.tokens import Tokens
from pintpot.core.errors import UnsupportedModel
from pintpot.core.values import has_values

CHECKED_TOKENS = 4
"""Tokens on which the projections are tried before anything is stored."""

TOLERANCE = 0.05
"""The greatest difference that is rounding, as a share of the greatest number: bfloat16 has 8 bits."""

FUSED = ("qkv_proj", "c_attn")
"""Projections of queries, keys and values together, in this order."""

NORMS = ("k_norm", "k_layernorm")
"""Norms of keys between projection and rotation."""


@dataclass(frozen=True, eq=False)
class Projections:
    """How one attention module makes keys and values.

    Attributes:
        module: the attention module.
        sizes: of its layer.
    """

    module: nn.Module
    sizes: LayerSizes

    def keys(self, inputs: Tensor) -> Tensor:
        """Keys (B, T, K * D) before norm and rotation, from inputs (B, T, hidden)."""
        width = self.sizes.heads * self.sizes.key_dim
        return self._project(inputs, "k_proj", -width - self.sizes.heads * self.sizes.value_dim, width)

    def values(self, inputs: Tensor) -> Tensor:
        """Values (B, T, K * D)."""
        width = self.sizes.heads * self.sizes.value_dim
        return self._project(inputs, "v_proj", -width, width)

    def finished_keys(self, keys: Tensor, place: Place, positions: Tensor) -> Tensor:
        """Keys (B, T, K * D) as attention wants them: normed and rotated, float32 (B, K, T, D)."""
        norms = (getattr(self.module, name, None) for name in NORMS)
        norm = next((norm for norm in norms if norm is not None), None)
        over_all = norm is not None and getattr(norm, "weight", keys[0, 0, :0]).numel() == keys.shape[-1]
        if norm is not None and over_all:
            keys = norm(keys)
        heads = keys.unflatten(-1, (self.sizes.heads, -1))
        if norm is not None and not over_all:
            heads = norm(heads)
        heads = heads.transpose(1, 2).float()
        return heads if place.rotary is None else place.rotary.rotate(heads, positions)

    def finished_values(self, values: Tensor) -> Tensor:
        """Values (B, T, K * D) by heads: float32 (B, K, T, D)."""
        return values.unflatten(-1, (self.sizes.heads, -1)).transpose(1, 2).float()

    def weight(self, project: Callable[[Tensor], Tensor], like: Tensor) -> tuple[Tensor, Tensor]:
        """The matrix (hidden, K * D) and the bias (K * D,) of ``keys`` or ``values``, whatever module does it.

        Args:
            project: one of the two.
            like: inputs (B, T, hidden) that give device and dtype.
        """
        size = like.shape[-1]
        unit = torch.eye(size, dtype=like.dtype, device=like.device)[None]
        bias = project(torch.zeros_like(unit[:, :1]))
        return (project(unit) - bias)[0], bias[0, 0]

    def _project(self, inputs: Tensor, name: str, first: int, width: int) -> Tensor:
        """One of keys and values; from a fused projection, ``width`` outputs from the ``first`` on (from behind)."""
        inputs = inputs.contiguous()  # some projections take views of what they are given
        own = getattr(self.module, name, None)
        if own is not None:
            out: Tensor = own(inputs)
            return out
        for fused in FUSED:
            if (joint := getattr(self.module, fused, None)) is not None:
                together: Tensor = joint(inputs)
                start = together.shape[-1] + first
                return together[..., start : start + width]
        raise _unsupported(self.module, "has no projection of keys and values that Pintpot knows")


def check_projections(tokens: Tokens, call: Call, place: Place) -> None:
    """Make the first tokens' keys and values anew and compare them with those that the model made.

    Raises:
        UnsupportedModel: when the module is of an unknown kind, or makes them in another way.
    """
    if tokens.inputs is None:
        raise _unsupported(call.module, "does not show what it is given")
    few = tokens.part(0, CHECKED_TOKENS)
    if few.inputs is None or not has_values(few.keys):
        return
    made = Projections(call.module, place.sizes)
    inputs = few.inputs.squeeze(1)
    try:
        keys = made.finished_keys(made.keys(inputs), place, few.positions)
        values = made.finished_values(made.values(inputs))
    except RuntimeError as error:
        raise _unsupported(call.module, f"makes keys of another shape ({error})") from error
    for kind, found, given in (("keys", keys, few.keys), ("values", values, few.values)):
        if found.shape != given.shape or (found - given).abs().max() > TOLERANCE * given.abs().max():
            raise _unsupported(call.module, f"gives other {kind} than its projections and positions 0, 1, 2 make")


def _unsupported(module: nn.Module, why: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{type(module).__name__} {why}: its keys and values cannot be made anew from its input",
        hint="use a store of keys and values, as kivi or rotatekv; pad on the left and give position_ids",
    )
