"""GaLore: run Adam on the gradient's leading subspace, chosen anew every T steps.

Source:    Zhao et al. 2024, arXiv:2403.03507, algorithm 2 (eq. 5 for the update, eq. 12-13 for the subspace).
Differs:   the subspace comes from the eigenvectors of ``G G^T`` in float64 instead of a float32 SVD (the same
           vectors, more exactly, about five times faster), with fixed signs; where the smaller side is above
           ``exact_side`` and more than twice the rank, from a randomised decomposition (Halko et al. 2011,
           arXiv:0909.4061, algorithm 4.4 with two power iterations and ten columns more) in float32; the weight decay
           comes before the update, as in torch's AdamW; the learning rate is not warmed up here.
Saves:     optimizer, real: ``S R + 2 R L`` elements a matrix instead of ``2 S L``. No full-size temporary; each
           refresh holds a few S x S matrices in float64, or of a large matrix a few L x R in float32.
Shapes:    matrix S x L (smaller side first), basis S x R, moments R x L.
Composes:  any method of another slot that leaves full gradients of the weight matrices.
Use when:  AdamW's states do not fit, and the update should follow Adam closely.
Not when:  steps are few (APOLLO needs no refresh).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import TRAINING, Claim, Source, technique
from pintpot.core.workload import Workload
from pintpot.optim._base import ProjectedMethod
from pintpot.optim._engine import ProjectedOptimizer
from pintpot.optim._groups import split_shape
from pintpot.optim._leading import LeadingSubspace
from pintpot.optim._project import Project
from pintpot.optim._residual import Drop, Residual


@technique(
    name="galore",
    wing="optim",
    slot="optimizer",
    source=Source(
        "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", arxiv="2403.03507", year=2024
    ),
    accounts=(Account.OPTIMIZER,),
    jobs=TRAINING,
    needs=("dense_weights", "matrix_gradients"),
    claims=(
        Claim(
            "validation perplexity", 34.88, versus="AdamW 34.06", at="Llama 60M, C4, rank 128 of 512", where="table 2"
        ),
        Claim("optimizer bytes saved (fraction)", 0.655, versus="AdamW", at="Llama pretraining", where="abstract"),
    ),
    fidelity="subspace by a float64 eigendecomposition of G G^T, with fixed signs, instead of a float32 SVD;"
    " by a randomised one for sides above 1,024",
)
@dataclass(frozen=True, kw_only=True)
class GaLoreRule(ProjectedMethod):
    """``LeadingSubspace x Adam x Drop``.

    Attributes:
        rank: rows of the projected gradient.
        update_gap: steps between refreshes of the subspace (T).
        scale: factor on the learning rate of projected matrices (alpha).
        exact_side: smaller side up to which the subspace is exact; that of larger matrices comes from a random sketch.
    """

    usual_pretraining_rate: ClassVar[float | None] = 1e-2
    """The authors' scripts for C4 (jiaweizzhao/GaLore, scripts/benchmark_c4), from 60M to 1B parameters."""

    rank: int = 128
    update_gap: int = 200
    scale: float = 0.25
    exact_side: int = 1024

    def project(self) -> Project:
        """Onto leading singular vectors."""
        return LeadingSubspace(self.rank, exact_side=self.exact_side)

    def residual(self) -> Residual:
        """Dropped."""
        return Drop(self.scale)

    @property
    def refresh_steps(self) -> int:
        """The update gap."""
        return self.update_gap

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """Table 2 of the paper: perplexity 2.4 % above AdamW at 60M, 0.5 % at 1B; more where the rank is lower."""
        sides = [min(p.shape[-2:]) for p in split_shape(shape)[0]]
        share = min(1.0, self.rank / min(sides)) if sides else 1.0
        return (0.024 if shape.numel < 2e8 else 0.008) * min(4.0, max(0.5, 0.25 / share))


class GaLore(ProjectedOptimizer):
    """GaLore as a torch optimizer: ``GaLore(model, lr=1e-2, rank=128, update_gap=200, scale=0.25)``.

    See ``ProjectedOptimizer`` for the arguments and ``GaLoreRule`` for the hyperparameters.
    """

    method = GaLoreRule


GaLoreRule.kind = GaLore
