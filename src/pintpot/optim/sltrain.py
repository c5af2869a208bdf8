"""SLTrain: train each weight as a product of two thin matrices plus a few entries at random places.

Source:    Han et al. 2024, arXiv:2406.02214, and the authors' code (initialisation, scale, the rebuilt weight).
Differs:   places are kept as int32 (a half of the authors' int64) and drawn without a permutation of all of them. With
           ``density=0`` it is plain low-rank training, ``W = (alpha / R) B A``, and B is drawn like A.
Saves:     weights, gradients and optimizer, real: ``R (O + I)`` numbers and ``density O I`` entries instead of ``O I``.
           The dense weight is rebuilt in the forward and again in the backward pass and never kept: one layer's at
           a time, and one layer's dense gradient.
Shapes:    weight O x I, A (R, I), B (O, R), N entries with their places in the flat weight.
Composes:  any state format, gradient release, activation checkpointing; not with rules that project or choose blocks.
Use when:  pretraining, and neither AdamW's states nor the weights themselves fit.
Not when:  fine-tuning: the weights that were there are not kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from pintpot.core.errors import ShapeError
from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Claim, Source, technique
from pintpot.core.workload import Workload
from pintpot.optim._parameterize import FactoredLinear, Parameterization, SumLinear, matrix_of, typical_side, uniform
from pintpot.optim._tensors import has_values


@technique(
    name="sltrain",
    wing="optim",
    slot="optimizer",
    part="parameters",
    source=Source(
        "SLTrain: a sparse plus low-rank approach for parameter and memory efficient pretraining",
        arxiv="2406.02214",
        year=2024,
    ),
    accounts=(Account.WEIGHTS, Account.GRADIENTS, Account.OPTIMIZER),
    jobs=("pretrain",),
    needs=("dense_weights", "matrix_gradients", "gradients"),
    removes=("matrix_gradients",),
    claims=(
        Claim(
            "memory saved (fraction)",
            0.73,
            versus="full-rank training",
            at="Llama 7B pretraining, with quantised states and updates layer by layer",
            where="abstract",
        ),
    ),
    fidelity="places in int32",
)
@dataclass(frozen=True, kw_only=True)
class SLTrain(Parameterization):
    """``W = (alpha / rank) B A + S``.

    Attributes:
        rank: columns of B and rows of A.
        alpha: numerator of the scale.
        density: entries of S that are not zero, as a fraction of the weight.
    """

    may_be_zero = ("density",)

    rank: int = 128
    alpha: float = 32.0
    density: float = 0.03

    def parameterize(self, linear: nn.Linear | Conv1D, generator: torch.Generator | None) -> SumLinear:
        """A fresh start: what the layer held is not used."""
        return SparseLowRankLinear(linear, self, generator)

    def passing_numel(self, out: int, inside: int, tokens: int) -> int:
        """The dense weight or its gradient."""
        return out * inside

    def flops(self, out: int, inside: int, tokens: int) -> float:
        """The weight is rebuilt twice, and the gradients of both factors come from the dense one."""
        return 8.0 * self.rank * out * inside

    def check(self) -> None:
        """Refuse what is not positive, and densities of one or more."""
        super().check()
        if self.density >= 1:
            raise ShapeError(f"density must be below 1, not {self.density}", hint="default: 0.03")

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """The paper: comparable to full-rank training at a quarter of the width; more where the rank is lower."""
        return 0.03 * max(1.0, 0.25 * typical_side(shape) / self.rank)


class SparseLowRankLinear(FactoredLinear):
    """A linear layer of two factors and scattered entries."""

    places: Tensor

    def __init__(self, linear: nn.Linear | Conv1D, method: SLTrain, generator: torch.Generator | None) -> None:
        super().__init__(linear, method.rank, method.alpha, generator)
        matrix = matrix_of(linear)
        count = int(method.density * matrix.numel())
        if not count:
            # With nothing beside the product the weight would start at zero.
            self.left = nn.Parameter(uniform(tuple(self.left.shape), matrix, generator))
        self.register_buffer("places", _places(matrix, count, generator))
        bound = self.in_features**-0.5
        self.entries = nn.Parameter(matrix.new_empty(count).uniform_(-bound, bound, generator=generator))

    def dense(self) -> Tensor:
        """The product plus the entries at their places."""
        return _rebuilt(self.left, self.right, self.entries, self.places, self.scale)

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., I) to (..., O)."""
        made: Tensor = _Rebuilt.apply(inputs, self.left, self.right, self.entries, self.places, self.scale, self.bias)
        return made


class _Rebuilt(torch.autograd.Function):
    """The layer's product; its weight is made anew in each pass instead of saved."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        left: Tensor,
        right: Tensor,
        entries: Tensor,
        places: Tensor,
        scale: float,
        bias: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(inputs, left, right, entries, places)
        ctx.scale = scale
        return functional.linear(inputs, _rebuilt(left, right, entries, places, scale), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        inputs, left, right, entries, places = ctx.saved_tensors
        back = None
        if ctx.needs_input_grad[0]:
            back = gradient @ _rebuilt(left, right, entries, places, ctx.scale)
        rows = gradient.flatten(0, -2)
        whole = rows.T @ inputs.flatten(0, -2)
        of_left = (whole @ right.T).mul_(ctx.scale)
        of_right = (left.T @ whole).mul_(ctx.scale)
        of_entries = whole.view(-1).index_select(0, places)
        of_bias = rows.sum(0) if ctx.needs_input_grad[6] else None
        return back, of_left, of_right, of_entries, None, None, of_bias


def _rebuilt(left: Tensor, right: Tensor, entries: Tensor, places: Tensor, scale: float) -> Tensor:
    dense = (left @ right).mul_(scale)
    dense.view(-1).index_add_(0, places, entries)
    return dense


def _places(matrix: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """Ascending distinct places in the flat weight, every choice as likely as any other, ``(N,)``."""
    numel = matrix.numel()
    dtype = torch.int32 if numel < 1 << 31 else torch.int64
    places = torch.empty(0, dtype=dtype, device=matrix.device)
    if not has_values(matrix):
        return places.new_empty(count)
    while len(places) < count:
        # Never more than are missing: to drop some of the distinct ones again would prefer low places.
        drawn = torch.randint(numel, (count - len(places),), generator=generator, dtype=dtype, device=matrix.device)
        places = torch.cat((places, drawn)).unique()
    return places
