"""Endor: store a pruned weight as a bitmap and the numbers that are left, for weights that must travel.

Source:    Joo et al. 2024, "Endor", arXiv:2406.11674 (a bitmap of the places and the non-zero numbers). It presumes a
           pruned model; pruned here by the scores of Wanda (Sun et al. 2023, arXiv:2306.11695) with the compensation
           of SparseGPT (Frantar and Alistarh 2023, arXiv:2301.00774).
Differs:   no kernel that expands the bitmap on a GPU, and no transfer past the CPU: rows are expanded by a compiled
           kernel, in the processor's cache for few rows of input, and in strips for more. Kept numbers can also be
           stored on a grid.
Saves:     weights, real, in memory and on disk: O * packed_size(I, 1) + 2 n bytes for n kept numbers of 16 bits (n
           rounded up to a multiple of 256). Pruning needs one block, and 4 I^2 bytes a layer for the inputs' second
           moments.
Shapes:    weight (O, I); bitmap (O, packed_size(I, 1)); values (n / 256, 256), or codes of them.
Composes:  caches, activations, adapters on the frozen base; not with anything that needs dense weights.
Use when:  the model is pruned already, or loading and moving its weights is what takes the time.
Not when:  memory alone counts: a grid of equal size keeps all numbers and loses far less than cutting half of them.
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
from pintpot.core.technique import Claim, Source, technique
from pintpot.core.workload import Workload
from pintpot.weights._base import WeightMethod, risk_between
from pintpot.weights.formats import Dense, Format, Grid, Sparse, Tensors
from pintpot.weights.pruning import RISES, cut_with_compensation, input_weighted_score
from pintpot.weights.statistics import InputStatistics

BITS_RISES = ((16.0, 0.0001), (8.0, 0.0005), (4.0, 0.025), (3.0, 0.15))
"""Bits of a kept number, and what they add."""


@technique(
    name="endor",
    wing="weights",
    source=Source("Endor: Hardware-Friendly Sparse Format for Offloaded LLM Inference", 2024, "2406.11674"),
    accounts=[Account.WEIGHTS],
    jobs=["generate", "finetune", "compress"],
    removes=["dense_weights", "matrix_gradients"],
    claims=[
        Claim(
            "speed-up of offloaded inference", 1.70, versus="Hugging Face Accelerate", at="OPT-66B", where="abstract"
        ),
        Claim("speed-up of offloaded inference", 1.78, versus="the same", at="Llama2-70B", where="abstract"),
    ],
    fidelity="expanded on the CPU, without a GPU kernel or a transfer past the CPU",
)
@dataclass(frozen=True, kw_only=True)
class Endor(WeightMethod):
    """A bitmap and what is left after pruning.

    Attributes:
        kept_fraction: share of a matrix that is kept.
        bits: of a kept number: 16 as it is, 2 to 8 on a grid.
        group_size: kept numbers that share a scale, on a grid; at most 256.
        compensate: change what is kept to make up for what is cut.
        damping: share of the mean diagonal of H that is added to it.
    """

    calibrated: ClassVar[bool] = True
    drops: ClassVar[bool] = True
    kept_fraction: float = 0.5
    bits: int = 16
    group_size: int = 64
    compensate: bool = True
    damping: float = 0.01

    def __post_init__(self) -> None:
        if self.bits != 16 and not 2 <= self.bits <= 8:
            raise CompositionError(
                f"endor keeps numbers of 16 bits, or of 2 to 8, not {self.bits}", hint="for instance endor(bits=8)"
            )
        Sparse(kept_fraction=self.kept_fraction, values=Grid(group_size=self.group_size))

    def terms(self, name: str, out_features: int, in_features: int, dtype: torch.dtype) -> tuple[Format, ...]:
        """Single numbers anywhere in the matrix, of 16 bits or on a grid."""
        half = torch.bfloat16 if dtype is torch.bfloat16 else torch.float16
        scale = "bfloat16" if dtype is torch.bfloat16 else "float16"
        grid = Grid(bits=min(self.bits, 8), group_size=self.group_size, scale_dtype=scale)
        values = Dense(dtype=half) if self.bits == 16 else grid
        return (Sparse(kept_fraction=self.kept_fraction, balanced=False, values=values),)

    def find(
        self, name: str, weight: Tensor, formats: tuple[Format, ...], inputs: InputStatistics | None = None
    ) -> tuple[Tensors, ...]:
        """What scores highest in the matrix; by magnitude where nothing is known of the inputs."""
        layout = formats[0]
        if not isinstance(layout, Sparse):
            return super().find(name, weight, formats)
        dense = weight.float()
        score = layout.blocks(input_weighted_score(dense, inputs))
        # A block of one number is its own norm.
        mask = layout.choose(score[..., 0] if layout.block == 1 else score.square().sum(-1))
        del score
        if self.compensate and inputs is not None:
            kept = layout.weight(mask[..., None].expand(-1, -1, layout.block))
            dense = cut_with_compensation(dense, kept, inputs.hessian, self.damping)
        return (layout.encode_with(dense, mask),)

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """From what is kept and its bits; large models lose less than the small one that it was measured on."""
        return risk_between(RISES, self.kept_fraction) + risk_between(BITS_RISES, float(self.bits))

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[Endor]:
        """From the safest to the smallest."""
        for kept, bits in ((0.8, 16), (0.7, 16), (0.6, 16), (0.5, 16), (0.5, 8), (0.5, 4), (0.4, 4)):
            yield cls(kept_fraction=kept, bits=bits)
