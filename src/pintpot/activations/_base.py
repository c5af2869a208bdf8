"""The activations wing: what is kept between the forward and the backward pass, and in which form."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from pintpot.core.technique import Technique
from pintpot.core.workload import Workload


@dataclass(frozen=True, kw_only=True)
class ActivationMethod(Technique):
    """A technique of the ``activations`` slot: a scope around anyone's training steps.

    Attributes:
        exact: whether losses and gradients are those of the plain step bit for bit.
    """

    exact: ClassVar[bool] = True

    @abstractmethod
    def scope(
        self, model: nn.Module, workload: Workload, budget_bytes: int | None = None
    ) -> AbstractContextManager[object]:
        """A context in which forward passes of ``model`` keep less for their backward passes.

        The forward and the backward pass of a step both happen inside. Leaving the context restores the model.

        Args:
            model: the model that is trained, adapters attached.
            workload: the sizes of one step (``batch`` sequences of ``tokens``).
            budget_bytes: the most bytes that may be kept for the backward pass at any moment; the method then
                gives up the least speed for it. ``None`` asks for the lowest peak.

        Raises:
            BudgetError: on entering, when the budget is below what the method can reach.
            UnsupportedModel: on entering, when the method cannot act on the model.
        """
