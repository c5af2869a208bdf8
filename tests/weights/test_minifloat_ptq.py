"""Small floats: learned rounding, equalised channels, corrected biases, and where floats lose less than integers."""

import copy

import pytest
import torch

from pintpot.core.errors import CompositionError, ShapeError
from pintpot.weights.minifloat_ptq import MinifloatPTQ, equalising
from pintpot.weights.statistics import InputStatistics
from tests.architectures import tiny_model

ROWS, COLUMNS = 16, 64


def case(seed: int = 0) -> tuple[torch.Tensor, InputStatistics]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(ROWS, COLUMNS, generator=generator)
    tokens = torch.randn(256, COLUMNS, generator=generator) @ torch.randn(COLUMNS, COLUMNS, generator=generator)
    statistics = InputStatistics.empty(COLUMNS, torch.device("cpu"))
    statistics.add_(tokens + 1)
    return weight, statistics


def held(method: MinifloatPTQ, weight: torch.Tensor, statistics: InputStatistics | None) -> torch.Tensor:
    (layout,) = method.terms("w", *weight.shape, weight.dtype)
    (stored,) = method.find("w", weight, (layout,), statistics)
    return layout.decode(stored, weight.shape[1], torch.float32)


@pytest.mark.parametrize("levels", ["e2m1", "e3m0", "int4", "int3"])
def test_learned_rounding_goes_to_a_neighbour_and_lowers_the_output_error(levels):
    weight, statistics = case()
    nearest = held(MinifloatPTQ(levels=levels, equalise=False, iterations=0), weight, statistics)
    learned = held(MinifloatPTQ(levels=levels, equalise=False), weight, statistics)
    before, after = statistics.error(nearest - weight), statistics.error(learned - weight)
    assert (after <= before * 1.0001).all()
    assert after.sum() < 0.75 * before.sum()
    changed = learned != nearest
    assert 0.02 < changed.float().mean() < 0.6
    # The other neighbour lies on the other side of the number.
    inside = changed & (weight.abs() < 0.99 * weight.abs().amax(1, keepdim=True))
    assert ((learned - weight) * (nearest - weight) <= 1e-6)[inside].all()


def test_equalising_helps_where_channels_differ():
    weight, _ = case()
    weight = weight * torch.logspace(-1.5, 1.5, COLUMNS)
    errors = []
    for equalise in (False, True):
        difference = held(MinifloatPTQ(levels="int4", equalise=equalise, iterations=0), weight, None) - weight
        errors.append(float((difference / weight.abs().amax(0)).square().mean()))
    assert errors[1] < 0.6 * errors[0]
    ranges = (weight / equalising(weight)).abs().amax(0)
    before = weight.abs().amax(0)
    assert float(ranges.max() / ranges.min()) == pytest.approx(float(before.max() / before.min()) ** 0.5, rel=1e-4)
    assert torch.equal(equalising(torch.zeros(3, 4)), torch.ones(4))


def test_floats_lose_less_than_integers_on_long_tails():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, 256, generator=generator) ** 3
    errors = {
        levels: float((held(MinifloatPTQ(levels=levels, equalise=False), weight, None) - weight).square().sum())
        for levels in ("e2m1", "int4")
    }
    assert errors["e2m1"] < 0.6 * errors["int4"]


@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
def test_biases_take_the_mean_error(architecture):
    """The first layer's mean output on the calibration text is the dense one's again."""
    dense = tiny_model(architecture)
    for parameter in dense.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.5
    texts = [torch.randint(3, 256, (2, 64), generator=torch.Generator().manual_seed(0))]
    name = {"gpt2": "transformer.h.0.attn.c_attn", "opt": "model.decoder.layers.0.self_attn.q_proj"}[architecture]

    def mean_output(model) -> torch.Tensor:
        seen = []
        handle = model.get_submodule(name).register_forward_hook(lambda m, a, out: seen.append(out))
        with torch.no_grad():
            model(texts[0])
        handle.remove()
        return seen[0].flatten(0, 1).mean(0)

    wanted, errors = mean_output(dense), []
    for correct in (False, True):
        model = copy.deepcopy(dense)
        MinifloatPTQ(levels="e2m0", correct_bias=correct, iterations=0).quantize_model_(model, texts)
        errors.append(float((mean_output(model) - wanted).abs().mean()))
    assert errors[1] < 0.01 * errors[0]


def test_settings_are_checked():
    with pytest.raises(CompositionError, match="iterations"):
        MinifloatPTQ(iterations=-1)
    with pytest.raises(ShapeError, match="no table"):
        MinifloatPTQ(levels="fp4")
