"""The cache as a whole: in generate, within a size, with clear refusals."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import DynamicCache, LlamaConfig

from pintpot.cache import (
    KIVI,
    LagKV,
    SnapKV,
    build_cache,
    cache_bytes,
    prefill_in_pieces,
    use_cache_attention,
)
from pintpot.cache.rotatekv import RotateKV
from pintpot.core.errors import BudgetError, CompositionError, ShapeError, UnsupportedModel
from tests.architectures import tiny_config, tiny_model

torch.set_num_threads(1)
COMPOSITIONS = {
    "dense": {},
    "kivi": {"store": KIVI(bits=4, residual_length=32)},
    "lagkv": {"keep": LagKV(lag_tokens=16, sink_tokens=4)},
    "both": {"keep": LagKV(lag_tokens=16, sink_tokens=4), "store": KIVI(bits=4)},
}


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def tokens(*sizes, seed=0):
    return torch.randint(3, 256, sizes, generator=torch.Generator().manual_seed(seed))


def generate(model, ids, cache, **options):
    torch.manual_seed(0)
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, **options}
    with use_cache_attention(model):
        return model.generate(ids, past_key_values=cache, **settings)


@pytest.mark.parametrize("name", COMPOSITIONS)
@pytest.mark.parametrize(
    "options",
    [{"do_sample": True, "top_k": 5}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}],
    ids=["sampling", "beams", "two answers"],
)
def test_generate_modes(model, name, options):
    ids = tokens(2, 90)
    cache = build_cache(model.config, **COMPOSITIONS[name])
    out = generate(model, ids, cache, **options)
    assert out.shape == (2 * options.get("num_return_sequences", 1), 98)
    assert torch.equal(out[0, :90], ids[0])
    assert cache.get_seq_length() == 97
    if name == "dense":
        expected = generate(model, ids, DynamicCache(config=model.config), **options)
        assert torch.equal(out, expected)


PADDED = {**COMPOSITIONS, "kivi8": {"store": KIVI(bits=8, residual_length=32)}, "snapkv": {"keep": SnapKV()}}


@pytest.mark.parametrize("name", PADDED)
@pytest.mark.parametrize("piece", [None, 25])
def test_left_padding_gives_what_each_sequence_gives_alone(model, name, piece):
    long, short = tokens(1, 80), tokens(1, 50, seed=1)
    padded = torch.cat([torch.zeros(1, 30, dtype=torch.int64), short], dim=1)
    mask = torch.ones(2, 80, dtype=torch.int64)
    mask[1, :30] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 60, "min_new_tokens": 60, "prefill_chunk_size": piece}
    cache = build_cache(model.config, **PADDED[name])
    together = generate(model, torch.cat([long, padded]), cache, **settings)
    for row, ids in enumerate((long, short)):
        # A piece's tokens see what was kept of earlier ones, so the pieces must be the same ones.
        alone = generate(model, ids, build_cache(model.config, **PADDED[name]), max_new_tokens=60, min_new_tokens=60)
        if piece is None or name == "dense":
            assert torch.equal(together[row, -60:], alone[0, -60:])
    dense = cache_bytes(model.config, 139, batch=2, **PADDED[name])
    assert cache.nbytes() <= dense


def test_beams_of_a_padded_batch_are_those_of_each_sequence_alone(model):
    long, short = tokens(1, 80), tokens(1, 50, seed=1)
    padded = torch.cat([torch.zeros(1, 30, dtype=torch.int64), short], dim=1)
    mask = torch.ones(2, 80, dtype=torch.int64)
    mask[1, :30] = 0
    settings = {"num_beams": 3, "max_new_tokens": 30, "min_new_tokens": 30}
    both = COMPOSITIONS["both"]
    together = generate(
        model, torch.cat([long, padded]), build_cache(model.config, **both), attention_mask=mask, **settings
    )
    for row, ids in enumerate((long, short)):
        alone = generate(model, ids, build_cache(model.config, **both), **settings)
        assert torch.equal(together[row, -30:], alone[0, -30:])


@pytest.mark.parametrize("name", ["kivi", "lagkv", "both"])
def test_pads_behind_tokens_are_refused_when_tokens_are_evicted_or_packed(model, name):
    mask = torch.ones(2, 80, dtype=torch.int64)
    mask[1, 60:] = 0
    with pytest.raises(CompositionError, match="behind tokens") as caught:
        generate(model, tokens(2, 80), build_cache(model.config, **COMPOSITIONS[name]), attention_mask=mask)
    assert "padding_side" in caught.value.hint


def test_another_models_cache_is_refused(model):
    cache = build_cache(tiny_config("qwen3"), store=KIVI())
    with pytest.raises(CompositionError, match="another model"):
        generate(model, tokens(1, 20), cache)


def test_a_second_cache_beside_ours_is_refused(model):
    with pytest.raises(ValueError, match="cache_implementation"):
        generate(model, tokens(1, 20), build_cache(model.config, store=KIVI()), cache_implementation="static")


@pytest.mark.parametrize("name", COMPOSITIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name, dtype):
    model = tiny_model("llama", dtype=dtype)
    cache = build_cache(model.config, **COMPOSITIONS[name])
    out = generate(model, tokens(1, 150), cache)
    assert out.shape == (1, 158)
    assert cache.nbytes() == cache_bytes(model.config, 157, dtype=dtype, **COMPOSITIONS[name])


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_more_turns_go_on_where_the_last_ended(model, name):
    first, second = tokens(1, 70), tokens(1, 40, seed=1)
    cache = build_cache(model.config, **COMPOSITIONS[name])
    with use_cache_attention(model), torch.no_grad():
        model(first, past_key_values=cache)
        logits = model(second, past_key_values=cache).logits
        expected = model(torch.cat([first, second], dim=1)).logits[:, 70:]
    assert cache.get_seq_length() == 110
    tolerance = 1e-4 if name == "dense" else 0.3
    assert (logits - expected).abs().max() < tolerance


@pytest.mark.parametrize("name", ["dense", "kivi"])
@pytest.mark.parametrize("piece", [5, 17, 64, 500])
def test_chunked_prefill_gives_what_prefill_gives(model, name, piece):
    ids = tokens(2, 130)
    whole, pieces = (build_cache(model.config, **COMPOSITIONS[name]) for _ in range(2))
    with use_cache_attention(model), torch.no_grad():
        expected = model(ids, past_key_values=whole).logits[:, -1]
        logits = prefill_in_pieces(model, ids, pieces, piece)
    tolerance = 1e-5 if name == "dense" else 0.05
    assert (logits - expected).abs().max() < tolerance
    assert pieces.nbytes() == whole.nbytes()


def test_chunked_prefill_with_padding(model):
    ids, mask = tokens(2, 60), torch.ones(2, 60, dtype=torch.int64)
    mask[1, :20] = 0
    with use_cache_attention(model):
        together = prefill_in_pieces(model, ids, build_cache(model.config), 25, attention_mask=mask)
        alone = prefill_in_pieces(model, ids[1:, 20:], build_cache(model.config), 25)
    # Rotary positions are relative, so the pads in front shift nothing.
    torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-5)
    with pytest.raises(ShapeError):
        prefill_in_pieces(model, ids, build_cache(model.config), 0)


@pytest.mark.parametrize("store", [None, KIVI(bits=2)])
def test_a_budget_is_never_exceeded(model, store):
    budget = cache_bytes(model.config, 400, keep=LagKV(kept_fraction=0.2, lag_tokens=32), store=store) + 100
    full = cache_bytes(model.config, 400, store=store)
    assert budget < full
    keep = LagKV(kept_fraction=1.0, lag_tokens=32)
    cache = build_cache(model.config, keep=keep, store=store, budget_bytes=budget, tokens=400)
    assert 0 < cache.keep.kept_fraction < 1
    more = LagKV(kept_fraction=(cache.keep.survivors + 1) / 32, lag_tokens=32)
    assert cache_bytes(model.config, 400, keep=more, store=store, reserve_tokens=400) > budget
    sizes = []
    with use_cache_attention(model), torch.no_grad():
        for start in range(0, 300, 50):
            prefill_in_pieces(model, tokens(1, 50, seed=start), cache, 20)
            sizes.append(cache.nbytes())
        for step in range(20):
            model(tokens(1, 5, seed=step), past_key_values=cache)
            sizes.append(cache.nbytes())
        assert max(sizes) <= budget
        with pytest.raises(BudgetError, match="sized for 400 tokens"):
            model(tokens(1, 1), past_key_values=cache)
    assert cache.get_seq_length() == 400


def test_a_budget_that_is_too_small_names_the_least(model):
    with pytest.raises(BudgetError) as caught:
        build_cache(model.config, keep=LagKV(), store=KIVI(), budget_bytes=1000, tokens=500)
    least = int(caught.value.message.split("(")[1].split(" bytes")[0])
    build_cache(model.config, keep=LagKV(), store=KIVI(), budget_bytes=least, tokens=500)
    with pytest.raises(BudgetError):
        build_cache(model.config, keep=LagKV(), store=KIVI(), budget_bytes=least - 1, tokens=500)


def test_more_sequences_than_the_budget_is_for_are_refused(model):
    cache = build_cache(model.config, keep=LagKV(), budget_bytes=1 << 20, tokens=300)
    with use_cache_attention(model), torch.no_grad(), pytest.raises(BudgetError, match="sequences"):
        model(tokens(2, 30), past_key_values=cache)


def test_without_our_attention_the_cache_says_so(model):
    cache = build_cache(model.config, store=KIVI())
    with pytest.raises(CompositionError, match="without Pintpot's attention") as caught:
        model(tokens(1, 30), past_key_values=cache)
    assert "use_cache_attention" in caught.value.hint
    with use_cache_attention(model), pytest.raises(CompositionError, match="incomplete"):
        model(tokens(1, 30), past_key_values=cache)
    cache.reset()
    with use_cache_attention(model), torch.no_grad():
        model(tokens(1, 30), past_key_values=cache)
    assert cache.get_seq_length() == 30


def test_attention_is_put_back(model):
    before = model.config._attn_implementation
    with pytest.raises(KeyboardInterrupt), use_cache_attention(model):
        assert model.config._attn_implementation == "pintpot_cache"
        raise KeyboardInterrupt
    assert model.config._attn_implementation == before


def test_attention_inside_attention_takes_nothing_away(model):
    """A store that is shown what attention is given goes on being shown it."""
    with use_cache_attention(model), torch.no_grad():
        with use_cache_attention(model):
            pass
        cache = build_cache(model.config, store=RotateKV(bits=4))
        model(tokens(1, 40), past_key_values=cache)
    assert cache.get_seq_length() == 40
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3"])
def test_our_attention_serves_other_caches_and_none(name):
    model, ids = tiny_model(name), tokens(2, 40)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        with use_cache_attention(model):
            torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-5)
            cache = DynamicCache(config=model.config)
            parts = [model(part, past_key_values=cache).logits for part in ids.split(15, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-4, atol=1e-5)


def test_crop_reset_and_batch_changes(model):
    cache = build_cache(model.config)
    ids = tokens(2, 60)
    with use_cache_attention(model), torch.no_grad():
        model(ids, past_key_values=cache)
        cache.crop(-20)
        assert cache.get_seq_length() == 40
        again = model(ids[:, 40:], past_key_values=cache).logits[:, -1]
        expected = model(ids, use_cache=False).logits[:, -1]
        torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-5)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0, 3]))
        cache.reorder_cache(torch.tensor([1, 0]))
        swapped = model(ids[[1, 0], :1], past_key_values=cache).logits
        expected = model(torch.cat([ids[[1, 0]], ids[[1, 0], :1]], dim=1), use_cache=False).logits[:, -1:]
        torch.testing.assert_close(swapped, expected, rtol=1e-4, atol=1e-5)
    assert cache.is_croppable
    cache.reset()
    assert cache.get_seq_length() == cache.nbytes() == 0


@pytest.mark.parametrize("name", ["kivi", "lagkv", "both"])
def test_crop_of_what_is_gone_is_refused(model, name):
    cache = build_cache(model.config, **COMPOSITIONS[name])
    with use_cache_attention(model), torch.no_grad():
        model(tokens(1, 60), past_key_values=cache)
    assert not cache.is_croppable
    with pytest.raises(CompositionError, match="crop"):
        cache.crop(-1)
    cache.crop(0)


def test_shapes_alone_are_enough():
    config = tiny_config("llama")
    with FakeTensorMode():
        model = tiny_model("llama")
        for composition in COMPOSITIONS.values():
            cache = build_cache(config, **composition)
            with use_cache_attention(model), torch.no_grad():
                model(torch.zeros(2, 222, dtype=torch.int64), past_key_values=cache)
                for _ in range(7):  # enough to pack a group and to evict a chunk
                    model(torch.zeros(2, 1, dtype=torch.int64), past_key_values=cache)
            assert cache.nbytes() == cache_bytes(config, 229, batch=2, **composition)


def test_models_that_such_caches_are_not_for():
    for name in ("mamba", "t5"):
        with pytest.raises(UnsupportedModel) as caught:
            build_cache(tiny_config(name))
        assert caught.value.hint
    with pytest.raises(CompositionError, match="would change nothing"):
        build_cache(tiny_config("mistral"), store=KIVI())


def test_eager_models_get_soft_capping_right():
    """Gemma 2's scores are capped, which fused attention cannot do: the cap must matter, and be honoured."""
    model = tiny_model("gemma2")
    model.config.attn_logit_softcapping = 0.01
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = 0.01
    ids = tokens(1, 60)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        with use_cache_attention(model):
            capped = model(ids, past_key_values=build_cache(model.config)).logits
    torch.testing.assert_close(capped, expected, rtol=1e-4, atol=1e-5)


def test_deep_config_is_sized_in_no_time_and_for_each_layer():
    config = LlamaConfig(num_hidden_layers=80, hidden_size=8192, num_attention_heads=64, num_key_value_heads=8)
    dense = cache_bytes(config, 4096, dtype=torch.bfloat16)
    assert dense == 80 * 2 * 8 * 128 * 4096 * 2
    packed = cache_bytes(config, 4096, store=KIVI(bits=2, residual_length=0), dtype=torch.bfloat16)
    assert packed == pytest.approx(dense * 3 / 16, rel=0.05)
