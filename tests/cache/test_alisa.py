"""ALISA attends to the most recent tokens and to those that received most attention so far."""

import pytest
import torch

from pintpot.cache.alisa import ALISA
from pintpot.core.errors import CompositionError
from tests.cache.layers import attention
from tests.cache.recalling import B, K, attended, exact, filled, numbers_of, tensors

torch.set_num_threads(1)


def sums_of(query, keys, last):
    """Attention received from the last queries of a prompt, by definition: float64 (B, K, T)."""
    return attention(keys, query, last).sum(dim=(2, 3))


@pytest.mark.parametrize("pieces", [[120], [70, 50]])
def test_sums_are_of_the_attention_that_tokens_received(pieces):
    query, keys, values = tensors(120)
    layer, _ = filled(ALISA(budget_tokens=100, group_tokens=8), query, keys, values, pieces)
    expected, position = torch.zeros(B, K, 120, dtype=torch.float64), 0
    for count in pieces:
        position += count
        expected[:, :, :position] += sums_of(query[:, :, :position], keys[:, :, :position], min(count, 50))
    torch.testing.assert_close(layer.state.received.view()[..., 0].double(), expected, rtol=1e-5, atol=1e-5)


def test_summing_in_blocks_gives_the_same(monkeypatch):
    query, keys, values = tensors(120)
    store = ALISA(budget_tokens=100, group_tokens=8)
    whole = filled(store, query, keys, values, [70, 50])[0].state.received.view()
    monkeypatch.setattr("pintpot.cache.alisa.SCORES_AT_ONCE", 7 * B * 4 * 512)
    torch.testing.assert_close(filled(store, query, keys, values, [70, 50])[0].state.received.view(), whole)


def test_half_of_the_window_is_recent_and_half_received_most():
    query, keys, values = tensors(200)
    layer, _ = filled(ALISA(budget_tokens=40, group_tokens=8), query, keys, values, [200])
    found = numbers_of(attended(layer, query[:, :, -1:])[0], keys)
    filed = layer.state.rows.tokens
    assert filed == (200 - 20) // 8 * 8
    expected = torch.zeros(B, K, 200, dtype=torch.bool)
    expected.scatter_(2, sums_of(query, keys, 20)[..., :filed].topk(20, dim=-1).indices, True)
    expected[..., filed:] = True
    assert torch.equal(found, expected)


def test_decoding_goes_on_summing_over_the_window_alone():
    query, keys, values = tensors(201)
    layer, out = filled(ALISA(budget_tokens=40, group_tokens=8), query, keys, values, [200, 1])
    before, _ = filled(ALISA(budget_tokens=40, group_tokens=8), query, keys, values, [200])
    chosen = numbers_of(attended(before, query[:, :, -1:])[0], keys)
    chosen[..., 200] = True
    torch.testing.assert_close(
        out[:, -1:].double(), exact(query[:, :, -1:], keys, values, chosen), rtol=1e-5, atol=1e-6
    )
    grouped = query[:, :, -1].double().unflatten(1, (K, -1))
    scores = (grouped @ keys.double().transpose(-1, -2)).masked_fill(~chosen[:, :, None], -torch.inf)
    expected = scores.softmax(dim=-1).sum(dim=2)
    expected[..., :200] += before.state.received.view()[..., 0]
    torch.testing.assert_close(layer.state.received.view()[..., 0].double(), expected, rtol=1e-5, atol=1e-5)


def test_up_to_the_budget_nothing_is_lost():
    query, keys, values = tensors(150)
    layer, out = filled(ALISA(budget_tokens=160, group_tokens=8), query, keys, values, [90, 1, 30, *[1] * 29])
    assert layer.state.rows.tokens > 0
    for t in (90, 121, 149):
        expected = exact(query[:, :, t : t + 1], keys[:, :, : t + 1], values[:, :, : t + 1])
        torch.testing.assert_close(out[:, t : t + 1].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wrong", [{"budget_tokens": 1}, {"group_tokens": 0}])
def test_impossible_parameters_are_refused(wrong):
    with pytest.raises(CompositionError) as caught:
        ALISA(**wrong)
    assert caught.value.hint
