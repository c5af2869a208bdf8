"""Each optimizer against a plain float64 twin, and what its idea promises."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pintpot.core.errors import CompositionError, ShapeError, TrainingError
from pintpot.optim import Apollo, ApolloMini, Fira, GaLore
from pintpot.optim._leading import LeadingSubspace
from pintpot.optim._tensors import CHUNK_NUMEL, chunks, mix_seed

GAP, RANK, STEPS, LR, DECAY = 7, 4, 20, 0.05, 0.1
SHAPES = ((16, 24), (24, 16), (12,), (3, 10, 14))
KINDS = {"galore": GaLore, "fira": Fira, "apollo": Apollo, "apollo-mini": ApolloMini}


def gradients(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


def start(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(7)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in SHAPES]


def make(name: str, parameters: object, **more: object) -> torch.optim.Optimizer:
    settings = {"lr": LR, "weight_decay": DECAY, "update_gap": GAP, **more}
    if name != "apollo-mini":
        settings["rank"] = RANK
    return KINDS[name](parameters, **settings)


def run(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        for p, g in zip(parameters, gradients(step), strict=True):
            p.grad = g.to(p.dtype)
        optimizer.step()


def adam(moments: dict, key: object, g: torch.Tensor, step: int) -> torch.Tensor:
    """The textbook rule, one tensor at a time."""
    m, v = moments.get(key, (torch.zeros_like(g), torch.zeros_like(g)))
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    moments[key] = (m, v)
    return (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)


class ByMatrix:
    """A method as its paper writes it, one matrix at a time, the smaller side on the left: ``update`` is the method."""

    def __init__(self) -> None:
        self.moments: dict = {}

    def step(self, weights: list[torch.Tensor], step: int) -> list[torch.Tensor]:
        moved = []
        for index, (w, g) in enumerate(zip(weights, gradients(step - 1), strict=True)):
            w = w * (1 - LR * DECAY)
            if w.dim() == 1:
                moved.append(w - LR * adam(self.moments, index, g, step))
                continue
            many_w, many_g = w.reshape(-1, *w.shape[-2:]), g.reshape(-1, *g.shape[-2:])
            wide = w.shape[-2] <= w.shape[-1]
            parts = []
            for expert in range(len(many_w)):
                update = self.update((index, expert), many_g[expert] if wide else many_g[expert].T, step)
                parts.append(many_w[expert] - LR * (update if wide else update.T))
            moved.append(torch.stack(parts).reshape(w.shape))
        return moved


class Twin(ByMatrix):
    """GaLore, Fira and APOLLO."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.basis, self.norms = name, {}, {}

    def update(self, key: tuple[int, int], g: torch.Tensor, step: int) -> torch.Tensor:
        """The update of one S x L matrix before the learning rate."""
        if (step - 1) % GAP == 0:
            if self.name in ("galore", "fira"):
                u = torch.linalg.svd(g, full_matrices=False)[0][:, :RANK]
                peaks = u[u.abs().argmax(0), torch.arange(RANK)]
                self.basis[key] = u * peaks.sign()
            else:
                rank = RANK if self.name == "apollo" else 1
                generator = torch.Generator().manual_seed(mix_seed(0, 0, key[0], (step - 1) // GAP))
                self.basis[key] = (torch.randn((rank, g.shape[0]), generator=generator) / rank**0.5).double().T
        p = self.basis[key]
        small = p.T @ g
        direction = adam(self.moments, key, small, step)
        if self.name == "galore":
            return 0.25 * p @ direction
        if self.name == "fira":
            rest = (g - p @ small) * (direction.norm(dim=0) / small.norm(dim=0))
            return 0.25 * p @ direction + self.limited(key, rest)
        if self.name == "apollo":
            update = g * (direction.norm(dim=0) / small.norm(dim=0))
        else:
            update = g * (direction.norm() / small.norm())
        return self.limited(key, update) * (1.0 if self.name == "apollo" else 128**0.5)

    def limited(self, key: tuple[int, int], update: torch.Tensor) -> torch.Tensor:
        norm = update.norm()
        if key in self.norms and norm > 1.01 * self.norms[key]:
            update = update / norm * 1.01 * self.norms[key]
        self.norms[key] = update.norm()
        return update


@pytest.mark.parametrize("name", KINDS)
def test_twenty_steps_are_those_of_the_float64_twin(name):
    ours, twin = start(), Twin(name)
    weights = [p.detach().clone() for p in ours]
    optimizer = make(name, ours)
    for step in range(STEPS):
        run(optimizer, ours, range(step, step + 1))
        weights = twin.step(weights, step + 1)
    for p, w in zip(ours, weights, strict=True):
        # Both are float64. Adam's division makes rounding of 1e-16 matter where a moment is near zero, no more.
        torch.testing.assert_close(p.detach(), w, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", KINDS)
def test_resuming_across_a_refresh_is_exact(name):
    whole, parted = start(torch.float32), start(torch.float32)
    first = make(name, whole)
    run(first, whole, range(STEPS))
    early = make(name, parted)
    run(early, parted, range(GAP - 1))
    saved = copy.deepcopy(early.state_dict())
    late = make(name, parted)
    late.load_state_dict(saved)
    run(late, parted, range(GAP - 1, STEPS))
    assert all(torch.equal(a, b) for a, b in zip(whole, parted, strict=True))


def test_a_bfloat16_state_is_restored_in_its_own_dtypes():
    parameters = start(torch.bfloat16)
    optimizer = make("apollo", parameters)
    run(optimizer, parameters, range(3))
    other = make("apollo", parameters)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p in parameters:
        for key, value in optimizer.state[p].items():
            if isinstance(value, torch.Tensor):
                assert other.state[p][key].dtype == value.dtype
                assert torch.equal(other.state[p][key], value)
            else:
                assert other.state[p][key] == value
    assert optimizer.state[parameters[0]]["update_norm"].dtype == torch.float32


def test_galore_moves_a_weight_only_inside_its_subspace_of_rank_r():
    p = nn.Parameter(torch.zeros(16, 24))
    optimizer = GaLore([p], lr=1.0, rank=RANK)
    p.grad = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    top = torch.linalg.svd(p.grad)[0][:, :RANK]
    optimizer.step()
    state = optimizer.state[p]
    assert {k: tuple(v.shape) for k, v in state.items() if k != "step"} == {
        "exp_avg": (RANK, 24),
        "exp_avg_sq": (RANK, 24),
        "basis": (16, RANK),
    }
    assert torch.linalg.matrix_rank(p.detach()) == RANK
    torch.testing.assert_close(top @ (top.T @ p.detach()), p.detach(), rtol=1e-4, atol=1e-5)


def test_the_subspace_is_that_of_the_svd_and_refreshed_on_time():
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(32, 80, generator=generator) * torch.logspace(0, -4, 80)
    state: dict = {}
    LeadingSubspace(8).refresh_(state, gradient, 0, {})
    exact = torch.linalg.svd(gradient.double())[0][:, :8]
    overlaps = torch.linalg.svdvals(exact.T @ state["basis"].double())
    torch.testing.assert_close(overlaps, torch.ones(8, dtype=torch.float64), rtol=0, atol=1e-6)
    p = nn.Parameter(torch.zeros(16, 24))
    optimizer = GaLore([p], rank=RANK, update_gap=3)
    seen = []
    for step in range(6):
        p.grad = gradients(step)[0].float()
        optimizer.step()
        seen.append(optimizer.state[p]["basis"])
    assert [torch.equal(seen[i], seen[0]) for i in range(6)] == [True, True, True, False, False, False]


@pytest.mark.parametrize(("kind", "rank"), [(Apollo, RANK), (ApolloMini, 1)])
def test_apollo_stores_no_projection_and_keeps_the_direction_of_the_gradient(kind, rank):
    p = nn.Parameter(torch.zeros(16, 24))
    optimizer = kind([p], lr=1.0, **({"rank": rank} if kind is Apollo else {}))
    p.grad = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    gradient = p.grad.clone()
    optimizer.step()
    state = optimizer.state[p]
    assert sum(v.numel() for v in state.values() if isinstance(v, torch.Tensor)) == 2 * rank * 24 + 1
    assert isinstance(state["seed"], int)
    ratios = -p.detach() / gradient
    along = (0,) if kind is Apollo else (0, 1)
    torch.testing.assert_close(ratios, ratios.mean(along, keepdim=True).expand_as(ratios), rtol=1e-4, atol=1e-5)
    assert torch.linalg.matrix_rank(p.detach()) == 16


def test_apollo_mini_holds_about_the_memory_of_sgd():
    p = nn.Parameter(torch.zeros(512, 2048))
    optimizer = ApolloMini([p])
    p.grad = torch.ones_like(p)
    optimizer.step()
    held = sum(v.nbytes for v in optimizer.state[p].values() if isinstance(v, torch.Tensor))
    assert held == 2 * 2048 * 4 + 4
    assert held < 0.005 * p.nbytes


def test_the_update_may_grow_by_one_percent_a_step():
    p = nn.Parameter(torch.zeros(16, 24))
    optimizer = Apollo([p], lr=1.0, rank=RANK)
    gradient = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    norms = []
    # Opposite gradients cancel in the first moment; then it builds up again, far faster than the limit.
    for sign in (1, -1, 1, 1, 1):
        before = p.detach().clone()
        p.grad = sign * gradient
        optimizer.step()
        norms.append((p.detach() - before).norm())
    growth = [float(b / a) for a, b in pairwise(norms)]
    assert growth[0] < 0.2
    assert growth[1:] == pytest.approx([1.01, 1.01, 1.01], abs=1e-3)


def test_random_projections_depend_on_seed_parameter_and_refresh():
    def states(seed: int) -> list[int]:
        parameters = start(torch.float32)
        optimizer = make("apollo", parameters, seed=seed)
        found = []
        for step in range(GAP + 1):
            run(optimizer, parameters, range(step, step + 1))
            if step in (0, GAP):
                found += [optimizer.state[parameters[i]]["seed"] for i in (0, 1)]
        return found

    assert states(3) == states(3)
    assert len({*states(3), *states(4)}) == 8


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(name, bad):
    for policy in ("raise", "skip"):
        parameters = start(torch.float32)
        optimizer = make(name, parameters, nonfinite=policy)
        run(optimizer, parameters, range(2))
        before = [p.detach().clone() for p in parameters]
        held = copy.deepcopy(optimizer.state_dict())
        for p, g in zip(parameters, gradients(2), strict=True):
            p.grad = g.float()
        parameters[2].grad[3] = bad
        if policy == "raise":
            with pytest.raises(TrainingError, match=r"\(12,\)"):
                optimizer.step()
        else:
            optimizer.step()
        assert all(torch.equal(a, p) for a, p in zip(before, parameters, strict=True))
        after = optimizer.state_dict()
        for key, state in held["state"].items():
            assert all(
                torch.equal(v, after["state"][key][n]) if isinstance(v, torch.Tensor) else v == after["state"][key][n]
                for n, v in state.items()
            )


def test_gradients_whose_norm_alone_overflows_are_finite():
    p = nn.Parameter(torch.zeros(16, 24))
    p.grad = torch.full((16, 24), 3e38)
    assert GaLore([p], rank=2)._finite([p])
    q = nn.Parameter(torch.zeros(12))
    q.grad = torch.full((12,), 3e38)
    assert GaLore([q])._finite([q])


@pytest.mark.parametrize("name", KINDS)
def test_zero_gradients_and_recovery(name):
    parameters = start(torch.float32)
    optimizer = make(name, parameters)
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(torch.isfinite(p).all() for p in parameters)
    before = [p.detach().clone() for p in parameters]
    run(optimizer, parameters, range(2))
    # A limiter that remembered the zero would hold every later update at zero.
    assert all((a - p).abs().max() > 1e-3 for a, p in zip(before, parameters, strict=True))


@pytest.mark.parametrize("name", ["galore", "apollo"])
def test_a_rank_above_the_smaller_side_is_that_side(name):
    p = nn.Parameter(torch.zeros(10, 30))
    optimizer = KINDS[name]([p], rank=64)
    p.grad = torch.randn(10, 30, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    assert optimizer.state[p]["exp_avg"].shape == (10, 30)


def test_frozen_late_and_plain_parameters():
    frozen, early, late = start(torch.float32)[:3]
    other = nn.Parameter(torch.zeros(16, 24))
    optimizer = GaLore([{"params": [frozen, early]}], lr=LR, rank=RANK)
    early.grad = torch.ones_like(early)
    before = frozen.detach().clone()
    optimizer.step()
    assert torch.equal(before, frozen)
    assert frozen not in optimizer.state
    optimizer.add_param_group({"params": [late, other], "projected": False, "lr": 0.5})
    late.grad, other.grad = torch.ones_like(late), torch.ones_like(other)
    optimizer.step()
    assert optimizer.state[other]["exp_avg"].shape == (16, 24)
    assert (optimizer.state[late]["step"], optimizer.state[early]["step"]) == (1, 2)


def test_plain_parameters_follow_torch_adamw():
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, CHUNK_NUMEL + 1000)) for _ in range(2))
    mine = GaLore([{"params": [ours], "projected": False}], lr=0.01, weight_decay=0.1)
    reference = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1)
    for step in range(3):
        for p in (ours, theirs):
            p.grad = torch.cos(p.detach() * (step + 3))
        mine.step()
        reference.step()
    torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-5, atol=1e-6)


def test_groups_schedulers_and_closures():
    parameters = start(torch.float32)
    optimizer = Apollo([{"params": parameters[:1], "rank": 2}, {"params": parameters[1:2]}], lr=0.1, rank=RANK)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = sum((p**2).sum() for p in parameters[:2])
        loss.backward()
        return loss.detach()

    first = float(optimizer.step(closure))
    scheduler.step()
    second = float(optimizer.step(closure))
    assert second < first
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
    assert [optimizer.state[p]["exp_avg"].shape[0] for p in parameters[:2]] == [2, RANK]


def test_settings_that_make_no_sense_are_refused():
    p = nn.Parameter(torch.zeros(16, 24))
    with pytest.raises(CompositionError, match="no parameter 'ranks'"):
        GaLore([p], ranks=3)
    with pytest.raises(CompositionError, match="no setting ranks"):
        GaLore([{"params": [p], "ranks": 3}])
    for settings in ({"rank": 0}, {"update_gap": 0}, {"scale": -1.0}):
        with pytest.raises(ShapeError, match="must be positive"):
            GaLore([p], **settings)
    sparse = nn.Parameter(torch.zeros(16, 24))
    sparse.grad = torch.zeros(16, 24).to_sparse()
    with pytest.raises(ShapeError, match="sparse"):
        GaLore([sparse]).step()


@pytest.mark.parametrize("name", KINDS)
def test_runs_on_fake_tensors_with_the_same_state_sizes(name):
    real = start(torch.float32)
    optimizer = make(name, real)
    run(optimizer, real, range(1))
    with FakeTensorMode():
        fake = [nn.Parameter(torch.empty(shape)) for shape in SHAPES]
        shadow = make(name, fake)
        for p in fake:
            p.grad = torch.empty(p.shape)
        shadow.step()
        shadow.step()
        for p, q in zip(real, fake, strict=True):
            sizes = [
                {k: v.nbytes for k, v in o.state[x].items() if isinstance(v, torch.Tensor)}
                for o, x in ((optimizer, p), (shadow, q))
            ]
            assert sizes[0] == sizes[1]


def test_helpers():
    assert list(chunks([3, 3, 3, 9, 1], limit=6)) == [[0, 1], [2], [3], [4]]
    assert len({mix_seed(s, a, b) for s in range(5) for a in range(5) for b in range(5)}) == 125
