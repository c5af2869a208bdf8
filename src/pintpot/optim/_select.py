"""The ``select`` part: which blocks of the model are trained at a time, and for how long.

The parameters of the other blocks are frozen: they have no gradient, and what the optimizer kept for them is dropped.
What is outside the blocks (embeddings, head, final norm) is always trained.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pintpot.core.errors import UnsupportedModel
from pintpot.core.shape import block_names
from pintpot.optim._tensors import mix_seed


@dataclass(frozen=True)
class Select(ABC):
    """A rule that chooses blocks.

    Attributes:
        active: blocks trained at a time (a model with fewer trains all).
        every: steps between two choices.
        seed: of random choices.
    """

    active: int
    every: int
    seed: int = 0

    looks: bool = False
    """Whether the choice needs the gradients of all blocks: the last step before it then computes them all."""

    @abstractmethod
    def choose(self, blocks: Sequence[Sequence[Tensor]], turn: int) -> list[int]:
        """The numbers of the blocks to train in this turn, ascending.

        Args:
            blocks: the parameters of each block.
            turn: how many choices came before.
        """


@dataclass(frozen=True)
class UniformBlocks(Select):
    """Every block is as likely as any other (LISA, arXiv:2403.17919, algorithm 1)."""

    def choose(self, blocks: Sequence[Sequence[Tensor]], turn: int) -> list[int]:
        """A sample without replacement, by the seed and the turn alone."""
        generator = torch.Generator().manual_seed(mix_seed(self.seed, turn))
        return sorted(torch.randperm(len(blocks), generator=generator)[: self.active].tolist())


def blocks_of(model: nn.Module) -> list[list[nn.Parameter]]:
    """The trainable parameters of each block.

    Raises:
        UnsupportedModel: when the model has no repeated blocks.
    """
    names = block_names(model)
    if not names:
        raise UnsupportedModel(
            f"{type(model).__name__} has no repeated blocks", hint="selection acts on models made of blocks"
        )
    return [[p for p in model.get_submodule(name).parameters() if p.requires_grad] for name in names]
