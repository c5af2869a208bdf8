"""Tensors on a GPU take its kernels, and so do fake ones that stand for them; without a GPU nothing is registered."""

import subprocess
import sys

import pytest
import torch

from pintpot.kernels import gpu

pytest.importorskip("triton", reason="the kernels for GPUs need Triton (the extra gpu)")

# A process of its own, which is told that there is a GPU: what is registered stays.
REHEARSAL = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from pintpot.kernels import PackedBlock, attend_packed, dequantize, grid_matmul, tiles_matmul
from pintpot.kernels.tiles import tiles_shape

torch.version.cuda, torch.cuda.is_available = "13", lambda: True


class Seen(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "pintpot":
            print(function.name())
        return function(*args, **(kwargs or {}))


def empty(*shape, dtype=torch.float16):
    return torch.empty(shape, dtype=dtype, device="cuda")


with FakeTensorMode():
    packed, scale, zero = empty(96, 64, dtype=torch.uint8), empty(96, 2), empty(96, 1, dtype=torch.uint8)
    tiles = empty(*tiles_shape(96, 128, 3), dtype=torch.uint8)
    with Seen():
        grid_matmul(empty(3, 128), packed, scale, zero, bits=4, group_size=64)
        dequantize(packed, scale, zero, bits=4, group_size=64, in_features=128, dtype=torch.float16)
        tiles_matmul(empty(2, 3, 128), tiles, scale, None, bits=3, group_size=64)
    keys = empty(1, 2, 64, 8, 16, dtype=torch.uint8), empty(1, 2, 64, 8), empty(1, 2, 64, 8)
    values = empty(1, 2, 256, 32, dtype=torch.uint8), empty(1, 2, 256, 2), empty(1, 2, 256, 2)
    with Seen():
        attend_packed(
            empty(1, 2, 3, 64, dtype=torch.float32), [PackedBlock(*keys, *values, 256)],
            bits=4, key_group=32, value_group=32,
        )
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="is for machines without a GPU")
def test_a_rehearsal_takes_the_path_of_the_run():
    done = subprocess.run([sys.executable, "-c", REHEARSAL], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    wanted = ["grid_matmul", "grid_dequantize", "tiles_matmul", "attend_packed"]
    assert done.stdout.split() == [f"pintpot::{name}" for name in wanted]


def test_tensors_that_are_not_on_a_gpu_are_left_to_others():
    assert not gpu.serves(torch.zeros(1))
    assert gpu.ready() == torch.cuda.is_available()
