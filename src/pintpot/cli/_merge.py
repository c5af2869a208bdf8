"""How ``pintpot merge`` reads the models that it is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pintpot.core.errors import CompositionError
from pintpot.weights.merging import Tuned


def read_models(models: Sequence[str], modules: Sequence[str]) -> list[Tuned]:
    """The fine-tuned models with their tasks and where these have terms of their own.

    Args:
        models: ``task=folder``, or a folder that gives its name to the task.
        modules: ``task=where``, or ``where`` for all tasks that are not named.

    Raises:
        CompositionError: when modules are given for a task that is not there.
    """
    found = [_model(text) for text in models]
    chosen = {task: where for task, _, where in (_named(text) for text in modules)}
    unknown = sorted(chosen.keys() - {"", *(model.task for model in found)})
    if unknown:
        raise CompositionError(
            f"there is no task called {', '.join(unknown)}",
            hint=f"there are: {', '.join(model.task for model in found)}",
        )
    return [replace(model, modules=chosen.get(model.task, chosen.get("", ""))) for model in found]


def _model(text: str) -> Tuned:
    task, named, folder = _named(text)
    return Tuned(task if named else Path(folder).name, Path(folder))


def _named(text: str) -> tuple[str, str, str]:
    """The name, the equals sign and the value; both first empty where there is no name."""
    name, equals, value = text.partition("=")
    return (name, equals, value) if equals and "/" not in name else ("", "", text)
