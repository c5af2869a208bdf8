"""FRUGAL: run Adam on random rows of each gradient, and move all other weights by the sign of theirs.

Source:    Zmushko et al. 2024, arXiv:2411.07837, algorithm 1 with AdamW and signSGD, and the authors' code
           (``coord_choice="columns"``).
Differs:   the rows or columns are those of the smaller side, which are columns for every matrix with at least as many
           outputs as inputs; experts of a stack share theirs. Of the paper's choices (whole blocks, columns, single
           entries, SVD) this is the authors' default in code: every matrix keeps the same number of moments at all
           times, so the memory neither depends on which blocks are drawn nor jumps when they change.
Saves:     optimizer, real: ``2 density S L`` elements a matrix instead of ``2 S L``; the rows are found again from an
           integer seed. One strip of the rest of the gradient at a time.
Shapes:    matrix S x L (smaller side first), moments density S x L.
Composes:  any method of another slot that leaves full gradients of the weight matrices.
Use when:  AdamW's states do not fit, and neither refreshes nor products with a basis are wanted.
Not when:  gradients are very noisy (small batches): the sign gives noise and signal the same step.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pintpot.core.errors import ShapeError
from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import TRAINING, Source, Technique, technique
from pintpot.core.workload import Workload
from pintpot.optim._base import ProjectedMethod
from pintpot.optim._engine import ProjectedOptimizer
from pintpot.optim._project import Project, RandomRows
from pintpot.optim._residual import Residual, SignRest


@technique(
    name="frugal",
    wing="optim",
    slot="optimizer",
    source=Source(
        "FRUGAL: Memory-Efficient Optimization by Reducing State Overhead for Scalable Training",
        arxiv="2411.07837",
        year=2024,
    ),
    accounts=(Account.OPTIMIZER,),
    jobs=TRAINING,
    needs=("dense_weights", "matrix_gradients"),
    removes=("moments_in_place",),
    fidelity="columns of the smaller side (the paper also draws whole blocks or single entries)",
)
@dataclass(frozen=True, kw_only=True)
class FrugalRule(ProjectedMethod):
    """``RandomRows x Adam x SignRest``.

    Attributes:
        density: fraction of the smaller side that Adam works on (rho).
        update_gap: steps between draws (T); the moments start anew at each.
        scale: factor on the learning rate of projected matrices.
        rest_scale: factor on the learning rate of the signs, beside ``scale``.
        seed: from which the rows are drawn.
    """

    density: float = 0.25
    update_gap: int = 200
    scale: float = 1.0
    rest_scale: float = 1.0
    seed: int = 0

    def project(self) -> Project:
        """Onto random rows."""
        return RandomRows(self.density)

    def residual(self) -> Residual:
        """By its sign."""
        return SignRest(self.scale, self.rest_scale)

    @property
    def refresh_steps(self) -> int:
        """The update gap."""
        return self.update_gap

    @property
    def base_seed(self) -> int:
        """The seed."""
        return self.seed

    def check(self) -> None:
        """Refuse what any method refuses, and densities above 1."""
        super().check()
        if self.density > 1:
            raise ShapeError(f"density must be at most 1, not {self.density}", hint="default: 0.25")

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """The abstract places it above GaLore at equal memory; AdamW is approached, not reached."""
        return 0.01 + 0.02 * (0.25 - min(0.25, self.density))

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[Technique]:
        """A quarter, as in the paper, and less."""
        yield from (cls(density=density) for density in (0.25, 0.125, 0.0625))


class Frugal(ProjectedOptimizer):
    """FRUGAL as a torch optimizer: ``Frugal(model, lr=1e-3, density=0.25, update_gap=200)``.

    See ``ProjectedOptimizer`` for the arguments and ``FrugalRule`` for the hyperparameters.
    """

    method = FrugalRule


FrugalRule.kind = Frugal
