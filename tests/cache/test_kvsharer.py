"""KVSharer: which layers share is searched for, and those that do attend to exactly what another holds."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pintpot.cache import KIVI, SnapKV, build_cache, cache_bytes, use_cache_attention
from pintpot.cache.aqua_kv import AquaKV
from pintpot.cache.calibration import Calibration
from pintpot.cache.forecast import Parts, waiting_bytes
from pintpot.cache.geometry import layer_kinds
from pintpot.cache.kvsharer import KVSharer, dissimilar_pairs, mean_caches, redirect
from pintpot.cache.minicache import MiniCache
from pintpot.cache.shared import SharedLayer
from pintpot.cache.xquant_cl import XQuantCL
from pintpot.core.errors import CompositionError, DataError
from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.slots import conflict
from pintpot.core.workload import Generate
from pintpot.jobs.simulate import simulate
from tests.architectures import tiny_config, tiny_model
from tests.cache.calibrating import calibrated, texts

torch.set_num_threads(1)
LAYERS = 5


def deep_model(layers=LAYERS):
    config = tiny_config("llama")
    config.num_hidden_layers = layers
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ModelShape.from_config(config).build("cpu")


@pytest.fixture(scope="module")
def model():
    return deep_model()


def owned(model, tmp_path, owners):
    """A technique that shares as told."""
    technique = KVSharer(shared_layers=LAYERS - len(set(owners)))
    found = tuple({"owner": torch.tensor(owner)} for owner in owners)
    file = tmp_path / "owners.safetensors"
    Calibration(str(technique), ModelShape.from_config(model.config).fingerprint, found).write(file)
    return KVSharer(shared_layers=technique.shared_layers, calibration=str(file))


def tokens(*sizes, seed=0):
    return torch.randint(3, 256, sizes, generator=torch.Generator().manual_seed(seed))


def shared_by_hand(model, ids, owners):
    """Logits of a model whose attention modules are given the keys and values of others, without any cache."""
    held = {}

    class Lending:
        layers = ()

        def update(self, keys, values, layer_idx, *args, **kwargs):
            held[layer_idx] = (keys, values)
            return held[owners[layer_idx]]

        def get_seq_length(self, *args):
            return 0

        def get_mask_sizes(self, query_length, *args):
            return query_length, 0

    lending, hooks = Lending(), []
    for block in model.model.layers:

        def give(module, args, kwargs):
            return args, {**kwargs, "past_key_values": lending}

        hooks.append(block.self_attn.register_forward_pre_hook(give, with_kwargs=True))
    try:
        with torch.no_grad():
            return model(ids, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("piece", [60, 17, 1])
@pytest.mark.parametrize("parts", [{}, {"store": KIVI(bits=2)}, {"keep": SnapKV(kept_fraction=1.0)}], ids=repr)
def test_layers_attend_to_what_another_holds_the_newest_tokens_included(model, tmp_path, parts, piece):
    owners = [0, 1, 0, 1, 0]
    ids = tokens(2, 60)
    cache = build_cache(model.config, layers=owned(model, tmp_path, owners), **parts)
    with use_cache_attention(model), torch.no_grad():
        logits = torch.cat([model(part, past_key_values=cache).logits for part in ids.split(piece, dim=1)], dim=1)
    # KIVI's window holds all 60 tokens as they are, and the keep keeps all: exact either way.
    torch.testing.assert_close(logits, shared_by_hand(model, ids, owners), rtol=1e-4, atol=1e-5)
    assert [isinstance(layer, SharedLayer) for layer in cache.layers] == [False, False, True, True, True]
    assert cache.get_seq_length() == 60


def test_the_search_takes_dissimilar_pairs_as_long_as_the_last_hidden_states_stay_similar(model):
    texts_ = texts()
    caches = mean_caches(model, texts_)
    ranked = list(dissimilar_pairs(caches))
    assert len(ranked) == LAYERS * (LAYERS - 1) // 2
    assert all(upper > lower for upper, lower in ranked)

    def distance(pair):
        return sum(float((caches[pair[0]][i] - caches[pair[1]][i]).double().norm(dim=-1).mean()) for i in (0, 1))

    assert [distance(pair) for pair in ranked] == sorted((distance(pair) for pair in ranked), reverse=True)
    found = [int(layer["owner"]) for layer in KVSharer(shared_layers=1, threshold=-1.0).fit(model, texts_)]
    upper, lower = ranked[0]
    assert found == [lower if layer == upper else layer for layer in range(LAYERS)]
    with pytest.raises(DataError, match="can share") as caught:
        KVSharer(shared_layers=4, threshold=1 - 1e-7).fit(model, texts_)
    assert "threshold" in caught.value.hint


def test_who_attended_to_a_layer_that_now_shares_follows_it():
    owners = redirect([0, 1, 2, 3, 4], upper=4, lower=2)
    owners = redirect(owners, upper=2, lower=1)
    assert owners == [0, 1, 1, 3, 1]
    assert redirect(owners, upper=3, lower=2) == [0, 1, 1, 1, 1]


def test_end_to_end_with_generate_beams_and_a_padded_batch(model):
    technique = calibrated(KVSharer(shared_layers=2, threshold=-1.0), model)
    long, short = tokens(1, 80), tokens(1, 50, seed=1)
    padded = torch.cat([torch.zeros(1, 30, dtype=torch.int64), short], dim=1)
    mask = torch.ones(2, 80, dtype=torch.int64)
    mask[1, :30] = 0
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": 2}

    def answer(ids, **options):
        cache = build_cache(model.config, layers=technique, store=KIVI(bits=4, residual_length=32))
        with use_cache_attention(model):
            return model.generate(ids, past_key_values=cache, **settings, **options)[:, -6:]

    together = answer(torch.cat([long, padded]), attention_mask=mask)
    assert torch.equal(together, torch.cat([answer(long), answer(short)]))


def test_an_interrupted_pass_is_noticed(model, tmp_path):
    cache = build_cache(model.config, layers=owned(model, tmp_path, [0, 1, 2, 3, 0]), store=KIVI())
    with use_cache_attention(model), torch.no_grad():
        last = model.model.layers[-1].register_forward_pre_hook(lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(tokens(1, 10), past_key_values=cache)
        last.remove()
        with pytest.raises(CompositionError, match="incomplete"):
            model(tokens(1, 10), past_key_values=cache)
        cache.reset()
        model(tokens(1, 10), past_key_values=cache)
    assert cache.get_seq_length() == 10


def test_a_budget_counts_what_waits_for_readers(model):
    technique = calibrated(KVSharer(shared_layers=2, threshold=-1.0), model)
    parts = Parts(store=KIVI(), layers=technique)
    waits = waiting_bytes(layer_kinds(model.config), 300, parts, 1, torch.float32)
    assert waits == 2 * 300 * 2 * 2 * 16 * 4
    held = cache_bytes(model.config, 300, store=KIVI(), layers=technique, reserve_tokens=300)
    cache = build_cache(model.config, store=KIVI(), layers=technique, budget_bytes=held + waits, tokens=300)
    with use_cache_attention(model), torch.no_grad():
        model(tokens(1, 300), past_key_values=cache)
    assert cache.nbytes() == held


def test_shapes_alone_are_enough(model):
    technique = calibrated(KVSharer(shared_layers=2, threshold=-1.0), model)
    with FakeTensorMode():
        fake = deep_model()
        cache = build_cache(fake.config, layers=technique, keep=SnapKV())
        with use_cache_attention(fake), torch.no_grad():
            for count in (200, 1):
                fake(torch.zeros(1, count, dtype=torch.int64), past_key_values=cache)
        assert cache.nbytes() == cache_bytes(fake.config, 201, layers=technique, keep=SnapKV())


def test_a_rehearsal_knows_which_layers_share():
    deep = deep_model(8)
    technique = calibrated(KVSharer(shared_layers=5, threshold=-1.0), deep)
    ledger = simulate(
        ModelShape.from_config(deep.config), Generate(batch=1, prompt_tokens=40, new_tokens=2), [technique]
    )
    expected = cache_bytes(deep.config, 41, layers=technique, reserve_tokens=42)
    assert ledger.phase("decode").of(Account.KV_CACHE) == expected


@pytest.mark.parametrize("wrong", [{"shared_layers": 0}, {"threshold": 1.0}, {"threshold": -2.0}])
def test_impossible_parameters_are_refused(wrong):
    with pytest.raises(CompositionError) as caught:
        KVSharer(**wrong)
    assert caught.value.hint


@pytest.mark.parametrize("store", [AquaKV(), MiniCache(start_fraction=0.0), XQuantCL()], ids=str)
def test_stores_that_build_on_the_layer_below_are_refused(model, store):
    assert "every_layer" in conflict(KVSharer(), store)
    with pytest.raises(CompositionError, match="every_layer"):
        build_cache(model.config, layers=KVSharer(), store=store)
    assert not conflict(KVSharer(), KIVI())


def test_what_cannot_stand_beside_it_is_refused(model):
    with pytest.raises(CompositionError, match="calibrated"):
        build_cache(model.config, layers=KVSharer())
    with pytest.raises(CompositionError, match="would change nothing"):
        build_cache(tiny_model("gemma2").config, layers=KVSharer())
