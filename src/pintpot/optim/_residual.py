"""The ``residual`` part: how the small direction moves the parameter, and what becomes of the rest of the gradient.

Shapes: S smaller side, L larger side, R rank; parameter and gradient oriented ``(..., S, L)``, small gradient and
direction ``(..., R, L)``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from pintpot.optim._project import Project, State


@dataclass(frozen=True)
class Small:
    """One projected gradient and the direction that the inner rule made of it, both ``(..., R, L)``."""

    gradient: Tensor
    direction: Tensor


@dataclass(frozen=True)
class Residual(ABC):
    """The last part of the update.

    Attributes:
        scale: factor on the learning rate of projected matrices.
    """

    scale: float

    def start_(self, state: State, gradient: Tensor) -> None:  # noqa: B027 - most residuals keep nothing
        """Put into a fresh ``state`` what the residual keeps."""

    @abstractmethod
    def apply_(
        self, parameter: Tensor, gradient: Tensor, small: Small, state: State, project: Project, lr: float
    ) -> None:
        """Move ``parameter`` in place."""

    def state_bytes(self, side: int, long: int, dtype: torch.dtype) -> int:
        """Bytes kept for one matrix of a dtype."""
        return 0

    def workspace_numel(self, side: int, long: int) -> int:
        """Temporary elements while one matrix is moved."""
        return 0


@dataclass(frozen=True)
class Drop(Residual):
    """The direction goes back up; what lies outside the subspace is dropped (GaLore, eq. 5)."""

    def apply_(
        self, parameter: Tensor, gradient: Tensor, small: Small, state: State, project: Project, lr: float
    ) -> None:
        """``W -= lr * scale * P direction``."""
        project.up_(parameter, state, small.direction, -lr * self.scale)


@dataclass(frozen=True)
class ScaledGradient(Residual):
    """The whole gradient, scaled as the inner rule scaled the small one (APOLLO, eq. 5 and algorithm 1).

    Attributes:
        per_channel: one factor for each of the L columns, else one for the matrix.
        growth_limit: the norm of the update may grow by this factor a step (the limiter of Fira,
            arXiv:2410.01623, which APOLLO takes over).
    """

    per_channel: bool = True
    growth_limit: float = 1.01

    def start_(self, state: State, gradient: Tensor) -> None:
        """The norm of the last update: 0 (no limit yet)."""
        _start_limiter_(state, gradient)

    def apply_(
        self, parameter: Tensor, gradient: Tensor, small: Small, state: State, project: Project, lr: float
    ) -> None:
        """``W -= lr * scale * G diag(s)``, with ``s = |direction| / |small gradient|`` and the norm limited."""
        over = (-2,) if self.per_channel else (-2, -1)
        factors = _growth(small, over)
        whole = _norm(gradient, over)
        limiter = _limited_(state, _norm(factors * whole, (-2, -1)), self.growth_limit)
        parameter.addcmul_(gradient, (factors * limiter).to(gradient.dtype), value=-lr * self.scale)

    def state_bytes(self, side: int, long: int, dtype: torch.dtype) -> int:
        """One number, in float32 or wider."""
        return _norm_dtype(dtype).itemsize

    def workspace_numel(self, side: int, long: int) -> int:
        """A handful of rows."""
        return 8 * long if self.per_channel else 8


@dataclass(frozen=True)
class NormScaled(Residual):
    """The direction goes back up, and the rest of the gradient moves the weights too (Fira, arXiv:2410.01623).

    Each column of the rest is scaled as the inner rule scaled the small one, and the growth of its norm is limited.

    Attributes:
        growth_limit: the norm of the scaled rest may grow by this factor a step.
    """

    growth_limit: float = 1.01

    def start_(self, state: State, gradient: Tensor) -> None:
        """The norm of the last scaled rest: 0 (no limit yet)."""
        _start_limiter_(state, gradient)

    def apply_(
        self, parameter: Tensor, gradient: Tensor, small: Small, state: State, project: Project, lr: float
    ) -> None:
        """``W -= lr * (scale * P direction + (G - P small) diag(s))``, the last term limited."""
        rest = gradient.clone()
        project.up_(rest, state, small.gradient, -1.0)
        factors = _growth(small, (-2,))
        limiter = _limited_(state, _norm(factors * _norm(rest, (-2,)), (-2, -1)), self.growth_limit)
        parameter.addcmul_(rest, (factors * limiter).to(gradient.dtype), value=-lr)
        project.up_(parameter, state, small.direction, -lr * self.scale)

    def state_bytes(self, side: int, long: int, dtype: torch.dtype) -> int:
        """One number, in float32 or wider."""
        return _norm_dtype(dtype).itemsize

    def workspace_numel(self, side: int, long: int) -> int:
        """The rest of the gradient, and a handful of rows."""
        return side * long + 8 * long


def _norm(tensor: Tensor, over: tuple[int, ...]) -> Tensor:
    return torch.linalg.vector_norm(tensor, dim=over, keepdim=True, dtype=_norm_dtype(tensor.dtype))


def _growth(small: Small, over: tuple[int, ...]) -> Tensor:
    """What the inner rule multiplied norms by; 0 where there was nothing."""
    before, after = _norm(small.gradient, over), _norm(small.direction, over)
    return torch.where(before > 0, after / before, 0.0)


def _start_limiter_(state: State, gradient: Tensor) -> None:
    state["update_norm"] = gradient.new_zeros((*gradient.shape[:-2], 1, 1), dtype=_norm_dtype(gradient.dtype))


def _limited_(state: State, norm: Tensor, growth_limit: float) -> Tensor:
    """The factor that keeps a norm within ``growth_limit`` times the last one, which is then this one."""
    allowed = growth_limit * state["update_norm"]
    limiter = torch.where((allowed > 0) & (norm > allowed), allowed / norm, 1.0)
    state["update_norm"] = norm * limiter
    return limiter


def _norm_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
