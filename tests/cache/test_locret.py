"""Locret trains heads to foresee how much later text will want each token."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pintpot.cache import KIVI, build_cache, cache_bytes, use_cache_attention
from pintpot.cache.calibration import sample_layer
from pintpot.cache.locret import Locret, features, lesson, retaining_scores
from pintpot.core.errors import CompositionError
from tests.architectures import tiny_config, tiny_model
from tests.cache.calibrating import fitted, texts
from tests.cache.layers import normal
from tests.cache.seeing import B, D, H, K, filled, place_of, tensors

torch.set_num_threads(1)
SMALL = {"stabilizer_tokens": 16, "hidden_units": 16, "training_steps": 4}
HEAD = {"inner": normal(16, (H + 2 * K) * D, seed=7), "outer": normal(K, 16, seed=8)}


def agreement(first, second):
    """Rank correlation over the tokens, the mean over heads."""
    ranks = [s.argsort(dim=-1).argsort(dim=-1).double() for s in (first, second)]
    return float(torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(*ranks, strict=True)]).mean())


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gemma2"])
def test_the_target_is_the_highest_score_that_the_rest_of_the_text_gives(name):
    model, text = tiny_model(name), texts(1)[0]
    sample = sample_layer(model, text, 0)
    given, wanted = lesson(sample, 0.25)
    before = 72
    heads = sample.keys.shape[1]
    queries = sample.queries[:, :, before:].double().unflatten(1, (heads, -1))
    scores = queries @ sample.keys[:, :, None, :before].double().mT * sample.call.scaling
    torch.testing.assert_close(wanted, scores.amax(dim=(2, 3)).mT.float(), rtol=1e-4, atol=1e-5)
    assert given.shape == (1, before, (sample.queries.shape[1] + 2 * heads) * sample.keys.shape[-1])
    plain = sample.unrotated_keys()[:, :, :before].transpose(1, 2).flatten(2)
    first = sample.queries.shape[1] * sample.keys.shape[-1]
    torch.testing.assert_close(given[..., first : first + plain.shape[-1]], plain)


def test_training_teaches_heads_to_rank_the_tokens_of_other_texts():
    model = tiny_model("gpt2")
    for index, layer in enumerate(model.transformer.h):
        # All queries look for something in common, which is what there is to learn.
        layer.attn.c_attn.weight.data *= 4
        layer.attn.c_attn.bias.data[:64] = 2 * normal(64, seed=index)
    method = Locret(hidden_units=32, training_steps=100, learning_rate=5e-3)
    first, second = method.fit(model, texts(4)), method.fit(model, texts(4))
    assert all(torch.equal(a[name], b[name]) for a, b in zip(first, second, strict=True) for name in a)
    unseen = torch.randint(3, 256, (1, 96), generator=torch.Generator().manual_seed(99))
    for index, head in enumerate(first):
        given, wanted = lesson(sample_layer(model, unseen, index), method.answer_fraction)
        assert agreement(retaining_scores(given, head)[0].T, wanted[0].T) > 0.85
        drawn = {name: torch.randn(w.shape, generator=torch.Generator().manual_seed(1)) for name, w in head.items()}
        assert agreement(retaining_scores(given, drawn)[0].T, wanted[0].T) < 0.4


def test_fitting_leaves_no_gradients_and_no_trace_in_the_global_generator():
    model = tiny_model("llama")
    state = torch.get_rng_state()
    with torch.no_grad():
        found = Locret(**SMALL).fit(model, texts())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(weight.requires_grad for head in found for weight in head.values())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("pieces", [[90], [40, 1, 1, 30, 18], [1] * 90])
def test_scores_are_of_each_token_alone_however_tokens_come(pieces, monkeypatch):
    monkeypatch.setattr("pintpot.cache.locret.SCORE_TOKENS", 32)
    method = Locret(stabilizer_tokens=26, kept_fraction=0.25, sink_tokens=0)
    query, keys, values = tensors(90)
    layer = filled(method, query, keys, values, pieces, place_of(tensors=HEAD))
    positions = torch.arange(90)[None, None]
    scores = retaining_scores(features(query, keys, values, positions, None), HEAD).mT
    best = scores[..., :64].topk(16).indices.sort().values
    kept, _ = layer.stored.whole()
    for b in range(B):
        for k in range(K):
            assert torch.equal(kept[b, k], keys[b, k][best[b, k]])
    torch.testing.assert_close(layer.pending.view(0).trace[..., 0], scores[..., 64:], rtol=1e-5, atol=1e-5)
    assert torch.equal(layer.pending.view(0).keys, keys[:, :, 64:])


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generate(name, dtype):
    model = tiny_model(name, dtype=dtype)
    keep = fitted(Locret(**SMALL), model)
    cache = build_cache(model.config, keep=keep, store=KIVI(bits=8))
    ids = torch.randint(3, 256, (2, 150), generator=torch.Generator().manual_seed(0))
    with use_cache_attention(model):
        out = model.generate(ids, past_key_values=cache, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert out.shape == (2, 154)
    assert cache.nbytes() == cache_bytes(model.config, 153, keep=keep, store=KIVI(bits=8), batch=2, dtype=dtype)


def test_shapes_alone_are_enough():
    keep = fitted(Locret(**SMALL), tiny_model("llama"))
    config = tiny_config("llama")
    with FakeTensorMode():
        model = tiny_model("llama")
        cache = build_cache(config, keep=keep)
        with use_cache_attention(model), torch.no_grad():
            model(torch.zeros(2, 150, dtype=torch.int64), past_key_values=cache)
            model(torch.zeros(2, 1, dtype=torch.int64), past_key_values=cache)
        assert cache.nbytes() == cache_bytes(config, 151, batch=2, keep=keep)


def test_one_calibration_serves_every_size():
    model = tiny_model("llama")
    keep = fitted(Locret(**SMALL), model)
    budget = cache_bytes(model.config, 300, keep=replace(keep, kept_fraction=0.3), reserve_tokens=300)
    cache = build_cache(model.config, keep=replace(keep, kept_fraction=1.0), budget_bytes=budget, tokens=300)
    assert 0.25 < cache.keep.kept_fraction <= 0.3
    with use_cache_attention(model), torch.no_grad():
        model(torch.randint(3, 256, (1, 300), generator=torch.Generator().manual_seed(0)), past_key_values=cache)
    assert cache.nbytes() <= budget
    with pytest.raises(CompositionError, match="was made for locret"):
        build_cache(model.config, keep=replace(keep, hidden_units=8))


def test_without_calibration_it_says_how_to_get_one():
    with pytest.raises(CompositionError, match="calibrated") as caught:
        build_cache(tiny_config("llama"), keep=Locret())
    assert "pintpot calibrate" in caught.value.hint


@pytest.mark.parametrize("wrong", [{"hidden_units": 0}, {"training_steps": 0}, {"answer_fraction": 1.0}])
def test_impossible_parameters_are_refused(wrong):
    with pytest.raises(CompositionError) as caught:
        Locret(**wrong)
    assert caught.value.hint
