"""Closed forms for what a weight method does to memory and time, from shapes alone."""

from __future__ import annotations

import torch

from pintpot.core.shape import ModelShape
from pintpot.kernels import native
from pintpot.kernels.grid import FEW_ROWS
from pintpot.weights._base import WeightMethod
from pintpot.weights.grid import ENCODE_ELEMENTS
from pintpot.weights.modules import Target, find_targets

_KEPT: dict[tuple[str, torch.dtype], tuple[Target, ...]] = {}


def targets_of(shape: ModelShape) -> tuple[Target, ...]:
    """The parameters that a method would replace (built once for each architecture and dtype)."""
    key = (shape.fingerprint, shape.dtype)
    if key not in _KEPT:
        _KEPT[key] = find_targets(shape.build("meta"))[0]
    return _KEPT[key]


def packed_change(shape: ModelShape, method: WeightMethod) -> tuple[int, int]:
    """How many bytes of weights a method adds (negative), and the most workspace that one product needs."""
    targets = targets_of(shape)
    change = sum(t.nbytes(method) - t.numel * t.dtype.itemsize for t in targets)
    workspace = max(
        sum(layout.workspace(t.shape[-2], t.shape[-1], shape.dtype) for layout in t.formats(method))
        for t in _kinds(targets)
    )
    return change, workspace


def compression_peak(shape: ModelShape, method: WeightMethod) -> int:
    """Bytes of temporaries while compressing a folder or loading it compressed: one dense parameter at a time.

    Experts lie one by one in checkpoints, so that putting them together holds them twice.
    """
    largest = max(
        t.numel * t.dtype.itemsize * (2 if t.matrices > 1 else 1) + t.nbytes(method) for t in _kinds(targets_of(shape))
    )
    replaced = {t.parameter for t in targets_of(shape)}
    others = max((p.nbytes for p in shape.parameters if p.name not in replaced), default=0)
    together = min(ENCODE_ELEMENTS, max(t.numel // t.matrices for t in _kinds(targets_of(shape))))
    return max(largest, others) + _encode_temporaries(shape.dtype) * together


def _encode_temporaries(dtype: torch.dtype) -> int:
    """Bytes for each number of the rows that are encoded together: the float32 block, codes, groups' extremes.

    A weight of 16 bits is made float32 first, and packing without the compiled kernel has temporaries of its own.
    """
    return 8 + (0 if dtype is torch.float32 else 4) + (0 if native.library() is not None else 4)


def multiplies_packed(rows: int) -> bool:
    """Whether products with so many rows of input are made by the compiled kernel, without workspace."""
    return rows <= FEW_ROWS and native.library() is not None


def extra_reads(shape: ModelShape, method: WeightMethod, rows: int) -> int:
    """Bytes moved more than with dense weights (or, if negative, less) in one pass over all matrices.

    The compiled product reads what is packed, and makes a byte of each number for a moment. The compiled
    dequantisation reads what is packed and writes the dense numbers, which the product then reads as it would have
    read the weight. Without it each number is unpacked (a byte written and read), converted, shifted and scaled (each
    written, and read again) first.

    Args:
        shape: the model.
        method: what packs its weights.
        rows: rows of input of each product.
    """
    itemsize = shape.dtype.itemsize
    if multiplies_packed(rows):
        each = 1 - itemsize
    else:
        each = 2 * itemsize if native.library() is not None else 2 + 5 * itemsize
    return sum(t.nbytes(method) + t.numel * each for t in targets_of(shape))


def _kinds(targets: tuple[Target, ...]) -> tuple[Target, ...]:
    """One target for each shape."""
    return tuple({(t.shape, t.dtype): t for t in targets}.values())
