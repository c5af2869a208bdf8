"""The one training loop, which pretraining and fine-tuning share.

It runs any model that returns a loss, on any `Batches`, with any `torch.optim.Optimizer`. A run can be stopped at any
moment: Ctrl-C and SIGTERM finish the current step and leave a checkpoint; after a kill the last checkpoint is whole.
A resumed run is bit for bit the run that was never stopped, for the same machine and number of threads.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from pintpot.core.errors import CompositionError, DataError, Interrupted, TrainingError
from pintpot.jobs.batches import Batches
from pintpot.jobs.stopping import stop_requests
from pintpot.jobs.training_progress import Reporter, reporter
from pintpot.jobs.training_state import Position, list_checkpoints, load_checkpoint, save_checkpoint

Schedule = Callable[[int], float]
"""Factor on the learning rate of every group, from the step (0 for the first)."""

Validate = Callable[[nn.Module], dict[str, float]]
"""Figures of a model, by name. Called in evaluation mode without gradients."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How to run the loop; what to train is given apart.

    Attributes:
        accumulate: batches whose mean gradient makes one step.
        clip_norm: largest norm of the whole gradient; None leaves it, and so do optimizers that release gradients.
        checkpoints: folder for the checkpoints; None keeps none.
        checkpoint_every: steps between checkpoints.
        keep_checkpoints: how many stay.
        trainable_only: checkpoints leave out frozen parameters (adapters on a frozen model).
        validate_every: steps between validations (and one at the end); 0 for none.
        run: what identifies the run (JSON-able); a checkpoint of another run is refused.
        memory_budget_bytes: shown beside the memory of the process.
        progress: show a progress bar, or lines where there is no terminal.
    """

    accumulate: int = 1
    clip_norm: float | None = 1.0
    checkpoints: Path | None = None
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    trainable_only: bool = False
    validate_every: int = 0
    run: dict[str, Any] = field(default_factory=dict)
    memory_budget_bytes: int | None = None
    progress: bool = True


@dataclass(frozen=True)
class TrainResult:
    """What a run gave.

    Attributes:
        steps: optimizer steps done in all, resumed ones included.
        loss: mean training loss of the last 20 steps (nats per token).
        curve: one row a step: `step`, `tokens`, `loss`, `learning_rate`, `gradient_norm`, `seconds`; after a
            validation also its figures.
        seconds: wall time of this call.
    """

    steps: int
    loss: float
    curve: list[dict[str, float]]
    seconds: float


def warmup_stable_decay(*, warmup: int, decay: int, steps: int) -> Schedule:
    """Linear from 0 to 1 over `warmup` steps, 1, then linear to 0 over the last `decay` of `steps` steps."""

    def factor(step: int) -> float:
        rising = (step + 1) / warmup if step < warmup else 1.0
        falling = (steps - step) / (decay + 1) if step >= steps - decay else 1.0
        return max(0.0, min(rising, falling))

    return factor


def train(
    model: nn.Module,
    batches: Batches,
    optimizer: Optimizer,
    schedule: Schedule,
    settings: TrainSettings,
    *,
    validate: Validate | None = None,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
    around_step: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> TrainResult:
    """Train in place; resumes from the newest checkpoint in `settings.checkpoints` if there is one.

    Args:
        model: called as `model(input_ids=, labels=, use_cache=False)`, returns an object with a scalar `loss`.
        batches: `accumulate` of them make one step.
        optimizer: any optimizer over the model's parameters. Its groups' learning rates are scaled by `schedule`.
        schedule: factor on the learning rates, a pure function of the step.
        settings: how to run.
        validate: figures to record every `validate_every` steps.
        on_step: called after each step with the steps done and the row of the curve.
        around_step: gives the context for the forward and backward passes.

    Raises:
        TrainingError: when the loss is not finite, or the checkpoints are those of another run.
        Interrupted: after Ctrl-C or SIGTERM, once a checkpoint is written.
        DataError: when there is not one step's worth of batches.
        CompositionError: when batches are accumulated with an optimizer that releases gradients.
    """
    steps = len(batches) // settings.accumulate
    if steps < 1:
        raise DataError("there is not enough data for one step", hint="give more data, or fewer accumulated batches")
    if settings.accumulate > 1 and getattr(optimizer, "releases_gradients", False):
        raise CompositionError(
            "gradients that are released as they arrive cannot be accumulated over batches",
            hint="leave out gradient-release, or use one larger batch with checkpointing",
        )
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", float(group["lr"]))
    loop = _Loop(model, batches, optimizer, schedule, settings, validate, around_step)
    began = time.perf_counter()
    position = loop.resume()
    curve = position.curve
    with reporter(settings.progress, steps, settings.memory_budget_bytes) as report, stop_requests() as stop:
        for step in range(position.step, steps):
            row = loop.step(step, curve)
            _finish_row(loop, row, step, steps, report)
            curve.append(row)
            if on_step is not None:
                on_step(step + 1, row)
            if stop or (step + 1) % settings.checkpoint_every == 0 or step + 1 == steps:
                loop.checkpoint(step + 1, curve)
            if stop and step + 1 < steps:
                raise _interrupted(step + 1, steps, settings)
    last = [row["loss"] for row in curve[-20:]]
    return TrainResult(len(curve), sum(last) / len(last), curve, time.perf_counter() - began)


class _Loop:
    """The parts of a run that every step needs."""

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        optimizer: Optimizer,
        schedule: Schedule,
        settings: TrainSettings,
        validate: Validate | None,
        around_step: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.model = model
        self.batches = batches
        self.optimizer = optimizer
        self.schedule = schedule
        self.settings = settings
        self.validate = validate
        self.around_step = around_step
        self.device = next(model.parameters()).device

    def resume(self) -> Position:
        """Where to begin: the newest checkpoint, or step 0."""
        folder = self.settings.checkpoints
        found = list_checkpoints(folder) if folder is not None else []
        if not found:
            return Position(step=0, curve=[], run=self.settings.run)
        return load_checkpoint(
            found[-1], self.model, self.optimizer, self.settings.run, trainable_only=self.settings.trainable_only
        )

    def checkpoint(self, step: int, curve: list[dict[str, float]]) -> None:
        """Write a checkpoint, if they are wanted."""
        if self.settings.checkpoints is None:
            return
        save_checkpoint(
            self.settings.checkpoints,
            self.model,
            self.optimizer,
            Position(step=step, curve=curve, run=self.settings.run),
            trainable_only=self.settings.trainable_only,
            keep=self.settings.keep_checkpoints,
        )

    def step(self, step: int, curve: list[dict[str, float]]) -> dict[str, float]:
        """One optimizer step; returns its row of the curve."""
        began = time.perf_counter()
        self.model.train()
        factor = self.schedule(step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        if getattr(self.optimizer, "gradient_free", False):
            loss, tokens, norm = self._forward_only(step)
        else:
            loss, tokens, norm = self._update(step)
        return {
            "step": step + 1,
            "tokens": tokens + (curve[-1]["tokens"] if curve else 0),
            "loss": loss,
            "learning_rate": float(self.optimizer.param_groups[0]["lr"]),
            "gradient_norm": norm,
            "seconds": time.perf_counter() - began,
        }

    def _update(self, step: int) -> tuple[float, int, float]:
        """One update from the gradient; the loss, the tokens and the gradient's norm."""
        loss, tokens = self._gradient(step)
        self._require_finite(loss, step)
        norm = self._clip()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss, tokens, norm

    def _forward_only(self, step: int) -> tuple[float, int, float]:
        """One update from losses alone; the optimizer asks for as many as it needs."""
        first = step * self.settings.accumulate
        batches = [self.batches[first + place] for place in range(self.settings.accumulate)]

        def closure() -> float:
            total = 0.0
            with torch.no_grad(), self.around_step():
                for batch in batches:
                    inputs, labels = batch.input_ids.to(self.device), batch.labels.to(self.device)
                    total += float(self.model(input_ids=inputs, labels=labels, use_cache=False).loss)
            return total / len(batches)

        loss = self.optimizer.step(closure)
        self._require_finite(loss, step)
        return float(loss), sum(batch.input_ids.numel() for batch in batches), 0.0

    def _require_finite(self, loss: float | None, step: int) -> None:
        if loss is None or not math.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss} at step {step + 1}",
                hint="lower the learning rate, clip gradients, or look for NaN in the weights or the data",
            )

    def _gradient(self, step: int) -> tuple[float, int]:
        """Accumulate the gradient of a step; the mean loss (nats) and the tokens it saw."""
        total, tokens = 0.0, 0
        for place in range(self.settings.accumulate):
            batch = self.batches[step * self.settings.accumulate + place]
            with self.around_step():
                inputs, labels = batch.input_ids.to(self.device), batch.labels.to(self.device)
                output = self.model(input_ids=inputs, labels=labels, use_cache=False)
                (output.loss / self.settings.accumulate).backward()
            total += float(output.loss.detach()) / self.settings.accumulate
            tokens += batch.input_ids.numel()
        return total, tokens

    def _clip(self) -> float:
        if getattr(self.optimizer, "releases_gradients", False):
            return float(self.optimizer.gradient_norm())  # type: ignore[attr-defined]
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        if self.settings.clip_norm is None:
            return float(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        return float(torch.nn.utils.clip_grad_norm_(parameters, self.settings.clip_norm))

    def figures(self) -> dict[str, float]:
        """The validation figures, without touching the random generators' course."""
        if self.validate is None:
            return {}
        self.model.eval()
        with torch.no_grad(), torch.random.fork_rng():
            return self.validate(self.model)


def _finish_row(loop: _Loop, row: dict[str, float], step: int, steps: int, report: Reporter) -> None:
    """Add the validation's figures when it is their turn, and show the row."""
    every = loop.settings.validate_every
    if every and ((step + 1) % every == 0 or step + 1 == steps):
        row.update(loop.figures())
    report(row)


def _interrupted(step: int, steps: int, settings: TrainSettings) -> Interrupted:
    if settings.checkpoints is None:
        return Interrupted(f"stopped at step {step} of {steps}", hint="give a checkpoint folder to be able to resume")
    return Interrupted(
        f"stopped at step {step} of {steps}; the checkpoint is in {settings.checkpoints}",
        hint="run the same command again to resume",
    )
