"""``pintpot ledger``: run a job on random tokens and show its memory, predicted beside measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pintpot.cli import _options
from pintpot.cli._output import facts, notes, print_json


def command(
    model: _options.Model,
    job: Annotated[str, typer.Option("--job", help="generate, finetune or pretrain.")] = "generate",
    batch: _options.Batch = None,
    prompt_tokens: _options.PromptTokens = None,
    new_tokens: _options.NewTokens = None,
    tokens: _options.Tokens = None,
    steps: _options.Steps = None,
    device_memory: _options.DeviceMemory = None,
    host_memory: _options.HostMemory = None,
    disk: _options.Disk = None,
    dtype: _options.DataType = None,
    techniques: _options.Techniques = None,
    cache: _options.CacheExpression = None,
    plan: _options.PlanFile = None,
    png: Annotated[Path | None, typer.Option("--png", metavar="FILE", help="Draw memory over time here.")] = None,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write a self-contained page.")] = None,
    predict_only: Annotated[bool, typer.Option("--predict-only", help="Load no weights and run nothing.")] = False,
    seed: _options.Seed = 0,
    json: _options.Json = False,
    quiet: _options.Quiet = False,
) -> None:
    """Measure a run of a model and a job with techniques, beside what was predicted for it."""
    from pintpot.core.workload import Budget
    from pintpot.jobs.choose import Wish, choose, workload_of
    from pintpot.jobs.measure_run import measure_run
    from pintpot.jobs.pictures import write_pictures
    from pintpot.ledger.report import table, to_json

    sizes = {
        "batch": batch,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "tokens": tokens,
        "steps": steps,
    }
    wish = Wish(
        budget=Budget.of(device_memory, host_memory, disk),
        techniques=_options.joined(techniques, cache),
        plan=plan,
        dtype=dtype,
        seed=seed,
    )
    with notes(quiet or json).status("predicting") as status:
        chosen = choose(model, workload_of(job, sizes), wish)
        status.update("running")
        measured = None if predict_only else measure_run(chosen)
    write_pictures(chosen, measured, png=png, html=html)
    if json:
        print_json(to_json(chosen.predicted, measured, chosen.budget))
    else:
        facts().print(table(chosen.predicted, measured, chosen.budget))
