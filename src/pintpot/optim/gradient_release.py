"""Gradient release: update each parameter as soon as its gradient is there, and free the gradient.

Source:    Lv et al. 2023, "Full Parameter Fine-tuning for Large Language Models with Limited Resources" (LOMO),
           arXiv:2306.09782, sec. 3.1 (fused update).
Differs:   any rule of the wing takes the place of SGD; the whole gradient is never there, so it is not clipped (the
           paper's second backward pass for its norm is left out).
Saves:     gradients, real: the largest gradient instead of all of them.
Shapes:    parameters of any shape.
Composes:  any rule that updates each parameter by itself, packed states, activation checkpointing.
Use when:  weights fit and gradients beside them do not.
Not when:  gradients are accumulated over batches, or training needs clipping by the whole norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pintpot.core.ledger import Account, Ledger
from pintpot.core.shape import ModelShape
from pintpot.core.technique import TRAINING, Claim, Source, technique
from pintpot.core.workload import Workload
from pintpot.optim._base import OptimExtra


@technique(
    name="gradient-release",
    wing="optim",
    slot="optimizer",
    part="release",
    source=Source(
        "Full Parameter Fine-tuning for Large Language Models with Limited Resources", arxiv="2306.09782", year=2023
    ),
    accounts=(Account.GRADIENTS,),
    jobs=TRAINING,
    needs=("gradients",),
    claims=(Claim("memory used (fraction)", 0.108, versus="the standard approach with AdamW", where="abstract"),),
    fidelity="any rule instead of SGD; no clipping by the whole norm",
)
@dataclass(frozen=True, kw_only=True)
class GradientRelease(OptimExtra):
    """Gradients live from their arrival to their update; nothing to set."""

    @property
    def extras(self) -> Mapping[str, Any]:
        """``release_gradients=True``."""
        return {"release_gradients": True}

    def predict(self, ledger: Ledger, shape: ModelShape, workload: Workload) -> Ledger:
        """``gradients`` are the largest parameter's; the temporaries of the update come in the backward pass."""
        if not workload.training:
            return ledger
        step = ledger.phase("step")
        held = min(max(p.nbytes for p in shape.parameters), step.of(Account.GRADIENTS))
        ledger = ledger.set(Account.GRADIENTS, held, phases=("backward",)).set(Account.GRADIENTS, 0, phases=("step",))
        return ledger.add(Account.WORKSPACE, step.of(Account.WORKSPACE), phases=("backward",))

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """The update is the same but for the clipping that is left out."""
        return 0.002
