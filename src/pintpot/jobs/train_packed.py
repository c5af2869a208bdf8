"""Compressing by training: what a method puts into the model learns on text, and what was learnt is made the result."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from pintpot.core.files import new_folder, refuse_existing, require_disk, write_atomic
from pintpot.core.model_folder import open_model
from pintpot.jobs.calibration_texts import default_documents
from pintpot.jobs.documents import split
from pintpot.jobs.load import load, load_tokenizer, no_progress_bars
from pintpot.jobs.objective_training import train_objective
from pintpot.jobs.text import Text, TextSettings, encode_parts, read_parts, require_range, seed_everything
from pintpot.jobs.text_training import CHECKPOINTS, held_out_loss
from pintpot.jobs.training import TrainResult
from pintpot.weights import CompressionReport
from pintpot.weights.by_training import ByTraining, follow_, followers, observe_
from pintpot.weights.load import refuse_compressed

RECORD = "training.json"
"""The curve, in the folder that is written."""

STATE_COPIES = 7
"""How often what is trained fits into the checkpoints of a run, with AdamW's moments."""

DEFAULT_CHARACTERS = 4_000_000
"""So much of the text that comes with Python is read where no data is given."""


@dataclass(frozen=True, kw_only=True)
class TrainedPart:
    """What training the weights of a compressed model gave.

    Attributes:
        report: what was compressed.
        source_bytes: bytes of all tensors of the source.
        output_bytes: bytes of all tensors of the output.
        loss_source: nats per token of held-out text; None when nothing is held out.
        loss_before: of what is trained, before training.
        loss_after: of the result.
        training: the curve.
    """

    report: CompressionReport
    source_bytes: int
    output_bytes: int
    loss_source: float | None
    loss_before: float | None
    loss_after: float | None
    training: TrainResult

    @property
    def sizes(self) -> tuple[CompressionReport, int, int]:
        """The report, and the bytes before and after."""
        return self.report, self.source_bytes, self.output_bytes

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form."""
        return {
            "held_out_loss_source": self.loss_source,
            "held_out_loss_untrained": self.loss_before,
            "held_out_loss_trained": self.loss_after,
            "steps": self.training.steps,
        }


class _Penalised(nn.Module):
    """What is trained, a model or a method's objective on it, with the penalties of its parts in the loss."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, use_cache: bool = False) -> Any:
        """The result of the module."""
        result = self.module(input_ids=input_ids, labels=labels, use_cache=use_cache)
        for penalty in (part.penalty() for part in followers(self.module)):
            if penalty is not None:
                result.loss = result.loss + penalty
        return result


def compress_by_training(
    folder: Path,
    out: str | Path,
    method: ByTraining[Any],
    data: str | Path | None,
    settings: TextSettings,
    *,
    seed: int = 0,
    progress: bool = True,
) -> TrainedPart:
    """Train a model by a method on text and write what comes; the same call resumes after a stop.

    Args:
        folder: the dense model; held in float32 while it is trained, and once more where the method has a teacher.
        out: the folder to write.
        method: how.
        data: the text; that which comes with Python when None.
        settings: of the training.
        seed: of batches and order.
        progress: show it.

    Raises:
        PintpotError: for bad input, each kind with its own class and a hint; nothing half-written is left.
        Interrupted: after Ctrl-C or SIGTERM, with a checkpoint written.
    """
    target = refuse_existing(out)
    opened = open_model(folder)
    refuse_compressed(opened)
    method.check(opened.shape())
    tokenizer = load_tokenizer(folder)
    text = _text(data, tokenizer, settings, seed)
    require_range(folder, text, settings.tokens)
    require_disk(target, 4 * (opened.shape().numel + STATE_COPIES * method.trained_numel(opened.shape())))
    with new_folder(target, resume=True) as partial, no_progress_bars():
        seed_everything(seed)
        model = load(folder, torch.float32)
        source_loss = held_out_loss(model, text.held_out, settings)
        skeleton = opened.shape().build("meta")
        prepared = method.prepare_(model)
        before = held_out_loss(model, text.held_out, settings)
        objective = method.objective(model, load(folder, torch.float32)) if method.taught else None
        training = train_objective(
            _Penalised(model if objective is None else objective),
            text,
            settings,
            learning_rate=method.learning_rate,
            run={"technique": str(method), "model": opened.shape().fingerprint, "seed": seed},
            checkpoints=partial / CHECKPOINTS,
            validate=lambda: held_out_loss(model, text.held_out, settings),
            observe=lambda: observe_(model),
            follow=lambda progress: follow_(model, progress),
            progress=progress,
        )
        report = method.finish_(model.eval(), prepared, skeleton)
        after = held_out_loss(model, text.held_out, settings)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(opened.dtype)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        part = TrainedPart(
            report=report,
            source_bytes=opened.weight_bytes,
            output_bytes=open_model(partial, match=False).weight_bytes,
            loss_source=source_loss,
            loss_before=before,
            loss_after=after,
            training=training,
        )
        record = {"technique": method.name, "parameters": asdict(method), **part.to_dict(), "curve": training.curve}
        write_atomic(partial / RECORD, json.dumps(record, indent=1))
        shutil.rmtree(partial / CHECKPOINTS, ignore_errors=True)
    return part


def _text(data: str | Path | None, tokenizer: PreTrainedTokenizerBase, settings: TextSettings, seed: int) -> Text:
    if data is not None:
        return encode_parts(read_parts(data, settings, seed), tokenizer, settings)
    documents = default_documents(DEFAULT_CHARACTERS, seed)
    return encode_parts(split(documents, settings.validation_fraction, seed), tokenizer, settings)
