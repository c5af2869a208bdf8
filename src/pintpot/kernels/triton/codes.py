"""Reading packed codes inside a kernel (``pintpot.kernels.packing`` has the layout).

The binary digits of a width are its fields: 7 = 4 + 2 + 1, stored in this order, the lowest bits of a code first.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _bits_of(bytes_of_field, offsets, shift, seen, FIELD: tl.constexpr):
    """The bits that a field has of some codes, int32."""
    byte = tl.load(bytes_of_field + offsets, mask=seen, other=0).to(tl.int32)
    return (byte >> shift) & ((1 << FIELD) - 1)


@triton.jit
def _of_columns(bytes_of_field, columns, seen, COUNT: tl.constexpr, FIELD: tl.constexpr):
    """The bits that a field has of the codes of any columns, int32."""
    WIDTH: tl.constexpr = (COUNT * FIELD + 7) // 8
    return _bits_of(bytes_of_field, columns % WIDTH, columns // WIDTH * FIELD, seen, FIELD)


@triton.jit
def codes_at(rows, columns, seen, COUNT: tl.constexpr, BITS: tl.constexpr):
    """Codes of any columns of packed rows, int32.

    Args:
        rows: pointers to the first byte of each row.
        columns: integers below ``COUNT`` that broadcast with ``rows``.
        seen: where there is something to read; elsewhere the code is 0.
        COUNT: codes of a row.
        BITS: width of a code.
    """
    TWOS: tl.constexpr = (COUNT * (BITS & 4) + 7) // 8
    ONES: tl.constexpr = TWOS + (COUNT * (BITS & 2) + 7) // 8
    codes = tl.zeros_like(columns)
    if BITS == 8:
        codes = codes | _of_columns(rows, columns, seen, COUNT, 8)
    if BITS & 4:
        codes = codes | _of_columns(rows, columns, seen, COUNT, 4)
    if BITS & 2:
        codes = codes | (_of_columns(rows + TWOS, columns, seen, COUNT, 2) << (BITS & 4))
    if BITS & 1:
        codes = codes | (_of_columns(rows + ONES, columns, seen, COUNT, 1) << (BITS & 6))
    return codes


@triton.jit
def _of_plane(bytes_of_field, offsets, seen, PLANE: tl.constexpr, BYTES: tl.constexpr, FIELDS: tl.constexpr):
    """The bits that a field has of the codes of one plane, int32; ``FIELDS`` is its width and the narrowest's."""
    TIMES: tl.constexpr = FIELDS[0] // FIELDS[1]
    return _bits_of(bytes_of_field, PLANE % TIMES * BYTES + offsets, PLANE // TIMES * FIELDS[0], seen, FIELDS[0])


@triton.jit
def codes_of_plane(rows, offsets, seen, PLANE: tl.constexpr, BYTES: tl.constexpr, BITS: tl.constexpr):
    """Codes of columns ``PLANE * BYTES + offsets``, int32, where every field is a whole number of bytes.

    The planes of the narrowest field are parts of those of the wider ones. So the bytes of all fields at ``offsets``
    hold the codes of all planes, and a kernel that takes one plane after the other reads each byte once.

    Args:
        rows: pointers to the first byte of each row.
        offsets: integers below ``BYTES`` that broadcast with ``rows``.
        seen: where there is something to read; elsewhere the code is 0.
        PLANE: number of the plane.
        BYTES: of the narrowest field of a row.
        BITS: width of a code.
    """
    LEAST: tl.constexpr = BITS & -BITS
    TWOS: tl.constexpr = (BITS & 4) // LEAST * BYTES
    ONES: tl.constexpr = TWOS + (BITS & 2) // LEAST * BYTES
    codes = tl.zeros_like(offsets)
    if BITS == 8:
        codes = codes | _of_plane(rows, offsets, seen, PLANE, BYTES, (8, 8))
    if BITS & 4:
        codes = codes | _of_plane(rows, offsets, seen, PLANE, BYTES, (4, LEAST))
    if BITS & 2:
        codes = codes | (_of_plane(rows + TWOS, offsets, seen, PLANE, BYTES, (2, LEAST)) << (BITS & 4))
    if BITS & 1:
        codes = codes | (_of_plane(rows + ONES, offsets, seen, PLANE, BYTES, (1, 1)) << (BITS & 6))
    return codes


@triton.jit
def _of_groups(rows, groups, seen, SIZES: tl.constexpr, FIELD: tl.constexpr):
    """The bits that a field has of the codes of whole groups, int32; ``SIZES``: its first byte, and those below."""
    WIDTH: tl.constexpr = SIZES[2] * FIELD // 8
    offsets = groups[None, :, None] * SIZES[1] + SIZES[0] + tl.arange(0, WIDTH)[None, None, :]
    bytes_of_field = tl.load(rows[:, :, None] + offsets, mask=seen[:, :, None], other=0).to(tl.int32)
    shifts = (tl.arange(0, 8 // FIELD) * FIELD)[None, None, :, None]
    bits = (bytes_of_field[:, :, None, :] >> shifts) & ((1 << FIELD) - 1)
    return tl.reshape(bits, (rows.shape[0], groups.shape[0] * SIZES[2]))


@triton.jit
def codes_of_groups(rows, groups, seen, SIZE: tl.constexpr, COUNT: tl.constexpr, BITS: tl.constexpr):
    """Codes of groups that were packed each by itself, one group after the other: int32 (rows, groups * COUNT).

    Each byte is read once, and neighbouring bytes together; fields must be powers of 2 of whole bytes.

    Args:
        rows: (rows, 1), pointers to the first byte of each row.
        groups: (groups,), their numbers.
        seen: (rows, groups), where there is something to read; elsewhere codes are 0.
        SIZE: bytes of a group.
        COUNT: codes of a group, a power of 2.
        BITS: width of a code.
    """
    TWOS: tl.constexpr = COUNT * (BITS & 4) // 8
    ONES: tl.constexpr = TWOS + COUNT * (BITS & 2) // 8
    codes = tl.zeros((rows.shape[0], groups.shape[0] * COUNT), dtype=tl.int32)
    if BITS == 8:
        codes = codes | _of_groups(rows, groups, seen, (0, SIZE, COUNT), 8)
    if BITS & 4:
        codes = codes | _of_groups(rows, groups, seen, (0, SIZE, COUNT), 4)
    if BITS & 2:
        codes = codes | (_of_groups(rows, groups, seen, (TWOS, SIZE, COUNT), 2) << (BITS & 4))
    if BITS & 1:
        codes = codes | (_of_groups(rows, groups, seen, (ONES, SIZE, COUNT), 1) << (BITS & 6))
    return codes


@triton.jit
def repeated(numbers, TIMES: tl.constexpr):
    """(rows, n) with each column ``TIMES`` times beside itself: (rows, n * TIMES)."""
    shape: tl.constexpr = (numbers.shape[0], numbers.shape[1], TIMES)
    return tl.reshape(tl.broadcast_to(numbers[:, :, None], shape), (shape[0], shape[1] * TIMES))
