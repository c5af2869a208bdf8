"""LPViT: cut blocks of a vision transformer's weights where that costs little and saves much power.

Source:    Xu et al. 2024, "LPViT", arXiv:2407.02068, and the authors' code: blocks ranked and layers' shares chosen by
           a second-order Taylor approximation of the distortion, with a power term that counts the kept blocks times
           the inputs that they read, balanced against the distortion by their steepest slopes.
Differs:   distortion is that of each layer's own output, by the second moments of its inputs and relative to its
           energy; the authors take the network's output by gradients. All matrices of one kind of block together keep
           what they would with equal shares, so that the bytes are known before. Later columns make up for what is
           cut, in place of the fine-tuning that follows in the paper.
Saves:     weights, real: with n blocks of b numbers kept, 2 n b bytes and a bit a block. Pruning needs one block of the
           model, and 4 I^2 bytes a layer for the inputs' second moments.
Shapes:    weight (O, I) in R x C blocks; bitmap (R, packed_size(C, 1)); values (n, b).
Composes:  nothing that needs dense weights. Any model of linear layers, not only vision transformers.
Use when:  the hardware multiplies blocks, and power counts.
Not when:  memory alone counts: a grid of equal size keeps all numbers and loses far less.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from pintpot.core.errors import CompositionError
from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Claim, Source, technique
from pintpot.core.workload import Workload
from pintpot.weights._base import Evidence, Layout, WeightMethod, risk_between
from pintpot.weights.formats import Dense, Format, Sparse, Tensors
from pintpot.weights.formats.sparse import RUN
from pintpot.weights.pruning import cut_with_compensation
from pintpot.weights.statistics import InputStatistics

if TYPE_CHECKING:
    from pintpot.weights.targets import Target

RISES = ((0.9, 0.1), (0.8, 0.35), (0.7, 1.3), (0.6, 4.6), (0.5, 12.0))
"""Share of the blocks that is kept, and the relative rise of perplexity."""

INPUTS_AT_ONCE = 16
"""Inputs that the authors' power model counts as one read."""


@technique(
    name="lpvit",
    wing="weights",
    source=Source("LPViT: Low-Power Semi-structured Pruning for Vision Transformers", 2024, "2407.02068"),
    accounts=[Account.WEIGHTS],
    jobs=["generate", "finetune", "compress"],
    removes=["dense_weights", "matrix_gradients"],
    claims=[
        Claim("speed-up", 3.93, versus="dense weights", at="DeiT-B, dedicated hardware, at most", where="abstract"),
        Claim("speed-up", 1.79, versus="dense weights", at="DeiT-B, GPU, at most", where="abstract"),
        Claim("power of inference", 1.4, versus="dense weights, times less", at="GPU", where="abstract"),
    ],
    fidelity="distortion of each layer's own output instead of the network's; compensated instead of fine-tuned",
)
@dataclass(frozen=True, kw_only=True)
class LPViT(WeightMethod):
    """Blocks, kept or cut, with a share of its own for each matrix.

    Attributes:
        kept_fraction: share of all blocks that is kept.
        block_rows: out-features of a block; fewer where they do not divide a weight's.
        block_columns: in-features of a block; fewer where they do not divide a weight's.
        power: weight of the power term; at 1 its steepest slopes count as much as the distortion's.
        least_kept: share of each matrix that is kept at least.
        damping: share of the mean diagonal of H that is added to it.
    """

    calibrated: ClassVar[bool] = True
    examines: ClassVar[bool] = True
    drops: ClassVar[bool] = True
    same_at_every_depth: ClassVar[bool] = False
    kept_fraction: float = 0.5
    block_rows: int = 32
    block_columns: int = 32
    power: float = 1.0
    least_kept: float = 0.05
    damping: float = 0.01

    def __post_init__(self) -> None:
        Sparse(kept_fraction=self.kept_fraction, block_rows=self.block_rows, block_columns=self.block_columns)
        if self.power < 0 or not 0 <= self.least_kept <= 1:
            raise CompositionError(
                f"lpvit cannot weigh power by {self.power} and keep {self.least_kept} of each matrix",
                hint="the defaults are power=1.0, least_kept=0.05",
            )

    def terms(self, name: str, out_features: int, in_features: int, dtype: torch.dtype) -> tuple[Format, ...]:
        """The best blocks of the matrix, in 16 bits."""
        return (
            Sparse(
                kept_fraction=self.kept_fraction,
                block_rows=math.gcd(out_features, self.block_rows),
                block_columns=math.gcd(in_features, self.block_columns),
                balanced=False,
                values=Dense(dtype=torch.bfloat16 if dtype is torch.bfloat16 else torch.float16),
            ),
        )

    def examine(self, name: str, weight: Tensor, inputs: InputStatistics | None) -> dict[str, Tensor]:
        """What cutting each block costs, as a share of what cutting all would."""
        rows, columns = weight.shape
        layout = self.terms(name, rows, columns, weight.dtype)[0]
        assert isinstance(layout, Sparse)
        cost = block_cost(weight.float(), layout, None if inputs is None else inputs.hessian)
        return {"cost": cost.flatten() / cost.sum().clamp(min=torch.finfo(torch.float32).tiny)}

    def layout(self, targets: Sequence[Target], evidence: Evidence | None = None) -> Layout:
        """Shares by cost and power; equal ones where nothing was examined, or where blocks are small."""
        found = {t.parameter: self.terms(t.parameter, t.shape[-2], t.shape[-1], t.dtype) for t in targets}
        if evidence is None:
            return found
        for rivals in _by_block(targets, found).values():
            costs = {t.parameter: _sorted_cost(evidence[t.parameter]["cost"], t.matrices) for t in rivals}
            reads = {t.parameter: t.shape[-1] / INPUTS_AT_ONCE for t in rivals}
            for name, count in self.share(costs, reads).items():
                equal = found[name][0]
                assert isinstance(equal, Sparse)
                found[name] = (replace(equal, kept_fraction=count / len(costs[name])),)
        return found

    def share(self, costs: Mapping[str, Tensor], reads: Mapping[str, float]) -> dict[str, int]:
        """How many blocks each matrix keeps, as many in all as with equal shares.

        Args:
            costs: of cutting each block, by the matrix's name, from the costliest on.
            reads: of a kept block of each matrix, in the power model's unit.
        """
        uniform = Sparse(kept_fraction=self.kept_fraction)
        total = sum(uniform.kept(len(cost)) for cost in costs.values())
        # What brings the steepest slopes of both to one height, as the authors' code does.
        steepest = sum(float(cost[0]) for cost in costs.values()) / sum(reads.values())
        worth = []
        for name, cost in costs.items():
            own = cost - self.power * steepest * reads[name]
            sure = min(uniform.kept(len(cost)), max(1, math.ceil(self.least_kept * len(cost))))
            own[:sure] = torch.inf
            worth.append(own)
        chosen = torch.zeros(sum(map(len, worth)), dtype=torch.bool)
        chosen[torch.cat(worth).argsort(descending=True, stable=True)[:total]] = True
        parts = chosen.split([len(own) for own in worth])
        return {name: int(part.sum()) for name, part in zip(costs, parts, strict=True)}

    def find(
        self, name: str, weight: Tensor, formats: tuple[Format, ...], inputs: InputStatistics | None = None
    ) -> tuple[Tensors, ...]:
        """The costliest blocks; those of the largest norm where nothing is known of the inputs."""
        layout = formats[0]
        if inputs is None or not isinstance(layout, Sparse):
            return super().find(name, weight, formats)
        dense = weight.float()
        mask = layout.choose(block_cost(dense, layout, inputs.hessian))
        kept = layout.weight(mask[..., None].expand(-1, -1, layout.block))
        return (layout.encode_with(cut_with_compensation(dense, kept, inputs.hessian, self.damping), mask),)

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """From what is kept; large models lose less than the small one that it was measured on."""
        return risk_between(RISES, self.kept_fraction)

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[LPViT]:
        """From the safest to the smallest."""
        for kept in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4):
            yield cls(kept_fraction=kept)


def block_cost(weight: Tensor, layout: Sparse, hessian: Tensor | None) -> Tensor:
    """The mean squared change of the output from cutting each block alone, its second-order Taylor term.

    Args:
        weight: float32 (O, I).
        layout: of the blocks.
        hessian: second moments (I, I) of the inputs; None for uncorrelated ones of equal size.

    Returns:
        float32 (R, C).
    """
    if hessian is None:
        return layout.blocks(weight.square()).sum(-1)
    wide = layout.block_columns
    columns = []
    for start in range(0, weight.shape[1], wide):
        part, own = weight[:, start : start + wide], slice(start, start + wide)
        columns.append(((part @ hessian[own, own]) * part).sum(1))
    return torch.stack(columns, 1).unflatten(0, (-1, layout.block_rows)).sum(1)


def _sorted_cost(cost: Tensor, matrices: int) -> Tensor:
    """From the costliest block on; of a stack the mean of as many blocks as it has matrices."""
    return cost.sort(descending=True).values.view(-1, matrices).mean(1)


def _by_block(targets: Sequence[Target], formats: Layout) -> Mapping[tuple[object, ...], list[Target]]:
    """Targets whose blocks take the same bytes, one block in a row of what is stored."""
    found: dict[tuple[object, ...], list[Target]] = defaultdict(list)
    for target in targets:
        layout = formats[target.parameter][0]
        if isinstance(layout, Sparse) and layout.block >= RUN:
            found[layout.block_rows, layout.block_columns, layout.values, target.matrices].append(target)
    return found
