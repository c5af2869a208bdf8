"""KVSharer: layers attend to the keys and values of another, dissimilar, earlier layer and hold none of their own.

Source:    Yang et al. 2024, "KVSharer: Efficient Inference via Layer-Wise Dissimilar KV Cache Sharing",
           arXiv:2410.18517; the search as in the authors' code (number of layers and threshold too).
Differs:   a layer that shares still computes its own keys and values, which are let go (the authors' modelling code
           skips that: memory is saved as there, computation is not). With a keep, the layer that holds the tokens
           judges them by its own queries.
Saves:     kv_cache, real: a layer that shares holds nothing. While a prompt is read, the dense keys and values of each
           layer that others attend to wait until the last of them has (at most as many layers as share).
Shapes:    none of its own: one number for each layer.
Composes:  any keep and any store that treats each layer by itself.
Use when:  deep models, contexts that are long for the weights; layers can be spared beside fewer tokens or bits.
Not when:  there are few layers with full attention, or quality must not change at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import PretrainedConfig, PreTrainedModel

from pintpot.cache._base import LayerSharing, Place
from pintpot.cache.attention import use_cache_attention
from pintpot.cache.build import build_cache
from pintpot.cache.calibration import Calibrated, found_for
from pintpot.cache.geometry import FULL, has_full_attention, layer_kinds
from pintpot.cache.layer import CacheLayer
from pintpot.core.errors import CompositionError, DataError
from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Claim, Source, technique
from pintpot.core.workload import Workload

RISK_AT_QUARTER = 0.3
"""Relative rise of perplexity where a quarter of the layers share."""


@technique(
    name="kvsharer",
    wing="cache",
    part="layers",
    source=Source(
        "KVSharer: Efficient Inference via Layer-Wise Dissimilar KV Cache Sharing", year=2024, arxiv="2410.18517"
    ),
    accounts=[Account.KV_CACHE],
    removes=("every_layer",),
    claims=[
        Claim("computation of the cache saved", 0.30, versus="full cache", where="abstract"),
        Claim("generation speed", 1.3, versus="full cache", where="abstract"),
    ],
    fidelity="keys and values of layers that share are still computed",
)
@dataclass(frozen=True, kw_only=True)
class KVSharer(Calibrated, LayerSharing):
    """Sharing between dissimilar layers.

    Attributes:
        shared_layers: how many layers hold nothing; at most all but the first.
        threshold: the least cosine between the model's last hidden states with and without sharing.
    """

    shared_layers: int = 4
    threshold: float = 0.5

    def __post_init__(self) -> None:
        if self.shared_layers < 1:
            raise CompositionError(
                f"kvsharer: {self.shared_layers} shared layers save nothing", hint="share at least one: shared_layers=1"
            )
        if not -1 <= self.threshold < 1:
            raise CompositionError(
                f"kvsharer: a cosine is never above {self.threshold}", hint="the authors use threshold=0.5"
            )

    def acts_on(self, layers: int) -> bool:
        """See ``CacheTechnique.acts_on``: the first layer has no earlier one."""
        return layers > 1

    def shared(self, layers: int) -> int:
        """See ``LayerSharing.shared``."""
        return min(self.shared_layers, layers - 1)

    def owners(self, config: PretrainedConfig) -> list[int]:
        """See ``LayerSharing.owners``: as the calibration has found."""
        found = found_for(self, config)
        with unset_fake_temporarily():
            return [int(layer["owner"]) for layer in found.layers]

    def calibration_bytes(self, place: Place, dtype: torch.dtype) -> int:
        """See ``CacheTechnique.calibration_bytes``: who shares is read when the cache is built, and not held."""
        return 0

    @torch.no_grad()
    def fit(self, model: PreTrainedModel, texts: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """See ``Calibrated.fit``: the most dissimilar pairs of layers, as long as the last hidden states stay similar.

        Raises:
            CompositionError: when the model has a single layer with full attention.
            DataError: when fewer layers than asked for can share.
        """
        count = sum(layer.kind == FULL for layer in layer_kinds(model.config))
        if not self.acts_on(count):
            raise CompositionError("kvsharer needs two layers with full attention", hint="leave it out")
        owners = list(range(count))
        ranked = dissimilar_pairs(mean_caches(model, texts))
        with use_cache_attention(model):
            exact = [_last_hidden(model, text, owners) for text in texts]
            for upper, lower in ranked:
                if owners[upper] != upper:
                    continue
                tried = redirect(owners, upper, lower)
                now = (_last_hidden(model, text, tried) for text in texts)
                if mean_cosine(exact, now) > self.threshold:
                    owners = tried
                if len(set(owners)) == count - self.shared(count):
                    return [{"owner": torch.tensor(owner)} for owner in owners]
        raise DataError(
            f"only {count - len(set(owners))} of {self.shared(count)} layers can share with a cosine above "
            f"{self.threshold}",
            hint="share fewer layers, or lower the threshold",
        )

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """Near what was measured on the embedded model: 19 % with one layer of six, 48 % with two."""
        count = sum(layer.kind == FULL for layer in layer_kinds(shape.config))
        return RISK_AT_QUARTER * (4 * self.shared(count) / count) ** 1.4

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[KVSharer]:
        """An eighth, a quarter and three eighths of the layers, as far as these are different numbers."""
        if has_full_attention(shape.config):
            count = sum(layer.kind == FULL for layer in layer_kinds(shape.config))
            shares = {round(count * eighths / 8) for eighths in (1, 2, 3)}
            yield from (cls(shared_layers=shared) for shared in sorted(shares) if 0 < shared < count)


@dataclass(frozen=True, kw_only=True)
class _Tried(LayerSharing):
    """Owners as they are given, for trying them out."""

    facts = KVSharer.facts
    numbers: tuple[int, ...]

    def shared(self, layers: int) -> int:
        return layers - len(set(self.numbers))

    def owners(self, config: PretrainedConfig) -> list[int]:
        return list(self.numbers)


def _last_hidden(model: PreTrainedModel, text: Tensor, owners: Sequence[int]) -> Tensor:
    """The last hidden states (B, T, hidden) of a text, with these layers shared."""
    cache = build_cache(model.config, layers=_Tried(numbers=tuple(owners)))
    hidden: Tensor = model.base_model(text, past_key_values=cache, use_cache=True).last_hidden_state
    return hidden.float()


@torch.no_grad()
def mean_caches(model: PreTrainedModel, texts: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Keys and values (K, T, D) of each layer, the mean over all sequences, as long as the shortest text."""
    tokens = min(text.shape[-1] for text in texts)
    sums: list[list[Tensor]] = []
    for text in texts:
        cache = build_cache(model.config)
        with use_cache_attention(model):
            model.base_model(text[:, :tokens], past_key_values=cache, use_cache=True)
        held = [layer.stored.whole() for layer in cache.layers if isinstance(layer, CacheLayer)]
        found = [[states.float().sum(dim=0) for states in pair] for pair in held if pair is not None]
        both = zip(sums or [[torch.zeros(()), torch.zeros(())] for _ in found], found, strict=True)
        sums = [[a + b for a, b in zip(*pairs, strict=True)] for pairs in both]
    sequences = sum(text.shape[0] for text in texts)
    return [(keys / sequences, values / sequences) for keys, values in sums]


def dissimilar_pairs(caches: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[int, int]]:
    """Pairs of a layer and an earlier one, the greatest Euclidean distance of keys and values first."""

    def distance(pair: tuple[int, int]) -> float:
        upper, lower = (caches[layer] for layer in pair)
        return sum(float((a - b).norm(dim=-1).mean()) for a, b in zip(upper, lower, strict=True))

    pairs = [(upper, lower) for upper in range(len(caches)) for lower in range(upper)]
    return sorted(pairs, key=distance, reverse=True)


def redirect(owners: Sequence[int], upper: int, lower: int) -> list[int]:
    """Owners when ``upper`` attends to what ``lower`` attends to, and so does whoever attended to ``upper``."""
    return [owners[lower] if owner == upper else owner for owner in owners]


def mean_cosine(exact: Iterable[Tensor], now: Iterable[Tensor]) -> float:
    """The mean over texts of the cosine of all their hidden states, as one vector each."""
    cosines = [torch.cosine_similarity(a.flatten(), b.flatten(), dim=0) for a, b in zip(exact, now, strict=True)]
    return float(torch.stack(cosines).mean())
