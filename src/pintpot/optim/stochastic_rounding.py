"""Stochastic rounding: weights of 16 bits go up or down at random, so that updates too small for them still add up.

Source:    Gupta et al. 2015, arXiv:1502.02551, sec. 3.1 (the rounding), for the weights' update.
Differs:   the numbers are bfloat16 or float16, where the paper has fixed point, and only weights are rounded so; the
           directions are those of the rule, in the dtype of its moments; the update of a projected matrix is first
           rounded to the nearest in the weights' dtype, which is a share of it, not of the weight.
Saves:     weights, real: the float32 copy that training in 16 bits otherwise wants; none of what is held without one. A
           batch of weights is in float32 at a time, and beside a projection the update of one matrix in its dtype.
Shapes:    parameters of any shape. Those of 32 bits and more are left to their own precision: in a float32 model this
           does nothing.
Composes:  any rule of the optimizer slot (alone: AdamW), packed states, gradient release, adapters.
Use when:  the weights are trained in bfloat16 with small learning rates.
Not when:  the weights are float32, or steps so large that rounding does not matter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pintpot.core.ledger import Account, Ledger
from pintpot.core.shape import ModelShape
from pintpot.core.technique import TRAINING, Claim, Source, Technique, technique
from pintpot.core.workload import Workload
from pintpot.optim._base import OptimExtra, phase_of_update
from pintpot.optim._groups import split_shape
from pintpot.optim._rounding import NARROW
from pintpot.optim._tensors import CHUNK_NUMEL


@technique(
    name="stochastic-rounding",
    wing="optim",
    slot="optimizer",
    part="rounding",
    source=Source("Deep Learning with Limited Numerical Precision", arxiv="1502.02551", year=2015),
    accounts=(Account.WEIGHTS,),
    jobs=TRAINING,
    needs=("gradients",),
    claims=(Claim("bits a number", 16, versus="32, at little to no loss of accuracy", where="abstract"),),
    fidelity="bfloat16 or float16 instead of fixed point; weights only",
)
@dataclass(frozen=True, kw_only=True)
class StochasticRounding(OptimExtra):
    """Weights of 16 bits are rounded at random; nothing to set."""

    @property
    def extras(self) -> Mapping[str, Any]:
        """``stochastic_rounding=True``."""
        return {"stochastic_rounding": True}

    def predict(self, ledger: Ledger, shape: ModelShape, workload: Workload) -> Ledger:
        """The ``workspace`` of the update: a batch of weights in float32 with what rounds it, and an update apart."""
        if not workload.training or shape.dtype not in NARROW:
            return ledger
        batch = 4 * 4 * min(CHUNK_NUMEL, max(p.numel for p in shape.parameters))
        apart = max((p.nbytes for p in split_shape(shape)[0]), default=0)
        return ledger.add(Account.WORKSPACE, batch + apart, phases=(phase_of_update(ledger),))

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[Technique]:
        """None to plan with: it is for quality, and frees nothing that a plan counts."""
        return ()
