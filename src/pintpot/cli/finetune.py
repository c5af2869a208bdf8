"""``pintpot finetune``: train a model further on some text, within a memory budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pintpot.cli import _options
from pintpot.cli._output import facts, notes, print_json


def command(
    model: _options.Model,
    data: Annotated[Path, typer.Option("--data", metavar="PATH", help="JSONL (text, messages), text, or a folder.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The folder to write; it must not exist.")],
    tokens: Annotated[int, typer.Option("--tokens", help="Length of the packed sequences.")] = 512,
    batch: Annotated[int, typer.Option("--batch", help="Sequences in each pass.")] = 1,
    accumulate: Annotated[int, typer.Option("--accumulate", help="Passes in one update.")] = 1,
    steps: Annotated[int | None, typer.Option("--steps", help="Updates; by --epochs if absent.")] = None,
    epochs: Annotated[float, typer.Option("--epochs", help="How often each text is seen.")] = 1.0,
    learning_rate: Annotated[
        float | None,
        typer.Option("--learning-rate", "--lr", help="The highest, after warm-up; by default the optimizer's usual."),
    ] = None,
    weight_decay: Annotated[float, typer.Option("--weight-decay")] = 0.0,
    validation: Annotated[float, typer.Option("--validation", help="Share of the documents held out.")] = 0.05,
    validate_every: Annotated[int, typer.Option("--validate-every", help="Updates between validations.")] = 0,
    checkpoint_every: Annotated[int, typer.Option("--checkpoint-every", help="Updates between checkpoints.")] = 100,
    merge: Annotated[bool, typer.Option("--merge", help="Fold adapters in and write a whole model.")] = False,
    device_memory: _options.DeviceMemory = None,
    host_memory: _options.HostMemory = None,
    disk: _options.Disk = None,
    dtype: _options.DataType = None,
    techniques: _options.Techniques = None,
    plan: _options.PlanFile = None,
    measure: Annotated[bool, typer.Option("--measure", help="Show measured beside predicted memory.")] = False,
    seed: _options.Seed = 0,
    json: _options.Json = False,
    quiet: _options.Quiet = False,
) -> None:
    """Fine-tune a model; run the same command again to resume."""
    from pintpot.cli._tables import finetune_record, record_table
    from pintpot.core.workload import Budget
    from pintpot.jobs.choose import Wish
    from pintpot.jobs.finetune import FinetuneSettings, finetune
    from pintpot.ledger.report import table

    settings = FinetuneSettings(
        tokens=tokens,
        batch=batch,
        accumulate=accumulate,
        steps=steps,
        epochs=epochs,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        validation_fraction=validation,
        validate_every=validate_every,
        checkpoint_every=checkpoint_every,
        merge=merge,
    )
    wish = Wish(
        budget=Budget.of(device_memory, host_memory, disk),
        techniques=techniques,
        plan=plan,
        dtype=dtype,
        seed=seed,
    )
    show = not (quiet or json)
    result = finetune(model, data, out, settings=settings, wish=wish, measure=measure, progress=show)
    if json:
        print_json(finetune_record(result))
        return
    facts().print(record_table(f"fine-tuned into {out}", finetune_record(result)["figures"]))
    if measure:
        notes(quiet).print(table(result.plan.predicted, result.measured, result.plan.budget))
