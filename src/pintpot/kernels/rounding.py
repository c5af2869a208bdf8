"""Rounding to formats with few bits: which numbers a format has, and which of its two neighbours a number becomes.

All formats are one lattice. A number of exponent ``e`` goes to a multiple of ``2 ** (max(e, least_exponent) -
digits)``, and then into the range; a fixed-point format is a lattice whose least exponent is above all of its numbers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from pintpot.core.errors import ShapeError
from pintpot.kernels import native
from pintpot.kernels.philox import random_words


class Rounding(StrEnum):
    """Which of its two neighbours a number becomes that a format does not have.

    The first four and ``TIES_AWAY`` are those of IEEE 754. Up and down are towards the infinities. ``TO_ODD`` takes
    the neighbour whose last bit is set, so that a second rounding to fewer bits goes where one alone would have gone.
    ``STOCHASTIC`` takes either with the probability of its nearness (in steps of ``2 ** -24``), ``STOCHASTIC_EQUAL``
    with one half.
    """

    NEAREST = "nearest"
    UP = "up"
    DOWN = "down"
    TOWARD_ZERO = "toward_zero"
    TIES_TO_ZERO = "ties_to_zero"
    TIES_AWAY = "ties_away"
    TO_ODD = "to_odd"
    STOCHASTIC = "stochastic"
    STOCHASTIC_EQUAL = "stochastic_equal"

    @property
    def random(self) -> bool:
        """Whether it needs a seed."""
        return self in (Rounding.STOCHASTIC, Rounding.STOCHASTIC_EQUAL)


MODES = tuple(Rounding)
"""The modes in the order of their numbers in the library."""

_NEVER_BEYOND = (Rounding.TOWARD_ZERO, Rounding.TO_ODD)
_LEAST_SHIFT = -60
"""Numbers below this power of two of a step are all rounded alike."""


@dataclass(frozen=True)
class Lattice:
    """The numbers of a format, as rounding needs them.

    Attributes:
        digits: bits after the first one of a number.
        least_exponent: numbers below ``2 ** least_exponent`` have the step of those at it.
        low: the least number.
        high: the greatest.
        beyond: the magnitude of what has overflowed: infinity, or NaN; None where the range saturates.
        flushes: whether numbers below ``2 ** least_exponent`` become zero.
    """

    digits: int
    least_exponent: int
    low: float
    high: float
    beyond: float | None = None
    flushes: bool = False

    def limits(self, rounding: Rounding) -> tuple[float, ...]:
        """``low``, ``high``, what numbers beyond them become, and what the infinities become."""
        least, most = (self.low, self.high) if self.beyond is None else (-self.beyond, self.beyond)
        below = self.low if rounding in (*_NEVER_BEYOND, Rounding.UP) else least
        above = self.high if rounding in (*_NEVER_BEYOND, Rounding.DOWN) else most
        return self.low, self.high, below, above, least, most


@dataclass(frozen=True)
class Minifloat:
    """A binary floating-point format: a sign, and these bits.

    Attributes:
        exponent_bits: 2 to 8.
        significand_bits: stored ones, without the implicit first; 1 to 23.
        subnormals: whether there are numbers between zero and the smallest normal one. Without, those that would lie
            there become zero.
        saturates: whether what is too large becomes the largest number instead of infinity (or NaN, without that).
        top: what the format gives up for infinities and NaN: its greatest ``"exponent"``, as IEEE 754 does; its
            greatest ``"code"``, for one NaN; or ``"nothing"``: then it always saturates.
    """

    exponent_bits: int
    significand_bits: int
    subnormals: bool = True
    saturates: bool = False
    top: str = "exponent"

    def __post_init__(self) -> None:
        if not 2 <= self.exponent_bits <= 8 or not 1 <= self.significand_bits <= 23:
            raise ShapeError(
                f"no minifloat has {self.exponent_bits} bits of exponent and {self.significand_bits} of significand",
                hint="use 2 to 8 bits of exponent and 1 to 23 of significand",
            )
        if self.top not in ("exponent", "code", "nothing"):
            raise ShapeError(f"no minifloat gives up {self.top!r}", hint='choose "exponent", "code" or "nothing"')

    @property
    def largest(self) -> float:
        """The largest number."""
        bias = (1 << (self.exponent_bits - 1)) - 1
        exponent = bias if self.top == "exponent" else bias + 1
        step = 2.0**-self.significand_bits
        return 2.0**exponent * (2 - (2 * step if self.top == "code" else step))

    @property
    def lattice(self) -> Lattice:
        """Its numbers."""
        least, beyond = 2 - (1 << (self.exponent_bits - 1)), math.inf if self.top == "exponent" else math.nan
        stays = self.saturates or self.top == "nothing"
        return Lattice(
            self.significand_bits, least, -self.largest, self.largest, None if stays else beyond, not self.subnormals
        )


@dataclass(frozen=True)
class FixedPoint:
    """Multiples of ``2 ** -fraction_bits`` from ``-2 ** (integer_bits - 1)`` to below its opposite; it saturates.

    Attributes:
        integer_bits: those before the point, with the sign.
        fraction_bits: those after it; both together 2 to 23.
    """

    integer_bits: int
    fraction_bits: int

    def __post_init__(self) -> None:
        if self.integer_bits < 1 or self.fraction_bits < 0 or not 2 <= self.integer_bits + self.fraction_bits <= 23:
            raise ShapeError(
                f"no fixed-point format has {self.integer_bits} bits before the point and {self.fraction_bits} after",
                hint="use at least one before the point, and 2 to 23 together",
            )

    @property
    def lattice(self) -> Lattice:
        """Its numbers."""
        top, bits = 2.0 ** (self.integer_bits - 1), self.integer_bits + self.fraction_bits
        return Lattice(bits, self.integer_bits, -top, top - 2.0**-self.fraction_bits)


@dataclass(frozen=True)
class Integer:
    """Equal steps over the range of the numbers that are rounded; both ends are kept.

    Attributes:
        bits: 2 to 16.
        symmetric: as many steps below zero as above, over the largest magnitude. Otherwise from the least number (or
            zero) to the greatest, with an integer for zero.
        scale: the step, for symmetric formats; None to find it from the numbers.
    """

    bits: int
    symmetric: bool = True
    scale: float | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 16:
            raise ShapeError(f"an integer format has 2 to 16 bits, not {self.bits}", hint="for instance 8")
        if self.scale is not None and (self.scale <= 0 or not self.symmetric):
            raise ShapeError(f"{self.scale} cannot be the step", hint="give a positive one, to a symmetric format")

    def fit(self, numbers: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """The step, and the integer that zero becomes."""
        if self.scale is not None:
            return self.scale, 0.0
        tiny = torch.finfo(torch.float32).tiny
        if self.symmetric:
            return (numbers.abs().amax() / ((1 << (self.bits - 1)) - 1)).clamp(min=tiny), 0.0
        low, high = numbers.amin().clamp(max=0), numbers.amax().clamp(min=0)
        scale = ((high - low) / ((1 << self.bits) - 1)).clamp(min=tiny)
        return scale, (-low / scale).round()

    @property
    def lattice(self) -> Lattice:
        """The integers themselves."""
        half = float(1 << (self.bits - 1))
        low, high = (1 - half, half - 1) if self.symmetric else (0.0, 2 * half - 1)
        return Lattice(self.bits + 1, self.bits + 1, low, high)


NumberFormat = Minifloat | FixedPoint | Integer

FORMATS: Mapping[str, NumberFormat] = {
    "e4m3": Minifloat(4, 3, saturates=True, top="code"),
    "e5m2": Minifloat(5, 2),
    "e3m2": Minifloat(3, 2, top="nothing"),
    "e2m3": Minifloat(2, 3, top="nothing"),
    "e2m1": Minifloat(2, 1, top="nothing"),
    "q43": Minifloat(4, 3),
    "q52": Minifloat(5, 2),
    "bfloat16": Minifloat(8, 7),
    "float16": Minifloat(5, 10),
    "tf32": Minifloat(8, 10),
    "float32": Minifloat(8, 23),
}
"""Formats by name. ``e4m3`` to ``e2m1`` are those of the Open Compute Project; ``q43`` and ``q52`` are quarter
precision as Pychop has it, with the largest exponent given up."""

ALIASES: Mapping[str, str] = {
    **dict.fromkeys(("fp8-e4m3",), "q43"),
    **dict.fromkeys(("fp8-e5m2",), "q52"),
    **dict.fromkeys(("b", "bf16"), "bfloat16"),
    **dict.fromkeys(("h", "half", "fp16"), "float16"),
    **dict.fromkeys(("t",), "tf32"),
    **dict.fromkeys(("s", "single", "fp32"), "float32"),
}
"""Pychop's other names for them."""


def format_named(name: str) -> NumberFormat:
    """The format of a name.

    Args:
        name: of ``FORMATS`` or ``ALIASES``, or any other minifloat such as ``"e5m4"`` (by the rules of IEEE 754),
            fixed point such as ``"fixed4.4"`` (bits before and after the point), or ``"int8"`` or ``"uint8"``
            (integers over the range of the numbers, symmetric or not).

    Raises:
        ShapeError: when there is none.
    """
    known = FORMATS.get(ALIASES.get(name, name))
    if known is not None:
        return known
    if found := re.fullmatch(r"e(\d+)m(\d+)", name):
        return Minifloat(int(found[1]), int(found[2]))
    if found := re.fullmatch(r"fixed(\d+)\.(\d+)", name):
        return FixedPoint(int(found[1]), int(found[2]))
    if found := re.fullmatch(r"(u?)int(\d+)", name):
        return Integer(int(found[2]), symmetric=not found[1])
    raise ShapeError(
        f"there is no number format called {name!r}",
        hint=f"there are {', '.join(FORMATS)}, and any such as e5m4, fixed4.4, int8 or uint8",
    )


def round_to(
    numbers: Tensor,
    format: NumberFormat,
    rounding: Rounding | str = Rounding.NEAREST,
    *,
    seed: int | None = None,
    stream: int = 0,
) -> Tensor:
    """Numbers rounded to those of a format, each once.

    NaN stays NaN, and zeros keep their signs. The gradient passes straight through where nothing was clipped. In
    bfloat16 and float16 rounding is computed in float32, and the result is put into the dtype: what the dtype cannot
    hold (say float16's largest number, in bfloat16) becomes its nearest.

    Args:
        numbers: float of any shape and device.
        format: to round to.
        rounding: how.
        seed: of random rounding.
        stream: a number for each tensor that is rounded with the same seed. What is drawn depends on both and on the
            place in the tensor only, and not on the device.

    Returns:
        The shape and dtype of ``numbers``.

    Raises:
        ShapeError: when random rounding has no seed, there is no such rounding, or the numbers are not floats.
    """
    if rounding not in MODES or not numbers.is_floating_point():
        raise ShapeError(
            f"{numbers.dtype} is not rounded {str(rounding)!r}", hint=f"give floats, and one of {', '.join(MODES)}"
        )
    mode = Rounding(rounding)
    if mode.random and seed is None:
        raise ShapeError(f"{mode} rounding needs a seed", hint="for instance seed=0")
    if not isinstance(format, Integer):
        return _on(numbers, format.lattice, mode, seed or 0, stream)
    wide = numbers if numbers.dtype is torch.float64 else numbers.float()
    scale, zero = format.fit(wide.detach())
    rounded = _on(wide / scale + zero, format.lattice, mode, seed or 0, stream)
    return ((rounded - zero) * scale).to(numbers.dtype)


def _on(numbers: Tensor, lattice: Lattice, rounding: Rounding, seed: int, stream: int) -> Tensor:
    through = torch.is_grad_enabled() and numbers.requires_grad
    rounded: Tensor = (_Through.apply if through else _rounded)(numbers, lattice, rounding, seed, stream)
    return rounded


class _Through(torch.autograd.Function):
    """Rounding whose gradient is that of clipping."""

    @staticmethod
    def forward(ctx: Any, numbers: Tensor, lattice: Lattice, *how: Any) -> Tensor:
        ctx.save_for_backward(numbers)
        ctx.lattice = lattice
        return _rounded(numbers, lattice, *how)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (numbers,) = ctx.saved_tensors
        inside = (numbers >= ctx.lattice.low) & (numbers <= ctx.lattice.high)
        return gradients[0] * inside, None, None, None, None


def _rounded(numbers: Tensor, lattice: Lattice, rounding: Rounding, seed: int, stream: int) -> Tensor:
    """As compiled where that serves; the operation takes numbers that lie one after the other."""
    if numbers.dtype not in native.DTYPES or not native.serves(numbers):
        return round_definition(numbers, lattice, rounding, seed, stream)
    settings = [lattice.digits, lattice.least_exponent, int(lattice.flushes), MODES.index(rounding)]
    # As signed integers of 64 bits.
    draw = [(number + (1 << 63)) % (1 << 64) - (1 << 63) for number in (seed, stream)]
    rounded: Tensor = torch.ops.pintpot.round_to(numbers, settings, [*lattice.limits(rounding)], draw)
    return rounded


def round_definition(numbers: Tensor, lattice: Lattice, rounding: Rounding, seed: int = 0, stream: int = 0) -> Tensor:
    """What rounding to a lattice is, in plain torch; exact in float32 and float64."""
    wide = numbers if numbers.dtype is torch.float64 else numbers.float()
    size = wide.abs()
    low, high, below, above, least, most = lattice.limits(rounding)
    fraction, exponent = torch.frexp(size)
    place = (exponent - 1).clamp(min=lattice.least_exponent) - lattice.digits
    shift = (exponent - place).clamp(min=_LEAST_SHIFT)
    steps = fraction * _power_of_two(shift, wide.dtype)
    whole = steps.floor()
    whole = whole + _goes_up(wide, whole, steps - whole, rounding, (seed, stream)).to(whole.dtype)
    rounded = _scaled(whole, place)
    if lattice.flushes:
        rounded = rounded.masked_fill(size < 2.0**lattice.least_exponent, 0.0)
    rounded = rounded.copysign(wide)
    rounded = rounded.masked_fill(rounded > high, above).masked_fill(rounded < low, below)
    rounded = rounded.masked_fill(wide == math.inf, most).masked_fill(wide == -math.inf, least)
    return torch.where(wide.isnan(), wide, rounded).to(numbers.dtype)


def _goes_up(wide: Tensor, whole: Tensor, rest: Tensor, rounding: Rounding, draw: tuple[int, int]) -> Tensor:
    """Whether magnitudes that are ``whole + rest`` steps become one step more than ``whole``."""
    if rounding.random:
        chance = (random_words(wide.numel(), *draw, wide.device) >> 8).view(wide.shape)
        up = chance < rest * 2**24 if rounding is Rounding.STOCHASTIC else (chance < 1 << 23) & (rest > 0)
        return up
    even = whole == 2 * (whole / 2).floor()
    return {
        Rounding.NEAREST: lambda: (rest > 0.5) | ((rest == 0.5) & ~even),
        Rounding.UP: lambda: (rest > 0) & (wide > 0),
        Rounding.DOWN: lambda: (rest > 0) & (wide < 0),
        Rounding.TOWARD_ZERO: lambda: torch.zeros_like(even),
        Rounding.TIES_TO_ZERO: lambda: rest > 0.5,
        Rounding.TIES_AWAY: lambda: rest >= 0.5,
        Rounding.TO_ODD: lambda: (rest > 0) & even,
    }[rounding]()


def _power_of_two(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """``2 ** exponent`` for int32 exponents of normal numbers, made from bits: exact on every device."""
    if dtype is torch.float64:
        return ((exponent.long() + 1023) << 52).view(torch.float64)
    return ((exponent + 127) << 23).view(torch.float32)


def _scaled(numbers: Tensor, exponent: Tensor) -> Tensor:
    """``numbers * 2 ** exponent``, in two factors where one would be subnormal."""
    # The exponents of infinities and NaN are anything; what is made of them is replaced.
    bias = 1023 if numbers.dtype is torch.float64 else 127
    first = exponent.clamp(1 - bias, bias)
    second = (exponent - first).clamp(1 - bias, bias)
    return numbers * _power_of_two(first, numbers.dtype) * _power_of_two(second, numbers.dtype)
