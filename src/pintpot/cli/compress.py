"""``pintpot compress``: write a smaller model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pintpot.cli import _options
from pintpot.cli._output import facts, print_json


def command(
    model: _options.Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; it must not exist.")],
    techniques: Annotated[
        str | None, typer.Option("--techniques", metavar="EXPR", help="How, such as rtn4 or 'gptq(bits=3)'.")
    ] = None,
    size: Annotated[
        str | None, typer.Option("--size", metavar="SIZE", help="Most bytes of the output, such as 900MiB.")
    ] = None,
    plan: _options.PlanFile = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="PATH", help="Text to calibrate or train on; Python's own if absent."),
    ] = None,
    samples: Annotated[int, typer.Option("--samples", help="Sequences to calibrate on.")] = 128,
    sample_tokens: Annotated[int, typer.Option("--sample-tokens", help="Their length.")] = 512,
    steps: Annotated[int | None, typer.Option("--steps", help="Updates, for methods that are trained.")] = None,
    batch: Annotated[int, typer.Option("--batch", help="Sequences in each pass of training.")] = 4,
    learning_rate: _options.LearningRate = None,
    seed: _options.Seed = 0,
    json: _options.Json = False,
    quiet: _options.Quiet = False,
) -> None:
    """Compress a model, block by block, in much less memory than it takes itself; run again to resume."""
    from pintpot.cli._tables import record_table
    from pintpot.jobs.calibration_texts import CalibrationSettings
    from pintpot.jobs.compress import compress
    from pintpot.jobs.model_source import model_folder
    from pintpot.jobs.plan import plan_from_file
    from pintpot.jobs.text import TextSettings

    folder = model_folder(model)
    record = compress(
        folder,
        out,
        techniques=techniques,
        plan=None if plan is None else plan_from_file(plan, folder),
        size=size,
        calibration=CalibrationSettings(data=data, samples=samples, tokens=sample_tokens),
        training=TextSettings(tokens=sample_tokens, batch=batch, steps=steps, learning_rate=learning_rate),
        seed=seed,
        progress=not (quiet or json),
    ).to_dict()
    if json:
        print_json(record)
    else:
        facts().print(record_table(f"compressed to {out}", record))
