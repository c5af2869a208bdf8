"""What the remaining parts of the optim wing do: released gradients, stochastic rounding, and tpSGD's networks.

Run with ``python -m benchmarks.optim_parts``, a few minutes of one core. Released gradients: live bytes of a training
step. Stochastic rounding: pretraining as in ``optim_pretraining`` at its smaller size, with weights in bfloat16. tpSGD:
a classifier of three layers on points that a random network has labelled, beside SGD with backpropagation.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from benchmarks.optim_pretraining import SIZES, protocol, train
from benchmarks.rows import append_rows, stamp
from benchmarks.training_wings import live_peak, llama
from torch import Tensor, nn
from torch.nn import functional

from pintpot.core.errors import TrainingError
from pintpot.core.expression import parse
from pintpot.core.workload import Pretrain
from pintpot.jobs.assemble import Composition, Rates, dress
from pintpot.ledger.predict import Assembled
from pintpot.ledger.steps import train_step
from pintpot.optim import AdamW, TpSgd

RATES, SEEDS = (1e-3, 3e-3, 1e-2), (0, 1, 2)
CLASSES, WIDTH, POINTS, EPOCHS = 10, 32, 4000, 20


def row(name: str, config: str, metric: str, unit: str, value: float, base: tuple[str, float], **more: Any) -> None:
    """Write one row."""
    ratio = f"{value / base[1]:.3f} of the baseline" if base[1] else ""
    found = {"technique": name, "config": config, "metric": metric, "unit": unit, "value": f"{value:.6g}"}
    found |= {"baseline": base[0], "baseline_value": f"{base[1]:.6g}", "status": ratio, **more}
    append_rows("optim", [stamp(found)])
    print(f"{name}: {metric} {value:.6g} against {base[1]:.6g}", flush=True)


def released() -> None:
    """Live bytes of one step above weights and states, with gradients that stay and with gradients that go."""
    peaks = {}
    ids = torch.randint(0, 256, (1, 32), generator=torch.Generator().manual_seed(0))
    for release in (False, True):
        model = llama(512, 8)
        optimizer = AdamW(model, 1e-3, release_gradients=release)
        train_step(model, optimizer, ids, ids, clip_norm=None)
        peaks[release] = live_peak(lambda m=model, o=optimizer: train_step(m, o, ids, ids, clip_norm=None))
    where = {"model": "llama 512x8 (random, bytes)", "data": "random tokens, batch 1 x 32", "context_tokens": 32}
    config = "AdamW, second step, above weights and states"
    row("gradient-release", config, "live bytes", "bytes", peaks[True], ("gradients kept", peaks[False]), **where)


def rounded() -> None:
    """Perplexity of bfloat16 weights, rounded to the nearest and at random: best rate from seed 0, then three seeds."""
    size, found = SIZES["1M"], {}
    for name, config in (("nearest", "adamw"), ("stochastic-rounding", "stochastic-rounding")):

        def run(rate: float, seed: int, config: str = config) -> float:
            return math.exp(train(lambda m: _bfloat16(m, config, rate, seed), size, seed)["nats"])

        first = {rate: run(rate, SEEDS[0]) for rate in RATES}
        rate = min(first, key=lambda r: first[r])
        values = [first[rate], *(run(rate, seed) for seed in SEEDS[1:])]
        found[name] = rate, statistics.fmean(values), statistics.stdev(values)
    rate, mean, deviation = found["stochastic-rounding"]
    plain = found["nearest"]
    where = {"model": size.name + ", bfloat16", "data": protocol(size)["data"], "context_tokens": 64, "seed": "0-2"}
    base = (f"AdamW in bfloat16, rounded to the nearest, lr={plain[0]:g} (deviation {plain[2]:.3g})", plain[1])
    config = f"AdamW, lr={rate:g} (best of {', '.join(f'{r:g}' for r in RATES)}; deviation {deviation:.3g})"
    row("stochastic-rounding", config, "held-out perplexity", "per token", mean, base, **where)


def _bfloat16(model: Any, config: str, rate: float, seed: int) -> Assembled:
    torch.manual_seed(seed)
    workload = Pretrain(batch=4, tokens=64)
    if config == "adamw":
        return Assembled(model=model.bfloat16(), optimizer=AdamW(model, rate))
    return dress(model.bfloat16(), Composition.of(parse(config), "pretrain"), workload, Rates(rate, 0.0), seed=seed)


def classified() -> None:
    """Held-out accuracy of both ways at the best of their rates."""
    inputs, labels = _points()
    ways: dict[str, Callable[[nn.Sequential, float], Callable[[Tensor, Tensor], object]]] = {
        "tpsgd": _projected_targets,
        "SGD": _backpropagation,
    }
    best = {
        name: max(
            (statistics.fmean(_accuracy(make, rate, seed, inputs, labels) for seed in SEEDS), rate)
            for rate in (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
        )
        for name, make in ways.items()
    }
    where = {"model": f"{WIDTH}-128-128-{CLASSES}, tanh", "data": f"{POINTS} points of a random teacher", "seed": "0-2"}
    base = (f"SGD with backpropagation, lr={best['SGD'][1]:g}", best["SGD"][0])
    lost = base[1] - best["tpsgd"][0]
    status = (
        f"{'matches' if lost <= 0.05 else 'not reproduced'}: {lost:.3f} of accuracy lost, at most 0.05 in the paper"
    )
    row(
        "tpsgd",
        f"lr={best['tpsgd'][1]:g}",
        "held-out accuracy",
        "fraction",
        best["tpsgd"][0],
        base,
        **where,
        paper_value="at most 0.05 lost",
        status=status,
    )


def _points() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2 * POINTS, WIDTH, generator=generator)
    first, second = (torch.randn(i, o, generator=generator) / i**0.5 for i, o in ((WIDTH, 64), (64, CLASSES)))
    return inputs, ((inputs @ first).tanh() @ second).argmax(-1)


def _projected_targets(model: nn.Sequential, rate: float) -> Callable[[Tensor, Tensor], object]:
    optimizer = TpSgd(model, rate)
    return lambda x, y: optimizer.step(lambda: (x, y))


def _backpropagation(model: nn.Sequential, rate: float) -> Callable[[Tensor, Tensor], object]:
    optimizer = torch.optim.SGD(model.parameters(), rate)

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def _accuracy(make: Any, rate: float, seed: int, inputs: Tensor, labels: Tensor) -> float:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(WIDTH, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, CLASSES))
    step = make(model, rate)
    try:
        for chosen in _batches(seed):
            step(inputs[chosen], labels[chosen])
    except TrainingError:  # It diverged.
        return 0.0
    with torch.no_grad():
        return float((model(inputs[POINTS:]).argmax(-1) == labels[POINTS:]).float().mean())


def _batches(seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(EPOCHS):
        yield from torch.randperm(POINTS, generator=generator).split(32)


def main() -> None:
    """All three."""
    released()
    classified()
    rounded()


if __name__ == "__main__":
    main()
