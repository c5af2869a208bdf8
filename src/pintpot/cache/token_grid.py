"""Vectors that are packed token by token, on grids of integers in groups of channels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pintpot.cache.packed import quantize, scale_dtype
from pintpot.cache.rows import Columns
from pintpot.kernels import pack, packed_size, restore


@dataclass(frozen=True)
class TokenGrid:
    """How vectors (B, K, T, width) are packed.

    Attributes:
        bits: width of a code.
        width: numbers of a token.
        group: of them, how many share a scale.
        span: share of a group's range, about its middle, that codes span; numbers beyond are cut.
    """

    bits: int
    width: int
    group: int
    span: float = 1.0

    @classmethod
    def of(cls, bits: int, group_size: int, width: int, span: float = 1.0) -> TokenGrid:
        """With the largest groups up to a size that divide the width."""
        return cls(bits, width, largest_divisor(width, group_size), span)

    @property
    def token_bytes(self) -> int:
        """Bytes of a packed vector."""
        return packed_size(self.width, self.bits) + 4 * (self.width // self.group)

    def pack(self, numbers: Tensor, dtype: torch.dtype, name: str = "") -> Columns:
        """Columns of codes, scales and least numbers, for a cache of a dtype; ``name`` comes before theirs."""
        groups = numbers.unflatten(-1, (-1, self.group))
        if self.span < 1:
            low, high = groups.aminmax(dim=-1, keepdim=True)
            cut = (high - low) * ((1 - self.span) / 2)
            groups = groups.clamp(low + cut, high - cut)
        codes, scale, low = quantize(groups, self.bits, scale_dtype(dtype))
        return {f"{name}codes": pack(codes.flatten(-2), self.bits), f"{name}scale": scale, f"{name}low": low}

    def unpack(self, columns: Columns, name: str = "") -> Tensor:
        """The vectors, float32."""
        stored = (columns[f"{name}{part}"] for part in ("codes", "scale", "low"))
        return restore(*stored, bits=self.bits, group_size=self.group, count=self.width)


def largest_divisor(size: int, most: int) -> int:
    """The greatest divisor of a size that is at most ``most``."""
    return next(number for number in range(min(size, most), 0, -1) if size % number == 0)
