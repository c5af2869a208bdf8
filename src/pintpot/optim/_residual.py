"""The ``residual`` part: how the small direction moves the parameter, and what becomes of the rest of the gradient.

Shapes: S smaller side, L larger side, R rank; parameter and gradient oriented ``(..., S, L)``, small gradient and
direction ``(..., R, L)``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pintpot.optim._project import Project, State
from pintpot.optim._tensors import CHUNK_NUMEL, strips


@dataclass(frozen=True)
class Small:
    """One projected gradient and what the inner rule made of it.

    Attributes:
        gradient: ``(..., R, L)``.
        direction: ``(..., R, L)``.
        moments: what the rule keeps, by name; changes in place are kept.
    """

    gradient: Tensor
    direction: Tensor
    moments: Mapping[str, Tensor]


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


@dataclass(frozen=True)
class SignRest(Residual):
    """The direction goes back up, and the sign of the rest of the gradient moves the weights too (FRUGAL, algorithm 1).

    Attributes:
        rest_scale: factor on the learning rate of the rest, beside ``scale``.
    """

    rest_scale: float = 1.0

    def apply_(
        self, parameter: Tensor, gradient: Tensor, small: Small, state: State, project: Project, lr: float
    ) -> None:
        """``W -= lr * scale * (P direction + rest_scale * sign(G - P small))``, the rest strip by strip."""
        long = gradient.shape[-1]
        width = max(1, CHUNK_NUMEL * long // gradient.numel())
        for strip in strips(long, width, gradient):
            rest = gradient[..., strip].clone()
            project.up_(rest, state, small.gradient[..., strip], -1.0)
            parameter[..., strip].add_(rest.sign_(), alpha=-lr * self.scale * self.rest_scale)
        project.up_(parameter, state, small.direction, -lr * self.scale)

    def workspace_numel(self, side: int, long: int) -> int:
        """A strip of the rest."""
        return side * min(long, max(1, CHUNK_NUMEL // side))


@dataclass(frozen=True)
class MuonRest(Residual):
    """The momentum outside the subspace moves the weights too, made orthogonal as in Muon (COSMOS).

    Inside, the inner rule says what each entry of the small momentum is multiplied by. Both parts are added, and the
    sum is scaled to one length: a root mean square of ``scale``.

    Attributes:
        weight: root mean square of the orthogonal part before it is added (gamma).
        momentum_decay: of the momentum, which the inner rule keeps.
    """

    weight: float = 0.1
    momentum_decay: float = 0.9

    def apply_(
        self, parameter: Tensor, gradient: Tensor, small: Small, state: State, project: Project, lr: float
    ) -> None:
        """``W -= lr * scale * sqrt(S L) * X / |X|``, with ``X = P (direction * P^T M) + weight * sqrt(S L) * O / |O|``.

        O is the orthogonal factor of ``M - P P^T M``.
        """
        momentum = small.moments["momentum"]
        momentum.lerp_(gradient.to(momentum.dtype), 1 - self.momentum_decay)
        side, long = parameter.shape[-2:]
        length = math.sqrt(side * long)
        whole = momentum.to(parameter.dtype, copy=True, memory_format=torch.contiguous_format)
        inside = project.down(state, whole)
        if project.rank_of(side) < side:
            project.up_(whole, state, inside, -1.0)
            whole = _orthogonal(whole)
            whole.mul_(_to_length(whole, self.weight * length))
        else:
            whole.zero_()  # Nothing is left outside, and rounding must not be taken for it.
        project.up_(whole, state, inside.mul_(small.direction), 1.0)
        parameter.addcmul_(whole, _to_length(whole, self.scale * length), value=-lr)

    def workspace_numel(self, side: int, long: int) -> int:
        """The momentum, the rest before and after one step of its orthogonalisation, and two products S x S."""
        return 3 * side * long + 2 * side * side


def _norm(tensor: Tensor, over: tuple[int, ...]) -> Tensor:
    dtype = _norm_dtype(tensor.dtype)
    if over == (-2,) and tensor.stride(-1) == 1 and tensor.numel() > CHUNK_NUMEL:
        # torch walks down each column of a matrix that lies in rows; rows added up are read in order.
        squares = tensor.new_zeros((*tensor.shape[:-2], 1, tensor.shape[-1]), dtype=dtype)
        long = tensor.shape[-2]
        for rows in strips(long, max(1, CHUNK_NUMEL * long // tensor.numel()), tensor):
            squares += tensor[..., rows, :].to(dtype).square().sum(-2, keepdim=True)
        return squares.sqrt_()
    return torch.linalg.vector_norm(tensor, dim=over, keepdim=True, dtype=dtype)


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


def _to_length(tensor: Tensor, length: float) -> Tensor:
    """The factor that gives each matrix this norm; 0 where it is zero."""
    norm = _norm(tensor, (-2, -1))
    return torch.where(norm > 0, length / norm, 0.0).to(tensor.dtype)


def _orthogonal(matrix: Tensor) -> Tensor:
    """Nearly the orthogonal factor of each matrix, its singular values in about 0.7 to 1.2; ``matrix`` is overwritten.

    Five Newton-Schulz steps of the fifth order with Muon's coefficients (Jordan et al. 2024).
    """
    first, third, fifth = 3.4445, -4.7750, 2.0315
    found = matrix.mul_(_to_length(matrix, 1.0)).reshape(-1, *matrix.shape[-2:])
    for _ in range(5):
        gram = found @ found.mT
        found = torch.baddbmm(found, torch.baddbmm(gram, gram, gram, beta=third, alpha=fifth), found, beta=first)
    return found.reshape(matrix.shape)
