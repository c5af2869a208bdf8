"""The ``project`` part: how a gradient matrix becomes a small one, and how a small one comes back.

Shapes: S smaller side, L larger side, R rank. Every matrix arrives *oriented*, smaller side first: ``(..., S, L)``,
with ``S <= L``; leading dimensions (packed experts) are a batch. The small matrix is ``(..., R, L)``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pintpot.optim._tensors import CHUNK_NUMEL, has_values

State = dict[str, Any]
"""What the optimizer keeps for one parameter: tensors and integers."""


@dataclass(frozen=True)
class Project(ABC):
    """A map from ``(..., S, L)`` to ``(..., R, L)``.

    Attributes:
        rank: rows of the small matrix at most (a matrix with a smaller side keeps that side).
    """

    rank: int

    def rank_of(self, side: int) -> int:
        """The rank used for a matrix whose smaller side is ``side``."""
        return min(self.rank, side)

    def due(self, state: State, gap: int) -> bool:
        """Whether the subspace is to be chosen now, before the update that follows ``state["step"]`` others."""
        return bool(state["step"] % gap == 0)

    @abstractmethod
    def refresh_(self, state: State, gradient: Tensor, seed: int, moments: Mapping[str, Tensor]) -> None:
        """Choose the subspace anew, and put into ``state`` what is needed to use it again.

        Args:
            state: what is kept for the parameter; holds the last subspace, if there was one.
            gradient: ``(..., S, L)``.
            seed: differs by parameter and turn.
            moments: those of the inner rule by name, to be carried over in place where the method does so; empty at
                the first time. A method that starts them anew also sets ``state["forgotten"]`` to ``state["step"]``.
        """

    @abstractmethod
    def basis(self, state: State, gradient: Tensor) -> Tensor:
        """The basis of the current subspace, ``(..., S, R)`` or ``(S, R)``."""

    @abstractmethod
    def state_bytes(self, side: int, long: int, dtype: torch.dtype) -> int:
        """Bytes kept between steps for one matrix of a dtype."""

    @abstractmethod
    def workspace_numel(self, side: int, long: int) -> tuple[int, int]:
        """Temporary elements for one matrix: (in the parameter's dtype, in float64), at the most."""

    def flops(self, side: int, long: int) -> float:
        """Operations to bring one matrix down and up again."""
        return 4.0 * side * long * self.rank_of(side)

    def down(self, state: State, gradient: Tensor) -> Tensor:
        """The small gradient, ``(..., R, L)``."""
        return self.basis(state, gradient).mT @ gradient

    def up_(self, target: Tensor, state: State, small: Tensor, factor: float) -> None:
        """Add ``factor`` times the full-size image of ``small`` to ``target``, without a full-size temporary."""
        basis = self.basis(state, target)
        if target.dim() == 2:
            target.addmm_(basis, small, alpha=factor)
        else:
            target.baddbmm_(basis.expand(*target.shape[:-2], *basis.shape[-2:]), small, alpha=factor)


@dataclass(frozen=True)
class LeadingSubspace(Project):
    """Onto the leading singular vectors of the gradient at the last refresh (GaLore, eq. 12-13).

    Only the vectors of the smaller side are needed, so they are taken from the eigenvectors of the S x S product
    ``G G^T``, summed in float64. That loses nothing against a float32 SVD (it is nearer to the float64 one) and
    needs neither the vectors of the larger side nor a copy of the gradient. Each vector's sign is fixed, so
    that moments kept across refreshes meet vectors of the same orientation.
    """

    def refresh_(self, state: State, gradient: Tensor, seed: int, moments: Mapping[str, Tensor]) -> None:
        """Store the basis ``(..., S, R)``, in the gradient's dtype."""
        side, long = gradient.shape[-2:]
        gram = gradient.new_zeros((*gradient.shape[:-2], side, side), dtype=torch.float64)
        width = self._gram_width(side, long)
        for start in range(0, long, width):
            part = gradient[..., start : start + width].double()
            gram += part @ part.mT
        vectors = torch.linalg.eigh(gram)[1].flip(-1)[..., : self.rank_of(side)]
        largest = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
        state["basis"] = (vectors * largest.sign()).to(gradient.dtype).contiguous()

    def basis(self, state: State, gradient: Tensor) -> Tensor:
        """The stored basis."""
        stored: Tensor = state["basis"]
        return stored

    def state_bytes(self, side: int, long: int, dtype: torch.dtype) -> int:
        """The basis, S x R."""
        return side * self.rank_of(side) * dtype.itemsize

    def workspace_numel(self, side: int, long: int) -> tuple[int, int]:
        """At a refresh, in float64: the sum, an addend and a strip of the gradient; then the sum and eigenvectors."""
        summing = 2 * side * side + side * self._gram_width(side, long)
        return 0, max(summing, 3 * side * side + 4 * side * self.rank_of(side))

    def _gram_width(self, side: int, long: int) -> int:
        return min(long, max(1, CHUNK_NUMEL // side))


@dataclass(frozen=True)
class RandomSubspace(Project):
    """Onto random directions with entries from N(0, 1/R), made again from a seed whenever needed (APOLLO, sec. 4.1)."""

    def refresh_(self, state: State, gradient: Tensor, seed: int, moments: Mapping[str, Tensor]) -> None:
        """Store the new seed, an integer; no matrix is kept."""
        state["seed"] = seed

    def basis(self, state: State, gradient: Tensor) -> Tensor:
        """The random basis ``(S, R)`` that the stored seed stands for."""
        side = gradient.shape[-2]
        rank = self.rank_of(side)
        generator = None
        if has_values(gradient):
            generator = torch.Generator(device=gradient.device).manual_seed(state["seed"])
        drawn = torch.randn((rank, side), generator=generator, device=gradient.device, dtype=torch.float32)
        return drawn.mul_(rank**-0.5).to(gradient.dtype).mT

    def state_bytes(self, side: int, long: int, dtype: torch.dtype) -> int:
        """Nothing: the seed is a Python integer."""
        return 0

    def workspace_numel(self, side: int, long: int) -> tuple[int, int]:
        """The regenerated basis, drawn in float32 and cast."""
        return 2 * side * self.rank_of(side), 0
