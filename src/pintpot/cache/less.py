"""LESS: tokens that are evicted go into a small recurrent state, which answers for all of them together.

Source:    Dong et al. 2024, "Get More with LESS: Synthesizing Recurrence with KV Cache Compression for Efficient LLM
           Inference", arXiv:2402.09398; the two maps and their training as in the authors' code (hdong920/LESS).
Differs:   one set of maps serves any keep, whichever it was trained with (``policy``; the authors train one for each
           keep and size). The policy evicts some tokens at a time, as the keep does in use. Texts are trained on one by
           one instead of two by two. Query heads of one key-value head share its state and have maps of their own, as
           the authors do where all query heads share one.
Saves:     nothing by itself: it adds a state of constant size to a keep, float32 (about ``rank`` tokens of the dense
           cache at 16 bits), and the maps in the model's dtype, so that the keep may evict more.
Shapes:    maps of queries (H, D, U) and (H, U, R), of keys (K, D, U), (K, U, R) and (K, R, R); state (B, K, R, D)
           and (B, K, R, 1), U hidden units, R rank.
Composes:  any keep, any store. Layers that share another's tokens share its state and maps.
Use when:  a small share of the tokens is kept and the rest matters a little each; many sequences share the maps.
Not when:  little is evicted, or evicted tokens must be recalled word by word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pintpot.cache._base import Keep, Place
from pintpot.cache.calibration import Calibrated, sample_layer, tensors_for
from pintpot.cache.defensivekv import output_weight
from pintpot.cache.evictions import eviction_times
from pintpot.cache.feature_maps import Lesson, Training, key_features, query_features, train_maps
from pintpot.cache.residue import Residue, ResidueState
from pintpot.cache.tokens import Tokens
from pintpot.core.errors import CompositionError, DataError
from pintpot.core.expression import parse
from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Source, technique
from pintpot.core.workload import Workload

ABSORBED_TOKENS = 512
"""Tokens that are taken into the state together: bounds the temporaries."""


@technique(
    name="less",
    wing="cache",
    part="residue",
    beside="keep",
    source=Source(
        "Get More with LESS: Synthesizing Recurrence with KV Cache Compression for Efficient LLM Inference",
        year=2024,
        arxiv="2402.09398",
    ),
    accounts=[Account.KV_CACHE],
    fidelity="one set of maps for any keep; trained on one text at a time",
)
@dataclass(frozen=True, kw_only=True)
class LESS(Calibrated, Residue):
    """A low-rank state beside a keep.

    Attributes:
        rank: features of a query or a key; the rank of the state.
        hidden_units: of the maps that make features.
        policy: the keep that the maps are trained with. The default is the authors' 5 % of texts of 4,096 tokens, half
            of it heavy hitters and half recent tokens.
        epochs: of training, over the calibration texts.
        learning_rate: at first; it is halved every 10 epochs.
        dropout: of hidden units while training.
        seed: of the maps before training, and of what is dropped.
    """

    rank: int = 8
    hidden_units: int = 512
    policy: str = "h2o(kept_fraction=0.025, recent_tokens=102, chunk_tokens=40)"
    epochs: int = 40
    learning_rate: float = 1e-3
    dropout: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.rank, self.hidden_units, self.epochs) < 1 or not 0 <= self.dropout < 1:
            raise CompositionError(
                f"less cannot train {self.rank} features of {self.hidden_units} units for {self.epochs} epochs with a "
                f"dropout of {self.dropout}",
                hint="use at least one of each, and a dropout of at least 0 and below 1",
            )

    def keep(self) -> Keep:
        """The keep that the maps are trained with.

        Raises:
            CompositionError: when ``policy`` is none.
        """
        named = parse(self.policy)
        if len(named) != 1 or not isinstance(named[0], Keep):
            raise CompositionError(
                f"less is trained with a keep, and {self.policy} is none",
                hint="name one that evicts: less(policy=h2o(recent_tokens=64))",
            )
        return named[0]

    def open(self, place: Place, batch: int, device: torch.device) -> LESSState:
        """See ``Residue.open``."""
        return LESSState(self.rank, place, batch, device)

    def predict_bytes(self, place: Place, batch: int) -> int:
        """See ``Residue.predict_bytes``: the same however many tokens are evicted."""
        return batch * place.sizes.heads * self.rank * (place.sizes.value_dim + 1) * torch.float32.itemsize

    def calibration_bytes(self, place: Place, dtype: torch.dtype) -> int:
        """See ``CacheTechnique.calibration_bytes``: two matrices for each head, and the keys' last one."""
        sizes = place.sizes
        of_head = self.hidden_units * (sizes.key_dim + self.rank)
        return ((sizes.query_heads + sizes.heads) * of_head + sizes.heads * self.rank**2) * dtype.itemsize

    @torch.no_grad()
    def fit(self, model: PreTrainedModel, texts: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """See ``Calibrated.fit``: each layer by itself; what it meets on all texts is held at a time.

        Raises:
            CompositionError: when ``policy`` is no keep.
            DataError: when it evicts nothing of any text.
        """
        keep = self.keep()
        generator = torch.Generator().manual_seed(self.seed)
        how = Training(self.rank, self.hidden_units, self.epochs, self.learning_rate, self.dropout)
        found = []
        for index, tensors in enumerate(tensors_for(keep, model.config, model.dtype)):
            samples = [sample_layer(model, text, index) for text in texts]
            lessons = [
                Lesson(sample, eviction_times(keep, sample, tensors), output_weight(sample.module).float())
                for sample in samples
            ]
            lessons = [lesson for lesson in lessons if lesson.evicts]
            if not lessons:
                raise DataError(
                    f"{keep} evicts nothing of texts of {max(text.shape[-1] for text in texts)} tokens",
                    hint="calibrate on longer texts, or train with a keep that keeps less: "
                    "less(policy=h2o(recent_tokens=16))",
                )
            found.append(train_maps(lessons, how, generator))
        return found

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[LESS]:
        """None: plans are made to save bytes, and this spends some beside a keep that the user has chosen."""
        return ()


class LESSState(ResidueState):
    """Sums over evicted tokens: features times values, and features."""

    def __init__(self, rank: int, place: Place, batch: int, device: torch.device) -> None:
        sizes = place.sizes
        self.place = place
        self.mixed = torch.zeros((batch, sizes.heads, rank, sizes.value_dim), dtype=torch.float32, device=device)
        self.norm = torch.zeros((batch, sizes.heads, rank, 1), dtype=torch.float32, device=device)

    def absorb(self, tokens: Tokens, gone: Tensor) -> None:
        """See ``ResidueState.absorb``."""
        for start in range(0, tokens.count, ABSORBED_TOKENS):
            part = tokens.part(start, start + ABSORBED_TOKENS)
            features = key_features(part.keys, self.place.tensors)
            features = (features * gone[:, :, start : start + ABSORBED_TOKENS, None]).mT
            self.mixed += features @ part.values.float()
            self.norm += features.sum(dim=-1, keepdim=True)

    def answer(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """See ``ResidueState.answer``: where nothing is evicted yet, a score of minus infinity."""
        features = query_features(query, self.place.tensors).unflatten(1, (self.norm.shape[1], -1)).flatten(2, 3)
        weight = features @ self.norm
        return weight.log(), features @ self.mixed / weight.clamp(min=torch.finfo(torch.float32).tiny)

    def tensors(self) -> Iterator[Tensor]:
        """See ``ResidueState.tensors``."""
        yield from (self.mixed, self.norm)

    def over_batch_(self, change: Callable[[Tensor], Tensor]) -> None:
        """See ``ResidueState.over_batch_``."""
        self.mixed, self.norm = change(self.mixed), change(self.norm)
