"""When a keep lets the tokens of a text go: for techniques that are fitted to what is then missing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pintpot.cache._base import Keep, Place
from pintpot.cache.calibration import LayerSample
from pintpot.cache.cascade import Cascade, LayerKeep
from pintpot.cache.dense import Dense
from pintpot.cache.layer import CacheLayer
from pintpot.cache.residue import Residue, ResidueState
from pintpot.cache.tokens import Tokens

PIECE_TOKENS = 32
"""Tokens of the text that a keep is shown at once."""


@torch.no_grad()
def eviction_times(keep: Keep, sample: LayerSample, tensors: Mapping[str, Tensor] | None = None) -> Tensor:
    """For each token the number of the first one that no longer sees it; the length of the text if all do.

    Layers that share what may be kept are taken one by one, as if each had its even share.

    Args:
        keep: what is kept.
        sample: what a layer meets on the text.
        tensors: what calibration found for the keep in this layer.

    Returns:
        int64 (B, K, T).
    """
    place = sample.place.but(recent_tokens=keep.recent, consecutive=False, tensors=tensors or {})
    cascade = Cascade(keep, 1, 1) if isinstance(keep, LayerKeep) else None
    times = torch.full(sample.keys.shape[:3], sample.keys.shape[2], device=sample.keys.device)
    layer = CacheLayer(Dense(), keep, place, cascade=cascade, residue=_Timing(times=times))
    for start in range(0, sample.keys.shape[2], PIECE_TOKENS):
        new = slice(start, start + PIECE_TOKENS)
        handle, _ = layer.update(sample.keys[:, :, new], sample.values[:, :, new])
        if isinstance(layer.remains, _Times):
            layer.remains.seen = layer.seen
        layer.attend(handle, replace(sample.call, query=sample.queries[:, :, new], mask=None))
    return times


class _Times(ResidueState):
    """Nothing but a note of when tokens were let go."""

    def __init__(self, times: Tensor, place: Place) -> None:
        self.times, self.place, self.seen = times, place, 0

    def absorb(self, tokens: Tokens, gone: Tensor) -> None:
        index = tokens.positions.expand_as(gone)
        self.times.scatter_(2, index, self.times.gather(2, index).masked_fill(gone, self.seen))

    def answer(self, query: Tensor) -> tuple[Tensor, Tensor]:
        batch, query_heads, count, _ = query.shape
        sizes = self.place.sizes
        values = query.new_zeros(
            (batch, sizes.heads, query_heads // sizes.heads * count, sizes.value_dim), dtype=torch.float32
        )
        return torch.full_like(values[..., :1], -torch.inf), values

    def tensors(self) -> Iterator[Tensor]:
        yield self.times

    def over_batch_(self, change: Callable[[Tensor], Tensor]) -> None:
        self.times = change(self.times)


@dataclass(frozen=True, kw_only=True)
class _Timing(Residue):
    """Notes in ``times`` when tokens were let go."""

    times: Tensor

    def open(self, place: Place, batch: int, device: torch.device) -> ResidueState:
        return _Times(self.times, place)

    def predict_bytes(self, place: Place, batch: int) -> int:
        return 0
