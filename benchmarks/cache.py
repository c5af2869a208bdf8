"""Quality, bytes and speed of caches, beside transformers' own and NVIDIA's kvpress.

Run with ``python -m benchmarks.cache``; writes ``results/cache.csv``, and ``results/cache.jsonl`` as it goes: run again
it goes on where it stopped. ``cache_tasks`` says what is asked, ``cache_methods`` of which caches. Speed is measured on
two layers of a 1B-parameter Llama's shape with random weights, and the peak of reading a prompt on the same.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks.cache_memory import held_bytes, llama_1b, memory
from benchmarks.cache_methods import BASELINE, DENSE, Job, Method, Subject, chosen, dense_bytes, methods
from benchmarks.cache_peers import kvpress
from benchmarks.cache_rows import Measured, rows
from benchmarks.cache_tasks import BATCH, Reading, Task, calibration, make_tasks, parts, score, value
from benchmarks.journal import Journal
from benchmarks.rows import append_rows, stamp
from torch import Tensor
from transformers import AutoModelForCausalLM, Cache

from pintpot import reference
from pintpot.cache import prefill_in_pieces, use_cache_attention
from pintpot.core.errors import PintpotError

Once = Callable[[Mapping[str, Any], Callable[[], dict[str, Any]]], dict[str, Any]]
"""Measures what was not measured before, and adds where and when."""

SPEED_FRACTIONS = (None, 0.25, 1.0)
"""Keeps are timed at this share of the dense bytes."""


def attention(subject: Subject, method: Method) -> contextlib.AbstractContextManager[None]:
    return use_cache_attention(subject.model) if method.ours else contextlib.nullcontext()


def piece_tokens(cache: Cache, most: int) -> int:
    """Tokens that may be read at once, at most so many: some caches of a given size take a prompt in pieces."""
    limits = [layer.limit for layer in cache.layers if getattr(layer, "limit", None) is not None]
    return min([most, *(limit.piece_tokens for limit in limits if limit.piece_tokens is not None)])


@torch.no_grad()
def ask(subject: Subject, method: Method, task: Task, reading: Reading) -> tuple[list[list[float]], int]:
    """What each prompt gets for each question, and the bytes of the cache after the last."""
    tokens = reading.context.shape[1]
    found = []
    with attention(subject, method):
        cache = method.make(subject, Job(tokens, reading.asked, len(reading.context)))
        prefill_in_pieces(subject.model, reading.context, cache, chunk_tokens=piece_tokens(cache, tokens))
        for turn in reading.turns:
            logits = subject.model(turn.fed, past_key_values=cache, use_cache=True).logits
            found.append(score(task, logits[:, -turn.answer.shape[1] :], turn.answer))
    return [list(prompt) for prompt in zip(*found, strict=True)], held_bytes(cache)


def measure(subject: Subject, method: Method, task: Task) -> dict[str, Any]:
    """A task's figures: what each prompt got, the figure, its parts, bytes of one sequence, seconds."""
    scores, size, begin = [], 0, time.perf_counter()
    for reading in task.readings:
        got, held = ask(subject, method, task, reading)
        scores += got
        size = max(size, held // len(reading.context))
    model = subject.model
    return {
        "value": value(task.unit, scores),
        "parts": parts(task.unit, scores),
        "bytes": size,
        "asked_bytes": dense_bytes(model.config, task.readings[0].asked, 1, model.dtype),
        "seconds": round(time.perf_counter() - begin, 2),
        "scores": scores,
    }


def measured(subject: Subject, method: Method, tasks: Sequence[Task], once: Once) -> Measured:
    """A method on all tasks that it can do."""
    runs = {}
    for task in tasks:
        what = {"way": f"{method.config}, {task.metric}", "model": subject.name, "task": task.digest}
        try:
            runs[task.metric] = once(what, lambda task=task: measure(subject, method, task))
        except PintpotError as error:
            print(f"left out: {what['way']}: {error.message}", flush=True)
    kind = "ours" if method.ours else "transformers"
    return Measured(method.technique, method.config, runs, kind=kind, fraction=method.fraction)


def reference_subject(folder: Path) -> Subject:
    """The model whose answers are judged."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:12]
    return Subject(model, f"{folder.name} {digest}", calibration(folder))


def quality(folder: Path, options: argparse.Namespace) -> None:
    """Every method on every task; its rows are written as soon as it is done."""
    tasks = make_tasks(folder, options.context, options.prompts)
    subject = reference_subject(folder)
    about = {
        "model": subject.name,
        "data": f"held-out text, {options.prompts} prompts a task",
        "context_tokens": options.context,
    }
    presses = kvpress(folder, tasks, quick=options.quick, run=options.only != "quality")
    found = chosen(methods(subject.model.config, Job(options.context, 1, BATCH)), options.methods)
    if options.quick:
        found = found[:6] + found[-4:]
    if options.only == "kvpress":
        found = [DENSE]
    once: Once = lambda what, run: stamp(run())  # noqa: E731  # a journal's method otherwise
    if not options.quick:
        once = Journal("cache", len(found) * len(tasks), again=options.again).once
    dense = measured(subject, DENSE, tasks, once)
    rivals = list(presses)
    for method in found[1:]:
        mine = measured(subject, method, tasks, once)
        keep(rows(mine, tasks, rivals, dense, about), options)
    for rival in (dense, *presses):
        keep(rows(rival, tasks, [], dense, about), options)


@torch.no_grad()
def decode_seconds(subject: Subject, method: Method, context: Tensor, steps: int) -> tuple[float, float, int]:
    """Median seconds of one decoded token, seconds of prefill, bytes of the cache."""
    tokens = context.shape[1]
    with attention(subject, method):
        cache = method.make(subject, Job(tokens, steps, 1))
        begin = time.perf_counter()
        prefill_in_pieces(subject.model, context, cache, piece_tokens(cache, 1024 if method.ours else tokens))
        prefill = time.perf_counter() - begin
        times = []
        for _ in range(steps):
            begin = time.perf_counter()
            subject.model(context[:, :1], past_key_values=cache, use_cache=True)
            times.append(time.perf_counter() - begin)
    return sorted(times)[steps // 2], prefill, held_bytes(cache)


def speed(context_tokens: int, steps: int, options: argparse.Namespace) -> None:
    """Rows of decoding and prefill."""
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(0, 512, (16, 256), generator=generator)
    subject = Subject(llama_1b(512), "two layers of a 1B Llama, thin feed-forward", texts)
    context = torch.randint(0, 512, (1, context_tokens), generator=generator)
    every = chosen(methods(subject.model.config, Job(context_tokens, steps, 1)), options.methods)
    every = [m for m in every if m.fraction in SPEED_FRACTIONS]
    found: dict[str, tuple[float, float, int]] = {}
    for method in every[:6] if options.quick else every:
        try:
            found[method.config] = decode_seconds(subject, method, context, steps)
        except PintpotError as error:
            print(f"left out: {method.config}: {error.message}", flush=True)
            continue
        keep(speed_rows(method, found, context_tokens), options)


def speed_rows(
    method: Method, found: Mapping[str, tuple[float, float, int]], context_tokens: int
) -> list[dict[str, Any]]:
    """Rows of a method, beside the baseline and its peer where these were timed before."""
    made = []
    for metric, place in (("decode, one token", 0), ("prefill", 1)):
        row = {
            "technique": method.technique,
            "config": method.config,
            "model": "2 layers of a 1B Llama's attention, random float32 weights",
            "data": "random tokens",
            "context_tokens": context_tokens,
            "seed": 0,
            "metric": metric,
            "unit": "seconds",
            "value": f"{found[method.config][place]:.4g}",
            "baseline": BASELINE,
            "baseline_value": f"{found[BASELINE][place]:.4g}",
            "status": "no figure in the paper for a CPU" if method.ours else "peer",
            "peak_bytes": found[method.config][2],
        }
        if method.peer in found:
            row |= {"peer": method.peer, "peer_value": f"{found[method.peer][place]:.4g}"}
        made.append(stamp(row))
    return made


def keep(made: Sequence[dict[str, Any]], options: argparse.Namespace) -> None:
    """Show rows, and write them unless the run is a quick one."""
    for row in made:
        print(f"{row['config']} | {row['metric']}: {row['value']} | {row['status']}", flush=True)
    if made and not options.quick:
        append_rows("cache", list(made))


def main() -> None:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=None, help="a model folder; the embedded model by default")
    parser.add_argument("--context", type=int, default=1000)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384], help="contexts that are timed")
    parser.add_argument("--prompts", type=int, default=32, help="prompts of each task")
    parser.add_argument(
        "--methods", default="", help="techniques, comma-separated, beside the baseline; all by default"
    )
    parser.add_argument("--quick", action="store_true", help="few prompts and methods, nothing written")
    parser.add_argument("--again", action="store_true", help="measure anew what is there")
    parser.add_argument(
        "--only",
        choices=["quality", "kvpress", "speed", "memory"],
        default=None,
        help="one part: quality takes kvpress's figures as they are there, and kvpress measures only these",
    )
    options = parser.parse_args()
    if options.quick:
        options.prompts = min(options.prompts, 8)
    if options.only in (None, "quality", "kvpress"):
        quality(options.model or reference.path(), options)
    if options.only in (None, "speed"):
        for context_tokens in (1024,) if options.quick else options.lengths:
            speed(context_tokens, 5 if options.quick else 15, options)
    if options.only in (None, "memory"):
        keep(memory(1024 if options.quick else 4096, options.quick), options)


if __name__ == "__main__":
    main()
