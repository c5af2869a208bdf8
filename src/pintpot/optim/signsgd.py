"""signSGD: move each weight by the sign of its momentum (Signum), or of its gradient, which takes no state at all.

Source:    Bernstein et al. 2018, arXiv:1802.04434, algorithm 1 (signSGD, and Signum with momentum 0.9); of the paper's
           two halves the optimizer, not the vote of several workers.
Differs:   the weight decay is decoupled from the gradient; beside a projection it is the small gradient whose signs are
           taken.
Saves:     optimizer, real: one element of state for each of Adam's two; none with ``momentum=0.0``.
Shapes:    moments of the shape of what is updated.
Composes:  any rule of the optimizer slot whose inner rule is Adam (alone: all parameters), packed states, gradient
           release, adapters.
Use when:  no optimizer state fits at all, batches are large, and the learning rate can be tuned: 3 to 10 times lower
           than AdamW's.
Not when:  gradients are noisy (small batches): noise and signal get the same step. Lion is better at the same memory.
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
from pintpot.optim._rules import Signs


@technique(
    name="signsgd",
    wing="optim",
    slot="optimizer",
    part="rule",
    source=Source("signSGD: Compressed Optimisation for Non-Convex Problems", arxiv="1802.04434", year=2018),
    accounts=(Account.OPTIMIZER,),
    jobs=TRAINING,
    needs=("any_rule", "gradients"),
    fidelity="one worker, so no vote; decoupled weight decay",
)
@dataclass(frozen=True, kw_only=True)
class SignSgd(RuleExtra):
    """Signs in Adam's place.

    Attributes:
        momentum: what an older gradient is worth at each step; 0 for signSGD without a state.
    """

    rate_factor: ClassVar[float] = 0.2

    momentum: float = 0.9

    def rule(self) -> Inner:
        """Signum's, or without a momentum signSGD's."""
        moments = Signs.moments if self.momentum else ()
        return Signs(moments=moments, betas=(self.momentum, 0.0))

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """The abstract has the momentum match Adam on images; without it, or in small batches, signs are noise."""
        return 0.03 if self.momentum else 0.06

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[Technique]:
        """Without a state: with one, Lion takes the same bytes at a lower risk."""
        yield cls(momentum=0.0)
