"""Caches of keys and values that hold less: what is kept times how it is stored, given a size in bytes."""

from pintpot.cache._base import Keep, LayerSizes, Store
from pintpot.cache.attention import install_attention, use_cache_attention
from pintpot.cache.build import PintpotCache, build_cache
from pintpot.cache.dense import Dense
from pintpot.cache.forecast import cache_bytes
from pintpot.cache.kivi import KIVI
from pintpot.cache.lagkv import LagKV
from pintpot.cache.prefill import chunked_prefill
from pintpot.cache.snapkv import SnapKV

TECHNIQUES = (
    "kivi",
    "lagkv",
    "snapkv",
)

__all__ = [
    "KIVI",
    "TECHNIQUES",
    "Dense",
    "Keep",
    "LagKV",
    "LayerSizes",
    "PintpotCache",
    "SnapKV",
    "Store",
    "build_cache",
    "cache_bytes",
    "chunked_prefill",
    "install_attention",
    "use_cache_attention",
]
