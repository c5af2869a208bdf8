"""Fine-tuning: from a model folder and some text to a folder that transformers loads.

Everything that can be wrong with model, data, plan and disk is found before training starts. The result appears
under its name only when complete; until then ``<out>.partial`` holds checkpoints, and the same call goes on from them.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import shutil
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerBase

from pintpot.core.errors import BudgetError, CompositionError, DataError
from pintpot.core.expression import expression
from pintpot.core.files import new_folder, refuse_existing, require_disk, write_atomic
from pintpot.core.ledger import Account, Ledger
from pintpot.core.model_folder import open_model
from pintpot.core.plan import Plan
from pintpot.core.shape import ModelShape
from pintpot.core.units import format_bytes
from pintpot.core.workload import Finetune
from pintpot.jobs.assemble import Rates, assemble
from pintpot.jobs.batches import IntArray, PackedText
from pintpot.jobs.choose import Wish, choose, require_fit
from pintpot.jobs.documents import encode, read_documents, split
from pintpot.jobs.dtypes import DTYPES
from pintpot.jobs.load import load_tokenizer
from pintpot.jobs.model_source import model_folder
from pintpot.jobs.training import TrainResult, TrainSettings, train, warmup_stable_decay
from pintpot.ledger.measure import measure as measure_memory
from pintpot.ledger.predict import Assembled
from pintpot.optim._base import OptimMethod
from pintpot.planner.plan_file import write_plan

CHECKPOINTS = "checkpoints"
"""The folder inside the unfinished output that holds the checkpoints."""

KEPT_CHECKPOINTS = 2
"""How many stay at any time."""

HELD_OUT_ROWS = 32
"""Sequences of held-out text that the loss is measured on, at most."""


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings:
    """How to fine-tune.

    Attributes:
        tokens: length of the packed sequences.
        batch: sequences in each forward and backward pass.
        accumulate: passes in one update.
        steps: updates; when ``None``, so many that each text is seen ``epochs`` times.
        epochs: used when ``steps`` is not given.
        learning_rate: the highest, after warm-up; what is usual for the plan's optimizer when ``None``.
        weight_decay: of the optimizer.
        validation_fraction: share of the documents held out (of the tokens, when there is one document).
        validate_every: updates between validations; 0 for one before and one after.
        checkpoint_every: updates between checkpoints.
        merge: fold adapters into the weights and write a whole model.
    """

    tokens: int = 512
    batch: int = 1
    accumulate: int = 1
    steps: int | None = None
    epochs: float = 1.0
    learning_rate: float | None = None
    weight_decay: float = 0.0
    validation_fraction: float = 0.05
    validate_every: int = 0
    checkpoint_every: int = 100
    merge: bool = False


@dataclass(frozen=True, kw_only=True)
class FinetuneResult:
    """What fine-tuning gave.

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
class Text:
    """The tokens to train on and those held out, int64 (N,), and a digest of both."""

    training: IntArray
    held_out: IntArray
    digest: str


def read_text(data: str | Path, tokenizer: PreTrainedTokenizerBase, settings: FinetuneSettings, seed: int) -> Text:
    """Read, encode and split the data.

    Raises:
        DataError: when it cannot be read, or is less than one sequence.
    """
    documents = read_documents(data)
    if len(documents) > 1:
        kept, held = split(documents, settings.validation_fraction, seed)
        training, held_out = encode(tokenizer, kept), encode(tokenizer, held)
    else:
        tokens = encode(tokenizer, documents)
        cut = len(tokens) - math.floor(len(tokens) * settings.validation_fraction)
        training, held_out = tokens[:cut], tokens[cut:]
    if len(training) < 2:
        raise DataError(f"{data} gives {len(training)} training tokens", hint="give more text")
    digest = hashlib.sha256(training.tobytes() + b"|" + held_out.tobytes()).hexdigest()
    return Text(training=training, held_out=held_out, digest=digest)


def finetune(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    settings: FinetuneSettings | None = None,
    wish: Wish | None = None,
    measure: bool = False,
    progress: bool = True,
) -> FinetuneResult:
    """Fine-tune a model; the same call resumes a run that was stopped.

    Args:
        model: a model folder or hub name.
        data: JSON Lines with ``text`` or ``messages``, a text file, or a folder of them.
        out: the folder to write; must not exist.
        settings: how to train.
        wish: the memory budget, techniques or plan.
        measure: record the measured ledger.
        progress: show progress.

    Raises:
        PintpotError: for bad input, each kind with its own class and a hint; nothing half-written is left.
        Interrupted: after Ctrl-C or SIGTERM, with a checkpoint written.
    """
    settings, wish = settings or FinetuneSettings(), wish or Wish()
    target = refuse_existing(out)
    folder = model_folder(model)
    tokenizer = load_tokenizer(folder)
    text = read_text(data, tokenizer, settings, wish.seed)
    batches = _batches(text, settings, wish.seed)
    workload = Finetune(batch=settings.batch, tokens=settings.tokens, steps=len(batches) // settings.accumulate)
    plan = require_fit(choose(folder, workload, wish))
    _check(plan, settings, folder, target)
    with new_folder(target, resume=True) as partial, ExitStack() as stack:
        _seed_everything(plan.seed)
        run = stack.enter_context(measure_memory(budget=plan.budget)) if measure else None
        with run.phase("load") if run is not None else nullcontext():
            live = assemble(folder, plan, _rates(plan, settings))
        if run is not None:
            run.register(live.model, live.optimizer)
        before = held_out_loss(live.model, text.held_out, settings)
        training = _train(live, batches, text, plan, settings, partial / CHECKPOINTS, progress)
        after = held_out_loss(live.model, text.held_out, settings)
        stack.close()
        result = FinetuneResult(
            out=target,
            plan=plan,
            training=training,
            loss_before=before,
            loss_after=after,
            measured=None if run is None else run.ledger,
        )
        _save(live.model, tokenizer, result, settings, folder, partial)
    return result


@torch.no_grad()
def held_out_loss(model: nn.Module, tokens: IntArray, settings: FinetuneSettings) -> float | None:
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


def _batches(text: Text, settings: FinetuneSettings, seed: int) -> PackedText:
    """The packed training sequences of the whole run."""
    rows = PackedText(text.training, sequence_tokens=settings.tokens, sequences=settings.batch, seed=seed)
    per_update = settings.batch * settings.accumulate
    steps = settings.steps or max(1, math.ceil(settings.epochs * rows.blocks / per_update))
    return PackedText(
        text.training,
        sequence_tokens=settings.tokens,
        sequences=settings.batch,
        steps=steps * settings.accumulate,
        seed=seed,
    )


def _train(
    live: Assembled,
    batches: PackedText,
    text: Text,
    plan: Plan,
    settings: FinetuneSettings,
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
        _optimizer(live),
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


def _rates(plan: Plan, settings: FinetuneSettings) -> Rates:
    if settings.learning_rate is not None:
        return Rates(settings.learning_rate, settings.weight_decay)
    rules = (type(technique) for technique in plan.in_slot("optimizer") if isinstance(technique, OptimMethod))
    return Rates(next(rules, OptimMethod).usual_learning_rate, settings.weight_decay)


def _optimizer(live: Assembled) -> Optimizer:
    if live.optimizer is None:
        raise CompositionError("the plan gives no optimizer", hint="make a plan with: pintpot plan --job finetune")
    return live.optimizer


def _check(plan: Plan, settings: FinetuneSettings, folder: Path, out: Path) -> None:
    """Refuse what could only fail later: too little disk, or a merge of nothing."""
    if settings.merge and not plan.in_slot("adapters"):
        raise CompositionError("there are no adapters to merge", hint="drop --merge, or use adapters such as lora")
    if settings.merge and plan.in_slot("weights"):
        raise CompositionError(
            "adapters cannot be merged into packed weights without rounding them away",
            hint="drop --merge and keep the adapter folder",
        )
    shape = ModelShape.from_folder(folder, DTYPES[plan.model.dtype])
    state = plan.predicted.peak_of(Account.OPTIMIZER)
    written = shape.weight_bytes + (KEPT_CHECKPOINTS + 1) * (shape.weight_bytes + state)
    require_disk(out, written)
    if plan.budget.disk is not None and written > plan.budget.disk:
        raise BudgetError(
            f"checkpoints and result take {format_bytes(written)} of disk, more than {format_bytes(plan.budget.disk)}",
            hint="allow more with --disk, or use adapters, whose checkpoints are small",
        )


def _save(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    result: FinetuneResult,
    settings: FinetuneSettings,
    folder: Path,
    partial: Path,
) -> None:
    """Write what transformers (or peft, for adapters) loads, with the plan and the ledgers beside it."""
    adapters = result.plan.in_slot("adapters")
    if settings.merge:
        model = model.merge_and_unload()
    if settings.merge or not adapters:
        model.to(open_model(folder, match=False).dtype)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
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


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (libraries below us use the global generator)
    torch.manual_seed(seed)
