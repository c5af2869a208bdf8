"""Decoding of losslessly stored checkpoints while transformers loads them.

transformers makes parameters of checkpoint tensors by rules. Here each rule gets a first step that decodes, and a rule
that takes every other name is added, so that any architecture loads whatever its own rules are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter

from pintpot.core import byte_planes
from pintpot.core.model_folder import DTYPES

_EVERY_NAME = "^"


class Decode(ConversionOps):
    """Decodes the tensors that a rule takes, and casts those of floating point to the parameter's dtype."""

    @torch.no_grad()
    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], *, model: PreTrainedModel, full_layer_name: str, **kwargs: Any
    ) -> dict[str, Any]:
        """The same names with decoded tensors; the rule for every name gives the parameter's."""
        like = model.get_parameter_or_buffer(full_layer_name)
        decoded: dict[str, Any] = {}
        for name in list(input_dict):
            stored = input_dict.pop(name)
            tensors = [_decoded(tensor, like) for tensor in (stored if isinstance(stored, list) else [stored])]
            decoded[full_layer_name if name == _EVERY_NAME else name] = tensors
        return decoded

    @property
    def reverse_op(self) -> ConversionOps:
        """Not asked for: the rules are put back as they were when the model is loaded."""
        raise NotImplementedError


def _decoded(stored: Tensor, like: Tensor) -> Tensor:
    tensor = byte_planes.decode(stored.cpu().numpy(), DTYPES)
    return tensor.to(like.dtype) if tensor.is_floating_point() and like.is_floating_point() else tensor


def decoding(rules: Sequence[Any]) -> list[Any]:
    """Loading rules that decode first; renamings stay as they are."""
    return [
        *(_with(rule, [Decode(), *rule.operations]) if isinstance(rule, WeightConverter) else rule for rule in rules),
        WeightConverter(_EVERY_NAME, "", operations=[Decode()], force_cpu=True),
    ]


def without_decoding(rules: Sequence[Any]) -> list[Any]:
    """The rules that ``decoding`` was given, by which the model is saved."""
    plain: list[Any] = []
    for rule in rules:
        steps = getattr(rule, "operations", [])
        if not any(isinstance(step, Decode) for step in steps):
            plain.append(rule)
        elif len(steps) > 1:
            rule.operations = steps[1:]
            plain.append(rule)
    return plain


def _with(rule: WeightConverter, operations: list[ConversionOps]) -> WeightConverter:
    return rule.copy(
        list(rule._original_source_patterns),
        list(rule._original_target_patterns),
        operations=operations,
        force_cpu=True,
    )
