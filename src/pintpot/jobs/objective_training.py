"""Training a module on its own objective, with checkpoints: what conversions and trained weights have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pintpot.jobs.text import Text, TextSettings, update_batches
from pintpot.jobs.training import TrainResult, TrainSettings, train, warmup_stable_decay


def train_objective(
    module: nn.Module,
    text: Text,
    settings: TextSettings,
    *,
    learning_rate: float,
    run: dict[str, Any],
    checkpoints: Path,
    validate: Callable[[], float | None],
    observe: Callable[[], None] = lambda: None,
    follow: Callable[[float], None] = lambda progress: None,
    progress: bool,
) -> TrainResult:
    """Train a module whose ``forward(input_ids, labels, use_cache)`` gives a ``loss``, in place, with AdamW.

    Args:
        module: its trainable parameters are trained.
        text: what it reads.
        settings: sizes of the training.
        learning_rate: where the settings name none.
        run: identifies the run, with its ``seed``; checkpoints of another one are refused.
        checkpoints: the folder for them; the same call goes on from the last.
        validate: the held-out loss of what is trained, or None.
        observe: told before each update, when the gradients are complete and clipped.
        follow: told after each update which share of them is done.
        progress: show it.
    """
    batches = update_batches(text, settings, run["seed"])
    steps = len(batches) // settings.accumulate
    rate = learning_rate if settings.learning_rate is None else settings.learning_rate
    wanted = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(wanted, lr=rate, weight_decay=settings.weight_decay)
    optimizer.register_step_pre_hook(lambda *_: observe())
    return train(
        module,
        batches,
        optimizer,
        warmup_stable_decay(warmup=max(1, steps // 100), decay=steps, steps=steps),
        TrainSettings(
            accumulate=settings.accumulate,
            checkpoints=checkpoints,
            checkpoint_every=settings.checkpoint_every,
            trainable_only=True,
            validate_every=settings.validate_every,
            run={**run, "settings": asdict(settings), "text": text.digest},
            progress=progress,
        ),
        validate=lambda _: {"held_out_loss": validate() or float("nan")},
        on_step=lambda step, _: follow(step / steps),
    )
