"""Fira: run Adam on the gradient's leading subspace, and let the rest of the gradient move the weights too.

Source:    Chen et al. 2024, arXiv:2410.01623, algorithm 1 (norm-based scaling and the norm-growth limiter).
Differs:   the subspace comes from the eigenvectors of ``G G^T`` in float64 instead of a float32 SVD; the rest is
           ``G - P P^T G``, as in the paper (the authors' package subtracts ``scale`` times the projection); bias
           correction comes before the limiter; the weight decay comes before the update.
Saves:     optimizer, real: as GaLore, ``S R + 2 R L`` elements a matrix instead of ``2 S L``, and one float32. The rest
           of the gradient is one full-size temporary, a matrix at a time.
Shapes:    matrix S x L (smaller side first), basis S x R, moments R x L, factors L.
Composes:  any method of another slot that leaves full gradients of the weight matrices.
Use when:  GaLore's memory is right but its quality is not: the update has full rank.
Not when:  one more matrix-sized temporary is too much (APOLLO needs none).
"""

from __future__ import annotations

from dataclasses import dataclass

from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import TRAINING, Claim, Source, technique
from pintpot.core.workload import Workload
from pintpot.optim._engine import ProjectedOptimizer
from pintpot.optim._residual import NormScaled, Residual
from pintpot.optim.galore import GaLoreRule


@technique(
    name="fira",
    wing="optim",
    slot="optimizer",
    source=Source(
        "Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?", arxiv="2410.01623", year=2024
    ),
    accounts=(Account.OPTIMIZER,),
    jobs=TRAINING,
    needs=("dense_weights", "matrix_gradients"),
    claims=(
        Claim(
            "validation perplexity", 31.06, versus="AdamW 34.06", at="Llama 60M, C4, rank 128 of 512", where="table 2"
        ),
    ),
    fidelity="subspace by a float64 eigendecomposition; bias correction before the norm-growth limiter",
)
@dataclass(frozen=True, kw_only=True)
class FiraRule(GaLoreRule):
    """``LeadingSubspace x Adam x NormScaled``; the hyperparameters are GaLore's."""

    def residual(self) -> Residual:
        """Scaled by column, with its growth limited."""
        return NormScaled(self.scale)

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """Below AdamW's perplexity in table 2 of the paper; tuned AdamW is not beaten, so not zero."""
        return 0.004


class Fira(ProjectedOptimizer):
    """Fira as a torch optimizer: ``Fira(model, lr=1e-2, rank=128, update_gap=200, scale=0.25)``.

    See ``ProjectedOptimizer`` for the arguments and ``FiraRule`` for the hyperparameters.
    """

    method = FiraRule


FiraRule.kind = Fira
