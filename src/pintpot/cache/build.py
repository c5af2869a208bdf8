"""Building a cache for a model: keep x store in every layer whose cache grows, within a size in bytes if asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PretrainedConfig
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, get_layer_types_and_kwargs

from pintpot.cache._base import Keep, LayerSharing, Store
from pintpot.cache.calibration import tensors_for
from pintpot.cache.cascade import Cascade, LayerKeep
from pintpot.cache.dense import Dense
from pintpot.cache.forecast import Parts, cache_bytes, places_of, waiting_bytes
from pintpot.cache.geometry import FULL, SLIDING, layer_kinds
from pintpot.cache.layer import CacheLayer, SlidingLayer
from pintpot.cache.limit import Limit
from pintpot.cache.links import Agreement
from pintpot.cache.residue import Residue
from pintpot.cache.rotary import rotary_of
from pintpot.cache.shared import SharedLayer
from pintpot.core import slots
from pintpot.core.errors import BudgetError, CompositionError, UnsupportedModel
from pintpot.core.units import format_bytes
from pintpot.core.workload import Generate

PIECE_TOKENS = 512
"""The most tokens that a cache of a given size reads at once, where what layers keep must wait for the layers above."""


class PintpotCache(Cache):
    """A transformers cache that holds less: pass it as ``past_key_values`` inside ``use_cache_attention(model)``.

    Attributes:
        keep: what is kept in the layers with full attention, after fitting into the budget; None for everything.
        store: how it is stored.
    """

    def __init__(self, layers: list[Any], keep: Keep | None, store: Store) -> None:
        super().__init__(layers=layers)
        self.keep = keep
        self.store = store

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor that is held, in all layers."""
        for layer in self.layers:
            if isinstance(layer, CacheLayer):
                yield from layer.tensors()
            else:
                yield from (held for held in vars(layer).values() if isinstance(held, Tensor) and held.dim() > 1)

    @contextmanager
    def aside(self, tokens: int) -> Iterator[None]:
        """Inside this ``with``, the last ``tokens`` tokens of every call only ask, and are not kept.

        What is decided on in such a call is judged by their queries instead of the most recent ones.

        Raises:
            CompositionError: for a padded batch.
            UnsupportedModel: when a layer of the model cannot forget what it was asked.
        """
        layers = [layer for layer in self.layers if isinstance(layer, (CacheLayer, SlidingLayer))]
        if len(layers) + sum(isinstance(layer, SharedLayer) for layer in self.layers) < len(self.layers):
            raise UnsupportedModel(
                "a layer with a recurrent state cannot forget what it was asked",
                hint="use a model all of whose layers have attention",
            )
        if any(isinstance(layer, CacheLayer) and layer.rows is not None for layer in layers):
            raise CompositionError("a padded batch cannot be asked aside", hint="read one sequence at a time")
        for layer in layers:
            layer.aside = tokens
        try:
            yield
        finally:
            for layer in layers:
                layer.aside = 0

    def nbytes(self) -> int:
        """Bytes held, spare capacity included."""
        return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in self.tensors()}.values())

    def tier_nbytes(self) -> int:
        """Bytes held on a slower tier, spare capacity included."""
        return sum(layer.tier_nbytes() for layer in self.layers if isinstance(layer, CacheLayer))


def build_cache(
    config: PretrainedConfig,
    *,
    keep: Keep | None = None,
    store: Store | None = None,
    layers: LayerSharing | None = None,
    residue: Residue | None = None,
    budget_bytes: int | None = None,
    batch: int = 1,
    tokens: int | None = None,
    dtype: torch.dtype | None = None,
) -> PintpotCache:
    """An empty cache for a model of this configuration.

    Layers with a sliding window stay as they are (they are bounded already), and so do layers without attention; only
    layers with full attention are subject to ``keep`` and ``store``.

    Args:
        config: of the model.
        keep: what is kept; None keeps everything.
        store: how it is stored; None stores densely.
        layers: which layers hold tokens; None lets all.
        residue: what becomes of evicted tokens; None lets them go without a trace.
        budget_bytes: the most bytes that it may ever hold. The keep then keeps as much as fits, at most what it says.
        batch: sequences at once (times beams), for the budget.
        tokens: the most tokens that will come (prompt and new ones together); with a budget, the model's longest
            context where not given.
        dtype: of keys and values, for the budget; the configuration's where not given.

    Raises:
        BudgetError: when the budget is too small, with the least that would do.
        CompositionError: when a part would change nothing in this model, or two cannot stand together.
        UnsupportedModel: for models that such caches are not for.
    """
    kinds = layer_kinds(config)
    parts = Parts(keep, store, layers, residue)
    _check(config, parts)
    limit = None
    if budget_bytes is not None:
        text = config.get_text_config(decoder=True)
        tokens = tokens or _longest(config)
        numbers = dtype or (text.dtype if isinstance(text.dtype, torch.dtype) else torch.float32)
        keep = fit(config, parts, budget_bytes=budget_bytes, tokens=tokens, batch=batch, dtype=numbers)
        piece = PIECE_TOKENS if waiting_bytes(kinds, PIECE_TOKENS, parts, batch, numbers) else None
        limit = Limit(tokens, batch, numbers.itemsize, budget_bytes, piece)
    settings = get_layer_types_and_kwargs(config.get_text_config(decoder=True))[1]
    full = _full_layers(config, parts._replace(keep=keep), limit, tokens, dtype)
    built: list[Any] = []
    for layer, given in zip(kinds, settings, strict=True):
        if layer.kind == FULL:
            built.append(next(full))
        elif layer.kind in SLIDING:
            built.append(SlidingLayer(**given))
        else:
            built.append(DYNAMIC_LAYER_TYPE_MAPPING[layer.kind](**given))
    return PintpotCache(built, keep, store or Dense())


def _check(config: PretrainedConfig, parts: Parts) -> None:
    """Refuse parts that would change nothing, or that cannot stand together."""
    count = sum(layer.kind == FULL for layer in layer_kinds(config))
    idle = [part.name for part in parts.named() if not count or not part.acts_on(count)]
    if idle:
        raise CompositionError(
            f"{' and '.join(idle)} would change nothing: {count or 'no'} layers of this {config.model_type} have full "
            "attention",
            hint="leave it out" + ("" if count else ": a sliding window bounds the cache by itself"),
        )
    slots.check(parts.named(), Generate.job)


def _full_layers(
    config: PretrainedConfig, parts: Parts, limit: Limit | None, tokens: int | None, dtype: torch.dtype | None
) -> Iterator[CacheLayer | SharedLayer]:
    """The layers with full attention, in order."""
    keep, store = parts.keep, parts.store or Dense()
    places = places_of(layer_kinds(config), keep, tokens, parts.layers)
    same = store.shared_tokens == "layers" and keep is not None
    cascade = Cascade(keep, len(places), store.granule(places[0])) if isinstance(keep, LayerKeep) else None
    agreement = Agreement() if same else None
    rotary = rotary_of(config, FULL) if store.needs_rotary or (keep is not None and keep.needs_rotary) else None
    found = list(zip(*(tensors_for(part, config, dtype) for part in (keep, store, parts.residue)), strict=True))
    owners = range(len(found)) if parts.layers is None else parts.layers.owners(config)
    holders: dict[int, CacheLayer] = {}
    lower: CacheLayer | None = None
    for number, owner in enumerate(owners):
        if owner != number:
            yield SharedLayer(holders[owner])
            continue
        tensors = {name: tensor for part in found[number] for name, tensor in part.items()}
        here = places[len(holders)].but(rotary=rotary, tensors=tensors)
        layer = CacheLayer(store, keep, here, limit=limit, cascade=cascade, agreement=agreement, residue=parts.residue)
        layer.lower, lower = lower, layer
        holders[number] = layer
        yield layer


def _longest(config: PretrainedConfig) -> int:
    longest = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if longest is None:
        raise BudgetError(
            "a cache of a given size must know how many tokens may come, and the model has no longest context",
            hint="give build_cache tokens=prompt and new tokens together",
        )
    return int(longest)


def fit(
    config: PretrainedConfig,
    parts: Parts,
    *,
    budget_bytes: int,
    tokens: int,
    batch: int,
    dtype: torch.dtype,
) -> Keep | None:
    """The keep that keeps most within a budget, at every moment up to ``tokens`` tokens.

    Raises:
        BudgetError: when nothing fits, with the least bytes that would do.
    """
    keep = parts.keep

    def needed(chosen: Keep | None) -> int:
        these = parts._replace(keep=chosen)
        held = cache_bytes(config, tokens, **these._asdict(), batch=batch, dtype=dtype, reserve_tokens=tokens)
        return held + waiting_bytes(layer_kinds(config), min(tokens, PIECE_TOKENS), these, batch, dtype)

    candidates = [keep] if keep is None else keep.shrink()
    least = 0
    for candidate in candidates:
        least = needed(candidate)
        if least <= budget_bytes:
            return candidate
    what = " with the least that the keep allows" if keep is not None else ""
    raise BudgetError(
        f"a cache of {format_bytes(budget_bytes)} cannot hold {tokens} tokens of {batch} sequences: "
        f"it takes at least {format_bytes(least)} ({least} bytes){what}",
        hint="allow more, evict (lagkv), pack (kivi), or ask for fewer tokens",
    )
