"""Optimizers on equal work: pretraining a small Llama on the standard library, and step time beside the peers.

Every registered rule, and every extra on AdamW, trains on the same windows for the same steps, at the best of the same
learning rates. Run with ``python -m benchmarks.optim``. The peers ``galore-torch`` and ``apollo-torch`` are measured
where they are installed (``pip install --no-deps galore-torch apollo-torch bitsandbytes``; both import the last).
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from benchmarks.rows import append_rows, stamp
from benchmarks.training_wings import batches, live_peak, llama, median_seconds, stdlib_bytes
from torch import nn

from pintpot.core.registry import techniques
from pintpot.ledger.steps import train_step
from pintpot.optim import Apollo, ApolloMini, GaLore, OptimExtra, projected_groups
from pintpot.optim._adamw import AdamWRule

HIDDEN, LAYERS, BATCH, TOKENS, STEPS, SEED = 128, 5, 8, 96, 80, 0
RANK, GAP = 32, 50
RATES = (1e-3, 3e-3, 1e-2)
FORWARD_ONLY_RATES = (1e-5, 1e-4, 1e-3)
SMALL = {"rank": RANK, "update_gap": GAP, "active_blocks": 2, "interval_steps": 10, "directions": 20, "samples": 4}
"""Hyperparameters for a model of this size, for the rules that have them (DCT-AdamW still chooses at each step)."""
PAPER = {
    "galore": "34.88 ppl (AdamW 34.06)",
    "fira": "31.06 ppl (AdamW 34.06)",
    "apollo": "31.55 ppl (AdamW 34.06)",
    "apollo-mini": "30.95 ppl (AdamW 34.06)",
    "dct-low-rank": "13.69 ppl (AdamW 11.73)",
}
SIDE, LONG = 1024, 2752
MODEL = f"llama-{HIDDEN}x{LAYERS} (random, bytes)"
DATA = "python stdlib"
Make = Callable[..., torch.optim.Optimizer]


def peer(package: str, kind: str, settings: dict[str, Any]) -> Make | None:
    """Makes a peer's optimizer over the same groups; None where the package is not installed."""
    if any(importlib.util.find_spec(name) is None for name in (package, "bitsandbytes")):
        return None
    cls = getattr(importlib.import_module(package), kind)

    def make(model: nn.Module, lr: float = 1e-2) -> torch.optim.Optimizer:
        projected, plain = projected_groups(model)
        groups = [{"params": plain["params"]}, {"params": projected["params"], "update_proj_gap": GAP, **settings}]
        quiet = {"no_deprecation_warning": True} if package == "galore_torch" else {}
        return cls(groups, lr=lr, eps=1e-8, **quiet)

    return make


def methods(rank: int) -> dict[str, tuple[Make, Make | None, str]]:
    """Ours, the peer, and the configuration, by technique."""
    standard = {"proj_type": "std"}
    galore = peer("galore_torch", "GaLoreAdamW", {"rank": rank, "scale": 0.25, **standard})
    random = {"proj": "random", **standard}
    apollo = peer("apollo_torch", "APOLLOAdamW", {"rank": rank, "scale": 1.0, "scale_type": "channel", **random})
    mini = peer("apollo_torch", "APOLLOAdamW", {"rank": 1, "scale": 128.0, "scale_type": "tensor", **random})
    return {
        "galore": (lambda m: GaLore(m, lr=1e-2, rank=rank, update_gap=GAP), galore, f"rank={rank}, gap={GAP}, lr=0.01"),
        "apollo": (lambda m: Apollo(m, lr=1e-2, rank=rank, update_gap=GAP), apollo, f"rank={rank}, gap={GAP}, lr=0.01"),
        "apollo-mini": (lambda m: ApolloMini(m, lr=1e-2, update_gap=GAP), mini, f"gap={GAP}, lr=0.01"),
    }


def registered() -> dict[str, tuple[Callable[[nn.Module, float], torch.optim.Optimizer], str]]:
    """Every technique that can pretrain a language model: how it is made, and its configuration."""
    found = {}
    for name, kind in techniques("optim").items():
        if "pretrain" not in kind.facts.jobs and "finetune" not in kind.facts.jobs:
            continue
        if issubclass(kind, OptimExtra):
            extras = dict(kind().extras)
            found[name] = (lambda m, lr, extras=extras: AdamWRule().optimizer(m, lr=lr, **extras), "AdamW")
            continue
        small = {key: value for key, value in SMALL.items() if key in kind.__dataclass_fields__}
        if name == "dct-low-rank":
            del small["update_gap"]
        rule = kind.build(small)
        found[name] = (lambda m, lr, rule=rule: rule.optimizer(m, lr=lr), str(rule))
    return found


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in the state, the peers' projector objects included."""
    total = 0
    for state in optimizer.state.values():
        for value in [*state.values(), *vars(state.get("projector", object)).values()]:
            total += value.nbytes if isinstance(value, torch.Tensor) else 0
    return total


def pretrain(make: Make) -> dict[str, float]:
    """Bits per byte on held-out modules after the same steps on the same windows; state bytes; seconds."""
    model = llama(HIDDEN, LAYERS, seed=SEED)
    optimizer = make(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, (s + 1) / 15) * (1 - 0.9 * s / STEPS))
    start = time.process_time()
    for step, ids in enumerate(batches(stdlib_bytes(held_out=False), BATCH, TOKENS, SEED)):
        if step == STEPS:
            break
        train_step(model, optimizer, ids, ids)
        schedule.step()
    seconds = time.process_time() - start
    windows = stdlib_bytes(held_out=True)[: 64 * TOKENS].view(64, TOKENS)
    with torch.no_grad():
        loss = model.eval()(input_ids=windows, labels=windows).loss
    return {"bits": float(loss) / 0.6931471805599453, "state": state_bytes(optimizer), "seconds": seconds}


class OneMatrix(nn.Module):
    """A linear layer of a realistic shape, as the only block of a model."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(SIDE, LONG, bias=True)})])


def step_costs(make: Make | None) -> dict[str, float]:
    """Seconds of a first step (which chooses the subspace) and of a later one, and the bytes of its temporaries."""
    if make is None:
        return {"first": float("nan"), "later": float("nan"), "bytes": float("nan")}
    torch.manual_seed(0)
    model = OneMatrix()
    optimizer = make(model)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    start = time.process_time()
    optimizer.step()
    first = time.process_time() - start
    later = median_seconds(optimizer.step, 9)
    return {"first": first, "later": later, "bytes": live_peak(optimizer.step)}


def best(make: Callable[[nn.Module, float], torch.optim.Optimizer], rates: Sequence[float]) -> tuple[dict, float]:
    """The run with the fewest bits, and its learning rate."""
    runs = {rate: pretrain(lambda m, rate=rate: make(m, rate)) for rate in rates}
    rate = min(runs, key=lambda r: runs[r]["bits"] if math.isfinite(runs[r]["bits"]) else math.inf)
    return runs[rate], rate


def rows_of(name: str, config: str, ours: dict, base: dict, other: dict | None, what: dict) -> dict:
    """One row of the results."""
    metric, key = what["metric"], what["key"]
    value, reference = ours[key], base[key]
    rival = None if other is None else other[key]
    return stamp(
        {
            "technique": name,
            "config": config,
            "model": what["model"],
            "data": what["data"],
            "context_tokens": what.get("tokens", ""),
            "seed": SEED,
            "metric": metric,
            "unit": what["unit"],
            "value": f"{value:.6g}",
            "baseline": "torch AdamW" + what.get("note", ""),
            "baseline_value": f"{reference:.6g}",
            "peer": "" if rival is None else ("galore-torch 1.0" if name == "galore" else "apollo-torch 1.0.3"),
            "peer_value": "" if rival is None else f"{rival:.6g}",
            "paper_value": what.get("paper", {}).get(name, ""),
            "status": what["status"](value, reference, rival),
            "peak_bytes": int(ours.get("state", ours.get("bytes", 0))),
            "seconds": f"{ours.get('seconds', ours.get('later', 0.0)):.4g}",
        }
    )


def quality_status(value: float, reference: float, rival: float | None) -> str:
    """Whether the small run ranks the method against AdamW as the paper does (never the paper's own setting)."""
    near = "" if rival is None else f"; {value - rival:+.3f} against the peer"
    return f"not reproduced: 1M parameters and 60k tokens instead of 60M on C4; {value - reference:+.3f} bits{near}"


def bytes_status(value: float, reference: float, rival: float | None) -> str:
    """Ours against AdamW's bytes and the peer's."""
    over = "" if rival is None else f", {value / rival:.2f} of the peer"
    return f"matches: {value / reference:.3f} of AdamW{over}" if value < reference else "differs: no saving"


def cost_status(value: float, reference: float, rival: float | None) -> str:
    """How many times faster or smaller than the peer."""
    if rival is None:
        return "not reproduced: peer not installed"
    return f"{'matches' if value <= rival else 'differs'}: peer / ours = {rival / value:.2f}"


def main() -> None:
    """Measure everything and write ``results/optim.csv``."""
    adamw, rate = best(lambda m, lr: torch.optim.AdamW(m.parameters(), lr=lr, weight_decay=0.0), RATES)
    print("AdamW", rate, adamw, flush=True)
    shared = {"model": MODEL, "data": DATA, "tokens": TOKENS, "note": f" (best of {RATES}: {rate})", "paper": PAPER}
    peers = {name: rival for name, (_, rival, _) in methods(RANK).items()}
    quality = {"metric": "held-out bits per byte", "unit": "bits", "key": "bits", "status": quality_status}
    held = {"metric": "optimizer state", "unit": "bytes", "key": "state", "status": bytes_status}
    for name, (make, config) in registered().items():
        rates = FORWARD_ONLY_RATES if getattr(make(llama(HIDDEN, 2), 1e-3), "gradient_free", False) else RATES
        ours, rate = best(make, rates)
        rival = peers.get(name)
        theirs = None if rival is None else pretrain(lambda m, rival=rival, rate=rate: rival(m, rate))
        print(name, config, rate, ours, theirs, flush=True)
        full = f"{config}, lr={rate} (best of {rates})"
        append_rows("optim", [rows_of(name, full, ours, adamw, theirs, {**shared, **w}) for w in (quality, held)])
    plain = step_costs(lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2))
    for name, (make, rival, config) in methods(256).items():
        ours, theirs = step_costs(make), None if rival is None else step_costs(rival)
        print(name, ours, theirs, plain, flush=True)
        rows = []
        for key, metric, unit in (
            ("later", "step time", "CPU seconds"),
            ("first", "first step time (chooses the subspace)", "CPU seconds"),
            ("bytes", "temporaries of a step", "bytes"),
        ):
            what = {"metric": metric, "unit": unit, "key": key, "status": cost_status, "data": "normal noise"}
            rows.append(rows_of(name, config, ours, plain, theirs, {**what, "model": f"linear {SIDE}x{LONG} float32"}))
        print(append_rows("optim", rows))


if __name__ == "__main__":
    main()
