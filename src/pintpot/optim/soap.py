"""SOAP: run Adam in the eigenbases of Shampoo's preconditioners, which are turned a little every few steps.

Source:    Vyas et al. 2024, arXiv:2409.11321, algorithm 3, with the defaults of the authors' code (nikhilvyas/SOAP):
           decay rates (0.95, 0.95), a turn by one power step and QR every 10 steps, sides up to 10,000.
Differs:   the first moment is kept in the eigenbases and turned with them, which is the same sum; the first bases come
           from a float64 decomposition; the weight decay comes before the update; stacks of experts are taken matrix by
           matrix; vectors, and matrices with a side below 8, follow Adam and skip no step. Beside a projection the
           matrix is the small gradient, and its averages stay as they are when the subspace changes, as the moments do.
Saves:     optimizer, real beside a projection alone: ``2 R^2 + 2 L^2`` float32 elements more a matrix (the second term
           where L is at most ``largest_side``). Alone it takes more than AdamW: for fewer steps, not for memory.
Shapes:    matrix R x L (the small one, or the whole), averages and bases R x R and L x L.
Composes:  methods that project onto a subspace and keep Adam's moments as they are (galore, apollo, fira), packed
           states (the averages stay whole), gradient release.
Use when:  steps are dear, batches large, and memory is left.
Not when:  memory is short, or updates must be cheap: each takes products with L x L.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import TRAINING, Claim, Source, Technique, technique
from pintpot.core.work import Work
from pintpot.core.workload import Workload
from pintpot.optim._base import RuleExtra
from pintpot.optim._groups import is_matrix
from pintpot.optim._inner import Inner
from pintpot.optim._rules import SoapRule


@technique(
    name="soap",
    wing="optim",
    slot="optimizer",
    part="rule",
    source=Source("SOAP: Improving and Stabilizing Shampoo using Adam", arxiv="2409.11321", year=2024),
    accounts=(Account.OPTIMIZER,),
    jobs=TRAINING,
    needs=("any_rule", "gradients", "dense_weights", "matrix_gradients", "moments_in_place"),
    claims=(
        Claim("iterations saved (fraction)", 0.4, versus="AdamW", at="360M and 660M, large batches", where="abstract"),
        Claim("time saved (fraction)", 0.35, versus="AdamW", at="360M and 660M, large batches", where="abstract"),
    ),
    fidelity="small matrices and vectors follow Adam from the first step; the small gradient is preconditioned",
)
@dataclass(frozen=True, kw_only=True)
class Soap(RuleExtra):
    """SOAP in Adam's place.

    Attributes:
        beta1: decay rate of the first moment.
        beta2: decay rate of the second moment and of the averages.
        turn_gap: steps between two turns of the bases.
        largest_side: a longer side keeps its own basis.
    """

    beta1: float = 0.95
    beta2: float = 0.95
    turn_gap: int = 10
    largest_side: int = 10000

    def rule(self) -> Inner:
        """Adam in eigenbases."""
        return SoapRule(betas=(self.beta1, self.beta2), every=self.turn_gap, largest_side=self.largest_side)

    def work(self, work: Work, shape: ModelShape, workload: Workload) -> Work:
        """Products with the bases and for the averages, and a share of a turn; as if no matrix were projected."""
        if not workload.training:
            return work
        flops = 0.0
        for p in shape.parameters:
            for side in p.shape[-2:] if is_matrix(p.shape) else ():
                if side <= self.largest_side:
                    flops += 6.0 * p.numel * side + 6.0 * p.numel / min(p.shape[-2:]) * side**2 / self.turn_gap
        return work.plus("step", flops=flops, dtype="float32")

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """At or below AdamW's loss in the paper; not zero, so that it is not chosen for nothing."""
        return 0.002

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[Technique]:
        """None to plan with: it never takes less than Adam."""
        return ()
