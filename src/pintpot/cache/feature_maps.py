"""Positive features of queries and keys whose products stand for attention weights, and how they are trained.

Source:  Dong et al. 2024, "LESS", arXiv:2402.09398; initialisation and training as in the authors' code
         (hdong920/LESS, train_kernels.py).
Shapes:  B batch, H query heads, K key-value heads, R = H / K, Q queries, T tokens, D head dim, U hidden units, F
         features. Maps: ``query_inner`` (H, D, U), ``query_outer`` (H, U, F), ``key_inner`` (K, D, U), ``key_outer``
         (K, U, F), ``key_mix`` (K, F, F).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import gelu

from pintpot.cache.calibration import LayerSample
from pintpot.cache.stream import SCORES_AT_ONCE

FIRST_SCALE = 1e-4
"""Of the features of keys before training: evicted tokens weigh next to nothing then."""

Maps = Mapping[str, Tensor]
Drop = Callable[[Tensor], Tensor]


def query_features(query: Tensor, maps: Maps, drop: Drop | None = None) -> Tensor:
    """Features of queries (B, H, Q, D): float32 (B, H, Q, F), at least 0."""
    return _two_layers(query, maps["query_inner"], maps["query_outer"], drop).abs().float()


def key_features(keys: Tensor, maps: Maps, drop: Drop | None = None) -> Tensor:
    """Features of keys (B, K, T, D): float32 (B, K, T, F), at least 0."""
    return (_two_layers(keys, maps["key_inner"], maps["key_outer"], drop) @ maps["key_mix"]).abs().float()


def _two_layers(given: Tensor, inner: Tensor, outer: Tensor, drop: Drop | None) -> Tensor:
    hidden = given.to(inner.dtype) @ inner
    return gelu(gelu(hidden if drop is None else drop(hidden)) @ outer)


@dataclass(frozen=True)
class Lesson:
    """A text, as one layer meets it.

    Attributes:
        sample: what the layer meets.
        times: for each token the number of the first one that no longer sees it, int64 (B, K, T).
        output: the weight behind attention, float32 (H * D, hidden).
    """

    sample: LayerSample
    times: Tensor
    output: Tensor

    @property
    def evicts(self) -> bool:
        """Whether any token of the text misses another."""
        return self.first < self.times.shape[-1]

    @property
    def first(self) -> int:
        """The first token that misses another."""
        return int(self.times.min())

    @cached_property
    def wanted(self) -> list[tuple[slice, Tensor]]:
        """What the layer gives for tokens that miss others, when nothing is evicted: float32 (B, Q, hidden) of some."""
        batch, heads, tokens, _ = self.sample.queries.shape
        count = max(1, SCORES_AT_ONCE // (batch * heads * tokens))
        blocks = [slice(start, min(tokens, start + count)) for start in range(self.first, tokens, count)]
        return [(rows, self.outputs(rows)) for rows in blocks]

    def features(self, maps: Maps, drop: Drop | None = None) -> Tensor:
        """Of the text's keys: float32 (B, K, T, F)."""
        return key_features(self.sample.keys.float(), maps, drop)

    def outputs(
        self, rows: slice, maps: Maps | None = None, features: Tensor | None = None, drop: Drop | None = None
    ) -> Tensor:
        """What the layer gives for some tokens: float32 (B, Q, hidden).

        Args:
            rows: which tokens.
            maps: of queries, whose products with the features of keys are the weights of evicted tokens; None where
                nothing is evicted.
            features: of the text's keys.
            drop: of hidden units.
        """
        query, keys = self.sample.queries[:, :, rows].float(), self.sample.keys.float()
        call, heads = self.sample.call, keys.shape[1]
        scores = (query * call.scaling).unflatten(1, (heads, -1)) @ keys[:, :, None].mT
        if call.softcap is not None:
            scores = (scores / call.softcap).tanh() * call.softcap
        own = torch.arange(rows.start, rows.stop, device=keys.device)[:, None]
        scores = scores.masked_fill(torch.arange(keys.shape[2], device=keys.device) > own, -torch.inf)
        # Relative to the greatest score, and never to less than 0, so that no exponential is too large.
        base = scores.amax(dim=-1, keepdim=True).clamp(min=0)
        weights = (scores - base).exp()
        if maps is not None and features is not None:
            products = query_features(query, maps, drop).unflatten(1, (heads, -1)) @ features[:, :, None].mT
            weights = torch.where(self.times[:, :, None, None] <= own, products * (-base).exp(), weights)
        norm = weights.sum(dim=-1, keepdim=True)
        if call.sinks is not None:
            norm = norm + (call.sinks.float().reshape(heads, -1, 1, 1) - base).exp()
        out = (weights @ self.sample.values[:, :, None].float()) / norm
        return out.flatten(1, 2).transpose(1, 2).flatten(2) @ self.output

    def losses(self, maps: Maps, features: Tensor, drop: Drop | None = None) -> Iterator[Tensor]:
        """Parts of the mean squared error of what the layer gives, of some tokens at a time; see ``outputs``."""
        count = sum(wanted.numel() for _, wanted in self.wanted)
        for rows, wanted in self.wanted:
            yield (self.outputs(rows, maps, features, drop) - wanted).square().sum() / count


@dataclass(frozen=True)
class Training:
    """How maps are trained, with the authors' values where they are not the user's.

    Attributes:
        features: F.
        hidden_units: U.
        epochs: over the texts.
        learning_rate: at first; it is halved every ``half_after`` epochs.
        dropout: of hidden units.
        half_after: epochs.
    """

    features: int
    hidden_units: int
    epochs: int
    learning_rate: float
    dropout: float
    half_after: int = 10


def train_maps(lessons: Sequence[Lesson], how: Training, generator: torch.Generator) -> dict[str, Tensor]:
    """Maps with which the layer gives nearly what it gives when nothing is evicted.

    A tenth of the texts is held out, and the epoch that does best on them is taken.

    Args:
        lessons: all of the same layer.
        how: to train.
        generator: of what the maps are before training, and of what is dropped.

    Returns:
        float32 maps.
    """
    parts = _first_parts(lessons[0], how, generator)
    scale = 1 / _mean_square(lessons)
    split = max(1, int(0.9 * len(lessons)))
    held_out = lessons[split:] or lessons
    optimizer = torch.optim.Adam(parts.values(), lr=how.learning_rate)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, how.half_after, gamma=0.5)
    best: dict[str, Tensor] = {}
    least = math.inf

    def drop(hidden: Tensor) -> Tensor:
        kept = torch.rand(hidden.shape, generator=generator).to(hidden.device) >= how.dropout
        return hidden * kept / (1 - how.dropout)

    for _ in range(how.epochs):
        for index in torch.randperm(split, generator=generator).tolist():
            optimizer.zero_grad()
            with torch.enable_grad():
                _backward(lessons[index], _folded(parts), drop if how.dropout else None, scale)
            optimizer.step()
        schedule.step()
        maps = {name: held.detach().clone() for name, held in _folded(parts).items()}
        error = _error(held_out, maps)
        if error < least or not best:
            best, least = maps, error
    return best


def _backward(lesson: Lesson, maps: Maps, drop: Drop | None, scale: float) -> None:
    """Gradients of the loss of one text, whose keys are mapped once for all parts of it."""
    features = lesson.features(maps, drop)
    given = features.detach().requires_grad_()
    for loss in lesson.losses(maps, given, drop):
        (loss * scale).backward()
    features.backward(given.grad)


@torch.no_grad()
def _error(lessons: Sequence[Lesson], maps: Maps) -> float:
    return sum(float(loss) for lesson in lessons for loss in lesson.losses(maps, lesson.features(maps)))


def _mean_square(lessons: Sequence[Lesson]) -> float:
    """Of what is wanted: Adam ignores the scale of a loss only as long as gradients are well above its epsilon."""
    wanted = [states for lesson in lessons for _, states in lesson.wanted]
    return sum(float(states.square().sum()) for states in wanted) / sum(states.numel() for states in wanted) or 1.0


def _first_parts(lesson: Lesson, how: Training, generator: torch.Generator) -> dict[str, Tensor]:
    """What is trained, before training."""
    keys, query_heads = lesson.sample.keys, lesson.sample.queries.shape[1]
    heads, dim, units, count = keys.shape[1], keys.shape[-1], how.hidden_units, how.features

    def uniform(*sizes: int) -> Tensor:
        bound = math.sqrt(6 / (sizes[-2] + sizes[-1]))
        return (torch.rand(sizes, generator=generator) * 2 - 1).mul_(bound)

    parts = {
        "query_inner": uniform(query_heads, dim, units),
        "query_outer": uniform(query_heads, units, count),
        "key_inner": uniform(heads, dim, units),
        "key_outer": uniform(heads, units, count),
        "mix": uniform(heads, count, count),
        "scale": torch.full((heads, count, 1), FIRST_SCALE),
        "mix_scale": torch.full((heads, 1, count), FIRST_SCALE),
    }
    return {name: part.to(keys.device).requires_grad_() for name, part in parts.items()}


def _folded(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Maps of what is trained: the scales of keys and their last layer, with its bypass, are one matrix."""
    mix = parts["mix"]
    identity = torch.eye(mix.shape[-1], device=mix.device)
    folded = parts["scale"].abs() * (identity + mix * parts["mix_scale"])
    return {name: parts[name] for name in ("query_inner", "query_outer", "key_inner", "key_outer")} | {
        "key_mix": folded
    }
