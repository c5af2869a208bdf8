"""MixLLM: 8 bits for the output features that the model's loss needs most, anywhere in the model, and 4 for the others.

Source:    Zheng et al. 2024, "MixLLM", arXiv:2412.14590, and the authors' repository microsoft/MixLLM. An output
           feature whose weights change by ``d`` on rounding to 4 bits costs ``|g d + (g d)^2 / 2|``, summed over
           samples, with ``g`` the gradient of a sample's loss; the costliest 10 % of all features get 8 symmetric bits,
           the others 4 asymmetric ones, all in groups of 128, by GPTQ, and inputs get 8 bits in groups of 128.
Differs:   features compete with all others of the same input width and not with all (a wide feature takes more bytes),
           so that bytes follow from shapes; the experts of a layer share their choice; ranges are not clipped.
Saves:     weights, real: packed rows of both widths, scales, and 4 O bytes of order a matrix. Choosing needs the whole
           dense model in memory, the activations of one sequence and one matrix's gradient.
Shapes:    weight (O, I); codes of each part (O_part, I) packed; scale (O_part, N); order (O,).
Composes:  caches, activations, adapters on the frozen base; not with anything that needs dense weights.
Use when:  4 bits are nearly enough, the dense model fits in memory once, and integer products of 8 bits are fast.
Not when:  the model does not fit dense: gptq and awq need one block at a time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pintpot.core.errors import CompositionError
from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Claim, Source, technique
from pintpot.core.workload import Workload
from pintpot.weights._base import Evidence, Layout, Texts, WeightMethod, risk_between
from pintpot.weights.formats import Format, Grid, RoundedInput, Split, Tensors
from pintpot.weights.gptq import GPTQ
from pintpot.weights.gradients import each_gradient, samples
from pintpot.weights.statistics import InputStatistics
from pintpot.weights.targets import Target

RISES = ((8.2, 0.0008), (6.2, 0.008), (4.7, 0.018), (4.2, 0.024), (3.3, 0.1))
"""Bits a weight and the relative rise of perplexity."""


@technique(
    name="mixllm",
    wing="weights",
    source=Source(
        "MixLLM: LLM Quantization with Global Mixed-precision between Output-features and Highly-efficient System"
        " Design",
        2024,
        "2412.14590",
    ),
    accounts=[Account.WEIGHTS],
    jobs=["generate", "finetune", "compress"],
    removes=["dense_weights", "matrix_gradients"],
    claims=[
        Claim("rise of perplexity", 0.2, versus="0.5", at="Llama 3.1 70B, 10 % more bits", where="abstract"),
    ],
    fidelity="features compete among those of one input width; ranges are not clipped",
)
@dataclass(frozen=True, kw_only=True)
class MixLLM(WeightMethod):
    """Two widths, chosen by output feature over the whole model.

    Attributes:
        large_bits: width of the codes of the features that need it.
        small_bits: of the others.
        large_fraction: share of all output features that are wide.
        group_size: in-features that share a scale; -1 for a whole row.
        input_bits: to which inputs are rounded, in the same groups; 16 leaves them.
    """

    calibrated: ClassVar[bool] = True
    examines: ClassVar[bool] = True
    looks_at_whole: ClassVar[bool] = True
    same_at_every_depth: ClassVar[bool] = False
    large_bits: int = 8
    small_bits: int = 4
    large_fraction: float = 0.1
    group_size: int = 128
    input_bits: int = 8

    def __post_init__(self) -> None:
        for bits in (self.large_bits, self.small_bits):
            Grid(bits=bits, group_size=self.group_size)
        if not 0 <= self.large_fraction <= 1 or self.input_bits not in (*range(2, 9), 16):
            raise CompositionError(
                f"mixllm cannot widen a share of {self.large_fraction} of the features with {self.input_bits} bits of "
                "input",
                hint="a share from 0 to 1; 2 to 8 bits of input, or 16 to leave it",
            )

    def terms(self, name: str, out_features: int, in_features: int, dtype: torch.dtype) -> tuple[Format, ...]:
        """Two grids, with the share of wide features that all have on average."""
        return self._formats(range(int(self.large_fraction * out_features)), out_features, dtype)

    def _grids(self, dtype: torch.dtype) -> tuple[Grid, Grid]:
        scale = "bfloat16" if dtype is torch.bfloat16 else "float16"
        large = Grid(bits=self.large_bits, group_size=self.group_size, symmetric=True, scale_dtype=scale)
        return large, Grid(bits=self.small_bits, group_size=self.group_size, scale_dtype=scale)

    def _formats(self, wide: Iterable[int], out_features: int, dtype: torch.dtype) -> tuple[Format, ...]:
        chosen = tuple(wide)
        counts = (len(chosen), out_features - len(chosen))
        layout: Format = Split(parts=self._grids(dtype), counts=counts, first=chosen)
        if self.input_bits < 16:
            layout = RoundedInput(inner=layout, bits=self.input_bits, group_size=self.group_size)
        return (layout,)

    def layout(self, targets: Sequence[Target], evidence: Evidence | None = None) -> Layout:
        """The costliest features of each input width are wide; evenly many everywhere where nothing was examined."""
        wide: dict[str, Sequence[int]] = {}
        for rivals in _by_width(targets).values():
            every = sum(t.shape[-2] for t in rivals)
            count = int(self.large_fraction * every)
            if evidence is None:
                for target, end in zip(rivals, accumulate(t.shape[-2] for t in rivals), strict=True):
                    start = end - target.shape[-2]
                    wide[target.parameter] = range(count * end // every - count * start // every)
                continue
            costs = torch.cat([evidence[t.parameter]["cost"] for t in rivals])
            top = torch.zeros(every, dtype=torch.bool)
            top[costs.argsort(descending=True, stable=True)[:count]] = True
            for target, own in zip(rivals, top.split([t.shape[-2] for t in rivals]), strict=True):
                wide[target.parameter] = own.nonzero()[:, 0].tolist()
        return {t.parameter: self._formats(wide[t.parameter], t.shape[-2], t.dtype) for t in targets}

    def examine_model(self, model: PreTrainedModel, targets: Sequence[Target], texts: Texts) -> Evidence:
        """What each output feature costs the loss when it is rounded to the small width."""
        named = {t.parameter: t for t in targets}
        found = {t.parameter: {"cost": torch.zeros(t.shape[-2])} for t in targets}

        def take(name: str, gradient: Tensor) -> None:
            target = named[name]
            weight = target.rows(model.get_parameter(name).detach()).float()
            change = self._rounded(weight, target.dtype) - weight
            slope = (target.rows(gradient).float() * change).sum(-1)
            found[name]["cost"] += (slope + slope.square() / 2).abs().reshape(-1, target.shape[-2]).sum(0).cpu()

        for text in samples(texts):
            each_gradient(model, list(named), text, take)
        return found

    def _rounded(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        _, small = self._grids(dtype)
        rows = weight.reshape(-1, weight.shape[-1])
        return small.decode(small.encode(rows), rows.shape[1], torch.float32).view_as(weight)

    def find(
        self, name: str, weight: Tensor, formats: tuple[Format, ...], inputs: InputStatistics | None = None
    ) -> tuple[Tensors, ...]:
        """The codes of each part's features by GPTQ; to nearest where nothing is known of the inputs."""
        split = formats[0].inner if isinstance(formats[0], RoundedInput) else formats[0]
        if inputs is None or not isinstance(split, Split):
            return super().find(name, weight, formats)
        dense, order = weight.float(), split.own_order(weight.device)
        parts = dense[order].split(list(split.counts))
        stored = [
            GPTQ().round(part, grid, inputs.hessian)
            for part, grid in zip(parts, split.parts, strict=True)
            if len(part) and isinstance(grid, Grid)
        ]
        return (split.store(stored, order),)

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """From bits a weight; large models lose less than the small one that it was measured on."""
        return risk_between(RISES, self.bits_a_weight(shape))

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[MixLLM]:
        """From the safest to the smallest."""
        for fraction in (1.0, 0.5, 0.2, 0.1, 0.0):
            yield cls(large_fraction=fraction)


def _by_width(targets: Sequence[Target]) -> Mapping[tuple[object, ...], list[Target]]:
    """Targets whose rows take the same bytes."""
    found: dict[tuple[object, ...], list[Target]] = defaultdict(list)
    for target in targets:
        found[target.matrices, target.shape[-1], target.dtype].append(target)
    return found
