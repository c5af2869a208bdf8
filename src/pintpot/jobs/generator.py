"""A loaded model that continues prompts, token by token.

Shapes:  B sequences at once, T prompt tokens. Prompts of one batch are run together only when they are of equal
         length, so that no technique ever meets padding and each sequence gives what it gives alone.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pintpot.core.errors import DataError, ShapeError
from pintpot.jobs.documents import Messages, render
from pintpot.jobs.sampling import Sampling, next_tokens
from pintpot.ledger import steps
from pintpot.ledger.predict import Assembled

Prompt = str | Messages | Sequence[int]
"""A text, a conversation, or token ids."""

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What decoding gives for the first bytes of a character whose last bytes are still to come."""


@dataclass(frozen=True, kw_only=True)
class GenerateSettings:
    """How to generate.

    Attributes:
        new_tokens: at most so many for each prompt.
        batch: prompts at once.
        sampling: how tokens are chosen.
        stop_at_end: stop at the model's end-of-text token.
        task: that a merged model is switched to; what its tasks share when ``None``.
    """

    new_tokens: int = 128
    batch: int = 1
    sampling: Sampling = field(default_factory=Sampling)
    stop_at_end: bool = True
    task: str | None = None


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What one prompt gave.

    Attributes:
        text: the new text.
        tokens: its token ids.
        prompt_tokens: length of the prompt.
        ended: whether the model ended by itself.
    """

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    ended: bool


@dataclass(kw_only=True)
class Speed:
    """Seconds and tokens of the calls so far, prefill and decoding apart."""

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0

    def prefill(self, tokens: int, seconds: float) -> None:
        """Add a prefill."""
        self.prefill_tokens += tokens
        self.prefill_seconds += seconds

    def decode(self, tokens: int, seconds: float) -> None:
        """Add a decoding step."""
        self.decode_tokens += tokens
        self.decode_seconds += seconds

    def to_dict(self) -> dict[str, float]:
        """Seconds, and tokens per second where there were any."""
        return {
            "prefill_seconds": self.prefill_seconds,
            "prefill_tokens_per_second": self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else 0.0,
            "decode_seconds": self.decode_seconds,
            "decode_tokens_per_second": self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0,
        }


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """The token ids of a prompt.

    Raises:
        DataError: when it has no tokens.
    """
    if isinstance(prompt, str):
        ids = list(tokenizer(prompt)["input_ids"])
    elif prompt and isinstance(prompt[0], dict):
        text = render(tokenizer, prompt, answer=True)  # type: ignore[arg-type]  # its turns are dictionaries
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    else:
        ids = [int(token) for token in prompt]  # type: ignore[arg-type]  # what is left is a list of numbers
    if not ids:
        raise DataError("the prompt is empty", hint="give some text to continue")
    return ids


def require_length(config: Any, prompt_tokens: int, new_tokens: int) -> None:
    """Refuse more tokens than the model has positions for.

    Raises:
        ShapeError: when prompt and new tokens together are more.
    """
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and prompt_tokens + new_tokens > longest:
        raise ShapeError(
            f"a prompt of {prompt_tokens} tokens and {new_tokens} new ones are more than the {longest} "
            "that the model was made for",
            hint="shorten the prompt, or ask for fewer new tokens",
        )


class Generator:
    """A model with its tokenizer and cache, ready to complete prompts.

    Args:
        live: the assembled model.
        tokenizer: the model's.
        settings: how to generate.
    """

    def __init__(self, live: Assembled, tokenizer: PreTrainedTokenizerBase, settings: GenerateSettings) -> None:
        self.live = live
        self.tokenizer = tokenizer
        self.settings = settings
        self.speed = Speed()
        self._ends = _end_tokens(live.model, tokenizer) if settings.stop_at_end else frozenset()

    def stream(self, prompt: Prompt) -> Iterator[str]:
        """The new text of one prompt, piece by piece as it comes (whole characters only)."""
        written: list[int] = []
        yield from self._pieces(self._encode(prompt), written)

    def complete_streaming(self, prompt: Prompt, on_text: Callable[[str], None]) -> Completion:
        """The completion of one prompt, of which ``on_text`` gets each new piece as it comes."""
        ids = self._encode(prompt)
        written: list[int] = []
        for piece in self._pieces(ids, written):
            on_text(piece)
        return self._completion(len(ids), written)

    def _pieces(self, ids: list[int], written: list[int]) -> Iterator[str]:
        """Pieces of new text; ``written`` is filled with the new tokens."""
        shown = ""
        for tokens in self._run([ids]):
            written.append(int(tokens[0]))
            text = self._text(written)
            if not text.endswith(_UNFINISHED) and len(text) > len(shown):
                yield text[len(shown) :]
                shown = text
        rest = self._text(written)[len(shown) :]
        if rest:
            yield rest

    def _text(self, tokens: Sequence[int]) -> str:
        kept = itertools.takewhile(lambda token: token not in self._ends, tokens)
        return str(self.tokenizer.decode(list(kept), skip_special_tokens=True))

    def complete(self, prompts: Sequence[Prompt]) -> list[Completion]:
        """The completions of prompts, in their order."""
        rows = [self._encode(prompt) for prompt in prompts]
        order = sorted(range(len(rows)), key=lambda place: (len(rows[place]), place))
        done: dict[int, Completion] = {}
        for _, group in itertools.groupby(order, key=lambda place: len(rows[place])):
            places = list(group)
            for first in range(0, len(places), self.settings.batch):
                chosen = places[first : first + self.settings.batch]
                done |= zip(chosen, self._complete([rows[place] for place in chosen]), strict=True)
        return [done[place] for place in range(len(rows))]

    def _encode(self, prompt: Prompt) -> list[int]:
        ids = encode_prompt(self.tokenizer, prompt)
        require_length(self.live.model.config, len(ids), self.settings.new_tokens)
        return ids

    def _complete(self, rows: list[list[int]]) -> list[Completion]:
        new = torch.cat(list(self._run(rows)), dim=1).tolist()
        return [self._completion(len(row), tokens) for row, tokens in zip(rows, new, strict=True)]

    def _completion(self, prompt_tokens: int, tokens: list[int]) -> Completion:
        end = next((place for place, token in enumerate(tokens) if token in self._ends), None)
        kept = tuple(tokens[:end])
        return Completion(text=self._text(kept), tokens=kept, prompt_tokens=prompt_tokens, ended=end is not None)

    def _run(self, rows: list[list[int]]) -> Iterator[Tensor]:
        """New tokens (B, 1) of prompts of equal length, until all have ended or there are enough."""
        model, sampling = self.live.model, self.settings.sampling
        device = next(model.parameters()).device
        tokens = torch.tensor(rows, device=device)
        random = sampling.generator(device)
        ended = [False] * len(rows)
        with self.live.scope():
            progress = None
            for _ in range(self.settings.new_tokens):
                began = time.perf_counter()
                if progress is None:
                    progress = self.live.prefill(tokens)
                    self.speed.prefill(tokens.numel(), time.perf_counter() - began)
                else:
                    progress = steps.decode(model, tokens, progress)
                    self.speed.decode(tokens.numel(), time.perf_counter() - began)
                tokens = next_tokens(progress.logits, sampling, random)
                yield tokens
                ended = [was or int(token) in self._ends for was, token in zip(ended, tokens[:, 0], strict=True)]
                if all(ended):
                    return


def _end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens at which a model ends, by its generation settings, else by its tokenizer."""
    settings = getattr(model, "generation_config", None)
    ends = tokenizer.eos_token_id if settings is None or settings.eos_token_id is None else settings.eos_token_id
    return frozenset(() if ends is None else ends if isinstance(ends, list) else (ends,))
