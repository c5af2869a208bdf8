"""JLCM: rows of like spread share a codebook, and training moves both its entries and which entry each weight takes.

Source:    Yvinec et al. 2023, "Network Memory Footprint Compression Through Jointly Learnable Codebooks and Mappings",
           arXiv:2309.17361: re-ordered neurons with several codebooks, joint learning of codebooks and mappings, and a
           gradient of the mapping that falls with the distance of two entries.
Differs:   built from the abstract, figure 1's caption and the reviews: the gradient's form (gap / (gap + distance)),
           the groups (equally many rows, by their standard deviation) and the entries that a weight may move to (the
           nearest `candidates` at the start) are ours. The order of the rows is stored; the authors fold it into the
           next layer. Trained on the model's loss, all layers together.
Saves:     weights, real: packed_size(I, bits) bytes a row, 2^bits * 2 bytes a group, 4 bytes a row for its place. While
           it is trained a weight takes 4 * candidates bytes instead of 4.
Shapes:    weight (O, I); mapping (O, I, M) with M candidates; entries (G, K) of G groups.
Composes:  by training: any optimizer of the compress job; packed: caches, activations, adapters on the frozen base.
Use when:  there is text to train on and rows differ in their distributions; no scales of groups are stored.
Not when:  there is no time to train, or no room for the mappings. Mixtures of experts.
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
from pintpot.core.workload import Workload
from pintpot.weights._base import risk_between
from pintpot.weights.clustering import nearest
from pintpot.weights.formats import Codebook, Format, Split, Tensors
from pintpot.weights.formats.grouped import SCALE_DTYPES
from pintpot.weights.statistics import InputStatistics
from pintpot.weights.trained import StandIn, TrainedMethod

RISES = ((8.6, 0.001), (4.2, 0.048), (3.2, 0.124), (2.2, 0.765))
"""Bits a weight and the relative rise of perplexity: of the embedded model, the first a guess."""

PACE = 4.0
"""Scores of a mapping for each unit of its parameter, which an optimizer moves by about a learning rate a step."""


@technique(
    name="learnable-codebooks",
    wing="weights",
    source=Source(
        "Network Memory Footprint Compression Through Jointly Learnable Codebooks and Mappings", 2023, "2309.17361"
    ),
    accounts=[Account.WEIGHTS],
    jobs=["compress"],
    removes=["dense_weights", "matrix_gradients"],
    claims=[Claim("GB of weights", 2.0, versus="dense", at="Llama 7B", where="abstract")],
    fidelity="form of the gradient, groups and candidates are ours, after the abstract, figure 1's caption and reviews",
)
@dataclass(frozen=True, kw_only=True)
class LearnableCodebooks(TrainedMethod):
    """Codebooks and mappings that learn together.

    Attributes:
        bits: of an index; a codebook has ``2 ** bits`` entries.
        groups: of rows, at most, each with a codebook of its own.
        candidates: entries that a weight can move to, its nearest at the start; at least 2.
        book_share: most bytes of the codebooks, as a share of those of the indices: small matrices have fewer groups.
    """

    learning_rate: ClassVar[float] = 3e-4
    bits: int = 4
    groups: int = 8
    candidates: int = 5
    book_share: float = 0.125

    def __post_init__(self) -> None:
        Codebook(index_bits=self.bits)
        if self.bits > 8 or self.groups < 1 or self.candidates < 2 or self.book_share <= 0:
            raise CompositionError(
                "learnable-codebooks has 1 to 8 bits, at least one group and two candidates, and book_share above 0",
                hint="for instance learnable-codebooks(bits=4, groups=8, candidates=5)",
            )

    def terms(self, name: str, out_features: int, in_features: int, dtype: torch.dtype) -> tuple[Format, ...]:
        """A codebook of single numbers for each group of rows; one group needs no order."""
        entries = "bfloat16" if dtype is torch.bfloat16 else "float16"
        book = Codebook(vector_length=1, index_bits=self.bits, entry_dtype=entries)
        indices = book.nbytes(out_features, in_features) - book.book_bytes()
        groups = max(1, min(self.groups, out_features, int(self.book_share * indices / book.book_bytes())))
        if groups == 1:
            return (book,)
        counts = tuple(out_features // groups + (i < out_features % groups) for i in range(groups))
        return (Split(parts=(book,) * groups, counts=counts),)

    def stand_in(
        self, name: str, weight: Tensor, formats: tuple[Format, ...], inputs: InputStatistics | None = None
    ) -> LearntMapping:
        """Codebooks by k-means of each group, and the mapping to the nearest entries."""
        return LearntMapping(weight.float(), formats[0], self.candidates)

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """From bits a weight; large models lose less than the small one that it was measured on."""
        return risk_between(RISES, self.bits_a_weight(shape))

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[LearnableCodebooks]:
        """From the safest to the smallest."""
        for bits in (8, 4, 3, 2):
            yield cls(bits=bits)


class LearntMapping(StandIn):
    """Codebooks and a mapping (O, I, M), both trained. The rows are in the order of the groups.

    Args:
        weight: float32 (O, I).
        layout: a codebook of single numbers, or parts with one each.
        candidates: M, at most.
    """

    order: Tensor
    group: Tensor
    first: Tensor
    unit: Tensor

    def __init__(self, weight: Tensor, layout: Format, candidates: int) -> None:
        super().__init__()
        self.layout = layout
        self.books, self.counts = _books(layout, weight.shape[0])
        spread = weight.std(1, correction=0)
        order = spread.argsort(stable=True) if len(self.books) > 1 else torch.arange(weight.shape[0])
        rows = weight[order.to(weight.device)]
        size = 2 ** self.books[0].index_bits
        few = min(candidates, size)
        entries, firsts, scores = [], [], []
        for book, part in zip(self.books, rows.split(self.counts), strict=True):
            own = book.fit(book.vectors(part), book.index_bits).sort(0).values
            index = nearest(part.reshape(-1, 1), own).view(part.shape)
            first = (index - few // 2).clamp(0, size - few)
            near = own[first[..., None] + torch.arange(few, device=weight.device), 0]
            scores.append((part[..., None] - near).square().neg_().div_(_gap(own.t())[..., None].square() * PACE))
            entries.append(own[:, 0])
            firsts.append(first)
        stacked = torch.stack(entries)
        unit = stacked.square().mean().sqrt().clamp(min=1e-8)
        self.entries = nn.Parameter(stacked / unit)
        self.mapping = nn.Parameter(torch.cat(scores))
        group = torch.tensor([index for index, count in enumerate(self.counts) for _ in range(count)])
        self.register_buffer("unit", unit)
        self.register_buffer("order", order.to(weight.device))
        self.register_buffer("group", group.to(weight.device))
        self.register_buffer("first", torch.cat(firsts).to(torch.uint8))

    def weight(self) -> Tensor:
        """The entries that the mapping chooses; in evaluation mode as they are stored."""
        entries = self.entries * self.unit if self.training else torch.stack(self._stored())
        rows: Tensor = _Chosen.apply(entries, self.mapping, self.first, self.group)
        return rows[self.order.argsort()]

    def terms(self, formats: tuple[Format, ...]) -> tuple[Tensors, ...]:
        """The codebooks, and the index of the entry with the highest score for each weight."""
        index = (self.first + self.mapping.detach().argmax(-1)).split(self.counts)
        parts = [b.store([own[:, None]], [i]) for b, own, i in zip(self.books, self._stored(), index, strict=True)]
        return (self.layout.store(parts, self.order) if isinstance(self.layout, Split) else parts[0],)

    def _stored(self) -> list[Tensor]:
        dtype = SCALE_DTYPES[self.books[0].entry_dtype]
        return list((self.entries.detach() * self.unit).to(dtype).float())


def _books(layout: Format, out_features: int) -> tuple[tuple[Codebook, ...], list[int]]:
    parts = layout.parts if isinstance(layout, Split) else (layout,)
    counts = list(layout.counts) if isinstance(layout, Split) else [out_features]
    return tuple(part for part in parts if isinstance(part, Codebook)), counts


def _gap(entries: Tensor) -> Tensor:
    """Mean distance of neighbouring entries (G, K), for each group (G, 1); above 0."""
    width = entries.amax(1, keepdim=True) - entries.amin(1, keepdim=True)
    return (width / max(1, entries.shape[1] - 1)).clamp(min=torch.finfo(torch.float32).tiny ** 0.25)


class _Chosen(torch.autograd.Function):
    """The entry with the highest score; each score's gradient falls with its entry's distance from the chosen one."""

    @staticmethod
    def forward(ctx: Any, entries: Tensor, mapping: Tensor, first: Tensor, group: Tensor) -> Tensor:
        index = first + mapping.argmax(-1)
        place = index + group[:, None] * entries.shape[1]
        ctx.save_for_backward(entries, mapping, first, group)
        return entries.reshape(-1)[place]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        entries, mapping, first, group = ctx.saved_tensors
        gradient, few = gradients[0], mapping.shape[-1]
        place = first.long() + group[:, None] * entries.shape[1]
        chosen = place + mapping.argmax(-1)
        flat = entries.reshape(-1)
        by_entry = torch.zeros_like(flat).index_add_(0, chosen.flatten(), gradient.flatten()).view_as(entries)
        # Away from the chosen entry by so much: the plain gradient would be this times the weight's own, and so would
        # favour the farthest entries.
        away = flat[place[..., None] + torch.arange(few, device=flat.device)] - flat[chosen][..., None]
        gap = _gap(entries)[group][..., None]
        by_score = gradient[..., None] * away.sign() * (gap / (gap + away.abs()))
        return by_entry, by_score, None, None
