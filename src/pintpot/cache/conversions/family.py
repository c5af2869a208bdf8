"""What the converted models have in common: the Llama family of decoders, which Llama, Qwen2 and Mistral are.

These three differ in their biases alone, so that one configuration holds them all, and conversions are written once.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, TypeVar, cast

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig, PreTrainedModel

from pintpot.core.errors import UnsupportedModel

SOURCES = ("llama", "qwen2", "mistral")
"""The architectures (``model_type``) that can be converted."""

Made = TypeVar("Made", bound="FamilyForCausalLM")


@strict
class FamilyConfig(LlamaConfig):
    """A Llama with biases where the source has them.

    Attributes:
        attention_bias: whether the projections to queries, keys and values have biases.
        output_bias: whether the projection of the heads' outputs has one.
        source_type: the ``model_type`` that it was converted from.
    """

    output_bias: bool = False
    source_type: str = "llama"


class FamilyForCausalLM(LlamaForCausalLM):
    """A Llama with the biases of its configuration."""

    config_class = FamilyConfig

    def __init__(self, config: FamilyConfig) -> None:
        super().__init__(config)
        for block in self.model.layers:
            output = block.self_attn.o_proj
            if config.output_bias != config.attention_bias:
                block.self_attn.o_proj = nn.Linear(output.in_features, output.out_features, bias=config.output_bias)


def check_source(config: PretrainedConfig, method: str) -> None:
    """Refuse a model that a conversion is not for.

    Args:
        config: of the source.
        method: the name of the conversion.

    Raises:
        UnsupportedModel: naming the architecture, or every layer with a sliding window.
    """
    if config.model_type not in SOURCES:
        raise UnsupportedModel(
            f"{method} cannot convert {config.model_type}: its model.layers.*.self_attn is not plain grouped-query "
            "attention with rotary positions",
            hint=f"convert a model of one of these kinds: {', '.join(SOURCES)}",
        )
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModel(
            f"{method} cannot convert a compressed model", hint="convert the dense model, then compress the result"
        )
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    if config.model_type == "mistral" and getattr(config, "sliding_window", None) is not None:
        kinds = ["sliding_attention"] * config.num_hidden_layers
    sliding = [f"model.layers.{i}.self_attn" for i, kind in enumerate(kinds) if kind != "full_attention"]
    if sliding:
        raise UnsupportedModel(
            f"{method} cannot convert layers with a sliding window: {', '.join(sliding)}",
            hint="such layers have a cache of bounded size already; convert a model without them",
        )


def family_settings(config: PretrainedConfig) -> dict[str, Any]:
    """A source's configuration as arguments of ``FamilyConfig``."""
    own = {f.name for f in fields(cast(Any, LlamaConfig))}
    settings = {name: getattr(config, name) for name in sorted(own) if hasattr(config, name)}
    skipped = ("architectures", "transformers_version", "model_type", "attention_bias")
    settings = {name: value for name, value in settings.items() if name not in skipped}
    bias = bool(getattr(config, "attention_bias", config.model_type == "qwen2"))
    output = bias and config.model_type != "qwen2"
    return {**settings, "attention_bias": bias, "output_bias": output, "source_type": config.model_type}


@torch.no_grad()
def build_with(kind: type[Made], config: FamilyConfig, source: PreTrainedModel, changed: dict[str, Tensor]) -> Made:
    """A converted model: the source's tensors by their names, with ``changed`` in the place of their layers'.

    Args:
        kind: its class.
        config: its configuration.
        source: gives everything that is not in ``changed``; not modified, its storage may be shared.
        changed: tensors by their names in the new model; whatever the source holds in the same modules is left out.
    """
    homes = {name.rpartition(".self_attn.")[0] for name in changed if ".self_attn." in name}
    kept = {
        name: tensor.detach()
        for name, tensor in source.state_dict().items()
        if name.rpartition(".self_attn.")[0] not in homes or ".self_attn.o_proj." in name
    }
    made = kind.from_pretrained(None, config=config, state_dict={**kept, **changed}, dtype=source.dtype)
    made.generation_config = source.generation_config
    return cast(Made, made.eval())
