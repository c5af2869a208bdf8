"""Models to convert: tiny ones with random biases and norms, so that nothing is zero or one by chance."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pintpot.core.shape import ModelShape
from tests.architectures import tiny_config

SOURCES = ("llama", "qwen2", "mistral")


def source(name: str) -> PreTrainedModel:
    """A tiny model of one of the families, without sliding windows."""
    config = tiny_config(name)
    if name == "mistral":
        config.sliding_window = None
    random = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ModelShape.from_config(config).build("cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=random)
            parameter.add_(noise, alpha=0.3 if parameter.dim() == 1 else 0.1)
    return model


def tokens(batch: int = 2, count: int = 40, seed: int = 0) -> Tensor:
    """Random token ids (B, T)."""
    return torch.randint(3, 256, (batch, count), generator=torch.Generator().manual_seed(seed))
