"""The convert job: a model folder and some text in, a model folder with a smaller cache out.

A conversion that trains keeps checkpoints in ``<out>.partial``, and the same call goes on from them.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from pintpot.cache.conversions import Conversion
from pintpot.core.errors import CompositionError, ShapeError
from pintpot.core.expression import parse
from pintpot.core.files import new_folder, refuse_existing, require_disk, write_atomic
from pintpot.core.model_folder import open_model
from pintpot.core.shape import ModelShape
from pintpot.core.slots import check
from pintpot.core.technique import Technique
from pintpot.jobs.batches import PackedText
from pintpot.jobs.load import load, load_tokenizer, no_progress_bars
from pintpot.jobs.model_source import model_folder
from pintpot.jobs.objective_training import train_objective
from pintpot.jobs.text import (
    Text,
    TextSettings,
    encode_parts,
    read_parts,
    require_range,
    seed_everything,
)
from pintpot.jobs.text_training import CHECKPOINTS, held_out_loss
from pintpot.jobs.training import TrainResult
from pintpot.ledger.reach import tensors_in

JOB = "convert"

STATE_COPIES = 10
"""How often the weights fit into what a training run writes: checkpoints with AdamW's moments, and the result."""

SAMPLES_AT_ONCE = 8
"""Calibration sequences in each pass."""


@dataclass(frozen=True, kw_only=True)
class ConvertSettings(TextSettings):
    """How to convert: as ``TextSettings`` for conversions that train, and what to calibrate on.

    Attributes:
        samples: sequences of the text that activations are looked at on, at most.
        sample_tokens: their length.
        teacher: a model folder or hub name to distil from; the source itself when ``None``.
    """

    samples: int = 128
    sample_tokens: int = 256
    teacher: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("samples", 1), ("sample_tokens", 2)):
            value = getattr(self, name)
            if value < least:
                raise ShapeError(f"{name} must be at least {least}, not {value}", hint="give a larger one")


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What a conversion gave.

    Attributes:
        folder: the folder that was written.
        method: how.
        tokens: at which the caches were measured.
        source_cache_bytes: of the source's cache after so many tokens of one sequence, measured, in the stored dtype.
        cache_bytes: likewise, of the new model's.
        loss_source: nats per token of held-out text; ``None`` when nothing is held out.
        loss_converted: of the new model, before any training.
        loss_trained: after it; ``None`` for conversions that need none.
        training: the curve.
        seconds: of this call.
    """

    folder: Path
    method: Conversion
    tokens: int
    source_cache_bytes: int
    cache_bytes: int
    loss_source: float | None
    loss_converted: float | None
    loss_trained: float | None
    training: TrainResult | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form."""
        return {
            "folder": str(self.folder),
            "technique": str(self.method),
            "tokens": self.tokens,
            "source_cache_bytes": self.source_cache_bytes,
            "cache_bytes": self.cache_bytes,
            "held_out_loss_source": self.loss_source,
            "held_out_loss_converted": self.loss_converted,
            "held_out_loss_trained": self.loss_trained,
            "steps": 0 if self.training is None else self.training.steps,
            "seconds": round(self.seconds, 3),
        }


def convert(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    method: str | Technique,
    rank: int | None = None,
    settings: ConvertSettings | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Converted:
    """Convert a model's attention and write a folder that ``AutoModelForCausalLM`` loads.

    The model is held in float32, and a teacher beside it where one is needed. The result is written in the dtype of
    the source.

    Args:
        model: a dense model folder or hub name.
        data: JSON Lines with ``text`` or ``messages``, a text file, or a folder of them.
        out: the folder to write; must not exist.
        method: an expression such as ``"transmla(rank=256)"``, or a conversion.
        rank: instead of the method's own.
        settings: calibration and training.
        seed: of samples, batches and order.
        progress: show the progress of training.

    Raises:
        CompositionError: when the method is not exactly one conversion.
        UnsupportedModel: when the model is not one that it is for, naming the modules.
        PintpotError: for other bad input, each kind with its own class and a hint; nothing half-written is left.
        Interrupted: after Ctrl-C or SIGTERM while training, with a checkpoint written.
    """
    settings = settings or ConvertSettings()
    chosen = _method(method, rank)
    target = refuse_existing(out)
    folder = model_folder(model)
    opened = open_model(folder)
    chosen.check(opened.config)
    tokenizer = load_tokenizer(folder)
    text = encode_parts(read_parts(data, settings, seed), tokenizer, settings)
    require_range(folder, text, max(settings.tokens, settings.sample_tokens))
    require_disk(target, opened.shape(torch.float32).weight_bytes * (STATE_COPIES if chosen.trains else 1))
    begin = time.monotonic()
    with new_folder(target, resume=chosen.trains) as partial, no_progress_bars():
        seed_everything(seed)
        source = load(folder, torch.float32)
        before = held_out_loss(source, text.held_out, settings)
        held = cache_bytes(source, settings.tokens, opened.dtype)
        converted = chosen.convert(source, _samples(text, settings, seed))
        at_once = held_out_loss(converted, text.held_out, settings)
        del source
        training = None
        if chosen.trains:
            run = {"technique": str(chosen), "model": opened.shape().fingerprint, "seed": seed}
            teacher = load(_teacher(settings, folder), torch.float32)
            training = _train(chosen, converted, teacher, text, settings, run, partial / CHECKPOINTS, progress)
        result = Converted(
            folder=target,
            method=chosen,
            tokens=settings.tokens,
            source_cache_bytes=held,
            cache_bytes=cache_bytes(converted, settings.tokens, opened.dtype),
            loss_source=before,
            loss_converted=at_once,
            loss_trained=None if training is None else held_out_loss(converted, text.held_out, settings),
            training=training,
            seconds=time.monotonic() - begin,
        )
        _save(converted.to(opened.dtype), tokenizer, result, partial)  # type: ignore[arg-type]
    return result


def _method(method: str | Technique, rank: int | None) -> Conversion:
    chosen = parse(method) if isinstance(method, str) else (method,)
    check(chosen, JOB)
    if len(chosen) != 1 or not isinstance(chosen[0], Conversion):
        raise CompositionError("converting takes exactly one conversion", hint="for instance transmla(rank=256)")
    if rank is None:
        return chosen[0]
    if all(f.name != "rank" for f in fields(chosen[0])):
        raise CompositionError(f"{chosen[0].name} has no rank", hint=f"see `pintpot techniques {chosen[0].name}`")
    return replace(chosen[0], rank=rank)  # type: ignore[call-arg]


def _teacher(settings: ConvertSettings, source: Path) -> Path:
    """The teacher's folder, whose vocabulary must be the source's.

    Raises:
        ShapeError: when it is not.
    """
    if settings.teacher is None:
        return source
    folder = model_folder(settings.teacher)
    sizes = [ModelShape.from_folder(f).config.vocab_size for f in (source, folder)]
    if sizes[0] != sizes[1]:
        raise ShapeError(
            f"the teacher has a vocabulary of {sizes[1]} tokens, and the model one of {sizes[0]}",
            hint="give a teacher of the same family",
        )
    return folder


def _samples(text: Text, settings: ConvertSettings, seed: int) -> Sequence[Tensor]:
    """Sequences of the training text, int64 (B, T) each."""
    packed = PackedText(text.training, sequence_tokens=settings.sample_tokens, sequences=1, seed=seed)
    count = min(settings.samples, packed.blocks)
    rows = torch.cat([packed[step].input_ids for step in range(count)])
    return rows.split(SAMPLES_AT_ONCE)


@torch.no_grad()
def cache_bytes(model: PreTrainedModel, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of a model's own cache after ``tokens`` tokens of one sequence, measured, as if it were held in ``dtype``.

    Args:
        model: in evaluation mode.
        tokens: how many.
        dtype: of keys and values; the model may be held in another.
    """
    cache = DynamicCache(config=model.config)
    model(input_ids=torch.zeros(1, tokens, dtype=torch.int64), past_key_values=cache, use_cache=True, logits_to_keep=1)
    return sum(tensor.numel() for tensor in tensors_in(cache)) * dtype.itemsize


def _train(
    method: Conversion,
    converted: PreTrainedModel,
    teacher: PreTrainedModel,
    text: Text,
    settings: ConvertSettings,
    run: dict[str, Any],
    checkpoints: Path,
    progress: bool,
) -> TrainResult | None:
    """Train the new model by its objective, in place."""
    module = method.objective(converted, teacher)
    if module is None:
        return None
    result = train_objective(
        module,
        text,
        settings,
        learning_rate=method.learning_rate,
        run=run,
        checkpoints=checkpoints,
        validate=lambda: held_out_loss(converted, text.held_out, settings),
        progress=progress,
    )
    converted.eval()
    return result


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, result: Converted, folder: Path) -> None:
    """Write model, tokenizer, card and what was measured."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    curve = [] if result.training is None else result.training.curve
    record = {**result.to_dict(), "folder": ".", "parameters": asdict(result.method), "curve": curve}
    write_atomic(folder / "conversion.json", json.dumps(record, indent=1))
    write_atomic(folder / "README.md", _card(result))
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)


def _card(result: Converted) -> str:
    return (
        f"# Converted with Pintpot\n\nAttention: `{result.method}`. The cache of {result.tokens} tokens takes "
        f"{result.cache_bytes} bytes, and took {result.source_cache_bytes}. To load:\n\n"
        "```python\nimport pintpot.cache.conversions  # registers the architecture with transformers\n"
        "from transformers import AutoModelForCausalLM\n"
        'model = AutoModelForCausalLM.from_pretrained("this folder")\n```\n'
    )
