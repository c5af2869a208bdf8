"""A grid whose levels are any table of at most 256 numbers: minifloats, powers of two, quantiles of a normal.

A number is ``levels[code] * scale`` with a scale for each group of in-features; the table follows from its name and is
not stored. Bytes of a weight (O, I) with N groups a row: ``O * (packed_size(I, bits) + 2 * N)``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from pintpot.core.errors import ShapeError
from pintpot.kernels import pack, packed_size, unpack
from pintpot.weights.formats._base import Storage, Tensors, file_name
from pintpot.weights.formats.grid import ENCODE_ELEMENTS
from pintpot.weights.formats.grouped import SCALE_DTYPES, SMALLEST, Grouped

BYTES_A_NUMBER = 16
"""Of temporaries in finding a code: the number over its scale (4), and the code in 64 bits (8) and in 8, rounded up."""


@file_name("level_grid")
@dataclass(frozen=True, kw_only=True)
class LevelGrid(Grouped):
    """Groups of codes into a table of levels, with a scale.

    Attributes:
        levels: the table's name. ``"e2m1"``: a minifloat with a sign, so many bits of exponent and of mantissa (none
            for powers of two with zero, ``"e3m0"``), with subnormal numbers and without infinities. ``"pow4"``: powers
            of two without zero, in 4 bits. ``"nf4"``: quantiles of a normal distribution, in 4 bits. ``"int4"``: the
            integers from -7 to 7.
        group_size: in-features that share a scale; -1 for a whole row. The last group may be shorter.
        scale_dtype: ``"float16"`` or ``"bfloat16"``.
    """

    levels: str = "e2m1"
    group_size: int = 128
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        levels_of(self.levels)
        self.check_groups()

    @property
    def bits(self) -> int:
        """Width of a code."""
        return max(1, (len(levels_of(self.levels)) - 1).bit_length())

    def table(self, device: torch.device) -> Tensor:
        """The levels, rising, the largest of them 1 or -1; float32."""
        return torch.tensor(levels_of(self.levels), device=device)

    def storage(self, out_features: int, in_features: int) -> Storage:
        """``packed`` and ``scale``."""
        return {
            "packed": ((out_features, packed_size(in_features, self.bits)), torch.uint8),
            "scale": ((out_features, self.groups(in_features)), SCALE_DTYPES[self.scale_dtype]),
        }

    def encode(self, weight: Tensor) -> Tensors:
        """Round to the nearest level, where each group's largest magnitude is the largest level's."""
        rows, columns = weight.shape
        stored = {
            name: weight.new_empty(shape, dtype=dtype) for name, (shape, dtype) in self.storage(rows, columns).items()
        }
        step = max(1, ENCODE_ELEMENTS // columns)
        for start in range(0, rows, step):
            part = weight[start : start + step].float()
            scale = self.fit(part)
            for name, tensor in self.store(self.round(part, scale), scale).items():
                stored[name][start : start + step] = tensor
        return stored

    def fit(self, weight: Tensor) -> Tensor:
        """The scale of each group, its largest magnitude: (O, N) for float32 (O, I), as the scale's dtype holds it."""
        columns = weight.shape[-1]
        size = self.group(columns)
        largest = functional.pad(weight.abs(), (0, -columns % size)).unflatten(-1, (-1, size)).amax(-1)
        return self.settle(largest)

    def settle(self, scale: Tensor) -> Tensor:
        """Positive scales as their dtype holds them, float32."""
        dtype = SCALE_DTYPES[self.scale_dtype]
        return scale.clamp(min=SMALLEST[self.scale_dtype], max=torch.finfo(dtype).max).to(dtype).float()

    def round(self, weight: Tensor, scale: Tensor) -> Tensor:
        """The codes of the nearest levels, uint8 (O, I), for scales (O, N)."""
        table = self.table(weight.device)
        middles = (table[1:] + table[:-1]) / 2
        return torch.bucketize((weight / self.by_column(scale, weight.shape[-1])).contiguous(), middles).to(torch.uint8)

    def value(self, codes: Tensor, scale: Tensor) -> Tensor:
        """The numbers (O, I) that codes stand for, float32."""
        return self._look_up(codes, torch.float32).mul_(self.by_column(scale, codes.shape[-1]))

    def _look_up(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        table = self.table(codes.device).to(dtype)
        return table.index_select(0, codes.flatten().int()).view(codes.shape)

    def store(self, codes: Tensor, scale: Tensor) -> Tensors:
        """The stored tensors of codes with their scales."""
        return {"packed": pack(codes, self.bits), "scale": scale.to(SCALE_DTYPES[self.scale_dtype])}

    def decode(self, tensors: Mapping[str, Tensor], in_features: int, dtype: torch.dtype) -> Tensor:
        """The numbers (O, I) that stored tensors stand for, in ``dtype``."""
        numbers = self._look_up(unpack(tensors["packed"], self.bits, in_features), dtype)
        return numbers.mul_(self.by_column(tensors["scale"].to(dtype), in_features))

    def row_bytes(self, in_features: int, dtype: torch.dtype) -> int:
        """Bytes of temporaries in decoding one row: its numbers, and its codes in 8 and 32 bits or its scales."""
        return in_features * (dtype.itemsize + max(5, dtype.itemsize))


@lru_cache
def levels_of(name: str) -> tuple[float, ...]:
    """The levels of a table, rising, the largest magnitude 1.

    Raises:
        ShapeError: when there is no such table, or it has more than 256 levels.
    """
    if found := re.fullmatch(r"e([1-7])m([0-6])", name):
        exponent, mantissa = int(found[1]), int(found[2])
        bits, levels = 1 + exponent + mantissa, _minifloat(exponent, mantissa)
    elif found := re.fullmatch(r"pow([2-8])", name):
        bits = int(found[1])
        levels = [sign * 2.0**-power for sign in (-1, 1) for power in range(1 << (bits - 1))] if bits <= 8 else []
    elif found := re.fullmatch(r"nf([2-8])", name):
        bits = int(found[1])
        levels = _normal(bits)
    elif found := re.fullmatch(r"int([2-8])", name):
        bits = int(found[1])
        levels = [float(level) for level in range(1 - (1 << (bits - 1)), 1 << (bits - 1))]
    else:
        bits, levels = 0, []
    if not 2 <= bits <= 8:
        raise ShapeError(
            f"there is no table of levels {name!r} in at most 8 bits",
            hint="a minifloat such as e2m1, powers of two such as e3m0 (with zero) or pow4 (without), int4, or nf4",
        )
    largest = max(abs(level) for level in levels)
    # Adding 0 makes one of the two zeros.
    return tuple(sorted({level / largest + 0.0 for level in levels}))


def _minifloat(exponent: int, mantissa: int) -> list[float]:
    """All numbers of a minifloat, up to a common factor: 0 and the smallest exponent are subnormal."""
    steps = 1 << mantissa
    magnitudes = [m / steps for m in range(steps)]
    magnitudes += [2.0 ** (e - 1) * (1 + m / steps) for e in range(1, 1 << exponent) for m in range(steps)]
    # Subnormal numbers have the exponent of the smallest normal ones, which is 0 here.
    return [sign * magnitude for sign in (-1, 1) for magnitude in magnitudes]


def _normal(bits: int) -> list[float]:
    """NF4's quantiles (Dettmers et al. 2023, arXiv:2305.14314, sec. 3) for any width: one more above 0 than below."""
    half = 1 << (bits - 1)
    tail = (1 / (2 * (2 * half - 1)) + 1 / (4 * half)) / 2
    above = torch.special.ndtri(torch.linspace(1 - tail, 0.5, half + 1, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(1 - tail, 0.5, half, dtype=torch.float64)[:-1])
    return [*below.tolist(), 0.0, *above.tolist()]
