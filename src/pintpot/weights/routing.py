"""Which of the tasks of a merged model are added to what they share: a choice of the moment, which costs nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import nn

from pintpot.core.errors import CompositionError
from pintpot.weights._base import Layout
from pintpot.weights.formats import Format, Routed
from pintpot.weights.modules import PackedTerms

Route = str | Mapping[str, float] | None
"""A task, or the weights of several, or none."""


def tasks_of(model: nn.Module) -> tuple[str, ...]:
    """The tasks that a merged model can be switched to; none of any other model."""
    return tasks_in(module.formats for module in model.modules() if isinstance(module, PackedTerms))


def tasks_in(terms: Iterable[tuple[Format, ...]]) -> tuple[str, ...]:
    """The tasks in the formats of weights, as they are met."""
    routed = [layout for formats in terms for layout in formats if isinstance(layout, Routed)]
    return tuple(dict.fromkeys(task for layout in routed for task in layout.tasks))


def route_(model: nn.Module, route: Route) -> None:
    """Switch a merged model to a task, or to a weighted sum of tasks; nothing is copied, and nothing stored changes.

    The choice is not saved with the model.

    Args:
        model: loaded from a folder that ``pintpot merge`` wrote; adapters may be attached.
        route: a task; or weights by task, the others having none; or None for what all tasks share.

    Raises:
        CompositionError: when the model is not merged, or has no such task.
    """
    weights = _weights(route, tasks_of(model))
    for module in model.modules():
        if isinstance(module, PackedTerms):
            module.formats = _routed(module.formats, weights)


def routed_layout(layout: Layout, route: Route) -> Layout:
    """The formats of a merged model that is switched to a task; see ``route_``."""
    weights = _weights(route, tasks_in(layout.values()))
    return {name: _routed(formats, weights) for name, formats in layout.items()}


def _routed(formats: tuple[Format, ...], weights: Mapping[str, float]) -> tuple[Format, ...]:
    return tuple(
        replace(layout, weights=tuple(weights.get(task, 0.0) for task in layout.tasks) if weights else ())
        if isinstance(layout, Routed)
        else layout
        for layout in formats
    )


def _weights(route: Route, tasks: tuple[str, ...]) -> dict[str, float]:
    if not tasks:
        raise CompositionError("the model has no tasks to choose from", hint="merge models first: pintpot merge")
    weights = {} if route is None else {route: 1.0} if isinstance(route, str) else dict(route)
    unknown = sorted(weights.keys() - set(tasks))
    if unknown:
        raise CompositionError(f"the model has no task called {', '.join(unknown)}", hint=f"it has: {', '.join(tasks)}")
    return {task: float(weight) for task, weight in weights.items()}
