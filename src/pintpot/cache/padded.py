"""Padded batches: a layer of the cache for each sequence, so that each is cached as if it were alone.

Tokens are evicted and packed by their number in the text, which differs between sequences of unequal length. So the
sequences of a padded batch are taken apart; pads are never stored.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from pintpot.cache._base import Call, Place
from pintpot.cache.tokens import Tokens
from pintpot.core.errors import CompositionError

if TYPE_CHECKING:
    from pintpot.cache.layer import CacheLayer


def real_tokens(mask: Tensor, count: int) -> list[int]:
    """How many of the last ``count`` tokens of each sequence are no pads, by a mask (B, 1, 1, T).

    Raises:
        CompositionError: when pads stand anywhere but in front, or the mask says more than padding.
    """
    if mask.shape[1:3] != (1, 1):
        raise CompositionError(
            "a cache that evicts or packs tokens cannot follow an attention mask of its own",
            hint="leave out the mask; a padded batch takes an attention mask of zeros and ones",
        )
    seen = mask[:, 0, 0].bool() if mask.dtype == torch.bool else mask[:, 0, 0] >= 0
    if bool((seen[:, :-1] & ~seen[:, 1:]).any()):
        raise CompositionError(
            "pads stand behind tokens, and a cache that evicts or packs cannot leave them out there",
            hint='pad on the left: tokenizer.padding_side = "left"',
        )
    return [int(n) for n in seen[:, -count:].sum(dim=-1)]


class PaddedRows:
    """The sequences of a padded batch.

    Args:
        layer: the layer that holds them.
        batch: how many there are.
    """

    def __init__(self, layer: CacheLayer, batch: int) -> None:
        self.alone = [layer.like() for _ in range(batch)]

    def attend(self, owner: CacheLayer, tokens: Tokens, call: Call) -> Tensor:
        """Attention of new tokens (B, K, S, D) to those held of their own sequence: (B, S, H, D), zero for pads.

        Args:
            owner: the layer that holds the sequences.
            tokens: the new ones, pads included.
            call: of attention, with the mask of the batch.
        """
        batch, heads, count, _ = call.query.shape
        real = [count] * batch if call.mask is None else real_tokens(call.mask, count)
        out = call.query.new_zeros((batch, count, heads, tokens.values.shape[-1]))
        for row, n in enumerate(real):
            layer = self._ready(owner, row)
            if n:
                new = tokens.row(row).part(count - n)
                layer.inputs = None if new.inputs is None else new.inputs[:, 0]
                handle, _ = layer.update(new.keys, new.values)
                own = replace(call, query=call.query[row : row + 1, :, count - n :], mask=None)
                out[row : row + 1, count - n :] = layer.attend(handle, own)
        return out

    def lend(self, owner: CacheLayer, call: Call) -> Tensor:
        """See ``CacheLayer.lend``: (B, S, H, D), zero for pads."""
        batch, heads, count, _ = call.query.shape
        real = [count] * batch if call.mask is None else real_tokens(call.mask, count)
        place = cast(Place, owner.place)
        out = call.query.new_zeros((batch, count, heads, place.sizes.value_dim))
        for row, n in enumerate(real):
            if n:
                own = replace(call, query=call.query[row : row + 1, :, count - n :], mask=None)
                out[row : row + 1, count - n :] = self.alone[row].lend(own)
        return out

    def _ready(self, owner: CacheLayer, row: int) -> CacheLayer:
        """The layer of a sequence, among the other layers of the same sequence."""
        layer = self.alone[row]
        if owner.lower is not None and owner.lower.rows is not None:
            layer.lower = owner.lower.rows.alone[row]
        layer.cascade = None if owner.cascade is None else owner.cascade.of_row(row)
        layer.agreement = None if owner.agreement is None else owner.agreement.of_row(row)
        return layer

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor that is held."""
        for layer in self.alone:
            yield from layer.tensors()

    def pick_(self, rows: Sequence[int]) -> None:
        """These sequences in this order, any of them several times."""
        used: set[int] = set()
        chosen = []
        for row in rows:
            chosen.append(self.alone[row] if row not in used else _copied(self.alone[row]))
            used.add(row)
        self.alone = chosen


def _copied(layer: CacheLayer) -> CacheLayer:
    """A layer that holds the same and shares nothing but what calibration found."""
    other = layer.like()
    shared = {id(layer.place): other.place, id(layer.store): layer.store, id(layer.keep): layer.keep}
    for name in ("state", "remains", "pending", "queries", "seen", "batch_size", "is_initialized"):
        setattr(other, name, copy.deepcopy(getattr(layer, name), dict(shared)))
    for name in ("dtype", "device", "heads"):
        if hasattr(layer, name):
            setattr(other, name, getattr(layer, name))
    return other
