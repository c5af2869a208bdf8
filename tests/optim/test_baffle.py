"""BAFFLE against a plain twin, and what clients send."""

import pytest
import torch
from torch import nn

from pintpot.core.errors import ShapeError
from pintpot.optim import Baffle
from pintpot.optim._tensors import mix_seed

SHAPES = ((6, 5), (7,), (2, 3, 4))
SIGMA, K, LR = 1e-4, 6, 0.05


def start() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(7)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for s in SHAPES]


@torch.no_grad()
def loss_of(parameters: list[torch.Tensor], goal: float = 0.5) -> float:
    return float(sum((p - goal).square().sum() + (3 * p).sin().sum() for p in parameters)) / 50


def direction(step: int, number: int) -> list[torch.Tensor]:
    drawn = []
    for index, shape in enumerate(SHAPES):
        generator = torch.Generator().manual_seed(mix_seed(mix_seed(0, step, number), index, 0))
        drawn.append(torch.randn(torch.Size(shape).numel(), generator=generator, dtype=torch.float64).reshape(shape))
    return drawn


@pytest.mark.parametrize("clip", [0.3, 0.01, float("inf")])
def test_twenty_rounds_are_those_of_the_twin(clip):
    ours = start()
    twin = [nn.Parameter(p.detach().clone()) for p in ours]
    optimizer = Baffle(ours, lr=LR, directions=K, sigma=SIGMA, clip=clip)
    for step in range(20):
        optimizer.step(lambda: loss_of(ours))
        here = loss_of(twin)
        for p in twin:
            p.grad = torch.zeros_like(p)
        for number in range(K):
            delta = [SIGMA * z for z in direction(step, number)]
            rise = loss_of([p + d for p, d in zip(twin, delta, strict=True)]) - here
            for p, d in zip(twin, delta, strict=True):
                p.grad += rise / SIGMA * d / SIGMA / K
        nn.utils.clip_grad_norm_(twin, clip, norm_type="inf")
        with torch.no_grad():
            for p in twin:
                p -= LR * p.grad
    for p, expected in zip(ours, twin, strict=True):
        # Forward differences enlarge rounding errors of 1e-16 by 1e4.
        torch.testing.assert_close(p.detach(), expected.detach(), rtol=1e-8, atol=1e-8)


def test_clients_send_numbers_and_the_server_does_the_rest():
    together, server = start(), start()
    one = Baffle(together, lr=LR, directions=K)
    two = Baffle(server, lr=LR, directions=K)
    for _ in range(3):
        mean = one.step([lambda: loss_of(together, 0.0), lambda: loss_of(together, 2.0)])
        before = [p.detach().clone() for p in server]
        sent = [two.differences(lambda goal=goal: loss_of(server, goal)) for goal in (0.0, 2.0)]
        assert all(len(numbers) == K and all(type(x) is float for x in numbers) for numbers in sent)
        for p, old in zip(server, before, strict=True):
            torch.testing.assert_close(p.detach(), old, rtol=0, atol=1e-14)
        two.descend(sent)
        assert isinstance(mean, float)
    for a, b in zip(together, server, strict=True):
        # The sums are taken in another order, and the differences enlarge that by 1e4.
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    assert one.steps == two.steps == 3


def test_shares_weigh_the_clients():
    equal, weighed = start(), start()
    one, two = Baffle(equal, lr=LR, directions=2), Baffle(weighed, lr=LR, directions=2)
    one.descend([[1.0, 2.0]])
    two.descend([[0.0, 0.0], [4 / 3, 8 / 3]], shares=[1, 3])
    for a, b in zip(equal, weighed, strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(ShapeError, match="2 numbers"):
        one.descend([[1.0, 2.0, 3.0]])
    with pytest.raises(ShapeError, match="2 numbers"):
        one.descend([])


def test_many_directions_give_the_gradient():
    p = nn.Parameter(torch.zeros(20, dtype=torch.float64))
    slope = torch.arange(20.0, dtype=torch.float64) - 10
    Baffle([p], lr=1.0, directions=1000, clip=float("inf")).step(lambda: float((p * slope).sum()))
    # The error of each element is about |slope| / sqrt(K).
    cosine = torch.nn.functional.cosine_similarity(-p.detach(), slope, dim=0)
    assert float(cosine) > 0.98
    torch.testing.assert_close(-p.detach(), slope, rtol=0, atol=4 * float(slope.norm()) / 1000**0.5)


def test_a_client_that_fails_leaves_the_weights():
    p = nn.Parameter(torch.ones(5))
    losses = iter([1.0, 2.0])
    with pytest.raises(StopIteration):
        Baffle([p], directions=4).differences(lambda: next(losses))
    torch.testing.assert_close(p.detach(), torch.ones(5), rtol=1e-6, atol=0)
