"""Training on text, as fine-tuning and pretraining do it: from documents to a folder that transformers loads.

Everything that can be wrong with model, data, plan and disk is found before training starts. The result appears
under its name only when complete; until then ``<out>.partial`` holds checkpoints, and the same call goes on from them.
"""

from __future__ import annotations

import json
import math
import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerBase

from pintpot.core.errors import BudgetError, CompositionError
from pintpot.core.expression import expression
from pintpot.core.files import new_folder, refuse_existing, require_disk, scratch, write_atomic
from pintpot.core.ledger import Account, Ledger, Tier
from pintpot.core.plan import Plan
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Technique
from pintpot.core.units import format_bytes
from pintpot.core.workload import Train
from pintpot.jobs.assemble import Composition, Rates, undress
from pintpot.jobs.batches import IntArray, PackedText
from pintpot.jobs.choose import Wish, choose, require_fit
from pintpot.jobs.dtypes import DTYPES
from pintpot.jobs.load import no_progress_bars
from pintpot.jobs.streamed import save_streamed
from pintpot.jobs.text import Text, TextSettings, require_range, seed_everything, update_batches
from pintpot.jobs.training import TrainResult, TrainSettings, train, warmup_stable_decay
from pintpot.jobs.training_state import streamed_weights
from pintpot.ledger.measure import measure as measure_memory
from pintpot.ledger.predict import Assembled
from pintpot.optim._base import OptimExtra, OptimMethod
from pintpot.planner.plan_file import write_plan

CHECKPOINTS = "checkpoints"
"""The folder inside the unfinished output that holds the checkpoints."""

STREAMED = "streamed"
"""The folder inside the unfinished output for weights that are on disk while they are trained."""

KEPT_CHECKPOINTS = 2
"""How many stay at any time."""

HELD_OUT_ROWS = 32
"""Sequences of held-out text that the loss is measured on, at most."""


@dataclass(frozen=True, kw_only=True)
class TextResult:
    """What training on text gave.

    Attributes:
        out: the folder.
        plan: what was run.
        training: the curve.
        loss_before: nats per token of the held-out text before training; ``None`` when nothing is held out.
        loss_after: the same after training.
        measured: the ledger of the run, when it was measured.
    """

    out: Path
    plan: Plan
    training: TrainResult
    loss_before: float | None
    loss_after: float | None
    measured: Ledger | None


@dataclass(frozen=True, kw_only=True)
class TextJob(ABC):
    """What one kind of training on text does its own way.

    Attributes:
        source: the model folder, or its configuration.
        tokenizer: what the text is read with, and what is saved with the model.
    """

    workload: ClassVar[type[Train]]

    source: Path
    tokenizer: PreTrainedTokenizerBase

    def check(self, plan: Plan) -> None:  # noqa: B027 (most jobs can run any plan that was chosen for them)
        """Refuse a plan that could only fail later.

        Raises:
            CompositionError: saying what to leave out.
        """

    @abstractmethod
    def assemble(self, plan: Plan, rates: Rates, place: Path) -> Assembled:
        """The model, its optimizer and its scope, ready to train; ``place`` is for weights that stay on disk."""

    @abstractmethod
    def finished(self, model: Any, plan: Plan) -> Any:
        """The trained model as it is saved."""


def train_on_text(
    job: TextJob, text: Text, out: str | Path, settings: TextSettings, wish: Wish, *, measure: bool, progress: bool
) -> TextResult:
    """Plan a job, run it on a text, and save what comes; the other arguments are those of ``finetune``.

    Raises:
        PintpotError: as ``finetune`` and ``pretrain`` do.
    """
    target = refuse_existing(out)
    require_range(job.source, text, settings.tokens)
    batches = update_batches(text, settings, wish.seed)
    steps = len(batches) // settings.accumulate
    workload = job.workload(batch=settings.batch, tokens=settings.tokens, steps=steps)
    plan = require_fit(choose(job.source, workload, wish))
    job.check(plan)
    _require_room(plan, job.source, target)
    with new_folder(target, resume=True) as partial, scratch(partial / STREAMED) as place, ExitStack() as stack:
        seed_everything(plan.seed)
        run = stack.enter_context(measure_memory(budget=plan.budget)) if measure else None
        with run.phase("load") if run is not None else nullcontext():
            live = job.assemble(plan, _rates(plan, settings), place)
        if run is not None:
            run.register(live.model, live.optimizer)
        before = held_out_loss(live.model, text.held_out, settings)
        training = _train(live, batches, text, plan, settings, partial / CHECKPOINTS, progress)
        after = held_out_loss(live.model, text.held_out, settings)
        stack.close()
        result = TextResult(
            out=target,
            plan=plan,
            training=training,
            loss_before=before,
            loss_after=after,
            measured=None if run is None else run.ledger,
        )
        _save(job, live, result, settings, partial)
    return result


@torch.no_grad()
def held_out_loss(model: nn.Module, tokens: IntArray, settings: TextSettings) -> float | None:
    """Mean loss (nats per token) over at most the first rows of held-out tokens; ``None`` when there are too few."""
    if len(tokens) < 2:
        return None
    width = min(settings.tokens, len(tokens))
    rows = torch.from_numpy(tokens[: len(tokens) // width * width].reshape(-1, width)[:HELD_OUT_ROWS])
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    parts = rows.split(settings.batch)
    losses = []
    for part in parts:
        inputs = part.to(device)
        losses.append(float(model(input_ids=inputs, labels=inputs, use_cache=False).loss) * len(part))
    model.train(was_training)
    return sum(losses) / len(rows)


def usual_learning_rate(techniques: Sequence[Technique], job: str) -> float:
    """The learning rate that is usual for a job with the optimizer among some techniques, AdamW where there is none."""
    rules = (type(technique) for technique in techniques if isinstance(technique, OptimMethod))
    factors = (technique.rate_factor for technique in techniques if isinstance(technique, OptimExtra))
    return next(rules, OptimMethod).learning_rate_of(job) * math.prod(factors)


def trained_by(live: Assembled) -> Optimizer:
    """The optimizer of a job that trains.

    Raises:
        CompositionError: when the job has none.
    """
    if live.optimizer is None:
        raise CompositionError("the plan gives no optimizer", hint="make a plan with: pintpot plan --job finetune")
    return live.optimizer


def _train(
    live: Assembled,
    batches: PackedText,
    text: Text,
    plan: Plan,
    settings: TextSettings,
    checkpoints: Path,
    progress: bool,
) -> TrainResult:
    steps = len(batches) // settings.accumulate
    run = {
        "settings": asdict(settings),
        "text": text.digest,
        "model": plan.model.fingerprint,
        "dtype": plan.model.dtype,
        "techniques": expression(plan.techniques),
        "seed": plan.seed,
    }
    return train(
        live.model,
        batches,
        trained_by(live),
        warmup_stable_decay(warmup=max(1, min(100, steps // 10)), decay=max(1, steps // 2), steps=steps),
        TrainSettings(
            accumulate=settings.accumulate,
            checkpoints=checkpoints,
            checkpoint_every=settings.checkpoint_every,
            keep_checkpoints=KEPT_CHECKPOINTS,
            trainable_only=True,
            validate_every=settings.validate_every,
            run=run,
            memory_budget_bytes=plan.budget.device,
            progress=progress,
        ),
        validate=lambda model: {"held_out_loss": held_out_loss(model, text.held_out, settings) or math.nan},
        around_step=live.scope,
    )


def _rates(plan: Plan, settings: TextSettings) -> Rates:
    usual = usual_learning_rate(plan.techniques, plan.workload.job)
    return Rates(usual if settings.learning_rate is None else settings.learning_rate, settings.weight_decay)


def _require_room(plan: Plan, source: Path, out: Path) -> None:
    """Refuse to begin what the disk, or the budget of it, cannot hold."""
    shape = ModelShape.from_folder(source, DTYPES[plan.model.dtype])
    state = plan.predicted.peak_of(Account.OPTIMIZER)
    written = shape.weight_bytes + (KEPT_CHECKPOINTS + 1) * (shape.weight_bytes + state)
    written += plan.predicted.peak_bytes(Tier.DISK)
    require_disk(out, written)
    if plan.budget.disk is not None and written > plan.budget.disk:
        raise BudgetError(
            f"checkpoints and result take {format_bytes(written)} of disk, more than {format_bytes(plan.budget.disk)}",
            hint="allow more with --disk; adapters and small optimizer states make small checkpoints",
        )


def _save(job: TextJob, live: Assembled, result: TextResult, settings: TextSettings, partial: Path) -> None:
    """Write what transformers (or peft, for adapters) loads, with the plan and the ledgers beside it."""
    model: Any = live.model
    store = streamed_weights(live.optimizer)
    undress(model, Composition.of(result.plan.techniques, job.workload.job))
    with no_progress_bars():
        if store is not None:
            save_streamed(model, store, job.source, partial)
        else:
            job.finished(model, result.plan).save_pretrained(partial)
    job.tokenizer.save_pretrained(partial)
    write_plan(result.plan, partial / "plan.yaml")
    ledgers = {
        "predicted": result.plan.predicted.to_dict(),
        "measured": None if result.measured is None else result.measured.to_dict(),
    }
    write_atomic(partial / "ledger.json", json.dumps(ledgers, indent=1))
    figures = {
        "held_out_loss_before": result.loss_before,
        "held_out_loss_after": result.loss_after,
        "settings": asdict(settings),
        "curve": result.training.curve,
    }
    write_atomic(partial / "training.json", json.dumps(figures, indent=1))
    shutil.rmtree(partial / CHECKPOINTS, ignore_errors=True)
