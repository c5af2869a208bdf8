"""SVDQuant: outliers move to the weights, the branch takes them, and what is left goes into few bits."""

import pytest
import torch

from pintpot.core.errors import ShapeError
from pintpot.weights.formats import Grid, RoundedInput
from pintpot.weights.modules import CompressedLinear
from pintpot.weights.statistics import InputStatistics
from pintpot.weights.svdquant import SVDQuant, smoothing
from tests.architectures import tiny_model

ROWS, COLUMNS, TOKENS = 96, 128, 400


def weight() -> torch.Tensor:
    dense = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)) * 0.1
    dense[3] *= 6
    return dense


def inputs() -> torch.Tensor:
    x = torch.randn(TOKENS, COLUMNS, generator=torch.Generator().manual_seed(1))
    x[:, ::17] *= 40
    return x


def statistics() -> InputStatistics:
    seen = InputStatistics.empty(COLUMNS, torch.device("cpu"))
    seen.add_(inputs())
    return seen


def error_of(method: SVDQuant) -> float:
    """Relative squared error of the outputs, inputs rounded and all."""
    dense, x = weight(), inputs()
    formats = method.terms("w", ROWS, COLUMNS, torch.float32)
    found = method.find("w", dense, formats, statistics())
    out = sum(f.matmul(x, t) for f, t in zip(formats, found, strict=True))
    return float((out - x @ dense.T).square().sum() / (x @ dense.T).square().sum())


def test_four_bits_of_both_survive_outliers_that_rounding_alone_does_not():
    plain = RoundedInput(inner=Grid(bits=4, group_size=64, symmetric=True), bits=4, group_size=64)
    dense, x = weight(), inputs()
    rounded = plain.matmul(x, plain.encode(dense))
    alone = float((rounded - x @ dense.T).square().sum() / (x @ dense.T).square().sum())
    assert error_of(SVDQuant()) < 0.4 * alone


def test_the_branch_and_its_refinement_each_lower_the_error():
    assert error_of(SVDQuant(rank=6, iterations=0)) < error_of(SVDQuant(rank=1, iterations=0))
    assert error_of(SVDQuant(iterations=10)) < error_of(SVDQuant(iterations=0))


def test_smoothing_divides_the_largest_inputs_most():
    scale = smoothing(weight(), statistics(), 0.5)
    assert scale[::17].min() > 1.5 * scale[1:17].max()


def test_the_expected_error_is_that_of_samples_within_a_factor():
    method, dense = SVDQuant(), weight()
    formats = method.terms("w", ROWS, COLUMNS, torch.float32)
    found = method.find("w", dense, formats, statistics())
    x = inputs()
    out = sum(f.matmul(x, t) for f, t in zip(formats, found, strict=True))
    measured = float((out - x @ dense.T).square().sum() / TOKENS)
    assert method.error(dense, found, *formats, statistics()) == pytest.approx(measured, rel=0.5)


def test_on_a_model():
    model = tiny_model("llama")
    ids = torch.arange(64).view(2, 32) + 3
    with torch.no_grad():
        dense = model(ids).logits
        SVDQuant(bits=6).quantize_model_(model, [ids])
        assert isinstance(model.model.layers[0].mlp.up_proj, CompressedLinear)
        assert (model(ids).logits - dense).norm() < 0.2 * dense.norm()


@pytest.mark.parametrize("fields", [{"bits": 1}, {"bits": 9}, {"rank": 0}])
def test_refusals(fields):
    with pytest.raises(ShapeError, match="2 to 8 bits"):
        SVDQuant(**fields)
