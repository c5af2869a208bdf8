"""DenseShift: weights are signed powers of two and never zero, and every bit of them is trained by itself.

Source:    Li et al. 2022, "DenseShift", arXiv:2208.09708 (ICCV 2023): the zero-free levels and the sign-scale
           decomposition; the recursion and its gradient as in the authors' code for 3 bits, for any width.
Differs:   a group's powers of two have a common factor, trained too, which the authors leave to the batch
           normalisation after each convolution; training starts from signs and shifts that come nearest to the dense
           weight, with latent numbers that say how near, instead of from random latent numbers of small variance;
           products are made with ordinary multiplications.
Saves:     weights, real: O * (packed_size(I, 1 + shift_bits) + 2 N) bytes a matrix. Training holds 2^shift_bits latent
           numbers a weight, with gradients and moments.
Shapes:    weight (O, I); latent numbers (1 + levels, O, I); codes (O, I) packed; scale (O, N).
Composes:  caches, activations, adapters on the frozen base; not with anything that needs dense weights.
Use when:  hardware shifts instead of multiplying; 2 to 4 bits and text to train on.
Not when:  there is no time to train: half of the levels lie near zero, so that equal steps lose less at first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from pintpot.core.errors import CompositionError
from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Source, technique
from pintpot.core.workload import Workload
from pintpot.weights._base import risk_between
from pintpot.weights.formats import Format, LevelGrid, Tensors
from pintpot.weights.statistics import InputStatistics
from pintpot.weights.trained import StandIn, TrainedMethod

RISES = ((4.1, 0.048), (3.1, 0.12), (2.1, 1.41))
"""Bits a weight and the relative rise of perplexity, of the embedded model in `results/weights.csv` (300 steps)."""

SHARES = tuple(1 - i / 20 for i in range(15))
"""Of a group's largest magnitude: the factors that are tried."""

START = 0.05
"""Latent number of a weight twice as large as the limit between two levels, or of an average one for its sign: small,
as the authors' are, so that bits turn over soon where gradients agree, first of all those of doubtful weights."""

LIMIT = math.log2(1.5)
"""Of the shift, above a level: half way to the next power of 2."""


@technique(
    name="denseshift",
    wing="weights",
    source=Source("DenseShift: Towards Accurate and Transferable Low-Bit Shift Network", 2022, "2208.09708"),
    accounts=[Account.WEIGHTS],
    jobs=["compress"],
    removes=["dense_weights", "matrix_gradients"],
    fidelity="with a trained factor a group in the place of batch normalisation; starts from the dense weight",
)
@dataclass(frozen=True, kw_only=True)
class DenseShift(TrainedMethod):
    """Signs and shifts, trained.

    Attributes:
        shift_bits: bits of the power beside the sign, 1 to 3; the paper's networks of 2, 3 and 4 bits have 1, 2 and 3.
        group_size: in-features that share a factor; -1 for a whole row, as after a batch normalisation.
    """

    learning_rate: ClassVar[float] = 1e-4
    shift_bits: int = 2
    group_size: int = -1

    def __post_init__(self) -> None:
        if not 1 <= self.shift_bits <= 3:
            raise CompositionError(
                f"denseshift shifts by 1 to 3 bits, not {self.shift_bits}", hint="for instance denseshift(shift_bits=2)"
            )
        LevelGrid(group_size=self.group_size)

    def terms(self, name: str, out_features: int, in_features: int, dtype: torch.dtype) -> tuple[Format, ...]:
        """Codes of signed powers of two."""
        scale = "bfloat16" if dtype is torch.bfloat16 else "float16"
        return (LevelGrid(levels=f"pow{1 + self.shift_bits}", group_size=self.group_size, scale_dtype=scale),)

    def stand_in(
        self, name: str, weight: Tensor, formats: tuple[Format, ...], inputs: InputStatistics | None = None
    ) -> StandIn:
        """The nearest signs and shifts, to be trained."""
        layout = formats[0]
        if len(formats) != 1 or not isinstance(layout, LevelGrid) or not layout.levels.startswith("pow"):
            raise CompositionError(f"denseshift trains powers of two, not {formats}", hint="leave the layout to it")
        return Shifted(weight, layout)

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """From bits a weight; large models lose less than the small one that it was measured on."""
        return risk_between(RISES, self.bits_a_weight(shape))

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[DenseShift]:
        """From the safest to the smallest."""
        for shift_bits, group_size in ((3, 64), (3, -1), (2, 64), (2, -1), (1, 64), (1, -1)):
            yield cls(shift_bits=shift_bits, group_size=group_size)


class Shifted(StandIn):
    """Latent numbers (1 + levels, O, I): the first's sign is the weight's, the others' signs make the shift.

    With ``H`` the step function the shift is ``H(t_n) (1 + H(t_(n-1)) (1 + ...))``: how many of the last latent numbers
    in a row are positive.

    Args:
        weight: float (O, I).
        layout: signed powers of two.
    """

    def __init__(self, weight: Tensor, layout: LevelGrid) -> None:
        super().__init__()
        self.layout = layout
        self.levels = (1 << (layout.bits - 1)) - 1
        scale = best_factor(weight.float(), layout)
        shares = weight.float() / layout.by_column(scale, weight.shape[1])
        limits = torch.arange(self.levels, device=weight.device).flip(0)[:, None, None] + LIMIT
        above = (shares.abs().log2() + self.levels - limits).clamp(-1, 1)
        signs = shares / shares.abs().mean().clamp(min=torch.finfo(torch.float32).tiny)
        self.latent = nn.Parameter((torch.cat([signs.clamp(-1, 1)[None], above]) * START).to(weight.dtype))
        # A logarithm, so that no update makes a factor negative.
        self.log_scale = nn.Parameter(scale.log().to(weight.dtype))

    def scale(self) -> Tensor:
        """The factor of each group (O, N)."""
        return self.log_scale.exp()

    def shift(self) -> Tensor:
        """The power of each weight (O, I), 0 to ``levels``, with the gradient of the steps passed straight through."""
        shift: Tensor = _Step.apply(self.latent[1])
        for latent in self.latent[2:]:
            shift = (shift + 1) * _Step.apply(latent)
        return shift

    def weight(self) -> Tensor:
        """Signs times powers of two times the groups' factors."""
        shift = self.shift()
        sign = 2 * _Step.apply(self.latent[0]) - 1
        # The gradient is that of a gentler function of the shift, as in the authors' code: powers would let the largest
        # weights take all of it.
        gentle = sign * (shift + 1).sqrt()
        exact = (torch.exp2(shift) * sign - gentle).detach() + gentle
        return exact * self.layout.by_column(self.scale(), exact.shape[-1]) * 2.0**-self.levels

    @torch.no_grad()
    def terms(self, formats: tuple[Format, ...]) -> tuple[Tensors, ...]:
        """The codes of signs and shifts, and the factors."""
        scale = self.layout.settle(self.scale().float())
        sign = torch.where(self.latent[0] >= 0, 1.0, -1.0)
        numbers = torch.exp2(self.shift().float() - self.levels) * sign
        return (self.layout.store(self.layout.round(numbers, torch.ones_like(scale)), scale),)


def best_factor(weight: Tensor, layout: LevelGrid) -> Tensor:
    """The factor (O, N) of each group, of a few shares of its largest magnitude, with the least squared error."""
    largest = layout.fit(weight)
    best, least = largest, torch.full_like(largest, torch.inf)
    size, groups = layout.group(weight.shape[1]), largest.shape[1]
    for share in SHARES:
        scale = layout.settle(largest * share)
        error = (layout.value(layout.round(weight, scale), scale) - weight).square()
        error = functional.pad(error, (0, groups * size - weight.shape[1])).unflatten(1, (groups, size)).sum(-1)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


class _Step(torch.autograd.Function):
    """1 where a number is not negative, else 0; the gradient passes straight through."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor) -> Tensor:
        return (latent >= 0).to(latent.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]
