"""Fine-tuning the embedded model, by every method of the optim wing, on a task that it does not know.

Run with ``python -m benchmarks.optim_finetuning``; run again it goes on where it stopped (``--again`` measures anew).
The task: ``# reverse:`` and four random words, then the same words from the last to the first. The model was trained to
copy lines, never to reverse them. An answer counts when all four words are right; a greedy decoder gives exactly those
answers, since each word is then predicted after the right ones. Every method trains on the same rows for the same
steps, at the best of three learning rates; the rule for the other hyperparameters is in ``optim_methods``.
"""

from __future__ import annotations

import argparse
import math
import time
from typing import Any

import numpy as np
import torch
from benchmarks.journal import Journal
from benchmarks.optim_methods import Way, chosen, schedule, state_bytes, ways
from benchmarks.rows import append_rows
from torch import Tensor

from pintpot import reference
from pintpot.core.errors import PintpotError, TrainingError
from pintpot.core.workload import Finetune
from pintpot.jobs.load import load
from pintpot.ledger.steps import train_step
from pintpot.reference import data

WORDS, BATCH, STEPS, HELD_OUT, SEED = 4, 16, 150, 512, 0
STAMPS = ("hardware", "versions", "commit", "date")
Figures = dict[str, Any]


def examples(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows and labels, int64 (count, tokens); only the answer carries loss. Seeds give rows of their own."""
    vocabulary, tokenizer = data.vocabulary(), data.tokenizer()
    words = np.random.default_rng([seed, WORDS]).choice(vocabulary.words, size=(count, WORDS))
    begin, mark, newline = [[0], tokenizer.encode("# reverse:").ids, [vocabulary.newline]]
    pieces = [np.tile(piece, (count, 1)) for piece in (begin, mark)]
    ids = np.concatenate([*pieces, words, np.tile(newline, (count, 1)), words[:, ::-1]], axis=1)
    labels = ids.copy()
    labels[:, :-WORDS] = -100
    return torch.from_numpy(ids), torch.from_numpy(labels)


@torch.no_grad()
def evaluate(model: Any) -> Figures:
    """Nats per word and the fraction of right answers, on rows that no training step sees."""
    ids, labels = examples(HELD_OUT, seed=10**6)
    output = model.eval()(input_ids=ids, labels=labels)
    right = output.logits[:, -WORDS - 1 : -1].argmax(dim=-1) == ids[:, -WORDS:]
    nats = float(output.loss)
    return {"accuracy": float(right.all(dim=1).float().mean()), "nats": nats if math.isfinite(nats) else math.inf}


def train(way: Way, workload: Finetune, rate: float) -> Figures:
    """Held-out figures after the steps (none right where training diverged), state bytes and seconds."""
    job = way.assemble(load(reference.path(), torch.float32), workload, rate, SEED)
    model, optimizer = job.model, job.optimizer
    assert optimizer is not None
    rates = schedule(optimizer, workload.steps)
    state, start = 0, time.process_time()
    try:
        for step in range(workload.steps):
            train_step(model, optimizer, *examples(BATCH, seed=step), scope=job.scope)
            rates.step()
            # Not at the end only: a selection forgets its moments when its turn is over.
            state = max(state, state_bytes(optimizer)) if step % 7 == 1 else state
    except TrainingError:
        return {"accuracy": 0.0, "nats": math.inf, "state": state, "seconds": 0.0}
    return {"state": state, "seconds": time.process_time() - start, **evaluate(model)}


def best(journal: Journal, way: Way, workload: Finetune) -> tuple[float, Figures]:
    """The learning rate with the most right answers (of equals, the least loss), and its run."""
    grid = {}
    for rate in way.rates:
        what = {"way": way.config, "rate": rate, "seed": SEED, "task": task(workload), "held_out": HELD_OUT}
        grid[rate] = journal.once(what, lambda rate=rate: train(way, workload, rate))
    rate = max(grid, key=lambda r: (grid[r]["accuracy"], -grid[r]["nats"]))
    return rate, grid[rate]


def task(workload: Finetune) -> str:
    """The work in words."""
    return f"reversal of {WORDS} words, {workload.steps} steps of {BATCH} rows"


def rows(way: Way, rate: float, found: Figures, base: Figures, workload: Finetune) -> list[dict[str, Any]]:
    """A method's rows beside AdamW's."""
    tried = ", ".join(f"{r:g}" for r in way.rates)
    common = {
        "technique": way.name,
        "config": f"{way.config}, lr={rate:g} (best of {tried})",
        "model": "pintpot-reference, float32",
        "data": task(workload),
        "context_tokens": examples(1, 0)[0].shape[1],
        "seed": SEED,
        "baseline": f"torch AdamW (before training: {base['before_accuracy']:.3f} right)",
        "peak_bytes": found["state"],
        "seconds": f"{found['seconds']:.4g}",
        **{key: found[key] for key in STAMPS},
    }
    measures = {
        ("answers right of 512 held out", "fraction"): "accuracy",
        ("held-out loss of the answer", "nats per word"): "nats",
        ("optimizer state", "bytes"): "state",
    }
    made = []
    for (metric, unit), key in measures.items():
        value, reference_value = found[key], base[key]
        status = f"{value - reference_value:+.3f} against AdamW; no paper has this task"
        if key == "state":
            status = f"{value / reference_value:.3f} of AdamW"
        if way.name == "torch AdamW":
            status = "baseline"
        row = {"metric": metric, "unit": unit, "value": f"{value:.7g}", "baseline_value": f"{reference_value:.7g}"}
        made.append({**common, **row, "status": status})
    return made


def main() -> None:
    """Fine-tune by every method and write its rows as soon as its runs are done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="methods, comma-separated, beside torch AdamW")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"steps of each run ({STEPS})")
    parser.add_argument("--again", action="store_true", help="measure anew what is there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = load(reference.path(), torch.float32)
    tokens = examples(1, 0)[0].shape[1]
    workload = Finetune(batch=BATCH, tokens=tokens, steps=options.steps)
    found = chosen(ways(workload, model.config.hidden_size, model.config.num_hidden_layers), options.only)
    before = evaluate(model)
    print(f"before training: {before['accuracy']:.3f} right, {before['nats']:.3f} nats per word", flush=True)
    journal = Journal("optim_finetuning", sum(len(way.rates) for way in found), again=options.again)
    base: Figures | None = None
    for way in found:
        try:
            rate, figures = best(journal, way, workload)
        except PintpotError as error:
            print(f"{way.name}: {error}", flush=True)
            continue
        base = base or {**figures, "before_accuracy": before["accuracy"]}
        append_rows("optim", rows(way, rate, figures, base, workload))


if __name__ == "__main__":
    main()
