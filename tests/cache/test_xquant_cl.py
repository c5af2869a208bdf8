"""XQuant-CL stores what a layer's input adds to that of the layer below."""

from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, LlamaForCausalLM

from pintpot.cache import LagKV, build_cache, cache_bytes, use_cache_attention
from pintpot.cache._base import LayerSizes, Place
from pintpot.cache.tokens import Tokens
from pintpot.cache.xquant import XQuant
from pintpot.cache.xquant_cl import XQuantCL
from pintpot.core.errors import CompositionError
from tests.architectures import SIZES
from tests.cache.calibrating import calibrated, fitted
from tests.cache.test_xquant import difference, prompt

torch.set_num_threads(1)
B, K, D, HIDDEN = 2, 2, 8, 32
PLACE = Place(LayerSizes(K, D, D, 2, HIDDEN), layers=4)


def deep(heads=4):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_key_value_heads": heads, "num_hidden_layers": 4})).eval()


def normal(*sizes, seed=0):
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def stack(method, inputs, place=PLACE, tensors=({},) * 4):
    """States of layers on one another, each with its inputs (B, T, hidden)."""
    states = []
    for index, own in enumerate(inputs):
        below = partial(states.__getitem__, index - 1) if states else None
        states.append(method.open(place.but(index=index, tensors=tensors[index], below=below)))
        keys = torch.zeros(B, place.sizes.heads, own.shape[1], place.sizes.key_dim)
        states[-1].append(Tokens.consecutive(keys, keys, inputs=own[:, None]))
    return states


def similar(count=300, change=0.05):
    """Inputs of four layers, each a little different from the one below."""
    inputs = [normal(B, count, HIDDEN)]
    for seed in range(1, 4):
        inputs.append(inputs[-1] + change * normal(B, count, HIDDEN, seed=seed))
    return inputs


def test_small_differences_are_kept_by_few_bits_better_than_inputs_are():
    inputs = similar()
    states = stack(XQuantCL(bits=2, first_layers=1, first_bits=8), inputs)
    alone = XQuant(bits=2).open(PLACE)
    alone.append(Tokens.consecutive(torch.zeros(B, K, 300, D), torch.zeros(B, K, 300, D), inputs=inputs[3][:, None]))
    for state, own in zip(states[1:], inputs[1:], strict=True):
        error = (state.estimate(0, 300)[:, 0] - own).abs().max()
        assert error < 0.1
    assert (alone.estimate(0, 300)[:, 0] - inputs[3]).abs().max() > 0.5


def test_differences_are_to_what_is_held_below_so_that_errors_do_not_add_up():
    """Each layer stores its input less what the layer below gives, which holds that one's rounding too."""
    inputs = similar()
    states = stack(XQuantCL(bits=3, first_layers=1, first_bits=2), inputs)
    for below, state, own in zip(states, states[1:], inputs[1:], strict=False):
        wanted = own - below.estimate(0, 300)[:, 0]
        rounded = state.grid.unpack(state.rows.read(0, 300))[:, 0]
        step = (wanted.amax(-1, keepdim=True) - wanted.amin(-1, keepdim=True)) / 7
        assert ((rounded - wanted).abs() <= 0.51 * step + 1e-3).all()
        torch.testing.assert_close(state.estimate(0, 300)[:, 0], below.estimate(0, 300)[:, 0] + rounded)
    errors = [float((s.estimate(0, 300)[:, 0] - own).abs().mean()) for s, own in zip(states, inputs, strict=True)]
    assert errors[3] < errors[0] / 4


def test_the_first_layers_store_their_inputs():
    inputs = [normal(B, 50, HIDDEN, seed=seed) for seed in range(4)]
    states = stack(XQuantCL(bits=1, first_layers=3, first_bits=8), inputs)
    assert all((s.estimate(0, 50)[:, 0] - own).abs().max() < 0.02 for s, own in zip(states[:3], inputs, strict=False))
    assert (states[3].estimate(0, 50)[:, 0] - inputs[3]).abs().max() > 0.5


def test_only_what_projections_see_of_a_large_input_is_stored():
    narrow = PLACE.but(sizes=LayerSizes(1, 4, 4, 2, HIDDEN))
    bases = [{"down": torch.linalg.qr(normal(HIDDEN, 8, seed=9 + i))[0]} for i in range(4)]
    method, inputs = XQuantCL(bits=8, first_layers=1, first_bits=8), similar()
    states = stack(method, inputs, narrow, bases)
    for state, own, basis in zip(states, inputs, bases, strict=True):
        seen = state.estimate(0, 300)[:, 0] @ basis["down"]
        assert (seen - own @ basis["down"]).abs().max() < 0.05
        assert state.nbytes() == method.predict_bytes(300, state.place, B, torch.float32)
    assert states[0].grid.width == 8


@pytest.mark.parametrize("heads", [4, 1])
@pytest.mark.parametrize("keep", [None, LagKV(lag_tokens=16, sink_tokens=4)])
def test_end_to_end(heads, keep):
    model = deep(heads)
    store = calibrated(XQuantCL(bits=8, first_bits=8, first_layers=1, group_size=32), model)
    worst, cache = difference(model, store, keep=keep)
    assert cache.nbytes() == cache_bytes(model.config, 150, keep=keep, store=store, batch=2)
    if keep is None:
        assert worst < 5e-3
        settings = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": 2, "do_sample": False}
        with use_cache_attention(model):
            packed = model.generate(prompt(60), past_key_values=build_cache(model.config, store=store), **settings)
            exact = model.generate(prompt(60), past_key_values=build_cache(model.config), **settings)
        assert torch.equal(packed, exact)


def test_all_layers_hold_the_same_tokens():
    model = deep()
    keep = LagKV(lag_tokens=16, sink_tokens=4)
    _, cache = difference(model, XQuantCL(first_layers=1), keep=keep)
    states = [layer.stored for layer in cache.layers]
    positions = [s.rows.read(0, s.tokens)["positions"] for s in states]
    assert all(torch.equal(positions[0], other) for other in positions[1:])


def test_shapes_alone_are_enough():
    store = fitted(XQuantCL(first_layers=1, group_size=32), deep(1))
    config = deep(1).config
    with FakeTensorMode():
        model = LlamaForCausalLM(config)
        cache = build_cache(config, store=store)
        with use_cache_attention(model), torch.no_grad():
            model(torch.zeros(2, 100, dtype=torch.int64), past_key_values=cache)
            model(torch.zeros(2, 1, dtype=torch.int64), past_key_values=cache)
        assert cache.nbytes() == cache_bytes(config, 101, store=store, batch=2)


@pytest.mark.parametrize("wrong", [{"bits": 0}, {"first_layers": 0}, {"first_bits": 9}])
def test_impossible_parameters_are_refused(wrong):
    with pytest.raises(CompositionError) as caught:
        XQuantCL(**wrong)
    assert caught.value.hint
