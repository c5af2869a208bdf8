"""SVDQuant: move outliers from inputs to weights, let a low-rank branch of 16 bits take them there, round the rest.

Source:    Li et al. 2024, "SVDQuant", arXiv:2411.05007: smoothing by input channel, the leading singular vectors of the
           smoothed weight in 16 bits, weight residual and inputs in 4-bit groups, and the branch found again for what
           rounding leaves, as long as that helps.
Differs:   the smoothing is chosen by the expected output error (second moments of the inputs, and rounding noise of the
           inputs as large as their root mean squares make it) instead of the outputs on samples; each layer has scales
           of its own; the rank is at most a sixteenth of a matrix's smaller side, which binds below 512. No fused
           kernels: the branches are multiplied one after the other, and inputs are rounded but multiplied as floats, so
           nothing is gained in time.
Saves:     weights, real: rtn's bytes without zeros in groups of 64, 2 R (O + I) for the branch and 2 I for the scales.
           Activations are rounded, not stored in 4 bits. Finding them needs one block, 4 I^2 bytes a layer, and
           singular vectors of one matrix.
Shapes:    weight (O, I); factors (O, R) and (R, I); codes (O, I) packed; scale (O, N); input scales (I,).
Composes:  caches, activations, adapters on the frozen base; not with anything that needs dense weights.
Use when:  hardware multiplies integers of 4 bits, and inputs have channels far larger than the others.
Not when:  inputs can stay in 16 bits: gptq and awq then lose less in fewer bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from pintpot.core.errors import ShapeError
from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Claim, Source, technique
from pintpot.core.workload import Workload
from pintpot.weights._base import WeightMethod, risk_between
from pintpot.weights.factorised import leading_factors
from pintpot.weights.formats import Dense, Format, Grid, LowRank, RoundedInput, Scaled, Tensors
from pintpot.weights.statistics import InputStatistics

RISES = ((9.8, 0.0002), (7.8, 0.005), (6.8, 0.012), (5.8, 0.053), (4.8, 0.51))
"""Bits a weight and the relative rise of perplexity, of the embedded model in `results/weights.csv`."""

SMALLEST_SHARE = 16
"""The rank is at most the smaller side divided by this."""

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""The exponents of the inputs' size in the smoothing that are tried; one minus it is that of the weights."""

PEAK = 1.44
"""The largest of a group of normal numbers, over the 8-norm of their standard deviations, by root mean square."""


@technique(
    name="svdquant",
    wing="weights",
    source=Source(
        "SVDQuant: Absorbing Outliers by Low-Rank Components for 4-Bit Diffusion Models", 2024, arxiv="2411.05007"
    ),
    accounts=[Account.WEIGHTS],
    jobs=["generate", "finetune", "compress"],
    removes=["dense_weights", "matrix_gradients"],
    claims=[
        Claim("memory, times less", 3.5, versus="16 bits", at="FLUX.1, 12 billion parameters", where="abstract"),
        Claim("speed-up", 3.0, versus="4-bit weights alone", at="FLUX.1 on a laptop 4090", where="abstract"),
    ],
    fidelity="smoothing by expected instead of sampled output error; no fused kernels",
)
@dataclass(frozen=True, kw_only=True)
class SVDQuant(WeightMethod):
    """A low-rank branch beside few bits for weights and inputs.

    Attributes:
        bits: of a weight's code and of an input, 2 to 8.
        group_size: in-features that share a scale, in the weight and in the input.
        rank: of the branch.
        iterations: how often at most the branch is found again for what rounding leaves.
    """

    calibrated: ClassVar[bool] = True
    bits: int = 4
    group_size: int = 64
    rank: int = 32
    iterations: int = 10

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8 or self.rank < 1:
            raise ShapeError(
                f"svdquant has 2 to 8 bits and a rank of 1 or more, not {self.bits} and {self.rank}",
                hint="for instance svdquant(bits=4, rank=32)",
            )
        Grid(bits=self.bits, group_size=self.group_size)

    def terms(self, name: str, out_features: int, in_features: int, dtype: torch.dtype) -> tuple[Format, ...]:
        """The branch, whose input is as it comes, and a grid of the scaled weight, whose input is rounded."""
        scale = "bfloat16" if dtype is torch.bfloat16 else "float16"
        rank = max(1, min(self.rank, min(out_features, in_features) // SMALLEST_SHARE))
        grid = Grid(bits=self.bits, group_size=self.group_size, symmetric=True, scale_dtype=scale)
        rounded = RoundedInput(inner=grid, bits=self.bits, group_size=self.group_size)
        branch = LowRank(rank=rank, factor=Dense(dtype=getattr(torch, scale)))
        return (branch, Scaled(inner=rounded, scale_dtype=scale))

    def find(
        self, name: str, weight: Tensor, formats: tuple[Format, ...], inputs: InputStatistics | None = None
    ) -> tuple[Tensors, ...]:
        """The smoothing with the least error, and then branch and grid in turn; without smoothing for unseen inputs."""
        branch, scaled = formats
        if inputs is None or not isinstance(branch, LowRank) or not isinstance(scaled, Scaled):
            return super().find(name, weight, formats)
        dense = weight.float()
        smooth = [torch.ones_like(inputs.largest), *(smoothing(dense, inputs, share) for share in SHARES)]
        found = [split(dense, torch.zeros_like(dense), scale, branch, scaled) for scale in smooth]
        errors = [self.error(dense, terms, branch, scaled, inputs) for terms in found]
        least = min(errors)
        best, scale = found[errors.index(least)], smooth[errors.index(least)]
        for _ in range(self.iterations):
            rounded = scaled.decode(best[1], dense.shape[1], torch.float32)
            terms = split(dense, rounded, scale, branch, scaled)
            error = self.error(dense, terms, branch, scaled, inputs)
            if error >= least:
                break
            best, least = terms, error
        return best

    def error(
        self, weight: Tensor, terms: tuple[Tensors, ...], branch: LowRank, scaled: Scaled, inputs: InputStatistics
    ) -> float:
        """The expected squared error of the outputs: of the weights, and of inputs that are rounded in groups."""
        columns = weight.shape[1]
        rounded = scaled.decode(terms[1], columns, torch.float32)
        wrong = inputs.error(weight - branch.decode(terms[0], columns, torch.float32) - rounded).sum()
        scale = terms[1]["input_scale"].float()
        size = columns if self.group_size == -1 else min(self.group_size, columns)
        spread = functional.pad(inputs.hessian.diagonal().sqrt() * scale, (0, -columns % size)).unflatten(0, (-1, size))
        step = PEAK * spread.norm(p=8, dim=1) / ((1 << (self.bits - 1)) - 1)
        # A number rounded to a multiple of a step is wrong by a twelfth of the step squared on average.
        noise = ((rounded / scale).square().sum(0) * step.square().repeat_interleave(size)[:columns] / 12).sum()
        return float(wrong + noise)

    def finding_bytes(self, out_features: int, in_features: int, dtype: torch.dtype) -> int:
        """Five decompositions to choose from, and the temporaries of the next."""
        return 48 * out_features * in_features

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """From bits a weight; large models lose less than the small one that it was measured on."""
        return risk_between(RISES, self.bits_a_weight(shape))

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[SVDQuant]:
        """From the safest to the smallest."""
        for bits in (8, 6, 5, 4):
            yield cls(bits=bits)


def smoothing(weight: Tensor, inputs: InputStatistics, share: float) -> Tensor:
    """By what each input channel (I,) is divided and its weights are multiplied, for a share between the two sizes."""
    own = weight.abs().amax(0).clamp(min=1e-5).pow(1 - share)
    scale = (inputs.largest.pow(share) / own).clamp(min=1e-4)
    return scale / (scale.max() * scale.min()).sqrt()


def split(weight: Tensor, rounded: Tensor, smooth: Tensor, branch: LowRank, scaled: Scaled) -> tuple[Tensors, Tensors]:
    """A branch for what ``rounded`` leaves of a weight (O, I), and a grid for what the branch leaves.

    Both are found for smoothed weights; the branch is stored for inputs as they come.
    """
    left, right = leading_factors((weight - rounded) * smooth, branch.rank)
    low = branch.encode_factors(left, right / smooth)
    rest = weight - branch.decode(low, weight.shape[1], torch.float32)
    return low, scaled.encode_with(rest, 1 / smooth)
