"""A weight whose input channels are held by several formats: the twin of ``Split``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pintpot.core.errors import ShapeError
from pintpot.weights.formats._base import Format, Storage, Tensors, file_name, prefixed, within
from pintpot.weights.formats.grid import Grid


@file_name("split_input")
@dataclass(frozen=True, kw_only=True)
class SplitInput(Format):
    """Input channels in parts; ``order`` says which channel each column of the parts, one after the other, is.

    Attributes:
        parts: the format of each part.
        counts: input channels of each part; they add up to I.
    """

    parts: tuple[Format, ...] = (Grid(),)
    counts: tuple[int, ...] = (1,)

    def storage(self, out_features: int, in_features: int) -> Storage:
        """``order`` (I,), in 16 bits where they are enough, and the tensors of each part that is not empty.

        Raises:
            ShapeError: when the parts do not add up.
        """
        if len(self.parts) != len(self.counts) or sum(self.counts) != in_features or min(self.counts) < 0:
            raise ShapeError(
                f"parts of {self.counts} input channels are not {in_features}", hint="let the counts add up to them"
            )
        stored: Storage = {"order": ((in_features,), _order_dtype(in_features))}
        for prefix, layout, channels in self.places():
            stored |= prefixed(prefix, layout.storage(out_features, channels.stop - channels.start))
        return stored

    def places(self) -> Iterator[tuple[str, Format, slice]]:
        """The name's beginning, the format and the place in the order of each part that is not empty."""
        start = 0
        for index, (layout, count) in enumerate(zip(self.parts, self.counts, strict=True)):
            if count:
                yield f"part{index}_", layout, slice(start, start + count)
            start += count

    def encode(self, weight: Tensor) -> Tensors:
        """With the channels in their own order."""
        return self.encode_with(weight, torch.arange(weight.shape[1], device=weight.device))

    def encode_with(self, weight: Tensor, order: Tensor) -> Tensors:
        """With the channels of ``order`` (I,), the first of them in the first part."""
        parts = [layout.encode(weight[:, order[channels]]) for _, layout, channels in self.places()]
        return self.store(parts, order)

    def store(self, parts: Sequence[Tensors], order: Tensor) -> Tensors:
        """The stored tensors of those of each part that is not empty, and the order (I,)."""
        stored: Tensors = {"order": order.to(_order_dtype(order.shape[0]))}
        for (prefix, _, _), tensors in zip(self.places(), parts, strict=True):
            stored |= prefixed(prefix, tensors)
        return stored

    def decode(self, tensors: Mapping[str, Tensor], in_features: int, dtype: torch.dtype) -> Tensor:
        """The columns of all parts in the channels' own order."""
        order = tensors["order"].long()
        dense = torch.empty((self.out_features(tensors), in_features), dtype=dtype, device=order.device)
        for prefix, layout, channels in self.places():
            part = layout.decode(within(prefix, tensors), channels.stop - channels.start, dtype)
            dense[:, order[channels]] = part
        return dense

    def matmul(self, input: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """The sum of the parts' products with their input channels."""
        order = tensors["order"].long()
        out: Tensor | None = None
        for prefix, layout, channels in self.places():
            part = layout.matmul(input.index_select(-1, order[channels]), within(prefix, tensors))
            out = part if out is None else out + part
        assert out is not None
        return out

    def workspace(self, out_features: int, in_features: int, dtype: torch.dtype) -> int:
        """The most of any part; the inputs in order and the parts' outputs are not counted."""
        parts = [layout.workspace(out_features, c.stop - c.start, dtype) for _, layout, c in self.places()]
        return max(parts)

    def out_features(self, tensors: Mapping[str, Tensor]) -> int:
        """O, from the first part that is not empty."""
        prefix, layout, _ = next(self.places())
        return layout.out_features(within(prefix, tensors))


def _order_dtype(in_features: int) -> torch.dtype:
    return torch.int16 if in_features <= torch.iinfo(torch.int16).max else torch.int32
