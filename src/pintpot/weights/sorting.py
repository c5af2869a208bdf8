"""Ranking the terms of a compressed folder anew, by what each does for the loss of the whole model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pintpot.core.errors import CompositionError
from pintpot.core.files import write_atomic
from pintpot.core.model_folder import open_model
from pintpot.weights._base import Texts
from pintpot.weights.load import load_compressed
from pintpot.weights.modules import PackedTerms
from pintpot.weights.quantizer import PintpotConfig
from pintpot.weights.ranked import RankedLayout
from pintpot.weights.targets import find_targets

Progress = Callable[[int, int], None]
"""Called with the terms that were tried, and all."""


@torch.no_grad()
def sort_terms_(folder: str | Path, texts: Texts, progress: Progress | None = None) -> RankedLayout:
    """Rank the terms of a folder by the loss that the whole model has with each, and write the order into the folder.

    All weights have their first terms; each in turn gets its second, and those that lower the loss most come first;
    then all have two, and so on (the sorting of Wang et al. 2024, arXiv:2410.23918). That is one pass of the packed
    model over the texts for every term but the first ones.

    Args:
        folder: compressed by a method that ranks its terms, such as bitstack; its ``config.json`` is changed.
        texts: what the model is judged on.
        progress: told how far it is.

    Returns:
        The layout in its new order.

    Raises:
        CompositionError: when the folder's terms are not ranked, or there are no texts.
        ModelFolderError: when the folder is damaged, incomplete, or not compressed by Pintpot.
    """
    opened = open_model(folder)
    model = load_compressed(folder).eval()
    config = PintpotConfig(**(opened.quantization or {}))
    layout = config.read_layout()
    if not isinstance(layout, RankedLayout):
        raise CompositionError(
            f"{folder} is used as a whole: {config.technique} does not rank its terms", hint="compress with bitstack"
        )
    if not texts:
        raise CompositionError("there is no text to judge the model on", hint="give texts=[token ids]")
    targets, _ = find_targets(opened.shape(config.dtype).build("meta"), config.dtype)
    holders = {t.parameter: _packed(model, t.holder) for t in targets if t.parameter in layout}
    order: list[str] = []
    for height in range(1, max(len(formats) for formats in layout.values())):
        for name, holder in holders.items():
            holder.formats = layout[name][:height]
        losses: dict[str, float] = {}
        for name in (name for name in holders if len(layout[name]) > height):
            holders[name].formats = layout[name][: height + 1]
            losses[name] = _loss(model, texts)
            holders[name].formats = layout[name][:height]
            if progress is not None:
                progress(len(order) + len(losses), len(layout.order))
        order += sorted(losses, key=lambda name: losses[name])
    ranked = RankedLayout(layout, order)
    file = Path(folder) / "config.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    data["quantization_config"] = PintpotConfig.of(config.method(), config.dtype, ranked).to_dict()
    write_atomic(file, json.dumps(data, indent=2) + "\n")
    return ranked


def _packed(model: PreTrainedModel, name: str) -> PackedTerms:
    module = model.get_submodule(name)
    if not isinstance(module, PackedTerms):
        raise CompositionError(f"{name} is not packed", hint="load the folder as Pintpot wrote it")
    return module


def _loss(model: PreTrainedModel, texts: Texts) -> float:
    """Mean over texts in nats a token; infinite where it is not a number, so that such a term comes last."""
    losses = [_loss_of(model, text) for text in texts]
    mean = sum(losses) / len(losses)
    return math.inf if math.isnan(mean) else mean


def _loss_of(model: PreTrainedModel, text: Tensor | Mapping[str, Tensor]) -> float:
    inputs = {"input_ids": text} if isinstance(text, Tensor) else dict(text)
    return float(model(**inputs, labels=inputs["input_ids"]).loss)
