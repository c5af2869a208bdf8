"""What the commands that train on text share: their settings, and what they print."""

from __future__ import annotations

from dataclasses import fields
from typing import TypeVar

import typer

from pintpot.cli._options import Show
from pintpot.cli._output import facts, notes, print_json
from pintpot.cli._tables import record_table, text_record
from pintpot.jobs.text_training import TextResult, TextSettings
from pintpot.ledger.report import table

S = TypeVar("S", bound=TextSettings)


def settings_of(kind: type[S], context: typer.Context) -> S:
    """The settings of a job, from the options of the same names."""
    return kind(**{field.name: context.params[field.name] for field in fields(kind)})


def print_result(title: str, result: TextResult, show: Show) -> None:
    """What a run gave, and with ``show.measure`` its memory."""
    record = text_record(result)
    if show.json:
        print_json(record)
        return
    facts().print(record_table(title, record["figures"]))
    if show.measure:
        notes(show.quiet).print(table(result.plan.predicted, result.measured, result.plan.budget))
