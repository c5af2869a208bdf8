"""Coding of tensors: every bit comes back, whatever the dtype, and damage is noticed."""

import numpy as np
import pytest
import torch

from pintpot.core import byte_planes
from pintpot.core.errors import ModelFolderError
from pintpot.core.model_folder import DTYPE_NAMES, DTYPES

SIZES = [(), (0,), (1,), (3, 5), (byte_planes.CHUNK,), (byte_planes.CHUNK + 1,), (3, byte_planes.CHUNK)]


def coded(tensor: torch.Tensor) -> np.ndarray:
    return np.frombuffer(b"".join(byte_planes.encode(tensor, DTYPE_NAMES[tensor.dtype])), np.uint8)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def trained(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(0.02).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_bit_comes_back(dtype):
    generator = torch.Generator().manual_seed(0)
    for shape in SIZES:
        count = int(np.prod(shape)) * dtype.itemsize
        high = 2 if dtype is torch.bool else 256
        noise = torch.randint(0, high, (count,), generator=generator, dtype=torch.uint8).view(dtype).reshape(shape)
        back = byte_planes.decode(coded(noise), DTYPES)
        assert (back.dtype, back.shape) == (noise.dtype, noise.shape)
        assert torch.equal(bits(back), bits(noise))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_not_a_number_signs_of_zero_and_the_smallest_numbers_come_back(dtype):
    smallest = torch.finfo(dtype).tiny
    values = [0.0, -0.0, float("nan"), float("inf"), -float("inf"), smallest, -smallest, smallest / 4, 1.0, -1.0]
    tensor = torch.tensor(values * 100, dtype=dtype)
    assert torch.equal(bits(byte_planes.decode(coded(tensor), DTYPES)), bits(tensor))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bytes_are_near_the_entropy_of_the_exponents(dtype):
    tensor = trained((300_000,), dtype)
    exponents = torch.frexp(tensor.float())[1] if dtype is not torch.float16 else None
    size = len(coded(tensor)) / tensor.nbytes
    if exponents is None:
        # Five bits of exponent with three of mantissa in a plane.
        assert size < 0.87
        return
    shares = exponents.unique(return_counts=True)[1].double() / tensor.numel()
    entropy = float(-(shares * shares.log2()).sum())
    width = 8 * dtype.itemsize
    # Nothing is gained in signs and mantissas; a Huffman code is at most a few hundredths of a bit from the entropy.
    assert (entropy + width - 8) / width - 0.001 < size < (entropy + 0.15 + width - 8) / width


def test_planes_and_exponents_apart_are_what_saves():
    tensor = trained((300_000,), torch.bfloat16)
    exponents, places, mixed = (len(coded(t)) for t in (tensor, tensor.view(torch.int16), tensor.view(torch.uint8)))
    # Planes of bytes against bytes as they lie in the file; then the exponent's lowest bit with the other seven.
    assert places < 0.87 * mixed
    assert exponents < 0.995 * places


def test_numbers_widened_from_16_bits_take_hardly_more():
    tensor = trained((200_000,), torch.bfloat16)
    assert len(coded(tensor.float())) < 1.01 * len(coded(tensor))


def test_threads_do_not_change_the_bytes():
    tensor = trained((2 * byte_planes.GROUP + 7,), torch.bfloat16)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(coded(tensor).tobytes())
            assert torch.equal(byte_planes.decode(coded(tensor), DTYPES), tensor)
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]


@pytest.mark.parametrize("place", ["magic", "description", "table", "plane", "end"])
def test_damage_is_refused(place):
    stored = coded(trained((1000,), torch.bfloat16)).copy()
    begin = byte_planes.describe(stored.tobytes()).begin
    if place == "end":
        stored = stored[:-1]
    else:
        stored[{"magic": 0, "description": 14, "table": begin, "plane": begin + 8}[place]] ^= 0x40
    with pytest.raises(ModelFolderError, match="damaged"):
        byte_planes.decode(stored, DTYPES)


def test_what_says_nothing_of_its_chunks_has_those_of_before(monkeypatch):
    monkeypatch.setattr(byte_planes, "CHUNK", byte_planes.CHUNK_UNSAID)
    tensor = trained((byte_planes.CHUNK + 7,), torch.bfloat16)
    stored = coded(tensor).tobytes()
    said = b',"chunk":%d' % byte_planes.CHUNK
    stored = stored.replace(said + b"}", b"}" + b" " * len(said), 1)
    monkeypatch.undo()
    assert b"chunk" not in stored[: byte_planes.DESCRIPTION_BYTES]
    assert torch.equal(byte_planes.decode(np.frombuffer(stored, np.uint8), DTYPES), tensor)
