"""Minifloat PTQ: weights as floats (or integers) of 3 to 8 bits, equalised, rounded by learning, biases corrected.

Source:    Aggarwal et al. 2023, "Post-Training Quantization with Low-precision Minifloats and Integers on FPGAs",
           arXiv:2311.12359, which applies to minifloats what was made for integers: weight equalisation and bias
           correction (Nagel et al. 2019, arXiv:1906.04721) and learned rounding (Nagel et al. 2020, arXiv:2004.10568).
Differs:   weights only: activations stay as they are. Equalising scales are kept beside each weight instead of being
           folded into the layer before it, whose ranges are taken as equal. Rounding is learned on the second moments
           of a layer's inputs, in fewer and larger steps, and a row keeps it only where its output error fell.
Saves:     weights, real: O * (packed_size(I) + 2 N) + 2 I bytes a matrix. Rounding needs a block, 4 I^2 bytes a layer,
           and about eight times the largest matrix in 32 bits.
Shapes:    weight (O, I); codes (O, I) packed; scale (O, N); input scales (I,); bias (O,).
Composes:  caches, activations, adapters on the frozen base; not with anything that needs dense weights.
Use when:  weights have long tails that a uniform grid spends its codes on, or the hardware multiplies small floats.
Not when:  8 bits are allowed, or groups are small: integers with zeros then lose as little.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pintpot.core.errors import CompositionError
from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Source, technique
from pintpot.core.workload import Workload
from pintpot.weights._base import WeightMethod, risk_between
from pintpot.weights.formats import Format, LevelGrid, Scaled, Tensors
from pintpot.weights.formats._base import prefixed
from pintpot.weights.formats.grouped import SCALE_DTYPES
from pintpot.weights.statistics import InputStatistics

RISES = ((8.17, 0.0003), (6.17, 0.0004), (5.17, 0.0068), (4.59, 0.0245), (4.17, 0.031), (3.17, 0.21))
"""Bits a weight and the relative rise of perplexity, of the embedded model in `results/weights.csv`."""

LOW, HIGH = -0.1, 1.1
"""The sigmoid of a rounding is stretched to these ends and cut to 0 and 1 (Nagel et al. 2020)."""
WARM_UP = 0.2
"""Share of the steps before roundings are pressed towards 0 and 1."""
PRESSURE = 10.0
"""Weight of the term that presses them, for errors that are 1 on average at the start."""
EXPONENTS = (20.0, 2.0)
"""Of that term, at the start and at the end."""


@technique(
    name="minifloat-ptq",
    wing="weights",
    source=Source("Post-Training Quantization with Low-precision Minifloats and Integers on FPGAs", 2023, "2311.12359"),
    accounts=[Account.WEIGHTS],
    jobs=["generate", "finetune", "compress"],
    removes=["dense_weights", "matrix_gradients"],
    fidelity="weights only; equalising scales kept beside each weight; rounding learned on second moments",
)
@dataclass(frozen=True, kw_only=True)
class MinifloatPTQ(WeightMethod):
    """Small floats, rounded by learning.

    Attributes:
        levels: a minifloat by its bits of exponent and mantissa, such as ``"e2m1"``, or integers, such as ``"int4"``.
        group_size: in-features that share a scale; -1 for a whole row.
        equalise: divide each input channel by the root of its range before rounding.
        correct_bias: take the mean error of each output out of the layer's bias, where it has one.
        iterations: steps of learning how to round; 0 for rounding to nearest.
        learning_rate: of these steps.
    """

    calibrated: ClassVar[bool] = True
    levels: str = "e2m1"
    group_size: int = -1
    equalise: bool = True
    correct_bias: bool = True
    iterations: int = 200
    learning_rate: float = 0.03

    def __post_init__(self) -> None:
        LevelGrid(levels=self.levels, group_size=self.group_size)
        if self.iterations < 0:
            raise CompositionError(f"{self.iterations} iterations cannot be made", hint="0 rounds to nearest")

    @property
    def corrects_bias(self) -> bool:  # type: ignore[override]
        """As the setting says."""
        return self.correct_bias

    def terms(self, name: str, out_features: int, in_features: int, dtype: torch.dtype) -> tuple[Format, ...]:
        """A grid of levels, of the scaled weight where it is equalised."""
        scale = "bfloat16" if dtype is torch.bfloat16 else "float16"
        grid = LevelGrid(levels=self.levels, group_size=self.group_size, scale_dtype=scale)
        return (Scaled(inner=grid, scale_dtype=scale) if self.equalise else grid,)

    def find(
        self, name: str, weight: Tensor, formats: tuple[Format, ...], inputs: InputStatistics | None = None
    ) -> tuple[Tensors, ...]:
        """Equalising scales, and the codes of learned rounding; to nearest where nothing is known of the inputs."""
        (layout,) = formats
        scaled = layout.inner if isinstance(layout, Scaled) else layout
        if not isinstance(scaled, LevelGrid):
            return super().find(name, weight, formats)
        dense, moments = weight.float(), None if inputs is None else inputs.hessian
        more: Tensors = {}
        if isinstance(layout, Scaled):
            more = {"input_scale": equalising(dense).to(SCALE_DTYPES[layout.scale_dtype])}
            factor = more["input_scale"].float()
            dense, moments = dense / factor, None if moments is None else moments * factor[:, None] * factor
        scale = scaled.fit(dense)
        codes = scaled.round(dense, scale)
        if moments is not None and self.iterations:
            codes = self.learned(dense, scaled, scale, moments)
        stored = scaled.store(codes, scale)
        return ({**prefixed("inner_", stored), **more} if more else stored,)

    def learned(self, weight: Tensor, grid: LevelGrid, scale: Tensor, moments: Tensor) -> Tensor:
        """Which of its two neighbours in the table each number becomes, by gradient descent on the output error.

        Args:
            weight: float32 (O, I).
            grid: the table and the groups.
            scale: of the groups (O, N).
            moments: mean of ``x x^T`` (I, I).

        Returns:
            codes uint8 (O, I); of rows whose error did not fall, those of the nearest.
        """
        table, steps = grid.table(weight.device), grid.by_column(scale, weight.shape[1])
        nearest = grid.round(weight, scale)
        lower = (torch.bucketize((weight / steps).contiguous(), table, right=True) - 1).clamp_(0, len(table) - 2)
        base, gap = table[lower] * steps, (table[lower + 1] - table[lower]) * steps
        share = ((weight - base) / gap).clamp_(0, 1)
        first = row_errors(grid.value(nearest, scale) - weight, moments)
        slope = 2 * share.numel() / float(first.sum()) if float(first.sum()) > 0 else 0.0
        # The stretched sigmoid of the start is the share itself.
        variable = torch.logit((share - LOW) / (HIGH - LOW))
        optimizer = torch.optim.Adam([variable], lr=self.learning_rate)
        for step in range(self.iterations):
            sigmoid = torch.sigmoid(variable)
            up = (sigmoid * (HIGH - LOW) + LOW).clamp_(0, 1)
            gradient = ((base + up * gap - weight) @ moments).mul_(gap).mul_(slope)
            done = step / self.iterations
            if done >= WARM_UP:
                gradient += _pressure(up, (done - WARM_UP) / (1 - WARM_UP))
            inside = (up > 0) & (up < 1)
            variable.grad = gradient * (HIGH - LOW) * sigmoid * (1 - sigmoid) * inside
            optimizer.step()
        codes = (lower + (variable > 0)).to(torch.uint8)
        better = row_errors(grid.value(codes, scale) - weight, moments) < first
        return torch.where(better[:, None], codes, nearest)

    def finding_bytes(self, out_features: int, in_features: int, dtype: torch.dtype) -> int:
        """Eighteen matrices like the weight in 32 bits while rounding is learned, and the equalised second moments."""
        return 72 * out_features * in_features + 4 * in_features**2

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """From bits a weight; large models lose less than the small one that it was measured on."""
        return risk_between(RISES, self.bits_a_weight(shape))

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[MinifloatPTQ]:
        """From the safest to the smallest."""
        for levels, group_size in (("e4m3", -1), ("e2m3", -1), ("e2m2", -1), ("e2m1", 32), ("e2m1", -1), ("e2m0", -1)):
            yield cls(levels=levels, group_size=group_size)


def equalising(weight: Tensor) -> Tensor:
    """Scales (I,) of input channels, the roots of their ranges, around 1; 1 for channels of zeros."""
    ranges = weight.abs().amax(0)
    ranges = torch.where(ranges > 0, ranges, 1.0)
    roots = ranges.sqrt()
    return roots / (roots.max() * roots.min()).sqrt()


def row_errors(difference: Tensor, moments: Tensor) -> Tensor:
    """Mean squared error of each output (O,) for differences of weights (O, I) and moments of inputs (I, I)."""
    return ((difference @ moments) * difference).sum(-1)


def _pressure(up: Tensor, done: float) -> Tensor:
    """The gradient of ``PRESSURE * (1 - |2 up - 1| ** exponent)``."""
    start, end = EXPONENTS
    exponent = start + (end - start) * done
    away = 2 * up - 1
    return away.abs().pow(exponent - 1).mul_(-2 * PRESSURE * exponent).mul_(away.sign())
