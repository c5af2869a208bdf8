"""Closed forms of the cache's bytes and of what attending to it costs, from shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from transformers import PretrainedConfig

from pintpot.cache._base import GROW_TOKENS, CacheTechnique, Keep, LayerSharing, LayerSizes, Place, Store
from pintpot.cache.cascade import LayerKeep
from pintpot.cache.dense import Dense
from pintpot.cache.geometry import FULL, SLIDING, LayerKind, has_full_attention, layer_kinds
from pintpot.cache.lanes import lane_bytes, mean_stored, stored_parts
from pintpot.cache.residue import Residue
from pintpot.core.expression import expression, parse
from pintpot.core.ledger import Account, Ledger, Moment, Tier
from pintpot.core.shape import ModelShape
from pintpot.core.work import Work
from pintpot.core.workload import Generate, Workload

FACT = "cache"
"""Where a ledger notes the cache techniques whose effect it holds."""

PIECE_FACT = "piece_tokens"
"""Where a ledger notes how many tokens of a prompt are read at once, if not all."""

_KINDS: dict[str, tuple[LayerKind, ...]] = {}

SCORE_PASSES = 12
"""Times that scoring reads or writes each number of a token in float32."""


def cache_bytes(
    config: PretrainedConfig,
    tokens: int,
    *,
    keep: Keep | None = None,
    store: Store | None = None,
    layers: LayerSharing | None = None,
    residue: Residue | None = None,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    reserve_tokens: int | None = None,
) -> int:
    """Bytes of a whole cache after ``tokens`` tokens: what ``PintpotCache.nbytes()`` will be, exactly.

    Layers with recurrent states instead of keys and values count as nothing.

    Args:
        config: of the model.
        tokens: seen by each sequence.
        keep: what is kept; None keeps all.
        store: how; None stores densely.
        layers: which layers hold tokens; None lets all.
        residue: what becomes of evicted tokens; None lets them go without a trace.
        batch: sequences.
        dtype: of keys and values.
        reserve_tokens: the cache was built for so many tokens.

    Raises:
        UnsupportedModel: for models that such caches are not for.
    """
    return _bytes_of(layer_kinds(config), tokens, Parts(keep, store, layers, residue), batch, dtype, reserve_tokens)


class Parts(NamedTuple):
    """What a cache is composed of; None for the plain way."""

    keep: Keep | None = None
    store: Store | None = None
    layers: LayerSharing | None = None
    residue: Residue | None = None

    def named(self) -> list[CacheTechnique]:
        """Those that are not plain."""
        return [part for part in self if part is not None]


def _bytes_of(
    kinds: Sequence[LayerKind],
    tokens: int,
    parts: Parts,
    batch: int,
    dtype: torch.dtype,
    reserve_tokens: int | None,
) -> int:
    total = 0
    for place in places_of(kinds, parts.keep, reserve_tokens, parts.layers):
        total += layer_bytes(place, tokens, parts.keep, parts.store or Dense(), batch, dtype)
        if parts.residue is not None and tokens:
            total += parts.residue.predict_bytes(place, batch) + parts.residue.calibration_bytes(place, dtype)
    for layer in kinds:
        if layer.kind in SLIDING and layer.window is not None:
            total += layer.sizes.dense_bytes(min(tokens, layer.window - 1), batch, dtype)
    return total


def places_of(
    kinds: Sequence[LayerKind], keep: Keep | None, reserve_tokens: int | None, layers: LayerSharing | None = None
) -> list[Place]:
    """The places of the layers with full attention that hold tokens, as this keep leaves them to a store."""
    full = [layer for layer in kinds if layer.kind == FULL]
    full = full[: len(full) - (0 if layers is None else layers.shared(len(full)))]
    shares = isinstance(keep, LayerKeep)
    reserve = reserve_tokens if keep is None or reserve_tokens is None else keep.held(reserve_tokens).stored
    return [
        Place(
            layer.sizes,
            index,
            len(full),
            recent_tokens=0 if keep is None else keep.recent,
            # How much a layer will get is not known beforehand where layers share.
            reserve_tokens=None if shares else reserve,
            grow_tokens=1 if shares else GROW_TOKENS,
            consecutive=keep is None,
        )
        for index, layer in enumerate(full)
    ]


def layer_bytes(place: Place, tokens: int, keep: Keep | None, store: Store, batch: int, dtype: torch.dtype) -> int:
    """Bytes of one layer with full attention after ``tokens`` tokens."""
    if not tokens:
        return 0
    fitted = sum(t.calibration_bytes(place, dtype) for t in (keep, store) if t is not None)
    stored = sum(store.predict_bytes(count, part, batch, dtype) for count, part in stored_parts(keep, tokens, place))
    if keep is None:
        return fitted + stored
    sizes = place.sizes
    stored += fitted + lane_bytes(keep, tokens, place, batch)
    queries = keep.observed_queries * sizes.query_heads * sizes.key_dim * dtype.itemsize
    inputs = sizes.hidden * dtype.itemsize if store.needs_inputs else 0
    pending = keep.most_pending * (inputs + sizes.heads * keep.traces * 4)
    return stored + sizes.dense_bytes(keep.most_pending, batch, dtype) + batch * (pending + queries)


def tier_bytes(
    kinds: Sequence[LayerKind], tokens: int, parts: Parts, batch: int, dtype: torch.dtype
) -> dict[Tier, int]:
    """Bytes on slower tiers after ``tokens`` tokens; empty for stores that have none."""
    total: dict[Tier, int] = {}
    store = parts.store or Dense()
    for place in places_of(kinds, parts.keep, None, parts.layers):
        for stored, part in stored_parts(parts.keep, tokens, place):
            for tier, size in store.tier_bytes(stored, part, batch, dtype).items():
                total[tier] = total.get(tier, 0) + size
    return total


def waiting_bytes(kinds: Sequence[LayerKind], tokens: int, parts: Parts, batch: int, dtype: torch.dtype) -> int:
    """Bytes of what waits densely, at most, while ``tokens`` tokens are read at once.

    Tokens wait where layers share what may be kept, and until every layer has seen them that needs them.
    """
    keep, store, layers, _ = parts
    full = [layer.sizes for layer in kinds if layer.kind == FULL]
    shared = 0 if layers is None or not full else layers.shared(len(full))
    lent = 0 if keep is None and (store is None or store.exact) else shared
    total = sum(sizes.dense_bytes(tokens, batch, dtype) for sizes in full[:lent])
    decided, survivors = (tokens, tokens) if keep is None else keep.decided(tokens + keep.most_pending)
    if store is not None:
        given = survivors + (0 if keep is None else keep.sinks)
        total += sum(sizes.dense_bytes(given, batch, dtype) for sizes in full[: store.waiting_layers])
    if not isinstance(keep, LayerKeep):
        return total
    needs_inputs = store is not None and store.needs_inputs
    full = full[: len(full) - shared]
    # Until shares are worked out anew, the newest layers hold the most they may.
    held = [survivors] * len(full) + [keep.most(survivors, decided)] * min(keep.divided_every - 1, len(full))
    return total + sum(
        sizes.dense_bytes(count, batch, dtype)
        + count * batch * (sizes.hidden * dtype.itemsize * needs_inputs + sizes.heads * (4 * keep.traces + 4))
        for sizes, count in zip(full + full, held, strict=False)
    )


def parts_of(text: str, *more: CacheTechnique) -> Parts:
    """The parts of a cache among the techniques of an expression and some more; later ones win."""
    parts = Parts()
    for technique in (*(parse(text) if text else ()), *more):
        if isinstance(technique, Keep):
            parts = parts._replace(keep=technique)
        elif isinstance(technique, Store):
            parts = parts._replace(store=technique)
        elif isinstance(technique, LayerSharing):
            parts = parts._replace(layers=technique)
        elif isinstance(technique, Residue):
            parts = parts._replace(residue=technique)
    return parts


def predict_cache(technique: CacheTechnique, ledger: Ledger, shape: ModelShape, workload: Workload) -> Ledger:
    """A ledger with this technique, and those that it notes already, in the cache."""
    if not isinstance(workload, Generate) or not any(layer.kind == FULL for layer in _kinds_of(shape)):
        return ledger
    parts = parts_of(str(ledger.facts.get(FACT, "")), technique)
    sizes = _sizes(shape)
    store = parts.store or Dense()

    # Jobs know how many tokens will come, and build their caches for so many.
    most = workload.prompt_tokens + workload.new_tokens
    stored = most if parts.keep is None else parts.keep.held(most).stored
    workspace = store.chunk_bytes(sizes, workload.batch)
    workspace += store.handed_bytes(stored, Place(sizes), workload.batch, shape.dtype)

    def bytes_after(tokens: int) -> int:
        return _bytes_of(_kinds_of(shape), tokens, parts, workload.batch, shape.dtype, most)

    def at_least(moment: Moment) -> Moment:
        return moment.with_bytes(Account.WORKSPACE, max(workspace, moment.of(Account.WORKSPACE)))

    at_once = min(workload.prompt_tokens, int(ledger.facts.get(PIECE_FACT, workload.prompt_tokens)))
    waits = waiting_bytes(_kinds_of(shape), at_once, parts, workload.batch, shape.dtype)
    ledger = ledger.set(Account.KV_CACHE, bytes_after(workload.prompt_tokens) + waits, phases=("prefill",))
    ledger = ledger.set(Account.KV_CACHE, bytes_after(most - 1), phases=("decode",)).edit(at_least, ("decode",))
    # What is on disk is foreseen at all moments, as it must be free from the beginning.
    for tier, size in tier_bytes(_kinds_of(shape), most - 1, parts, workload.batch, shape.dtype).items():
        ledger = ledger.set(Account.KV_CACHE, size, tier)
    noted = expression(parts.named())
    return replace(ledger, facts={**ledger.facts, FACT: noted})


def cache_work(technique: CacheTechnique, work: Work, shape: ModelShape, workload: Workload) -> Work:
    """Work with this technique in the cache: its own change, as if it stood alone."""
    if not isinstance(workload, Generate) or not any(layer.kind == FULL for layer in _kinds_of(shape)):
        return work
    sizes = _sizes(shape)
    layers = sum(layer.kind == FULL for layer in _kinds_of(shape))
    tokens = workload.prompt_tokens + workload.new_tokens // 2
    dense = sizes.dense_bytes(tokens, workload.batch, shape.dtype)
    prompt = sizes.dense_bytes(workload.prompt_tokens, workload.batch, torch.float32)
    if isinstance(technique, Store):
        decode = technique.decode_bytes(tokens, Place(sizes, layers=layers), workload.batch, shape.dtype)
        prefill = prompt * 6
    elif isinstance(technique, Keep):
        held = mean_stored(technique, tokens, Place(sizes, layers=layers)) + technique.held(tokens).pending
        # Streamed attention makes what is held float32: it is written and read once more.
        decode = 3 * sizes.dense_bytes(held, workload.batch, torch.float32)
        prefill = prompt * SCORE_PASSES
    elif isinstance(technique, Residue):
        place = Place(sizes, layers=layers)
        held = technique.predict_bytes(place, workload.batch)
        decode = dense + held + technique.calibration_bytes(place, shape.dtype)
        prefill = prompt
    else:
        return work
    return work.plus("decode", read_bytes=layers * (decode - dense)).plus("prefill", read_bytes=layers * prefill)


def full_layers(shape: ModelShape) -> list[Place]:
    """The places of the layers with full attention, nothing else known."""
    return places_of(_kinds_of(shape), None, None)


def _sizes(shape: ModelShape) -> LayerSizes:
    return next(layer.sizes for layer in _kinds_of(shape) if layer.kind == FULL)


def _kinds_of(shape: ModelShape) -> tuple[LayerKind, ...]:
    """The layers of a model, none where such caches are not for it (read once for each architecture)."""
    if shape.fingerprint not in _KINDS:
        _KINDS[shape.fingerprint] = layer_kinds(shape.config) if has_full_attention(shape.config) else ()
    return _KINDS[shape.fingerprint]
