"""The ``inner rule`` part: from small gradients to update directions, with a state of the small size.

Shapes: each tensor of a list has any shape; its moments have the same one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from pintpot.optim._project import State
from pintpot.optim._tensors import CHUNK_NUMEL, has_values, is_dense


@dataclass(frozen=True)
class Inner(ABC):
    """An update rule for tensors.

    Attributes:
        moments: names of the tensors it keeps, each of the size of what it updates unless ``shape_of`` says otherwise.
        betas: decay rates.
        eps: added to what is divided by.
    """

    by_matrix: ClassVar[bool] = False
    """Whether the rule is one for matrices, in bases of its own; Adam then serves all that is none."""

    moments: tuple[str, ...] = ()
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def shape_of(self, moment: str, small: torch.Size, side: int) -> torch.Size:
        """The shape of a moment for a small gradient of a matrix whose smaller side is ``side``."""
        return small

    def largest(self, small: torch.Size, side: int) -> int:
        """Elements of the largest moment, or of the small gradient."""
        return max([small.numel(), *(self.shape_of(name, small, side).numel() for name in self.moments)])

    def start_(self, state: State, gradient: Tensor, shape: torch.Size) -> None:  # noqa: B027 - most keep no more
        """Put into a fresh ``state`` what is kept beside the moments, for small gradients of this shape."""

    def enter(self, state: State, small: Tensor) -> Tensor:
        """The small gradient as the rule sees it (in another frame, preconditioned)."""
        return small

    def leave(self, state: State, direction: Tensor) -> Tensor:
        """A direction of the rule as the residual sees it: back from the frame of ``enter``."""
        return direction

    def learn_(self, state: State, small: Tensor, moments: Mapping[str, Tensor]) -> None:  # noqa: B027 - most do not
        """What follows from the small gradient once its update is made; ``moments`` may be changed in place."""

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

    def step_(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor],
        moments: Sequence[Sequence[Tensor]],
        steps: Sequence[int],
        lr: float,
        weight_decay: float,
    ) -> None:
        """Move parameters in place along the directions of their own gradients, after a decoupled weight decay."""
        directions = self.directions(gradients, moments, steps)
        if weight_decay:
            torch._foreach_mul_(list(parameters), 1 - lr * weight_decay)
        torch._foreach_add_(list(parameters), directions, alpha=-lr)


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
        if _in_one_pass(gradients, first, second):
            found = [torch.zeros_like(gradient) for gradient in gradients]
            self._fused_(found, gradients, (first, second), steps, lr=-1.0, weight_decay=0.0)
            return found
        beta1, beta2 = self.betas
        torch._foreach_lerp_(first, list(gradients), 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, list(gradients), list(gradients), 1 - beta2)
        roots = torch._foreach_sqrt(second)
        torch._foreach_div_(roots, [(1 - beta2**step) ** 0.5 for step in steps])
        torch._foreach_add_(roots, self.eps)
        torch._foreach_mul_(roots, [1 - beta1**step for step in steps])
        return list(torch._foreach_div(first, roots))

    def step_(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor],
        moments: Sequence[Sequence[Tensor]],
        steps: Sequence[int],
        lr: float,
        weight_decay: float,
    ) -> None:
        """As torch's AdamW; in one pass over the memory where it can be."""
        if type(self) is Adam and _in_one_pass(parameters, gradients, *moments):
            self._fused_(parameters, gradients, moments, steps, lr, weight_decay)
        else:
            super().step_(parameters, gradients, moments, steps, lr, weight_decay)

    def _fused_(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor],
        moments: Sequence[Sequence[Tensor]],
        steps: Sequence[int],
        lr: float,
        weight_decay: float,
    ) -> None:
        if not all(has_values(p) for p in parameters):
            return
        adamw(
            list(parameters),
            list(gradients),
            list(moments[0]),
            list(moments[1]),
            [],
            # The function counts this step itself.
            [torch.tensor(step - 1.0, device=p.device) for step, p in zip(steps, parameters, strict=True)],
            fused=True,
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=lr,
            weight_decay=weight_decay,
            eps=self.eps,
            maximize=False,
        )


@dataclass(frozen=True)
class FisherAdam(Adam):
    """Adam on natural gradients: each is first divided by its empirical Fisher matrix (Natural GaLore).

    The matrix is ``lambda I + G G^T``, where the columns of G are the last small gradients, g itself among them. By
    Woodbury's identity the inverse times g is then ``G w``, where w solves ``(lambda I + G^T G) w = e`` and e marks the
    column of g: a system as small as the history is short, and a sum of what it holds.

    Attributes:
        history: gradients in G (s).
        damping: lambda.
    """

    moments: tuple[str, ...] = ("exp_avg", "exp_avg_sq", "past")
    history: int = 20
    damping: float = 1e-3

    def shape_of(self, moment: str, small: torch.Size, side: int) -> torch.Size:
        """The past gradients are a stack of small ones."""
        return torch.Size((self.history, *small)) if moment == "past" else small

    def workspace_numel(self, rank: int, long: int) -> int:
        """The natural gradient, also while it is summed, two widened strips of the history, and all of it unpacked."""
        past = self.history * rank * long
        return 2 * rank * long + 2 * min(CHUNK_NUMEL, past) + past

    def directions(
        self, gradients: Sequence[Tensor], moments: Sequence[Sequence[Tensor]], steps: Sequence[int]
    ) -> list[Tensor]:
        """Those of Adam for the natural gradients; the oldest gradient of each history makes room for this one."""
        first, second, past = (list(tensors) for tensors in moments)
        natural = [self._natural(g, held, step) for g, held, step in zip(gradients, past, steps, strict=True)]
        return super().directions(natural, (first, second), steps)

    def _natural(self, gradient: Tensor, past: Tensor, step: int) -> Tensor:
        place = (step - 1) % self.history
        past[place] = gradient
        # Places not yet filled are zeros, which add nothing to the sums.
        columns = past.movedim(0, -3).flatten(-2)
        wide = torch.promote_types(gradient.dtype, torch.float32)
        width = max(1, CHUNK_NUMEL * columns.shape[-1] // columns.numel())
        gram = columns.new_zeros((*columns.shape[:-1], self.history), dtype=wide)
        for strip in columns.split(width, dim=-1):
            gram += strip.to(wide) @ strip.to(wide).mT
        weights = self._weights(gram, place)
        natural = torch.empty_like(gradient, memory_format=torch.contiguous_format)
        parts = natural.flatten(-2).unsqueeze(-2).split(width, dim=-1)
        for part, strip in zip(parts, columns.split(width, dim=-1), strict=True):
            part.copy_(weights @ strip.to(wide))
        return natural

    def _weights(self, gram: Tensor, place: int) -> Tensor:
        """What each past gradient counts for, (..., 1, s)."""
        diagonal = gram.diagonal(dim1=-2, dim2=-1)
        # Rounding may make the sum less than positive, by no more than this.
        rounding = torch.finfo(gram.dtype).eps * diagonal.sum(-1, keepdim=True)
        diagonal.add_(self.damping + rounding)
        unit = gram.new_zeros((*gram.shape[:-1], 1))
        unit[..., place, :] = 1
        return torch.cholesky_solve(unit, torch.linalg.cholesky_ex(gram)[0]).mT


@dataclass(frozen=True)
class MomentumAdam(Inner):
    """Adam's rule where the momentum is kept whole and moved on by the residual (COSMOS; see ``MuonRest``).

    Its ``directions`` are what the entries of the small momentum are to be multiplied by.
    """

    moments: tuple[str, ...] = ("exp_avg_sq", "momentum")
    betas: tuple[float, float] = (0.9, 0.96)
    eps: float = 1e-8

    def shape_of(self, moment: str, small: torch.Size, side: int) -> torch.Size:
        """The momentum has the matrix's own shape."""
        return torch.Size((*small[:-2], side, small[-1])) if moment == "momentum" else small

    def directions(
        self, gradients: Sequence[Tensor], moments: Sequence[Sequence[Tensor]], steps: Sequence[int]
    ) -> list[Tensor]:
        """One over the roots of corrected second moments, and the correction of the momentum."""
        second = list(moments[0])
        beta1, beta2 = self.betas
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, list(gradients), list(gradients), 1 - beta2)
        roots = torch._foreach_sqrt(second)
        torch._foreach_div_(roots, [(1 - beta2**step) ** 0.5 for step in steps])
        torch._foreach_add_(roots, self.eps)
        torch._foreach_mul_(roots, [1 - beta1**step for step in steps])
        torch._foreach_reciprocal_(roots)
        return list(roots)


def _in_one_pass(*lists: Sequence[Tensor]) -> bool:
    """Whether torch's fused kernel takes these tensors: of one dtype, and each place of the lists laid out alike."""
    first = lists[0]
    if not first or first[0].device.type not in ("cpu", "cuda"):
        return False
    dtype = first[0].dtype
    return dtype.is_floating_point and all(
        len({t.stride() for t in tensors}) == 1 and is_dense(tensors[0]) and {t.dtype for t in tensors} == {dtype}
        for tensors in zip(*lists, strict=True)
    )
