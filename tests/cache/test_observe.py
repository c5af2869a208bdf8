"""Attention weights for keeps are those of the whole attention matrix, however they are asked for."""

import pytest
import torch
from torch import nn

from pintpot.cache import observe
from pintpot.cache._base import Call, LayerSizes, Place, Seen
from pintpot.cache.dense import dense_chunks
from pintpot.cache.tokens import Tokens

torch.set_num_threads(1)
B, H, K, D, STORED, PENDING = 2, 4, 2, 16, 40, 60


def normal(*sizes, seed=0):
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def weights(query, keys, scaling, softcap=None, sinks=None):
    """The attention of the last tokens to all, by its definition in float64: (B, H, S, T)."""
    scores = query.double() @ keys.double().repeat_interleave(H // K, dim=1).transpose(-1, -2) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    queries, tokens = query.shape[2], keys.shape[2]
    seen = torch.arange(tokens) <= torch.arange(tokens - queries, tokens)[:, None]
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is None:
        return scores.softmax(dim=-1)
    column = sinks.double().reshape(1, H, 1, 1).expand(B, H, queries, 1)
    return torch.cat([scores, column], dim=-1).softmax(dim=-1)[..., :-1]


@pytest.mark.parametrize(("softcap", "with_sinks"), [(None, False), (2.0, False), (None, True)])
@pytest.mark.parametrize("queries", [1, 7, 50])
def test_weights_are_exact_over_what_is_stored_and_pending(monkeypatch, queries, softcap, with_sinks):
    monkeypatch.setattr(observe, "CHUNK_TOKENS", 16)
    monkeypatch.setattr(observe, "dense_chunks", lambda keys, values: dense_chunks(keys, values, 16))
    monkeypatch.setattr(observe, "WEIGHTS_AT_ONCE", 5 * B * H * 16)
    query = normal(B, H, queries, D)
    keys, values = normal(B, K, STORED + PENDING, D, seed=1), normal(B, K, STORED + PENDING, D, seed=2)
    sinks = normal(H, seed=3) if with_sinks else None
    call = Call(module=nn.Module(), query=query, scaling=0.5, softcap=softcap, sinks=sinks)
    seen = Seen(
        Tokens.consecutive(keys[:, :, STORED:], values[:, :, STORED:], STORED),
        10,
        query,
        call,
        lambda: dense_chunks(keys[:, :, :STORED], values[:, :, :STORED], 16),
        Place(LayerSizes(K, D, D)),
    )
    expected = weights(query, keys, 0.5, softcap, sinks)[..., STORED:].unflatten(1, (K, H // K))
    found = seen.attention(lambda w: w.amax(dim=3))
    torch.testing.assert_close(found, expected.amax(dim=3).float(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(seen.received(), expected.sum(dim=3).float(), rtol=1e-4, atol=1e-6)
