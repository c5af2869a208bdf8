"""Methods whose numbers are found by training: a stand-in that can be trained, and packing what came out.

Between ``prepare_`` and ``finish_`` the model is an ordinary one: any training loop trains it, on its own loss or on
the method's ``objective``. Without any training in between, the packed model is the method's starting point.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from pintpot.core.errors import UnsupportedModel
from pintpot.core.shape import ModelShape
from pintpot.core.workload import Compress
from pintpot.weights._base import CompressionReport, Layout, Texts, WeightMethod
from pintpot.weights.by_training import ByTraining, Follower
from pintpot.weights.forecast import kept_bytes, layout_of, replaced_in, targets_of
from pintpot.weights.formats import Format, Tensors
from pintpot.weights.modules import place_
from pintpot.weights.replace import report_of
from pintpot.weights.statistics import InputStatistics
from pintpot.weights.targets import Target, find_targets


class StandIn(Follower):
    """What can be trained in the place of one packed weight (O, I); its parameters are found by the optimizer.

    A subclass keeps what it needs of the dense weight as parameters and buffers of its own.
    """

    @abstractmethod
    def weight(self) -> Tensor:
        """The numbers (O, I) that the packed weight would have now, differentiable in the parameters."""

    @abstractmethod
    def terms(self, formats: tuple[Format, ...]) -> tuple[Tensors, ...]:
        """The stored tensors of the weight as it is now."""

    def input(self, input: Tensor) -> Tensor:
        """What the input becomes before the product; itself unless overridden."""
        return input

    def product(self, input: Tensor, bias: Tensor | None) -> Tensor:
        """``input`` (..., I) -> (..., O); overridden where the terms of the weight take different inputs."""
        return functional.linear(self.input(input), self.weight().to(input.dtype), bias)


class TrainedLinear(nn.Linear):
    """A linear layer whose weight is a stand-in.

    Args:
        stand_in: of the weight.
        in_features: I.
        out_features: O.
        bias: the layer's, or None.
    """

    def __init__(self, stand_in: StandIn, in_features: int, out_features: int, bias: nn.Parameter | None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.stand_in = stand_in
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The numbers (O, I) as they are now."""
        return self.stand_in.weight()

    def forward(self, input: Tensor) -> Tensor:
        """``input`` (..., I) -> (..., O)."""
        return self.stand_in.product(input, self.bias)


class TrainedConv2d(nn.Conv2d):
    """A convolution of one group whose weight (O, I * height * width) is a stand-in.

    Args:
        stand_in: of the weight.
        old: the dense convolution, whose sizes and bias it takes over.
    """

    def __init__(self, stand_in: StandIn, old: nn.Conv2d) -> None:
        nn.Module.__init__(self)
        for name in nn.Conv2d.__constants__:
            setattr(self, name, getattr(old, name))
        self.stand_in = stand_in
        self.register_parameter("bias", old.bias)  # type: ignore[arg-type]

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The numbers (O, I, height, width) as they are now."""
        return self.stand_in.weight().view(self.out_channels, self.in_channels, *self.kernel_size)

    def forward(self, input: Tensor) -> Tensor:
        """``input`` (B, I, height, width) -> (B, O, height, width)."""
        return self._conv_forward(self.stand_in.input(input), self.weight.to(input.dtype), self.bias)


@dataclass(frozen=True, kw_only=True)
class TrainedMethod(WeightMethod, ByTraining[Layout]):
    """A weight method whose numbers are trained; ``find`` packs the starting point."""

    learning_rate: ClassVar[float] = 1e-4
    """The usual one."""

    @abstractmethod
    def stand_in(
        self, name: str, weight: Tensor, formats: tuple[Format, ...], inputs: InputStatistics | None = None
    ) -> StandIn:
        """What is trained in the place of a weight (O, I), at its starting point.

        Args:
            name: the parameter's.
            weight: its numbers, float.
            formats: that it will be packed in.
            inputs: of the layer, where the method is calibrated.
        """

    def find(
        self, name: str, weight: Tensor, formats: tuple[Format, ...], inputs: InputStatistics | None = None
    ) -> tuple[Tensors, ...]:
        """The starting point, packed."""
        return self.stand_in(name, weight, formats, inputs).terms(formats)

    def applying_bytes(self, shape: ModelShape, workload: Compress) -> int:
        """The model in 32 bits with gradients and Adam's moments, the dense one too where it teaches, and activations.

        Each stand-in's weight is made of two more matrices. Beside the matrices' inputs and outputs and the logits, a
        pass keeps half as much again.
        """
        replaced = replaced_in(shape, layout_of(shape, self))
        kept = kept_bytes(shape, replaced, workload.batch * workload.tokens, torch.float32)
        return 4 * (5 if self.taught else 4) * shape.numel + 8 * sum(t.numel for t in replaced) + kept * 3 // 2

    def check(self, shape: ModelShape) -> None:
        """Refuse layers that have no stand-in."""
        self._refuse_stacks(targets_of(shape), layout_of(shape, self))

    def _refuse_stacks(self, targets: Sequence[Target], layout: Layout) -> None:
        stacks = [t.parameter for t in targets if t.matrices > 1 and t.parameter in layout]
        if stacks:
            raise UnsupportedModel(
                f"{self.name} cannot train packed experts: {stacks[0]}", hint="choose a method that needs no training"
            )

    def prepare_(self, model: PreTrainedModel, texts: Texts = ()) -> Layout:
        """Put stand-ins in the place of a dense model's weights; everything else of the model can be trained too.

        Args:
            model: dense, in the dtype that it is trained in.
            texts: where the starting point needs calibration.

        Returns:
            The layout for ``finish_``.

        Raises:
            UnsupportedModel: naming layers that have no stand-in (stacks of experts).
        """
        self.require_texts(texts)
        targets, _ = find_targets(model)
        layout = self.layout(targets)
        self._refuse_stacks(targets, layout)
        for target in targets:
            if target.parameter in layout:
                old = model.get_submodule(target.module)
                weight = model.get_parameter(target.parameter).detach()
                dense = weight.t().contiguous() if target.transposed else weight.reshape(target.shape)
                stand_in = self.stand_in(target.parameter, dense, layout[target.parameter])
                bias: nn.Parameter | None = old.bias  # type: ignore[assignment]
                new: nn.Module
                if isinstance(old, nn.Conv2d):
                    new = TrainedConv2d(stand_in, old)
                else:
                    new = TrainedLinear(stand_in, target.shape[-1], target.shape[-2], bias)
                model.set_submodule(target.module, new.train(old.training))
        return layout

    @torch.no_grad()
    def finish_(self, model: PreTrainedModel, prepared: Layout, skeleton: nn.Module) -> CompressionReport:
        """Pack what was trained, and mark the model so that it is saved and loaded as a compressed one."""
        # Imported here because that module builds on this wing's base.
        from pintpot.weights.quantizer import mark_

        targets, dense = find_targets(skeleton)
        for target in targets:
            if target.parameter in prepared:
                trained = model.get_submodule(target.module)
                assert isinstance(trained, TrainedLinear | TrainedConv2d)
                formats = prepared[target.parameter]
                terms = trained.stand_in.terms(formats)
                _pack_(model, target, trained, formats, terms)
        mark_(model, self, prepared)
        return report_of(prepared, targets, dense)


def round_through(numbers: Tensor) -> Tensor:
    """The nearest integers, with the gradient passed straight through."""
    rounded: Tensor = _Round.apply(numbers)
    return rounded


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, numbers: Tensor) -> Tensor:
        return numbers.round()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def stand_ins(model: nn.Module) -> Iterator[StandIn]:
    """All stand-ins of a model that is being trained."""
    return (module for module in model.modules() if isinstance(module, StandIn))


def _pack_(
    model: nn.Module,
    target: Target,
    trained: TrainedLinear | TrainedConv2d,
    formats: tuple[Format, ...],
    terms: tuple[Tensors, ...],
) -> None:
    dense: nn.Module
    if isinstance(trained, TrainedConv2d):
        dense = nn.Conv2d(1, 1, 1, device="meta", dtype=trained.weight.dtype)
        for name in nn.Conv2d.__constants__:
            setattr(dense, name, getattr(trained, name))
    else:
        dense = nn.Linear(1, 1, bias=False, device="meta", dtype=trained.weight.dtype)
    dense.register_parameter("bias", trained.bias)  # type: ignore[arg-type]
    model.set_submodule(target.module, dense.train(trained.training))
    place_(model, target, formats, terms)
