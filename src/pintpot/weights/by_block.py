"""Two widths of codes, chosen block by block: the blocks that some score says need it get the larger one."""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pintpot.core.errors import CompositionError
from pintpot.weights._base import Evidence, Layout, Texts, WeightMethod
from pintpot.weights.formats import Format, Grid, Tensors
from pintpot.weights.gptq import GPTQ
from pintpot.weights.statistics import InputStatistics
from pintpot.weights.targets import Target


@dataclass(frozen=True, kw_only=True)
class ByBlock(WeightMethod):
    """A method that gives every matrix of a block the same width, one of two; codes are found by GPTQ.

    Blocks compete with those of the same shapes (an encoder's not with a decoder's), so that bytes follow from shapes.

    Attributes:
        large_bits: width of the codes in the blocks with the highest scores.
        small_bits: in the others.
        large_fraction: share of the blocks that get the large width.
        group_size: in-features that share a scale; -1 for a whole row.
    """

    calibrated: ClassVar[bool] = True
    examines: ClassVar[bool] = True
    looks_at_whole: ClassVar[bool] = True
    same_at_every_depth: ClassVar[bool] = False
    large_bits: int = 4
    small_bits: int = 2
    large_fraction: float = 0.5
    group_size: int = 128

    def __post_init__(self) -> None:
        for bits in (self.large_bits, self.small_bits):
            Grid(bits=bits, group_size=self.group_size)
        if not 0 <= self.large_fraction <= 1:
            raise CompositionError(
                f"{self.large_fraction} is no share of the blocks", hint="large_fraction is from 0 to 1"
            )

    @abstractmethod
    def scores(self, model: PreTrainedModel, blocks: Mapping[str, Sequence[Target]], texts: Texts) -> dict[str, float]:
        """How much each block needs the large width.

        Args:
            model: dense, all in memory; must be left as it was.
            blocks: the parameters that are replaced, by their block.
            texts: what the model reads.
        """

    def examine_model(self, model: PreTrainedModel, targets: Sequence[Target], texts: Texts) -> Evidence:
        """Each parameter's block's score."""
        scores = self.scores(model, by_block(targets), texts)
        return {t.parameter: {"score": torch.tensor(scores[t.block], dtype=torch.float64)} for t in targets}

    def terms(self, name: str, out_features: int, in_features: int, dtype: torch.dtype) -> tuple[Format, ...]:
        """A grid of the large width."""
        return self._grid(self.large_bits, dtype)

    def _grid(self, bits: int, dtype: torch.dtype) -> tuple[Format, ...]:
        scale = "bfloat16" if dtype is torch.bfloat16 else "float16"
        return (Grid(bits=bits, group_size=self.group_size, scale_dtype=scale),)

    def layout(self, targets: Sequence[Target], evidence: Evidence | None = None) -> Layout:
        """The large width for the blocks of the highest scores; for the first ones where nothing was examined."""
        kinds: dict[tuple[object, ...], list[str]] = defaultdict(list)
        blocks = by_block(targets)
        for block, own in blocks.items():
            kinds[tuple((t.shape, t.dtype) for t in own)].append(block)
        large: set[str] = set()
        for rivals in kinds.values():
            count = round(self.large_fraction * len(rivals))
            if evidence is not None:
                rivals.sort(key=lambda block: float(evidence[blocks[block][0].parameter]["score"]), reverse=True)
            large.update(rivals[:count])
        bits = {block: self.large_bits if block in large else self.small_bits for block in blocks}
        return {t.parameter: self._grid(bits[t.block], t.dtype) for t in targets}

    def find(
        self, name: str, weight: Tensor, formats: tuple[Format, ...], inputs: InputStatistics | None = None
    ) -> tuple[Tensors, ...]:
        """The codes by GPTQ."""
        return GPTQ().find(name, weight, formats, inputs)


def by_block(targets: Sequence[Target]) -> dict[str, list[Target]]:
    """The targets of each block, in their order."""
    found: dict[str, list[Target]] = defaultdict(list)
    for target in targets:
        found[target.block].append(target)
    return dict(found)
