"""tpSGD: train each layer of a small network towards a random image of the label, in one pass from front to back.

Source:    Lomnitz et al. 2022, arXiv:2208.08503 (a layer's loss ``|P y* - y|^2``, its update, any other loss).
Differs:   written from the abstract and the update rule. Ours are: the entries of P (uniform between -1 and 1), drawn
           anew from a seed when needed; one random target for each unit of a layer's output after what follows it
           (activation, pooling); the identity as the last layer's P. A layer's own gradient comes from autograd
           through that layer alone. No recurrent layers.
Saves:     gradients, optimizer and activations, real: those of one layer at a time.
Shapes:    input (batch, ...), labels (batch,) of integers; a layer's output (batch, ...) and its targets alike.
Composes:  nothing: it trains classifiers from Python, and no job here does.
Use when:  a shallow classifier is trained on a small device.
Not when:  a language model, or a deep network: a layer learns to tell classes apart, not what later layers need.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pintpot.core.errors import CompositionError, ShapeError, TrainingError, UnsupportedModel
from pintpot.core.ledger import Account
from pintpot.core.technique import Claim, Source, technique
from pintpot.optim._base import OptimMethod
from pintpot.optim._tensors import has_values, mix_seed

Loss = Callable[[Tensor, Tensor], Tensor]
"""From outputs and targets (batch, ...) to one number for the batch, of which a layer follows the gradient."""

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@technique(
    name="tpsgd",
    wing="optim",
    slot="optimizer",
    source=Source("Learning with Local Gradients at the Edge", arxiv="2208.08503", year=2022),
    accounts=(Account.GRADIENTS, Account.OPTIMIZER, Account.ACTIVATIONS),
    jobs=(),
    claims=(
        Claim(
            "accuracy lost (fraction), at most",
            0.05,
            versus="SGD with backpropagation",
            at="relatively shallow networks",
            where="abstract",
        ),
    ),
    fidelity="written from the abstract and the update rule; the distribution of the projections is ours",
)
@dataclass(frozen=True, kw_only=True)
class TpSgdRule(OptimMethod):
    """Local targets by fixed random projections of the label.

    Attributes:
        seed: from which the projections are drawn.
    """

    seed: int = 0

    def optimizer(self, model: nn.Module, *, lr: float, weight_decay: float = 0.0, **extras: Any) -> TpSgd:
        """The torch optimizer of this method; see ``TpSgd`` for what models it takes."""
        if extras:
            raise CompositionError(f"tpsgd has no setting {', '.join(sorted(extras))}", hint="leave it out")
        return TpSgd(model, lr=lr, weight_decay=weight_decay, **asdict(self))


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Half the squared distance, on average over the batch."""
    return (outputs - targets).square().sum() / (2 * len(outputs))


def absolute_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """The sum of distances, on average over the batch: each unit's error counts by its sign alone."""
    return (outputs - targets).abs().sum() / len(outputs)


class TpSgd(torch.optim.Optimizer):
    """tpSGD as a torch optimizer: ``TpSgd(model, lr=0.1, seed=0)``, then ``step(lambda: (inputs, labels))``.

    Args:
        model: an ``nn.Sequential`` (nested ones too) of linear layers and convolutions, with activations, norms,
            pooling and the like between them. Its last output is (batch, classes).
        lr: learning rate.
        weight_decay: decoupled from the gradient.
        loss: of every layer.
        seed: from which the projections are drawn.

    Raises:
        UnsupportedModel: for any other model, naming the modules that it cannot train.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.1,
        *,
        weight_decay: float = 0.0,
        loss: Loss = squared_error,
        seed: int = 0,
    ) -> None:
        self.stages = stages_of(model)
        self.loss, self.seed = loss, seed
        super().__init__(model.parameters(), {"lr": lr, "weight_decay": weight_decay})

    def step(self, closure: Callable[[], tuple[Tensor, Tensor]] | None = None) -> Tensor:  # type: ignore[override]
        """Train every layer on one batch, from front to back; the loss of the last one, before its update.

        Args:
            closure: gives the batch, inputs and labels.

        Raises:
            TrainingError: without a closure, or when the loss is not finite.
            ShapeError: when the last output is not (batch, classes).
        """
        batch = closure() if closure is not None else None
        if not isinstance(batch, tuple):
            raise TrainingError("tpsgd trains on a batch", hint="call step(lambda: (inputs, labels))")
        hidden, labels = batch
        classes = self._classes()
        for number, stage in enumerate(self.stages):
            trained = [p for module in stage for p in module.parameters() if p.requires_grad]
            with torch.enable_grad():
                outputs = hidden.detach()
                for module in stage:
                    outputs = module(outputs)
                last = number == len(self.stages) - 1
                targets = self._targets(outputs, labels, None if last else number, classes)
                loss = self.loss(outputs, targets)
            hidden = outputs.detach()
            if trained:
                self._descend_(trained, torch.autograd.grad(loss, trained), loss)
        return loss.detach()

    @torch.no_grad()
    def _descend_(self, trained: list[nn.Parameter], gradients: tuple[Tensor, ...], loss: Tensor) -> None:
        if has_values(loss) and not loss.isfinite():
            raise TrainingError("the loss of a layer is NaN or Inf", hint="lower the learning rate")
        settings = {p: group for group in self.param_groups for p in group["params"]}
        for p, gradient in zip(trained, gradients, strict=True):
            group = settings[p]
            p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(gradient, alpha=group["lr"])

    def _classes(self) -> int:
        last: Any = next(module for module in self.stages[-1] if isinstance(module, LAYERS))
        return int(last.out_features if isinstance(last, nn.Linear) else last.out_channels)

    def _targets(self, outputs: Tensor, labels: Tensor, number: int | None, classes: int) -> Tensor:
        """The image of each label in a layer's outputs; the label itself, one-hot, in the last layer's."""
        if number is None:
            if outputs.shape != (len(labels), classes):
                raise ShapeError(
                    f"the last output is {tuple(outputs.shape)}, not {(len(labels), classes)}",
                    hint="end the model with a linear layer of one unit a class",
                )
            images = torch.eye(classes, device=outputs.device, dtype=outputs.dtype)
        else:
            generator = None
            if has_values(outputs):
                generator = torch.Generator(device=outputs.device).manual_seed(mix_seed(self.seed, number))
            shape = (classes, *outputs.shape[1:])
            drawn = torch.rand(shape, generator=generator, device=outputs.device, dtype=torch.float32)
            images = drawn.mul_(2).sub_(1).to(outputs.dtype)
        return images[labels]


def stages_of(model: nn.Module) -> list[list[nn.Module]]:
    """The model's modules, each layer with what follows it; what comes before the first layer goes with that.

    Raises:
        UnsupportedModel: naming the modules that are neither layers nor without parameters of their own.
    """
    modules = list(_in_order(model, ""))
    norms = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
    wrong = [
        f"{name or 'the model'} ({type(module).__name__})"
        for name, module in modules
        if not isinstance(module, (*LAYERS, *norms)) and next(module.parameters(), None) is not None
    ]
    if wrong or not any(isinstance(module, LAYERS) for _, module in modules):
        raise UnsupportedModel(
            f"tpsgd cannot train {', '.join(wrong[:5]) or 'a model without layers'}",
            hint="it trains an nn.Sequential of linear layers and convolutions",
        )
    stages: list[list[nn.Module]] = []
    before: list[nn.Module] = []
    for _, module in modules:
        if isinstance(module, LAYERS):
            stages.append([*before, module] if not stages else [module])
        else:
            (stages[-1] if stages else before).append(module)
    return stages


def _in_order(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    if not isinstance(module, nn.Sequential):
        yield name, module
        return
    for child, inner in module.named_children():
        yield from _in_order(inner, f"{name}.{child}" if name else child)
