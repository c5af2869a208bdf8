"""1bit-Merging on the embedded model: two short fine-tunings in one folder, beside each alone and their average.

Run with ``python -m benchmarks.merging`` (a few minutes), or ``--quick`` to see that it works, which writes no rows.
"""

from __future__ import annotations

import argparse
import codecs
import copy
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from benchmarks.rows import append_rows, stamp
from benchmarks.training_wings import batches
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from pintpot import reference
from pintpot.core.model_folder import open_model
from pintpot.jobs.merge import Merged, merge
from pintpot.reference.data import held_out_text, tokenizer, training_text
from pintpot.reference.evaluate import next_token_losses
from pintpot.weights import load_compressed, route_

TASKS: dict[str, Callable[[str], str]] = {"swapped": str.swapcase, "rot13": lambda text: codecs.encode(text, "rot13")}
"""What each model is fine-tuned on: the standard library, changed so that the base does not know it."""

BATCH, TOKENS, RATE, SEED = 8, 256, 1e-3, 0
PARTS = {"whole model": "", "matrices of the blocks": "_proj"}
"""What is trained: the parameters in whose names this stands. The others are averaged, where they were trained."""


@dataclass(frozen=True)
class Size:
    """How much is done."""

    steps: int
    windows: int
    characters: int


FULL, QUICK = Size(120, 48, 2_000_000), Size(3, 2, 60_000)


def ids_of(text: str) -> Tensor:
    """Token ids int64 (N,)."""
    return torch.tensor(tokenizer().encode(text).ids)


def finetuned(base: nn.Module, task: str, part: str, size: Size) -> nn.Module:
    """The base after some updates on a task's text."""
    model = copy.deepcopy(base).train()
    trained = [p for name, p in model.named_parameters() if part in name]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    windows = iter(batches(ids_of(TASKS[task](training_text()[: size.characters])), BATCH, TOKENS, SEED))
    for _ in range(size.steps):
        ids = next(windows)
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return model.eval()


def perplexity(model: nn.Module, task: str, size: Size) -> float:
    """On held-out text of a task, in windows that do not overlap."""
    ids = ids_of(TASKS[task](held_out_text()[: size.characters]))[: size.windows * TOKENS].view(-1, TOKENS)
    return math.exp(torch.cat([next_token_losses(model, row[None]) for row in ids]).mean().item())


def averaged(models: list[nn.Module]) -> nn.Module:
    """The plain average."""
    mean = copy.deepcopy(models[0])
    parts = [model.state_dict() for model in models]
    mean.load_state_dict({name: torch.stack([p[name] for p in parts]).mean(0) for name in parts[0]})
    return mean


def rows(what: str, part: str, size: Size) -> Iterator[dict[str, object]]:
    """A row for each task."""
    base = AutoModelForCausalLM.from_pretrained(reference.path(), dtype=torch.float32).eval()
    models = {task: finetuned(base, task, part, size) for task in TASKS}
    with tempfile.TemporaryDirectory() as place:
        for task, model in models.items():
            # Stored as the base is, and judged as stored.
            model.to(open_model(reference.path()).dtype).save_pretrained(Path(place) / task)
            model.float()
        done = merge(reference.path(), {task: Path(place) / task for task in TASKS}, Path(place) / "merged")
        merged = load_compressed(done.folder, dtype=torch.float32)
    mean = averaged(list(models.values()))
    for task, model in models.items():
        route_(merged, task)
        candidates = {"base": base, "own": model, "mean": mean, "routed": merged}
        yield row_of(task, what, size, done, {name: perplexity(m, task, size) for name, m in candidates.items()})


def row_of(task: str, what: str, size: Size, done: Merged, found: dict[str, float]) -> dict[str, object]:
    """What was found of one task."""
    gains = {name: math.log(found["base"] / found[name]) for name in ("own", "mean", "routed")}
    kept = {name: gains[name] / gains["own"] for name in ("mean", "routed")}
    size_share = done.output_bytes / done.source_bytes
    return stamp(
        {
            "technique": "1bit-merging",
            "config": f"{len(TASKS)} tasks, {size.steps} updates of the {what} each; {task}",
            "model": "embedded",
            "data": f"python stdlib, {task}",
            "context_tokens": TOKENS,
            "seed": SEED,
            "metric": "perplexity of the task's held-out text",
            "unit": "perplexity",
            "value": f"{found['routed']:.6g}",
            "baseline": "the task's own model",
            "baseline_value": f"{found['own']:.6g}",
            "peer": "plain average of the models",
            "peer_value": f"{found['mean']:.6g}",
            "paper_value": "94.53 % of the performance in 55.02 % of the storage (Mistral 7B, abstract)",
            "status": f"keeps {kept['routed']:.1%} of what fine-tuning won over the base ({found['base']:.4g}), the "
            f"average {kept['mean']:.1%}; {size_share:.1%} of the bytes of the base and the models; another measure "
            "and model than the paper's",
        }
    )


def main() -> None:
    """Measure, and write the rows to ``results/weights.csv`` unless it is quick."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a few updates, and no rows written")
    quick = parser.parse_args().quick
    found = [row for what, part in PARTS.items() for row in rows(what, part, QUICK if quick else FULL)]
    for row in found:
        print(row["config"], row["value"], row["status"])
    if not quick:
        print(append_rows("weights", found))


if __name__ == "__main__":
    main()
