"""Text as the jobs read it: documents split, encoded and cut into batches, and what a model can read of them."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from pintpot.core.errors import DataError, ShapeError
from pintpot.core.shape import ModelShape
from pintpot.jobs.batches import IntArray, PackedText
from pintpot.jobs.documents import Document, encode, read_documents, split

_LEAST = {
    "tokens": 2,
    "batch": 1,
    "accumulate": 1,
    "steps": 1,
    "epochs": 0,
    "learning_rate": 0,
    "weight_decay": 0,
    "validate_every": 0,
    "checkpoint_every": 1,
}
"""The least that each setting may be."""


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """How to train on text.

    Attributes:
        tokens: length of the packed sequences.
        batch: sequences in each forward and backward pass.
        accumulate: passes in one update.
        steps: updates; when ``None``, so many that each text is seen ``epochs`` times.
        epochs: used when ``steps`` is not given.
        learning_rate: the highest, after warm-up; what is usual for the job and the plan's optimizer when ``None``.
        weight_decay: of the optimizer.
        validation_fraction: share of the documents held out (of the tokens, when there is one document).
        validate_every: updates between validations; 0 for one before and one after.
        checkpoint_every: updates between checkpoints.
    """

    tokens: int = 512
    batch: int = 1
    accumulate: int = 1
    steps: int | None = None
    epochs: float = 1.0
    learning_rate: float | None = None
    weight_decay: float = 0.0
    validation_fraction: float = 0.05
    validate_every: int = 0
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise ShapeError(f"{name} must be at least {least}, not {value}", hint="give a larger one")


@dataclass(frozen=True, kw_only=True)
class Text:
    """The tokens to train on and those held out, int64 (N,), and a digest of both."""

    training: IntArray
    held_out: IntArray
    digest: str


def longest_context(config: PretrainedConfig) -> int | None:
    """The tokens that a model has positions for; ``None`` where any number will do."""
    longest: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return longest


def read_parts(data: str | Path, settings: TextSettings, seed: int) -> tuple[list[Document], list[Document]]:
    """The documents to train on and those held out (none of them where there is only one document).

    Raises:
        DataError: when the data cannot be read.
    """
    documents = read_documents(data)
    return split(documents, settings.validation_fraction, seed) if len(documents) > 1 else (documents, [])


def encode_parts(
    parts: tuple[Sequence[Document], Sequence[Document]], tokenizer: PreTrainedTokenizerBase, settings: TextSettings
) -> Text:
    """Encode what ``read_parts`` gave; the end of a single document is held out.

    Raises:
        DataError: when it is less than one sequence.
    """
    training, held_out = (encode(tokenizer, documents) for documents in parts)
    if len(parts[0]) == 1 and not parts[1]:
        cut = len(training) - math.floor(len(training) * settings.validation_fraction)
        training, held_out = training[:cut], training[cut:]
    if len(training) < 2:
        raise DataError(f"the text gives {len(training)} training tokens", hint="give more text")
    digest = hashlib.sha256(training.tobytes() + b"|" + held_out.tobytes()).hexdigest()
    return Text(training=training, held_out=held_out, digest=digest)


def update_batches(text: Text, settings: TextSettings, seed: int) -> PackedText:
    """The packed training sequences of the whole run."""
    rows = PackedText(text.training, sequence_tokens=settings.tokens, sequences=settings.batch, seed=seed)
    per_update = settings.batch * settings.accumulate
    steps = settings.steps or max(1, math.ceil(settings.epochs * rows.blocks / per_update))
    return PackedText(
        text.training,
        sequence_tokens=settings.tokens,
        sequences=settings.batch,
        steps=steps * settings.accumulate,
        seed=seed,
    )


def require_range(source: Path, text: Text, tokens: int) -> None:
    """Refuse tokens that the model has no embedding for, and sequences that it has no positions for.

    Raises:
        ShapeError: naming the token, or the longest sequence.
    """
    config = ModelShape.from_folder(source).config
    size = config.get_text_config().vocab_size
    largest = max(int(part.max(initial=0)) for part in (text.training, text.held_out))
    if largest >= size:
        raise ShapeError(
            f"the tokenizer gives the token {largest}, and the model has a vocabulary of {size}",
            hint="give the tokenizer that belongs to the model, or a configuration with a larger vocab_size",
        )
    longest = longest_context(config)
    if longest is not None and tokens > longest:
        raise ShapeError(
            f"sequences of {tokens} tokens are longer than the {longest} that the model was made for",
            hint=f"use --tokens {longest}, or less",
        )


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (libraries below us use the global generator)
    torch.manual_seed(seed)
