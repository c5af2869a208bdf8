"""``pintpot convert``: write a model whose cache is smaller by its architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pintpot.cli import _options


def command(
    context: typer.Context,
    model: _options.Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; it must not exist.")],
    method: Annotated[
        str, typer.Option("--method", metavar="EXPR", help="How, such as transmla or 'loma(memory_tokens=4)'.")
    ],
    data: Annotated[Path, typer.Option("--data", metavar="PATH", help="JSONL (text, messages), text, or a folder.")],
    rank: Annotated[int | None, typer.Option("--rank", help="Numbers in a latent (transmla, x-ecomla).")] = None,
    samples: Annotated[int, typer.Option("--samples", help="Sequences to calibrate on.")] = 128,
    sample_tokens: Annotated[int, typer.Option("--sample-tokens", help="Their length.")] = 256,
    teacher: Annotated[
        str | None, typer.Option("--teacher", metavar="MODEL", help="A model to distil from; MODEL itself if absent.")
    ] = None,
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
    seed: _options.Seed = 0,
    json: _options.Json = False,
    quiet: _options.Quiet = False,
) -> None:
    """Convert a model's attention for a smaller cache; where it trains, run again to resume."""
    from pintpot.cli._output import facts, print_json
    from pintpot.cli._tables import record_table
    from pintpot.cli._training import settings_of
    from pintpot.jobs.convert import ConvertSettings, convert

    settings = settings_of(ConvertSettings, context)
    progress = not (quiet or json)
    result = convert(model, data, out, method=method, rank=rank, settings=settings, seed=seed, progress=progress)
    record = result.to_dict()
    if json:
        print_json(record)
    else:
        facts().print(record_table(f"converted into {out}", record))
