"""Closed forms of the cache's bytes and of what attending to it costs, from shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import PretrainedConfig

from pintpot.cache._base import GROW_TOKENS, CacheTechnique, Keep, LayerKeep, LayerSizes, Place, Store
from pintpot.cache.dense import Dense
from pintpot.cache.geometry import FULL, SLIDING, LayerKind, has_full_attention, layer_kinds
from pintpot.core.expression import expression, parse
from pintpot.core.ledger import Account, Ledger, Moment
from pintpot.core.shape import ModelShape
from pintpot.core.work import Work
from pintpot.core.workload import Generate, Workload

FACT = "cache"
"""Where a ledger notes the cache techniques whose effect it holds."""

_KINDS: dict[str, tuple[LayerKind, ...]] = {}

SCORE_PASSES = 12
"""Times that scoring reads or writes each number of a token in float32."""


def cache_bytes(
    config: PretrainedConfig,
    tokens: int,
    *,
    keep: Keep | None = None,
    store: Store | None = None,
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
        batch: sequences.
        dtype: of keys and values.
        reserve_tokens: the cache was built for so many tokens.

    Raises:
        UnsupportedModel: for models that such caches are not for.
    """
    return _bytes_of(layer_kinds(config), tokens, keep, store, batch, dtype, reserve_tokens)


def _bytes_of(
    kinds: Sequence[LayerKind],
    tokens: int,
    keep: Keep | None,
    store: Store | None,
    batch: int,
    dtype: torch.dtype,
    reserve_tokens: int | None,
) -> int:
    places = iter(places_of(kinds, keep, reserve_tokens))
    total = 0
    for layer in kinds:
        if layer.kind == FULL:
            total += layer_bytes(next(places), tokens, keep, store or Dense(), batch, dtype)
        elif layer.kind in SLIDING and layer.window is not None:
            total += layer.sizes.dense_bytes(min(tokens, layer.window - 1), batch, dtype)
    return total


def places_of(kinds: Sequence[LayerKind], keep: Keep | None, reserve_tokens: int | None) -> list[Place]:
    """The places of the layers with full attention, as this keep leaves them to a store."""
    full = [layer for layer in kinds if layer.kind == FULL]
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
    if keep is None:
        return fitted + store.predict_bytes(tokens, place, batch, dtype)
    sizes = place.sizes
    stored = fitted + store.predict_bytes(keep.held(tokens).stored, place, batch, dtype)
    queries = keep.observed_queries * sizes.query_heads * sizes.key_dim * dtype.itemsize
    inputs = sizes.hidden * dtype.itemsize if store.needs_inputs else 0
    pending = keep.most_pending * (inputs + sizes.heads * keep.traces * 4)
    return stored + sizes.dense_bytes(keep.most_pending, batch, dtype) + batch * (pending + queries)


def waiting_bytes(
    kinds: Sequence[LayerKind], tokens: int, keep: Keep | None, store: Store | None, batch: int, dtype: torch.dtype
) -> int:
    """Bytes of what waits densely, at most, while ``tokens`` tokens are read at once and layers share."""
    if not isinstance(keep, LayerKeep):
        return 0
    _, survivors = keep.decided(tokens + keep.most_pending)
    needs_inputs = store is not None and store.needs_inputs
    inputs = dtype.itemsize if needs_inputs else 0
    return sum(
        layer.sizes.dense_bytes(survivors, batch, dtype)
        + survivors * batch * (layer.sizes.hidden * inputs + layer.sizes.heads * (4 * keep.traces + 4))
        for layer in kinds
        if layer.kind == FULL
    )


def parts_of(text: str, *more: CacheTechnique) -> tuple[Keep | None, Store | None]:
    """The keep and the store among the techniques of an expression and some more; later ones win."""
    keep: Keep | None = None
    store: Store | None = None
    for technique in (*(parse(text) if text else ()), *more):
        if isinstance(technique, Keep):
            keep = technique
        elif isinstance(technique, Store):
            store = technique
    return keep, store


def predict_cache(technique: CacheTechnique, ledger: Ledger, shape: ModelShape, workload: Workload) -> Ledger:
    """A ledger with this technique, and those that it notes already, in the cache."""
    if not isinstance(workload, Generate) or not any(layer.kind == FULL for layer in _kinds_of(shape)):
        return ledger
    keep, store = parts_of(str(ledger.facts.get(FACT, "")), technique)
    sizes = _sizes(shape)
    workspace = (store or Dense()).chunk_bytes(sizes, workload.batch)

    # Jobs know how many tokens will come, and build their caches for so many.
    most = workload.prompt_tokens + workload.new_tokens

    def bytes_after(tokens: int) -> int:
        return _bytes_of(_kinds_of(shape), tokens, keep, store, workload.batch, shape.dtype, most)

    def at_least(moment: Moment) -> Moment:
        return moment.with_bytes(Account.WORKSPACE, max(workspace, moment.of(Account.WORKSPACE)))

    waits = waiting_bytes(_kinds_of(shape), workload.prompt_tokens, keep, store, workload.batch, shape.dtype)
    ledger = ledger.set(Account.KV_CACHE, bytes_after(workload.prompt_tokens) + waits, phases=("prefill",))
    ledger = ledger.set(Account.KV_CACHE, bytes_after(most - 1), phases=("decode",)).edit(at_least, ("decode",))
    noted = expression(t for t in (keep, store) if t is not None)
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
        held = technique.held(tokens)
        # Streamed attention makes what is held float32: it is written and read once more.
        decode = 3 * sizes.dense_bytes(held.stored + held.pending, workload.batch, torch.float32)
        prefill = prompt * SCORE_PASSES
    else:
        return work
    return work.plus("decode", read_bytes=layers * (decode - dense)).plus("prefill", read_bytes=layers * prefill)


def _sizes(shape: ModelShape) -> LayerSizes:
    return next(layer.sizes for layer in _kinds_of(shape) if layer.kind == FULL)


def _kinds_of(shape: ModelShape) -> tuple[LayerKind, ...]:
    """The layers of a model, none where such caches are not for it (read once for each architecture)."""
    if shape.fingerprint not in _KINDS:
        _KINDS[shape.fingerprint] = layer_kinds(shape.config) if has_full_attention(shape.config) else ()
    return _KINDS[shape.fingerprint]
