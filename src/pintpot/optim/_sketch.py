"""The leading singular vectors of a large matrix from its products with a few random ones.

Halko, Martinsson & Tropp 2011, arXiv:0909.4061, algorithm 4.4 (randomised subspace iteration), on the transpose, so
that what is drawn and what is decomposed at the end are of the smaller side.

Shapes: S smaller side, L larger side, K columns of the sketch. Matrices oriented ``(..., S, L)``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pintpot.optim._tensors import CHUNK_NUMEL, has_values, strips

OVERSAMPLING = 10
"""Columns drawn beyond those that are wanted (sec. 1.3 of the paper: 5 or 10)."""
POWER_ITERATIONS = 2
"""Each multiplies the ratios of singular values by their squares once more."""


def width_of(count: int) -> int:
    """Columns of the sketch (K) for so many singular vectors."""
    return count + OVERSAMPLING


def leading_vectors(matrix: Tensor, count: int, seed: int) -> Tensor:
    """Nearly the ``count`` leading left singular vectors, ``(..., S, count)``, orthonormal, in float32 or wider."""
    dtype = torch.promote_types(matrix.dtype, torch.float32)
    generator = torch.Generator(device=matrix.device).manual_seed(seed) if has_values(matrix) else None
    size = (matrix.shape[-2], width_of(count))
    found = torch.randn(size, generator=generator, device=matrix.device, dtype=dtype)
    for _ in range(POWER_ITERATIONS):
        found = torch.linalg.qr(_times(matrix, _orthonormal_image(matrix, found)))[0]
    # Of the last product not the range alone is used: its own singular vectors are those of the matrix.
    basis, small = torch.linalg.qr(_times(matrix, _orthonormal_image(matrix, found)))
    gram = small.double() @ small.double().mT
    return basis @ torch.linalg.eigh(gram)[1].flip(-1)[..., :count].to(dtype)


def flops(side: int, long: int, count: int) -> float:
    """Operations: the products, and about ``4 n K^2`` for each orthogonal factor."""
    width, turns = width_of(count), POWER_ITERATIONS + 1
    return turns * (4.0 * side * long * width + 4.0 * (side + long) * width**2)


def workspace_numel(side: int, long: int, count: int) -> int:
    """Temporary elements of float32: an image with its factor while that is found, sketches, a strip, small squares."""
    width = width_of(count)
    return 3 * long * width + 3 * side * width + side * _strip_width(side, long) + 8 * width * width


def _orthonormal_image(matrix: Tensor, found: Tensor) -> Tensor:
    """An orthonormal basis of ``matrix^T @ found``, ``(..., L, K)``."""
    image = found.new_empty((*matrix.shape[:-2], matrix.shape[-1], found.shape[-1]))
    for strip, part in _strips(matrix, found.dtype):
        image[..., strip, :] = part.mT @ found
    return torch.linalg.qr(image)[0]


def _times(matrix: Tensor, image: Tensor) -> Tensor:
    """``matrix @ image``, ``(..., S, K)``."""
    product = image.new_zeros((*matrix.shape[:-1], image.shape[-1]))
    for strip, part in _strips(matrix, image.dtype):
        product += part @ image[..., strip, :]
    return product


def _strips(matrix: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Columns of the matrix in a dtype; all of them at once where that takes no copy."""
    long = matrix.shape[-1]
    width = long if matrix.dtype == dtype else _strip_width(matrix.numel() // long, long)
    for strip in strips(long, width, matrix):
        yield strip, matrix[..., strip].to(dtype)


def _strip_width(side: int, long: int) -> int:
    return min(long, max(1, CHUNK_NUMEL // side))
