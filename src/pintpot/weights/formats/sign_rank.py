"""A weight whose signs are stored at one bit each, and whose magnitudes are a matrix of low rank.

``W = S * (left @ right)`` number by number, with ``S`` of -1 and 1. Of rank one this is the sign-value-independent
decomposition of Xu et al. 2024, arXiv:2402.11295, sec. 3.2; of more, the absolute value decomposition of Wang et al.
2024, arXiv:2410.23918.

Bytes of a weight (O, I): ``O * packed_size(I, 1) + 2 * rank * (O + I)``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pintpot.core.errors import ShapeError
from pintpot.kernels import pack, packed_size
from pintpot.kernels.tables import few_rows, sign_rank_decode, sign_rank_matmul
from pintpot.weights.formats._base import Format, Storage, Tensors, decodes_in_place, file_name
from pintpot.weights.formats.grid import SCALE_DTYPES

EXACT_SIDE = 512
"""Smaller side of a matrix up to which its leading singular vectors are computed exactly."""

POWER_STEPS = 6
"""Rounds of power iteration above."""


@file_name("sign_rank")
@dataclass(frozen=True, kw_only=True)
class SignRank(Format):
    """Signs times a matrix of low rank.

    Attributes:
        rank: of the magnitudes.
        scale_dtype: of the factors, ``"float16"`` or ``"bfloat16"``.
    """

    rank: int = 1
    scale_dtype: str = "float16"

    def storage(self, out_features: int, in_features: int) -> Storage:
        """``signs`` packed, ``left`` (O, rank) and ``right`` (rank, I).

        Raises:
            ShapeError: when the rank is not between 1 and the smaller side.
        """
        if not 1 <= self.rank <= min(out_features, in_features):
            raise ShapeError(
                f"a matrix of {out_features} x {in_features} has no rank {self.rank}",
                hint=f"choose a rank from 1 to {min(out_features, in_features)}",
            )
        return {
            "signs": ((out_features, packed_size(in_features, 1)), torch.uint8),
            "left": ((out_features, self.rank), SCALE_DTYPES[self.scale_dtype]),
            "right": ((self.rank, in_features), SCALE_DTYPES[self.scale_dtype]),
        }

    def encode(self, weight: Tensor) -> Tensors:
        """The signs, and the matrix of this rank that comes nearest to the magnitudes."""
        return self.store(weight, *leading_factors(weight.float().abs(), self.rank))

    def store(self, signed: Tensor, left: Tensor, right: Tensor) -> Tensors:
        """The stored tensors of given factors, with the signs of a matrix (O, I); zero counts as positive."""
        dtype = SCALE_DTYPES[self.scale_dtype]
        most = torch.finfo(dtype).max
        return {
            "signs": pack((signed >= 0).to(torch.uint8), 1),
            "left": left.clamp(-most, most).to(dtype).contiguous(),
            "right": right.clamp(-most, most).to(dtype).contiguous(),
        }

    def decode(self, tensors: Mapping[str, Tensor], in_features: int, dtype: torch.dtype) -> Tensor:
        """The signed product of the factors, computed in float32."""
        return sign_rank_decode(tensors["signs"], tensors["left"], tensors["right"], dtype)

    def multiplies_packed(self) -> bool:
        """It does."""
        return True

    def multiply_few(self, flat: Tensor, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """With signs and magnitudes put together a small tile at a time."""
        stored = tensors["signs"], tensors["left"], tensors["right"]
        return sign_rank_matmul(flat, *stored) if few_rows(flat, *stored) else None

    def rows(self, tensors: Mapping[str, Tensor], rows: slice) -> Tensors:
        """The signs and the left factor of the rows, and the right factor."""
        return {"signs": tensors["signs"][rows], "left": tensors["left"][rows], "right": tensors["right"]}

    def out_features(self, tensors: Mapping[str, Tensor]) -> int:
        """O of the signs."""
        return int(tensors["signs"].shape[0])

    def row_bytes(self, in_features: int, dtype: torch.dtype) -> int:
        """The numbers alone where they are decoded by a compiled kernel.

        Otherwise a byte of each sign, its float32 form and the magnitude, and the number where it is not float32.
        """
        if decodes_in_place(dtype):
            return in_features * dtype.itemsize
        return in_features * (9 + (0 if dtype is torch.float32 else dtype.itemsize))


def leading_factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """``left`` (O, rank) and ``right`` (rank, I) whose product comes nearest to a matrix, each with half of the values.

    Exact where a side is at most ``EXACT_SIDE`` long, by the eigenvectors of the smaller square. Otherwise by power
    iteration from cosines, the first of which is constant and so has a share in the leading vector of any matrix
    without negative numbers.

    Args:
        matrix: float32 (O, I).
        rank: at most the smaller side.
    """
    if matrix.shape[0] > matrix.shape[1]:
        left, right = leading_factors(matrix.t(), rank)
        return right.t(), left.t()
    if matrix.shape[0] <= EXACT_SIDE:
        exact = matrix.double()
        basis = torch.linalg.eigh(exact @ exact.t()).eigenvectors[:, -rank:].flip(-1).to(matrix.dtype)
    else:
        start = matrix @ _cosines(matrix.shape[1], min(2 * rank + 8, matrix.shape[0]), matrix.device)
        for _ in range(POWER_STEPS):
            start = matrix @ (matrix.t() @ torch.linalg.qr(start).Q)
        wide = torch.linalg.qr(start).Q
        basis = wide @ torch.linalg.svd(wide.t() @ matrix, full_matrices=False).U[:, :rank]
    right = basis.t() @ matrix
    root = right.norm(dim=1, keepdim=True).sqrt()
    return basis * root.t(), right / root.clamp(min=torch.finfo(matrix.dtype).tiny)


def _cosines(length: int, count: int, device: torch.device) -> Tensor:
    places = torch.arange(length, device=device, dtype=torch.float32)[:, None] + 0.5
    return torch.cos(math.pi / length * places * torch.arange(count, device=device, dtype=torch.float32))
