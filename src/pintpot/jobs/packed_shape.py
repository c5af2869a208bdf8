"""The shape of a model whose folder was compressed before: its weights are packed from the start."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from pintpot.core.shape import ModelShape
from pintpot.weights import PintpotConfig
from pintpot.weights.quantizer import QUANT_METHOD


@dataclass(frozen=True)
class PackedShape(ModelShape):
    """A model as shapes, with packed weights.

    Attributes:
        packing: how the weights were packed; ``None`` means that they were not.
    """

    packing: PintpotConfig | None = None

    def build(self, device: str = "meta") -> PreTrainedModel:
        """An untrained model of this shape with empty packed weights."""
        model = super().build(device)
        if self.packing is not None:
            self.packing.prepare_skeleton_(model)
        return model


def shape_of_folder(folder: Path, dtype: torch.dtype | None = None) -> ModelShape:
    """The shape of a folder, dense or compressed by Pintpot.

    Args:
        folder: the model's.
        dtype: to hold dense weights in. A compressed folder keeps its own.

    Raises:
        ModelFolderError: when there is no readable configuration.
        UnsupportedModel: when the architecture is unknown.
    """
    shape = ModelShape.from_folder(folder, dtype)
    settings: dict[str, Any] = getattr(shape.config, "quantization_config", None) or {}
    if settings.get("quant_method") != QUANT_METHOD:
        return shape
    own = ModelShape.from_folder(folder)
    return PackedShape(own.config, own.dtype, own.name, PintpotConfig(**settings))


def with_dtype(shape: ModelShape, dtype: torch.dtype) -> ModelShape:
    """The same shape, held in another dtype."""
    return replace(shape, dtype=dtype)
