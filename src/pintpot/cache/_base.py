"""The algebra of the cache wing: what is kept, times how it is stored.

A layer of the cache holds, in time order::

    [ stored: sinks and survivors, in the Store's format ] [ pending: recent tokens, not yet decided on by the Keep ]

New tokens are first attended to in full precision, then given over: without a ``Keep`` straight to the store, with one
to the pending window, from which the keep chooses survivors. So tokens are evicted before they are packed, each is
judged once, and what is packed is never unpacked to be packed again.

Layers may divide what is kept among themselves (``cascade.py``), and heads of one layer may keep different numbers of
tokens (``lanes.py``).

Shapes: B batch, H query heads, K key-value heads, T tokens, D head dim (of keys or of values), M query rows of one
key-value head. Keys and values (B, K, T, D), rotated already where the model rotates them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from pintpot.cache.rotary import Rotary
from pintpot.cache.tokens import Tokens
from pintpot.core.errors import CompositionError
from pintpot.core.ledger import Ledger, Tier
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Technique
from pintpot.core.work import Work
from pintpot.core.workload import Workload
from pintpot.kernels import Attended, reads_packed

GROW_TOKENS = 128
"""A dense buffer grows by this many tokens: a copy of it every 128 tokens rather than every token."""


@dataclass(frozen=True)
class LayerSizes:
    """What one layer of the cache holds for each token, and what it meets.

    Attributes:
        heads: key-value heads.
        key_dim: numbers in a key.
        value_dim: numbers in a value.
        query_heads: query heads.
        hidden: numbers in the input of the attention.
    """

    heads: int
    key_dim: int
    value_dim: int
    query_heads: int = 0
    hidden: int = 0

    @property
    def read_packed(self) -> bool:
        """Whether one token's queries read packed blocks as they are, where the store has a kernel for it."""
        return reads_packed(-(-self.query_heads // self.heads))

    def dense_bytes(self, tokens: int, batch: int, dtype: torch.dtype) -> int:
        """Bytes of ``tokens`` tokens of ``batch`` sequences, stored densely."""
        return tokens * batch * self.heads * (self.key_dim + self.value_dim) * dtype.itemsize


@dataclass(frozen=True)
class Place:
    """Where in a model a store is, and what it can count on.

    Attributes:
        sizes: of the layer.
        index: the layer's number among the layers with full attention.
        layers: how many of those there are.
        recent_tokens: recent tokens that are in full precision elsewhere (pending in a keep), so that the store need
            not keep a window of its own for them.
        reserve_tokens: the most tokens that will come, where known: then nothing is ever moved to grow.
        grow_tokens: what a dense buffer grows by.
        consecutive: whether every token comes to the store, in order: then a token's position is its number there.
        rotary: how the model rotates keys; None where it does not.
        tensors: what calibration found for this layer.
        below: gives the store of the layer below in a live cache; None in the lowest layer and in predictions.
    """

    sizes: LayerSizes
    index: int = 0
    layers: int = 1
    recent_tokens: int = 0
    reserve_tokens: int | None = None
    grow_tokens: int = GROW_TOKENS
    consecutive: bool = True
    rotary: Rotary | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    below: Callable[[], StoreState] | None = None

    def but(self, **changes: object) -> Place:
        """The same place with some changes."""
        return replace(self, **changes)  # type: ignore[arg-type]  # names and types as above


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of attention.

    Attributes:
        module: the model's attention module.
        query: (B, H, S, D).
        mask: None where every token sees all before it; (B, 1, 1, T) padding, to which causality is to be added;
            or (B, 1 or H, S, T), complete. True (or 0.0) where a token is seen.
        scaling: of the scores.
        softcap: scores go through ``softcap * tanh(scores / softcap)``.
        sinks: (H,), a score of each head that takes weight and gives nothing.
        dropout: of the weights; only where fused attention does the work.
        causal: whether a token sees only those before it.
    """

    module: nn.Module
    query: Tensor
    mask: Tensor | None = None
    scaling: float = 1.0
    softcap: float | None = None
    sinks: Tensor | None = None
    dropout: float = 0.0
    causal: bool = True

    @property
    def queries(self) -> int:
        """S."""
        return self.query.shape[2]

    @property
    def adds_causality(self) -> bool:
        """Whether causality is not in the mask, and matters."""
        bare = self.mask is None or self.mask.shape[-2] == 1
        return self.causal and self.queries > 1 and bare


class Chunk(ABC):
    """A run of stored tokens, small enough that making it dense for a moment costs little.

    Attributes:
        tokens: how many.
    """

    tokens: int

    @abstractmethod
    def scores(self, query: Tensor) -> Tensor:
        """Products of float32 queries (B, K, M, D) with the keys: float32 (B, K, M, tokens)."""

    def capped(self, query: Tensor, softcap: float | None) -> Tensor:
        """``scores``, capped as the model caps them."""
        scores = self.scores(query)
        return scores if softcap is None else scores.div_(softcap).tanh_().mul_(softcap)

    @abstractmethod
    def mix(self, weights: Tensor) -> Tensor:
        """Values weighted by float32 (B, K, M, tokens): float32 (B, K, M, D)."""

    @classmethod
    def attend_run(cls, chunks: Sequence[Self], query: Tensor, softcap: float | None) -> Attended | None:
        """What float32 queries (B, K, M, D) get from several chunks of this kind, all seen by all queries.

        None, as a rule, where that takes the chunks' ``scores`` and ``mix``.
        """
        return None


class StoreState(ABC):
    """The stored tokens of one layer."""

    @property
    @abstractmethod
    def tokens(self) -> int:
        """How many are stored."""

    @abstractmethod
    def append(self, tokens: Tokens) -> None:
        """Store tokens behind those already there. Does not keep the tensors that it is given."""

    @abstractmethod
    def chunks(self, call: Call) -> Iterator[Chunk]:
        """The stored tokens in order, in chunks of bounded size; or those of them that this call should attend to."""

    def observe(self, call: Call, tokens: Tokens | None) -> None:
        """Take note of attention that was just computed, before its new tokens are given over: nothing as a rule.

        Args:
            call: the attention.
            tokens: the new tokens, where they are not held yet.
        """
        return None

    @abstractmethod
    def tensors(self) -> Iterator[Tensor]:
        """Every tensor that is held, spare capacity included."""

    @abstractmethod
    def over_batch_(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every held tensor by ``change`` of it, which acts on the first dimension only."""

    def nbytes(self) -> int:
        """Bytes held, spare capacity included."""
        return sum(t.untyped_storage().nbytes() for t in self.tensors())

    def tier_nbytes(self) -> int:
        """Bytes held on a slower tier than the tensors'."""
        return 0

    def whole(self) -> tuple[Tensor, Tensor] | None:
        """All keys and values as views of dense storage, or None where they are not stored so."""
        return None

    def crop_(self, tokens: int) -> None:
        """Forget the last ``tokens`` tokens.

        Raises:
            CompositionError: when the format cannot.
        """
        raise CompositionError(
            "this cache cannot be cropped: packed or evicted tokens cannot be brought back",
            hint="use a dense cache for assisted decoding, or begin the conversation with a new cache",
        )


@dataclass(frozen=True, kw_only=True)
class CacheTechnique(Technique):
    """What keeps and stores share: predictions of the whole cache, from the parts that the ledger has seen so far."""

    def predict(self, ledger: Ledger, shape: ModelShape, workload: Workload) -> Ledger:
        """Bytes of the cache after the prompt and at the last token, and of the temporaries of attending to it.

        A keep and a store multiply, so each notes itself in ``ledger.facts["cache"]``, and whichever comes second
        predicts the two together.
        """
        # Imported here because the closed forms build on this module.
        from pintpot.cache.forecast import predict_cache

        return predict_cache(self, ledger, shape, workload)

    def calibration_bytes(self, place: Place, dtype: torch.dtype) -> int:
        """Bytes that a layer holds of what was found beforehand: nothing, unless the technique is calibrated."""
        return 0

    def acts_on(self, layers: int) -> bool:
        """Whether it changes anything in a model with so many layers with full attention (at least one)."""
        return True

    def work(self, work: Work, shape: ModelShape, workload: Workload) -> Work:
        """Bytes read and operations done for one token with this cache, in place of the dense one's."""
        from pintpot.cache.forecast import cache_work

        return cache_work(self, work, shape, workload)


@dataclass(frozen=True, kw_only=True)
class Store(CacheTechnique):
    """How tokens are stored.

    What a store cannot do with less is declared by features that it ``needs``: ``even_heads`` where the heads of a
    layer are stored together, ``even_layers`` where bytes are known beforehand only if all layers hold equally many
    tokens, ``every_layer`` where a layer is made from the one below. Keeps and sharings say which they remove.

    Attributes:
        exact: gives back what it was given, bit for bit.
        needs_inputs: wants the input of the attention beside its keys and values.
        needs_rotary: wants to take the rotation off keys.
        shared_tokens: "" where every head may keep tokens of its own; "heads" where all heads of a layer must hold
            the same tokens, and "layers" where all layers must too.
        waiting_layers: layers whose new tokens are dense at once, until a layer above has been given the same.
    """

    exact: ClassVar[bool] = False
    needs_inputs: ClassVar[bool] = False
    needs_rotary: ClassVar[bool] = False
    shared_tokens: ClassVar[str] = ""
    waiting_layers: ClassVar[int] = 0

    def granule(self, place: Place) -> int:
        """Tokens by which a layer's bytes grow: layers that share tokens differ by multiples of so many."""
        return 1

    @abstractmethod
    def open(self, place: Place) -> StoreState:
        """An empty layer."""

    def check(self, tokens: Tokens, call: Call, place: Place) -> None:
        """Refuse a model that the store cannot serve, by the first tokens that a layer is given.

        Raises:
            UnsupportedModel: naming the attention module.
        """
        return None

    @abstractmethod
    def predict_bytes(self, tokens: int, place: Place, batch: int, dtype: torch.dtype) -> int:
        """Exactly what ``nbytes()`` of one layer will be after ``tokens`` tokens."""

    def tier_bytes(self, tokens: int, place: Place, batch: int, dtype: torch.dtype) -> Mapping[Tier, int]:
        """Exactly what one layer will hold on slower tiers after ``tokens`` tokens: nothing unless overridden."""
        return {}

    @abstractmethod
    def chunk_bytes(self, sizes: LayerSizes, batch: int) -> int:
        """Temporaries that attending to one chunk takes, beside scores."""

    def handed_bytes(self, tokens: int, place: Place, batch: int, dtype: torch.dtype) -> int:
        """Temporaries that layers hand to one another while they attend to ``tokens`` stored tokens: none as a rule."""
        return 0

    def decode_bytes(self, tokens: int, place: Place, batch: int, dtype: torch.dtype) -> int:
        """Bytes moved when one token attends to ``tokens`` stored ones: each is read once unless overridden."""
        return self.predict_bytes(tokens, place, batch, dtype)


@dataclass(frozen=True, kw_only=True)
class LayerSharing(CacheTechnique):
    """Which layers hold tokens: each of the others attends to those of an earlier one.

    It leaves to any keep what is kept and to any store how, except to stores that build a layer from the one below.
    """

    @abstractmethod
    def shared(self, layers: int) -> int:
        """How many of so many layers with full attention hold nothing."""

    @abstractmethod
    def owners(self, config: PretrainedConfig) -> list[int]:
        """For each layer with full attention, the number of the one whose tokens it attends to: its own, or less."""


@dataclass(frozen=True)
class Held:
    """Tokens of a layer after some were seen: stored ones, and pending ones."""

    stored: int
    pending: int


@dataclass(frozen=True, kw_only=True)
class Keep(CacheTechnique):
    """What is kept: which of the pending tokens are decided on, and which of those survive.

    How many survive depends on counts alone, never on the tokens: sizes are known beforehand, and the same for every
    head of a layer (``LayerKeep`` divides the sum over the layers by what they see). Which ones may differ from head
    to head.

    Attributes:
        traces: float32 numbers that it notes for every pending token of every head (``trace``).
        needs_rotary: wants to take the rotation off keys or queries.
    """

    traces: ClassVar[int] = 0
    needs_rotary: ClassVar[bool] = False

    @property
    def observed_queries(self) -> int:
        """Recent queries that scores are computed from."""
        return 0

    @property
    @abstractmethod
    def sinks(self) -> int:
        """First tokens, which are always kept."""

    @property
    @abstractmethod
    def recent(self) -> int:
        """The fewest recent tokens that are always pending, once there are so many."""

    @property
    @abstractmethod
    def most_pending(self) -> int:
        """The most tokens that are pending after a decision."""

    @abstractmethod
    def decided(self, pending: int) -> tuple[int, int]:
        """Of so many pending tokens, how many of the oldest are decided on now, and how many of these survive."""

    @abstractmethod
    def score(self, seen: Seen) -> Tensor:
        """Importance of the tokens that are decided on now: float32 (B, K, decided)."""

    def trace(self, seen: Seen) -> Tensor:
        """What is to be noted of the pending tokens, after each call: float32 (B, K, T, traces).

        ``seen.tokens.trace`` is what was noted before, zeros for the new tokens; ``seen.call.query`` has the queries
        of the new tokens.
        """
        raise NotImplementedError

    def attended(self, chunks: Iterator[Chunk], seen: int, place: Place) -> Iterator[Chunk]:
        """The stored tokens as new ones are to attend to them: as they are unless overridden.

        Args:
            chunks: what is stored.
            seen: tokens that came before the new ones.
            place: which layer.
        """
        return chunks

    def choose(self, scores: Tensor) -> Tensor:
        """Survivors by their scores (B, K, decided): int64 indices (B, K, survivors), rising."""
        _, survivors = self.decided(scores.shape[-1] + self.recent)
        return top(scores, survivors)

    def lanes(self, place: Place) -> tuple[Lane, ...]:
        """Groups of heads that keep more or less than others; none where all heads keep as many."""
        return ()

    def assign(self, seen: Seen) -> Tensor:
        """The heads of each sequence in the order of lanes, at the first decision: int64 (B, K)."""
        raise NotImplementedError

    @abstractmethod
    def shrink(self) -> Iterator[Keep]:
        """This method keeping less and less, for fitting into a size; the first keeps as much as this one."""

    def held(self, seen: int) -> Held:
        """Tokens stored and pending after ``seen`` tokens, however they came."""
        pending = max(0, seen - self.sinks)
        decided, survivors = self.decided(pending)
        return Held(min(seen, self.sinks) + survivors, pending - decided)


@dataclass(frozen=True)
class Lane:
    """Heads of a layer that keep equally many tokens.

    Attributes:
        heads: how many heads.
        keep: decides on as many tokens at a time as the layer's own keep, and lets more or fewer survive.
    """

    heads: int
    keep: Keep


def top(scores: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` greatest along the last dimension, rising."""
    return scores.topk(count, dim=-1).indices.sort(dim=-1).values


@dataclass(frozen=True)
class Seen:
    """What a keep decides by.

    Attributes:
        tokens: all pending tokens, the new ones behind; keys and values (B, K, T, D).
        decided: of them, how many of the oldest are decided on now.
        queries: the queries (B, H, W, D) of the last W tokens, W at most ``observed_queries``.
        call: the attention that has just been computed.
        stored: what is stored before them.
        place: which layer.
    """

    tokens: Tokens
    decided: int
    queries: Tensor
    call: Call
    stored: Callable[[], Iterator[Chunk]]
    place: Place

    def attention(self, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        """What the recent queries' attention weights come to, without ever holding them for all tokens.

        Args:
            reduce: of weights (B, K, R, W, N) for N tokens, R query heads of a key-value head; W may not stay.

        Returns:
            The results, one behind the other along their last dimension, over all T pending tokens. Weights are
            exact: their sum over everything stored and pending (and the sinks of the model) is 1.
        """
        from pintpot.cache.observe import reduced_attention

        return reduced_attention(self, self.queries, reduce)

    def weights(self) -> Iterator[Tensor]:
        """The recent queries' attention weights (B, K, R, W, N) over the pending tokens, piece by piece, in order."""
        from pintpot.cache.observe import attention_weights

        return attention_weights(self, self.queries, self.queries.shape[2])

    def received(self, queries: Tensor | None = None) -> Tensor:
        """The attention that each pending token receives from queries, summed over them: float32 (B, K, R, T).

        Args:
            queries: (B, H, S, D) of the last S tokens; those of the call where not given.
        """
        from pintpot.cache.observe import received_attention

        return received_attention(self, self.call.query if queries is None else queries)
