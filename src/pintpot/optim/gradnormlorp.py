"""GradNormLoRP: train norms and thin matrices of a frozen weight, and project the gradients of the thin ones as well.

Source:    Huang et al. 2024, arXiv:2412.19616, and the authors' code (adapters of rank 8 with norms, projected to
           rank 4): ``W = m (W0 + B A) / ||W0 + B A||`` row by row, the factors under GaLore.
Differs:   the gradient is taken through the norm too, which the adapters that the authors' scripts use leave out; the
           projection is one-sided, as in their code; every linear layer of the blocks, no dropout; GaLore as here. As
           with them, A's first subspace is that of a zero gradient (B starts at zero), and stays until the refresh.
Saves:     gradients and optimizer, real: gradients of ``R (O + I) + O`` numbers instead of ``O I``, and GaLore's states
           for those. Weights grow by as much, activations by ``R + O`` numbers a token and layer.
Shapes:    frozen weight O x I, A (R, I), B (O, R), norms m (O).
Composes:  any state format, gradient release, activation checkpointing; not with rules that project or choose blocks.
Use when:  states and gradients do not fit, and LoRA is not close enough to full training.
Not when:  the adapter is to be kept apart from the model: this is merged when it is done.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from pintpot.core.errors import ShapeError
from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import TRAINING, Claim, Source, Technique, technique
from pintpot.core.workload import Workload
from pintpot.optim._base import OptimMethod
from pintpot.optim._groups import SMALLEST_SIDE
from pintpot.optim._parameterize import FactoredLinear, Parameterization, SumLinear, matrix_of
from pintpot.optim.galore import GaLoreRule


@technique(
    name="gradnormlorp",
    wing="optim",
    slot="optimizer",
    part="parameters",
    source=Source(
        "Gradient Weight-normalized Low-rank Projection for Efficient LLM Training", arxiv="2412.19616", year=2024
    ),
    accounts=(Account.GRADIENTS, Account.OPTIMIZER),
    jobs=TRAINING,
    needs=("dense_weights", "matrix_gradients", "gradients"),
    removes=("matrix_gradients",),
    claims=(
        Claim(
            "optimizer bytes saved (fraction)", 0.895, versus="full training", at="with 8-bit states", where="abstract"
        ),
        Claim("GLUE average", 80.65, versus="LoRA 79.23", at="RoBERTa, rank 8", where="abstract"),
    ),
    fidelity="gradient through the norm; one-sided projection; every linear layer, no dropout",
)
@dataclass(frozen=True, kw_only=True)
class GradNormLoRP(Parameterization):
    """``W = m (W0 + (alpha / rank) B A) / ||W0 + (alpha / rank) B A||``, a row at a time, under ``GaLoreRule``.

    Attributes:
        rank: columns of B and rows of A.
        alpha: numerator of the scale of B A.
        projected_rank: rows of a factor's projected gradient.
        update_gap: steps between refreshes of the subspace.
        scale: factor on the learning rate of the factors.
    """

    rank: int = 8
    alpha: float = 16.0
    projected_rank: int = 4
    update_gap: int = 500
    scale: float = 4.0

    def parameterize(self, linear: nn.Linear | Conv1D, generator: torch.Generator | None) -> SumLinear:
        """The layer's weight frozen, its norms trainable, with a product beside it that is zero."""
        return NormedLinear(linear, self, generator)

    def rule(self) -> OptimMethod:
        """GaLore with the projection's hyperparameters."""
        return GaLoreRule(rank=self.projected_rank, update_gap=self.update_gap, scale=self.scale)

    def kept_numel(self, out: int, inside: int, tokens: int) -> int:
        """What is between the factors, the output before its rows are scaled, and what the norms are made from."""
        rank = min(self.rank, out, inside)
        return tokens * (rank + out) + out * (rank + 4) + rank * rank

    def flops(self, out: int, inside: int, tokens: int) -> float:
        """Three passes through the factors, products of the frozen weight with one, no gradient of the weight."""
        rank = min(self.rank, out, inside)
        return 2.0 * tokens * (3 * rank * (out + inside) - out * inside) + 6.0 * rank * out * inside

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[Technique]:
        """Ranks 8 (the default) and 32, projected to a half."""
        for rank in (8, 32):
            yield cls(rank=rank, projected_rank=rank // 2)

    def check(self) -> None:
        """Refuse what is not positive, and ranks that no projection is made for."""
        super().check()
        if self.rank < SMALLEST_SIDE:
            raise ShapeError(
                f"rank must be at least {SMALLEST_SIDE}, not {self.rank}", hint="smaller factors are not projected"
            )

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """Between LoRA, which it outdoes in the paper, and full fine-tuning."""
        return 0.008 * (8 / self.rank) ** 0.5


class NormedLinear(FactoredLinear):
    """A linear layer of a frozen weight and two factors, its rows brought to trainable norms."""

    projected = ("left", "right")
    base: Tensor
    squares: Tensor

    def __init__(self, linear: nn.Linear | Conv1D, method: GradNormLoRP, generator: torch.Generator | None) -> None:
        super().__init__(linear, method.rank, method.alpha, generator)
        matrix = matrix_of(linear)
        wide = torch.promote_types(matrix.dtype, torch.float32)
        norms = torch.linalg.vector_norm(matrix, dim=1, dtype=wide)
        self.register_buffer("base", matrix)
        self.register_buffer("squares", norms.square())
        self.norms = nn.Parameter(norms.to(matrix.dtype))

    def dense(self) -> Tensor:
        """The sum with its rows at their norms."""
        return torch.addmm(self.base, self.left, self.right, alpha=self.scale).mul_(self._factors()[:, None])

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., I) to (..., O)."""
        between = functional.linear(inputs, self.right).mul(self.scale)
        made = (functional.linear(inputs, self.base) + functional.linear(between, self.left)) * self._factors()
        return made if self.bias is None else made + self.bias

    def _factors(self) -> Tensor:
        """Norm wanted over norm there, (O,), from products no larger than a factor.

        ``||w0 + c b A||^2 = ||w0||^2 + 2 c (w0 A^T) b + c^2 b (A A^T) b`` for each row w0 of W0 and b of B.
        """
        wide = self.squares.dtype
        left = self.left.to(wide)
        cross = (self.base @ self.right.T).to(wide)
        inner = (self.right @ self.right.T).to(wide)
        added = (2 * self.scale * cross + self.scale**2 * (left @ inner)) * left
        squares = (self.squares + added.sum(1)).clamp_min(torch.finfo(wide).tiny)
        return (self.norms.to(wide) * squares.rsqrt()).to(self.norms.dtype)
