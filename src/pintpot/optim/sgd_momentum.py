"""SGD with momentum: move each weight by the sum of its gradients, each worth less at every step.

Source:    Polyak 1964, doi:10.1016/0041-5553(64)90137-5 (the heavy ball); momentum 0.9, as usual in deep learning.
Differs:   the weight decay is decoupled from the gradient, as for every rule of this wing; beside a projection it is
           the small gradients that are summed.
Saves:     optimizer, real: one element of state for each of Adam's two.
Shapes:    moments of the shape of what is updated.
Composes:  any rule of the optimizer slot whose inner rule is Adam (alone: all parameters), packed states, gradient
           release, adapters.
Use when:  as a baseline, or where SGD is known to do (convolutions): the learning rate is then some fifty times AdamW's
           and must be searched for, since it depends on how large gradients are.
Not when:  transformers are trained: Lion takes the same memory and is nearer to Adam.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import TRAINING, Source, Technique, technique
from pintpot.core.workload import Workload
from pintpot.optim._base import RuleExtra
from pintpot.optim._inner import Inner
from pintpot.optim._rules import Momentum


@technique(
    name="sgd-momentum",
    wing="optim",
    slot="optimizer",
    part="rule",
    source=Source(
        "Some methods of speeding up the convergence of iteration methods",
        doi="10.1016/0041-5553(64)90137-5",
        year=1964,
    ),
    accounts=(Account.OPTIMIZER,),
    jobs=TRAINING,
    needs=("any_rule", "gradients"),
    fidelity="decoupled weight decay",
)
@dataclass(frozen=True, kw_only=True)
class SgdMomentum(RuleExtra):
    """The heavy ball in Adam's place.

    Attributes:
        momentum: what an older gradient is worth at each step.
    """

    rate_factor: ClassVar[float] = 50.0

    momentum: float = 0.9

    def rule(self) -> Inner:
        """Polyak's."""
        return Momentum(betas=(self.momentum, 0.0))

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """SGD trails Adam on transformers, by how much depends on a learning rate that a plan cannot search for."""
        return 0.1

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[Technique]:
        """None to plan with: Lion takes the same bytes at a lower risk."""
        return ()
