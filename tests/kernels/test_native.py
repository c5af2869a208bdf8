"""Loading the library: at first use, with one warning where it is missing, and sound after a fork."""

import os
import subprocess
import sys
import warnings

import pytest
import torch

from pintpot.kernels import grid_matmul, native, pack, unpack


def test_nothing_is_loaded_by_an_import(compiled):
    code = (
        "import pintpot.kernels as k; from pintpot.kernels import native;"
        "print(native.library.cache_info().currsize, 'libpintpot' in open('/proc/self/maps').read())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "False"]


def test_without_the_library_plain_torch_does_it_and_says_so_once(tmp_path, monkeypatch):
    monkeypatch.setenv("PINTPOT_KERNELS", str(tmp_path / "none.so"))
    native.library.cache_clear()
    try:
        codes = torch.arange(16, dtype=torch.uint8)[None]
        with pytest.warns(UserWarning, match="compiled kernels are missing"):
            packed = pack(codes, 4)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(unpack(packed, 4, 16), codes)
            product = grid_matmul(torch.ones(1, 16), packed, torch.ones(1, 1), None, bits=4, group_size=16)
        assert product.item() == float(codes.sum()) - 16 * 8
        assert native.path() == native.PLAIN
    finally:
        native.library.cache_clear()


def test_a_forked_child_computes_with_one_thread(compiled):
    """The runtime's threads do not survive a fork; waiting for them would last for ever."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    codes = torch.randint(0, 16, (4096, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed = pack(codes, 4)  # Starts the threads.
    with warnings.catch_warnings():
        # Newer Pythons warn of the very fork that is tried here.
        warnings.simplefilter("ignore")
        child = os.fork()
    if child == 0:
        os._exit(0 if torch.ops.pintpot.unpack(packed, 4, 64).numel() == codes.numel() else 1)
    torch.set_num_threads(before)
    assert os.waitpid(child, 0)[1] == 0


def test_threads_are_started_where_torch_has_no_runtime(compiled, threads):
    library = native.library()
    library.pintpot_use_runtime(None)
    try:
        codes = torch.randint(0, 8, (4096, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        assert torch.equal(unpack(pack(codes, 3), 3, 64), codes)
    finally:
        library.pintpot_use_runtime(native._openmp())


def test_torch_finds_no_fault_with_the_registrations(compiled):
    codes = torch.randint(0, 16, (3, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed, scale = pack(codes, 4), torch.rand(3, 2)
    checks = ("test_schema", "test_faketensor")
    for operation, arguments in (
        (torch.ops.pintpot.pack, (codes, 4)),
        (torch.ops.pintpot.unpack, (packed, 4, 40)),
        (torch.ops.pintpot.restore, (packed, scale, scale.neg(), 4, 32, 40)),
        (torch.ops.pintpot.grid_dequantize, (packed, scale, None, 4, 32, 40, torch.bfloat16)),
        (torch.ops.pintpot.grid_matmul, (torch.ones(2, 40), packed, scale, None, 4, 32)),
    ):
        torch.library.opcheck(operation.default, arguments, test_utils=checks)
