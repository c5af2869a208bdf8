"""MiniCache: two layers share directions, keep their own lengths, and keep the tokens that are too far apart."""

import pytest
import torch

from pintpot.cache import LagKV, SnapKV, build_cache, cache_bytes, use_cache_attention
from pintpot.cache._base import LayerSizes, Place
from pintpot.cache.cake import CAKE
from pintpot.cache.minicache import MiniCache
from pintpot.cache.paired import LowerState, UpperState, merged_direction
from pintpot.cache.tokens import Tokens
from pintpot.core.errors import CompositionError
from pintpot.core.shape import ModelShape
from tests.architectures import tiny_config, tiny_model
from tests.cache.test_stream import CALL, numbers

torch.set_num_threads(1)
B, K, D = 2, 2, 16
SIZES = LayerSizes(heads=K, key_dim=D, value_dim=D)


def normal(tokens, seed=0, dtype=torch.float32):
    return torch.randn(B, K, tokens, D, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pair(method, **changes):
    """The states of two layers that are merged."""
    lower = method.open(Place(SIZES, index=0, layers=2).but(**changes))
    upper = method.open(Place(SIZES, index=1, layers=2, below=lambda: lower).but(**changes))
    assert isinstance(lower, LowerState)
    assert isinstance(upper, UpperState)
    return lower, upper


def stored(state):
    return [torch.cat(parts, dim=2) for parts in zip(*map(numbers, state.chunks(CALL)), strict=True)]


def fill(states, pieces, dtype=torch.float32):
    """Give both layers tokens in pieces; returns what each was given."""
    given = [[normal(sum(pieces), seed=2 * i, dtype=dtype), normal(sum(pieces), seed=2 * i + 1)] for i in (0, 1)]
    given = [[states_.to(dtype) for states_ in pair_] for pair_ in given]
    start = 0
    for count in pieces:
        for state, (keys, values) in zip(states, given, strict=True):
            state.append(Tokens.consecutive(keys, values).part(start, start + count))
        start += count
    return given


def slerp(a, b, t):
    """Spherical interpolation by its definition, in float64."""
    a, b = (x.double() / x.double().norm(dim=-1, keepdim=True) for x in (a, b))
    angle = (a * b).sum(dim=-1, keepdim=True).clamp(-1, 1).arccos()
    return (((1 - t) * angle).sin() * a + (t * angle).sin() * b) / angle.sin(), angle[..., 0] / torch.pi


@pytest.mark.parametrize("t", [0.0, 0.3, 0.6, 1.0])
def test_directions_are_interpolated_on_the_sphere(t):
    a, b = normal(40), normal(40, seed=1)
    direction, angle = merged_direction(a, 5 * b, t)
    expected, distance = slerp(a, b, t)
    torch.testing.assert_close(direction.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(angle.double() / torch.pi, distance, rtol=1e-5, atol=1e-6)
    along = merged_direction(a, 3 * a, t)[0]
    torch.testing.assert_close(along, a / a.norm(dim=-1, keepdim=True))
    assert merged_direction(a, -a, t)[0].isfinite().all()
    assert merged_direction(a, torch.zeros_like(a), t)[0].isfinite().all()


def test_each_layer_has_its_lengths_and_the_tokens_farthest_apart_stay_as_they_are():
    method = MiniCache(start_fraction=0.0)
    states = pair(method)
    given = fill(states, [320])
    assert method.retained == 3
    for which in (0, 1):
        expected, distance = slerp(given[0][which], given[1][which], 0.6)
        farthest = distance.unflatten(-1, (5, 64)).topk(3, dim=-1).indices + 64 * torch.arange(5)[:, None]
        retained = torch.zeros(B, K, 320, dtype=torch.bool).scatter(2, farthest.flatten(-2), True)
        for layer, state in enumerate(states):
            kept, own = stored(state)[which], given[layer][which]
            assert torch.equal(kept[retained], own[retained])
            merged = expected * own.double().norm(dim=-1, keepdim=True)
            torch.testing.assert_close(kept[~retained].double(), merged[~retained], rtol=1e-4, atol=1e-5)


def test_layers_that_resemble_each_other_but_for_lengths_lose_almost_nothing():
    """Averages would: the paper's reason for taking lengths and directions apart."""
    keys = normal(256)
    given = [keys, 4 * keys + 0.05 * normal(256, seed=5)]
    states = pair(MiniCache(start_fraction=0.0))
    for state, own in zip(states, given, strict=True):
        state.append(Tokens.consecutive(own, own))
    for state, own in zip(states, given, strict=True):
        assert float((stored(state)[0] - own).norm() / own.norm()) < 0.02
        assert float((sum(given) / 2 - own).norm() / own.norm()) > 0.3


def test_four_bits_round_directions_and_leave_retained_tokens_alone():
    exact, packed = pair(MiniCache(start_fraction=0.0)), pair(MiniCache(start_fraction=0.0, bits=4))
    fill(exact, [256])
    fill(packed, [256])
    for one, other in zip(exact, packed, strict=True):
        for a, b in zip(stored(one), stored(other), strict=True):
            assert 0 < float((a - b).norm() / a.norm()) < 0.1
        assert torch.equal(one.retained.read(0, 12)["keys"], other.retained.read(0, 12)["keys"])
    assert packed[0].nbytes() < exact[0].nbytes() / 2


def test_how_tokens_come_makes_no_difference():
    at_once, in_pieces = (pair(MiniCache(start_fraction=0.0)) for _ in range(2))
    fill(at_once, [400])
    fill(in_pieces, [1, 7, 100, 200, 1, 1, 64, *[1] * 26])
    for one, other in zip(at_once, in_pieces, strict=True):
        assert one.tokens == other.tokens == 400
        for a, b in zip(stored(one), stored(other), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("settings", [{}, {"retained_fraction": 0.0}, {"group_tokens": 16, "retained_fraction": 0.5}])
def test_bytes_are_as_predicted_and_two_layers_are_little_more_than_one(bits, dtype, settings):
    method = MiniCache(start_fraction=0.0, bits=bits, **settings)
    states = pair(method)
    pieces = [100, 1, 500, 27, 1]
    for upto in range(1, len(pieces) + 1):
        states = pair(method)
        fill(states, pieces[:upto], dtype)
        for state in states:
            assert state.nbytes() == method.predict_bytes(state.tokens, state.place, B, dtype)
    wide = LayerSizes(heads=8, key_dim=128, value_dim=128)
    places = [Place(wide, index=i, layers=2) for i in (0, 1)]
    more, less = (sum(method.predict_bytes(n, p, 1, dtype) for p in places) for n in (64 * 256, 32 * 256))
    one = wide.dense_bytes(32 * 256, 1, dtype)
    if not settings:
        # Lengths, and 3 of 64 tokens in both layers, beside one layer's directions.
        extra = one * 6 / 64 + 32 * 256 * 8 * (4 * dtype.itemsize) + 128 * 8 * 3 * 2
        directions = one if bits == 16 else 32 * 256 * 8 * 2 * (64 + 4 * 4)
        assert more - less == directions + extra
        assert more - less < 1.15 * one


def test_tokens_that_the_layer_above_has_not_been_given_yet_are_there():
    lower, upper = pair(MiniCache(start_fraction=0.0))
    keys, values = normal(150), normal(150, seed=1)
    lower.append(Tokens.consecutive(keys, values))
    assert lower.tokens == 150
    assert all(torch.equal(a, b) for a, b in zip(stored(lower), (keys, values), strict=True))
    with pytest.raises(CompositionError, match="other tokens"):
        upper.append(Tokens.consecutive(keys[:, :, :70], values[:, :, :70]))


def test_pairs_go_from_the_middle_upwards():
    method = MiniCache()
    roles = [(method.is_lower(p), method.is_upper(p)) for p in (Place(SIZES, index=i, layers=9) for i in range(9))]
    alone, lower, upper = (False, False), (True, False), (False, True)
    assert roles == [alone] * 4 + [lower, upper, lower, upper, alone]


@pytest.mark.parametrize("keep", [None, SnapKV(kept_fraction=0.5), LagKV(lag_tokens=16)], ids=str)
def test_end_to_end_with_generate_beams_and_a_padded_batch(keep):
    model, store = tiny_model("llama"), MiniCache(start_fraction=0.0, group_tokens=16)
    ids = torch.randint(3, 256, (2, 120), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 120, dtype=torch.int64)
    mask[1, :40] = 0
    settings = {"max_new_tokens": 18, "min_new_tokens": 18, "do_sample": False, "num_beams": 2}

    def answer(ids, **options):
        cache = build_cache(model.config, keep=keep, store=store)
        with use_cache_attention(model):
            out = model.generate(ids, past_key_values=cache, **settings, **options)
        return out[:, -18:], cache.nbytes()

    together, _ = answer(ids, attention_mask=mask)
    alone = [answer(ids[:1]), answer(ids[1:, 40:])]
    assert torch.equal(together, torch.cat([out for out, _ in alone]))
    assert alone[0][1] == cache_bytes(model.config, 137, keep=keep, store=store, batch=2)


def test_a_budget_counts_the_layer_that_waits():
    model, store = tiny_model("llama"), MiniCache(start_fraction=0.0)
    held = cache_bytes(model.config, 300, store=store, reserve_tokens=300)
    waits = 300 * 2 * 2 * 16 * 4
    cache = build_cache(model.config, store=store, budget_bytes=held + waits, tokens=300)
    most = []
    with use_cache_attention(model), torch.no_grad():
        for layer in model.model.layers:
            layer.register_forward_hook(lambda *args: most.append(cache.nbytes()))
        model(torch.ones(1, 300, dtype=torch.int64), past_key_values=cache)
    assert max(most) <= held + waits
    assert cache.nbytes() == held


@pytest.mark.parametrize(
    "wrong", [{"interpolation": 1.5}, {"retained_fraction": -0.1}, {"bits": 9}, {"group_tokens": 48}]
)
def test_impossible_parameters_are_refused(wrong):
    with pytest.raises(CompositionError) as caught:
        MiniCache(**wrong)
    assert caught.value.hint


def test_what_it_cannot_do_is_refused():
    with pytest.raises(CompositionError, match="would change nothing"):
        build_cache(tiny_config("llama"), store=MiniCache())
    with pytest.raises(CompositionError, match="even_layers"):
        build_cache(tiny_config("llama"), keep=CAKE(), store=MiniCache(start_fraction=0.0))
    assert list(MiniCache.options(ModelShape.from_config(tiny_config("gemma2")), None)) == []
