"""COSMOS: Adam in the leading eigenspace of the gradients, Muon on what that leaves of the momentum.

Source:    Liu et al. 2025, arXiv:2502.17410; hyperparameters of the authors' code (lliu606/COSMOS).
Differs:   the average of ``G G^T`` is of the smaller side whatever side that is; its first basis comes from a float64
           eigendecomposition; Newton-Schulz runs in the parameter's dtype, where the code uses bfloat16, and on fused
           query-key-value matrices as a whole; embeddings, norms and head follow AdamW with the group's own decay
           rates; the length of an update is that of the code (a root mean square of ``scale`` times the learning rate);
           weight decay, which the code ignores, comes before the update.
Saves:     optimizer, real: ``S L + R L + S R + R^2`` elements a matrix instead of ``2 S L``: about half. Each update
           takes two or three matrix-sized temporaries and two of S x S, a matrix at a time.
Shapes:    matrix S x L (smaller side first), momentum S x L, basis S x R, average R x R, second moments R x L.
Composes:  any method of another slot that leaves full gradients of the weight matrices.
Use when:  pretraining, with room for one momentum and time for Newton-Schulz.
Not when:  half of AdamW's states is still too much (GaLore, APOLLO), or batches are small, so that its products weigh.
"""

from __future__ import annotations

from dataclasses import dataclass

from pintpot.core.errors import ShapeError
from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import TRAINING, Source, technique
from pintpot.core.work import Work
from pintpot.core.workload import Workload
from pintpot.optim._base import ProjectedMethod
from pintpot.optim._engine import ProjectedOptimizer
from pintpot.optim._groups import split_shape
from pintpot.optim._inner import Inner, MomentumAdam
from pintpot.optim._leading import PowerSubspace
from pintpot.optim._project import Project
from pintpot.optim._residual import MuonRest, Residual


@technique(
    name="cosmos",
    wing="optim",
    slot="optimizer",
    source=Source(
        "COSMOS: A Hybrid Adaptive Optimizer for Memory-Efficient Training of LLMs", arxiv="2502.17410", year=2025
    ),
    accounts=(Account.OPTIMIZER,),
    jobs=TRAINING,
    needs=("dense_weights", "matrix_gradients"),
    removes=("any_rule",),
    fidelity="Newton-Schulz in the parameter's dtype; fused matrices are not split",
)
@dataclass(frozen=True, kw_only=True)
class CosmosRule(ProjectedMethod):
    """``PowerSubspace x MomentumAdam x MuonRest``.

    Attributes:
        rank: dimensions of the leading eigenspace.
        scale: factor on the learning rate of matrices, the root mean square of their updates.
        rest_weight: root mean square of Muon's part before it is added to Adam's (gamma).
        momentum_decay: of the momentum of matrices (beta 1).
        decay: of their second moments and of the average of ``G G^T`` (beta 2).
    """

    rank: int = 64
    scale: float = 0.1
    rest_weight: float = 0.1
    momentum_decay: float = 0.9
    decay: float = 0.96

    def project(self) -> Project:
        """Onto the leading eigenspace, moved at each step."""
        # What is left outside is made orthogonal, which would magnify the rounding of what was taken out.
        return PowerSubspace(self.rank, exact=True, decay=self.decay)

    def inner(self, betas: tuple[float, float], eps: float) -> Inner:
        """Adam's rule for the momentum inside."""
        return MomentumAdam(betas=(self.momentum_decay, self.decay), eps=eps)

    def residual(self) -> Residual:
        """Muon's rule for the momentum outside."""
        return MuonRest(self.scale, weight=self.rest_weight, momentum_decay=self.momentum_decay)

    def check(self) -> None:
        """Refuse decays of 1 and more beside what makes no sense anywhere."""
        for name in ("momentum_decay", "decay"):
            if getattr(self, name) >= 1:
                raise ShapeError(f"{name} must be below 1, not {getattr(self, name)}", hint="default: 0.9 and 0.96")
        super().check()

    def refresh_flops(self, side: int, long: int) -> float:
        """A power step with its orthogonalisation, and the five steps of Newton-Schulz."""
        rank = min(self.rank, side)
        power = 6.0 * side * long * rank + 8.0 * side * rank**2
        return power + 5 * (4.0 * side * side * long + 2.0 * side**3)

    def work(self, work: Work, shape: ModelShape, workload: Workload) -> Work:
        """That of the small matrices, and the momentum, read and written."""
        if not workload.training:
            return work
        moved = 2 * sum(p.nbytes for p in split_shape(shape)[0])
        return super().work(work, shape, workload).plus("step", read_bytes=moved)

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """The abstract claims AdamW's quality and more, without a figure; not zero."""
        return 0.005 if workload.job == "pretrain" else 0.01


class Cosmos(ProjectedOptimizer):
    """COSMOS as a torch optimizer: ``Cosmos(model, lr=1e-3, rank=64, scale=0.1, rest_weight=0.1)``.

    See ``ProjectedOptimizer`` for the arguments and ``CosmosRule`` for the hyperparameters.
    """

    method = CosmosRule


CosmosRule.kind = Cosmos
