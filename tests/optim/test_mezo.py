"""MeZO against its algorithm as the paper writes it, and the memory that it promises."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from pintpot.core.errors import CompositionError, ShapeError, TrainingError
from pintpot.core.shape import ParameterShape
from pintpot.jobs.batches import PackedText
from pintpot.jobs.training import TrainSettings, train
from pintpot.ledger.tracker import Tracker
from pintpot.optim import Mezo, MezoRule
from pintpot.optim._tensors import CHUNK_NUMEL, mix_seed
from tests.architectures import tiny_model

SHAPES = ((6, 5), (7,), (2, 3, 4), ())
LR, DECAY = 0.02, 0.1


def start(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(7)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in SHAPES]


def loss_of(parameters: list[torch.Tensor]) -> float:
    return float(sum((p - 0.5).square().sum() + (3 * p).sin().sum() for p in parameters))


def direction(seed: int, step: int, sample: int) -> list[torch.Tensor]:
    drawn = []
    for number, shape in enumerate(SHAPES):
        generator = torch.Generator().manual_seed(mix_seed(mix_seed(seed, step, sample), number, 0))
        count = torch.Size(shape).numel()
        drawn.append(torch.randn(count, generator=generator, dtype=torch.float64).reshape(shape))
    return drawn


@pytest.mark.parametrize("samples", [1, 3])
def test_twenty_steps_are_those_of_algorithm_1(samples):
    ours = start()
    theta = [p.detach().clone() for p in ours]
    optimizer = Mezo(ours, lr=LR, weight_decay=DECAY, epsilon=1e-3, samples=samples, seed=3)
    for step in range(20):
        reported = optimizer.step(lambda: loss_of(ours))
        directions = [direction(3, step, sample) for sample in range(samples)]
        slopes, losses = [], []
        for z in directions:
            theta = [p + 1e-3 * d for p, d in zip(theta, z, strict=True)]
            losses.append(loss_of(theta))
            theta = [p - 2e-3 * d for p, d in zip(theta, z, strict=True)]
            losses.append(loss_of(theta))
            theta = [p + 1e-3 * d for p, d in zip(theta, z, strict=True)]
            slopes.append((losses[-2] - losses[-1]) / 2e-3)
        theta = [(1 - LR * DECAY) * p for p in theta]
        for z, slope in zip(directions, slopes, strict=True):
            theta = [p - LR / samples * slope * d for p, d in zip(theta, z, strict=True)]
        assert reported == pytest.approx(sum(losses) / len(losses), rel=1e-9)
    for p, expected in zip(ours, theta, strict=True):
        # Differences of 1e-16 in a loss become 1e-13 in a slope.
        torch.testing.assert_close(p.detach(), expected, rtol=1e-9, atol=1e-9)


def test_a_step_moves_along_one_direction_only():
    p = nn.Parameter(torch.zeros(50, dtype=torch.float64))
    optimizer = Mezo([p], lr=0.1)
    moved = []
    for _ in range(3):
        before = p.detach().clone()
        optimizer.step(lambda: float((p - 1).square().sum()))
        moved.append(p.detach() - before)
    for step, change in enumerate(moved):
        generator = torch.Generator().manual_seed(mix_seed(mix_seed(0, step, 0), 0, 0))
        z = torch.randn(50, generator=generator, dtype=torch.float64)
        # The way to both sides and back leaves a rounding error.
        torch.testing.assert_close(change, z * (change @ z) / (z @ z), rtol=0, atol=1e-14)
    assert torch.linalg.matrix_rank(torch.stack(moved), rtol=1e-6) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_as_large_as_the_model_is_made(dtype):
    model = nn.Linear(4096, 2048, bias=False, dtype=dtype)
    optimizer = Mezo(model, lr=1e-3, samples=2)
    with Tracker(samples=None) as tracker:
        tracker.register(model, optimizer)
        tracker.note()
        before = tracker.current_bytes()
        optimizer.step(lambda: float(model.weight[0, 0]))
        ledger = tracker.ledger()
    shape = SimpleNamespace(parameters=[ParameterShape("weight", (2048, 4096), dtype, "linear", "")], dtype=dtype)
    # A number that is read from the weights is beside the pieces.
    assert CHUNK_NUMEL <= ledger.peak_bytes() - before <= MezoRule().workspace_bytes(shape) + 64
    assert MezoRule().workspace_bytes(shape) < model.weight.nbytes


def test_perturbations_leave_no_trace_beyond_rounding():
    p = nn.Parameter(torch.linspace(-0.05, 0.05, 1001))
    before = p.detach().clone()
    optimizer = Mezo([p], lr=0.0)
    for _ in range(100):
        optimizer.step(lambda: float(p.sum()))
    # A random walk of 300 roundings, each of half a unit in the last place of 0.05 (1.9e-9) at most.
    assert float((p.detach() - before).abs().max()) < 1e-7


def test_pieces_have_directions_of_their_own_whatever_the_layout():
    p = nn.Parameter(torch.zeros(CHUNK_NUMEL // 1024 + 1, 1024).T)
    assert not p.is_contiguous()
    Mezo([p], lr=1.0).step(lambda: float(p.mean()) * 1e6)
    flat = p.detach().T.reshape(-1)
    first, second = flat[:1024], flat[CHUNK_NUMEL:]
    assert float(flat.abs().min()) >= 0
    assert len(torch.unique(flat)) > 0.9 * flat.numel()
    assert abs(float(torch.corrcoef(torch.stack((first, second)))[0, 1])) < 0.15


def test_frozen_parameters_stay_and_vectors_do_not_decay():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].requires_grad_(False)
    frozen = model[0].weight.clone()
    bias, weight = model[1].bias.detach().clone(), model[1].weight.detach().clone()
    Mezo(model, lr=0.5, weight_decay=1.0).step(lambda: 1.0)
    assert torch.equal(model[0].weight, frozen)
    torch.testing.assert_close(model[1].bias.detach(), bias)
    torch.testing.assert_close(model[1].weight.detach(), weight / 2)


def test_losses_are_taken_in_evaluation_mode():
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).train()
    model[0].eval()
    seen = []

    def closure() -> torch.Tensor:
        seen.append(model[1].training or torch.is_grad_enabled())
        return model(torch.ones(1, 3)).sum()

    Mezo(model).step(closure)
    assert seen == [False, False]
    assert [m.training for m in model.modules()] == [True, False, True]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite(bad):
    p = nn.Parameter(torch.ones(3))
    losses = iter([1.0, bad, 1.0, bad])
    with pytest.raises(TrainingError, match="step 1"):
        Mezo([p], lr=1.0).step(lambda: next(losses))
    Mezo([p], lr=1.0, nonfinite="skip").step(lambda: next(losses))
    torch.testing.assert_close(p.detach(), torch.ones(3))


def test_refusals():
    p = nn.Parameter(torch.ones(3))
    with pytest.raises(TrainingError, match="losses"):
        Mezo([p]).step()
    with pytest.raises(CompositionError, match="momentum"):
        Mezo([p], momentum=0.9)
    with pytest.raises(CompositionError, match="epsilon"):
        Mezo([{"params": [p], "epsilon": 0.1}])
    with pytest.raises(ShapeError, match="samples"):
        Mezo([p], samples=0)
    with pytest.raises(ShapeError, match="overlap"):
        Mezo([nn.Parameter(torch.ones(1, 3).expand(2, 3))])


def test_the_training_loop_resumes_it_bit_for_bit(tmp_path: Path):
    data = PackedText(np.random.default_rng(0).integers(3, 256, 500), sequence_tokens=16, sequences=2, steps=4, seed=1)

    def run(model: nn.Module, **settings: object) -> None:
        train(model, data, Mezo(model, lr=1e-3), lambda step: 1 / (1 + step), TrainSettings(progress=False, **settings))

    def stop(done: int, row: dict[str, float]) -> None:
        if done == 3:
            raise KeyboardInterrupt

    whole, parted = tiny_model("gpt2"), tiny_model("gpt2")
    run(whole)
    settings = TrainSettings(progress=False, checkpoints=tmp_path / "run", checkpoint_every=2)
    with pytest.raises(KeyboardInterrupt):
        train(parted, data, Mezo(parted, lr=1e-3), lambda step: 1 / (1 + step), settings, on_step=stop)
    run(parted, checkpoints=tmp_path / "run")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parted.parameters(), strict=True))
