"""Prompts from a JSON Lines file, completions into another, line by line, so that a stopped run can go on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pintpot.core.errors import DataError, Interrupted
from pintpot.core.files import PARTIAL, fsync_folder, refuse_existing
from pintpot.jobs.documents import messages_of, read_json_lines
from pintpot.jobs.generator import Completion, Prompt
from pintpot.jobs.stopping import stop_requests

COMPLETION = "completion"
"""The key of the new text in the output; the other keys of a prompt's line are copied."""


@dataclass(frozen=True)
class PromptLine:
    """One line of a prompt file.

    Attributes:
        entry: the whole object of the line.
        prompt: what is to be completed.
    """

    entry: dict[str, Any]
    prompt: Prompt


def read_prompts(file: Path) -> list[PromptLine]:
    """The prompts of a JSON Lines file: ``prompt`` or ``text`` (a text), or ``messages`` (a conversation).

    Raises:
        DataError: when the file is missing, empty, or a line cannot be read.
    """
    if not file.is_file():
        raise DataError(f"{file} does not exist", hint='give a file with lines such as {"prompt": "..."}')
    lines = [PromptLine(entry, _prompt(entry, f"{file} line {number}")) for number, entry in read_json_lines(file)]
    if not lines:
        raise DataError(f"{file} holds no prompts", hint='write lines such as {"prompt": "..."}')
    return lines


def complete_file(
    lines: Sequence[PromptLine],
    out: Path,
    complete: Callable[[Sequence[Prompt]], list[Completion]],
    *,
    batch: int = 1,
    progress: Callable[[int], None] = lambda done: None,
) -> int:
    """Complete prompts into a JSON Lines file, which gets its name when the last line is in it.

    Until then ``<out>.partial`` holds the lines done so far; the same call goes on after them.

    Args:
        lines: the prompts.
        out: the file to write.
        complete: gives the completions of some prompts.
        batch: prompts given to ``complete`` at once, and written together.
        progress: called with the number of lines done.

    Returns:
        How many lines were already there from an earlier call.

    Raises:
        OutputExists: when ``out`` is there.
        DataError: when the partial file belongs to other prompts.
        Interrupted: after Ctrl-C; the lines done are kept.
    """
    refuse_existing(out)
    partial = out.with_name(out.name + PARTIAL)
    before = _lines_done(partial, lines)
    progress(before)
    with partial.open("ab") as handle, stop_requests(at_once=True) as stop:
        for first in range(before, len(lines), batch):
            chosen = lines[first : first + batch]
            try:
                completions = complete([line.prompt for line in chosen])
            except KeyboardInterrupt as error:
                raise _interrupted(first, lines, partial) from error
            records = (_record(line, done) for line, done in zip(chosen, completions, strict=True))
            handle.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode())
            handle.flush()
            os.fsync(handle.fileno())
            progress(first + len(chosen))
            if stop and first + len(chosen) < len(lines):
                raise _interrupted(first + len(chosen), lines, partial)
    partial.replace(out)
    fsync_folder(out.absolute().parent)
    return before


def _interrupted(done: int, lines: Sequence[PromptLine], partial: Path) -> Interrupted:
    return Interrupted(
        f"stopped after {done} of {len(lines)} prompts; {partial} holds them",
        hint="run the same command again to go on",
    )


def _prompt(entry: dict[str, Any], place: str) -> Prompt:
    if "messages" in entry:
        return messages_of(entry["messages"], place)
    text = entry.get("prompt", entry.get("text"))
    if not isinstance(text, str) or not text:
        raise DataError(f"{place}: needs a prompt, a text or messages", hint='write lines such as {"prompt": "..."}')
    return text


def _record(line: PromptLine, done: Completion) -> dict[str, Any]:
    figures = {"prompt_tokens": done.prompt_tokens, "new_tokens": len(done.tokens), "ended": done.ended}
    return {**line.entry, COMPLETION: done.text, **figures}


def _lines_done(partial: Path, lines: Sequence[PromptLine]) -> int:
    """How many lines an earlier call has finished; a line cut short at the end is taken away."""
    if not partial.exists():
        return 0
    data = partial.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    done = whole.splitlines()
    for line, raw in zip(lines, done, strict=False):
        if not _belongs(raw, line):
            raise DataError(
                f"{partial} was written for other prompts", hint="remove it to start anew, or choose another output"
            )
    if len(done) > len(lines):
        raise DataError(f"{partial} holds more lines than there are prompts", hint="remove it to start anew")
    if len(whole) < len(data):
        with partial.open("r+b") as handle:
            handle.truncate(len(whole))
    return len(done)


def _belongs(raw: bytes, line: PromptLine) -> bool:
    """Whether a line of the output is the completion of a prompt."""
    try:
        record = json.loads(raw)
    except ValueError:
        return False
    same = isinstance(record, dict) and COMPLETION in record
    return same and all(record.get(key) == value for key, value in line.entry.items() if key != COMPLETION)
