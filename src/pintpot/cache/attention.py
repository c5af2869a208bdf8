"""The attention function that reads Pintpot's caches, switched on for one model and off again.

A cache's ``update`` gives the model a handle instead of tensors, and this function unwraps it. Given tensors (layers
with a sliding window, a run without a cache), it does what transformers' ``sdpa`` attention does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, Cache, PreTrainedModel
from transformers.masking_utils import (
    AttentionMaskInterface,
    causal_mask_function,
    prepare_padding_mask,
    sdpa_mask,
)
from transformers.utils import is_tracing

from pintpot.cache._base import Call
from pintpot.cache.layer import CacheLayer
from pintpot.cache.shared import Handle
from pintpot.cache.stream import attend_dense
from pintpot.core.errors import UnsupportedModel

NAME = "pintpot_cache"
"""The name under which the function stands in transformers' attention interface."""


def cache_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor | Handle,
    value: Tensor | Handle,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention in transformers' interface.

    Args:
        module: the model's attention module.
        query: (B, H, S, D).
        key: a cache's handle, or keys (B, K, T, D).
        value: the same handle, or values.
        attention_mask: from ``cache_mask``, or the caller's own of four dimensions.
        scaling: of the scores; one over the root of the head dim where not given.
        dropout: of the weights.
        **kwargs: what models pass: ``softcap`` and ``s_aux`` (sinks) are honoured, a position bias is refused.

    Returns:
        (B, S, H, D), and no weights.

    Raises:
        UnsupportedModel: for a model with a position bias.
    """
    if kwargs.get("position_bias") is not None:
        raise UnsupportedModel(
            "this model adds a position bias to its scores, which Pintpot's caches do not know",
            hint="leave out the cache technique",
        )
    causal = kwargs.get("is_causal")
    call = Call(
        module=module,
        query=query,
        mask=attention_mask,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
        dropout=dropout,
        causal=getattr(module, "is_causal", True) if causal is None else causal,
    )
    if isinstance(key, Handle):
        return key.layer.attend(key, call), None
    if isinstance(value, Handle):
        raise UnsupportedModel(
            "this model changes its keys between cache and attention", hint="leave out the cache technique"
        )
    return attend_dense(call, key, value), None


def cache_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    *,
    attention_mask: Tensor | None = None,
    **pattern: Any,
) -> Tensor | None:
    """The mask of a forward pass, in transformers' interface.

    Plain causality is left to the attention function, so the mask is None, or the padding (B, 1, 1, T) alone; other
    patterns (sliding windows, blocks) give transformers' own mask.
    """
    plain = (
        pattern.get("mask_function", causal_mask_function) is causal_mask_function
        and pattern.get("local_size") is None
        and pattern.get("allow_is_causal_skip", True)
    )
    follows = isinstance(q_offset, int) and kv_offset == 0 and kv_length == q_offset + q_length
    if not (plain and follows):
        mask: Tensor | None = sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask=attention_mask, **pattern
        )
        return mask
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is None:
        return None
    padding = padding[:, :kv_length]
    # Shapes alone cannot say whether anything is padded: then the mask stays.
    if not is_tracing(padding) and bool(padding.all()):
        return None
    return padding[:, None, None, :]


def install_attention(model: PreTrainedModel) -> list[RemovableHandle]:
    """Let a model read Pintpot's caches from now on.

    Returns:
        The hooks that were added: none where the model could do so already.

    Raises:
        UnsupportedModel: when its attention cannot be exchanged.
    """
    AttentionInterface.register(NAME, cache_attention)
    AttentionMaskInterface.register(NAME, cache_mask)
    _set(model, NAME)
    return [
        module.register_forward_pre_hook(_show_inputs, with_kwargs=True)
        for module in model.modules()
        if hasattr(module, "layer_idx") and _show_inputs not in module._forward_pre_hooks.values()
    ]


def _show_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Show a layer of the cache what its attention is given, if its store wants to know."""
    cache = kwargs.get("past_key_values")
    index = getattr(module, "layer_idx", None)
    if not isinstance(cache, Cache) or index is None or index >= len(cache.layers):
        return
    layer = cache.layers[index]
    if isinstance(layer, CacheLayer) and layer.store.needs_inputs:
        layer.inputs = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]


@contextmanager
def use_cache_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let a model read Pintpot's caches inside a ``with``; its own attention is back afterwards.

    Raises:
        UnsupportedModel: when its attention cannot be exchanged.
    """
    before = model.config._attn_implementation or "eager"
    added = install_attention(model)
    try:
        yield
    finally:
        _set(model, before)
        for hook in added:
            hook.remove()


def _set(model: PreTrainedModel, name: str) -> None:
    try:
        model.set_attn_implementation(name)
    except ValueError as error:
        raise UnsupportedModel(
            f"{type(model).__name__} cannot use another attention function: {error}",
            hint="leave out the cache technique: the model then uses its own cache",
        ) from error
