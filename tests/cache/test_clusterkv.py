"""ClusterKV recalls the clusters of keys that a query points to, wherever their tokens stand."""

import pytest
import torch
from torch.nn import functional

from pintpot.cache.clusterkv import ClusterKV, cluster
from pintpot.cache.dense import DenseState
from pintpot.core.errors import CompositionError
from tests.cache.recalling import B, D, H, K, attended, exact, filled, numbers_of, place_of, tensors

torch.set_num_threads(1)
SMALL = {"sink_tokens": 4, "window_tokens": 64, "cluster_tokens": 16, "dense_layers": 0}


def topics(tokens, count=4):
    """Keys around orthogonal directions that take turns, and which one each is of."""
    _, keys, values = tensors(tokens)
    of = torch.arange(tokens) % count
    directions = torch.eye(D)[:count]
    return 8 * directions[of] + 0.1 * keys, values, of


def test_clusters_are_those_of_k_means_by_cosine():
    keys = tensors(150)[1]
    centroids, labels = cluster(keys, 6, 5)
    for b in range(B):
        for k in range(K):
            own = keys[b, k].double()
            means = own[torch.randperm(150, generator=torch.Generator().manual_seed(0))[:6]]
            for _ in range(5):
                of = (functional.normalize(own, dim=-1) @ functional.normalize(means, dim=-1).T).argmax(dim=-1)
                means = torch.stack([own[of == c].mean(dim=0) if (of == c).any() else means[c] for c in range(6)])
            of = (functional.normalize(own, dim=-1) @ functional.normalize(means, dim=-1).T).argmax(dim=-1)
            torch.testing.assert_close(centroids[b, k].double(), means, rtol=1e-5, atol=1e-6)
            assert torch.equal(labels[b, k], of)


def test_clustering_in_parts_gives_the_same(monkeypatch):
    keys = tensors(150)[1]
    whole = cluster(keys, 6, 5)
    monkeypatch.setattr("pintpot.cache.clusterkv.SIMILAR_AT_ONCE", 64 * B * K)
    for one, other in zip(whole, cluster(keys, 6, 5), strict=True):
        torch.testing.assert_close(one, other)


def test_what_is_alike_is_recalled_though_it_stands_apart():
    keys, values, of = topics(4 + 128)
    query = tensors(4 + 128)[0]
    # 8 clusters of 16 tokens; every fourth token is of the topic that is asked for.
    layer, _ = filled(ClusterKV(budget_tokens=4 + 32, **SMALL), query, keys, values, [4 + 128])
    asked = torch.zeros(B, H, 1, D)
    asked[..., 2] = 1.0
    found = numbers_of(attended(layer, asked)[0], keys)
    expected = (of == 2).clone()
    expected[:4] = True
    assert torch.equal(found, expected.expand(B, K, -1))


def test_up_to_the_budget_nothing_is_lost():
    query, keys, values = tensors(250)
    store = ClusterKV(budget_tokens=300, **SMALL)
    layer, out = filled(store, query, keys, values, [90, 1, 100, *[1] * 59])
    assert layer.state.rows.tokens == 192
    for t in (90, 191, 249):
        expected = exact(query[:, :, t : t + 1], keys[:, :, : t + 1], values[:, :, : t + 1])
        torch.testing.assert_close(out[:, t : t + 1].double(), expected, rtol=1e-5, atol=1e-6)


def test_attention_is_exact_over_what_is_recalled():
    query, keys, values = tensors(250)
    layer, _ = filled(ClusterKV(budget_tokens=64, **SMALL), query, keys, values, [249])
    found, their = attended(layer, query[:, :, -1:])
    assert found.shape[2] == 64 + (249 - 4) % 64
    _, out = filled(ClusterKV(budget_tokens=64, **SMALL), query, keys, values, [249, 1])
    expected = exact(
        query[:, :, -1:], torch.cat([found, keys[:, :, -1:]], dim=2), torch.cat([their, values[:, :, -1:]], dim=2)
    )
    torch.testing.assert_close(out[:, -1:].double(), expected, rtol=1e-5, atol=1e-6)


def test_decoded_tokens_are_clustered_when_a_window_is_full():
    query, keys, values = tensors(4 + 192)
    layer, _ = filled(ClusterKV(budget_tokens=64, **SMALL), query, keys, values, [4 + 100, *[1] * 92])
    assert layer.state.centroids.shape[2] == 12
    assert layer.state.sizes.sum(dim=-1).unique().tolist() == [192]
    fetched = torch.cat([layer.state.rows.block(i) for i in range(layer.state.rows.blocks)], dim=2)[..., :D]
    means = torch.stack([part.mean(dim=0) for part in fetched[0, 0].split(layer.state.sizes[0, 0].tolist())])
    torch.testing.assert_close(layer.state.centroids[0, 0], means)


def test_the_lowest_layers_are_left_as_they_are():
    store = ClusterKV()
    assert isinstance(store.open(place_of(index=1, layers=3)), DenseState)
    assert store.tier_bytes(5000, place_of(index=1, layers=3), 1, torch.float32) == {}
    assert sum(store.tier_bytes(5000, place_of(index=2, layers=3), 1, torch.float32).values()) > 0
    assert not store.acts_on(2)


@pytest.mark.parametrize("wrong", [{"budget_tokens": 16}, {"cluster_tokens": 321}, {"iterations": 0}])
def test_impossible_parameters_are_refused(wrong):
    with pytest.raises(CompositionError) as caught:
        ClusterKV(**wrong)
    assert caught.value.hint
