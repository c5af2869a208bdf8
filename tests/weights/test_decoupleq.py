"""Integers and scales in turn, each the best for the other, and tuning of a block's scales."""

import copy

import pytest
import torch

from pintpot.core.errors import CompositionError
from pintpot.weights import Grid
from pintpot.weights.decoupleq import DecoupleQ, _Search
from pintpot.weights.gptq import GPTQ
from pintpot.weights.modules import PackedTerms
from pintpot.weights.statistics import InputStatistics
from tests.architectures import tiny_model

ROWS, COLUMNS = 12, 64


def case() -> tuple[torch.Tensor, InputStatistics]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS, generator=generator) + 0.5
    tokens = torch.randn(256, COLUMNS, generator=generator) @ torch.randn(COLUMNS, COLUMNS, generator=generator)
    statistics = InputStatistics.empty(COLUMNS, torch.device("cpu"))
    statistics.add_(tokens)
    return weight, statistics


def search(group_size: int = 24, bits: int = 2) -> _Search:
    weight, statistics = case()
    return _Search(weight, Grid(bits=bits, group_size=group_size, symmetric=True), statistics.hessian)


def value_of(method: DecoupleQ, weight: torch.Tensor, statistics: InputStatistics | None) -> torch.Tensor:
    formats = method.terms("w", ROWS, COLUMNS, torch.float32)
    found = method.find("w", weight, formats, statistics)
    return sum(f.decode(t, COLUMNS, torch.float32) for f, t in zip(formats, found, strict=True))


def test_scales_and_offsets_solve_the_least_squares_of_each_row():
    """Against the normal equations in float64, row by row, with a last group that is shorter."""
    found = search()
    codes = found._nearest(found.weight, found.scale, found.offset)
    scale, offset = found._solve_rows(codes, found.weight).chunk(2, dim=1)
    root = torch.linalg.cholesky(found.hessian.double()).T
    for row in range(ROWS):
        columns = []
        for numbers in (codes[row].double(), torch.ones(COLUMNS, dtype=torch.float64)):
            for start in range(0, COLUMNS, 24):
                part = torch.zeros(COLUMNS, dtype=torch.float64)
                part[start : start + 24] = numbers[start : start + 24]
                columns.append(root @ part)
        wanted = root @ found.weight[row].double()
        best = torch.linalg.lstsq(torch.stack(columns, 1), wanted[:, None]).solution[:, 0]
        torch.testing.assert_close(torch.cat([scale[row], offset[row]]).double(), best, rtol=1e-2, atol=1e-3)


def test_every_round_lowers_the_error_and_offsets_are_no_integers():
    errors = []
    for rounds in (1, 2, 4):
        found = search()
        found.alternate_(rounds)
        errors.append(float(found.error.sum()))
    assert errors[2] <= errors[1] < 0.9 * errors[0]
    steps = found.offset / found.scale
    assert (steps - steps.round()).abs().mean() > 0.1


@pytest.mark.parametrize("group_size", [32, -1])
def test_nearer_than_gptq_at_two_bits(group_size):
    weight, statistics = case()
    ours = value_of(DecoupleQ(group_size=group_size), weight, statistics)
    peer = GPTQ(bits=2, group_size=group_size)
    formats = peer.terms("w", ROWS, COLUMNS, torch.float32)
    theirs = formats[0].decode(peer.find("w", weight, formats, statistics)[0], COLUMNS, torch.float32)
    error = [float(statistics.error(weight - held).sum()) for held in (ours, theirs)]
    assert error[0] < 0.7 * error[1]


def test_without_inputs_and_with_constant_groups():
    weight, _ = case()
    weight[:, :32] = 0.25
    held = value_of(DecoupleQ(bits=4, group_size=32), weight, None)
    assert (held[:, :32] - 0.25).abs().max() < 1e-3
    assert (held - weight).norm() < 0.1 * weight.norm()


def test_tuning_brings_a_block_nearer_and_leaves_codes_alone():
    model = tiny_model("llama")
    texts = [torch.randint(3, 256, (2, 32), generator=torch.Generator().manual_seed(s)) for s in range(2)]
    with torch.no_grad():
        dense = model(texts[0]).logits
    errors, codes = {}, {}
    for epochs in (0, 4):
        packed = copy.deepcopy(model)
        DecoupleQ(group_size=32, rounds=1, epochs=epochs, learning_rate=1e-3).quantize_model_(packed, texts)
        first = next(m for m in packed.model.layers[0].modules() if isinstance(m, PackedTerms))
        codes[epochs] = first.get_buffer("term0_packed")
        with torch.no_grad():
            errors[epochs] = float((packed(texts[0]).logits - dense).square().mean())
        assert not any("multiply" in m.__dict__ for m in packed.modules())
        assert all(p.grad is None for p in packed.parameters())
    assert torch.equal(codes[0], codes[4])
    assert errors[4] < 0.9 * errors[0]


def test_settings_are_checked():
    with pytest.raises(CompositionError, match="a round at least"):
        DecoupleQ(rounds=0)
