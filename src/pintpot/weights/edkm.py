"""eDKM: train weights through a soft assignment to few centroids, kept for one number of each value that occurs.

Source:    Cho et al. 2023, "eDKM", arXiv:2309.00964, uniquification and marshalling; the layer is that of Cho et al.
           2021, "DKM", arXiv:2108.12659: attention of weights to centroids, centroids as the attention's means.
Differs:   the map over unique values is made again in the backward pass from the weight, which is there anyway, rather
           than kept, so there is no list of indices to shard over learners; the temperature is a share of the squared
           median distance of neighbouring centroids; embeddings stay dense (8 bits in the paper).
Saves:     weights, real: O * packed_size(I, bits) and 2^bits * 2 bytes a matrix. In training nothing of the attention
           map is kept (DKM keeps |W| * 2^bits numbers, several times over); a step needs tables of at most
           65536 * 2^bits numbers of 4 bytes an iteration, of one matrix at a time.
Shapes:    weight (O, I); U unique values; attention (U, K); centroids (K,).
Composes:  by training: any optimizer of the compress job; packed: caches, activations, adapters on the frozen base.
Use when:  there is text and time to train on, and 3 bits or fewer are wanted without scales of groups.
Not when:  there is no time to train: one codebook serves a whole matrix, so that rows of little spread lose most, and
           without training rounding to nearest with a scale for each row is better. Mixtures of experts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pintpot.core.errors import CompositionError
from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Claim, Source, technique
from pintpot.core.values import has_values
from pintpot.core.workload import Workload
from pintpot.weights._base import risk_between
from pintpot.weights.clustering import cluster, nearest
from pintpot.weights.formats import Codebook, Format, Tensors
from pintpot.weights.formats.grouped import SCALE_DTYPES
from pintpot.weights.statistics import InputStatistics
from pintpot.weights.trained import StandIn, TrainedMethod

RISES = ((8.1, 0.001), (4.0, 0.069), (3.0, 0.93), (2.0, 2.2))
"""Bits a weight and the relative rise of perplexity: of the embedded model, the first a guess."""

LEAST_TEMPERATURE = 1e-20
"""Of weights that are all the same."""

PATTERNS = 1 << 16
"""Values that a number of 16 bits can have."""


@technique(
    name="edkm",
    wing="weights",
    source=Source(
        "eDKM: An Efficient and Accurate Train-time Weight Clustering for Large Language Models", 2023, "2309.00964"
    ),
    accounts=[Account.WEIGHTS],
    jobs=["compress"],
    removes=["dense_weights", "matrix_gradients"],
    claims=[
        Claim("GB of weights", 2.5, versus="12.6 GB dense", at="LLaMA-7B, 3 bits", where="abstract"),
        Claim("times less memory of a layer in training", 130, versus="DKM", at="LLaMA-7B", where="abstract"),
    ],
    fidelity="the map is recomputed in the backward pass instead of kept and sharded; embeddings stay dense",
)
@dataclass(frozen=True, kw_only=True)
class EDKM(TrainedMethod):
    """Differentiable k-means over unique 16-bit values.

    Attributes:
        bits: of an index; there are ``2 ** bits`` centroids for a matrix.
        temperature: of the attention, as a share of the squared median distance of neighbouring centroids.
        iterations: of k-means in a forward pass, at most.
        tolerance: it ends when no centroid moves by more than this share of that distance.
    """

    learning_rate: ClassVar[float] = 5e-5
    bits: int = 3
    temperature: float = 0.1
    iterations: int = 5
    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        Codebook(index_bits=self.bits)
        if self.bits > 8 or self.temperature <= 0 or self.iterations < 1:
            raise CompositionError(
                "edkm has 1 to 8 bits, a temperature above 0 and at least one iteration",
                hint="for instance edkm(bits=3)",
            )

    def terms(self, name: str, out_features: int, in_features: int, dtype: torch.dtype) -> tuple[Format, ...]:
        """A codebook of single numbers."""
        entries = "bfloat16" if dtype is torch.bfloat16 else "float16"
        return (Codebook(vector_length=1, index_bits=self.bits, entry_dtype=entries),)

    def stand_in(
        self, name: str, weight: Tensor, formats: tuple[Format, ...], inputs: InputStatistics | None = None
    ) -> ClusteredWeight:
        """The weight, with centroids by k-means."""
        assert isinstance(formats[0], Codebook)
        return ClusteredWeight(weight.float(), formats[0], self)

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """From bits a weight; large models lose less than the small one that it was measured on."""
        return risk_between(RISES, self.bits_a_weight(shape))

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[EDKM]:
        """From the safest to the smallest."""
        for bits in (8, 4, 3, 2):
            yield cls(bits=bits)


class ClusteredWeight(StandIn):
    """A weight (O, I) that is trained through its clusters. In evaluation mode it is what would be packed.

    Args:
        weight: float32.
        book: the format of the packed weight.
        method: temperature and iterations.
    """

    centroids: Tensor

    def __init__(self, weight: Tensor, book: Codebook, method: EDKM) -> None:
        super().__init__()
        self.book, self.method = book, method
        self.dense = nn.Parameter(weight.clone())
        values, counts = unique_values(weight)
        centroids = cluster(values[:, None], 2**book.index_bits, counts)[:, 0]
        self.register_buffer("centroids", centroids)

    def weight(self) -> Tensor:
        """The means of the centroids that each number attends to; the nearest one itself in evaluation mode."""
        if not self.training:
            return self._entries()[self._nearest()]
        out, centroids = _SoftClusters.apply(self.dense, self.centroids, self.method)
        with torch.no_grad():
            self.centroids.copy_(centroids)
        return out

    def terms(self, formats: tuple[Format, ...]) -> tuple[Tensors, ...]:
        """The nearest centroids."""
        return (self.book.store([self._entries()[:, None]], [self._nearest()]),)

    def _entries(self) -> Tensor:
        return self.centroids.to(SCALE_DTYPES[self.book.entry_dtype]).float()

    def _nearest(self) -> Tensor:
        rounded = self.dense.detach().bfloat16().float()
        return nearest(rounded.reshape(-1, 1), self._entries()[:, None]).view(rounded.shape)


def unique_values(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The values (U,) that occur in a weight rounded to bfloat16, and how often each does (U,), both float32."""
    if not has_values(weight):
        return weight.new_empty(1), weight.new_empty(1)
    counts = torch.bincount(_patterns(weight).flatten(), minlength=PATTERNS)
    found = counts.nonzero()[:, 0]
    return _values(found), counts[found].float()


def _patterns(weight: Tensor) -> Tensor:
    """The bits of each number in bfloat16, int32, 0 to 65535."""
    return weight.detach().bfloat16().contiguous().view(torch.int16).int() & (PATTERNS - 1)


def _values(patterns: Tensor) -> Tensor:
    signed = torch.where(patterns >= PATTERNS // 2, patterns - PATTERNS, patterns)
    return signed.to(torch.int16).view(torch.bfloat16).float()


def attend(values: Tensor, centroids: Tensor, temperature: Tensor) -> Tensor:
    """Attention (U, K) of numbers (U,) to centroids (K,): the softmax of the negative squared distances."""
    return (-(values[:, None] - centroids).square() / temperature).softmax(1)


def converge(values: Tensor, counts: Tensor, centroids: Tensor, method: EDKM) -> tuple[Tensor, Tensor]:
    """Centroids (K,) by soft k-means, differentiable in the values, and the temperature that was used.

    Args:
        values: numbers (U,).
        counts: how often each occurs (U,).
        centroids: where it starts (K,).
        method: temperature, iterations and tolerance.
    """
    rising = centroids.detach().sort().values
    # The middle distance: a few far-off centroids do not make the attention of all the others soft.
    gap = rising.diff().median().clamp(min=1e-3 * (rising[-1] - rising[0]))
    temperature = (method.temperature * gap.square()).clamp(min=LEAST_TEMPERATURE)
    for _ in range(method.iterations):
        attention = attend(values, centroids, temperature) * counts[:, None]
        mass = attention.sum(0)
        moved = torch.where(mass > 0, (attention * values[:, None]).sum(0) / mass.clamp(min=1e-12), centroids)
        still = bool(((moved - centroids).detach().abs() <= method.tolerance * gap).all())
        centroids = moved
        if still:
            break
    return centroids, temperature


class _SoftClusters(torch.autograd.Function):
    """Keeps the weight itself, which is there anyway, and the centroids; the tables are made again in the backward."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, start: Tensor, method: EDKM) -> tuple[Tensor, Tensor]:
        start = start.clone()
        ctx.save_for_backward(weight, start)
        ctx.method = method
        patterns = _patterns(weight)
        counts = torch.bincount(patterns.flatten(), minlength=PATTERNS)
        found = counts.nonzero()[:, 0]
        values = _values(found)
        centroids, temperature = converge(values, counts[found].float(), start, method)
        table = values.new_zeros(PATTERNS)
        table[found] = attend(values, centroids, temperature) @ centroids
        ctx.mark_non_differentiable(centroids)
        return table[patterns].to(weight.dtype), centroids

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight, start = ctx.saved_tensors
        gradient = gradients[0].float()
        patterns = _patterns(weight)
        counts = torch.bincount(patterns.flatten(), minlength=PATTERNS)
        found = counts.nonzero()[:, 0]
        share = torch.bincount(patterns.flatten(), weights=gradient.flatten(), minlength=PATTERNS)[found].float()
        number = counts[found].float()
        with torch.enable_grad():
            # A number acts on its own output, and as one of many on the centroids: two paths with tables of their own.
            own, common = (_values(found).requires_grad_() for _ in range(2))
            centroids, temperature = converge(common, number, start, ctx.method)
            out = attend(own, centroids, temperature) @ centroids
            (by_centroids,) = torch.autograd.grad(out, common, share, retain_graph=True)
            (by_itself,) = torch.autograd.grad(out.sum(), own)
        slope, push = gradient.new_zeros((2, PATTERNS)).unbind()
        slope[found], push[found] = by_itself, by_centroids / number
        return (gradient * slope[patterns] + push[patterns]).to(weight.dtype), None, None
