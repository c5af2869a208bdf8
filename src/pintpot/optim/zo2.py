"""ZO2: MeZO on a model that is larger than the device; each block is fetched once a step and run for both sides.

Source:    Wang et al. 2025, arXiv:2503.12668, and the authors' code (github.com/liangyuwang/zo2): the dual forward
           pass of a block, and its update at the next step's fetch.
Differs:   a block is written back where the second side left it, and is brought home with its update in one pass (one
           direction drawn less); so the weights are, bit for bit, those of ``mezo`` here, but for tied embeddings,
           which go to either side twice (equal to rounding). Two buffers, where the authors fetch one block while they
           write another. Blocks are exchanged in their own precision. Directions come from seeds, not from saved
           states of a generator. Where the device is the CPU, the slower tier is disk.
Saves:     weights (to the embeddings, the head and two blocks), gradients, optimizer and activations, real. Disk or
           host memory holds the blocks; of activations, the hidden states of both sides are held.
Shapes:    parameters of any shape; hidden states (B, T, hidden size).
Composes:  nothing that changes weights or gradients: no adapters, packed weights, packed states, released gradients.
Use when:  the weights alone do not fit, and there is time for many steps.
Not when:  the model fits (MeZO is the same without the traffic).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from pintpot.core.ledger import Account, Ledger, Moment, Tier
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Claim, Source, Technique, technique
from pintpot.core.work import Work
from pintpot.core.workload import Train, Workload
from pintpot.optim._blockwise import BlockwiseOptimizer
from pintpot.optim._tensors import mix_seed
from pintpot.optim._zeroth import GradientFreeMethod, Measure, Slope


@technique(
    name="zo2",
    wing="optim",
    slot="optimizer",
    source=Source(
        "ZO2: Scalable Zeroth-Order Fine-Tuning for Extremely Large Language Models with Limited GPU Memory",
        arxiv="2503.12668",
        year=2025,
    ),
    accounts=(Account.WEIGHTS, Account.GRADIENTS, Account.OPTIMIZER, Account.ACTIVATIONS),
    jobs=("finetune",),
    # Adapters take the weight matrices out of training, which are all that is streamed here.
    needs=("dense_weights", "matrix_gradients"),
    removes=("gradients", "whole_moments"),
    claims=(
        Claim(
            "parameters that can be trained (billions)",
            175,
            versus="beyond the reach of traditional methods",
            at="a GPU of 18 GB",
            where="abstract",
        ),
    ),
    fidelity="blocks come home and are updated in one pass; two buffers; no low-bit exchange; disk beside a CPU",
)
@dataclass(frozen=True, kw_only=True)
class Zo2Rule(GradientFreeMethod):
    """Central differences along one seeded normal direction, block by block.

    Attributes:
        epsilon: how far the parameters are moved to either side.
        seed: from which the directions are drawn.
    """

    streams: ClassVar[bool] = True

    epsilon: float = 1e-3
    seed: int = 0

    @property
    def forward_passes(self) -> int:
        """One to either side."""
        return 2

    @property
    def draws(self) -> int:
        """To either side, and with the update."""
        return 3

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """That of MeZO."""
        return 0.3

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[Technique]:
        """The default, for decoders of several blocks."""
        if not shape.config.is_encoder_decoder and len({p.block for p in shape.parameters if p.block}) > 1:
            yield cls()

    def predict(self, ledger: Ledger, shape: ModelShape, workload: Workload) -> Ledger:
        """MeZO's, with two blocks of the weights on the device and all blocks on disk."""
        if not isinstance(workload, Train):
            return ledger
        sizes = _block_bytes(shape)
        gone = sum(sizes) - min(2, len(sizes)) * max(sizes, default=0)
        # Hidden states and masks of both sides, which no plain pass keeps beside those it works on.
        text = shape.config.get_text_config()
        width = 4 * text.hidden_size + 2 * workload.tokens
        beside = workload.batch * workload.tokens * width * shape.dtype.itemsize

        def stream(moment: Moment) -> Moment:
            if moment.phase == "forward":
                moment = moment.with_bytes(Account.ACTIVATIONS, moment.of(Account.ACTIVATIONS) + beside)
            moment = moment.with_bytes(Account.WEIGHTS, moment.of(Account.WEIGHTS) - gone)
            return moment.with_bytes(Account.WEIGHTS, sum(sizes), Tier.DISK)

        return super().predict(ledger, shape, workload).edit(stream)

    def work(self, work: Work, shape: ModelShape, workload: Workload) -> Work:
        """MeZO's, and every block read and written once a step."""
        return super().work(work, shape, workload).plus("step", disk_bytes=2 * sum(_block_bytes(shape)))


class Zo2(BlockwiseOptimizer):
    """ZO2 as a torch optimizer: ``Zo2(model, lr=1e-6, epsilon=1e-3, seed=0, folder="work")``.

    See ``BlockwiseOptimizer`` for the arguments and ``Zo2Rule`` for the hyperparameters.
    """

    method = Zo2Rule
    rule: Zo2Rule

    def _estimate(self, measure: Measure) -> list[Slope]:
        direction = mix_seed(self.rule.seed, self.steps, 0)
        return [(direction, self._slope(direction, self.rule.epsilon, measure))]


def _block_bytes(shape: ModelShape) -> list[int]:
    """Bytes of each block."""
    sizes: dict[str, int] = {}
    for p in shape.parameters:
        if p.block:
            sizes[p.block] = sizes.get(p.block, 0) + p.nbytes
    return list(sizes.values())


Zo2Rule.kind = Zo2
