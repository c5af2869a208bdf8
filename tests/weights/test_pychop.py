"""Pychop: linear layers compute in another arithmetic inside a scope, and are what they were outside of it."""

import pytest
import torch

from pintpot.core.errors import CompositionError, ShapeError, UnsupportedModel
from pintpot.core.expression import parse
from pintpot.core.shape import ModelShape
from pintpot.core.workload import Finetune, Generate
from pintpot.jobs.assemble import Composition
from pintpot.jobs.simulate import simulate
from pintpot.kernels import native
from pintpot.kernels.rounding import format_named, round_to
from pintpot.planner.options import candidates
from pintpot.weights.pychop import Pychop
from pintpot.weights.rtn import RTN
from tests.architectures import tiny_config, tiny_model

torch.set_num_threads(1)
IDS = torch.arange(20).view(2, 10) + 3
GENERATE = Generate(prompt_tokens=16, new_tokens=4)


def logits_of(model) -> torch.Tensor:
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=IDS, **more).logits


def linear(model) -> torch.nn.Linear:
    return model.model.layers[0].mlp.up_proj


@pytest.mark.parametrize("rounding", ["nearest", "toward_zero"])
def test_a_layer_is_the_rounded_product_of_rounded_weights(rounding):
    model = tiny_model("qwen2").eval()
    layer = model.model.layers[0].self_attn.q_proj
    torch.nn.init.normal_(layer.bias)
    x, e5m2 = torch.randn(3, layer.in_features), format_named("e5m2")

    def rounded(numbers: torch.Tensor) -> torch.Tensor:
        return round_to(numbers, e5m2, rounding)

    with torch.no_grad():
        plain = torch.nn.functional.linear(x, layer.weight, layer.bias)
        held = torch.nn.functional.linear(x, rounded(layer.weight), rounded(layer.bias))
        for settings, expected in (
            (Pychop(format="e5m2", rounding=rounding), rounded(held)),
            (Pychop(format="e5m2", rounding=rounding, activations=False), held),
            (Pychop(format="e5m2", rounding=rounding, weights=False), rounded(plain)),
        ):
            with settings.scope_of(model)():
                assert torch.equal(layer(x), expected)
        assert torch.equal(layer(x), plain)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "mixtral", "t5"])
def test_the_model_is_as_it_was_outside(architecture):
    model = tiny_model(architecture).eval()
    before, held = logits_of(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scope = Pychop(format="e5m2").scope_of(model)
    with scope():
        assert model.state_dict().keys() == held.keys()
        inside = logits_of(model)
    assert 1e-3 < (inside - before).norm() / before.norm() < 0.5
    with pytest.raises(RuntimeError), scope():
        model(input_ids=IDS.float())
    assert torch.equal(logits_of(model), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks or "weight" in m.__dict__ for m in model.modules())
    assert all(torch.equal(tensor, held[name]) for name, tensor in model.state_dict().items())
    with scope():
        assert torch.equal(logits_of(model), inside)


def test_more_bits_come_nearer_to_the_model():
    model = tiny_model("llama").eval()
    before, errors = logits_of(model), []
    for name in ("e5m1", "e5m2", "e5m3", "bf16", "fp16", "fp32"):
        with Pychop(format=name).scope_of(model)():
            errors.append(float((logits_of(model) - before).norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0


def test_random_rounding_is_that_of_its_seed():
    model = tiny_model("llama").eval()

    def with_seed(seed: int) -> torch.Tensor:
        with Pychop(format="e4m3", rounding="stochastic", seed=seed).scope_of(model)():
            first = logits_of(model)
            # Outputs are drawn anew in each pass.
            assert not torch.equal(logits_of(model), first)
        return first

    assert torch.equal(with_seed(1), with_seed(1))
    assert not torch.equal(with_seed(1), with_seed(2))


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_training_reaches_the_weights_through_the_rounding(rounding):
    model = tiny_model("llama").train()
    scope = Pychop(format="e4m3", rounding=rounding).scope_of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        with scope():
            loss = model(input_ids=IDS, labels=IDS).loss
            loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert linear(model).weight.grad.abs().sum() > 0
    assert losses[-1] < 0.8 * losses[0]
    # What was trained is not what was rounded.
    assert not torch.equal(linear(model).weight, round_to(linear(model).weight, format_named("e4m3")))


def test_what_is_recomputed_for_its_gradient_is_rounded_alike():
    gradients = []
    for checkpointed in (False, True):
        model = tiny_model("llama").train()
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        with Pychop(format="e4m3", rounding="stochastic").scope_of(model)():
            model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append(linear(model).weight.grad)
    assert torch.equal(*gradients)


def test_it_takes_a_place_of_its_own_and_is_never_offered():
    made = Composition.of(parse("pychop(format=e4m3)*kivi"), "generate")
    assert made.arithmetic == Pychop(format="e4m3")
    shape = ModelShape.from_config(tiny_config("llama"))
    offered, rejected = candidates(shape, GENERATE, simulate(shape, GENERATE), {"pychop": Pychop})
    assert not offered
    assert "simulated" in str(rejected)
    for other, job in (("rtn4", "generate"), ("lora", "finetune")):
        with pytest.raises(CompositionError, match="pychop needs"):
            Composition.of(parse(f"pychop*{other}"), job)


@pytest.mark.parametrize("workload", [GENERATE, Finetune(batch=2, tokens=32, steps=2)], ids=["generate", "finetune"])
def test_the_closed_form_is_near_the_rehearsal(workload):
    shape = ModelShape.from_config(tiny_config("llama"))
    plain = simulate(shape, workload)
    settings = Pychop(format="e4m3")
    rehearsed, closed = simulate(shape, workload, (settings,)), settings.predict(plain, shape, workload)
    assert rehearsed.peak_bytes() > plain.peak_bytes()
    # In plain torch the temporaries of rounding are the most that any mode has.
    most = 1.05 if native.library() is not None else 1.5
    assert 0.97 < closed.peak_bytes() / rehearsed.peak_bytes() < most


def test_risk_rises_as_bits_fall():
    shape = ModelShape.from_config(tiny_config("llama"))
    for names in (
        ("fp16", "bf16", "e5m3", "e4m3", "e5m2", "e3m2", "e2m1"),
        ("int8", "int6", "int4"),
        ("fixed4.10", "fixed4.4"),
    ):
        risks = [Pychop(format=name).risk(shape, GENERATE) for name in names]
        assert risks == sorted(risks)
        assert risks[0] > 0


def test_refusals():
    with pytest.raises(ShapeError, match="no number format"):
        Pychop(format="fp12")
    with pytest.raises(CompositionError, match="nearest"):
        Pychop(rounding="up and down")
    with pytest.raises(CompositionError, match="nothing to round"):
        Pychop(weights=False, activations=False)
    model = tiny_model("llama")
    RTN(bits=4, group_size=32).quantize_model_(model)
    with pytest.raises(UnsupportedModel, match="up_proj"):
        Pychop().scope_of(model)
