"""Low-rank CTR: factorise the layers and embedding tables of a click model by where their outputs lie.

Source:    Yu et al. 2024, "Unified Low-rank Compression Framework for Click-through Rate Prediction", arXiv:2405.18146,
           and the authors' code: the leading eigenvectors of the covariance of each layer's or table's outputs on the
           training data, with a bias for what the projection leaves of their mean.
Differs:   one share of bytes for all layers and tables, where the authors choose ranks by hand, put an activation
           between a layer's factors and train them further. In the blocks of a language model, whose layers mostly have
           no bias, second moments take the covariance's place.
Saves:     weights, real: all but the share that is asked for. In a network of any kind (``factorise_network_``) its
           outputs' covariance is held for every layer and table, 8 O^2 bytes each.
Shapes:    layer (O, I), table (N, O) of N values; factors of rank R: (O, R) and (R, I), or (N, R) and (O, R).
Composes:  caches, activations, adapters on the frozen base; not with anything that needs dense weights. A factorised
           network is an ordinary module, to be trained on.
Use when:  a recommender's tables and layers must shrink three to five times, and its training data is there.
Not when:  a language model is to be compressed: rounding loses far less at the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pintpot.core.errors import CompositionError, ShapeError, UnsupportedModel
from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Claim, Source, technique
from pintpot.core.workload import Workload
from pintpot.weights._base import CompressionReport
from pintpot.weights.factorised import FactorisedMethod, output_factors
from pintpot.weights.statistics import InputStatistics


@technique(
    name="low-rank-ctr",
    wing="weights",
    source=Source("Unified Low-rank Compression Framework for Click-through Rate Prediction", 2024, arxiv="2405.18146"),
    accounts=[Account.WEIGHTS],
    jobs=["generate", "finetune", "compress"],
    removes=["dense_weights", "matrix_gradients"],
    claims=[
        Claim("model size, times less", 3.0, versus="dense, at a higher AUC", at="click models", where="abstract"),
        Claim("model size, times less, at most", 5.0, versus="dense, at a higher AUC", where="abstract"),
    ],
    fidelity="one share for all; no activation between the factors and no training of them",
)
@dataclass(frozen=True, kw_only=True)
class LowRankCTR(FactorisedMethod):
    """Factors from outputs, for language models and for any network of layers and tables.

    Attributes:
        kept_fraction: of the bytes of each layer and table.
    """

    calibrated: ClassVar[bool] = True
    corrects_bias: ClassVar[bool] = True
    rises: ClassVar[tuple[tuple[float, float], ...]] = ((15.5, 0.1), (14.4, 0.22), (11.0, 0.9), (8.0, 3.0), (4.0, 15.0))
    kept_fraction: float = 0.25

    def __post_init__(self) -> None:
        if not 0 < self.kept_fraction < 1:
            raise ShapeError(
                f"kept_fraction is a share of each layer's bytes, not {self.kept_fraction}",
                hint="for instance low-rank-ctr(kept_fraction=0.25)",
            )

    def rank(self, out_features: int, in_features: int) -> int:
        """The share of the rank at which the factors are as large as the matrix; 0 leaves it dense."""
        return int(self.kept_fraction * out_features * in_features / (out_features + in_features))

    def factors(
        self, name: str, weight: Tensor, rank: int, inputs: InputStatistics | None = None
    ) -> tuple[Tensor, Tensor]:
        """From the outputs; from the weight alone for experts that met no token."""
        if inputs is None:
            return super().factors(name, weight, rank)
        return output_factors(weight, inputs.hessian, rank)

    @torch.no_grad()
    def factorise_network_(self, network: nn.Module, batches: Iterable[Any]) -> CompressionReport:
        """Replace every ``nn.Linear`` and ``nn.Embedding`` of a network in place by two thin ones, where that is less.

        Args:
            network: any module of them; run in evaluation mode, which is restored.
            batches: of training data; a tuple or a mapping is handed over as the arguments.

        Raises:
            CompositionError: when there are no batches.
            UnsupportedModel: when nothing gets smaller.
        """
        seen = {name: Outputs() for name, module in network.named_modules() if self._fits(module)}
        if not seen:
            raise UnsupportedModel(
                f"no layer or table of {type(network).__name__} gets smaller at a share of {self.kept_fraction}",
                hint="choose a smaller kept_fraction",
            )
        with _watching(network, seen):
            for batch in batches:
                _call(network, batch)
        unused = [name for name, outputs in seen.items() if not outputs.count]
        if len(unused) == len(seen):
            raise CompositionError("low-rank-ctr needs training data, and there is none", hint="give batches")
        before = _bytes(network)
        left = [(f"{name}.weight", "the data never reaches it") for name in unused]
        for name, outputs in seen.items():
            if outputs.count:
                network.set_submodule(name, self._thin(network.get_submodule(name), outputs))
        done = tuple(f"{name}.weight" for name in seen if name not in unused)
        return CompressionReport(done, tuple(left), before, _bytes(network))

    def _fits(self, module: nn.Module) -> bool:
        if type(module) is nn.Embedding and (module.padding_idx is not None or module.max_norm is not None):
            return False
        return type(module) in (nn.Linear, nn.Embedding) and self.rank(*_weight(module).shape) >= 1

    def _thin(self, module: nn.Module, outputs: Outputs) -> nn.Sequential:
        weight, mean = _weight(module), outputs.total / outputs.count
        like: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        rank = self.rank(*weight.shape)
        covariance = outputs.moments / outputs.count - torch.outer(mean, mean)
        directions = torch.linalg.eigh(covariance)[1][:, -rank:].flip(-1)
        second = nn.Linear(rank, len(mean), **like)
        second.weight.copy_(directions)
        if isinstance(module, nn.Linear):
            first: nn.Linear | nn.Embedding = nn.Linear(weight.shape[1], rank, bias=False, **like)
            first.weight.copy_(directions.t() @ weight.double())
            own = torch.zeros_like(mean) if module.bias is None else module.bias.double()
            second.bias.copy_(mean - directions @ (directions.t() @ (mean - own)))
        else:
            first = nn.Embedding(weight.shape[0], rank, **like)
            first.weight.copy_((weight.double() - mean) @ directions)
            second.bias.copy_(mean)
        return nn.Sequential(first, second).train(module.training)

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[LowRankCTR]:
        """From the safest to the smallest."""
        for fraction in (0.9, 0.75, 0.6, 0.5, 0.4, 0.25):
            yield cls(kept_fraction=fraction)


@dataclass
class Outputs:
    """Sums over the outputs y (O,) of a layer or table, in float64: of y, of ``y y^T``, and their number."""

    total: Tensor | Any = 0.0
    moments: Tensor | Any = 0.0
    count: int = 0

    def add_(self, outputs: Tensor) -> None:
        """Take in more outputs (..., O)."""
        rows = outputs.detach().reshape(-1, outputs.shape[-1]).double()
        self.total, self.moments = self.total + rows.sum(0), self.moments + rows.t() @ rows
        self.count += rows.shape[0]


@contextmanager
def _watching(network: nn.Module, seen: Mapping[str, Outputs]) -> Iterator[None]:
    training = network.training
    network.eval()
    handles = [
        network.get_submodule(name).register_forward_hook(lambda module, args, out, to=outputs: to.add_(out))
        for name, outputs in seen.items()
    ]
    try:
        yield
    finally:
        network.train(training)
        for handle in handles:
            handle.remove()


def _call(network: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        network(**batch)
    elif isinstance(batch, tuple | list):
        network(*batch)
    else:
        network(batch)


def _weight(module: nn.Module) -> Tensor:
    weight: Tensor = module.weight.detach()  # type: ignore[operator]
    return weight


def _bytes(network: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in network.parameters())
