"""The commands as a whole: help, version, errors in one line, JSON alone on standard output."""

import json
import os
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from pintpot._version import __version__
from pintpot.cli.app import app
from pintpot.core.errors import Interrupted, PintpotError

COMMANDS = (
    "generate",
    "finetune",
    "pretrain",
    "compress",
    "merge",
    "check",
    "export",
    "plan",
    "ledger",
    "machine",
    "techniques",
    "demo",
)
runner = CliRunner()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command):
    result = runner.invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.stdout


def test_version():
    result = runner.invoke(app, ["--version"])
    assert result.stdout.strip() == f"pintpot {__version__}"


def test_help_imports_no_heavy_library():
    code = (
        "import sys; from typer.testing import CliRunner; from pintpot.cli.app import app; "
        "CliRunner().invoke(app, ['plan', '--help']); "
        "print([m for m in ('torch', 'transformers', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def failing(error: BaseException) -> typer.Typer:
    """The application's group around one command that fails."""
    other = typer.Typer(cls=type(typer.main.get_command(app)), pretty_exceptions_enable=False)

    @other.command("fail")
    def fail() -> None:
        raise error

    @other.command("other")
    def unused() -> None: ...

    return other


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (PintpotError("broken\nthing", hint="mend it"), 2, ["error: broken thing", "hint: mend it"]),
        (
            Interrupted("stopped at step 3", hint="run it again"),
            130,
            ["error: stopped at step 3", "hint: run it again"],
        ),
    ],
)
def test_an_error_is_one_line_and_a_hint(error, code, lines):
    result = runner.invoke(failing(error), ["fail"])
    assert result.exit_code == code
    assert result.stderr.splitlines() == lines
    assert result.stdout == ""


def test_interruption_ends_quietly():
    result = runner.invoke(failing(KeyboardInterrupt()), ["fail"])
    assert result.exit_code == 130
    assert "run the same command again" in result.stderr
    assert "Traceback" not in result.stderr


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("PINTPOT_DEBUG", "1")
    result = runner.invoke(failing(PintpotError("broken")), ["fail"])
    assert isinstance(result.exception, PintpotError)


def test_a_wrong_path_from_a_real_process(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "pintpot.cli", "generate", str(tmp_path / "nothing"), "--prompt", "x", "--json"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PINTPOT_DEBUG": ""},
    )
    assert done.returncode == 2
    assert done.stdout == ""
    # Other libraries may have said something at their import.
    said = done.stderr.splitlines()[-2:]
    assert [line.split(":")[0] for line in said] == ["error", "hint"]
    assert "Traceback" not in done.stderr


def test_techniques_are_listed_with_all_their_facts():
    result = runner.invoke(app, ["techniques", "--json"])
    assert result.exit_code == 0, result.output
    entries = json.loads(result.stdout)
    assert {"rtn", "lora", "galore"} <= {entry["name"] for entry in entries}
    for entry in entries:
        assert {"name", "wing", "source", "accounts", "saving", "fidelity", "claims", "evidence"} <= entry.keys()
        assert entry["summary"]
    one_wing = json.loads(runner.invoke(app, ["techniques", "--wing", "weights", "--json"]).stdout)
    assert {entry["wing"] for entry in one_wing} == {"weights"}


def test_the_page_of_a_technique_shows_headings_claims_and_evidence(tmp_path, monkeypatch):
    (tmp_path / "weights.csv").write_text("technique,config,metric,value\nrtn,bits=4,perplexity,12.5\nother,,x,1\n")
    monkeypatch.setenv("PINTPOT_RESULTS", str(tmp_path))
    entry = json.loads(runner.invoke(app, ["techniques", "rtn", "--json"]).stdout)
    assert entry["evidence"] == [{"technique": "rtn", "config": "bits=4", "metric": "perplexity", "value": "12.5"}]
    assert list(entry["page"])[:2] == ["Source", "Differs"]
    assert {"Saves", "Composes", "Use when", "Not when"} <= entry["page"].keys()
    shown = runner.invoke(app, ["techniques", "rtn"]).stdout
    assert "12.5" in shown
    assert "Not when" in shown


def test_an_unknown_technique_suggests_the_nearest():
    result = runner.invoke(app, ["techniques", "galor"])
    assert result.exit_code == 2
    assert "did you mean galore" in result.stderr
