"""The texts that a weight method looks at a model with: the user's, or else those that come with every Python."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pintpot.core.errors import CompositionError, ShapeError
from pintpot.core.model_folder import has_tokenizer
from pintpot.core.shape import ModelShape
from pintpot.jobs.batches import PackedText
from pintpot.jobs.documents import Document, read_documents
from pintpot.jobs.load import load_tokenizer
from pintpot.jobs.text import TextSettings, encode_parts, longest_context, require_range
from pintpot.reference.corpus import read_corpus
from pintpot.weights._base import ROWS_AT_ONCE, WeightMethod

CHARACTERS_A_TOKEN = 8
"""More than a token has on average: so much text is encoded for each that is wanted."""

CHARACTERS_A_TURN = 200
"""What a turn of a conversation is taken to have."""


@dataclass(frozen=True, kw_only=True)
class CalibrationSettings:
    """What to calibrate on.

    Attributes:
        data: JSON Lines with ``text`` or ``messages``, a text file, or a folder of them; None for the source code and
            documentation of Python's standard library.
        samples: sequences, at most.
        tokens: their length, or what the model has positions for if that is less.
    """

    data: str | Path | None = None
    samples: int = 128
    tokens: int = 512

    def __post_init__(self) -> None:
        if self.samples < 1 or self.tokens < 2:
            raise ShapeError(
                f"cannot calibrate on {self.samples} samples of {self.tokens} tokens", hint="ask for more of them"
            )


def calibration_texts(
    folder: Path, method: WeightMethod, settings: CalibrationSettings | None = None, seed: int = 0
) -> list[Tensor]:
    """Batches of token ids int64 (B, T) for a model; none for a method that needs none.

    Args:
        folder: the model's, with a tokenizer.
        method: that wants to see them.
        settings: which and how many.
        seed: of their choice.

    Raises:
        CompositionError: when the folder has no tokenizer.
        DataError: when the data cannot be read, or is too little.
    """
    if not method.calibrated:
        return []
    settings = settings or CalibrationSettings()
    if not has_tokenizer(folder):
        raise CompositionError(
            f"{method.name} reads text, and {folder} has no tokenizer",
            hint="put the tokenizer's files into the folder, or give token ids from Python: compress_folder(texts=...)",
        )
    longest = longest_context(ModelShape.from_folder(folder).config)
    width = settings.tokens if longest is None else min(settings.tokens, longest)
    wanted = settings.samples * width * CHARACTERS_A_TOKEN
    if settings.data is None:
        chosen = default_documents(wanted, seed)
    else:
        chosen = list(_enough(read_documents(settings.data), wanted, seed))
    text = encode_parts((chosen, ()), load_tokenizer(folder), TextSettings(validation_fraction=0.0))
    require_range(folder, text, width)
    packed = PackedText(text.training, sequence_tokens=width, sequences=1, seed=seed)
    rows = torch.cat([packed[step].input_ids for step in range(min(settings.samples, packed.blocks))])
    return list(rows.split(ROWS_AT_ONCE))


def default_documents(characters: int, seed: int = 0) -> list[Document]:
    """So much source code and documentation of Python's standard library, in an order of the seed's."""
    every = [Document(document.name, document.text) for document in read_corpus()[0]]
    return list(_enough(every, characters, seed))


def _enough(documents: Sequence[Document], characters: int, seed: int) -> Iterator[Document]:
    """Documents in an order of their own until there is as much text as is wanted."""
    order = list(documents)
    random.Random(seed).shuffle(order)
    for document in order:
        if characters <= 0:
            return
        yield document
        characters -= len(document.text) or CHARACTERS_A_TURN * len(document.messages)
