"""``pintpot export``: write a folder in the format of another program."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pintpot.cli import _options
from pintpot.cli._output import facts, print_json


def command(
    model: Annotated[str, typer.Argument(metavar="FOLDER", help="A model folder, dense or compressed.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="What to write: a folder, or for gguf a file.")],
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="safetensors, compressed-tensors or gguf.")],
    json: _options.Json = False,
) -> None:
    """Write a compressed model for other programs: dense safetensors, compressed-tensors (vLLM) or GGUF (llama.cpp).

    Numbers stay exactly as they are where the format has the like; what is not exact is said. What has no counterpart
    is refused, with the reason.
    """
    from pintpot.cli._tables import record_table
    from pintpot.jobs.model_source import model_folder
    from pintpot.weights.export import export_folder

    record = export_folder(model_folder(model), out, to).to_dict()
    if json:
        print_json(record)
    else:
        facts().print(record_table(f"exported {model} to {to}", record))
