"""Packed blocks of tokens: keys in groups along tokens, values in groups along channels.

Each block grows to ``BLOCK_TOKENS`` tokens, so that appending moves at most one block's codes and packs none again.

Shapes: B batch, K key-value heads, C tokens of a block, D head dim, G group size, N = C / G groups of tokens,
M = D / G' groups of channels. Codes are unsigned; a number is ``code * scale + low`` of its group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from pintpot.cache._base import LayerSizes
from pintpot.cache.fused import ReadableChunk
from pintpot.kernels import Attended, PackedBlock, attend_packed, attend_serves, pack, packed_size, restore

BLOCK_TOKENS = 256
"""Tokens of a block: what streamed attention makes dense at a time, and at most so many are spare."""


@dataclass(frozen=True)
class Layout:
    """How numbers are packed.

    Attributes:
        bits: width of a code.
        key_group: tokens that share a scale in one channel of the keys; divides ``BLOCK_TOKENS``.
        value_group: channels that share a scale in one token of the values; divides the head dim of values.
    """

    bits: int
    key_group: int
    value_group: int

    def packed_bytes(self, tokens: int, sizes: LayerSizes) -> int:
        """Bytes of ``tokens`` packed tokens (whole groups) of one sequence."""
        keys = sizes.key_dim * (tokens // self.key_group) * (packed_size(self.key_group, self.bits) + 4)
        values = tokens * (packed_size(sizes.value_dim, self.bits) + 4 * (sizes.value_dim // self.value_group))
        return sizes.heads * (keys + values)


def scale_dtype(dtype: torch.dtype) -> torch.dtype:
    """Scales take two bytes: bfloat16 for a bfloat16 cache (for its range), else float16."""
    return torch.bfloat16 if dtype is torch.bfloat16 else torch.float16


def quantize(groups: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Round to the grid between the least and the greatest number of each group.

    Args:
        groups: (..., G), any float dtype.
        bits: width of a code.
        dtype: of the scales.

    Returns:
        Codes uint8 (..., G), scale and low (...) in ``dtype``. Codes are chosen for scale and low as stored.
    """
    numbers = groups.float()
    low, high = numbers.aminmax(dim=-1)
    limit = torch.finfo(dtype).max
    low = low.clamp(-limit, limit).to(dtype)
    scale = ((high - low) / ((1 << bits) - 1)).clamp(0, limit).to(dtype)
    step = scale.float().unsqueeze(-1)
    codes = (numbers - low.float().unsqueeze(-1)) / torch.where(step > 0, step, torch.ones_like(step))
    return codes.round_().clamp_(0, (1 << bits) - 1).to(torch.uint8), scale, low


class Block:
    """Room for packed tokens, keys and values filled independently.

    Args:
        like_keys: keys (B, K, any, D) that give sizes, dtype and device.
        like_values: values (B, K, any, D).
        layout: how to pack.
        tokens: room for so many, whole groups.
    """

    def __init__(self, like_keys: Tensor, like_values: Tensor, layout: Layout, tokens: int) -> None:
        self.layout = layout
        batch, heads, _, key_dim = like_keys.shape
        self.value_dim = like_values.shape[-1]
        groups = tokens // layout.key_group
        scales = scale_dtype(like_keys.dtype)
        value_groups = self.value_dim // layout.value_group

        def empty(*sizes: int, dtype: torch.dtype = scales) -> Tensor:
            return torch.empty((batch, heads, *sizes), dtype=dtype, device=like_keys.device)

        self.keys = empty(key_dim, groups, packed_size(layout.key_group, layout.bits), dtype=torch.uint8)
        self.key_scale, self.key_low = empty(key_dim, groups), empty(key_dim, groups)
        self.values = empty(tokens, packed_size(self.value_dim, layout.bits), dtype=torch.uint8)
        self.value_scale, self.value_low = empty(tokens, value_groups), empty(tokens, value_groups)

    def grow_(self, tokens: int) -> None:
        """Room for ``tokens`` tokens in all, what is packed carried over."""
        more = tokens - self.values.shape[2]
        if more <= 0:
            return
        groups = more // self.layout.key_group

        def grown(held: Tensor, dim: int, count: int) -> Tensor:
            sizes = list(held.shape)
            sizes[dim] = count
            return torch.cat([held, held.new_empty(sizes)], dim=dim)

        self.keys = grown(self.keys, 3, groups)
        self.key_scale, self.key_low = grown(self.key_scale, 3, groups), grown(self.key_low, 3, groups)
        self.values = grown(self.values, 2, more)
        self.value_scale, self.value_low = grown(self.value_scale, 2, more), grown(self.value_low, 2, more)

    def write_keys(self, start: int, keys: Tensor) -> None:
        """Pack keys (B, K, T, D) at token ``start``; both are multiples of the group size."""
        size = self.layout.key_group
        here = slice(start // size, (start + keys.shape[-2]) // size)
        groups = keys.transpose(-1, -2).unflatten(-1, (-1, size))
        codes, scale, low = quantize(groups, self.layout.bits, self.key_scale.dtype)
        self.keys[..., here, :] = pack(codes, self.layout.bits)
        self.key_scale[..., here], self.key_low[..., here] = scale, low

    def write_values(self, start: int, values: Tensor) -> None:
        """Pack values (B, K, T, D) at token ``start``."""
        here = slice(start, start + values.shape[-2])
        groups = values.unflatten(-1, (-1, self.layout.value_group))
        codes, scale, low = quantize(groups, self.layout.bits, self.value_scale.dtype)
        self.values[..., here, :] = pack(codes.flatten(-2), self.layout.bits)
        self.value_scale[..., here, :], self.value_low[..., here, :] = scale, low

    def read_keys(self, start: int, stop: int) -> Tensor:
        """Keys of tokens ``start`` to ``stop`` (multiples of the group size), transposed: float32 (B, K, D, T)."""
        size = self.layout.key_group
        here = slice(start // size, stop // size)
        scale, low = self.key_scale[..., here, None], self.key_low[..., here, None]
        groups = restore(self.keys[..., here, :], scale, low, bits=self.layout.bits, group_size=size, count=size)
        return groups.flatten(-2)

    def read_values(self, start: int, stop: int) -> Tensor:
        """Values of tokens ``start`` to ``stop``: float32 (B, K, T, D)."""
        here, group_size = slice(start, stop), self.layout.value_group
        scale, low = self.value_scale[..., here, :], self.value_low[..., here, :]
        packed, bits = self.values[..., here, :], self.layout.bits
        return restore(packed, scale, low, bits=bits, group_size=group_size, count=self.value_dim)

    def first(self, tokens: int) -> PackedBlock:
        """Its first tokens, for the kernel that attends to them."""
        keys, values = (self.keys, self.key_scale, self.key_low), (self.values, self.value_scale, self.value_low)
        return PackedBlock(*keys, *values, tokens)

    def tensors(self) -> Iterator[Tensor]:
        """What is held."""
        yield from (self.keys, self.key_scale, self.key_low, self.values, self.value_scale, self.value_low)

    def over_batch_(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace what is held by ``change`` of it."""
        self.keys, self.key_scale, self.key_low = change(self.keys), change(self.key_scale), change(self.key_low)
        self.values = change(self.values)
        self.value_scale, self.value_low = change(self.value_scale), change(self.value_low)


class BlockChunk(ReadableChunk):
    """The first ``tokens`` tokens of a block."""

    def __init__(self, block: Block, tokens: int) -> None:
        self.block = block
        self.tokens = tokens

    def read_keys(self) -> Tensor:
        """Its keys, float32 (B, K, tokens, D)."""
        return self.block.read_keys(0, self.tokens).transpose(-1, -2)

    def read_values(self) -> Tensor:
        """Its values, float32 (B, K, tokens, D)."""
        return self.block.read_values(0, self.tokens)

    @classmethod
    def attend_run(cls, chunks: Sequence[Self], query: Tensor, softcap: float | None) -> Attended | None:
        """See ``Chunk.attend_run``: few queries read blocks as they are packed, where that is compiled."""
        layout = chunks[0].block.layout
        blocks = [chunk.block.first(chunk.tokens) for chunk in chunks]
        if not attend_serves(query, blocks):
            return super().attend_run(chunks, query, softcap)
        groups = {"key_group": layout.key_group, "value_group": layout.value_group}
        return attend_packed(query, blocks, bits=layout.bits, softcap=softcap, **groups)
