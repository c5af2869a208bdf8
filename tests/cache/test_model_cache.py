"""A cache in one line beside the user's own generate call."""

import pytest
import torch
from transformers import DynamicCache

import pintpot
from pintpot.core.errors import BudgetError, CompositionError
from tests.architectures import tiny_model

torch.set_num_threads(1)
SETTINGS = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}


@pytest.fixture
def model():
    return tiny_model("llama")


def tokens(count):
    return torch.randint(3, 256, (1, count), generator=torch.Generator().manual_seed(0))


def test_one_line_and_plain_generate(model):
    ids = tokens(60)
    expected = model.generate(ids, past_key_values=DynamicCache(config=model.config), **SETTINGS)
    cache = pintpot.cache(model)
    assert torch.equal(model.generate(ids, past_key_values=cache, **SETTINGS), expected)
    assert cache.get_seq_length() == 67


def test_a_size_in_words_is_kept_to(model):
    cache = pintpot.cache(model, "lagkv(lag_tokens=32)*kivi2", budget="100KiB", tokens=400)
    out = model.generate(tokens(300), past_key_values=cache, **SETTINGS)
    assert out.shape == (1, 308)
    assert 0 < cache.nbytes() <= 100 << 10


def test_sizes_and_techniques_that_cannot_be(model):
    with pytest.raises(BudgetError, match="at least"):
        pintpot.cache(model, "kivi4", budget=100, tokens=400)
    with pytest.raises(CompositionError, match="no part of a cache"):
        pintpot.cache(model, "rtn4")
    with pytest.raises(CompositionError, match="both fill"):
        pintpot.cache(model, "kivi4*kivi2")
