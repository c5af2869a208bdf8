"""CSKV: keep few channels of older tokens' keys and values, and the newest tokens as they are.

Source:    Wang et al. 2024, "CSKV: Training-Efficient Channel Shrinking for KV Cache in Long-Context Scenarios",
           arXiv:2409.10593, with the authors' code (wln20/CSKV).
Differs:   the layer-wise reconstruction loss is not trained down but minimised exactly: the factors of a rank that lose
           the least of given keys are their leading principal directions. So latents come from keys and values
           instead of from the attention's input. At less than 16 bits the factors are not trained with the rounding.
Saves:     kv_cache, real: the ranks' share of older tokens' numbers, at 16 or fewer bits. Attending makes 512 tokens
           float32 at a time.
Shapes:    latents (B, 1, T, R), R = int(density * D) * K; bases (K * D, R).
Composes:  any keep; its heads then keep the same tokens, since latents are of all heads. The keep's pending window
           stands for ours at 16 bits.
Use when:  long contexts; with 4 bits on top, where kivi alone is not enough.
Not when:  there is no text like the model's own to calibrate on, or heads are few and small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pintpot.cache._base import Call, Chunk, LayerSizes, Place, Store
from pintpot.cache.calibration import Calibrated, sample_layer
from pintpot.cache.dense import CHUNK_TOKENS, Dense, DenseChunk, DenseState
from pintpot.cache.forecast import places_of
from pintpot.cache.geometry import has_full_attention, layer_kinds
from pintpot.cache.kivi import KIVI, KIVIState
from pintpot.cache.latent import LatentState, open_latents
from pintpot.cache.rows import BLOCK_TOKENS, joined, position_bytes, position_column, positions_of, room_for
from pintpot.cache.tokens import Buffer, Tokens
from pintpot.core.errors import CompositionError
from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Claim, Source, technique
from pintpot.core.workload import Workload

FULL_BITS = 16
"""Latents of so many bits are not rounded: they have the dtype of the cache."""


@technique(
    name="cskv",
    wing="cache",
    part="store",
    source=Source(
        "CSKV: Training-Efficient Channel Shrinking for KV Cache in Long-Context Scenarios",
        year=2024,
        arxiv="2409.10593",
    ),
    accounts=[Account.KV_CACHE],
    claims=[
        Claim("memory of the cache saved", 0.8, versus="16-bit cache", at="16-bit latents", where="abstract"),
        Claim("memory of the cache saved", 0.95, versus="16-bit cache", at="4-bit latents", where="abstract"),
    ],
    fidelity="the reconstruction loss is minimised exactly instead of trained; no training with the rounding",
    needs=("even_heads",),
)
@dataclass(frozen=True, kw_only=True)
class CSKV(Calibrated, Store):
    """Low-rank channels beside a window.

    Attributes:
        key_density: share of the channels that older keys keep.
        value_density: share that older values keep.
        window_tokens: recent tokens in full precision, handed over together when there are so many. A power of 2 up to
            256; with fewer than 16 bits, keys are rounded in groups of so many tokens.
        bits: width of a latent's code: 16 for none, or 1 to 8.
        calibration: the file of the bases.
    """

    needs_rotary: ClassVar[bool] = True
    shared_tokens: ClassVar[str] = "heads"
    key_density: float = 0.2
    value_density: float = 0.2
    window_tokens: int = 32
    bits: int = FULL_BITS

    def __post_init__(self) -> None:
        if not (0 < self.key_density <= 1 and 0 < self.value_density <= 1):
            raise CompositionError(
                f"cskv: densities must be above 0 and at most 1, not {self.key_density} and {self.value_density}",
                hint="for instance cskv(key_density=0.2, value_density=0.2)",
            )
        if self.window_tokens < 1 or BLOCK_TOKENS % self.window_tokens:
            raise CompositionError(
                f"cskv: window_tokens must be a power of 2 up to {BLOCK_TOKENS}, not {self.window_tokens}",
                hint="the authors use window_tokens=32",
            )
        if self.bits != FULL_BITS and not 1 <= self.bits <= 8:
            raise CompositionError(
                f"cskv has latents of 1 to 8 bits, or {FULL_BITS}, not {self.bits}", hint="for instance cskv(bits=4)"
            )

    def ranks(self, sizes: LayerSizes) -> tuple[int, int]:
        """Numbers that are kept of a token's keys, and of its values."""
        keys, values = int(self.key_density * sizes.key_dim), int(self.value_density * sizes.value_dim)
        return max(1, keys) * sizes.heads, max(1, values) * sizes.heads

    def unit(self, place: Place) -> int:
        """Tokens that leave the window together: one where there is none."""
        apart = self.bits != FULL_BITS or place.recent_tokens < self.window_tokens
        return self.window_tokens if apart else 1

    def latents(self) -> Dense | KIVI:
        """How latents are stored."""
        return (
            Dense()
            if self.bits == FULL_BITS
            else KIVI(bits=self.bits, group_size=self.window_tokens, residual_length=0)
        )

    def latent_place(self, place: Place) -> Place:
        """A layer's place, for the store of its latents."""
        return place.but(sizes=LayerSizes(1, *self.ranks(place.sizes)))

    def granule(self, place: Place) -> int:
        """See ``Store.granule``."""
        return self.unit(place)

    def open(self, place: Place) -> CSKVState:
        """See ``Store.open``."""
        return CSKVState(open_latents(self.latents(), self.latent_place(place)), place, self.unit(place))

    def predict_bytes(self, tokens: int, place: Place, batch: int, dtype: torch.dtype) -> int:
        """See ``Store.predict_bytes``."""
        if not tokens:
            return 0
        unit = self.unit(place)
        latents = self.latents().predict_bytes(tokens // unit * unit, self.latent_place(place), batch, dtype)
        positions = batch * room_for(tokens, place) * position_bytes(place, 1)
        return latents + positions + place.sizes.dense_bytes(unit - 1, batch, dtype)

    def chunk_bytes(self, sizes: LayerSizes, batch: int) -> int:
        """Keys or values of a chunk, before and after rotation, with their latents."""
        latents = max(self.ranks(sizes))
        return CHUNK_TOKENS * batch * 4 * (3 * sizes.heads * max(sizes.key_dim, sizes.value_dim) + latents)

    def decode_bytes(self, tokens: int, place: Place, batch: int, dtype: torch.dtype) -> int:
        """See ``Store.decode_bytes``: keys and values are written, turned and read in float32."""
        numbers = place.sizes.dense_bytes(tokens, batch, torch.float32)
        return self.predict_bytes(tokens, place, batch, dtype) + 6 * numbers

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """As measured on the embedded model, 3.4 % at half of the channels and 8.1 % at a fifth; and kivi's by bits.

        Recall of single words falls much faster there, to half and to nothing: its heads have but 32 channels.
        """
        kept = (self.key_density + self.value_density) / 2
        rounding = 0.0 if self.bits == FULL_BITS else self.latents().risk(shape, workload)
        return 0.034 * (1 / kept - 1) ** 0.62 + rounding

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[CSKV]:
        """Half and a fifth of the channels, then 4 bits; none for a model without full attention."""
        if has_full_attention(shape.config):
            for density, bits in ((0.5, FULL_BITS), (0.2, FULL_BITS), (0.2, 4)):
                yield cls(key_density=density, value_density=density, bits=bits)

    @torch.no_grad()
    def fit(self, model: PreTrainedModel, texts: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """See ``Calibrated.fit``: the leading principal directions of unrotated keys, and of values."""
        found = []
        for place in places_of(layer_kinds(model.config), None, None):
            products: list[Tensor] = []
            for text in texts:
                sample = sample_layer(model, text, place.index)
                more = [_products(sample.unrotated_keys()), _products(sample.values)]
                products = [a + b for a, b in zip(products, more, strict=True)] if products else more
            dtype, ranks = sample.keys.dtype, self.ranks(place.sizes)
            keys, values = (_leading(p, rank).to(dtype) for p, rank in zip(products, ranks, strict=True))
            found.append({"key_basis": keys, "value_basis": values})
        return found

    def calibration_bytes(self, place: Place, dtype: torch.dtype) -> int:
        """See ``Calibrated.calibration_bytes``."""
        sizes, (keys, values) = place.sizes, self.ranks(place.sizes)
        return sizes.heads * (sizes.key_dim * keys + sizes.value_dim * values) * dtype.itemsize


class CSKVState(LatentState):
    """Latents, and the window behind them. Positions are those of the window's tokens too."""

    def __init__(self, inner: DenseState | KIVIState, place: Place, unit: int) -> None:
        super().__init__(inner, place)
        self.unit = unit
        self.keys, self.values = Buffer(), Buffer()

    @property
    def tokens(self) -> int:
        """See ``StoreState.tokens``."""
        return self.inner.tokens + self.keys.tokens

    def append(self, tokens: Tokens) -> None:
        """See ``StoreState.append``."""
        if self.keys.held is None:
            self.keys.allocate(tokens.keys, self.unit - 1)
            self.values.allocate(tokens.values, self.unit - 1)
        if columns := position_column(tokens, self.place, 1):
            self.positions.append(columns)
        # The first tokens fill the window up, further ones need not pass through it.
        first = min(tokens.count, -self.keys.tokens % self.unit)
        self._enter(tokens.part(0, first))
        whole = (tokens.count - first) // self.unit * self.unit
        for start in range(first, first + whole, BLOCK_TOKENS):
            self._shrink(tokens.part(start, min(start + BLOCK_TOKENS, first + whole)))
        self._enter(tokens.part(first + whole))

    def _enter(self, tokens: Tokens) -> None:
        """Put tokens into the window, and hand it over when it is full."""
        if self.keys.tokens + tokens.count < self.unit:
            self.keys.write(tokens.keys)
            self.values.write(tokens.values)
            return
        full = Tokens.consecutive(self.keys.behind(tokens.keys), self.values.behind(tokens.values))
        self.keys.tokens = self.values.tokens = 0
        self._shrink(full)

    def _shrink(self, tokens: Tokens) -> None:
        """Store the latents of the next tokens."""
        start = self.inner.tokens
        columns = {} if self.place.consecutive else self.positions.read(start, start + tokens.count)
        positions = positions_of(columns, start, tokens.count, tokens.keys.device)
        keys, values = self.encode(Tokens(tokens.keys, tokens.values, positions))
        self.inner.append(Tokens(keys, values, positions))

    def encode(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """See ``LatentState.encode``."""
        rotary, keys = self.place.rotary, tokens.keys.float()
        keys = keys if rotary is None else rotary.unrotate(keys, tokens.positions)
        latents = [
            joined(states.float()) @ self._basis(name) for name, states in (("key", keys), ("value", tokens.values))
        ]
        return latents[0].to(tokens.keys.dtype), latents[1].to(tokens.values.dtype)

    def decode_keys(self, latents: Tensor, positions: Tensor, call: Call) -> Tensor:
        """See ``LatentState.decode_keys``."""
        keys = self._by_heads(latents @ self._basis("key").T)
        return keys if self.place.rotary is None else self.place.rotary.rotate(keys, positions)

    def decode_values(self, latents: Tensor, call: Call) -> Tensor:
        """See ``LatentState.decode_values``."""
        return self._by_heads(latents @ self._basis("value").T)

    def _by_heads(self, numbers: Tensor) -> Tensor:
        return numbers.squeeze(1).unflatten(-1, (self.place.sizes.heads, -1)).transpose(1, 2)

    def _basis(self, name: str) -> Tensor:
        return self.place.tensors[f"{name}_basis"].float()

    def chunks(self, call: Call) -> Iterator[Chunk]:
        """See ``StoreState.chunks``: latents, then the window."""
        yield from super().chunks(call)
        if self.keys.tokens:
            yield DenseChunk(self.keys.view(), self.values.view())

    def tensors(self) -> Iterator[Tensor]:
        """See ``StoreState.tensors``."""
        yield from super().tensors()
        yield from self.keys.tensors()
        yield from self.values.tensors()

    def over_batch_(self, change: Callable[[Tensor], Tensor]) -> None:
        """See ``StoreState.over_batch_``."""
        super().over_batch_(change)
        self.keys.over_batch_(change)
        self.values.over_batch_(change)


def _products(states: Tensor) -> Tensor:
    """Sums over the tokens of the products of all pairs of channels: float64 (K * D, K * D)."""
    vectors = joined(states).flatten(0, 2).double()
    return vectors.T @ vectors


def _leading(products: Tensor, rank: int) -> Tensor:
    """The directions in which tokens extend most, (K * D, rank)."""
    return torch.linalg.eigh(products).eigenvectors[:, -rank:].flip(-1).contiguous()
