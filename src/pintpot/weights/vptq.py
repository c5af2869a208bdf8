"""VPTQ: vectors of each input channel become entries of a codebook, and the channels after it make up for the error.

Source:    Liu et al. 2024, "VPTQ", arXiv:2409.17066: channel-independent second-order optimisation, Hessian-weighted
           k-means, residual and outlier quantisation; and the authors' code (microsoft/VPTQ).
Differs:   codebooks are not trained after, nor norms (the authors' optional layer-wise and end-to-end steps); channels
           are scaled by their spread but not shifted by their mean; k-means weighs errors in the weight's own units,
           the authors in scaled ones. Vectors are shortened, at the same bits a weight, in matrices too small to pay
           for the codebook (a part of its indices' bytes at most, `book_share`).
Saves:     weights, real: (index_bits + residual_bits) / vector_length bits a weight, 2 bytes an input channel for its
           scale, and the codebooks (2^index_bits + 2^residual_bits) * vector_length * 2 bytes a matrix. Finding them
           needs one block, 4 I^2 bytes a layer for the inputs' second moments, and some copies of the largest matrix.
Shapes:    weight (O, I); H (I, I); vectors of V consecutive out-features of one input channel; codebook (2^B, V);
           indices (I, ceil(O / V)).
Composes:  caches, activations, adapters on the frozen base; not with anything that needs dense weights.
Use when:  3 bits or fewer: there vectors lose far less than single numbers on a grid, and cost no scales of groups.
Not when:  4 bits are enough: gptq finds them in less time and its grids multiply faster. Codebooks of 2^16 entries take
           hours a model without a GPU, those of 2^12 (``vptq(vector_length=6, index_bits=12)``) minutes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from pintpot.core.errors import CompositionError
from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Claim, Source, technique
from pintpot.core.workload import Workload
from pintpot.weights._base import WeightMethod, risk_between
from pintpot.weights.clustering import distance_bytes, nearest
from pintpot.weights.compensation import compensate_, inverse_factor
from pintpot.weights.formats import Codebook, Format, Scaled, SplitInput, Tensors, Transposed
from pintpot.weights.formats._base import prefixed
from pintpot.weights.formats.grouped import SCALE_DTYPES, SMALLEST
from pintpot.weights.statistics import InputStatistics

RISES = ((4.29, 0.0148), (3.4, 0.067), (2.33, 0.36), (1.92, 1.42))
"""Bits a weight and the relative rise of perplexity, of the embedded model in `results/weights.csv`."""


@technique(
    name="vptq",
    wing="weights",
    source=Source(
        "VPTQ: Extreme Low-bit Vector Post-Training Quantization for Large Language Models", 2024, "2409.17066"
    ),
    accounts=[Account.WEIGHTS],
    jobs=["generate", "finetune", "compress"],
    removes=["dense_weights", "matrix_gradients"],
    claims=[
        Claim(
            "perplexity gained, at most", 0.34, versus="the best method before", at="LLaMA-2, 2 bits", where="abstract"
        ),
        Claim(
            "perplexity gained, at most",
            0.68,
            versus="the best method before",
            at="Mistral-7B, 2 bits",
            where="abstract",
        ),
    ],
    fidelity="no training of codebooks and norms after; no shift of channels; shorter vectors in small matrices",
)
@dataclass(frozen=True, kw_only=True)
class VPTQ(WeightMethod):
    """Vector quantisation with second-order compensation.

    Attributes:
        vector_length: out-features that share an index, at most.
        index_bits: of an index for vectors of that length.
        residual_bits: of an index into a second codebook, which holds what the first leaves over; 0 for none.
        outlier_share: of the input channels, those with the largest inputs, that have a codebook of their own.
        outlier_length: ``vector_length`` of the outliers.
        outlier_bits: ``index_bits`` of the outliers.
        channel_scales: divide each input channel by its standard deviation, which is stored.
        activation_order: round the channels with the largest inputs first; always so where some are outliers.
        iterations: of k-means, at most.
        damping: share of the mean diagonal of H that is added to it.
        book_share: most bytes of the codebooks, as a share of those of the indices.
    """

    calibrated: ClassVar[bool] = True
    vector_length: int = 8
    index_bits: int = 16
    residual_bits: int = 0
    outlier_share: float = 0.0
    outlier_length: int = 4
    outlier_bits: int = 16
    channel_scales: bool = True
    activation_order: bool = True
    iterations: int = 100
    damping: float = 0.01
    book_share: float = 0.25

    def __post_init__(self) -> None:
        Codebook(vector_length=self.vector_length, index_bits=self.index_bits, residual_bits=self.residual_bits)
        Codebook(vector_length=self.outlier_length, index_bits=self.outlier_bits)
        if not 0 <= self.outlier_share < 1 or self.book_share <= 0:
            raise CompositionError(
                f"outlier_share is a share below 1 and book_share above 0, not {self.outlier_share}, {self.book_share}",
                hint="for instance vptq(outlier_share=0.01, book_share=0.25)",
            )

    def terms(self, name: str, out_features: int, in_features: int, dtype: torch.dtype) -> tuple[Format, ...]:
        """A codebook of input channels, or two where some are outliers, under the channels' scales."""
        scale = "bfloat16" if dtype is torch.bfloat16 else "float16"
        outliers = math.ceil(self.outlier_share * in_features)
        wide = Codebook(vector_length=self.vector_length, index_bits=self.index_bits, residual_bits=self.residual_bits)
        inner = self._part(wide, out_features, in_features - outliers)
        if outliers:
            fine = Codebook(vector_length=self.outlier_length, index_bits=self.outlier_bits)
            parts = (self._part(fine, out_features, outliers), inner)
            inner = SplitInput(parts=parts, counts=(outliers, in_features - outliers))
        return (Scaled(inner=inner, scale_dtype=scale),) if self.channel_scales else (inner,)

    def _part(self, wanted: Codebook, out_features: int, channels: int) -> Format:
        """The codebook with the longest vectors, at the wanted bits a weight, that the matrix can pay for."""
        for length in range(wanted.vector_length, 0, -1):
            index, residual = (
                round(bits * length / wanted.vector_length) for bits in (wanted.index_bits, wanted.residual_bits)
            )
            if index > 0 and (residual > 0) == (wanted.residual_bits > 0):
                book = Codebook(vector_length=length, index_bits=index, residual_bits=residual)
                best = Transposed(inner=book, out_features_held=out_features)
                if book.book_bytes() <= self.book_share * (book.nbytes(channels, out_features) - book.book_bytes()):
                    break
        return best

    def find(
        self, name: str, weight: Tensor, formats: tuple[Format, ...], inputs: InputStatistics | None = None
    ) -> tuple[Tensors, ...]:
        """The indices channel by channel; without compensation where nothing is known of the inputs."""
        layout = formats[0]
        inner = layout.inner if isinstance(layout, Scaled) else layout
        if not _places(inner, weight.shape[1]):
            return super().find(name, weight, formats)
        hessian = torch.eye(weight.shape[1], device=weight.device) if inputs is None else inputs.hessian
        dense = torch.where(hessian.diagonal() == 0, 0.0, weight.float())
        if not isinstance(layout, Scaled):
            return (self.round(dense, inner, hessian, torch.ones_like(hessian[0])),)
        scale = spread(dense).to(SCALE_DTYPES[layout.scale_dtype])
        return ({**prefixed("inner_", self.round(dense, inner, hessian, scale.float())), "input_scale": scale},)

    def round(self, weight: Tensor, layout: Format, hessian: Tensor, scale: Tensor) -> Tensors:
        """The stored tensors of a weight divided by its channels' scales.

        Args:
            weight: float32 (O, I), not divided yet.
            layout: a transposed codebook, or such parts of the input channels.
            hessian: second moments (I, I) of the inputs.
            scale: of the channels (I,).
        """
        order = torch.arange(weight.shape[1], device=weight.device)
        if self.activation_order or isinstance(layout, SplitInput):
            order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
        places = _places(layout, weight.shape[1])
        importance = hessian.diagonal() * scale.square()
        factor = inverse_factor(hessian, self.damping, order)
        drafts = [
            _Draft(book, importance[order[place]], book.vectors((weight / scale)[:, order[place]].t()))
            for book, place in places
        ]
        owner = [
            draft for draft, (_, place) in zip(drafts, places, strict=True) for _ in range(place.start, place.stop)
        ]
        first = [place.start for _, place in places for _ in range(place.start, place.stop)]

        def round_columns(own: slice, numbers: Tensor) -> Tensor:
            at, unit = own.start, scale[order[own.start]]
            return numbers - unit * owner[at].round_(at - first[at], numbers[:, 0] / unit)[:, None]

        for stage in range(max(len(draft.book.stages) for draft in drafts)):
            for draft in drafts:
                draft.add_stage_(stage, self.iterations)
            compensate_(weight[:, order], factor, round_columns)
        if isinstance(layout, SplitInput):
            return layout.store([prefixed("inner_", draft.store()) for draft in drafts], order)
        by_channel = order.argsort()
        drafts[0].indices = [index[by_channel] for index in drafts[0].indices]
        return prefixed("inner_", drafts[0].store())

    def finding_bytes(self, out_features: int, in_features: int, dtype: torch.dtype) -> int:
        """The distances of vectors from entries, the sums of k-means in 64 bits, and GPTQ's matrices."""
        layout = self.terms("", out_features, in_features, dtype)[0]
        places = _places(layout.inner if isinstance(layout, Scaled) else layout, in_features)
        distances = max(
            distance_bytes((place.stop - place.start) * book.count(out_features), 1 << max(book.stages))
            for book, place in places
        )
        return distances + 60 * out_features * in_features + 12 * in_features**2

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """From bits a weight; large models lose less than the small one that it was measured on."""
        return risk_between(RISES, self.bits_a_weight(shape))

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[VPTQ]:
        """From the safest to the smallest; indices of 12 bits, because those of 16 take long to find."""
        for length in (3, 4, 6, 8):
            yield cls(vector_length=length, index_bits=12)


@dataclass
class _Draft:
    """The codebooks of some input channels in the making.

    Attributes:
        book: their format.
        importance: of each channel, in the order in which they are rounded (C,).
        left: what the stages found so far leave over of each vector (C, N, V).
        books: the entries of each stage found so far.
        indices: int64 (C, N) into each.
    """

    book: Codebook
    importance: Tensor
    left: Tensor
    books: list[Tensor] = field(default_factory=list)
    indices: list[Tensor] = field(default_factory=list)

    def add_stage_(self, stage: int, iterations: int) -> None:
        """A codebook for what is left over, if the format has so many."""
        if stage < len(self.book.stages):
            importance = self.importance[:, None].expand(self.left.shape[:2])
            self.books.append(self.book.fit(self.left, self.book.stages[stage], importance, iterations))
            self.indices.append(torch.empty(self.left.shape[:2], dtype=torch.int64, device=self.left.device))

    def round_(self, place: int, column: Tensor) -> Tensor:
        """Choose the entries for a channel's numbers (O,); gives what they leave over."""
        rest = self.book.vectors(column)
        for book, index in zip(self.books, self.indices, strict=True):
            index[place] = chosen = nearest(rest, book)
            rest = rest - book[chosen]
        self.left[place] = rest
        return rest.flatten()[: column.shape[0]]

    def store(self) -> Tensors:
        """The stored tensors of the format."""
        return self.book.store(self.books, self.indices)


def spread(weight: Tensor) -> Tensor:
    """The standard deviation of each input channel (I,) of a weight (O, I); one where all its numbers are the same."""
    found = weight.std(0, correction=0)
    return torch.where(found > SMALLEST["float16"], found, 1.0)


def _places(layout: Format, channels: int) -> list[tuple[Codebook, slice]]:
    """The codebooks in a layout and the places of their channels in its order; none for other layouts."""
    parts = [(layout, slice(0, channels))]
    if isinstance(layout, SplitInput):
        parts = [(part, place) for _, part, place in layout.places()]
    found = [(p.inner, place) for p, place in parts if isinstance(p, Transposed) and isinstance(p.inner, Codebook)]
    return found if len(found) == len(parts) else []
