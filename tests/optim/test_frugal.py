"""FRUGAL: random rows with Adam, signs for the rest, and its agreement with a plain float64 twin."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pintpot.core.errors import ShapeError
from pintpot.jobs.training_state import flatten_state, unflatten_state
from pintpot.optim import Frugal, _residual
from pintpot.optim._project import RandomRows
from pintpot.optim._tensors import mix_seed

GAP, STEPS, LR, DENSITY = 7, 20, 0.05, 0.3
SHAPES = ((16, 24), (24, 16), (12,), (3, 10, 14))


def gradients(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


def start(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(7)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in SHAPES]


def make(parameters: list[nn.Parameter], **more: float) -> Frugal:
    return Frugal(parameters, **{"lr": LR, "weight_decay": 0.1, "update_gap": GAP, "density": DENSITY, **more})


def run(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        for p, g in zip(parameters, gradients(step), strict=True):
            p.grad = g.to(p.dtype)
        optimizer.step()


def rows_of(index: int, side: int, turn: int) -> list[int]:
    generator = torch.Generator().manual_seed(mix_seed(0, 0, index, turn))
    return torch.randperm(side, generator=generator)[: int(side * DENSITY)].tolist()


def twin(index: int, steps: int) -> torch.Tensor:
    """One matrix (or stack), element by element whether a row has a state: 1 in the mask where it has."""
    w = start()[index].detach()
    for step in range(steps):
        g = gradients(step)[index]
        if step % GAP == 0:
            side = min(g.shape[-2:])
            mask = torch.zeros(side, dtype=torch.float64)
            mask[rows_of(index, side, step // GAP)] = 1
            mask = (mask[:, None] if g.shape[-2] == side else mask[None, :]).expand_as(g)
            m, v, age = torch.zeros_like(g), torch.zeros_like(g), 0
        age += 1
        full = g * mask
        m, v = 0.9 * m + 0.1 * full, 0.999 * v + 0.001 * full**2
        adam = (m / (1 - 0.9**age)) / ((v / (1 - 0.999**age)).sqrt() + 1e-8)
        w = w * (1 - LR * 0.1) - LR * 0.5 * (adam + 0.8 * (g - full).sign())
    return w


@pytest.mark.parametrize("limit", [1 << 20, 70])
def test_twenty_steps_are_those_of_the_float64_twin(limit, monkeypatch):
    monkeypatch.setattr(_residual, "CHUNK_NUMEL", limit)
    parameters = start()
    run(make(parameters, scale=0.5, rest_scale=0.8), parameters, range(STEPS))
    for index in (0, 1, 3):
        torch.testing.assert_close(parameters[index].detach(), twin(index, STEPS), rtol=1e-9, atol=1e-9)


def test_chosen_columns_follow_adam_and_all_others_their_sign():
    p = nn.Parameter(torch.zeros(24, 16))
    optimizer = Frugal([p], lr=1.0, density=0.25)
    for _ in range(2):
        p.grad = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
        p.grad[:, :8] *= 2
        before = p.detach().clone()
        optimizer.step()
    state = optimizer.state[p]
    rows = RandomRows(density=0.25).rows(state, p.grad.mT)
    assert state["exp_avg"].shape == (4, 24)
    assert set(state) == {"step", "seed", "forgotten", "exp_avg", "exp_avg_sq"}
    rest = torch.ones(16, dtype=torch.bool)
    rest[rows] = False
    assert torch.equal((before - p.detach())[:, rest], p.grad[:, rest].sign())
    # The same gradient twice: Adam's corrected moments are the gradient and its square.
    torch.testing.assert_close((before - p.detach())[:, rows], p.grad[:, rows].sign(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(state["exp_avg"], 0.19 * p.grad[:, rows].T, rtol=1e-5, atol=1e-6)


def test_rows_change_at_every_turn_and_with_them_the_moments_go():
    p = nn.Parameter(torch.zeros(40, 50))
    optimizer = Frugal([p], density=0.25, update_gap=3)
    drawn = []
    for step in range(6):
        p.grad = torch.randn(40, 50, generator=torch.Generator().manual_seed(step))
        optimizer.step()
        state = optimizer.state[p]
        rows = RandomRows(density=0.25).rows(state, p.grad)
        drawn.append(rows.tolist())
        if step % 3 == 0:
            torch.testing.assert_close(state["exp_avg"], 0.1 * p.grad[rows])
    assert drawn[0] == drawn[1] == drawn[2] != drawn[3] == drawn[5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [32, 8])
def test_resuming_through_a_checkpoint_is_exact(dtype, bits):
    whole, parted = start(dtype), start(dtype)
    run(make(whole, state_bits=bits), whole, range(STEPS))
    early = make(parted, state_bits=bits)
    run(early, parted, range(GAP + 2))
    saved = unflatten_state(*flatten_state(copy.deepcopy(early.state_dict())))
    late = make(parted, state_bits=bits)
    late.load_state_dict(saved)
    run(late, parted, range(GAP + 2, STEPS))
    assert all(torch.equal(a, b) for a, b in zip(whole, parted, strict=True))


def test_fake_tensors_have_the_same_state_sizes():
    real = start(torch.float32)
    optimizer = make(real)
    run(optimizer, real, range(1))
    with FakeTensorMode():
        fake = [nn.Parameter(torch.empty(shape)) for shape in SHAPES]
        shadow = make(fake)
        for p in fake:
            p.grad = torch.empty_like(p)
        shadow.step()
        for p, q in zip(real, fake, strict=True):
            one, two = (
                {k: v.shape for k, v in state.items() if isinstance(v, torch.Tensor)}
                for state in (optimizer.state[p], shadow.state[q])
            )
            assert one == two


def test_a_zero_gradient_moves_nothing_and_a_tiny_density_keeps_a_row():
    p = nn.Parameter(torch.ones(10, 20))
    optimizer = Frugal([p], density=0.01)
    p.grad = torch.zeros(10, 20)
    optimizer.step()
    assert torch.equal(p.detach(), torch.ones(10, 20))
    assert optimizer.state[p]["exp_avg"].shape == (1, 20)


def test_the_basis_is_that_of_the_rows():
    gradient = torch.randn(10, 14, generator=torch.Generator().manual_seed(0))
    project, state = RandomRows(density=0.5), {"seed": 3}
    basis = project.basis(state, gradient)
    assert torch.equal(basis.mT @ gradient, project.down(state, gradient))
    one, other = torch.zeros(10, 14), torch.zeros(10, 14)
    project.up_(one, state, gradient[:5], 2.0)
    super(RandomRows, project).up_(other, state, gradient[:5], 2.0)
    assert torch.equal(one, other)


def test_densities_that_make_no_sense_are_refused():
    for density in (0.0, 1.5):
        with pytest.raises(ShapeError, match="density"):
            Frugal([nn.Parameter(torch.ones(10, 10))], density=density)
