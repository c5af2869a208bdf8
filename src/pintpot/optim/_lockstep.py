"""Two runs of a model in step: every block is run for both before the next block is needed.

A model's code runs all of its blocks in one call. So a run is made of three: the model is called with blocks that only
note what they are given (``gather``), the blocks are run one after the other by whoever has them (``Passage.advance``),
and the model is called with blocks that give what came out (``finish``), from which it makes the loss.

Shapes: hidden states as the model's own; for language models (batch, tokens, hidden size).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from pintpot.core.errors import CompositionError, UnsupportedModel

Respond = Callable[..., Any]
"""What stands in for the blocks: called with a block's number and its arguments."""


class _Halted(BaseException):
    """The blocks have what they need, and the rest of the model need not run."""


@dataclass
class Passage:
    """One call of a model, between two of its blocks.

    Attributes:
        hidden: what the next block takes.
        arguments: the other arguments of each block, dropped when it has run.
    """

    hidden: Tensor
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]

    def advance(self, block: nn.Module, index: int) -> None:
        """Run one block."""
        args, kwargs = self.arguments[index]
        self.arguments[index] = (), {}
        out = block(self.hidden, *args, **kwargs)
        self.hidden = out if isinstance(out, Tensor) else out[0]


class Lockstep:
    """A model taken apart at its blocks.

    Only the first argument of a block may come from the block before it.

    Args:
        model: what is called.
        blocks: its blocks in the order in which they run.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
        self.model = model
        self.blocks = tuple(blocks)
        self._kind: type | None = None

    @property
    def known(self) -> bool:
        """Whether ``learn`` has seen a block run."""
        return self._kind is not None

    def learn(self, closure: Callable[[], Any], watched: Iterable[nn.Module]) -> set[nn.Module]:
        """Run the model to the end of its first block, to see what a block gives back.

        Args:
            closure: calls the model.
            watched: modules to look out for.

        Returns:
            Those of them that were called before the first block.

        Raises:
            UnsupportedModel: when a block gives back more tensors than hidden states.
        """
        called: set[nn.Module] = set()
        run = self.blocks[0].forward

        def respond(index: int, *args: Any, **kwargs: Any) -> Any:
            out = run(*args, **kwargs)
            if not isinstance(out, Tensor) and any(isinstance(item, Tensor) for item in out[1:]):
                raise UnsupportedModel(
                    f"the blocks of {type(self.model).__name__} hand on more than hidden states",
                    hint="use mezo, which runs the model as a whole",
                )
            self._kind = type(out)
            raise _Halted

        with ExitStack() as stack:
            for module in watched:
                handle = module.register_forward_pre_hook(lambda m, args: called.add(m))
                stack.callback(handle.remove)
            stack.enter_context(self._standing_in(respond, halts=True))
            self._call(closure)
        return called

    def gather(self, closure: Callable[[], Any]) -> list[Passage]:
        """The calls of a model that a closure makes, each before its first block.

        Raises:
            UnsupportedModel: when the model does not run its blocks once each in their order.
        """
        passages: list[Passage] = []

        def respond(index: int, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if index == 0:
                passages.append(Passage(hidden_states, []))
            if not passages or len(passages[-1].arguments) != index:
                raise UnsupportedModel(
                    f"{type(self.model).__name__} does not run its blocks once each, one after the other",
                    hint="use mezo, which runs the model as a whole",
                )
            passages[-1].arguments.append((args, kwargs))
            if index == len(self.blocks) - 1:
                raise _Halted
            return self._given(hidden_states)

        with self._standing_in(respond, halts=True):
            self._call(closure)
        return passages

    def finish(self, measure: Callable[[], float], passages: list[Passage]) -> float:
        """The loss, from what came out of the last block; the passages are used up."""

        def respond(index: int, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            last = index == len(self.blocks) - 1
            return self._given(passages.pop(0).hidden if last else hidden_states)

        with self._standing_in(respond, halts=False):
            return measure()

    def _given(self, hidden: Tensor) -> Any:
        """Hidden states in the form in which a block gives them."""
        return hidden if self._kind is None or issubclass(self._kind, Tensor) else (hidden,)

    def _call(self, closure: Callable[[], Any]) -> None:
        try:
            closure()
        except _Halted:
            raise CompositionError(
                f"the closure calls a part of {type(self.model).__name__}, not the model itself",
                hint="let it return model(input_ids=..., labels=...).loss",
            ) from None

    @contextmanager
    def _standing_in(self, respond: Respond, *, halts: bool) -> Iterator[None]:
        """Replace the blocks; where they halt the model, its output has a loss of zero and nothing else."""
        forward = self.model.forward

        def halting(*args: Any, **kwargs: Any) -> Any:
            try:
                return forward(*args, **kwargs)
            except _Halted:
                return CausalLMOutput(loss=torch.zeros(()))

        with ExitStack() as stack:
            for index, block in enumerate(self.blocks):
                stack.enter_context(_replaced(block, partial(respond, index)))
            if halts:
                stack.enter_context(_replaced(self.model, halting))
            yield


@contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another forward for one module."""
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own
