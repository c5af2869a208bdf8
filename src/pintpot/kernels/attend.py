"""Attention of a few queries to packed keys and values, block by block, without making any block dense.

Shapes: B batch, K key-value heads, M queries of a key-value head, T tokens that a block has room for, D and E head dims
of keys and values. Queries are float32 (B, K, M, D), scaled already. Nothing is masked.

Blocks are packed in one of three ways. ``PackedBlock``: integers, with a scale and a least number for each group of
tokens in a channel of the keys, and for each group of channels in a token of the values. ``Float8Block``: numbers in
the format E4M3, with a scale for each token of a head, or for a head. ``RotatedBlock``: integers in groups of channels,
after keys were mixed over all heads, and values over their own.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pintpot.kernels import gpu, native
from pintpot.kernels.hadamard import hadamard
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


class RotatedBlock(NamedTuple):
    """Integers in groups of channels: of N = K * D channels in a token's keys, and of E in each of its values.

    Attributes:
        keys: uint8 (B, 1, T, packed_size(N, bits)).
        key_scale: float (B, 1, T, N / G).
        key_low: as ``key_scale``.
        values: uint8 (B, K, T, packed_size(E, bits)).
        value_scale: of the dtype of ``key_scale``, (B, K, T, E / G').
        value_low: as ``value_scale``.
        positions: int32 (B, 1, T, 1); None where a token's number in the store is its position.
        tokens: how many of the T are there.
    """

    keys: Tensor
    key_scale: Tensor
    key_low: Tensor
    values: Tensor
    value_scale: Tensor
    value_low: Tensor
    positions: Tensor | None
    tokens: int


class RotatedLayout(NamedTuple):
    """How the tokens of rotated blocks were packed.

    A token's keys, before they were turned by its position, were joined (head after head, N channels), transformed
    (``hadamard``) and put into another order; each of its values was transformed.

    Attributes:
        bits: width of a code, 1 to 8.
        key_group: channels of keys that share a scale, G; divides N.
        value_group: channels of values that share a scale, G'; divides E.
        key_block: channels of keys that are mixed by the transform.
        value_block: likewise of values.
        order: int32 (B or 1, N), which channel is at each place.
        frequencies: float32 (R,), radians a token: channels i and i + R of a head are turned together; None where keys
            are not turned.
        scaling: of what is turned.
    """

    bits: int
    key_group: int
    value_group: int
    key_block: int
    value_block: int
    order: Tensor
    frequencies: Tensor | None = None
    scaling: float = 1.0


AnyBlock = PackedBlock | Float8Block | RotatedBlock


def reads_packed(queries: int) -> bool:
    """Whether so many queries of a key-value head read blocks as they are packed on this machine's processor."""
    return queries <= FEW_QUERIES and native.built()


def attend_serves(query: Tensor, blocks: Sequence[AnyBlock]) -> bool:
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


def attend_rotated(
    query: Tensor,
    blocks: Sequence[RotatedBlock],
    layout: RotatedLayout,
    *,
    first: int = 0,
    skipped: Tensor | None = None,
    softcap: float | None = None,
) -> Attended:
    """Attention to rotated blocks. The sum of values is transformed back once, and no value by itself.

    Args:
        query: float32 (B, K, M, D), scaled.
        blocks: one at least, packed alike; they may have room for different numbers of tokens.
        layout: how they are packed.
        first: number in the store of the first token; the others follow.
        skipped: int32 (B, n), numbers in the store of tokens that are left out of each sequence (they get the least of
            all scores). Those of tokens that are not in these blocks mean nothing.
        softcap: scores go through ``softcap * tanh(scores / softcap)``.

    Raises:
        ShapeError: when the sizes do not belong together.
    """
    if not attend_serves(query, blocks) or not native.serves(layout.order, layout.frequencies, skipped):
        return attend_rotated_definition(query, blocks, layout, first, skipped, softcap)
    tensors = layout.order, layout.frequencies, skipped
    sizes = [layout.bits, layout.key_group, layout.value_group, layout.key_block, first]
    run = torch.ops.pintpot.attend_rotated
    out, top, norm = run(query.contiguous(), *_listed(blocks), *tensors, sizes, layout.scaling, softcap or 0.0)
    return Attended(hadamard(out, layout.value_block), top, norm)


def _listed(blocks: Sequence[AnyBlock]) -> tuple[list[Tensor], list[int]]:
    held = [stored for block in blocks for stored in block[:-1] if isinstance(stored, Tensor)]
    return held, [block.tokens for block in blocks]


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
        parts.append(attended(capped(scores, softcap), values[:, :, : block.tokens]))
    return functools.reduce(Attended.joined, parts)


def attend_fp8_definition(query: Tensor, blocks: Sequence[Float8Block], softcap: float | None = None) -> Attended:
    """What ``attend_fp8`` does, in plain torch."""
    parts = []
    for block in blocks:
        keys, values = (
            (codes.view(torch.float8_e4m3fn).float() * scale.float())[:, :, : block.tokens]
            for codes, scale in ((block.keys, block.key_scale), (block.values, block.value_scale))
        )
        parts.append(attended(capped(query @ keys.transpose(-1, -2), softcap), values))
    return functools.reduce(Attended.joined, parts)


def attend_rotated_definition(
    query: Tensor,
    blocks: Sequence[RotatedBlock],
    layout: RotatedLayout,
    first: int = 0,
    skipped: Tensor | None = None,
    softcap: float | None = None,
) -> Attended:
    """What ``attend_rotated`` does, in plain torch."""
    parts, back = [], layout.order.long().argsort(dim=-1)[:, None, None]
    for block in blocks:
        sizes = {"bits": layout.bits, "group_size": layout.key_group, "count": layout.order.shape[-1]}
        ordered = restore(block.keys, block.key_scale, block.key_low, **sizes)
        joint = hadamard(ordered.gather(-1, back.expand_as(ordered)), layout.key_block).squeeze(1)
        keys = joint.unflatten(-1, (query.shape[1], -1)).transpose(1, 2)
        numbers = torch.arange(first, first + keys.shape[2], device=keys.device)
        if layout.frequencies is not None:
            at = numbers[None, None] if block.positions is None else block.positions.squeeze(-1)
            keys = _turned(keys, at[..., None].float() * layout.frequencies, layout.scaling)
        count = block.value_scale.shape[-1] * layout.value_group
        sizes |= {"group_size": layout.value_group, "count": count}
        values = hadamard(restore(block.values, block.value_scale, block.value_low, **sizes), layout.value_block)
        scores = capped(query @ keys.transpose(-1, -2), softcap)
        if skipped is not None:
            without = (skipped[..., None] == numbers).any(dim=1)
            scores = scores.masked_fill(without[:, None, None], torch.finfo(scores.dtype).min)
        parts.append(attended(scores[..., : block.tokens], values[:, :, : block.tokens]))
        first += block.tokens
    return functools.reduce(Attended.joined, parts)


def _turned(keys: Tensor, angles: Tensor, scaling: float) -> Tensor:
    """Keys (B, K, T, D) turned by angles (B or 1, 1, T, R)."""
    count = angles.shape[-1]
    first, second, rest = keys.split([count, count, keys.shape[-1] - 2 * count], dim=-1)
    cos, sin = angles.cos() * scaling, angles.sin() * scaling
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def capped(scores: Tensor, softcap: float | None) -> Tensor:
    """Scores that do not go beyond a cap."""
    return softcap * (scores / softcap).tanh() if softcap else scores


def attended(scores: Tensor, values: Tensor) -> Attended:
    """The weighted sum of values (B, K, T, E) by their scores (B, K, M, T)."""
    top = scores.amax(dim=-1, keepdim=True)
    weights = (scores - top).exp()
    return Attended(weights @ values, top, weights.sum(dim=-1, keepdim=True))
