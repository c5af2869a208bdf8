"""Caches of keys and values that hold less: what is kept times how it is stored, given a size in bytes."""

import sys
from types import ModuleType
from typing import Any

from pintpot.cache._base import Keep, LayerSizes, Store
from pintpot.cache.attention import install_attention, use_cache_attention
from pintpot.cache.build import PintpotCache, build_cache
from pintpot.cache.chunked_prefill import ChunkedPrefill, prefill_in_pieces
from pintpot.cache.dense import Dense
from pintpot.cache.episodes import EpisodicCaches
from pintpot.cache.forecast import cache_bytes
from pintpot.cache.kivi import KIVI
from pintpot.cache.lagkv import LagKV
from pintpot.cache.model_cache import model_cache
from pintpot.cache.snapkv import SnapKV

TECHNIQUES = (
    "alisa",
    "aqua_kv",
    "cake",
    "chunked_prefill",
    "clusterkv",
    "compactor",
    "conversions.loma",
    "conversions.transmla",
    "conversions.x_ecomla",
    "cskv",
    "defensivekv",
    "dynamickv",
    "epicache",
    "expected_attention",
    "fp8",
    "h2o",
    "kcache",
    "keydiff",
    "kivi",
    "kvsharer",
    "lagkv",
    "layer_defensivekv",
    "leoam",
    "less",
    "locret",
    "minicache",
    "rotatekv",
    "snapkv",
    "streaming_llm",
    "task_kv",
    "xquant",
    "xquant_cl",
    "zigzagkv",
)

__all__ = [
    "KIVI",
    "TECHNIQUES",
    "ChunkedPrefill",
    "Dense",
    "EpisodicCaches",
    "Keep",
    "LagKV",
    "LayerSizes",
    "PintpotCache",
    "SnapKV",
    "Store",
    "build_cache",
    "cache_bytes",
    "prefill_in_pieces",
    "install_attention",
    "model_cache",
    "use_cache_attention",
]


class _Callable(ModuleType):
    """This package, which can be called: ``pintpot.cache(model, "lagkv*kivi2", budget="64MiB")``."""

    def __call__(self, *args: Any, **kwargs: Any) -> PintpotCache:
        """See ``model_cache``."""
        return model_cache(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
