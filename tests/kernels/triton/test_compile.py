"""The kernels compile to machine code for GPUs of two generations, without a GPU; that they are interpreted is not all.

Triton decides when it is imported whether it interprets, so this is a process of its own.
"""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="the kernels for GPUs need Triton (the extra gpu)")

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pintpot.kernels.triton import attend, grid, tiles

MOST_SHARED = 99 * 1024  # bytes that a block has on the smallest GPUs of these generations
TYPES = dict(packed="*u8", tiles="*u8", scale="*fp16", zero="*u8", table="*i64")
TYPES |= dict(x="*bf16", query="*fp32", like_scale="*bf16")


def compile(kernel, generation, options=None, **constants):
    types = {
        name: "constexpr" if name in constants else TYPES.get(name, "*fp32" if name in OUTPUTS else "i32")
        for name in kernel.arg_names
    }
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=types, constexprs=places)
    made = triton.compile(source, target=GPUTarget("cuda", generation, 32), options=options)
    assert made.asm["cubin"] and made.metadata.shared <= MOST_SHARED, (kernel, constants, made.metadata.shared)


OUTPUTS = ("out", "outs", "top", "tops", "norm", "norms", "parts")
for generation, rows, bits in ((80, 1, 4), (90, 4, 4)):
    tiling = grid._Tiling.of(rows, 4096, bits, 128, bits == 4)
    compile(grid._product, generation, grid.options(tiling.planes), OUT=grid.OUT_FEATURES, TILING=tiling)
compile(grid._dequantize, 90, BLOCK=1024, TILING=tiling)
compile(grid._add, 90, PARTS=4, BLOCK=256)
tiling = tiles._Tiling(3, 4096, 4096, 128, False, 16, tiles.DOWN, "tf32x3")
compile(tiles._product, 90, tiles.OPTIONS, TILES=tiles.ACROSS, TILING=tiling)
packing = attend._Packing(2, 64, 64, 32, 32, 16, 30.0, "tf32x3")
compile(attend._attend, 80, attend.OPTIONS, PACKING=packing)
compile(attend._join, 90, PARTS=4, PACKING=packing)
"""


def test_kernels_compile(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
