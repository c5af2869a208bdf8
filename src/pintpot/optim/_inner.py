"""The ``inner rule`` part: from small gradients to update directions, with a state of the small size.

Shapes: each tensor of a list has any shape; its moments have the same one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pintpot.optim._project import State


@dataclass(frozen=True)
class Inner(ABC):
    """An update rule for tensors.

    Attributes:
        moments: names of the tensors it keeps, each of the size of what it updates unless ``shape_of`` says otherwise.
    """

    moments: tuple[str, ...] = ()

    def shape_of(self, moment: str, shape: torch.Size) -> torch.Size:
        """The shape of a moment for small gradients of this shape."""
        return shape

    def start_(self, state: State, gradient: Tensor, shape: torch.Size) -> None:  # noqa: B027 - most keep no more
        """Put into a fresh ``state`` what is kept beside the moments, for small gradients of this shape."""

    def enter(self, state: State, small: Tensor) -> Tensor:
        """The small gradient as the rule sees it (in another frame, preconditioned)."""
        return small

    def leave(self, state: State, direction: Tensor) -> Tensor:
        """A direction of the rule as the residual sees it: back from the frame of ``enter``."""
        return direction

    def state_bytes(self, rank: int, long: int, dtype: torch.dtype) -> int:
        """Bytes kept beside the moments for one small matrix (rank, long)."""
        return 0

    def workspace_numel(self, rank: int, long: int) -> int:
        """Temporary elements, of 4 bytes, for one small matrix beyond three of its size."""
        return 0

    @abstractmethod
    def directions(
        self, gradients: Sequence[Tensor], moments: Sequence[Sequence[Tensor]], steps: Sequence[int]
    ) -> list[Tensor]:
        """Descent directions (to be subtracted, before the learning rate).

        Args:
            gradients: the gradients; not modified.
            moments: for each name in ``self.moments`` the tensors, one a gradient; updated in place.
            steps: for each gradient the number of this update, from 1.
        """


@dataclass(frozen=True)
class Adam(Inner):
    """Adam with bias correction (Kingma & Ba 2015, arXiv:1412.6980, algorithm 1)."""

    moments: tuple[str, ...] = ("exp_avg", "exp_avg_sq")
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def directions(
        self, gradients: Sequence[Tensor], moments: Sequence[Sequence[Tensor]], steps: Sequence[int]
    ) -> list[Tensor]:
        """Corrected first moments over the roots of corrected second moments."""
        first, second = list(moments[0]), list(moments[1])
        beta1, beta2 = self.betas
        torch._foreach_lerp_(first, list(gradients), 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, list(gradients), list(gradients), 1 - beta2)
        roots = torch._foreach_sqrt(second)
        torch._foreach_div_(roots, [(1 - beta2**step) ** 0.5 for step in steps])
        torch._foreach_add_(roots, self.eps)
        torch._foreach_mul_(roots, [1 - beta1**step for step in steps])
        return list(torch._foreach_div(first, roots))
