"""Running a planned job on random tokens while watching its memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pintpot.core.errors import PlanError
from pintpot.core.ledger import Ledger
from pintpot.core.plan import Plan
from pintpot.core.workload import Generate, Train
from pintpot.jobs.assemble import assemble
from pintpot.jobs.model_source import model_folder
from pintpot.ledger import steps
from pintpot.ledger.measure import measure
from pintpot.ledger.predict import Assembled

TRAINING_STEPS = 2
"""Updates that are run: the first allocates the optimizer's state, the second shows the settled peak."""


def measure_run(plan: Plan, folder: str | Path | None = None) -> Ledger:
    """The measured ledger of a plan's job, run on random tokens of the planned sizes.

    Training runs at most ``TRAINING_STEPS`` updates, which reach the peak.

    Args:
        plan: what to run.
        folder: the model's, when not the one that the plan names.

    Raises:
        PlanError: for a job that has no run to measure.
    """
    workload = plan.workload
    if not isinstance(workload, Generate | Train):
        raise PlanError(f"{workload.job} cannot be measured on random tokens", hint="measure generating or training")
    torch.manual_seed(plan.seed)
    with measure(budget=plan.budget) as run:
        with run.phase("load"):
            live = assemble(model_folder(folder or plan.model.name), plan)
        run.register(live.model, live.optimizer)
        if isinstance(workload, Generate):
            run_generation(live, workload)
        else:
            run_training(live, workload)
    return run.ledger


def run_generation(live: Assembled, workload: Generate) -> None:
    """Greedy generation of exactly the workload's sizes from random tokens."""
    prompt = _random_tokens(live, workload.batch, workload.prompt_tokens)
    with live.scope():
        progress = live.prefill(prompt)
        for _ in range(workload.new_tokens - 1):
            progress = steps.decode(live.model, steps.choose(progress), progress)


def run_training(live: Assembled, workload: Train) -> None:
    """A few updates on random tokens."""
    if live.optimizer is None:
        raise PlanError("there is no optimizer to train with", hint="assemble the job for training")
    tokens = _random_tokens(live, workload.batch, workload.tokens)
    for _ in range(min(workload.steps, TRAINING_STEPS)):
        steps.train_step(live.model, live.optimizer, tokens, tokens, scope=live.scope)


def _random_tokens(live: Assembled, batch: int, tokens: int) -> torch.Tensor:
    parameter = next(live.model.parameters())
    config: Any = live.model.config
    size = config.get_text_config().vocab_size
    return torch.randint(0, size, (batch, tokens), device=parameter.device)
