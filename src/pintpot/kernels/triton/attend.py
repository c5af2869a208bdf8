"""Attention of a few queries to packed blocks on a GPU: codes become numbers in registers, a tile of tokens at a time.

A program takes one head of one sequence and some of its blocks, with an online softmax; a second kernel puts the
programs' results together in a fixed order. So results depend on the shapes alone.

Shapes: B batch, K key-value heads, M queries of a key-value head, T tokens that a block has room for, D and E head dims
of keys and values, G and G' tokens and channels of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pintpot.kernels.layout import packed_size
from pintpot.kernels.ops_attend import packed_shape
from pintpot.kernels.triton.codes import codes_at, codes_of_groups, repeated
from pintpot.kernels.triton.grid import PROGRAMS, float32_precision

OPTIONS = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
"""How the kernel is compiled."""


@dataclass(frozen=True)
class _Packing:
    """What a kernel is compiled for.

    Attributes:
        bits: width of a code.
        key_dim: D.
        value_dim: E.
        key_group: G.
        value_group: G'.
        queries: M, rounded up to what a matrix unit takes.
        softcap: of the scores; 0 for none.
        precision: of float32 products.
    """

    bits: int
    key_dim: int
    value_dim: int
    key_group: int
    value_group: int
    queries: int
    softcap: float
    precision: str

    @property
    def key_bytes(self) -> int:
        """Bytes of a group of tokens in a channel of the keys."""
        return packed_size(self.key_group, self.bits)

    @property
    def value_bytes(self) -> int:
        """Bytes of a token of the values."""
        return packed_size(self.value_dim, self.bits)

    @property
    def key_width(self) -> int:
        """Channels of a tile of keys."""
        return max(16, triton.next_power_of_2(self.key_dim))

    @property
    def value_width(self) -> int:
        """Channels of a tile of values."""
        return max(16, triton.next_power_of_2(self.value_dim))

    @property
    def tokens(self) -> int:
        """Tokens of a tile: with more, numbers would not stay in registers."""
        return 64 if self.key_group == 64 else 32

    @property
    def whole_groups(self) -> bool:
        """Whether a tile of keys is whole groups whose fields are whole bytes."""
        return self._even(self.key_group) and self.key_group <= self.tokens

    @property
    def whole_values(self) -> bool:
        """Whether a token's values, and their groups, are powers of 2, and their fields whole bytes."""
        return self._even(self.value_dim) and self.value_dim >= 16 and _is_power_of_2(self.value_group)

    def _even(self, count: int) -> bool:
        return _is_power_of_2(count) and count * (self.bits & -self.bits) % 8 == 0


def _is_power_of_2(count: int) -> bool:
    return count & (count - 1) == 0


@triton.jit
def _number(table, index, kind: tl.constexpr):
    """Where a tensor begins, from the table."""
    return tl.load(table + index).to(tl.pointer_type(kind))


@triton.jit
def _keys(entry, head, start, seen, SCALE: tl.constexpr, PACKING: tl.constexpr):
    """Keys of a tile of tokens: float32 (channels, tokens)."""
    room = tl.load(entry + 7)
    groups_of_block = room // PACKING.key_group
    channels = tl.arange(0, PACKING.key_width).to(tl.int64)[:, None]
    wanted = channels < PACKING.key_dim
    rows = (head * PACKING.key_dim + channels) * groups_of_block
    packed, scale, low = _number(entry, 0, tl.uint8), _number(entry, 1, SCALE), _number(entry, 2, SCALE)
    if PACKING.whole_groups:
        COUNT: tl.constexpr = seen.shape[1] // PACKING.key_group
        groups = start // PACKING.key_group + tl.arange(0, COUNT)
        held = wanted & (groups < groups_of_block)[None, :]
        codes = codes_of_groups(
            packed + rows * PACKING.key_bytes, groups, held, PACKING.key_bytes, PACKING.key_group, PACKING.bits
        )
        places = rows + groups[None, :]
        scales = repeated(tl.load(scale + places, mask=held, other=0).to(tl.float32), PACKING.key_group)
        lows = repeated(tl.load(low + places, mask=held, other=0).to(tl.float32), PACKING.key_group)
    else:
        tokens = (start + tl.arange(0, seen.shape[1]))[None, :]
        held = wanted & seen
        places = rows + tokens // PACKING.key_group
        inside = tokens % PACKING.key_group
        codes = codes_at(packed + places * PACKING.key_bytes, inside, held, PACKING.key_group, PACKING.bits)
        scales = tl.load(scale + places, mask=held, other=0).to(tl.float32)
        lows = tl.load(low + places, mask=held, other=0).to(tl.float32)
    return codes.to(tl.float32) * scales + lows


@triton.jit
def _values(entry, head, start, seen, SCALE: tl.constexpr, PACKING: tl.constexpr):
    """Values of a tile of tokens: float32 (tokens, channels); zeros for tokens that are not there."""
    room = tl.load(entry + 7)
    GROUPS: tl.constexpr = PACKING.value_dim // PACKING.value_group
    tokens = (head * room + start + tl.arange(0, seen.shape[1]))[:, None]
    there = tl.trans(seen)
    packed, scale, low = _number(entry, 3, tl.uint8), _number(entry, 4, SCALE), _number(entry, 5, SCALE)
    rows = packed + tokens * PACKING.value_bytes
    if PACKING.whole_values:
        codes = codes_of_groups(rows, tl.arange(0, 1), there, PACKING.value_bytes, PACKING.value_dim, PACKING.bits)
        places = tokens * GROUPS + tl.arange(0, GROUPS)[None, :]
        scales = repeated(tl.load(scale + places, mask=there, other=0).to(tl.float32), PACKING.value_group)
        lows = repeated(tl.load(low + places, mask=there, other=0).to(tl.float32), PACKING.value_group)
    else:
        channels = tl.arange(0, PACKING.value_width)[None, :]
        held = there & (channels < PACKING.value_dim)
        codes = codes_at(rows, channels, held, PACKING.value_dim, PACKING.bits)
        places = tokens * GROUPS + channels // PACKING.value_group
        scales = tl.load(scale + places, mask=held, other=0).to(tl.float32)
        lows = tl.load(low + places, mask=held, other=0).to(tl.float32)
    return codes.to(tl.float32) * scales + lows


@triton.jit
def _attend(query, like_scale, table, out, top, norm, queries, blocks, blocks_a_part, PACKING: tl.constexpr):
    """Attention of one head's queries to some of the blocks; see the top of the file.

    Args:
        query: (B * K, M, D).
        like_scale: anything of the dtype of the scales.
        table: int64 (blocks, 8), see ``_table``.
        out: (B * K, parts, M, E); weighted sums, relative to ``top``.
        top: (B * K, parts, M).
        norm: as ``top``.
        queries: M.
        blocks: how many.
        blocks_a_part: how many of them a program takes.
        PACKING: the layout.
    """
    head, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rows = tl.arange(0, PACKING.queries)[:, None]
    channels = tl.arange(0, PACKING.key_width)[None, :]
    asked = (rows < queries) & (channels < PACKING.key_dim)
    asking = tl.load(query + (head * queries + rows) * PACKING.key_dim + channels, mask=asked, other=0)
    best = tl.full((PACKING.queries, 1), float("-inf"), dtype=tl.float32)
    total = tl.zeros((PACKING.queries, 1), dtype=tl.float32)
    sums = tl.zeros((PACKING.queries, PACKING.value_width), dtype=tl.float32)
    for block in range(part * blocks_a_part, tl.minimum(part * blocks_a_part + blocks_a_part, blocks)):
        entry = table + block * 8
        tokens = tl.load(entry + 6)
        for start in range(0, tokens, PACKING.tokens):
            seen = (start + tl.arange(0, PACKING.tokens) < tokens)[None, :]
            keys = _keys(entry, head, start, seen, like_scale.dtype.element_ty, PACKING)
            scores = tl.dot(asking, keys, input_precision=PACKING.precision)
            if PACKING.softcap > 0:
                # The hyperbolic tangent, by the sigmoid.
                scores = PACKING.softcap * (2 * tl.sigmoid(scores * (2 / PACKING.softcap)) - 1)
            scores = tl.where(seen, scores, float("-inf"))
            higher = tl.maximum(best, tl.max(scores, axis=1, keep_dims=True))
            weights = tl.exp(scores - higher)
            shrink = tl.exp(best - higher)
            values = _values(entry, head, start, seen, like_scale.dtype.element_ty, PACKING)
            sums = tl.dot(weights, values, sums * shrink, input_precision=PACKING.precision)
            total = total * shrink + tl.sum(weights, axis=1, keep_dims=True)
            best = higher
    place = (head * tl.num_programs(1) + part) * queries + rows
    channels = tl.arange(0, PACKING.value_width)[None, :]
    wanted = rows < queries
    tl.store(out + place * PACKING.value_dim + channels, sums, mask=wanted & (channels < PACKING.value_dim))
    tl.store(top + place, best, mask=wanted)
    tl.store(norm + place, total, mask=wanted)


@triton.jit
def _join(outs, tops, norms, out, top, norm, queries, PARTS: tl.constexpr, PACKING: tl.constexpr):
    """The parts of one query put together, in order; shapes as in ``_attend``, those on the right without parts."""
    head, row = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channels = tl.arange(0, PACKING.value_width)
    wanted = channels < PACKING.value_dim
    first = head * PARTS * queries + row
    best = tl.load(tops + first)
    for part in range(1, PARTS):
        best = tl.maximum(best, tl.load(tops + first + part * queries))
    total = tl.zeros((), dtype=tl.float32)
    sums = tl.zeros((PACKING.value_width,), dtype=tl.float32)
    for part in range(PARTS):
        place = first + part * queries
        shrink = tl.exp(tl.load(tops + place) - best)
        total += tl.load(norms + place) * shrink
        sums += tl.load(outs + place * PACKING.value_dim + channels, mask=wanted, other=0) * shrink
    place = head * queries + row
    tl.store(out + place * PACKING.value_dim + channels, sums, mask=wanted)
    tl.store(top + place, best)
    tl.store(norm + place, total)


def attend_packed(
    query: Tensor,
    stored: Sequence[Tensor],
    tokens: Sequence[int],
    bits: int,
    key_group: int,
    value_group: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """What ``torch.ops.pintpot.attend_packed`` does, on a GPU.

    Products are as exact as ``torch.set_float32_matmul_precision`` asks for.

    Args:
        query: float32 (B, K, M, D), scaled, contiguous like the others.
        stored: of each block keys uint8 (B, K, D, T / G, packed_size(G, bits)), their scales and least numbers
            (B, K, D, T / G), values uint8 (B, K, T, packed_size(E, bits)), their scales and least numbers
            (B, K, T, E / G').
        tokens: how many of each block are there, 1 to T.
        bits: width of a code, 1 to 8.
        key_group: tokens that share a scale, G.
        value_group: channels that share a scale, G'.
        softcap: scores go through ``softcap * tanh(scores / softcap)``, where it is not 0.

    Returns:
        Weighted sums of values (B, K, M, E), relative to the greatest score (B, K, M, 1), and sums of exponentials
        (B, K, M, 1), relative to it too; float32.

    Raises:
        ShapeError: when the sizes do not belong together.
    """
    found = packed_shape(query, stored, tokens, bits, key_group, value_group, softcap)
    batch, heads, queries, key_dim = query.shape
    packing = _Packing(
        bits=bits,
        key_dim=key_dim,
        value_dim=found[0].shape[-1],
        key_group=key_group,
        value_group=value_group,
        queries=max(16, triton.next_power_of_2(queries)),
        softcap=softcap,
        precision=float32_precision(),
    )
    table = _table(stored, tokens, query.device)
    blocks_a_part = triton.cdiv(len(tokens), max(1, min(len(tokens), PROGRAMS // (batch * heads))))
    parts = triton.cdiv(len(tokens), blocks_a_part)
    held = found if parts == 1 else tuple(t.new_empty((batch, heads, parts, *t.shape[2:])) for t in found)
    sizes = queries, len(tokens), blocks_a_part
    _attend[(batch * heads, parts)](query, stored[1], table, *held, *sizes, PACKING=packing, **OPTIONS)
    if parts > 1:
        _join[(batch * heads, queries)](*held, *found, queries, PARTS=parts, PACKING=packing)
    return found


def _table(stored: Sequence[Tensor], tokens: Sequence[int], device: torch.device) -> Tensor:
    """For each block the addresses of its six tensors, its tokens, and the tokens that it has room for."""
    rows = []
    for index, count in enumerate(tokens):
        own = stored[6 * index : 6 * index + 6]
        rows.append([*(tensor.data_ptr() for tensor in own), count, own[3].shape[2]])
    return torch.tensor(rows, dtype=torch.int64).to(device, non_blocking=True)
