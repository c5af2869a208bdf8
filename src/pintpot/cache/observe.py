"""Attention weights for keeps: exact, of some queries, in pieces, though the model's own attention gives none.

Two passes over the tokens: the first finds the logarithm of the sum of each query's exponentials over everything
stored and pending, the second gives weights chunk by chunk to whoever sums them up.

Shapes: R query heads of a key-value head, W queries, N tokens of a chunk; weights (B, K, R, W, N).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pintpot.cache._base import Call, Chunk, Seen
from pintpot.cache.dense import CHUNK_TOKENS, dense_chunks

WEIGHTS_AT_ONCE = 4 << 20
"""Weights (float32 numbers) of one block of queries and one chunk."""


def reduced_attention(seen: Seen, queries: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """See ``Seen.attention``."""
    return torch.cat([reduce(weights) for weights in attention_weights(seen, queries, queries.shape[2])], dim=-1)


def received_attention(seen: Seen, queries: Tensor) -> Tensor:
    """See ``Seen.received``."""
    batch, heads, count, _ = queries.shape
    rows = max(1, WEIGHTS_AT_ONCE // (batch * heads * CHUNK_TOKENS))
    total: Tensor | None = None
    for start in range(0, count, rows):
        block = queries[:, :, start : start + rows]
        found = torch.cat([w.sum(dim=3) for w in attention_weights(seen, block, count - start)], dim=-1)
        total = found if total is None else total.add_(found)
    if total is None:
        raise ValueError("attention needs at least one query")
    return total


def attention_weights(seen: Seen, queries: Tensor, last: int) -> Iterator[Tensor]:
    """Weights (B, K, R, W, N) of consecutive queries, the first of the ``last`` last tokens', chunk by chunk."""
    keys = seen.tokens.keys
    tokens, call = keys.shape[2], seen.call
    grouped = (queries.float() * call.scaling).unflatten(1, (keys.shape[1], -1))
    norm = _sinks(call, grouped)
    for chunk in seen.stored():
        norm = _add(norm, _scores(chunk, grouped, call))
    pending = list(dense_chunks(keys, seen.tokens.values))
    own = torch.arange(tokens - last, tokens - last + queries.shape[2], device=keys.device)[:, None]
    starts = range(0, tokens, CHUNK_TOKENS)
    for start, chunk in zip(starts, pending, strict=True):
        norm = _add(norm, _hide(_scores(chunk, grouped, call), own, start))
    if norm is None:
        return
    for start, chunk in zip(starts, pending, strict=True):
        yield _hide(_scores(chunk, grouped, call), own, start).sub_(norm[..., None]).exp_()


def _scores(chunk: Chunk, grouped: Tensor, call: Call) -> Tensor:
    """Scores (B, K, R, W, N) of a chunk."""
    return chunk.capped(grouped.flatten(2, 3), call.softcap).unflatten(2, grouped.shape[2:4])


def _hide(scores: Tensor, own: Tensor, start: int) -> Tensor:
    """Scores with those of tokens behind each query's own (W, 1) at the least number."""
    columns = torch.arange(start, start + scores.shape[-1], device=scores.device)
    return scores.masked_fill_(columns > own, torch.finfo(scores.dtype).min)


def _sinks(call: Call, grouped: Tensor) -> Tensor | None:
    if call.sinks is None:
        return None
    batch, heads, share, count, _ = grouped.shape
    return call.sinks.float().reshape(1, heads, share, 1).expand(batch, heads, share, count)


def _add(norm: Tensor | None, scores: Tensor) -> Tensor:
    found = scores.logsumexp(dim=-1)
    return found if norm is None else torch.logaddexp(norm, found)
