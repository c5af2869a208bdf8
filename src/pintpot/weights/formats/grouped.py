"""What formats with a number for each group of in-features share."""

from __future__ import annotations

import torch
from torch import Tensor

from pintpot.core.errors import ShapeError
from pintpot.weights.formats._base import Format

SCALE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}

SMALLEST = {"float16": 2.0**-24, "bfloat16": 2.0**-126}
"""The smallest positive scale that each dtype can hold."""


class Grouped(Format):
    """Rows of a weight in groups of in-features; a subclass has these two fields.

    Attributes:
        group_size: in-features that share a scale; -1 for a whole row. The last group may be shorter.
        scale_dtype: ``"float16"`` or ``"bfloat16"``.
    """

    group_size: int
    scale_dtype: str

    def check_groups(self) -> None:
        """Refuse fields that make no groups.

        Raises:
            ShapeError: naming the field.
        """
        if self.group_size != -1 and self.group_size < 1:
            raise ShapeError(
                f"group_size must be positive, or -1 for whole rows, not {self.group_size}", hint="for instance 128"
            )
        if self.scale_dtype not in SCALE_DTYPES:
            raise ShapeError(
                f"scales cannot be stored as {self.scale_dtype!r}", hint=f"one of: {', '.join(SCALE_DTYPES)}"
            )

    def group(self, in_features: int) -> int:
        """In-features that share a scale, for rows of this length."""
        return in_features if self.group_size == -1 else min(self.group_size, in_features)

    def groups(self, in_features: int) -> int:
        """N, for rows of this length."""
        return -(-in_features // self.group(in_features))

    def by_column(self, of_groups: Tensor, in_features: int) -> Tensor:
        """One number a group, (..., N), at each of its columns, (..., I)."""
        return of_groups.repeat_interleave(self.group(in_features), dim=-1)[..., :in_features]
