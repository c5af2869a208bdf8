"""A weight that is the product of two thin factors, each held by a format of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pintpot.core.errors import ShapeError
from pintpot.kernels import low_rank_matmul, low_rank_workspace
from pintpot.weights.formats._base import Format, Storage, Tensors, file_name, prefixed, within
from pintpot.weights.formats.dense import Dense


@file_name("low_rank")
@dataclass(frozen=True, kw_only=True)
class LowRank(Format):
    """``W = left @ right`` with ``left`` (O, r) and ``right`` (r, I).

    Attributes:
        rank: r.
        factor: the format of both factors.
    """

    rank: int = 16
    factor: Format = field(default_factory=lambda: Dense(dtype=torch.float16))

    def storage(self, out_features: int, in_features: int) -> Storage:
        """The tensors of both factors.

        Raises:
            ShapeError: when the rank is not between 1 and the smaller side.
        """
        if not 1 <= self.rank <= min(out_features, in_features):
            raise ShapeError(
                f"a matrix of {out_features} x {in_features} has no rank {self.rank}",
                hint=f"choose a rank from 1 to {min(out_features, in_features)}",
            )
        return {
            **prefixed("left_", self.factor.storage(out_features, self.rank)),
            **prefixed("right_", self.factor.storage(self.rank, in_features)),
        }

    def encode(self, weight: Tensor) -> Tensors:
        """The nearest matrix of this rank: the leading singular vectors, each with the root of its value."""
        left, values, right = torch.linalg.svd(weight.float(), full_matrices=False)
        root = values[: self.rank].sqrt()
        return self.encode_factors(left[:, : self.rank] * root, root[:, None] * right[: self.rank])

    def encode_factors(self, left: Tensor, right: Tensor) -> Tensors:
        """Given factors (O, r) and (r, I)."""
        return {
            **prefixed("left_", self.factor.encode(left.contiguous())),
            **prefixed("right_", self.factor.encode(right.contiguous())),
        }

    def factors(self, tensors: Mapping[str, Tensor], in_features: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Both factors in ``dtype``."""
        left = self.factor.decode(within("left_", tensors), self.rank, dtype)
        return left, self.factor.decode(within("right_", tensors), in_features, dtype)

    def decode(self, tensors: Mapping[str, Tensor], in_features: int, dtype: torch.dtype) -> Tensor:
        """The product of the factors, computed in float32."""
        left, right = self.factors(tensors, in_features, torch.float32)
        return (left @ right).to(dtype)

    def matmul(self, input: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """First the right factor, then the left one; of dense factors without all inner numbers in memory."""
        if isinstance(self.factor, Dense):
            return low_rank_matmul(input, tensors["left_dense"], tensors["right_dense"])
        inner = self.factor.matmul(input, within("right_", tensors))
        return self.factor.matmul(inner, within("left_", tensors))

    def multiplies_packed(self) -> bool:
        """By dense factors, or where their format does."""
        return isinstance(self.factor, Dense) or self.factor.multiplies_packed()

    def workspace(self, out_features: int, in_features: int, dtype: torch.dtype) -> int:
        """That of the factor with the larger one; only dense factors have the thin product beside it bounded."""
        if isinstance(self.factor, Dense):
            return low_rank_workspace(out_features, in_features, self.rank, self.factor.dtype, dtype)
        return max(
            self.factor.workspace(out_features, self.rank, dtype), self.factor.workspace(self.rank, in_features, dtype)
        )

    def rows(self, tensors: Mapping[str, Tensor], rows: slice) -> Tensors:
        """The rows of the left factor, and the right one."""
        left = prefixed("left_", self.factor.rows(within("left_", tensors), rows))
        return {**left, **prefixed("right_", within("right_", tensors))}

    def out_features(self, tensors: Mapping[str, Tensor]) -> int:
        """O of the left factor."""
        return self.factor.out_features(within("left_", tensors))
