"""The most bytes that reading a prompt takes: a dense cache at once, beside ours in pieces."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from benchmarks.cache_methods import BASELINE, DENSE, Job, Method, Subject, ours, windows_for
from benchmarks.rows import stamp
from benchmarks.training_wings import live_peak
from torch import Tensor
from transformers import AutoModelForCausalLM, Cache, LlamaConfig, PreTrainedModel

from pintpot.cache import Keep, Store, prefill_in_pieces, use_cache_attention
from pintpot.core.expression import parse
from pintpot.core.registry import techniques
from pintpot.ledger.reach import tensors_in

PIECE_TOKENS = 256
READ = ("", "kivi(bits=4)", "kivi", "lagkv", "snapkv", "snapkv*kivi")
"""Expressions whose prefill is measured; a keep is given ``FRACTION`` of the dense bytes. Empty: a dense cache."""

FRACTION = 0.25
MODEL = "2 of the 16 layers of a 1B Llama, 512 words instead of 128,256, random float32 weights"


def llama_1b(intermediate: int, seed: int = 0) -> PreTrainedModel:
    """Two layers of Llama 3.2 1B's shape, with feed-forward layers of a given size, for 512 words."""
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=intermediate,
        num_hidden_layers=2,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=512,
        max_position_embeddings=32768,
    )
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).eval()


def prefill_peak(subject: Subject, method: Method, context: Tensor, piece: int) -> tuple[int, int]:
    """Most bytes of tensors that lived while a prompt (1, T) was read, beside the weights; the cache's at the end."""
    job = Job(context.shape[1], 1, 1)
    held = 0

    def work() -> None:
        nonlocal held
        cache = method.make(subject, job)
        prefill_in_pieces(subject.model, context, cache, chunk_tokens=piece)
        held = held_bytes(cache)

    with use_cache_attention(subject.model) if method.ours else contextlib.nullcontext():
        peak = live_peak(work)
    return peak, held


def held_bytes(cache: Cache) -> int:
    """Bytes of everything that a cache holds, whoever made it."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors_in(cache)}
    return sum(storages.values())


def readers(subject: Subject, tokens: int) -> list[tuple[Method, int]]:
    """What reads the prompt, and in pieces of how many tokens: the dense cache at once first."""
    found = [(DENSE, tokens), (DENSE, PIECE_TOKENS)]
    job = Job(tokens, 1, 1)
    known = techniques("cache")
    for text in READ:
        parts = list(parse(text)) if text and all(name.split("(")[0] in known for name in text.split("*")) else []
        keep = next((part for part in parts if isinstance(part, Keep)), None)
        if keep is not None:
            store = next((part for part in parts if isinstance(part, Store)), None)
            keep = windows_for(keep, store, subject.model.config, job, FRACTION, subject.model.dtype)
            parts = [part for part in (keep, store) if part is not None]
        if parts:
            found.append((ours(parts, FRACTION if keep is not None else None), PIECE_TOKENS))
    return found


def memory(tokens: int, quick: bool) -> list[dict[str, Any]]:
    """Rows of the peak of reading a prompt of so many tokens."""
    model = llama_1b(8192)
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(0, 512, (16, 256), generator=generator)
    subject = Subject(model, "two layers of a 1B Llama", texts)
    context = torch.randint(0, 512, (1, tokens), generator=generator)
    found = readers(subject, tokens)
    found = found[: 4 if quick else None]
    return rows([(m, piece, *prefill_peak(subject, m, context, piece)) for m, piece in found], tokens)


def rows(found: Sequence[tuple[Method, int, int, int]], tokens: int) -> list[dict[str, Any]]:
    """One row for each reader: method, tokens of a piece, peak, bytes of the cache."""
    base = found[0][2]
    made = []
    for method, piece, peak, held in found:
        pieces = "at once" if piece >= tokens else f"in pieces of {piece} tokens"
        row = {
            "technique": method.technique,
            "config": f"{method.config}, {pieces}",
            "model": MODEL,
            "data": "random tokens",
            "context_tokens": tokens,
            "seed": 0,
            "metric": "peak bytes of reading the prompt, beside the weights",
            "unit": "bytes",
            "value": peak,
            "baseline": f"{BASELINE}, at once",
            "baseline_value": base,
            "status": f"{peak / base:.3f} of {BASELINE} at once; the cache holds {held} bytes",
            "peak_bytes": peak,
        }
        print(f"{row['config']}: {row['status']}", flush=True)
        made.append(stamp(row))
    return made
