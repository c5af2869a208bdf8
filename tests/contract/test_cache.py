"""What every registered cache technique must do, on every architecture with attention."""

import gc
import itertools
import weakref

import pytest
import torch
from transformers import DynamicCache

from pintpot.cache import KIVI, build_cache, cache_bytes, use_cache_attention
from pintpot.cache._base import Keep, LayerSharing, Store
from pintpot.cache.calibration import Calibrated
from pintpot.cache.cascade import LayerKeep
from pintpot.cache.geometry import FULL, has_full_attention, layer_kinds
from pintpot.cache.recall import RecallStore
from pintpot.cache.residue import Residue
from pintpot.core.errors import CompositionError
from pintpot.core.expression import expression, parse
from pintpot.core.ledger import Account, Ledger, Moment
from pintpot.core.registry import techniques
from pintpot.core.shape import ModelShape
from pintpot.core.slots import conflict
from pintpot.core.workload import Generate
from tests.architectures import ATTENTION, tiny_config, tiny_model
from tests.cache.calibrating import calibrated

torch.set_num_threads(1)
PROMPT, NEW = 300, 6
KEEPS = [kind for kind in techniques("cache").values() if issubclass(kind, Keep)]
STORES = [kind for kind in techniques("cache").values() if issubclass(kind, Store)]
SHARINGS = [kind for kind in techniques("cache").values() if issubclass(kind, LayerSharing)]
RESIDUES = [kind for kind in techniques("cache").values() if issubclass(kind, Residue)]
# Sizes that save something at a prompt of 300 tokens, and that are calibrated in no time.
SMALL = {
    "alisa": {"budget_tokens": 64, "group_tokens": 16},
    "clusterkv": {
        "budget_tokens": 48,
        "sink_tokens": 4,
        "window_tokens": 32,
        "cluster_tokens": 8,
        "iterations": 4,
        "dense_layers": 0,
    },
    "expected-attention": {"observed_tokens": 16},
    "h2o": {"recent_tokens": 32},
    "kcache": {"top_tokens": 32, "group_tokens": 16},
    "kvsharer": {"shared_layers": 1, "threshold": -1.0},
    "lagkv": {"lag_tokens": 32},
    "leoam": {"budget_tokens": 48, "chunk_tokens": 16, "least_tokens": 8, "recent_tokens": 8},
    "less": {"rank": 2, "hidden_units": 4, "epochs": 1, "policy": "lagkv(lag_tokens=16)"},
    "locret": {"stabilizer_tokens": 32, "hidden_units": 8, "training_steps": 2},
    "minicache": {"start_fraction": 0.0, "group_tokens": 16},
    "streaming-llm": {"window_tokens": 64},
    "task-kv": {"recent_tokens": 64},
}


def small(kind):
    return kind(**SMALL.get(kind.facts.name, {}))


SINGLES = [{"keep": small(k)} for k in KEEPS] + [{"store": small(s)} for s in STORES]
PAIRS = [
    {"keep": small(k), "store": small(s)}
    for k, s in itertools.product(KEEPS, STORES)
    if not conflict(small(k), small(s))
]
SHARED = [
    {"layers": small(kind), **single}
    for kind, single in itertools.product(SHARINGS, [{}, *SINGLES])
    if not any(conflict(small(kind), technique) for technique in single.values())
]
GROWING = [name for name in ATTENTION if has_full_attention(tiny_config(name))]
RESIDUAL = [{"keep": small(k), "residue": small(r)} for k, r in itertools.product(KEEPS, RESIDUES)]
RESIDUAL += [
    {"residue": small(kind), **composition}
    for kind, composition in itertools.product(RESIDUES, [*PAIRS[::23], *SHARED[::11]])
    if "keep" in composition
]
# Every technique on every architecture, every pair on one of them in turn.
CASES = [
    *itertools.product(GROWING, SINGLES),
    *((GROWING[i % len(GROWING)], pair) for i, pair in enumerate(PAIRS)),
    *(("llama", shared) for shared in SHARED),
    *(("llama", residual) for residual in RESIDUAL),
    *((name, residual) for name, residual in zip(GROWING, RESIDUAL[-len(GROWING) :], strict=False)),
]


def label(composition):
    return expression(composition.values()) or "dense"


def acts_on(composition, config):
    count = sum(layer.kind == FULL for layer in layer_kinds(config))
    return all(technique.acts_on(count) for technique in composition.values())


def ready(composition, model):
    return {part: calibrated(technique, model) for part, technique in composition.items()}


def prompt():
    return torch.randint(3, 256, (2, PROMPT), generator=torch.Generator().manual_seed(0))


def generate(model, cache):
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    with use_cache_attention(model):
        return model.generate(
            prompt(), past_key_values=cache, return_dict_in_generate=True, output_logits=True, **settings
        )


def test_every_technique_has_a_part():
    assert KEEPS
    assert STORES
    assert {k.facts.part for k in KEEPS} == {"keep"}
    assert {s.facts.part for s in STORES} == {"store"}
    assert {s.facts.part for s in SHARINGS} == {"layers"}
    assert {r.facts.part for r in RESIDUES} == {"residue"}


@pytest.mark.parametrize(("keep", "store"), itertools.product(KEEPS, STORES))
def test_what_cannot_stand_together_is_refused(keep, store):
    """Uneven layers and heads spoil what layers or heads share, what is recalled, and what was calibrated."""
    together = store.shared_tokens or issubclass(store, RecallStore | Calibrated)
    even_layers = store.shared_tokens == "layers" or issubclass(store, RecallStore)
    assert ("even_heads" in store.facts.needs) == bool(together)
    assert ("even_layers" in store.facts.needs) == even_layers
    assert ("even_heads" in keep.facts.removes) == (keep.lanes is not Keep.lanes)
    assert ("even_layers" in keep.facts.removes) == issubclass(keep, LayerKeep)
    pair = {"keep": small(keep), "store": small(store)}
    if conflict(*pair.values()):
        with pytest.raises(CompositionError, match="which"):
            build_cache(tiny_config("llama"), **pair)


@pytest.mark.parametrize("name", ATTENTION)
def test_nothing_evicted_and_nothing_packed_is_the_models_own_cache(name):
    model = tiny_model(name)
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    expected = model.generate(prompt(), past_key_values=DynamicCache(config=model.config), **settings)
    assert torch.equal(generate(model, build_cache(model.config)).sequences, expected)


@pytest.mark.parametrize("name", GROWING)
def test_eight_bits_change_logits_by_less_than_a_hundredth(name):
    model = tiny_model(name)
    ids = prompt()
    with torch.no_grad(), use_cache_attention(model):
        exact, packed = build_cache(model.config), build_cache(model.config, store=KIVI(bits=8, residual_length=32))
        for piece in ids.split(100, dim=1):
            difference = model(piece, past_key_values=exact).logits - model(piece, past_key_values=packed).logits
            assert difference.abs().max() < 1e-2
    assert packed.nbytes() < exact.nbytes()


@pytest.mark.parametrize(
    ("name", "composition"),
    [case for case in CASES if acts_on(case[1], tiny_config(case[0]))],
    ids=lambda case: case if isinstance(case, str) else label(case),
)
def test_bytes_are_as_predicted_and_less_than_dense(name, composition):
    model = tiny_model(name)
    cache = build_cache(model.config, **ready(composition, model))
    generate(model, cache)
    measured = cache.nbytes()
    assert measured == cache_bytes(model.config, PROMPT + NEW - 1, batch=2, **composition)
    dense = build_cache(model.config)
    generate(model, dense)
    assert measured < dense.nbytes()


@pytest.mark.parametrize("composition", [{}, *SINGLES, *SHARED[:2], *RESIDUAL[:2]], ids=label)
def test_a_cache_is_freed_when_it_is_let_go(composition):
    """Without the help of the collector of cycles: the next prompt's cache must not stand beside the last one's."""
    model = tiny_model("llama")
    composition = ready(composition, model)
    gc.collect()
    gc.disable()
    try:
        cache = build_cache(model.config, **composition)
        generate(model, cache)
        layers = [weakref.ref(layer) for layer in cache.layers]
        del cache
        assert [layer() for layer in layers] == [None] * len(layers)
    finally:
        gc.enable()


@pytest.mark.parametrize("composition", [*SINGLES, *PAIRS[::7], *SHARED[::7], *RESIDUAL[::7]], ids=label)
def test_the_same_twice(composition):
    model = tiny_model("llama")
    first, second = (generate(model, build_cache(model.config, **ready(composition, model))) for _ in range(2))
    assert torch.equal(first.sequences, second.sequences)
    assert all(torch.equal(a, b) for a, b in zip(first.logits, second.logits, strict=True))


@pytest.mark.parametrize("composition", [*SINGLES, *PAIRS, *SHARED, *RESIDUAL], ids=label)
def test_prediction_lowers_the_account_and_does_not_depend_on_order(composition):
    shape = ModelShape.from_config(tiny_config("llama"))
    workload = Generate(batch=2, prompt_tokens=PROMPT, new_tokens=NEW)
    plain = Ledger("predicted", tuple(Moment(phase, {}) for phase in ("load", "prefill", "decode")))
    plain = plain.set(Account.KV_CACHE, cache_bytes(shape.config, PROMPT + NEW - 1, batch=2), phases=("decode",))
    results = []
    for order in itertools.permutations(ready(composition, tiny_model("llama")).values()):
        ledger = plain
        for technique in order:
            ledger = technique.predict(ledger, shape, workload)
        results.append(ledger.phase("decode").of(Account.KV_CACHE))
    expected = cache_bytes(shape.config, PROMPT + NEW - 1, batch=2, reserve_tokens=PROMPT + NEW, **composition)
    assert set(results) == {expected}
    assert expected < plain.phase("decode").of(Account.KV_CACHE)


@pytest.mark.parametrize("kind", [*KEEPS, *STORES, *SHARINGS], ids=lambda kind: kind.facts.name)
def test_options_are_distinct_readable_and_ordered_by_bytes(kind):
    config = tiny_config("llama")
    config.num_hidden_layers = 8
    shape = ModelShape.from_config(config)
    workload = Generate(batch=1, prompt_tokens=4000, new_tokens=100)
    options = list(kind.options(shape, workload))
    assert len(set(options)) == len(options) > 1
    assert all(parse(str(option)) == (option,) for option in options)
    sizes = [cache_bytes(shape.config, 4000, **{kind.facts.part: option}) for option in options]
    risks = [option.risk(shape, workload) for option in options]
    assert sizes == sorted(sizes, reverse=True)
    assert risks == sorted(risks)
    assert list(kind.options(ModelShape.from_config(tiny_config("mistral")), workload)) == []
