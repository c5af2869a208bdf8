"""From packed modules back to ordinary ones that hold the rounded weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pintpot.core.errors import UnsupportedModel
from pintpot.weights.modules import CompressedConv2d, CompressedExperts, CompressedLinear


@torch.no_grad()
def dequantize_(model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Replace every packed layer of a model by a dense one, in place; the rounding stays.

    Called by transformers' ``model.dequantize()``, which also removes the quantization configuration.

    Args:
        model: a compressed model.
        dtype: of the dense weights; the modules' own by default.

    Raises:
        UnsupportedModel: naming packed experts, or a method that put other modules in the place of blocks: these are
            not made dense again.
    """
    method: Any = getattr(getattr(model, "hf_quantizer", None), "method", None)
    if method is not None and method.converts:
        raise UnsupportedModel(
            f"blocks that {method.name} made are not made dense again", hint="load the dense folder instead"
        )
    experts = [name for name, module in model.named_modules() if isinstance(module, CompressedExperts)]
    if experts:
        raise UnsupportedModel(
            f"packed experts are not made dense again: {', '.join(experts)}", hint="load the dense folder instead"
        )
    kinds = (CompressedLinear, CompressedConv2d)
    packed = [(name, module) for name, module in model.named_modules() if isinstance(module, kinds)]
    for name, module in packed:
        model.set_submodule(name, _dense(module, dtype or module.dtype))
    return model


def _dense(module: CompressedLinear | CompressedConv2d, dtype: torch.dtype) -> nn.Module:
    weight = module.weight.to(dtype).as_subclass(torch.Tensor)
    dense: nn.Module
    if isinstance(module, CompressedConv2d):
        dense = nn.Conv2d(1, 1, 1, device="meta")
        for name in nn.Conv2d.__constants__:
            setattr(dense, name, getattr(module, name))
    elif module.transposed:
        dense = Conv1D(module.out_features, 0)
        weight = weight.t().contiguous()
    else:
        dense = nn.Linear(1, 1, bias=False, device="meta")
        dense.in_features, dense.out_features = module.in_features, module.out_features
    dense.weight = nn.Parameter(weight)
    dense.register_parameter("bias", module.bias)  # type: ignore[arg-type]
    return dense.train(module.training)
