"""Tuning what a packed block holds in floating point, so that its outputs come nearer to the dense block's.

Codes stay as they are, unless a method opens them too. While a block is tuned, its packed layers multiply by weights
that are made from their codes and from float32 copies of what is tuned; afterwards the copies are stored, rounded, in
the place of the old numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from pintpot.weights.formats import Format, Tensors
from pintpot.weights.modules import PackedTerms
from pintpot.weights.paused import hidden_of
from pintpot.weights.statistics import BlockCall

Rebuild = Callable[[tuple[Format, ...], Sequence[Tensors], int], Tensor]
"""A weight (O, I), float32, from its formats, their stored tensors and I; differentiable in those of floating point."""


@dataclass(frozen=True)
class Opening:
    """What is tuned of a packed layer, where it is not just the stored tensors of floating point.

    Attributes:
        open: for formats and stored tensors, by term, the float32 tensors that stand for some of them.
        close: for formats and stored tensors with those in their places, by term, what is stored of them.
    """

    open: Callable[[tuple[Format, ...], Sequence[Tensors]], Sequence[Tensors]]
    close: Callable[[tuple[Format, ...], Sequence[Tensors]], Sequence[Tensors]]


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How a block is tuned: Adam on the mean squared difference of its outputs.

    Attributes:
        learning_rate: of Adam.
        epochs: passes over all texts.
        betas: of Adam.
        eps: of Adam.
        weight_decay: of Adam.
        norms: tune the weights and biases of the block's norms too. Only those in float32: in 16 bits such small steps
            would be lost in rounding.
    """

    learning_rate: float = 1e-5
    epochs: int = 4
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 2e-5
    weight_decay: float = 1e-6
    norms: bool = True


@dataclass
class _Tuned:
    """A packed layer's tensors of floating point as float32 parameters, by the names of its buffers."""

    holder: PackedTerms
    copies: dict[str, nn.Parameter] = field(default_factory=dict)

    def multiply(self, rebuild: Rebuild, input: Tensor, row: int | None = None) -> Tensor:
        terms: list[Tensors] = []
        for index, (_, tensors) in enumerate(self.holder.stored(row)):
            copies = {name: self.copies.get(f"term{index}_{name}") for name in tensors}
            own = {name: copy if row is None else copy[row] for name, copy in copies.items() if copy is not None}
            terms.append({**tensors, **own})
        return functional.linear(input, rebuild(self.holder.formats, terms, input.shape[-1]).to(input.dtype))

    def store_(self, opening: Opening) -> None:
        terms = [
            {name: self.copies.get(f"term{index}_{name}", tensor).detach() for name, tensor in tensors.items()}
            for index, (_, tensors) in enumerate(self.holder.stored())
        ]
        for index, tensors in enumerate(opening.close(self.holder.formats, terms)):
            for name, tensor in tensors.items():
                self.holder.get_buffer(f"term{index}_{name}").copy_(tensor)


def _floats(formats: tuple[Format, ...], terms: Sequence[Tensors]) -> list[Tensors]:
    return [{n: t.detach().float().clone() for n, t in own.items() if t.is_floating_point()} for own in terms]


FLOATS = Opening(_floats, lambda formats, terms: terms)
"""The stored tensors of floating point are tuned, and stored rounded."""


def tune_block_(
    block: nn.Module,
    calls: Sequence[BlockCall],
    outputs: Sequence[Tensor],
    rebuild: Rebuild,
    tuning: Tuning,
    opening: Opening = FLOATS,
) -> None:
    """Tune the numbers of floating point in a block's packed layers, and its own vectors.

    The block is left as it was where the stored numbers turn out no better over all texts.

    Args:
        block: with packed weights; changed in place.
        calls: how the model calls it.
        outputs: hidden states that the dense block gave.
        rebuild: makes a packed layer's weight.
        tuning: how.
        opening: what of a packed layer.
    """
    layers = [_copied(m, opening) for m in block.modules() if isinstance(m, PackedTerms) and hasattr(m, "formats")]
    norms = list(_vectors(block)) if tuning.norms else []
    changed = [*norms, *(b for layer in layers for b in _held(layer))]
    kept = [tensor.detach().clone() for tensor in changed]
    before = output_error(block, calls, outputs)
    with multiplying({layer.holder: partial(layer.multiply, rebuild) for layer in layers}):
        _descend_(block, calls, outputs, [*norms, *(c for layer in layers for c in layer.copies.values())], tuning)
    for layer in layers:
        layer.store_(opening)
    if not output_error(block, calls, outputs) < before:
        for tensor, old in zip(changed, kept, strict=True):
            tensor.data.copy_(old)


def _copied(holder: PackedTerms, opening: Opening) -> _Tuned:
    opened = opening.open(holder.formats, [tensors for _, tensors in holder.stored()])
    named = {f"term{index}_{name}": t for index, own in enumerate(opened) for name, t in own.items()}
    return _Tuned(holder, {name: nn.Parameter(tensor) for name, tensor in named.items()})


def _held(layer: _Tuned) -> list[Tensor]:
    return [layer.holder.get_buffer(name) for name in layer.copies]


def _vectors(block: nn.Module) -> Iterator[nn.Parameter]:
    """Weights and biases of norms, in float32: of modules that hold vectors and nothing else."""
    for module in block.modules():
        own = list(module.parameters(recurse=False))
        leaf = not isinstance(module, nn.Linear | PackedTerms) and not list(module.children())
        if leaf and all(p.dim() == 1 and p.dtype is torch.float32 for p in own):
            yield from own


@contextmanager
def multiplying(products: Mapping[PackedTerms, Callable[..., Tensor]]) -> Iterator[None]:
    """A context in which packed layers multiply their input (and a matrix of a stack, by its number) as they are told.

    Args:
        products: by layer, what stands in for its ``multiply``.
    """
    try:
        for holder, product in products.items():
            holder.__dict__["multiply"] = product
        yield
    finally:
        for holder in products:
            holder.__dict__.pop("multiply", None)


def _descend_(
    block: nn.Module, calls: Sequence[BlockCall], outputs: Sequence[Tensor], parameters: list[Tensor], tuning: Tuning
) -> None:
    wanted = [p.requires_grad for p in parameters]
    optimizer = torch.optim.Adam(
        parameters, lr=tuning.learning_rate, betas=tuning.betas, eps=tuning.eps, weight_decay=tuning.weight_decay
    )
    with torch.enable_grad():
        for parameter in parameters:
            parameter.requires_grad_(True)
        for _ in range(tuning.epochs):
            for call, output in zip(calls, outputs, strict=True):
                loss = functional.mse_loss(hidden_of(block(*call.args, **call.kwargs)).float(), output.float())
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.grad = gradient
                optimizer.step()
    for parameter, before in zip(parameters, wanted, strict=True):
        parameter.grad = None
        parameter.requires_grad_(before)


@torch.no_grad()
def output_error(block: nn.Module, calls: Sequence[BlockCall], outputs: Sequence[Tensor]) -> float:
    """Mean squared difference of a block's outputs from those wanted, summed over its calls."""
    return sum(
        float(functional.mse_loss(hidden_of(block(*call.args, **call.kwargs)).float(), output.float()))
        for call, output in zip(calls, outputs, strict=True)
    )
