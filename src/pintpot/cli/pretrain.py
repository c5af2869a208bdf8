"""``pintpot pretrain``: train a model from random weights, by its configuration and some text, or by a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pintpot.cli import _options
from pintpot.cli._output import facts, print_json

RECIPES = (".yaml", ".yml")
"""Endings of files that are taken for recipes."""

_BESIDE_RECIPES = frozenset({"source", "data", "out", "steps", "seed", "json", "quiet"})
"""What can be given with a recipe."""


def command(
    context: typer.Context,
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A folder with a config.json, that file, a hub name, or a recipe.")
    ],
    data: Annotated[
        Path, typer.Argument(metavar="DATA", help="JSONL (text, messages), text, or a folder; not with a recipe.")
    ],
    out: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="The folder to write; it must not exist.", show_default=False)
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", metavar="DIR", help="By default SOURCE's own; if it has none, made from DATA."),
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
    """Train a model from random weights; run the same command again to resume.

    `pintpot pretrain CONFIG DATA OUT` trains the model of a configuration on any text, as finetune does.
    `pintpot pretrain RECIPE.yaml OUT` repeats a run, such as the reference model's, of which the recipe says all but
    --steps and --seed.
    """
    from pintpot.cli._training import print_result, settings_of
    from pintpot.core.errors import DataError
    from pintpot.core.workload import Budget
    from pintpot.jobs.choose import Wish
    from pintpot.jobs.pretrain import PretrainSettings, pretrain

    progress = not (quiet or json)
    if Path(source).suffix.lower() in RECIPES:
        _by_recipe(context, out or data, progress, json)
        return
    if out is None:
        raise DataError(
            f"text to train {source} on, or the folder to write, is missing",
            hint="pintpot pretrain CONFIG DATA OUT, or with a recipe: pintpot pretrain RECIPE.yaml OUT",
        )
    settings = settings_of(PretrainSettings, context)
    budget = Budget.of(device_memory, host_memory, disk)
    wish = Wish(budget=budget, techniques=techniques, plan=plan, dtype=dtype, seed=seed)
    result = pretrain(
        source, data, out, tokenizer=tokenizer, settings=settings, wish=wish, measure=measure, progress=progress
    )
    print_result(f"pretrained into {out}", result, _options.Show(json=json, quiet=quiet, measure=measure))


def _by_recipe(context: typer.Context, out: Path, progress: bool, json: bool) -> None:
    """Train by a recipe, with no more options than it leaves open."""
    from pintpot.cli._tables import record_table, training_record
    from pintpot.core.errors import PlanError
    from pintpot.jobs.pretrain_recipe import pretrain_recipe

    source = context.params["source"]
    given = {name for name in context.params if _was_given(context, name)}
    flags = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    wrong = ["DATA"] if context.params["out"] is not None else []
    wrong += sorted(flags[name] for name in given - _BESIDE_RECIPES)
    if wrong:
        raise PlanError(
            f"{source} is a recipe, beside which {', '.join(wrong)} cannot be given",
            hint="change the recipe (its text, model, optimizer, stages), or give a configuration instead of it",
        )
    seed = context.params["seed"] if "seed" in given else None
    result = pretrain_recipe(Path(source), out, steps=context.params["steps"], seed=seed, progress=progress)
    record = training_record(out, result)
    if json:
        print_json(record)
    else:
        facts().print(record_table(f"trained into {out}", record))


def _was_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
