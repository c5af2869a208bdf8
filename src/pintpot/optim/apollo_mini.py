"""APOLLO-Mini: one factor a matrix, from Adam on a rank-1 random projection; the memory of plain SGD.

Source:    Zhu et al. 2024, arXiv:2412.05270, section 4.3 (rank 1, tensor-wise scaling, alpha = sqrt(128)).
Differs:   as in APOLLO: bias correction before the limiter; the limiter starts anew after a zero update.
Saves:     optimizer, real: ``2 L`` elements and one float32 a matrix instead of ``2 S L``. No full-size temporary.
Shapes:    matrix S x L (smaller side first), random projection S x 1, moments 1 x L, one factor.
Composes:  any method of another slot that leaves full gradients of the weight matrices.
Use when:  even APOLLO's states are too much; large models.
Not when:  matrices are tiny: one factor for a whole matrix is coarse, and the saving over APOLLO is small.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import TRAINING, Claim, Technique, technique
from pintpot.core.workload import Workload
from pintpot.optim._base import ProjectedMethod
from pintpot.optim._engine import ProjectedOptimizer
from pintpot.optim._project import Project, RandomSubspace
from pintpot.optim._residual import Residual, ScaledGradient
from pintpot.optim.apollo import SOURCE


@technique(
    name="apollo-mini",
    wing="optim",
    slot="optimizer",
    source=SOURCE,
    accounts=(Account.OPTIMIZER,),
    jobs=TRAINING,
    needs=("dense_weights", "matrix_gradients"),
    claims=(Claim("validation perplexity", 30.95, versus="AdamW 34.06", at="Llama 60M, C4, rank 1", where="table 2"),),
    fidelity="bias correction before the norm-growth limiter",
)
@dataclass(frozen=True, kw_only=True)
class ApolloMiniRule(ProjectedMethod):
    """``RandomSubspace of rank 1 x Adam x ScaledGradient by matrix``.

    Attributes:
        update_gap: steps between random projections (T).
        scale: factor on the learning rate of projected matrices (alpha, the root of 128).
        seed: from which the projections are drawn.
    """

    usual_pretraining_rate: ClassVar[float | None] = 1e-2
    """The authors' scripts for C4 (scripts/pretrain_c4), from 60M to 7B parameters."""

    update_gap: int = 200
    scale: float = 128**0.5
    seed: int = 0

    def project(self) -> Project:
        """Onto one random direction."""
        return RandomSubspace(1)

    def residual(self) -> Residual:
        """The gradient scaled as a whole."""
        return ScaledGradient(self.scale, per_channel=False)

    @property
    def refresh_steps(self) -> int:
        """The update gap."""
        return self.update_gap

    @property
    def base_seed(self) -> int:
        """The seed."""
        return self.seed

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """As APOLLO, with a margin for its single factor a matrix."""
        return 0.008

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[Technique]:
        """The default alone: the rank is the method."""
        yield cls()


class ApolloMini(ProjectedOptimizer):
    """APOLLO-Mini as a torch optimizer: ``ApolloMini(model, lr=1e-2, update_gap=200, scale=128**0.5, seed=0)``.

    See ``ProjectedOptimizer`` for the arguments and ``ApolloMiniRule`` for the hyperparameters.
    """

    method = ApolloMiniRule


ApolloMiniRule.kind = ApolloMini
