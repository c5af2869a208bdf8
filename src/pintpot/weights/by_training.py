"""Methods that change a model by training it: what a training loop calls, and when.

``prepare_`` makes the model one that can be trained, by any loop, on its own loss or on the method's ``objective``.
The loop calls ``observe_`` when the gradients of an update are complete and ``follow_`` after it, and adds ``penalty``
to the loss. ``finish_`` makes what was trained the result.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from pintpot.core.shape import ModelShape
from pintpot.core.technique import Technique
from pintpot.weights._base import CompressionReport, Texts

Prepared = TypeVar("Prepared")


class Follower(nn.Module):
    """A part of a model that is told how its training goes.

    What it has to know of what went before is in parameters and buffers, so that a run goes on from a checkpoint.
    """

    def observe_(self) -> None:
        """Called before each update, when the gradients are as the optimizer will use them."""

    def follow_(self, progress: float) -> None:
        """Called after each update with the share of the training that is done, for schedules."""

    def penalty(self) -> Tensor | None:
        """What is added to the loss, if anything."""
        return None


def followers(model: nn.Module) -> Iterator[Follower]:
    """All parts of a model that are told."""
    return (module for module in model.modules() if isinstance(module, Follower))


def observe_(model: nn.Module) -> None:
    """Tell every part that the gradients are complete."""
    for part in followers(model):
        part.observe_()


def follow_(model: nn.Module, progress: float) -> None:
    """Tell every part which share of the training is done."""
    for part in followers(model):
        part.follow_(progress)


@dataclass(frozen=True, kw_only=True)
class ByTraining(Technique, Generic[Prepared]):
    """A technique that changes a model by training it."""

    @property
    @abstractmethod
    def learning_rate(self) -> float:
        """The usual one."""

    def check(self, shape: ModelShape) -> None:
        """Refuse a model that it cannot train, from shapes alone.

        Raises:
            UnsupportedModel: naming the first layer that stands in the way.
        """

    @abstractmethod
    def prepare_(self, model: PreTrainedModel, texts: Texts = ()) -> Prepared:
        """Make a dense model one that can be trained; what is to be trained requires gradients.

        Args:
            model: in the dtype that it is trained in.
            texts: where the starting point needs calibration.

        Returns:
            What ``finish_`` has to know.
        """

    @abstractmethod
    def finish_(self, model: PreTrainedModel, prepared: Prepared, skeleton: nn.Module) -> CompressionReport:
        """Make what was trained the result, in place.

        Args:
            model: after ``prepare_`` and training.
            prepared: what ``prepare_`` gave.
            skeleton: the dense model's, usually on the meta device, which says what was what.
        """

    def objective(self, student: PreTrainedModel, teacher: PreTrainedModel) -> nn.Module | None:
        """A module whose ``forward(input_ids, labels, use_cache)`` gives the ``loss`` to train with.

        Args:
            student: after ``prepare_``.
            teacher: the dense model, frozen.

        Returns:
            None for the model's own loss.
        """
        return None

    @property
    def taught(self) -> bool:
        """Whether there is an objective, and so a teacher."""
        return type(self).objective is not ByTraining.objective

    def trained_numel(self, shape: ModelShape) -> int:
        """How many numbers are trained: about all of the model's."""
        return shape.numel
