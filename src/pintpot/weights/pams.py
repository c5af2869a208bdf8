"""PAMS: the largest value of each activation is a trained parameter, and a dense teacher shows where to look.

Source:    Li et al. 2020, "PAMS", arXiv:2011.04212 (ECCV 2020): the trained truncation of activations and the
           structured knowledge transfer; starting values, rates and the weights of the losses from the authors' code.
Differs:   every matrix and convolution of the blocks quantises its own input, where the authors put activations'
           quantisers at three places of each residual block; the features that are compared are those of the last
           block. Signed integers have one negative value more than the authors'. Products are made in floating point.
Saves:     weights, real: O * (packed_size(I, bits) + 2) + 4 bytes a matrix (the step is stored once a row). Training
           holds the dense model twice (student and teacher) with gradients and moments.
Shapes:    weight (O, I); codes (O, I) packed; scale (O, 1), all equal; input_step (1,).
Composes:  caches, activations, adapters on the frozen base; not with anything that needs dense weights.
Use when:  convolutional or windowed super-resolution networks without batch normalisation, whose ranges are wide.
Not when:  one step for a whole matrix loses too much (4 bits of a language model): group-wise methods are better there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from pintpot.core.errors import CompositionError
from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape, block_names
from pintpot.core.technique import Claim, Source, technique
from pintpot.core.workload import Workload
from pintpot.weights._base import risk_between
from pintpot.weights.formats import Format, Grid, StaticInput, Tensors
from pintpot.weights.paused import hidden_of
from pintpot.weights.statistics import InputStatistics
from pintpot.weights.trained import StandIn, TrainedMethod, round_through

RISES = ((8.1, 0.0002), (6.2, 0.05), (4.1, 0.468), (3.1, 10.0))
"""Bits a weight and the relative rise of perplexity: of the embedded model, the second a guess; the first fell."""

SCALE_RATE = 100.0
"""How much faster than a weight a largest value moves (1e-2 against 1e-4 in the authors' code)."""

DECAY = 0.9997
"""Of the running mean of the largest value while it is not trained yet."""


@technique(
    name="pams",
    wing="weights",
    source=Source("PAMS: Quantized Super-Resolution via Parameterized Max Scale", 2020, "2011.04212"),
    accounts=[Account.WEIGHTS],
    jobs=["compress"],
    removes=["dense_weights", "matrix_gradients"],
    claims=[Claim("PSNR on Set5 (dB)", 32.124, versus="32.095 dense", at="EDSR, 8 bits", where="abstract")],
    fidelity="each matrix quantises its own input; features are compared after the last block",
)
@dataclass(frozen=True, kw_only=True)
class PAMS(TrainedMethod):
    """Trained truncation of activations, with a teacher.

    Attributes:
        bits: of weights and activations, 2 to 8; the paper has 8 and 4.
        warm_up: share of the training in which largest values only follow the activations (1 of 30 epochs).
        transfer_weight: of the distance of the attention maps, beside 1 of the task's loss.
    """

    learning_rate: ClassVar[float] = 1e-4
    bits: int = 8
    warm_up: float = 1 / 30
    transfer_weight: float = 1000.0

    def __post_init__(self) -> None:
        StaticInput(inner=Grid(bits=self.bits), bits=self.bits)

    def terms(self, name: str, out_features: int, in_features: int, dtype: torch.dtype) -> tuple[Format, ...]:
        """Signed integers with one step, for inputs with one step."""
        scale = "bfloat16" if dtype is torch.bfloat16 else "float16"
        grid = Grid(bits=self.bits, group_size=-1, symmetric=True, scale_dtype=scale)
        return (StaticInput(inner=grid, bits=self.bits),)

    def stand_in(
        self, name: str, weight: Tensor, formats: tuple[Format, ...], inputs: InputStatistics | None = None
    ) -> StandIn:
        """The dense weight, and a largest activation that is not known yet."""
        layout = formats[0]
        if len(formats) != 1 or not isinstance(layout, StaticInput) or not isinstance(layout.inner, Grid):
            raise CompositionError(f"pams trains integers, not {formats}", hint="leave the layout to the method")
        return MaxScale(weight, layout, self.warm_up)

    def objective(self, student: PreTrainedModel, teacher: PreTrainedModel) -> nn.Module:
        """The task's loss and the distance of the attention maps."""
        return StructuredTransfer(student, teacher, self.transfer_weight)

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """From bits a weight; large models lose less than the small one that it was measured on."""
        return risk_between(RISES, self.bits_a_weight(shape))

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[PAMS]:
        """From the safest to the smallest."""
        for bits in (8, 6, 4):
            yield cls(bits=bits)


class MaxScale(StandIn):
    """A weight, and the largest value of its input.

    Args:
        weight: float (O, I).
        layout: of weight and input.
        warm_up: share of the training in which the largest value follows the input.
    """

    warm: Tensor

    def __init__(self, weight: Tensor, layout: StaticInput, warm_up: float) -> None:
        super().__init__()
        assert isinstance(layout.inner, Grid)
        self.bits, self.grid, self.warm_up = layout.bits, layout.inner, warm_up
        # A buffer, so that a run that goes on from a checkpoint does not warm up again.
        self.register_buffer("warm", torch.tensor(warm_up > 0, device=weight.device))
        self.dense = nn.Parameter(weight.clone())
        # NaN leaves the input as it is until something is known of it.
        self.largest = nn.Parameter(weight.new_tensor(math.nan, dtype=torch.float32))

    def _step(self) -> Tensor:
        return self.largest * SCALE_RATE / ((1 << (self.bits - 1)) - 1)

    def _weight_scale(self) -> Tensor:
        top = self.dense.detach().float().abs().amax()
        return self.grid.settle(-top, top)[0]

    def weight(self) -> Tensor:
        """The rounded weight; its largest magnitude is that of its grid."""
        scale = self._weight_scale()
        return (round_through(self.dense.float() / scale) * scale).to(self.dense.dtype)

    def input(self, input: Tensor) -> Tensor:
        """The truncated and rounded input; during the warm-up it is not truncated."""
        first = bool(self.largest.isnan())
        if self.training and (self.warm or first):
            self._follow_(input.detach(), first)
        if self.largest.isnan():
            return input
        half = 1 << (self.bits - 1)
        step = self._step()
        codes = input.float() / step
        if not (self.training and self.warm):
            codes = codes.clamp(-half, half - 1)
        return (round_through(codes) * step).to(input.dtype)

    @torch.no_grad()
    def _follow_(self, input: Tensor, first: bool) -> None:
        """Take in the mean over the batch of each input's largest magnitude."""
        found = input.float().abs().flatten(1).amax(1).mean().clamp(min=1e-8) / SCALE_RATE
        self.largest.copy_(found if first else DECAY * self.largest + (1 - DECAY) * found)

    def follow_(self, progress: float) -> None:
        """End the warm-up in time."""
        self.warm.fill_(progress < self.warm_up)

    @torch.no_grad()
    def terms(self, formats: tuple[Format, ...]) -> tuple[Tensors, ...]:
        """The codes, and the steps of weight and input."""
        layout = formats[0]
        assert isinstance(layout, StaticInput)
        scale = self._weight_scale().expand(self.dense.shape[0], 1)
        zero = torch.full_like(scale, 1 << (self.grid.bits - 1))
        grid = self.grid.store(self.grid.round(self.dense.float(), scale, zero), scale, zero)
        return (layout.encode_with(grid, self._step().nan_to_num(0.0).view(1)),)


class StructuredTransfer(nn.Module):
    """A student with the loss of structured knowledge transfer.

    Args:
        student: trained.
        teacher: run without gradients, always in evaluation mode; not a part of this module.
        transfer_weight: of the mean squared distance of the attention maps after the last block.
    """

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel, transfer_weight: float) -> None:
        super().__init__()
        self.student = student
        self.teacher = (teacher.eval(),)
        self.transfer_weight = transfer_weight

    def forward(self, labels: Tensor, **inputs: Any) -> SimpleNamespace:
        """The loss.

        Args:
            labels: images (B, C, height, width), whose mean absolute distance from the student's first output is the
                task's loss; or whatever else the student's own loss takes.
            inputs: of the model, by name.
        """
        with torch.no_grad():
            _, taught = features_of(self.teacher[0], inputs)
        images = labels.is_floating_point()
        result, learnt = features_of(self.student, inputs if images else {**inputs, "labels": labels})
        loss = functional.l1_loss(result[0], labels) if images else result.loss
        return SimpleNamespace(loss=loss + self.transfer_weight * (map_of(learnt) - map_of(taught)).square().mean())


def features_of(model: PreTrainedModel, inputs: dict[str, Any]) -> tuple[Any, Tensor]:
    """What a model gives, and what its last block gave."""
    seen: list[Tensor] = []
    block = model.get_submodule(block_names(model)[-1])
    handle = block.register_forward_hook(lambda module, args, output: seen.append(hidden_of(output)))
    try:
        return model(**inputs), seen[-1]
    finally:
        handle.remove()


def map_of(features: Tensor) -> Tensor:
    """The attention map of features (B, C, height, width) or (B, T, C), of length one: (B, places)."""
    channels = 1 if features.dim() == 4 else -1
    return functional.normalize(features.float().square().mean(channels).flatten(1))
