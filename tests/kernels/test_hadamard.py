"""The fast Hadamard transform is the product with Sylvester's matrix."""

import pytest
import torch
from scipy.linalg import hadamard as sylvester

from pintpot.core.errors import CompositionError, ShapeError
from pintpot.kernels.hadamard import hadamard, hadamard_definition, power_of_two

torch.set_num_threads(1)


@pytest.mark.parametrize(("size", "block"), [(1, 1), (8, 8), (64, 16), (96, 32), (512, 512)])
def test_it_is_the_matrix_product_and_its_own_inverse(size, block):
    numbers = torch.randn(2, 3, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = torch.from_numpy(sylvester(block)).double() / block**0.5
    expected = (numbers.unflatten(-1, (-1, block)) @ matrix).flatten(-2)
    mixed = hadamard(numbers, block)
    torch.testing.assert_close(mixed, expected)
    torch.testing.assert_close(hadamard(mixed, block), numbers)


def test_half_precision_keeps_its_dtype():
    assert hadamard(torch.ones(4, dtype=torch.bfloat16), 4).tolist() == [2, 0, 0, 0]


def test_the_greatest_power_of_two():
    assert [power_of_two(size) for size in (1, 64, 80, 96, 105)] == [1, 64, 16, 32, 1]


@pytest.mark.parametrize("block", [0, 3, 16])
def test_impossible_blocks_are_refused(block):
    with pytest.raises(ShapeError) as caught:
        hadamard(torch.zeros(24), block)
    assert "8" in caught.value.hint


SHAPES = ((1, 1), (3, 1), (6, 2), (12, 4), (24, 8), (528, 16), (96, 32), (128, 64), (4096, 4096), (320, 64), (0, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_compiled_is_bit_for_bit_the_definition(isa, threads, dtype):
    for rows in (3, 70):
        for size, block in SHAPES:
            numbers = torch.randn(rows, size + 1, generator=torch.Generator().manual_seed(size)).to(dtype)
            for part in (numbers[:, :size].contiguous(), numbers.view(-1)[1 : 1 + size]):
                found = torch.ops.pintpot.hadamard(part, block)
                assert torch.equal(found, hadamard_definition(part, block)), (size, block)


def test_blocks_do_not_mix(isa):
    numbers = torch.randn(2, 96, generator=torch.Generator().manual_seed(0))
    clean = torch.ops.pintpot.hadamard(numbers, 8)
    numbers[1, 17] = torch.nan
    found = torch.ops.pintpot.hadamard(numbers, 8)
    assert found[1, 16:24].isnan().all()
    assert found.isnan().sum() == 8
    assert torch.equal(found[~found.isnan()], clean[~found.isnan()])


def test_strided_numbers_and_gradients(compiled):
    numbers = torch.randn(16, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    mixed = hadamard(numbers.t(), 8)
    torch.testing.assert_close(mixed, hadamard_definition(numbers.t(), 8))
    back = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))
    (found,) = torch.autograd.grad(mixed, numbers, back)
    torch.testing.assert_close(found, hadamard_definition(back, 8).t())
    exact = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: hadamard(x, 4), exact)


def test_what_the_operation_refuses(compiled):
    torch.library.opcheck(torch.ops.pintpot.hadamard.default, (torch.randn(3, 8), 4))
    for numbers, block in ((torch.zeros(24), 16), (torch.zeros(8).double(), 8), (torch.zeros(8, 8)[:, :4], 4)):
        with pytest.raises(ShapeError):
            torch.ops.pintpot.hadamard(numbers, block)
    with pytest.raises(CompositionError, match="vmap"):
        torch.vmap(lambda row: hadamard(row, 4))(torch.zeros(3, 8))
