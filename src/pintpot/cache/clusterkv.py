"""ClusterKV: recall tokens by clusters of similar keys, not by where they stand in the text.

Source:    Liu et al. 2024, "ClusterKV: Manipulating LLM KV Cache in Semantic Space for Recallable Compression",
           arXiv:2412.03213, and the authors' code (github.com/sjtu-zhao-lab/ClusterKV).
Differs:   the query heads of a key-value head recall the same clusters, by the mean of their queries (an option of the
           authors' code); tokens at the end of a prompt that do not fill a window are clustered with those that
           follow, as coarsely; a cluster without keys keeps its centroid; of the clusters that were recalled, those of
           the last query stay on the device.
Saves:     kv_cache, real: all tokens but the first and recent ones leave the device, and as many as a query recalls
           stay there with one centroid for ``cluster_tokens`` tokens. They are in host memory under a GPU, on disk
           under a model in host memory, each cluster in one piece.
Shapes:    centroids (B, K, C, D), sizes (B, K, C) for C clusters; rows on the tier (B, K, T, 2 D).
Composes:  any keep that keeps as much in all layers.
Use when:  long prompts of which each answer needs some places; the question may come later.
Not when:  the context is hardly longer than what is recalled, or the folder for temporary files is itself in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from pintpot.cache._base import Place, StoreState
from pintpot.cache.dense import Dense, DenseState
from pintpot.cache.geometry import FULL, has_full_attention, layer_kinds
from pintpot.cache.recall import RecallState, RecallStore, recalled_bytes
from pintpot.cache.tokens import Tokens
from pintpot.core.ledger import Account, Tier
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Claim, Source, technique
from pintpot.core.workload import Workload

SIMILAR_AT_ONCE = 4 << 20
"""Similarities of keys and centroids (float32 numbers) that are held at once."""


@technique(
    name="clusterkv",
    wing="cache",
    part="store",
    source=Source(
        "ClusterKV: Manipulating LLM KV Cache in Semantic Space for Recallable Compression",
        year=2024,
        arxiv="2412.03213",
    ),
    accounts=[Account.KV_CACHE],
    claims=[
        Claim("latency", 2.0, versus="full cache", at="32K tokens, 1K to 2K recalled", where="abstract"),
        Claim("decoding throughput", 2.5, versus="full cache", at="32K tokens, 1K to 2K recalled", where="abstract"),
    ],
    fidelity="clusters are shared by the query heads of a key-value head; the end of a prompt waits for its window",
    needs=("even_layers", "even_heads"),
)
@dataclass(frozen=True, kw_only=True)
class ClusterKV(RecallStore):
    """Clusters of keys on a slower tier.

    Attributes:
        budget_tokens: tokens that a query attends to, the first ones included and the recent ones not; up to so many
            attention is exact.
        sink_tokens: first tokens, which stay on the device.
        window_tokens: tokens that are clustered together as they come.
        cluster_tokens: tokens of a cluster on average (the authors' tests have 400 clusters for 32K tokens).
        iterations: of k-means.
        seed: of the keys that k-means begins with.
        dense_layers: lowest layers that are left as they are.
    """

    in_order: ClassVar[bool] = False
    budget_tokens: int = 1024
    sink_tokens: int = 16
    window_tokens: int = 320
    cluster_tokens: int = 80
    iterations: int = 20
    seed: int = 0
    dense_layers: int = 2

    def __post_init__(self) -> None:
        self.require(window_tokens=self.window_tokens, cluster_tokens=self.cluster_tokens, iterations=self.iterations)
        self.require(clusters=self.clusters(self.window_tokens), sink_tokens=self.sink_tokens + 1)

    @property
    def first(self) -> int:
        """See ``RecallStore.first``."""
        return self.sink_tokens

    @property
    def group(self) -> int:
        """See ``RecallStore.group``."""
        return self.window_tokens

    @property
    def recalled(self) -> int:
        """See ``RecallStore.recalled``."""
        return self.budget_tokens - self.sink_tokens

    def clusters(self, tokens: int) -> int:
        """Clusters of so many tokens."""
        return tokens // self.window_tokens * (self.window_tokens // self.cluster_tokens)

    def acts_on(self, layers: int) -> bool:
        """See ``CacheTechnique.acts_on``."""
        return layers > self.dense_layers

    def open(self, place: Place) -> StoreState:
        """See ``Store.open``."""
        if place.index < self.dense_layers:
            return DenseState(place.reserve_tokens, place.grow_tokens)
        return ClusterState(self, place)

    def predict_bytes(self, tokens: int, place: Place, batch: int, dtype: torch.dtype) -> int:
        """See ``Store.predict_bytes``."""
        if place.index < self.dense_layers:
            return Dense().predict_bytes(tokens, place, batch, dtype)
        return super().predict_bytes(tokens, place, batch, dtype)

    def tier_bytes(self, tokens: int, place: Place, batch: int, dtype: torch.dtype) -> dict[Tier, int]:
        """See ``Store.tier_bytes``."""
        return {} if place.index < self.dense_layers else super().tier_bytes(tokens, place, batch, dtype)

    def index_bytes(self, tokens: int, place: Place, batch: int, dtype: torch.dtype) -> int:
        """See ``RecallStore.index_bytes``: centroids, sizes, and what was recalled last."""
        filed = self.filed(tokens, place)
        centroids = self.clusters(filed) * batch * place.sizes.heads * (place.sizes.key_dim * dtype.itemsize + 4)
        return centroids + recalled_bytes(min(filed, self.recalled), place.sizes, batch, dtype)

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """In inverse proportion to the tokens that are recalled.

        On the embedded model, 1,000 tokens, perplexity did not rise at 256, 128 or 64 tokens, and recall of a key fell
        to 0.83, 0.75 and 0.33; this is put between the two.
        """
        return 5.0 / self.budget_tokens

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[ClusterKV]:
        """2K to 256 tokens; none for a model without full attention."""
        if has_full_attention(shape.config):
            layers = sum(layer.kind == FULL for layer in layer_kinds(shape.config))
            for tokens in (2048, 1024, 512, 256):
                yield cls(budget_tokens=tokens, dense_layers=2 if layers > 8 else 0)


class ClusterState(RecallState):
    """Clusters in the order in which they were made, each one run on the tier."""

    method: ClusterKV

    def __init__(self, method: ClusterKV, place: Place) -> None:
        super().__init__(method, place)
        self.centroids: Tensor | None = None
        self.sizes: Tensor | None = None

    def file(self, tokens: Tokens) -> None:
        """See ``RecallState.file``: in the order of their clusters."""
        method = self.method
        centroids, labels = cluster(tokens.keys, method.clusters(tokens.count), method.iterations, method.seed)
        sizes = torch.zeros(centroids.shape[:3], dtype=torch.int32, device=labels.device)
        sizes.scatter_add_(2, labels, torch.ones_like(labels, dtype=torch.int32))
        known = self.centroids is not None and self.sizes is not None
        self.centroids = torch.cat([self.centroids, centroids], dim=2) if known else centroids  # type: ignore[list-item]
        self.sizes = torch.cat([self.sizes, sizes], dim=2) if known else sizes  # type: ignore[list-item]
        order = labels.argsort(dim=-1, stable=True)
        self.put(tokens, order)

    def choose(self, query: Tensor, count: int) -> Tensor:
        """See ``RecallState.choose``: whole clusters by the product of query and centroid, the last one cut off."""
        if self.centroids is None or self.sizes is None:
            raise ValueError("nothing was clustered yet")
        scores = (query.sum(dim=2, keepdim=True) @ self.centroids.float().transpose(-1, -2)).squeeze(2)
        order = scores.argsort(dim=-1, descending=True, stable=True)
        sizes = self.sizes.long()
        begins = (sizes.cumsum(dim=-1) - sizes).gather(-1, order)
        ends = sizes.gather(-1, order).cumsum(dim=-1)
        wanted = torch.arange(count, device=query.device).expand(*order.shape[:2], -1).contiguous()
        which = torch.searchsorted(ends, wanted, right=True)
        before = ends - sizes.gather(-1, order)
        return begins.gather(-1, which) + wanted - before.gather(-1, which)

    def tensors(self) -> Iterator[Tensor]:
        """See ``StoreState.tensors``."""
        yield from super().tensors()
        if self.centroids is not None and self.sizes is not None:
            yield from (self.centroids, self.sizes)

    def over_batch_(self, change: Callable[[Tensor], Tensor]) -> None:
        """See ``StoreState.over_batch_``."""
        super().over_batch_(change)
        if self.centroids is not None and self.sizes is not None:
            self.centroids, self.sizes = change(self.centroids), change(self.sizes)


def cluster(keys: Tensor, count: int, iterations: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """K-means by the cosine between keys and centroids, which are means of keys.

    Args:
        keys: (B, K, T, D), any float dtype.
        count: clusters, at most T.
        iterations: of assigning keys and averaging them.
        seed: of the keys that are the first centroids, the same tokens in all heads.

    Returns:
        Centroids (B, K, count, D) in the keys' dtype, and the cluster of each key, int64 (B, K, T).
    """
    starts = torch.randperm(keys.shape[2], generator=torch.Generator().manual_seed(seed))[:count]
    centroids = keys[:, :, starts.to(keys.device)].float()
    for _ in range(iterations):
        labels = _nearest(keys, centroids)
        totals, members = torch.zeros_like(centroids), centroids.new_zeros(centroids.shape[:3])
        for part, at in zip(
            keys.split(_rows(keys, count), dim=2), labels.split(_rows(keys, count), dim=2), strict=True
        ):
            totals.scatter_add_(2, at[..., None].expand(-1, -1, -1, keys.shape[3]), part.float())
            members.scatter_add_(2, at, torch.ones_like(at, dtype=members.dtype))
        centroids = torch.where(members[..., None] > 0, totals / members.clamp(min=1)[..., None], centroids)
    centroids = centroids.to(keys.dtype)
    return centroids, _nearest(keys, centroids.float())


def _rows(keys: Tensor, count: int) -> int:
    """Keys that are compared with all centroids at once."""
    return max(1, SIMILAR_AT_ONCE // (keys.shape[0] * keys.shape[1] * max(count, keys.shape[3])))


def _nearest(keys: Tensor, centroids: Tensor) -> Tensor:
    """The centroid of the greatest cosine for each key: the key's own length makes no difference."""
    directions = functional.normalize(centroids, dim=-1).transpose(-1, -2)
    return torch.cat(
        [(part.float() @ directions).argmax(dim=-1) for part in keys.split(_rows(keys, centroids.shape[2]), dim=2)],
        dim=2,
    )
