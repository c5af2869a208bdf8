"""Greenformers: factorise every linear layer at a share of the rank at which nothing is saved.

Source:    Cahyawijaya 2021, "Greenformers", arXiv:2108.10808, chapter on the low-rank transformer, and the authors'
           library: a layer becomes two whose rank is a share of ``O I / (O + I)``, filled by the SVD, by semi-NMF, or
           at random for a model that is trained in this form.
Differs:   linear layers only (the library factorises convolutions too); the SVD is exact, where the library's is
           randomised; semi-NMF starts from the absolute values of the SVD's factor instead of clusters. No plain NMF,
           which is for weights without signs. Linformer, with which the thesis compares, is another method.
Saves:     weights, real: all but the share that is asked for. Applying it needs one dense matrix and its singular
           vectors.
Shapes:    weight (O, I); factors (O, R) and (R, I); by semi-NMF the first holds no negative number.
Composes:  caches, activations, adapters on the frozen base; not with anything that needs dense weights.
Use when:  a model is to be trained further in its small form, or matrices are known to be of low rank.
Not when:  nothing is trained afterwards: methods that look at inputs (lord) or spectra (welore) lose less.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pintpot.core.errors import CompositionError, ShapeError
from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Claim, Source, technique
from pintpot.core.workload import Workload
from pintpot.weights.factorised import FactorisedMethod, leading_factors
from pintpot.weights.statistics import InputStatistics

SOLVERS = ("svd", "snmf", "random")
"""How the factors are found."""


@technique(
    name="greenformers",
    wing="weights",
    source=Source(
        "Greenformers: Improving Computation and Memory Efficiency in Transformer Models via Low-Rank Approximation",
        2021,
        arxiv="2108.10808",
    ),
    accounts=[Account.WEIGHTS],
    jobs=["generate", "finetune", "compress"],
    removes=["dense_weights", "matrix_gradients"],
    claims=[
        Claim("costs of development saved, %", 30.0, versus="BERT-base", at="at least, estimated", where="abstract")
    ],
    fidelity="linear layers only; exact SVD",
)
@dataclass(frozen=True, kw_only=True)
class Greenformers(FactorisedMethod):
    """Factors at one share of the parity rank.

    Attributes:
        kept_fraction: of each layer's bytes.
        solver: ``"svd"``, ``"snmf"`` or ``"random"`` (to be trained).
        iterations: of semi-NMF.
        seed: of random factors.
    """

    rises: ClassVar[tuple[tuple[float, float], ...]] = (
        (15.5, 0.25),
        (14.2, 0.55),
        (11.1, 1.9),
        (8.0, 8.0),
        (4.0, 40.0),
    )
    kept_fraction: float = 0.5
    solver: str = "svd"
    iterations: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.kept_fraction < 1:
            raise ShapeError(
                f"kept_fraction is a share of each layer's bytes, not {self.kept_fraction}",
                hint="for instance greenformers(kept_fraction=0.5)",
            )
        if self.solver not in SOLVERS:
            raise CompositionError(
                f"greenformers cannot factorise by {self.solver!r}", hint=f"one of: {', '.join(SOLVERS)}"
            )

    def rank(self, out_features: int, in_features: int) -> int:
        """The share of the rank at which the factors are as large as the matrix; 0 leaves it dense."""
        return int(self.kept_fraction * (out_features * in_features // (out_features + in_features)))

    def factors(
        self, name: str, weight: Tensor, rank: int, inputs: InputStatistics | None = None
    ) -> tuple[Tensor, Tensor]:
        """By the solver."""
        if self.solver == "random":
            return random_factors(weight, rank, self.seed ^ zlib.crc32(name.encode()))
        if self.solver == "snmf":
            return semi_nmf(weight, rank, self.iterations)
        return leading_factors(weight, rank)

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[Greenformers]:
        """From the safest to the smallest."""
        for fraction in (0.9, 0.75, 0.6, 0.5, 0.4, 0.3):
            yield cls(kept_fraction=fraction)


def random_factors(weight: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Factors of two fresh linear layers: uniform within one over the root of each one's in-features."""
    generator = torch.Generator().manual_seed(seed)

    def layer(out_features: int, in_features: int) -> Tensor:
        values = torch.rand(out_features, in_features, generator=generator)
        return ((2 * values - 1) / in_features**0.5).to(weight.device)

    return layer(weight.shape[0], rank), layer(rank, weight.shape[1])


def semi_nmf(weight: Tensor, rank: int, iterations: int) -> tuple[Tensor, Tensor]:
    """Factors of which the left one is not negative, by the updates of Ding, Li and Jordan (2010).

    The right factor is the least-squares solution for the left one, which is then scaled number by number, so that it
    keeps its sign and the error does not rise.

    Args:
        weight: float32 (O, I).
        rank: R.
        iterations: of both updates.
    """
    dense = weight.double()
    left = leading_factors(weight, rank)[0].double().abs() + 1e-4
    right = torch.linalg.lstsq(left, dense).solution
    for _ in range(iterations):
        cross, gram = dense @ right.t(), right @ right.t()
        up = cross.clamp(min=0) + left @ (-gram).clamp(min=0)
        down = (-cross).clamp(min=0) + left @ gram.clamp(min=0)
        left = left * (up / down.clamp(min=1e-12)).sqrt()
        right = torch.linalg.lstsq(left, dense).solution
    return left.to(weight.dtype), right.to(weight.dtype)
