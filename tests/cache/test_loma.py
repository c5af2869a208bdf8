"""LoMA: zones are read, remembered and forgotten, and a memory can be trained to give its zone back."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from pintpot.cache import build_cache
from pintpot.cache.conversions.loma import LoMA
from pintpot.cache.conversions.memory import MEMORY, READING, REPETITION, Layout, MemoryConfig
from pintpot.core.errors import CompositionError, ShapeError
from tests.cache.sources import source, tokens

torch.set_num_threads(1)
METHOD = LoMA(memory_tokens=2, compression_ratio=3)
CONFIG = MemoryConfig(memory_tokens=2, compression_ratio=3)


def layout_of(count, *, repeat):
    return Layout.of(count, CONFIG, repeat=repeat, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def model():
    made = METHOD.convert(source("llama"), [])
    with torch.no_grad():
        made.special_tokens.weight.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
    return made


def test_every_zone_is_followed_by_its_memory_and_its_repetition():
    layout = layout_of(14, repeat=True)
    r, m, again = READING, MEMORY, REPETITION
    assert layout.kind.tolist() == [*[r] * 6, m, m, *[again] * 6, *[r] * 6, m, m, *[again] * 6, r, r]
    assert layout.position.tolist() == [
        *range(6), 2, 5, *range(6), *range(6, 12), 8, 11, *range(6, 12), 12, 13
    ]  # fmt: skip
    assert layout_of(12, repeat=False).kind.tolist() == [*[r] * 6, m, m, *[r] * 6]
    assert layout.places[MEMORY].tolist() == [6, 7, 20, 21]


def test_the_mask_says_who_sees_whom():
    layout = layout_of(14, repeat=True)
    mask = layout.mask(torch.float32)[0, 0]
    rows = list(zip(layout.kind.tolist(), layout.zone.tolist(), layout.position.tolist(), strict=True))
    for i, (kind, zone, position) in enumerate(rows):
        for j, (other_kind, other_zone, other_position) in enumerate(rows):
            if kind == READING:
                sees = (other_kind == READING and zone == other_zone and other_position <= position) or (
                    other_kind == MEMORY and other_zone < zone
                )
            elif kind == MEMORY:
                sees = zone == other_zone and other_kind in (READING, MEMORY)
            else:
                sees = zone == other_zone and (
                    other_kind == MEMORY or (other_kind == REPETITION and other_position <= position)
                )
            assert (mask[i, j] == 0) == sees, (i, j)


@torch.no_grad()
def test_of_a_full_zone_only_its_memory_is_held(model):
    cache = DynamicCache(config=model.config)
    held = []
    for token in tokens(2, 15).split(1, dim=1):
        model(token, past_key_values=cache, use_cache=True)
        held.append(cache.layers[0].keys.shape[2])
    assert held == [1, 2, 3, 4, 5, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7]
    assert cache.get_seq_length() == 15
    kept = cache.layers[0].keys
    assert kept.untyped_storage().nbytes() == kept.numel() * 4


@torch.no_grad()
def test_what_comes_later_sees_a_zone_through_its_memory_alone(model):
    first, other, rest = tokens(1, 6), tokens(1, 6, seed=1), tokens(1, 5, seed=2)
    caches = [DynamicCache(config=model.config) for _ in range(3)]
    for zone, cache in zip((first, other, other), caches, strict=True):
        model(zone, past_key_values=cache, use_cache=True)
    for given, taken in zip(caches[0].layers, caches[2].layers, strict=True):
        taken.keys, taken.values = given.keys, given.values
    logits = [model(rest, past_key_values=cache, use_cache=True).logits for cache in caches]
    assert (logits[0] - logits[1]).abs().max() > 1e-3
    assert torch.equal(logits[0], logits[2])


def test_beams_and_resets_work_and_cropping_does_not(model):
    written = model.generate(tokens(1, 10), max_new_tokens=6, min_new_tokens=6, num_beams=2)
    assert written.shape == (1, 16)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        fresh = model(tokens(), past_key_values=cache, use_cache=True).logits
        with pytest.raises(CompositionError, match="cropped"):
            cache.crop(-1)
        cache.reset()
        assert torch.equal(model(tokens(), past_key_values=cache, use_cache=True).logits, fresh)


def test_a_cache_of_another_kind_is_refused_and_ours_is_made_right(model):
    with pytest.raises(CompositionError, match="knows its memories"):
        model(tokens(), past_key_values=DynamicCache(), use_cache=True)
    with torch.no_grad():
        cache = build_cache(model.config)
        model(tokens(), past_key_values=cache, use_cache=True)
    assert cache.nbytes() == METHOD.cache_bytes(model.config, 40, 2, torch.float32)


def test_both_losses_are_those_of_their_zones(model):
    ids = tokens(2, 14)
    module = METHOD.objective(model, model)
    with torch.no_grad():
        found = module(ids, ids)
        hidden, layout = model.lay_out(model.model.embed_tokens(ids), repeat=True)
        logits = model.lm_head(hidden).double().log_softmax(-1)
    reading, again = layout.places[READING].tolist(), layout.places[REPETITION].tolist()
    text = [-logits[b, p, ids[b, t + 1]] for b in range(2) for t, p in enumerate(reading[:-1])]
    repeat = [-logits[b, p, ids[b, int(layout.position[p])]] for b in range(2) for p in again]
    torch.testing.assert_close(found.text.double(), sum(text) / len(text), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.repeat.double(), sum(repeat) / len(repeat), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.loss, found.text + found.repeat)
    with pytest.raises(ShapeError, match="no full zone"):
        module(ids[:, :5], ids[:, :5])


def test_memories_learn_to_give_their_zones_back():
    config = LlamaConfig(
        vocab_size=8, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    random = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = LlamaForCausalLM(config)
    method = LoMA(memory_tokens=1, compression_ratio=2)
    module = method.objective(method.convert(plain, []), plain).train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    losses = []
    for _ in range(100):
        ids = torch.randint(0, 8, (32, 4), generator=random)
        result = module(ids, ids)
        result.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(result.repeat.detach()))
    # Random tokens can only be known from the memory: without it the loss stays at the logarithm of 8.
    assert losses[0] > 2
    assert sum(losses[-10:]) / 10 < 1.2
