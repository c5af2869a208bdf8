"""KIVI packs keys by channel and values by token, once, and keeps a window."""

import pytest
import torch

from pintpot.cache._base import LayerSizes, Place
from pintpot.cache.kivi import KIVI
from pintpot.cache.packed import BLOCK_TOKENS
from pintpot.cache.tokens import Tokens
from pintpot.core.errors import CompositionError
from tests.cache.test_stream import CALL, numbers

torch.set_num_threads(1)
B, K, D = 2, 2, 16
PLACE = Place(LayerSizes(heads=K, key_dim=D, value_dim=D))


def normal(tokens, seed=0, dtype=torch.float32):
    return torch.randn(B, K, tokens, D, generator=torch.Generator().manual_seed(seed)).to(dtype)


def stored(state):
    """All keys and values that a state stands for."""
    return [torch.cat(parts, dim=2) for parts in zip(*map(numbers, state.chunks(CALL)), strict=True)]


def worst(kept, given):
    return float((kept - given).abs().max())


def test_keys_survive_an_outlier_channel_and_values_an_outlier_token():
    keys, values = normal(512), normal(512, seed=1)
    keys[..., 3] *= 100
    values[:, :, 77] *= 100
    state = KIVI(bits=4, residual_length=0).open(PLACE)
    state.append(Tokens.consecutive(keys, values))
    kept_keys, kept_values = stored(state)
    plain_channels = [c for c in range(D) if c != 3]
    plain_tokens = [t for t in range(512) if t != 77]
    assert worst(kept_keys[..., plain_channels], keys[..., plain_channels]) < 0.4
    assert worst(kept_values[:, :, plain_tokens], values[:, :, plain_tokens]) < 0.4
    # The other way round, the outliers spoil what shares a scale with them.
    state = KIVI(bits=4, residual_length=0).open(PLACE)
    state.append(Tokens.consecutive(values, keys))
    kept_values, kept_keys = stored(state)
    assert worst(kept_keys[..., plain_channels], keys[..., plain_channels]) > 0.8
    assert worst(kept_values[:, :, plain_tokens], values[:, :, plain_tokens]) > 0.8


def test_the_window_is_exact_and_the_rest_is_packed():
    method = KIVI(bits=2, residual_length=64)
    state = method.open(PLACE)
    keys, values = normal(300), normal(300, seed=1)
    state.append(Tokens.consecutive(keys, values))
    kept_keys, kept_values = stored(state)
    assert state.packed_keys == 300 // 64 * 64
    assert state.packed_values == (300 - 64) // 32 * 32
    assert torch.equal(kept_keys[:, :, state.packed_keys :], keys[:, :, state.packed_keys :])
    assert torch.equal(kept_values[:, :, state.packed_values :], values[:, :, state.packed_values :])
    assert 300 - state.packed_values >= method.residual_length
    assert worst(kept_keys[:, :, : state.packed_keys], keys[:, :, : state.packed_keys]) > 0.1


def test_nothing_packed_is_packed_again():
    state = KIVI(bits=2, residual_length=32).open(PLACE)
    state.append(Tokens.consecutive(normal(200), normal(200, seed=1)))
    keys, values, blocks = state.packed_keys, state.packed_values, list(state.blocks)
    groups = keys // 32
    before = [
        (b.keys[:, :, :, :groups].clone(), b.key_scale[..., :groups].clone(), b.values[:, :, :values].clone())
        for b in blocks
    ]
    for step in range(200):
        state.append(Tokens.consecutive(normal(1, seed=step), normal(1, seed=1000 + step)))
    assert state.packed_keys > keys
    assert all(now is then for now, then in zip(state.blocks, blocks, strict=False))
    for block, (codes, scale, value_codes) in zip(blocks, before, strict=True):
        assert torch.equal(block.keys[:, :, :, :groups], codes)
        assert torch.equal(block.key_scale[..., :groups], scale)
        assert torch.equal(block.values[:, :, :values], value_codes)


@pytest.mark.parametrize("recent", [0, 20, 128])
def test_how_tokens_come_makes_no_difference(recent):
    keys, values = normal(613), normal(613, seed=1)
    at_once, in_pieces = (KIVI(bits=3, residual_length=96).open(PLACE.but(recent_tokens=recent)) for _ in range(2))
    at_once.append(Tokens.consecutive(keys, values))
    position = 0
    for count in [1, 7, 300, 1, 1, 250, *[1] * 53]:
        in_pieces.append(Tokens.consecutive(keys, values).part(position, position + count))
        position += count
    assert position == at_once.tokens == in_pieces.tokens
    for one, other in zip(stored(at_once), stored(in_pieces), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("recent", [0, 128])
def test_bytes_are_as_predicted(bits, dtype, recent):
    method = KIVI(bits=bits)
    state = method.open(PLACE.but(recent_tokens=recent))
    place = PLACE.but(recent_tokens=recent)
    assert state.nbytes() == method.predict_bytes(0, place, B, dtype) == 0
    for count in (100, 1, 500, 27, 1):
        state.append(Tokens.consecutive(normal(count, dtype=dtype), normal(count, dtype=dtype)))
        assert state.nbytes() == method.predict_bytes(state.tokens, place, B, dtype)


def test_a_number_takes_its_bits_and_its_share_of_a_scale():
    """Section 3: codes of 2 bits, and scale and zero of 16 bits for 32 numbers, make 3 bits a number."""
    sizes = LayerSizes(heads=8, key_dim=64, value_dim=64)
    method = KIVI(bits=2)
    more = method.predict_bytes(129 * BLOCK_TOKENS, Place(sizes), 1, torch.float16)
    less = method.predict_bytes(65 * BLOCK_TOKENS, Place(sizes), 1, torch.float16)
    assert more - less == sizes.dense_bytes(64 * BLOCK_TOKENS, 1, torch.float16) * 3 // 16


def test_constant_and_huge_numbers_stay_finite():
    state = KIVI(bits=2, residual_length=0).open(PLACE)
    keys = torch.full((B, K, 64, D), 3.0)
    values = normal(64) * 1e30
    state.append(Tokens.consecutive(keys, values))
    kept_keys, kept_values = stored(state)
    assert torch.equal(kept_keys, keys)
    assert kept_values.isfinite().all()


def test_odd_head_sizes_are_grouped_evenly():
    assert KIVI().layout(80).value_group == 20
    assert KIVI().layout(128).value_group == 32
    assert KIVI().layout(8).value_group == 8


@pytest.mark.parametrize("wrong", [{"bits": 9}, {"group_size": 48}, {"residual_length": 100}, {"bits": 0}])
def test_impossible_parameters_are_refused(wrong):
    with pytest.raises(CompositionError) as caught:
        KIVI(**wrong)
    assert caught.value.hint
