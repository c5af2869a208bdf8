"""BitStack: each weight a stack of blocks of about one bit, all stacks sorted together, and loaded as far as they fit.

Source:    Wang et al. 2024, "BitStack", arXiv:2410.23918: scaling by activations, iterative absolute value
           decomposition, and sorting of all blocks with stacks of equal height but for one block; details from the
           authors' code.
Differs:   blocks of equal height are sorted by how much of its layer's output energy each wins back for its bytes, in
           one pass block by block; ``sorting.sort_terms_`` sorts a finished folder as the authors do, by the loss of
           the whole model with each block added. The scales lie in the right factors, not in the norms before the
           layers, which gives the same weights.
Saves:     weights, real: n * (O * packed_size(I, 1) + 2 k (O + I)) bytes a matrix with n blocks, and any part of
           them with ``load_compressed(folder, size_bytes=...)``. Compressing decomposes each matrix twice.
Shapes:    weight (O, I); each block: signs (O, I) packed, left (O, k), right (k, I).
Composes:  caches, activations, adapters on the frozen base; not with anything that needs dense weights.
Use when:  the memory that there will be is not known beforehand, or changes: one folder, any size.
Not when:  the size is fixed: a block of one bit more takes away less of the error than a bit more of a grid, so that
           rounding to nearest loses less from 3 bits on, and GPTQ at any size; both multiply faster.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from pintpot.core.errors import CompositionError
from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Source, technique
from pintpot.core.workload import Workload
from pintpot.weights._base import Evidence, Layout, WeightMethod, risk_between
from pintpot.weights.formats import Format, SignRank, Tensors
from pintpot.weights.formats.sign_rank import leading_factors
from pintpot.weights.ranked import RankedLayout
from pintpot.weights.statistics import InputStatistics

if TYPE_CHECKING:
    from pintpot.weights.targets import Target

RISES = ((7.0, 0.068), (5.8, 0.093), (4.7, 0.15), (3.5, 0.35), (2.3, 1.5))
"""Bits a weight and the relative rise of perplexity."""

SMALLEST_SCALE = 1e-3
"""Scale of a channel that is never active, as a share of the mean scale."""

SIGNS_A_FACTOR = 256
"""Numbers in a row for each singular vector of ``options``: the factors then take an eighth of the bytes of the signs,
as 16 vectors do with 4096 numbers."""


@technique(
    name="bitstack",
    wing="weights",
    source=Source(
        "BitStack: Fine-Grained Size Control for Compressed Large Language Models in Variable Memory Environments",
        2024,
        "2410.23918",
    ),
    accounts=[Account.WEIGHTS],
    jobs=["generate", "finetune", "compress"],
    removes=["dense_weights", "matrix_gradients"],
    fidelity="blocks are sorted by their layer's output error unless the folder is sorted by loss afterwards",
)
@dataclass(frozen=True, kw_only=True)
class BitStack(WeightMethod):
    """Residual blocks of signs and a few singular vectors.

    Attributes:
        blocks: in a stack.
        rank: singular vectors of the magnitudes in a block.
    """

    calibrated: ClassVar[bool] = True
    examines: ClassVar[bool] = True
    blocks: int = 16
    rank: int = 16

    def __post_init__(self) -> None:
        if self.blocks < 1 or self.rank < 1:
            raise CompositionError(
                f"bitstack has at least one block and one vector, not {self.blocks} and {self.rank}",
                hint="for instance bitstack(blocks=16, rank=16)",
            )

    def terms(self, name: str, out_features: int, in_features: int, dtype: torch.dtype) -> tuple[Format, ...]:
        """The blocks of one stack."""
        return (SignRank(rank=min(self.rank, out_features, in_features)),) * self.blocks

    def find(
        self, name: str, weight: Tensor, formats: tuple[Format, ...], inputs: InputStatistics | None = None
    ) -> tuple[Tensors, ...]:
        """Each block is the absolute value decomposition of what the blocks before it leave of the scaled weight."""
        stack = [layout for layout in formats if isinstance(layout, SignRank)]
        if len(stack) != len(formats):
            return super().find(name, weight, formats)
        return tuple(tensors for tensors, _ in decompose(weight.float(), stack, input_scale(weight, inputs)))

    def examine(self, name: str, weight: Tensor, inputs: InputStatistics | None) -> dict[str, Tensor]:
        """Shares of the output's energy (of the weight's, where no input was seen) that the blocks win back, (n,)."""
        stack = [SignRank(rank=min(self.rank, *weight.shape))] * self.blocks
        energies = [_energy(weight.float(), inputs)]
        energies += [_energy(rest, inputs) for _, rest in decompose(weight.float(), stack, input_scale(weight, inputs))]
        lost = torch.stack(energies) / energies[0].clamp(min=torch.finfo(torch.float32).tiny)
        return {"won": lost[:-1] - lost[1:]}

    def layout(self, targets: Sequence[Target], evidence: Evidence | None = None) -> Layout:
        """Stacks of equal height, with the order of their blocks where it is known."""
        formats = super().layout(targets)
        if evidence is None:
            return formats
        sizes = {t.parameter: t.nbytes(formats[t.parameter][:1]) for t in targets}
        return RankedLayout(formats, block_order({name: found["won"] for name, found in evidence.items()}, sizes))

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """From bits a weight; large models lose less than the small one that it was measured on."""
        return risk_between(RISES, self.bits_a_weight(shape))

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[BitStack]:
        """From the safest to the smallest."""
        rank = min(16, max(1, shape.config.get_text_config().hidden_size // SIGNS_A_FACTOR))
        for blocks in (8, 6, 5, 4, 3, 2):
            yield cls(blocks=blocks, rank=rank)


def input_scale(weight: Tensor, inputs: InputStatistics | None) -> Tensor:
    """How large each input channel (I,) is, by its root mean square over tokens; of mean one."""
    if inputs is None:
        return torch.ones(weight.shape[-1], device=weight.device)
    size = inputs.hessian.diagonal().clamp(min=0).sqrt()
    mean = size.mean()
    return (size / mean).clamp(min=SMALLEST_SCALE) if mean > 0 else torch.ones_like(size)


def decompose(weight: Tensor, stack: Sequence[SignRank], scale: Tensor) -> Iterator[tuple[Tensors, Tensor]]:
    """The iterative absolute value decomposition of a weight whose columns count as much as ``scale`` says.

    Args:
        weight: float32 (O, I).
        stack: the formats of the blocks.
        scale: (I,), positive. The signs do not know it, and the right factor is divided by it again.

    Yields:
        The stored tensors of each block, and what the blocks so far leave of the weight.
    """
    rest = weight
    for layout in stack:
        left, right = leading_factors((rest * scale).abs(), layout.rank)
        tensors = layout.store(rest, left, right / scale)
        rest = rest - layout.decode(tensors, weight.shape[-1], torch.float32)
        yield tensors, rest


def block_order(won: Mapping[str, Tensor], sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The parameters in the order in which a block more of each is worth its bytes.

    No stack is higher than another by more than one block; among blocks of one height those come first that win the
    most for a byte.

    Args:
        won: by parameter, what each of its blocks wins, (n,).
        sizes: bytes of a block of each.
    """
    heights = max((len(found) for found in won.values()), default=0)
    order: list[str] = []
    for height in range(1, heights):
        order += sorted(won, key=lambda name: -float(won[name][height]) / sizes[name])
    return tuple(order)


def _energy(weight: Tensor, inputs: InputStatistics | None) -> Tensor:
    """What a weight (O, I) adds to the square of its layer's output, over all tokens."""
    return weight.square().sum() if inputs is None else inputs.error(weight).sum()
