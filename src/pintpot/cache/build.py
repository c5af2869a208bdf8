"""Building a cache for a model: keep x store in every layer whose cache grows, within a size in bytes if asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PretrainedConfig
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, get_layer_types_and_kwargs

from pintpot.cache._base import Keep, LayerKeep, Store
from pintpot.cache.calibration import tensors_for
from pintpot.cache.cascade import Cascade
from pintpot.cache.dense import Dense
from pintpot.cache.forecast import cache_bytes, places_of, waiting_bytes
from pintpot.cache.geometry import FULL, SLIDING, has_full_attention, layer_kinds
from pintpot.cache.layer import Agreement, CacheLayer, Limit, SlidingLayer
from pintpot.cache.rotary import rotary_of
from pintpot.core.errors import BudgetError, CompositionError
from pintpot.core.units import format_bytes

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

    def nbytes(self) -> int:
        """Bytes held, spare capacity included."""
        return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in self.tensors()}.values())


def build_cache(
    config: PretrainedConfig,
    *,
    keep: Keep | None = None,
    store: Store | None = None,
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
        budget_bytes: the most bytes that it may ever hold. The keep then keeps as much as fits, at most what it says.
        batch: sequences at once (times beams), for the budget.
        tokens: the most tokens that will come (prompt and new ones together); with a budget, the model's longest
            context where not given.
        dtype: of keys and values, for the budget; the configuration's where not given.

    Raises:
        BudgetError: when the budget is too small, with the least that would do.
        CompositionError: when no layer of the model could use the keep or store.
        UnsupportedModel: for models that such caches are not for.
    """
    kinds = layer_kinds(config)
    if (keep is not None or store is not None) and not has_full_attention(config):
        names = " and ".join(t.name for t in (keep, store) if t is not None)
        raise CompositionError(
            f"{names} would change nothing: no layer of this {config.model_type} has full attention",
            hint="leave it out: a sliding window bounds the cache by itself",
        )
    limit = None
    if budget_bytes is not None:
        text = config.get_text_config(decoder=True)
        tokens = tokens or _longest(config)
        numbers = dtype or (text.dtype if isinstance(text.dtype, torch.dtype) else torch.float32)
        keep = fit(config, keep, store, budget_bytes=budget_bytes, tokens=tokens, batch=batch, dtype=numbers)
        piece = PIECE_TOKENS if isinstance(keep, LayerKeep) else None
        limit = Limit(tokens, batch, numbers.itemsize, budget_bytes, piece)
    settings = get_layer_types_and_kwargs(config.get_text_config(decoder=True))[1]
    full = iter(_full_layers(config, keep, store or Dense(), limit, tokens, dtype))
    layers: list[Any] = []
    for layer, given in zip(kinds, settings, strict=True):
        if layer.kind == FULL:
            layers.append(next(full))
        elif layer.kind in SLIDING:
            layers.append(SlidingLayer(**given))
        else:
            layers.append(DYNAMIC_LAYER_TYPE_MAPPING[layer.kind](**given))
    return PintpotCache(layers, keep, store or Dense())


def _full_layers(
    config: PretrainedConfig,
    keep: Keep | None,
    store: Store,
    limit: Limit | None,
    tokens: int | None,
    dtype: torch.dtype | None,
) -> Iterator[CacheLayer]:
    """The layers with full attention, in order."""
    places = places_of(layer_kinds(config), keep, tokens)
    same = store.shared_tokens == "layers" and keep is not None
    if same and isinstance(keep, LayerKeep):
        raise CompositionError(
            f"{store.name} needs the same tokens in all layers, and {keep.name} keeps more in some than in others",
            hint="keep by a share that is the same for all layers: snapkv, lagkv",
        )
    cascade = Cascade(keep, len(places), store.granule(places[0])) if isinstance(keep, LayerKeep) else None
    agreement = Agreement() if same else None
    rotary = rotary_of(config, FULL) if store.needs_rotary else None
    lower: CacheLayer | None = None
    found = zip(tensors_for(keep, config, dtype), tensors_for(store, config, dtype), strict=True)
    for place, (of_keep, of_store) in zip(places, found, strict=True):
        here = place.but(rotary=rotary, tensors={**of_keep, **of_store})
        layer = CacheLayer(store, keep, here, limit=limit, cascade=cascade, agreement=agreement)
        layer.lower, lower = lower, layer
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
    keep: Keep | None,
    store: Store | None,
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

    def needed(chosen: Keep | None) -> int:
        held = cache_bytes(config, tokens, keep=chosen, store=store, batch=batch, dtype=dtype, reserve_tokens=tokens)
        return held + waiting_bytes(layer_kinds(config), min(tokens, PIECE_TOKENS), chosen, store, batch, dtype)

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
