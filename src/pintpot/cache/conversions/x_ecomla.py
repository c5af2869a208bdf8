"""X-EcoMLA: latent attention whose factors begin as the singular vectors of the pre-trained weights, then distilled.

Source:    Li et al. 2025, "X-EcoMLA: Upcycling Pre-Trained Attention into MLA for Efficient and Extreme KV
           Compression", arXiv:2503.11132v4, and the authors' code (github.com/AMD-AGI/AMD-Hybrid-Models).
Differs:   the rotary rows are whole pairs of evenly spaced frequencies, which stay at their own frequencies (the
           authors' code takes the last rows of each head, which are halves of pairs); queries are factored only where
           asked for (q_rank, 1424 in the paper's 1B model), which saves no cache; biases are one more column of the
           weights; the divergence is a mean over tokens; the learning rate falls linearly, not as a cosine; no
           preference optimisation after the distillation.
Saves:     kv_cache, real: rank + rope_dim numbers a token in each converted layer.
Shapes:    E hidden size, K key-value heads, D head dim, P rope_dim, R rank; keys' and values' weights (K*D, E).
Composes:  a conversion of its own; the new model can be fine-tuned, compressed and generated with like any other.
Use when:  a cache several times smaller is worth a training run, with the model itself or a larger one as teacher.
Not when:  nothing can be trained: transmla loses far less at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from pintpot.cache.conversions._base import Conversion, check_rank, check_rotary, head_dim_of
from pintpot.cache.conversions.directions import rotary_rows, truncated
from pintpot.cache.conversions.distillation import Distillation
from pintpot.cache.conversions.family import build_with, family_settings
from pintpot.cache.conversions.latent import LatentConfig, LatentForCausalLM, stored_numbers
from pintpot.core.errors import ShapeError
from pintpot.core.ledger import Account
from pintpot.core.technique import Claim, Source, technique


@technique(
    name="x-ecomla",
    wing="cache",
    part="conversion",
    jobs=("convert",),
    source=Source(
        "X-EcoMLA: Upcycling Pre-Trained Attention into MLA for Efficient and Extreme KV Compression",
        2025,
        arxiv="2503.11132",
    ),
    accounts=(Account.KV_CACHE,),
    claims=(
        Claim(
            "compression of the cache at the same average score",
            6.4,
            versus="Llama3.2-1B-Instruct",
            at="3.6B training tokens",
            where="abstract",
        ),
        Claim(
            "compression of the cache with less than 0.1 % lower average score",
            10.6,
            versus="Llama3.2-1B-Instruct",
            at="7B training tokens",
            where="abstract",
        ),
    ),
    fidelity="whole rotary pairs; queries factored on request only; linear decay; no preference optimisation",
)
@dataclass(frozen=True, kw_only=True)
class XEcoMLA(Conversion):
    """Hyperparameters of the conversion; the defaults are those of the paper's 1B model at 10.6x.

    Attributes:
        rank: R, numbers in a latent (``kv_lora_rank``).
        rope_dim: P, numbers in the rotary key, an even divisor of the head dim below it.
        q_rank: of the queries' factors; 0 leaves their projection undivided.
        energy: where above 0, each layer has its own rank: the most that hold no more than this share of the squared
            singular values (0.95 in the paper's variant).
        q_energy: the same for the queries' factors.
        every: convert every so many layers, from the first; the others keep keys and values (a hybrid).
        kl_weight: of the divergence from the teacher in the loss.
        ce_weight: of the loss on the text itself.
    """

    learning_rate: ClassVar[float] = 8e-5
    trains: ClassVar[bool] = True

    rank: int = 64
    rope_dim: int = 32
    q_rank: int = 0
    energy: float = 0.0
    q_energy: float = 0.0
    every: int = 1
    kl_weight: float = 1.0
    ce_weight: float = 0.0

    def check(self, config: PretrainedConfig) -> None:
        """Refuse other architectures, and sizes that do not fit."""
        super().check(config)
        head_dim = head_dim_of(config)
        check_rotary(self.rope_dim, config, head_dim - 1)
        check_rank(self.rank, min(2 * config.num_key_value_heads * head_dim, config.hidden_size))
        if self.q_rank:
            check_rank(self.q_rank, min(config.num_attention_heads * head_dim, config.hidden_size), "q_rank")
        for name in ("energy", "q_energy"):
            if not 0 <= getattr(self, name) <= 1:
                raise ShapeError(f"{name} must be from 0 to 1, not {getattr(self, name)}", hint="use 0.95")
        if not 1 <= self.every <= config.num_hidden_layers:
            most = config.num_hidden_layers
            raise ShapeError(f"every must be from 1 to {most}, not {self.every}", hint="use every=1 for all layers")

    def cache_bytes(self, config: PretrainedConfig, tokens: int, batch: int, dtype: torch.dtype) -> int | None:
        """R + P numbers for each token in converted layers; None where the weights decide on R."""
        if self.energy:
            return None
        ranks = [self.rank if self._converts(i) else 0 for i in range(config.num_hidden_layers)]
        return stored_numbers(self._config(config, ranks, ranks)) * tokens * batch * dtype.itemsize

    def _converts(self, layer: int) -> bool:
        return layer % self.every == 0

    def _config(self, source: PretrainedConfig, ranks: list[int], q_ranks: list[int]) -> LatentConfig:
        return LatentConfig(
            **family_settings(source),
            kv_lora_ranks=ranks,
            q_lora_ranks=q_ranks,
            qk_rope_head_dim=self.rope_dim,
            qk_nope_head_dim=head_dim_of(source) - self.rope_dim,
        )

    @torch.no_grad()
    def convert(self, model: PreTrainedModel, texts: Sequence[Tensor]) -> LatentForCausalLM:
        """The model before its distillation; texts are not looked at."""
        self.check(model.config)
        changed: dict[str, Tensor] = {}
        ranks, q_ranks = ([0] * model.config.num_hidden_layers for _ in range(2))
        for index, block in enumerate(model.model.layers):
            if not self._converts(index):
                continue
            made = self._factors(block.self_attn, head_dim_of(model.config))
            ranks[index] = made["kv_b_proj.weight"].shape[1]
            q_ranks[index] = made["q_b_proj.weight"].shape[1] if "q_b_proj.weight" in made else 0
            changed |= {f"model.layers.{index}.self_attn.{name}": tensor for name, tensor in made.items()}
        return build_with(LatentForCausalLM, self._config(model.config, ranks, q_ranks), model, changed)

    def _factors(self, attention: Any, head_dim: int) -> dict[str, Tensor]:
        """The tensors of a latent layer from the singular vectors of a layer's weights."""
        query, key, value = (_with_bias(layer) for layer in (attention.q_proj, attention.k_proj, attention.v_proj))
        plain, rotary = rotary_rows(head_dim, self.rope_dim)
        heads, kv_heads = len(query) // head_dim, len(key) // head_dim
        up, down = truncated(torch.cat([key, value]), self.rank, self.energy)
        shared = key.reshape(kv_heads, head_dim, -1).mean(0)[rotary]
        keys_up, values_up = (
            part.reshape(kv_heads, head_dim, -1).repeat_interleave(heads // kv_heads, dim=0) for part in up.chunk(2)
        )
        made = {
            "kv_a_proj_with_mqa": torch.cat([down, shared]),
            "kv_b_proj": torch.cat([keys_up[:, plain], values_up], dim=1).flatten(0, 1),
        }
        order = torch.tensor([*plain, *rotary])
        if self.q_rank or self.q_energy:
            rows, made["q_a_proj"] = truncated(query, self.q_rank or min(query.shape), self.q_energy)
            made["q_b_proj"] = rows.reshape(heads, head_dim, -1)[:, order].flatten(0, 1)
        else:
            made["q_proj"] = query.reshape(heads, head_dim, -1)[:, order].flatten(0, 1)
        tensors: dict[str, Tensor] = {}
        for name, matrix in made.items():
            weight = matrix
            if attention.q_proj.bias is not None and not name.endswith("b_proj"):
                weight, tensors[f"{name}.bias"] = matrix[:, :-1], matrix[:, -1]
            tensors[f"{name}.weight"] = weight
        return {name: t.to(attention.q_proj.weight.dtype).contiguous() for name, t in tensors.items()}

    def objective(self, converted: PreTrainedModel, teacher: PreTrainedModel) -> nn.Module:
        """The divergence from the teacher's next tokens, and the loss on the text where it has weight."""
        return Distillation(converted, teacher, self.kl_weight, self.ce_weight)


def _with_bias(layer: Any) -> Tensor:
    """The weight in float64, and the bias as its last column where there is one."""
    weight: Tensor = layer.weight.double()
    return weight if layer.bias is None else torch.cat([weight, layer.bias.double()[:, None]], dim=1)
