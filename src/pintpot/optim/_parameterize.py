"""The ``parameters`` part of the slot: linear layers whose weight is a sum of trainable terms while they are trained.

A method says how one layer becomes another module (``parameterize``), and, where it acts between updates, what it does
to each (``act_``). Before the optimizer is made a job calls ``prepare_``, after that ``follow_``, before saving
``finish_``, which leaves the ordinary layers that transformers knows.

Shapes: weight O x I, whichever way a layer stores it; rank R; activations (..., I) and (..., O).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers.pytorch_utils import Conv1D

from pintpot.core.errors import ShapeError, UnsupportedModel
from pintpot.core.ledger import Account, Ledger, Moment
from pintpot.core.shape import ModelShape, ParameterShape, block_names
from pintpot.core.technique import Technique
from pintpot.core.work import Work
from pintpot.core.workload import Train, Workload
from pintpot.optim._base import OptimMethod
from pintpot.optim._groups import projected_names
from pintpot.optim._tensors import has_values, mix_seed

POSITION = "parameterization"
"""The buffer of a model, int64 (2,), that holds the seed and the number of updates done."""


class SumLinear(nn.Module, ABC):
    """A linear layer whose weight is a sum of terms; takes over the bias of the layer it stands for.

    Args:
        linear: that layer; its weight is not kept.
    """

    projected: ClassVar[tuple[str, ...]] = ()
    """The names of parameters whose gradients a projecting rule may project."""

    def __init__(self, linear: nn.Linear | Conv1D) -> None:
        super().__init__()
        self.out_features, self.in_features = matrix_of(linear).shape
        self.transposed = isinstance(linear, Conv1D)
        self.bias = linear.bias
        self.train(linear.training)

    @abstractmethod
    def dense(self) -> Tensor:
        """The whole weight, O x I, in storage of its own."""

    @property
    def weight(self) -> Tensor:
        """The whole weight as the layer it stands for would hold it."""
        return self.dense().T if self.transposed else self.dense()

    @property
    def projected_parameters(self) -> tuple[nn.Parameter, ...]:
        """The parameters that are called ``projected``."""
        return tuple(self.get_parameter(name) for name in self.projected)

    def extra_repr(self) -> str:
        """The sizes."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


class FactoredLinear(SumLinear):
    """A linear layer with a product of two thin matrices among its terms, ``scale * left @ right``; it starts at zero.

    Args:
        linear: the layer it stands for.
        rank: columns of the left matrix and rows of the right one, at most the smaller side.
        alpha: numerator of the scale.
        generator: to draw the right matrix from.
    """

    def __init__(self, linear: nn.Linear | Conv1D, rank: int, alpha: float, generator: torch.Generator | None) -> None:
        super().__init__(linear)
        matrix = matrix_of(linear)
        rank = min(rank, *matrix.shape)
        self.scale = alpha / rank
        self.right = nn.Parameter(uniform((rank, self.in_features), matrix, generator))
        self.left = nn.Parameter(matrix.new_zeros((self.out_features, rank)))


@dataclass(frozen=True, kw_only=True)
class Parameterization(Technique):
    """A technique that changes what is trained; any rule of the slot may train it."""

    acts: ClassVar[bool] = False
    """Whether the method does something after each update."""

    may_be_zero: ClassVar[tuple[str, ...]] = ()
    """Hyperparameters that turn something off when they are zero."""

    part_of_width: ClassVar[float] = 0.25
    """The paper's ranks, as a fraction of the width of its models."""

    @abstractmethod
    def parameterize(self, linear: nn.Linear | Conv1D, generator: torch.Generator | None) -> SumLinear:
        """The module that takes a layer's place, on the weight's device and in its dtype.

        Args:
            linear: a layer; not modified, but its storage may live on in the new one.
            generator: to draw from; ``None`` where tensors have no values.
        """

    def act_(self, layer: SumLinear, step: int, seed: int) -> Iterable[Tensor]:
        """Do what is due after update number ``step``.

        Args:
            layer: one of this method's.
            step: the updates done, from 1; 0 on fake tensors, where all that is ever done counts as due.
            seed: differs by layer and step.

        Returns:
            The parameters whose optimizer state is to be forgotten.
        """
        return ()

    def rule(self) -> OptimMethod | None:
        """The rule that trains the terms where no other is asked for; AdamW when ``None``."""
        return None

    def kept_numel(self, out: int, inside: int, tokens: int) -> int:
        """Elements that one layer keeps for the backward pass, beyond those of a dense layer."""
        return 0

    def passing_numel(self, out: int, inside: int, tokens: int) -> int:
        """Temporary elements of one layer in the backward pass."""
        return 0

    def flops(self, out: int, inside: int, tokens: int) -> float:
        """Operations of one layer in a step, less those of a dense layer."""
        return 0.0

    def prepare_(self, model: nn.Module, seed: int) -> None:
        """Replace the layers of the model, one at a time; the same seed draws the same numbers.

        Raises:
            ShapeError: for a hyperparameter that makes no sense.
            UnsupportedModel: when no layer can be replaced.
        """
        self.check()
        names = linear_names(model)
        if not names:
            raise UnsupportedModel(
                f"{type(model).__name__} has no trainable linear layers that {self.name} could replace",
                hint="leave it out, or train the weights themselves",
            )
        for number, name in enumerate(names):
            linear: Any = model.get_submodule(name)
            generator = generator_for(linear.weight, mix_seed(seed, number))
            model.set_submodule(name, self.parameterize(linear, generator))
        if self.acts:
            model.register_buffer(POSITION, torch.tensor([seed, 0], device=linear.weight.device))

    def follow_(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Act after each step of the optimizer, which is of the prepared model's parameters."""
        if not self.acts:
            return
        position = model.get_buffer(POSITION)
        layers = tuple(layer for _, layer in sum_linears(model))

        @torch.no_grad()
        def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            position[1] += 1
            known = has_values(position)
            seed, step = (int(value) for value in position) if known else (0, 0)
            for number, layer in enumerate(layers):
                for parameter in self.act_(layer, step, mix_seed(seed, number, step)):
                    # A prediction is of the time between two such moments too.
                    if known:
                        optimizer.state.pop(parameter, None)

        optimizer.register_step_post_hook(after)

    @torch.no_grad()
    def finish_(self, model: nn.Module) -> None:
        """Put ordinary layers back, with the merged weights, one at a time."""
        for name in [name for name, _ in sum_linears(model)]:
            layer: Any = model.get_submodule(name)
            model.set_submodule(name, _ordinary(layer))
        model._buffers.pop(POSITION, None)

    def check(self) -> None:
        """Refuse hyperparameters that are not positive (or, where they may be, zero).

        Raises:
            ShapeError: naming the first one.
        """
        for entry in fields(self):
            value = getattr(self, entry.name)
            if value < 0 or (value == 0 and entry.name not in self.may_be_zero):
                raise ShapeError(f"{entry.name} must be positive, not {value}", hint=f"default: {entry.default}")

    def state_bytes(self, shape: ModelShape) -> int:
        """Bytes of the optimizer's state between steps, under the method's own rule."""
        trained = self.sizes(shape).trained
        rule: Any = self.rule()
        return 2 * trained.weight_bytes if rule is None else int(rule.state_bytes(trained))

    def sizes(self, shape: ModelShape) -> Sizes:
        """What the prepared model consists of."""
        return _sizes(self, _Key(shape.fingerprint, shape.dtype, shape))

    def predict(self, ledger: Ledger, shape: ModelShape, workload: Workload) -> Ledger:
        """Weights as they are held, gradients and states of what is trained, and what the layers keep.

        Beside another rule the states are at most AdamW's. While loading, the dense model is there first.
        """
        if not isinstance(workload, Train):
            return ledger
        sizes, itemsize = self.sizes(shape), shape.dtype.itemsize
        tokens = workload.batch * workload.tokens
        more, trained = sizes.held - shape.weight_bytes, sizes.trained.weight_bytes
        state = self.state_bytes(shape)
        kept = itemsize * sum(self.kept_numel(*layer, tokens) for layer in sizes.layers)
        passing = itemsize * max(self.passing_numel(*layer, tokens) for layer in sizes.layers)
        largest = max(out * inside for out, inside in sizes.layers)

        def change(moment: Moment) -> Moment:
            least = passing if moment.phase == "backward" else 0
            work = moment.of(Account.WORKSPACE)
            if moment.phase == "step":
                work = min(work, 2 * trained)
            gradients = min(trained, moment.of(Account.GRADIENTS))
            moment = moment.with_bytes(Account.GRADIENTS, gradients)
            plain = moment.of(Account.OPTIMIZER) >= 2 * shape.weight_bytes
            moment = moment.with_bytes(Account.OPTIMIZER, state if plain else 2 * trained)
            return moment.with_bytes(Account.WORKSPACE, max(work, least))

        training = ("forward", "backward", "step")
        ledger = ledger.edit(change, phases=training).add(Account.WEIGHTS, more, phases=(*training, "load"))
        ledger = ledger.add(Account.WORKSPACE, max(0, -more) + 5 * largest * max(4, itemsize), phases=("load",))
        return ledger.add(Account.ACTIVATIONS, kept, phases=("forward", "backward"))

    def work(self, work: Work, shape: ModelShape, workload: Workload) -> Work:
        """Less traffic for gradients and states, and the products of the layers."""
        if not isinstance(workload, Train):
            return work
        sizes, tokens = self.sizes(shape), workload.batch * workload.tokens
        # Gradients are written and read, moments read and written, parameters read and written: seven times.
        moved = 7 * (sizes.trained.weight_bytes - shape.weight_bytes)
        flops = sum(self.flops(*layer, tokens) for layer in sizes.layers)
        return work.plus("step", read_bytes=moved, flops=flops, dtype=str(shape.dtype).removeprefix("torch."))

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[Technique]:
        """The rank that is the paper's part of the width."""
        rank = max(1, int(cls.part_of_width * typical_side(shape)))
        default = {entry.name: entry.default for entry in fields(cls)}["rank"]
        yield cls() if rank == default else cls.build({"rank": rank})


@dataclass(frozen=True)
class Sizes:
    """A prepared model, as shapes.

    Attributes:
        trained: the model with the trainable parameters alone.
        held: bytes of all parameters, and of the buffers that are kept in their place.
        layers: (O, I) of the layers that were replaced.
    """

    trained: ModelShape
    held: int
    layers: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class _Key:
    fingerprint: str
    dtype: torch.dtype
    shape: ModelShape = field(compare=False)


@lru_cache(maxsize=256)
def _sizes(method: Parameterization, key: _Key) -> Sizes:
    model = key.shape.build("meta")
    method.prepare_(model, 0)
    before = {p.name: p for p in key.shape.parameters}
    chosen = projected_names(model)
    blocks = block_names(model)
    trained = tuple(
        before.get(name)
        or ParameterShape(
            name,
            tuple(p.shape),
            p.dtype,
            "linear" if name in chosen else "other",
            next((block for block in blocks if name.startswith(block + ".")), ""),
        )
        for name, p in model.named_parameters()
        if p.requires_grad
    )
    layers = [layer for _, layer in sum_linears(model)]
    held = sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for layer in layers for b in layer.buffers())
    return Sizes(
        trained=key.shape.with_parameters(trained),
        held=held + (model.get_buffer(POSITION).nbytes if method.acts else 0),
        layers=tuple((layer.out_features, layer.in_features) for layer in layers),
    )


def typical_side(shape: ModelShape) -> int:
    """The smaller side of the linear layer in the middle, when they are sorted by it; 1 without any."""
    sides = sorted(min(p.shape) for p in shape.linears())
    return sides[len(sides) // 2] if sides else 1


def matrix_of(linear: nn.Linear | Conv1D) -> Tensor:
    """A layer's weight as a matrix O x I, detached."""
    weight = linear.weight.detach()
    return weight.T if isinstance(linear, Conv1D) else weight


def generator_for(tensor: Tensor, seed: int) -> torch.Generator | None:
    """A generator on a tensor's device, or ``None`` for a tensor without values."""
    return torch.Generator(device=tensor.device).manual_seed(seed) if has_values(tensor) else None


def uniform(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Numbers of torch's usual start of a linear layer: between minus and plus ``1 / sqrt(fan_in)`` (the last side)."""
    bound = 1 / math.sqrt(shape[-1])
    return like.new_empty(shape).uniform_(-bound, bound, generator=generator)


def linear_names(model: nn.Module) -> list[str]:
    """The layers inside the blocks whose weight may be replaced: trainable, of their own, and no wider than a matrix.

    Stacks of matrices (packed experts), embeddings and the head are not among them.
    """
    chosen = projected_names(model)
    places = model.named_modules(remove_duplicate=False)
    uses = Counter(id(p) for _, module in places for p in module.parameters(recurse=False))
    return [
        name
        for name, module in model.named_modules()
        # A subclass may read its own weight.
        if type(module) in (nn.Linear, Conv1D)
        and f"{name}.weight" in chosen
        and module.weight.requires_grad
        and uses[id(module.weight)] == 1
    ]


def sum_linears(model: nn.Module) -> Iterator[tuple[str, SumLinear]]:
    """The layers of a prepared model with their names."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, SumLinear))


def _ordinary(layer: SumLinear) -> nn.Module:
    """The plain layer with the same weight and bias."""
    out, inside = layer.out_features, layer.in_features
    with torch.device("meta"):
        plain = Conv1D(out, inside) if layer.transposed else nn.Linear(inside, out, bias=layer.bias is not None)
    plain.weight = nn.Parameter(layer.weight.contiguous())
    plain.bias = layer.bias
    return plain.train(layer.training)
