"""Products with grids in tiles on a GPU (``pintpot.kernels.tiles`` has the layout).

Codes of one place in the registers of all threads are taken together: a whole tensor is shifted and masked by the same
number of bits, whatever the width. The order of the in-features in a product is that of the threads, for the weight and
the input alike.

Shapes: R rows of input, O out-features, I in-features.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from pintpot.kernels.layout import packed_size
from pintpot.kernels.tiles import STEP, THREADS, TILE, check_tiles
from pintpot.kernels.triton.codes import codes_at
from pintpot.kernels.triton.grid import add_parts, float32_precision, split

OPTIONS = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
"""How the kernel is compiled."""

ACROSS = 8
"""Tiles of out-features that a program takes."""

DOWN = STEP // TILE
"""Tiles of in-features that it takes in a step: as few as a product with a matrix unit needs."""


@dataclass(frozen=True)
class _Tiling:
    """What a kernel is compiled for.

    Attributes:
        bits: width of a code.
        columns: in-features.
        out_features: of the weight.
        group: in-features that share a scale.
        symmetric: whether there are no zeros stored.
        rows: input rows of a program: 1, or what a matrix unit takes.
        down: tiles of in-features of a step.
        precision: of float32 products.
    """

    bits: int
    columns: int
    out_features: int
    group: int
    symmetric: bool
    rows: int
    down: int
    precision: str

    @property
    def tile_bytes(self) -> int:
        """Bytes of a tile."""
        return THREADS * self.bits

    @property
    def tiles_down(self) -> int:
        """Tiles along the in-features."""
        return -(-self.columns // TILE)

    @property
    def tiles_across(self) -> int:
        """Tiles along the out-features."""
        return -(-self.out_features // TILE)

    @property
    def groups(self) -> int:
        """Groups of a row."""
        return -(-self.columns // self.group)

    @property
    def zero_bytes(self) -> int:
        """Bytes of a row of zeros."""
        return packed_size(self.groups, self.bits)

    @property
    def steps(self) -> int:
        """Steps in which the in-features are taken."""
        return -(-self.tiles_down // self.down)


@triton.jit
def _codes(first, seen, INDEX: tl.constexpr, TILING: tl.constexpr):
    """The code of one place in each thread's registers, int32.

    Args:
        first: pointers to each thread's first byte.
        seen: where there is something to read; elsewhere codes are 0.
        INDEX: the place, 0 to 7.
        TILING: the layout.
    """
    BYTE: tl.constexpr = INDEX * TILING.bits // 8
    SHIFT: tl.constexpr = INDEX * TILING.bits % 8
    code = tl.load(first + BYTE * 32, mask=seen, other=0).to(tl.int32) >> SHIFT
    if SHIFT + TILING.bits > 8:
        code = code | (tl.load(first + BYTE * 32 + 32, mask=seen, other=0).to(tl.int32) << (8 - SHIFT))
    return code & ((1 << TILING.bits) - 1)


@triton.jit
def _added(sums, taken, numbers, TILING: tl.constexpr):
    """``sums`` with the products of inputs (rows, in-features) and numbers (out-features, in-features)."""
    if TILING.rows == 1:
        sums += numbers * taken.to(tl.float32)
    else:
        sums = tl.dot(taken, tl.trans(numbers.to(taken.dtype)), sums, input_precision=TILING.precision)
    return sums


@triton.jit
def _scales(scale, zero, features, group, TILING: tl.constexpr):
    """Scales and zeros of one group: (out-features, 1) each."""
    wanted = features < TILING.out_features
    scales = tl.load(scale + features * TILING.groups + group, mask=wanted, other=0).to(tl.float32)
    if TILING.symmetric:
        zeros = tl.full(features.shape, 1 << (TILING.bits - 1), dtype=tl.int32)
    else:
        places = tl.zeros_like(features).to(tl.int32) + group
        zeros = codes_at(zero + features * TILING.zero_bytes, places, wanted, TILING.groups, TILING.bits)
    return scales, zeros


@triton.jit
def _scaled(sums, scales, TILING: tl.constexpr):
    """Sums times the scales of their out-features, which lie along the first or the second dimension."""
    return sums * scales if TILING.rows == 1 else sums * tl.trans(scales)


@triton.jit
def _store(out, sums, inputs, features, rows, TILING: tl.constexpr):
    """Write the sums of a program."""
    if TILING.rows == 1:
        tl.store(out + features, tl.sum(sums, axis=1, keep_dims=True), mask=features < TILING.out_features)
    else:
        places = out + inputs * TILING.out_features + tl.trans(features)
        tl.store(places, sums, mask=(inputs < rows) & (tl.trans(features) < TILING.out_features))


@triton.jit
def _product(x, tiles, scale, zero, out, rows, steps, TILES: tl.constexpr, TILING: tl.constexpr):
    """A tile of a product: some rows of input, ``TILES`` tiles of out-features, ``steps`` steps of in-features.

    Args:
        x: (R, I).
        tiles: uint8 (tiles down, tiles across, bytes).
        scale: (O, N).
        zero: uint8 (O, bytes); not read of a symmetric grid.
        out: (parts, R, O).
        rows: R.
        steps: that a part has.
        TILES: of out-features.
        TILING: the layout.
    """
    inputs = (tl.program_id(1) * TILING.rows + tl.arange(0, TILING.rows)).to(tl.int64)[:, None]
    part = tl.program_id(2)
    # Threads by their rows of out-features, and by their places along the in-features.
    lines = tl.arange(0, TILES * 8)[:, None]
    across = tl.program_id(0) * TILES + lines // 8
    features = (across * 16 + lines % 8).to(tl.int64)
    places = tl.arange(0, TILING.down * 4)[None, :]
    first = tiles + across.to(tl.int64) * TILING.tile_bytes + lines % 8 * 4 + places % 4
    HEIGHT: tl.constexpr = TILES * 8 if TILING.rows == 1 else TILING.rows
    WIDTH: tl.constexpr = TILING.down * 4 if TILING.rows == 1 else TILES * 8
    sums = tl.zeros((HEIGHT, WIDTH), dtype=tl.float32)
    sums_below = tl.zeros((HEIGHT, WIDTH), dtype=tl.float32)
    for step in range(part * steps, tl.minimum(part * steps + steps, TILING.steps)):
        down = step * TILING.down + places // 4
        seen = (down < TILING.tiles_down) & (across < TILING.tiles_across)
        threads = first + down.to(tl.int64) * (TILING.tiles_across * TILING.tile_bytes)
        group = step * TILING.down * 16 // TILING.group
        scales, zeros = _scales(scale, zero, features, group, TILING)
        scales_below, zeros_below = _scales(scale, zero, features + 8, group, TILING)
        own = tl.zeros((HEIGHT, WIDTH), dtype=tl.float32)
        below = tl.zeros((HEIGHT, WIDTH), dtype=tl.float32)
        for INDEX in tl.static_range(4):
            columns = down * 16 + INDEX // 2 * 8 + places % 4 * 2 + INDEX % 2
            there = (inputs < rows) & (columns < TILING.columns)
            taken = tl.load(x + inputs * TILING.columns + columns, mask=there, other=0)
            own = _added(own, taken, (_codes(threads, seen, INDEX, TILING) - zeros).to(tl.float32), TILING)
            numbers = (_codes(threads, seen, INDEX + 4, TILING) - zeros_below).to(tl.float32)
            below = _added(below, taken, numbers, TILING)
        sums += _scaled(own, scales, TILING)
        sums_below += _scaled(below, scales_below, TILING)
    out += part.to(tl.int64) * rows * TILING.out_features
    _store(out, sums, inputs, features, rows, TILING)
    _store(out, sums_below, inputs, features + 8, rows, TILING)


def matmul(input: Tensor, tiles: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int) -> Tensor:
    """What ``torch.ops.pintpot.tiles_matmul`` does, on a GPU; sums are in float32 and results depend on shapes alone.

    Args:
        input: (R, I) float32, bfloat16 or float16, contiguous like the others.
        tiles: uint8, see ``pintpot.kernels.tiles``.
        scale: float (O, N).
        zero: uint8 (O, packed_size(N, bits)), or None for a symmetric grid.
        bits: width of a code, 1 to 8.
        group_size: in-features that share a scale: a multiple of 64, or all.

    Returns:
        (R, O) in the dtype of ``input``.

    Raises:
        ShapeError: when the sizes do not belong together.
    """
    rows, columns, out_features = input.shape[:-1].numel(), input.shape[-1], scale.shape[0]
    check_tiles(tiles, scale, bits, columns)
    out = input.new_empty((*input.shape[:-1], out_features))
    if not out.numel():
        return out
    tiling = _Tiling(
        bits=bits,
        columns=columns,
        out_features=out_features,
        group=group_size,
        symmetric=zero is None,
        rows=1 if rows == 1 else max(16, min(32, triton.next_power_of_2(rows))),
        down=DOWN,
        precision=float32_precision(),
    )
    programs = triton.cdiv(tiling.tiles_across, ACROSS), triton.cdiv(rows, tiling.rows)
    parts, steps, sums = split(tiling.steps, programs, out)
    tensors = input, tiles, scale, tiles if zero is None else zero
    _product[(*programs, parts)](*tensors, sums, rows, steps, TILES=ACROSS, TILING=tiling, **OPTIONS)
    return add_parts(sums, out)
