"""Gradients of a whole model's own loss, handed on one parameter at a time, so that never all of them are held."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pintpot.core.errors import UnsupportedModel
from pintpot.weights._base import Texts
from pintpot.weights.paused import inputs_of

Take = Callable[[str, Tensor], None]
"""Given a parameter's name and the gradient of the loss with respect to it."""


def samples(texts: Texts) -> Iterator[Tensor | Mapping[str, Tensor]]:
    """Batches of one: each sequence of batches of token ids (B, T); batches of inputs by name as they are."""
    for text in texts:
        if isinstance(text, Tensor):
            yield from text.split(1)
        else:
            yield text


def each_gradient(
    model: PreTrainedModel, parameters: Sequence[str], text: Tensor | Mapping[str, Tensor], take: Take
) -> float:
    """Hand on the gradients of the model's loss on a text, each as soon as it is known.

    Leaves the model as it was, also its gradients.

    Args:
        model: whole, in evaluation mode.
        parameters: names of those whose gradients are wanted.
        text: token ids, which are what is predicted too, or inputs by name with ``labels`` among them.
        take: must not keep the gradient, which is freed afterwards.

    Returns:
        The loss.

    Raises:
        UnsupportedModel: when the model has no loss of its own.
    """
    with _only(model, parameters, take), torch.enable_grad():
        loss = loss_on(model, text)
        loss.backward()
    return float(loss.detach())


def loss_on(model: PreTrainedModel, text: Tensor | Mapping[str, Tensor]) -> Tensor:
    """The model's own loss on a text, which is what is to be predicted too.

    Raises:
        UnsupportedModel: when the model has no loss of its own.
    """
    inputs = inputs_of(model, text)
    if isinstance(text, Tensor) and "labels" in inspect.signature(model.forward).parameters:
        inputs["labels"] = text
    if inputs.get("labels") is None:
        raise UnsupportedModel(
            f"{type(model).__name__} has no loss on this text",
            hint="take a model with a head, and give inputs with labels where it is not a language model",
        )
    loss: Tensor = model(**inputs).loss
    return loss


@contextmanager
def _only(model: nn.Module, parameters: Sequence[str], take: Take) -> Iterator[None]:
    """Gradients reach these parameters and no others, and are gone when they were taken."""

    def hand_on(name: str, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        if gradient is not None:
            with torch.no_grad():
                take(name, gradient)

    wanted = {name: model.get_parameter(name) for name in parameters}
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    handles = []
    try:
        for parameter, _, _ in before:
            parameter.requires_grad_(False)
            parameter.grad = None
        for name, parameter in wanted.items():
            parameter.requires_grad_(True)
            handles.append(parameter.register_post_accumulate_grad_hook(partial(hand_on, name)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, requires, gradient in before:
            parameter.requires_grad_(requires)
            parameter.grad = gradient
