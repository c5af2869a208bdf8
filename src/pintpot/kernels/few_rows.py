"""Which products of a few rows of input the compiled kernels take."""

from __future__ import annotations

from torch import Tensor

from pintpot.kernels import native
from pintpot.kernels.grid import FEW_ROWS


def serves_few(flat: Tensor, *stored: Tensor | None) -> bool:
    """Whether a compiled product takes these rows of input (N, I), as they are, with these stored tensors.

    It does not where a gradient is to flow to the input: that product is made by strips, as its backward pass is.
    """
    few = 0 < flat.shape[0] <= FEW_ROWS and flat.shape[1] > 0 and flat.dtype in native.DTYPES
    return few and native.serves(flat, *stored)
