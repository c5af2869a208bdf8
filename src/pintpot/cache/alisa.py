"""ALISA: attend to the most recent tokens and to those that received most attention; all others wait on a slower tier.

Source:    Zhao et al. 2024, "ALISA: Accelerating Large Language Model Inference via Sparsity-Aware KV Caching",
           arXiv:2403.17312, sparse window attention.
Differs:   both halves of the window are fixed numbers of tokens, not a share of all; attention is summed from the last
           queries of each piece that is read and from every token that follows; the query heads of a key-value head
           share their window; what was moved away is always fetched and never computed again, as fetching what a
           layer recalls costs less than running the layers below it; nothing is packed to 8 bits on the way.
Saves:     kv_cache, real: tokens that are neither recent nor recalled leave the device, for a number each. They are in
           host memory under a GPU, on disk under a model in host memory.
Shapes:    attention received, summed (B, K, T, 1); rows on the tier (B, K, T, 2 D).
Composes:  any keep that keeps as much in all layers; with one, attention is summed over the tokens that are stored.
Use when:  attention goes to the same tokens again and again, and the answer follows the prompt at once.
Not when:  what matters changes with the question: sums know only the past. Nor when the folder for temporary files
           is itself in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pintpot.cache._base import Call, Chunk, Place, top
from pintpot.cache.dense import CHUNK_TOKENS, capacity, dense_chunks
from pintpot.cache.geometry import has_full_attention
from pintpot.cache.recall import RecallState, RecallStore, recalled_bytes
from pintpot.cache.stream import SCORES_AT_ONCE
from pintpot.cache.tokens import Buffer, Tokens
from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Claim, Source, technique
from pintpot.core.workload import Workload


@technique(
    name="alisa",
    wing="cache",
    part="store",
    source=Source(
        "ALISA: Accelerating Large Language Model Inference via Sparsity-Aware KV Caching",
        year=2024,
        arxiv="2403.17312",
    ),
    accounts=[Account.KV_CACHE],
    claims=[
        Claim("throughput", 3.0, versus="FlexGen", at="one GPU with its host, at best", where="abstract"),
        Claim("throughput", 1.9, versus="vLLM", at="one GPU with its host, at best", where="abstract"),
    ],
    fidelity="a window of fixed size; what was moved away is fetched, never computed again; no 8-bit packing",
    needs=("even_layers", "even_heads"),
)
@dataclass(frozen=True, kw_only=True)
class ALISA(RecallStore):
    """Sparse window attention, the rest on a slower tier.

    Attributes:
        budget_tokens: tokens that a query attends to, half of them the most recent ones and half those that received
            most attention; up to so many attention is exact.
        group_tokens: tokens that are put on the tier together.
    """

    budget_tokens: int = 1024
    group_tokens: int = 64

    def __post_init__(self) -> None:
        self.require(group_tokens=self.group_tokens, budget_tokens=self.budget_tokens // 2)

    @property
    def recent(self) -> int:
        """See ``RecallStore.recent``: half of the window."""
        return self.budget_tokens - self.recalled

    @property
    def group(self) -> int:
        """See ``RecallStore.group``."""
        return self.group_tokens

    @property
    def recalled(self) -> int:
        """See ``RecallStore.recalled``: the other half."""
        return self.budget_tokens // 2

    def open(self, place: Place) -> ALISAState:
        """See ``Store.open``."""
        return ALISAState(self, place)

    def index_bytes(self, tokens: int, place: Place, batch: int, dtype: torch.dtype) -> int:
        """See ``RecallStore.index_bytes``: a sum for every token, and what was recalled last."""
        sums = capacity(tokens, place.reserve_tokens, place.grow_tokens) * batch * place.sizes.heads * 4
        return sums + recalled_bytes(min(self.filed(tokens, place), self.recalled), place.sizes, batch, dtype)

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """On the embedded model, 1,000 tokens: 9.1 % at a window of 256 tokens and 12 % at 128."""
        return 0.09 * (256 / self.budget_tokens) ** 0.5

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[ALISA]:
        """2K to 256 tokens; none for a model without full attention."""
        if has_full_attention(shape.config):
            for tokens in (2048, 1024, 512, 256):
                yield cls(budget_tokens=tokens)


class ALISAState(RecallState):
    """Tokens in order, with the attention that each has received."""

    method: ALISA

    def __init__(self, method: ALISA, place: Place) -> None:
        super().__init__(method, place)
        self.received = Buffer()
        self._new: Tensor | None = None

    def append(self, tokens: Tokens) -> None:
        """See ``StoreState.append``."""
        if not tokens.count:
            return
        known = self._new is not None and self._new.shape[2] == tokens.count
        sums = self._new if known else None
        if sums is None:
            sums = tokens.keys.new_zeros((*tokens.keys.shape[:3], 1), dtype=torch.float32)
        if self.received.held is None or self.received.room < tokens.count:
            room = capacity(self.tokens + tokens.count, self.place.reserve_tokens, self.place.grow_tokens)
            self.received.allocate(sums, room)
        self.received.write(sums)
        self._new = None
        super().append(tokens)

    def file(self, tokens: Tokens) -> None:
        """See ``RecallState.file``."""
        self.put(tokens)

    def choose(self, query: Tensor, count: int) -> Tensor:
        """See ``RecallState.choose``: by the attention received so far, whatever the query."""
        filed = 0 if self.rows is None else self.rows.tokens
        return top(self.received.view()[:, :, :filed, 0], count)

    def observe(self, call: Call, tokens: Tokens | None) -> None:
        """See ``StoreState.observe``: add up what each token received from the last queries, half a window of them."""
        # Under a keep, new tokens come here later and by other numbers.
        new = tokens if self.place.consecutive else None
        columns = self.tokens_attended(call) + (0 if new is None else new.count)
        if not columns:
            return
        last = min(call.queries, self.method.recent)
        heads = self.place.sizes.heads
        grouped = (call.query[:, :, call.queries - last :].float() * call.scaling).unflatten(1, (heads, -1))
        rows = max(1, SCORES_AT_ONCE // (call.query.shape[0] * call.query.shape[1] * CHUNK_TOKENS))
        total = grouped.new_zeros((*grouped.shape[:2], columns))
        for start in range(0, last, rows):
            block = grouped[:, :, :, start : start + rows]
            hidden = last - start if new is not None else None
            total += self._shares(call, block, new, columns, hidden)
        if self.tokens:
            self._add(total[..., : columns - (0 if new is None else new.count)], call)
        if new is not None:
            self._new = total[..., columns - new.count :, None]

    def tokens_attended(self, call: Call) -> int:
        """How many stored tokens this call attends to."""
        filed = 0 if self.rows is None else self.rows.tokens
        return self.tokens - (max(0, filed - self.method.recalled) if call.queries == 1 else 0)

    def _shares(self, call: Call, block: Tensor, new: Tokens | None, columns: int, last: int | None) -> Tensor:
        """Attention that tokens receive from a block of queries (B, K, R, Q, D): (B, K, columns).

        Args:
            call: the attention.
            block: the queries, scaled.
            new: the new tokens, if they count.
            columns: tokens in all.
            last: the first query of the block is the last new token's but ``last - 1``.
        """
        query, own = block.flatten(2, 3), None
        if last is not None:
            first = columns - last
            own = torch.arange(first, first + block.shape[3], device=block.device).repeat(block.shape[2])[:, None]

        def scores() -> Iterator[Tensor]:
            start = 0
            for chunk in self._seen(call, new):
                found = chunk.capped(query, call.softcap)
                if own is not None:
                    places = torch.arange(start, start + chunk.tokens, device=found.device)
                    found = found.masked_fill(places > own, torch.finfo(found.dtype).min)
                yield found
                start += chunk.tokens

        norm = query.new_full((*query.shape[:3], 1), -torch.inf)
        for found in scores():
            norm = torch.logaddexp(norm, found.logsumexp(dim=-1, keepdim=True))
        return torch.cat([(found - norm).exp_().sum(dim=2) for found in scores()], dim=-1)

    def _seen(self, call: Call, new: Tokens | None) -> Iterator[Chunk]:
        """What the call has attended to; what it recalled is still there."""
        if call.queries == 1 and self.recalled.held is not None:
            yield from self.recalled_chunks(self.recalled.held)
            yield from self.near_chunks(self._recent)
        else:
            yield from self.chunks(call)
        if new is not None:
            yield from dense_chunks(new.keys, new.values)

    def _add(self, shares: Tensor, call: Call) -> None:
        """Add shares (B, K, n) to the sums of the stored tokens that this call attends to."""
        sums = self.received.view()[..., 0]
        filed = 0 if self.rows is None else self.rows.tokens
        if filed and call.queries == 1 and self.recalled.numbers is not None:
            count = min(filed, self.method.recalled)
            sums.scatter_add_(2, self.recalled.numbers.long(), shares[..., :count])
            sums[..., filed:] += shares[..., count:]
        else:
            sums += shares

    def tensors(self) -> Iterator[Tensor]:
        """See ``StoreState.tensors``."""
        yield from super().tensors()
        yield from self.received.tensors()

    def over_batch_(self, change: Callable[[Tensor], Tensor]) -> None:
        """See ``StoreState.over_batch_``."""
        super().over_batch_(change)
        self.received.over_batch_(change)
