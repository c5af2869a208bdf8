"""What the layers of a classifier of images are given, with how much its loss would curve along what they give.

The curvature is the diagonal of the Fisher matrix: squared gradients of the cross-entropy with classes that are drawn
from the dense model's own prediction. Shapes: N rows of a layer's inputs, I in-features, O out-features.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from pintpot.core.errors import CompositionError, DataError, UnsupportedModel
from pintpot.weights._base import Texts
from pintpot.weights.modules import rows_of
from pintpot.weights.paused import inputs_of


@dataclass(frozen=True)
class CurvedRows:
    """A sample of a layer's inputs.

    Attributes:
        rows: float32 (N, I).
        curvature: of the loss along each output, float32 (N, O); one where an output has none at all.
        low: the smallest number of each in-feature over all inputs, (I,), and at most zero.
        high: the largest, at least zero.
    """

    rows: Tensor
    curvature: Tensor
    low: Tensor
    high: Tensor

    def error(self, difference: Tensor) -> Tensor:
        """What a difference of outputs (N, O) adds to the loss, for each output (O,), up to a factor."""
        return (difference.square() * self.curvature).sum(0)

    def range_of_all(self) -> tuple[Tensor, Tensor]:
        """The smallest and the largest number of all in-features, (1,) each."""
        return self.low.amin(0, keepdim=True), self.high.amax(0, keepdim=True)


@torch.no_grad()
def draw_classes(model: PreTrainedModel, texts: Texts) -> list[Tensor]:
    """A class for each image (or each place of it) of each batch, from the model's own prediction; always the same.

    Raises:
        CompositionError: when a batch is not of images.
        DataError: when the model predicts NaN or Inf.
        UnsupportedModel: when the model predicts no classes.
    """
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for text in texts:
        if isinstance(text, Tensor):
            raise CompositionError(
                "token ids are no images", hint='give batches of inputs by name, such as {"pixel_values": images}'
            )
        logits = getattr(model(**inputs_of(model, text)), "logits", None)
        if logits is None:
            raise UnsupportedModel(
                f"{type(model).__name__} predicts no classes", hint="take the model with its head for classification"
            )
        if not torch.isfinite(logits).all():
            raise DataError(
                f"{type(model).__name__} predicts NaN or Inf", hint="give it other images, or hold it in float32"
            )
        shares = logits.float().softmax(1).movedim(1, -1)
        chosen = shares.reshape(-1, shares.shape[-1]).cpu().multinomial(1, generator=generator)
        drawn.append(chosen.view(shares.shape[:-1]).to(logits.device))
    return drawn


def observe_curved(
    model: PreTrainedModel, names: Sequence[str], texts: Texts, classes: Sequence[Tensor], samples: int
) -> dict[str, CurvedRows]:
    """Samples of the inputs of some linear layers and convolutions, from one forward and backward pass a batch.

    Args:
        model: in evaluation mode; left as it is.
        names: of the layers.
        texts: batches of images.
        classes: as ``draw_classes`` gives them.
        samples: rows of each layer's input that are kept, over all batches.

    Raises:
        DataError: when an input holds NaN or Inf.
    """
    generator = torch.Generator().manual_seed(0)
    each = -(-samples // len(texts))
    parts: dict[str, list[CurvedRows]] = defaultdict(list)
    for text, drawn in zip(texts, classes, strict=True):
        for name, (rows, gradients) in _pass(model, names, text, drawn).items():
            low, high = rows.amin(0), rows.amax(0)
            if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
                raise DataError(
                    f"the inputs of {name} hold NaN or Inf", hint="compress the model in float32, or give other images"
                )
            chosen = torch.randperm(rows.shape[0], generator=generator)[:each].to(rows.device)
            own = CurvedRows(rows[chosen].float(), gradients[chosen].float().square(), low.float(), high.float())
            parts[name].append(own)
    return {name: _joined(own) for name, own in parts.items()}


def _joined(parts: Sequence[CurvedRows]) -> CurvedRows:
    curvature = torch.cat([part.curvature for part in parts])
    total = curvature.mean(0)
    # Of a size that float32 holds well. An output that the loss does not depend on here counts evenly.
    largest = total.amax().clamp(min=torch.finfo(torch.float32).tiny)
    return CurvedRows(
        torch.cat([part.rows for part in parts]),
        torch.where(total > 0, curvature / largest, 1.0),
        torch.stack([part.low for part in parts]).amin(0).clamp(max=0),
        torch.stack([part.high for part in parts]).amax(0).clamp(min=0),
    )


def _pass(
    model: PreTrainedModel, names: Sequence[str], text: Tensor | Mapping[str, Tensor], classes: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """All rows of each layer's input (N, I), and the gradients along its outputs (N, O)."""
    given: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def take(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            given[name], outputs[name] = args[0].detach(), output

        return take

    with ExitStack() as stack, torch.enable_grad():
        for name in names:
            stack.callback(model.get_submodule(name).register_forward_hook(hook(name)).remove)
        # Gradients flow from the images on, whatever of the model is frozen.
        inputs = {
            key: value.detach().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value
            for key, value in inputs_of(model, text).items()
        }
        loss = functional.cross_entropy(model(**inputs).logits.float(), classes, reduction="sum")
        gradients = torch.autograd.grad(loss, list(outputs.values()))
    found = {}
    for name, gradient in zip(outputs, gradients, strict=True):
        module = model.get_submodule(name)
        along = gradient.flatten(2).transpose(1, 2) if isinstance(module, nn.Conv2d) else gradient
        rows = rows_of(module, given[name])
        found[name] = rows.reshape(-1, rows.shape[-1]), along.reshape(-1, along.shape[-1])
    return found
