"""Clipping and adapters that learn block by block, held back where the model's loss is steep."""

import copy
from pathlib import Path

import pytest
import torch

from pintpot.core.errors import CompositionError
from pintpot.weights import compress_folder, load_compressed
from pintpot.weights.examined import ExaminedLayout, Replaced
from pintpot.weights.modules import PackedTerms
from pintpot.weights.targets import find_targets
from pintpot.weights.ultra_low_bit_partial_retraining import UltraLowBitPartialRetraining, _Layer
from tests.architectures import tiny_model

ROWS, COLUMNS = 12, 64
TEXTS = [torch.randint(3, 256, (2, 32), generator=torch.Generator().manual_seed(s)) for s in range(2)]


def method(**settings) -> UltraLowBitPartialRetraining:
    return UltraLowBitPartialRetraining(**{"group_size": 32, "learning_rate": 2e-3, "clipping_rate": 5e-2} | settings)


def layer(group_size: int = 24, saliency: torch.Tensor | None = None) -> _Layer:
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    kind = UltraLowBitPartialRetraining(group_size=group_size)
    formats = kind.terms("w", ROWS, COLUMNS, torch.float32)
    holder = PackedTerms()
    holder.hold(formats, kind.find("w", weight, formats))
    return _Layer(Replaced(holder, weight, {} if saliency is None else {"saliency": saliency}))


def test_rounding_in_training_is_that_of_the_stored_numbers_and_of_a_plain_reference():
    found = layer()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        found.low.copy_(torch.randn(found.low.shape, generator=generator))
        found.left.copy_(torch.randn(found.left.shape, generator=generator))
    found.round_()
    found.store_()
    (grid, rounded), (adapters, factors) = found.holder.stored()
    torch.testing.assert_close(found.rounded.detach(), grid.decode(rounded, COLUMNS, torch.float32))
    whole = found.left @ found.right
    torch.testing.assert_close(whole.detach(), adapters.decode(factors, COLUMNS, torch.float32), rtol=2e-3, atol=2e-3)
    for row in range(ROWS):
        for group, start in enumerate(range(0, COLUMNS, 24)):
            part = found.dense[row, start : start + 24].double()
            low = torch.sigmoid(found.low[row, group].double()) * part.min().clamp(max=0)
            high = torch.sigmoid(found.high[row, group].double()) * part.max().clamp(min=0)
            scale = ((high - low) / 3).half().double()
            zero = (-low / scale).round()
            wanted = ((part / scale).round() + zero).clamp(0, 3).sub(zero) * scale
            torch.testing.assert_close(found.rounded[row, start : start + 24].double(), wanted, rtol=1e-4, atol=1e-4)


def test_drift_is_weighted_by_saliency_and_moves_the_ends_of_groups():
    saliency = torch.rand(ROWS, COLUMNS, generator=torch.Generator().manual_seed(2))
    found = layer(saliency=saliency)
    wanted = (saliency.double() * (found.rounded - found.dense).double().square()).sum()
    torch.testing.assert_close(found.drift().double(), wanted, rtol=1e-5, atol=0)
    low, high = torch.autograd.grad(found.drift(), [found.low, found.high])
    assert low.any()
    assert high.any()
    assert float(layer().drift()) == 0


def test_saliencies_are_mean_squared_gradients_of_each_sample():
    model = tiny_model("llama")
    targets, _ = find_targets(model)
    found = method().examine_model(model, targets, TEXTS)
    wanted = 0.0
    for text in torch.cat(TEXTS).split(1):
        model.zero_grad()
        model(input_ids=text, labels=text).loss.backward()
        wanted = wanted + model.get_parameter(targets[0].parameter).grad.double().square() / 4
    model.zero_grad()
    torch.testing.assert_close(found[targets[0].parameter]["saliency"].double(), wanted, rtol=1e-3, atol=1e-12)
    assert isinstance(method().layout(targets, found), ExaminedLayout)
    assert not method(regularisation=0.0).examine_model(model, targets, TEXTS)


def drift_and_error(**settings) -> tuple[float, float]:
    """How far salient weights are from the dense ones once a model was trained, and the error of its logits."""
    model = tiny_model("llama")
    targets, _ = find_targets(model)
    found = method().examine_model(model, targets, TEXTS)
    with torch.no_grad():
        dense = model(TEXTS[0]).logits
    packed = copy.deepcopy(model)
    method(**settings).quantize_model_(packed, TEXTS)
    total = 0.0
    for target in targets:
        grid, tensors = next(packed.get_submodule(target.holder).stored())
        held = grid.decode(tensors, target.shape[-1], torch.float32)
        wrong = (held - model.get_parameter(target.parameter)).square()
        total += float((found[target.parameter]["saliency"] * wrong).sum().detach())
    with torch.no_grad():
        error = float((packed(TEXTS[0]).logits - dense).square().mean())
    assert not any("multiply" in m.__dict__ for m in packed.modules())
    assert all(p.grad is None for p in packed.parameters())
    return total, error


def test_training_brings_the_model_nearer_and_the_regulariser_holds_salient_weights():
    _, untrained = drift_and_error(epochs=0)
    free, plain = drift_and_error(regularisation=0.0)
    held, regularised = drift_and_error(regularisation=10.0)
    assert plain < 0.8 * untrained
    assert regularised < untrained
    assert held < 0.95 * free


def test_clipping_and_adapters_both_learn():
    model, packed = tiny_model("llama"), tiny_model("llama")
    method(epochs=0).quantize_model_(model, TEXTS)
    method().quantize_model_(packed, TEXTS)
    for before, after in zip(model.modules(), packed.modules(), strict=True):
        if isinstance(before, PackedTerms):
            assert not before.get_buffer("term1_left_dense").any()
            assert after.get_buffer("term1_left_dense").any()
            assert not torch.equal(before.get_buffer("term0_scale"), after.get_buffer("term0_scale"))


def test_the_folder_way_remembers_too(tmp_path: Path):
    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path / "dense")
    compress_folder(tmp_path / "dense", tmp_path / "packed", method(epochs=2), texts=TEXTS)
    method(epochs=2).quantize_model_(model, TEXTS)
    loaded = load_compressed(tmp_path / "packed")
    with torch.no_grad():
        assert torch.equal(loaded(TEXTS[0]).logits, model(TEXTS[0]).logits)


@pytest.mark.parametrize("settings", [{"rank": 0}, {"epochs": -1}, {"bits": 1}, {"regularisation": -1.0}])
def test_settings_are_checked(settings):
    with pytest.raises(CompositionError, match="needs 2 bits"):
        UltraLowBitPartialRetraining(**settings)
