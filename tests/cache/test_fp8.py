"""FP8 keeps numbers as bytes of floating point, each token with a scale of its own."""

import pytest
import torch

from pintpot.cache import build_cache, cache_bytes, use_cache_attention
from pintpot.cache._base import LayerSizes, Place
from pintpot.cache.fp8 import FP8
from pintpot.cache.tokens import Tokens
from pintpot.core.errors import CompositionError
from tests.architectures import tiny_model
from tests.cache.test_stream import CALL, numbers

torch.set_num_threads(1)
B, K, D = 2, 2, 16
PLACE = Place(LayerSizes(heads=K, key_dim=D, value_dim=D))


def normal(tokens, seed=0, dtype=torch.float32):
    return torch.randn(B, K, tokens, D, generator=torch.Generator().manual_seed(seed)).to(dtype)


def stored(state):
    return [torch.cat(parts, dim=2) for parts in zip(*map(numbers, state.chunks(CALL)), strict=True)]


def filled(method, keys, values, pieces, place=PLACE):
    state = method.open(place)
    whole, position = Tokens.consecutive(keys, values), 0
    for count in pieces:
        state.append(whole.part(position, position + count))
        position += count
    return state


def e4m3_by_definition(number):
    """The nearest number of a sign, 4 bits of exponent (bias 7) and 3 of mantissa, in float64."""
    exponent = number.abs().clamp(min=2.0**-6).log2().floor()
    step = torch.exp2(exponent - 3)
    return (number / step).round() * step


@pytest.mark.parametrize("scales", ["token", "head"])
def test_numbers_are_the_formats_nearest(scales):
    keys, values = normal(300), normal(300, seed=1) * 1e-3
    for kept, given in zip(stored(filled(FP8(scales=scales), keys, values, [300])), (keys, values), strict=True):
        greatest = given.abs().amax(dim=-1 if scales == "token" else (2, 3), keepdim=True)
        scale = (greatest * ((1.0 if scales == "token" else 8.0) / 448)).bfloat16().double()
        expected = e4m3_by_definition((given.double() / scale).clamp(-448, 448)) * scale
        torch.testing.assert_close(kept.double(), expected, rtol=1e-5, atol=1e-9)


def test_a_huge_token_spoils_no_other():
    keys, values = normal(100), normal(100, seed=1)
    keys[:, :, 40] *= 1e6
    kept, _ = stored(filled(FP8(), keys, values, [100]))
    assert ((kept - keys).abs() / keys.abs().amax(dim=-1, keepdim=True)).max() < 2**-4
    shared, _ = stored(filled(FP8(scales="head"), keys, values, [100]))
    assert (shared[:, :, 0] - keys[:, :, 0]).abs().max() > 0.1


def test_a_head_scale_leaves_room_for_greater_tokens():
    keys, values = normal(50), normal(50, seed=1)
    keys[:, :, 10:] *= 3
    kept, _ = stored(filled(FP8(scales="head"), keys, values, [10, 40]))
    assert ((kept - keys).abs() / keys.abs().clamp(min=0.1)).max() < 2**-3.9


@pytest.mark.parametrize("scales", ["token", "head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grow", [1, 128])
def test_bytes_are_as_predicted(scales, dtype, grow):
    method, place = FP8(scales=scales), PLACE.but(grow_tokens=grow)
    state = method.open(place)
    assert state.nbytes() == method.predict_bytes(0, place, B, dtype) == 0
    for count in (100, 1, 500, 27, 1):
        state.append(Tokens.consecutive(normal(count, dtype=dtype), normal(count, dtype=dtype)))
        assert state.nbytes() == method.predict_bytes(state.tokens, place, B, dtype)


def test_how_tokens_come_makes_no_difference():
    keys, values = normal(613), normal(613, seed=1)
    at_once, in_pieces = (filled(FP8(), keys, values, p) for p in ([613], [1, 7, 300, 1, 250, 54]))
    for one, other in zip(stored(at_once), stored(in_pieces), strict=True):
        assert torch.equal(one, other)


def test_zeros_and_huge_numbers_stay_finite():
    keys, values = torch.zeros(B, K, 40, D), normal(40) * 1e30
    kept_keys, kept_values = stored(filled(FP8(), keys, values, [40]))
    assert torch.equal(kept_keys, keys)
    assert ((kept_values - values).abs() / values.abs().amax(dim=-1, keepdim=True)).max() < 2**-4


def test_beams_and_half_of_the_bytes_end_to_end():
    model = tiny_model("llama", dtype=torch.bfloat16)
    ids = torch.randint(3, 256, (2, 120), generator=torch.Generator().manual_seed(0))
    cache = build_cache(model.config, store=FP8())
    with use_cache_attention(model):
        out = model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False, num_beams=3)
    assert out.shape == (2, 128)
    assert cache.nbytes() == cache_bytes(model.config, 127, store=FP8(), batch=6, dtype=torch.bfloat16)
    dense = cache_bytes(model.config, 128, batch=6, dtype=torch.bfloat16)
    assert cache.nbytes() == dense * (16 + 2) / (2 * 16)


def test_an_unknown_scale_is_refused():
    with pytest.raises(CompositionError) as caught:
        FP8(scales="tensor")
    assert caught.value.hint
