"""What caches are judged by: batches of token ids, each split into what is read into the cache and what is asked after.

All prompts are made from seeds and held-out text, so every method, peers included, reads the same token ids. A cache
is compressed when its context has been read; questions come after that, and each goes on from the cache as the one
before left it. Right answers stand in the conversation whatever was predicted, so that one mistake does not make the
next question harder.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from pintpot.core.files import write_atomic
from pintpot.reference.corpus import read_corpus
from pintpot.reference.evaluate import recall_prompts
from pintpot.reference.material import encode_documents
from pintpot.reference.tasks import KEY_WORDS, IntArray, Prompt, Vocabulary, make_copy_prompt, task_vocabulary
from pintpot.reference.tokenizer import load_tokenizer

BATCH = 8
KEYS = 4
"""Planted lines of the multi-key recall."""

PLANTED = 8
"""Planted lines of the multi-turn recall."""

TURNS = 4
"""Questions of the multi-turn recall, one after the other."""

RECALL = ("recall of 1 key", f"recall of 1 of {KEYS} keys", f"{TURNS} questions on {PLANTED} keys, one after the other")
"""The tasks whose mean is a method's figure: words planted in a text, asked for after compression."""

MEAN = "mean accuracy of the three recall tasks"

CALIBRATION = (64, 512)
"""Windows of training text, and their tokens, for methods that are calibrated."""

LONGEST_TOKEN = 24
"""Characters of text that surely make a token."""


@dataclass(frozen=True)
class Turn:
    """One question, with its answer behind it.

    Attributes:
        fed: tokens that are read, int64 (B, F): what followed the last answer, the question, the answer but its end.
        answer: what the last A of these should predict, int64 (B, A).
    """

    fed: Tensor
    answer: Tensor


@dataclass(frozen=True)
class Reading:
    """Prompts of equal length.

    Attributes:
        context: what is read into the cache, int64 (B, C).
        turns: what is asked of it afterwards.
    """

    context: Tensor
    turns: tuple[Turn, ...]

    @property
    def asked(self) -> int:
        """Tokens that are read after the context."""
        return sum(turn.fed.shape[1] for turn in self.turns)


@dataclass(frozen=True)
class Task:
    """Prompts of one kind.

    Attributes:
        metric: what is measured, in words.
        unit: ``accuracy`` (share of questions answered right in full), ``words`` (share of right words) or
            ``perplexity``.
        readings: in batches; recall prompts by the depth of what is asked.
    """

    metric: str
    unit: str
    readings: tuple[Reading, ...]

    @property
    def digest(self) -> str:
        """Of all token ids and how they are split, sha256, 12 hex digits."""
        found = hashlib.sha256()
        for reading in self.readings:
            for ids in (reading.context, *(part for turn in reading.turns for part in (turn.fed, turn.answer))):
                found.update(f"{tuple(ids.shape)}".encode() + ids.numpy().tobytes())
        return found.hexdigest()[:12]


Scores = list[list[float]]
"""For each prompt and each of its questions: the share that is right, or nats per token."""


def score(task: Task, logits: Tensor, answer: Tensor) -> list[float]:
    """What each prompt of a batch gets for one answer (B, A), from the logits (B, A, V) that predict it."""
    if task.unit == "perplexity":
        losses = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), answer, reduction="none")
        return [round(float(nats), 5) for nats in losses.mean(dim=1)]
    right = logits.argmax(-1) == answer
    shares = right.all(dim=1).float() if task.unit == "accuracy" else right.float().mean(dim=1)
    return [round(float(share), 5) for share in shares]


def value(unit: str, scores: Scores) -> float:
    """A task's figure."""
    mean = float(np.mean(scores))
    return math.exp(min(mean, 300.0)) if unit == "perplexity" else mean


def parts(unit: str, scores: Scores) -> list[float]:
    """The figure of each question where there are several, else of each quarter of the prompts (by depth, rising)."""
    table = np.array(scores)
    split = table.T if table.shape[1] > 1 else np.array_split(table[:, 0], min(4, len(table)))
    return [round(value(unit, [list(part)]), 4) for part in split]


def make_tasks(folder: Path, context_tokens: int, prompts: int) -> list[Task]:
    """Every task, at so many tokens with all questions and answers (but the last answer's), so many prompts each."""
    return list(_tasks(folder, context_tokens, prompts))


def _tasks(folder: Path, tokens: int, prompts: int) -> Iterator[Task]:
    tokenizer = load_tokenizer(folder)
    words = task_vocabulary(tokenizer)
    filler = encode_documents(tokenizer, read_corpus()[1])
    question = len(words.recall_mark) + KEY_WORDS
    for name, keys in zip(RECALL[:2], (1, KEYS), strict=True):
        made = recall_prompts(filler, words, tokens=tokens, count=prompts, keys=keys)
        yield Task(name, "accuracy", _readings([_one_turn(p, question) for p in made]))
    spent = (TURNS - 1) * words.line_tokens
    made = recall_prompts(filler, words, tokens=tokens - spent, count=prompts, keys=PLANTED)
    yield Task(RECALL[2], "accuracy", _readings([_turns(p, words, seed) for seed, p in enumerate(made)]))
    copies = [make_copy_prompt(words, tokens=tokens, seed=seed) for seed in range(prompts)]
    copied = [_one_turn(p, len(words.copy_mark) + 1) for p in copies]
    yield Task("copying, share of words right", "words", _readings(copied))
    quarter = tokens // 4
    starts = np.linspace(0, len(filler) - tokens, prompts).astype(int)
    texts = [Prompt(filler[s : s + tokens - quarter], filler[s + tokens - quarter : s + tokens]) for s in starts]
    metric = f"perplexity of the last {quarter} of {tokens} tokens"
    yield Task(metric, "perplexity", _readings([_one_turn(p, 1) for p in texts]))


Split = tuple[IntArray, list[tuple[IntArray, IntArray]]]
"""A prompt's context, and what is fed and answered in each turn."""


def _one_turn(prompt: Prompt, question: int) -> Split:
    fed = np.concatenate([prompt.input_ids[-question:], prompt.answer[:-1]])
    return prompt.input_ids[:-question], [(fed, prompt.answer)]


def _turns(prompt: Prompt, words: Vocabulary, seed: int) -> Split:
    """The prompt's own question first, then those after the other lines planted in it, in an order by seed."""
    context = prompt.input_ids[: -len(words.recall_mark) - KEY_WORDS]
    first = np.concatenate([prompt.input_ids[len(context) + len(words.recall_mark) :], prompt.answer])
    others = [line for line in _planted(context, words) if (line != first).any()]
    chosen = np.random.default_rng([seed, len(context)]).permutation(len(others))[: TURNS - 1]
    turns, before = [], np.zeros(0, dtype=np.int64)
    for line in [first, *(others[index] for index in chosen)]:
        turns.append((np.concatenate([before, words.recall_mark, line[:-1]]), line[KEY_WORDS:]))
        before = np.array([line[-1], words.newline])
    return context, turns


def _planted(context: IntArray, words: Vocabulary) -> list[IntArray]:
    """Key and value words of the recall lines in a text."""
    size = len(words.recall_mark)
    windows = np.lib.stride_tricks.sliding_window_view(context, words.line_tokens)
    starts = (windows[:, :size] == words.recall_mark).all(axis=1) & (windows[:, -1] == words.newline)
    return [window[size:-1] for window in windows[starts]]


def _readings(rows: Sequence[Split]) -> tuple[Reading, ...]:
    def stacked(part: Sequence[IntArray]) -> Tensor:
        return torch.from_numpy(np.stack(part)).long()

    made = []
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        turns = zip(*(row[1] for row in batch), strict=True)
        pairs = (tuple(stacked(part) for part in zip(*turn, strict=True)) for turn in turns)
        made.append(Reading(stacked([row[0] for row in batch]), tuple(Turn(fed, answer) for fed, answer in pairs)))
    return tuple(made)


def write_prompts(file: Path, folder: Path, tasks: Sequence[Task], fractions: Sequence[float]) -> str:
    """Write everything that is read, for programs that cannot import ours: safetensors, the tasks in its metadata.

    Tensors are ``<task>/<batch>/context`` and ``<task>/<batch>/<turn>/fed`` and ``.../answer``, with tasks, batches and
    turns counted from 0, and ``calibration``, windows of training text. ``fractions`` are the shares of a context that
    are to be kept.

    Returns:
        The sha256 of names and tokens, 12 hex digits.
    """
    tensors = {"calibration": calibration(folder)}
    kept = ",".join(str(fraction) for fraction in fractions)
    facts = {"tasks": str(len(tasks)), "model": str(folder.resolve()), "fractions": kept}
    for index, task in enumerate(tasks):
        facts |= {f"{index}/metric": task.metric, f"{index}/unit": task.unit, f"{index}/digest": task.digest}
        facts[f"{index}/batches"] = str(len(task.readings))
        for batch, reading in enumerate(task.readings):
            tensors[f"{index}/{batch}/context"] = reading.context
            for turn, asked in enumerate(reading.turns):
                tensors[f"{index}/{batch}/{turn}/fed"] = asked.fed
                tensors[f"{index}/{batch}/{turn}/answer"] = asked.answer
    write_atomic(file, save({name: t.contiguous() for name, t in tensors.items()}, metadata=facts))
    held = b"".join(name.encode() + tensors[name].numpy().tobytes() for name in sorted(tensors))
    return hashlib.sha256(held).hexdigest()[:12]


@lru_cache(maxsize=1)
def calibration(folder: Path) -> Tensor:
    """The beginnings of training documents, spread evenly over those that are long enough, int64 (windows, tokens)."""
    count, tokens = CALIBRATION
    tokenizer = load_tokenizer(folder)
    longest = LONGEST_TOKEN * tokens
    documents = [document.text for document in read_corpus()[0] if len(document.text) >= longest]
    chosen = [documents[index * len(documents) // count] for index in range(count)]
    return torch.tensor([tokenizer.encode(text[:longest]).ids[:tokens] for text in chosen])
