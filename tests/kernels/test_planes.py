"""Losslessly stored numbers are put together by the compiled kernel as by numpy, byte for byte."""

import numpy as np
import pytest
import torch

from pintpot.core import byte_planes
from pintpot.core.model_folder import DTYPE_NAMES, DTYPES
from pintpot.kernels import native
from pintpot.kernels.planes import join_planes


@pytest.mark.parametrize("width", [2, 4])
def test_joined_as_numpy_does(isa, width):
    random = np.random.default_rng(0)
    for count in (0, 1, 3, 15, 16, 17, 1000):
        held = [random.integers(0, 256, count + 1, dtype=np.uint8) for _ in range(width)]
        for start in (0, 1):
            planes = [plane[start : start + count] for plane in held]
            found, expected = (np.zeros(width * count, np.uint8) for _ in range(2))
            join_planes(planes, found)
            byte_planes.join_exponents(planes, expected)
            assert np.array_equal(found, expected)


def test_every_pattern_of_16_bits_comes_back(isa):
    whole = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        stored = b"".join(byte_planes.encode(whole.view(dtype), DTYPE_NAMES[dtype]))
        again = byte_planes.decode(np.frombuffer(stored, np.uint8), DTYPES)
        assert torch.equal(again.view(torch.int16), whole)


def test_it_is_what_core_uses(compiled):
    assert byte_planes._joiner is join_planes


def test_planes_that_lie_apart_are_left_to_numpy(monkeypatch):
    planes = [np.arange(20, dtype=np.uint8)[::2], np.arange(10, dtype=np.uint8)]
    found, expected = (np.zeros(20, np.uint8) for _ in range(2))
    join_planes(planes, found)
    byte_planes.join_exponents(planes, expected)
    assert np.array_equal(found, expected)
    monkeypatch.setattr(native, "library", lambda: None)
    join_planes([np.ascontiguousarray(plane) for plane in planes], found)
    assert np.array_equal(found, expected)
