"""A long conversation in several small caches, one for each of its topics: the session of EpiCache.

Source:  Kim et al. 2025, "EpiCache", arXiv:2509.17396; the steps as in apple/ml-epicache.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pintpot.cache._base import Store
from pintpot.cache.attention import use_cache_attention
from pintpot.cache.build import PintpotCache, build_cache
from pintpot.cache.epicache import EpiCache
from pintpot.core.errors import ShapeError

STARTS = 10
"""Times that clustering begins anew; the best result counts."""


@dataclass(frozen=True)
class Episode:
    """One topic of a conversation.

    Attributes:
        centre: mean of the embeddings of its segments, float32 (E,).
        segments: numbers of its segments, rising.
        prompt: token ids (1, P) that the conversation was judged by.
        cache: the whole conversation, as far as it matters to the topic.
    """

    centre: Tensor
    segments: tuple[int, ...]
    prompt: Tensor
    cache: PintpotCache


class EpisodicCaches:
    """Reads a conversation once for each of its topics, and answers each question from the nearest one's cache.

    Args:
        model: in evaluation mode.
        keep: sizes of episodes, blocks and caches; with ``similarities`` (from ``layer_similarities``), layers that
            mind eviction more keep more.
        store: how tokens are stored; None stores densely.
        embed: gives a vector (E,) for token ids (1, T), of a sentence encoder for instance; None takes the mean of
            the model's own last hidden states.
        instruction: token ids (1, n) in front of every episode's prompt, for instance of "Extract essential
            information from this conversation segment."
        seed: of the clustering.

    Attributes:
        episodes: what the conversation was divided into.
        conversation: token ids (1, T) read so far.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        keep: EpiCache,
        *,
        store: Store | None = None,
        embed: Callable[[Tensor], Tensor] | None = None,
        instruction: Tensor | None = None,
        seed: int = 0,
    ) -> None:
        self.model, self.keep, self.store, self.seed = model, keep, store, seed
        self._embed_with = embed or self._own_embedding
        self.instruction = instruction
        self.episodes: list[Episode] = []
        self.conversation = torch.empty((1, 0), dtype=torch.int64)

    def read(self, utterances: Sequence[Tensor]) -> None:
        """Read a conversation in place of what was read before.

        Args:
            utterances: token ids, int64 (1, T) each.

        Raises:
            ShapeError: when there is none, or they are not of one sequence each.
        """
        if not utterances or any(part.dim() != 2 or part.shape[0] != 1 or not part.numel() for part in utterances):
            raise ShapeError("a conversation is utterances of token ids (1, T)", hint="give at least one, none empty")
        size = self.keep.segment_utterances
        segments = [torch.cat(list(utterances[i : i + size]), dim=1) for i in range(0, len(utterances), size)]
        self.conversation = torch.cat(segments, dim=1)
        points = torch.stack([self.embedding(segment) for segment in segments])
        labels = clusters(points.numpy(), min(self.keep.episodes, len(segments)), self.seed)
        self.episodes = []
        for label in sorted(set(labels)):
            members = [number for number, other in enumerate(labels) if other == label]
            centre = points[members].mean(dim=0)
            nearest = (points[members] @ centre).argsort(descending=True)[: self.keep.medoid_segments]
            prompt = [segments[i] for i in sorted(members[int(number)] for number in nearest)]
            asked = torch.cat(([] if self.instruction is None else [self.instruction]) + prompt, dim=1)
            self.episodes.append(Episode(centre, tuple(members), asked, self._judged_by(asked)))

    def embedding(self, ids: Tensor) -> Tensor:
        """The direction of a text's meaning: float32 (E,) of length 1."""
        found = self._embed_with(ids).detach().float().cpu()
        return found / found.norm().clamp(min=torch.finfo(torch.float32).tiny)

    @torch.no_grad()
    def _own_embedding(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.model.base_model(ids, use_cache=False).last_hidden_state
        return hidden[0].float().mean(dim=0)

    @torch.no_grad()
    def _judged_by(self, prompt: Tensor) -> PintpotCache:
        """The conversation's cache, its tokens judged block by block by a prompt that is not kept."""
        cache = build_cache(self.model.config, keep=self.keep, store=self.store)
        with use_cache_attention(self.model), cache.aside(prompt.shape[1]):
            for block in self.conversation.split(self.keep.block_tokens, dim=1):
                ids = torch.cat([block, prompt], dim=1)
                self.model.base_model(ids, past_key_values=cache, use_cache=True)
        return cache

    def nearest(self, question: Tensor) -> int:
        """The number of the episode whose centre a question (1, T) is nearest to.

        Raises:
            ShapeError: when no conversation has been read.
        """
        if not self.episodes:
            raise ShapeError("no conversation has been read", hint="call read(utterances) first")
        asked = self.embedding(question)
        return max(range(len(self.episodes)), key=lambda number: float(self.episodes[number].centre @ asked))

    def answer(self, question: Tensor, **settings: object) -> Tensor:
        """The new tokens (1, n) that follow a question (1, T) on the conversation.

        The cache is copied for the answer, so that the next question finds it as it was.

        Args:
            question: token ids, with what the model expects before its answer.
            **settings: of transformers' ``generate``, for instance ``max_new_tokens``.
        """
        cache = copy.deepcopy(self.episodes[self.nearest(question)].cache)
        ids = torch.cat([self.conversation, question], dim=1)
        with use_cache_attention(self.model):
            out: Tensor = self.model.generate(ids, past_key_values=cache, **settings)  # type: ignore[operator]
        return out[:, ids.shape[1] :]

    def nbytes(self) -> int:
        """Bytes held by all caches."""
        return sum(episode.cache.nbytes() for episode in self.episodes)


def clusters(points: np.ndarray, count: int, seed: int) -> list[int]:
    """A label for each of points (n, E): k-means with k-means++ starts, the best of ``STARTS``."""
    # Imported here because it takes long to load.
    from scipy.cluster.vq import ClusterError, kmeans2

    count = min(count, len(np.unique(points, axis=0)))
    random = np.random.default_rng(seed)
    best: tuple[float, list[int]] | None = None
    for _ in range(STARTS):
        try:
            centres, labels = kmeans2(points, count, minit="++", missing="raise", seed=random)
        except ClusterError:
            continue
        spread = float(((points - centres[labels]) ** 2).sum())
        if best is None or spread < best[0]:
            best = spread, [int(label) for label in labels]
    # Every start has left a cluster empty.
    return clusters(points, count - 1, seed) if best is None else best[1]
