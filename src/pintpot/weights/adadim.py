"""AdaDim: group each matrix along its input or its output channels, whichever loses less of the layer's output.

Source:    Heo et al. 2023, "Rethinking Channel Dimensions to Isolate Outliers", arXiv:2309.15531: groups within input
           channels, so that large inputs stay among themselves, and the choice by reconstruction error for each layer,
           on top of rounding to nearest (RTN-ada) and of GPTQ (GPTQ-ada).
Differs:   a layer is judged by its own output error on all calibration tokens; the authors judge queries, keys, values,
           gate and up by the output of their attention or network part. The choice is made on the dense model's inputs.
           Only layers that take the same bytes either way have a choice, so that bytes are known from shapes: sizes
           that both hold whole groups, which large models have.
Saves:     weights, real: as rtn. Choosing needs what finding the codes needs: a block, and 4 I^2 bytes a layer.
Shapes:    weight (O, I); along inputs codes (O, I), scale and zero (O, I / G); along outputs the transpose of these.
Composes:  caches, activations, adapters on the frozen base; not with anything that needs dense weights.
Use when:  3 or 4 bits in groups of 128, in models with a few very large input channels.
Not when:  groups are small enough to isolate outliers by themselves, or whole rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pintpot.core.errors import CompositionError
from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Claim, Source, technique
from pintpot.core.workload import Workload
from pintpot.weights._base import Evidence, Layout, WeightMethod
from pintpot.weights.compensation import compensate_, inverse_factor
from pintpot.weights.formats import Format, Grid, Tensors, Transposed
from pintpot.weights.formats._base import prefixed
from pintpot.weights.gptq import GPTQ, MOST_CLIPPED_BITS, rise
from pintpot.weights.ranges import best_ranges
from pintpot.weights.rtn import RTN
from pintpot.weights.statistics import InputStatistics
from pintpot.weights.targets import Target

BASES = ("gptq", "rtn")


@technique(
    name="adadim",
    wing="weights",
    source=Source(
        "Rethinking Channel Dimensions to Isolate Outliers for Low-bit Weight Quantization of Large Language Models",
        2023,
        "2309.15531",
    ),
    accounts=[Account.WEIGHTS],
    jobs=["generate", "finetune", "compress"],
    removes=["dense_weights", "matrix_gradients"],
    claims=[
        Claim("points of MMLU, up to", 4.7, versus="rtn and gptq", at="base models", where="abstract"),
        Claim(
            "points of HumanEval, up to", 10.0, versus="rtn and gptq", at="instruction-tuned models", where="abstract"
        ),
    ],
    fidelity="layers are judged by their own output, and only those of equal bytes either way have a choice",
)
@dataclass(frozen=True, kw_only=True)
class AdaDim(WeightMethod):
    """Groups along inputs or outputs, by layer.

    Attributes:
        bits: width of a code, 1 to 8.
        group_size: channels that share a scale.
        base: ``"gptq"`` or ``"rtn"``: how the codes are found.
        symmetric: fix the zero in the middle and do not store it.
        clip: search the range of each group, as gptq's, where the base is gptq.
    """

    calibrated: ClassVar[bool] = True
    examines: ClassVar[bool] = True
    bits: int = 4
    group_size: int = 128
    base: str = "gptq"
    symmetric: bool = False
    clip: bool = False

    def __post_init__(self) -> None:
        Grid(bits=self.bits, group_size=self.group_size)
        if self.base not in BASES or self.group_size == -1:
            raise CompositionError(
                f"adadim works on groups, on top of one of {', '.join(BASES)}: not base={self.base!r} with "
                f"group_size={self.group_size}",
                hint="for instance adadim(base=gptq, group_size=128)",
            )

    def terms(self, name: str, out_features: int, in_features: int, dtype: torch.dtype) -> tuple[Format, ...]:
        """Groups of input channels, as rtn's."""
        scale = "bfloat16" if dtype is torch.bfloat16 else "float16"
        return (Grid(bits=self.bits, group_size=self.group_size, symmetric=self.symmetric, scale_dtype=scale),)

    def layout(self, targets: Sequence[Target], evidence: Evidence | None = None) -> Layout:
        """Groups of output channels where they lose less and take as many bytes."""
        found = dict(super().layout(targets))
        for target in targets if evidence is not None else ():
            (grid,) = found[target.parameter]
            across = _across(grid, target.shape[-2])
            equal = target.nbytes((across,)) == target.nbytes((grid,))
            along, over = evidence[target.parameter]["errors"].tolist()  # type: ignore[index]
            if equal and over < along:
                found[target.parameter] = (across,)
        return found

    def examine(self, name: str, weight: Tensor, inputs: InputStatistics | None) -> dict[str, Tensor]:
        """The mean squared output error of rounding to nearest in either grouping."""
        dense = weight.float()
        (grid,) = self.terms(name, weight.shape[0], weight.shape[1], weight.dtype)
        errors = []
        for layout in (grid, _across(grid, weight.shape[0])):
            rounded = layout.decode(layout.encode(dense), weight.shape[1], torch.float32)
            difference = dense - rounded
            errors.append(difference.square().sum() if inputs is None else inputs.error(difference).sum())
        return {"errors": torch.stack(errors)}

    def find(
        self, name: str, weight: Tensor, formats: tuple[Format, ...], inputs: InputStatistics | None = None
    ) -> tuple[Tensors, ...]:
        """The codes by the base, in the grouping that the layout says."""
        layout = formats[0]
        if inputs is None or self.base == "rtn" or len(formats) > 1:
            return super().find(name, weight, formats)
        if isinstance(layout, Grid):
            base = GPTQ(bits=layout.bits, group_size=layout.group_size, clip=self.clip)
            return base.find(name, weight, formats, inputs)
        if isinstance(layout, Transposed) and isinstance(layout.inner, Grid):
            return (compensated_across(weight.float(), layout.inner, inputs.hessian, clip=self.clip),)
        return super().find(name, weight, formats)

    def finding_bytes(self, out_features: int, in_features: int, dtype: torch.dtype) -> int:
        """The base's, or those of six matrices in 32 bits, by which the groupings are compared."""
        method = GPTQ(clip=self.clip) if self.base == "gptq" else RTN()
        base = method.finding_bytes(out_features, in_features, dtype)
        return max(base, 25 * out_features * in_features)

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """As gptq's, which it equals on the small model that both were measured on."""
        return rise(self.bits_a_weight(shape), self.clip)

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[AdaDim]:
        """From the safest to the smallest."""
        for bits, group_size in ((8, 128), (5, 128), (4, 64), (4, 128), (3, 64), (3, 128)):
            yield cls(bits=bits, group_size=group_size, clip=bits <= MOST_CLIPPED_BITS)


def _across(grid: Format, out_features: int) -> Transposed:
    return Transposed(inner=grid, out_features_held=out_features)


def compensated_across(weight: Tensor, grid: Grid, hessian: Tensor, *, clip: bool = False) -> Tensors:
    """The stored tensors of a transposed grid, by compensation from one input channel to the next.

    The groups of a channel lie in one column of the weight, so that their scales fit the numbers that compensation
    left there by the time that it is rounded.

    Args:
        weight: float32 (O, I).
        grid: of the transpose.
        hessian: mean of ``x x^T`` (I, I).
        clip: search the range of each group; its numbers share an input, so that all count alike.
    """
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    codes = torch.empty(weight.t().shape, dtype=torch.uint8, device=weight.device)
    scale = torch.empty((weight.shape[1], grid.groups(weight.shape[0])), device=weight.device)
    zero = torch.empty_like(scale)
    alike = torch.ones(weight.shape[0], device=weight.device)

    def round_columns(own: slice, numbers: Tensor) -> Tensor:
        row, place = numbers.t().contiguous(), order[own]
        step, middle = grid.settle(*best_ranges(row, grid, alike)) if clip else grid.fit(row)
        scale[place], zero[place] = step, middle
        codes[place] = code = grid.round(row, step, middle)
        return grid.value(code, step, middle).t()

    live = torch.where(hessian.diagonal() == 0, 0.0, weight)
    compensate_(live[:, order], inverse_factor(hessian, order=order), round_columns)
    return prefixed("inner_", grid.store(codes, scale, zero))
