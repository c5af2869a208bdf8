"""Reading training data: JSON Lines with ``text`` or ``messages``, plain text files, or folders of them.

Everything that can be wrong with the data is found while reading, before a model is loaded, and each complaint
names the file and the line.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from pintpot.core.errors import DataError
from pintpot.core.units import MiB, format_bytes
from pintpot.jobs.batches import IntArray

JSON_LINES = (".jsonl", ".ndjson")
"""Endings of files that hold one JSON object a line."""

LONGEST_LINE_BYTES = 16 * MiB
"""Lines above this are refused: they are almost always a file without line ends."""

Messages = tuple[dict[str, str], ...]

_ENCODED_TOGETHER = 1000
"""Documents whose tokens are Python numbers, of many bytes each, at the same time."""


@dataclass(frozen=True)
class Document:
    """One training text, or one conversation.

    Attributes:
        place: where it came from, for messages to the user (``data.jsonl line 3``).
        text: the text, when it is one.
        messages: the turns (``role``, ``content``), when it is a conversation.
    """

    place: str
    text: str = ""
    messages: Messages = ()


def read_documents(path: str | Path) -> list[Document]:
    """All documents of a file, or of a folder's files in order of name.

    Raises:
        DataError: when the path does not exist, holds nothing, or a line cannot be read.
    """
    source = Path(path)
    if not source.exists():
        raise DataError(f"{source} does not exist", hint="give a .jsonl or text file, or a folder of text files")
    files = [source] if source.is_file() else sorted(f for f in source.rglob("*") if f.is_file() and _visible(f))
    documents = [document for file in files for document in _read_file(file)]
    if not documents:
        raise DataError(f"{source} holds no text", hint='write lines such as {"text": "..."} or a plain text file')
    return documents


def read_json_lines(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers (from 1) and objects of a JSON Lines file; blank lines are skipped.

    Raises:
        DataError: naming the line that is too long, not UTF-8, or not a JSON object.
    """
    for number, line in read_lines(file):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{file} line {number}: not valid JSON ({error.msg} at column {error.colno})",
                hint="write one JSON object a line",
            ) from error
        if not isinstance(entry, dict):
            raise DataError(
                f"{file} line {number}: a JSON object is needed, not {type(entry).__name__}",
                hint='write lines such as {"text": "..."}',
            )
        yield number, entry


def read_lines(file: Path) -> Iterator[tuple[int, str]]:
    """Line numbers (from 1) and lines of a UTF-8 file, never holding more than the longest line allowed.

    Raises:
        DataError: naming the line that is too long or not UTF-8.
    """
    with file.open("rb") as handle:
        number = 0
        while line := handle.readline(LONGEST_LINE_BYTES + 1):
            number += 1
            if len(line) > LONGEST_LINE_BYTES:
                raise DataError(
                    f"{file} line {number} is longer than {format_bytes(LONGEST_LINE_BYTES)}",
                    hint="split it into shorter documents, one a line",
                )
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            try:
                yield number, line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{file} line {number} is not UTF-8 (byte {error.start + 1})",
                    hint=f"convert it, for example: iconv -f latin1 -t utf-8 {file.name}",
                ) from error


def messages_of(entry: Any, place: str) -> Messages:
    """A conversation, checked.

    Raises:
        DataError: when it is not a non-empty list of objects with the texts ``role`` and ``content``.
    """
    turns = entry if isinstance(entry, list) else []
    good = [t for t in turns if isinstance(t, dict) and all(isinstance(t.get(k), str) for k in ("role", "content"))]
    if not turns or len(good) != len(turns):
        raise DataError(
            f"{place}: messages must be a list of objects with role and content",
            hint='for example {"messages": [{"role": "user", "content": "..."}]}',
        )
    return tuple({"role": t["role"], "content": t["content"]} for t in good)


def render(tokenizer: PreTrainedTokenizerBase | None, messages: Messages, *, answer: bool = False) -> str:
    """A conversation as text: by the tokenizer's chat template, or as plain ``role: content`` lines without one.

    Args:
        tokenizer: the model's, if there is one yet.
        messages: the turns.
        answer: end where the assistant's answer begins.
    """
    if tokenizer is not None and tokenizer.chat_template:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=answer))
    lines = "".join(f"{turn['role']}: {turn['content']}\n" for turn in messages)
    return lines + "assistant:" if answer else lines


def texts_of(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase | None = None) -> list[str]:
    """The documents as texts, conversations as ``render`` writes them."""
    return [render(tokenizer, d.messages) if d.messages else d.text for d in documents]


def encode(tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document]) -> IntArray:
    """The documents as one stream of tokens, int64 (N,), each followed by the end-of-text token if there is one."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    pieces = [np.empty(0, dtype=np.int64)]
    for first in range(0, len(documents), _ENCODED_TOGETHER):
        texts = texts_of(documents[first : first + _ENCODED_TOGETHER], tokenizer)
        ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        pieces.append(np.array([token for row in ids for token in (*row, *end)], dtype=np.int64))
    return np.concatenate(pieces)


def split(documents: Sequence[Document], fraction: float, seed: int) -> tuple[list[Document], list[Document]]:
    """Training and validation documents; which are held out depends on the seed and the count alone.

    Args:
        documents: all of them.
        fraction: share held out, by number; at least one document when it is positive and there are two.
        seed: decides which.
    """
    if not 0 <= fraction < 1:
        raise DataError(
            f"the validation fraction must be at least 0 and below 1, not {fraction}", hint="for example 0.05"
        )
    count = min(max(1, round(fraction * len(documents))), len(documents) - 1) if fraction else 0
    chosen = set(np.random.default_rng(seed).permutation(len(documents))[:count].tolist())
    training = [d for i, d in enumerate(documents) if i not in chosen]
    return training, [d for i, d in enumerate(documents) if i in chosen]


def _visible(file: Path) -> bool:
    return not file.name.startswith(".")


def _read_file(file: Path) -> Iterator[Document]:
    if file.suffix.lower() in JSON_LINES:
        for number, entry in read_json_lines(file):
            yield _document(entry, f"{file} line {number}")
        return
    text = "".join(line for _, line in read_lines(file))
    if text.strip():
        yield Document(str(file), text)


def _document(entry: dict[str, Any], place: str) -> Document:
    if "messages" in entry:
        return Document(place, messages=messages_of(entry["messages"], place))
    text = entry.get("text")
    if not isinstance(text, str) or not text.strip():
        raise DataError(
            f"{place}: needs a non-empty text, or messages", hint='write {"text": "..."} or {"messages": [...]}'
        )
    return Document(place, text)
