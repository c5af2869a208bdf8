"""Conversions of the embedded model's attention: perplexity and recall against bytes of the cache, beside the source.

Run with ``python -m benchmarks.cache_conversions [--quick] [--only NAME] [--steps N]``; writes ``results/cache.csv``.

Conversions are calibrated and trained on the training text of the embedded model, with its recall and copy rows mixed
in as in its own training, and judged on the held-out text. Where a conversion is trained, its figures before training
have rows of their own. Bytes are measured: what the model's own cache holds of one sequence.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from benchmarks.rows import append_rows, stamp
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from pintpot import reference
from pintpot.cache.conversions import Conversion, LoMA, MemoryForCausalLM, TransMLA, XEcoMLA
from pintpot.cache.conversions.memory import REPETITION
from pintpot.jobs.batches import Mixture, PackedText
from pintpot.jobs.convert import cache_bytes
from pintpot.jobs.load import no_progress_bars
from pintpot.jobs.training import TrainSettings, train, warmup_stable_decay
from pintpot.reference import data
from pintpot.reference.corpus import read_corpus
from pintpot.reference.evaluate import accuracy, next_token_losses
from pintpot.reference.material import encode_documents
from pintpot.reference.tasks import CopyRows, RecallRows

CONTEXT = 512
"""Tokens of the texts and prompts that are judged, and at which the cache is measured."""

BASELINE = "the source"
CALIBRATION = (64, 256)
"""Sequences, and their tokens, that activations are looked at on."""

TRAIN_TOKENS = 256
TRAIN_ROWS = (3, 2, 1)
"""Rows of text, recall and copying in a batch."""

Figures = dict[str, tuple[float, str]]
"""Value and unit, by metric."""


@dataclass(frozen=True)
class Case:
    """One conversion, with how it is trained, if at all."""

    method: Conversion
    rate: float = 0.0


@dataclass(frozen=True)
class State:
    """A converted model at one moment: what was done to it, its figures, and the seconds that both took."""

    text: str
    found: Figures
    seconds: float


CASES = [
    *(Case(TransMLA(rank=rank, rope_dim=rope)) for rank, rope in ((64, 64), (64, 32), (48, 32), (32, 32), (16, 16))),
    Case(XEcoMLA(rank=48, rope_dim=16), rate=2e-3),
    Case(XEcoMLA(rank=16, rope_dim=16), rate=2e-3),
    Case(XEcoMLA(rank=16, rope_dim=16, every=2), rate=2e-3),
    Case(XEcoMLA(energy=0.95, rope_dim=16), rate=2e-3),
    Case(LoMA(memory_tokens=8, compression_ratio=2), rate=2e-3),
    Case(LoMA(memory_tokens=2, compression_ratio=4), rate=2e-3),
]


def load_source(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def calibration(tokens: np.ndarray) -> list[Tensor]:
    count, length = CALIBRATION
    packed = PackedText(tokens, sequence_tokens=length, sequences=8, steps=count // 8)
    return [packed[step].input_ids for step in range(count // 8)]


def figures(model: PreTrainedModel, prompts: int) -> Figures:
    """What a model is judged by, without a cache: it then gives what it gives with its own."""
    held_out = data.held_out_tokens()
    every = len(held_out) // prompts
    rows = torch.from_numpy(np.stack([held_out[i * every : i * every + CONTEXT] for i in range(prompts)]))
    losses = torch.cat([next_token_losses(model, part) for part in rows.split(4)])
    found: Figures = {f"perplexity of {CONTEXT} tokens": (math.exp(float(losses.mean())), "perplexity")}
    for keys in (1, 4):
        asked = data.recall_prompts(CONTEXT, prompts, keys=keys)
        found[f"recall of 1 of {keys} keys"] = (accuracy(model, asked), "accuracy")
    found["bytes of the cache for each token"] = (cache_bytes(model, CONTEXT, torch.bfloat16) / CONTEXT, "bytes")
    if isinstance(model, MemoryForCausalLM):
        found["tokens of a zone given back from its memory"] = (given_back(model, rows), "share")
    return found


@torch.no_grad()
def given_back(model: MemoryForCausalLM, rows: Tensor) -> float:
    """The share of tokens in full zones that the repetition after their memory gives right."""
    rows = rows[:, : CONTEXT // model.config.zone_tokens * model.config.zone_tokens]
    right = []
    for part in rows.split(4):
        hidden, layout = model.lay_out(model.get_input_embeddings()(part), repeat=True)
        places = layout.places[REPETITION]
        right.append((model.lm_head(hidden[:, places]).argmax(-1) == part[:, layout.position[places]]).float())
    return float(torch.cat(right).mean())


def trained(case: Case, model: PreTrainedModel, teacher: PreTrainedModel, tokens: np.ndarray, steps: int) -> str:
    """Train a converted model in place; what was done, for the row."""
    module = case.method.objective(model, teacher)
    if module is None:
        return ""
    filler, text = (PackedText(tokens, sequence_tokens=TRAIN_TOKENS, seed=seed) for seed in (1, 2))
    words = data.vocabulary()
    recall = RecallRows(filler, words, sequence_tokens=TRAIN_TOKENS, seed=3)
    copies = CopyRows(words, sequence_tokens=TRAIN_TOKENS, seed=4)
    train(
        module,
        Mixture([(text, TRAIN_ROWS[0]), (recall, TRAIN_ROWS[1]), (copies, TRAIN_ROWS[2])], steps=steps),
        torch.optim.AdamW(module.parameters(), lr=case.rate, weight_decay=0.0),
        warmup_stable_decay(warmup=max(1, steps // 20), decay=steps // 2, steps=steps),
        TrainSettings(progress=False),
    )
    model.eval()
    return f"after {steps} steps of {sum(TRAIN_ROWS)} x {TRAIN_TOKENS} tokens, rate {case.rate:g}"


def rows_of(case: Case, state: State, base: Figures, folder: Path, prompts: int) -> list[dict]:
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:12]
    peak = round(state.found["bytes of the cache for each token"][0] * CONTEXT)
    return [
        {
            "technique": case.method.name,
            "config": f"{case.method}, {state.text}",
            "model": f"{folder.name} {digest}",
            "data": f"held-out text, {prompts} prompts",
            "context_tokens": CONTEXT,
            "seed": 0,
            "metric": metric,
            "unit": unit,
            "value": round(value, 4),
            "baseline": BASELINE,
            "baseline_value": round(base[metric][0], 4) if metric in base else "",
            "peer": "",
            "peer_value": "",
            "paper_value": "",
            "status": "no figure in the paper for a model and training of this size",
            "peak_bytes": peak,
            "seconds": round(state.seconds, 2),
        }
        for metric, (value, unit) in state.found.items()
    ]


def measure(case: Case, folder: Path, judge: Callable[[PreTrainedModel], Figures], steps: int) -> list[State]:
    """The states of a conversion: at once, and after training where it is trained."""
    with no_progress_bars():
        source, teacher = load_source(folder), load_source(folder)
    tokens = encode_documents(data.tokenizer(), read_corpus()[0])
    torch.manual_seed(0)
    begin = time.perf_counter()
    with no_progress_bars():
        model = case.method.convert(source, calibration(tokens))
    states = [State("untrained", judge(model), time.perf_counter() - begin)]
    if case.method.trains:
        begin = time.perf_counter()
        done = trained(case, model, teacher, tokens, steps)
        states.append(State(done, judge(model), time.perf_counter() - begin))
    return states


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=None, help="a model folder; the embedded model by default")
    parser.add_argument("--prompts", type=int, default=64, help="texts and prompts of each task")
    parser.add_argument("--steps", type=int, default=300, help="of training")
    parser.add_argument("--only", default=None, help="one technique")
    parser.add_argument("--quick", action="store_true", help="few prompts, steps and cases, nothing written")
    options = parser.parse_args()
    folder = options.model or reference.path()
    prompts, steps = (8, 15) if options.quick else (options.prompts, options.steps)
    cases = [case for case in CASES if options.only in (None, case.method.name)]
    if options.quick:
        cases = list({case.method.name: case for case in cases}.values())

    def judge(model: PreTrainedModel) -> Figures:
        return figures(model, prompts)

    with no_progress_bars():
        base = judge(load_source(folder))
    print(BASELINE, base, flush=True)
    for case in cases:
        # Where it is trained, those are the first rows: the ones that summaries show.
        for state in reversed(measure(case, folder, judge, steps)):
            shown = {name: round(value, 3) for name, (value, _) in state.found.items()}
            print(case.method, state.text, shown, f"{state.seconds:.0f} s", flush=True)
            if not options.quick:
                append_rows("cache", [stamp(row) for row in rows_of(case, state, base, folder, prompts)])


if __name__ == "__main__":
    main()
