"""Which parameters are projected: the matrices of linear layers (and packed experts) inside the blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from pintpot.core.shape import ModelShape, ParameterShape, block_names

SMALLEST_SIDE = 8
"""Matrices with a smaller side than this (routers, depthwise filters) are left to the plain rule."""


def is_matrix(shape: Sequence[int]) -> bool:
    """Whether a shape is that of a matrix, or of a stack of matrices, worth projecting."""
    return len(shape) in (2, 3) and min(shape[-2:]) >= SMALLEST_SIDE


def projected_names(model: nn.Module) -> frozenset[str]:
    """Names of the parameters of a model that are projected.

    They are the weights of linear layers and the three-dimensional expert weights inside the model's blocks;
    embeddings, norms, biases and the head are not. A model without blocks has all its linear layers projected.
    A module that stands for a linear layer names those of its own in ``projected_parameters``.
    """
    blocks = tuple(name + "." for name in block_names(model))
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear | Conv1D)}
    linear |= {id(p) for m in model.modules() for p in getattr(m, "projected_parameters", ())}
    return frozenset(
        name
        for name, p in model.named_parameters()
        if is_matrix(p.shape) and (p.dim() == 3 or id(p) in linear) and (not blocks or name.startswith(blocks))
    )


def projected_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two parameter groups of the trainable parameters, for any ``ProjectedOptimizer``.

    The first is projected; the second (embeddings, norms, biases, head) follows the plain rule. Add
    hyperparameters to the dictionaries to set them for a group.
    """
    chosen = projected_names(model)
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in trainable if name in chosen], "projected": True},
        {"params": [p for name, p in trainable if name not in chosen], "projected": False},
    ]
    return [group for group in groups if group["params"]]


def split_shape(shape: ModelShape) -> tuple[list[ParameterShape], list[ParameterShape]]:
    """The parameters of a model's shape that are projected, and the others, as ``projected_groups`` splits them."""
    in_blocks = any(p.block for p in shape.parameters)
    projected: list[ParameterShape] = []
    plain: list[ParameterShape] = []
    for p in shape.parameters:
        matrix = is_matrix(p.shape) and (p.kind == "linear" or len(p.shape) == 3)
        (projected if matrix and (p.block or not in_blocks) else plain).append(p)
    return projected, plain
