"""Lion: move each weight by the sign of its momentum alone; one moment instead of two.

Source:    Chen et al. 2023, arXiv:2302.06675, algorithm 2; decay rates (0.9, 0.99).
Differs:   the weight decay comes before the update, which is the same sum; beside a projection it is the small gradient
           whose signs are taken.
Saves:     optimizer, real: one element of state for each of Adam's two.
Shapes:    moments of the shape of what is updated.
Composes:  any rule of the optimizer slot whose inner rule is Adam (alone: all parameters), packed states, gradient
           release, adapters.
Use when:  half of Adam's states fit, batches are large, and the learning rate can be tuned: 3 to 10 times lower than
           AdamW's, with a weight decay as much higher.
Not when:  batches are small (the authors expect no gain below 64), or AdamW's learning rate must serve.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import TRAINING, Claim, Source, technique
from pintpot.core.workload import Workload
from pintpot.optim._base import RuleExtra
from pintpot.optim._inner import Inner
from pintpot.optim._rules import LionRule


@technique(
    name="lion",
    wing="optim",
    slot="optimizer",
    part="rule",
    source=Source("Symbolic Discovery of Optimization Algorithms", arxiv="2302.06675", year=2023),
    accounts=(Account.OPTIMIZER,),
    jobs=TRAINING,
    needs=("any_rule", "gradients"),
    claims=(
        Claim("zero-shot accuracy (%)", 88.3, versus="the best before, 2 % less", at="ImageNet", where="abstract"),
    ),
)
@dataclass(frozen=True, kw_only=True)
class Lion(RuleExtra):
    """Lion in Adam's place.

    Attributes:
        beta1: share of the momentum in what the sign is taken of.
        beta2: share of the momentum in the next one; for language models the authors also use 0.95 and 0.98.
    """

    rate_factor: ClassVar[float] = 0.2

    beta1: float = 0.9
    beta2: float = 0.99

    def rule(self) -> Inner:
        """Lion's."""
        return LionRule(betas=(self.beta1, self.beta2))

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """On a par with Adam in the paper where the learning rate was tuned anew, which a plan cannot do."""
        return 0.006
