"""The protocol of conversions: a model becomes another one whose cache is smaller by its architecture.

A conversion says which models it is for (``check``), makes the new model (``convert``), and, where it must be trained
afterwards, gives what to minimise (``objective``). What comes out is a model of transformers like any other.

Shapes: B batch, T tokens. Texts are int64 (B, T).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from pintpot.cache.conversions.family import check_source
from pintpot.core.errors import ShapeError
from pintpot.core.ledger import Account, Ledger
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Technique
from pintpot.core.workload import Generate, Workload


@dataclass(frozen=True, kw_only=True)
class Conversion(Technique):
    """A technique that turns a model into one with a smaller cache."""

    learning_rate: ClassVar[float] = 5e-5
    """The usual one, where the conversion is trained."""

    trains: ClassVar[bool] = False
    """Whether the new model must be trained, by ``objective``."""

    def check(self, config: PretrainedConfig) -> None:
        """Refuse what cannot be converted, from the configuration alone.

        Raises:
            UnsupportedModel: naming the modules.
            ShapeError: naming the hyperparameter that does not fit the model.
        """
        check_source(config, self.name)

    @abstractmethod
    def convert(self, model: PreTrainedModel, texts: Sequence[Tensor]) -> PreTrainedModel:
        """The new model, in evaluation mode.

        Args:
            model: the source; not modified, but its storage may be shared.
            texts: what to look at the source's activations on.

        Raises:
            DataError: when there are none, and some are needed.
        """

    def objective(self, converted: PreTrainedModel, teacher: PreTrainedModel) -> nn.Module | None:
        """A module whose ``forward(input_ids, labels, use_cache)`` gives the ``loss`` to train with, or None.

        Args:
            converted: what ``convert`` gave; the module's trainable parameters are its own.
            teacher: the source, or a larger model with the same vocabulary; frozen.
        """
        return None

    @abstractmethod
    def cache_bytes(self, config: PretrainedConfig, tokens: int, batch: int, dtype: torch.dtype) -> int | None:
        """Bytes of the cache of the converted model after ``tokens`` tokens, exactly; None where only weights tell.

        Args:
            config: of the source.
            tokens: seen by each sequence.
            batch: sequences.
            dtype: of what is stored.
        """

    def predict(self, ledger: Ledger, shape: ModelShape, workload: Workload) -> Ledger:
        """The cache of the converted model in the place of the source's."""
        if not isinstance(workload, Generate):
            return ledger
        last = workload.prompt_tokens + workload.new_tokens - 1
        for phase, tokens in (("prefill", workload.prompt_tokens), ("decode", last)):
            size = self.cache_bytes(shape.config, tokens, workload.batch, shape.dtype)
            if size is not None:
                ledger = ledger.set(Account.KV_CACHE, size, phases=(phase,))
        return ledger


@torch.no_grad()
def output_covariances(
    model: PreTrainedModel, layers: Mapping[str, nn.Module], texts: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Sums of outer products of what modules give for texts, not centred: float64 (O, O) for outputs of O numbers.

    Args:
        model: run on every text.
        layers: modules of it, by any name.
        texts: int64 (B, T) each.
    """
    sums: dict[str, Tensor] = {}

    def watch(name: str) -> object:
        def add(module: nn.Module, inputs: object, output: Tensor) -> None:
            rows = output.flatten(0, -2).float()
            product = (rows.T @ rows).double()
            sums[name] = sums[name] + product if name in sums else product

        return add

    handles = [module.register_forward_hook(watch(name)) for name, module in layers.items()]  # type: ignore[arg-type]
    try:
        for text in texts:
            model(input_ids=text, use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return sums


@torch.no_grad()
def mean_loss(model: PreTrainedModel, texts: Sequence[Tensor]) -> float:
    """Nats per token of texts."""
    losses = [float(model(input_ids=text, labels=text, use_cache=False).loss) for text in texts]
    return sum(losses) / len(losses) if losses else math.nan


def head_dim_of(config: PretrainedConfig) -> int:
    """D of an attention layer."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def check_rotary(rope_dim: int, config: PretrainedConfig, most: int) -> None:
    """Refuse a rotary key of a size that the source's frequencies cannot be laid out in.

    Raises:
        ShapeError: with the sizes that can.
    """
    head_dim = head_dim_of(config)
    fractions = [n for n in range(2, head_dim, 2) if head_dim % n == 0]
    allowed = [*fractions, *range(head_dim, most + 1, head_dim)]
    if rope_dim not in allowed:
        raise ShapeError(
            f"rope_dim must be an even divisor or a multiple of the head dim {head_dim}, not {rope_dim}",
            hint=f"one of: {', '.join(map(str, allowed))}",
        )


def check_rank(rank: int, most: int, what: str = "rank") -> None:
    """Refuse a rank that is no rank of the model.

    Raises:
        ShapeError: with the highest.
    """
    if not 1 <= rank <= most:
        raise ShapeError(f"{what} must be from 1 to {most} for this model, not {rank}", hint=f"use {what}={most // 2}")
