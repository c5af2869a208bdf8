"""Block coordinate descent: train one block at a time, by default the one whose gradient is largest.

Source:    Nutini et al. 2017, arXiv:1712.08859 (block selection: cyclic, random, and greedy by Gauss-Southwell).
Differs:   the paper updates the chosen block once, by a gradient or Newton step of a length that its Lipschitz
           constant allows; here it takes ``interval_steps`` steps of AdamW, whose state then goes. The greedy rules
           that divide by Lipschitz constants are left out: for networks these are not known, and to estimate them
           from differences of noisy gradients takes two more copies of the block. What is outside the decoder
           blocks (embeddings, norm, head) is always trained.
Saves:     optimizer, real: the moments of ``active_blocks`` blocks instead of all. Gradients too where the rule is
           cyclic or random. The greedy rule computes all gradients in the first step of each turn, so that their peak
           stays (unless gradients are released: that step then only notes their norms, and moves no block).
Shapes:    parameters of any shape.
Composes:  states of 8 or 4 bits, gradient release, activation checkpointing.
Use when:  a block's moments are all that fits, and full-rank updates are wanted.
Not when:  blocks depend on one another strongly, as at the start of pretraining: many short turns go to waste.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from pintpot.core.errors import ShapeError
from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import TRAINING, Source, Technique, technique
from pintpot.core.workload import Workload
from pintpot.optim._base import ProjectedMethod
from pintpot.optim._engine import ProjectedOptimizer
from pintpot.optim._select import CyclicBlocks, GreedyBlocks, Select, UniformBlocks

RULES: Mapping[str, Callable[[int, int, int], Select]] = MappingProxyType(
    {"greedy": GreedyBlocks, "cyclic": CyclicBlocks, "random": UniformBlocks}
)
"""The selection of each ``rule``."""


@technique(
    name="block-coordinate-descent",
    wing="optim",
    slot="optimizer",
    source=Source(
        "Let's Make Block Coordinate Descent Converge Faster: Faster Greedy Rules, Message-Passing, "
        "Active-Set Complexity, and Superlinear Convergence",
        arxiv="1712.08859",
        year=2017,
    ),
    accounts=(Account.OPTIMIZER, Account.GRADIENTS),
    jobs=TRAINING,
    needs=("dense_weights", "matrix_gradients"),
    fidelity="a block takes several AdamW steps instead of one gradient step; no Lipschitz constants",
)
@dataclass(frozen=True, kw_only=True)
class BlockCoordinateDescentRule(ProjectedMethod):
    """``(GreedyBlocks | CyclicBlocks | UniformBlocks) x AdamW``.

    Attributes:
        rule: ``"greedy"`` (Gauss-Southwell: the largest gradient), ``"cyclic"`` or ``"random"``.
        active_blocks: blocks trained at a time.
        interval_steps: steps between two choices.
        seed: of random choices.
    """

    rule: str = "greedy"
    active_blocks: int = 1
    interval_steps: int = 20
    seed: int = 0

    def select(self) -> Select:
        """Blocks by the rule."""
        return RULES[self.rule](self.active_blocks, self.interval_steps, self.seed)

    def check(self) -> None:
        """Refuse unknown rules, and numbers that make no sense."""
        if self.rule not in RULES:
            raise ShapeError(f"rule must be one of {', '.join(RULES)}, not {self.rule}", hint="default: greedy")
        super().check()

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """The paper has no networks. As for LISA; a single block learns more slowly."""
        return 0.03 if workload.job == "finetune" else 0.3

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[Technique]:
        """The greedy rule, and the cyclic one, whose gradients are fewer, with more blocks."""
        blocks = len({p.block for p in shape.parameters if p.block})
        yield cls()
        yield from (cls(rule="cyclic", active_blocks=count) for count in (1, 2, 4) if count == 1 or count < blocks)


class BlockCoordinateDescent(ProjectedOptimizer):
    """Block coordinate descent as a torch optimizer: ``BlockCoordinateDescent(model, lr=1e-5, rule="greedy")``.

    It freezes and unfreezes the model's blocks itself. See ``ProjectedOptimizer`` for the arguments and
    ``BlockCoordinateDescentRule`` for the hyperparameters.
    """

    method = BlockCoordinateDescentRule


BlockCoordinateDescentRule.kind = BlockCoordinateDescent
