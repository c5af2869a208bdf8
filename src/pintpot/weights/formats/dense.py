"""A term that is stored as it is, for what other formats cannot hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pintpot.weights.formats._base import Format, Storage, Tensors, file_name


@file_name("dense")
@dataclass(frozen=True, kw_only=True)
class Dense(Format):
    """Numbers as they are.

    Attributes:
        dtype: of the stored numbers.
    """

    dtype: torch.dtype = torch.float32

    def storage(self, out_features: int, in_features: int) -> Storage:
        """One tensor (O, I)."""
        return {"dense": ((out_features, in_features), self.dtype)}

    def encode(self, weight: Tensor) -> Tensors:
        """The weight in the term's dtype."""
        return {"dense": weight.detach().to(self.dtype, copy=True)}

    def decode(self, tensors: Mapping[str, Tensor], in_features: int, dtype: torch.dtype) -> Tensor:
        """The numbers in ``dtype``."""
        return tensors["dense"].to(dtype)

    def matmul(self, input: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """``input`` (..., I) times the transposed weight."""
        return functional.linear(input, tensors["dense"].to(input.dtype))

    def workspace(self, out_features: int, in_features: int, dtype: torch.dtype) -> int:
        """Bytes of a cast weight, where the dtypes differ."""
        return 0 if dtype is self.dtype else out_features * in_features * dtype.itemsize
