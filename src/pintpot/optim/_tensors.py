"""Small tensor helpers of the optimizers: orientation, batches of bounded size, seeds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

CHUNK_NUMEL = 1 << 20
"""Elements worked on at once. Temporaries stay this small however large the model, and within the CPU's caches."""


def has_values(tensor: Tensor) -> bool:
    """Whether the tensor holds numbers (meta and fake tensors have shapes only)."""
    return not tensor.is_meta and not isinstance(tensor, FakeTensor)


def strips(long: int, width: int, like: Tensor) -> list[slice]:
    """Consecutive slices of ``width`` out of ``long``. Of tensors without values the first, which takes as much memory.

    Thousands of strips of a large model would make a rehearsal last for minutes.
    """
    found = [slice(start, min(start + width, long)) for start in range(0, long, width)]
    return found if has_values(like) else found[:1]


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill a stretch of memory without gaps, in whatever order of the dimensions."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def oriented(matrix: Tensor) -> Tensor:
    """A view with the smaller of the last two sides first: ``(..., S, L)`` with ``S <= L``."""
    return matrix if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT


def chunks(sizes: Iterable[int], limit: int = CHUNK_NUMEL) -> Iterator[list[int]]:
    """Consecutive indices of ``sizes`` in batches that sum to at most ``limit`` (or hold a single index)."""
    batch: list[int] = []
    total = 0
    for index, size in enumerate(sizes):
        if batch and total + size > limit:
            yield batch
            batch, total = [], 0
        batch.append(index)
        total += size
    if batch:
        yield batch


def mix_seed(seed: int, *indices: int) -> int:
    """A 63-bit seed that depends on every argument (the finaliser of SplitMix64, Steele et al. 2014, per index)."""
    mask = (1 << 64) - 1
    value = seed & mask
    for index in indices:
        value = (value + 0x9E3779B97F4A7C15 * (index + 1)) & mask
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
        value ^= value >> 31
    return value >> 1
