"""What the layers of a block are given while a model reads text, in as few numbers as the methods need.

Shapes: I in-features, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from pintpot.core.errors import DataError


@dataclass(frozen=True)
class BlockCall:
    """How a model calls a block: run it with ``block(*args, **kwargs)``."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def samples(self) -> Iterator[BlockCall]:
        """The same for one sequence at a time; tensors of the hidden states' first dimension (no vectors) are cut."""
        count = next(t.shape[0] for t in tree_leaves((self.args, self.kwargs)) if isinstance(t, Tensor) and t.dim() > 1)

        def cut(value: Any, index: int) -> Any:
            own = isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == count
            return value[index : index + 1] if own else value

        for index in range(count):
            args, kwargs = tree_map(partial(cut, index=index), (self.args, self.kwargs))
            yield BlockCall(args, kwargs)


@dataclass
class InputStatistics:
    """The inputs x (I,) of one matrix over all calibration tokens, in float32.

    Attributes:
        hessian: mean of ``x x^T`` (I, I): half the second derivative of the layer's squared output error.
        mean: of x (I,).
        magnitude: mean of ``|x|`` (I,).
        largest: of ``|x|`` (I,).
        tokens: N.
    """

    hessian: Tensor
    mean: Tensor
    magnitude: Tensor
    largest: Tensor
    tokens: int = 0

    @classmethod
    def empty(cls, in_features: int, device: torch.device) -> InputStatistics:
        """Of no tokens."""
        mean, magnitude, largest = torch.zeros((3, in_features), device=device).unbind()
        return cls(torch.zeros((in_features, in_features), device=device), mean, magnitude, largest)

    def add_(self, inputs: Tensor) -> None:
        """Take in more inputs (..., I)."""
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        if not rows.shape[0]:
            return
        before, self.tokens = self.tokens, self.tokens + rows.shape[0]
        keep, new = before / self.tokens, 1 / self.tokens
        self.hessian.mul_(keep).addmm_(rows.t(), rows, alpha=new)
        self.mean.mul_(keep).add_(rows.sum(0), alpha=new)
        self.magnitude.mul_(keep).add_(rows.abs().sum(0), alpha=new)
        torch.maximum(self.largest, rows.abs().amax(0), out=self.largest)

    def error(self, difference: Tensor) -> Tensor:
        """Mean squared error of each output, (O,), that a difference of weights (O, I) makes."""
        rows = difference.float()
        return ((rows @ self.hessian) * rows).sum(-1)


Seen = dict[str, list[InputStatistics | None]]
"""By parameter: the statistics of each of its matrices; None for experts that met no token."""


@dataclass
class InputWatch:
    """Gathers the statistics of the layers of one block; layers with the same input share them."""

    _shared: dict[str, InputStatistics] = field(default_factory=dict)
    _leader: dict[str, str] = field(default_factory=dict)
    _last: tuple[str, Tensor] | None = None

    def take(self, name: str, inputs: Tensor) -> None:
        """The inputs of a layer, as the block passes them on."""
        if name not in self._leader:
            same = self._last is not None and self._last[1] is inputs
            self._leader[name] = self._last[0] if same and self._last is not None else name
        leader = self._leader[name]
        if leader == name:
            if name not in self._shared:
                self._shared[name] = InputStatistics.empty(inputs.shape[-1], inputs.device)
            self._shared[name].add_(inputs)
            self._last = (name, inputs)

    def of(self, name: str) -> InputStatistics | None:
        """What was gathered for a layer; None when it was never called.

        Raises:
            DataError: when an input held NaN or Inf.
        """
        found = self._shared.get(self._leader.get(name, name))
        if found is not None and not torch.isfinite(found.largest).all():
            raise DataError(
                f"the inputs of {name} hold NaN or Inf",
                hint="the model overflows on this text: compress it in float32, or give other text",
            )
        return found

    def forget(self) -> None:
        """Let go of the last input (the block's pass is over)."""
        self._last = None


@contextmanager
def watching(
    block: nn.Module, layers: Mapping[str, Callable[[InputWatch], Callable[..., None]]]
) -> Iterator[InputWatch]:
    """A context in which a block's layers report their inputs.

    Args:
        block: the block.
        layers: by the layer's name in the block, what makes its forward pre-hook for a watch.
    """
    watch = InputWatch()
    handles = [block.get_submodule(name).register_forward_pre_hook(make(watch)) for name, make in layers.items()]
    try:
        yield watch
    finally:
        watch.forget()
        for handle in handles:
            handle.remove()
