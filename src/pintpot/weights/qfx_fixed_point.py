"""QFX: weights and inputs in fixed point, whose binary points are learnt with everything else.

Source:    Dai et al. 2024, "Trainable Fixed-Point Quantization for Deep Learning Acceleration on FPGAs",
           arXiv:2401.17544: the cast ``overflow(round(x << f), bits) >> f`` with a trained ``f``, and words with few
           ones (K-hot) in the place of multipliers.
Differs:   weights and inputs of the matrices are in fixed point; normalisations, activations and sums of the residual
           stream stay in floating point, where the paper casts these too. Overflow saturates, as one of the paper's
           modes. The points start where the squared error of the weight is least, and where the first batch fits.
           Products are emulated with multiplications.
Saves:     weights, real: O * (packed_size(I, bits) + 2) + 4 bytes a matrix (the step is stored once a row). Training
           holds the dense model with gradients and moments.
Shapes:    weight (O, I); codes (O, I) packed; scale (O, 1), all equal; input_step (1,).
Composes:  caches, activations, adapters on the frozen base; not with anything that needs dense weights.
Use when:  the target computes in fixed point (FPGAs, microcontrollers): every scale is a shift.
Not when:  scales may be any number: one power of two for a whole matrix wastes up to a bit and all of its rows' ranges.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor, nn

from pintpot.core.errors import CompositionError
from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Source, technique
from pintpot.core.workload import Workload
from pintpot.weights._base import risk_between
from pintpot.weights.formats import Format, Grid, StaticInput, Tensors
from pintpot.weights.statistics import InputStatistics
from pintpot.weights.trained import StandIn, TrainedMethod, round_through

RISES = ((8.2, 0.002), (6.2, 0.015), (5.2, 0.035), (4.1, 0.075), (3.1, 0.785))
"""Bits a weight and the relative rise of perplexity: the last two of the embedded model, the others guesses."""

POINT_RATE = 100.0
"""How much faster than a weight a binary point moves: it is this times the number that is trained."""

LEAST_POINT, MOST_POINT = -15, 24
"""Binary points whose step a scale of 16 bits holds."""


@technique(
    name="qfx-fixed-point",
    wing="weights",
    source=Source("Trainable Fixed-Point Quantization for Deep Learning Acceleration on FPGAs", 2024, "2401.17544"),
    accounts=[Account.WEIGHTS],
    jobs=["compress"],
    removes=["dense_weights", "matrix_gradients"],
    fidelity="only weights and inputs of matrices are in fixed point, not the element-wise layers between them",
)
@dataclass(frozen=True, kw_only=True)
class QFX(TrainedMethod):
    """Fixed point with trained binary points.

    Attributes:
        bits: of a weight's word, 2 to 8, with its sign.
        input_bits: of an input's word, 2 to 16.
        most_ones: ones that the magnitude of a weight's word may have, so that a product is so many shifts; 0 for any
            number of them.
    """

    learning_rate: ClassVar[float] = 1e-4
    bits: int = 8
    input_bits: int = 8
    most_ones: int = 0

    def __post_init__(self) -> None:
        StaticInput(inner=Grid(bits=self.bits), bits=self.input_bits)
        if self.bits < 2 or self.most_ones < 0:
            raise CompositionError(
                "a word of fixed point has at least 2 bits, and no negative number of ones",
                hint="for instance qfx-fixed-point(bits=6, most_ones=2)",
            )

    def terms(self, name: str, out_features: int, in_features: int, dtype: torch.dtype) -> tuple[Format, ...]:
        """Signed words with one step, for inputs with one step."""
        scale = "bfloat16" if dtype is torch.bfloat16 else "float16"
        grid = Grid(bits=self.bits, group_size=-1, symmetric=True, scale_dtype=scale)
        return (StaticInput(inner=grid, bits=self.input_bits),)

    def stand_in(
        self, name: str, weight: Tensor, formats: tuple[Format, ...], inputs: InputStatistics | None = None
    ) -> StandIn:
        """The dense weight and its best binary point, to be trained."""
        layout = formats[0]
        if len(formats) != 1 or not isinstance(layout, StaticInput) or not isinstance(layout.inner, Grid):
            raise CompositionError(f"qfx-fixed-point trains fixed point, not {formats}", hint="leave the layout to it")
        return FixedPoint(weight, layout, self.most_ones)

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """From bits a weight; large models lose less than the small one that it was measured on."""
        return risk_between(RISES, self.bits_a_weight(shape))

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[QFX]:
        """From the safest to the smallest."""
        for bits in (8, 6, 5, 4):
            yield cls(bits=bits)


class FixedPoint(StandIn):
    """A weight and two binary points.

    Args:
        weight: float (O, I).
        layout: words of fixed point, for inputs in fixed point.
        most_ones: in the magnitude of a word; 0 for any number.
    """

    def __init__(self, weight: Tensor, layout: StaticInput, most_ones: int = 0) -> None:
        super().__init__()
        assert isinstance(layout.inner, Grid)
        self.bits, self.input_bits, self.most_ones, self.grid = layout.inner.bits, layout.bits, most_ones, layout.inner
        self.dense = nn.Parameter(weight.clone())
        tried = (point_for(weight, self.bits) + torch.arange(3, device=weight.device)).clamp(max=MOST_POINT)
        error = torch.stack([(self._cast(weight, point) - weight).float().square().sum() for point in tried])
        self.point = nn.Parameter(tried.gather(0, error.argmin().view(1)) / POINT_RATE)
        # Nothing is known of the input yet: NaN leaves it as it is.
        self.input_point = nn.Parameter(torch.full_like(self.point.detach(), math.nan))

    def _cast(self, weight: Tensor, point: Tensor) -> Tensor:
        return cast(weight, point, self.bits, self.most_ones)

    def weight(self) -> Tensor:
        """The weight in fixed point."""
        return self._cast(self.dense, self.point * POINT_RATE)

    def input(self, input: Tensor) -> Tensor:
        """The input in fixed point, with a binary point that fits the first batch and is trained from then on."""
        if self.training and self.input_point.isnan():
            with torch.no_grad():
                self.input_point.copy_(point_for(input, self.input_bits) / POINT_RATE)
        if self.input_point.isnan():
            return input
        return cast(input, self.input_point * POINT_RATE, self.input_bits).to(input.dtype)

    @torch.no_grad()
    def terms(self, formats: tuple[Format, ...]) -> tuple[Tensors, ...]:
        """The words, and the steps of weight and input."""
        layout = formats[0]
        assert isinstance(layout, StaticInput)
        scale = self.dense.new_full((self.dense.shape[0], 1), 1.0).float() * step_of(self.point * POINT_RATE)
        zero = torch.full_like(scale, 1 << (self.bits - 1))
        grid = self.grid.store(self.grid.round(self.weight().float(), scale, zero), scale, zero)
        step = step_of(self.input_point * POINT_RATE).nan_to_num(0.0)
        return (layout.encode_with(grid, step),)


def point_for(numbers: Tensor, bits: int) -> Tensor:
    """The most fractional bits with which the largest of some numbers does not overflow, float32 (1,)."""
    largest = numbers.detach().abs().amax().float().view(1)
    return (((1 << (bits - 1)) - 1) / largest).log2().floor().clamp(LEAST_POINT, MOST_POINT)


def step_of(point: Tensor) -> Tensor:
    """The step of a binary point (rounded to an integer), float32; differentiable in it."""
    return torch.exp2(-round_through(point.clamp(LEAST_POINT, MOST_POINT)))


def cast(numbers: Tensor, point: Tensor, bits: int, most_ones: int = 0) -> Tensor:
    """Numbers as signed words of so many bits, ``point`` of them fractional; overflow saturates.

    Differentiable in the numbers that do not overflow, and in the point.
    """
    half = 1 << (bits - 1)
    step = step_of(point).to(numbers.device)
    codes = (numbers.float() / step).clamp(-half, half - 1)
    words = round_through(codes)
    if most_ones:
        words = (nearest_word(words.detach(), codes.detach(), bits, most_ones) - words).detach() + words
    return (words * step).to(numbers.dtype)


def nearest_word(words: Tensor, codes: Tensor, bits: int, most_ones: int) -> Tensor:
    """The nearest integers to ``codes`` whose magnitude has at most so many ones; ``words`` gives the dtype."""
    table = torch.tensor(words_with(bits, most_ones), device=codes.device)
    middles = (table[1:] + table[:-1]) / 2
    return table[torch.bucketize(codes.abs(), middles)].to(words.dtype).copysign(codes)


@lru_cache
def words_with(bits: int, most_ones: int) -> tuple[float, ...]:
    """All magnitudes of signed words of so many bits with at most so many ones, rising."""
    return tuple(float(n) for n in range(1 << (bits - 1)) if n.bit_count() <= most_ones)
