"""CAKE, ZigZagKV and DynamicKV: one cache divided among layers by what they see."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from pintpot.cache import build_cache, cache_bytes, prefill_in_pieces, use_cache_attention
from pintpot.cache.cake import CAKE
from pintpot.cache.cascade import proportional
from pintpot.cache.dynamickv import DynamicKV
from pintpot.cache.epicache import EpiCache
from pintpot.cache.forecast import Parts, waiting_bytes
from pintpot.cache.geometry import layer_kinds
from pintpot.cache.zigzagkv import ZigZagKV
from pintpot.core.errors import CompositionError
from tests.architectures import tiny_config, tiny_model
from tests.cache.layers import attention, cascaded, normal, read, sizes_of

torch.set_num_threads(1)
B, K, R, D, T = 2, 2, 2, 8, 200
KEEPS = (CAKE, DynamicKV, ZigZagKV)


def texts(sharpness):
    """Keys, values and queries of a layer for each sharpness of its attention."""
    for seed, sharp in enumerate(sharpness):
        keys, values = normal(B, K, T, D, seed=seed), normal(B, K, T, D, seed=100 + seed)
        yield keys, values, sharp * normal(B, K * R, T, D, seed=200 + seed)


def run(keep, sharpness):
    """The layers after a prompt, and what they were given."""
    given = list(texts(sharpness))
    layers = cascaded(keep, len(given), sizes_of(given[0][0], given[0][2]))
    for layer, (keys, values, query) in zip(layers, given, strict=True):
        read(layer, keys, values, query)
    return layers, given


def stored(layers):
    return [layer.stored.tokens for layer in layers]


def window(keep, keys, query):
    """The window's weights on the tokens that are decided on, float64."""
    decided, _ = keep.decided(T - keep.sinks)
    return attention(keys, query, keep.window_tokens)[..., :decided]


def test_cake_slices_by_entropy_and_variance():
    keep = CAKE(tau1=1.6, tau2=0.4)
    layers, given = run(keep, (0.1, 0.5, 2.0))
    preferences = []
    for keys, _, query in given:
        weights = window(keep, keys, query)
        entropy = -(weights * (weights + 1e-10).log()).sum()
        preferences.append(float(entropy ** (1 / 1.6) * weights.var(dim=3).sum() ** (1 / 0.4)))
    _, each = keep.decided(T)
    assert sum(stored(layers)) == 3 * each
    assert stored(layers) == proportional(3 * each, preferences, [128] * 3)
    assert len(set(stored(layers))) > 1


def test_cake_keeps_tokens_whose_attention_is_great_or_restless():
    keep = CAKE(kept_fraction=0.25, gamma=50.0)
    (layer,), [(keys, _, query)] = run(keep, (1.0,))
    weights = window(keep, keys, query)
    indicator = (weights.mean(dim=3) + 50.0 * weights.var(dim=3)).mean(dim=2)
    chosen = functional.avg_pool1d(indicator, 5, stride=1, padding=2).topk(32).indices.sort().values
    expected = keys.gather(2, chosen[..., None].expand(-1, -1, -1, D))
    assert torch.equal(layer.stored.whole()[0], expected)


def test_zigzagkv_divides_by_the_tokens_that_hold_the_attention():
    keep = ZigZagKV(kept_fraction=0.25)
    layers, given = run(keep, (0.1, 1.0, 3.0))
    least = []
    for keys, _, query in given:
        received = window(keep, keys, query).sum(dim=3)
        heads = received.flatten(0, 2)
        needed = []
        for head in heads:
            held, count = 0.0, 0
            for share in head.sort(descending=True).values:
                held, count = held + share, count + 1
                if held >= 0.9 * head.sum():
                    break
            needed.append(count)
        least.append(sum(needed) / len(needed))
    _, each = keep.decided(T)
    expected = [0.2 * each + 0.8 * 3 * each * budget / sum(least) for budget in least]
    assert sum(stored(layers)) == 3 * each
    assert all(abs(held - share) < 1 for held, share in zip(stored(layers), expected, strict=True))
    assert stored(layers) == sorted(stored(layers), reverse=True)
    assert stored(layers)[-1] < stored(layers)[0] / 1.5


def test_dynamickv_gives_each_layer_its_part_of_the_best_tokens_of_all():
    keep = DynamicKV(kept_fraction=0.25, revised_every=8)
    layers, given = run(keep, (0.2, 1.0, 3.0))
    scores = []
    for keys, _, query in given:
        votes = window(keep, keys, query).sum(dim=3).mean(dim=2)
        scores.append(functional.max_pool1d(votes, 7, stride=1, padding=3))
    _, each = keep.decided(T)
    owner = torch.arange(3).repeat_interleave(scores[0].numel())
    best = torch.cat([s.flatten() for s in scores]).topk(3 * each * B * K).indices
    counts = [float((owner[best] == layer).sum()) for layer in range(3)]
    assert sum(stored(layers)) == 3 * each
    assert all(abs(held - count / (B * K)) <= 1 for held, count in zip(stored(layers), counts, strict=True))
    assert len(set(stored(layers))) > 1


def test_dynamickv_holds_the_largest_budget_until_the_next_revision():
    keep = DynamicKV(kept_fraction=0.0625, most_ratio=3.0, revised_every=2)
    given = list(texts((1.0,) * 4))
    layers = cascaded(keep, 4, sizes_of(given[0][0], given[0][2]))
    _, each = keep.decided(T)
    held = []
    for layer, (keys, values, query) in zip(layers, given, strict=True):
        read(layer, keys, values, query)
        held.append([waiting.tokens.count for waiting in layer.cascade._waiting])
    assert held[0] == [3 * each]
    assert sum(held[1]) == min(4, 2 * 3) * each
    assert held[2][-1] == 3 * each
    assert held[3] == []
    assert sum(stored(layers)) == 4 * each


@pytest.mark.parametrize("kind", KEEPS)
def test_later_tokens_are_divided_too_and_the_sum_stays_as_planned(kind):
    keep = kind(kept_fraction=0.3, window_tokens=8)
    given = list(texts((0.2, 1.0, 3.0)))
    layers = cascaded(keep, 3, sizes_of(given[0][0], given[0][2]))
    position = 0
    for count in (90, 1, 1, 70, 38):
        new = slice(position, position + count)
        for layer, (keys, values, query) in zip(layers, given, strict=True):
            read(layer, keys[:, :, new], values[:, :, new], query[:, :, new])
        position += count
        assert sum(stored(layers)) == 3 * keep.held(position).stored


def test_no_layer_is_given_more_than_it_holds():
    assert proportional(28, [9.4, 9.3, 9.3], [9, 10, 10]) == [9, 10, 9]
    assert proportional(10, [0.0, 0.0], [9, 9]) == [5, 5]
    assert proportional(30, [5.0, 1.0], [9, 9]) == [9, 9]


@pytest.mark.parametrize("kind", KEEPS)
def test_end_to_end(kind):
    model, keep = tiny_model("llama"), kind(kept_fraction=0.25)
    ids = torch.randint(3, 256, (1, 260), generator=torch.Generator().manual_seed(0))
    cache = build_cache(model.config, keep=keep)
    with use_cache_attention(model):
        out = model.generate(ids, past_key_values=cache, max_new_tokens=80, min_new_tokens=80, do_sample=False)
    assert out.shape == (1, 340)
    assert cache.nbytes() == cache_bytes(model.config, 339, keep=keep)
    budget = cache_bytes(model.config, 300, keep=kind(kept_fraction=0.5)) + 40_000
    small = build_cache(model.config, keep=kind(kept_fraction=1.0), budget_bytes=budget, tokens=300)
    with use_cache_attention(model):
        prefill_in_pieces(model, ids, small, 100)
    assert small.nbytes() <= budget


@pytest.mark.parametrize("kind", [*KEEPS, EpiCache])
def test_shapes_alone_are_enough(kind):
    config, keep = tiny_config("llama"), kind(kept_fraction=0.25)
    with FakeTensorMode():
        model, cache = tiny_model("llama"), build_cache(config, keep=keep)
        with use_cache_attention(model), torch.no_grad():
            model(torch.zeros(2, 222, dtype=torch.int64), past_key_values=cache)
            model(torch.zeros(2, 1, dtype=torch.int64), past_key_values=cache)
        assert cache.nbytes() == cache_bytes(config, 223, keep=keep, batch=2)


def test_what_waits_is_more_where_budgets_are_revised_seldom():
    kinds = layer_kinds(tiny_config("llama"))

    def waits(**settings):
        parts = Parts(keep=DynamicKV(kept_fraction=0.05, **settings))
        return waiting_bytes(kinds, 512, parts, 1, torch.float32)

    assert waits(revised_every=1) < waits(revised_every=2)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: CAKE(window_tokens=1),
        lambda: CAKE(tau1=0.0),
        lambda: CAKE(kernel_size=4),
        lambda: ZigZagKV(attention_share=1.5),
        lambda: ZigZagKV(least_share=-0.1),
        lambda: DynamicKV(most_ratio=0.5),
        lambda: DynamicKV(revised_every=0),
    ],
)
def test_impossible_parameters_are_refused(wrong):
    with pytest.raises(CompositionError) as caught:
        wrong()
    assert caught.value.hint
