"""Pretraining: from a configuration and some text to a model folder that transformers loads.

See ``text_training`` for what it shares with fine-tuning: planning, checkpoints, resuming, what is written; and
``pretrain_recipe`` for runs with a curriculum.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from pintpot.core.errors import ModelFolderError, ShapeError, UnsupportedModel
from pintpot.core.files import refuse_existing
from pintpot.core.model_folder import has_tokenizer
from pintpot.core.plan import Plan
from pintpot.core.shape import ModelShape
from pintpot.core.workload import Pretrain, Train
from pintpot.jobs.assemble import Rates, assemble
from pintpot.jobs.choose import Wish
from pintpot.jobs.documents import Document, texts_of
from pintpot.jobs.dtypes import DTYPES
from pintpot.jobs.load import read_tokenizer
from pintpot.jobs.model_source import model_folder
from pintpot.jobs.packed_shape import with_dtype
from pintpot.jobs.text import TextSettings, encode_parts, longest_context, read_parts
from pintpot.jobs.text_training import TextJob, TextResult, train_on_text
from pintpot.ledger.predict import Assembled
from pintpot.reference.tokenizer import as_transformers, train_tokenizer


@dataclass(frozen=True, kw_only=True)
class PretrainSettings(TextSettings):
    """How to pretrain: as ``TextSettings``."""


@dataclass(frozen=True, kw_only=True)
class PretrainJob(TextJob):
    """Training of a model that does not exist yet.

    Attributes:
        shape: the model; its special tokens are those of the tokenizer.
    """

    workload: ClassVar[type[Train]] = Pretrain

    shape: ModelShape

    def assemble(self, plan: Plan, rates: Rates, place: Path) -> Assembled:
        """Random weights, as the global generator gives them, with the plan applied."""
        return assemble(self.source, plan, rates, with_dtype(self.shape, DTYPES[plan.model.dtype]))

    def finished(self, model: Any, plan: Plan) -> Any:
        """The model, in the dtype that its configuration names, if it names one."""
        named = getattr(self.shape.config, "dtype", None)
        if isinstance(named, torch.dtype):
            model.to(named)
        if model.generation_config is not None:
            model.generation_config.pad_token_id = self.tokenizer.pad_token_id
        return model


def pretrain(
    config: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    tokenizer: str | Path | None = None,
    settings: PretrainSettings | None = None,
    wish: Wish | None = None,
    measure: bool = False,
    progress: bool = True,
) -> TextResult:
    """Train a model from random weights; the same call resumes a run that was stopped.

    Args:
        config: a folder with a ``config.json``, that file, or a hub name. Weights in the folder are not read.
        data: JSON Lines with ``text`` or ``messages``, a text file, or a folder of them.
        out: the folder to write; must not exist.
        tokenizer: a folder with a tokenizer, or a hub name; that beside the configuration when absent, and where
            there is none, byte-level BPE of the model's vocabulary, trained on the training documents.
        settings: how to train.
        wish: the memory budget, techniques or plan, and the seed.
        measure: record the measured ledger.
        progress: show progress.

    Raises:
        PintpotError: for bad input, each kind with its own class and a hint; nothing half-written is left.
        Interrupted: after Ctrl-C or SIGTERM, with a checkpoint written.
    """
    settings, wish = settings or PretrainSettings(), wish or Wish()
    refuse_existing(out)
    source = model_folder(config, weights=False)
    shape = _shape(source)
    parts = read_parts(data, settings, wish.seed)
    chosen = None if tokenizer is None else model_folder(tokenizer, weights=False)
    job = _job(source, shape, chosen, parts[0])
    text = encode_parts(parts, job.tokenizer, settings)
    return train_on_text(job, text, out, settings, wish, measure=measure, progress=progress)


def _shape(source: Path) -> ModelShape:
    """The shape of a configuration, when a model can be made of it."""
    shape = ModelShape.from_folder(source)
    if getattr(shape.config, "quantization_config", None) is not None:
        raise UnsupportedModel(
            f"{source} describes packed weights, which cannot be trained",
            hint="take quantization_config out of config.json",
        )
    if shape.config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not (
        shape.config.is_encoder_decoder or getattr(shape.config, "is_decoder", False)
    ):
        raise UnsupportedModel(
            f"{source} is of a model that sees the tokens that it should predict ({shape.config.model_type})",
            hint="set is_decoder to true in config.json, or choose a causal architecture",
        )
    text = shape.config.get_text_config()
    try:
        if min(text.vocab_size, getattr(text, "num_hidden_layers", 1)) < 1 or not shape.parameters:
            raise ValueError("it has no layers or no vocabulary")
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UnsupportedModel(
            f"no model can be made of {source}: {error}", hint="compare it with the config.json of a model of its kind"
        ) from error
    return shape


def _job(source: Path, shape: ModelShape, chosen: Path | None, documents: Sequence[Document]) -> PretrainJob:
    """The job with the chosen tokenizer, the one beside the configuration, or one made for the documents.

    Raises:
        ModelFolderError: when the chosen tokenizer is not there.
        ShapeError: when the model's vocabulary is too small for it.
    """
    size = int(shape.config.get_text_config().vocab_size)
    folder = chosen or source
    folder = folder if folder.is_dir() else folder.parent
    found = has_tokenizer(folder)
    if chosen is not None and not found:
        raise ModelFolderError(f"{chosen} has no tokenizer", hint="give a folder that holds a tokenizer.json")
    if found:
        tokenizer = read_tokenizer(folder)
    else:
        made = train_tokenizer(texts_of(documents), vocabulary_tokens=size)
        tokenizer = as_transformers(made, context_tokens=longest_context(shape.config))
    if found and chosen is None:
        return PretrainJob(source=source, tokenizer=tokenizer, shape=shape)
    if len(tokenizer) > size:
        raise ShapeError(
            f"the tokenizer has {len(tokenizer)} tokens, and the model a vocabulary of {size}",
            hint=f"set vocab_size to {len(tokenizer)} or more in the model's config.json",
        )
    return PretrainJob(source=source, tokenizer=tokenizer, shape=_with_tokens(shape, tokenizer))


def _with_tokens(shape: ModelShape, tokenizer: PreTrainedTokenizerBase) -> ModelShape:
    """The shape with the special tokens of a tokenizer that did not come with it."""
    config = copy.deepcopy(shape.config)
    own = config.get_text_config()
    own.bos_token_id, own.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    # The embedding of a padding token is not trained, so a token with another use must not be one.
    shared = tokenizer.pad_token_id in (tokenizer.bos_token_id, tokenizer.eos_token_id)
    own.pad_token_id = None if shared and not config.is_encoder_decoder else tokenizer.pad_token_id
    return replace(shape, config=config)
