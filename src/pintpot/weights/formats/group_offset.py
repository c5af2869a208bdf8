"""A term that is one number for each group of in-features: what lets the zero of another term's grid be any number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pintpot.weights.formats._base import Storage, Tensors, file_name
from pintpot.weights.formats.grouped import SCALE_DTYPES, Grouped


@file_name("group_offset")
@dataclass(frozen=True, kw_only=True)
class GroupOffset(Grouped):
    """All numbers of a group are one. Its product is that of the sums of the input over groups: N columns, not I.

    Attributes:
        group_size: in-features that share a number; -1 for a whole row. The last group may be shorter.
        scale_dtype: of the numbers, ``"float16"`` or ``"bfloat16"``.
    """

    group_size: int = 128
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        self.check_groups()

    def storage(self, out_features: int, in_features: int) -> Storage:
        """``offset`` (O, N)."""
        return {"offset": ((out_features, self.groups(in_features)), SCALE_DTYPES[self.scale_dtype])}

    def encode(self, weight: Tensor) -> Tensors:
        """The mean of each group."""
        columns = weight.shape[-1]
        sums = self.sums(weight.float())
        counts = self.sums(torch.ones((1, columns), device=weight.device))
        return {"offset": (sums / counts).to(SCALE_DTYPES[self.scale_dtype])}

    def sums(self, numbers: Tensor) -> Tensor:
        """Of numbers (..., I) over each group, (..., N), in their dtype."""
        columns = numbers.shape[-1]
        size = self.group(columns)
        return functional.pad(numbers, (0, -columns % size)).unflatten(-1, (-1, size)).sum(-1)

    def decode(self, tensors: Mapping[str, Tensor], in_features: int, dtype: torch.dtype) -> Tensor:
        """The numbers (O, I)."""
        return self.by_column(tensors["offset"].to(dtype), in_features)

    def matmul(self, input: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """``input`` (..., I) times the transposed weight, from its sums over groups."""
        return functional.linear(self.sums(input), tensors["offset"].to(input.dtype))

    def workspace(self, out_features: int, in_features: int, dtype: torch.dtype) -> int:
        """Bytes of the numbers in the input's dtype; a padded input is as large as the input, and not counted."""
        same = dtype is SCALE_DTYPES[self.scale_dtype]
        return 0 if same else out_features * self.groups(in_features) * dtype.itemsize
