"""Training without gradients block by block, for models of which two blocks are on the device at a time.

Every block is run for both sides of a direction while it is there, and makes its update when it comes next.

Shapes: parameters of any shape; hidden states as the model's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pintpot.core.errors import CompositionError, TrainingError
from pintpot.optim._lockstep import Lockstep
from pintpot.optim._stream import BlockStore, DiskStore, HostStore, Layout, ShapeStore, Stream, block_layouts, is_away
from pintpot.optim._tensors import has_values
from pintpot.optim._zeroth import Closure, Measure, Move, Slope, ZerothOrderOptimizer, move_, way


@dataclass
class _Part:
    """Parameters that are moved together.

    Attributes:
        members: group, number and parameter.
        place: how far they are from home along the direction of this step.
        due: moves that are still to be made, each by group.
    """

    members: list[tuple[int, int, Tensor]] = field(default_factory=list)
    place: float = 0.0
    due: list[list[Move]] = field(default_factory=list)

    def go_(self, direction: int, distance: float) -> None:
        """From wherever they are to a distance along a direction from home."""
        for _, number, p in self.members:
            move_(p.detach(), number, (1.0, {direction: distance - self.place}))
        self.place = distance

    def settle_(self) -> None:
        """Make the moves that are due."""
        for moves in self.due:
            for group, number, p in self.members:
                move_(p.detach(), number, moves[group])
        self.due = []


class BlockwiseOptimizer(ZerothOrderOptimizer):
    """Descends along random directions, with the model's blocks in a slower tier; base of ZO2.

    Between steps the weights are in the store, not in the model. A forward pass without gradients brings them, block
    by block; ``bring_back`` puts them all into the model again.

    Args:
        params: the model. Its blocks leave memory at once.
        lr: learning rate.
        folder: where the blocks' files are kept, for a model on the CPU. Without one the blocks stay in memory.
        device: the GPU to train a model on whose blocks stay in host memory; the model's own when absent.
        store: where the blocks are already, for a model that was loaded so.
        **settings: those of ``ZerothOrderOptimizer`` and the fields of ``method``.

    Raises:
        UnsupportedModel: when the model is not one row of blocks with parameters of their own.
        CompositionError: for anything but a model, and for a folder beside a GPU.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float = 1e-6,
        *,
        folder: str | Path | None = None,
        device: str | torch.device | None = None,
        store: BlockStore | None = None,
        **settings: Any,
    ) -> None:
        if not isinstance(params, nn.Module):
            name = type(self).__name__
            raise CompositionError(f"{name} needs the model, not its parameters", hint=f"{name}(model, ...)")
        layouts = block_layouts(params)
        if store is None and any(is_away(p) for p in params.parameters()):
            raise CompositionError("the blocks of this model are elsewhere", hint="call bring_back() on its optimizer")
        super().__init__(params, lr, **settings)
        names = [layout.block for layout in layouts]
        self._lockstep = Lockstep(params, [params.get_submodule(name) for name in names])
        self._sort()
        self._direction = 0
        self._closure: Closure | None = None
        at = torch.device(device) if device is not None else next(params.parameters()).device
        self.store = store or _store_of(layouts, params, at, folder)
        self._stream: Stream | None = None
        self._handles: list[Any] = []
        if self.store is not None:
            self._stream = Stream(params, self.store, at, keep=store is None)
            self._handles = [params.register_forward_pre_hook(self._before_model)]
            for index, block in enumerate(self._lockstep.blocks):
                self._handles.append(block.register_forward_pre_hook(self._bring(index)))

    def step(self, closure: Closure | None = None) -> float | Tensor:  # type: ignore[override]
        """One update. See ``ZerothOrderOptimizer.step``.

        Args:
            closure: calls the model, once or several times, and makes its loss from the ``loss`` of the outputs.
        """
        self._closure = closure
        try:
            return super().step(closure)
        finally:
            self._closure = None

    @torch.no_grad()
    def settle(self) -> None:
        """Make all moves that are due, so that the store holds the weights of this step."""
        for index, part in enumerate(self._blocks):
            if part.due:
                with self._working(index):
                    pass
        if self._stream is not None:
            self._stream.finish()

    @torch.no_grad()
    def bring_back(self) -> None:
        """Put all weights into the model again, and train it there from now on."""
        self.settle()
        if self._stream is not None:
            self._stream.part()
            for handle in self._handles:
                handle.remove()
        self.store = self._stream = None

    def state_dict(self) -> dict[str, Any]:
        """As any optimizer's; the weights, too, are then those of this step."""
        self.settle()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state exactly; the weights are those that model and store hold now."""
        super().load_state_dict(state_dict)
        for part in self._parts():
            part.due, part.place = [], 0.0
        if self._stream is not None:
            self._stream.forget()

    def _slope(self, direction: int, distance: float, measure: Measure) -> float:
        closure, run = self._closure, self._lockstep
        if closure is None:
            raise TrainingError("there is nothing to run", hint="call step(closure)")
        self._direction = direction
        if self._stream is not None:
            self._stream.ahead(0)
        if not run.known:
            self._learn(closure)
        self._go(("early", "both"), distance)
        above = run.gather(closure)
        self._go(("early", "both"), -distance)
        below = run.gather(closure)
        for index, block in enumerate(run.blocks):
            with self._working(index) as part:
                for passages, side in ((above, distance), (below, -distance)):
                    part.go_(direction, side)
                    for passage in passages:
                        passage.advance(block, index)
        self._go(("late", "both"), distance)
        first = run.finish(measure, above)
        self._go(("late", "both"), -distance)
        return (first - run.finish(measure, below)) / (2 * distance)

    def _return_(self, slopes: Sequence[Slope] | None = None) -> None:
        """Note the way home and the update; parameters that are at hand make it now."""
        for part in self._parts():
            shifts = [(self._direction, -part.place)] if part.place else []
            if shifts or slopes is not None:
                part.due.append([way(group, shifts, slopes) for group in self.param_groups])
            part.place = 0.0
        for part in self._rest.values():
            part.settle_()
        if self._stream is None:
            self.settle()

    def _go(self, rest: Iterable[str], distance: float) -> None:
        for name in rest:
            self._rest[name].go_(self._direction, distance)

    @contextmanager
    def _working(self, index: int) -> Iterator[_Part]:
        """One block at hand, where its last update has been made; on an error it is as it was in the store."""
        part = self._blocks[index]
        if self._stream is None:
            part.settle_()
            yield part
            return
        before = part.due, part.place
        try:
            with self._stream.changing(index):
                part.settle_()
                yield part
        except BaseException:
            part.due, part.place = before
            raise

    def _parts(self) -> list[_Part]:
        return [*self._rest.values(), *self._blocks]

    def _sort(self) -> None:
        """Sort what is trained into blocks and the rest, of which nothing is known until the model runs."""
        block_of = {id(p): i for i, block in enumerate(self._lockstep.blocks) for p in block.parameters()}
        self._blocks = [_Part() for _ in self._lockstep.blocks]
        self._rest = {name: _Part() for name in ("early", "late", "both")}
        members = [(i, p) for i, group in enumerate(self.param_groups) for p in group["params"]]
        for number, (group, p) in enumerate(members):
            if p.requires_grad:
                part = self._blocks[block_of[id(p)]] if id(p) in block_of else self._rest["both"]
                part.members.append((group, number, p))

    def _learn(self, closure: Closure) -> None:
        """Find out which of the rest is used before the blocks, which after them, and which at both times."""
        if self._stream is not None:
            self._stream.fetch(0)
        rest, self._rest["both"].members = self._rest["both"].members, []
        users: dict[int, list[nn.Module]] = {id(p): [] for _, _, p in rest}
        for module in self._lockstep.model.modules():
            for p in module.parameters(recurse=False):
                if id(p) in users:
                    users[id(p)].append(module)
        early = self._lockstep.learn(closure, {module for found in users.values() for module in found})
        # An embedding may be used as the head, too, by the same module.
        head = getattr(self._lockstep.model, "get_output_embeddings", lambda: None)()
        for member in rest:
            found = users[id(member[2])]
            times = {"late" for m in found if m not in early or m is head} | {"early" for m in found if m in early}
            self._rest["both" if len(times) > 1 else times.pop()].members.append(member)

    def _check_layout(self, p: Tensor) -> None:
        if not is_away(p):
            super()._check_layout(p)

    def _before_model(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        if self._closure is None and self._stream is not None:
            self.settle()
            self._stream.ahead(0)

    def _bring(self, index: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def bring(block: nn.Module, args: tuple[Any, ...]) -> None:
            if self._closure is not None or self._stream is None:
                return
            if torch.is_grad_enabled() and self._blocks[index].members:
                raise CompositionError(
                    "there are no gradients for blocks that leave memory again",
                    hint="call the model under torch.no_grad()",
                )
            self._stream.fetch(index)

        return bring


def _store_of(
    layouts: Sequence[Layout], model: nn.Module, at: torch.device, folder: str | Path | None
) -> BlockStore | None:
    """Where the blocks of a model go; ``None`` leaves them where they are."""
    if not all(has_values(p) for p in model.parameters()):
        return ShapeStore(layouts)
    if at.type == "cuda" and folder is None:
        return HostStore(at, layouts)
    if at.type != "cpu":
        raise CompositionError(f"blocks on disk are for a CPU, not for {at}", hint="leave out the folder")
    return None if folder is None else DiskStore(Path(folder), layouts)
