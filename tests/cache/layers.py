"""Layers of a cache outside a model, and a plain reference that has all attention weights at once."""

import torch

from pintpot.cache._base import Call, LayerSizes, Place
from pintpot.cache.cascade import Cascade
from pintpot.cache.dense import Dense
from pintpot.cache.layer import CacheLayer


def normal(*sizes, seed=0):
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def call_of(query, heads, scaling=1.0, **more):
    module = torch.nn.Module()
    module.num_key_value_groups = query.shape[1] // heads
    return Call(module=module, query=query, scaling=scaling, **more)


def cascaded(keep, count, sizes):
    """Layers of one cache that share what they keep."""
    cascade = Cascade(keep, count, 1)
    places = [Place(sizes, i, count, recent_tokens=keep.recent, grow_tokens=1, consecutive=False) for i in range(count)]
    return [CacheLayer(Dense(), keep, place, cascade=cascade) for place in places]


def read(layer, keys, values, query, **more):
    """Give a layer tokens (B, K, S, D) with their queries (B, H, S, D); the attention's output."""
    handle, _ = layer.update(keys, values)
    return layer.attend(handle, call_of(query, keys.shape[1], **more))


def sizes_of(keys, query):
    return LayerSizes(keys.shape[1], keys.shape[-1], keys.shape[-1], query.shape[1])


def attention(keys, query, queries, scaling=1.0):
    """Weights (B, K, R, W, T) of the last queries in float64, causal."""
    heads, tokens = keys.shape[1], keys.shape[2]
    grouped = query[:, :, -queries:].double().unflatten(1, (heads, -1)) * scaling
    scores = grouped @ keys.double().transpose(-1, -2)[:, :, None]
    own = torch.arange(tokens - queries, tokens)[:, None]
    return scores.masked_fill(torch.arange(tokens) > own, -torch.inf).softmax(dim=-1)
