"""BLaST: grow sparse while training, cutting the weakest blocks and letting those back that the gradient asks for.

Source:    Okanovic et al. 2025, "BLaST", arXiv:2507.03117: blocked prune and grow. At every step of the pattern the
           blocks of the largest weight norms are kept, and those of the largest gradient norms beside them begin again
           from zero; the share that is cut rises with the cube of the training that is left.
Differs:   training multiplies by a dense weight with zeros in it; what is stored afterwards is sparse. Only layers
           outside attention, as in the paper; blocks are smaller where they do not divide a weight. How often the
           pattern is made anew, and the share of the training after which it stands, are ours.
Saves:     weights, real, after training: with n blocks of b x b kept, n b^2 numbers of 16 bits and O I / b^2 / 8 bytes.
           Training takes the dense model's memory, a bit a block, and the norms of the last gradient's blocks.
Shapes:    weight (O, I); bitmap (O / b, packed_size(I / b, 1)); values (n, b^2).
Composes:  caches, activations; any loss and optimizer of the compress job.
Use when:  the model is trained anyhow, and most of its feed-forward layers are to go, block by block.
Not when:  there is no training: cut in one go, nine tenths of the blocks take the model with them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from pintpot.core.errors import CompositionError
from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Claim, Source, technique
from pintpot.core.workload import Workload
from pintpot.weights._base import Evidence, Layout, risk_between
from pintpot.weights.formats import Dense, Format, Sparse, Tensors
from pintpot.weights.formats.selection import largest
from pintpot.weights.statistics import InputStatistics
from pintpot.weights.trained import StandIn, TrainedMethod

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pintpot.weights.targets import Target

RISES = ((0.5, 0.65), (0.3, 1.58))
"""Share of the blocks that is kept, and the relative rise of perplexity of the embedded model after 300 steps of
training, in `results/weights.csv`."""


class GrowingSparse(StandIn):
    """A dense weight with blocks at zero, and the pattern of those that are not.

    Args:
        weight: float (O, I).
        layout: how it will be stored.
        settled: share of the training after which nothing grows back.
        every: updates after which the pattern is made anew.
    """

    mask: Tensor
    updates: Tensor

    def __init__(self, weight: Tensor, layout: Sparse, settled: float, every: int) -> None:
        super().__init__()
        self.layout, self.settled, self.every = layout, settled, every
        # A buffer, so that a run that goes on from a checkpoint counts on.
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.dense = nn.Parameter(weight.detach().clone())
        rows, columns = layout.grid(*weight.shape)
        self.register_buffer("mask", torch.ones((rows, columns), dtype=torch.bool, device=weight.device))
        self.wanted: Tensor | None = None

    def weight(self) -> Tensor:
        """The numbers (O, I), zero where blocks are cut; remembers the norms of the gradient's blocks."""
        kept = self.layout.weight(self.mask[..., None].expand(-1, -1, self.layout.block))
        cut = self.dense * kept
        if cut.requires_grad:
            cut.register_hook(self._see)
        return cut

    def _see(self, gradient: Tensor) -> None:
        """The gradient of all blocks, also of those that are zero now."""
        self.wanted = self.norms(gradient)

    def norms(self, numbers: Tensor) -> Tensor:
        """Squared norms of the blocks (R, C)."""
        return self.layout.blocks(numbers.detach().float()).square().sum(-1)

    @torch.no_grad()
    def follow_(self, progress: float) -> None:
        """Make the pattern anew when it is due, and when the last blocks have gone for good."""
        self.updates += 1
        settled = progress >= self.settled
        if settled and int(self.mask.sum()) > self.layout.kept(self.mask.numel()):
            self.prune_and_grow_(1.0)
        elif not settled and int(self.updates) % self.every == 0:
            self.prune_and_grow_(progress / self.settled)

    def prune_and_grow_(self, progress: float) -> None:
        """Keep the strongest blocks, and beside them from zero those with the strongest gradient.

        Args:
            progress: share that is done of the time in which the pattern changes; at 1 nothing grows.
        """
        total = self.mask.numel()
        cut = (1 - self.layout.kept(total) / total) * (1 - (1 - progress) ** 3)
        kept = max(1, round(total * (1 - cut)))
        strong = _best(self.norms(self.dense) * self.mask, kept)
        # What is cut, and what begins again, is zero.
        self.dense.mul_(self.layout.weight(strong[..., None].expand(-1, -1, self.layout.block)))
        grown = _best(self.wanted, kept) if self.wanted is not None and progress < 1 else strong
        self.mask.copy_(strong | grown)

    def terms(self, formats: tuple[Format, ...]) -> tuple[Tensors, ...]:
        """The strongest blocks, as many as the layout keeps."""
        return (self.layout.encode_with(self.weight().detach(), self.layout.choose(self.norms(self.weight()))),)


@technique(
    name="blast",
    wing="weights",
    source=Source(
        "BLaST: High Performance Inference and Pretraining using BLock Sparse Transformers", 2025, "2507.03117"
    ),
    accounts=[Account.WEIGHTS],
    jobs=["compress"],
    removes=["dense_weights", "matrix_gradients"],
    claims=[
        Claim(
            "inference memory", 3.12, versus="dense weights, times less", at="95 % of MLP blocks cut", where="abstract"
        ),
        Claim("speed-up of inference", 1.6, versus="dense weights", at="the same", where="abstract"),
    ],
    fidelity="trained as a dense weight with zero blocks; sparse in storage and in products afterwards",
)
@dataclass(frozen=True, kw_only=True)
class BLaST(TrainedMethod):
    """Blocks that are cut and grown in training.

    Attributes:
        kept_fraction: share of the blocks that is left in the end.
        block_size: side of a block; smaller where it does not divide a weight.
        settled: share of the training after which the pattern stands.
        every: updates after which the pattern is made anew.
    """

    drops: ClassVar[bool] = True
    kept_fraction: float = 0.2
    block_size: int = 32
    settled: float = 0.8
    every: int = 10

    def __post_init__(self) -> None:
        Sparse(kept_fraction=self.kept_fraction, block_rows=self.block_size)
        if not 0 < self.settled <= 1 or self.every < 1:
            raise CompositionError(
                f"blast cannot settle at {self.settled} of the training, every {self.every} updates",
                hint="the defaults are settled=0.8, every=10",
            )

    def terms(self, name: str, out_features: int, in_features: int, dtype: torch.dtype) -> tuple[Format, ...]:
        """Square blocks of 16-bit numbers, the best of the whole matrix."""
        half = torch.bfloat16 if dtype is torch.bfloat16 else torch.float16
        side = math.gcd(math.gcd(out_features, in_features), self.block_size)
        return (
            Sparse(
                kept_fraction=self.kept_fraction,
                block_rows=side,
                block_columns=side,
                balanced=False,
                values=Dense(dtype=half),
            ),
        )

    def layout(self, targets: Sequence[Target], evidence: Evidence | None = None) -> Layout:
        """Every weight outside attention."""
        return super().layout([t for t in targets if "attention" not in _path(t) and "attn" not in _path(t)])

    def stand_in(
        self, name: str, weight: Tensor, formats: tuple[Format, ...], inputs: InputStatistics | None = None
    ) -> StandIn:
        """The dense weight, with all blocks."""
        layout = formats[0]
        if not isinstance(layout, Sparse):
            raise CompositionError(
                f"blast stores {name} in blocks, not as {layout}", hint="use the method's own layout"
            )
        return GrowingSparse(weight, layout, self.settled, self.every)

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """From what is kept, after training."""
        return risk_between(RISES, self.kept_fraction)

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[BLaST]:
        """From the safest to the smallest."""
        for kept in (0.7, 0.5, 0.3, 0.2, 0.1, 0.05):
            yield cls(kept_fraction=kept)


def _path(target: Target) -> str:
    return target.parameter.lower()


def _best(score: Tensor, count: int) -> Tensor:
    """Whether each of the blocks (R, C) is among so many of the highest scores, and scores at all."""
    return largest(score, count) & (score > 0)
