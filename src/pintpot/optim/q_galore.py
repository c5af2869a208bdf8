"""Q-GaLore: GaLore with its basis in 4 bits, its moments in 8, and fewer refreshes where the subspace keeps still.

Source:    Zhang et al. 2024, arXiv:2407.08296, and the authors' code (groups of 256, cosine 0.4 over five refreshes).
Differs:   the weights stay in the model's dtype (the paper has them in INT8, updated by stochastic rounding); the
           leading vector is compared with that of the basis as kept, in 4 bits; a stack of experts is refreshed
           together, by the mean of their cosines; the subspace is found as in ``galore``; groups run over the basis of
           the smaller side row by row, the last one filled up with zeros.
Saves:     optimizer, real: ``S R / 2 + 2 R L`` bytes a matrix and a few for scales, instead of ``2 S L`` elements. The
           basis is unpacked for one matrix at a time.
Shapes:    matrix S x L (smaller side first), basis S x R as codes, moments R x L as codes.
Composes:  gradient release, activation checkpointing; not with another kind of states, since it has its own.
Use when:  GaLore's moments and bases are still too much, or its refreshes take too long.
Not when:  steps are few: the gap only grows after six refreshes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import TRAINING, Claim, Source, technique
from pintpot.core.workload import Workload
from pintpot.optim._engine import ProjectedOptimizer
from pintpot.optim._leading import PackedSubspace
from pintpot.optim._project import Project
from pintpot.optim.galore import GaLoreRule


@technique(
    name="q-galore",
    wing="optim",
    slot="optimizer",
    source=Source(
        "Q-GaLore: Quantized GaLore with INT4 Projection and Layer-Adaptive Low-Rank Gradients",
        arxiv="2407.08296",
        year=2024,
    ),
    accounts=(Account.OPTIMIZER,),
    jobs=TRAINING,
    needs=("dense_weights", "matrix_gradients"),
    removes=("whole_moments",),
    claims=(
        Claim("memory saved (fraction)", 0.5, versus="LoRA and GaLore, at most", at="fine-tuning", where="abstract"),
    ),
    fidelity="weights are not quantised; the leading vector is compared in 4 bits; experts of a stack refresh together",
)
@dataclass(frozen=True, kw_only=True)
class QGaLoreRule(GaLoreRule):
    """``PackedSubspace x Adam in 8 bits x Drop``.

    Attributes:
        rank: rows of the projected gradient.
        update_gap: steps between refreshes of the subspace at first (T).
        scale: factor on the learning rate of projected matrices (alpha).
        exact_side: smaller side up to which the subspace is exact.
        group_size: elements of the basis that share a scale.
        cosine_threshold: mean cosine of successive leading vectors from which the subspace counts as still.
        queue_refreshes: refreshes over which the mean is taken.
        gap_growth: factor on the gap whenever a refresh finds the subspace still.
    """

    state_bits: ClassVar[int] = 8

    group_size: int = 256
    cosine_threshold: float = 0.4
    queue_refreshes: int = 5
    gap_growth: int = 2

    def project(self) -> Project:
        """Onto leading singular vectors, kept in 4 bits."""
        return PackedSubspace(
            self.rank,
            self.group_size,
            self.cosine_threshold,
            self.queue_refreshes,
            self.gap_growth,
            exact_side=self.exact_side,
        )

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """As GaLore, with a margin for the rounding and the older subspaces."""
        return super().risk(shape, workload) + 0.005


class QGaLore(ProjectedOptimizer):
    """Q-GaLore as a torch optimizer: ``QGaLore(model, lr=1e-2, rank=128, update_gap=200, scale=0.25)``.

    Its moments are of 8 bits unless ``state_bits`` says otherwise. See ``ProjectedOptimizer`` for the arguments and
    ``QGaLoreRule`` for the hyperparameters.
    """

    method = QGaLoreRule


QGaLoreRule.kind = QGaLore
