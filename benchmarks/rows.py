"""Rows of ``results/<wing>.csv``: one order of columns for every wing."""

from __future__ import annotations

import csv
import datetime
import fcntl
import io
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch

from pintpot.core.files import write_atomic

COLUMNS = [
    *("technique", "config", "model", "data", "context_tokens", "seed", "metric", "unit", "value"),
    *("baseline", "baseline_value", "peer", "peer_value", "paper_value", "status"),
    *("peak_bytes", "seconds", "hardware", "versions", "commit", "date"),
]
KEY = ("technique", "config", "model", "data", "context_tokens", "seed", "metric")
"""Columns that say what was measured; a new row replaces the old one that agrees in all of them."""

RESULTS = Path(os.environ.get("PINTPOT_RESULTS", Path(__file__).parent.parent / "results"))


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def stamp(row: dict) -> dict:
    """The row with hardware, versions, commit and date filled in."""
    packages = ("torch", "transformers", "pintpot")
    return {
        **row,
        "hardware": f"{_processor()}, {torch.get_num_threads()} threads",
        "versions": " ".join(f"{name} {version(name)}" for name in packages),
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


def read_rows(wing: str) -> list[dict]:
    """The rows of a wing's results; none where there is no file yet."""
    file = RESULTS / f"{wing}.csv"
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def append_rows(wing: str, rows: list[dict]) -> Path:
    """Write rows into the wing's results, in the place of older rows that measured the same.

    The file is replaced as a whole, and two benchmarks that run at once do not lose each other's rows.
    """
    RESULTS.mkdir(exist_ok=True, parents=True)
    file = RESULTS / f"{wing}.csv"
    with _alone():
        fresh = {tuple(str(row.get(k, "")) for k in KEY) for row in rows}
        kept = [row for row in read_rows(wing) if tuple(row[k] for k in KEY) not in fresh]
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*kept, *rows])
        write_atomic(file, text.getvalue())
    return file


@contextmanager
def _alone() -> Iterator[None]:
    """Hold the results folder against other benchmarks."""
    handle = os.open(RESULTS, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
