"""Inner rules that take Adam's place in any method: Lion, momentum, signs, and Adam in Shampoo's eigenbasis.

Shapes: R rank (or the smaller side, where nothing is projected), L larger side; small gradients ``(..., R, L)``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pintpot.core.errors import CompositionError
from pintpot.optim._inner import Adam, Inner
from pintpot.optim._project import Project, State


@dataclass(frozen=True)
class LionRule(Inner):
    """The sign of a mean of gradient and momentum, which are mixed again to be remembered (arXiv:2302.06675)."""

    moments: tuple[str, ...] = ("exp_avg",)
    betas: tuple[float, float] = (0.9, 0.99)

    def directions(
        self, gradients: Sequence[Tensor], moments: Sequence[Sequence[Tensor]], steps: Sequence[int]
    ) -> list[Tensor]:
        """``sign(b1 m + (1 - b1) g)``, and then ``m = b2 m + (1 - b2) g``."""
        first = list(moments[0])
        mixed = torch._foreach_lerp(first, list(gradients), 1 - self.betas[0])
        torch._foreach_sign_(mixed)
        torch._foreach_lerp_(first, list(gradients), 1 - self.betas[1])
        return list(mixed)


@dataclass(frozen=True)
class Momentum(Inner):
    """The sum of all gradients, each worth less by a factor at every step (Polyak's heavy ball, as torch's SGD)."""

    moments: tuple[str, ...] = ("momentum",)
    betas: tuple[float, float] = (0.9, 0.0)

    def directions(
        self, gradients: Sequence[Tensor], moments: Sequence[Sequence[Tensor]], steps: Sequence[int]
    ) -> list[Tensor]:
        """``m = b1 m + g``."""
        first = list(moments[0])
        torch._foreach_mul_(first, self.betas[0])
        torch._foreach_add_(first, list(gradients))
        return first


@dataclass(frozen=True)
class Signs(Inner):
    """The sign of the momentum (Signum), or without moments of the gradient (arXiv:1802.04434)."""

    moments: tuple[str, ...] = ("exp_avg",)
    betas: tuple[float, float] = (0.9, 0.0)

    def directions(
        self, gradients: Sequence[Tensor], moments: Sequence[Sequence[Tensor]], steps: Sequence[int]
    ) -> list[Tensor]:
        """``sign(m)``, with ``m = b1 m + (1 - b1) g``."""
        if not moments:
            return list(torch._foreach_sign(list(gradients)))
        torch._foreach_lerp_(list(moments[0]), list(gradients), 1 - self.betas[0])
        return list(torch._foreach_sign(list(moments[0])))


@dataclass(frozen=True)
class SoapRule(Adam):
    """Adam in the eigenbases of the averages of ``G G^T`` and ``G^T G`` (arXiv:2409.11321).

    The moments are kept in these bases. The first gradient of a matrix only finds them.

    Attributes:
        every: steps between two turns of the bases.
        largest_side: a longer side keeps its own basis.
    """

    by_matrix: ClassVar[bool] = True

    betas: tuple[float, float] = (0.95, 0.95)
    every: int = 10
    largest_side: int = 10000

    def start_(self, state: State, gradient: Tensor, shape: torch.Size) -> None:
        """The averages and their bases, zeros at first, in float32 or wider."""
        wide = torch.promote_types(gradient.dtype, torch.float32)
        for name, dim in self._sides(shape).items():
            for part in ("average", "frame"):
                state[f"{name}_{part}"] = gradient.new_zeros((*shape[:-2], shape[dim], shape[dim]), dtype=wide)

    def state_bytes(self, rank: int, long: int, dtype: torch.dtype) -> int:
        """Two squares a side."""
        wide = torch.promote_types(dtype, torch.float32)
        shape = torch.Size((rank, long))
        return sum(2 * shape[dim] ** 2 * wide.itemsize for dim in self._sides(shape).values())

    def workspace_numel(self, rank: int, long: int) -> int:
        """Three small matrices while they turn, and while a basis is found five squares in float64."""
        shape = torch.Size((rank, long))
        return 3 * rank * long + 10 * max((shape[dim] ** 2 for dim in self._sides(shape).values()), default=0)

    def enter(self, state: State, small: Tensor) -> Tensor:
        """The gradient in the bases; the first counts for nothing."""
        if state["step"] == 1:
            return torch.zeros_like(small, memory_format=torch.contiguous_format)
        return self._turned(state, small, back=False)

    def directions(
        self, gradients: Sequence[Tensor], moments: Sequence[Sequence[Tensor]], steps: Sequence[int]
    ) -> list[Tensor]:
        """Adam's, which begin at the second step."""
        return super().directions(gradients, moments, [max(1, step - 1) for step in steps])

    def leave(self, state: State, direction: Tensor) -> Tensor:
        """Back from the bases."""
        return self._turned(state, direction, back=True)

    def learn_(self, state: State, small: Tensor, moments: Mapping[str, Tensor]) -> None:
        """Move the averages on, and when it is time their bases, with the moments."""
        for name, dim in self._sides(small.shape).items():
            average, frame = state[f"{name}_average"], state[f"{name}_frame"]
            wide = small.to(average.dtype)
            average.lerp_(wide @ wide.mT if dim == -2 else wide.mT @ wide, 1 - self.betas[1])
            if state["step"] == 1:
                # In float64: float32 does not converge for every average of one gradient, which has few dimensions.
                frame.copy_(torch.linalg.eigh(average.double())[1].flip(-1))
            elif (state["step"] - 1) % self.every == 0:
                _turn_(average, frame, dim, moments)

    def _sides(self, shape: torch.Size) -> dict[str, int]:
        """The dimensions that have a basis, by name."""
        return {name: dim for name, dim in (("left", -2), ("right", -1)) if shape[dim] <= self.largest_side}

    def _turned(self, state: State, small: Tensor, back: bool) -> Tensor:
        found = small
        for name, dim in self._sides(small.shape).items():
            frame = state[f"{name}_frame"].mT if back else state[f"{name}_frame"]
            wide = found.to(frame.dtype)
            found = frame.mT @ wide if dim == -2 else wide @ frame
        return found.to(small.dtype)


def _turn_(average: Tensor, frame: Tensor, dim: int, moments: Mapping[str, Tensor]) -> None:
    """One power step of a basis of the average, its vectors sorted by how much they stretch; the moments follow."""
    image = average @ frame
    order = (frame * image).sum(-2).argsort(dim=-1, descending=True, stable=True)
    found = torch.linalg.qr(image.gather(-1, order[..., None, :].expand_as(image)))[0]
    turn = frame.mT @ found
    first, second = moments["exp_avg"], moments["exp_avg_sq"]
    wide = first.to(turn.dtype)
    first.copy_(turn.mT @ wide if dim == -2 else wide @ turn)
    places = order[..., :, None] if dim == -2 else order[..., None, :]
    second.copy_(second.gather(dim, places.expand_as(second)))
    frame.copy_(found)


RULES: Mapping[str, Inner] = {
    "adam": Adam(),
    "lion": LionRule(),
    "sgd-momentum": Momentum(),
    "signsgd": Signs(),
    "soap": SoapRule(),
}
"""The rules that can be asked for by name, with the hyperparameters of their papers."""


def rule_of(asked: Inner | str | None, own: Inner, project: Project | None) -> Inner | None:
    """The rule asked for in the place of a method's own; ``None`` when there is none.

    Args:
        asked: a rule, or its name.
        own: the method's.
        project: the method's.

    Raises:
        CompositionError: for an unknown name, and where the method cannot do without its own.
    """
    if asked is None:
        return None
    if isinstance(asked, str) and asked not in RULES:
        raise CompositionError(f"no inner rule is called {asked!r}", hint=f"one of: {', '.join(RULES)}")
    rule = RULES[asked] if isinstance(asked, str) else asked
    if type(own) is not Adam:
        raise CompositionError("the method has an inner rule of its own", hint="leave out the other rule")
    if rule.by_matrix and project is not None and project.carries:
        raise CompositionError(
            "the method moves moments to other rows, but the rule keeps them in bases of its own",
            hint="use another rule, or a method such as galore",
        )
    return rule
