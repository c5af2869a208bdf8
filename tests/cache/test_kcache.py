"""KCache scores every key, and fetches the values of the tokens with the largest weights."""

import pytest
import torch

from pintpot.cache.kcache import KCache
from pintpot.core.errors import CompositionError
from tests.cache.recalling import B, D, H, K, exact, filled, tensors

torch.set_num_threads(1)
T = 200


def test_up_to_the_top_tokens_nothing_is_lost():
    query, keys, values = tensors(T)
    layer, out = filled(KCache(top_tokens=T, group_tokens=16), query, keys, values, [100, 1, 50, *[1] * 49])
    assert layer.state.rows.tokens == T // 16 * 16
    for t in (100, 199):
        expected = exact(query[:, :, t : t + 1], keys[:, :, : t + 1], values[:, :, : t + 1])
        torch.testing.assert_close(out[:, t : t + 1].double(), expected, rtol=1e-5, atol=1e-6)


def test_values_of_the_largest_weights_stand_for_all_others():
    """By definition in float64: the softmax is over all tokens, and those that are fetched take the others' weight."""
    query, keys, values = tensors(T)
    store = KCache(top_tokens=10, group_tokens=16)
    _, out = filled(store, query, keys, values, [T - 1, 1])
    filed = (T - 1) // 16 * 16
    grouped = query[:, :, -1].double().unflatten(1, (K, -1))
    weights = (grouped @ keys.double().transpose(-1, -2)).softmax(dim=-1)
    share = weights[..., :filed] / weights[..., :filed].sum(dim=-1, keepdim=True)
    chosen = torch.zeros(B, K, filed, dtype=torch.bool)
    chosen.scatter_(2, share.sum(dim=2).topk(10, dim=-1).indices, True)
    counted = torch.cat([chosen, torch.ones(B, K, T - filed, dtype=torch.bool)], dim=-1)
    scale = weights[..., :filed].sum(dim=-1) / (weights[..., :filed] * chosen[:, :, None]).sum(dim=-1)
    weights[..., :filed] *= scale[..., None]
    expected = ((weights * counted[:, :, None]) @ values.double()).reshape(B, 1, H, D)
    torch.testing.assert_close(out[:, -1:].double(), expected, rtol=1e-5, atol=1e-6)


def test_keys_are_on_the_device_and_old_values_are_not():
    query, keys, values = tensors(T)
    store = KCache(group_tokens=16)
    layer, _ = filled(store, query, keys, values, [T])
    assert torch.equal(layer.state.keys.view(), keys)
    held = sum(t.numel() for t in layer.state.tensors()) - layer.state.keys.held.numel()
    assert held == 15 * B * K * D
    fetched = torch.cat([layer.state.rows.block(i) for i in range(layer.state.rows.blocks)], dim=2)
    assert torch.equal(fetched, values[:, :, : fetched.shape[2]])


@pytest.mark.parametrize("wrong", [{"top_tokens": 0}, {"group_tokens": 0}])
def test_impossible_parameters_are_refused(wrong):
    with pytest.raises(CompositionError) as caught:
        KCache(**wrong)
    assert caught.value.hint
