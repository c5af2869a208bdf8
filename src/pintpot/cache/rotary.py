"""Rotary positions as a model applies them to keys, and how to take them off again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pintpot.core.errors import UnsupportedModel

INTERLEAVED = ("chatglm", "codegen", "cohere", "cohere2", "ernie4_5", "glm", "glm4", "gptj", "helium", "llama4")
"""Model types that rotate neighbouring channels; all others rotate channel i with channel i + half."""

STEADY = ("default", "linear", "llama3", "yarn", "proportional")
"""Kinds of rotary frequencies that do not depend on how long the text is."""


@dataclass(frozen=True, eq=False)
class Rotary:
    """Rotation of the first ``2 * len(frequencies)`` channels by a token's position.

    Attributes:
        frequencies: float32 (R / 2,), radians a token.
        scaling: of what is rotated (YaRN; 1.0 elsewhere).
    """

    frequencies: Tensor
    scaling: float = 1.0

    @property
    def channels(self) -> int:
        """How many of a head's first channels are rotated."""
        return 2 * len(self.frequencies)

    def rotate(self, states: Tensor, positions: Tensor) -> Tensor:
        """States (B, K, T, D) rotated by positions (1, 1, T) or (B, K, T), in float32."""
        return self._turn(states, *self._waves(positions, 1.0, self.scaling))

    def unrotate(self, states: Tensor, positions: Tensor) -> Tensor:
        """The inverse of ``rotate``."""
        return self._turn(states, *self._waves(positions, -1.0, 1.0 / self.scaling))

    def shift(self, states: Tensor, tokens: int) -> Tensor:
        """Rotated states (B, K, T, D) as if they stood ``tokens`` further on, in float32."""
        steps = torch.full((1, 1, 1), tokens, device=states.device)
        return self._turn(states, *self._waves(steps, 1.0, 1.0))

    def rotate_mean(self, states: Tensor, positions: Tensor) -> Tensor:
        """The mean of states (B, K, T, D) rotated by each of positions (n,), in float32."""
        cos, sin = self._waves(positions, 1.0, self.scaling)
        return self._turn(states, cos.mean(dim=0), sin.mean(dim=0))

    def _waves(self, positions: Tensor, direction: float, scaling: float) -> tuple[Tensor, Tensor]:
        angles = positions[..., None].float() * self.frequencies.to(positions.device)
        return angles.cos() * scaling, angles.sin() * (scaling * direction)

    def _turn(self, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned, rest = states.float().split([self.channels, states.shape[-1] - self.channels], dim=-1)
        first, second = turned.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def rotary_of(config: PretrainedConfig, kind: str) -> Rotary | None:
    """The rotation of the layers of one type (``full_attention``), None for a model without rotary positions.

    Raises:
        UnsupportedModel: for frequencies that change with the length of the text, and for interleaved channels.
    """
    text = config.get_text_config(decoder=True)
    found: dict[str, Any] | None = getattr(text, "rope_parameters", None)
    if not found:
        return None
    nested = isinstance(found.get(kind), dict)
    settings = found[kind] if nested else found
    rope_type = settings.get("rope_type", "default")
    if rope_type not in STEADY or text.model_type in INTERLEAVED:
        why = f"of type {rope_type}" if rope_type not in STEADY else "on interleaved channels"
        raise UnsupportedModel(
            f"{text.model_type} has rotary positions {why}, which this cache cannot take off its keys",
            hint="use techniques that take keys as they are: kivi, lagkv",
        )
    if rope_type != "default":
        given = {"layer_type": kind} if nested else {}
        frequencies, scaling = ROPE_INIT_FUNCTIONS[rope_type](text, torch.device("cpu"), **given)
        return Rotary(frequencies.float(), float(scaling))
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    channels = int(head_dim * settings.get("partial_rotary_factor", 1.0))
    steps = torch.arange(0, channels, 2, dtype=torch.float32) / channels
    return Rotary(1.0 / settings["rope_theta"] ** steps)
