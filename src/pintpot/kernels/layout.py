"""The layout of packed integers: the fields that a width is cut into, and the bytes they take (see ``packing.py``)."""

from __future__ import annotations

from pintpot.core.errors import ShapeError

_FIELDS = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}


def fields_of(bits: int) -> tuple[int, ...]:
    """The widths of the fields of a code, lowest bits first.

    Raises:
        ShapeError: when the width is not 1 to 8.
    """
    if bits not in _FIELDS:
        raise ShapeError(f"{bits} bits cannot be packed", hint="use 1 to 8 bits")
    return _FIELDS[bits]


def field_bytes(count: int, field: int) -> int:
    """Bytes of one field of so many codes."""
    return -(-count * field // 8)


def packed_size(count: int, bits: int) -> int:
    """Bytes in which ``pack`` stores ``count`` codes: ``count * bits / 8``, each field rounded up to a byte."""
    return sum(field_bytes(count, field) for field in fields_of(bits))
