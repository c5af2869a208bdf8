"""Formats that hold a weight in another format and change its input before the product."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from pintpot.weights.formats._base import Format, Storage, Tensors, prefixed, within
from pintpot.weights.formats.grid import Grid


@dataclass(frozen=True, kw_only=True)
class Wrapped(Format):
    """A base: what a subclass does to the input, and which tensors it needs for that, is all that it adds.

    Attributes:
        inner: the format of the weight.
    """

    prefix: ClassVar[str] = "inner_"
    """Before the names of the inner tensors; empty where there are no others. It does not change."""

    inner: Format = field(default_factory=Grid)

    @abstractmethod
    def changed(self, input: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """What the inner product gets in the place of ``input`` (..., I)."""

    def own_storage(self, in_features: int) -> Storage:
        """The tensors beside the inner ones; they belong to all rows."""
        return {}

    def storage(self, out_features: int, in_features: int) -> Storage:
        """The inner tensors and its own."""
        inner = prefixed(self.prefix, self.inner.storage(out_features, in_features))
        return {**inner, **self.own_storage(in_features)}

    def encode(self, weight: Tensor) -> Tensors:
        """The inner tensors."""
        return prefixed(self.prefix, self.inner.encode(weight))

    def decode(self, tensors: Mapping[str, Tensor], in_features: int, dtype: torch.dtype) -> Tensor:
        """The inner numbers."""
        return self.inner.decode(within(self.prefix, tensors), in_features, dtype)

    def matmul(self, input: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """The inner product of the changed input."""
        return self.inner.matmul(self.changed(input, tensors), within(self.prefix, tensors))

    def multiplies_packed(self) -> bool:
        """As the inner format does: only its input is changed."""
        return self.inner.multiplies_packed()

    def workspace(self, out_features: int, in_features: int, dtype: torch.dtype) -> int:
        """That of the inner format; the changed input is as large as the input, which is not counted either."""
        return self.inner.workspace(out_features, in_features, dtype)

    def row_bytes(self, in_features: int, dtype: torch.dtype) -> int:
        """That of the inner format."""
        return self.inner.row_bytes(in_features, dtype)

    def rows(self, tensors: Mapping[str, Tensor], rows: slice) -> Tensors:
        """The inner tensors of the rows, and its own."""
        own = {name: tensor for name, tensor in tensors.items() if not name.startswith(self.prefix)}
        return {**prefixed(self.prefix, self.inner.rows(within(self.prefix, tensors), rows)), **own}

    def rows_together(self) -> int:
        """Those of the inner format."""
        return self.inner.rows_together()

    def out_features(self, tensors: Mapping[str, Tensor]) -> int:
        """O of the inner tensors."""
        return self.inner.out_features(within(self.prefix, tensors))


def passed_through(input: Tensor, rounded: Tensor) -> Tensor:
    """The rounded numbers with the gradient of the input itself."""
    return input + (rounded - input.detach()) if input.requires_grad else rounded
