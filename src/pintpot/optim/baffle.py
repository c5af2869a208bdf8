"""BAFFLE: clients run forward passes and send a list of numbers; the server makes the update from seeds.

Source:    Feng et al. 2023, arXiv:2301.12195 (forward differences), and the authors' code (github.com/FengHZ/BAFFLE).
Differs:   the server descends by plain SGD instead of Adam, whose moments and gradient would be of the model's size;
           it keeps no running average of the weights (an option of the authors' code), a further copy. One batch of
           each client makes a round (the authors' FedSGD).
Saves:     gradients, optimizer and activations, real: nothing but integers is kept. Temporaries are a few pieces of a
           million elements.
Shapes:    parameters of any shape; K directions give K numbers a client.
Composes:  adapters; not with packed states or gradient release, since there are neither.
Use when:  clients can only run a model (inference hardware, trusted enclaves), and it is small.
Not when:  there is one machine (MeZO takes better steps for the same passes), or weights of half precision, in which
           a perturbation of ``sigma`` is lost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pintpot.core.errors import ShapeError
from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import TRAINING, Source, technique
from pintpot.core.workload import Workload
from pintpot.optim._tensors import mix_seed
from pintpot.optim._zeroth import (
    Closure,
    GradientFreeMethod,
    Measure,
    Slope,
    ZerothOrderOptimizer,
    evaluating,
    noise,
    pieces,
)


@technique(
    name="baffle",
    wing="optim",
    slot="optimizer",
    source=Source("Does Federated Learning Really Need Backpropagation?", arxiv="2301.12195", year=2023),
    accounts=(Account.GRADIENTS, Account.OPTIMIZER, Account.ACTIVATIONS),
    jobs=TRAINING,
    removes=("gradients", "whole_moments"),
    fidelity="plain SGD on the server; no running average of the weights",
)
@dataclass(frozen=True, kw_only=True)
class BaffleRule(GradientFreeMethod):
    """Forward differences along seeded normal directions, shared by all clients.

    Attributes:
        directions: forward differences a client takes in a round (K).
        sigma: length of the perturbations.
        clip: the largest magnitude of an element of the gradient; a larger gradient is scaled down as a whole.
            Infinity leaves it.
        seed: from which the directions are drawn.
    """

    directions: int = 500
    sigma: float = 1e-4
    clip: float = 0.3
    seed: int = 0

    @property
    def forward_passes(self) -> int:
        """One a direction, and one where the weights are."""
        return self.directions + 1

    @property
    def draws(self) -> int:
        """To each direction and from it, once to clip and once to update."""
        return 4 * self.directions

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """A few hundred directions say little about the gradient of a language model."""
        return 0.5


class Baffle(ZerothOrderOptimizer):
    """BAFFLE as a torch optimizer: ``Baffle(model, lr=1e-2, directions=500, sigma=1e-4, clip=0.3, seed=0)``.

    ``step(closure)`` is a round with one client, ``step([closure, ...])`` one with several. Where they are elsewhere,
    each sends ``differences(closure)``, and all, or the server alone, call ``descend`` with what was sent.

    See ``ZerothOrderOptimizer`` for the arguments and ``BaffleRule`` for the hyperparameters.
    """

    method = BaffleRule
    rule: BaffleRule

    def step(self, closure: Closure | Sequence[Closure] | None = None) -> float | Tensor:  # type: ignore[override]
        """One round; the mean of the losses that were taken. See ``ZerothOrderOptimizer.step``."""
        if closure is None or callable(closure):
            return super().step(closure)
        clients = tuple(closure)

        def mean() -> float | Tensor:
            return sum(client() for client in clients) / len(clients)

        # The directions are the same for all clients, so the mean of their differences is that of the mean loss.
        return super().step(mean)

    @torch.no_grad()
    def differences(self, closure: Closure) -> list[float]:
        """What a client sends: the rise of its loss along each direction of this round. Its weights stay."""
        try:
            with evaluating(self.model):
                return self._rises(lambda: float(closure()))
        finally:
            self._return_()

    @torch.no_grad()
    def descend(self, sent: Sequence[Sequence[float]], shares: Sequence[float] | None = None) -> None:
        """What the server does: average and update.

        Args:
            sent: for each client its differences.
            shares: weight of each client, such as its number of examples; equal where absent.

        Raises:
            ShapeError: when clients sent more or fewer numbers than there are directions.
            TrainingError: when a number is not finite (unless ``nonfinite`` is ``"skip"``).
        """
        if not sent or any(len(numbers) != self.rule.directions for numbers in sent):
            raise ShapeError(f"every client sends {self.rule.directions} numbers", hint="use differences(closure)")
        weights = [1.0] * len(sent) if shares is None else list(shares)
        total = math.fsum(weights)
        mean = [
            math.fsum(w * x for w, x in zip(weights, column, strict=True)) / total for column in zip(*sent, strict=True)
        ]
        self._finish_(self._slopes(mean))

    def _estimate(self, measure: Measure) -> list[Slope]:
        return self._slopes(self._rises(measure))

    def _rises(self, measure: Measure) -> list[float]:
        here = measure()
        rises = []
        for number in self._draws(self.rule.directions):
            self._go_(self._direction(number), self.rule.sigma)
            rises.append(measure() - here)
        return rises

    def _direction(self, number: int) -> int:
        return mix_seed(self.rule.seed, self.steps, number)

    def _slopes(self, rises: Sequence[float]) -> list[Slope]:
        """Stein's identity: the mean of ``z (L(W + sigma z) - L(W)) / sigma``, clipped."""
        mean = [rise / self.rule.sigma / len(rises) for rise in rises]
        slopes = [(self._direction(number), slope) for number, slope in enumerate(mean)]
        if not (self._real() and math.isfinite(self.rule.clip) and all(map(math.isfinite, mean))):
            return slopes
        # As torch's clip_grad_norm_ with the largest element as the norm, which the authors use.
        factor = min(1.0, self.rule.clip / (self._largest(slopes) + 1e-6))
        return [(direction, factor * slope) for direction, slope in slopes]

    def _largest(self, slopes: Sequence[Slope]) -> float:
        """The largest magnitude in the gradient, which is made and dropped piece by piece."""
        most = []
        for _, number, p in self.trained():
            for place, piece in pieces(p):
                total = torch.zeros_like(piece, dtype=torch.promote_types(piece.dtype, torch.float32))
                for direction, slope in slopes:
                    total.add_(noise(piece, mix_seed(direction, number, place)).mul_(slope))
                most.append(total.abs_().max())
        return max((float(value) for value in most), default=0.0)


BaffleRule.kind = Baffle
