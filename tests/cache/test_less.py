"""LESS keeps a small sum of what is evicted, and trained maps let queries ask it."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

import pintpot
from pintpot import reference
from pintpot.cache import KIVI, LagKV, SnapKV, build_cache, cache_bytes, use_cache_attention
from pintpot.cache.cake import CAKE
from pintpot.cache.calibration import calibrate, sample_layer
from pintpot.cache.cascade import Cascade, LayerKeep
from pintpot.cache.defensivekv import output_weight
from pintpot.cache.dense import Dense
from pintpot.cache.evictions import PIECE_TOKENS, eviction_times
from pintpot.cache.feature_maps import Lesson, Training, key_features, query_features, train_maps
from pintpot.cache.h2o import H2O
from pintpot.cache.layer import CacheLayer
from pintpot.cache.less import LESS
from pintpot.core.errors import CompositionError, DataError
from pintpot.core.expression import parse
from pintpot.core.workload import Generate
from pintpot.jobs.assemble import Composition, dress
from pintpot.reference.data import held_out_tokens, tokenizer, training_text
from tests.architectures import tiny_config, tiny_model
from tests.cache.calibrating import fitted, texts
from tests.cache.layers import normal, read
from tests.cache.seeing import SCALING, B, D, H, K, place_of, tensors

torch.set_num_threads(1)
UNITS, RANK = 6, 3
SMALL = LESS(rank=RANK, hidden_units=UNITS, epochs=1, policy="lagkv(lag_tokens=16)")
KEEP = LagKV(lag_tokens=16, sink_tokens=2, kept_fraction=0.25)
MAPS = {
    "query_inner": normal(H, D, UNITS, seed=11),
    "query_outer": normal(H, UNITS, RANK, seed=12),
    "key_inner": normal(K, D, UNITS, seed=13),
    "key_outer": normal(K, UNITS, RANK, seed=14),
    "key_mix": normal(K, RANK, RANK, seed=15),
}


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


def features(states, side):
    """Features of one head's (T, D) in float64."""
    inner, outer = (MAPS[f"{side[0]}_{name}"][side[1]].double() for name in ("inner", "outer"))
    found = gelu(gelu(states @ inner) @ outer)
    return (found @ MAPS["key_mix"][side[1]].double() if side[0] == "key" else found).abs()


def filled(keep, query, keys, values, pieces, **more):
    layer = CacheLayer(Dense(), keep, place_of(tensors=MAPS), residue=SMALL, **more)
    start = 0
    for count in pieces:
        new = slice(start, start + count)
        out = read(layer, keys[:, :, new], values[:, :, new], query[:, :, new], scaling=SCALING)
        start += count
    return layer, out


def kept(layer, keys, b, k):
    """Which tokens of a head are held."""
    held = torch.cat([layer.stored.whole()[0], layer.pending.view(0).keys], dim=2)[b, k]
    return (keys[b, k][:, None] == held).all(dim=-1).any(dim=-1)


@pytest.mark.parametrize("keep", [KEEP, H2O(recent_tokens=16, chunk_tokens=8)], ids=str)
def test_evicted_tokens_answer_by_their_features_and_kept_ones_exactly(keep):
    query, keys, values = tensors(100)
    layer, _ = filled(keep, query[:, :, :99], keys[:, :, :99], values[:, :, :99], [60, 20, 19])
    seen = {
        (b, k): torch.cat([kept(layer, keys[:, :, :99], b, k), torch.tensor([True])])
        for b in range(B)
        for k in range(K)
    }
    out = read(layer, keys[:, :, 99:], values[:, :, 99:], query[:, :, 99:], scaling=SCALING)
    for b in range(B):
        for h in range(H):
            k = h * K // H
            asked = query[b, h, 99].double()
            exact = (keys[b, k].double() @ asked * SCALING).exp()
            told = features(keys[b, k].double(), ("key", k)) @ features(asked[None], ("query", h))[0]
            weights = torch.where(seen[b, k], exact, told)
            expected = weights @ values[b, k].double() / weights.sum()
            assert not seen[b, k].all()
            torch.testing.assert_close(out[b, 0, h].double(), expected, rtol=1e-4, atol=1e-5)


TRAINED_WITH = [
    KEEP,
    SnapKV(window_tokens=8, chunk_tokens=16),
    CAKE(window_tokens=8, chunk_tokens=16),
    H2O(recent_tokens=16, chunk_tokens=16),
]


@pytest.mark.parametrize("keep", TRAINED_WITH, ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_what_is_trained_is_what_is_used(keep, name):
    model = tiny_model(name)
    sample = sample_layer(model, texts(1)[0].repeat(2, 1), 0)
    lesson = Lesson(sample, eviction_times(keep, sample), output_weight(sample.module).float())
    assert lesson.evicts
    maps = train_maps([lesson], Training(RANK, UNITS, 1, 1e-3, 0.3), torch.Generator().manual_seed(0))
    maps = {**maps, "key_mix": maps["key_mix"] * 1e4}
    place = sample.place.but(tensors=maps, consecutive=False)
    cascade = Cascade(keep, 1, 1) if isinstance(keep, LayerKeep) else None
    layer, outs = CacheLayer(Dense(), keep, place, residue=SMALL, cascade=cascade), []
    for start in range(0, sample.keys.shape[2], PIECE_TOKENS):
        new = slice(start, start + PIECE_TOKENS)
        handle, _ = layer.update(sample.keys[:, :, new], sample.values[:, :, new])
        outs.append(layer.attend(handle, replace(sample.call, query=sample.queries[:, :, new], mask=None)))
    rows = slice(0, sample.keys.shape[2])
    torch.testing.assert_close(
        torch.cat(outs, dim=1).flatten(2) @ lesson.output, lesson.outputs(rows, maps, lesson.features(maps))
    )


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_lessons_want_what_the_model_gives_in_full(softcap):
    model = tiny_model("llama")
    sample = sample_layer(model, texts(1)[0], 1)
    sample = replace(sample, call=replace(sample.call, softcap=softcap, sinks=normal(sample.queries.shape[1])))
    lesson = Lesson(sample, eviction_times(KEEP, sample), output_weight(sample.module))
    heads = sample.keys.shape[1]
    scores = sample.queries.double().unflatten(1, (heads, -1)) @ sample.keys.double()[:, :, None].mT
    scores = scores * sample.call.scaling
    scores = scores if softcap is None else (scores / softcap).tanh() * softcap
    scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
    sinks = sample.call.sinks.double().reshape(heads, -1, 1, 1).expand(*scores.shape[:-1], 1)
    weights = torch.cat([scores, sinks], dim=-1).softmax(dim=-1)[..., :-1]
    out = (weights @ sample.values.double()[:, :, None]).flatten(1, 2).transpose(1, 2).flatten(2)
    expected = out @ lesson.output.double()
    rows, wanted = lesson.wanted[0]
    torch.testing.assert_close(wanted.double(), expected[:, rows], rtol=1e-4, atol=1e-6)
    assert rows.start == lesson.first < 96


def test_times_are_those_of_eviction():
    sample = sample_layer(tiny_model("llama"), texts(1)[0], 0)
    times = eviction_times(KEEP, sample)
    # Two sinks, then chunks of 16 of which 4 stay, decided on when the one behind them has come: two of them when 64
    # tokens have been seen, and two with the last token, which nobody can miss any more.
    assert (times[..., :2] == 96).all()
    assert (times[..., 34:] == 96).all()
    assert ((times[..., 2:34].unflatten(-1, (2, 16)) == 64).sum(dim=-1) == 12).all()


def test_training_brings_the_reference_model_nearer_to_its_full_cache():
    model = AutoModelForCausalLM.from_pretrained(reference.path(), dtype=torch.float32)
    ids = torch.tensor(tokenizer().encode(training_text()[:10_000]).ids)
    policy = "lagkv(kept_fraction=0.1, lag_tokens=8)"
    method = LESS(hidden_units=64, policy=policy, epochs=8, learning_rate=1e-2, dropout=0.0)
    trained = fitted(method, model, list(ids[: 8 * 128].view(4, 2, 128)))
    text = torch.from_numpy(held_out_tokens()[: 4 * 128]).long().view(4, 128)

    def outputs(**parts):
        """Logits and the hidden states behind each layer, of the second half of the text."""
        cache = build_cache(model.config, **parts)
        with torch.no_grad(), use_cache_attention(model):
            found = [model(t, past_key_values=cache, output_hidden_states=True) for t in text.split(16, dim=1)]
        logits = torch.cat([out.logits for out in found], dim=1)[:, 64:].log_softmax(dim=-1)
        hidden = torch.stack(
            [torch.cat(states, dim=1) for states in zip(*(o.hidden_states for o in found), strict=True)]
        )
        return logits, hidden[1:, :, 64:]

    full, keep = outputs(), parse(policy)[0]
    less, without = (outputs(keep=keep, **more) for more in ({"residue": trained}, {}))
    near, far = ((found[1] - full[1]).square().sum(dim=(1, 2, 3)) for found in (less, without))
    assert (near < 0.95 * far).all()
    assert near[0] < 0.4 * far[0]
    near, far = (float((full[0].exp() * (full[0] - found[0])).sum(dim=-1).mean()) for found in (less, without))
    assert near < 0.96 * far


def test_training_in_parts_is_training_at_once(monkeypatch):
    sample = sample_layer(tiny_model("llama"), texts(1)[0], 0)
    found = []
    for at_once in (1 << 20, 4 * 96 * 10):
        monkeypatch.setattr("pintpot.cache.feature_maps.SCORES_AT_ONCE", at_once)
        lesson = Lesson(sample, eviction_times(KEEP, sample), output_weight(sample.module))
        found.append(train_maps([lesson], Training(RANK, UNITS, 3, 1e-3, 0.0), torch.Generator().manual_seed(0)))
        parts = len(lesson.wanted)
    assert parts > 2
    for whole, part in zip(*(maps.values() for maps in found), strict=True):
        torch.testing.assert_close(part, whole, rtol=1e-3, atol=1e-5)


def test_fitting_is_deterministic_and_leaves_no_trace():
    model, state = tiny_model("llama"), torch.get_rng_state()
    first, second = (replace(SMALL, epochs=2).fit(model, texts()) for _ in range(2))
    other = replace(SMALL, epochs=2, seed=1).fit(model, texts())
    assert all(torch.equal(a[name], b[name]) for a, b in zip(first, second, strict=True) for name in a)
    assert not torch.equal(first[0]["key_inner"], other[0]["key_inner"])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_state_stays_as_small_as_it_is(dtype):
    model = tiny_model("llama", dtype=dtype)
    less = fitted(SMALL, model)
    cache = build_cache(model.config, keep=KEEP, residue=less)
    sizes = cache.layers[0].place.sizes
    with torch.no_grad(), use_cache_attention(model):
        for seen in (40, 240, 440):
            count = seen - cache.get_seq_length()
            model(
                torch.randint(3, 256, (2, count), generator=torch.Generator().manual_seed(seen)), past_key_values=cache
            )
            assert cache.nbytes() == cache_bytes(model.config, seen, batch=2, dtype=dtype, keep=KEEP, residue=less)
            held = sum(t.nbytes for layer in cache.layers for t in layer.remains.tensors())
            assert held == 2 * len(cache.layers) * sizes.heads * RANK * (sizes.value_dim + 1) * 4
    assert all((layer.remains.norm > 0).any() for layer in cache.layers)


def test_shapes_alone_are_enough():
    less = fitted(SMALL, tiny_model("llama"))
    config = tiny_config("llama")
    parts = {"keep": CAKE(window_tokens=8), "store": KIVI(residual_length=32), "residue": less}
    with FakeTensorMode():
        model = tiny_model("llama")
        cache = build_cache(config, **parts)
        with use_cache_attention(model), torch.no_grad():
            model(torch.zeros(2, 150, dtype=torch.int64), past_key_values=cache)
            model(torch.zeros(2, 1, dtype=torch.int64), past_key_values=cache)
        assert cache.nbytes() == cache_bytes(config, 151, batch=2, **parts)


@pytest.mark.parametrize("beams", [1, 3])
def test_padded_batches_and_beams_are_those_of_each_sequence_alone(beams):
    model = tiny_model("llama")
    parts = {"keep": KEEP, "residue": fitted(SMALL, model)}
    long, short = (torch.randint(3, 256, (1, n), generator=torch.Generator().manual_seed(n)) for n in (90, 60))
    padded = torch.cat([long, torch.cat([torch.zeros(1, 30, dtype=torch.int64), short], dim=1)])
    mask = torch.ones(2, 90, dtype=torch.int64)
    mask[1, :30] = 0
    settings = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False, "num_beams": beams, "pad_token_id": 0}

    def generate(ids, **more):
        with use_cache_attention(model):
            cache = build_cache(model.config, **parts)
            return model.generate(ids, past_key_values=cache, **settings, **more), cache

    together, cache = generate(padded, attention_mask=mask)
    for row, ids in enumerate((long, short)):
        assert torch.equal(together[row, -40:], generate(ids)[0][0, -40:])
    assert cache.nbytes() <= cache_bytes(model.config, 129, batch=2 * beams, **parts)


def test_a_budget_counts_it():
    model = tiny_model("llama")
    less = fitted(SMALL, model)
    cache = build_cache(model.config, keep=KEEP, residue=less, budget_bytes=120_000, tokens=600)
    with torch.no_grad(), use_cache_attention(model):
        for piece in torch.randint(3, 256, (1, 600), generator=torch.Generator().manual_seed(0)).split(200, dim=1):
            model(piece, past_key_values=cache)
            assert cache.nbytes() <= 120_000


def test_the_users_way(tmp_path):
    model = tiny_model("llama")
    calibrate(model, parse(str(SMALL))[0], texts()).write(tmp_path / "less.safetensors")
    written = f"lagkv(lag_tokens=16)*kivi4*{replace(SMALL, calibration=str(tmp_path / 'less.safetensors'))}"
    live = dress(model, Composition.of(parse(written), "generate"), Generate(batch=1, prompt_tokens=96, new_tokens=8))
    assert all(layer.residue.name == "less" for layer in live.cache().layers)
    cache = pintpot.cache(model, written)
    out = model.generate(texts(1)[0], past_key_values=cache, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert out.shape == (1, 104)
    assert all(float(layer.remains.norm.sum()) > 0 for layer in cache.layers)


def test_without_a_keep_there_is_nothing_to_be_done():
    model = tiny_model("llama")
    less = fitted(SMALL, model)
    for parts in ({}, {"store": KIVI()}):
        with pytest.raises(CompositionError, match="without a technique of the keep part"):
            build_cache(model.config, residue=less, **parts)
    for text in (str(less), f"{less}*kivi"):
        with pytest.raises(CompositionError, match="without a technique of the keep part"):
            pintpot.cache(model, text)


def test_what_cannot_be():
    with pytest.raises(CompositionError, match="calibrated"):
        build_cache(tiny_config("llama"), keep=KEEP, residue=LESS())
    with pytest.raises(CompositionError, match="kivi is none"):
        LESS(policy="kivi").fit(tiny_model("llama"), texts())
    with pytest.raises(DataError, match="evicts nothing"):
        LESS().fit(tiny_model("llama"), texts())
    for wrong in ({"rank": 0}, {"hidden_units": 0}, {"epochs": 0}, {"dropout": 1.0}):
        with pytest.raises(CompositionError, match="cannot train"):
            LESS(**wrong)


def test_features_of_half_the_width_are_those_of_the_whole():
    query, keys, _ = tensors(5)
    half = {name: held.bfloat16() for name, held in MAPS.items()}
    torch.testing.assert_close(query_features(query, half), query_features(query, MAPS), rtol=0.1, atol=0.3)
    assert (key_features(keys, MAPS) >= 0).all()
