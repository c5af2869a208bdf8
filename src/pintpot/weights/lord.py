"""LoRD: replace each matrix by the projection of its outputs on the directions in which they vary.

Source:    Kaushal et al. 2023, "LORD", arXiv:2309.14021: one-shot decomposition by the eigenvectors of the covariance
           of each layer's outputs (atomic feature mimicking), at a share of the full rank.
Differs:   the outputs' second moments instead of their covariance, because most layers have no bias for their mean;
           without one these are what loses least, and a layer that has one has it corrected. Every matrix that gets
           smaller at the share is decomposed; the authors choose kinds of layers by their sensitivity.
Saves:     weights, real: R * (O + I) numbers instead of O * I, and nothing where that is no less. Finding the factors
           needs one block, the inputs' second moments (4 I^2 bytes a layer), and 24 O^2 bytes for the eigenvectors.
Shapes:    weight (O, I); factors (O, R) with orthonormal columns, and (R, I).
Composes:  caches, activations, adapters on the frozen base; not with anything that needs dense weights.
Use when:  texts of the kind that the model will read are at hand, and plain products at 16 bits are wanted: there is no
           decoding, and a product takes less time too.
Not when:  bytes matter alone: below about half of them, 8 or 4 bits lose far less.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from pintpot.core.errors import ShapeError
from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Claim, Source, technique
from pintpot.core.workload import Workload
from pintpot.weights.factorised import FactorisedMethod, output_factors
from pintpot.weights.statistics import InputStatistics


@technique(
    name="lord",
    wing="weights",
    source=Source(
        "LORD: Low Rank Decomposition Of Monolingual Code LLMs For One-Shot Compression", 2023, arxiv="2309.14021"
    ),
    accounts=[Account.WEIGHTS],
    jobs=["generate", "finetune", "compress"],
    removes=["dense_weights", "matrix_gradients"],
    claims=[
        Claim("rise of perplexity, %", 1.0, versus="dense", at="ranks lower by up to 39.58 %", where="abstract"),
        Claim("parameters, billions", 13.2, versus="16 dense, no drop of HumanEval", at="StarCoder", where="abstract"),
    ],
    fidelity="second moments instead of covariance; layers are chosen by size, not by sensitivity",
)
@dataclass(frozen=True, kw_only=True)
class LoRD(FactorisedMethod):
    """Factors from the outputs' second moments.

    Attributes:
        kept_rank_fraction: of the smaller side of each matrix.
    """

    calibrated: ClassVar[bool] = True
    corrects_bias: ClassVar[bool] = True
    rises: ClassVar[tuple[tuple[float, float], ...]] = (
        (15.5, 0.08),
        (14.5, 0.18),
        (13.6, 0.26),
        (9.2, 1.3),
        (5.0, 8.0),
    )
    kept_rank_fraction: float = 0.6042

    def __post_init__(self) -> None:
        if not 0 < self.kept_rank_fraction < 1:
            raise ShapeError(
                f"kept_rank_fraction is a share of the full rank, not {self.kept_rank_fraction}",
                hint="for instance lord(kept_rank_fraction=0.6)",
            )

    def rank(self, out_features: int, in_features: int) -> int:
        """The same share of the smaller side for all."""
        return int(self.kept_rank_fraction * min(out_features, in_features))

    def factors(
        self, name: str, weight: Tensor, rank: int, inputs: InputStatistics | None = None
    ) -> tuple[Tensor, Tensor]:
        """From the outputs; from the weight alone for experts that met no token."""
        if inputs is None:
            return super().factors(name, weight, rank)
        return output_factors(weight, inputs.hessian, rank)

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[LoRD]:
        """From the safest to the smallest."""
        for fraction in (0.65, 0.6, 0.5, 0.4, 0.3, 0.2):
            method = cls(kept_rank_fraction=fraction)
            if method.shrinks(shape):
                yield method
