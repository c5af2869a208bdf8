"""RTN: round each weight to the nearest point of a uniform grid over its group.

Source:    the round-to-nearest baseline of Frantar et al. 2022, "GPTQ", arXiv:2210.17323, sec. 5; the grid with scale
           and zero is that of Dettmers et al. 2022, "LLM.int8()", arXiv:2208.07339, sec. 2.1.
Differs:   nothing known; group_size=-1 is the per-row grid of the baseline.
Saves:     weights, real: O * (packed_size(I) + 2 N + packed_size(N)) bytes a matrix with N = ceil(I / group_size).
           Products need at most 16 MiB more workspace. Applying it needs one dense matrix at a time.
Shapes:    weight (O, I); codes (O, I) packed; scale (O, N); zero (O, N) packed.
Composes:  caches, activations, adapters on the frozen base; not with anything that needs dense weights.
Use when:  8 to 5 bits, or 4 bits in small groups: no calibration data, seconds a layer.
Not when:  3 bits or fewer matter: methods with calibration lose far less.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from pintpot.core.errors import CompositionError
from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Claim, Source, technique
from pintpot.core.workload import Workload
from pintpot.weights._base import WeightMethod
from pintpot.weights.formats import Format, Grid

RISK = {8: 0.0002, 7: 0.0003, 6: 0.0025, 5: 0.0092, 4: 0.029, 3: 0.20, 2: 4.1}
"""Relative rise of perplexity by bits at groups of 64, fitted to `results/weights.csv` (the embedded model; 7 and 8
bits are within its noise)."""
GROUP_GROWTH = 1.39
"""Factor on it for each doubling of the group, from the same fit."""
SYMMETRIC_FACTOR = 1.96
"""Factor on it without zeros, measured at 4 bits in groups of 32."""


@technique(
    name="rtn",
    wing="weights",
    source=Source("LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", year=2022, arxiv="2208.07339"),
    accounts=[Account.WEIGHTS],
    jobs=["generate", "finetune", "compress"],
    removes=["dense_weights", "matrix_gradients"],
    claims=[
        Claim(
            "WikiText2 perplexity",
            37.28,
            versus="27.65 dense",
            at="OPT-125M, 4 bits, whole rows",
            where="table of OPT perplexities on WikiText2",
        ),
        Claim(
            "WikiText2 perplexity",
            12.10,
            versus="10.86 dense",
            at="OPT-6.7B, 4 bits, whole rows",
            where="table of OPT perplexities on WikiText2",
        ),
    ],
)
@dataclass(frozen=True, kw_only=True)
class RTN(WeightMethod):
    """Round to nearest.

    Attributes:
        bits: width of a code, 2 to 8.
        group_size: in-features that share a scale; -1 for a whole row.
        symmetric: fix the zero in the middle and do not store it.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise CompositionError(f"rtn has 2 to 8 bits, not {self.bits}", hint="for instance rtn(bits=4)")
        Grid(bits=self.bits, group_size=self.group_size)

    def terms(self, name: str, out_features: int, in_features: int, dtype: torch.dtype) -> tuple[Format, ...]:
        """One grid. Scales are bfloat16 for bfloat16 weights (products then use them exactly), else float16."""
        scale = "bfloat16" if dtype is torch.bfloat16 else "float16"
        return (Grid(bits=self.bits, group_size=self.group_size, symmetric=self.symmetric, scale_dtype=scale),)

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """From the fit; large models lose less than the small one that it was made on."""
        group = shape.config.get_text_config().hidden_size if self.group_size == -1 else self.group_size
        symmetric = SYMMETRIC_FACTOR if self.symmetric else 1.0
        return RISK[self.bits] * GROUP_GROWTH ** math.log2(group / 64) * symmetric

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[RTN]:
        """From the safest to the smallest."""
        for bits, groups in ((8, (128,)), (6, (128,)), (5, (128, 64)), (4, (128, 64, 32)), (3, (64, 32)), (2, (32,))):
            for group in sorted(groups):
                yield cls(bits=bits, group_size=group)
