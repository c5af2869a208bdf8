"""Just One Byte: many machines fine-tune one model by MeZO and tell each other one byte a direction.

Every machine takes the slope along its own directions on its own data and sends it as one byte. The others know the
directions from (step, machine, sample), so each makes everyone's update and all hold the same weights.

Source:    Zelikman et al. 2023, arXiv:2306.10015, and the authors' program (github.com/ezelikman/justonebyte).
Differs:   the byte is an 8-bit float (e4m3, slopes up to 448; the authors' program sends numbers as text); every
           machine retraces the rounding of the others' perturbations, so that all stay equal bit for bit without the
           copy of the weights that the program keeps; a slope is not multiplied by ``epsilon`` in the update, as in
           MeZO (the program does, so its learning rate of 0.1 is 1e-4 here); messages go by torch.distributed.
Saves:     gradients, optimizer and activations, real, as MeZO; between machines one byte instead of a gradient.
Shapes:    parameters of any shape.
Composes:  adapters, packed weights; not with packed states or gradient release, since there are neither.
Use when:  machines with slow links, or whose data must not leave them, fine-tune a model that each can run.
Not when:  the links are fast and the memory is there for gradients; or for pretraining.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed as dist

from pintpot.core.errors import TrainingError
from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Claim, Source, technique
from pintpot.core.workload import Workload
from pintpot.optim._tensors import mix_seed
from pintpot.optim._zeroth import GradientFreeMethod, Measure, Slope, ZerothOrderOptimizer, noise, pieces, widened


@technique(
    name="just-one-byte",
    wing="optim",
    slot="optimizer",
    source=Source(
        "Just One Byte (per gradient): A Note on Low-Bandwidth Decentralized Language Model Finetuning Using Shared "
        "Randomness",
        arxiv="2306.10015",
        year=2023,
    ),
    accounts=(Account.GRADIENTS, Account.OPTIMIZER, Account.ACTIVATIONS),
    jobs=("finetune",),
    removes=("gradients", "whole_moments"),
    claims=(Claim("bytes exchanged for one projected gradient", 1, versus="a whole gradient", where="abstract"),),
    fidelity="bytes are 8-bit floats; rounding is retraced instead of keeping a copy of the weights",
)
@dataclass(frozen=True, kw_only=True)
class JustOneByteRule(GradientFreeMethod):
    """MeZO whose directions are shared among machines.

    Attributes:
        epsilon: how far the parameters are moved to either side.
        samples: directions that each machine takes in a step.
        seed: from which the directions are drawn; the same on all machines.
    """

    epsilon: float = 1e-3
    samples: int = 1
    seed: int = 0

    @property
    def forward_passes(self) -> int:
        """Two a direction of this machine."""
        return 2 * self.samples

    @property
    def draws(self) -> int:
        """Three ways along each direction of this machine, and the update."""
        return 4 * self.samples

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """That of MeZO, and a little for slopes of three bits."""
        return 0.31


class JustOneByte(ZerothOrderOptimizer):
    """Just One Byte as a torch optimizer: ``JustOneByte(model, lr=1e-4, epsilon=1e-3, samples=1, seed=0)``.

    It works alone, and with every other machine of the default process group once torch.distributed is initialised.
    Between steps ``group`` may be set to another process group: machines leave and join. One that joins starts from
    the weights that the others started from and calls ``replay(history)``, or loads their weights and their
    ``state_dict``. All machines need the same kind of device and the same build of torch, for the same normal numbers.

    See ``ZerothOrderOptimizer`` for the arguments and ``JustOneByteRule`` for the hyperparameters.

    Attributes:
        group: the machines; None for the default process group.
        history: for each step the bytes of all machines, in hexadecimal, and the learning rate of each group. With
            the first weights it makes the present ones.
    """

    method = JustOneByteRule
    rule: JustOneByteRule

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.group: dist.ProcessGroup | None = None
        self.history: list[dict[str, Any]] = []

    def replay(self, history: Sequence[dict[str, Any]]) -> None:
        """Make the steps of a history again, bit for bit, without a forward pass; those made already are left out.

        Raises:
            TrainingError: when the steps made so far are not the first of the history.
        """
        done = len(self.history)
        if self.history != list(history[:done]):
            raise TrainingError("this is the history of another run", hint="start from the weights it started from")
        rates = [group["lr"] for group in self.param_groups]
        try:
            with torch.no_grad():
                for entry in history[done:]:
                    self._again_(entry)
        finally:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate

    def state_dict(self) -> dict[str, Any]:
        """The number of steps and the history."""
        return {**super().state_dict(), "history": [dict(entry) for entry in self.history]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state exactly."""
        super().load_state_dict(state_dict)
        self.history = [dict(entry) for entry in state_dict["history"]]

    def _estimate(self, measure: Measure) -> list[Slope]:
        """Every machine goes through the perturbations of all, in the same order, so that all round alike."""
        machine, machines = self._world()
        mine = []
        for other in range(machines):
            for sample in self._draws(self.rule.samples):
                direction = self._direction(other, sample)
                if other == machine:
                    mine.append(to_byte(self._slope(direction, self.rule.epsilon, measure)))
                    self._return_()
                else:
                    self._retrace_(direction)
        codes = mine if machines == 1 else self._exchange(mine, machines)
        self.history.append({"bytes": bytes(codes).hex(), "lr": [float(g["lr"]) for g in self.param_groups]})
        return self._slopes(codes)

    def _again_(self, entry: dict[str, Any]) -> None:
        """One step of a history."""
        codes = list(bytes.fromhex(entry["bytes"]))
        for group, rate in zip(self.param_groups, entry["lr"], strict=True):
            group["lr"] = rate
        for place in range(len(codes)):
            self._retrace_(self._direction(*divmod(place, self.rule.samples)))
        self.history.append(dict(entry))
        self._finish_(self._slopes(codes))

    def _direction(self, machine: int, sample: int) -> int:
        return mix_seed(self.rule.seed, self.steps, machine, sample)

    def _slopes(self, codes: Sequence[int]) -> list[Slope]:
        """The mean gradient that the bytes of all machines stand for."""
        places = (divmod(place, self.rule.samples) for place in range(len(codes)))
        return [(self._direction(*at), from_byte(code) / len(codes)) for at, code in zip(places, codes, strict=True)]

    def _retrace_(self, direction: int) -> None:
        """Round as a machine does that perturbs along this direction and returns."""
        epsilon = self.rule.epsilon
        for _, number, p in self.trained():
            for place, piece in pieces(p):
                step = noise(piece, mix_seed(direction, number, place)).mul_(epsilon)
                for factor in (1, -2, 1):
                    value = widened(piece).add_(step, alpha=factor)
                    if value is not piece:
                        piece.copy_(value)

    def _world(self) -> tuple[int, int]:
        """The number of this machine, and how many there are."""
        if not (self._real() and dist.is_available() and dist.is_initialized()):
            return 0, 1
        return dist.get_rank(self.group), dist.get_world_size(self.group)

    def _exchange(self, codes: Sequence[int], machines: int) -> list[int]:
        """The bytes of all machines, in the order of their numbers."""
        device = next(p.device for _, _, p in self.trained()) if dist.get_backend(self.group) == "nccl" else None
        mine = torch.tensor(codes, dtype=torch.uint8, device=device)
        everyone = [torch.empty_like(mine) for _ in range(machines)]
        dist.all_gather(everyone, mine, group=self.group)
        return [code for part in everyone for code in part.tolist()]


def _level(code: int) -> float:
    exponent, fraction = divmod(code, 8)
    return fraction / 8 * 2.0**-6 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7)


LEVELS = [_level(code) for code in range(127)]
"""The numbers from 0 to 448 that an 8-bit float (e4m3) can be; code 127 is NaN, and the top bit is the sign."""


def to_byte(slope: float) -> int:
    """The code of the nearest 8-bit float, at most 448 in size; NaN for what is not finite."""
    if not math.isfinite(slope):
        return 127
    above = min(bisect_left(LEVELS, abs(slope)), len(LEVELS) - 1)
    below = max(0, above - 1)
    up, down = LEVELS[above] - abs(slope), abs(slope) - LEVELS[below]
    # Halfway, the even code.
    code = above if up < down or (up == down and above % 2 == 0) else below
    return code + 128 * (slope < 0)


def from_byte(code: int) -> float:
    """The number of a code."""
    size = code % 128
    return math.nan if size == 127 else math.copysign(LEVELS[size], 64 - code // 128 * 128)


JustOneByteRule.kind = JustOneByte
