"""XQuant stores what attention is given, and makes keys and values from it by the model's own weights."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PersimmonConfig,
    PersimmonForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from pintpot.cache import SnapKV, build_cache, cache_bytes, use_cache_attention
from pintpot.cache._base import Call, LayerSizes, Place
from pintpot.cache.token_grid import TokenGrid
from pintpot.cache.xquant import XQuant, has_large_input
from pintpot.core.errors import CompositionError, UnsupportedModel
from pintpot.core.shape import ModelShape
from pintpot.core.work import PhaseWork, Work
from pintpot.core.workload import Generate
from tests.architectures import SIZES, tiny_config, tiny_model
from tests.cache.calibrating import calibrated, fitted

torch.set_num_threads(1)
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi", "gpt2", "opt", "mixtral", "phi3", "grouped")


def some_model(name, dtype=torch.float32):
    if name not in ("phi3", "grouped"):
        return tiny_model(name, dtype=dtype)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name == "phi3":
            return Phi3ForCausalLM(Phi3Config(**SIZES)).to(dtype).eval()
        config = LlamaConfig(**{**SIZES, "num_key_value_heads": 1}, attention_bias=True, dtype=dtype)
        model = LlamaForCausalLM(config).to(dtype).eval()
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.self_attn.k_proj.bias)
            torch.nn.init.normal_(layer.self_attn.v_proj.bias)
        return model


def prompt(count=150, batch=2, seed=0):
    return torch.randint(3, 256, (batch, count), generator=torch.Generator().manual_seed(seed))


def difference(model, store, keep=None, pieces=50, ids=None):
    """The greatest difference of logits from those of a dense cache, and the cache."""
    exact, cache = build_cache(model.config, keep=keep), build_cache(model.config, keep=keep, store=store)
    worst = 0.0
    with torch.no_grad(), use_cache_attention(model):
        for piece in (prompt() if ids is None else ids).split(pieces, dim=1):
            logits = model(piece, past_key_values=exact).logits
            worst = max(worst, float((logits - model(piece, past_key_values=cache).logits).abs().max()))
    return worst, cache


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_keys_and_values_are_made_again(name):
    model = some_model(name)
    store = calibrated(XQuant(bits=8, group_size=32), model)
    ids = prompt()
    if name == "mixtral":
        # A rounded input may send a token to other experts, which is no error of the cache's.
        assert difference(model, store)[1].nbytes() == cache_bytes(model.config, 150, store=store, batch=2)
        return
    worst, cache = difference(model, store, ids=ids)
    assert worst < 5e-3
    assert cache.nbytes() == cache_bytes(model.config, 150, store=store, batch=2)
    assert worst > 0


def test_what_is_stored_is_the_input_rounded_token_by_token():
    model = tiny_model("llama")
    given = []
    hook = model.model.layers[1].self_attn.register_forward_pre_hook(
        lambda _, args, kwargs: given.append(kwargs["hidden_states"]), with_kwargs=True
    )
    _, cache = difference(model, XQuant(bits=3, group_size=16), pieces=150)
    hook.remove()
    groups = given[-1].double().unflatten(-1, (-1, 16))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    expected = (((groups - low) / (high - low) * 7).round() * (high - low) / 7 + low).flatten(-2)
    held = cache.layers[1].stored.estimate(0, 150).squeeze(1)
    step = ((high - low) / 7).expand_as(groups).flatten(-2)
    assert ((held - expected).abs() < 2e-3).double().mean() > 0.99
    assert ((held - given[-1]).abs() <= 0.51 * step + 2e-3).all()


def test_the_input_of_a_model_without_shared_heads_takes_half_of_the_bytes_of_its_keys_and_values():
    sizes = LayerSizes(heads=32, key_dim=128, value_dim=128, query_heads=32, hidden=4096)
    taken = XQuant(bits=4).predict_bytes(4096, Place(sizes), 1, torch.float16)
    assert taken == sizes.dense_bytes(4096, 1, torch.float16) / 2 * (4 + 32 / 128) / 16


def test_a_large_input_is_stored_in_the_coordinates_of_its_projections():
    model = some_model("grouped")
    sizes = build_cache(model.config).layers[0].place.sizes
    assert has_large_input(sizes)
    store = fitted(XQuant(bits=8, group_size=32), model)
    cache = build_cache(model.config, store=store)
    found, weight = cache.layers[0].place.tensors, model.model.layers[0].self_attn.k_proj.weight.T
    torch.testing.assert_close(found["key_down"] @ found["key_up"], weight, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found["key_down"].T @ found["key_down"], torch.eye(16), rtol=1e-4, atol=1e-5)
    with pytest.raises(CompositionError, match="calibrated") as caught:
        build_cache(model.config, store=XQuant())
    assert "pintpot calibrate" in caught.value.hint


@pytest.mark.parametrize(("name", "dtype"), [("llama", torch.float16), ("grouped", torch.bfloat16)])
def test_half_precision_with_eviction(name, dtype):
    model = some_model(name, dtype)
    store, keep = calibrated(XQuant(group_size=32), model), SnapKV(window_tokens=8)
    cache = build_cache(model.config, keep=keep, store=store, dtype=dtype)
    with use_cache_attention(model):
        out = model.generate(prompt(200), past_key_values=cache, max_new_tokens=5, do_sample=False)
    assert out.shape[0] == 2
    tokens = out.shape[1] - 1
    assert cache.nbytes() == cache_bytes(model.config, tokens, keep=keep, store=store, batch=2, dtype=dtype)


@pytest.mark.parametrize("name", ["qwen3", "grouped"])
def test_survivors_are_turned_to_their_own_positions(name):
    model = some_model(name)
    keep = SnapKV(window_tokens=8, kept_fraction=0.25)
    store = calibrated(XQuant(bits=8, group_size=32), model)
    ids = prompt(200, batch=1)
    _, cache = difference(model, store, keep=keep, pieces=200, ids=ids)
    state = cache.layers[0].stored
    rows = state.positions if name == "grouped" else state.rows
    positions = rows.read(0, state.tokens)["positions"].flatten()
    assert (positions.diff() > 0).all()
    assert positions[-1] > state.tokens
    kept = torch.cat([c.keys() for c in state.chunks(call_of(model))], dim=2)
    with torch.no_grad(), use_cache_attention(model):
        dense = build_cache(model.config)
        model(ids, past_key_values=dense)
    expected = dense.layers[0].stored.whole()[0][:, :, positions.long()]
    assert (kept - expected).abs().max() < 0.02 * expected.abs().max()


def call_of(model):
    return Call(module=model.model.layers[0].self_attn, query=torch.zeros(1, 4, 1, 16))


def test_shapes_alone_are_enough():
    store = calibrated(XQuant(group_size=32), some_model("grouped"))
    config = some_model("grouped").config
    with FakeTensorMode():
        model = LlamaForCausalLM(config)
        cache = build_cache(config, store=store)
        with use_cache_attention(model), torch.no_grad():
            model(torch.zeros(2, 100, dtype=torch.int64), past_key_values=cache)
            model(torch.zeros(2, 1, dtype=torch.int64), past_key_values=cache)
        assert cache.nbytes() == cache_bytes(config, 101, store=store, batch=2)


def test_padded_sequences_are_cached_as_if_alone():
    model = tiny_model("llama")
    long, short = prompt(80, batch=1), prompt(50, batch=1, seed=1)
    padded = torch.cat([torch.zeros(1, 30, dtype=torch.int64), short], dim=1)
    mask = torch.ones(2, 80, dtype=torch.int64)
    mask[1, :30] = 0
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    with use_cache_attention(model):
        cache = build_cache(model.config, store=XQuant(bits=8))
        both = model.generate(torch.cat([long, padded]), attention_mask=mask, past_key_values=cache, **settings)
        alone = model.generate(short, past_key_values=build_cache(model.config, store=XQuant(bits=8)), **settings)
    assert torch.equal(both[1, -6:], alone[0, -6:])


def test_modules_of_other_kinds_are_refused_by_name_before_anything_is_stored():
    config = PersimmonConfig(**{**SIZES, "num_key_value_heads": 4})
    model = PersimmonForCausalLM(config).eval()
    cache = build_cache(config, store=XQuant())
    with (
        torch.no_grad(),
        use_cache_attention(model),
        pytest.raises(UnsupportedModel, match="PersimmonAttention") as caught,
    ):
        model(prompt(20), past_key_values=cache)
    assert caught.value.hint
    assert cache.nbytes() == 0


def test_a_module_that_makes_its_keys_in_another_way_is_refused():
    model = tiny_model("llama")
    layer = model.model.layers[1].self_attn
    layer.k_norm = torch.nn.LayerNorm(16)
    with torch.no_grad(), use_cache_attention(model), pytest.raises(UnsupportedModel, match="gives other keys"):
        model(prompt(20), past_key_values=build_cache(model.config, store=XQuant()))


def test_the_work_of_making_keys_again_is_counted():
    shape = ModelShape.from_config(tiny_config("llama"))
    workload = Generate(batch=1, prompt_tokens=1000, new_tokens=1)
    nothing = Work({"prefill": PhaseWork(), "decode": PhaseWork()})
    work = XQuant().work(nothing, shape, workload)
    assert work.phases["decode"].flops["float32"] == 2 * 1000 * 64 * 64 * 2


def test_groups_divide_the_input():
    assert TokenGrid.of(4, 128, 4096).group == 128
    assert TokenGrid.of(4, 128, 80).group == 80
    assert TokenGrid.of(2, 128, 576) == TokenGrid(2, 576, 96)
    assert math.isclose(TokenGrid.of(2, 128, 4096).token_bytes * 8 / 4096, 2.25)


@pytest.mark.parametrize("wrong", [{"bits": 9}, {"bits": 0}, {"group_size": 48}])
def test_impossible_parameters_are_refused(wrong):
    with pytest.raises(CompositionError) as caught:
        XQuant(**wrong)
    assert caught.value.hint
