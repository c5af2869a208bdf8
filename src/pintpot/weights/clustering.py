"""Weighted k-means of vectors, the same on every machine for the same numbers.

Shapes: N vectors, V numbers in each, K entries of the codebook.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from pintpot.core.values import has_values

DISTANCE_BYTES = 4 << 20
"""Most bytes of distances between vectors and entries that are held at a time: they are read again out of the cache."""

RUN = 64
"""Entries whose least distance is found without asking which it is, which vectors of a processor do much faster."""


def nearest(vectors: Tensor, entries: Tensor) -> Tensor:
    """For each vector the entry with the least squared distance, int64 (N,); of equals the first.

    Args:
        vectors: float32 (N, V).
        entries: float32 (K, V).
    """
    found = torch.empty(vectors.shape[0], dtype=torch.int64, device=vectors.device)
    for part, distance in _distances(vectors, entries):
        found[part] = _least(distance)[1]
    return found


def distance_bytes(vectors: int, entries: int) -> int:
    """Bytes of the distances that are held at a time for so many vectors and entries, and of what finds the least."""
    together = math.gcd(entries, RUN)
    return 4 * (entries + together + 2 * (entries // together)) * min(vectors, _vectors_at_once(entries))


def _vectors_at_once(entries: int) -> int:
    return max(1, DISTANCE_BYTES // (4 * entries))


def _distances(vectors: Tensor, entries: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Half the squared distances (K, n) of n vectors at a time, less half of their own squared length."""
    lengths = entries.square().sum(1, keepdim=True) / 2
    step = _vectors_at_once(entries.shape[0])
    for start in range(0, vectors.shape[0], step):
        part = slice(start, start + step)
        yield part, torch.addmm(lengths, entries, vectors[part].t(), alpha=-1)


def _least(distance: Tensor) -> tuple[Tensor, Tensor]:
    """The least of each column of distances (K, n), and its row; of equals the first."""
    together = math.gcd(distance.shape[0], RUN)
    runs = distance.view(-1, together, distance.shape[1])
    least, run = runs.amin(1).t().contiguous().min(1)
    return least, run * together + runs[run, :, torch.arange(run.shape[0], device=run.device)].argmin(1)


def cluster(
    vectors: Tensor,
    count: int,
    importance: Tensor | None = None,
    *,
    iterations: int = 100,
    tolerance: float = 1e-5,
    seed: int = 0,
) -> Tensor:
    """Entries of a codebook with little weighted squared distance from the vectors (Lloyd's iteration).

    It starts from vectors drawn at random, and where vectors are single numbers from their quantiles.
    An entry that no vector is nearest to moves to one of the vectors that are farthest from theirs.

    Args:
        vectors: float32 (N, V).
        count: K; where there are fewer vectors, the entries left over are zero.
        importance: weight of each vector (N,), not negative; all alike when not given.
        iterations: most of them.
        tolerance: it ends when the entries move by less than this share of the vectors' variance.
        seed: of the draw.

    Returns:
        float32 (K, V); with no values where the vectors have none.
    """
    if not has_values(vectors):
        return vectors.new_empty((count, vectors.shape[1]))
    weight = vectors.new_ones(vectors.shape[0]) if importance is None else importance.float()
    if not bool((weight > 0).any()):
        weight = torch.ones_like(weight)
    entries = _quantiles(vectors, count, weight) if vectors.shape[1] == 1 else _drawn(vectors, count, seed)
    enough = tolerance * float(vectors.var(0, correction=0).mean())
    for _ in range(iterations):
        moved = _centres(vectors, weight, entries)
        shift = float((moved - entries).square().sum())
        entries = moved
        if shift <= enough:
            break
    return entries


def _drawn(vectors: Tensor, count: int, seed: int) -> Tensor:
    drawn = torch.randperm(vectors.shape[0], generator=torch.Generator().manual_seed(seed))[:count]
    entries = vectors.new_zeros((count, vectors.shape[1]))
    entries[: drawn.shape[0]] = vectors[drawn.to(vectors.device)]
    return entries


def _quantiles(numbers: Tensor, count: int, weight: Tensor) -> Tensor:
    """Those in the middle of ``count`` equal shares of the weight, (count, 1), rising."""
    rising, order = numbers[:, 0].sort(stable=True)
    reached = weight[order].double().cumsum(0)
    middles = (torch.arange(count, device=numbers.device) + 0.5) * (reached[-1] / count)
    return rising[torch.searchsorted(reached, middles).clamp(max=rising.shape[0] - 1)][:, None]


def _centres(vectors: Tensor, weight: Tensor, entries: Tensor) -> Tensor:
    sums = torch.zeros((entries.shape[0], entries.shape[1] + 1), dtype=torch.float64, device=vectors.device)
    error = torch.empty_like(weight)
    for part, distance in _distances(vectors, entries):
        least, own = _least(distance)
        error[part] = (2 * least + vectors[part].square().sum(1)).clamp_(min=0) * weight[part]
        rows = torch.cat([vectors[part] * weight[part, None], weight[part, None]], 1)
        sums += _sums(rows.double(), own, entries.shape[0])
    mass = sums[:, -1:]
    moved = torch.where(mass > 0, sums[:, :-1] / mass.clamp(min=torch.finfo(torch.float64).tiny), entries.double())
    empty = (mass[:, 0] <= 0).nonzero()[:, 0]
    far = error.topk(min(empty.shape[0], error.shape[0]))
    wanted = far.indices[far.values > 0]
    moved[empty[: wanted.shape[0]]] = vectors[wanted].double()
    return moved.float()


def _sums(rows: Tensor, own: Tensor, count: int) -> Tensor:
    """For each of ``count`` entries the sum of its rows: over runs of sorted rows, the same on every run of a GPU."""
    reached = functional.pad(rows[own.argsort(stable=True)].cumsum(0), (0, 0, 1, 0))
    ends = functional.pad(torch.bincount(own, minlength=count).cumsum(0), (1, 0))
    return reached[ends].diff(dim=0)
