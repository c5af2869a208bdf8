"""Keeps by score in half precision, in pieces, in padded batches, and on shapes alone."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pintpot.cache import build_cache, cache_bytes, prefill_in_pieces, use_cache_attention
from pintpot.cache.defensivekv import DefensiveKV
from pintpot.cache.expected_attention import ExpectedAttention
from pintpot.cache.h2o import H2O
from pintpot.cache.keydiff import KeyDiff
from pintpot.cache.layer_defensivekv import LayerDefensiveKV
from pintpot.cache.locret import Locret
from pintpot.cache.streaming_llm import StreamingLLM
from tests.architectures import tiny_config, tiny_model
from tests.cache.calibrating import calibrated

torch.set_num_threads(1)
KEEPS = [
    DefensiveKV(),
    ExpectedAttention(observed_tokens=16),
    H2O(recent_tokens=32),
    KeyDiff(),
    LayerDefensiveKV(),
    Locret(stabilizer_tokens=32, hidden_units=8, training_steps=2),
    StreamingLLM(window_tokens=64),
]
every_keep = pytest.mark.parametrize("keep", KEEPS, ids=lambda keep: keep.name)


def tokens(*sizes, seed=0):
    return torch.randint(3, 256, sizes, generator=torch.Generator().manual_seed(seed))


@every_keep
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_pieces(keep, dtype):
    model = tiny_model("llama", dtype=dtype)
    keep = calibrated(keep, model)
    cache = build_cache(model.config, keep=keep)
    with use_cache_attention(model):
        logits = prefill_in_pieces(model, tokens(2, 250), cache, 70)
    assert logits.isfinite().all()
    assert cache.nbytes() == cache_bytes(model.config, 250, keep=keep, batch=2, dtype=dtype)


@every_keep
def test_shapes_alone_are_enough(keep):
    keep, config = calibrated(keep, tiny_model("llama")), tiny_config("llama")
    with FakeTensorMode():
        model = tiny_model("llama")
        cache = build_cache(config, keep=keep)
        with use_cache_attention(model), torch.no_grad():
            for count in (180, 40):
                model(torch.zeros(2, count, dtype=torch.int64), past_key_values=cache)
        assert cache.nbytes() == cache_bytes(config, 220, batch=2, keep=keep)


@every_keep
def test_a_padded_sequence_keeps_what_it_keeps_alone(keep):
    model = tiny_model("llama")
    keep = calibrated(keep, model)
    long, short = tokens(1, 200), tokens(1, 150, seed=1)
    ids = torch.cat([long, torch.cat([torch.zeros(1, 50, dtype=torch.int64), short], dim=1)])
    mask = (torch.arange(200) >= torch.tensor([[0], [50]])).long()
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    with use_cache_attention(model):
        together = model.generate(
            ids, attention_mask=mask, past_key_values=build_cache(model.config, keep=keep), **settings
        )
        alone = [
            model.generate(row, past_key_values=build_cache(model.config, keep=keep), **settings)
            for row in (long, short)
        ]
    for row, expected in zip(together, alone, strict=True):
        assert torch.equal(row[-12:], expected[0, -12:])
