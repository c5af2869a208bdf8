"""Attention of a few queries to packed keys and values, block by block, without making any block dense.

Shapes: B batch, K key-value heads, M queries of a key-value head, T tokens that a block has room for, D and E head dims
of keys and values. Queries are float32 (B, K, M, D), scaled already. Nothing is masked.

Blocks are packed in one of two ways. ``PackedBlock``: integers, with a scale and a least number for each group of
tokens in a channel of the keys, and for each group of channels in a token of the values. ``Float8Block``: numbers in
the format E4M3, with a scale for each token of a head, or for a head.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pintpot.kernels import gpu, native
from pintpot.kernels.packing import restore

FEW_QUERIES = 16
"""Up to so many queries of a key-value head the compiled kernels are for; each block is read once for every four."""


class Attended(NamedTuple):
    """Softmax-weighted values of some tokens, to be put together with those of others.

    Attributes:
        out: the weighted sum of values, relative to ``top``: float32 (B, K, M, E).
        top: the greatest score, (B, K, M, 1).
        norm: the sum of the exponentials of all scores, relative to ``top``, (B, K, M, 1).
    """

    out: Tensor
    top: Tensor
    norm: Tensor

    def joined(self, other: Attended) -> Attended:
        """That of both sets of tokens."""
        top = torch.maximum(self.top, other.top)
        own, theirs = (self.top - top).exp(), (other.top - top).exp()
        return Attended(self.out * own + other.out * theirs, top, self.norm * own + other.norm * theirs)


class PackedBlock(NamedTuple):
    """Integers in groups: of G tokens in each channel of the keys, and of G' channels in each token of the values.

    Attributes:
        keys: uint8 (B, K, D, T / G, packed_size(G, bits)).
        key_scale: float (B, K, D, T / G).
        key_low: as ``key_scale``.
        values: uint8 (B, K, T, packed_size(E, bits)).
        value_scale: of the dtype of ``key_scale``, (B, K, T, E / G').
        value_low: as ``value_scale``.
        tokens: how many of the T are there.
    """

    keys: Tensor
    key_scale: Tensor
    key_low: Tensor
    values: Tensor
    value_scale: Tensor
    value_low: Tensor
    tokens: int


class Float8Block(NamedTuple):
    """Numbers in E4M3 (1 sign bit, 4 of exponent, 3 of mantissa), as bytes.

    Attributes:
        keys: uint8 (B, K, T, D).
        key_scale: float (B, K, T, 1), or (B, K, 1, 1) for all tokens of a head.
        values: uint8 (B, K, T, E).
        value_scale: of the dtype and shape of ``key_scale``.
        tokens: how many of the T are there.
    """

    keys: Tensor
    key_scale: Tensor
    values: Tensor
    value_scale: Tensor
    tokens: int


def reads_packed(queries: int) -> bool:
    """Whether so many queries of a key-value head read blocks as they are packed on this machine's processor."""
    return queries <= FEW_QUERIES and native.built()


def attend_serves(query: Tensor, blocks: Sequence[PackedBlock | Float8Block]) -> bool:
    """Whether there is a kernel for these queries and blocks: on the CPU, or for integers on a GPU."""
    if query.dtype != torch.float32 or blocks[0].key_scale.dtype not in native.DTYPES:
        return False
    given = query.contiguous(), *_listed(blocks)[0]
    on_gpu = isinstance(blocks[0], PackedBlock) and gpu.serves(*given)
    return 0 < query.shape[2] <= FEW_QUERIES and (on_gpu or native.serves(*given))


def attend_packed(
    query: Tensor,
    blocks: Sequence[PackedBlock],
    *,
    bits: int,
    key_group: int,
    value_group: int,
    softcap: float | None = None,
) -> Attended:
    """Attention to blocks of integers in groups.

    Args:
        query: float32 (B, K, M, D), scaled.
        blocks: one at least, packed alike; they may have room for different numbers of tokens.
        bits: width of a code, 1 to 8.
        key_group: tokens that share a scale, G.
        value_group: channels that share a scale, G'; divides E.
        softcap: scores go through ``softcap * tanh(scores / softcap)``.

    Raises:
        ShapeError: when the sizes do not belong together.
    """
    sizes = bits, key_group, value_group
    if not attend_serves(query, blocks):
        return attend_packed_definition(query, blocks, *sizes, softcap)
    run = torch.ops.pintpot.attend_packed
    return Attended(*run(query.contiguous(), *_listed(blocks), *sizes, softcap or 0.0))


def attend_fp8(query: Tensor, blocks: Sequence[Float8Block], *, softcap: float | None = None) -> Attended:
    """Attention to blocks of numbers in E4M3.

    Args:
        query: float32 (B, K, M, D), scaled.
        blocks: one at least, packed alike; they may have room for different numbers of tokens.
        softcap: scores go through ``softcap * tanh(scores / softcap)``.

    Raises:
        ShapeError: when the sizes do not belong together.
    """
    if not attend_serves(query, blocks):
        return attend_fp8_definition(query, blocks, softcap)
    return Attended(*torch.ops.pintpot.attend_fp8(query.contiguous(), *_listed(blocks), softcap or 0.0))


def _listed(blocks: Sequence[PackedBlock | Float8Block]) -> tuple[list[Tensor], list[int]]:
    return [held for block in blocks for held in block[:-1]], [block.tokens for block in blocks]


def attend_packed_definition(
    query: Tensor,
    blocks: Sequence[PackedBlock],
    bits: int,
    key_group: int,
    value_group: int,
    softcap: float | None = None,
) -> Attended:
    """What ``attend_packed`` does, in plain torch."""
    parts = []
    for block in blocks:
        scale, low = block.key_scale[..., None], block.key_low[..., None]
        groups = restore(block.keys, scale, low, bits=bits, group_size=key_group, count=key_group)
        count = block.value_scale.shape[-1] * value_group
        scale, low = block.value_scale, block.value_low
        values = restore(block.values, scale, low, bits=bits, group_size=value_group, count=count)
        scores = query @ groups.flatten(-2)[..., : block.tokens]
        parts.append(_attended(scores, values[:, :, : block.tokens], softcap))
    return functools.reduce(Attended.joined, parts)


def attend_fp8_definition(query: Tensor, blocks: Sequence[Float8Block], softcap: float | None = None) -> Attended:
    """What ``attend_fp8`` does, in plain torch."""
    parts = []
    for block in blocks:
        keys, values = (
            (codes.view(torch.float8_e4m3fn).float() * scale.float())[:, :, : block.tokens]
            for codes, scale in ((block.keys, block.key_scale), (block.values, block.value_scale))
        )
        parts.append(_attended(query @ keys.transpose(-1, -2), values, softcap))
    return functools.reduce(Attended.joined, parts)


def _attended(scores: Tensor, values: Tensor, softcap: float | None) -> Attended:
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    top = scores.amax(dim=-1, keepdim=True)
    weights = (scores - top).exp()
    return Attended(weights @ values, top, weights.sum(dim=-1, keepdim=True))
