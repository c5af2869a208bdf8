"""Does the composed step learn as AdamW does: the loss over 200 steps of the 134M Llama of ``optim_composition``.

Run with ``python -m benchmarks.optim_curve``; run again it goes on where it stopped. Real text, one sequence of 128
tokens a step (the shape's own 4 x 512 would take hours), linear warm-up over 20 steps. AdamW is run from two seeds of
the data: the noise is how far the two end apart. Learning rates are those of the papers' 130M models, and
AdamW's for APOLLO-Mini.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from benchmarks.journal import Journal
from benchmarks.optim_composition import OURS
from benchmarks.optim_pretraining import corpus
from benchmarks.rows import append_rows
from transformers import LlamaConfig, LlamaForCausalLM

from pintpot.core.expression import parse
from pintpot.core.workload import Finetune
from pintpot.jobs.assemble import Composition, Rates, dress
from pintpot.ledger.steps import train_step

TOKENS, STEPS, WARMUP, TAIL = 128, 200, 20, 40
RUNS = {
    "torch AdamW": ("", 1e-3, 0),
    "torch AdamW, another seed": ("", 1e-3, 1),
    "adamw-8bit": (OURS["adamw-8bit"], 1e-3, 0),
    "apollo": (OURS["apollo"], 1e-2, 0),
    "apollo-mini": (OURS["apollo-mini"], 1e-3, 0),
}


def losses(expression: str, rate: float, seed: int, steps: int) -> list[float]:
    """The training loss of every step."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12
    )
    workload = Finetune(batch=1, tokens=TOKENS, steps=steps)
    job = dress(
        LlamaForCausalLM(config),
        Composition.of(parse(expression) if expression else (), "finetune"),
        workload,
        Rates(rate, 0.0),
    )
    assert job.optimizer is not None
    rates = torch.optim.lr_scheduler.LambdaLR(job.optimizer, lambda step: min(1.0, (step + 1) / WARMUP))
    tokens, generator, found = corpus()[0], torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        start = int(torch.randint(0, len(tokens) - TOKENS, (1,), generator=generator))
        ids = tokens[None, start : start + TOKENS]
        found.append(float(train_step(job.model, job.optimizer, ids, ids, scope=job.scope, clip_norm=None)))
        rates.step()
    return found


def main() -> None:
    """Run every way and write how the ends of the curves compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    journal = Journal("optim_curve", len(RUNS))
    found: dict[str, dict[str, Any]] = {}
    for name, (expression, rate, seed) in RUNS.items():
        what = {
            "way": expression or "torch AdamW",
            "rate": rate,
            "seed": seed,
            "steps": options.steps,
            "tokens": TOKENS,
        }
        found[name] = journal.once(
            what, lambda e=expression, r=rate, s=seed: {"losses": losses(e, r, s, options.steps)}
        )
    ends = {name: statistics.fmean(figures["losses"][-TAIL:]) for name, figures in found.items()}
    noise = abs(ends["torch AdamW"] - ends["torch AdamW, another seed"])
    for name, (expression, rate, seed) in RUNS.items():
        ahead = ends[name] - ends["torch AdamW"]
        within = "within" if abs(ahead) <= noise else "below" if ahead < 0 else "above"
        status = f"{within} AdamW's noise ({ahead:+.3f}, noise {noise:.3f})" if expression else "baseline"
        if ends[name] > found[name]["losses"][0]:
            status = "diverged"
        row = {
            "technique": name,
            "config": f"{expression or 'torch AdamW'}, lr={rate:g}",
            "model": "llama-134M (768 x 12, vocabulary 32000, random, float32)",
            "data": f"{corpus()[3]}, {options.steps} steps of 1x{TOKENS} tokens",
            "context_tokens": TOKENS,
            "seed": seed,
            "metric": f"training loss, mean of the last {TAIL} steps",
            "unit": "nats per token",
            "value": round(ends[name], 4),
            "baseline": "torch AdamW",
            "baseline_value": round(ends["torch AdamW"], 4),
            "status": status,
            **{key: found[name][key] for key in ("hardware", "versions", "commit", "date")},
        }
        append_rows("optim", [row])
        print(f"{name}: {ends[name]:.4f} ({row['status']})", flush=True)


if __name__ == "__main__":
    main()
