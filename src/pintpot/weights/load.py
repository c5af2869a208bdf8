"""Loading compressed models, and compressing while loading; a half-loaded model is never returned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from pintpot.core.errors import ModelFolderError, PintpotError, UnsupportedModel
from pintpot.core.model_folder import ModelFolder, check_finite, open_model
from pintpot.core.shape import model_class
from pintpot.weights._base import Texts, WeightMethod
from pintpot.weights.fitting import fit
from pintpot.weights.quantizer import FAILURES, QUANT_METHOD, PintpotConfig


def load_compressed(
    folder: str | Path, *, dtype: torch.dtype | None = None, size_bytes: int | None = None
) -> PreTrainedModel:
    """Load a folder that ``compress_folder`` or ``save_pretrained`` wrote.

    Args:
        folder: the compressed folder.
        dtype: of the dense parameters and of computing; the folder's own by default.
        size_bytes: most bytes of all tensors, where the folder's terms are ranked: those that are worth most are
            loaded, as far as they fit, and the others are not read.

    Raises:
        BudgetError: when the size is too small for the first terms.
        CompositionError: when a size is given and the folder's terms are not ranked.
        ModelFolderError: when the folder is damaged, incomplete, or not compressed by Pintpot.
    """
    opened = open_model(folder)
    if (opened.quantization or {}).get("quant_method") != QUANT_METHOD and not opened.coded:
        raise ModelFolderError(
            f"{folder} is not a model that Pintpot compressed", hint="load it as it is, or run `pintpot compress` first"
        )
    if size_bytes is None:
        return _load(opened, dtype, None)
    part = fit(opened, size_bytes, dtype)
    return _load(part.opened, dtype, None, part.left_off)


def load_and_compress(
    folder: str | Path, method: WeightMethod, *, dtype: torch.dtype | None = None, texts: Texts = ()
) -> PreTrainedModel:
    """Load a dense folder and compress each parameter (or block) as it arrives; the dense model is never in memory.

    Args:
        folder: the dense folder.
        method: how to compress.
        dtype: of the dense parameters and of computing; the folder's own by default.
        texts: what the model reads, where the method is calibrated.

    Raises:
        CompositionError: when texts are needed and there are none.
        ModelFolderError: when the folder is damaged or incomplete, or a parameter holds NaN or Inf.
        UnsupportedModel: when the model is compressed already, or has layers that cannot be compressed.
    """
    opened = open_model(folder)
    refuse_compressed(opened)
    if method.works_on_blocks or method.examines:
        # Imported here because that module writes folders too, which this one only reads.
        from pintpot.weights.folder_blocks import load_calibrated

        return load_calibrated(opened, method, texts, dtype)
    if opened.coded:
        raise UnsupportedModel(
            f"{folder} is stored coded, and is not decoded and compressed at once",
            hint="compress it into a new folder first (pintpot compress), and load that",
        )
    return _load(opened, dtype, PintpotConfig.of(method))


def refuse_compressed(opened: ModelFolder) -> None:
    """Refuse a folder that holds a compressed model.

    Raises:
        UnsupportedModel: naming how it was compressed.
    """
    if opened.quantization is not None:
        raise UnsupportedModel(
            f"{opened.path} is compressed already (by {opened.quantization.get('quant_method', 'an unknown method')})",
            hint="compress the original model instead",
        )


def _load(
    opened: ModelFolder,
    dtype: torch.dtype | None,
    config: PintpotConfig | None,
    left_off: frozenset[str] = frozenset(),
) -> PreTrainedModel:
    kind: Any = model_class(opened.config)
    extra: dict[str, Any] = {} if config is None else {"quantization_config": config}
    if left_off:
        extra["config"] = opened.config
    failures: list[PintpotError] = []
    token = FAILURES.set(failures)
    try:
        model, info = kind.from_pretrained(
            opened.path,
            dtype=dtype or (opened.dtype if config is not None else "auto"),
            output_loading_info=True,
            use_safetensors=True,
            local_files_only=True,
            **extra,
        )
    except RuntimeError as error:
        # transformers gathers errors of single parameters and raises them as one RuntimeError.
        if failures:
            raise failures[0] from error
        raise ModelFolderError(
            f"{opened.path} cannot be loaded: {error}", hint="the weights do not match config.json, or are damaged"
        ) from error
    finally:
        FAILURES.reset(token)
    if left_off:
        info["unexpected_keys"] = set(info["unexpected_keys"]) - left_off
    wrong = [f"{kind.replace('_', ' ')}: {_first(info[kind])}" for kind in _FAULTS if info.get(kind)]
    if wrong:
        raise ModelFolderError(
            f"{opened.path} is only half there ({'; '.join(wrong)})", hint="download or compress the model again"
        )
    loaded: PreTrainedModel = model
    for name, tensor in loaded.state_dict().items():
        check_finite(name, tensor)
    return loaded


_FAULTS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


def _first(names: Any) -> str:
    listed = sorted(map(str, names))
    return listed[0] + (f" and {len(listed) - 1} more" if len(listed) > 1 else "")
