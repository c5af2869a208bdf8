"""``pintpot machine``: what this machine can do, measured once and kept."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from pintpot.cli import _options
from pintpot.cli._output import facts, notes, print_json


def command(
    refresh: Annotated[bool, typer.Option("--refresh", help="Measure again.")] = False,
    json: _options.Json = False,
    quiet: _options.Quiet = False,
) -> None:
    """Measure memory bandwidth, arithmetic and disk rates (under 20 s), and keep them for time forecasts."""
    from pintpot.cli._tables import record_table
    from pintpot.kernels import native
    from pintpot.ledger.machine import machine

    with notes(quiet or json).status("measuring this machine"):
        record = machine(refresh=refresh)
    found = {**asdict(record), "kernels": native.path()}
    if json:
        print_json(found)
    else:
        facts().print(record_table("machine", found))
