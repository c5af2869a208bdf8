"""Streamed attention equals plain attention in float64."""

import math

import pytest
import torch
from torch import nn

from pintpot.cache import stream
from pintpot.cache._base import Call, LayerSizes, Place
from pintpot.cache.dense import DenseChunk, dense_chunks
from pintpot.cache.kivi import KIVI
from pintpot.cache.stream import attend_chunks
from pintpot.cache.tokens import Tokens
from pintpot.core.errors import CompositionError

torch.set_num_threads(1)
B, H, K, D = 2, 4, 2, 16
CALL = Call(module=nn.Module(), query=torch.zeros(B, H, 1, D))


def normal(*sizes, seed=0, dtype=torch.float32):
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def plain(query, keys, values, seen, scaling, softcap=None, sinks=None):
    """Attention by its definition, in float64; ``seen`` (B, 1 or H, S, T) is True or an addend."""
    keys = keys.double().repeat_interleave(H // K, dim=1)
    values = values.double().repeat_interleave(H // K, dim=1)
    scores = query.double() @ keys.transpose(-1, -2) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, -math.inf) if seen.dtype == torch.bool else scores + seen
    if sinks is not None:
        scores = torch.cat([scores, sinks.double().reshape(1, H, 1, 1).expand(B, H, query.shape[2], 1)], dim=-1)
    weights = scores.softmax(dim=-1)[..., : keys.shape[2]]
    return (weights @ values).transpose(1, 2)


def causal(queries, tokens):
    return (torch.arange(tokens) <= torch.arange(tokens - queries, tokens)[:, None])[None, None]


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 5 queries, so that a few tokens make many."""
    monkeypatch.setattr(stream, "SCORES_AT_ONCE", 5 * B * H * stream.CHUNK_TOKENS)


@pytest.fixture(params=[True, False], ids=["gradients", "fused"])
def gradients(request):
    """Chunks that all queries see are read by fused attention, unless a gradient might be asked for."""
    with torch.set_grad_enabled(request.param):
        yield


@pytest.mark.parametrize("queries", [1, 12, 40])
@pytest.mark.parametrize("chunk", [7, 64])
@pytest.mark.parametrize(("softcap", "with_sinks"), [(None, False), (3.0, False), (None, True)])
@pytest.mark.usefixtures("small_blocks", "gradients")
def test_causal(queries, chunk, softcap, with_sinks):
    query, keys, values = normal(B, H, queries, D), normal(B, K, 40, D, seed=1), normal(B, K, 40, D, seed=2)
    sinks = normal(H, seed=3) if with_sinks else None
    call = Call(module=nn.Module(), query=query, mask=None, scaling=0.7, softcap=softcap, sinks=sinks)
    out = attend_chunks(call, list(dense_chunks(keys, values, chunk)), K)
    expected = plain(query, keys, values, causal(queries, 40), 0.7, softcap, sinks)
    torch.testing.assert_close(out, expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["padding", "boolean", "by head", "additive"])
@pytest.mark.usefixtures("small_blocks")
def test_masks(kind):
    query, keys, values = normal(B, H, 12, D), normal(B, K, 40, D, seed=1), normal(B, K, 40, D, seed=2)
    padding = torch.ones(B, 1, 1, 40, dtype=torch.bool)
    padding[0, ..., :9] = False
    full = causal(12, 40) & padding
    mask = {
        "padding": padding,
        "boolean": full,
        "by head": full.expand(B, H, 12, 40).clone(),
        "additive": torch.zeros(B, 1, 12, 40).masked_fill(~full, -1e30),
    }[kind]
    if kind == "by head":
        mask[:, 1, :, 11] = full = False
        full = mask
    call = Call(module=nn.Module(), query=query, mask=mask, scaling=0.25)
    out = attend_chunks(call, list(dense_chunks(keys, values, 16)), K)
    torch.testing.assert_close(out, plain(query, keys, values, full, 0.25).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("queries", [1, 20])
@pytest.mark.usefixtures("gradients")
def test_packed_chunks_equal_attention_to_the_numbers_they_stand_for(bits, queries):
    keys, values = normal(B, K, 700, D, seed=1), normal(B, K, 700, D, seed=2)
    state = KIVI(bits=bits, group_size=32, residual_length=64).open(Place(LayerSizes(K, D, D)))
    state.append(Tokens.consecutive(keys, values))
    numbers_k, numbers_v = (torch.cat(parts, dim=2) for parts in zip(*map(numbers, state.chunks(CALL)), strict=True))
    call = Call(module=nn.Module(), query=normal(B, H, queries, D), mask=None, scaling=0.25)
    out = attend_chunks(call, list(state.chunks(CALL)), K)
    expected = plain(call.query, numbers_k, numbers_v, causal(queries, 700), 0.25)
    torch.testing.assert_close(out, expected.float(), rtol=1e-4, atol=1e-5)
    assert (numbers_k - keys).abs().max() < 8 / 2**bits
    assert (numbers_v - values).abs().max() < 8 / 2**bits


def test_chunks_that_all_queries_see_are_fused_where_that_is_exact():
    query, keys, values = normal(B, K, 9, D), normal(B, K, 40, D, seed=1), normal(B, K, 40, D, seed=2)
    chunks = list(dense_chunks(keys, values, 16))
    assert DenseChunk.attend_run(chunks, query, None) is None  # gradients might be asked for
    with torch.no_grad():
        assert DenseChunk.attend_run(chunks, query, 3.0) is None
        found = DenseChunk.attend_run(chunks, query, None)
    scores = query.double() @ keys.double().transpose(-1, -2)
    torch.testing.assert_close(found.out / found.norm, (scores.softmax(-1) @ values.double()).float())
    torch.testing.assert_close(found.top + found.norm.log(), scores.logsumexp(-1, keepdim=True).float())


def numbers(chunk):
    """Keys and values (B, K, T, D) that a chunk stands for, read off by unit queries and unit weights."""
    eye = torch.eye(D).expand(B, K, D, D)
    unit = torch.eye(chunk.tokens).expand(B, K, -1, -1)
    return chunk.scores(eye).transpose(-1, -2), chunk.mix(unit)


def test_half_precision_is_accumulated_in_float32():
    query = normal(B, H, 3, D, dtype=torch.bfloat16)
    keys, values = normal(B, K, 600, D, seed=1, dtype=torch.bfloat16), normal(B, K, 600, D, seed=2)
    call = Call(module=nn.Module(), query=query, mask=None, scaling=0.25)
    out = attend_chunks(call, list(dense_chunks(keys, values.bfloat16(), 64)), K)
    assert out.dtype == torch.bfloat16
    expected = plain(query, keys, values.bfloat16(), causal(3, 600), 0.25)
    torch.testing.assert_close(out, expected.bfloat16(), rtol=1e-2, atol=1e-3)


def test_a_mask_for_other_tokens_is_refused():
    query, keys = normal(B, H, 1, D), normal(B, K, 40, D)
    call = Call(module=nn.Module(), query=query, mask=torch.ones(B, 1, 1, 41, dtype=torch.bool), scaling=1.0)
    with pytest.raises(CompositionError, match="41 tokens, and the cache holds 40"):
        attend_chunks(call, list(dense_chunks(keys, keys)), K)
