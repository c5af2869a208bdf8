"""What the optimizer benchmarks compare: every registered method, scaled to a small model by one rule, and peers.

The rule, for a model of hidden size H with L blocks that is trained for N steps: a rank is H / 4 (as 128 of 512 for
the Llama 60M of the papers' tables), and a second rank or a numerator ``alpha`` keeps its ratio to it; what is counted
in steps (gaps, intervals) is the paper's, at most N / 10; blocks trained at a time are the paper's, at most L / 2;
forward passes of a step are at most ``MOST_DIRECTIONS``, preconditioned sides at most ``LARGEST_SIDE``. All else is
the paper's default. Learning rates are the best of ``RATES``, times a factor where steps are not of Adam's size.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from pintpot.adapters import Lora
from pintpot.core.expression import expression
from pintpot.core.registry import techniques
from pintpot.core.technique import Technique
from pintpot.core.workload import Train
from pintpot.jobs.assemble import Composition, Rates, dress
from pintpot.ledger.predict import Assembled
from pintpot.optim import GradientFreeMethod, projected_groups

RATES = (1e-3, 3e-3, 1e-2)
FACTORS = {"lion": 0.1, "signsgd": 0.1, "sgd-momentum": 100.0}
"""Rules whose steps are longer than Adam's at the same rate (signs) or shorter (a clipped gradient)."""
GRADIENT_FREE_FACTOR = 0.1
MOST_DIRECTIONS = 8
LARGEST_SIDE = 640
"""Above it SOAP leaves a side alone: as far below the vocabulary of 2,048 as its 10,000 is below one of 32,000."""

TWO_RATES = "torch AdamW (matrices at {:g} of the rate)"
"""What a method gains by moving the matrices less than embeddings and head, as GaLore does by its ``scale`` of 0.25."""

BASELINES: dict[str, tuple[str, dict[str, Any]]] = {
    "low-rank": ("sltrain", {"density": 0.0}),
    "lora": ("relora", {"restart_gap": 0}),
}
"""What the papers' tables have beside the methods: ``W = B A``, and ``W0 + B A`` with W0 frozen at random."""

PARTS = ("", "rule", "states", "parameters")
"""Parts of the optimizer slot that change what is learnt; the others only change where bytes are."""

ADAMW_60M = 34.06
GALORE_TABLE_2 = {"q-galore": 34.88, "low-rank": 78.18, "lora": 34.99, "relora": 37.04}
"""Perplexities of Llama 60M on C4 that no technique's claims hold: table 2 of GaLore, and Q-GaLore's."""

TOLERANCE = 0.03
"""How far a ratio to AdamW may be from the paper's, beside two standard errors, and still match."""


@dataclass(frozen=True)
class Way:
    """One way to train a model.

    Attributes:
        name: what it is listed under.
        parts: its techniques; none for torch's AdamW.
        factor: on the learning rates that are tried.
        matrices: on the rate of the matrices inside the blocks, for torch's AdamW.
    """

    name: str
    parts: tuple[Technique, ...] = ()
    factor: float = 1.0
    matrices: float = 1.0

    @property
    def config(self) -> str:
        """The expression that ``pintpot`` takes."""
        return expression(self.parts) or self.name

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates that are tried."""
        return tuple(float(f"{rate * self.factor:.3g}") for rate in RATES)

    def assemble(self, model: Any, workload: Train, rate: float, seed: int) -> Assembled:
        """The model dressed as the jobs do it, the method's own randomness from the same seed."""
        torch.manual_seed(seed)
        if self.matrices != 1:
            inside, outside = projected_groups(model)
            groups = [{"params": inside["params"], "lr": rate * self.matrices}, {"params": outside["params"]}]
            return Assembled(model=model, optimizer=torch.optim.AdamW(groups, lr=rate, weight_decay=0.0))
        seeded = [replace(p, seed=seed) if hasattr(p, "seed") else p for p in self.parts]
        return dress(model, Composition.of(seeded, workload.job), workload, Rates(rate, 0.0), seed=seed)


def ways(workload: Train, hidden: int, layers: int) -> list[Way]:
    """AdamW, and every registered method that serves the job; fine-tuning also by LoRA, as peft has it."""
    found = [Way("torch AdamW"), *(Way(TWO_RATES.format(part), matrices=part) for part in (0.25, 0.03))]
    for name, kind in techniques("optim").items():
        pretrained = not (workload.job == "pretrain" and issubclass(kind, GradientFreeMethod))
        if workload.job in kind.facts.jobs and kind.facts.part in PARTS and pretrained:
            factor = GRADIENT_FREE_FACTOR if issubclass(kind, GradientFreeMethod) else FACTORS.get(name, 1.0)
            found.append(Way(name, (scaled(kind, hidden, layers, workload.steps),), factor))
    if workload.job == "finetune":
        return [*found, Way("lora (peft)", (scaled(Lora, hidden, layers, workload.steps),))]
    for name, (method, without) in BASELINES.items():
        kind = techniques("optim").get(method)
        if kind is not None:
            found.append(Way(name, (replace(scaled(kind, hidden, layers, workload.steps), **without),)))
    return found


def scaled(kind: type[Technique], hidden: int, layers: int, steps: int) -> Technique:
    """A technique with the hyperparameters of this module's rule."""
    default = {field.name: field.default for field in fields(kind)}
    changed: dict[str, Any] = {}
    for name, value in default.items():
        if name in ("rank", "projected_rank", "alpha") and "rank" in default:
            changed[name] = type(value)(value * (hidden // 4) / default["rank"])
        elif name.endswith(("_gap", "_steps")):
            changed[name] = min(value, max(1, steps // 10))
        elif name == "active_blocks":
            changed[name] = min(value, max(1, layers // 2))
        elif name == "directions":
            changed[name] = min(value, MOST_DIRECTIONS)
        elif name == "largest_side":
            changed[name] = min(value, LARGEST_SIDE)
    return kind.build({name: value for name, value in changed.items() if value != default[name]})


def chosen(found: Iterable[Way], only: str) -> list[Way]:
    """AdamW, and those named (all when none is)."""
    wanted = {name.strip() for name in only.split(",") if name.strip()}
    return [way for way in found if not wanted or way.name in ("torch AdamW", *wanted)]


def peers(hidden: int, steps: int) -> dict[str, tuple[str, Callable[[nn.Module, float], torch.optim.Optimizer]]]:
    """The authors' optimizers where they are installed, by the technique that they are compared with."""
    gap = min(200, max(1, steps // 10))
    random = {"proj": "random", "proj_type": "std", "update_proj_gap": gap}
    found = {
        "galore": ("galore_torch", "GaLoreAdamW", {"scale": 0.25, "proj_type": "std", "update_proj_gap": gap}),
        "apollo": ("apollo_torch", "APOLLOAdamW", {"scale": 1.0, "scale_type": "channel", **random}),
        "apollo-mini": ("apollo_torch", "APOLLOAdamW", {"scale": 128.0, "scale_type": "tensor", **random}),
    }
    # Both import bitsandbytes.
    there = {n: f for n, f in found.items() if all(map(importlib.util.find_spec, (f[0], "bitsandbytes")))}
    return {
        name: (package, _peer(package, kind, {"rank": 1 if name == "apollo-mini" else hidden // 4, **settings}))
        for name, (package, kind, settings) in there.items()
    }


def _peer(package: str, kind: str, settings: dict[str, Any]) -> Callable[[nn.Module, float], torch.optim.Optimizer]:
    def make(model: nn.Module, rate: float) -> torch.optim.Optimizer:
        projected, plain = projected_groups(model)
        groups = [{"params": plain["params"]}, {"params": projected["params"], **settings}]
        return getattr(importlib.import_module(package), kind)(groups, lr=rate, eps=1e-8, no_deprecation_warning=True)

    return make


def paper_ratio(name: str) -> tuple[float, str] | None:
    """The paper's perplexity over AdamW's in the same table, and both in words; None where none is known."""
    if name in GALORE_TABLE_2:
        figure = GALORE_TABLE_2[name]
        return figure / ADAMW_60M, f"{figure / ADAMW_60M:.3f} of AdamW ({figure} / {ADAMW_60M}, Llama 60M on C4)"
    kind = techniques("optim").get(name)
    for claim in kind.facts.claims if kind is not None else ():
        other = re.search(r"\b(?:AdamW|full-rank training)\s+([\d.]+)", claim.versus)
        if "perplexity" in claim.metric and other:
            ratio = claim.figure / float(other[1])
            return ratio, f"{ratio:.3f} of AdamW ({claim.figure} / {other[1]}, {claim.at})"
    return None


def verdict(ratio: float, error: float, paper: tuple[float, str] | None) -> str:
    """The ratio to AdamW beside the paper's.

    ``matches`` within ``TOLERANCE`` and two standard errors, ``differs`` when better than that, ``not reproduced``
    when worse.
    """
    ours = f"{ratio:.3f} of AdamW"
    if paper is None:
        return f"{ours}; the paper has no such figure"
    away, allowed = ratio - paper[0], TOLERANCE + 2 * error
    word = "matches" if abs(away) <= allowed else "differs" if away < 0 else "not reproduced"
    return f"{word}: {ours}, {paper[0]:.3f} in the paper (allowed: {allowed:.3f})"


def schedule(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up over a tenth of the steps, then half a cosine to a tenth of the rate, as in GaLore."""
    warm = max(1, steps // 10)

    def factor(step: int) -> float:
        done = min(1.0, (step - warm) / max(1, steps - warm))
        return (step + 1) / warm if step < warm else 0.55 + 0.45 * math.cos(math.pi * done)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in the state, those inside lists and the peers' projectors included; each storage once."""
    storages: dict[int, int] = {}
    waiting: list[Any] = list(optimizer.state.values())
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__"):
            waiting += [getattr(value, name) for name in value.__tensor_flatten__()[0]]
        elif isinstance(value, Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value
        elif type(value).__name__.endswith("Projector"):
            waiting += vars(value).values()
    return sum(storages.values())


def weight_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers, each storage once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
