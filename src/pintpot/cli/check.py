"""``pintpot check``: is a model folder whole."""

from __future__ import annotations

from typing import Annotated

import typer

from pintpot.cli import _options
from pintpot.cli._output import facts, print_json


def command(
    model: Annotated[str, typer.Argument(metavar="FOLDER", help="A model folder, dense or compressed.")],
    json: _options.Json = False,
) -> None:
    """Read every tensor of a model folder and name those that are damaged.

    Tensors are compared with the checksums that compressing wrote; without these, files, names, shapes and NaN or Inf
    are checked. Exits with 0 when nothing is wrong, 1 when tensors are damaged, and 2 when the folder cannot be opened.
    """
    from pintpot.cli._tables import record_table
    from pintpot.jobs.model_source import model_folder
    from pintpot.weights.integrity import check_folder

    found = check_folder(model_folder(model))
    if json:
        print_json(found.to_dict())
    else:
        facts().print(record_table(f"{model} is {'whole' if found.whole else 'damaged'}", found.to_dict()))
    if not found.whole:
        raise typer.Exit(1)
