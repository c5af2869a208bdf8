"""Attention over chunks of stored tokens with an online softmax: nothing of the cache's length is ever made dense.

Source:  Milakov & Gimelshein 2018, "Online normalizer calculation for softmax", arXiv:1805.02867.
Shapes:  B batch, H query heads, K key-value heads, R = H / K, S queries, Q queries of a block, N tokens of a chunk.
         The queries of one key-value head are rows together: (B, K, R * Q, D), the head's R query heads first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from pintpot.cache._base import Call, Chunk
from pintpot.cache.dense import CHUNK_TOKENS, dense_chunks
from pintpot.cache.residue import ResidueState
from pintpot.core.errors import CompositionError
from pintpot.kernels import Attended

SCORES_AT_ONCE = 4 << 20
"""Scores (float32 numbers) of one block of queries and one chunk."""

MASK_AT_ONCE = 8 << 20
"""Entries of the largest mask that is made for fused attention; beyond it, attention is streamed."""


def attend_dense(call: Call, keys: Tensor, values: Tensor) -> Tensor:
    """Attention to dense keys and values (B, K, T, D), the last S of them the queries' own: (B, S, H, D).

    Fused where torch can (the very call that transformers makes), streamed otherwise.
    """
    tokens = keys.shape[2]
    needs_mask = call.adds_causality and (call.mask is not None or tokens > call.queries)
    too_large = needs_mask and call.queries * tokens > MASK_AT_ONCE
    if call.softcap is not None or call.sinks is not None or too_large:
        return attend_chunks(call, list(dense_chunks(keys, values)), keys.shape[1])
    mask = call.mask
    if needs_mask:
        causal = _causal(call.queries, tokens, keys.device)
        mask = causal if mask is None else causal & mask.bool()
    out: Tensor = sdpa_attention_forward(
        call.module,
        call.query,
        keys,
        values,
        mask,
        dropout=call.dropout,
        scaling=call.scaling,
        is_causal=call.causal,
    )[0]
    return out


def _causal(queries: int, tokens: int, device: torch.device) -> Tensor:
    rows = torch.arange(tokens - queries, tokens, device=device)
    return (torch.arange(tokens, device=device) <= rows[:, None])[None, None]


def attend_chunks(call: Call, chunks: Sequence[Chunk], heads: int, residue: ResidueState | None = None) -> Tensor:
    """Attention to chunks of stored tokens, the last S of them the queries' own.

    Args:
        call: the queries and what they may see; the mask's columns are the chunks' tokens.
        chunks: in order.
        heads: key-value heads K.
        residue: what is left of tokens that are in no chunk, seen by all queries.

    Returns:
        (B, S, H, D) in the query's dtype.

    Raises:
        CompositionError: when the mask is for another number of tokens, or dropout is asked for.
    """
    total = sum(chunk.tokens for chunk in chunks)
    if call.mask is not None and call.mask.shape[-1] != total:
        raise CompositionError(
            f"the attention mask is for {call.mask.shape[-1]} tokens, and the cache holds {total}",
            hint="caches that evict tokens need prompts of equal length in one batch (no padding, no custom mask)",
        )
    if call.dropout:
        raise CompositionError(
            "attention from a packed or evicting cache has no dropout", hint="call model.eval() before generating"
        )
    batch, query_heads, queries, _ = call.query.shape
    rows = max(1, SCORES_AT_ONCE // (batch * query_heads * CHUNK_TOKENS))
    blocks = [_attend_rows(call, chunks, heads, residue, slice(s, s + rows)) for s in range(0, queries, rows)]
    return (blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)).to(call.query.dtype)


def _attend_rows(call: Call, chunks: Sequence[Chunk], heads: int, residue: ResidueState | None, rows: slice) -> Tensor:
    """The output (B, Q, H, D) in float32 of some of the queries."""
    total = sum(chunk.tokens for chunk in chunks)
    query = call.query[:, :, rows]
    batch, query_heads, count, _ = query.shape
    grouped = (query.float() * call.scaling).reshape(batch, heads, -1, query.shape[-1])
    online = _Online(call.sinks, batch, heads, count)
    last_seen = total - call.queries + rows.start + count if call.causal else total
    for run, first in _runs(chunks):
        placed = list(_with_starts(run, first))
        whole = [chunk for chunk, start in placed if _seen_by_all(call, rows.start, start + chunk.tokens, total)]
        found = type(run[0]).attend_run(whole, grouped, call.softcap) if whole else None
        if found is not None:
            online.join(found)
        for chunk, start in placed if found is None else placed[len(whole) :]:
            if start >= last_seen:
                break
            scores = chunk.capped(grouped, call.softcap)
            online.add(_masked(call, scores, rows.start, start, total, heads), chunk.mix)
    if residue is not None:
        scores, values = residue.answer(query)
        online.add(scores, values.mul)
    return online.mean.reshape(batch, query_heads, count, -1).transpose(1, 2)


def _runs(chunks: Sequence[Chunk]) -> Iterator[tuple[list[Chunk], int]]:
    """Neighbours of one kind together, each run with the number of its first token."""
    start = 0
    for _, same in groupby(chunks, key=type):
        run = list(same)
        yield run, start
        start += sum(chunk.tokens for chunk in run)


def _with_starts(chunks: Sequence[Chunk], start: int) -> Iterator[tuple[Chunk, int]]:
    for chunk in chunks:
        yield chunk, start
        start += chunk.tokens


def _seen_by_all(call: Call, first_row: int, stop: int, total: int) -> bool:
    """Whether queries from ``first_row`` on see all tokens before ``stop``."""
    return call.mask is None and not _hides_future(call, first_row, stop, total)


def _hides_future(call: Call, first_row: int, stop: int, total: int) -> bool:
    return call.adds_causality and stop > total - call.queries + first_row + 1


def _masked(call: Call, scores: Tensor, first_row: int, start: int, total: int, heads: int) -> Tensor:
    """Scores (B, K, R * Q, N) with those of unseen tokens at the least number."""
    columns = slice(start, start + scores.shape[-1])
    count = scores.shape[2] * heads // call.query.shape[1]
    if _seen_by_all(call, first_row, columns.stop, total):
        return scores
    split = scores.unflatten(2, (-1, count))
    least = torch.finfo(scores.dtype).min
    if call.mask is not None:
        every_row = call.mask.shape[-2] == 1
        mask = call.mask[..., columns] if every_row else call.mask[..., first_row : first_row + count, columns]
        mask = mask.unsqueeze(2) if mask.shape[1] == 1 else mask.unflatten(1, (heads, -1))
        split = split.masked_fill(~mask, least) if mask.dtype == torch.bool else split + mask
    if _hides_future(call, first_row, columns.stop, total):
        positions = torch.arange(columns.start, columns.stop, device=scores.device)
        own = torch.arange(count, device=scores.device) + (total - call.queries + first_row)
        split = split.masked_fill(positions > own[:, None], least)
    return split.flatten(2, 3)


class _Online:
    """Softmax-weighted sums over chunks that come one by one.

    Attributes:
        found: what the chunks so far give; None before the first.
    """

    def __init__(self, sinks: Tensor | None, batch: int, heads: int, count: int) -> None:
        self.found: Attended | None = None
        if sinks is not None:
            top = sinks.float().reshape(1, heads, -1, 1).expand(batch, heads, -1, count)
            top = top.reshape(batch, heads, -1, 1)
            self.found = Attended(torch.zeros_like(top), top, torch.ones_like(top))

    def join(self, found: Attended) -> None:
        """Some more chunks, attended to already."""
        self.found = found if self.found is None else self.found.joined(found)

    def add(self, scores: Tensor, mix: Callable[[Tensor], Tensor]) -> None:
        """One more chunk with its scores (B, K, M, N), and what gives its values by their weights."""
        top = scores.amax(dim=-1, keepdim=True)
        if self.found is not None:
            top = torch.maximum(top, self.found.top)
        weights = scores.sub_(top).exp_()
        norm = weights.sum(dim=-1, keepdim=True)
        out = mix(weights)
        if self.found is not None:
            shrink = (self.found.top - top).exp_()
            norm = norm.add_(self.found.norm * shrink)
            out = out.add_(self.found.out * shrink)
        self.found = Attended(out, top, norm)

    @property
    def mean(self) -> Tensor:
        """The values' weighted mean, (B, K, M, D)."""
        if self.found is None:
            raise ValueError("no tokens came")
        return self.found.out / self.found.norm
