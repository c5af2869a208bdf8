"""The shape of a model whose folder was compressed before: its weights are packed from the start."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from pintpot.core.errors import CompositionError
from pintpot.core.model_folder import open_model
from pintpot.core.plan import ModelIdentity
from pintpot.core.shape import ModelShape
from pintpot.weights import PintpotConfig
from pintpot.weights._base import describe
from pintpot.weights.fitting import fit
from pintpot.weights.quantizer import QUANT_METHOD
from pintpot.weights.routing import routed_layout


@dataclass(frozen=True)
class PackedShape(ModelShape):
    """A model as shapes, with packed weights.

    Attributes:
        packing: how the weights were packed; ``None`` means that they were not.
        size_bytes: most bytes of the tensors that are loaded; None for all.
    """

    packing: PintpotConfig | None = None
    size_bytes: int | None = None

    @property
    def ranked(self) -> bool:
        """Whether the folder can be loaded in any size."""
        return self.packing is not None and self.packing.order is not None

    @property
    def packed_as(self) -> str:
        """The configuration of the packing."""
        return "" if self.packing is None else json.dumps(self.packing.to_dict(), sort_keys=True)

    def build(self, device: str = "meta") -> PreTrainedModel:
        """An untrained model of this shape with empty packed weights."""
        model = super().build(device)
        if self.packing is not None:
            self.packing.prepare_skeleton_(model)
        return model


def shape_of_folder(folder: Path, dtype: torch.dtype | None = None, task: str | None = None) -> ModelShape:
    """The shape of a folder, dense or compressed by Pintpot.

    Args:
        folder: the model's.
        dtype: to hold dense weights in. A compressed folder keeps its own.
        task: that a merged model is switched to, or none.

    Raises:
        CompositionError: when there is no such task.
        ModelFolderError: when there is no readable configuration.
        UnsupportedModel: when the architecture is unknown.
    """
    shape = ModelShape.from_folder(folder, dtype)
    settings: dict[str, Any] = getattr(shape.config, "quantization_config", None) or {}
    packed = settings.get("quant_method") == QUANT_METHOD
    if task is not None:
        layout = routed_layout((PintpotConfig(**settings).read_layout() if packed else None) or {}, task)
        settings = {**settings, **describe(layout)}
    if not packed:
        return shape
    own = ModelShape.from_folder(folder)
    return PackedShape(own.config, own.dtype, own.name, PintpotConfig(**settings))


def in_size(shape: ModelShape, size_bytes: int) -> PackedShape:
    """The shape of as much of a folder as fits into a size.

    Args:
        shape: of the whole folder, which it names.
        size_bytes: most bytes of all tensors.

    Raises:
        BudgetError: when the first term of each weight is too much.
        CompositionError: when the folder has one size only.
    """
    if not isinstance(shape, PackedShape) or not shape.ranked:
        raise CompositionError(
            f"{shape.name} has one size only", hint="leave out the size, or give a folder compressed with bitstack"
        )
    part = fit(open_model(shape.name), size_bytes)
    packing = PintpotConfig(**(part.opened.quantization or {}))
    return replace(shape, packing=packing, size_bytes=size_bytes)


def as_planned(shape: ModelShape, model: ModelIdentity) -> ModelShape:
    """A model's shape in the size and the dtype of a plan."""
    sized = shape if model.size_bytes is None else in_size(shape, model.size_bytes)
    return with_dtype(sized, getattr(torch, model.dtype))


def with_dtype(shape: ModelShape, dtype: torch.dtype) -> ModelShape:
    """The same shape, held in another dtype."""
    return replace(shape, dtype=dtype)
