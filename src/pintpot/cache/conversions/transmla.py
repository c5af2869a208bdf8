"""TransMLA: grouped-query attention rewritten as latent attention, then cut down to its principal directions.

Source:    Meng et al. 2025, "TransMLA: MLA Is All You Need", arXiv:2502.07864v5, and the authors' converter
           (github.com/fxmeng/TransMLA).
Differs:   no factors of the queries (they do not change the cache) and no norms on the factors, both optional in the
           authors' converter; the folder is a model of ours (see ``latent.py``), because DeepSeek's classes in
           transformers always normalise the latent and have no biases on the queries; the fold of frequencies is
           chosen by the loss on the calibration text where the authors' code leaves that measurement out.
Saves:     kv_cache, real: rank + rope_dim numbers a token and layer instead of two vectors for each key-value head.
Shapes:    K key-value heads, D head dim, F = D/2 frequencies, f of them folded, G = F/f groups, P rope_dim, R rank;
           covariances of keys (K*D, K*D), ordered (head, real or imaginary half, frequency).
Composes:  a conversion of its own; the new model can be fine-tuned, compressed and generated with like any other.
Use when:  the cache is what limits context or batch, and some text like the model's own is at hand to calibrate on.
Not when:  the rank would have to be far below half of the keys and values without training afterwards.

Rotary positions act on each frequency as a rotation, which commutes with any mixing of the heads' parts of this same
frequency: keys are rotated over the heads to their principal components (RoRoPE), adjacent frequencies taken as one
where that concentrates them further (FreqFold), and only the leading components keep their positions. The rest of the
keys, without positions, is scaled to the size of the values and cut down together with them by principal components.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from pintpot.cache.conversions._base import (
    Conversion,
    check_rank,
    check_rotary,
    head_dim_of,
    mean_loss,
    output_covariances,
)
from pintpot.cache.conversions.directions import leading_directions, rotate_heads
from pintpot.cache.conversions.family import build_with, family_settings
from pintpot.cache.conversions.latent import LatentConfig, LatentForCausalLM
from pintpot.core.errors import DataError, ShapeError
from pintpot.core.ledger import Account
from pintpot.core.technique import Claim, Source, technique


@technique(
    name="transmla",
    wing="cache",
    part="conversion",
    jobs=("convert",),
    source=Source("TransMLA: MLA Is All You Need", 2025, arxiv="2502.07864"),
    accounts=(Account.KV_CACHE,),
    claims=(
        Claim(
            "speedup of generation",
            10.6,
            versus="the source",
            at="LLaMA-2-7B, 93 % of the cache compressed away, 8K context",
            where="abstract",
        ),
    ),
    fidelity="no factors of the queries and no norms on the factors; the fold is chosen by the calibration loss",
)
@dataclass(frozen=True, kw_only=True)
class TransMLA(Conversion):
    """Hyperparameters of the conversion.

    Attributes:
        rank: R, numbers in a latent (``kv_lora_rank``).
        rope_dim: P, numbers in the rotary key: an even divisor of the head dim, or a multiple of it. With as many as
            all key-value heads have together, nothing is approximated but by the rank.
        freq_fold: adjacent frequencies that are taken as one; 0 for the number with the lowest loss.
        balance: size of the keys' part of the latent, relative to the values', before it is cut down.
    """

    rank: int = 512
    rope_dim: int = 64
    freq_fold: int = 0
    balance: float = 1.0

    def check(self, config: PretrainedConfig) -> None:
        """Refuse other architectures, and sizes that do not fit."""
        super().check(config)
        width = config.num_key_value_heads * head_dim_of(config)
        check_rotary(self.rope_dim, config, width)
        check_rank(self.rank, 2 * width - self.rope_dim)
        if self.freq_fold and self.freq_fold not in self._folds(config):
            raise ShapeError(
                f"freq_fold must be one of {self._folds(config)} with rope_dim={self.rope_dim}, not {self.freq_fold}",
                hint="use freq_fold=0 to have it chosen",
            )
        if not self.balance > 0:
            raise ShapeError(f"balance must be above 0, not {self.balance}", hint="use balance=1.0")

    def _folds(self, config: PretrainedConfig) -> list[int]:
        """The folds that divide the frequencies into groups of whole components."""
        half = head_dim_of(config) // 2
        if self.rope_dim == 2 * half * config.num_key_value_heads:
            return [1]
        least = max(1, 2 * half // self.rope_dim)
        folds = [least * n for n in range(1, half // least + 1)]
        return [fold for fold in folds if half % fold == 0]

    def cache_bytes(self, config: PretrainedConfig, tokens: int, batch: int, dtype: torch.dtype) -> int:
        """R + P numbers for each token in each layer."""
        return (self.rank + self.rope_dim) * config.num_hidden_layers * tokens * batch * dtype.itemsize

    @torch.no_grad()
    def convert(self, model: PreTrainedModel, texts: Sequence[Tensor]) -> LatentForCausalLM:
        """Take the positions off all but the leading parts of the keys, then cut what is left down with the values."""
        self.check(model.config)
        if not texts:
            raise DataError("transmla has no text to calibrate on", hint="give some text like the model's own")
        layers = {str(i): block.self_attn.k_proj for i, block in enumerate(model.model.layers)}
        keys = [*output_covariances(model, layers, texts).values()]
        folds = [self.freq_fold] if self.freq_fold else self._folds(model.config)
        best = self._decouple(model, keys, folds[0])
        lowest = mean_loss(best, texts) if len(folds) > 1 else 0.0
        for fold in folds[1:]:
            candidate = self._decouple(model, keys, fold)
            loss = mean_loss(candidate, texts)
            if loss >= lowest:
                break
            best, lowest = candidate, loss
        return self._compress(best, model, texts)

    def _config(self, source: PretrainedConfig, rank: int) -> LatentConfig:
        head_dim = head_dim_of(source)
        whole = self.rope_dim == source.num_key_value_heads * head_dim
        return LatentConfig(
            **family_settings(source),
            kv_lora_ranks=[rank] * source.num_hidden_layers,
            qk_rope_head_dim=self.rope_dim,
            qk_nope_head_dim=0 if whole else head_dim,
        )

    def _decouple(self, model: PreTrainedModel, keys: Sequence[Tensor], fold: int) -> LatentForCausalLM:
        """The model with latents of full rank, which hold the values and the keys that lose their positions."""
        config = model.config
        heads, head_dim = config.num_key_value_heads, head_dim_of(config)
        changed: dict[str, Tensor] = {}
        for index, (block, covariance) in enumerate(zip(model.model.layers, keys, strict=True)):
            rotary, plain = rotate_heads(covariance, heads, self.rope_dim, fold)
            made = _decoupled(block.self_attn, rotary, plain, head_dim)
            changed |= {f"model.layers.{index}.self_attn.{name}": tensor for name, tensor in made.items()}
        return build_with(LatentForCausalLM, self._config(config, 2 * heads * head_dim - self.rope_dim), model, changed)

    def _compress(
        self, decoupled: LatentForCausalLM, source: PreTrainedModel, texts: Sequence[Tensor]
    ) -> LatentForCausalLM:
        """Balance keys against values, and keep R principal components of both together."""
        whole = decoupled.config.kv_lora_rank
        values = source.config.num_key_value_heads * head_dim_of(source.config)
        layers = {str(i): block.self_attn.kv_a_proj_with_mqa for i, block in enumerate(decoupled.model.layers)}
        found = output_covariances(decoupled, layers, texts)
        changed: dict[str, Tensor] = {}
        for name, block in zip(found, decoupled.model.layers, strict=True):
            covariance = found[name][:whole, :whole]
            scale = _balance(covariance, whole - values, self.balance)
            leading = leading_directions(covariance * scale * scale[:, None], self.rank)
            made = _cut_down(block.self_attn, scale, leading)
            changed |= {f"model.layers.{name}.self_attn.{key}": tensor for key, tensor in made.items()}
        return build_with(LatentForCausalLM, self._config(source.config, self.rank), decoupled, changed)


def _balance(covariance: Tensor, keys: int, balance: float) -> Tensor:
    """Factors (O) that bring the mean norm of the first ``keys`` numbers to that of the others."""
    norms = covariance.diagonal().clamp_min(0).sqrt()
    scale = torch.ones_like(norms)
    if keys and norms[:keys].mean() > 0:
        scale[:keys] = norms[keys:].mean() * balance / norms[:keys].mean()
    return scale


def _decoupled(attention: Any, rotary: Tensor, plain: Tensor, head_dim: int) -> dict[str, Tensor]:
    """The tensors of a latent layer of full rank that computes what ``attention`` does, but for lost positions."""
    (query, query_bias), (key, key_bias), (value, value_bias) = (
        _double(layer) for layer in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    width, dtype = len(key), attention.q_proj.weight.dtype
    heads, kv_heads = len(query) // head_dim, width // head_dim
    repeats = heads // kv_heads
    to_plain, to_rotary = (
        part.reshape(kv_heads, head_dim, -1).repeat_interleave(repeats, dim=0) for part in (plain, rotary)
    )
    # The rotary part of a query is what it would be multiplied with in its head's share of the rotary components.
    query = query.reshape(heads, head_dim, -1)
    query_bias = query_bias.reshape(heads, head_dim, 1)
    kept = head_dim if plain.shape[1] else 0
    queries, query_biases = (
        torch.cat([part[:, :kept], to_rotary.mT @ part], dim=1).flatten(0, 1) for part in (query, query_bias)
    )
    identity = torch.eye(width, dtype=torch.float64, device=key.device)
    to_value = identity.reshape(kv_heads, head_dim, width).repeat_interleave(repeats, dim=0)
    keys_up = torch.cat([to_plain, to_plain.new_zeros(heads, head_dim, width)], dim=-1)[:, :kept]
    values_up = torch.cat([to_value.new_zeros(heads, head_dim, plain.shape[1]), to_value], dim=-1)
    made = {
        "q_proj.weight": queries,
        "kv_a_proj_with_mqa.weight": torch.cat([plain.T @ key, value, rotary.T @ key]),
        "kv_b_proj.weight": torch.cat([keys_up, values_up], dim=1).flatten(0, 1),
    }
    if attention.q_proj.bias is not None:
        made["q_proj.bias"] = query_biases[:, 0]
        made["kv_a_proj_with_mqa.bias"] = torch.cat([plain.T @ key_bias, value_bias, rotary.T @ key_bias])
    return {name: tensor.to(dtype) for name, tensor in made.items()}


def _cut_down(attention: Any, scale: Tensor, leading: Tensor) -> dict[str, Tensor]:
    """The tensors of a latent layer (of R numbers) from those of one of full rank."""
    down, bias = _double(attention.kv_a_proj_with_mqa)
    whole, dtype = len(scale), attention.kv_a_proj_with_mqa.weight.dtype
    up = attention.kv_b_proj.weight.double() / scale
    made = {
        "kv_a_proj_with_mqa.weight": torch.cat([leading.T @ (down[:whole] * scale[:, None]), down[whole:]]),
        "kv_b_proj.weight": up @ leading,
    }
    if attention.kv_a_proj_with_mqa.bias is not None:
        made["kv_a_proj_with_mqa.bias"] = torch.cat([leading.T @ (bias[:whole] * scale), bias[whole:]])
    own = {name: tensor for name, tensor in attention.state_dict().items() if name not in made}
    return {**own, **{name: tensor.to(dtype) for name, tensor in made.items()}}


def _double(layer: Any) -> tuple[Tensor, Tensor]:
    """Weight and bias of a linear layer in float64; zeros where it has no bias."""
    weight = layer.weight.double()
    return weight, layer.bias.double() if layer.bias is not None else weight.new_zeros(len(weight))
