"""Layers divide what may be kept: in proportion, in whole granules, never more than was decided on."""

from dataclasses import dataclass

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pintpot.cache import KIVI, build_cache, cache_bytes, prefill_in_pieces, use_cache_attention
from pintpot.cache.cake import CAKE
from pintpot.cache.cascade import LayerKeep, proportional
from pintpot.cache.fraction import ChunkedKeep
from pintpot.core.errors import BudgetError
from tests.architectures import tiny_config, tiny_model

torch.set_num_threads(1)


@dataclass(frozen=True, kw_only=True)
class Upper(LayerKeep, ChunkedKeep):
    """Prefers higher layers, and in each the tokens with the longest keys."""

    facts = CAKE.facts

    @property
    def recent(self):
        return 32

    def score(self, seen):
        return seen.tokens.keys[:, :, : seen.decided].float().norm(dim=-1)

    def preference(self, seen):
        return 1.0 + 3.0 * seen.place.index


def tokens(count, batch=1):
    return torch.randint(3, 256, (batch, count), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("total", "preferences", "most", "expected"),
    [
        (10, [1.0, 1.0], 10, [5, 5]),
        (10, [3.0, 1.0], 10, [8, 2]),
        (10, [9.0, 1.0], 6, [6, 4]),
        (10, [0.0, 0.0, 0.0], 10, [4, 3, 3]),
        (30, [1.0, 2.0], 10, [10, 10]),
        (7, [1.0], 10, [7]),
        (0, [1.0, 2.0], 5, [0, 0]),
    ],
)
def test_shares(total, preferences, most, expected):
    shares = proportional(total, preferences, [most] * len(preferences))
    assert sorted(shares, reverse=True) == sorted(expected, reverse=True)
    assert shares == expected or preferences[0] == preferences[-1]


@pytest.mark.parametrize("store", [None, KIVI(bits=4)])
def test_the_sum_is_what_any_keep_would_keep_and_the_preferred_layer_gets_more(store):
    model = tiny_model("llama")
    keep = Upper(kept_fraction=0.25)
    cache = build_cache(model.config, keep=keep, store=store)
    with use_cache_attention(model), torch.no_grad():
        model(tokens(700, 2), past_key_values=cache)
    lower, upper = (layer.stored.tokens for layer in cache.layers)
    assert lower + upper == 2 * keep.held(700).stored
    assert upper > lower
    assert cache.nbytes() == cache_bytes(model.config, 700, keep=keep, store=store, batch=2)


def test_what_is_kept_are_each_layers_best():
    model = tiny_model("llama")
    cache = build_cache(model.config, keep=Upper(kept_fraction=0.25))
    whole = build_cache(model.config)
    with use_cache_attention(model), torch.no_grad():
        model(tokens(300), past_key_values=cache)
        model(tokens(300), past_key_values=whole)
    keys, _ = whole.layers[0].stored.whole()
    kept, _ = cache.layers[0].stored.whole()
    decided = keys[:, :, 4:260]
    count = kept.shape[2] - 4
    best = decided.norm(dim=-1).topk(count, dim=-1).indices.sort(dim=-1).values
    assert torch.equal(kept[:, :, 4:], decided.gather(2, best[..., None].expand(-1, -1, -1, 16)))


def test_a_budget_holds_while_layers_wait_and_long_pieces_are_refused():
    model = tiny_model("llama")
    budget = cache_bytes(model.config, 1200, dtype=torch.float32) // 2
    cache = build_cache(model.config, keep=Upper(kept_fraction=1.0), budget_bytes=budget, tokens=1200)
    with use_cache_attention(model), torch.no_grad():
        with pytest.raises(BudgetError, match="at once") as caught:
            model(tokens(600), past_key_values=cache)
        assert "prefill_chunk_size" in caught.value.hint
        prefill_in_pieces(model, tokens(500), cache, 100)
    assert cache.nbytes() <= budget


def test_shapes_alone_are_enough():
    config = tiny_config("llama")
    with FakeTensorMode(), torch.no_grad():
        model = tiny_model("llama")
        cache = build_cache(config, keep=Upper())
        with use_cache_attention(model):
            model(torch.zeros(1, 300, dtype=torch.int64), past_key_values=cache)
        assert cache.nbytes() == cache_bytes(config, 300, keep=Upper())
