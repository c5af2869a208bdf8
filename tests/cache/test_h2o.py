"""H2O counts the attention that each token has received, and keeps those that received most."""

import pytest
import torch

from pintpot.cache.h2o import H2O
from tests.cache.layers import normal
from tests.cache.seeing import B, D, K, all_weights, filled, seen_by, tensors

torch.set_num_threads(1)


def received(query, keys):
    return all_weights(query, keys).sum(dim=(2, 3))


@pytest.mark.parametrize("sinks", [0, 4])
def test_notes_are_the_columns_of_the_whole_attention_matrix(sinks):
    method = H2O(recent_tokens=16, sink_tokens=sinks)
    query, keys, values = tensors(700)
    noted = method.trace(seen_by(method, query, keys, values, sinks=sinks))[..., 0]
    torch.testing.assert_close(noted, received(query, keys)[..., sinks:].float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pieces", [[60], [40, 20], [20, 1, 1, 8, 30], [1] * 60])
def test_attention_adds_up_however_tokens_come(pieces):
    query, keys, values = tensors(60)
    layer = filled(H2O(recent_tokens=16), query, keys, values, pieces)
    noted = layer.pending.view(0).trace[..., 0]
    torch.testing.assert_close(noted, received(query, keys).float(), rtol=1e-4, atol=1e-5)


def test_a_heavy_hitter_of_early_queries_stays_though_the_last_ones_ignore_it():
    query, keys, values = tensors(100)
    direction = normal(D, seed=5)
    keys[:, :, 7] = direction * 10
    query[:, :, 8:40] = direction
    query[:, :, 40:] = -direction
    layer = filled(H2O(recent_tokens=16, kept_fraction=1 / 64), query, keys, values, [100])
    kept, _ = layer.stored.whole()
    assert kept.shape[2] == 1
    assert torch.equal(kept[:, :, 0], keys[:, :, 7])


def test_each_head_keeps_its_own_heavy_hitters_and_all_recent_tokens():
    query, keys, values = tensors(200)
    layer = filled(H2O(recent_tokens=8), query, keys, values, [200])
    kept, _ = layer.stored.whole()
    expected = received(query, keys)[..., :192].topk(18).indices.sort().values
    for b in range(B):
        for k in range(K):
            assert torch.equal(kept[b, k], keys[b, k][expected[b, k]])
    assert torch.equal(layer.pending.view(0).keys, keys[:, :, 192:])
    assert not torch.equal(expected[0, 0], expected[0, 1])
