"""Kernels for GPUs: which operations have one, and which tensors they serve.

They are written in Triton (the extra ``gpu``) and registered for the same ``torch.ops.pintpot`` operations as the
compiled ones for the CPU, when a tensor on a GPU first asks for one. Without Triton the plain torch definitions run.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pintpot.kernels import native

KERNELS = {
    "grid_matmul": ("grid", "matmul"),
    "grid_dequantize": ("grid", "dequantize"),
    "tiles_matmul": ("tiles", "matmul"),
    "attend_packed": ("attend", "attend_packed"),
}
"""For each operation, its module in ``pintpot.kernels.triton`` and its function there."""

MOST_ROWS = 128
"""Up to so many rows of input a product is taken from packed storage; beyond, numbers would be made too often."""


@functools.cache
def ready() -> bool:
    """Whether there is an NVIDIA GPU and Triton, whose kernels are then registered; ``PINTPOT_KERNELS=off`` says no."""
    wanted = os.environ.get("PINTPOT_KERNELS") != "off"
    if not (wanted and torch.version.cuda and torch.cuda.is_available() and importlib.util.find_spec("triton")):
        return False
    for name, (module, function) in KERNELS.items():
        run = getattr(importlib.import_module(f"pintpot.kernels.triton.{module}"), function)
        native.LIBRARY.impl(name, _on_its_gpu(run), "CUDA")
    return True


def _on_its_gpu(run: Callable[..., Any]) -> Callable[..., Any]:
    """A function that is run on the GPU of its first argument: Triton would take the current one."""

    def on_its_gpu(first: Tensor, *rest: Any) -> Any:
        with torch.cuda.device_of(first):
            return run(first, *rest)

    return on_its_gpu


def serves(*tensors: Tensor | None) -> bool:
    """Whether the kernels take these tensors: contiguous, on one GPU, and no gradient is to flow to them."""
    devices = {tensor.device for tensor in tensors if tensor is not None}
    return len(devices) == 1 and native.takes("cuda", *tensors) and ready()
