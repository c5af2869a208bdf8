"""LoRC: round to nearest, and hold the leading directions of the rounding error beside it.

Source:    Yao et al. 2023, "ZeroQuant-V2", arXiv:2303.08302, the section on low-rank compensation: the SVD of the error
           ``W - Q(W)``, cut to a small rank, its singular values split evenly over two factors, which are rounded to 8
           bits.
Differs:   on top of round-to-nearest in groups only; the authors put it on their ZeroQuant variants and on GPTQ too,
           and add 8-bit activations. The rank is at most an eighth of a matrix's smaller side, which binds below 64.
Saves:     weights, real: rtn's bytes, and R * (O + I) more with 2 (O + R) for scales. Applying it needs one dense
           matrix, its error and the error's singular vectors at a time.
Shapes:    weight (O, I); codes (O, I) packed; factors (O, R) and (R, I) in 8 bits.
Composes:  caches, activations, adapters on the frozen base; not with anything that needs dense weights.
Use when:  4 or 3 bits in large groups, on matrices so large that a few directions cost next to nothing.
Not when:  hidden sizes of a few hundred: the factors' bytes buy more as smaller groups.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from pintpot.core.errors import ShapeError
from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Source, technique
from pintpot.core.workload import Workload
from pintpot.weights._base import WeightMethod, risk_between
from pintpot.weights.formats import Format, Grid, LowRank

RISES = ((9.0, 0.0002), (6.0, 0.009), (5.0, 0.028), (4.1, 0.13), (4.0, 0.17), (3.1, 2.6), (3.0, 2.9))
"""Bits a weight and the relative rise of perplexity, of the embedded model in `results/weights.csv`."""

LARGEST_SHARE = 8
"""The rank is at most the smaller side divided by this."""


@technique(
    name="zeroquant-v2-lorc",
    wing="weights",
    source=Source(
        "ZeroQuant-V2: Exploring Post-training Quantization in LLMs from Comprehensive Study to Low Rank Compensation",
        2023,
        arxiv="2303.08302",
    ),
    accounts=[Account.WEIGHTS],
    jobs=["generate", "finetune", "compress"],
    removes=["dense_weights", "matrix_gradients"],
    fidelity="on round-to-nearest only; weights only",
)
@dataclass(frozen=True, kw_only=True)
class ZeroQuantV2LoRC(WeightMethod):
    """A grid and a low-rank error.

    Attributes:
        bits: width of a code, 2 to 8.
        group_size: in-features that share a scale; -1 for a whole row.
        rank: directions of the error that are kept.
        factor_bits: width of a number of the factors.
    """

    bits: int = 4
    group_size: int = 128
    rank: int = 8
    factor_bits: int = 8

    def __post_init__(self) -> None:
        Grid(bits=self.bits, group_size=self.group_size)
        Grid(bits=self.factor_bits)
        if self.rank < 1:
            raise ShapeError(f"the error needs a rank of 1 or more, not {self.rank}", hint="for instance rank=8")

    def terms(self, name: str, out_features: int, in_features: int, dtype: torch.dtype) -> tuple[Format, ...]:
        """A grid, and the error that it leaves."""
        scale = "bfloat16" if dtype is torch.bfloat16 else "float16"
        rank = max(1, min(self.rank, min(out_features, in_features) // LARGEST_SHARE))
        factor = Grid(bits=self.factor_bits, group_size=-1, symmetric=True, scale_dtype=scale)
        grid = Grid(bits=self.bits, group_size=self.group_size, scale_dtype=scale)
        return (grid, LowRank(rank=rank, factor=factor))

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """From bits a weight; large models lose less than the small one that it was measured on."""
        return risk_between(RISES, self.bits_a_weight(shape))

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[ZeroQuantV2LoRC]:
        """From the safest to the smallest."""
        for bits, group_size in ((8, 128), (5, 128), (4, 64), (4, 128), (3, 64), (3, 128), (2, 64)):
            yield cls(bits=bits, group_size=group_size)
