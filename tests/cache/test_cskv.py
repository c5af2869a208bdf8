"""CSKV keeps the channels of older tokens that lose least, and the newest tokens as they are."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pintpot.cache import SnapKV, build_cache, cache_bytes, use_cache_attention
from pintpot.cache._base import LayerSizes, Place
from pintpot.cache.calibration import sample_layer
from pintpot.cache.cskv import CSKV
from pintpot.cache.rotary import Rotary
from pintpot.cache.tokens import Tokens
from pintpot.core.errors import CompositionError
from tests.architectures import tiny_model
from tests.cache.calibrating import fitted, texts
from tests.cache.test_stream import CALL, numbers

torch.set_num_threads(1)
B, K, D = 2, 2, 16
ROTARY = Rotary(10000.0 ** -(torch.arange(0, D, 2) / D))
POSITIONS = torch.arange(2000)[None, None]


def normal(*sizes, seed=0, dtype=torch.float32):
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed)).to(dtype)


def basis(rank, seed):
    return torch.linalg.qr(normal(K * D, rank, seed=seed))[0]


def place_of(method, **changes):
    ranks = method.ranks(LayerSizes(K, D, D))
    tensors = {"key_basis": basis(ranks[0], 5), "value_basis": basis(ranks[1], 6)}
    return Place(LayerSizes(K, D, D), rotary=ROTARY, tensors=tensors).but(**changes)


def some(count, dtype=torch.float32, seed=0):
    keys, values = normal(B, K, count, D, seed=seed), normal(B, K, count, D, seed=seed + 1, dtype=dtype)
    return Tokens.consecutive(ROTARY.rotate(keys, POSITIONS[..., :count]).to(dtype), values)


def filled(method, tokens, pieces, place):
    state, position = method.open(place), 0
    for count in pieces:
        state.append(tokens.part(position, position + count))
        position += count
    return state


def stored(state):
    return [torch.cat(parts, dim=2) for parts in zip(*map(numbers, state.chunks(CALL)), strict=True)]


def flat(states):
    return states.double().transpose(1, 2).flatten(2)


def test_older_tokens_are_projected_before_rotation_and_the_window_is_exact():
    method = CSKV(key_density=0.5, value_density=0.25)
    place, tokens = place_of(method), some(300)
    keys, values = stored(filled(method, tokens, [300], place))
    plain = flat(ROTARY.unrotate(tokens.keys, tokens.positions))
    for kept, given, name in (
        (flat(ROTARY.unrotate(keys, tokens.positions)), plain, "key_basis"),
        (flat(values), flat(tokens.values), "value_basis"),
    ):
        vectors = place.tensors[name].double()
        torch.testing.assert_close(kept[:, :288], (given @ vectors @ vectors.T)[:, :288], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(kept[:, :288], given[:, :288], atol=0.5)
    assert torch.equal(keys[:, :, 288:], tokens.keys[:, :, 288:])
    assert torch.equal(values[:, :, 288:], tokens.values[:, :, 288:])


def test_no_factors_of_the_rank_lose_less_of_keys_and_values():
    """The calibration minimises the reconstruction loss: gradient descent from elsewhere ends no lower."""
    model = tiny_model("qwen2")
    found = CSKV(key_density=0.5, value_density=0.25).fit(model, texts())
    samples = [sample_layer(model, text, 1) for text in texts()]
    keys = torch.cat([flat(s.unrotated_keys())[0] for s in samples])
    values = torch.cat([flat(s.values)[0] for s in samples])
    for name, given, rank in (("key_basis", keys, 16), ("value_basis", values, 8)):
        vectors = found[1][name].double()
        assert vectors.shape == (32, rank)
        torch.testing.assert_close(vectors.T @ vectors, torch.eye(rank, dtype=torch.float64), rtol=1e-4, atol=1e-5)
        loss = (given - given @ vectors @ vectors.T).pow(2).sum()
        least = torch.linalg.svdvals(given)[rank:].pow(2).sum()
        torch.testing.assert_close(loss, least, rtol=1e-3, atol=1e-9)
        down, up = (normal(32, rank, seed=s).double().mul_(0.2).requires_grad_() for s in (1, 2))
        optimizer = torch.optim.Adam([down, up], lr=0.05)
        for _ in range(60):
            optimizer.zero_grad()
            trained = (given - given @ down @ up.T).pow(2).sum()
            trained.backward()
            optimizer.step()
        assert trained > loss * (1 - 1e-6)


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("recent", [0, 64])
def test_how_tokens_come_makes_no_difference(bits, recent):
    method = CSKV(key_density=0.5, value_density=0.5, bits=bits)
    place, tokens = place_of(method, recent_tokens=recent), some(613)
    at_once = filled(method, tokens, [613], place)
    in_pieces = filled(method, tokens, [1, 7, 300, 1, 1, 250, *[1] * 53], place)
    for one, other in zip(stored(at_once), stored(in_pieces), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert at_once.nbytes() == in_pieces.nbytes()


def test_survivors_are_turned_to_their_own_positions():
    method = CSKV(key_density=1.0, value_density=1.0)
    place = place_of(method, consecutive=False)
    kept = some(300).gather(torch.arange(0, 300, 3).expand(B, 1, -1))
    keys, values = stored(filled(method, kept, [3, 50, 47], place))
    torch.testing.assert_close(keys, kept.keys, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(values, kept.values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [16, 4, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("changes", [{}, {"recent_tokens": 64, "consecutive": False}, {"grow_tokens": 1}])
def test_bytes_are_as_predicted(bits, dtype, changes):
    method = CSKV(bits=bits)
    place = place_of(method, **changes)
    state = method.open(place)
    assert state.nbytes() == method.predict_bytes(0, place, B, dtype) == 0
    for count in (10, 100, 1, 500, 27, 1):
        state.append(some(count, dtype=dtype))
        assert state.nbytes() == method.predict_bytes(state.tokens, place, B, dtype)


def test_savings_are_the_papers():
    """A fifth of the channels saves 80 %, and 4 bits (with scales of 32 numbers) about 95 %."""
    place = Place(LayerSizes(heads=8, key_dim=128, value_dim=128))
    dense = place.sizes.dense_bytes(32768, 1, torch.float16)
    assert 1 - CSKV().predict_bytes(32768, place, 1, torch.float16) / dense == pytest.approx(0.8, abs=0.01)
    assert 1 - CSKV(bits=4).predict_bytes(32768, place, 1, torch.float16) / dense == pytest.approx(0.94, abs=0.01)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("keep", [None, SnapKV(window_tokens=8)])
def test_end_to_end_on_calibrated_models(name, keep):
    model = tiny_model(name)
    ids = torch.randint(3, 256, (2, 150), generator=torch.Generator().manual_seed(0))
    differences = []
    for density in (1.0, 0.25):
        store = fitted(CSKV(key_density=density, value_density=density), model)
        cache, exact = build_cache(model.config, keep=keep, store=store), build_cache(model.config, keep=keep)
        with use_cache_attention(model), torch.no_grad():
            for piece in ids.split(70, dim=1):
                out = [model(piece, past_key_values=c).logits for c in (cache, exact)]
        differences.append(float((out[0] - out[1]).abs().max()))
        assert cache.nbytes() == cache_bytes(model.config, 150, keep=keep, store=store, batch=2)
    if keep is None:
        assert differences[0] < 1e-4 < differences[1]


def test_shapes_alone_are_enough():
    store = fitted(CSKV(bits=4), tiny_model("llama"))
    with FakeTensorMode():
        model = tiny_model("llama")
        cache = build_cache(model.config, store=store)
        with use_cache_attention(model), torch.no_grad():
            model(torch.zeros(2, 100, dtype=torch.int64), past_key_values=cache)
            model(torch.zeros(2, 1, dtype=torch.int64), past_key_values=cache)
        assert cache.nbytes() == cache_bytes(model.config, 101, store=store, batch=2)


@pytest.mark.parametrize("wrong", [{"key_density": 0.0}, {"value_density": 1.5}, {"window_tokens": 48}, {"bits": 12}])
def test_impossible_parameters_are_refused(wrong):
    with pytest.raises(CompositionError) as caught:
        CSKV(**wrong)
    assert caught.value.hint
