"""Multi-head latent attention: a token's cache is one latent vector and one rotary key, whatever the number of heads.

Keys and values of every head are linear functions of the latent, which is stored in their place. A prompt rebuilds
them for as long as a layer runs; a single token is attended without rebuilding any: the functions are absorbed into
its query and its output, so that all heads attend to the stored vectors as they are.

Differs from DeepSeek's models in transformers: no normalisation of the latent (it would keep a conversion from being
exact), biases where the source has them, the source's rotary frequencies and scale, and a rank for each layer.

Shapes: B batch, T tokens, S stored tokens, H heads, D head dim, N dimensions of a key without positions, P of the
rotary key, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward

from pintpot.cache.conversions.family import FamilyConfig, FamilyForCausalLM


@strict
class LatentConfig(FamilyConfig):
    """A decoder of the Llama family with latent attention.

    Attributes:
        kv_lora_ranks: R of each layer; 0 for a layer that keeps its keys and values.
        q_lora_ranks: likewise of the queries' factors; 0 for an undivided projection.
        qk_nope_head_dim: N.
        qk_rope_head_dim: P: every ``head_dim / P``-th frequency of the source, or all of them ``P / head_dim`` times.
        kv_lora_rank: the largest rank.
    """

    model_type = "pintpot_latent"

    kv_lora_ranks: list[int] | None = None
    q_lora_ranks: list[int] | None = None
    qk_nope_head_dim: int = 64
    qk_rope_head_dim: int = 64
    kv_lora_rank: int = 0

    def __post_init__(self, **kwargs: Any) -> None:
        self.kv_lora_ranks = self.kv_lora_ranks or [0] * self.num_hidden_layers
        self.q_lora_ranks = self.q_lora_ranks or [0] * self.num_hidden_layers
        self.kv_lora_rank = max(self.kv_lora_ranks)
        super().__post_init__(**kwargs)


def stored_numbers(config: LatentConfig) -> int:
    """Numbers that the cache of a model holds for each token of a sequence."""
    head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
    whole = 2 * (config.num_key_value_heads or config.num_attention_heads) * head_dim
    return sum(rank + config.qk_rope_head_dim if rank else whole for rank in config.kv_lora_ranks or ())


class LatentAttention(nn.Module):
    """One layer of latent attention, with DeepSeek's names for its projections."""

    def __init__(self, config: LatentConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.heads = config.num_attention_heads
        self.head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
        self.nope_dim = config.qk_nope_head_dim
        self.rope_dim = config.qk_rope_head_dim
        self.rank = (config.kv_lora_ranks or [0])[layer_idx]
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.num_key_value_groups = 1
        self.is_causal = True
        q_rank = (config.q_lora_ranks or [0])[layer_idx]
        query_size = self.heads * (self.nope_dim + self.rope_dim)
        if q_rank:
            self.q_a_proj = nn.Linear(config.hidden_size, q_rank, bias=config.attention_bias)
            self.q_b_proj = nn.Linear(q_rank, query_size, bias=False)
        else:
            self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.kv_a_proj_with_mqa = nn.Linear(config.hidden_size, self.rank + self.rope_dim, bias=config.attention_bias)
        self.kv_b_proj = nn.Linear(self.rank, self.heads * (self.nope_dim + self.head_dim), bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=config.output_bias)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend, after writing the tokens' latents (B, 1, T, R) and rotary keys (B, 1, T, P) into the cache."""
        batch, tokens = hidden_states.shape[:2]
        query = self._query(hidden_states).view(batch, tokens, self.heads, -1).transpose(1, 2)
        plain, rotary = query.split([self.nope_dim, self.rope_dim], dim=-1)
        latent, key = self.kv_a_proj_with_mqa(hidden_states)[:, None].split([self.rank, self.rope_dim], dim=-1)
        cos, sin = (self._angles(part) for part in position_embeddings)
        rotary, key = apply_rotary_pos_emb(rotary, key, cos, sin)
        if past_key_values is not None:
            latent, key = past_key_values.update(latent, key, self.layer_idx)
        # A layer that adapters wrap is more than its weight, which is all that can be absorbed.
        absorb = tokens == 1 and type(self.kv_b_proj) is nn.Linear
        attend = self._attend_absorbed if absorb else self._attend_expanded
        output, weights = attend(plain, rotary, latent, key, attention_mask, kwargs)
        return self.o_proj(output.reshape(batch, tokens, -1)), weights

    def _query(self, hidden_states: Tensor) -> Tensor:
        queries: Tensor = (
            self.q_proj(hidden_states) if hasattr(self, "q_proj") else self.q_b_proj(self.q_a_proj(hidden_states))
        )
        return queries

    def _angles(self, table: Tensor) -> Tensor:
        """The columns of the rotary table (B, T, D) that belong to the rotary key: (B, T, P)."""
        half = table[..., : self.head_dim // 2]
        if self.rope_dim < self.head_dim:
            half = half[..., :: self.head_dim // self.rope_dim]
        return torch.cat([half] * (self.rope_dim // half.shape[-1]), dim=-1)

    def _attend_expanded(
        self, plain: Tensor, rotary: Tensor, latent: Tensor, key: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """Keys and values of every head are rebuilt: (B, T, H, D)."""
        batch, stored = latent.shape[0], latent.shape[2]
        rebuilt = self.kv_b_proj(latent[:, 0]).view(batch, stored, self.heads, -1).transpose(1, 2)
        plain_key, value = rebuilt.split([self.nope_dim, self.head_dim], dim=-1)
        keys = torch.cat([plain_key, key.expand(-1, self.heads, -1, -1)], dim=-1)
        return self._interface(torch.cat([plain, rotary], dim=-1), keys, value, mask, kwargs)

    def _attend_absorbed(
        self, plain: Tensor, rotary: Tensor, latent: Tensor, key: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """The heads of a single token stand as the rows of one head over the stored vectors: (B, H, D)."""
        weight = self.kv_b_proj.weight.view(self.heads, self.nope_dim + self.head_dim, self.rank)
        to_key, to_value = weight.split([self.nope_dim, self.head_dim], dim=1)
        absorbed = torch.einsum("bhn,hnr->bhr", plain[:, :, 0], to_key)
        query = torch.cat([absorbed, rotary[:, :, 0]], dim=-1)[:, None]
        keys = torch.cat([latent, key], dim=-1)
        mixed, weights = self._interface(query, keys, latent, mask, {**kwargs, "is_causal": False})
        return torch.einsum("bhr,hdr->bhd", mixed[:, :, 0], to_value), weights

    def _interface(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = float(self.attention_dropout or 0.0) if self.training else 0.0
        output, weights = attend(self, query, key, value, mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return output, weights


class LatentForCausalLM(FamilyForCausalLM):
    """A decoder of the Llama family, some or all of whose layers have latent attention."""

    config_class = LatentConfig

    def __init__(self, config: LatentConfig) -> None:
        super().__init__(config)
        for index, block in enumerate(self.model.layers):
            if (config.kv_lora_ranks or [0])[index]:
                block.self_attn = LatentAttention(config, index)
        self.post_init()


AutoConfig.register(LatentConfig.model_type, LatentConfig, exist_ok=True)
AutoModelForCausalLM.register(LatentConfig, LatentForCausalLM, exist_ok=True)
