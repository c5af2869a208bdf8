"""Writing files so that nothing half-written is ever left: temporary name, fsync, rename."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pintpot.core.errors import BudgetError, ModelFolderError, OutputExists
from pintpot.core.units import format_bytes

PARTIAL = ".partial"
"""Ending of the names under which unfinished outputs are written, beside where they will stand."""


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Write a file that is either wholly there or not at all, even if the process is killed."""
    target = Path(path)
    temporary = target.with_name(target.name + PARTIAL)
    data = content.encode() if isinstance(content, str) else content
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(target)
    fsync_folder(target.parent)


def fsync_folder(folder: Path) -> None:
    """Make renames inside a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def refuse_existing(path: str | Path) -> Path:
    """The path, when nothing stands there yet (an empty folder may).

    Raises:
        OutputExists: when a file or a non-empty folder is there.
    """
    target = Path(path)
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise OutputExists(f"{target} already exists", hint="choose another output path, or remove it first")
    return target


@contextmanager
def new_folder(path: str | Path, *, resume: bool = False) -> Iterator[Path]:
    """A folder that appears under its name only when the block ends without an error.

    The block writes into ``<path>.partial``. On an error the partial folder is removed, unless ``resume`` is
    set: then it stays, and the next call with ``resume`` goes on in it. Where there is nothing to go on with (no file
    yet, or a ``ModelFolderError``) it is removed all the same.

    Raises:
        OutputExists: when something already stands at ``path``.
    """
    target = refuse_existing(path)
    partial = target.with_name(target.name + PARTIAL)
    if partial.exists() and not resume:
        shutil.rmtree(partial)
    partial.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
    except BaseException as error:
        empty = not any(file.is_file() for file in partial.rglob("*"))
        if not resume or empty or isinstance(error, ModelFolderError):
            shutil.rmtree(partial, ignore_errors=True)
        raise
    for file in partial.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    if target.is_dir():
        target.rmdir()
    partial.replace(target)
    fsync_folder(target.parent)


@contextmanager
def scratch(path: Path) -> Iterator[Path]:
    """The path of a folder that may be made in the block, and is removed at its end."""
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def require_disk(path: str | Path, size: int) -> None:
    """Refuse to start what the disk cannot hold.

    Args:
        path: where the output will stand (it need not exist yet).
        size: bytes that will be written at most.

    Raises:
        BudgetError: when less is free.
    """
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < size:
        raise BudgetError(
            f"{folder} has {format_bytes(free)} free, and {format_bytes(size)} would be written",
            hint="free some space, or give an output path on another disk",
        )
