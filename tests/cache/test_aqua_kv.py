"""AQUA-KV: what a layer holds is what the layer below could not tell, rounded."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pintpot.cache import KIVI, SnapKV, build_cache, cache_bytes, use_cache_attention
from pintpot.cache._base import LayerSizes, Place
from pintpot.cache.aqua_kv import DAMPING, AquaKV, regression
from pintpot.cache.higgs import code_bytes, decode, encode, group_of, normal_grid
from pintpot.cache.kvsharer import KVSharer
from pintpot.cache.predicted import heads_together
from pintpot.cache.rotary import Rotary
from pintpot.cache.tokens import Tokens
from pintpot.core.errors import CompositionError, DataError
from tests.architectures import tiny_config, tiny_model
from tests.cache.calibrating import calibrated
from tests.cache.test_stream import CALL, numbers

torch.set_num_threads(1)
B, K, D = 2, 2, 16
E = K * D
SIZES = LayerSizes(heads=K, key_dim=D, value_dim=D)
ROTARY = Rotary(1.0 / 10000 ** (torch.arange(0, D, 2) / D))


def normal(*sizes, seed=0):
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def linear(seed):
    """Maps as calibration gives them."""
    scale = E**-0.5
    return {
        "keys_weight": normal(E, E, seed=seed) * scale,
        "keys_offset": normal(E, seed=seed + 1),
        "values_weight": normal(E, 2 * E, seed=seed + 2) * scale,
        "values_offset": normal(E, seed=seed + 3),
    }


def layers(method, count=2, dtype=torch.float32, **changes):
    """The states of layers one above the other."""
    states = []
    for i in range(count):
        found = {"grid": normal_grid(method.bits if i else method.first_bits)} | (linear(10 * i) if i else {})
        below = None if not i else (lambda lower=states[-1]: lower)
        place = Place(
            SIZES, index=i, layers=count, rotary=ROTARY, tensors={k: t.to(dtype) for k, t in found.items()}, below=below
        )
        states.append(method.open(place.but(**changes)))
    return states


def given(count, tokens, dtype=torch.float32):
    return [[normal(B, K, tokens, D, seed=2 * i + j).to(dtype) for j in (0, 1)] for i in range(count)]


def fill(states, content, pieces):
    start = 0
    for piece in pieces:
        for state, (keys, values) in zip(states, content, strict=True):
            state.append(Tokens.consecutive(keys, values).part(start, start + piece))
        start += piece


def stored(states):
    """Keys and values of all layers, read from the lowest to the uppermost as a pass through the model does."""
    read = [[numbers(chunk) for chunk in list(state.chunks(CALL))] for state in states]
    return [[torch.cat(parts, dim=2) for parts in zip(*chunks, strict=True)] for chunks in read]


def error(back, real):
    return float((back.double() - real.double()).norm() / real.double().norm())


def test_the_grid_of_pairs_is_better_than_the_best_of_single_numbers():
    """Mean squared errors of Lloyd and Max for a normal number: 0.1175 at 2 bits, 0.03454 at 3, 0.009497 at 4."""
    x = normal(2000, 64)
    for bits, single in ((2, 0.1175), (3, 0.03454), (4, 0.009497)):
        grid = normal_grid(bits)
        codes, scale = encode(x, grid, torch.float32)
        assert codes.shape[-1] == code_bytes(64, bits) == 8 * bits
        assert float((decode(codes, scale, grid, 64) - x).square().mean()) < 0.95 * single
    assert normal_grid(2) is normal_grid(2)


def test_rounding_is_that_of_a_plain_reference():
    """Every pair of the transformed numbers takes the nearest grid point."""
    x, grid = normal(30, 96) * 7, normal_grid(3)
    assert group_of(96) == 32
    codes, scale = encode(x, grid, torch.float32)
    sylvester = torch.ones(1, 1, dtype=torch.float64)
    while len(sylvester) < 32:
        sylvester = torch.cat([torch.cat([sylvester, sylvester], 1), torch.cat([sylvester, -sylvester], 1)])
    sylvester /= 32**0.5
    groups = x.double().reshape(30, 3, 32)
    normed = (groups @ sylvester) / scale.double()[..., None]
    pairs = normed.reshape(-1, 2)
    nearest = grid.double()[torch.cdist(pairs, grid.double()).argmin(dim=-1)].reshape(30, 3, 32)
    expected = ((nearest * scale.double()[..., None]) @ sylvester).reshape(30, 96)
    torch.testing.assert_close(decode(codes, scale, grid, 96).double(), expected, rtol=1e-4, atol=1e-4)
    zeros = encode(torch.zeros(3, 32), grid, torch.float32)
    assert torch.equal(decode(*zeros, grid, 32), torch.zeros(3, 32))
    outlier = torch.zeros(1, 32)
    outlier[0, 5] = 1000.0
    assert error(decode(*encode(outlier, normal_grid(4), torch.bfloat16), normal_grid(4), 32), outlier) < 0.2


def test_a_layer_holds_the_residual_of_the_layer_below_as_it_comes_back():
    method = AquaKV(bits=3, sink_tokens=0, window_tokens=1)
    states, content = layers(method, count=3), given(3, 300)
    fill(states, content, [300])
    below = None
    for state, (keys, values), back in zip(states, content, stored(states), strict=True):
        found, grid = state.place.tensors, state.place.tensors["grid"]
        k = heads_together(ROTARY.unrotate(keys, torch.arange(300)[None, None])).double()
        v = heads_together(values).double()
        pk = 0.0 if below is None else below[0] @ found["keys_weight"].double().T + found["keys_offset"].double()
        k = pk + decode(*encode(k - pk, grid, torch.float32), grid, E).double()
        pv = 0.0
        if below is not None:
            pv = torch.cat([k, below[1]], -1) @ found["values_weight"].double().T + found["values_offset"].double()
        v = pv + decode(*encode(v - pv, grid, torch.float32), grid, E).double()
        below = (k, v)
        rotated = ROTARY.rotate(k.float().unflatten(2, (K, D)).transpose(1, 2), torch.arange(300)[None, None])
        assert error(back[0], rotated) < 1e-2
        assert error(back[1].transpose(1, 2).flatten(2), v) < 1e-2
        assert error(back[0], keys) < 0.35


def test_what_the_layer_below_tells_costs_no_precision():
    """The paper's idea: a layer that follows from the one below is had at one bit, which rounds any other away."""
    predicted, alone = (layers(AquaKV(bits=1, sink_tokens=0, window_tokens=1)) for _ in range(2))
    alone[1].place.tensors.update({name: torch.zeros_like(t) for name, t in linear(10).items()})
    (keys, values), _ = given(2, 256)
    found, positions = linear(10), torch.arange(256)[None, None]
    k = heads_together(ROTARY.unrotate(keys, positions)) @ found["keys_weight"].T + found["keys_offset"]
    v = torch.cat([k, heads_together(values)], dim=-1) @ found["values_weight"].T + found["values_offset"]
    upper = [ROTARY.rotate(k.unflatten(2, (K, D)).transpose(1, 2), positions), v.unflatten(2, (K, D)).transpose(1, 2)]
    errors = []
    for states in (predicted, alone):
        fill(states, [[keys, values], upper], [256])
        errors.append([error(back, real) for back, real in zip(stored(states)[1], upper, strict=True)])
    assert max(errors[0]) < 0.1 < 0.4 < min(errors[1])


def test_first_and_recent_tokens_are_exact_and_how_they_come_makes_no_difference():
    method, content = AquaKV(bits=2), given(3, 700)
    at_once, in_pieces = layers(method, count=3), layers(method, count=3)
    fill(at_once, content, [700])
    fill(in_pieces, content, [1, 2, 300, 1, 250, 127, *[1] * 19])
    assert at_once[0].packed.tokens == (700 - 4) // 128 * 128
    for one, other, (keys, values) in zip(stored(at_once), stored(in_pieces), content, strict=True):
        for a, b, real in zip(one, other, (keys, values), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
            assert torch.equal(a[:, :, :4], real[:, :, :4])
            assert torch.equal(a[:, :, 644:], real[:, :, 644:])
            assert error(a[:, :, 4:644], real[:, :, 4:644]) > 0.05


def test_what_is_handed_up_is_let_go_and_made_anew_when_it_is_wanted_again():
    states, content = layers(AquaKV(window_tokens=1), count=3), given(3, 520)
    fill(states, content, [520])
    first = stored(states)
    assert not any(state.fresh or state.reading for state in states)
    # The uppermost alone, from layers that have handed everything over.
    again = [torch.cat(parts, dim=2) for parts in zip(*map(numbers, states[2].chunks(CALL)), strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(first[2], again, strict=True))
    # A layer that is read twice before the one above.
    chunks = [list(states[0].chunks(CALL)) for _ in range(2)]
    assert all(one is other for one, other in zip(*(c[1:] for c in chunks), strict=True))


def test_tokens_after_eviction_have_their_own_positions():
    place = {"consecutive": False, "recent_tokens": 128}
    states, content = layers(AquaKV(bits=4, first_bits=4, sink_tokens=0), **place), given(2, 300)
    positions = torch.stack([torch.randperm(5000, generator=torch.Generator().manual_seed(i))[:300] for i in range(B)])
    positions = positions.sort(dim=-1).values[:, None]
    for state, (keys, values) in zip(states, content, strict=True):
        state.append(Tokens(keys, values, positions))
    for back, real in zip(stored(states), content, strict=True):
        assert error(back[0], real[0]) < 0.25
        assert error(back[1], real[1]) < 0.25


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("changes", [{}, {"consecutive": False, "recent_tokens": 100}])
def test_bytes_are_as_predicted(dtype, bits, changes):
    method = AquaKV(bits=bits)
    states, content = layers(method, dtype=dtype, **changes), given(2, 629, dtype)
    seen = 0
    for piece in (100, 1, 500, 27, 1):
        for state, (keys, values) in zip(states, content, strict=True):
            state.append(Tokens.consecutive(keys, values).part(seen, seen + piece))
        seen += piece
        for state in states:
            assert state.nbytes() == method.predict_bytes(seen, state.place, B, dtype)
    found = sum(t.numel() * t.element_size() for t in states[1].place.tensors.values())
    assert method.calibration_bytes(states[1].place, dtype) == found


def test_regression_is_damped_least_squares():
    x, y = [normal(2, 40, 6), normal(1, 30, 6, seed=1)], [normal(2, 40, 3, seed=2), normal(1, 30, 3, seed=3)]
    found = regression("keys", x, y)
    rows = torch.cat([a.flatten(0, 1) for a in x]).double()
    rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=torch.float64)], dim=-1)
    wanted = torch.cat([b.flatten(0, 1) for b in y]).double()
    damping = DAMPING * (rows.T @ rows).diagonal().mean()
    # Damping is the same as further rows of zero targets.
    more = torch.cat([rows, damping.sqrt() * torch.eye(7, dtype=torch.float64)])
    solution = torch.linalg.lstsq(more, torch.cat([wanted, torch.zeros(7, 3, dtype=torch.float64)])).solution
    torch.testing.assert_close(found["keys_weight"].double(), solution[:6].T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["keys_offset"].double(), solution[6], rtol=1e-4, atol=1e-5)


def test_fitting_predicts_better_than_nothing():
    model = tiny_model("llama")
    layer = AquaKV().fit(model, [torch.randint(3, 256, (1, 400), generator=torch.Generator().manual_seed(0))])[1]
    assert set(layer) == {"grid", "keys_weight", "keys_offset", "values_weight", "values_offset"}
    cache = build_cache(model.config)
    ids = torch.randint(3, 256, (1, 300), generator=torch.Generator().manual_seed(1))
    with use_cache_attention(model), torch.no_grad():
        model(ids, past_key_values=cache)
    values = [heads_together(cache.layers[i].stored.whole()[1]) for i in (0, 1)]
    rotary = Rotary(1.0 / 10000 ** (torch.arange(0, D, 2) / D))
    keys = heads_together(rotary.unrotate(cache.layers[1].stored.whole()[0], torch.arange(300)[None, None]))
    inputs = torch.cat([keys, values[0]], dim=-1)
    told = inputs @ layer["values_weight"].T + layer["values_offset"]
    assert error(told, values[1]) < error(torch.zeros_like(told), values[1])


@pytest.mark.parametrize("keep", [None, SnapKV(kept_fraction=0.5)], ids=str)
def test_end_to_end_with_generate_beams_and_a_padded_batch(keep):
    model = tiny_model("llama")
    store = calibrated(AquaKV(bits=4, window_tokens=16), model)
    ids = torch.randint(3, 256, (2, 110), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 110, dtype=torch.int64)
    mask[1, :40] = 0
    settings = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False, "num_beams": 2}

    def answer(ids, **options):
        cache = build_cache(model.config, keep=keep, store=store)
        with use_cache_attention(model):
            out = model.generate(ids, past_key_values=cache, **settings, **options)
        return out[:, -9:], cache.nbytes()

    together, _ = answer(ids, attention_mask=mask)
    alone = [answer(ids[:1]), answer(ids[1:, 40:])]
    assert torch.equal(together, torch.cat([out for out, _ in alone]))
    assert alone[0][1] == cache_bytes(model.config, 118, keep=keep, store=store, batch=2)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_four_bits_change_logits_little(name):
    model = tiny_model(name)
    store = calibrated(AquaKV(bits=4, window_tokens=16), model)
    ids = torch.randint(3, 256, (2, 200), generator=torch.Generator().manual_seed(0))
    exact, packed = build_cache(model.config), build_cache(model.config, store=store)
    with torch.no_grad(), use_cache_attention(model):
        for piece in ids.split(70, dim=1):
            difference = model(piece, past_key_values=exact).logits - model(piece, past_key_values=packed).logits
            assert difference.abs().max() < 0.05


def test_shapes_alone_are_enough():
    store = calibrated(AquaKV(), tiny_model("llama"))
    with FakeTensorMode():
        model = tiny_model("llama")
        cache = build_cache(model.config, store=store, keep=SnapKV())
        with use_cache_attention(model), torch.no_grad():
            for count in (200, 1):
                model(torch.zeros(1, count, dtype=torch.int64), past_key_values=cache)
        assert cache.nbytes() == cache_bytes(model.config, 201, store=store, keep=SnapKV())


@pytest.mark.parametrize("wrong", [{"bits": 5}, {"first_bits": 0}, {"sink_tokens": -1}, {"window_tokens": 0}])
def test_impossible_parameters_are_refused(wrong):
    with pytest.raises(CompositionError) as caught:
        AquaKV(**wrong)
    assert caught.value.hint


def test_what_it_cannot_do_is_refused(tmp_path):
    model = tiny_model("llama")
    with pytest.raises(CompositionError, match="calibrated") as caught:
        build_cache(model.config, store=AquaKV())
    assert "pintpot calibrate" in caught.value.hint
    with pytest.raises(DataError):
        build_cache(model.config, store=AquaKV(calibration=str(tmp_path / "none")))
    store = calibrated(AquaKV(), model)
    with pytest.raises(CompositionError, match="another model"):
        build_cache(tiny_config("qwen3"), store=store)
    with pytest.raises(CompositionError, match="every_layer"):
        build_cache(model.config, store=store, layers=KVSharer())
    states = layers(AquaKV(window_tokens=1))
    with pytest.raises(CompositionError, match="other tokens"):
        states[1].append(Tokens.consecutive(normal(B, K, 9, D), normal(B, K, 9, D)))


def test_fewer_bits_than_kivi_at_the_same_sizes():
    """2 bits and two bytes for 1,024 numbers, where KIVI has two scales for 32."""
    wide = Place(LayerSizes(heads=8, key_dim=128, value_dim=128), index=1, layers=2)
    sizes = {}
    for method in (AquaKV(bits=2), KIVI(bits=2)):
        sizes[method.name] = [method.predict_bytes(4 + 256 * n, wide, 1, torch.bfloat16) for n in (64, 128)]
    per_number = {name: (more - less) * 8 / (64 * 256 * 2048) for name, (less, more) in sizes.items()}
    assert per_number == {"aqua-kv": 2 + 16 / 1024, "kivi": 3.0}
