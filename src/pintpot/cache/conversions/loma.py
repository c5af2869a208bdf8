"""LoMA: after each zone of tokens a few memory tokens are read, whose keys and values take the zone's place.

Source:    Wang and Xiao 2024, "LoMA: Lossless Compressed Memory Attention", arXiv:2401.09486 (abstract, and summaries
           of the training scheme: zones, special tokens, both losses).
Differs:   the figure of the attention mask and the position numbers could not be seen, and are ours: memory tokens see
           their zone and each other in both directions; repetition tokens see their memory and the repetition before
           them; memory tokens stand at every compression_ratio-th position of their zone, repetition tokens at the
           positions that they repeat. Both default sizes and the learning rate are ours. The special tokens are no
           part of the vocabulary, so that the tokenizer stays as it is.
Saves:     kv_cache, real: memory_tokens instead of memory_tokens * compression_ratio tokens for each full zone.
Shapes:    B batch, T tokens, Z = memory_tokens * compression_ratio tokens in a zone.
Composes:  a conversion of its own; the new model can be fine-tuned, compressed and generated with like any other.
Use when:  long contexts are read or written, and the model can be trained on text like them.
Not when:  nothing can be trained: untrained memories hold next to nothing of their zones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from pintpot.cache.conversions._base import Conversion, head_dim_of
from pintpot.cache.conversions.family import build_with, family_settings
from pintpot.cache.conversions.memory import READING, REPETITION, MemoryConfig, MemoryForCausalLM
from pintpot.core.errors import ShapeError
from pintpot.core.ledger import Account
from pintpot.core.technique import Source, technique


@technique(
    name="loma",
    wing="cache",
    part="conversion",
    jobs=("convert",),
    source=Source("LoMA: Lossless Compressed Memory Attention", 2024, arxiv="2401.09486"),
    accounts=(Account.KV_CACHE,),
    fidelity="mask and positions are ours where the paper's figures could not be seen; default sizes are ours",
)
@dataclass(frozen=True, kw_only=True)
class LoMA(Conversion):
    """Hyperparameters of the conversion.

    Attributes:
        memory_tokens: which stand for a zone (t in the paper).
        compression_ratio: tokens of a zone for each of them (c in the paper).
        repeat_weight: of the repetition's loss, beside the loss on the text; 1 in the paper.
    """

    trains: ClassVar[bool] = True

    memory_tokens: int = 8
    compression_ratio: int = 4
    repeat_weight: float = 1.0

    def check(self, config: PretrainedConfig) -> None:
        """Refuse other architectures, and zones longer than the context."""
        super().check(config)
        for name, least in (("memory_tokens", 1), ("compression_ratio", 2)):
            value = getattr(self, name)
            if value < least:
                raise ShapeError(f"{name} must be at least {least}, not {value}", hint="give a larger one")
        zone = self.memory_tokens * self.compression_ratio
        if zone >= config.max_position_embeddings:
            raise ShapeError(
                f"a zone of {zone} tokens is as long as the model's {config.max_position_embeddings} positions",
                hint="give fewer memory_tokens or a lower compression_ratio",
            )

    def cache_bytes(self, config: PretrainedConfig, tokens: int, batch: int, dtype: torch.dtype) -> int:
        """Keys and values of all memories, and of the zone that is not full."""
        full, rest = divmod(tokens, self.memory_tokens * self.compression_ratio)
        numbers = 2 * config.num_key_value_heads * head_dim_of(config) * config.num_hidden_layers
        return (full * self.memory_tokens + rest) * numbers * batch * dtype.itemsize

    @torch.no_grad()
    def convert(self, model: PreTrainedModel, texts: Sequence[Tensor]) -> MemoryForCausalLM:
        """The model before its training; both special tokens begin as the mean of the embeddings."""
        self.check(model.config)
        config = MemoryConfig(
            **family_settings(model.config),
            memory_tokens=self.memory_tokens,
            compression_ratio=self.compression_ratio,
        )
        embeddings: Any = model.get_input_embeddings()
        mean = embeddings.weight.float().mean(0, keepdim=True)
        special = {"special_tokens.weight": mean.repeat(2, 1).to(model.dtype)}
        return build_with(MemoryForCausalLM, config, model, special)

    def objective(self, converted: PreTrainedModel, teacher: PreTrainedModel) -> nn.Module:
        """The loss on the text, and that of giving each zone back from its memory; the teacher is not asked."""
        return Repetition(cast(MemoryForCausalLM, converted), self.repeat_weight)


class Repetition(nn.Module):
    """A model with the loss of LoMA's training, ``L_LM + repeat_weight * L_Repeat``.

    Args:
        model: trained.
        repeat_weight: of the repetition.
    """

    def __init__(self, model: MemoryForCausalLM, repeat_weight: float = 1.0) -> None:
        super().__init__()
        self.model = model
        self.repeat_weight = repeat_weight

    def forward(self, input_ids: Tensor, labels: Tensor, use_cache: bool = False) -> SimpleNamespace:
        """The loss of texts, int64 (B, T), and its parts ``text`` and ``repeat`` (nats per token).

        Raises:
            ShapeError: for texts without one full zone.
        """
        size = self.model.config.zone_tokens
        if input_ids.shape[1] < size:
            raise ShapeError(
                f"texts of {input_ids.shape[1]} tokens have no full zone of {size}", hint="train on longer sequences"
            )
        model: Any = self.model
        hidden, layout = model.lay_out(model.model.embed_tokens(input_ids), repeat=True)
        read = model.lm_head(hidden[:, layout.places[READING]])
        text = model.loss_function(logits=read, labels=labels, vocab_size=read.shape[-1])
        repetition = layout.places[REPETITION]
        again = model.lm_head(hidden[:, repetition]).float()
        repeat = nn.functional.cross_entropy(again.flatten(0, 1), input_ids[:, layout.position[repetition]].flatten())
        return SimpleNamespace(loss=text + self.repeat_weight * repeat, text=text, repeat=repeat)
