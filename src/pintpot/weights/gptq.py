"""GPTQ: round column by column, and let the columns not yet rounded make up for each error.

Source:    Frantar et al. 2022, "GPTQ", arXiv:2210.17323, algorithm 1.
Differs:   scales are stored in 16 bits and used as stored; a factorisation that fails is tried again with more damping.
           `clip`, off as in the paper, is the authors' `mse`, with errors weighted by the inputs' mean squares.
Saves:     weights, real: as rtn, O * (packed_size(I) + 2 N + packed_size(N)) bytes a matrix. Finding the codes needs
           one block, the inputs' second moments (4 I^2 bytes a layer), and two copies of the largest.
Shapes:    weight (O, I); H (I, I); codes (O, I) packed; scale and zero (O, N).
Composes:  caches, activations, adapters on the frozen base; not with anything that needs dense weights.
Use when:  4 or 3 bits: near the dense model after minutes of work on a few texts.
Not when:  8 to 5 bits, where rounding to nearest loses nothing either; 2 bits, where codebooks lose less.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Claim, Source, technique
from pintpot.core.workload import Workload
from pintpot.weights._base import WeightMethod, risk_between
from pintpot.weights.compensation import compensate_, inverse_factor
from pintpot.weights.formats import Format, Grid, Tensors
from pintpot.weights.ranges import best_ranges, searching_bytes
from pintpot.weights.statistics import InputStatistics

RISES = (
    (8.27, 0.0002),
    (5.27, 0.0055),
    (4.38, 0.0148),
    (4.23, 0.0153),
    (3.64, 0.054),
    (3.38, 0.075),
    (2.6, 0.54),
    (2.33, 0.89),
)
"""Bits a weight and the relative rise of perplexity, of the embedded model in `results/weights.csv`."""

CLIPPED_RISES = (
    (4.65, 0.0064),
    (4.38, 0.0127),
    (4.23, 0.0157),
    (3.64, 0.05),
    (3.38, 0.066),
    (3.27, 0.076),
    (2.6, 0.46),
    (2.33, 0.58),
    (2.22, 0.66),
)
"""The same where ranges are searched."""

MOST_CLIPPED_BITS = 4
"""Width of codes up to which searched ranges are offered."""


@technique(
    name="gptq",
    wing="weights",
    source=Source(
        "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022, "2210.17323"
    ),
    accounts=[Account.WEIGHTS],
    jobs=["generate", "finetune", "compress"],
    removes=["dense_weights", "matrix_gradients"],
    claims=[
        Claim("WikiText2 perplexity", 8.37, versus="8.34 dense", at="OPT-175B, 4 bits, whole rows", where="table 4"),
        Claim("WikiText2 perplexity", 8.68, versus="8.34 dense", at="OPT-175B, 3 bits, whole rows", where="table 4"),
    ],
)
@dataclass(frozen=True, kw_only=True)
class GPTQ(WeightMethod):
    """Rounding with second-order compensation.

    Attributes:
        bits: width of a code, 2 to 8.
        group_size: in-features that share a scale; -1 for a whole row.
        symmetric: fix the zero in the middle and do not store it.
        activation_order: round the columns with the largest inputs first.
        static_groups: fix the scales of all groups before the first column is rounded; needed for an activation order,
            because a group's columns are then rounded at different times.
        clip: search the range of each group for the least error, each input weighted by its mean square, instead of
            reaching from its smallest to its largest number.
        damping: share of the mean diagonal of H that is added to it.
    """

    calibrated: ClassVar[bool] = True
    bits: int = 4
    group_size: int = 128
    symmetric: bool = False
    activation_order: bool = True
    static_groups: bool = True
    clip: bool = False
    damping: float = 0.01

    def __post_init__(self) -> None:
        Grid(bits=self.bits, group_size=self.group_size)

    def terms(self, name: str, out_features: int, in_features: int, dtype: torch.dtype) -> tuple[Format, ...]:
        """One grid, as rtn's."""
        scale = "bfloat16" if dtype is torch.bfloat16 else "float16"
        return (Grid(bits=self.bits, group_size=self.group_size, symmetric=self.symmetric, scale_dtype=scale),)

    def find(
        self, name: str, weight: Tensor, formats: tuple[Format, ...], inputs: InputStatistics | None = None
    ) -> tuple[Tensors, ...]:
        """The codes by algorithm 1; to the nearest where nothing is known of the inputs."""
        grid = formats[0]
        if inputs is None or not isinstance(grid, Grid):
            return super().find(name, weight, formats)
        return (self.round(weight.float(), grid, inputs.hessian),)

    def round(self, weight: Tensor, grid: Grid, hessian: Tensor) -> Tensors:
        """The stored tensors of a weight (O, I), float32, for second moments (I, I) of its inputs."""
        columns, size = weight.shape[1], grid.group(weight.shape[1])
        order = torch.arange(columns, device=weight.device)
        static = self.static_groups or self.activation_order
        if self.activation_order:
            order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
        weight = torch.where(hessian.diagonal() == 0, 0.0, weight)
        moments = hessian.diagonal()
        scale, zero = self._fit(weight, grid, moments)
        codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
        one = Grid(bits=grid.bits, group_size=-1, symmetric=grid.symmetric, scale_dtype=grid.scale_dtype)

        def round_columns(column: slice, numbers: Tensor) -> Tensor:
            place = int(order[column.start])
            group = place // size
            if not static and place % size == 0:
                # Columns of the group that were reached by compensation already, as they are now.
                own = slice(place, place + size)
                fitted = self._fit(current[:, own], one, moments[own])
                scale[:, group : group + 1], zero[:, group : group + 1] = fitted
            at = slice(group, group + 1)
            codes[:, place : place + 1] = code = one.round(numbers, scale[:, at], zero[:, at])
            return one.value(code, scale[:, at], zero[:, at])

        current = weight[:, order]
        factor = inverse_factor(hessian, self.damping, order)
        compensate_(current, factor, round_columns)
        return grid.store(codes, scale, zero)

    def _fit(self, weight: Tensor, grid: Grid, moments: Tensor) -> tuple[Tensor, Tensor]:
        return grid.settle(*best_ranges(weight, grid, moments)) if self.clip else grid.fit(weight)

    def finding_bytes(self, out_features: int, in_features: int, dtype: torch.dtype) -> int:
        """The weight three times in 32 bits and its codes; the Hessian, its factor, and another one's room."""
        group = Grid(group_size=self.group_size).group(in_features)
        searching = searching_bytes(out_features, in_features, group) if self.clip else 0
        return max(13 * out_features * in_features + 12 * in_features**2, 9 * out_features * in_features + searching)

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """From bits a weight; large models lose less than the small one that it was measured on."""
        return rise(self.bits_a_weight(shape), self.clip)

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[GPTQ]:
        """From the safest to the smallest; with few bits ranges are worth their search."""
        for bits, group_size in ((8, 128), (5, 128), (4, 64), (4, 128), (3, 32), (3, 64), (2, 32)):
            yield cls(bits=bits, group_size=group_size, clip=bits <= MOST_CLIPPED_BITS)


def rise(bits: float, clip: bool) -> float:
    """The relative rise of perplexity that is reckoned with at so many bits a weight."""
    return risk_between(CLIPPED_RISES if clip else RISES, bits)
