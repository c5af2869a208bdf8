"""The ``select`` part: which blocks of the model are trained at a time, and for how long.

The parameters of the other blocks are frozen: they have no gradient, and what the optimizer kept for them is dropped.
What is outside the blocks (embeddings, head, final norm) is always trained.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pintpot.core.errors import UnsupportedModel
from pintpot.core.shape import block_names
from pintpot.optim._groups import is_matrix
from pintpot.optim._tensors import CHUNK_NUMEL, has_values, mix_seed

Memory = dict[str, Any]
"""What a rule remembers between choices: numbers, strings, lists and dicts. It is saved with the optimizer."""


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
    """Whether the rule needs the gradients of all blocks: the first step of each turn then computes them all, and the
    choice is made before its update."""

    @abstractmethod
    def choose(
        self, blocks: Sequence[Sequence[Tensor]], turn: int, norms: Sequence[float], memory: Memory
    ) -> list[int]:
        """The numbers of the blocks to train in this turn, ascending.

        Args:
            blocks: the parameters of each block.
            turn: how many choices came before.
            norms: of each block's gradient, where the rule looks; else empty.
            memory: what the rule remembers, empty at first; changed in place.
        """


@dataclass(frozen=True)
class UniformBlocks(Select):
    """Every block is as likely as any other (LISA, arXiv:2403.17919, algorithm 1)."""

    def choose(
        self, blocks: Sequence[Sequence[Tensor]], turn: int, norms: Sequence[float], memory: Memory
    ) -> list[int]:
        """A sample without replacement, by the seed and the turn alone."""
        generator = torch.Generator().manual_seed(mix_seed(self.seed, turn))
        return sorted(torch.randperm(len(blocks), generator=generator)[: self.active].tolist())


@dataclass(frozen=True)
class CyclicBlocks(Select):
    """One after the other, from the first to the last and again."""

    def choose(
        self, blocks: Sequence[Sequence[Tensor]], turn: int, norms: Sequence[float], memory: Memory
    ) -> list[int]:
        """The blocks that follow those of the turn before."""
        count = min(self.active, len(blocks))
        return sorted((turn * count + i) % len(blocks) for i in range(count))


@dataclass(frozen=True)
class GreedyBlocks(Select):
    """The blocks whose gradients are largest (Gauss-Southwell; Nutini et al. 2017, arXiv:1712.08859)."""

    looks: bool = True

    def choose(
        self, blocks: Sequence[Sequence[Tensor]], turn: int, norms: Sequence[float], memory: Memory
    ) -> list[int]:
        """Those of the largest norms; of equals the first."""
        return sorted(sorted(range(len(blocks)), key=lambda number: -norms[number])[: self.active])


@dataclass(frozen=True)
class OutlierBlocks(Select):
    """A block is the likelier the more outliers its weights have (OwLore, arXiv:2405.18380).

    Attributes:
        threshold: a weight is an outlier above this many times the block's mean magnitude (M).
    """

    threshold: float = 13.0

    def choose(
        self, blocks: Sequence[Sequence[Tensor]], turn: int, norms: Sequence[float], memory: Memory
    ) -> list[int]:
        """A sample without replacement, by the shares of outliers at the first choice."""
        if "shares" not in memory:
            memory["shares"] = [self.share_of(block) for block in blocks]
        shares = torch.tensor(memory["shares"], dtype=torch.float64)
        generator = torch.Generator().manual_seed(mix_seed(self.seed, turn))
        drawn = torch.multinomial(shares, min(self.active, len(blocks)), generator=generator)
        return sorted(drawn.tolist())

    def share_of(self, block: Sequence[Tensor]) -> float:
        """The share of outliers among the weights of a block's matrices, one more than there are."""
        pieces = [piece for p in block if is_matrix(p.shape) for piece in p.detach().reshape(-1).split(CHUNK_NUMEL)]
        numel = sum(piece.numel() for piece in pieces)
        if not numel:
            return 1.0
        mean = torch.stack([piece.abs().sum(dtype=torch.float32) for piece in pieces]).double().sum() / numel
        count = torch.stack([(piece.abs() > self.threshold * mean).sum() for piece in pieces]).sum()
        # A block without outliers keeps a chance, and where no block has any all are equally likely.
        return (int(count) + 1) / numel


class Selection:
    """The blocks that are trained now, and when they change.

    Args:
        rule: chooses them.
        blocks: the parameters of each block.

    Attributes:
        active: the numbers of the blocks that are trained.
        looking: whether all blocks have gradients in this step, and ``active`` are chosen by them before its update.
    """

    def __init__(self, rule: Select, blocks: Sequence[Sequence[nn.Parameter]]) -> None:
        self.rule, self.blocks, self.steps = rule, blocks, 0
        self.active: list[int] = []
        self.memory: Memory = {}
        self.looking = rule.looks
        self._number: dict[Tensor, int] = {p: number for number, block in enumerate(blocks) for p in block}
        self._noted: dict[int, list[Tensor]] = defaultdict(list)
        self._begin({})

    def note_(self, parameter: Tensor) -> bool:
        """Whether this step only looks at the gradient of a parameter, whose norm is then noted."""
        number = self._number.get(parameter)
        if not self.looking or number is None or parameter.grad is None:
            return False
        self._noted[number].append(_norm(parameter.grad))
        return True

    def advance_(self, states: MutableMapping[Tensor, Any]) -> None:
        """Count a step; when it is time, freeze the blocks of this turn, drop their ``states``, and choose others."""
        if self.looking:
            return  # The step was skipped: the next one looks.
        self.steps += 1
        if self.steps % self.rule.every == 0:
            self.looking = self.rule.looks
            self._begin(states)

    def state_dict(self) -> dict[str, Any]:
        """Where the selection stands."""
        return {"steps": self.steps, "active": list(self.active), "memory": dict(self.memory)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Train what was trained when the state was taken; an empty one begins anew."""
        self.steps, self.active = state.get("steps", 0), list(state.get("active", ()))
        self.memory = dict(state.get("memory", {}))
        self.looking = self.rule.looks and self.steps % self.rule.every == 0
        if self.active and not self.looking:
            self._train(self.active)
        else:
            self._begin({})

    def _begin(self, states: MutableMapping[Tensor, Any]) -> None:
        """Begin a turn: make all gradients come where the rule looks, else choose."""
        if self.looking:
            self._train(range(len(self.blocks)))
        else:
            self.choose_(states)

    def choose_(self, states: MutableMapping[Tensor, Any]) -> None:
        """Choose, where the rule looks by the gradients that are there or were noted; free those of other blocks.

        Args:
            states: what the optimizer keeps for each parameter; that of blocks no longer trained is dropped.
        """
        before = set(self.active)
        # On shapes alone the first blocks stand for any: with them the backward pass goes through the whole model.
        if all(has_values(p) for block in self.blocks for p in block):
            norms = self._norms() if self.looking else []
            self.active = self.rule.choose(self.blocks, self.steps // self.rule.every, norms, self.memory)
        else:
            self.active = list(range(min(self.rule.active, len(self.blocks))))
        self.looking = False
        self._noted.clear()
        self._train(self.active)
        for number in before - set(self.active):
            for p in self.blocks[number]:
                states.pop(p, None)

    def _norms(self) -> list[float]:
        found = [
            [*self._noted[number], *(_norm(p.grad) for p in block if p.grad is not None)]
            for number, block in enumerate(self.blocks)
        ]
        every = [norm for norms in found for norm in norms]
        # One copy from the device for all.
        numbers = iter(torch.stack([norm.to(every[0].device) for norm in every]).tolist() if every else ())
        return [math.hypot(*(next(numbers) for _ in norms)) for norms in found]

    def _train(self, numbers: Iterable[int]) -> None:
        chosen = set(numbers)
        for number, block in enumerate(self.blocks):
            for p in block:
                p.requires_grad_(number in chosen)
                if number not in chosen:
                    p.grad = None


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


def _norm(gradient: Tensor) -> Tensor:
    wide = torch.promote_types(gradient.dtype, torch.float32)
    return torch.linalg.vector_norm(gradient, dtype=wide).float()
