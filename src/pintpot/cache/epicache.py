"""EpiCache: read a conversation in blocks, and judge each block by what a topic of it asks.

Source:    Kim et al. 2025, "EpiCache: Episodic KV Cache Management for Long Conversational Question Answering",
           arXiv:2509.17396; details and defaults as in the authors' repository (apple/ml-epicache).
Differs:   a token is judged once, with its block, and a share of every block survives; the authors judge all tokens
           that they still hold after every block, and keep a fixed number. Heads of a layer keep equally many. Weights
           are shared with the prompt's own tokens. Without a prompt the last queries judge.
Saves:     kv_cache, real: evicted tokens are gone, and reading in blocks bounds the peak. Every episode has a cache
           of its own (``pintpot.cache.EpisodicCaches``).
Shapes:    attention weights of the prompt (B, K, R, W, N), their maximum over heads and queries (B, K, T).
Composes:  any store, except those in which all layers hold the same tokens.
Use when:  many questions on various topics come after a long conversation.
Not when:  there is one question, and it is known beforehand: judge by it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, PreTrainedModel

from pintpot.cache._base import Seen
from pintpot.cache.cascade import LayerKeep
from pintpot.cache.fraction import ChunkedKeep
from pintpot.cache.geometry import FULL, layer_kinds
from pintpot.core.errors import CompositionError, ShapeError, UnsupportedModel
from pintpot.core.ledger import Account
from pintpot.core.technique import Claim, Source, technique

LEAST_SHARE = 0.25
"""Of the average budget that every layer gets, however little it minds."""

COMPARED_TOKENS = 100
"""Keys of so many tokens are compared as one vector."""


@technique(
    name="epicache",
    wing="cache",
    part="keep",
    source=Source(
        "EpiCache: Episodic KV Cache Management for Long Conversational Question Answering",
        year=2025,
        arxiv="2509.17396",
    ),
    accounts=[Account.KV_CACHE],
    claims=[
        Claim("accuracy above recent baselines, up to", 0.4, versus="other eviction", where="abstract (v1)"),
        Claim("memory", 3.5, versus="full cache", where="abstract (v1)"),
        Claim("latency", 2.4, versus="full cache", where="abstract (v1)"),
    ],
    fidelity="tokens are judged once, a share of each block; heads of a layer keep equally many",
    removes=("even_layers",),
)
@dataclass(frozen=True, kw_only=True)
class EpiCache(ChunkedKeep, LayerKeep):
    """Eviction of a block's tokens by a prompt that stands for an episode of the conversation.

    Attributes:
        kept_fraction: share of the decided tokens that survives, over all layers.
        sink_tokens: first tokens, always kept.
        recent_tokens: tokens that wait for the next block; without a prompt, their queries judge.
        block_tokens: tokens of a block.
        episodes: topics that a conversation is divided into.
        segment_utterances: utterances that are embedded together.
        medoid_segments: segments nearest to the centre of an episode that make its prompt.
        sharpness: how much more the layers that mind eviction may keep (alpha).
        similarities: of each layer with full attention, from ``layer_similarities``; empty for equal budgets.
    """

    # At a quarter of the bytes 11.0 % more perplexity, and 98 % of the recall lost, of which a fifth counts
    # (`results/cache.csv`).
    risk_at_half: ClassVar[float] = 0.12
    kept_fraction: float = 0.25
    sink_tokens: int = 4
    recent_tokens: int = 64
    block_tokens: int = 2048
    episodes: int = 4
    segment_utterances: int = 4
    medoid_segments: int = 4
    sharpness: float = 1.1
    similarities: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = (self.recent_tokens, self.block_tokens, self.episodes, self.segment_utterances, self.medoid_segments)
        if min(counts) < 1 or self.sharpness < 0:
            raise CompositionError(
                "epicache: counts are at least 1, and sharpness is at least 0",
                hint="the authors use 4 episodes, 4 utterances a segment, blocks of 2048 tokens and sharpness=1.1",
            )

    @property
    def recent(self) -> int:
        """See ``Keep.recent``."""
        return self.recent_tokens

    @property
    def observed_queries(self) -> int:
        """See ``Keep.observed_queries``."""
        return self.recent_tokens

    def score(self, seen: Seen) -> Tensor:
        """See ``Keep.score``: the most attention that any of the queries pays."""
        return seen.attention(lambda weights: weights.amax(dim=3)).amax(dim=2)[..., : seen.decided]

    def preference(self, seen: Seen) -> float:
        """See ``LayerKeep.preference``."""
        if not self.similarities:
            return 1.0
        if len(self.similarities) != seen.place.layers:
            raise CompositionError(
                f"epicache has similarities of {len(self.similarities)} layers, and the model {seen.place.layers}",
                hint="find them with pintpot.cache.epicache.layer_similarities(model, text)",
            )
        return shares(self.similarities, self.sharpness)[seen.place.index]


def shares(similarities: tuple[float, ...], sharpness: float) -> list[float]:
    """Each layer's share of what is kept: more where keys change more when tokens are evicted; they sum to 1."""
    low, high = min(similarities), max(similarities)
    if high == low:
        return [1 / len(similarities)] * len(similarities)
    weights = [(1 - (similarity - low) / (high - low)) ** sharpness for similarity in similarities]
    bounded = [max(weight / sum(weights), LEAST_SHARE / len(weights)) for weight in weights]
    return [share / sum(bounded) for share in bounded]


@torch.no_grad()
def layer_similarities(
    model: PreTrainedModel, text: Tensor, *, block_tokens: int = 4096, sink_tokens: int = 128, overlap: float = 0.5
) -> tuple[float, ...]:
    """How alike the keys of each layer stay when a text is read in blocks that forget the blocks before.

    Args:
        model: in evaluation mode, with its own attention.
        text: token ids (1, T), more than a block of them.
        block_tokens: tokens of a block.
        sink_tokens: first tokens, which every block sees.
        overlap: share of the block before that a block sees too.

    Returns:
        The mean cosine of each layer with full attention, over heads and stretches of ``COMPARED_TOKENS`` tokens.

    Raises:
        ShapeError: when the text is one block or less.
    """
    tokens = text.shape[-1]
    if tokens <= block_tokens or text.shape[0] != 1:
        raise ShapeError(
            f"{text.shape[0]} x {tokens} tokens are not one text of more than a block of {block_tokens}",
            hint="give one longer text, or ask for smaller blocks",
        )
    whole = DynamicCache()
    model(text, past_key_values=whole, use_cache=True)
    blocks = _in_blocks(model, text, block_tokens, min(sink_tokens, block_tokens), int(overlap * block_tokens))
    full = [i for i, layer in enumerate(layer_kinds(model.config)) if layer.kind == FULL]
    return tuple(_likeness(_held(whole, i)[0], blocks[i]) for i in full)


def _in_blocks(model: PreTrainedModel, text: Tensor, size: int, sinks: int, overlap: int) -> list[Tensor]:
    """Keys (1, K, T, D) of each layer when blocks see the sinks and the end of the block before."""
    read: list[list[Tensor]] = []
    carried: list[tuple[Tensor, Tensor]] = []
    first: list[tuple[Tensor, Tensor]] = []
    for start in range(0, text.shape[-1], size):
        block = text[:, start : start + size]
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(carried):
            cache.update(keys, values, layer)
        positions = torch.arange(start, start + block.shape[-1], device=text.device)[None]
        model(block, past_key_values=cache, position_ids=positions, use_cache=True)
        count = block.shape[-1]
        held = [_part(_held(cache, layer), -count, None) for layer in range(len(cache.layers))]
        first = first or [_part(pair, 0, sinks) for pair in held]
        read.append([keys for keys, _ in held])
        # In the first block, the end must not repeat the sinks.
        tail = min(overlap, count - (sinks if start == 0 else 0))
        ends = [_part(pair, count - tail, None) for pair in held]
        carried = [
            (torch.cat([sink[0], end[0]], dim=2), torch.cat([sink[1], end[1]], dim=2))
            for sink, end in zip(first, ends, strict=True)
        ]
    return [torch.cat(keys, dim=2) for keys in zip(*read, strict=True)]


def _part(pair: tuple[Tensor, Tensor], start: int, stop: int | None) -> tuple[Tensor, Tensor]:
    return pair[0][:, :, start:stop], pair[1][:, :, start:stop]


def _held(cache: DynamicCache, layer: int) -> tuple[Tensor, Tensor]:
    keys, values = (getattr(cache.layers[layer], name, None) for name in ("keys", "values"))
    if not isinstance(keys, Tensor) or not isinstance(values, Tensor):
        raise UnsupportedModel("a layer caches no keys and values", hint="use a model whose layers all have attention")
    return keys, values


def _likeness(one: Tensor, other: Tensor) -> float:
    """Mean cosine of keys (1, K, T, D), stretch by stretch."""
    found = [
        functional.cosine_similarity(a.float().flatten(2), b.float().flatten(2), dim=-1)
        for a, b in zip(one.split(COMPARED_TOKENS, dim=2), other.split(COMPARED_TOKENS, dim=2), strict=True)
    ]
    return float(torch.stack(found).mean())
