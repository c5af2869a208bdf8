"""Pretraining by every method of the optim wing: the text of the embedded model, the same tokens, perplexity.

Run with ``python -m benchmarks.optim_pretraining``; run again it goes on where it stopped (``--again`` measures anew).
At the smaller size every method is trained at each of three learning rates from seed 0, and at the best one from seeds
1 and 2; at the larger size once, at the rate that was best at the smaller. The rule for the other hyperparameters is in
``optim_methods``.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from benchmarks.journal import Journal
from benchmarks.optim_methods import (
    Way,
    chosen,
    paper_ratio,
    peers,
    schedule,
    state_bytes,
    verdict,
    ways,
    weight_bytes,
)
from benchmarks.rows import append_rows
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from pintpot.core.errors import PintpotError, TrainingError
from pintpot.core.workload import Pretrain
from pintpot.ledger.predict import Assembled
from pintpot.ledger.steps import train_step
from pintpot.reference import data
from pintpot.reference.corpus import corpus_hash, read_corpus
from pintpot.reference.material import encode_documents

BATCH, TOKENS, WINDOWS, SEEDS = 4, 64, 128, (0, 1, 2)
STAMPS = ("hardware", "versions", "commit", "date")
Figures = dict[str, Any]
Runs = tuple[Figures, ...]


@dataclass(frozen=True)
class Size:
    """A Llama and how long it is trained."""

    hidden: int
    layers: int
    steps: int

    def build(self, seed: int) -> LlamaForCausalLM:
        """The model with random weights, heads of 32."""
        torch.manual_seed(seed)
        heads = self.hidden // 32
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=data.tokenizer().get_vocab_size(),
                hidden_size=self.hidden,
                intermediate_size=(8 * self.hidden // 3 + 31) // 32 * 32,
                num_hidden_layers=self.layers,
                num_attention_heads=heads,
                num_key_value_heads=heads,
                max_position_embeddings=256,
                use_cache=False,
            )
        )

    @cached_property
    def name(self) -> str:
        """How the model is listed."""
        model = self.build(0)
        total, inner = (sum(p.numel() for p in m.parameters()) for m in (model, model.model.layers))
        return f"llama {self.hidden}x{self.layers}, {total / 1e6:.2f}M parameters ({inner / 1e6:.2f}M in blocks)"

    @property
    def workload(self) -> Pretrain:
        """Batch, tokens and steps."""
        return Pretrain(batch=BATCH, tokens=TOKENS, steps=self.steps)


SIZES = {"1M": Size(hidden=96, layers=5, steps=250), "4M": Size(hidden=224, layers=5, steps=500)}


@lru_cache(maxsize=1)
def corpus() -> tuple[Tensor, Tensor, float, str]:
    """Training tokens, held-out windows, bytes per held-out token, and the corpus in words."""
    training, held_out = read_corpus()
    tokens = torch.from_numpy(encode_documents(data.tokenizer(), training)).long()
    test = data.held_out_tokens()
    starts = np.linspace(0, len(test) - TOKENS, WINDOWS).astype(int)
    size = sum(len(document.text.encode()) for document in held_out) / len(test)
    windows = torch.from_numpy(np.stack([test[s : s + TOKENS] for s in starts]))
    return tokens, windows, size, f"python standard library {corpus_hash(training)[:8]}"


def windows_of(seed: int) -> Iterator[Tensor]:
    """Random windows of the training text, the same for the same seed."""
    tokens = corpus()[0]
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(0, len(tokens) - TOKENS, (BATCH,), generator=generator)
        yield torch.stack([tokens[s : s + TOKENS] for s in starts])


def train(make: Callable[[nn.Module], Assembled], size: Size, seed: int) -> Figures:
    """Held-out nats per token after the steps (infinite where training diverged), bytes and seconds."""
    job = make(size.build(seed))
    model, optimizer = job.model, job.optimizer
    assert optimizer is not None
    rates = schedule(optimizer, size.steps)
    state, start = 0, time.process_time()
    try:
        for step, ids in zip(range(size.steps), windows_of(seed), strict=False):
            train_step(model, optimizer, ids, ids, scope=job.scope)
            rates.step()
            # Not at the end only: a selection forgets its moments when its turn is over.
            state = max(state, state_bytes(optimizer)) if step % 7 == 1 else state
    except TrainingError:
        return {"nats": math.inf, "state": state, "weights": weight_bytes(model), "seconds": 0.0}
    seconds = time.process_time() - start
    with torch.no_grad():
        losses = [float(model.eval()(input_ids=ids, labels=ids).loss) for ids in corpus()[1].split(32)]
    nats = statistics.fmean(losses)
    held = {"state": state, "weights": weight_bytes(model), "seconds": seconds}
    return {"nats": nats if math.isfinite(nats) else math.inf, **held}


def run(journal: Journal, size: Size, way: Way, rate: float, seed: int) -> Figures:
    """One run of one of our methods."""
    what = {"way": way.config, "rate": rate, "seed": seed, "model": size.name, **protocol(size)}
    return journal.once(what, lambda: train(lambda m: way.assemble(m, size.workload, rate, seed), size, seed))


def run_peer(journal: Journal, size: Size, name: str, rate: float, seed: int) -> Figures:
    """One run of the peer of a technique."""
    package, make = peers(size.hidden, size.steps)[name]
    what = {"way": f"{package} for {name}", "rate": rate, "seed": seed, "model": size.name, **protocol(size)}
    return journal.once(what, lambda: train(lambda m: Assembled(model=m, optimizer=make(m, rate)), size, seed))


def protocol(size: Size) -> dict[str, Any]:
    """What else decides the figures."""
    return {"data": f"{corpus()[3]}, {size.steps} steps of {BATCH}x{TOKENS} tokens", "windows": WINDOWS}


@dataclass(frozen=True)
class Result:
    """A method's runs at its best rate, one for each seed, and its peer's."""

    way: Way
    rate: float
    runs: Runs
    rivals: Runs = ()


def mean(runs: Runs) -> float:
    """Mean perplexity."""
    return statistics.fmean(math.exp(min(run["nats"], 300.0)) for run in runs)


def deviation(runs: Runs) -> float:
    """Standard deviation of the perplexity."""
    return statistics.stdev(math.exp(min(run["nats"], 300.0)) for run in runs)


def error(runs: Runs) -> float:
    """Standard error of the mean perplexity as a fraction of it; 0 for one run, which does not tell."""
    return deviation(runs) / mean(runs) / math.sqrt(len(runs)) if len(runs) > 1 else 0.0


def rows(result: Result, base: Result, size: Size) -> list[dict[str, Any]]:
    """A method's rows: perplexity, its deviation, bits per byte, and bytes."""
    name, seeds = result.way.name, len(result.runs)
    paper = paper_ratio(name)
    tried = ", ".join(f"{rate:g}" for rate in result.way.rates)
    where = "" if seeds > 1 else f" at {SIZES['1M'].hidden}x{SIZES['1M'].layers}"
    common = {
        "technique": name,
        "config": f"{result.way.config}, lr={result.rate:g} (best of {tried}{where})",
        "model": size.name,
        "data": protocol(size)["data"],
        "context_tokens": TOKENS,
        "seed": f"0-{seeds - 1}" if seeds > 1 else "0",
        "baseline": f"torch AdamW, lr={base.rate:g}",
        "peer": peers(size.hidden, size.steps)[name][0] if result.rivals else "",
        "peak_bytes": result.runs[0]["state"],
        "seconds": f"{statistics.fmean(run['seconds'] for run in result.runs):.4g}",
        **{key: result.runs[-1][key] for key in STAMPS},
    }
    to_bits = 1 / (math.log(2) * corpus()[2])
    measures: dict[tuple[str, str], Callable[[Runs], float]] = {
        ("held-out perplexity", "per token"): mean,
        (f"standard deviation of the perplexity over {seeds} seeds", "per token"): deviation,
        ("held-out bits per byte", "bits"): lambda runs: statistics.fmean(r["nats"] for r in runs) * to_bits,
        ("optimizer state", "bytes"): lambda runs: runs[0]["state"],
        ("weights and optimizer state", "bytes"): lambda runs: runs[0]["weights"] + runs[0]["state"],
    }
    made = []
    for (metric, unit), of in measures.items():
        if of is deviation and seeds == 1:
            continue
        ours, theirs = of(result.runs), of(base.runs)
        ratio = ours / theirs if theirs else math.nan
        row = {**common, "metric": metric, "unit": unit, "value": f"{ours:.7g}", "baseline_value": f"{theirs:.7g}"}
        row["peer_value"] = f"{of(result.rivals):.7g}" if result.rivals else ""
        row["status"] = f"{ratio:.3f} of AdamW"
        if of is mean:
            row["paper_value"] = paper[1] if paper else ""
            row["status"] = verdict(ratio, ratio * math.hypot(error(result.runs), error(base.runs)), paper)
        if result.way.name == base.way.name:
            row["status"] = "baseline"
        made.append(row)
    return made


def small(journal: Journal, way: Way) -> Result:
    """The grid from seed 0, then the other seeds at the best rate, and the peer at it."""
    size = SIZES["1M"]
    grid = {rate: run(journal, size, way, rate, SEEDS[0]) for rate in way.rates}
    rate = min(grid, key=lambda r: grid[r]["nats"])
    runs = (grid[rate], *(run(journal, size, way, rate, seed) for seed in SEEDS[1:]))
    rivals = [run_peer(journal, size, way.name, rate, s) for s in SEEDS if way.name in peers(size.hidden, size.steps)]
    return Result(way, rate, runs, tuple(rivals))


def large(journal: Journal, way: Way, rate: float) -> Result:
    """One run from the first seed, and the peer's."""
    size = SIZES["4M"]
    rivals = [run_peer(journal, size, way.name, rate, SEEDS[0])] if way.name in peers(size.hidden, size.steps) else []
    return Result(way, rate, (run(journal, size, way, rate, SEEDS[0]),), tuple(rivals))


def listed(size: Size, only: str) -> list[Way]:
    """What is trained."""
    return chosen(ways(size.workload, size.hidden, size.layers), only)


def main() -> None:
    """Train every method at both sizes and write its rows as soon as its runs are done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="1M,4M", help="which sizes, comma-separated; 4M needs the rates of 1M")
    parser.add_argument("--only", default="", help="methods, comma-separated, beside torch AdamW")
    parser.add_argument("--steps", type=int, help="steps at both sizes instead of " + _STEPS)
    parser.add_argument("--again", action="store_true", help="measure anew what is there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.steps:
        SIZES.update({name: replace(size, steps=options.steps) for name, size in SIZES.items()})
    found = listed(SIZES["1M"], options.only)
    rivals = sum(way.name in peers(SIZES["1M"].hidden, 1) for way in found)
    totals = {"1M": len(found) * (len(found[0].rates) + 2) + 3 * rivals, "4M": len(found) + rivals}
    journal = Journal("optim_pretraining", totals["1M"], again=options.again)
    rates: dict[str, float] = {}
    bases: dict[str, Result] = {}
    for name in ("1M", "4M"):
        if name == "4M" and "4M" in options.sizes.split(","):
            journal = Journal("optim_pretraining", totals["4M"], again=options.again)
        elif name == "4M":
            continue
        for way in listed(SIZES[name], options.only):
            try:
                result = small(journal, way) if name == "1M" else large(journal, way, rates[way.name])
            except PintpotError as error_:
                print(f"{way.name}: {error_}", flush=True)
                continue
            rates.setdefault(way.name, result.rate)
            base = bases.setdefault(name, result)
            append_rows("optim", rows(result, base, SIZES[name]))
            print(f"{name} {way.name}: {mean(result.runs):.2f} against AdamW {mean(base.runs):.2f}", flush=True)


_STEPS = " and ".join(f"{size.steps} ({name})" for name, size in SIZES.items())

if __name__ == "__main__":
    main()
