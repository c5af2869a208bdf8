"""DCT-AdamW: run Adam on the cosines that the gradient is most aligned with, chosen anew at every step.

Source:    Modoranu et al. 2025, arXiv:2505.17967, and the authors' code (``DCTAdamW``: L1 norms, a choice every step).
Differs:   the basis is that of the DCT-II, whose transform Makhoul's algorithm gives (the authors' product with a
           matrix uses its transpose); its vectors are made again from their numbers, so that not even the shared basis
           is kept; the optional error feedback is left out, as in the authors' defaults: the rest of the gradient is
           dropped; moments always move with their vectors (an option in the code); always the smaller side is
           projected; the weight decay comes before the update.
Saves:     optimizer, real: ``2 R L`` elements and R integers of 4 bytes a matrix instead of ``2 S L``; no basis. One
           basis S x R and one strip of the transform at a time.
Shapes:    matrix S x L (smaller side first), numbers R, moments R x L.
Composes:  any method of another slot that leaves full gradients of the weight matrices.
Use when:  GaLore's memory is right and its refreshes or bases are too much; the subspace should follow the gradient.
Not when:  steps must be as cheap as they can be: the transform is computed at every step.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log2

from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import TRAINING, Claim, Source, technique
from pintpot.core.workload import Workload
from pintpot.optim._base import ProjectedMethod
from pintpot.optim._engine import ProjectedOptimizer
from pintpot.optim._project import CosineSubspace, Project
from pintpot.optim._residual import Drop, Residual


@technique(
    name="dct-low-rank",
    wing="optim",
    slot="optimizer",
    source=Source(
        "SVD-Free Low-Rank Adaptive Gradient Optimization for Large Language Models", arxiv="2505.17967", year=2025
    ),
    accounts=(Account.OPTIMIZER,),
    jobs=TRAINING,
    needs=("dense_weights", "matrix_gradients"),
    removes=("moments_in_place",),
    claims=(
        Claim(
            "validation perplexity",
            13.69,
            versus="LDAdamW 13.91, AdamW 11.73",
            at="Llama 800M, C4, DCT-AdamW",
            where="public notes on the conference version, not the preprint",
        ),
    ),
    fidelity="no error feedback (optional in the paper); DCT-II basis, made again from its numbers",
)
@dataclass(frozen=True, kw_only=True)
class DctLowRankRule(ProjectedMethod):
    """``CosineSubspace x Adam x Drop``.

    Attributes:
        rank: rows of the projected gradient.
        update_gap: steps between choices of the vectors.
        scale: factor on the learning rate of projected matrices.
    """

    rank: int = 256
    update_gap: int = 1
    scale: float = 1.0

    def project(self) -> Project:
        """Onto the best aligned vectors of the cosine transform."""
        return CosineSubspace(self.rank)

    def residual(self) -> Residual:
        """Dropped."""
        return Drop(self.scale)

    @property
    def refresh_steps(self) -> int:
        """The update gap."""
        return self.update_gap

    def refresh_flops(self, side: int, long: int) -> float:
        """A real Fourier transform of every column."""
        return 2.5 * side * log2(side) * long

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """The paper's perplexity at 800M is 17 % above AdamW's; fine-tuning has less to learn."""
        return 0.03 if workload.job == "finetune" else 0.17


class DctLowRank(ProjectedOptimizer):
    """DCT-AdamW as a torch optimizer: ``DctLowRank(model, lr=1e-3, rank=256, update_gap=1)``.

    See ``ProjectedOptimizer`` for the arguments and ``DctLowRankRule`` for the hyperparameters.
    """

    method = DctLowRankRule


DctLowRankRule.kind = DctLowRank
