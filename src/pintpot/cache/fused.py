"""Chunks that can be read as numbers, and attention to them by torch's fused attention for CPUs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from pintpot.cache._base import Chunk
from pintpot.kernels import Attended

_FLASH = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
"""What ``scaled_dot_product_attention`` calls, which also gives the logarithm of the sum of exponentials."""


class ReadableChunk(Chunk):
    """Tokens that become dense numbers for a moment. A base."""

    @abstractmethod
    def read_keys(self) -> Tensor:
        """Its keys, float32 (B, K, tokens, D)."""

    @abstractmethod
    def read_values(self) -> Tensor:
        """Its values, float32 (B, K, tokens, E)."""

    def scores(self, query: Tensor) -> Tensor:
        """See ``Chunk.scores``."""
        return query @ self.read_keys().transpose(-1, -2)

    def mix(self, weights: Tensor) -> Tensor:
        """See ``Chunk.mix``."""
        return weights @ self.read_values()

    @classmethod
    def attend_run(cls, chunks: Sequence[Self], query: Tensor, softcap: float | None) -> Attended | None:
        """See ``Chunk.attend_run``: no scores are held. Not for capped scores, nor with gradients."""
        if _FLASH is None or softcap is not None or query.device.type != "cpu" or torch.is_grad_enabled():
            return None
        found = None
        for chunk in chunks:
            keys, values = chunk.read_keys().contiguous(), chunk.read_values().contiguous()
            if keys.shape[-1] != values.shape[-1]:
                return None
            mean, total = _FLASH(query, keys, values, scale=1.0)
            one = Attended(mean, total.unsqueeze(-1), torch.ones_like(total).unsqueeze(-1))
            found = one if found is None else found.joined(one)
        return found
