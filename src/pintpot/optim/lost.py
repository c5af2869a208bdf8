"""LOST: train each weight as its leading singular vectors plus the columns that those reproduce worst.

Source:    Li et al. 2025, arXiv:2508.02668, and the adapter of the authors' code (factors from the singular value
           decomposition, columns by the norm of what is left, mixed by gamma).
Differs:   no activation between the factors (an option in the authors' code), so that the layer stays linear and merges
           into one weight; the columns are chosen by all remaining singular values (the code takes a number of them);
           singular vectors by an eigendecomposition in float64.
Saves:     weights, gradients and optimizer, real: ``R (O + I) + O K`` numbers instead of ``O I``. Activations grow by
           ``R + K`` numbers a token and layer.
Shapes:    weight O x I, A (R, I), B (O, R), K columns (O, K) with their numbers.
Composes:  any state format, gradient release, activation checkpointing; rules that project see the columns' gradient.
Use when:  pretraining, and fewer products as well as fewer bytes are wanted.
Not when:  fine-tuning: most of the weight is dropped at the start.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from pintpot.core.errors import ShapeError
from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Claim, Source, technique
from pintpot.core.workload import Workload
from pintpot.optim._leading import LeadingSubspace
from pintpot.optim._parameterize import Parameterization, SumLinear, matrix_of, typical_side
from pintpot.optim._project import State
from pintpot.optim._tensors import oriented


@technique(
    name="lost",
    wing="optim",
    slot="optimizer",
    part="parameters",
    source=Source("LOST: Low-rank and Sparse Pre-training for Large Language Models", arxiv="2508.02668", year=2025),
    accounts=(Account.WEIGHTS, Account.GRADIENTS, Account.OPTIMIZER),
    jobs=("pretrain",),
    needs=("dense_weights", "matrix_gradients", "gradients"),
    claims=(Claim("validation perplexity", 15.02, versus="full-rank training 15.56", at="Llama 1B, C4"),),
    fidelity="no activation between the factors; columns chosen by the whole remainder",
)
@dataclass(frozen=True, kw_only=True)
class Lost(Parameterization):
    """``W = gamma B A + (1 - gamma) W_columns``.

    Attributes:
        rank: columns of B and rows of A.
        sparsity: columns (input channels) kept, as a fraction.
        gamma: weight of the low-rank part; the columns have the rest.
    """

    rank: int = 128
    sparsity: float = 0.05
    gamma: float = 0.7

    def parameterize(self, linear: nn.Linear | Conv1D, generator: torch.Generator | None) -> SumLinear:
        """Factors and columns of the weight that the layer holds."""
        return ColumnsLowRankLinear(linear, self)

    def kept_numel(self, out: int, inside: int, tokens: int) -> int:
        """What is between the factors, and the chosen channels of the input."""
        return tokens * (min(self.rank, out, inside) + self.columns(inside))

    def flops(self, out: int, inside: int, tokens: int) -> float:
        """Three passes through thin matrices instead of the whole."""
        thin = min(self.rank, out, inside) * (out + inside) + out * self.columns(inside)
        return 6.0 * tokens * (thin - out * inside)

    def columns(self, inside: int) -> int:
        """The number of columns kept of ``inside``."""
        return max(1, int(self.sparsity * inside))

    def check(self) -> None:
        """Refuse what is not positive, and fractions of more than one."""
        super().check()
        for name in ("sparsity", "gamma"):
            if getattr(self, name) > 1:
                raise ShapeError(f"{name} must be at most 1, not {getattr(self, name)}", hint="use the default")

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """The paper finds no loss; not zero, and more where the rank is lower than a quarter of the width."""
        return 0.02 * max(1.0, 0.25 * typical_side(shape) / self.rank)


class ColumnsLowRankLinear(SumLinear):
    """A linear layer of two factors and a few dense columns."""

    projected = ("columns",)
    channels: Tensor

    def __init__(self, linear: nn.Linear | Conv1D, method: Lost) -> None:
        super().__init__(linear)
        matrix = matrix_of(linear)
        self.gamma = method.gamma
        left, right = _factors(matrix, method.rank)
        self.left, self.right = nn.Parameter(left), nn.Parameter(right)
        wide = torch.promote_types(matrix.dtype, torch.float32)
        rest = torch.linalg.vector_norm(matrix - left @ right, dim=0, dtype=wide)
        channels = rest.topk(method.columns(self.in_features)).indices.sort().values
        self.register_buffer("channels", channels.int())
        self.columns = nn.Parameter(matrix.index_select(1, self.channels))

    def dense(self) -> Tensor:
        """The mixture of both parts."""
        dense = (self.left @ self.right).mul_(self.gamma)
        return dense.index_add_(1, self.channels, self.columns, alpha=1 - self.gamma)

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., I) to (..., O)."""
        # Scaled while they are small.
        between = functional.linear(inputs, self.right).mul(self.gamma)
        chosen = inputs.index_select(-1, self.channels).mul(1 - self.gamma)
        return functional.linear(between, self.left, self.bias) + functional.linear(chosen, self.columns)


def _factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best B (O, R) and A (R, I), each with the root of the singular values."""
    wide = oriented(matrix)
    project, state = LeadingSubspace(rank), State()
    project.refresh_(state, wide, 0, {})
    basis = state["basis"]
    small = basis.mT @ wide
    roots = torch.linalg.vector_norm(small, dim=-1).sqrt()
    # A direction that the weight does not have stays zero instead of becoming 0 / 0.
    thin, long = basis * roots, small / roots.clamp_min(torch.finfo(small.dtype).tiny)[:, None]
    return (thin, long) if wide is matrix else (long.mT.contiguous(), thin.mT.contiguous())
