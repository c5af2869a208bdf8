"""``pintpot plan``: choose the techniques that make a job fit, and say what that costs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pintpot.cli import _options
from pintpot.cli._output import facts, notes, print_json


def command(
    model: _options.Model,
    job: Annotated[str, typer.Option("--job", help="generate, finetune, pretrain or compress.")] = "generate",
    batch: _options.Batch = None,
    prompt_tokens: _options.PromptTokens = None,
    new_tokens: _options.NewTokens = None,
    tokens: _options.Tokens = None,
    steps: _options.Steps = None,
    device_memory: _options.DeviceMemory = None,
    host_memory: _options.HostMemory = None,
    disk: _options.Disk = None,
    weights_size: _options.WeightsSize = None,
    dtype: _options.DataType = None,
    techniques: _options.Techniques = None,
    cache: _options.CacheExpression = None,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", metavar="NAME", help="Never use this technique (repeatable).")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the plan here (YAML).")
    ] = None,
    seed: _options.Seed = 0,
    json: _options.Json = False,
    quiet: _options.Quiet = False,
) -> None:
    """Plan a job within a memory budget, from the model's configuration alone."""
    from pintpot.core.files import refuse_existing
    from pintpot.core.workload import Budget
    from pintpot.jobs.choose import Wish, choose, workload_of
    from pintpot.planner.explain import explain, plan_to_dict
    from pintpot.planner.plan_file import write_plan

    if output is not None:
        refuse_existing(output)
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
        exclude=tuple(exclude or ()),
        weights_size=weights_size,
        dtype=dtype,
        seed=seed,
    )
    with notes(quiet or json).status("planning"):
        chosen = choose(model, workload_of(job, sizes), wish)
    if output is not None:
        write_plan(chosen, output)
    if json:
        print_json(plan_to_dict(chosen))
        return
    facts().print(explain(chosen))
    if output is not None:
        notes(quiet).print(f"written to {output}; run it with: pintpot {job} {model} --plan {output}")
