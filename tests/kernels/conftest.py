"""The compiled kernels, once for each instruction set that this processor has."""

import shutil

import pytest
import torch

from pintpot.kernels import native

ISAS = ("avx512", "avx2", "generic")


@pytest.fixture(params=ISAS)
def isa(request, tmp_path, monkeypatch):
    """Loads a copy of the library, which makes its own choice of the instruction set."""
    if native.library() is None:
        pytest.skip("the compiled kernels are not built")
    copy = shutil.copy(native.library()._name, tmp_path / "lib.so")
    monkeypatch.setenv("PINTPOT_KERNELS", str(copy))
    monkeypatch.setenv("PINTPOT_ISA", request.param)
    native.library.cache_clear()
    if native.path() != request.param:
        native.library.cache_clear()
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    native.library.cache_clear()


@pytest.fixture
def compiled():
    """Skips a test where there is no library."""
    if native.library() is None:
        pytest.skip("the compiled kernels are not built")


@pytest.fixture(params=[1, 3])
def threads(request):
    """The number of threads that torch has."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
