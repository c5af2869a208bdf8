"""Triton's kernels, on the GPU where there is one, otherwise in Triton's interpreter (see tests/conftest.py)."""

import numpy as np
import pytest
import torch


@pytest.fixture
def device(monkeypatch):
    """Where kernels run; the interpreter is taught products of bfloat16, of which it would multiply the bits."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    language = pytest.importorskip("triton.language")
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    multiply = builder.create_dot

    def widened(operand):
        if operand.dtype.scalar != language.bfloat16:
            return operand
        return handle((operand.data.astype(np.uint32) << 16).view(np.float32), language.float32)

    def create_dot(self, left, right, *rest):
        return multiply(self, widened(left), widened(right), *rest)

    monkeypatch.setattr(builder, "create_dot", create_dot)
    return torch.device("cpu")
