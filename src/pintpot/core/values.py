"""Telling tensors that have numbers from those that only have a shape."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake


def has_values(tensor: Tensor) -> bool:
    """Whether there are numbers: not on the device ``meta``, and not in a rehearsal with fake tensors.

    The fake tensors of ``torch.compile`` and ``torch.export`` stand for tensors with numbers.
    """
    return torch.compiler.is_compiling() or not (tensor.is_meta or is_fake(tensor))
