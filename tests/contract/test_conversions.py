"""What every registered conversion must do, on every architecture that it is for."""

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from pintpot.cache.conversions import Conversion, LatentConfig, LoMA, MemoryConfig, TransMLA, XEcoMLA
from pintpot.core.errors import ShapeError, UnsupportedModel
from pintpot.core.expression import parse
from pintpot.core.ledger import Account, Ledger, Moment
from pintpot.core.registry import techniques
from pintpot.core.shape import OWN_ARCHITECTURES, ModelShape
from pintpot.core.workload import Generate
from pintpot.ledger.reach import tensors_in
from tests.architectures import tiny_config
from tests.cache.sources import SOURCES, source, tokens

torch.set_num_threads(1)
CASES = {
    "transmla": TransMLA(rank=24, rope_dim=8),
    "x-ecomla": XEcoMLA(rank=24, rope_dim=8),
    "loma": LoMA(memory_tokens=2, compression_ratio=4),
}
METHODS = pytest.mark.parametrize("method", CASES.values(), ids=CASES)


def held_bytes(cache):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(cache))


@pytest.fixture(scope="module")
def converted():
    texts = [tokens(4, 32, seed=1)]
    return {(name, m.name): m.convert(source(name), texts) for name in SOURCES for m in CASES.values()}


def test_every_conversion_is_here_and_says_that_it_is_one():
    kinds = {name: kind for name, kind in techniques("cache").items() if kind.facts.part == "conversion"}
    assert kinds.keys() == CASES.keys()
    for name, kind in kinds.items():
        assert issubclass(kind, Conversion)
        assert kind.facts.jobs == ("convert",)
        assert kind.facts.accounts == (Account.KV_CACHE,)
        assert parse(str(CASES[name])) == (CASES[name],)


@METHODS
@pytest.mark.parametrize("name", SOURCES)
@torch.no_grad()
def test_the_cache_has_the_bytes_that_were_predicted_and_less_than_the_sources(name, method, converted):
    model, ids = converted[name, method.name], tokens()
    caches = [DynamicCache(config=m.config) for m in (model, source(name))]
    model(ids, past_key_values=caches[0], use_cache=True)
    source(name)(ids, past_key_values=caches[1], use_cache=True)
    config = tiny_config(name)
    assert held_bytes(caches[0]) == method.cache_bytes(config, 40, 2, torch.float32) < held_bytes(caches[1])
    plain = Ledger("predicted", tuple(Moment(phase, {}) for phase in ("load", "prefill", "decode")))
    ledger = method.predict(plain, ModelShape.from_config(config), Generate(batch=2, prompt_tokens=30, new_tokens=11))
    assert ledger.phase("decode").of(Account.KV_CACHE) == held_bytes(caches[0])


@METHODS
@pytest.mark.parametrize("name", SOURCES)
@torch.no_grad()
def test_tokens_one_by_one_give_what_they_give_together(name, method, converted):
    model, ids = converted[name, method.name], tokens()
    together = model(ids, use_cache=False).logits
    cache = DynamicCache(config=model.config)
    pieces = [ids[:, :21], *ids[:, 21:].split(1, dim=1)]
    apart = torch.cat([model(piece, past_key_values=cache, use_cache=True).logits for piece in pieces], dim=1)
    torch.testing.assert_close(apart, together, atol=1e-4, rtol=1e-4)
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    written = model.generate(ids[:, :9], **settings)
    assert torch.equal(model(written[:, :-1], use_cache=False).logits[:, 8:].argmax(-1), written[:, 9:])


@METHODS
@pytest.mark.parametrize("name", SOURCES)
@torch.no_grad()
def test_a_saved_folder_loads_as_the_same_model(name, method, converted, tmp_path):
    model, ids = converted[name, method.name], tokens()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(model)
    assert torch.equal(loaded(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    assert ModelShape.from_folder(tmp_path).numel == model.num_parameters()


@METHODS
@torch.no_grad()
def test_the_same_twice_and_neither_source_nor_random_state_is_touched(method):
    model, texts = source("qwen2"), [tokens(4, 32, seed=1)]
    before, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    first, second = (method.convert(model, texts).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())


@METHODS
@pytest.mark.parametrize("name", ["gpt2", "gemma2", "qwen3", "mixtral"])
def test_other_architectures_are_refused(name, method):
    with pytest.raises(UnsupportedModel, match=r"self_attn"):
        method.check(tiny_config(name))


@METHODS
def test_sliding_windows_and_compressed_models_are_refused(method):
    with pytest.raises(UnsupportedModel, match=r"model\.layers\.0\.self_attn, model\.layers\.1\.self_attn"):
        method.check(tiny_config("mistral"))
    config = tiny_config("llama")
    config.quantization_config = {"quant_method": "pintpot"}
    with pytest.raises(UnsupportedModel, match="compressed"):
        method.check(config)


@pytest.mark.parametrize(
    "method",
    [
        TransMLA(rank=600, rope_dim=8),
        TransMLA(rank=24, rope_dim=12),
        TransMLA(rank=24, rope_dim=8, freq_fold=3),
        TransMLA(rank=24, rope_dim=8, balance=0.0),
        XEcoMLA(rank=24, rope_dim=16),
        XEcoMLA(rank=24, rope_dim=8, energy=1.5),
        XEcoMLA(rank=24, rope_dim=8, every=0),
        XEcoMLA(rank=24, rope_dim=8, q_rank=500),
        LoMA(memory_tokens=0),
        LoMA(compression_ratio=1),
        LoMA(memory_tokens=100, compression_ratio=8),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_are_refused_with_what_would(method):
    with pytest.raises(ShapeError) as error:
        method.check(tiny_config("llama"))
    assert error.value.hint


def test_padding_is_masked_or_refused(converted):
    ids = tokens(1, 12)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.int64), ids], dim=1)
    mask = torch.cat([torch.zeros(1, 4, dtype=torch.int64), torch.ones_like(ids)], dim=1)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        model = converted["llama", "transmla"]
        shifted = model(padded, attention_mask=mask, position_ids=positions).logits[:, 4:]
        torch.testing.assert_close(shifted, model(ids).logits, atol=1e-4, rtol=1e-4)
    with pytest.raises(ShapeError, match="padded"):
        converted["llama", "loma"](padded, attention_mask=mask)


def test_the_core_knows_where_our_architectures_are_registered():
    kinds = {"pintpot_latent": LatentConfig, "pintpot_memory": MemoryConfig}
    assert {name: kind.__module__ for name, kind in kinds.items()} == OWN_ARCHITECTURES
    assert all(kind.model_type == name for name, kind in kinds.items())
