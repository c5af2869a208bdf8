"""RotateKV rotates outliers away before it packs, and keeps the tokens of massive activations exactly."""

import pytest
import torch

from pintpot.cache import build_cache, cache_bytes, use_cache_attention
from pintpot.cache._base import LayerSizes, Place
from pintpot.cache.rotary import Rotary
from pintpot.cache.rotatekv import RotateKV, peaks
from pintpot.cache.tokens import Tokens
from pintpot.core.errors import CompositionError
from tests.architectures import tiny_model
from tests.cache.calibrating import fitted, texts
from tests.cache.test_stream import CALL, numbers

torch.set_num_threads(1)
B, K, D, HIDDEN = 2, 2, 16, 24
ROTARY = Rotary(10000.0 ** -(torch.arange(0, D, 2) / D))
PLACE = Place(LayerSizes(heads=K, key_dim=D, value_dim=D, hidden=HIDDEN), rotary=ROTARY)
POSITIONS = torch.arange(2000)[None, None]


def normal(*sizes, seed=0, dtype=torch.float32):
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed)).to(dtype)


def some(count, seed=0, dtype=torch.float32):
    """Tokens whose keys are rotated already."""
    keys = normal(B, K, count, D, seed=seed)
    rotated = ROTARY.rotate(keys, POSITIONS[..., :count]).to(dtype)
    values, inputs = normal(B, K, count, D, seed=seed + 1, dtype=dtype), normal(B, 1, count, HIDDEN, seed=seed + 2)
    return Tokens.consecutive(rotated, values, inputs=inputs.to(dtype))


def stored(method, tokens, pieces=None, place=PLACE):
    state, position = method.open(place), 0
    for count in pieces or [tokens.count]:
        state.append(tokens.part(position, position + count))
        position += count
    return [torch.cat(parts, dim=2) for parts in zip(*map(numbers, state.chunks(CALL)), strict=True)]


def packed_by_definition(tokens, bits):
    """What is left of the keys, in float64: rotate, order, round each token to its own grid, and back."""
    size = K * D
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    matrix /= size**0.5
    plain = ROTARY.unrotate(tokens.keys, tokens.positions).double().transpose(1, 2).flatten(2)
    rotated = plain @ matrix
    order = rotated.sum(dim=1, keepdim=True).argsort(dim=-1).expand_as(rotated)
    groups = rotated.gather(2, order).unflatten(2, (-1, 8))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    ordered = (((groups - low) / step).round() * step + low).flatten(2)
    back = torch.empty_like(ordered).scatter_(2, order, ordered) @ matrix
    return ROTARY.rotate(back.unflatten(2, (K, D)).transpose(1, 2), tokens.positions)


def test_keys_are_rotated_ordered_and_rounded_as_defined():
    tokens = some(60)
    kept, _ = stored(RotateKV(bits=4, group_size=8, sink_tokens=0), tokens)
    expected = packed_by_definition(tokens, 4)
    # Scales are float16, so a number on the border between two codes may fall on the other side.
    assert ((kept - expected).abs() > 2e-2).double().mean() < 0.02
    assert (kept - tokens.keys).abs().mean() > 0.01


def test_an_outlier_channel_is_spread_and_spoils_little():
    tokens = some(200)
    plain = normal(B, K, 200, D)
    plain[..., 5] += 60
    plain[..., 9] -= 40
    keys = ROTARY.rotate(plain, POSITIONS[..., :200])
    method = RotateKV(sink_tokens=0, bits=3, group_size=8)
    kept, _ = stored(method, Tokens(keys, tokens.values, tokens.positions, tokens.inputs))
    back = ROTARY.unrotate(kept, POSITIONS[..., :200])
    others = [c for c in range(D) if c not in (5, 9)]
    error = (back - plain)[..., others].pow(2).mean()
    # Rounding keys as they are, in groups of the same size, loses the plain channels altogether.
    groups = plain.unflatten(-1, (-1, 8))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = (high - low) / 7
    naive = (((groups - low) / step).round() * step + low - groups).flatten(-2)[..., others].pow(2).mean()
    assert error < naive / 4


def test_tokens_of_massive_activations_are_exact_and_no_others():
    tokens = some(300)
    tokens.inputs[0, 0, 17, 3] = 500
    tokens.inputs[1, 0, 290, 4] = -500
    keys, values = stored(RotateKV(sink_tokens=1), tokens)
    for kept, given in ((keys, tokens.keys), (values, tokens.values)):
        exact = (kept == given).all(dim=-1).all(dim=1)
        assert exact.nonzero().tolist() == [[0, 17], [1, 290]]


def test_sinks_are_found_until_there_is_no_room():
    tokens = some(30)
    keys, _ = stored(RotateKV(sink_tokens=4), tokens, [3, 20, 7])
    exact = (keys == tokens.keys).all(dim=-1).all(dim=1)
    best = 3 + peaks(tokens.inputs)[:, 0, 3:23].argmax(dim=-1)
    for row in range(B):
        assert exact[row].nonzero().flatten().tolist() == [0, 1, 2, int(best[row])]


def test_positions_of_survivors_are_kept():
    tokens = some(100).gather(torch.arange(0, 100, 3).expand(B, 1, -1))
    place = PLACE.but(consecutive=False)
    kept, _ = stored(RotateKV(bits=8, sink_tokens=0), tokens, place=place)
    assert (kept - tokens.keys).abs().max() < 0.05


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("consecutive", [True, False])
def test_bytes_are_as_predicted(bits, dtype, consecutive):
    method, place = RotateKV(bits=bits), PLACE.but(consecutive=consecutive)
    state = method.open(place)
    assert state.nbytes() == method.predict_bytes(0, place, B, dtype) == 0
    for count in (100, 1, 500, 27, 1):
        state.append(some(count, dtype=dtype))
        assert state.nbytes() == method.predict_bytes(state.tokens, place, B, dtype)


def test_heads_of_odd_sizes_are_rotated_in_smaller_blocks():
    layout = RotateKV().layout(LayerSizes(heads=6, key_dim=80, value_dim=96))
    assert (layout.keys.group, layout.values.group, layout.key_block, layout.value_block) == (120, 96, 16, 32)
    layout = RotateKV().layout(LayerSizes(heads=8, key_dim=128, value_dim=128))
    assert (layout.keys.group, layout.values.group, layout.key_block, layout.value_block) == (128, 128, 512, 128)


def test_a_calibration_orders_the_channels_of_the_whole_layer():
    model = tiny_model("llama")
    method = fitted(RotateKV(bits=3), model)
    cache = build_cache(model.config, store=method)
    order = cache.layers[0].place.tensors["order"]
    assert sorted(order.tolist()) == list(range(32))
    with use_cache_attention(model):
        model.generate(texts()[0], past_key_values=cache, max_new_tokens=3, do_sample=False)
    assert cache.nbytes() == cache_bytes(model.config, 98, store=method)
    assert cache.layers[0].state.order is None


@pytest.mark.parametrize("wrong", [{"bits": 9}, {"group_size": 0}, {"sink_tokens": -1}, {"head_group": 0}])
def test_impossible_parameters_are_refused(wrong):
    with pytest.raises(CompositionError) as caught:
        RotateKV(**wrong)
    assert caught.value.hint
