"""Quality, bytes and speed of caches, beside transformers' own: dense, quanto and hqq.

Run with ``python -m benchmarks.cache [--model FOLDER] [--quick]``; writes ``results/cache.csv``.

Quality is measured after compression: a prompt is read into the cache without its last tokens, and those (the
question of a recall prompt, the last quarter of a text) are then read from the cache together with the answer. Every
method gets the same tokens in the same batches. Speed is measured on two layers of a 1B-parameter Llama's shape with
random weights.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from benchmarks.rows import append_rows, stamp
from torch import Tensor
from transformers import AutoModelForCausalLM, Cache, DynamicCache, LlamaConfig, PreTrainedModel, QuantizedCache

from pintpot import reference
from pintpot.cache import KIVI, LagKV, build_cache, cache_bytes, chunked_prefill, use_cache_attention
from pintpot.cache._base import Keep, Store
from pintpot.core.errors import BudgetError
from pintpot.core.expression import expression
from pintpot.ledger.reach import tensors_in
from pintpot.reference.corpus import read_corpus
from pintpot.reference.material import encode_documents
from pintpot.reference.tasks import KEY_WORDS, make_copy_prompt, make_recall_prompt, task_vocabulary
from pintpot.reference.tokenizer import load_tokenizer

BATCH = 8
DEPTHS = (0.05, 0.25, 0.5, 0.75, 0.95)
FRACTIONS = (0.5, 0.25, 0.125)
BASELINE = "DynamicCache"


@dataclass(frozen=True)
class Method:
    """One way to cache: names, what makes the cache (of a model, for so many tokens and sequences), who reads it."""

    technique: str
    config: str
    make: Callable[[PreTrainedModel, int, int], Cache]
    ours: bool = True
    peer: str = ""
    paper: float | str = ""


def ours(keep: Keep | None = None, store: Store | None = None, fraction: float | None = None) -> Method:
    """A composition; with a fraction, in that share of the dense cache's bytes."""

    def make(model: PreTrainedModel, tokens: int, batch: int) -> Cache:
        budget = None
        if fraction is not None:
            dense = cache_bytes(model.config, tokens, batch=batch, dtype=model.dtype, reserve_tokens=tokens)
            budget = round(dense * fraction)
        return build_cache(
            model.config, keep=keep, store=store, budget_bytes=budget, batch=batch, tokens=tokens, dtype=model.dtype
        )

    parts = [t for t in (keep, store) if t is not None]
    config = expression(parts) + ("" if fraction is None else f" in {fraction:.1%} of the dense bytes")
    bits = store.bits if isinstance(store, KIVI) and keep is None else None
    return Method(
        "*".join(t.name for t in parts),
        config,
        make,
        peer=f"quanto{bits}" if bits in (2, 4) else "",
        paper=0.9 if keep is not None and store is None and fraction == 0.125 else "",
    )


def theirs(backend: str, bits: int) -> Method:
    """The quantised cache of transformers with its defaults; hqq along the axis that it can pack."""
    axes = {"axis_key": 1, "axis_value": 1} if backend == "hqq" else {}
    name = f"{backend}{bits}"
    return Method(
        name, f"QuantizedCache {name}", lambda m, *_: QuantizedCache(backend, m.config, nbits=bits, **axes), ours=False
    )


DENSE = Method(BASELINE, BASELINE, lambda m, *_: DynamicCache(config=m.config), ours=False)
PEERS = [theirs("quanto", 4), theirs("quanto", 2), theirs("hqq", 4), theirs("hqq", 2)]
SHORT_LAG = LagKV(kept_fraction=1.0, lag_tokens=32)
OURS = [
    *(ours(store=KIVI(bits=b)) for b in (8, 4, 2)),
    *(ours(store=KIVI(bits=b, residual_length=32)) for b in (4, 2)),
    *(ours(keep=LagKV(kept_fraction=f)) for f in FRACTIONS),
    *(ours(keep=SHORT_LAG, fraction=f) for f in FRACTIONS),
    *(ours(keep=SHORT_LAG, store=KIVI(bits=4, residual_length=32), fraction=f) for f in (0.25, 0.125)),
    ours(keep=SHORT_LAG, store=KIVI(bits=2, residual_length=32), fraction=0.125),
]


def fits(model: PreTrainedModel, method: Method, tokens: int, batch: int = BATCH) -> bool:
    """Whether a method can be had in the bytes that it is given."""
    try:
        method.make(model, tokens, batch)
    except BudgetError as error:
        print(f"left out: {method.config}: {error.message}")
        return False
    return True


def attention(model: PreTrainedModel, method: Method) -> contextlib.AbstractContextManager[None]:
    return use_cache_attention(model) if method.ours else contextlib.nullcontext()


def held_bytes(cache: Cache) -> int:
    """Bytes of everything that a cache holds, whoever made it."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors_in(cache)}
    return sum(storages.values())


@torch.no_grad()
def logits_from_cache(
    model: PreTrainedModel, method: Method, context: Tensor, rest: Tensor
) -> tuple[Tensor, int, float]:
    """Logits (B, R, V) of the tokens ``rest`` (B, R) read from the cache of ``context`` (B, T), bytes, seconds."""
    begin = time.perf_counter()
    with attention(model, method):
        cache = method.make(model, context.shape[1] + rest.shape[1], len(context))
        chunked_prefill(model, context, cache, chunk_tokens=context.shape[1])
        logits = model(rest, past_key_values=cache, use_cache=True).logits
    return logits, held_bytes(cache), time.perf_counter() - begin


def tasks(folder: Path, context_tokens: int, prompts: int) -> Iterator[tuple[str, str, list[tuple[Tensor, Tensor]]]]:
    """Metric, unit, and batches of (tokens (B, T), labels (B, A) of the last tokens) with A answers at the end."""
    tokenizer = load_tokenizer(folder)
    words = task_vocabulary(tokenizer)
    filler = encode_documents(tokenizer, read_corpus()[1])
    for keys in (1, 4):
        for depth in DEPTHS:
            made = [
                make_recall_prompt(filler, words, tokens=context_tokens, depth=depth, seed=seed, keys=keys)
                for seed in range(prompts)
            ]
            name = f"recall of 1 of {keys} keys at depth {depth:.2f}"
            yield name, "accuracy", _batches([(p.input_ids, p.answer) for p in made])
    copies = [make_copy_prompt(words, tokens=context_tokens, seed=seed) for seed in range(prompts)]
    yield "copying, share of words right", "words", _batches([(p.input_ids, p.answer) for p in copies])
    every = len(filler) // prompts
    texts = [filler[i * every : i * every + context_tokens] for i in range(prompts)]
    quarter = context_tokens // 4
    yield (
        f"perplexity of the last {quarter} of {context_tokens} tokens",
        "perplexity",
        _batches([(t[:-quarter], t[-quarter:]) for t in texts]),
    )


def _batches(rows: list[tuple[np.ndarray, np.ndarray]]) -> list[tuple[Tensor, Tensor]]:
    return [
        tuple(torch.from_numpy(np.stack(part)).long() for part in zip(*rows[i : i + BATCH], strict=True))
        for i in range(0, len(rows), BATCH)
    ]


def question_tokens(folder: Path, unit: str) -> int:
    """Tokens at a prompt's end that are read from the cache, not into it."""
    words = task_vocabulary(load_tokenizer(folder))
    return {"accuracy": len(words.recall_mark) + KEY_WORDS, "words": len(words.copy_mark) + 1, "perplexity": 1}[unit]


def measure(
    model: PreTrainedModel, method: Method, unit: str, batches: list[tuple[Tensor, Tensor]], question: int
) -> tuple[float, int, float]:
    """The metric's value, bytes of the cache, seconds."""
    total, count, size, seconds = 0.0, 0, 0, 0.0
    for prompt, answer in batches:
        rest = torch.cat([prompt[:, -question:], answer[:, :-1]], dim=1)
        logits, size, took = logits_from_cache(model, method, prompt[:, :-question], rest)
        logits = logits[:, question - 1 :]
        seconds += took
        if unit == "perplexity":
            total += float(torch.nn.functional.cross_entropy(logits.transpose(1, 2), answer, reduction="sum"))
            count += answer.numel()
        else:
            right = logits.argmax(-1) == answer
            right = right.all(dim=1) if unit == "accuracy" else right
            total, count = total + float(right.sum()), count + right.numel()
    return (math.exp(total / count) if unit == "perplexity" else total / count), size, seconds


def status(unit: str, value: float, baseline: float, paper: float | str) -> str:
    if paper == "":
        return "no figure in the paper for this task"
    kept = value / baseline if baseline and unit != "perplexity" else baseline / value
    if kept >= float(paper):
        return f"matches: {kept:.2f} of the full cache's score kept"
    return f"differs: {kept:.2f} of the full cache's score kept, on a far smaller model and shorter context"


def quality(folder: Path, context_tokens: int, prompts: int, methods: list[Method]) -> list[dict]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:12]
    methods = [m for m in methods if fits(model, m, context_tokens)]
    rows = []
    for metric, unit, batches in tasks(folder, context_tokens, prompts):
        question = question_tokens(folder, unit)
        data = hashlib.sha256(b"".join(t.numpy().tobytes() for pair in batches for t in pair)).hexdigest()[:12]
        found = {m.config: measure(model, m, unit, batches, question) for m in methods}
        base = found[BASELINE]
        shown = {name: (round(v[0], 3), f"{v[1] / base[1]:.0%}") for name, v in found.items()}
        print(metric, shown, flush=True)
        for method in methods:
            value, size, seconds = found[method.config]
            peer = next((m for m in methods if m.technique == method.peer), None)
            rows.append(
                {
                    "technique": method.technique,
                    "config": method.config,
                    "model": f"{folder.name} {digest}",
                    "data": f"held-out text, {prompts} prompts, sha256 {data}",
                    "context_tokens": context_tokens,
                    "seed": 0,
                    "metric": metric,
                    "unit": unit,
                    "value": round(value, 4),
                    "baseline": BASELINE,
                    "baseline_value": round(base[0], 4),
                    "peer": peer.config if peer else "",
                    "peer_value": round(found[peer.config][0], 4) if peer else "",
                    "paper_value": method.paper,
                    "status": status(unit, value, base[0], method.paper) if method.ours else "peer",
                    "peak_bytes": size,
                    "seconds": round(seconds, 2),
                }
            )
    return rows


def speed_model() -> PreTrainedModel:
    """Two layers of a 1B-parameter Llama's attention, with thin feed-forward layers (they are not what is timed)."""
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=512,
        max_position_embeddings=32768,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def decode_seconds(model: PreTrainedModel, method: Method, context: Tensor, steps: int) -> tuple[float, float, int]:
    """Median seconds of one decoded token, seconds of prefill, bytes of the cache."""
    with attention(model, method):
        cache = method.make(model, context.shape[1] + steps, 1)
        begin = time.perf_counter()
        chunked_prefill(model, context, cache, chunk_tokens=1024 if method.ours else context.shape[1])
        prefill = time.perf_counter() - begin
        times = []
        for _ in range(steps):
            begin = time.perf_counter()
            model(context[:, :1], past_key_values=cache, use_cache=True)
            times.append(time.perf_counter() - begin)
    return sorted(times)[steps // 2], prefill, held_bytes(cache)


def speed(context_tokens: int, steps: int, methods: list[Method]) -> list[dict]:
    model = speed_model()
    context = torch.randint(0, 512, (1, context_tokens), generator=torch.Generator().manual_seed(0))
    methods = [m for m in methods if fits(model, m, context_tokens + steps, 1)]
    found = {m.config: decode_seconds(model, m, context, steps) for m in methods}
    rows = []
    for method in methods:
        decode, prefill, size = found[method.config]
        peer = next((m for m in methods if m.technique == method.peer), None)
        print(f"{method.config}: decode {decode * 1e3:.1f} ms, prefill {prefill:.2f} s, {size} bytes", flush=True)
        for metric, place in (("decode, one token", 0), ("prefill", 1)):
            rows.append(
                {
                    "technique": method.technique,
                    "config": method.config,
                    "model": "2 layers of a 1B Llama's attention, random float32 weights",
                    "data": "random tokens",
                    "context_tokens": context_tokens,
                    "seed": 0,
                    "metric": metric,
                    "unit": "seconds",
                    "value": round(found[method.config][place], 5),
                    "baseline": BASELINE,
                    "baseline_value": round(found[BASELINE][place], 5),
                    "peer": peer.config if peer else "",
                    "peer_value": round(found[peer.config][place], 5) if peer else "",
                    "paper_value": "",
                    "status": "no figure in the paper for a CPU" if method.ours else "peer",
                    "peak_bytes": size,
                    "seconds": round(decode * steps + prefill, 2),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=None, help="a model folder; the embedded model by default")
    parser.add_argument("--context", type=int, default=1000)
    parser.add_argument("--prompts", type=int, default=32, help="prompts of each task")
    parser.add_argument("--quick", action="store_true", help="few prompts and methods, nothing written")
    parser.add_argument("--only", choices=["quality", "speed"], default=None)
    options = parser.parse_args()
    folder = options.model or reference.path()
    methods = [DENSE, *PEERS, *OURS]
    if options.quick:
        methods = [DENSE, *OURS[1:3], OURS[-1]]

    def keep(rows: list[dict]) -> None:
        if not options.quick:
            print(append_rows("cache", [stamp(row) for row in rows]))

    if options.only != "speed":
        keep(quality(folder, options.context, 8 if options.quick else options.prompts, methods))
    if options.only != "quality":
        for context_tokens in (1024,) if options.quick else (1024, 4096):
            keep(speed(context_tokens, 5 if options.quick else 15, methods))


if __name__ == "__main__":
    main()
