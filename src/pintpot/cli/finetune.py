"""``pintpot finetune``: train a model further on some text, within a memory budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pintpot.cli import _options


def command(
    context: typer.Context,
    model: _options.Model,
    data: Annotated[Path, typer.Option("--data", metavar="PATH", help="JSONL (text, messages), text, or a folder.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The folder to write; it must not exist.")],
    tokens: _options.SequenceTokens = 512,
    batch: _options.Sequences = 1,
    accumulate: _options.Accumulate = 1,
    steps: _options.Updates = None,
    epochs: _options.Epochs = 1.0,
    learning_rate: _options.LearningRate = None,
    weight_decay: _options.WeightDecay = 0.0,
    validation_fraction: _options.Validation = 0.05,
    validate_every: _options.ValidateEvery = 0,
    checkpoint_every: _options.CheckpointEvery = 100,
    merge: Annotated[bool, typer.Option("--merge", help="Fold adapters in and write a whole model.")] = False,
    device_memory: _options.DeviceMemory = None,
    host_memory: _options.HostMemory = None,
    disk: _options.Disk = None,
    dtype: _options.DataType = None,
    techniques: _options.Techniques = None,
    plan: _options.PlanFile = None,
    measure: _options.Measure = False,
    seed: _options.Seed = 0,
    json: _options.Json = False,
    quiet: _options.Quiet = False,
) -> None:
    """Fine-tune a model; run the same command again to resume."""
    from pintpot.cli._training import print_result, settings_of
    from pintpot.core.workload import Budget
    from pintpot.jobs.choose import Wish
    from pintpot.jobs.finetune import FinetuneSettings, finetune

    settings = settings_of(FinetuneSettings, context)
    budget = Budget.of(device_memory, host_memory, disk)
    wish = Wish(budget=budget, techniques=techniques, plan=plan, dtype=dtype, seed=seed)
    progress = not (quiet or json)
    result = finetune(model, data, out, settings=settings, wish=wish, measure=measure, progress=progress)
    print_result(f"fine-tuned into {out}", result, _options.Show(json=json, quiet=quiet, measure=measure))
