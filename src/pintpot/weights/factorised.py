"""Weights as products of two thin factors in the weight's own dtype: what all methods of that kind share.

Shapes: O out-features, I in-features, R rank. A weight is (O, I), its factors (O, R) and (R, I).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pintpot.core.errors import UnsupportedModel
from pintpot.core.shape import ModelShape
from pintpot.core.workload import Workload
from pintpot.weights._base import Evidence, Layout, WeightMethod, risk_between
from pintpot.weights.forecast import layout_of, packed_change, targets_of
from pintpot.weights.formats import Dense, Format, LowRank, Tensors
from pintpot.weights.ranks import parity_rank
from pintpot.weights.statistics import InputStatistics
from pintpot.weights.targets import Target


@dataclass(frozen=True, kw_only=True)
class FactorisedMethod(WeightMethod):
    """A method that holds each weight by two factors, where these are smaller, and leaves it dense where not."""

    drops: ClassVar[bool] = True
    rises: ClassVar[tuple[tuple[float, float], ...]]
    """Bits that are left of 16 for each number, dense matrices and all, and the relative rise of perplexity."""

    @abstractmethod
    def rank(self, out_features: int, in_features: int) -> int:
        """The rank of a weight of this shape; one above ``parity_rank`` (or 0) leaves it dense."""

    def factors(
        self, name: str, weight: Tensor, rank: int, inputs: InputStatistics | None = None
    ) -> tuple[Tensor, Tensor]:
        """The factors (O, R) and (R, I) of a weight (O, I), float32: its leading singular vectors unless overridden."""
        return leading_factors(weight, rank)

    def terms(self, name: str, out_features: int, in_features: int, dtype: torch.dtype) -> tuple[Format, ...]:
        """One product of factors; the weight as it is where they would be no smaller."""
        rank = self.rank(out_features, in_features)
        shrinks = 1 <= rank <= parity_rank(out_features, in_features)
        return (held(rank, dtype) if shrinks else Dense(dtype=dtype),)

    def layout(self, targets: Sequence[Target], evidence: Evidence | None = None) -> Layout:
        """The weights that get smaller.

        Raises:
            UnsupportedModel: when none does.
        """
        chosen = {t: self.rank(t.shape[-2], t.shape[-1]) for t in targets}
        layout = {
            t.parameter: (held(rank, t.dtype),)
            for t, rank in chosen.items()
            if 1 <= rank <= parity_rank(t.shape[-2], t.shape[-1])
        }
        if not layout:
            raise UnsupportedModel(
                f"{self}: no matrix gets smaller at its rank, not even {targets[0].parameter}",
                hint="choose a smaller rank",
            )
        return layout

    def find(
        self, name: str, weight: Tensor, formats: tuple[Format, ...], inputs: InputStatistics | None = None
    ) -> tuple[Tensors, ...]:
        """The factors at the rank of the format."""
        layout = formats[0]
        if not isinstance(layout, LowRank):
            return super().find(name, weight, formats, inputs)
        return (layout.encode_factors(*self.factors(name, weight.float(), layout.rank, inputs)),)

    def shrinks(self, shape: ModelShape) -> bool:
        """Whether any matrix of a model gets smaller."""
        return any(1 <= self.rank(*t.shape[-2:]) <= parity_rank(*t.shape[-2:]) for t in targets_of(shape))

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """From the share of the matrices' bytes that is left."""
        return risk_between(self.rises, 16 * kept_share(self, shape))


def held(rank: int, dtype: torch.dtype) -> LowRank:
    """The format of factors in the weight's dtype."""
    return LowRank(rank=rank, factor=Dense(dtype=dtype))


def leading_factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The nearest matrix of this rank: leading singular vectors, each with the root of its value on either side."""
    if weight.shape[0] > weight.shape[1]:
        right, left = leading_factors(weight.t(), rank)
        return left.t(), right.t()
    dense = weight.double()
    # Eigenvectors of the smaller Gram matrix take a fraction of the time of all singular vectors.
    vectors = torch.linalg.eigh(dense @ dense.t())[1][:, -rank:].flip(-1)
    rest = vectors.t() @ dense
    root = rest.norm(dim=1).sqrt()
    return (vectors * root).to(weight.dtype), (rest / root.clamp(min=1e-20)[:, None]).to(weight.dtype)


def output_factors(weight: Tensor, moments: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors of this rank with the least squared output error.

    With ``U`` the leading eigenvectors of the outputs' second moments ``W H W^T``, ``U U^T W x`` is the projection of
    the outputs on where they lie.

    Args:
        weight: float32 (O, I).
        moments: ``H``, the mean of ``x x^T`` (I, I), or the inputs' covariance.
        rank: R.

    Returns:
        ``U`` (O, R) and ``U^T W`` (R, I).
    """
    dense = weight.double()
    _, vectors = torch.linalg.eigh(dense @ moments.double() @ dense.t())
    left = vectors[:, -rank:].flip(-1)
    return left.to(weight.dtype), (left.t() @ dense).to(weight.dtype)


def kept_share(method: WeightMethod, shape: ModelShape) -> float:
    """The share of the bytes of all matrices in the blocks that is left, those that stay dense included."""
    dense = sum(t.numel * t.dtype.itemsize for t in targets_of(shape))
    return 1 + packed_change(shape, layout_of(shape, method)) / dense
