"""LISA: train a few random blocks at a time, with embeddings and head always, and freeze the rest.

Source:    Pan et al. 2024, arXiv:2403.17919, algorithm 1 (every block as likely as any other).
Differs:   the moments of a block are forgotten when it is frozen, so that they take no memory; it begins anew when it
           is chosen again.
Saves:     optimizer and gradients, real: both of ``active`` blocks instead of all. Activations below the lowest active
           block are not kept either; since any block may be chosen, the prediction does not count on it.
Shapes:    parameters of any shape.
Composes:  states of 8 or 4 bits, gradient release, activation checkpointing; not with projected optimizers.
Use when:  fine-tuning a deep model: the memory of adapters with full-rank updates.
Not when:  pretraining from scratch, where every block has much to learn at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import TRAINING, Claim, Source, Technique, technique
from pintpot.core.workload import Workload
from pintpot.optim._base import ProjectedMethod
from pintpot.optim._engine import ProjectedOptimizer
from pintpot.optim._select import Select, UniformBlocks


@technique(
    name="lisa",
    wing="optim",
    slot="optimizer",
    source=Source(
        "LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model Fine-Tuning",
        arxiv="2403.17919",
        year=2024,
    ),
    accounts=(Account.OPTIMIZER, Account.GRADIENTS),
    jobs=TRAINING,
    needs=("dense_weights", "matrix_gradients"),
    claims=(Claim("MT-Bench score gained (fraction)", 0.11, versus="LoRA", at="fine-tuning", where="abstract"),),
    fidelity="moments of frozen blocks are dropped",
)
@dataclass(frozen=True, kw_only=True)
class LisaRule(ProjectedMethod):
    """``UniformBlocks x AdamW``.

    Attributes:
        active_blocks: blocks trained at a time (gamma).
        interval_steps: steps between two choices (K).
        seed: of the choices.
    """

    active_blocks: int = 2
    interval_steps: int = 20
    seed: int = 0

    def select(self) -> Select:
        """Blocks at random."""
        return UniformBlocks(self.active_blocks, self.interval_steps, self.seed)

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """Fine-tuning: at or above full training in the paper's tables; pretraining is not claimed."""
        return 0.02 if workload.job == "finetune" else 0.3

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[Technique]:
        """Two blocks, as in the paper, and more."""
        blocks = len({p.block for p in shape.parameters if p.block})
        yield from (cls(active_blocks=count) for count in (2, 4, 8) if count == 2 or count < blocks)


class Lisa(ProjectedOptimizer):
    """LISA as a torch optimizer: ``Lisa(model, lr=1e-5, active_blocks=2, interval_steps=20, seed=0)``.

    It freezes and unfreezes the model's blocks itself. See ``ProjectedOptimizer`` for the arguments and ``LisaRule``
    for the hyperparameters.
    """

    method = LisaRule


LisaRule.kind = Lisa
