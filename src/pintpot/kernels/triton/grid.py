"""Products with packed grids on a GPU: codes become numbers in registers, and nothing dense is written.

A program multiplies a tile of input rows by a tile of out-features over a part of the in-features, and writes its sums
in float32; where there are several parts, a second kernel adds them in a fixed order. So results depend on the shapes
alone, never on which program is done first.

Shapes: as in ``pintpot.kernels.grid``; R rows of input.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pintpot.kernels.layout import field_bytes, packed_size
from pintpot.kernels.ops_grid import check_grid
from pintpot.kernels.triton.codes import codes_at, codes_of_plane

PROGRAMS = 512
"""About so many programs are wanted: a few for each multiprocessor of the GPUs of today."""

OUT_FEATURES = 64
"""Out-features of a tile."""

MOST_OFFSETS = 64
"""Most bytes of a plane that are read at once."""


@dataclass(frozen=True)
class _Tiling:
    """What a kernel is compiled for.

    Attributes:
        bits: width of a code.
        columns: in-features.
        group: in-features that share a scale.
        symmetric: whether there are no zeros stored.
        nested: whether every field of a row is a whole number of bytes (see ``codes_of_plane``).
        plane: columns of a plane of the narrowest field.
        planes: of the narrowest field.
        rows: input rows of a tile: 1, or what a matrix unit takes.
        offsets: columns of a plane that are taken at once.
        one_group: whether these always lie in one group.
        precision: of float32 products.
    """

    bits: int
    columns: int
    group: int
    symmetric: bool
    nested: bool
    plane: int
    planes: int
    rows: int
    offsets: int
    one_group: bool
    precision: str

    @property
    def groups(self) -> int:
        """Groups of a row."""
        return -(-self.columns // self.group)

    @property
    def blocks(self) -> int:
        """Steps in which a plane is taken."""
        return -(-self.plane // self.offsets)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of codes."""
        return packed_size(self.columns, self.bits)

    @property
    def zero_bytes(self) -> int:
        """Bytes of a row of zeros."""
        return packed_size(self.groups, self.bits)

    @classmethod
    def of(cls, rows: int, columns: int, bits: int, group: int, symmetric: bool) -> _Tiling:
        """The tiles for so many input rows."""
        least = bits & -bits
        plane = field_bytes(columns, least)
        # The greatest power of 2 that divides both.
        common = math.gcd(plane, group, MOST_OFFSETS)
        few = 1 if rows == 1 else 16
        return cls(
            bits=bits,
            columns=columns,
            group=group,
            symmetric=symmetric,
            nested=columns * least % 8 == 0,
            plane=plane,
            planes=8 // least,
            rows=few if rows <= 16 else min(64, triton.next_power_of_2(rows)),
            offsets=common if common >= 16 else 32,
            one_group=common >= 16 or group >= columns,
            precision=float32_precision(),
        )


def float32_precision() -> str:
    """How matrix units multiply float32 numbers: as ``torch.set_float32_matmul_precision`` says."""
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def options(planes: int) -> dict[str, int | bool]:
    """How a kernel is compiled that takes so many planes in one step.

    Loads of all planes are under way at once, so that with many of them fewer steps need be so.
    """
    return {"num_warps": 4, "num_stages": {1: 3, 2: 3, 4: 2, 8: 1}[planes], "enable_fp_fusion": True}


@triton.jit
def _numbers(packed, scale, zero, rows, wanted, offsets, PLANE: tl.constexpr, TILING: tl.constexpr):
    """Codes less their zeros, and their scales, of a tile: float32 (OUT_FEATURES, offsets), (OUT_FEATURES, 1 or same).

    Args:
        packed: uint8 (O, bytes).
        scale: (O, N).
        zero: uint8 (O, bytes); not read of a symmetric grid.
        rows: int64 (OUT_FEATURES, 1), the out-features.
        wanted: bool (OUT_FEATURES, 1), which of them there are.
        offsets: (1, offsets) in the plane.
        PLANE: its number.
        TILING: the tiles.
    """
    columns = PLANE * TILING.plane + offsets
    seen = wanted & (offsets < TILING.plane) & (columns < TILING.columns)
    if TILING.nested:
        codes = codes_of_plane(packed + rows * TILING.row_bytes, offsets, seen, PLANE, TILING.plane, TILING.bits)
    else:
        codes = codes_at(packed + rows * TILING.row_bytes, columns, seen, TILING.columns, TILING.bits)
    if TILING.one_group:
        # Columns of a tile that are not there would belong to the next group.
        groups = tl.minimum(tl.min(columns, axis=1, keep_dims=True) // TILING.group, TILING.groups - 1)
        held = wanted
    else:
        groups = columns // TILING.group
        held = seen
    scales = tl.load(scale + rows * TILING.groups + groups, mask=held, other=0).to(tl.float32)
    if TILING.symmetric:
        return (codes - (1 << (TILING.bits - 1))).to(tl.float32), scales
    zeros = codes_at(zero + rows * TILING.zero_bytes, groups, held, TILING.groups, TILING.bits)
    return (codes - zeros).to(tl.float32), scales


@triton.jit
def _product(x, packed, scale, zero, out, rows, out_features, blocks, OUT: tl.constexpr, TILING: tl.constexpr):
    """One tile of a product, over ``blocks`` blocks of the columns of each plane; see the top of the file.

    Args:
        x: (R, I).
        packed: uint8 (O, bytes).
        scale: (O, N).
        zero: uint8 (O, bytes); not read of a symmetric grid.
        out: (parts, R, O).
        rows: R.
        out_features: O.
        blocks: that a part has.
        OUT: out-features of a tile.
        TILING: the tiles.
    """
    features = (tl.program_id(0) * OUT + tl.arange(0, OUT)).to(tl.int64)[:, None]
    inputs = (tl.program_id(1) * TILING.rows + tl.arange(0, TILING.rows)).to(tl.int64)[:, None]
    part = tl.program_id(2)
    wanted = features < out_features
    PLANES: tl.constexpr = TILING.planes
    WIDTH: tl.constexpr = TILING.offsets if TILING.rows == 1 else OUT
    HEIGHT: tl.constexpr = OUT if TILING.rows == 1 else TILING.rows
    sums = tl.zeros((HEIGHT, WIDTH), dtype=tl.float32)
    for block in range(part * blocks, tl.minimum(part * blocks + blocks, TILING.blocks)):
        offsets = (block * TILING.offsets + tl.arange(0, TILING.offsets))[None, :]
        for PLANE in tl.static_range(PLANES):
            columns = PLANE * TILING.plane + offsets
            seen = (inputs < rows) & (offsets < TILING.plane) & (columns < TILING.columns)
            taken = tl.load(x + inputs * TILING.columns + columns, mask=seen, other=0)
            numbers, scales = _numbers(packed, scale, zero, features, wanted, offsets, PLANE, TILING)
            if TILING.rows == 1:
                sums += numbers * (scales * taken.to(tl.float32))
            elif TILING.one_group:
                # Codes are exact in every dtype; their scale comes after the product.
                products = tl.dot(taken, tl.trans(numbers.to(taken.dtype)), input_precision=TILING.precision)
                sums += products * tl.trans(scales)
            else:
                weights = (numbers * scales).to(taken.dtype)
                sums = tl.dot(taken, tl.trans(weights), sums, input_precision=TILING.precision)
    out += part.to(tl.int64) * rows * out_features
    if TILING.rows == 1:
        tl.store(out + features, tl.sum(sums, axis=1, keep_dims=True), mask=wanted)
    else:
        tl.store(out + inputs * out_features + tl.trans(features), sums, mask=(inputs < rows) & tl.trans(wanted))


@triton.jit
def _add(parts, out, numel, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """The sum over the first dimension of ``parts`` (PARTS, numel), in order."""
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    seen = places < numel
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for part in range(PARTS):
        total += tl.load(parts + part * numel + places, mask=seen, other=0)
    tl.store(out + places, total, mask=seen)


def split(steps: int, programs: tuple[int, int], out: Tensor) -> tuple[int, int, Tensor]:
    """Parts that a product is cut into along the in-features, so that all of a GPU has work.

    Args:
        steps: in which the in-features are taken.
        programs: that there are for the output.
        out: the output.

    Returns:
        How many parts, the steps of one, and where they are written, one behind the other: ``out`` if there is one.
    """
    parts = max(1, min(steps, PROGRAMS // (programs[0] * programs[1])))
    of_a_part = triton.cdiv(steps, parts)
    parts = triton.cdiv(steps, of_a_part)
    return parts, of_a_part, out if parts == 1 else out.new_empty((parts, *out.shape), dtype=torch.float32)


def add_parts(sums: Tensor, out: Tensor) -> Tensor:
    """The sum of the parts that ``split`` made room for, in order, in ``out``."""
    if sums is not out:
        numel = out.numel()
        _add[(triton.cdiv(numel, 256),)](sums, out, numel, PARTS=sums.shape[0], BLOCK=256)
    return out


def matmul(input: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int) -> Tensor:
    """What ``torch.ops.pintpot.grid_matmul`` does, on a GPU; sums are in float32.

    Products of float32 numbers with matrix units (more than one row) are as exact as
    ``torch.set_float32_matmul_precision`` asks for.

    Args:
        input: (R, I) float32, bfloat16 or float16, contiguous like the others.
        packed: uint8 (O, packed_size(I, bits)).
        scale: float (O, N).
        zero: uint8 (O, packed_size(N, bits)), or None for a symmetric grid.
        bits: width of a code, 1 to 8.
        group_size: in-features that share a scale.

    Returns:
        (R, O) in the dtype of ``input``.

    Raises:
        ShapeError: when the sizes do not belong together.
    """
    check_grid(packed, scale, zero, bits, group_size, input.shape[-1])
    rows, columns, out_features = input.shape[:-1].numel(), input.shape[-1], packed.shape[0]
    out = input.new_empty((*input.shape[:-1], out_features))
    if not out.numel():
        return out
    tiling = _Tiling.of(rows, columns, bits, group_size, zero is None)
    programs = triton.cdiv(out_features, OUT_FEATURES), triton.cdiv(rows, tiling.rows)
    parts, blocks, sums = split(tiling.blocks, programs, out)
    # Where there is no zero its pointer is not followed.
    tensors = input, packed, scale, packed if zero is None else zero
    sizes = rows, out_features, blocks
    _product[(*programs, parts)](*tensors, sums, *sizes, OUT=OUT_FEATURES, TILING=tiling, **options(tiling.planes))
    return add_parts(sums, out)


@triton.jit
def _dequantize(packed, scale, zero, out, BLOCK: tl.constexpr, TILING: tl.constexpr):
    """A row of numbers for each program of the first dimension, a block of columns for each of the second."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    seen = columns < TILING.columns
    codes = codes_at(packed + row * TILING.row_bytes, columns, seen, TILING.columns, TILING.bits)
    groups = columns // TILING.group
    # The scale is rounded to the dtype before the product, as in the definition.
    scales = tl.load(scale + row * TILING.groups + groups, mask=seen, other=0).to(out.dtype.element_ty).to(tl.float32)
    if TILING.symmetric:
        numbers = codes - (1 << (TILING.bits - 1))
    else:
        numbers = codes - codes_at(zero + row * TILING.zero_bytes, groups, seen, TILING.groups, TILING.bits)
    tl.store(out + row * TILING.columns + columns, numbers.to(tl.float32) * scales, mask=seen)


def dequantize(
    packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int, columns: int, dtype: torch.dtype
) -> Tensor:
    """What ``torch.ops.pintpot.grid_dequantize`` does, on a GPU: bit for bit the definition.

    Args:
        packed: uint8 (..., packed_size(I, bits)).
        scale: float (..., N).
        zero: uint8 (..., packed_size(N, bits)), or None for a symmetric grid.
        bits: width of a code, 1 to 8.
        group_size: in-features that share a scale.
        columns: I.
        dtype: of the numbers.

    Returns:
        (..., I) in ``dtype``.

    Raises:
        ShapeError: when the sizes do not belong together.
    """
    check_grid(packed, scale, zero, bits, group_size, columns)
    out = packed.new_empty((*packed.shape[:-1], columns), dtype=dtype)
    rows = packed.shape[:-1].numel()
    if rows:
        tiling = _Tiling.of(1, columns, bits, group_size, zero is None)
        programs = rows, triton.cdiv(columns, 1024)
        _dequantize[programs](packed, scale, packed if zero is None else zero, out, BLOCK=1024, TILING=tiling)
    return out
