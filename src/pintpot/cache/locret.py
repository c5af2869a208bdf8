"""Locret: a small trained head beside each layer's attention says how much later text will want a token.

Source:    Huang et al. 2024, "Locret: Enhancing Eviction in Long-Context LLM Inference with Trained Retaining Heads",
           arXiv:2410.01805; sizes and training of the authors' code (huangyuxiang03/Locret).
Differs:   tokens are judged once, in chunks of a fixed share that survives for good, where the authors keep the best of
           all so far within a fixed size. Calibration texts have no answers: the last ``answer_fraction`` of each takes
           their place. The layers' heads are trained one after the other, each on its own part of the joint loss.
Saves:     kv_cache, real: evicted tokens are gone. Heads are held in the model's dtype, and one float32 number for
           every pending token of every head.
Shapes:    features of a token: its queries, keys and values of all heads, before rotation, (B, T, H * D + 2 * K * D);
           its scores (B, T, K).
Composes:  any store; tokens are evicted before they are packed.
Use when:  very long prompts that are read in pieces: a score never waits for what comes later.
Not when:  there is no text like the model's work to train on, or prompts are shorter than the stabilisers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from pintpot.cache._base import Place, Seen
from pintpot.cache.calibration import Calibrated, LayerSample, sample_layer
from pintpot.cache.forecast import places_of
from pintpot.cache.fraction import ChunkedKeep
from pintpot.cache.geometry import layer_kinds
from pintpot.cache.rotary import Rotary
from pintpot.core.errors import CompositionError
from pintpot.core.ledger import Account
from pintpot.core.technique import Claim, Source, technique

SCORE_TOKENS = 1024
"""Tokens that are scored together: bounds the temporaries."""

SMOOTHING = 0.0025
"""Weight of the difference between the scores of neighbouring tokens in the loss."""

WARM_UP = 2 / 3
"""Share of the training steps in which the step size rises; it falls to nothing in the others."""


@technique(
    name="locret",
    wing="cache",
    part="keep",
    source=Source(
        "Locret: Enhancing Eviction in Long-Context LLM Inference with Trained Retaining Heads",
        year=2024,
        arxiv="2410.01805",
    ),
    accounts=[Account.KV_CACHE],
    claims=[
        Claim("memory of the cache (times smaller)", 20, versus="full cache", at="Phi-3-mini-128K", where="abstract"),
        Claim("memory of the cache (times smaller)", 8, versus="full cache", at="Llama-3.1-8B", where="abstract"),
    ],
    fidelity="a share of each chunk survives for good; trained layer by layer on text without answers",
)
@dataclass(frozen=True, kw_only=True)
class Locret(Calibrated, ChunkedKeep):
    """Retaining heads.

    Attributes:
        kept_fraction: share of the tokens before the stabilisers that survives.
        stabilizer_tokens: recent tokens that stay whatever their score.
        hidden_units: of a retaining head.
        training_steps: each on one calibration text, taken in turn.
        learning_rate: at its highest.
        answer_fraction: last part of a calibration text, whose attention the heads learn to foresee.
        sink_tokens: first tokens that stay without being judged; the paper has none.
        seed: of the heads before training.
    """

    # A guess: keeps that do not see the question lose most of the recall, of which a fifth counts.
    risk_at_half: ClassVar[float] = 0.1
    traces: ClassVar[int] = 1
    free_after_fit: ClassVar[tuple[str, ...]] = ("kept_fraction", "chunk_tokens", "stabilizer_tokens", "sink_tokens")
    needs_rotary: ClassVar[bool] = True
    kept_fraction: float = 0.125
    stabilizer_tokens: int = 2500
    hidden_units: int = 1024
    training_steps: int = 3000
    learning_rate: float = 5e-4
    answer_fraction: float = 0.25
    sink_tokens: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.hidden_units, self.training_steps) < 1 or not 0 < self.answer_fraction < 1:
            raise CompositionError(
                f"locret cannot train {self.hidden_units} units in {self.training_steps} steps to foresee "
                f"{self.answer_fraction} of a text",
                hint="use at least one unit and one step, and a fraction between 0 and 1",
            )

    @property
    def recent(self) -> int:
        """See ``Keep.recent``."""
        return self.stabilizer_tokens

    def calibration_bytes(self, place: Place, dtype: torch.dtype) -> int:
        """See ``CacheTechnique.calibration_bytes``: two matrices."""
        sizes = place.sizes
        features = (sizes.query_heads + sizes.heads) * sizes.key_dim + sizes.heads * sizes.value_dim
        return self.hidden_units * (features + sizes.heads) * dtype.itemsize

    def trace(self, seen: Seen) -> Tensor:
        """See ``Keep.trace``: a token's score, from itself alone, when it comes."""
        tokens, query = seen.tokens, seen.call.query
        new = min(query.shape[2], tokens.count)
        fresh = tokens.part(tokens.count - new)
        parts = []
        for start in range(0, new, SCORE_TOKENS):
            part = fresh.part(start, start + SCORE_TOKENS)
            stop = query.shape[2] - new + start
            given = features(
                query[:, :, stop : stop + part.count], part.keys, part.values, part.positions, seen.place.rotary
            )
            parts.append(retaining_scores(given, seen.place.tensors))
        scores = torch.cat(parts, dim=1).mT[..., None]
        if tokens.trace is None or new == tokens.count:
            return scores
        return torch.cat([tokens.trace[:, :, : tokens.count - new], scores], dim=2)

    def score(self, seen: Seen) -> Tensor:
        """See ``Keep.score``: what was noted when the tokens came.

        Raises:
            ValueError: when nothing was noted.
        """
        if seen.tokens.trace is None:
            raise ValueError("locret scores by its notes, and none were taken")
        return seen.tokens.trace[:, :, : seen.decided, 0]

    def fit(self, model: PreTrainedModel, texts: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """See ``Calibrated.fit``: the features of one layer on all texts are held at a time, in float32."""
        generator = torch.Generator().manual_seed(self.seed)
        layers = len(places_of(layer_kinds(model.config), None, None))
        return [self._train([sample_layer(model, text, i) for text in texts], generator) for i in range(layers)]

    def _train(self, samples: list[LayerSample], generator: torch.Generator) -> dict[str, Tensor]:
        """The retaining head of one layer."""
        lessons = [lesson(sample, self.answer_fraction) for sample in samples]
        place, device = samples[0].place, samples[0].keys.device
        sizes = (self.hidden_units, lessons[0][0].shape[-1]), (place.sizes.heads, self.hidden_units)
        head = {
            name: (torch.randn(size, generator=generator) * 0.02).to(device).requires_grad_()
            for name, size in zip(("inner", "outer"), sizes, strict=True)
        }
        optimizer = torch.optim.AdamW(head.values(), lr=self.learning_rate, betas=(0.9, 0.95))
        warm_up = max(1, int(WARM_UP * self.training_steps))
        rest = max(1, self.training_steps - warm_up)
        schedule = LambdaLR(optimizer, lambda step: min((step + 1) / warm_up, (self.training_steps - step) / rest))
        with torch.enable_grad():
            for step in range(self.training_steps):
                given, wanted = lessons[step % len(lessons)]
                scores = retaining_scores(given, head)
                regression = functional.smooth_l1_loss(scores, wanted) / place.layers
                loss = regression + SMOOTHING * functional.mse_loss(scores[:, :-1], scores[:, 1:])
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_value_(head.values(), 0.5)
                optimizer.step()
                schedule.step()
        return {name: weight.detach() for name, weight in head.items()}


def features(query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, rotary: Rotary | None) -> Tensor:
    """Queries (B, H, T, D), keys and values (B, K, T, D) of tokens side by side, the rotation off: (B, T, I)."""
    if rotary is not None:
        query, keys = rotary.unrotate(query, positions).to(values.dtype), rotary.unrotate(keys, positions)
    return torch.cat([part.to(values.dtype).transpose(1, 2).flatten(2) for part in (query, keys, values)], dim=-1)


def retaining_scores(given: Tensor, head: Mapping[str, Tensor]) -> Tensor:
    """Scores (B, T, K), float32, of features (B, T, I)."""
    inner = functional.silu(functional.linear(given.to(head["inner"].dtype), head["inner"]))
    return functional.linear(inner, head["outer"]).float()


def lesson(sample: LayerSample, answer_fraction: float) -> tuple[Tensor, Tensor]:
    """Features (B, T, I) of a text's tokens before its answer, and what the answer wants of them, (B, T, K).

    A key-value head's target is the highest score, before the softmax, that any query of the answer gives the token.
    """
    tokens = sample.keys.shape[2]
    before = min(tokens - 1, max(1, int((1 - answer_fraction) * tokens)))
    keys = sample.keys[:, :, :before]
    queries = (sample.queries[:, :, before:].float() * sample.call.scaling).unflatten(1, (keys.shape[1], -1))
    pieces = keys.float().split(SCORE_TOKENS, dim=2)
    wanted = torch.cat([(queries @ piece[:, :, None].mT).amax(dim=(2, 3)) for piece in pieces], dim=-1)
    given = features(
        sample.queries[:, :, :before],
        keys,
        sample.values[:, :, :before],
        sample.positions[..., :before],
        sample.place.rotary,
    )
    return given.float(), wanted.mT
