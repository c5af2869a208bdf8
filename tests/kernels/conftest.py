"""The compiled kernels, once for each instruction set that this processor has."""

import functools
import platform
import shutil

import pytest
import torch

from pintpot.kernels import native

ISAS = ("dotprod", "generic") if platform.machine() == "aarch64" else ("avx512", "avx2", "generic")


@pytest.fixture(scope="session")
def copy_for(tmp_path_factory):
    """Copies the library once for each instruction set: where it is loaded it chooses one for good."""
    folder = tmp_path_factory.mktemp("kernels")
    return functools.cache(lambda isa, library: shutil.copy(library, folder / f"{isa}.so"))


@pytest.fixture(params=ISAS)
def isa(request, copy_for, monkeypatch):
    """Loads a copy of the library that works with one instruction set."""
    if native.library() is None:
        pytest.skip("the compiled kernels are not built")
    monkeypatch.setenv("PINTPOT_KERNELS", str(copy_for(request.param, native.library()._name)))
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
