"""Stores with recall outside a model: layers filled with tokens, and what one query gets from them."""

import torch

from pintpot.cache._base import LayerSizes, Place
from pintpot.cache.layer import CacheLayer
from tests.cache.layers import call_of, normal, read

B, H, K, D = 2, 4, 2, 8


def place_of(**more):
    return Place(LayerSizes(K, D, D, H), **more)


def tensors(tokens):
    """Queries (B, H, T, D), keys and values (B, K, T, D)."""
    return normal(B, H, tokens, D, seed=2), normal(B, K, tokens, D), normal(B, K, tokens, D, seed=1)


def filled(store, query, keys, values, pieces):
    """A layer that was given tokens piece by piece, and the outputs (B, T, H, D)."""
    layer = CacheLayer(store, None, place_of())
    out, position = [], 0
    for count in pieces:
        new = slice(position, position + count)
        out.append(read(layer, keys[:, :, new], values[:, :, new], query[:, :, new]))
        position += count
    return layer, torch.cat(out, dim=1)


def attended(layer, query):
    """Keys (B, K, n, D) that a single query (B, H, 1, D) attends to, and their values."""
    chunks = list(layer.stored.chunks(call_of(query, K)))
    return torch.cat([c.keys for c in chunks], dim=2), torch.cat([c.values for c in chunks], dim=2)


def exact(query, keys, values, chosen=None):
    """Attention of one query (B, H, 1, D) to tokens in float64, or to those of them where ``chosen`` (B, K, T)."""
    scores = query.double().unflatten(1, (K, -1)).squeeze(3) @ keys.double().transpose(-1, -2)
    if chosen is not None:
        scores = scores.masked_fill(~chosen[:, :, None], -torch.inf)
    return (scores.softmax(dim=-1) @ values.double()).flatten(1, 2)[:, None]


def numbers_of(found, keys):
    """Which of the keys (B, K, T, D) were found (B, K, n, D): bool (B, K, T)."""
    return (found[:, :, :, None] == keys[:, :, None]).all(dim=-1).any(dim=2)
