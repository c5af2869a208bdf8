"""Wide codes for the output features that the loss needs, anywhere in the model."""

import copy

import pytest
import torch

from pintpot.core.errors import CompositionError, ShapeError, UnsupportedModel
from pintpot.weights.formats import RoundedInput, Split
from pintpot.weights.gradients import each_gradient
from pintpot.weights.mixllm import MixLLM
from pintpot.weights.targets import find_targets
from tests.architectures import tiny_model

METHOD = MixLLM(group_size=32, large_fraction=0.25)


def texts(count: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 256, (2, 24), generator=generator) for _ in range(count)]


def wide_of(model) -> dict[str, tuple[int, ...]]:
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "formats"):
            (layout,) = module.formats
            split = layout.inner if isinstance(layout, RoundedInput) else layout
            assert split.counts[0] == len(split.first)
            found[name] = split.first
    return found


def test_costs_are_those_of_the_formula():
    """Against the gradients of the whole loss, sample by sample, from plain autograd."""
    model = tiny_model("llama")
    targets, _ = find_targets(model)
    found = METHOD.examine_model(model, targets, texts())
    name = "model.layers.0.mlp.down_proj.weight"
    weight = model.get_parameter(name)
    (_, small) = METHOD._grids(torch.float32)
    change = small.decode(small.encode(weight.detach()), weight.shape[1], torch.float32) - weight.detach()
    expected = torch.zeros(weight.shape[0])
    for row in torch.cat(texts()):
        (gradient,) = torch.autograd.grad(model(row[None], labels=row[None]).loss, weight)
        slope = (gradient * change).sum(1)
        expected += (slope + slope**2 / 2).abs()
    torch.testing.assert_close(found[name]["cost"], expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("architecture", ["gpt2", "mixtral", "t5"])
def test_gradients_of_every_kind_of_parameter_and_nothing_is_left_behind(architecture):
    model = tiny_model(architecture)
    model.get_input_embeddings().weight.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    targets, _ = find_targets(model)
    seen: dict[str, torch.Tensor] = {}
    names = [t.parameter for t in targets]
    loss = each_gradient(model, names, texts()[0][:1], lambda name, gradient: seen.update({name: gradient.clone()}))
    assert set(seen) == set(names)
    assert all(seen[t.parameter].shape == model.get_parameter(t.parameter).shape for t in targets)
    assert loss > 0
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())


def test_features_compete_over_the_whole_model():
    """Of two layers with rivals of the same width, the one that the loss hangs on gets nearly all wide features."""
    model = tiny_model("llama")
    for layer, factor in zip(model.model.layers, (8.0, 0.02), strict=True):
        layer.self_attn.o_proj.weight.data *= factor
        layer.mlp.down_proj.weight.data *= factor
    METHOD.quantize_model_(model, texts())
    wide = wide_of(model)
    total = sum(m.formats[0].inner.storage(m.out_features, m.in_features)["order"][0][0] for m in packed(model, 64))
    assert sum(len(wide[name]) for name, m in model.named_modules() if m in packed(model, 64)) == int(0.25 * total)
    assert len(wide["model.layers.0.mlp.down_proj"]) > 5 * len(wide["model.layers.1.mlp.down_proj"])


def packed(model, in_features: int) -> list[torch.nn.Module]:
    return [m for m in model.modules() if hasattr(m, "formats") and m.in_features == in_features]


def test_wide_features_are_the_costly_ones_and_hold_more():
    model = tiny_model("llama")
    targets, _ = find_targets(model)
    costs = METHOD.examine_model(model, targets, texts())
    dense = copy.deepcopy(model)
    MixLLM(group_size=32, large_fraction=0.25, input_bits=16).quantize_model_(model, texts())
    name = "model.layers.0.mlp.gate_proj"
    wide = list(wide_of(model)[name])
    narrow = [row for row in range(128) if row not in wide]
    cost = costs[f"{name}.weight"]["cost"]
    assert cost[wide].min() >= cost[narrow].max()
    error = (model.get_submodule(name).weight - dense.get_submodule(name).weight).square().mean(1)
    assert error[wide].mean() < 0.05 * error[narrow].mean()


def test_what_it_cannot_do_is_refused():
    with pytest.raises(CompositionError, match="mixllm cannot widen"):
        MixLLM(large_fraction=1.5)
    with pytest.raises(CompositionError, match="mixllm cannot widen"):
        MixLLM(input_bits=12)
    for first in ((1, 1), (64,)):
        with pytest.raises(ShapeError, match="cannot be"):
            Split(counts=(64,), first=first).storage(64, 64)
    body = tiny_model("llama").model
    with pytest.raises(UnsupportedModel, match="no loss"):
        each_gradient(body, [], texts()[0], lambda name, gradient: None)
