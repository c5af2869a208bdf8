"""Grids in tiles: the bytes that a thread of a GPU needs for a matrix unit lie together, in codes of any width.

Shapes: O out-features, I in-features, a tile is 16 of each. 32 threads hold a tile, 8 codes each, in the places that
the operand of a product of 16-bit numbers has in their registers:

    thread 4 * n + k  holds  out-features n and n + 8,  in-features 2 k, 2 k + 1, 2 k + 8, 2 k + 9

Its codes are one behind the other without gaps, lowest bits first, out-feature by out-feature: 8 codes of b bits are b
bytes. A tile has the first byte of every thread, then the second of every thread, and so on: threads that read one byte
each read one piece of memory together.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from pintpot.core.errors import ShapeError
from pintpot.kernels import gpu, native
from pintpot.kernels.packing import unpack

TILE = 16
"""In-features and out-features of a tile."""

THREADS = 32
"""Threads that hold a tile, 8 codes each."""


STEP = 64
"""In-features that the kernel for GPUs takes at once; they must be of one group."""


def tiles_shape(out_features: int, in_features: int, bits: int) -> tuple[int, int, int]:
    """Shape of the tiles of a weight, padded to whole ones: in-features, out-features, bytes."""
    return -(-in_features // TILE), -(-out_features // TILE), THREADS * bits


def pack_tiles(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 (O, I), each below ``2 ** bits``, in tiles: uint8 of the shape of ``tiles_shape``."""
    down, across, _ = tiles_shape(codes.shape[0], codes.shape[1], bits)
    padded = functional.pad(codes, (0, down * TILE - codes.shape[1], 0, across * TILE - codes.shape[0]))
    # Tile, half, row of a half; tile, half, thread's place in a half, neighbour.
    parts = padded.view(across, 2, 8, down, 2, 4, 2).permute(3, 0, 2, 5, 1, 4, 6)
    held = parts.reshape(down, across, THREADS, 8)
    word = held[..., 0].long()
    for index in range(1, 8):
        word |= held[..., index].long() << (index * bits)
    tiles = codes.new_empty((down, across, bits, THREADS))
    for byte in range(bits):
        tiles[..., byte, :] = (word >> (8 * byte)) & 0xFF
    return tiles.flatten(2)


def unpack_tiles(tiles: Tensor, bits: int, in_features: int) -> Tensor:
    """The codes that ``pack_tiles`` stored, with what pads the out-features: uint8 (out-features of tiles, I)."""
    down, across, _ = tiles.shape
    bytes_of = tiles.unflatten(2, (bits, THREADS))
    word = bytes_of[..., 0, :].long()
    for byte in range(1, bits):
        word |= bytes_of[..., byte, :].long() << (8 * byte)
    held = tiles.new_empty((down, across, THREADS, 8))
    for index in range(8):
        held[..., index] = (word >> (index * bits)) & ((1 << bits) - 1)
    parts = held.view(down, across, 8, 4, 2, 2, 2).permute(1, 4, 2, 0, 5, 3, 6)
    return parts.reshape(across * TILE, down * TILE)[:, :in_features]


def check_tiles(tiles: Tensor, scale: Tensor, bits: int, in_features: int) -> None:
    """Refuse tiles that are not those of a weight with these scales.

    Raises:
        ShapeError: naming the shapes.
    """
    if tiles.dtype != torch.uint8 or tuple(tiles.shape) != tiles_shape(scale.shape[0], in_features, bits):
        raise ShapeError(
            f"{tuple(tiles.shape)} and scales {tuple(scale.shape)} are no tiles of {in_features} columns and"
            f" {bits} bits",
            hint="pass the tensors, bits and group size that were stored together",
        )


def dequantize_tiles(
    tiles: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    *,
    bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """The numbers that a grid in tiles stands for, bit for bit those of ``dequantize``.

    Args:
        tiles: uint8, see ``tiles_shape``.
        scale: float (O, N), as of the grid.
        zero: uint8 (O, packed_size(N, bits)), as of the grid, or None for a symmetric one.
        bits: width of a code, 1 to 8.
        group_size: in-features that share a scale.
        in_features: I.
        dtype: of the numbers.

    Returns:
        (O, I) in ``dtype``.

    Raises:
        ShapeError: when the sizes do not belong together.
    """
    check_tiles(tiles, scale, bits, in_features)
    dense = unpack_tiles(tiles, bits, in_features)[: scale.shape[0]].to(dtype)
    group = torch.arange(in_features, device=tiles.device) // group_size
    if zero is None:
        dense -= 1 << (bits - 1)
    else:
        dense -= unpack(zero, bits, scale.shape[-1])[:, group].to(dtype)
    return dense.mul_(scale.to(dtype)[:, group])


def tiles_matmul(
    input: Tensor, tiles: Tensor, scale: Tensor, zero: Tensor | None, *, bits: int, group_size: int
) -> Tensor | None:
    """``input`` (..., I) times a transposed weight in tiles, on a GPU, where there is a kernel for it; otherwise None.

    There is one for a few rows of input, no gradient, and groups of a multiple of ``STEP`` in-features, or of all.

    Args:
        input: float32, bfloat16 or float16.
        tiles: uint8, see ``tiles_shape``.
        scale: float (O, N).
        zero: uint8 (O, packed_size(N, bits)), or None for a symmetric grid.
        bits: width of a code, 1 to 8.
        group_size: in-features that share a scale.

    Returns:
        (..., O) in the dtype of ``input``.
    """
    columns, rows = input.shape[-1], input.shape[:-1].numel()
    whole = group_size % STEP == 0 or group_size >= columns
    known = whole and columns and 0 < rows <= gpu.MOST_ROWS and input.dtype in native.DTYPES
    flat = input.reshape(-1, columns)
    if not known or not gpu.serves(flat, tiles, scale, zero):
        return None
    product: Tensor = torch.ops.pintpot.tiles_matmul(flat, tiles, scale, zero, bits, group_size)
    return product.view(*input.shape[:-1], product.shape[-1])


def tiles_matmul_definition(
    input: Tensor, tiles: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int
) -> Tensor:
    """``input`` (..., I) times the transposed weight, all of it made dense: (..., O)."""
    sizes = {"bits": bits, "group_size": group_size, "in_features": input.shape[-1]}
    return input @ dequantize_tiles(tiles, scale, zero, **sizes, dtype=input.dtype).t()
