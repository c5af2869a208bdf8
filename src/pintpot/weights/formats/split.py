"""A weight whose output channels are held by several formats, some of them in finer ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pintpot.core.errors import ShapeError
from pintpot.weights.formats._base import Format, Storage, Tensors, file_name, prefixed, within
from pintpot.weights.formats.grid import Grid


@file_name("split")
@dataclass(frozen=True, kw_only=True)
class Split(Format):
    """Output channels in parts; ``order`` says which channel each row of the parts, one after the other, is.

    Attributes:
        parts: the format of each part.
        counts: output channels of each part; they add up to O.
        first: channels that the order begins with, where they are known before the weight is; the others follow.
    """

    parts: tuple[Format, ...] = (Grid(),)
    counts: tuple[int, ...] = (1,)
    first: tuple[int, ...] = ()

    def storage(self, out_features: int, in_features: int) -> Storage:
        """``order`` int32 (O,) and the tensors of each part that is not empty.

        Raises:
            ShapeError: when the parts do not add up.
        """
        if len(self.parts) != len(self.counts) or sum(self.counts) != out_features or min(self.counts) < 0:
            raise ShapeError(
                f"parts of {self.counts} output channels are not {out_features}", hint="let the counts add up to them"
            )
        if len(set(self.first)) < len(self.first) or not all(0 <= c < out_features for c in self.first):
            raise ShapeError(
                f"the first of {out_features} output channels cannot be {self.first}", hint="name each one at most once"
            )
        stored: Storage = {}
        for prefix, layout, count in self._parts():
            stored |= prefixed(prefix, layout.storage(count, in_features))
        return {**stored, "order": ((out_features,), torch.int32)}

    def _parts(self) -> Iterator[tuple[str, Format, int]]:
        for index, (layout, count) in enumerate(zip(self.parts, self.counts, strict=True)):
            if count:
                yield f"part{index}_", layout, count

    def own_order(self, device: torch.device) -> Tensor:
        """The channels int64 (O,): the first ones, and the others as they come."""
        known = set(self.first)
        others = [channel for channel in range(sum(self.counts)) if channel not in known]
        return torch.tensor([*self.first, *others], dtype=torch.int64, device=device)

    def encode(self, weight: Tensor) -> Tensors:
        """With the channels in the format's own order."""
        return self.encode_with(weight, self.own_order(weight.device))

    def encode_with(self, weight: Tensor, order: Tensor) -> Tensors:
        """With the channels of ``order`` (O,), the first of them in the first part."""
        parts: list[Tensors] = []
        start = 0
        for _, layout, count in self._parts():
            parts.append(layout.encode(weight[order[start : start + count]]))
            start += count
        return self.store(parts, order)

    def store(self, parts: Sequence[Tensors], order: Tensor) -> Tensors:
        """The stored tensors of those of each part that is not empty, and the order (O,)."""
        stored: Tensors = {}
        for (prefix, _, _), tensors in zip(self._parts(), parts, strict=True):
            stored |= prefixed(prefix, tensors)
        return {**stored, "order": order.to(torch.int32)}

    def decode(self, tensors: Mapping[str, Tensor], in_features: int, dtype: torch.dtype) -> Tensor:
        """The rows of all parts in the channels' own order."""
        order = tensors["order"].long()
        dense = torch.empty((order.shape[0], in_features), dtype=dtype, device=order.device)
        start = 0
        for prefix, layout, count in self._parts():
            dense[order[start : start + count]] = layout.decode(within(prefix, tensors), in_features, dtype)
            start += count
        return dense

    def matmul(self, input: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """The products of the parts in the channels' own order."""
        parts = [layout.matmul(input, within(prefix, tensors)) for prefix, layout, _ in self._parts()]
        places = torch.empty_like(tensors["order"], dtype=torch.int64)
        places[tensors["order"].long()] = torch.arange(places.shape[0], device=places.device)
        return torch.cat(parts, -1).index_select(-1, places)

    def workspace(self, out_features: int, in_features: int, dtype: torch.dtype) -> int:
        """The most of any part; the parts' outputs, each channel once more, are not counted."""
        return max(layout.workspace(count, in_features, dtype) for _, layout, count in self._parts())

    def out_features(self, tensors: Mapping[str, Tensor]) -> int:
        """O."""
        return int(tensors["order"].shape[0])
