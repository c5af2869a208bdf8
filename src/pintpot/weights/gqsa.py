"""GQSA: cut whole groups of a row, keep the others in four bits, and tune what is left block by block.

Source:    Zeng et al. 2024, "GQSA", arXiv:2412.17560: groups of 16 in-features are pruned by their mean Hessian
           saliency, the others quantised with a scale and a zero each; then weights, scales and zeros are tuned on each
           block's output (its first stage).
Differs:   later columns make up for what is cut and rounded before a block is tuned, as in SparseGPT and GPTQ, because
           tuning begins at the rounded weights: the dense ones are gone by then. The second stage, which tunes scales
           and zeros end to end on the loss, is left out. A bitmap of groups instead of the indices of a
           block-compressed-row matrix; no kernel with its own division of work on a GPU. Rates and epochs of the tuning
           are ours.
Saves:     weights, real: with n groups of G kept in a matrix, O * packed_size(I / G, 1) bytes for the bitmap and
           n * (packed_size(G, bits) + 2.5): 2.7 bits a weight at 4 bits, G = 16 and half of the groups. Finding them
           needs one block, its inputs' second moments (4 I^2 bytes a layer), and in tuning 16 bytes a kept number.
Shapes:    weight (O, I); bitmap (O, packed_size(I / G, 1)); codes (n / w, w G) packed; scale and zero (n / w, w).
Composes:  caches, activations, adapters on the frozen base; not with anything that needs dense weights.
Use when:  fewer than three bits a weight, on hardware that gains from skipping groups.
Not when:  memory alone counts and three bits are allowed: there a full grid with compensation loses less.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from pintpot.core.errors import CompositionError
from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Claim, Source, technique
from pintpot.core.workload import Workload
from pintpot.kernels import unpack
from pintpot.weights._base import WeightMethod, risk_between
from pintpot.weights.compensation import compensate_, inverse_factor
from pintpot.weights.formats import Format, Grid, Sparse, Tensors
from pintpot.weights.formats._base import prefixed
from pintpot.weights.formats.grid import SCALE_DTYPES
from pintpot.weights.pruning import inverse_hessian_score
from pintpot.weights.statistics import BlockCall, InputStatistics
from pintpot.weights.trained import round_through
from pintpot.weights.tuning import Opening, Tuning, tune_block_

RISES = ((0.8, 0.11), (0.7, 0.28), (0.6, 0.71), (0.5, 1.67), (0.4, 3.99))
"""Share of the groups that is kept, at 4 bits, and the relative rise of perplexity on the embedded model
(`results/weights.csv`). More bits hardly help."""
NARROWER = {3: 1.4, 2: 3.7, 1: 130.0}
"""By what factor the rise is larger at fewer bits, for half of the groups."""


@technique(
    name="gqsa",
    wing="weights",
    source=Source(
        "GQSA: Group Quantization and Sparsity for Accelerating Large Language Model Inference", 2024, "2412.17560"
    ),
    accounts=[Account.WEIGHTS],
    jobs=["generate", "finetune", "compress"],
    removes=["dense_weights", "matrix_gradients"],
    claims=[
        Claim("speed-up of inference", 1.26, versus="2-bit weights", at="4 bits, half of the groups", where="abstract"),
        Claim("speed-up of inference", 2.35, versus="2:4 pruning", at="4 bits, half of the groups", where="abstract"),
    ],
    fidelity="tuned block by block from the rounded weights; not end to end; a bitmap of groups, no GPU kernel",
)
@dataclass(frozen=True, kw_only=True)
class GQSA(WeightMethod):
    """Groups of a row, kept or cut, on a grid each.

    Attributes:
        kept_fraction: share of a matrix's groups that is kept.
        bits: of a kept number.
        group_size: in-features of a group; smaller where it does not divide them.
        damping: share of the mean diagonal of H that is added to it.
        epochs: passes over the texts in tuning a block; 0 for none.
        learning_rate: of tuning.
    """

    calibrated: ClassVar[bool] = True
    refines: ClassVar[bool] = True
    drops: ClassVar[bool] = True
    kept_fraction: float = 0.5
    bits: int = 4
    group_size: int = 16
    damping: float = 0.01
    epochs: int = 5
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        Sparse(kept_fraction=self.kept_fraction, block_columns=self.group_size, values=Grid(bits=self.bits))
        if self.epochs < 0:
            raise CompositionError(f"gqsa tunes in 0 epochs or more, not {self.epochs}", hint="the default is epochs=5")

    def terms(self, name: str, out_features: int, in_features: int, dtype: torch.dtype) -> tuple[Format, ...]:
        """Groups of in-features, as many as the best of the matrix, each on a grid of its own."""
        scale = "bfloat16" if dtype is torch.bfloat16 else "float16"
        group = math.gcd(in_features, self.group_size)
        grid = Grid(bits=self.bits, group_size=group, scale_dtype=scale)
        return (Sparse(kept_fraction=self.kept_fraction, block_columns=group, balanced=False, values=grid),)

    def find(
        self, name: str, weight: Tensor, formats: tuple[Format, ...], inputs: InputStatistics | None = None
    ) -> tuple[Tensors, ...]:
        """The groups of the largest mean saliency; by magnitude where nothing is known of the inputs."""
        layout = formats[0]
        if inputs is None or not isinstance(layout, Sparse):
            return super().find(name, weight, formats)
        dense = weight.float()
        score = inverse_hessian_score(dense, inputs.hessian, self.damping)
        mask = layout.choose(layout.blocks(score).mean(-1))
        grid = layout.values
        if not isinstance(grid, Grid) or layout.block_rows > 1 or grid.group(layout.block) != layout.block:
            return (layout.encode_with(dense, mask),)
        return (self.round(dense, layout, mask, inputs.hessian),)

    def round(self, weight: Tensor, layout: Sparse, mask: Tensor, hessian: Tensor) -> Tensors:
        """Cut and round column by column; each error is made up for by the columns after it.

        Args:
            weight: float32 (O, I); not changed.
            layout: groups of a row, each on a grid of its own.
            mask: bool (O, I / G), the groups that are kept.
            hessian: second moments (I, I) of the inputs.
        """
        grid, current = _layout((layout,))[1], weight.clone()
        codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
        scale, zero = (torch.empty(mask.shape, device=weight.device) for _ in range(2))

        def round_columns(own: slice, numbers: Tensor) -> Tensor:
            group, first = divmod(own.start, layout.block)
            at = slice(group, group + 1)
            if not first:
                # The group's numbers as the errors before it have left them.
                scale[:, at], zero[:, at] = grid.fit(current[:, own.start : own.start + layout.block])
            codes[:, own] = code = grid.round(numbers, scale[:, at], zero[:, at])
            return grid.value(code, scale[:, at], zero[:, at]) * mask[:, at]

        compensate_(current, inverse_factor(hessian, self.damping), round_columns, block=8 * layout.block)
        held, steps, zeros = (
            layout.gather(part, mask) for part in (layout.blocks(codes), scale[..., None], zero[..., None])
        )
        return layout.store(grid.store(held, steps, zeros), mask)

    def refine_block_(self, block: nn.Module, calls: Sequence[BlockCall], outputs: Sequence[Tensor]) -> None:
        """Tune kept numbers, scales and zeros on the block's output."""
        if self.epochs:
            tuning = Tuning(
                learning_rate=self.learning_rate, epochs=self.epochs, eps=1e-8, weight_decay=0.0, norms=False
            )
            tune_block_(block, calls, outputs, _rebuild, tuning, Opening(_open, _close))

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """From what is kept, and its bits; large models lose less than the small one that it was measured on."""
        return risk_between(RISES, self.kept_fraction) * NARROWER.get(self.bits, 1.0)

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[GQSA]:
        """From the safest to the smallest."""
        for kept in (0.8, 0.7, 0.6, 0.5, 0.4):
            yield cls(kept_fraction=kept)


def _layout(formats: tuple[Format, ...]) -> tuple[Sparse, Grid]:
    layout = formats[0]
    assert isinstance(layout, Sparse)
    assert isinstance(layout.values, Grid)
    return layout, layout.values


def _open(formats: tuple[Format, ...], terms: Sequence[Tensors]) -> list[Tensors]:
    """The kept numbers (..., n / w, w G) in the codes' place, and scales and zeros (..., n / w, w) as they are."""
    layout, grid = _layout(formats)
    scale = terms[0]["values_scale"].float()
    codes = unpack(terms[0]["values_packed"], grid.bits, scale.shape[-1] * layout.block)
    zero = unpack(terms[0]["values_zero"], grid.bits, scale.shape[-1]).float()
    return [{"values_packed": grid.value(codes, scale, zero), "values_scale": scale.clone(), "values_zero": zero}]


def _codes(grid: Grid, tensors: Tensors) -> tuple[Tensor, Tensor]:
    """Codes and zeros, rounded, with the gradient passed through the rounding but not past the grid's ends."""
    numbers, top = tensors["values_packed"], (1 << grid.bits) - 1
    zero = round_through(tensors["values_zero"]).clamp(0, top)
    steps = round_through(numbers / grid.by_column(tensors["values_scale"], numbers.shape[-1]))
    return (steps + grid.by_column(zero, numbers.shape[-1])).clamp(0, top), zero


def _close(formats: tuple[Format, ...], terms: Sequence[Tensors]) -> list[Tensors]:
    grid = _layout(formats)[1]
    # Scales are stored in 16 bits, and codes are those for the stored ones.
    scale = terms[0]["values_scale"].to(SCALE_DTYPES[grid.scale_dtype]).float()
    codes, zero = _codes(grid, {**terms[0], "values_scale": scale})
    return [prefixed("values_", grid.store(codes.to(torch.uint8), scale, zero))]


def _rebuild(formats: tuple[Format, ...], terms: Sequence[Tensors], in_features: int) -> Tensor:
    layout, grid = _layout(formats)
    codes, zero = _codes(grid, terms[0])
    columns = codes.shape[-1]
    numbers = (codes - grid.by_column(zero, columns)) * grid.by_column(terms[0]["values_scale"], columns)
    mask = unpack(terms[0]["bitmap"], 1, in_features // layout.block).bool()
    blocks = numbers.new_zeros((*mask.shape, layout.block))
    return layout.weight(blocks.masked_scatter(mask[..., None], numbers))
