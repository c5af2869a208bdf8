"""RotateKV: rotate outliers away before packing each token to a few bits, and keep attention sinks as they are.

Source:    Su et al. 2025, "RotateKV: Accurate and Robust 2-Bit KV Cache Quantization for LLMs via Outlier-Aware
           Adaptive Rotations", arXiv:2501.16383, with the settings of the authors' code (ZunhaiSu/RotateKV).
Differs:   without a calibration, channels are ordered by the sums of the first tokens seen. Massive activations are
           looked for in what attention is given, after its norm, as the ratio of a token's greatest number to its
           mean one. At 2 bits a group's range is narrowed to 0.8 of it about its middle. Where heads times their size
           is no power of 2, the transform has smaller blocks.
Saves:     kv_cache, real: bits + 32 / group_size bits for each number, and the sinks exactly beside. Decoding reads
           rows as they are packed where that is compiled; elsewhere attending makes 256 tokens float32 at a time, a
           few times over.
Shapes:    keys as one vector a token, packed (B, 1, T, bytes); values packed (B, K, T, bytes); sinks (B, K, n, D).
Composes:  any keep; its heads then keep the same tokens, since the rotation mixes them.
Use when:  2 or 3 bits, token by token with no window, on a model whose keys have outlier channels.
Not when:  decoding must be as fast as can be: kivi unpacks as many bits in less time, since no key is mixed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from pintpot.cache._base import Call, Chunk, LayerSizes, Place, Store, StoreState
from pintpot.cache.calibration import Calibrated, sample_layer
from pintpot.cache.exact import ExactTokens, exact_bytes
from pintpot.cache.forecast import places_of
from pintpot.cache.fused import ReadableChunk
from pintpot.cache.geometry import has_full_attention, layer_kinds
from pintpot.cache.rows import BLOCK_TOKENS, Rows, joined, position_bytes, position_column, positions_of, room_for
from pintpot.cache.token_grid import TokenGrid, largest_divisor
from pintpot.cache.tokens import Tokens
from pintpot.core.errors import CompositionError
from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Claim, Source, technique
from pintpot.core.workload import Workload
from pintpot.kernels import Attended, RotatedBlock, RotatedLayout, attend_rotated, attend_serves
from pintpot.kernels.hadamard import hadamard, power_of_two

RISK = {8: 0.0, 7: 0.0001, 6: 0.0003, 5: 0.001, 4: 0.003, 3: 0.015, 2: 0.085, 1: 1.0}
"""Relative rise of perplexity by bits: at 8, 4, 3 and 2 bits as measured on the embedded model, between them by the
logarithm; 1 bit is a guess."""

SPAN = {2: 0.8}
"""Share of a group's range that codes span, where not all of it: the authors' setting for 2 bits."""


@technique(
    name="rotatekv",
    wing="cache",
    part="store",
    source=Source(
        "RotateKV: Accurate and Robust 2-Bit KV Cache Quantization for LLMs via Outlier-Aware Adaptive Rotations",
        year=2025,
        arxiv="2501.16383",
    ),
    accounts=[Account.KV_CACHE],
    claims=[
        Claim("rise of perplexity", 0.3, versus="FP16", at="2 bits, LLaMA-2-13B, WikiText-2", where="abstract"),
        Claim("peak memory", 3.97, versus="FP16", at="2 bits", where="abstract"),
        Claim("largest batch that fits", 5.75, versus="FP16", at="2 bits", where="abstract"),
    ],
    fidelity="channel order from the first tokens unless calibrated; sinks found behind the norm",
    needs=("even_heads",),
)
@dataclass(frozen=True, kw_only=True)
class RotateKV(Calibrated, Store):
    """Rotated asymmetric quantisation, token by token.

    Attributes:
        bits: width of a code, 1 to 8.
        group_size: channels that share a scale, at most.
        head_group: heads whose keys are rotated together, at most.
        sink_tokens: tokens with the most massive activations, kept exactly; found in the first call that has so many.
        calibration: the file of the channels' order; not needed.
    """

    needs_inputs: ClassVar[bool] = True
    needs_rotary: ClassVar[bool] = True
    shared_tokens: ClassVar[str] = "heads"
    bits: int = 2
    group_size: int = 128
    head_group: int = 4
    sink_tokens: int = 20

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise CompositionError(f"rotatekv has 1 to 8 bits, not {self.bits}", hint="for instance rotatekv(bits=4)")
        if min(self.group_size, self.head_group) < 1 or self.sink_tokens < 0:
            raise CompositionError(
                f"rotatekv: {self.group_size} channels in a group, {self.head_group} heads rotated together and "
                f"{self.sink_tokens} sinks are not sizes it can have",
                hint="the authors use group_size=128, head_group=4 and sink_tokens=20",
            )

    def layout(self, sizes: LayerSizes) -> Layout:
        """How a layer is rotated and packed."""
        keys, span = sizes.heads * sizes.key_dim, SPAN.get(self.bits, 1.0)
        return Layout(
            TokenGrid.of(self.bits, self.group_size, keys, span),
            TokenGrid.of(self.bits, self.group_size, sizes.value_dim, span),
            power_of_two(largest_divisor(sizes.heads, self.head_group) * sizes.key_dim),
            power_of_two(sizes.value_dim),
        )

    def open(self, place: Place) -> RotateKVState:
        """See ``Store.open``."""
        return RotateKVState(self, place)

    def predict_bytes(self, tokens: int, place: Place, batch: int, dtype: torch.dtype) -> int:
        """See ``Store.predict_bytes``."""
        if not tokens:
            return 0
        sizes = place.sizes
        layout = self.layout(sizes)
        row = layout.keys.token_bytes + sizes.heads * layout.values.token_bytes + position_bytes(place, 1)
        order = 0 if self.calibration else 4 * sizes.heads * sizes.key_dim
        return batch * (room_for(tokens, place) * row + exact_bytes(self.sink_tokens, sizes, dtype) + order)

    def chunk_bytes(self, sizes: LayerSizes, batch: int) -> int:
        """Sinks (keys or values, twice) and queries in float32; or codes and numbers of a block around a step."""
        width = max(sizes.key_dim, sizes.value_dim)
        if sizes.read_packed:
            return batch * width * 4 * (2 * self.sink_tokens * sizes.heads + 5 * sizes.query_heads)
        return BLOCK_TOKENS * batch * sizes.heads * width * (1 + 3 * 4)

    def decode_bytes(self, tokens: int, place: Place, batch: int, dtype: torch.dtype) -> int:
        """See ``Store.decode_bytes``: once what is packed, where the kernel reads it.

        Elsewhere about ten passes over float32 to unpack, order and turn, and three a step of the transform.
        """
        steps = self.layout(place.sizes).key_block.bit_length() - 1
        numbers = place.sizes.dense_bytes(tokens, batch, torch.float32)
        passes = 0 if place.sizes.read_packed else 10 + 3 * steps
        return self.predict_bytes(tokens, place, batch, dtype) + numbers * passes

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """From the table."""
        return RISK[self.bits]

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[RotateKV]:
        """4 to 2 bits; none for a model without full attention."""
        if has_full_attention(shape.config):
            for bits in (4, 3, 2):
                yield cls(bits=bits)

    def needs_calibration(self, config: PretrainedConfig) -> bool:
        """See ``Calibrated.needs_calibration``: the first tokens do."""
        return False

    @torch.no_grad()
    def fit(self, model: PreTrainedModel, texts: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """See ``Calibrated.fit``: each layer's channels, in the order of their sums over the texts."""
        found = []
        for index in range(len(places_of(layer_kinds(model.config), None, None))):
            total = torch.zeros(())
            for text in texts:
                sample = sample_layer(model, text, index)
                block = self.layout(sample.place.sizes).key_block
                total = total + hadamard(joined(sample.unrotated_keys()), block).sum(dim=(0, 1, 2))
            found.append({"order": total.argsort().to(torch.int32)})
        return found

    def calibration_bytes(self, place: Place, dtype: torch.dtype) -> int:
        """See ``Calibrated.calibration_bytes``."""
        return 4 * place.sizes.heads * place.sizes.key_dim if self.calibration else 0


@dataclass(frozen=True)
class Layout:
    """How the tokens of a layer are rotated and packed.

    Attributes:
        keys: the grid of a token's keys, all heads' together.
        values: the grid of a head's values.
        key_block: channels that are mixed by the rotation.
        value_block: likewise.
    """

    keys: TokenGrid
    values: TokenGrid
    key_block: int
    value_block: int


class RotateKVState(StoreState):
    """Packed rows, and the sinks beside them, which stand for their own packed selves."""

    def __init__(self, method: RotateKV, place: Place) -> None:
        self.place, self.layout = place, method.layout(place.sizes)
        self.rows = Rows(place)
        self.order: Tensor | None = None
        self.sinks = ExactTokens(method.sink_tokens)

    @property
    def tokens(self) -> int:
        """See ``StoreState.tokens``."""
        return self.rows.tokens

    def append(self, tokens: Tokens) -> None:
        """See ``StoreState.append``."""
        if tokens.inputs is None:
            raise ValueError("these tokens come without the attention's inputs")
        self.sinks.add(tokens, peaks(tokens.inputs), self.tokens)
        for start in range(0, tokens.count, BLOCK_TOKENS):
            self._pack(tokens.part(start, start + BLOCK_TOKENS))

    def _pack(self, tokens: Tokens) -> None:
        rotary, keys = self.place.rotary, tokens.keys.float()
        rotated = hadamard(joined(rotary.unrotate(keys, tokens.positions) if rotary else keys), self.layout.key_block)
        if self.order is None and "order" not in self.place.tensors:
            self.order = rotated.sum(dim=2, keepdim=True).argsort(dim=-1).to(torch.int32)
        ordered = rotated.gather(-1, self._order().expand_as(rotated))
        values = hadamard(tokens.values.float(), self.layout.value_block)
        self.rows.append(
            {
                **self.layout.keys.pack(ordered, tokens.keys.dtype, "key_"),
                **self.layout.values.pack(values, tokens.keys.dtype, "value_"),
                **position_column(tokens, self.place, 1),
            }
        )

    def _order(self) -> Tensor:
        """int64 (B or 1, 1, 1, channels): which channel comes at each place."""
        if self.order is None:
            return self.place.tensors["order"].long()[None, None, None]
        return self.order.long()

    def chunks(self, call: Call) -> Iterator[Chunk]:
        """See ``StoreState.chunks``."""
        for start in range(0, self.tokens, BLOCK_TOKENS):
            yield RotatedChunk(self, start, min(BLOCK_TOKENS, self.tokens - start))

    def read_keys(self, start: int, count: int) -> Tensor:
        """Keys of ``count`` tokens from number ``start`` on, all of one block: float32 (B, K, count, D)."""
        layout, rotary = self.layout, self.place.rotary
        columns = self.rows.read(start, start + count)
        ordered = layout.keys.unpack(columns, "key_")
        rotated = ordered.gather(-1, self._order().argsort(dim=-1).expand_as(ordered))
        joint = hadamard(rotated, layout.key_block).squeeze(1)
        keys = joint.unflatten(-1, (self.place.sizes.heads, -1)).transpose(1, 2)
        if rotary is not None:
            keys = rotary.rotate(keys, positions_of(columns, start, count, keys.device))
        return self.sinks.put_in("keys", keys, start)

    def read_values(self, start: int, count: int) -> Tensor:
        """Their values, float32 (B, K, count, E)."""
        rotated = self.layout.values.unpack(self.rows.read(start, start + count), "value_")
        return self.sinks.put_in("values", hadamard(rotated, self.layout.value_block), start)

    def block(self, start: int, count: int) -> RotatedBlock:
        """The block of these tokens as it is packed, spare room included."""
        held = self.rows.blocks[start // BLOCK_TOKENS]
        return RotatedBlock(
            held["key_codes"],
            held["key_scale"],
            held["key_low"],
            held["value_codes"],
            held["value_scale"],
            held["value_low"],
            held.get("positions"),
            count,
        )

    def packing(self) -> RotatedLayout:
        """How all blocks are packed."""
        layout, rotary = self.layout, self.place.rotary
        order = self.place.tensors["order"][None] if self.order is None else self.order.flatten(1)
        sizes = layout.keys.bits, layout.keys.group, layout.values.group, layout.key_block, layout.value_block
        return RotatedLayout(*sizes, order, *(() if rotary is None else (rotary.frequencies, rotary.scaling)))

    def tensors(self) -> Iterator[Tensor]:
        """See ``StoreState.tensors``."""
        yield from self.rows.tensors()
        yield from self.sinks.tensors()
        if self.order is not None:
            yield self.order

    def over_batch_(self, change: Callable[[Tensor], Tensor]) -> None:
        """See ``StoreState.over_batch_``."""
        self.rows.over_batch_(change)
        self.sinks.over_batch_(change)
        self.order = None if self.order is None else change(self.order)


class RotatedChunk(ReadableChunk):
    """Tokens of one block.

    Args:
        state: holds them.
        start: number of the first.
        tokens: how many.
    """

    def __init__(self, state: RotateKVState, start: int, tokens: int) -> None:
        self.state, self.start, self.tokens = state, start, tokens

    def read_keys(self) -> Tensor:
        """Its keys, float32 (B, K, tokens, D)."""
        return self.state.read_keys(self.start, self.tokens)

    def read_values(self) -> Tensor:
        """Its values, float32 (B, K, tokens, E)."""
        return self.state.read_values(self.start, self.tokens)

    @classmethod
    def attend_run(cls, chunks: Sequence[Self], query: Tensor, softcap: float | None) -> Attended | None:
        """See ``Chunk.attend_run``: few queries read blocks as they are packed, where that is compiled."""
        state, first = chunks[0].state, chunks[0].start
        blocks = [state.block(chunk.start, chunk.tokens) for chunk in chunks]
        if not attend_serves(query, blocks):
            return super().attend_run(chunks, query, softcap)
        sinks, packing = state.sinks, state.packing()
        found = attend_rotated(query, blocks, packing, first=first, skipped=sinks.numbers(), softcap=softcap)
        exact = sinks.attend(query, first, chunks[-1].start + chunks[-1].tokens, softcap)
        return found if exact is None else found.joined(exact)


def peaks(inputs: Tensor) -> Tensor:
    """How far each token's greatest number stands above its mean one: (B, 1, T) from (B, 1, T, hidden)."""
    sizes = inputs.float().abs()
    return sizes.amax(dim=-1) / sizes.mean(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
