"""Products of a basis with a matrix much larger than it, where it pays on bfloat16 copies made strip by strip.

Shapes: S smaller side, L larger side, R rank. Basis ``(S, R)``, matrices oriented ``(S, L)``, small ones ``(R, L)``;
with leading dimensions all are batches.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from pintpot.optim._tensors import CHUNK_NUMEL, strips

LEAST_MULTIPLICATIONS = 1 << 26
"""Products with fewer are made in the tensors' own dtype: there is nothing to gain."""


def is_narrowed(shape: torch.Size | tuple[int, ...], rank: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a matrix of this shape is multiplied by a basis of so many columns in bfloat16.

    Sums are always in float32; what is lost is the rounding of each factor and of the result to 8 bits, about 0.2 % of
    an element, which is random.
    """
    numel = 1
    for size in shape:
        numel *= size
    wanted = len(shape) == 2 and dtype == torch.float32 and numel * rank >= LEAST_MULTIPLICATIONS
    return wanted and _multiplies_bfloat16(device.type)


def down(basis: Tensor, gradient: Tensor, narrow: bool) -> Tensor:
    """``basis^T @ gradient``."""
    if not narrow:
        return basis.mT @ gradient
    small = gradient.new_empty((basis.shape[-1], gradient.shape[-1]))
    rows = basis.mT.to(torch.bfloat16, memory_format=torch.contiguous_format)
    for strip in _strips(gradient):
        small[:, strip] = rows @ gradient[:, strip].bfloat16()
    return small


def up_(target: Tensor, basis: Tensor, small: Tensor, factor: float, narrow: bool) -> None:
    """Add ``factor * basis @ small`` to ``target``, without a temporary of its size."""
    if not narrow:
        if target.dim() == 2:
            target.addmm_(basis, small, alpha=factor)
        else:
            target.baddbmm_(basis.expand(*target.shape[:-2], *basis.shape[-2:]), small, alpha=factor)
        return
    # Each product is laid out as the target, so that both are read in the order of their memory.
    across = target.stride(-1) != 1
    columns = (basis.mT if across else basis).to(torch.bfloat16, memory_format=torch.contiguous_format)
    narrowed = (small.mT if across else small).to(torch.bfloat16, memory_format=torch.contiguous_format)
    for strip in _strips(target):
        product = narrowed[strip] @ columns if across else columns @ narrowed[:, strip]
        target[:, strip].add_(product.mT if across else product, alpha=factor)


def workspace_bytes(side: int, long: int, rank: int, dtype: torch.dtype, device: torch.device) -> int:
    """Bytes of the copies that either product holds at once."""
    if not is_narrowed((side, long), rank, dtype, device):
        return 0
    width = min(long, max(1, CHUNK_NUMEL // side))
    return 2 * (side * rank + rank * long + (side + rank) * width)


def _strips(matrix: Tensor) -> list[slice]:
    side, long = matrix.shape
    return strips(long, max(1, CHUNK_NUMEL // side), matrix)


@cache
def _multiplies_bfloat16(device: str) -> bool:
    """Whether products of bfloat16 are faster than of float32 there."""
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    if device != "cpu" or not hasattr(torch.cpu, "get_capabilities"):
        return False
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))
