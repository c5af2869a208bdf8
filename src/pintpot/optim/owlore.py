"""OwLore: train a few blocks at a time, the likelier the more outliers their weights have, each as GaLore does.

Source:    Li et al. 2024, arXiv:2405.18380; hyperparameters of the authors' code (pixeli99/OwLore).
Differs:   an outlier is a weight whose own magnitude is above M times its block's mean, where the paper scores a
           weight by its magnitude times the norm of its input on calibration data; a block's count of outliers is one
           more than there are, so that each block may be chosen; the state of a block is forgotten when it is frozen;
           the subspace is found as in our GaLore.
Saves:     optimizer and gradients, real: of ``active_blocks`` blocks only, whose matrices take ``S R + 2 R L`` elements
           instead of ``2 S L``. Embeddings, norms and head keep AdamW's states.
Shapes:    matrix S x L (smaller side first), basis S x R, moments R x L.
Composes:  states of 8 or 4 bits, gradient release, activation checkpointing.
Use when:  fine-tuning a deep model, with more blocks at a time than LISA can afford.
Not when:  pretraining: fresh weights have no outliers, so the choice is uniform (LISA).
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
from pintpot.optim._leading import LeadingSubspace
from pintpot.optim._project import Project
from pintpot.optim._residual import Drop, Residual
from pintpot.optim._select import OutlierBlocks, Select


@technique(
    name="owlore",
    wing="optim",
    slot="optimizer",
    source=Source(
        "OwLore: Outlier-weighed Layerwise Sampled Low-Rank Projection for Memory-Efficient LLM Fine-tuning",
        arxiv="2405.18380",
        year=2024,
    ),
    accounts=(Account.OPTIMIZER, Account.GRADIENTS),
    jobs=TRAINING,
    needs=("dense_weights", "matrix_gradients"),
    claims=(
        Claim(
            "average accuracy gained (fraction)",
            0.011,
            versus="baselines, full fine-tuning included",
            at="Commonsense Reasoning, at the most",
            where="abstract",
        ),
        Claim("memory of fine-tuning (GB)", 21, versus="not stated", at="Llama-2 7B", where="abstract"),
    ),
    fidelity="outliers by weight magnitude alone, without input norms; moments of frozen blocks are dropped",
)
@dataclass(frozen=True, kw_only=True)
class OwLoreRule(ProjectedMethod):
    """``OutlierBlocks x LeadingSubspace x Adam x Drop``.

    Attributes:
        active_blocks: blocks trained at a time (gamma).
        interval_steps: steps between two choices (K).
        outlier_threshold: a weight is an outlier above this many times the block's mean magnitude (M).
        rank: rows of the projected gradient.
        update_gap: steps between refreshes of the subspace while a block stays chosen.
        scale: factor on the learning rate of projected matrices.
        seed: of the choices.
    """

    active_blocks: int = 5
    interval_steps: int = 50
    outlier_threshold: float = 13.0
    rank: int = 256
    update_gap: int = 100
    scale: float = 1.0
    seed: int = 0

    def select(self) -> Select:
        """Blocks at random, weighed by their outliers."""
        return OutlierBlocks(self.active_blocks, self.interval_steps, self.seed, threshold=self.outlier_threshold)

    def project(self) -> Project:
        """Onto leading singular vectors."""
        return LeadingSubspace(self.rank)

    def residual(self) -> Residual:
        """Dropped."""
        return Drop(self.scale)

    @property
    def refresh_steps(self) -> int:
        """The update gap."""
        return self.update_gap

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """Fine-tuning: at or above full training by the abstract; pretraining is not claimed."""
        return 0.02 if workload.job == "finetune" else 0.3

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[Technique]:
        """Five blocks, as the authors, and fewer."""
        yield from (cls(active_blocks=count) for count in (5, 3, 2, 1))


class OwLore(ProjectedOptimizer):
    """OwLore as a torch optimizer: ``OwLore(model, lr=3e-4, active_blocks=5, interval_steps=50, rank=256)``.

    It freezes and unfreezes the model's blocks itself. See ``ProjectedOptimizer`` for the arguments and ``OwLoreRule``
    for the hyperparameters.
    """

    method = OwLoreRule


OwLoreRule.kind = OwLore
