"""The compiled attention to packed blocks, which ``attend.py`` defines.

The tensors of all blocks come in one list, block by block in the order of ``PackedBlock``, ``Float8Block`` and
``RotatedBlock``. Each operation checks their sizes, since the library only has their addresses.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from pintpot.core.errors import ShapeError
from pintpot.kernels import native
from pintpot.kernels.layout import packed_size

INT64 = ctypes.c_int64
POINTER = ctypes.c_void_p
HINT = "pass blocks whole, as they were stored, with the bits and group sizes that they were packed with"

Result = tuple[Tensor, Tensor, Tensor]
Shape = tuple[int, ...]


class _Block(ctypes.Structure):
    _fields_ = [
        *((name, POINTER) for name in ("keys", "key_scale", "key_low", "values", "value_scale", "value_low")),
        *((name, INT64) for name in ("tokens", "room")),
    ]


class _Attend(ctypes.Structure):
    _fields_ = [
        *((name, POINTER) for name in ("blocks", "query", "out", "top", "norm")),
        *((name, INT64) for name in ("scale_dtype", "bits", "key_group", "value_group")),
        *((name, INT64) for name in ("count", "heads", "rows", "key_dim", "value_dim", "threads")),
        ("softcap", ctypes.c_double),
    ]


class _Rotated(ctypes.Structure):
    _fields_ = [
        ("attend", _Attend),
        *((name, POINTER) for name in ("positions", "order", "frequencies", "skipped")),
        *((name, INT64) for name in ("sequences", "orders", "waves", "skips", "key_block", "first")),
        ("scaling", ctypes.c_double),
    ]


def _attend_packed(
    query: Tensor,
    stored: Sequence[Tensor],
    tokens: Sequence[int],
    bits: int,
    key_group: int,
    value_group: int,
    softcap: float,
) -> Result:
    found = packed_shape(query, stored, tokens, bits, key_group, value_group, softcap)
    blocks = [
        _Block(*(t.data_ptr() for t in block), count, block[3].shape[2]) for block, count in _each(stored, 6, tokens)
    ]
    packing = native.DTYPES[stored[1].dtype], bits, key_group, value_group
    _run("attend_packed", query, blocks, found, packing, softcap)
    return found


def packed_shape(
    query: Tensor,
    stored: Sequence[Tensor],
    tokens: Sequence[int],
    bits: int,
    key_group: int,
    value_group: int,
    softcap: float,
) -> Result:
    """Empty results of ``attend_packed``.

    Raises:
        ShapeError: when the sizes do not belong together.
    """
    _check_query(query, stored, 6, tokens, softcap)
    if key_group < 1 or value_group < 1:
        raise ShapeError(f"groups of {key_group} tokens and {value_group} channels cannot be", hint=HINT)
    lead, key_dim = query.shape[:2], query.shape[-1]
    value_dim = stored[4].shape[-1] * value_group
    for block, count in _each(stored, 6, tokens):
        room = block[3].shape[2] if block[3].dim() == 4 else 0
        keys: Shape = (*lead, key_dim, room // key_group)
        values: Shape = (*lead, room, value_dim // value_group)
        shapes = [(*keys, packed_size(key_group, bits)), keys, keys]
        shapes += [(*lead, room, packed_size(value_dim, bits)), values, values]
        _check_block(block, shapes, count, room if room % key_group == 0 else 0)
    return _results(query, value_dim)


def _attend_fp8(query: Tensor, stored: Sequence[Tensor], tokens: Sequence[int], softcap: float) -> Result:
    found = _fp8_shape(query, stored, tokens, softcap)
    blocks = []
    for (keys, key_scale, values, value_scale), count in _each(stored, 4, tokens):
        of_keys, of_values = (keys.data_ptr(), key_scale.data_ptr()), (values.data_ptr(), value_scale.data_ptr())
        blocks.append(_Block(*of_keys, None, *of_values, None, count, keys.shape[2]))
    packing = native.DTYPES[stored[1].dtype], 8, int(_by_token(stored)), 0
    _run("attend_fp8", query, blocks, found, packing, softcap)
    return found


def _fp8_shape(query: Tensor, stored: Sequence[Tensor], tokens: Sequence[int], softcap: float) -> Result:
    _check_query(query, stored, 4, tokens, softcap)
    lead, key_dim, value_dim = query.shape[:2], query.shape[-1], stored[2].shape[-1]
    by_token = _by_token(stored)
    for block, count in _each(stored, 4, tokens):
        room = block[0].shape[2] if block[0].dim() == 4 else 0
        scales = (*lead, room if by_token else 1, 1)
        _check_block(block, [(*lead, room, key_dim), scales, (*lead, room, value_dim), scales], count, room)
    return _results(query, value_dim)


def _attend_rotated(
    query: Tensor,
    stored: Sequence[Tensor],
    tokens: Sequence[int],
    order: Tensor,
    frequencies: Tensor | None,
    skipped: Tensor | None,
    layout: Sequence[int],
    scaling: float,
    softcap: float,
) -> Result:
    found = _rotated_shape(query, stored, tokens, order, frequencies, skipped, layout, scaling, softcap)
    bits, key_group, value_group, key_block, first = layout
    blocks, positions = [], []
    for block, count in _each(stored, len(stored) // len(tokens), tokens):
        blocks.append(_Block(*(t.data_ptr() for t in block[:6]), count, block[3].shape[2]))
        positions.append(block[6].data_ptr() if len(block) > 6 else None)
    places = (POINTER * len(positions))(*positions)
    given = [None if held is None else held.data_ptr() for held in (order, frequencies, skipped)]
    counts = len(order), *(0 if held is None else held.shape[-1] for held in (frequencies, skipped))
    packing = native.DTYPES[stored[1].dtype], bits, key_group, value_group
    array = (_Block * len(blocks))(*blocks)
    call = _filled(query, array, found, packing, softcap)
    sizes = len(query), *counts, key_block, first
    native.call("attend_rotated", _Rotated(call, ctypes.addressof(places), *given, *sizes, scaling))
    return found


def _rotated_shape(
    query: Tensor,
    stored: Sequence[Tensor],
    tokens: Sequence[int],
    order: Tensor,
    frequencies: Tensor | None,
    skipped: Tensor | None,
    layout: Sequence[int],
    scaling: float,
    softcap: float,
) -> Result:
    tensors = len(stored) // max(1, len(tokens))
    if tensors not in (6, 7) or len(layout) != 5:
        raise ShapeError(f"{tensors} tensors of a block and {len(layout)} sizes cannot be", hint=HINT)
    _check_query(query, [held for place, held in enumerate(stored) if place % tensors < 6], 6, tokens, softcap)
    bits, key_group, value_group, key_block, _ = layout
    batch, heads, width = *query.shape[:2], query.shape[1] * query.shape[3]
    _check_rotation(query, order, frequencies, skipped)
    if (
        min(key_group, value_group, key_block) < 1
        or key_block & (key_block - 1)
        or width % key_group | width % key_block
    ):
        raise ShapeError(f"{width} channels of keys have no groups of {key_group} or blocks of {key_block}", hint=HINT)
    value_dim = stored[4].shape[-1] * value_group
    for block, count in _each(stored, tensors, tokens):
        room = block[3].shape[2] if block[3].dim() == 4 else 0
        keys: Shape = (batch, 1, room, width // key_group)
        values: Shape = (batch, heads, room, value_dim // value_group)
        shapes = [(batch, 1, room, packed_size(width, bits)), keys, keys]
        shapes += [(batch, heads, room, packed_size(value_dim, bits)), values, values, (batch, 1, room, 1)]
        _check_block(block, shapes[:tensors], count, room)
        if tensors == 7 and block[6].dtype != torch.int32:
            raise ShapeError(f"positions are int32, not {block[6].dtype}", hint=HINT)
    return _results(query, value_dim)


def _check_rotation(query: Tensor, order: Tensor, frequencies: Tensor | None, skipped: Tensor | None) -> None:
    batch, width, key_dim = len(query), query.shape[1] * query.shape[3], query.shape[3]
    given = [held for held in (order, frequencies, skipped) if held is not None]
    ordered = order.dtype == torch.int32 and order.dim() == 2 and order.shape[1] == width and len(order) in (1, batch)
    turned = frequencies is None or (
        frequencies.dtype == torch.float32 and frequencies.dim() == 1 and 2 * len(frequencies) <= key_dim
    )
    left = skipped is None or (skipped.dtype == torch.int32 and skipped.dim() == 2 and len(skipped) == batch)
    if not (ordered and turned and left and all(held.is_contiguous() for held in given)):
        raise ShapeError(
            f"{[(tuple(held.shape), held.dtype) for held in given]} are not the order of {width} channels (int32), the"
            f" frequencies of at most {key_dim // 2} pairs of them, and tokens that are left out (int32)",
            hint=HINT,
        )


def _by_token(stored: Sequence[Tensor]) -> bool:
    """Whether each token has a scale of its own."""
    return stored[1].shape[2:3] == stored[0].shape[2:3]


def _each(stored: Sequence[Tensor], tensors: int, tokens: Sequence[int]) -> Iterator[tuple[Sequence[Tensor], int]]:
    for index, count in enumerate(tokens):
        yield stored[index * tensors : (index + 1) * tensors], count


def _check_query(query: Tensor, stored: Sequence[Tensor], tensors: int, tokens: Sequence[int], softcap: float) -> None:
    if not tokens or len(stored) != tensors * len(tokens):
        raise ShapeError(f"{len(stored)} tensors are not {len(tokens)} blocks", hint=HINT)
    if query.dim() != 4 or query.dtype != torch.float32 or not query.is_contiguous() or not query.numel():
        raise ShapeError(
            f"queries {tuple(query.shape)} ({query.dtype}) are not float32 (B, K, M, D)", hint="scale them in float32"
        )
    if not softcap >= 0:
        raise ShapeError(f"scores cannot be capped at {softcap}", hint="0 leaves them as they are")
    scales = {held.dtype for place, held in enumerate(stored) if place % (tensors // 2)}
    codes = {held.dtype for held in stored[:: tensors // 2]}
    if codes != {torch.uint8} or len(scales) != 1 or not scales <= set(native.DTYPES):
        raise ShapeError(f"codes of {codes} with scales of {scales} cannot be read", hint=HINT)


def _check_block(block: Sequence[Tensor], shapes: Sequence[Shape], tokens: int, room: int) -> None:
    shaped = all(held.shape == shape for held, shape in zip(block, shapes, strict=True))
    if not shaped or not 0 < tokens <= room or not all(held.is_contiguous() for held in block):
        raise ShapeError(
            f"{[tuple(held.shape) for held in block]} are no block of {tokens} tokens; it has {list(shapes)}", hint=HINT
        )


def _results(query: Tensor, value_dim: int) -> Result:
    one = (*query.shape[:3], 1)
    return query.new_empty((*query.shape[:3], value_dim)), query.new_empty(one), query.new_empty(one)


def _run(
    name: str, query: Tensor, blocks: list[_Block], found: Result, packing: tuple[int, ...], softcap: float
) -> None:
    array = (_Block * len(blocks))(*blocks)
    native.call(name, _filled(query, array, found, packing, softcap))


def _filled(
    query: Tensor, blocks: ctypes.Array[_Block], found: Result, packing: tuple[int, ...], softcap: float
) -> _Attend:
    """``packing`` is the number of the scales' dtype, the bits, and the groups of keys and values."""
    pointers = ctypes.addressof(blocks), query.data_ptr(), *(t.data_ptr() for t in found)
    heads, rows, key_dim = query.shape[:2].numel(), *query.shape[2:]
    sizes = len(blocks), heads, rows, key_dim, found[0].shape[-1], torch.get_num_threads()
    return _Attend(*pointers, *packing, *sizes, softcap)


native.register(
    "attend_packed(Tensor query, Tensor[] stored, int[] tokens, int bits, int key_group, int value_group,"
    " float softcap) -> (Tensor, Tensor, Tensor)",
    _attend_packed,
    packed_shape,
)
native.register(
    "attend_fp8(Tensor query, Tensor[] stored, int[] tokens, float softcap) -> (Tensor, Tensor, Tensor)",
    _attend_fp8,
    _fp8_shape,
)
native.register(
    "attend_rotated(Tensor query, Tensor[] stored, int[] tokens, Tensor order, Tensor? frequencies, Tensor? skipped,"
    " int[] layout, float scaling, float softcap) -> (Tensor, Tensor, Tensor)",
    _attend_rotated,
    _rotated_shape,
)


@register_flop_formula(
    [torch.ops.pintpot.attend_packed, torch.ops.pintpot.attend_fp8, torch.ops.pintpot.attend_rotated]
)
def _attend_flops(
    query: torch.Size,
    stored: Sequence[torch.Size],
    tokens: Sequence[int],
    *rest: object,
    out_shape: Sequence[torch.Size],
    **named: object,
) -> int:
    """A product and a sum for each number of a token's key and value, and each query."""
    return 2 * query[:3].numel() * sum(tokens) * (query[3] + out_shape[0][3])
