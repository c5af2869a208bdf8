"""Large products with a basis are made in bfloat16, strip by strip, and are right to its precision in every layout."""

import pytest
import torch
from torch import nn

from pintpot.optim import GaLore
from pintpot.optim import _products as products
from pintpot.optim._inner import Adam
from pintpot.optim._residual import _norm
from pintpot.optim._tensors import CHUNK_NUMEL, is_dense


def matrix(side: int, long: int, across: bool) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(long, side).mT if across else torch.randn(side, long)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize(("side", "long", "rank"), [(96, 20_011, 24), (7, 300, 7), (1, 5, 1)])
def test_narrow_products_are_right_to_bfloat16(side, long, rank, across):
    gradient, basis = matrix(side, long, across), torch.linalg.qr(torch.randn(side, rank))[0]
    small = basis.double().mT @ gradient.double()
    assert error(products.down(basis, gradient, narrow=True), small) < 5e-3
    assert error(products.down(basis, gradient, narrow=False), small) < 1e-6
    target = matrix(side, long, across)
    expected = target.double() - 0.5 * basis.double() @ small
    move = expected - target.double()
    before = target.clone()
    products.up_(target, basis, small.float(), -0.5, narrow=True)
    assert error(target - before, move) < 1e-2


def test_only_large_float32_matrices_are_narrowed():
    cpu = torch.device("cpu")
    fast = products._multiplies_bfloat16("cpu")
    assert products.is_narrowed((4096, 4096), 64, torch.float32, cpu) == fast
    assert not products.is_narrowed((4096, 4096), 64, torch.float64, cpu)
    assert not products.is_narrowed((4096, 4096), 64, torch.bfloat16, cpu)
    assert not products.is_narrowed((64, 64), 64, torch.float32, cpu)
    assert not products.is_narrowed((8, 4096, 4096), 64, torch.float32, cpu)


def test_exact_products_can_be_asked_for():
    moved = []
    for exact in (True, False):
        p = nn.Parameter(torch.zeros(512, 1024))
        p.grad = matrix(512, 1024, across=False)
        GaLore([p], lr=1.0, rank=256, exact_products=exact).step()
        moved.append(p.detach())
    # Adam's first direction is a sign, which rounding turns where the small gradient is near zero.
    assert error(moved[1], moved[0].double()) < 0.1
    assert torch.equal(*moved) != products._multiplies_bfloat16("cpu")


@pytest.mark.parametrize("across", [False, True])
def test_norms_of_columns_of_a_large_matrix(across):
    large = matrix(600, CHUNK_NUMEL // 500, across)
    expected = large.double().norm(dim=-2, keepdim=True)
    torch.testing.assert_close(_norm(large, (-2,)).double(), expected, rtol=1e-6, atol=0)
    stack = torch.stack((large, 2 * large))
    torch.testing.assert_close(_norm(stack, (-2,)).double(), torch.stack((expected, 2 * expected)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_adam_is_the_same_in_one_pass_and_in_several(dtype):
    torch.manual_seed(0)
    gradient = torch.randn(6, 10, dtype=dtype)
    found = []
    for layout in (gradient, gradient.mT.contiguous().mT):  # The second is laid out unlike its moments.
        moments = [[torch.full_like(gradient, 0.1)], [torch.full_like(gradient, 0.2)]]
        weight = torch.ones_like(gradient)
        directions = Adam().directions([layout], moments, [3])
        again = [[m[0].clone() for m in moments][i : i + 1] for i in range(2)]
        Adam().step_([weight], [layout], again, [4], 0.1, 0.5)
        found.append((directions[0], *(m[0] for m in moments), weight))
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_dense_layouts():
    whole = torch.zeros(4, 6, 8)
    for dense in (whole, whole.mT, whole.permute(2, 0, 1), whole[:1]):
        assert is_dense(dense)
    for gaps in (whole[:, :3], whole[:, :1].expand(4, 6, 8)):
        assert not is_dense(gaps)
