"""What every weights technique must do, on every architecture."""

import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, StaticCache

from pintpot.core.errors import CompositionError, UnsupportedModel
from pintpot.core.ledger import Account, Ledger, Moment
from pintpot.core.registry import techniques
from pintpot.core.shape import ModelShape
from pintpot.core.workload import Generate
from pintpot.weights import WeightMethod, compress_folder, load_and_compress, load_compressed
from pintpot.weights.formats import Float8Input
from pintpot.weights.modules import PackedTerms
from pintpot.weights.trained import TrainedMethod
from tests.architectures import TINY, tiny_config, tiny_model

METHODS = sorted(
    name
    for name, kind in techniques("weights").items()
    if issubclass(kind, WeightMethod) and "compress" in kind.facts.jobs
)
KINDS: dict[str, tuple[str, ...]] = {name: techniques("weights")[name].model_types for name in METHODS}
GENERAL = [name for name in METHODS if not KINDS[name]]
FEW = ("gpt2", "llama", "mamba", "mixtral", "t5")
"""One architecture for each way that blocks are called and matrices are stored. The methods of BROAD, which stand for
those that look at activations and those that do not, meet all of them."""
BROAD = ("awq", "gptq", "rtn")
PAIRS = [
    (n, a)
    for n in METHODS
    for a in (sorted(TINY) if n in BROAD or KINDS[n] else FEW)
    if not KINDS[n] or tiny_config(a).model_type in KINDS[n]
]
GENERATE = Generate(batch=2, prompt_tokens=8, new_tokens=2)
SAFE = {"bits": 8, "group_size": 32, "blocks": 8}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def logits_of(model) -> torch.Tensor:
    ids = torch.arange(20).view(2, 10) + 3
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


def packed_bytes(model) -> int:
    holders = (m for m in model.modules() if isinstance(m, PackedTerms))
    return sum(b.nbytes for m in holders for b in m.buffers(recurse=False))


def formats_in(model) -> str:
    """The formats of all packed weights, in words."""
    return str([layout.to_dict() for m in model.modules() if isinstance(m, PackedTerms) for layout in m.formats])


def method_of(name: str):
    """A safe configuration, in groups that fit tiny models."""
    kind = techniques("weights")[name]
    known = {field.name for field in fields(kind)}
    return kind.build({key: value for key, value in SAFE.items() if key in known})


def texts_for(method) -> list[torch.Tensor]:
    """What a tiny model is calibrated on, where the method needs it."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 256, (2, 48), generator=generator) for _ in range(2)] if method.calibrated else []


@pytest.mark.parametrize(("name", "architecture"), PAIRS)
def test_every_way_gives_the_same_model_near_the_dense_one(name, architecture, tmp_path: Path):
    method = method_of(name)
    texts = texts_for(method)
    model = tiny_model(architecture)
    dense = logits_of(model)
    model.save_pretrained(tmp_path / "dense")

    report = compress_folder(tmp_path / "dense", tmp_path / "packed", method, texts=texts)
    from_folder = logits_of(load_compressed(tmp_path / "packed"))
    on_the_fly = logits_of(load_and_compress(tmp_path / "dense", method, texts=texts))
    assert method.quantize_model_(model, texts) == report
    in_place = logits_of(model)
    model.save_pretrained(tmp_path / "saved")
    auto = AutoModelForSeq2SeqLM if model.config.is_encoder_decoder else AutoModelForCausalLM
    reloaded = auto.from_pretrained(tmp_path / "saved")

    assert torch.equal(from_folder, in_place)
    assert torch.equal(on_the_fly, in_place)
    assert torch.equal(logits_of(reloaded), in_place)
    assert not torch.equal(in_place, dense)
    assert torch.isfinite(in_place).all()
    if method.bits_a_weight(ModelShape.from_config(tiny_config(architecture))) > 7 and not method.drops:
        # Random weights in 8 bits: an error of at most 1/255 of a group's range a weight, over 2 or 3 layers. What is
        # to be trained may start further away, and inputs in 8-bit floats are wrong by up to 1/16 each.
        limit = 0.1 if isinstance(method, TrainedMethod) or Float8Input.kind in formats_in(model) else 0.05
        assert (in_place - dense).abs().max() < limit * dense.abs().max()


@pytest.mark.parametrize("name", ["endor", "fireq", "flash-llm", "onebit", "rtn", "svdquant", "vptq"])
def test_a_decoding_step_is_captured_in_one_graph(name):
    """By ``torch.compile``, with each kind of format."""
    method, model = method_of(name), tiny_model("llama")
    method.quantize_model_(model, texts_for(method))
    captured = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    ids = torch.tensor([[5]])
    caches = [StaticCache(config=model.config, max_cache_len=8) for _ in range(2)]

    with torch.no_grad():
        plain, seen = model(ids, past_key_values=caches[0]).logits, captured(ids, past_key_values=caches[1]).logits
    torch._dynamo.reset()

    assert torch.equal(plain, seen)


@pytest.mark.parametrize(("name", "architecture"), PAIRS)
def test_predicted_bytes_are_the_measured_ones(name, architecture):
    model = tiny_model(architecture, dtype=torch.bfloat16)
    shape = ModelShape.from_config(tiny_config(architecture), torch.bfloat16)
    before = sum(p.nbytes for p in model.parameters())
    plain = Ledger("predicted", (Moment("decode", {}).with_bytes(Account.WEIGHTS, before),))
    kinds = list(techniques("weights")[name].options(shape, GENERATE))
    for method in kinds[:: max(1, len(kinds) // 3)]:
        model = tiny_model(architecture, dtype=torch.bfloat16)
        buffers = sum(b.nbytes for b in model.buffers())
        report = method.prepare_skeleton_(model)
        after = sum(t.nbytes for t in [*model.parameters(), *model.buffers()]) - buffers
        assert packed_bytes(model) == report.packed_bytes
        assert method.predict(plain, shape, GENERATE).peak_of(Account.WEIGHTS) == after < before


@pytest.mark.parametrize(("name", "architecture"), PAIRS)
def test_runs_on_shapes_alone_with_the_same_bytes(name, architecture):
    method = method_of(name)
    real = tiny_model(architecture)
    method.quantize_model_(real, texts_for(method))
    shape = ModelShape.from_config(tiny_config(architecture))
    with FakeTensorMode():
        # Encoding is the same for every architecture, so that one with each kind of layer is enough.
        plain = architecture in ("gpt2", "mixtral") and not (method.calibrated or method.refines or method.examines)
        encode = [method.quantize_model_] if plain else []
        for prepare in (method.prepare_skeleton_, *encode):
            model = shape.build("cpu")
            prepare(model)
            assert logits_of(model).shape == (2, 10, 256)
            assert packed_bytes(model) == packed_bytes(real)
    meta = shape.build("meta")
    method.prepare_skeleton_(meta)
    assert {t.device.type for t in meta.state_dict().values()} == {"meta"}


@pytest.mark.parametrize("name", GENERAL)
def test_same_input_same_bytes(name, tmp_path: Path):
    tiny_model("mixtral").save_pretrained(tmp_path / "dense")
    for out in ("one", "two"):
        method = method_of(name)
        compress_folder(tmp_path / "dense", tmp_path / out, method, texts=texts_for(method))
    files = sorted(p.name for p in (tmp_path / "one").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "two").iterdir())
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@pytest.mark.parametrize("name", GENERAL)
def test_refuses_what_is_compressed_already_and_names_it(name, tmp_path: Path):
    model, method = tiny_model("llama"), method_of(name)
    texts = texts_for(method)
    first = method.quantize_model_(model, texts).compressed[0].removesuffix(".weight")
    with pytest.raises(UnsupportedModel, match=re.escape(f"{first} (CompressedLinear)")):
        method.quantize_model_(model, texts)
    model.save_pretrained(tmp_path / "packed")
    for again in (
        lambda: compress_folder(tmp_path / "packed", tmp_path / "out", method, texts=texts),
        lambda: load_and_compress(tmp_path / "packed", method, texts=texts),
    ):
        with pytest.raises(UnsupportedModel, match="compressed already"):
            again()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", GENERAL)
def test_says_when_it_needs_texts(name):
    method = method_of(name)
    if method.calibrated:
        with pytest.raises(CompositionError, match="there is none"):
            method.quantize_model_(tiny_model("llama"))


@pytest.mark.parametrize("name", GENERAL)
def test_adapters_learn_on_top(name):
    model, method = tiny_model("llama"), method_of(name)
    method.quantize_model_(model, texts_for(method))
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    ids = torch.arange(20).view(2, 10) + 3
    tuned(input_ids=ids, labels=ids).loss.backward()
    gradients = [p.grad for p in tuned.parameters() if p.requires_grad]
    assert all(g is not None and torch.isfinite(g).all() for g in gradients)
    assert any(g.abs().max() > 0 for g in gradients)


@pytest.mark.parametrize("name", GENERAL)
def test_refuses_a_model_without_linear_layers(name):
    with pytest.raises(UnsupportedModel, match="no linear layer"):
        method = method_of(name)
        method.quantize_model_(torch.nn.Sequential(torch.nn.Embedding(4, 4)), texts_for(method))


@pytest.mark.parametrize("name", sorted(set(METHODS) - set(GENERAL)))
def test_refuses_kinds_of_models_that_it_is_not_for(name, tmp_path: Path):
    other = next(a for a in sorted(TINY) if tiny_config(a).model_type not in KINDS[name])
    model = tiny_model(other)
    texts = [torch.arange(20).view(2, 10) + 3]
    model.save_pretrained(tmp_path / "dense")
    for attempt in (
        lambda: method_of(name).quantize_model_(model, texts),
        lambda: method_of(name).prepare_skeleton_(model),
        lambda: compress_folder(tmp_path / "dense", tmp_path / "out", method_of(name), texts=texts),
        lambda: load_and_compress(tmp_path / "dense", method_of(name), texts=texts),
    ):
        with pytest.raises(UnsupportedModel, match=r"_proj"):
            attempt()
    assert not (tmp_path / "out").exists()
    assert not list(techniques("weights")[name].options(ModelShape.from_config(tiny_config(other)), GENERATE))


@pytest.mark.parametrize("name", GENERAL)
def test_fewer_bytes_are_a_greater_risk(name):
    shape = ModelShape.from_config(tiny_config("llama"))
    dense = Ledger("predicted", (Moment("decode", {}).with_bytes(Account.WEIGHTS, shape.weight_bytes),))
    options = list(techniques("weights")[name].options(shape, GENERATE))
    sizes = [o.predict(dense, shape, GENERATE).peak_of(Account.WEIGHTS) for o in options]
    risks = [o.risk(shape, GENERATE) for o in options]
    assert len(set(sizes)) > 1
    assert min(risks) > 0
    assert sizes == sorted(sizes, reverse=True)
    assert risks == sorted(risks)
