"""FP8: keep keys and values as 8-bit floating-point numbers, with a scale for each token or each head.

Source:    the practice of inference servers (vLLM, "Quantized KV Cache": E4M3 with a scale), in the format of
           Micikevicius et al. 2022, "FP8 Formats for Deep Learning", arXiv:2209.05433.
Differs:   servers take one scale for a tensor or a head, found beforehand or from the first tokens; here each token of
           each head has its own by default. Attention is computed in float32, not in 8 bits.
Saves:     kv_cache, real: a byte for each number, and two for each scale. Attending makes 256 tokens float32 at a time
           where there is no compiled kernel.
Shapes:    codes (B, K, T, D) in float8_e4m3fn, scales bfloat16 (B, K, T, 1), or (B, K, 1, 1) for a head.
Composes:  any keep.
Use when:  half of the cache's bytes is enough and nothing may be noticed.
Not when:  fewer bits do: kivi(bits=4) takes little more than half of this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from pintpot.cache._base import Call, Chunk, LayerSizes, Place, Store, StoreState
from pintpot.cache.fused import ReadableChunk
from pintpot.cache.geometry import has_full_attention
from pintpot.cache.rows import BLOCK_TOKENS, Columns, Rows, room_for
from pintpot.cache.tokens import Tokens
from pintpot.core.errors import CompositionError
from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Source, technique
from pintpot.core.workload import Workload
from pintpot.kernels import Attended, Float8Block, attend_fp8, attend_serves

FORMAT = torch.float8_e4m3fn
GREATEST = torch.finfo(FORMAT).max
"""448: beyond it there is no infinity, so numbers are cut there."""

MARGIN = 8.0
"""How much greater than in its first tokens a head's numbers may become before they are cut. The format spans 15
binades of normal numbers, so three of them cost nothing."""


@technique(
    name="fp8",
    wing="cache",
    part="store",
    source=Source("FP8 Formats for Deep Learning", year=2022, arxiv="2209.05433"),
    accounts=[Account.KV_CACHE],
    fidelity="a scale for each token of each head by default; attention in float32",
)
@dataclass(frozen=True, kw_only=True)
class FP8(Store):
    """Eight-bit floating-point numbers: a sign, 4 bits of exponent and 3 of mantissa.

    Attributes:
        scales: what has a scale of its own: ``token`` (of a head) or ``head`` (of a sequence, by its first tokens).
    """

    scales: str = "token"

    def __post_init__(self) -> None:
        if self.scales not in ("token", "head"):
            raise CompositionError(
                f"fp8 has a scale for each token or each head, not {self.scales!r}",
                hint="use fp8(scales=token) or fp8(scales=head)",
            )

    def open(self, place: Place) -> FP8State:
        """See ``Store.open``."""
        return FP8State(self, place)

    def predict_bytes(self, tokens: int, place: Place, batch: int, dtype: torch.dtype) -> int:
        """See ``Store.predict_bytes``."""
        if not tokens:
            return 0
        sizes, room = place.sizes, room_for(tokens, place)
        numbers = room * (sizes.key_dim + sizes.value_dim)
        return batch * sizes.heads * (numbers + 2 * 2 * (room if self.scales == "token" else 1))

    def chunk_bytes(self, sizes: LayerSizes, batch: int) -> int:
        """Numbers of one block, keys or values, in float32, or of the queries where these read blocks as they are."""
        width = max(sizes.key_dim, sizes.value_dim) * 4
        return batch * width * (4 * sizes.query_heads if sizes.read_packed else BLOCK_TOKENS * sizes.heads)

    def decode_bytes(self, tokens: int, place: Place, batch: int, dtype: torch.dtype) -> int:
        """See ``Store.decode_bytes``: read once; where there is no kernel, written in float32 and read again."""
        numbers = 0 if place.sizes.read_packed else place.sizes.dense_bytes(tokens, batch, torch.float32)
        return self.predict_bytes(tokens, place, batch, dtype) + 2 * numbers

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """As measured on the embedded model: 0.08 % with a scale for each token, 0.16 % with one for each head."""
        return 0.0008 if self.scales == "token" else 0.0016

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[FP8]:
        """Both scales; none for a model without full attention."""
        if has_full_attention(shape.config):
            for scales in ("token", "head"):
                yield cls(scales=scales)


def encode(numbers: Tensor, scale: Tensor) -> Tensor:
    """Numbers over their scale in eight bits, as bytes: uint8 of their shape (torch moves bytes everywhere)."""
    codes = (numbers.float() / scale.float()).clamp_(-GREATEST, GREATEST).to(FORMAT)
    return codes.view(torch.uint8)


def scale_for(greatest: Tensor, margin: float = 1.0) -> Tensor:
    """bfloat16 scales that bring absolute numbers up to ``greatest`` into the format."""
    scale = greatest.float() * (margin / GREATEST)
    return scale.clamp(torch.finfo(torch.bfloat16).tiny, torch.finfo(torch.bfloat16).max).to(torch.bfloat16)


class FP8State(StoreState):
    """Bytes and their scales."""

    def __init__(self, method: FP8, place: Place) -> None:
        self.by_head = method.scales == "head"
        self.rows = Rows(place)
        self.scales: Columns = {}

    @property
    def tokens(self) -> int:
        """See ``StoreState.tokens``."""
        return self.rows.tokens

    def append(self, tokens: Tokens) -> None:
        """See ``StoreState.append``."""
        for start in range(0, tokens.count, BLOCK_TOKENS):
            piece = tokens.part(start, start + BLOCK_TOKENS)
            columns: Columns = {}
            for name, numbers in (("keys", piece.keys), ("values", piece.values)):
                columns |= self._encoded(name, numbers, getattr(tokens, name))
            self.rows.append(columns)

    def _encoded(self, name: str, numbers: Tensor, call: Tensor) -> Columns:
        """Numbers of a piece of the call's, with scales where each token has its own."""
        if not self.by_head:
            scale = scale_for(numbers.abs().amax(dim=-1, keepdim=True))
            return {name: encode(numbers, scale), f"{name}_scale": scale}
        if name not in self.scales:
            self.scales[name] = scale_for(call.abs().amax(dim=(2, 3), keepdim=True), MARGIN)
        return {name: encode(numbers, self.scales[name])}

    def chunks(self, call: Call) -> Iterator[Chunk]:
        """See ``StoreState.chunks``."""
        for index, held in enumerate(self.rows.blocks):
            scales = self.scales if self.by_head else {name: held[f"{name}_scale"] for name in ("keys", "values")}
            yield FP8Chunk(held, scales, min(BLOCK_TOKENS, self.tokens - index * BLOCK_TOKENS))

    def tensors(self) -> Iterator[Tensor]:
        """See ``StoreState.tensors``."""
        yield from self.rows.tensors()
        yield from self.scales.values()

    def over_batch_(self, change: Callable[[Tensor], Tensor]) -> None:
        """See ``StoreState.over_batch_``."""
        self.rows.over_batch_(change)
        self.scales = {name: change(scale) for name, scale in self.scales.items()}


class FP8Chunk(ReadableChunk):
    """The first tokens of a block. Scales are applied to scores and weights, of which there are fewer than of numbers.

    Args:
        held: the bytes of the block, spare room included.
        scales: of keys and of values.
        tokens: how many are there.
    """

    def __init__(self, held: Columns, scales: Columns, tokens: int) -> None:
        self.tokens = tokens
        self.block = Float8Block(held["keys"], scales["keys"], held["values"], scales["values"], tokens)

    def read_keys(self) -> Tensor:
        """Its keys, float32 (B, K, tokens, D)."""
        return self._numbers(self.block.keys).mul_(self.block.key_scale[:, :, : self.tokens])

    def read_values(self) -> Tensor:
        """Its values, float32 (B, K, tokens, D)."""
        return self._numbers(self.block.values).mul_(self.block.value_scale[:, :, : self.tokens])

    def scores(self, query: Tensor) -> Tensor:
        """See ``Chunk.scores``."""
        numbers = self._numbers(self.block.keys)
        return (query @ numbers.transpose(-1, -2)).mul_(self._across(self.block.key_scale))

    def mix(self, weights: Tensor) -> Tensor:
        """See ``Chunk.mix``."""
        return (weights * self._across(self.block.value_scale)) @ self._numbers(self.block.values)

    @classmethod
    def attend_run(cls, chunks: Sequence[Self], query: Tensor, softcap: float | None) -> Attended | None:
        """See ``Chunk.attend_run``: few queries read the bytes as they are, where that is compiled."""
        blocks = [chunk.block for chunk in chunks]
        if not attend_serves(query, blocks):
            return super().attend_run(chunks, query, softcap)
        return attend_fp8(query, blocks, softcap=softcap)

    def _numbers(self, codes: Tensor) -> Tensor:
        return codes[:, :, : self.tokens].view(FORMAT).float()

    def _across(self, scale: Tensor) -> Tensor:
        """Scales (B, K, T or 1, 1) along the tokens of scores: float32 (B, K, 1, tokens or 1)."""
        return scale[:, :, : self.tokens].float().transpose(-1, -2)
