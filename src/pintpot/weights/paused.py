"""A model's own forward pass, paused at each call of a block until somebody gives the block's result.

Whatever a model does between its blocks (masks, rotary tables, position biases that blocks hand on, an encoder before a
decoder) it does itself; only the blocks are run elsewhere, one at a time, so that no more than one must be in memory.
Each batch of texts has a thread of its own, and only one of all threads runs at any time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from queue import SimpleQueue
from threading import Thread, local
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pintpot.core.errors import UnsupportedModel
from pintpot.core.shape import block_names
from pintpot.weights.statistics import BlockCall


class _Here(local):
    """The forward pass that the current thread runs."""

    forward: _Forward | None = None


_HERE = _Here()


class _Stopped(BaseException):
    """Nobody wants the rest of the forward pass."""


class _Forward:
    """One batch's forward pass, in a thread of its own."""

    def __init__(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> None:
        self._events: SimpleQueue[tuple[str, BlockCall] | BaseException | None] = SimpleQueue()
        self._answers: SimpleQueue[Any] = SimpleQueue()
        self.at: tuple[str, BlockCall] | None = None
        self._thread = Thread(target=self._run, args=(model, inputs), daemon=True)
        self._thread.start()
        self._wait()

    def _run(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> None:
        _HERE.forward = self
        try:
            with torch.no_grad():
                model(**inputs)
        except _Stopped:
            return
        except BaseException as error:  # noqa: BLE001  (raised again in the thread that waits)
            self._events.put(error)
        else:
            self._events.put(None)

    def meet(self, name: str, call: BlockCall) -> Any:
        """Called by a block in this pass: stand still until there is a result."""
        self._events.put((name, call))
        answer = self._answers.get()
        if isinstance(answer, _Stopped):
            raise answer
        return answer

    def answer(self, result: Any) -> None:
        """Go on with the result of the block, up to the next one."""
        self._answers.put(result)
        self._wait()

    def _wait(self) -> None:
        event = self._events.get()
        if isinstance(event, BaseException):
            raise event
        self.at = event

    def stop(self) -> None:
        """Leave the pass where it stands."""
        if self._thread.is_alive():
            self._answers.put(_Stopped())
            self._thread.join()
        self.at = None


class PausedPass:
    """The forward passes of all texts, which stand at the same block. A context manager.

    Iterating gives the blocks' names in the order in which the model calls them, each once; ``calls`` are then the
    calls that wait, and ``advance`` must be called before the next.

    Args:
        model: in evaluation mode while the context is open; its blocks need no values until they are reached.
        texts: batches of token ids, or of inputs by name.

    Raises:
        UnsupportedModel: when there are blocks that the model does not call, or texts that take different ways.
    """

    def __init__(self, model: PreTrainedModel, texts: Sequence[Tensor | Mapping[str, Tensor]]) -> None:
        self.model = model
        self.names = block_names(model)
        self._inputs = [inputs_of(model, text) for text in texts]
        self._forwards: list[_Forward] = []
        self._seen: set[str] = set()
        self._stack = ExitStack()

    def __enter__(self) -> PausedPass:
        self._stack.enter_context(evaluating(self.model))
        self._stack.enter_context(_pausing(self.model, self.names))
        self._stack.callback(self._stop)
        try:
            for inputs in self._inputs:
                self._forwards.append(_Forward(self.model, inputs))
        except BaseException:
            self._stack.close()
            raise
        return self

    def _stop(self) -> None:
        for forward in self._forwards:
            forward.stop()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def calls(self) -> list[BlockCall]:
        """The waiting calls, one for each text."""
        return [forward.at[1] for forward in self._forwards if forward.at is not None]

    def __iter__(self) -> Iterator[str]:
        while (name := self._place()) is not None:
            if name in self._seen:
                self.advance()
                continue
            yield name
        missed = [name for name in self.names if name not in self._seen]
        if missed:
            raise UnsupportedModel(
                f"the model never calls {missed[0]} on these texts (and {len(missed) - 1} more blocks)",
                hint="give texts that every part of the model reads",
            )

    def _place(self) -> str | None:
        places = {None if forward.at is None else forward.at[0] for forward in self._forwards}
        if len(places) > 1:
            raise UnsupportedModel(
                f"the texts are in different blocks at the same time: {sorted(map(str, places))}",
                hint="compress this model with a method that needs no texts",
            )
        return places.pop() if places else None

    def advance(self) -> None:
        """Run the block that all stand at as it is now, and go on to the next; stop after the last."""
        name = self._place()
        if name is None:
            return
        self._seen.add(name)
        block = self.model.get_submodule(name)
        last = self._seen.issuperset(self.names)
        for forward in self._forwards:
            if forward.at is not None and not last:
                call = forward.at[1]
                # The call's own inputs go when the pass has moved on.
                forward.answer(block(*call.args, **call.kwargs))
            else:
                forward.stop()


def inputs_of(model: PreTrainedModel, text: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's inputs for a batch, without a cache; a text goes to both an encoder and a decoder."""
    accepted = inspect.signature(model.forward).parameters
    plain: dict[str, Any] = {"use_cache": False} if "use_cache" in accepted else {}
    if not isinstance(text, Tensor):
        return {**text, **plain}
    more = {"decoder_input_ids": text} if model.config.is_encoder_decoder else {}
    return {"input_ids": text, **more, **plain}


def hidden_of(output: Any) -> Tensor:
    """The hidden states in what a block returned."""
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    return found


@contextmanager
def _pausing(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    blocks = [model.get_submodule(name) for name in names]

    def wrap(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            here = _HERE.forward
            return forward(*args, **kwargs) if here is None else here.meet(name, BlockCall(args, kwargs))

        return run

    own = [block.__dict__.get("forward") for block in blocks]
    try:
        for name, block in zip(names, blocks, strict=True):
            block.__dict__["forward"] = wrap(name, block.forward)
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            if forward is None:
                block.__dict__.pop("forward", None)
            else:
                block.__dict__["forward"] = forward


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode."""
    training = model.training
    try:
        model.eval()
        yield
    finally:
        model.train(training)
