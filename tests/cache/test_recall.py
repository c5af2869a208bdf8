"""Stores with recall as a whole: in generate, in every mode, with bytes by tier as predicted."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pintpot.cache import build_cache, cache_bytes, prefill_in_pieces, use_cache_attention
from pintpot.cache.alisa import ALISA
from pintpot.cache.cake import CAKE
from pintpot.cache.clusterkv import ClusterKV
from pintpot.cache.forecast import Parts, tier_bytes
from pintpot.cache.geometry import layer_kinds
from pintpot.cache.kcache import KCache
from pintpot.cache.leoam import LeoAM
from pintpot.cache.snapkv import SnapKV
from pintpot.cache.tiers import BLOCK_TOKENS
from pintpot.core.errors import BudgetError, CompositionError
from pintpot.core.ledger import Account, Ledger, Moment, Tier
from pintpot.core.shape import ModelShape
from pintpot.core.work import PhaseWork, Work
from pintpot.core.workload import Budget, Generate
from pintpot.jobs.choose import Wish
from pintpot.jobs.generate import generate as generate_text
from pintpot.jobs.generator import GenerateSettings
from tests.architectures import tiny_model
from tests.folders import write_model

torch.set_num_threads(1)
CLUSTERS = {"sink_tokens": 4, "window_tokens": 32, "cluster_tokens": 8, "iterations": 3, "dense_layers": 0}
FEW = [
    KCache(top_tokens=16, group_tokens=16),
    ClusterKV(budget_tokens=24, **CLUSTERS),
    LeoAM(budget_tokens=24, chunk_tokens=16, least_tokens=4, recent_tokens=8),
    ALISA(budget_tokens=32, group_tokens=16),
]
ALL = [
    KCache(top_tokens=400, group_tokens=16),
    ClusterKV(budget_tokens=400, **CLUSTERS),
    LeoAM(budget_tokens=400, chunk_tokens=16, least_tokens=4, recent_tokens=8),
    ALISA(budget_tokens=160, group_tokens=16),
]


def tokens(*sizes, seed=0):
    return torch.randint(3, 256, sizes, generator=torch.Generator().manual_seed(seed))


def generate(model, ids, cache, **options):
    torch.manual_seed(0)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **options}
    with use_cache_attention(model):
        return model.generate(ids, past_key_values=cache, **settings)


@pytest.mark.parametrize("store", ALL, ids=lambda store: store.name)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_a_budget_for_all_tokens_gives_what_the_model_gives(store, name):
    model = tiny_model(name)
    ids = tokens(2, 150)
    with use_cache_attention(model), torch.no_grad():
        cache = build_cache(model.config, store=store)
        parts = [model(part, past_key_values=cache).logits for part in (ids[:, :130], *ids[:, 130:].split(1, dim=1))]
        expected = model(ids, use_cache=False).logits
    assert cache.tier_nbytes() > 0
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("store", FEW, ids=lambda store: store.name)
def test_a_prompt_in_pieces_sees_all_that_came_before(store):
    model = tiny_model("llama")
    ids = tokens(2, 150)
    with use_cache_attention(model), torch.no_grad():
        whole, pieces = (build_cache(model.config, store=store) for _ in range(2))
        expected = model(ids, past_key_values=whole).logits[:, -1]
        torch.testing.assert_close(prefill_in_pieces(model, ids, pieces, 40), expected, rtol=1e-4, atol=1e-5)
    assert (pieces.nbytes(), pieces.tier_nbytes()) == (whole.nbytes(), whole.tier_nbytes())


@pytest.mark.parametrize("store", FEW, ids=lambda store: store.name)
@pytest.mark.parametrize("keep", [None, SnapKV(window_tokens=16)], ids=["all", "snapkv"])
def test_bytes_by_tier_are_as_predicted(store, keep):
    model = tiny_model("llama", dtype=torch.bfloat16)
    cache = build_cache(model.config, store=store, keep=keep)
    generate(model, tokens(2, 200), cache)
    predicted = tier_bytes(layer_kinds(model.config), 205, Parts(keep, store), 2, torch.bfloat16)
    assert predicted == {Tier.DISK: cache.tier_nbytes()}
    assert cache.nbytes() == cache_bytes(model.config, 205, keep=keep, store=store, batch=2, dtype=torch.bfloat16)


@pytest.mark.parametrize("store", FEW, ids=lambda store: store.name)
@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}], ids=["beams", "two answers"]
)
def test_sequences_that_change_places_take_their_tokens_along(store, options):
    """With a budget for all tokens, generation gives what the model's own cache gives."""
    model = tiny_model("llama")
    exact = ALL[FEW.index(store)]
    out = generate(model, tokens(2, 90), build_cache(model.config, store=exact), **options)
    assert torch.equal(out, generate(model, tokens(2, 90), None, **options))


@pytest.mark.parametrize("store", FEW, ids=lambda store: store.name)
def test_a_padded_batch_gives_what_each_sequence_gives_alone(store):
    model = tiny_model("llama")
    long, short = tokens(1, 120), tokens(1, 90, seed=1)
    ids = torch.cat([long, torch.cat([torch.zeros(1, 30, dtype=torch.int64), short], dim=1)])
    mask = torch.ones(2, 120, dtype=torch.int64)
    mask[1, :30] = 0
    together = generate(model, ids, build_cache(model.config, store=store), attention_mask=mask)
    for row, alone in enumerate((long, short)):
        assert torch.equal(together[row, -6:], generate(model, alone, build_cache(model.config, store=store))[0, -6:])


def test_shapes_alone_are_enough():
    with FakeTensorMode():
        model = tiny_model("llama")
        for store in FEW[1:]:
            cache = build_cache(model.config, store=store)
            with use_cache_attention(model), torch.no_grad():
                for count in (150, 1, 40, 1):
                    model(torch.zeros(2, count, dtype=torch.int64), past_key_values=cache)
            assert cache.nbytes() == cache_bytes(model.config, 192, store=store, batch=2)


def test_the_ledger_has_what_is_on_disk_and_the_work_what_is_read():
    shape = ModelShape.from_config(tiny_model("llama").config)
    workload = Generate(batch=2, prompt_tokens=200, new_tokens=6)
    plain = Ledger("predicted", tuple(Moment(phase, {}) for phase in ("load", "prefill", "decode")))
    ledger = FEW[1].predict(plain, shape, workload)
    filed = (205 - 4) // 32 * 32
    assert ledger.peak_of(Account.KV_CACHE, Tier.DISK) == 2 * 256 * 2 * 2 * (16 + 16) * 4
    less = SnapKV(kept_fraction=0.05).predict(ledger, shape, workload)
    assert less.peak_of(Account.KV_CACHE, Tier.DISK) == 0
    work = FEW[1].work(Work({"prefill": PhaseWork(), "decode": PhaseWork()}), shape, workload)
    row = 2 * 2 * (16 + 16) * 4
    assert work.phases["decode"].disk_bytes == 2 * 20 * row
    assert work.phases["prefill"].disk_bytes == 2 * ((200 - 4) // 32 * 32) * row
    assert filed == 192


def test_a_text_is_continued_with_most_of_its_cache_on_disk(tmp_path):
    folder = write_model(tmp_path / "model")
    settings = GenerateSettings(new_tokens=5)
    plain = generate_text(folder, "a" * 150, settings=settings, wish=Wish(techniques="none"))
    wish = Wish(techniques=f"kcache(top_tokens=200, group_tokens=16, folder={tmp_path})", budget=Budget.of(disk="1GiB"))
    done = generate_text(folder, "a" * 150, settings=settings, wish=wish)
    assert done.completions == plain.completions
    assert done.plan.predicted.peak_of(Account.KV_CACHE, Tier.DISK) == 2 * BLOCK_TOKENS * 2 * 16 * 4
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    with pytest.raises(BudgetError, match="disk"):
        generate_text(folder, "a" * 150, settings=settings, wish=replace(wish, budget=Budget.of(disk="1KiB")))


def test_keeps_that_divide_among_layers_are_refused():
    with pytest.raises(CompositionError, match="even_layers"):
        build_cache(tiny_model("llama").config, store=FEW[0], keep=CAKE())
