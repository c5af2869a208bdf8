"""Techniques that change how linear layers compute while a job runs, and leave the model as it was."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from transformers import PreTrainedModel

from pintpot.core.technique import Technique


@dataclass(frozen=True, kw_only=True)
class Arithmetic(Technique):
    """A technique that is in force inside a scope around forward and backward passes."""

    @abstractmethod
    def scope_of(self, model: PreTrainedModel) -> Callable[[], AbstractContextManager[None]]:
        """What makes the scope for a model, as often as it is wanted; outside of it nothing is changed.

        Raises:
            UnsupportedModel: naming every layer that it cannot be applied to.
        """
