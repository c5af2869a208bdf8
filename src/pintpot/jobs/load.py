"""Loading models and tokenizers from folders, dense or compressed; a half-loaded model is never returned."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from pintpot.core.errors import ModelFolderError, UnsupportedModel
from pintpot.core.model_folder import ModelFolder, check_finite, open_model
from pintpot.jobs.model_source import model_folder
from pintpot.weights import load_compressed

OURS = "pintpot"
"""The ``quant_method`` of folders that Pintpot compressed."""


def load(model: str | Path, dtype: torch.dtype | None = None, *, size_bytes: int | None = None) -> PreTrainedModel:
    """A model in evaluation mode, from a folder (dense, or compressed by Pintpot) or a hub name.

    Args:
        model: the folder or name.
        dtype: to hold dense weights in; as stored when ``None``. A compressed folder keeps its own.
        size_bytes: most bytes of all tensors, of a folder that can be loaded in any size.

    Raises:
        ModelFolderError: when the folder is incomplete, corrupt or unsafe, or weights hold NaN or Inf.
        UnsupportedModel: when the architecture is unknown, or another tool compressed the folder.
    """
    opened = open_model(model_folder(model))
    if opened.quantization is None:
        return _load_dense(opened, dtype or opened.dtype)
    method = opened.quantization.get("quant_method")
    if method != OURS:
        raise UnsupportedModel(
            f"{opened.path} was compressed by {method or 'another tool'}, not by Pintpot",
            hint="give the dense model, or load this one with transformers",
        )
    with no_progress_bars():
        return load_compressed(opened.path, size_bytes=size_bytes)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder; no code of the folder is run.

    Raises:
        ModelFolderError: when there is none, or it cannot be read.
    """
    open_model(folder, tokenizer=True, match=False)
    return read_tokenizer(folder)


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder that need not hold a model; no code of the folder is run.

    Raises:
        ModelFolderError: when it cannot be read.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise ModelFolderError(
            f"the tokenizer of {folder} cannot be loaded: {error}",
            hint="copy tokenizer.json and tokenizer_config.json of the model into the folder",
        ) from error
    return tokenizer


def _load_dense(opened: ModelFolder, dtype: torch.dtype) -> PreTrainedModel:
    kind: Any = AutoModelForSeq2SeqLM if opened.config.is_encoder_decoder else AutoModelForCausalLM
    with no_progress_bars():
        model, info = kind.from_pretrained(
            opened.path, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    lost = sorted([*info["missing_keys"], *info["unexpected_keys"], *(str(k) for k in info["mismatched_keys"])])
    if lost:
        raise ModelFolderError(
            f"{opened.path} does not hold what its configuration calls for: {', '.join(lost[:5])}",
            hint="the download is incomplete, or config.json belongs to another model",
        )
    for name, parameter in model.named_parameters():
        check_finite(name, parameter.detach())
    loaded: PreTrainedModel = model.eval()
    return loaded


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Silence transformers' own bars for a while; ours are shown instead."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
