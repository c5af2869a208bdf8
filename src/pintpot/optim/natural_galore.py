"""Natural GaLore: GaLore whose small gradients are first divided by their empirical Fisher matrix.

Source:    Das 2024, arXiv:2410.16029; hyperparameters of the author's code (selfsupervised-ai/Natural-GaLore).
Differs:   the subspace is found as in our GaLore (the code decomposes both sides); Woodbury's identity is used in the
           shorter form that holds because the newest gradient is in the history; to the damping is added what
           float32 sums may be wrong by; Adam's epsilon is this library's 1e-8 unless set (the code has 1e-6). As
           in the code, gradients of the last subspace stay in the history after a refresh.
Saves:     optimizer, real where ``(2 + s) R`` is well below ``2 S``: ``S R + (2 + s) R L`` elements a matrix instead of
           ``2 S L``. The abstract speaks of no additional memory, but the history is most of it; 8-bit states pack it.
Shapes:    matrix S x L (smaller side first), basis S x R, moments R x L, history s x R x L.
Composes:  any method of another slot that leaves full gradients of the weight matrices.
Use when:  steps are few, the matrices large and the rank low.
Not when:  ``(2 + s) R`` exceeds ``2 S``: AdamW then takes less.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import TRAINING, Claim, Source, Technique, technique
from pintpot.core.work import Work
from pintpot.core.workload import Workload
from pintpot.optim._engine import ProjectedOptimizer
from pintpot.optim._groups import split_shape
from pintpot.optim._inner import FisherAdam, Inner
from pintpot.optim.galore import GaLoreRule


@technique(
    name="natural-galore",
    wing="optim",
    slot="optimizer",
    source=Source(
        "Natural GaLore: Accelerating GaLore for memory-efficient LLM Training and Fine-tuning",
        arxiv="2410.16029",
        year=2024,
    ),
    accounts=(Account.OPTIMIZER,),
    jobs=TRAINING,
    needs=("dense_weights", "matrix_gradients"),
    removes=("any_rule",),
    claims=(
        Claim("average score (%)", 86.05, versus="full fine-tuning 86.28", at="RoBERTa, GLUE", where="abstract"),
        Claim("accuracy (%)", 83.09, versus="16-bit LoRA 80.06", at="TinyLlama 1.1B, TinyAgent", where="abstract"),
    ),
    fidelity="one-sided subspace by a float64 eigendecomposition of G G^T",
)
@dataclass(frozen=True, kw_only=True)
class NaturalGaLoreRule(GaLoreRule):
    """``LeadingSubspace x FisherAdam x Drop``; other hyperparameters are GaLore's.

    Attributes:
        history: small gradients that the Fisher matrix is made of (s).
        damping: added to its diagonal (lambda).
    """

    history: int = 20
    damping: float = 1e-3

    def inner(self, betas: tuple[float, float], eps: float) -> Inner:
        """Adam on natural gradients."""
        return FisherAdam(betas=betas, eps=eps, history=self.history, damping=self.damping)

    def work(self, work: Work, shape: ModelShape, workload: Workload) -> Work:
        """That of GaLore, and the history: read twice, multiplied with itself, and summed."""
        if not workload.training:
            return work
        moved, flops = 0, 0.0
        for p in split_shape(shape)[0]:
            side = min(p.shape[-2:])
            small = p.numel // side * min(self.rank, side)
            moved += 2 * self.history * small * p.dtype.itemsize
            flops += 2.0 * small * self.history * (self.history + 1)
        more = super().work(work, shape, workload)
        return more.plus("step", read_bytes=moved, flops=flops, dtype=str(shape.dtype).removeprefix("torch."))

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[Technique]:
        """The default, and ranks so low that the history saves: a sixteenth and a 32nd of the smallest side."""
        sides = [min(p.shape[-2:]) for p in split_shape(shape)[0]]
        yield cls()
        ranks = {max(1, min(sides) // part) for part in (16, 32)} if sides else set()
        yield from (cls(rank=rank) for rank in sorted(ranks - {cls.rank}))


class NaturalGaLore(ProjectedOptimizer):
    """Natural GaLore as a torch optimizer: ``NaturalGaLore(model, lr=1e-2, rank=128, history=20, damping=1e-3)``.

    See ``ProjectedOptimizer`` for the arguments and ``NaturalGaLoreRule`` for the hyperparameters.
    """

    method = NaturalGaLoreRule


NaturalGaLoreRule.kind = NaturalGaLore
