"""Full-parameter training of a 110M Llama shape in a fraction of AdamW's memory, beside peers; rows for results.

Run with ``python -m benchmarks.optim_composition [--steps 4] [--only NAME,...]``. Each way runs in a process of its
own; its memory is the growth of the resident set's peak over that of the imported libraries. Times are the median step
after the first.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from typing import Any

from benchmarks.rows import append_rows, stamp

BATCH, TOKENS = 4, 512
COMPOSITION = "sublinear-checkpointing*chunked-cross-entropy*gradient-release"
OURS = {
    "apollo": f"apollo(rank=64)*adamw-8bit*{COMPOSITION}",
    "apollo-mini": f"apollo-mini*adamw-4bit*{COMPOSITION}",
    "adamw-8bit": f"adamw-8bit*{COMPOSITION}",
}
PEERS = {
    "torch AdamW": "",
    "torch AdamW, transformers checkpointing": "",
    "torch SGD": "",
    "apollo-torch": "apollo_torch",
    "bitsandbytes AdamW8bit": "bitsandbytes",
}

WORKER = """
import json, statistics, sys, time
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from pintpot.core.expression import parse
from pintpot.core.heap import return_freed_memory
from pintpot.core.workload import Finetune
from pintpot.jobs.assemble import Composition, Rates, dress
from pintpot.ledger.steps import train_step
from pintpot.optim import projected_groups
way, expression, batch, tokens, steps = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6])
if way == "apollo-torch":
    import apollo_torch
if way.startswith("bitsandbytes"):
    import bitsandbytes
def resident(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))
before = resident("VmRSS")
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=32000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12,
    num_attention_heads=12, num_key_value_heads=12, max_position_embeddings=2048)).train()
workload = Finetune(batch=batch, tokens=tokens, steps=steps)
if expression:
    return_freed_memory()
    job = dress(model, Composition.of(parse(expression), "finetune"), workload, Rates(1e-3, 0.0))
    optimizer, scope = job.optimizer, job.scope
else:
    from contextlib import nullcontext as scope
    if "checkpointing" in way:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    groups = projected_groups(model)
    if way == "torch SGD":
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    elif way == "apollo-torch":
        low = {"rank": 64, "scale": 1.0, "scale_type": "channel", "proj": "random", "proj_type": "std",
               "update_proj_gap": 200}
        plain = {"params": groups[1]["params"]}
        optimizer = apollo_torch.APOLLOAdamW([plain, {"params": groups[0]["params"], **low}], lr=1e-3)
    elif way.startswith("bitsandbytes"):
        optimizer = bitsandbytes.optim.AdamW8bit(model.parameters(), lr=1e-3)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
ids = torch.randint(0, 32000, (steps, batch, tokens), generator=torch.Generator().manual_seed(1))
seconds, losses = [], []
for row in ids:
    start = time.perf_counter()
    loss = train_step(model, optimizer, row, row, scope=scope, clip_norm=None)
    seconds.append(time.perf_counter() - start)
    losses.append(float(loss))
print(json.dumps({"bytes": resident("VmHWM") - before, "seconds": statistics.median(seconds[1:]), "losses": losses}))
"""


def measure(way: str, expression: str, steps: int) -> dict[str, Any] | None:
    """Bytes, seconds a step and losses of one way; None where it cannot run."""
    command = [sys.executable, "-c", WORKER, way, expression, str(BATCH), str(TOKENS), str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{way}: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else done.returncode}", flush=True)
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


def row(name: str, config: str, found: dict[str, Any], base: dict[str, Any], metric: str) -> dict[str, Any]:
    """One row: bytes or seconds beside torch's AdamW in the same run."""
    key = "bytes" if metric.startswith("peak") else "seconds"
    ratio = found[key] / base[key]
    bar = (found[key] <= 1e9) if key == "bytes" else ratio <= 1.4
    verdict = "peer" if config == name else f"{'within' if bar else 'beyond'} the bar"
    return stamp(
        {
            "technique": name,
            "config": config,
            "model": "llama-134M (768 x 12, vocabulary 32000, random, float32)",
            "data": f"random tokens, batch {BATCH} x {TOKENS}",
            "context_tokens": TOKENS,
            "seed": 0,
            "metric": metric,
            "unit": key,
            "value": round(found[key], 3),
            "baseline": "torch AdamW",
            "baseline_value": round(base[key], 3),
            "status": f"{verdict} ({ratio:.2f} of AdamW)",
            "peak_bytes": found["bytes"],
            "seconds": round(found["seconds"], 2),
        }
    )


def main() -> None:
    """Measure every way and write its rows as soon as it is done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--only", default="", help="ways, comma-separated, beside torch AdamW")
    options = parser.parse_args()
    ways = {name: "" for name, package in PEERS.items() if not package or importlib.util.find_spec(package)} | OURS
    wanted = set(options.only.split(",")) if options.only else set(ways)
    base: dict[str, Any] | None = None
    for name, expression in ways.items():
        if name not in wanted and name != "torch AdamW":
            continue
        found = measure(name, expression, options.steps)
        if found is None:
            continue
        base = base or found
        print(f"{name}: {found['bytes'] / 1e6:.0f} MB, {found['seconds']:.2f} s, losses {found['losses']}", flush=True)
        metrics = ("peak resident bytes of a training step", "time of a training step")
        append_rows("optim", [row(name, expression or name, found, base, metric) for metric in metrics])


if __name__ == "__main__":
    main()
