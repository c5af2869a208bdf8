"""Quamba: a Mamba in 8 bits with a clipped scan input and a mixed scan output."""

from pathlib import Path

import pytest
import torch

from pintpot.core.errors import CompositionError, UnsupportedModel
from pintpot.weights import load_compressed
from pintpot.weights.formats import Rotated, StaticInput
from pintpot.weights.quamba import Quamba, percentile
from pintpot.weights.quantised_mamba import QuantisedMixer
from tests.architectures import tiny_model


def texts(count: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(3, 40, (count, 2, 1), generator=generator)
    # Numbers that count up in steps of 3: easily learnt.
    return list((starts + 3 * torch.arange(24)) % 200 + 3)


def loss_of(model) -> float:
    with torch.no_grad():
        return float(torch.stack([model(input_ids=t, labels=t).loss for t in texts(4)[2:]]).mean())


@pytest.fixture(scope="module")
def trained() -> dict[str, torch.Tensor]:
    """A tiny Mamba that has learnt to count."""
    model = tiny_model("mamba")
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(40):
        ids = texts(8)[step % 8]
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return model.state_dict()


def dense(state: dict[str, torch.Tensor]):
    model = tiny_model("mamba")
    model.load_state_dict(state)
    return model.eval()


def test_the_percentile_is_the_quantile():
    numbers = torch.randn(7, 143, generator=torch.Generator().manual_seed(0))
    for share in (0.6, 0.99, 0.99999, 1.0):
        torch.testing.assert_close(percentile(numbers, share), torch.quantile(numbers, share))


def test_without_steps_the_mixer_is_the_dense_one(trained):
    model, other = dense(trained), dense(trained)
    for block in other.backbone.layers:
        block.mixer = QuantisedMixer(block.mixer)
    ids = texts()[0]
    with torch.no_grad():
        torch.testing.assert_close(other(input_ids=ids).logits, model(input_ids=ids).logits)
    settings = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(other.generate(ids, **settings), model.generate(ids, **settings))


def test_a_trained_model_stays_what_it_is(trained, tmp_path: Path):
    model, packed = dense(trained), dense(trained)
    assert loss_of(model) < 3.0
    Quamba().quantize_model_(packed, texts())
    assert loss_of(packed) < 1.05 * loss_of(model)
    ids = texts()[0]
    one_by_one = packed.generate(ids, max_new_tokens=6, do_sample=False)
    with torch.no_grad():
        at_once = packed(input_ids=one_by_one, use_cache=False).logits[:, ids.shape[1] - 1 : -1].argmax(-1)
    assert torch.equal(one_by_one[:, ids.shape[1] :], at_once)
    with pytest.raises(UnsupportedModel, match="not made dense again"):
        packed.dequantize()
    packed.save_pretrained(tmp_path / "packed")
    assert loss_of(load_compressed(tmp_path / "packed")) == loss_of(packed)


def test_what_the_scan_is_given_has_256_values_and_is_clipped(trained):
    model = dense(trained)
    Quamba(percentile=0.9).quantize_model_(model, texts())
    mixer = model.backbone.layers[0].mixer
    seen = []
    mixer.x_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=texts()[0])
    step = mixer.steps[2]
    codes = seen[0] / step
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-3)
    assert codes.abs().max() <= 128
    # A tenth of the numbers lie beyond the last step.
    assert 0.02 < (codes.abs() >= 127).float().mean() < 0.3


def test_mixing_spreads_the_outliers_of_the_scans_output():
    generator = torch.Generator().manual_seed(0)
    weight, input = torch.randn(16, 64, generator=generator), torch.randn(50, 64, generator=generator)
    input[:, 5] *= 60
    exact = input @ weight.T
    errors = {}
    for rotate in (True, False):
        method = Quamba(rotate=rotate)
        (layout,) = method.terms("backbone.layers.0.mixer.out_proj.weight", 16, 64, torch.float32)
        (stored,) = method.find("out_proj", weight, (layout,))
        mixed = layout.mix(input) if isinstance(layout, Rotated) else input
        name = next(n for n in stored if n.endswith("input_step"))
        stored[name] = (mixed.abs().max() / 127).view(1)
        errors[rotate] = (layout.matmul(input, stored) - exact).norm() / exact.norm()
    assert isinstance(layout, StaticInput)
    assert errors[True] < 0.5 * errors[False]


def test_refuses_a_percentile_that_clips_most():
    with pytest.raises(CompositionError, match="percentile"):
        Quamba(percentile=0.3)
