"""Activation memory: a training step plain, under our scopes, and under transformers' own checkpointing.

Run with ``python -m benchmarks.activations``. Figures are peaks of live tensor bytes in one forward and backward pass
(weights not counted, gradients counted) and the median time of a pass; gradients are compared bit for bit.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from benchmarks.rows import append_rows, stamp
from benchmarks.training_wings import live_peak, llama, median_seconds
from torch import nn

from pintpot.activations import ChunkedCrossEntropy, SublinearCheckpointing
from pintpot.core.units import format_bytes
from pintpot.core.workload import Finetune

HIDDEN, LAYERS, BATCH, TOKENS, VOCABULARY = 128, 24, 2, 256, 1024
LARGE_VOCABULARY, LOSS_TOKENS = 16_000, 1024
WORK = Finetune(batch=BATCH, tokens=TOKENS)


def measure(
    model: nn.Module, scope: AbstractContextManager[object], tokens: int = TOKENS
) -> tuple[dict[str, float], list[torch.Tensor]]:
    """Peak bytes and seconds of one pass, and its gradients."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (BATCH, tokens), generator=generator)

    def one_pass() -> None:
        model.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids).loss.backward()

    with scope:
        seconds = median_seconds(one_pass, 5)
        model.zero_grad(set_to_none=True)
        peak = live_peak(one_pass)
    return {"peak": peak, "seconds": seconds}, [p.grad.clone() for p in model.parameters() if p.grad is not None]


def main() -> None:
    """Measure and write ``results/activations.csv``."""
    model = llama(HIDDEN, LAYERS, VOCABULARY)
    plain, gradients = measure(model, nullcontext())
    method = SublinearCheckpointing()
    with method.scope(model, WORK) as segments:
        chosen = f"{len(segments)} segments, {sum(map(len, segments))} of {LAYERS} blocks recomputed"
    ours, same = measure(model, method.scope(model, WORK))
    budget = int(0.5 * plain["peak"])
    with method.scope(model, WORK, budget) as segments:
        half = f"budget {format_bytes(budget)}: {sum(map(len, segments))} of {LAYERS} blocks recomputed"
    halved, also = measure(model, method.scope(model, WORK, budget))
    model.activation_checkpointing_enable({"use_reentrant": False})
    theirs, _ = measure(model, nullcontext())
    equal = all(torch.equal(a, b) for found in (same, also) for a, b in zip(gradients, found, strict=True))
    rows = []
    for config, found in ((chosen, ours), (half, halved)):
        print(config, found, "plain", plain, "transformers", theirs, "gradients equal:", equal)
        for key, metric, unit in (("peak", "peak of a pass", "bytes"), ("seconds", "time of a pass", "CPU seconds")):
            status = f"matches: {found[key] / plain[key]:.2f} of plain, {found[key] / theirs[key]:.2f} of the peer"
            rows.append(
                stamp(
                    {
                        "technique": method.name,
                        "config": config,
                        "model": f"llama-{HIDDEN}x{LAYERS} (random) batch {BATCH}",
                        "data": "random tokens",
                        "context_tokens": TOKENS,
                        "seed": 0,
                        "metric": metric,
                        "unit": unit,
                        "value": f"{found[key]:.6g}",
                        "baseline": "plain pass",
                        "baseline_value": f"{plain[key]:.6g}",
                        "peer": "transformers activation checkpointing, every layer",
                        "peer_value": f"{theirs[key]:.6g}",
                        "paper_value": "48 GB to 7 GB, 30 % more time (1,000-layer ResNet)",
                        "status": (status if equal else "differs: gradients not equal bit for bit"),
                        "peak_bytes": int(found["peak"]),
                        "seconds": f"{found['seconds']:.4g}",
                    }
                )
            )
    print(append_rows("activations", [*rows, *loss_rows()]))


def loss_rows() -> list[dict]:
    """The loss without the logits, on a model whose logits are its largest tensors."""
    model = llama(HIDDEN, 4, LARGE_VOCABULARY)
    work = Finetune(batch=BATCH, tokens=LOSS_TOKENS)
    plain, gradients = measure(model, nullcontext(), LOSS_TOKENS)
    ours, same = measure(model, ChunkedCrossEntropy().scope(model, work), LOSS_TOKENS)
    apart = max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(gradients, same, strict=True))
    print("chunked-cross-entropy", ours, "plain", plain, "gradients apart", apart)
    rows = []
    for key, metric, unit in (("peak", "peak of a pass", "bytes"), ("seconds", "time of a pass", "CPU seconds")):
        row = {
            "technique": "chunked-cross-entropy",
            "config": f"vocabulary {LARGE_VOCABULARY}",
            "model": f"llama-{HIDDEN}x4 (random) batch {BATCH}",
            "data": "random tokens",
            "context_tokens": LOSS_TOKENS,
            "seed": 0,
            "metric": metric,
            "unit": unit,
            "value": f"{ours[key]:.6g}",
            "baseline": "plain pass",
            "baseline_value": f"{plain[key]:.6g}",
            "status": f"matches: {ours[key] / plain[key]:.2f} of plain; gradients apart by at most {apart:.1e}",
            "peak_bytes": int(ours["peak"]),
            "seconds": f"{ours['seconds']:.4g}",
        }
        rows.append(stamp(row))
    return rows


if __name__ == "__main__":
    main()
