"""Q-GaLore: its 4-bit basis, its growing gap, and its agreement with a plain float64 twin."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pintpot.core.errors import CompositionError
from pintpot.core.slots import check
from pintpot.jobs.training_state import flatten_state, unflatten_state
from pintpot.kernels import unpack
from pintpot.optim import QGaLore, QGaLoreRule
from pintpot.optim._leading import PackedSubspace
from pintpot.optim.adamw_4bit import FourBitStates

GAP, RANK, GROUP, STEPS, LR = 2, 4, 48, 20, 0.05
SHAPES = ((16, 24), (24, 16), (3, 10, 14))
SETTINGS = {
    "lr": LR, "rank": RANK, "update_gap": GAP, "group_size": GROUP, "queue_refreshes": 2, "weight_decay": 0.1
}  # fmt: skip


def gradients(step: int) -> list[torch.Tensor]:
    """A direction that stays and noise, so that leading vectors of some matrices keep still."""
    fixed, moving = (torch.Generator().manual_seed(seed) for seed in (1, 1000 + step))
    found = []
    for shape in SHAPES:
        left = torch.randn((*shape[:-1], 1), generator=fixed, dtype=torch.float64)
        right = torch.randn((*shape[:-2], 1, shape[-1]), generator=fixed, dtype=torch.float64)
        found.append(left @ right + torch.randn(shape, generator=moving, dtype=torch.float64))
    return found


def start(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(7)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in SHAPES]


def run(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        for p, g in zip(parameters, gradients(step), strict=True):
            p.grad = g.to(p.dtype)
        optimizer.step()


def rounded(basis: torch.Tensor) -> torch.Tensor:
    """The basis after 4 bits, one group at a time."""
    flat, found = basis.reshape(-1), []
    for begin in range(0, len(flat), GROUP):
        group = flat[begin : begin + GROUP]
        low, high = group.min(), group.max()
        if len(group) < GROUP:
            low, high = low.clamp_max(0), high.clamp_min(0)
        scale = ((high - low) / 15).clamp_min(1e-5)
        zero = (-low / scale).round().clamp(0, 15)
        found.append(scale * ((group / scale).round() + zero).clamp(0, 15).sub(zero))
    return torch.cat(found).view_as(basis)


class Twin:
    """One parameter, its matrices one at a time, the smaller side on the left."""

    def __init__(self) -> None:
        self.gap, self.queue, self.bases, self.moments = GAP, [], {}, {}

    def update(self, matrices: list[torch.Tensor], step: int) -> list[torch.Tensor]:
        if step % self.gap == 0:
            cosines = []
            for key, g in enumerate(matrices):
                u = torch.linalg.svd(g, full_matrices=False)[0][:, :RANK]
                u = u * u[u.abs().argmax(0), torch.arange(RANK)].sign()
                if key in self.bases:
                    old = self.bases[key][:, 0]
                    cosines.append(float(old @ u[:, 0] / old.norm()))
                self.bases[key] = rounded(u)
            if cosines:
                self.queue = [*self.queue, sum(cosines) / len(cosines)][-2:]
                if len(self.queue) == 2 and sum(self.queue) / 2 >= 0.4:
                    self.gap *= 2
        found = []
        for key, g in enumerate(matrices):
            p = self.bases[key]
            small = p.T @ g
            m, v = self.moments.get(key, (torch.zeros_like(small), torch.zeros_like(small)))
            m, v = 0.9 * m + 0.1 * small, 0.999 * v + 0.001 * small**2
            self.moments[key] = (m, v)
            direction = (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
            found.append(0.25 * p @ direction)
        return found


def test_twenty_steps_are_those_of_the_float64_twin():
    ours = start()
    optimizer = QGaLore(ours, state_bits=32, **SETTINGS)
    weights, twins = [p.detach().clone() for p in ours], [Twin() for _ in ours]
    for step in range(STEPS):
        run(optimizer, ours, range(step, step + 1))
        for index, g in enumerate(gradients(step)):
            wide = g.shape[-2] <= g.shape[-1]
            matrices = [x if wide else x.T for x in g.reshape(-1, *g.shape[-2:])]
            updates = [u if wide else u.T for u in twins[index].update(matrices, step)]
            weights[index] = weights[index] * (1 - LR * 0.1) - LR * torch.stack(updates).view_as(g)
    for p, w, twin in zip(ours, weights, twins, strict=True):
        # The cosine is taken in float32 and only compared; the rest is float64.
        torch.testing.assert_close(p.detach(), w, rtol=1e-9, atol=1e-9)
        assert GAP * 2 ** optimizer.state[p].get("growths", 0) == twin.gap
    assert {twin.gap for twin in twins} != {GAP}


def test_the_basis_is_kept_in_half_a_byte_and_the_moments_in_one():
    p = nn.Parameter(torch.zeros(64, 96))
    optimizer = QGaLore([p], rank=32)
    p.grad = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    exact = torch.linalg.svd(p.grad)[0][:, :32]
    optimizer.step()
    state = optimizer.state[p]
    assert state["basis"].nbytes == 64 * 32 // 2
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.uint8
    codes = unpack(state["basis"], 4, 64 * 32)
    assert 10 < len(codes.unique()) <= 16
    kept = PackedSubspace(32).basis(state, p.grad)
    signs = (kept * exact).sum(0).sign()
    # Half a step of a group whose range is at most 2.
    assert (kept * signs - exact).abs().max() <= float(state["basis_scale"].max()) / 2 + 1e-5


@pytest.mark.parametrize(("still", "seen"), [(True, [0, 1, 2, 4, 8]), (False, [*range(12)])])
def test_refreshes_become_rarer_only_where_the_subspace_keeps_still(still, seen):
    p = nn.Parameter(torch.zeros(12, 16))
    optimizer = QGaLore([p], rank=2, update_gap=1, queue_refreshes=2, cosine_threshold=0.9)
    refreshed, before = [], None
    for step in range(12):
        generator = torch.Generator().manual_seed(0 if still else step)
        p.grad = torch.randn(12, 16, generator=generator)
        optimizer.step()
        basis = optimizer.state[p]["basis"]
        refreshed += [step] if basis is not before else []
        before = basis
    assert refreshed == seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resuming_through_a_checkpoint_is_exact(dtype):
    whole, parted = start(dtype), start(dtype)
    run(QGaLore(whole, **SETTINGS), whole, range(STEPS))
    early = QGaLore(parted, **SETTINGS)
    run(early, parted, range(GAP * 3 - 1))
    saved = unflatten_state(*flatten_state(copy.deepcopy(early.state_dict())))
    late = QGaLore(parted, **SETTINGS)
    late.load_state_dict(saved)
    run(late, parted, range(GAP * 3 - 1, STEPS))
    assert all(torch.equal(a, b) for a, b in zip(whole, parted, strict=True))


def test_fake_tensors_have_the_same_state_sizes():
    real = start(torch.bfloat16)
    optimizer = QGaLore(real, **SETTINGS)
    run(optimizer, real, range(3))
    with FakeTensorMode():
        fake = [nn.Parameter(torch.empty(shape, dtype=torch.bfloat16)) for shape in SHAPES]
        shadow = QGaLore(fake, **SETTINGS)
        for _ in range(3):
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
    optimizer = QGaLore([p], rank=64, update_gap=1)
    for gradient in (torch.zeros(9, 31), torch.zeros(9, 31), torch.ones(9, 31)):
        p.grad = gradient
        optimizer.step()
        assert p.isfinite().all()
    assert float((p.detach() - 1).abs().max()) > 0


def test_no_other_kind_of_states_beside_its_own():
    with pytest.raises(CompositionError, match="whole_moments"):
        check((QGaLoreRule(), FourBitStates()), "pretrain")
