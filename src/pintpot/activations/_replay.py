"""Recomputing runs of blocks in the backward pass, for any calls the model makes of them.

The forward pass runs as it always does; inside the chosen blocks, `torch.autograd.graph.saved_tensors_hooks` puts
empty places where tensors would be saved. The first place that the backward pass opens makes its `Segment` run its
recorded calls again, which fills the places in the same order. Because the calls themselves are recorded, the
blocks of a segment may get different arguments (masks, rotary tables), return tuples, or be skipped.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.checkpoint import get_device_states, set_device_states
from transformers import Cache

from pintpot.core.errors import CompositionError, TrainingError
from pintpot.core.heap import give_back


class _Place:
    """Where autograd saved a tensor: its description, and after recomputation the tensor."""

    __slots__ = ("__weakref__", "description", "segment", "tensor")

    def __init__(self, segment: Segment, tensor: Tensor) -> None:
        self.segment = segment
        self.description = (tensor.shape, tensor.dtype)
        self.tensor: Tensor | None = None


@dataclass(frozen=True)
class _Link:
    """An argument that an earlier call of the segment returned: leaf ``leaf`` of the result of call ``call``."""

    call: int
    leaf: int


@dataclass(frozen=True)
class _Call:
    """One call of a block, and all that is needed to make it again."""

    forward: Callable[..., Any]
    leaves: list[Any]
    spec: Any
    cpu_state: Tensor
    devices: list[int]
    device_states: list[Tensor]
    autocast: tuple[tuple[str, bool, torch.dtype], ...]


class _Enough(Exception):
    """Every place that is needed has been filled."""


class Segment:
    """One pass through a run of consecutive blocks, to be recomputed as a whole.

    It holds the tensors that came from outside (the hidden state at its start, masks) and random states, and no
    tensor made inside, until the backward pass needs them; then all of them, each until its use.
    """

    def __init__(self) -> None:
        self._calls: list[_Call] = []
        self._results: list[list[Any]] = []
        self._places: list[weakref.ref[_Place]] = []

    def run(self, forward: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Call a block and remember the call."""
        leaves, spec = tree_flatten((tuple(args), kwargs))
        made = {id(ref()): link for link, ref in self._made() if ref() is not None}
        linked = [made.get(id(leaf), leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        devices, states = get_device_states(*leaves)
        self._calls.append(_Call(forward, linked, spec, torch.get_rng_state(), devices, states, _autocast(leaves)))
        with saved_tensors_hooks(self._pack, self._unpack):
            result = forward(*args, **kwargs)
        self._results.append([weakref.ref(t) if isinstance(t, Tensor) else None for t in tree_leaves(result)])
        return result

    def _made(self) -> Iterator[tuple[_Link, weakref.ref[Tensor]]]:
        for call, result in enumerate(self._results):
            for leaf, ref in enumerate(result):
                if ref is not None:
                    yield _Link(call, leaf), ref

    def _pack(self, tensor: Tensor) -> _Place:
        place = _Place(self, tensor)
        self._places.append(weakref.ref(place))
        return place

    @staticmethod
    def _unpack(place: _Place) -> Tensor:
        if place.tensor is None:
            place.segment._recompute()
        if place.tensor is None:
            raise TrainingError(
                "a block saved fewer tensors for the backward pass when it ran again",
                hint="the block must do the same work each time; take it out of checkpointing",
            )
        return place.tensor

    def _recompute(self) -> None:
        give_back()
        filled = 0

        def fill(tensor: Tensor) -> None:
            nonlocal filled
            if filled == len(self._places):
                raise _Enough
            place = self._places[filled]()
            if place is not None:
                if place.description != (tensor.shape, tensor.dtype):
                    raise TrainingError(
                        f"a block saved {tuple(place.description[0])} {place.description[1]} for the backward pass, "
                        f"and {tuple(tensor.shape)} {tensor.dtype} when it ran again",
                        hint="the block must do the same work each time; take it out of checkpointing",
                    )
                place.tensor = tensor.detach()
            filled += 1
            if filled == len(self._places):
                raise _Enough

        try:
            with torch.enable_grad(), saved_tensors_hooks(fill, _closed):
                self._replay()
        except _Enough:
            give_back()

    def _replay(self) -> None:
        results: list[list[Any]] = []
        inputs: dict[int, Tensor] = {}
        devices = sorted({device for call in self._calls for device in call.devices})
        kinds = {t.device.type for call in self._calls for t in call.leaves if isinstance(t, Tensor)}
        device = next(iter(kinds - {"cpu", "meta"}), "cuda")
        with torch.random.fork_rng(devices=devices, device_type=device):
            for call in self._calls:
                torch.set_rng_state(call.cpu_state)
                set_device_states(call.devices, call.device_states, device_type=device)
                leaves = [_again(leaf, results, inputs) for leaf in call.leaves]
                args, kwargs = tree_unflatten(leaves, call.spec)
                with ExitStack() as stack:
                    for kind, enabled, dtype in call.autocast:
                        stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
                    results.append(tree_leaves(call.forward(*args, **kwargs)))


def _closed(_: object) -> Tensor:
    raise TrainingError("a block ran a backward pass of its own while being recomputed", hint="take it out")


def _again(leaf: Any, results: list[list[Any]], inputs: dict[int, Tensor]) -> Any:
    """An argument of a repeated call: a repeated result, or the outside tensor cut from its graph."""
    if isinstance(leaf, _Link):
        return results[leaf.call][leaf.leaf]
    if not isinstance(leaf, Tensor) or not leaf.requires_grad:
        return leaf
    if id(leaf) not in inputs:
        inputs[id(leaf)] = leaf.detach().requires_grad_()
    return inputs[id(leaf)]


def _autocast(leaves: Sequence[Any]) -> tuple[tuple[str, bool, torch.dtype], ...]:
    kinds = {"cpu", *(leaf.device.type for leaf in leaves if isinstance(leaf, Tensor) and not leaf.is_meta)}
    return tuple((kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in sorted(kinds))


def without_cache(leaf: Any) -> Any:
    """None in the place of an empty key-value cache: a recomputed block would fill it twice.

    Raises:
        CompositionError: when the cache holds something, so that leaving it out would change the result.
    """
    if not isinstance(leaf, Cache):
        return leaf
    if leaf.get_seq_length() > 0:
        raise CompositionError(
            "blocks that are recomputed cannot continue a key-value cache",
            hint="train with use_cache=False and no past_key_values",
        )
    return None


@contextmanager
def recomputed(blocks: Sequence[nn.Module], segments: Sequence[Sequence[int]]) -> Iterator[None]:
    """A context in which the blocks of each segment are recomputed together, and no block fills a cache.

    Args:
        blocks: all blocks of the model, in order.
        segments: indices into ``blocks``, each at most once.
    """
    of = {index: number for number, segment in enumerate(segments) for index in segment}
    current: tuple[int, int, Segment] = (-1, -1, Segment())

    def wrap(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal current
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            args = tuple(without_cache(value) for value in args)
            kwargs = {name: without_cache(value) for name, value in kwargs.items()}
            if index not in of:
                return forward(*args, **kwargs)
            number, last, segment = current
            if number != of[index] or index <= last:
                segment = Segment()
            current = (of[index], index, segment)
            give_back()
            return segment.run(forward, args, kwargs)

        return run

    own = [block.__dict__.get("forward") for block in blocks]
    try:
        for index, block in enumerate(blocks):
            block.__dict__["forward"] = wrap(index, block.forward)
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            if forward is None:
                block.__dict__.pop("forward", None)
            else:
                block.__dict__["forward"] = forward
