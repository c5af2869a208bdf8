"""DCT-AdamW: the transform, the choice of cosines, moments that move with them, and a plain float64 twin."""

import copy
import math

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pintpot.jobs.training_state import flatten_state, unflatten_state
from pintpot.optim import DctLowRank, _project
from pintpot.optim._project import CosineSubspace

RANK, STEPS, LR = 4, 20, 0.05
SHAPES = ((16, 24), (24, 17), (12,), (3, 10, 14))


def gradients(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


def start(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(7)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in SHAPES]


def make(parameters: list[nn.Parameter], **more: float) -> DctLowRank:
    return DctLowRank(parameters, **{"lr": LR, "weight_decay": 0.1, "rank": RANK, **more})


def run(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        for p, g in zip(parameters, gradients(step), strict=True):
            p.grad = g.to(p.dtype)
        optimizer.step()


def cosines(side: int) -> torch.Tensor:
    """The orthonormal DCT-II matrix, a vector a column."""
    place = torch.arange(side, dtype=torch.float64)
    basis = (2 / side) ** 0.5 * torch.cos(math.pi * (2 * place[:, None] + 1) * place[None, :] / (2 * side))
    basis[:, 0] /= 2**0.5
    return basis


class Twin:
    """One matrix as the paper writes it: a product with the whole basis, a sort, a rotation of the moments."""

    def __init__(self, gap: int) -> None:
        self.gap, self.chosen = gap, None

    def update(self, g: torch.Tensor, step: int) -> torch.Tensor:
        basis = cosines(len(g))
        if step % self.gap == 0:
            before = self.chosen
            self.chosen = basis[:, (basis.T @ g).abs().sum(1).topk(RANK).indices]
            if before is None:
                self.m = self.v = torch.zeros(RANK, g.shape[1], dtype=g.dtype)
            else:
                rotation = self.chosen.T @ before
                self.m, self.v = rotation @ self.m, (rotation @ self.v).abs()
        small = self.chosen.T @ g
        self.m, self.v = 0.9 * self.m + 0.1 * small, 0.999 * self.v + 0.001 * small**2
        direction = (self.m / (1 - 0.9 ** (step + 1))) / ((self.v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
        return self.chosen @ direction


@pytest.mark.parametrize("gap", [1, 3])
def test_twenty_steps_are_those_of_the_float64_twin(gap, monkeypatch):
    monkeypatch.setattr(_project, "CHUNK_NUMEL", 100)
    ours = start()
    optimizer = make(ours, update_gap=gap)
    run(optimizer, ours, range(STEPS))
    for index in (0, 1, 3):
        w = start()[index].detach()
        wide = w.shape[-2] <= w.shape[-1]
        matrices = [x if wide else x.T for x in w.reshape(-1, *w.shape[-2:])]
        twins = [Twin(gap) for _ in matrices]
        for step in range(STEPS):
            g = gradients(step)[index]
            parts = [x if wide else x.T for x in g.reshape(-1, *g.shape[-2:])]
            matrices = [
                x * (1 - LR * 0.1) - LR * twin.update(part, step)
                for x, part, twin in zip(matrices, parts, twins, strict=True)
            ]
        w = torch.stack([x if wide else x.T for x in matrices]).view_as(w)
        # A rotation in float64 is a permutation up to 1e-16, whose root Adam's division sees where a moment is new.
        torch.testing.assert_close(ours[index].detach(), w, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("side", [8, 9, 16, 31])
def test_the_fast_transform_ranks_as_the_product_does(side):
    gradient = torch.randn(2, side, 40, generator=torch.Generator().manual_seed(side))
    project = CosineSubspace(side)
    exact = (cosines(side).T @ gradient.double()).abs().sum(-1)
    norms = project._norms(gradient.double()) * (2 / side) ** 0.5
    torch.testing.assert_close(norms, exact, rtol=1e-12, atol=1e-12)
    basis = project.basis({"cosines": torch.arange(side, dtype=torch.int32)}, gradient[0].double())
    torch.testing.assert_close(basis, cosines(side), rtol=0, atol=1e-13)


def test_single_cosines_are_found_and_only_their_numbers_are_kept():
    planted = [1, 5, 30]
    p = nn.Parameter(torch.zeros(48, 64))
    optimizer = DctLowRank([p], lr=1.0, rank=3)
    mixture = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    p.grad = cosines(48)[:, planted].float() @ mixture
    optimizer.step()
    state = optimizer.state[p]
    assert state["cosines"].tolist() == planted
    assert sum(v.nbytes for v in state.values() if isinstance(v, torch.Tensor)) == 4 * 3 + 2 * 4 * 3 * 64
    assert torch.linalg.matrix_rank(p.detach()) == 3
    inside = cosines(48)[:, planted].float()
    torch.testing.assert_close(inside @ (inside.T @ p.detach()), p.detach(), rtol=1e-4, atol=1e-5)


def test_moments_stay_with_their_vector_and_new_ones_start_at_zero():
    project, state = CosineSubspace(3), {"cosines": torch.tensor([1, 4, 7], dtype=torch.int32)}
    moment = torch.tensor([[1.0] * 20, [2.0] * 20, [3.0] * 20])
    gradient = (cosines(10)[:, [4, 6, 7]] @ torch.randn(3, 20, dtype=torch.float64)).float()
    project.refresh_(state, gradient, 0, {"exp_avg": moment})
    assert state["cosines"].tolist() == [4, 6, 7]
    assert moment[:, 0].tolist() == [2.0, 0.0, 3.0]


def test_large_sides_keep_their_precision():
    numbers, side = torch.tensor([1, 4095, 8191], dtype=torch.int32), 8192
    basis = CosineSubspace(3).basis({"cosines": numbers}, torch.empty(side, 1))
    angles = math.pi * (2 * torch.arange(side, dtype=torch.float64)[:, None] + 1) * numbers / (2 * side)
    torch.testing.assert_close(basis.double(), (2 / side) ** 0.5 * angles.cos(), rtol=0, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [32, 8])
def test_resuming_through_a_checkpoint_is_exact(dtype, bits):
    whole, parted = start(dtype), start(dtype)
    run(make(whole, state_bits=bits), whole, range(10))
    early = make(parted, state_bits=bits)
    run(early, parted, range(4))
    saved = unflatten_state(*flatten_state(copy.deepcopy(early.state_dict())))
    late = make(parted, state_bits=bits)
    late.load_state_dict(saved)
    run(late, parted, range(4, 10))
    assert all(torch.equal(a, b) for a, b in zip(whole, parted, strict=True))


def test_fake_tensors_have_the_same_state_sizes():
    real = start(torch.bfloat16)
    optimizer = make(real)
    run(optimizer, real, range(2))
    with FakeTensorMode():
        fake = [nn.Parameter(torch.empty(shape, dtype=torch.bfloat16)) for shape in SHAPES]
        shadow = make(fake)
        for _ in range(2):
            for p in fake:
                p.grad = torch.empty_like(p)
            shadow.step()
        for p, q in zip(real, fake, strict=True):
            one, two = (
                {k: v.nbytes for k, v in state.items() if isinstance(v, torch.Tensor)}
                for state in (optimizer.state[p], shadow.state[q])
            )
            assert one == two


def test_zero_gradients_and_a_rank_above_the_side():
    p = nn.Parameter(torch.ones(9, 31))
    optimizer = DctLowRank([p], rank=64)
    p.grad = torch.zeros(9, 31)
    optimizer.step()
    assert torch.equal(p.detach(), torch.ones(9, 31))
    p.grad = torch.ones(9, 31)
    optimizer.step()
    assert optimizer.state[p]["cosines"].tolist() == list(range(9))
    assert p.isfinite().all()
    assert float((p.detach() - 1).abs().max()) > 0
