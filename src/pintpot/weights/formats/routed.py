"""Terms of several tasks, of which those that are wanted are added, each with a weight.

Which are wanted is a part of the format and not of what is stored: changing it costs nothing, and a model is switched
to another task by giving its modules another format (``weights.routing.route_``). Terms that are not wanted are not
read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from pintpot.core.errors import ShapeError
from pintpot.weights.formats._base import Format, Storage, Tensors, file_name, prefixed, within
from pintpot.weights.formats.signs import Signs


@file_name("routed")
@dataclass(frozen=True, kw_only=True)
class Routed(Format):
    """``W = sum of weight_t * inner_t`` over tasks ``t``.

    Attributes:
        inner: the format of each task's term.
        tasks: their names.
        weights: of the terms, in the order of the tasks; none where no task was chosen: then the sum is zero.
    """

    inner: Format = field(default_factory=Signs)
    tasks: tuple[str, ...] = ("task",)
    weights: tuple[float, ...] = ()

    prefix: ClassVar[str] = "task{}_"
    """Before the names of the tensors of the task of this number. It does not change."""

    def __post_init__(self) -> None:
        if not self.tasks or len(set(self.tasks)) < len(self.tasks) or len(self.weights) not in (0, len(self.tasks)):
            raise ShapeError(
                f"weights {self.weights} do not belong to tasks {self.tasks}",
                hint="name each task once, and give no weights or one for each",
            )

    def storage(self, out_features: int, in_features: int) -> Storage:
        """The tensors of every task."""
        stored: Storage = {}
        for index in range(len(self.tasks)):
            stored |= prefixed(self.prefix.format(index), self.inner.storage(out_features, in_features))
        return stored

    def encode(self, weight: Tensor) -> Tensors:
        """The same for every task: what tasks whose weights add up to one then hold together."""
        return self.store([self.inner.encode(weight) for _ in self.tasks])

    def store(self, terms: Sequence[Tensors]) -> Tensors:
        """The stored tensors of each task's."""
        stored: Tensors = {}
        for index, tensors in enumerate(terms):
            stored |= prefixed(self.prefix.format(index), tensors)
        return stored

    def wanted(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[float, Tensors]]:
        """The weight and the tensors of each term that is added."""
        for index, weight in enumerate(self.weights):
            if weight:
                yield weight, within(self.prefix.format(index), tensors)

    def decode(self, tensors: Mapping[str, Tensor], in_features: int, dtype: torch.dtype) -> Tensor:
        """The weighted sum of the wanted terms."""
        parts = ((w, self.inner.decode(stored, in_features, dtype)) for w, stored in self.wanted(tensors))
        total = _weighted(parts)
        if total is None:
            like = next(iter(tensors.values()))
            return like.new_zeros((self.out_features(tensors), in_features), dtype=dtype)
        return total

    def matmul(self, input: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of the products with the wanted terms."""
        total = _weighted((w, self.inner.matmul(input, stored)) for w, stored in self.wanted(tensors))
        return input.new_zeros((*input.shape[:-1], self.out_features(tensors))) if total is None else total

    def rows(self, tensors: Mapping[str, Tensor], rows: slice) -> Tensors:
        """The rows of every task's."""
        names = [self.prefix.format(index) for index in range(len(self.tasks))]
        return self.store([self.inner.rows(within(name, tensors), rows) for name in names])

    def rows_together(self) -> int:
        """Those of the inner format."""
        return self.inner.rows_together()

    def out_features(self, tensors: Mapping[str, Tensor]) -> int:
        """O of the first task's."""
        return self.inner.out_features(within(self.prefix.format(0), tensors))

    def row_bytes(self, in_features: int, dtype: torch.dtype) -> int:
        """A row of the sum, and what decoding one of a term takes."""
        return in_features * dtype.itemsize + self.inner.row_bytes(in_features, dtype)

    def workspace(self, out_features: int, in_features: int, dtype: torch.dtype) -> int:
        """That of one term, where any is wanted; the terms' outputs are not counted."""
        return self.inner.workspace(out_features, in_features, dtype) if any(self.weights) else 0


def _weighted(parts: Iterator[tuple[float, Tensor]]) -> Tensor | None:
    """The weighted sum, or None where there is nothing to add."""
    total: Tensor | None = None
    for weight, part in parts:
        scaled = part if weight == 1 else part * weight
        total = scaled if total is None else total + scaled
    return total
