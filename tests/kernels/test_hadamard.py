"""The fast Hadamard transform is the product with Sylvester's matrix."""

import pytest
import torch
from scipy.linalg import hadamard as sylvester

from pintpot.core.errors import ShapeError
from pintpot.kernels.hadamard import hadamard, power_of_two

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
