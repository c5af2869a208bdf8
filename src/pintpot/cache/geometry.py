"""What the layers of a model cache, read from its configuration."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig
from transformers.cache_utils import get_layer_types_and_kwargs

from pintpot.cache._base import LayerSizes
from pintpot.core.errors import UnsupportedModel

FULL = "full_attention"
SLIDING = ("sliding_attention", "chunked_attention")


@dataclass(frozen=True)
class LayerKind:
    """One layer of a model's cache.

    Attributes:
        kind: transformers' name of the layer's type (``full_attention``, ``sliding_attention``, ...).
        sizes: what it holds for each token.
        window: tokens it can hold, for layers that are bounded by themselves.
    """

    kind: str
    sizes: LayerSizes
    window: int | None = None


def layer_kinds(config: PretrainedConfig) -> tuple[LayerKind, ...]:
    """The layers of a decoder.

    Raises:
        UnsupportedModel: for encoder-decoders, models without attention, and attention that caches latent vectors.
    """
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_attention_heads", None)
    if config.is_encoder_decoder or heads is None:
        reason = "is an encoder-decoder" if config.is_encoder_decoder else "has no attention"
        raise UnsupportedModel(
            f"{config.model_type} {reason}: pintpot's caches are for decoders with attention",
            hint="leave out the cache technique: the model then uses its own cache",
        )
    if getattr(text, "kv_lora_rank", None) is not None:
        raise UnsupportedModel(
            f"{config.model_type} caches latent vectors, not keys and values",
            hint="leave out the cache technique: the model then uses its own cache",
        )
    key_value_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    sizes = LayerSizes(key_value_heads, head_dim, head_dim, heads, text.hidden_size)
    types, settings = get_layer_types_and_kwargs(text)
    return tuple(
        LayerKind(kind, sizes, given.get("sliding_window")) for kind, given in zip(types, settings, strict=True)
    )


def has_full_attention(config: PretrainedConfig) -> bool:
    """Whether a model has layers whose cache grows with every token: the only ones that the techniques act on."""
    try:
        return any(layer.kind == FULL for layer in layer_kinds(config))
    except UnsupportedModel:
        return False
