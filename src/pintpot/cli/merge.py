"""``pintpot merge``: write one folder that can be any of several fine-tuned models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pintpot.cli import _options
from pintpot.cli._output import facts, print_json


def command(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The model that all were made of: a folder or hub name.")],
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="[TASK=]MODEL...", help="Fine-tuned models; a task is called like its folder if unnamed."
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; it must not exist.")],
    modules: Annotated[
        list[str] | None,
        typer.Option(
            "--modules",
            metavar="[TASK=]WHERE",
            help="Where tasks have vectors of their own: all, attention or mlp. May be repeated.",
        ),
    ] = None,
    json: _options.Json = False,
    quiet: _options.Quiet = False,
) -> None:
    """Merge fine-tuned models of one base into the base and 1-bit task vectors; run again to resume."""
    from pintpot.cli._merge import read_models
    from pintpot.cli._tables import record_table
    from pintpot.jobs.merge import merge

    record = merge(base, read_models(models, modules or []), out, progress=not (quiet or json)).to_dict()
    if json:
        print_json(record)
    else:
        facts().print(record_table(f"merged into {out}", record))
