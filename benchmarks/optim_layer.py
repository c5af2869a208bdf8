"""The update of one realistic layer by every projected or packed optimizer and by its peers: time, peak and state.

Run with ``python -m benchmarks.optim_layer``; run again it goes on where it stopped (``--again`` measures anew). The
layer has the attention (four 4096 x 4096) and one feed-forward matrix (11008 x 4096) of a Llama 7B and a norm, float32,
with normal noise for gradients. Every optimizer has a process of its own. The first step chooses the subspace (and
compiles, where a peer does); a later step is the median after one more. Where there is a subspace, the amortised time
spreads what the first step takes longer over ``GAP`` steps. Peaks are resident bytes above those after the imports.

Peers are measured where they are installed: ``pip install --no-deps galore-torch apollo-torch bitsandbytes
pytorch-optimizer``, and ``pip install --no-deps --target out/peers torchao`` (in the environment itself transformers
and peft would import it everywhere).
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import torch
from benchmarks.journal import Journal
from benchmarks.optim_methods import state_bytes, weight_bytes
from benchmarks.rows import append_rows
from torch import nn

from pintpot.core.registry import techniques
from pintpot.optim import GradientFreeMethod, OptimExtra, projected_groups
from pintpot.optim._adamw import AdamWRule
from pintpot.optim._base import ProjectedMethod

SIDE, LONG, RANK, GAP, LR = 4096, 11008, 256, 200, 1e-3
MODEL = f"attention (4 of {SIDE}x{SIDE}), one {LONG}x{SIDE}, a norm; float32"
ELSEWHERE = Path(__file__).parent.parent / "out" / "peers"
BASE = "torch AdamW"
STAMPS = ("hardware", "versions", "commit", "date")
Make = Callable[[nn.Module], torch.optim.Optimizer]


class Layer(nn.Module):
    """The matrices of a decoder layer as the only block of a model."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.ModuleDict({name: nn.Linear(SIDE, SIDE, bias=False) for name in ("q", "k", "v", "o")})
        block["up"] = nn.Linear(SIDE, LONG, bias=False)
        block["norm"] = nn.RMSNorm(SIDE)
        self.layers = nn.ModuleList([block])


def ours() -> dict[str, Make]:
    """The registered methods that one layer can tell apart: not those that only choose blocks."""
    found: dict[str, Make] = {}
    for name, kind in techniques("optim").items():
        if "pretrain" not in kind.facts.jobs or issubclass(kind, GradientFreeMethod):
            continue
        if issubclass(kind, OptimExtra) and kind.facts.part in ("states", "rule"):
            extras = dict(kind().extras)
            found[name] = lambda model, extras=extras: AdamWRule().optimizer(model, lr=LR, **extras)
        elif issubclass(kind, ProjectedMethod) and kind().select() is None:
            settings = {"rank": RANK, "update_gap": GAP}
            if name == "dct-low-rank":
                del settings["update_gap"]
            rule = kind.build({key: value for key, value in settings.items() if key in kind.__dataclass_fields__})
            found[name] = lambda model, rule=rule: rule.optimizer(model, lr=LR)
    return found


def groups(model: nn.Module, **settings: Any) -> list[dict[str, Any]]:
    """Parameter groups as the authors' optimizers take them."""
    projected, plain = projected_groups(model)
    return [{"params": plain["params"]}, {"params": projected["params"], "update_proj_gap": GAP, **settings}]


def named(module: str, kind: str, *, whole: bool = True, settings: dict[str, Any] | None = None, **more: Any) -> Make:
    """An optimizer of a package, over all parameters or over the groups with these settings; imported now."""
    cls = getattr(importlib.import_module(module), kind)
    return lambda model: cls(model.parameters() if whole else groups(model, **(settings or {})), lr=LR, **more)


_GALORE = {"rank": RANK, "scale": 0.25}
_APOLLO = {"rank": RANK, "scale": 1.0, "scale_type": "channel"}
_MINI = {"rank": 1, "scale": 128.0, "scale_type": "tensor"}
_RANDOM = {"proj": "random", "proj_type": "std"}
_QUIET = {"no_deprecation_warning": True, "whole": False}
PEERS: dict[str, tuple[str, str, Callable[[], Make]]] = {
    "torch AdamW fused": ("", "torch", lambda: named("torch.optim", "AdamW", fused=True)),
    "galore-torch": (
        "galore",
        "galore_torch",
        lambda: named("galore_torch", "GaLoreAdamW", settings={**_GALORE, "proj_type": "std"}, **_QUIET),
    ),
    "pytorch-optimizer GaLore": (
        "galore",
        "pytorch_optimizer",
        lambda: named("pytorch_optimizer", "GaLore", settings={**_GALORE, "projection_type": "std"}, whole=False),
    ),
    "apollo-torch": (
        "apollo",
        "apollo_torch",
        lambda: named("apollo_torch", "APOLLOAdamW", settings=_APOLLO | _RANDOM, **_QUIET),
    ),
    "pytorch-optimizer APOLLO": (
        "apollo",
        "pytorch_optimizer",
        lambda: named("pytorch_optimizer", "APOLLO", settings=_APOLLO | {"projection_type": "random"}, whole=False),
    ),
    "apollo-torch mini": (
        "apollo-mini",
        "apollo_torch",
        lambda: named("apollo_torch", "APOLLOAdamW", settings=_MINI | _RANDOM, **_QUIET),
    ),
    "bitsandbytes AdamW8bit": ("adamw-8bit", "bitsandbytes", lambda: named("bitsandbytes.optim", "AdamW8bit")),
    "torchao AdamW8bit": ("adamw-8bit", "torchao", lambda: named("torchao.optim", "AdamW8bit")),
    "torchao AdamW4bit": ("adamw-4bit", "torchao", lambda: named("torchao.optim", "AdamW4bit")),
    "pytorch-optimizer FlashAdamW": (
        "adamw-8bit",
        "pytorch_optimizer",
        lambda: named("pytorch_optimizer", "FlashAdamW"),
    ),
}
"""Which of ours each is compared with, its package, and how it is made."""


def there(package: str) -> bool:
    """Whether a package is installed, here or in ``ELSEWHERE``."""
    return bool(importlib.util.find_spec(package) or PathFinder.find_spec(package, [str(ELSEWHERE)]))


def maker(name: str) -> Make:
    """How an optimizer is made, its packages imported."""
    sys.path.append(str(ELSEWHERE))
    if name == BASE:
        return lambda model: torch.optim.AdamW(model.parameters(), lr=LR, foreach=True)
    return PEERS[name][2]() if name in PEERS else ours()[name]


def refreshes(name: str) -> bool:
    """Whether an optimizer chooses a subspace from time to time."""
    kind: Any = techniques("optim").get(PEERS[name][0] if name in PEERS else name)
    return kind is not None and issubclass(kind, ProjectedMethod) and kind().project() is not None


def resident(field: str) -> int:
    """``VmRSS`` (now) or ``VmHWM`` (at the most) of this process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def work(name: str, steps: int) -> dict[str, Any]:
    """Measure one optimizer in this process."""
    make = maker(name)
    before = resident("VmRSS")
    torch.manual_seed(0)
    model = Layer()
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer = make(model)
    seconds, peaks = [], []
    for _ in range(steps + 2):
        # Forget the peak so far, so that each step has its own.
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        start = time.perf_counter()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
        peaks.append(resident("VmHWM") - before)
    return {
        "first": seconds[0],
        "later": statistics.median(seconds[2:]),
        "first_peak": peaks[0],
        "later_peak": max(peaks[2:]),
        "state": state_bytes(optimizer),
        "held": 2 * weight_bytes(model),
        "refreshes": refreshes(name),
    }


def measure(name: str, steps: int, threads: int, limit: int) -> dict[str, Any]:
    """The figures of one optimizer from a process of its own; why there are none, where there are none."""
    command = [sys.executable, "-m", "benchmarks.optim_layer", "--worker", name]
    command += ["--steps", str(steps), "--threads", str(threads)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done in {limit} s"}
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1][:200]}
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def amortised(found: dict[str, Any]) -> float:
    """Seconds of a step with its share of a refresh, if there are any."""
    return float(found["later"] + found["refreshes"] * max(0.0, found["first"] - found["later"]) / GAP)


METRICS: dict[tuple[str, str], Callable[[dict[str, Any]], float]] = {
    ("step time", "seconds"): lambda f: f["later"],
    ("first step time", "seconds"): lambda f: f["first"],
    (f"step time with a refresh every {GAP}", "seconds"): amortised,
    ("peak resident bytes of a step", "bytes"): lambda f: f["later_peak"],
    ("peak resident bytes of the first step", "bytes"): lambda f: f["first_peak"],
    ("optimizer state", "bytes"): lambda f: f["state"],
}


def rows(name: str, found: dict[str, Any], base: dict[str, Any], rivals: dict[str, dict[str, Any]]) -> list[dict]:
    """One row a metric, beside AdamW's and the best of the peers'."""
    common = {"technique": name, "config": f"rank {RANK}, gap {GAP}" if name in ours() else name, "model": MODEL}
    common |= {"data": "normal noise", "seed": 0, "baseline": f"{BASE} (foreach)"}
    common |= {key: found[key] for key in STAMPS}
    if "failed" in found:
        return [{**common, "metric": "step time", "unit": "seconds", "status": f"not measured: {found['failed']}"}]
    made = []
    for (metric, unit), of in METRICS.items():
        if of is amortised and not found["refreshes"]:
            continue
        value, reference = of(found), of(base)
        row = {**common, "metric": metric, "unit": unit, "value": f"{value:.6g}", "baseline_value": f"{reference:.6g}"}
        row |= {"peak_bytes": found["later_peak"], "seconds": f"{found['later']:.4g}"}
        row["status"] = f"{value / reference:.3f} of AdamW" if reference else ""
        best = min(((of(f), n) for n, f in rivals.items() if "failed" not in f), default=None)
        if best is not None:
            word = (
                "level with" if abs(value - best[0]) <= 0.03 * best[0] else "ahead of" if value < best[0] else "behind"
            )
            row |= {"peer": best[1], "peer_value": f"{best[0]:.6g}"}
            row["status"] += f"; {word} the best peer ({value / best[0]:.3f} of it)"
        made.append(row)
    return made


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="optimizers, comma-separated, beside torch AdamW")
    parser.add_argument("--steps", type=int, default=5, help="steps that the median is of (5)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of each process")
    parser.add_argument("--limit", type=int, default=1200, help="seconds that one optimizer may take (1200)")
    parser.add_argument("--again", action="store_true", help="measure anew what is there")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure AdamW, the peers and ours, and write the rows of each as soon as it is done."""
    options = parsed()
    torch.set_num_threads(options.threads)
    if options.worker:
        print(json.dumps(work(options.worker, options.steps)))
        return
    names = [BASE, *(name for name, (_, package, _) in PEERS.items() if there(package)), *ours()]
    wanted = {name.strip() for name in options.only.split(",") if name.strip()}
    names = [name for name in names if not wanted or name in wanted or name == BASE]
    journal = Journal("optim_layer", len(names), again=options.again)
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        what = {"way": name, "model": MODEL, "steps": options.steps, "threads": options.threads, "rank": RANK}
        found[name] = journal.once(what, lambda n=name: measure(n, options.steps, options.threads, options.limit))
        rivals = {n: found[n] for n in found if n in PEERS and PEERS[n][0] == name}
        append_rows("optim", rows(name, found[name], found[BASE], rivals))


if __name__ == "__main__":
    main()
