"""LagKV keeps what stands out from the chunk that follows, in each head, and lets the rest go."""

import pytest
import torch

from pintpot.cache._base import Call, LayerSizes, Place, Seen
from pintpot.cache.dense import Dense
from pintpot.cache.lagkv import LagKV
from pintpot.cache.layer import CacheLayer
from pintpot.cache.tokens import Tokens
from pintpot.core.errors import CompositionError

torch.set_num_threads(1)
B, K, D = 2, 3, 8
PLACE = Place(LayerSizes(K, D, D))


def normal(tokens, seed=0):
    return torch.randn(B, K, tokens, D, generator=torch.Generator().manual_seed(seed))


def seen(method, keys, values):
    call = Call(module=torch.nn.Module(), query=keys[:, :, -1:])
    decided, _ = method.decided(keys.shape[2])
    return Seen(Tokens.consecutive(keys, values), decided, call.query, call, lambda: iter(()), PLACE)


def choose(method, keys, values):
    return method.choose(method.score(seen(method, keys, values)))


def scores_by_definition(states, lag):
    """Equations 5 to 9 for one of keys and values, token by token, in float64."""
    chunks = states.double().unflatten(2, (-1, lag))
    out = []
    for p in range(chunks.shape[2] - 1):
        low = chunks[:, :, p + 1].min(dim=2).values[:, :, None]
        high = chunks[:, :, p + 1].max(dim=2).values[:, :, None]
        relative = (chunks[:, :, p] - low) / (high - low)
        out.append(relative.std(dim=-1).softmax(dim=-1))
    return torch.cat(out, dim=2)


def test_scores_are_the_papers():
    method = LagKV(lag_tokens=16)
    keys, values = normal(16 * 5 + 3), normal(16 * 5 + 3, seed=1)
    expected = scores_by_definition(keys[:, :, :80], 16) + scores_by_definition(values[:, :, :80], 16)
    torch.testing.assert_close(method.score(seen(method, keys, values)), expected.float(), rtol=1e-5, atol=1e-6)


def test_scoring_in_parts_gives_the_same(monkeypatch):
    method = LagKV(lag_tokens=16)
    keys, values = normal(16 * 9), normal(16 * 9, seed=1)
    whole = choose(method, keys, values)
    monkeypatch.setattr("pintpot.cache.lagkv.SCORE_TOKENS", 32)
    assert torch.equal(choose(method, keys, values), whole)


def test_a_token_that_stands_out_is_kept_and_a_plain_one_is_not():
    keys, values = normal(64), normal(64, seed=1)
    keys[:, 0, 5] *= torch.tensor([9.0, -9.0] * 4)
    keys[:, 1, 5] = values[:, 1, 5] = 0.0
    chosen = choose(LagKV(lag_tokens=32, kept_fraction=0.25), keys, values)
    assert chosen.shape == (B, K, 8)
    assert (chosen[:, 0] == 5).any(dim=-1).all()
    assert not (chosen[:, 1] == 5).any()


def filled(method, keys, values, pieces):
    layer = CacheLayer(Dense(), method)
    position = 0
    for count in pieces:
        new = slice(position, position + count)
        handle, _ = layer.update(keys[:, :, new], values[:, :, new])
        layer.attend(handle, Call(module=torch.nn.Module(), query=keys[:, :, new]))
        position += count
    return layer


def held(layer):
    return torch.cat([layer.state.whole()[0], layer.pending.view(0).keys], dim=2)


def test_sinks_and_recent_tokens_stay_and_the_rest_shrinks():
    method = LagKV(lag_tokens=16, sink_tokens=4, kept_fraction=0.25)
    keys, values = normal(4 + 16 * 6 + 5), normal(4 + 16 * 6 + 5, seed=1)
    layer = filled(method, keys, values, [keys.shape[2]])
    kept = held(layer)
    assert kept.shape[2] == 4 + 5 * 4 + 16 + 5
    assert torch.equal(kept[:, :, :4], keys[:, :, :4])
    assert torch.equal(kept[:, :, -21:], keys[:, :, -21:])
    chosen = choose(method, keys[:, :, 4:], values[:, :, 4:])
    for b in range(B):
        for k in range(K):
            assert torch.equal(kept[b, k, 4:24], keys[b, k, 4:][chosen[b, k]])
    assert not torch.equal(chosen[0, 0], chosen[0, 1])


def test_eviction_goes_on_the_same_way_however_tokens_come():
    method = LagKV(lag_tokens=8, sink_tokens=4, kept_fraction=0.5)
    keys, values = normal(101), normal(101, seed=1)
    at_once = filled(method, keys, values, [101])
    one_by_one = filled(method, keys, values, [1] * 101)
    mixed = filled(method, keys, values, [2, 30, 1, 1, 1, 40, 7, 9, 10])
    assert torch.equal(held(at_once), held(one_by_one))
    assert torch.equal(held(at_once), held(mixed))
    counts = method.held(101)
    assert at_once.state.tokens == counts.stored
    assert at_once.pending.tokens == counts.pending


def test_shrinking_keeps_less_every_time_down_to_one():
    kept = [m.survivors for m in LagKV(kept_fraction=0.25, lag_tokens=32).shrink()]
    assert kept == [8, 7, 6, 5, 4, 3, 2, 1]


@pytest.mark.parametrize("wrong", [{"kept_fraction": 0.0}, {"kept_fraction": 1.5}, {"lag_tokens": 1}])
def test_impossible_parameters_are_refused(wrong):
    with pytest.raises(CompositionError) as caught:
        LagKV(**wrong)
    assert caught.value.hint
