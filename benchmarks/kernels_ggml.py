"""llama.cpp's products, by its own CPU backend: ``libggml-base.so`` and ``libggml-cpu.so`` of a build under ``out/``.

Weights are held as llama.cpp would hold them: where its backend lays a format out anew for the processor, they are.
Threads are a pool that lives on, as in its own programs.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from benchmarks.weights_ggml import TYPES, library
from torch import Tensor

VOID, SIZE, INT64 = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64
FLOAT32 = 0
"""The number of float32 in ``enum ggml_type``."""

OVERHEAD = 1 << 16
"""Bytes of a context without data: more than the descriptions of a few tensors and a small graph take."""


class _Context(ctypes.Structure):
    """``struct ggml_init_params``."""

    _fields_ = [("mem_size", SIZE), ("mem_buffer", VOID), ("no_alloc", ctypes.c_bool)]


class _Pool(ctypes.Structure):
    """``struct ggml_threadpool_params``; ``GGML_MAX_N_THREADS`` is 512."""

    _fields_ = [
        ("cpumask", ctypes.c_bool * 512),
        ("n_threads", ctypes.c_int),
        ("prio", ctypes.c_int),
        ("poll", ctypes.c_uint32),
        ("strict_cpu", ctypes.c_bool),
        ("paused", ctypes.c_bool),
    ]


_SIGNATURES = {
    "base": {
        "ggml_init": (VOID, [_Context]),
        "ggml_new_tensor_2d": (VOID, [VOID, ctypes.c_int, INT64, INT64]),
        "ggml_mul_mat": (VOID, [VOID, VOID, VOID]),
        "ggml_new_graph_custom": (VOID, [VOID, SIZE, ctypes.c_bool]),
        "ggml_build_forward_expand": (None, [VOID, VOID]),
        "ggml_backend_alloc_ctx_tensors": (VOID, [VOID, VOID]),
        "ggml_backend_alloc_ctx_tensors_from_buft": (VOID, [VOID, VOID]),
        "ggml_backend_tensor_set": (None, [VOID, VOID, SIZE, SIZE]),
        "ggml_backend_tensor_get": (None, [VOID, VOID, SIZE, SIZE]),
        "ggml_backend_graph_compute": (ctypes.c_int, [VOID, VOID]),
        "ggml_backend_reg_get_proc_address": (VOID, [VOID, ctypes.c_char_p]),
        "ggml_backend_reg_dev_get": (VOID, [VOID, SIZE]),
        "ggml_backend_dev_supports_op": (ctypes.c_bool, [VOID, VOID]),
        "ggml_threadpool_params_default": (_Pool, [ctypes.c_int]),
    },
    "cpu": {
        "ggml_backend_cpu_init": (VOID, []),
        "ggml_backend_cpu_reg": (VOID, []),
        "ggml_backend_cpu_set_n_threads": (None, [VOID, ctypes.c_int]),
        "ggml_backend_cpu_set_threadpool": (None, [VOID, VOID]),
        "ggml_threadpool_new": (VOID, [ctypes.POINTER(_Pool)]),
    },
}


class Ggml:
    """The CPU backend with a number of threads.

    Args:
        threads: of its pool.
    """

    def __init__(self, threads: int) -> None:
        base = library()
        assert base is not None
        file = Path(base._name).with_name("libggml-cpu.so")
        for found, part in ((base, "base"), (ctypes.CDLL(str(file)), "cpu")):
            for name, (result, arguments) in _SIGNATURES[part].items():
                function = getattr(found, name)
                function.restype, function.argtypes = result, arguments
                setattr(self, name.removeprefix("ggml_"), function)
        self.backend = self.backend_cpu_init()
        pool = self.threadpool_params_default(threads)
        self.backend_cpu_set_n_threads(self.backend, threads)
        self.backend_cpu_set_threadpool(self.backend, self.threadpool_new(ctypes.byref(pool)))
        self.device = self.backend_reg_dev_get(self.backend_cpu_reg(), 0)

    def context(self) -> int:
        """Room for descriptions of tensors."""
        return self.init(_Context(OVERHEAD, None, True))

    def layouts(self) -> list[int]:
        """The buffer types in which the backend lays weights out anew."""
        address = self.backend_reg_get_proc_address(self.backend_cpu_reg(), b"ggml_backend_dev_get_extra_bufts")
        listed = ctypes.CFUNCTYPE(ctypes.POINTER(VOID), VOID)(address)(self.device)
        return list(itertools.takewhile(bool, listed)) if listed else []

    def product(
        self, kind: str, packed: Tensor, rows: int, columns: int, x: Tensor
    ) -> tuple[Callable[[], Tensor], bool]:
        """Multiplies inputs by one packed weight.

        Args:
            kind: a name in ``TYPES``.
            packed: the weight's bytes.
            rows: O.
            columns: I.
            x: float32 (N, I).

        Returns:
            What runs it and gives the outputs (N, O), always the same memory; and whether the weight was laid out anew.
        """
        for layout in [*self.layouts(), None]:
            held, context = self.context(), self.context()
            weight = self.new_tensor_2d(held, TYPES[kind], columns, rows)
            if layout is None:
                self.backend_alloc_ctx_tensors(held, self.backend)
            else:
                self.backend_alloc_ctx_tensors_from_buft(held, layout)
            inputs = self.new_tensor_2d(context, FLOAT32, columns, x.shape[0])
            outputs = self.mul_mat(context, weight, inputs)
            if layout is None or self.backend_dev_supports_op(self.device, outputs):
                break
        graph = self.new_graph_custom(context, 8, False)
        self.build_forward_expand(graph, outputs)
        self.backend_alloc_ctx_tensors(context, self.backend)
        self.backend_tensor_set(weight, packed.data_ptr(), 0, packed.nbytes)
        self.backend_tensor_set(inputs, x.data_ptr(), 0, x.nbytes)
        found = torch.empty(x.shape[0], rows)

        def run() -> Tensor:
            if self.backend_graph_compute(self.backend, graph):
                raise RuntimeError("ggml could not compute the product")
            self.backend_tensor_get(outputs, found.data_ptr(), 0, found.nbytes)
            return found

        return run, layout is not None


@cache
def ggml(threads: int) -> Ggml | None:
    """The backend, or None where there is no build."""
    return None if library() is None else Ggml(threads)
