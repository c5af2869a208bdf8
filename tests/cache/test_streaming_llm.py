"""StreamingLLM holds the first tokens and a window, at positions within the cache, however long the text."""

import pytest
import torch

from pintpot.cache import KIVI, build_cache, cache_bytes, use_cache_attention
from pintpot.cache.dense import Dense
from pintpot.cache.layer import CacheLayer
from pintpot.cache.rotary import Rotary
from pintpot.cache.streaming_llm import StreamingLLM
from pintpot.core.errors import BudgetError, CompositionError
from pintpot.core.shape import ModelShape
from pintpot.core.workload import Generate
from tests.architectures import tiny_config, tiny_model
from tests.cache.layers import read
from tests.cache.seeing import SCALING, D, H, K, place_of, tensors

torch.set_num_threads(1)
METHOD = StreamingLLM(window_tokens=24, sink_tokens=4, evicted_tokens=4)
ROTARY = Rotary(1.0 / 100.0 ** (torch.arange(0, D, 2) / D), scaling=1.1)
TOKENS = 120


def turned(states, positions):
    """The rotation by its definition, in float64."""
    angles = positions[:, None].double() * ROTARY.frequencies.double()
    cos, sin = angles.cos() * ROTARY.scaling, angles.sin() * ROTARY.scaling
    first, second = states.double().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def streamed_by_definition(query, keys, values, pieces):
    """Attention of pieces to what the cache holds when they come, with positions counted within the cache."""
    held, out, start = [], [], 0
    for count in pieces:
        new = list(range(start, start + count))
        seen = held + new
        positions = torch.arange(len(seen))
        rotated = turned(keys[:, :, seen], positions).repeat_interleave(H // K, dim=1)
        scores = turned(query[:, :, new], positions[-count:]) @ rotated.mT * SCALING
        later = positions > positions[-count:, None]
        weights = scores.masked_fill(later, -torch.inf).softmax(dim=-1)
        out.append(weights @ values[:, :, seen].double().repeat_interleave(H // K, dim=1))
        beyond = max(0, len(seen) - METHOD.sink_tokens - METHOD.window_tokens)
        gone = beyond // METHOD.evicted_tokens * METHOD.evicted_tokens
        held = seen[: METHOD.sink_tokens] + seen[METHOD.sink_tokens + gone :]
        start += count
    return torch.cat(out, dim=2).transpose(1, 2)


@pytest.mark.parametrize("store", [Dense(), KIVI(bits=8, residual_length=32)], ids=["dense", "kivi"])
@pytest.mark.parametrize("pieces", [[1] * TOKENS, [40] + [8] * 10], ids=["one by one", "in pieces"])
def test_attention_is_that_with_positions_within_the_cache(store, pieces):
    query, keys, values = tensors(TOKENS)
    where = torch.arange(TOKENS)
    rotated, asked = turned(keys, where).float(), turned(query, where).float()
    layer = CacheLayer(store, METHOD, place_of(rotary=ROTARY, recent_tokens=24))
    out, start = [], 0
    for count in pieces:
        new = slice(start, start + count)
        out.append(read(layer, rotated[:, :, new], values[:, :, new], asked[:, :, new], scaling=SCALING))
        start += count
    expected = streamed_by_definition(query, keys, values, pieces)
    torch.testing.assert_close(torch.cat(out, dim=1).double(), expected, rtol=1e-4, atol=1e-5)


def test_sinks_and_the_window_stay_and_the_size_does_not_grow():
    query, keys, values = tensors(400)
    layer = CacheLayer(Dense(), METHOD)
    sizes = set()
    for token in range(400):
        new = slice(token, token + 1)
        read(layer, keys[:, :, new], values[:, :, new], query[:, :, new])
        sizes.add(layer.nbytes())
        assert METHOD.held(token + 1).pending == layer.pending.tokens
        if token >= 60:
            assert METHOD.window_tokens <= layer.pending.tokens < METHOD.window_tokens + METHOD.evicted_tokens
    assert len(sizes) <= 2
    assert torch.equal(layer.stored.whole()[0], keys[:, :, :4])
    assert torch.equal(layer.pending.view(0).keys, keys[:, :, -layer.pending.tokens :])


@pytest.mark.parametrize("name", ["llama", "phi", "gemma3", "gpt2"])
def test_logits_are_exact_until_something_is_evicted_and_go_on_afterwards(name):
    model = tiny_model(name)
    ids = torch.randint(3, 256, (2, 150), generator=torch.Generator().manual_seed(0))
    cache, dense = build_cache(model.config, keep=METHOD), build_cache(model.config)
    with torch.no_grad(), use_cache_attention(model):
        differences = [
            (model(piece, past_key_values=cache).logits - model(piece, past_key_values=dense).logits).abs().max()
            for piece in ids.split(25, dim=1)
        ]
    assert max(differences[:2]) < 1e-4
    assert 0 < max(differences[2:]) < torch.inf
    assert cache.nbytes() == cache_bytes(model.config, 150, keep=METHOD, batch=2) < dense.nbytes()


def test_a_stream_goes_beyond_the_longest_context_of_the_model():
    model = tiny_model("llama")
    cache = build_cache(model.config, keep=METHOD)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), use_cache_attention(model):
        for _ in range(40):
            logits = model(torch.randint(3, 256, (1, 20), generator=generator), past_key_values=cache).logits
    assert cache.get_seq_length() == 800 > model.config.max_position_embeddings
    assert logits.isfinite().all()


def test_a_size_in_bytes_sets_the_window():
    config = tiny_config("llama")
    budget = cache_bytes(config, 400, keep=StreamingLLM(window_tokens=100), reserve_tokens=400)
    cache = build_cache(config, keep=StreamingLLM(), budget_bytes=budget, tokens=400)
    assert 100 - 16 < cache.keep.window_tokens <= 100
    with pytest.raises(BudgetError):
        build_cache(config, keep=StreamingLLM(), budget_bytes=1000, tokens=400)


def test_risk_rises_with_what_is_gone():
    shape = ModelShape.from_config(tiny_config("llama"))
    short, long = Generate(prompt_tokens=100, new_tokens=10), Generate(prompt_tokens=4000, new_tokens=10)
    assert StreamingLLM().risk(shape, short) == 0
    assert StreamingLLM().risk(shape, long) > 0


@pytest.mark.parametrize("wrong", [{"window_tokens": 0}, {"sink_tokens": -1}, {"evicted_tokens": 0}])
def test_impossible_parameters_are_refused(wrong):
    with pytest.raises(CompositionError) as caught:
        StreamingLLM(**wrong)
    assert caught.value.hint
