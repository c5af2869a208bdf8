"""The calibrate job: what a cache technique must know of a model beforehand, found on text and kept in a file."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pintpot.cache.calibration import Calibrated, calibrate
from pintpot.core.errors import CompositionError, ShapeError
from pintpot.core.expression import parse
from pintpot.core.files import refuse_existing
from pintpot.jobs.batches import PackedText
from pintpot.jobs.load import load, load_tokenizer, no_progress_bars
from pintpot.jobs.model_source import model_folder
from pintpot.jobs.text import TextSettings, encode_parts, read_parts, require_range, seed_everything

SAMPLES_AT_ONCE = 4
"""Sequences that the model reads together."""


@dataclass(frozen=True, kw_only=True)
class CalibrationFile:
    """What a calibration wrote.

    Attributes:
        path: the file.
        technique: as it is to be used from now on.
        samples: sequences of text that were read.
        tensor_bytes: bytes of what was found.
        seconds: it took.
    """

    path: Path
    technique: Calibrated
    samples: int
    tensor_bytes: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form."""
        return {
            "path": str(self.path),
            "technique": str(self.technique),
            "samples": self.samples,
            "tensor_bytes": self.tensor_bytes,
            "seconds": round(self.seconds, 3),
        }


def calibrate_file(
    model: str | Path,
    technique: str,
    data: str | Path,
    out: str | Path,
    *,
    samples: int = 16,
    sample_tokens: int = 512,
    seed: int = 0,
) -> CalibrationFile:
    """Fit a technique to a model on text, and write what was found.

    The model is held in float32. Layers are looked at one after the other, so one layer's keys, values and queries
    are held at a time.

    Args:
        model: a dense model folder or hub name.
        technique: an expression of one calibrated technique, such as ``"cskv(rank=64)"``.
        data: JSON Lines with ``text`` or ``messages``, a text file, or a folder of them.
        out: the file to write; must not exist.
        samples: sequences of text, at most.
        sample_tokens: their length.
        seed: of the choice of sequences.

    Raises:
        CompositionError: when it is not exactly one technique that needs calibration.
        PintpotError: for other bad input, each kind with its own class and a hint; nothing half-written is left.
    """
    if samples < 1 or sample_tokens < 2:
        raise ShapeError(f"cannot calibrate on {samples} samples of {sample_tokens} tokens", hint="give more text")
    chosen = parse(technique)
    if len(chosen) != 1 or not isinstance(chosen[0], Calibrated):
        raise CompositionError(
            f"{technique} is not one technique that needs calibration", hint="for instance cskv or aqua-kv"
        )
    method = replace(chosen[0], calibration="")
    target = refuse_existing(out)
    folder = model_folder(model)
    settings = TextSettings(tokens=sample_tokens, validation_fraction=0.0)
    text = encode_parts(read_parts(data, settings, seed), load_tokenizer(folder), settings)
    require_range(folder, text, sample_tokens)
    begin = time.monotonic()
    seed_everything(seed)
    packed = PackedText(text.training, sequence_tokens=sample_tokens, sequences=1, seed=seed)
    count = min(samples, packed.blocks)
    rows = torch.cat([packed[step].input_ids for step in range(count)])
    with no_progress_bars():
        found = calibrate(load(folder, torch.float32), method, rows.split(SAMPLES_AT_ONCE))
    found.write(target)
    size = sum(t.numel() * t.element_size() for layer in found.layers for t in layer.values())
    ready = replace(method, calibration=str(target))
    return CalibrationFile(
        path=target, technique=ready, samples=count, tensor_bytes=size, seconds=time.monotonic() - begin
    )
