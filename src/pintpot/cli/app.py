"""The application: the commands in the order of the help page, and what happens to their errors."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import Annotated, Any

import typer
import typer.core

from pintpot._version import __version__
from pintpot.cli import (
    calibrate,
    check,
    compress,
    convert,
    demo,
    export,
    finetune,
    generate,
    ledger,
    machine,
    merge,
    plan,
    pretrain,
    techniques,
)
from pintpot.cli._output import print_error
from pintpot.core.errors import Interrupted, PintpotError


class Commands(typer.core.TyperGroup):
    """A group of commands that says what went wrong in one line and a hint, instead of a traceback.

    ``PINTPOT_DEBUG=1`` in the environment shows the traceback.
    """

    def invoke(self, ctx: Any) -> Any:
        """Run the command; an error of ours ends the process with its exit code."""
        previous = _quit_on_terminate()
        try:
            return super().invoke(ctx)
        except PintpotError as error:
            if os.environ.get("PINTPOT_DEBUG") == "1":
                raise
            print_error(error)
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as error:
            if os.environ.get("PINTPOT_DEBUG") == "1":
                raise
            stopped = Interrupted("stopped", hint="nothing half-written is left; run the same command again")
            print_error(stopped)
            raise typer.Exit(stopped.exit_code) from error
        finally:
            if previous is not None:
                signal.signal(signal.SIGTERM, previous)


def _quit_on_terminate() -> Any:
    """Treat a request to terminate as Ctrl-C, so that jobs end in a state that can be resumed."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    try:
        return signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not in the main thread: signals belong to whoever runs us
        return None


app = typer.Typer(
    cls=Commands,
    name="pintpot",
    help="Fit a language model into the memory you have: predict, plan, fit, run and measure.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"pintpot {__version__}\n")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Fit a language model into the memory you have: predict, plan, fit, run and measure."""


for _name, _module in (
    ("generate", generate),
    ("finetune", finetune),
    ("pretrain", pretrain),
    ("compress", compress),
    ("convert", convert),
    ("merge", merge),
    ("check", check),
    ("export", export),
    ("calibrate", calibrate),
    ("plan", plan),
    ("ledger", ledger),
    ("machine", machine),
    ("techniques", techniques),
    ("demo", demo),
):
    app.command(_name)(_module.command)
