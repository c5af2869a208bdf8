"""KIVI: pack keys channel by channel and values token by token, with a window of recent tokens as they are.

Source:    Liu et al. 2024, "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", arXiv:2402.02750,
           Algorithm 1 and Section 3.2-3.3.
Differs:   values leave the window a group at a time instead of one token at a time (it holds residual_length to
           residual_length + group_size - 1 of them); scale and least value take two bytes each; where the head dim is
           no multiple of group_size, the values' groups are its largest divisor below.
Saves:     kv_cache, real: bits + 32 / group_size bits for each number outside the window. Storage grows by
           groups of tokens, copied until a block of 256 is full. Attending reads blocks as they are packed where that
           is compiled, and elsewhere makes one dense at a time; packing a prompt needs one block's temporaries.
Shapes:    keys packed (B, K, D, tokens / G, bytes), values packed (B, K, tokens, bytes); see packed.py.
Composes:  any keep: survivors are packed when the keep lets them go, and the keep's pending window stands for ours.
Use when:  long contexts or large batches; 4 bits cost almost nothing, 2 bits little in larger models.
Not when:  the context is hardly longer than the window, or the head dim is tiny (scales outweigh codes).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pintpot.cache._base import Call, LayerSizes, Place, Store, StoreState
from pintpot.cache.dense import DenseChunk
from pintpot.cache.geometry import has_full_attention
from pintpot.cache.packed import BLOCK_TOKENS, Block, BlockChunk, Layout
from pintpot.cache.tokens import Buffer, Tokens
from pintpot.core.errors import CompositionError
from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Claim, Source, technique
from pintpot.core.workload import Workload

RISK = {8: 0.0, 7: 0.0, 6: 0.0001, 5: 0.0003, 4: 0.0008, 3: 0.008, 2: 0.08, 1: 1.0}
"""Relative rise of perplexity by bits, at groups of 32: at 8, 4 and 2 bits as measured on the embedded model with short
windows (`results/cache.csv`), between them by the logarithm; 1 bit is a guess."""


@technique(
    name="kivi",
    wing="cache",
    part="store",
    source=Source("KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", year=2024, arxiv="2402.02750"),
    accounts=[Account.KV_CACHE],
    claims=[
        Claim("peak memory, model weights included", 2.6, versus="16-bit cache", at="2 bits", where="abstract"),
        Claim("largest batch that fits", 4.0, versus="16-bit cache", at="2 bits", where="abstract"),
    ],
    fidelity="values leave the window in groups",
)
@dataclass(frozen=True, kw_only=True)
class KIVI(Store):
    """Asymmetric group quantisation of the cache.

    Attributes:
        bits: width of a code, 1 to 8.
        group_size: numbers that share a scale: tokens for keys, channels for values. A power of 2 up to 256.
        residual_length: recent tokens in full precision; a multiple of ``group_size``.
    """

    bits: int = 2
    group_size: int = 32
    residual_length: int = 128

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise CompositionError(f"kivi has 1 to 8 bits, not {self.bits}", hint="for instance kivi(bits=4)")
        if self.group_size < 1 or BLOCK_TOKENS % self.group_size:
            raise CompositionError(
                f"kivi: group_size must be a power of 2 up to {BLOCK_TOKENS}, not {self.group_size}",
                hint="the paper uses group_size=32",
            )
        if self.residual_length < 0 or self.residual_length % self.group_size:
            raise CompositionError(
                f"kivi: residual_length must be a multiple of {self.group_size}, not {self.residual_length}",
                hint="the paper uses residual_length=128",
            )

    def layout(self, value_dim: int) -> Layout:
        """How a head of this size is packed."""
        values = next(size for size in range(min(self.group_size, value_dim), 0, -1) if value_dim % size == 0)
        return Layout(self.bits, self.group_size, values)

    def window(self, recent_tokens: int = 0) -> int:
        """Tokens kept in full precision beside ``recent_tokens`` that are so elsewhere."""
        missing = max(0, self.residual_length - recent_tokens)
        return -(-missing // self.group_size) * self.group_size

    def granule(self, place: Place) -> int:
        """See ``Store.granule``: keys are packed when the window is full."""
        return Split.of(self.window(place.recent_tokens), self.group_size).unit

    def open(self, place: Place) -> KIVIState:
        """See ``Store.open``. Nothing is ever moved to grow beyond a block, so nothing need be reserved."""
        return KIVIState(self, self.window(place.recent_tokens))

    def predict_bytes(self, tokens: int, place: Place, batch: int, dtype: torch.dtype) -> int:
        """See ``Store.predict_bytes``."""
        if not tokens:
            return 0
        sizes = place.sizes
        split = Split.of(self.window(place.recent_tokens), self.group_size)
        window = (split.key_room * sizes.key_dim + split.value_room * sizes.value_dim) * sizes.heads * dtype.itemsize
        packed = self.layout(sizes.value_dim).packed_bytes(split.packed_keys(tokens), sizes)
        return batch * (window + packed)

    def chunk_bytes(self, sizes: LayerSizes, batch: int) -> int:
        """The window, put together with late keys and new tokens; or codes and numbers of a block made dense."""
        block = 0 if sizes.read_packed else BLOCK_TOKENS * 5
        window = (self.residual_length + self.group_size) * 4 * 6
        return max(block, window) * batch * sizes.heads * max(sizes.key_dim, sizes.value_dim)

    def decode_bytes(self, tokens: int, place: Place, batch: int, dtype: torch.dtype) -> int:
        """See ``Store.decode_bytes``: once what is packed, where the kernel reads it.

        Elsewhere each code is unpacked (written, read), made a number, scaled, shifted and used: about seven passes
        over four bytes.
        """
        numbers = place.sizes.dense_bytes(tokens, batch, torch.float32) // 4
        passes = 0 if place.sizes.read_packed else 2 + 7 * 4
        return self.predict_bytes(tokens, place, batch, dtype) + numbers * passes

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """From the table; the groups' size changes it as the square of their number's range, roughly."""
        return RISK[self.bits] * (self.group_size / 32) ** 0.5

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[KIVI]:
        """8 to 2 bits; none for a model without full attention."""
        if has_full_attention(shape.config):
            for bits in (8, 4, 3, 2):
                yield cls(bits=bits)


@dataclass(frozen=True)
class Split:
    """Where the tokens of a layer stand.

    Attributes:
        window: recent tokens in full precision.
        group: tokens packed together.
        unit: keys are packed when so many have gathered: the window, or a group where there is no window.
    """

    window: int
    group: int
    unit: int

    @classmethod
    def of(cls, window: int, group: int) -> Split:
        """For a window of recent tokens and a group size."""
        return cls(window, group, max(window, group))

    @property
    def key_room(self) -> int:
        """Most keys that wait."""
        return self.unit - 1

    @property
    def value_room(self) -> int:
        """Most values that wait."""
        return self.window + self.group - 1

    def packed_keys(self, tokens: int) -> int:
        """Keys that are packed after ``tokens`` tokens."""
        return tokens // self.unit * self.unit

    def packed_values(self, tokens: int) -> int:
        """Values that are packed after ``tokens`` tokens: never more than keys."""
        return max(0, tokens - self.window) // self.group * self.group


class KIVIState(StoreState):
    """Packed blocks, and the windows of keys and values in front of them."""

    def __init__(self, method: KIVI, window: int) -> None:
        self.method = method
        self.split = Split.of(window, method.group_size)
        self._tokens = 0
        self.blocks: list[Block] = []
        self.keys = Buffer()
        self.values = Buffer()

    @property
    def tokens(self) -> int:
        """See ``StoreState.tokens``."""
        return self._tokens

    @property
    def packed_keys(self) -> int:
        """Keys in blocks."""
        return self.split.packed_keys(self.tokens)

    @property
    def packed_values(self) -> int:
        """Values in blocks."""
        return self.split.packed_values(self.tokens)

    def append(self, tokens: Tokens) -> None:
        """See ``StoreState.append``."""
        keys, values = tokens.keys, tokens.values
        keys_before, values_before = self.packed_keys, self.packed_values
        if self.keys.held is None:
            self.keys.allocate(keys, self.split.key_room)
            self.values.allocate(values, self.split.value_room)
        self._tokens += keys.shape[-2]
        while (missing := self.packed_keys - BLOCK_TOKENS * len(self.blocks)) > 0:
            if self.blocks:
                self.blocks[-1].grow_(BLOCK_TOKENS)
            self.blocks.append(Block(keys, values, self.method.layout(values.shape[-1]), min(missing, BLOCK_TOKENS)))
        if self.blocks:
            self.blocks[-1].grow_(self.packed_keys - BLOCK_TOKENS * (len(self.blocks) - 1))
        self._move(self.keys, keys, keys_before, self.packed_keys, Block.write_keys)
        self._move(self.values, values, values_before, self.packed_values, Block.write_values)

    def _move(
        self, window: Buffer, new: Tensor, start: int, stop: int, write: Callable[[Block, int, Tensor], None]
    ) -> None:
        """Pack tokens ``start`` to ``stop`` of the layer, which begin the window, and leave the rest in it."""
        if start == stop:
            window.write(new)
            return
        waiting = window.behind(new)
        position = start
        while position < stop:
            inside = position % BLOCK_TOKENS
            count = min(BLOCK_TOKENS - inside, stop - position)
            offset = position - start
            write(self.blocks[position // BLOCK_TOKENS], inside, waiting[:, :, offset : offset + count])
            position += count
        window.tokens = 0
        window.write(waiting[:, :, stop - start :])

    def chunks(self, call: Call) -> Iterator[BlockChunk | DenseChunk]:
        """See ``StoreState.chunks``: whole blocks, then the tokens whose values are not packed yet."""
        packed = self.packed_values
        for index in range(-(-packed // BLOCK_TOKENS)):
            yield BlockChunk(self.blocks[index], min(BLOCK_TOKENS, packed - index * BLOCK_TOKENS))
        if self.tokens > packed:
            yield DenseChunk(self._late_keys(), self.values.view())

    def _late_keys(self) -> Tensor:
        """Keys of the tokens whose values are in the window: packed ones made dense, then the keys' own window."""
        pieces = []
        position = self.packed_values
        while position < self.packed_keys:
            inside = position % BLOCK_TOKENS
            stop = min(BLOCK_TOKENS, inside + self.packed_keys - position)
            pieces.append(self.blocks[position // BLOCK_TOKENS].read_keys(inside, stop).transpose(-1, -2))
            position += stop - inside
        if not pieces:
            return self.keys.view()
        return torch.cat([*pieces, self.keys.view().float()], dim=-2)

    def tensors(self) -> Iterator[Tensor]:
        """See ``StoreState.tensors``."""
        for block in self.blocks:
            yield from block.tensors()
        yield from self.keys.tensors()
        yield from self.values.tensors()

    def over_batch_(self, change: Callable[[Tensor], Tensor]) -> None:
        """See ``StoreState.over_batch_``."""
        for block in self.blocks:
            block.over_batch_(change)
        self.keys.over_batch_(change)
        self.values.over_batch_(change)
