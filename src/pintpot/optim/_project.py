"""The ``project`` part: how a gradient matrix becomes a small one, and how a small one comes back.

Shapes: S smaller side, L larger side, R rank. Every matrix arrives *oriented*, smaller side first: ``(..., S, L)``,
with ``S <= L``; leading dimensions (packed experts) are a batch. The small matrix is ``(..., R, L)``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from pintpot.optim import _products as products
from pintpot.optim._tensors import CHUNK_NUMEL, has_values, strips

State = dict[str, Any]
"""What the optimizer keeps for one parameter: tensors, numbers and lists of numbers."""


@dataclass(frozen=True)
class Project(ABC):
    """A map from ``(..., S, L)`` to ``(..., R, L)``.

    Attributes:
        rank: rows of the small matrix at most (a matrix with a smaller side keeps that side).
        exact: large float32 products are not made in bfloat16 (see ``_products``).
    """

    rank: int
    exact: bool = field(default=False, kw_only=True)

    carries: ClassVar[bool] = False
    """Whether a refresh changes the moments; else they are not read for it."""

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
            moments: those of the inner rule by name, to be carried over in place where ``carries``; empty at
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

    def refresh_flops(self, side: int, long: int) -> float:
        """Operations to choose the subspace of one matrix."""
        return 0.0

    def down(self, state: State, gradient: Tensor) -> Tensor:
        """The small gradient, ``(..., R, L)``."""
        return products.down(self.basis(state, gradient), gradient, self._narrow(gradient))

    def up_(self, target: Tensor, state: State, small: Tensor, factor: float) -> None:
        """Add ``factor`` times the full-size image of ``small`` to ``target``, without a full-size temporary."""
        products.up_(target, self.basis(state, target), small, factor, self._narrow(target))

    def copies_bytes(self, side: int, long: int, dtype: torch.dtype) -> int:
        """Bytes of the bfloat16 copies that a large product is made of."""
        if self.exact or not self.flops(side, long):
            return 0
        return products.workspace_bytes(side, long, self.rank_of(side), dtype, torch.device("cpu"))

    def _narrow(self, matrix: Tensor) -> bool:
        rank = self.rank_of(matrix.shape[-2])
        return not self.exact and products.is_narrowed(matrix.shape, rank, matrix.dtype, matrix.device)


@dataclass(frozen=True)
class Whole(Project):
    """Nothing is projected: the way of all matrices through a rule that is one for matrices."""

    rank: int = field(default=0, init=False, repr=False)

    def rank_of(self, side: int) -> int:
        """The side itself."""
        return side

    def refresh_(self, state: State, gradient: Tensor, seed: int, moments: Mapping[str, Tensor]) -> None:
        """There is nothing to choose."""

    def basis(self, state: State, gradient: Tensor) -> Tensor:
        """The identity."""
        return torch.eye(gradient.shape[-2], dtype=gradient.dtype, device=gradient.device)

    def down(self, state: State, gradient: Tensor) -> Tensor:
        """The gradient itself."""
        return gradient

    def up_(self, target: Tensor, state: State, small: Tensor, factor: float) -> None:
        """Add."""
        target.add_(small, alpha=factor)

    def flops(self, side: int, long: int) -> float:
        """None."""
        return 0.0

    def state_bytes(self, side: int, long: int, dtype: torch.dtype) -> int:
        """Nothing."""
        return 0

    def workspace_numel(self, side: int, long: int) -> tuple[int, int]:
        """Nothing."""
        return 0, 0


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


@dataclass(frozen=True)
class RandomRows(Project):
    """Onto random rows of the gradient, found again from a seed whenever needed (FRUGAL, arXiv:2411.07837).

    Attributes:
        density: the fraction of the smaller side that is kept; it stands in the place of the rank.
    """

    carries: ClassVar[bool] = True
    rank: int = field(default=0, init=False, repr=False)
    density: float = 0.25

    def rank_of(self, side: int) -> int:
        """The density of the side, rounded down, at least one."""
        return max(1, int(self.density * side))

    def refresh_(self, state: State, gradient: Tensor, seed: int, moments: Mapping[str, Tensor]) -> None:
        """Store the new seed, and start the moments anew: they were those of other rows."""
        state["seed"], state["forgotten"] = seed, state["step"]
        for moment in moments.values():
            moment.zero_()

    def rows(self, state: State, gradient: Tensor) -> Tensor:
        """The numbers of the rows that the stored seed stands for, ascending, ``(R,)``."""
        side = gradient.shape[-2]
        generator = None
        if has_values(gradient):
            generator = torch.Generator(device=gradient.device).manual_seed(state["seed"])
        order = torch.randperm(side, generator=generator, device=gradient.device)
        return order[: self.rank_of(side)].sort().values

    def basis(self, state: State, gradient: Tensor) -> Tensor:
        """The chosen columns of the identity, ``(S, R)``."""
        rows = self.rows(state, gradient)
        return gradient.new_zeros((gradient.shape[-2], len(rows))).scatter_(0, rows[None], 1.0)

    def down(self, state: State, gradient: Tensor) -> Tensor:
        """The chosen rows."""
        return gradient.index_select(-2, self.rows(state, gradient))

    def up_(self, target: Tensor, state: State, small: Tensor, factor: float) -> None:
        """Add to the chosen rows."""
        target.index_add_(-2, self.rows(state, target), small, alpha=factor)

    def flops(self, side: int, long: int) -> float:
        """None: rows are copied."""
        return 0.0

    def state_bytes(self, side: int, long: int, dtype: torch.dtype) -> int:
        """Nothing: the seed is a Python integer."""
        return 0

    def workspace_numel(self, side: int, long: int) -> tuple[int, int]:
        """The order of all rows, in 8 bytes each, and the chosen ones with their places."""
        return 16 * side, 0


@dataclass(frozen=True)
class CosineSubspace(Project):
    """Onto the cosines that the gradient is most aligned with (Modoranu et al. 2025, arXiv:2505.17967).

    The vectors ``sqrt(2 / S) cos(pi (2 i + 1) k / 2 S)`` (the first divided by the root of 2) are the orthonormal
    basis of the discrete cosine transform, the same for every matrix of a side, so numbers k are all that is kept.
    Two of them are the same or orthogonal. Hence to rotate moments into the next subspace is to move those of each
    vector that stays to its new row; those of a new vector start at zero.
    """

    carries: ClassVar[bool] = True

    def refresh_(self, state: State, gradient: Tensor, seed: int, moments: Mapping[str, Tensor]) -> None:
        """Store the numbers ``(..., R)`` of the vectors along which the transform has the largest L1 norm."""
        side = gradient.shape[-2]
        order = self._norms(gradient).sort(dim=-1, descending=True, stable=True).indices
        chosen = order[..., : self.rank_of(side)].sort(dim=-1).values
        if moments:
            rank = chosen.shape[-1]
            row = torch.arange(rank, device=chosen.device).expand_as(chosen)
            rows = chosen.new_full((*chosen.shape[:-1], side), rank).scatter_(-1, state["cosines"].long(), row)
            source = rows.gather(-1, chosen)[..., None]
            for moment in moments.values():
                moved = moment.gather(-2, source.clamp_max(rank - 1).expand_as(moment))
                moment.copy_(moved.mul_(source < rank))
        if "cosines" in state:
            state["cosines"].copy_(chosen)
        else:
            state["cosines"] = chosen.int()

    def basis(self, state: State, gradient: Tensor) -> Tensor:
        """The vectors that the stored numbers stand for, ``(..., S, R)``."""
        side = gradient.shape[-2]
        number = state["cosines"].to(torch.int32 if side < 1 << 15 else torch.int64)
        place = torch.arange(1, 2 * side, 2, dtype=number.dtype, device=number.device)
        # Whole turns are taken off while the angle is an integer: a cosine of a large float32 is a poor one.
        turns = (place[:, None] * number[..., None, :]).remainder_(4 * side)
        angles = turns.to(torch.promote_types(gradient.dtype, torch.float32)).mul_(math.pi / (2 * side))
        size = 1 - (number == 0).to(angles.dtype) * (1 - math.sqrt(0.5))
        return angles.cos_().mul_(math.sqrt(2 / side) * size[..., None, :]).to(gradient.dtype)

    def state_bytes(self, side: int, long: int, dtype: torch.dtype) -> int:
        """Four bytes for each vector."""
        return 4 * self.rank_of(side)

    def workspace_numel(self, side: int, long: int) -> tuple[int, int]:
        """The angles, whole and as numbers, and the basis; at a refresh a strip's transform, then a moved moment."""
        rank = self.rank_of(side)
        width = min(long, max(1, CHUNK_NUMEL // side))
        return 5 * side * rank, max(2 * side * width, 2 * rank * long)

    def _norms(self, gradient: Tensor) -> Tensor:
        """The L1 norms of the rows of the transform, ``(..., S)``, by a complex one of the same length (Makhoul 1980).

        The rows are taken even ones first, odd ones back; wave k, turned by ``pi k / 2 S``, then holds rows k and S - k
        of the cosine transform as its real and imaginary part.
        """
        side, long = gradient.shape[-2:]
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        even, odd = (torch.arange(start, side, 2, device=gradient.device) for start in (0, 1))
        order = torch.cat((even, odd.flip(0)))
        angle = torch.arange(side // 2 + 1, dtype=dtype, device=gradient.device) * (-math.pi / (2 * side))
        turn = torch.complex(angle.cos(), angle.sin())[:, None]
        sums = angle.new_zeros((*gradient.shape[:-2], len(angle), 2))
        width = max(1, CHUNK_NUMEL * long // gradient.numel())
        for columns in strips(long, width, gradient):
            strip = gradient[..., columns].index_select(-2, order).to(dtype)
            waves = torch.fft.rfft(strip, dim=-2).mul_(turn)
            sums += torch.view_as_real(waves).abs_().sum(-2)
        sums[..., 0, 0] *= math.sqrt(0.5)
        return torch.cat((sums[..., 0], sums[..., 1 : (side + 1) // 2, 1].flip(-1)), dim=-1)
