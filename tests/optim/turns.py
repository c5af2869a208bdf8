"""A plain twin of training in turns: all gradients at each step, blocks that are not chosen left alone."""

import copy
from collections.abc import Callable

import torch
from torch import nn

from tests.optim.test_projected import adam

IDS = torch.randint(3, 256, (2, 16), generator=torch.Generator().manual_seed(0))
LR, DECAY = 0.02, 0.1


def backward(model: nn.Module) -> None:
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()


class Turns:
    """Trains a copy of a llama; ``update`` gives the move of one weight, ``choose`` the blocks of a turn.

    Args:
        model: where to begin.
        every: steps of a turn.
        choose: from the gradients by block (each a list) and the turn.
        update: from the moments, the parameter's name, gradient and number of steps since its block was chosen.
    """

    def __init__(self, model: nn.Module, every: int, choose: Callable, update: Callable | None = None) -> None:
        self.model, self.every, self.choose = copy.deepcopy(model).requires_grad_(), every, choose
        self.update = update or (lambda moments, name, g, step: adam(moments, name, g, step))
        self.moments: dict = {}
        self.ages: dict[str, int] = {}
        self.active: list[int] = []

    def blocks(self) -> list[list[nn.Parameter]]:
        return [list(layer.parameters()) for layer in self.model.model.layers]

    @torch.no_grad()
    def step(self, number: int) -> None:
        with torch.enable_grad():
            backward(self.model)
        if number % self.every == 0:
            self.active = self.choose([[p.grad for p in block] for block in self.blocks()], number // self.every)
        for name, p in self.model.named_parameters():
            if ".layers." in name and int(name.split(".")[2]) not in self.active:
                self.moments.pop(name, None)
                self.ages[name] = 0
            else:
                self.ages[name] = self.ages.get(name, 0) + 1
                p -= LR * DECAY * p + LR * self.update(self.moments, name, p.grad, self.ages[name])
        self.model.zero_grad()


def same_weights(one: nn.Module, other: nn.Module) -> None:
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        # Both are float64. Adam's division makes rounding of 1e-16 matter where a moment is near zero, no more.
        torch.testing.assert_close(
            p.detach(), q.detach(), rtol=1e-8, atol=1e-8, msg=lambda m, name=name: f"{name}: {m}"
        )
