"""MiniCache: neighbouring layers share one direction for each token, and each keeps the lengths of its own vectors.

Source:    Liu et al. 2024, "MiniCache: KV Cache Compression in Depth Dimension for Large Language Models",
           arXiv:2405.14366: spherical interpolation of directions, retention of tokens that are too far apart, from the
           middle of the model upwards.
Differs:   a share of the tokens is retained, those with the greatest angular distance in each group of 64 of each head
           (the paper sets a threshold between the least and the greatest distance), so that sizes are known beforehand.
           Groups are merged as they fill, so up to 63 tokens are not merged yet. With fewer bits, directions are
           rounded token by token in groups of up to 32 channels.
Saves:     kv_cache, real: two layers take little more than one. While a prompt is read, the tokens of one layer wait
           densely for the layer above. Attending makes 256 tokens of a layer dense at a time.
Shapes:    directions (B, K, T, D) of keys and of values for two layers, lengths (B, K, T, 1) for each; retained tokens
           (B, K, n, D) for each, and their places in their groups uint8 (B, K, n, 1).
Composes:  any keep that keeps the same number of tokens in all layers; the lowest layer chooses them for all.
Use when:  deep models, whose upper layers resemble their neighbours; beside a keep.
Not when:  the model has few layers with full attention, or layers that differ much from their neighbours.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch

from pintpot.cache._base import LayerSizes, Place, Store, StoreState
from pintpot.cache.dense import Dense, DenseState
from pintpot.cache.geometry import FULL, has_full_attention, layer_kinds
from pintpot.cache.paired import WHOLE, LowerState, UpperState, channels_of
from pintpot.cache.rows import BLOCK_TOKENS, room_for
from pintpot.core.errors import CompositionError
from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Claim, Source, technique
from pintpot.core.workload import Workload
from pintpot.kernels import packed_size


@technique(
    name="minicache",
    wing="cache",
    part="store",
    source=Source(
        "MiniCache: KV Cache Compression in Depth Dimension for Large Language Models", year=2024, arxiv="2405.14366"
    ),
    accounts=[Account.KV_CACHE],
    claims=[
        Claim("compression", 1.53, versus="full cache", at="LLaMA-2-7B, ShareGPT, merging only", where="abstract"),
        Claim("compression", 5.02, versus="full cache", at="LLaMA-2-7B, ShareGPT, with 4 bits", where="abstract"),
    ],
    fidelity="a share of the tokens is retained, not those beyond a threshold",
    needs=("even_layers", "even_heads", "every_layer"),
)
@dataclass(frozen=True, kw_only=True)
class MiniCache(Store):
    """Merging of pairs of layers.

    Attributes:
        interpolation: how far from the lower layer's direction towards the upper one's the shared direction lies.
        retained_fraction: share of the tokens that both layers keep as they are.
        start_fraction: share of the layers, from below, that are not merged.
        bits: of a number of a direction: 1 to 8, or 16 for numbers as they are.
        group_tokens: tokens that are merged together; a power of 2 up to 256.
    """

    shared_tokens: ClassVar[str] = "layers"
    waiting_layers: ClassVar[int] = 1
    same_at_every_depth: ClassVar[bool] = False
    interpolation: float = 0.6
    retained_fraction: float = 0.05
    start_fraction: float = 0.5
    bits: int = WHOLE
    group_tokens: int = 64

    def __post_init__(self) -> None:
        fractions = (self.interpolation, self.retained_fraction, self.start_fraction)
        if min(fractions) < 0 or max(fractions) > 1:
            raise CompositionError(
                f"minicache: {fractions} are not all from 0 to 1",
                hint="the paper has interpolation=0.6, retained_fraction=0.05 and start_fraction=0.5",
            )
        if not 1 <= self.bits <= 8 and self.bits != WHOLE:
            raise CompositionError(
                f"minicache has 1 to 8 bits, or 16, not {self.bits}", hint="for instance minicache(bits=4)"
            )
        if self.group_tokens < 1 or BLOCK_TOKENS % self.group_tokens:
            raise CompositionError(
                f"minicache: group_tokens must be a power of 2 up to {BLOCK_TOKENS}, not {self.group_tokens}",
                hint="for instance group_tokens=64",
            )

    @property
    def retained(self) -> int:
        """Tokens of a group that are not merged."""
        return round(self.retained_fraction * self.group_tokens)

    def start(self, layers: int) -> int:
        """The lowest layer that is merged."""
        return int(self.start_fraction * layers)

    def acts_on(self, layers: int) -> bool:
        """See ``CacheTechnique.acts_on``: there must be a pair."""
        return layers - self.start(layers) > 1

    def granule(self, place: Place) -> int:
        """See ``Store.granule``."""
        return self.group_tokens

    def is_lower(self, place: Place) -> bool:
        """Whether a layer is merged with the one above."""
        above = place.index - self.start(place.layers)
        return above >= 0 and above % 2 == 0 and place.index + 1 < place.layers

    def is_upper(self, place: Place) -> bool:
        """Whether a layer is merged with the one below."""
        above = place.index - self.start(place.layers)
        return above >= 0 and above % 2 == 1

    def open(self, place: Place) -> StoreState:
        """See ``Store.open``."""
        if self.is_lower(place):
            return LowerState(self, place)
        return UpperState(self, place) if self.is_upper(place) else DenseState(place.reserve_tokens, place.grow_tokens)

    def predict_bytes(self, tokens: int, place: Place, batch: int, dtype: torch.dtype) -> int:
        """See ``Store.predict_bytes``."""
        if not self.is_lower(place) and not self.is_upper(place):
            return Dense().predict_bytes(tokens, place, batch, dtype)
        if not tokens:
            return 0
        sizes, groups = place.sizes, tokens // self.group_tokens
        rows, retained = room_for(groups * self.group_tokens, place), room_for(groups * self.retained, place)
        lengths = rows * batch * sizes.heads * 2 * dtype.itemsize
        held = sizes.dense_bytes(self.group_tokens - 1 + retained, batch, dtype) + lengths
        if self.is_upper(place):
            return held
        numbers = sum(self.direction_bytes(dim, dtype) for dim in (sizes.key_dim, sizes.value_dim))
        return held + batch * sizes.heads * (rows * numbers + retained * 2)

    def direction_bytes(self, dim: int, dtype: torch.dtype) -> int:
        """Bytes of one direction of ``dim`` numbers."""
        if self.bits == WHOLE:
            return dim * dtype.itemsize
        return packed_size(dim, self.bits) + 4 * (dim // channels_of(dim))

    def chunk_bytes(self, sizes: LayerSizes, batch: int) -> int:
        """Numbers of one block, keys or values, in float32, twice while they are made."""
        return BLOCK_TOKENS * batch * sizes.heads * max(sizes.key_dim, sizes.value_dim) * 4 * 2

    def decode_bytes(self, tokens: int, place: Place, batch: int, dtype: torch.dtype) -> int:
        """See ``Store.decode_bytes``: each layer reads the shared directions, which are written and read once more."""
        numbers = place.sizes.dense_bytes(tokens, batch, torch.float32)
        return place.sizes.dense_bytes(tokens, batch, dtype) + 2 * numbers

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """A guess: with the square of the share of layers that are merged, a third more with 4 bits."""
        count = sum(layer.kind == FULL for layer in layer_kinds(shape.config))
        share = (count - self.start(count)) // 2 * 2 / count
        return 0.04 * share**2 * (1 + 2 ** (4 - self.bits) / 3)

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[MiniCache]:
        """From the middle as it is and with 4 bits, then from further below; none where there is no pair."""
        if not has_full_attention(shape.config):
            return
        count = sum(layer.kind == FULL for layer in layer_kinds(shape.config))
        pairs = 0
        for start in (0.5, 0.25, 0.0):
            chosen = cls(start_fraction=start)
            merged = (count - chosen.start(count)) // 2
            if merged > pairs:
                if not pairs:
                    yield chosen
                yield cls(start_fraction=start, bits=4)
            pairs = max(pairs, merged)
