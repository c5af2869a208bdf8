"""The steps of every job, written once: what the jobs run, what is measured, and what is simulated."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pintpot.ledger.reach import CACHE_NAMES, base_model


@dataclass(frozen=True)
class Progress:
    """A generation after some tokens.

    Attributes:
        logits: (batch, vocabulary) of the last position, float32.
        cache: the model's cache, or None where it keeps none.
        tokens: how many tokens the cache has seen.
        encoded: what the encoder made of the prompt, for encoder-decoder models.
    """

    logits: Tensor
    cache: Any
    tokens: int
    encoded: Any = None


@torch.no_grad()
def prefill(model: nn.Module, input_ids: Tensor, cache: Any = None, piece_tokens: int | None = None) -> Progress:
    """Read a prompt into a cache; an encoder-decoder model encodes it and starts its answer.

    Args:
        model: a causal or encoder-decoder language model of transformers, or a peft model around one.
        input_ids: (batch, tokens), int64, without padding.
        cache: an empty cache; None lets the model make its own.
        piece_tokens: read at most so many tokens at once; None reads all.
    """
    config: Any = model.config
    if not config.is_encoder_decoder:
        first, *pieces = input_ids.split(piece_tokens or input_ids.shape[1], dim=1)
        progress = _forward(model, first, cache, 0)
        for piece in pieces:
            progress = decode(model, piece, progress)
        return progress
    base = base_model(model)
    encoded = base.get_encoder()(input_ids=input_ids)
    start = torch.full_like(input_ids[:, :1], config.decoder_start_token_id or 0)
    return _forward(model, start, cache, 0, encoded)


@torch.no_grad()
def decode(model: nn.Module, tokens: Tensor, progress: Progress) -> Progress:
    """Go on by some tokens, (batch, tokens) int64; in the plain loop by one."""
    return _forward(model, tokens, progress.cache, progress.tokens, progress.encoded)


def choose(progress: Progress) -> Tensor:
    """The likeliest next token of each sequence, (batch, 1) int64."""
    return progress.logits.argmax(dim=-1, keepdim=True)


def train_step(
    model: nn.Module,
    optimizer: Optimizer,
    input_ids: Tensor,
    labels: Tensor,
    *,
    scope: Callable[[], AbstractContextManager[Any]] = nullcontext,
    clip_norm: float | None = 1.0,
    inputs: Mapping[str, Any] | None = None,
) -> Tensor:
    """One update from one batch; returns the loss (nats per token), detached.

    Args:
        model: gives a `loss` for `labels`.
        optimizer: over the model's parameters; their gradients are freed after its step.
        input_ids: (batch, tokens), int64.
        labels: (batch, tokens), int64, -100 where nothing is to be predicted.
        scope: makes the context around the forward and backward pass.
        clip_norm: the largest norm of the whole gradient; None leaves it.
        inputs: further arguments of the model.
    """
    model.train()
    if getattr(optimizer, "gradient_free", False):
        return _forward_only(model, optimizer, input_ids, labels, scope, inputs)
    with scope():
        loss = gradient(model, input_ids, labels, inputs)
    if clip_norm is not None:
        held = [p for p in model.parameters() if p.grad is not None]
        torch.nn.utils.clip_grad_norm_(held, clip_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss


def _forward_only(
    model: nn.Module,
    optimizer: Optimizer,
    input_ids: Tensor,
    labels: Tensor,
    scope: Callable[[], AbstractContextManager[Any]],
    inputs: Mapping[str, Any] | None,
) -> Tensor:
    """One update by an optimizer that asks for losses instead of gradients."""

    def closure() -> Tensor:
        with torch.no_grad(), scope():
            loss: Tensor = model(input_ids=input_ids, labels=labels, use_cache=False, **(inputs or {})).loss
        return loss

    return torch.as_tensor(optimizer.step(closure))  # type: ignore[arg-type]


def gradient(model: nn.Module, input_ids: Tensor, labels: Tensor, inputs: Mapping[str, Any] | None = None) -> Tensor:
    """Forward and backward pass of one batch, adding to the gradients; returns the loss, detached."""
    # A cache would keep the keys and values of the whole batch for nothing.
    output = model(input_ids=input_ids, labels=labels, use_cache=False, **(inputs or {}))
    loss: Tensor = output.loss
    loss.backward()
    return loss.detach()


def _forward(model: nn.Module, tokens: Tensor, cache: Any, seen: int, encoded: Any = None) -> Progress:
    accepted = inspect.signature(base_model(model).forward).parameters
    name = next((n for n in CACHE_NAMES if n in accepted), CACHE_NAMES[0])
    inputs: dict[str, Any] = {"use_cache": True, name: cache}
    if "logits_to_keep" in accepted:
        # The logits of a whole prompt are large, and only the last position's are used.
        inputs["logits_to_keep"] = 1
    if encoded is not None:
        inputs.update(decoder_input_ids=tokens, encoder_outputs=encoded)
    else:
        inputs["input_ids"] = tokens
    count = tokens.shape[1]
    if "position_ids" in accepted:
        # One row a sequence, as transformers' generate gives them: rotary tables are then made for each.
        inputs["position_ids"] = torch.arange(seen, seen + count, device=tokens.device).repeat(tokens.shape[0], 1)
    output = model(**inputs)
    logits = output.logits[:, -1].to(dtype=torch.float32, copy=True)
    return Progress(logits, getattr(output, name, None), seen + count, encoded)
