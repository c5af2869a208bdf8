"""BiPFT: one bit for each weight and each input, and thin full-precision factors for what attention loses by that.

Source:    Xing et al. 2023, "BiPFT", arXiv:2312.08937: binary layers with a low-rank estimate of what binarisation
           leaves of queries, keys and values; binarisation and its gradients from the authors' code.
Differs:   what attention itself multiplies (queries, keys, values, probabilities) and embeddings stay as they are; the
           estimates are added to the binary queries, keys and values, so that each term of the residual polynomial
           follows from them (the code estimates the terms apart, with two vectors for queries and two for keys); they
           start from the error of the dense weight; inputs behind an activation are signed too, with a shift.
Saves:     weights, real: O * packed_size(I, 1) + 2 (O + I) + 4 (I + 1) bytes a matrix, 2 r (O + I) more for queries,
           keys and values. Training holds dense weights with gradients and moments.
Shapes:    weight (O, I); signs (O, I) packed; scale of the input (1,); its shift (I,); factors (O, r) and (r, I).
Composes:  caches, activations, adapters on the frozen base; not with anything that needs dense weights.
Use when:  weights and inputs must be single bits, and there is text and time to pretrain on it.
Not when:  only memory counts: with inputs as they are, onebit learns more at the same size.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from pintpot.core.errors import CompositionError
from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Claim, Source, technique
from pintpot.core.workload import Workload
from pintpot.weights._base import risk_between
from pintpot.weights.formats import Dense, Format, LowRank, SignedInput, SignRank, Tensors
from pintpot.weights.formats.signed_input import sign_of_input
from pintpot.weights.statistics import InputStatistics
from pintpot.weights.trained import StandIn, TrainedMethod

RISES = ((1.5, 23.0), (1.4, 23.2))
"""Bits a weight and the relative rise of perplexity, of the embedded model in `results/weights.csv` (300 steps)."""

OF_ATTENTION = re.compile(r"(^|[._])(q|k|v|qkv|wqkv|query|key|value|c_attn|query_key_value)(_proj)?(\.weight)?$")
"""Names of the weights that make queries, keys and values."""


@technique(
    name="bipft",
    wing="weights",
    source=Source(
        "BiPFT: Binary Pre-trained Foundation Transformer with Low-rank Estimation of Binarization Residual "
        "Polynomials",
        2023,
        "2312.08937",
    ),
    accounts=[Account.WEIGHTS],
    jobs=["compress"],
    removes=["dense_weights", "matrix_gradients"],
    claims=[
        Claim("memory saved, times", 28, versus="full precision", at="BERT base", where="abstract"),
        Claim("GLUE average, % gained", 15.4, versus="binary models of single tasks", where="abstract"),
    ],
    fidelity="attention's own products are not binary; residual estimates enter queries, keys and values themselves",
)
@dataclass(frozen=True, kw_only=True)
class BiPFT(TrainedMethod):
    """Binary weights and inputs with estimates of low rank.

    Attributes:
        rank: of the estimates for queries, keys and values; the paper has 1.
    """

    learning_rate: ClassVar[float] = 2e-4
    rank: int = 1

    def terms(self, name: str, out_features: int, in_features: int, dtype: torch.dtype) -> tuple[Format, ...]:
        """Signs of weight and input; for queries, keys and values factors of low rank beside them."""
        half = torch.bfloat16 if dtype is torch.bfloat16 else torch.float16
        scale = str(half).removeprefix("torch.")
        binary = SignedInput(inner=SignRank(scale_dtype=scale))
        if not OF_ATTENTION.search(name):
            return (binary,)
        return binary, LowRank(rank=min(self.rank, out_features, in_features), factor=Dense(dtype=half))

    def stand_in(
        self, name: str, weight: Tensor, formats: tuple[Format, ...], inputs: InputStatistics | None = None
    ) -> StandIn:
        """The dense weight, of which only the signs are seen, and factors of the error."""
        ranks = [layout.rank for layout in formats if isinstance(layout, LowRank)]
        if not isinstance(formats[0], SignedInput) or len(formats) != 1 + len(ranks):
            raise CompositionError(
                f"bipft trains signs and low-rank factors, not {formats}", hint="leave the layout to the method"
            )
        return _Binary(weight, ranks[0] if ranks else 0)

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """From bits a weight; large models lose less than the small one that it was measured on."""
        return risk_between(RISES, self.bits_a_weight(shape))

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[BiPFT]:
        """From the safest to the smallest."""
        for rank in (4, 2, 1):
            yield cls(rank=rank)


class _Binary(StandIn):
    """A trained weight whose signs multiply the signs of its input, and trained factors on the input as it is."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        self.latent = nn.Parameter(weight.clone())
        self.scale = nn.Parameter(weight.new_zeros(1))
        self.shift = nn.Parameter(weight.new_zeros(weight.shape[-1]))
        self.left: nn.Parameter | None = None
        if rank:
            dense = Dense(dtype=weight.dtype)
            found = LowRank(rank=rank, factor=dense).encode(weight - self.binary().detach())
            self.left, self.right = nn.Parameter(found["left_dense"]), nn.Parameter(found["right_dense"])

    def binary(self) -> Tensor:
        """The signs around the mean, times the mean magnitude; the gradient passes straight through."""
        latent = self.latent.detach()
        signs = torch.where(latent >= latent.mean(), latent.abs().mean(), -latent.abs().mean())
        return signs + (self.latent - latent)

    def weight(self) -> Tensor:
        return self.binary() if self.left is None else self.binary() + self.left @ self.right

    def input(self, input: Tensor) -> Tensor:
        shifted = input + self.shift
        if self.training and not self.scale.detach().any():
            with torch.no_grad():
                self.scale.copy_(2 * shifted.abs().mean())
        if not self.scale.detach().any():
            return input
        return sign_of_input(shifted, self.scale)

    def product(self, input: Tensor, bias: Tensor | None) -> Tensor:
        out = functional.linear(self.input(input), self.binary().to(input.dtype), bias)
        if self.left is None:
            return out
        return out + functional.linear(functional.linear(input, self.right.to(input.dtype)), self.left.to(input.dtype))

    @torch.no_grad()
    def terms(self, formats: tuple[Format, ...]) -> tuple[Tensors, ...]:
        layout: Any = formats[0]
        size = self.latent.abs().mean()
        left, right = size.expand(self.latent.shape[0], 1), torch.ones_like(self.latent[:1])
        inner = layout.inner.store(self.latent - self.latent.mean(), left, right)
        found: list[Tensors] = [layout.encode_with(inner, self.scale, self.shift)]
        if self.left is not None:
            factors: Any = formats[1]
            found.append(factors.encode_factors(self.left, self.right))
        return tuple(found)
