"""AWQ: channels with large activations lose less, and ranges are cut where that helps."""

import torch

from pintpot.weights.awq import AWQ, EXPONENTS, best_scale
from pintpot.weights.formats import Grid, Scaled
from pintpot.weights.statistics import InputStatistics

ROWS, COLUMNS = 32, 128


def planted() -> tuple[torch.Tensor, torch.Tensor]:
    """Weights, and inputs of which three channels are 50 times as large as the others."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, COLUMNS, generator=generator)
    x[:, [5, 40, 99]] *= 50
    return torch.randn(ROWS, COLUMNS, generator=generator), x


def seen(x: torch.Tensor) -> InputStatistics:
    statistics = InputStatistics.empty(x.shape[1], x.device)
    statistics.add_(x)
    return statistics


def test_planted_outliers_keep_their_precision():
    dense, x = planted()
    method = AWQ(bits=3, group_size=32)
    formats = method.terms("mlp.up_proj.weight", ROWS, COLUMNS, torch.float32)
    stored = method.find("mlp.up_proj.weight", dense, formats, seen(x))[0]
    held = formats[0].decode(stored, COLUMNS, torch.float32)
    plain = Grid(bits=3, group_size=32)
    rounded = plain.decode(plain.encode(dense), COLUMNS, torch.float32)
    assert (x @ (dense - held).T).norm() < 0.8 * (x @ (dense - rounded).T).norm()
    scale = stored["input_scale"].float()
    assert scale[[5, 40, 99]].max() < scale.median() / 1.5


def test_scales_are_one_where_nothing_is_gained_and_best_of_the_grid_otherwise():
    dense, x = planted()
    layout = Scaled(inner=Grid(bits=4, group_size=32))
    statistics = seen(torch.randn(500, COLUMNS, generator=torch.Generator().manual_seed(1)).sign())
    assert torch.allclose(best_scale(dense, layout, statistics), torch.ones(COLUMNS), atol=0.01)
    errors = {}
    for share in (0.0, 0.3, 0.6, 0.9):
        scale = seen(x).magnitude.pow(share)
        scale = (scale.max() * scale.min()).sqrt() / scale
        held = layout.decode(layout.encode_with(dense, scale), COLUMNS, torch.float32)
        errors[share] = float(seen(x).error(dense - held).sum())
    chosen = layout.decode(layout.encode_with(dense, best_scale(dense, layout, seen(x))), COLUMNS, torch.float32)
    assert float(seen(x).error(dense - chosen).sum()) <= min(errors.values()) * 1.001


def test_scales_judged_on_some_rows_are_nearly_the_best_for_all():
    _, x = planted()
    dense = torch.randn(1200, COLUMNS, generator=torch.Generator().manual_seed(2))
    layout, statistics = Scaled(inner=Grid(bits=3, group_size=32)), seen(x)

    def error(scale: torch.Tensor) -> float:
        held = layout.decode(layout.encode_with(dense, scale), COLUMNS, torch.float32)
        return float(statistics.error(dense - held).sum())

    tried = [statistics.magnitude.pow(exponent).clamp(min=1e-4) for exponent in EXPONENTS]
    least = min(error((scale.max() * scale.min()).sqrt() / scale) for scale in tried)
    assert error(best_scale(dense, layout, statistics)) <= 1.03 * least


def test_queries_and_keys_are_not_cut():
    dense, x = planted()
    method = AWQ(bits=3, group_size=32)
    formats = method.terms("w", ROWS, COLUMNS, torch.float32)
    cut, whole = (
        method.find(f"model.layers.0.self_attn.{name}.weight", dense, formats, seen(x))[0]
        for name in ("v_proj", "k_proj")
    )
    assert (cut["inner_scale"] <= whole["inner_scale"]).all()
    assert (cut["inner_scale"] < whole["inner_scale"]).any()
