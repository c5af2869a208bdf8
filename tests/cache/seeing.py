"""What a keep sees of a prompt that is read at once, and layers filled piece by piece, with numbers made by hand."""

from pintpot.cache._base import LayerSizes, Place, Seen
from pintpot.cache.dense import Dense, dense_chunks
from pintpot.cache.layer import CacheLayer
from pintpot.cache.tokens import Tokens
from tests.cache.layers import attention, call_of, normal, read

B, H, K, D = 2, 4, 2, 8
SCALING = D**-0.5


def tensors(tokens):
    """Queries (B, H, T, D), keys and values (B, K, T, D)."""
    return normal(B, H, tokens, D, seed=2), normal(B, K, tokens, D), normal(B, K, tokens, D, seed=1)


def place_of(**more):
    return Place(LayerSizes(K, D, D, H), **more)


def seen_by(keep, query, keys, values, *, sinks=0, module=None, **more):
    """A prompt of which the first ``sinks`` tokens are stored already."""
    call = call_of(query, K, SCALING)
    if module is not None:
        call.module.o_proj = module
    tokens = Tokens.consecutive(keys[:, :, sinks:], values[:, :, sinks:], first=sinks)
    last = query[:, :, -keep.observed_queries :] if keep.observed_queries else query
    stored = (keys[:, :, :sinks], values[:, :, :sinks])
    decided, _ = keep.decided(tokens.count)
    return Seen(tokens, decided, last, call, lambda: iter(dense_chunks(*stored)), place_of(**more))


def filled(method, query, keys, values, pieces, place=None, store=None):
    """A layer after tokens came in pieces of these sizes."""
    layer = CacheLayer(store or Dense(), method, place)
    start = 0
    for count in pieces:
        new = slice(start, start + count)
        read(layer, keys[:, :, new], values[:, :, new], query[:, :, new], scaling=SCALING)
        start += count
    return layer


def all_weights(query, keys):
    """Causal attention weights (B, K, R, T, T), float64."""
    return attention(keys, query, query.shape[2], SCALING)
