"""Training without gradients: the protocol of its methods, and the engine that moves along random directions.

A direction is an integer, the seed of a standard normal for every parameter. It is drawn anew whenever it is needed,
a piece of at most ``CHUNK_NUMEL`` elements at a time, so that no tensor of the model's size is ever made.

Shapes: parameters of any shape, seen flat in the order of their memory.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from pintpot.core.errors import CompositionError, ShapeError, TrainingError
from pintpot.core.ledger import Account, Ledger, Moment
from pintpot.core.shape import ModelShape
from pintpot.core.work import Work
from pintpot.core.workload import Train, Workload
from pintpot.optim._base import OptimMethod
from pintpot.optim._tensors import CHUNK_NUMEL, has_values, mix_seed, strips

Closure = Callable[[], float | Tensor]
"""Runs the model and returns the loss, without a backward pass."""

Measure = Callable[[], float]
"""The loss where the parameters are now."""

Slope = tuple[int, float]
"""A direction and how fast the loss rises along it: their products summed are the estimate of the gradient."""

Move = tuple[float, dict[int, float]]
"""What is kept of a parameter (1 but for decay), and how far it goes along each direction."""

NOISE_FLOPS = 350
"""What drawing one normal number takes, in operations of a matrix product that take as long on a processor core (3.4 ns
and 103 GFLOP/s, measured)."""


@dataclass(frozen=True, kw_only=True)
class GradientFreeMethod(OptimMethod):
    """A method that needs losses only."""

    usual_learning_rate: ClassVar[float] = 1e-6

    kind: ClassVar[type[ZerothOrderOptimizer]]

    @property
    @abstractmethod
    def forward_passes(self) -> int:
        """Forward passes of one step."""

    @property
    @abstractmethod
    def draws(self) -> int:
        """Normal numbers drawn for each parameter in one step."""

    def optimizer(
        self, model: nn.Module, *, lr: float, weight_decay: float = 0.0, **extras: Any
    ) -> ZerothOrderOptimizer:
        """The torch optimizer of this method with these hyperparameters."""
        return self.kind(model, lr=lr, weight_decay=weight_decay, **extras, **asdict(self))

    def predict(self, ledger: Ledger, shape: ModelShape, workload: Workload) -> Ledger:
        """No gradients, no optimizer state, no backward pass; of the activations what one forward pass holds."""
        if not isinstance(workload, Train):
            return ledger
        forward = _forward_bytes(shape, workload, ledger.phase("forward").of(Account.ACTIVATIONS))
        sizes = {
            Account.GRADIENTS: dict.fromkeys(("forward", "backward", "step"), 0),
            Account.OPTIMIZER: dict.fromkeys(("forward", "backward", "step"), self.state_bytes(shape)),
            Account.ACTIVATIONS: {"forward": forward, "backward": 0, "step": 0},
            Account.WORKSPACE: {"backward": 0, "step": self.workspace_bytes(shape)},
        }

        def change(moment: Moment) -> Moment:
            for account, by_phase in sizes.items():
                if moment.phase in by_phase:
                    moment = moment.with_bytes(account, by_phase[moment.phase])
            return moment

        return ledger.edit(change)

    def state_bytes(self, shape: ModelShape) -> int:
        """Bytes kept between steps: none, but for a few integers."""
        return 0

    def workspace_bytes(self, shape: ModelShape) -> int:
        """Temporaries of one move: a piece of the direction, its product, and a wide copy of a narrow piece."""
        largest = max((p.numel for p in shape.parameters), default=0)
        return 3 * max(4, shape.dtype.itemsize) * min(CHUNK_NUMEL, largest)

    def work(self, work: Work, shape: ModelShape, workload: Workload) -> Work:
        """Forward passes instead of one forward and one backward pass (which costs two), and the moves between them."""
        if not workload.training or "step" not in work.phases:
            return work
        name = str(shape.dtype).removeprefix("torch.")
        step = work.phases["step"]
        saved = step.flops.get(name, 0.0) * (1 - self.forward_passes / 3)
        # A move reads and writes the weights; AdamW's update reads or writes seven numbers a parameter.
        moved = (2 * (self.forward_passes + 1) - 7) * shape.weight_bytes
        work = work.plus("step", flops=-saved, dtype=name, read_bytes=moved)
        return work.plus("step", flops=float(NOISE_FLOPS * self.draws * shape.numel))

    def check(self) -> None:
        """Refuse counts below 1 and sizes that are not positive."""
        for field in fields(self):
            value = getattr(self, field.name)
            if value < 0 or (field.name != "seed" and not value > 0):
                raise ShapeError(f"{field.name} must be positive, not {value}", hint=f"default: {field.default}")


class ZerothOrderOptimizer(torch.optim.Optimizer):
    """Descends along random directions by the losses that a closure reports; base of MeZO and its relatives.

    ``step(closure)`` calls the closure several times with other parameters; afterwards they are the old ones plus the
    update. Half-precision parameters are moved in float32 and rounded at each move, so they return only to within a few
    units in the last place; float32 is advised, and what comes back is then far nearer than the update is large.

    Args:
        params: a model, or parameters or parameter groups as for any torch optimizer. A model is put into evaluation
            mode while losses are taken (dropout would drown their differences), and its vectors (biases, norms)
            are not decayed; with parameters alone, both are left to the caller.
        lr: learning rate.
        weight_decay: decoupled from the gradient; here that is the same as coupled.
        nonfinite: when a loss is NaN or Inf, ``"raise"`` or ``"skip"`` the update.
        **hyperparameters: those of the method (the fields of ``method``), for all groups.

    Raises:
        CompositionError: for an unknown hyperparameter.
        ShapeError: for a value that makes no sense, or a parameter whose elements overlap.
        TrainingError: in ``step``, for a loss that is not finite, and without a closure.
    """

    gradient_free = True
    method: ClassVar[type[GradientFreeMethod]]

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float = 1e-6,
        *,
        weight_decay: float = 0.0,
        nonfinite: Literal["raise", "skip"] = "raise",
        **hyperparameters: float,
    ) -> None:
        self.rule = self.method.build(hyperparameters)
        self.rule.check()  # type: ignore[attr-defined]
        self.nonfinite = nonfinite
        self.model = params if isinstance(params, nn.Module) else None
        self.steps = 0
        self._place: Slope | None = None
        groups = _decayed_and_not(params) if isinstance(params, nn.Module) else params
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, now or later."""
        known = {"params", "param_names", "initial_lr", "lr", "weight_decay"}
        if unknown := sorted(set(param_group) - known):
            raise CompositionError(
                f"{type(self).__name__} has no setting {', '.join(unknown)} in a group",
                hint="a parameter group takes: lr, weight_decay",
            )
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            self._check_layout(p)

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> float | Tensor:  # type: ignore[override]
        """One update; the mean of the losses that were taken.

        Args:
            closure: gives the loss of the batch, the same one each time. If it raises, the parameters are put back.

        Raises:
            TrainingError: when a loss is not finite (unless ``nonfinite`` is ``"skip"``), or without a closure.
        """
        if closure is None:
            raise TrainingError(f"{type(self).__name__} needs losses", hint="call step(closure)")
        losses: list[float] = []
        unseen: list[Tensor] = []

        def measure() -> float:
            loss = closure()
            # The loss of fake tensors has no value: any stands for it.
            if isinstance(loss, Tensor) and not has_values(loss):
                unseen[:] = [loss]
                return 0.0
            losses.append(float(loss))
            return losses[-1]

        try:
            with evaluating(self.model):
                slopes = self._estimate(measure)
        except BaseException:
            self._return_()
            raise
        self._finish_(slopes)
        return unseen[0] if unseen else math.fsum(losses) / max(1, len(losses))

    def state_dict(self) -> dict[str, Any]:
        """The state of a torch optimizer, and the number of steps, from which all directions follow."""
        return {**super().state_dict(), "steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state exactly."""
        super().load_state_dict(state_dict)
        self.steps = int(state_dict["steps"])

    @abstractmethod
    def _estimate(self, measure: Measure) -> list[Slope]:
        """The gradient, from losses at other places.

        Args:
            measure: the loss where the parameters are now (see ``_go_``).
        """

    def _slope(self, direction: int, distance: float, measure: Measure) -> float:
        """The central difference along a direction; the parameters are left on its far side."""
        self._go_(direction, distance)
        above = measure()
        self._go_(direction, -distance)
        return (above - measure()) / (2 * distance)

    def _finish_(self, slopes: Sequence[Slope]) -> None:
        """Count the step and make its update, or refuse it."""
        self.steps += 1
        finite = all(math.isfinite(slope) for _, slope in slopes)
        self._return_(slopes if finite else None)
        if not finite and self.nonfinite == "raise":
            raise TrainingError(
                f"a loss of step {self.steps} is NaN or Inf",
                hint='lower the learning rate, look for NaN in weights or data, or pass nonfinite="skip"',
            )

    def _go_(self, direction: int, distance: float) -> None:
        """From wherever the parameters are to ``distance`` along a direction from home."""
        self._move_([*self._way_home(), (direction, distance)])
        self._place = direction, distance

    def _return_(self, slopes: Sequence[Slope] | None = None) -> None:
        """Home, and in the same pass the update of a step."""
        if self._place is not None or slopes is not None:
            self._move_(self._way_home(), slopes)
        self._place = None

    def _way_home(self) -> list[Slope]:
        return [] if self._place is None else [(self._place[0], -self._place[1])]

    def _move_(self, shifts: Sequence[Slope], slopes: Sequence[Slope] | None = None) -> None:
        """One pass over all parameters: add shifts along directions, and descend by slopes where there are any."""
        for group, number, p in self.trained():
            move_(p, number, way(group, shifts, slopes))

    def trained(self) -> Iterator[tuple[dict[str, Any], int, Tensor]]:
        """The trainable parameters with their groups and numbers."""
        number = 0
        for group in self.param_groups:
            for p in group["params"]:
                if p.requires_grad:
                    yield group, number, p.detach()
                number += 1

    def _check_layout(self, p: Tensor) -> None:
        """Refuse a parameter that has no order of memory."""
        _flat(p)

    def _draws(self, wanted: int) -> range:
        """Numbers of the directions of a step; on fake tensors two stand for all."""
        return range(wanted if self._real() else min(2, wanted))

    def _real(self) -> bool:
        """Whether the parameters hold numbers."""
        return all(has_values(p) for _, _, p in self.trained())


def _decayed_and_not(model: nn.Module) -> list[dict[str, Any]]:
    trained = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.dim() > 1]},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


@contextmanager
def evaluating(model: nn.Module | None) -> Iterator[None]:
    """Evaluation mode, and afterwards every module as it was."""
    training = [] if model is None else [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def way(group: dict[str, Any], shifts: Sequence[Slope], slopes: Sequence[Slope] | None = None) -> Move:
    """The move of a group's parameters that adds shifts along directions, and descends by slopes if there are any."""
    kept = 1 - group["lr"] * group["weight_decay"] if slopes is not None else 1.0
    amounts: dict[int, float] = {}
    for direction, distance in shifts:
        amounts[direction] = amounts.get(direction, 0.0) + kept * distance
    for direction, slope in slopes or ():
        amounts[direction] = amounts.get(direction, 0.0) - group["lr"] * slope
    return kept, amounts


def move_(p: Tensor, number: int, move: Move) -> None:
    """Make a move of one parameter, by whose number its share of each direction is drawn."""
    kept, amounts = move
    for place, piece in pieces(p):
        value = widened(piece)
        if kept != 1:
            value.mul_(kept)
        for direction, amount in amounts.items():
            value.add_(noise(piece, mix_seed(direction, number, place)).mul_(amount))
        if value is not piece:
            piece.copy_(value)


def _flat(p: Tensor) -> Tensor:
    """A view of all elements in the order of memory."""
    strides = p.stride()
    ordered = p.permute(sorted(range(p.dim()), key=lambda d: (-strides[d], d)))
    if not ordered.is_contiguous():
        raise ShapeError(
            f"the elements of a parameter of shape {tuple(p.shape)} overlap or have gaps", hint="make it contiguous"
        )
    return ordered.view(-1)


def pieces(p: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Numbered views of at most ``CHUNK_NUMEL`` elements each."""
    flat = _flat(p)
    yield from ((number, flat[part]) for number, part in enumerate(strips(len(flat), CHUNK_NUMEL, flat)))


def widened(piece: Tensor) -> Tensor:
    """The piece itself, or a float32 copy of a narrower one."""
    return piece.to(torch.promote_types(piece.dtype, torch.float32))


def noise(piece: Tensor, seed: int) -> Tensor:
    """Standard normal numbers for a piece that follow from the seed, in float32 or wider."""
    generator = torch.Generator(device=piece.device).manual_seed(seed) if has_values(piece) else None
    dtype = torch.promote_types(piece.dtype, torch.float32)
    return torch.randn(piece.shape, generator=generator, device=piece.device, dtype=dtype)


def _forward_bytes(shape: ModelShape, workload: Train, kept: int) -> int:
    """What a forward pass holds at once at the most, of activations of which a training step keeps ``kept``.

    That is the logits with what the loss makes of them in float32, or one block's share of them all; a quarter more
    is for what neither knows of.
    """
    numel = workload.batch * workload.tokens * getattr(shape.config.get_text_config(), "vocab_size", 0)
    head = numel * (shape.dtype.itemsize + 2 * 4)
    blocks = len({p.block for p in shape.parameters if p.block})
    return min(kept, 5 * max(head, kept // max(1, blocks)) // 4)
