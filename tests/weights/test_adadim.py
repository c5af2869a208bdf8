"""Groups along the channels that lose less: large inputs stay among themselves."""

import pytest
import torch

from pintpot.core.errors import CompositionError
from pintpot.weights import Grid, Transposed
from pintpot.weights.adadim import AdaDim
from pintpot.weights.statistics import InputStatistics
from pintpot.weights.targets import Target
from tests.architectures import tiny_model

SIZE = 64


def case(outlier: str) -> tuple[torch.Tensor, InputStatistics]:
    """A weight with large numbers in some input or output channels, and inputs with a few large channels."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(SIZE, SIZE, generator=generator)
    tokens = torch.randn(512, SIZE, generator=generator)
    if outlier == "input":
        weight[:, ::16] *= 12
        tokens[:, 1::16] *= 20
    else:
        weight[::16] *= 12
    statistics = InputStatistics.empty(SIZE, torch.device("cpu"))
    statistics.add_(tokens)
    return weight, statistics


def decided(method: AdaDim, weight: torch.Tensor, statistics: InputStatistics):
    target = Target("w", "w", "w", tuple(weight.shape), False, torch.float32)
    return method.layout([target], {"w": method.examine("w", weight, statistics)})["w"]


@pytest.mark.parametrize("base", ["rtn", "gptq"])
@pytest.mark.parametrize(("outlier", "kind"), [("input", Transposed), ("output", Grid)])
def test_the_grouping_that_isolates_the_outliers_is_chosen_and_loses_less(base, outlier, kind):
    method = AdaDim(bits=3, group_size=32, base=base)
    weight, statistics = case(outlier)
    formats = decided(method, weight, statistics)
    assert isinstance(formats[0], kind)
    grid = method.terms("w", SIZE, SIZE, torch.float32)[0]
    errors = []
    for layout in (grid, Transposed(inner=grid, out_features_held=SIZE)):
        (stored,) = method.find("w", weight, (layout,), statistics)
        held = layout.decode(stored, SIZE, torch.float32)
        errors.append(float(statistics.error(weight - held).sum()))
    assert min(errors) == errors[0 if kind is Grid else 1]
    assert max(errors) > 1.3 * min(errors)


def test_compensation_works_along_outputs_too():
    weight, statistics = case("input")
    mixed = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    statistics.hessian = mixed @ statistics.hessian @ mixed.T
    layout = (Transposed(inner=Grid(bits=3, group_size=32), out_features_held=SIZE),)
    errors = []
    for base in ("rtn", "gptq"):
        (stored,) = AdaDim(bits=3, group_size=32, base=base).find("w", weight, layout, statistics)
        held = layout[0].decode(stored, SIZE, torch.float32)
        errors.append(float(statistics.error(weight - held).sum()))
    assert errors[1] < 0.8 * errors[0]


def test_only_equal_bytes_are_exchanged():
    """A matrix whose rows make no whole groups along outputs keeps its grouping, so that bytes follow from shapes."""
    method = AdaDim(bits=3, group_size=32)
    target = Target("w", "w", "w", (20, SIZE), False, torch.float32)
    formats = method.layout([target], {"w": {"errors": torch.tensor([1.0, 0.1])}})["w"]
    assert formats == method.layout([target])["w"]


def test_a_model_is_grouped_by_layer():
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data[:, ::16] *= 12
    texts = [torch.randint(3, 256, (2, 48), generator=torch.Generator().manual_seed(0))]
    AdaDim(bits=4, group_size=32, base="rtn", symmetric=True).quantize_model_(model, texts)
    kinds = {name: type(m.formats[0]) for name, m in model.named_modules() if hasattr(m, "formats")}
    assert all(kind is Transposed for name, kind in kinds.items() if name.endswith("down_proj"))
    assert Grid in kinds.values()


@pytest.mark.parametrize("settings", [{"base": "awq"}, {"group_size": -1}])
def test_what_it_cannot_do_is_refused(settings):
    with pytest.raises(CompositionError, match="adadim works on groups"):
        AdaDim(**settings)
