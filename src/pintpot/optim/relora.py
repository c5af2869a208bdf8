"""ReLoRA: train thin matrices beside a frozen weight, and every T steps merge them into it and start anew.

Source:    Lialin et al. 2023, arXiv:2307.05695, and the authors' code (initialisation, merge and restart).
Differs:   at a restart the optimizer's state of the factors is cleared whole (the paper prunes nearly all of it, by
           magnitude); the learning rate is not warmed up again here, which is the schedule's business; there is no
           full-rank warm start (give a model that has had one), no dropout. With ``restart_gap=0`` nothing is ever
           merged: that is LoRA used for pretraining.
Saves:     gradients and optimizer, real: those of ``R (O + I)`` numbers instead of ``O I``. Weights grow by as much,
           activations by R numbers a token and layer.
Shapes:    frozen weight O x I, A (R, I), B (O, R); output += (alpha / R) B A input.
Composes:  any state format, gradient release, activation checkpointing; not with rules that project or choose blocks.
Use when:  pretraining goes on from a model that is past its first steps, and only states and gradients do not fit.
Not when:  training starts from random weights: a low-rank start is slow.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Claim, Source, technique
from pintpot.core.workload import Workload
from pintpot.optim._parameterize import (
    FactoredLinear,
    Parameterization,
    SumLinear,
    generator_for,
    matrix_of,
    typical_side,
    uniform,
)


@technique(
    name="relora",
    wing="optim",
    slot="optimizer",
    part="parameters",
    source=Source("ReLoRA: High-Rank Training Through Low-Rank Updates", arxiv="2307.05695", year=2023),
    accounts=(Account.GRADIENTS, Account.OPTIMIZER),
    jobs=("pretrain",),
    needs=("dense_weights", "matrix_gradients", "gradients"),
    removes=("matrix_gradients",),
    claims=(Claim("memory saved per GPU (GB)", 5.5, versus="full-rank training", at="up to 1.3B", where="abstract"),),
    fidelity="states cleared whole; no warm-up after a restart, no full-rank warm start, no dropout",
)
@dataclass(frozen=True, kw_only=True)
class ReLora(Parameterization):
    """``W = W0 + (alpha / rank) B A``, with W0 moved on at each restart.

    Attributes:
        rank: columns of B and rows of A.
        alpha: numerator of the scale.
        restart_gap: updates between restarts (T); 0 for never.
    """

    acts = True
    may_be_zero = ("restart_gap",)

    rank: int = 128
    alpha: float = 32.0
    restart_gap: int = 5000

    def parameterize(self, linear: nn.Linear | Conv1D, generator: torch.Generator | None) -> SumLinear:
        """The layer's weight frozen, with a product beside it that is zero."""
        return MergingLinear(linear, self, generator)

    def act_(self, layer: SumLinear, step: int, seed: int) -> Iterable[Tensor]:
        """Every ``restart_gap`` updates, merge and start anew."""
        if not isinstance(layer, MergingLinear) or not self.restart_gap or step % self.restart_gap:
            return ()
        layer.merge_(generator_for(layer.base, seed))
        return layer.left, layer.right

    def kept_numel(self, out: int, inside: int, tokens: int) -> int:
        """What is between the factors."""
        return tokens * min(self.rank, out, inside)

    def flops(self, out: int, inside: int, tokens: int) -> float:
        """Three passes through the factors, and no gradient of the weight."""
        return 2.0 * tokens * (3 * min(self.rank, out, inside) * (out + inside) - out * inside)

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """Behind full-rank training in all later comparisons, the more the lower its rank."""
        return 0.06 * max(1.0, 0.25 * typical_side(shape) / self.rank)


class MergingLinear(FactoredLinear):
    """A linear layer of a frozen weight and two factors."""

    base: Tensor

    def __init__(self, linear: nn.Linear | Conv1D, method: ReLora, generator: torch.Generator | None) -> None:
        super().__init__(linear, method.rank, method.alpha, generator)
        self.register_buffer("base", matrix_of(linear))

    def dense(self) -> Tensor:
        """The frozen weight and the product."""
        return torch.addmm(self.base, self.left, self.right, alpha=self.scale)

    def merge_(self, generator: torch.Generator | None) -> None:
        """Add the product to the frozen weight, and start the factors anew."""
        self.base.addmm_(self.left, self.right, alpha=self.scale)
        self.right.copy_(uniform((len(self.right), self.in_features), self.right, generator))
        self.left.zero_()

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., I) to (..., O)."""
        between = functional.linear(inputs, self.right).mul(self.scale)
        return functional.linear(inputs, self.base, self.bias) + functional.linear(between, self.left)
