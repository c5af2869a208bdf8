"""``pintpot calibrate``: fit a cache technique to a model, once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pintpot.cli import _options


def command(
    model: _options.Model,
    technique: Annotated[str, typer.Argument(metavar="EXPR", help="What to fit, such as cskv or 'aqua-kv(bits=2)'.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write; it must not exist.")],
    data: Annotated[Path, typer.Option("--data", metavar="PATH", help="JSONL (text, messages), text, or a folder.")],
    samples: Annotated[int, typer.Option("--samples", help="Sequences to look at.")] = 16,
    sample_tokens: Annotated[int, typer.Option("--sample-tokens", help="Their length.")] = 512,
    seed: _options.Seed = 0,
    json: _options.Json = False,
    quiet: _options.Quiet = False,
) -> None:
    """Fit a cache technique to a model on text; the file it writes is then given as its calibration."""
    from pintpot.cli._output import facts, notes, print_json
    from pintpot.cli._tables import record_table
    from pintpot.jobs.calibrate import calibrate_file

    with notes(quiet or json).status(f"fitting {technique}"):
        done = calibrate_file(model, technique, data, out, samples=samples, sample_tokens=sample_tokens, seed=seed)
    if json:
        print_json(done.to_dict())
    else:
        facts().print(record_table(f"calibrated into {out}", done.to_dict()))
