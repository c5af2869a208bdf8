"""SST: keep each weight as its singular value decomposition; train all values and, by turns, some of the vectors.

Source:    Zhao et al. 2024, arXiv:2405.15481 (ICML 2025): sampled vectors, enhanced gradient, unit norms, re-SVD.
Differs:   the learning rate is not warmed up again when vectors change, which is the schedule's business; the states
           of the singular values are cleared at a re-SVD only.
Saves:     gradients and optimizer, real: those of ``R (O + I) + M`` numbers instead of ``O I``. Weights grow to
           ``M (O + I + 1)``. Inputs and gradients along the vectors, M numbers a token, are there for one layer at a
           time and not kept.
Shapes:    weight O x I, M = min(O, I); left vectors (M, O), right vectors (M, I), one a row, the R trained ones apart.
Composes:  any state format, gradient release, activation checkpointing; not with rules that project or choose blocks.
Use when:  pretraining where states and gradients do not fit, and the weight shall move in every direction.
Not when:  the weights themselves are what does not fit: they double.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Claim, Source, technique
from pintpot.core.workload import Workload
from pintpot.optim._parameterize import Parameterization, SumLinear, generator_for, matrix_of
from pintpot.optim._tensors import has_values


@technique(
    name="sst",
    wing="optim",
    slot="optimizer",
    part="parameters",
    source=Source(
        "Sparse Spectral Training and Inference on Euclidean and Hyperbolic Neural Networks",
        arxiv="2405.15481",
        year=2024,
    ),
    accounts=(Account.GRADIENTS, Account.OPTIMIZER),
    jobs=("pretrain",),
    needs=("dense_weights", "matrix_gradients", "gradients"),
    removes=("matrix_gradients",),
    claims=(
        Claim(
            "perplexity gap to full-rank training closed (fraction)",
            0.974,
            versus="other low-rank methods",
            at="Llama 1.3B, 18.7 % of the parameters trainable",
            where="abstract",
        ),
    ),
    fidelity="no warm-up after a change of vectors; states of the values cleared at a re-SVD only",
)
@dataclass(frozen=True, kw_only=True)
class Sst(Parameterization):
    """``W = U diag(s) V^T``.

    Attributes:
        rank: pairs of vectors that are trained at once.
        interval_steps: updates before others are drawn. After so many draws as it takes to train each vector once on
            average, the decomposition is made anew.
    """

    acts = True
    part_of_width = 0.0625

    rank: int = 64
    interval_steps: int = 200

    def parameterize(self, linear: nn.Linear | Conv1D, generator: torch.Generator | None) -> SumLinear:
        """The decomposition of the weight that the layer holds, with the first vectors drawn."""
        return SpectralLinear(linear, self, generator)

    def act_(self, layer: SumLinear, step: int, seed: int) -> Iterable[Tensor]:
        """Bring values and vectors back to where they may be; when it is time, draw other vectors."""
        if not isinstance(layer, SpectralLinear):
            return ()
        layer.values.clamp_min_(0)
        for vectors in (layer.left, layer.right):
            vectors.copy_(functional.normalize(vectors, dim=-1))
        if step % self.interval_steps:
            return ()
        forgotten = [layer.left, layer.right]
        draws = -(-len(layer.values) // len(layer.left))
        if step // self.interval_steps % draws == 0:
            layer.decompose_(layer.dense())
            forgotten.append(layer.values)
        layer.draw_(generator_for(layer.values, seed))
        return forgotten

    def kept_numel(self, out: int, inside: int, tokens: int) -> int:
        """The values in the order of the vectors."""
        return min(out, inside)

    def passing_numel(self, out: int, inside: int, tokens: int) -> int:
        """The inputs and the gradients along all vectors, each twice."""
        return 4 * tokens * min(out, inside)

    def flops(self, out: int, inside: int, tokens: int) -> float:
        """Five passes through half of the vectors' matrices each, and those of the trained vectors."""
        every, some = min(out, inside) * (out + inside), min(self.rank, out, inside) * (out + inside)
        return 2.0 * tokens * (2.5 * every + some - 3 * out * inside)

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """The paper's Llama of 1.3B is at 14.59 against 14.54; its smaller models lose far more."""
        return 0.005 if shape.numel > 1e9 else 0.1


class SpectralLinear(SumLinear):
    """A linear layer of singular values and vectors.

    Its vectors stand in the order of ``order``, in numbers of ``values``: the trained ones first, then the others.
    """

    order: Tensor
    still_left: Tensor
    still_right: Tensor

    def __init__(self, linear: nn.Linear | Conv1D, method: Sst, generator: torch.Generator | None) -> None:
        super().__init__(linear)
        matrix = matrix_of(linear)
        count = min(matrix.shape)
        rank = min(method.rank, count)
        self.values = nn.Parameter(matrix.new_empty(count))
        self.left = nn.Parameter(matrix.new_empty((rank, self.out_features)))
        self.right = nn.Parameter(matrix.new_empty((rank, self.in_features)))
        self.register_buffer("still_left", matrix.new_empty((count - rank, self.out_features)))
        self.register_buffer("still_right", matrix.new_empty((count - rank, self.in_features)))
        self.register_buffer("order", torch.arange(count, dtype=torch.int32, device=matrix.device))
        with torch.no_grad():
            self.decompose_(matrix)
            self.draw_(generator)

    def decompose_(self, matrix: Tensor) -> None:
        """Take the singular values and vectors of a matrix O x I, the largest first."""
        wide = torch.promote_types(matrix.dtype, torch.float32)
        left, values, right = torch.linalg.svd(matrix.to(wide), full_matrices=False)
        self.values.copy_(values)
        self.order.copy_(torch.arange(len(self.order), device=self.order.device))
        self._place_(left.T, right)

    def draw_(self, generator: torch.Generator | None) -> None:
        """Choose the vectors to train: with probability half even, half in proportion to their values."""
        count, rank = len(self.values), len(self.left)
        values = self.values.float()
        share = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)
        if has_values(values):
            chosen = torch.multinomial(0.5 * (1 / count + share), rank, generator=generator)
        else:
            chosen = torch.arange(rank, device=values.device)
        flags = torch.zeros_like(self.order).index_fill_(0, chosen, 1)
        order = flags.argsort(descending=True, stable=True)
        rows = self.order.argsort()[order]
        self._place_(torch.cat((self.left, self.still_left))[rows], torch.cat((self.right, self.still_right))[rows])
        self.order.copy_(order)

    def dense(self) -> Tensor:
        """The product of all of them."""
        along = self._along()
        scaled = torch.cat((self.right, self.still_right)) * along[:, None]
        return torch.cat((self.left, self.still_left)).T @ scaled

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., I) to (..., O)."""
        vectors = (self.left, self.right, self.still_left, self.still_right)
        made: Tensor = _Spectral.apply(inputs, self._along(), *vectors, self.bias)
        return made

    def _along(self) -> Tensor:
        return self.values.index_select(0, self.order)

    def _place_(self, left: Tensor, right: Tensor) -> None:
        rank = len(self.left)
        self.left.copy_(left[:rank])
        self.still_left.copy_(left[rank:])
        self.right.copy_(right[:rank])
        self.still_right.copy_(right[rank:])


class _Spectral(torch.autograd.Function):
    """The layer's product. Its backward pass gives the enhanced gradient: that of a vector without its value."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        along: Tensor,
        left: Tensor,
        right: Tensor,
        still_left: Tensor,
        still_right: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(inputs, along, left, right, still_left, still_right)
        rank = len(left)
        rows = inputs.flatten(0, -2)
        made = (rows @ right.T).mul_(along[:rank]) @ left
        made.addmm_((rows @ still_right.T).mul_(along[rank:]), still_left)
        if bias is not None:
            made += bias
        return made.view(*inputs.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        inputs, along, left, right, still_left, still_right = ctx.saved_tensors
        rank = len(left)
        rows, arrived = inputs.flatten(0, -2), gradient.flatten(0, -2)
        # What the inputs are along the right vectors, and the gradient along the left ones.
        inside, outside = rows @ right.T, arrived @ left.T
        of_left, of_right = inside.T @ arrived, outside.T @ rows
        of_trained = inside.mul_(outside).sum(0)
        back = outside.mul_(along[:rank]) @ right
        inside, outside = rows @ still_right.T, arrived @ still_left.T
        of_values = torch.cat((of_trained, inside.mul_(outside).sum(0)))
        back.addmm_(outside.mul_(along[rank:]), still_right)
        of_bias = arrived.sum(0) if ctx.needs_input_grad[6] else None
        return back.view_as(inputs), of_values, of_left, of_right, None, None, of_bias
