"""How near our GPTQ and AWQ come to plain ones, written from the papers in float64 without any of our parts.

The plain GPTQ inverts the Hessian and eliminates one row and column after each rounding, where ours factors it once and
works in blocks. The plain AWQ rounds in float64, and tries each scale and each cut by itself. Both read the dense
model's inputs, and round the scales of their groups to 16 bits, as these are stored. Our GPTQ is also compared with
llm-compressor's, in the first block, where both look at the same inputs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from benchmarks.rows import stamp
from benchmarks.weights_peers import peers
from benchmarks.weights_subjects import Subject, dense_inputs
from torch import Tensor

from pintpot.core.expression import parse
from pintpot.weights import WeightMethod
from pintpot.weights.gptq import GPTQ

BITS, GROUP, DAMPING, STEPS, MOST_CUT = 4, 32, 0.01, 20, 0.5
NEAR = 1.02
"""Ratio of output errors up to which two implementations count as the same."""

SAME = 1e-4
"""Share of a matrix's range within which two numbers count as equal."""


@dataclass(frozen=True)
class Grids:
    """Scale and zero of each group of a weight, (O, N) each, float64."""

    scale: Tensor
    zero: Tensor

    @classmethod
    def of(cls, weight: Tensor, cut: float | Tensor = 0.0) -> Grids:
        """Those that reach from the smallest to the largest number, less a share of the largest magnitude."""
        parts = [weight[:, start : start + GROUP] for start in range(0, weight.shape[1], GROUP)]
        ends = torch.stack([part.abs().amax(1) for part in parts], 1) * (1 - cut)
        low = torch.stack([part.amin(1).clamp(max=0) for part in parts], 1).maximum(-ends)
        high = torch.stack([part.amax(1).clamp(min=0) for part in parts], 1).minimum(ends)
        scale = ((high - low) / (2**BITS - 1)).half().double()
        scale = torch.where(scale > 0, scale, 1.0)
        return cls(scale, (-low / scale).round().clamp(0, 2**BITS - 1))

    def round(self, weight: Tensor, columns: range) -> Tensor:
        """Some columns of a weight, (O, C), as the nearest points."""
        group = torch.tensor([column // GROUP for column in columns])
        scale, zero = self.scale[:, group], self.zero[:, group]
        return ((weight / scale).round().add(zero).clamp(0, 2**BITS - 1) - zero) * scale


def plain_gptq(weight: Tensor, hessian: Tensor) -> Tensor:
    """Algorithm 1 with the grids fixed first and the largest inputs rounded first: (O, I) rounded, float64."""
    grids, left = Grids.of(weight), weight.clone()
    damped = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    inverse = torch.linalg.inv(damped)
    for column in torch.argsort(hessian.diagonal(), descending=True, stable=True).tolist():
        rounded = grids.round(left[:, column : column + 1], range(column, column + 1))
        error = (left[:, column : column + 1] - rounded) / inverse[column, column]
        left -= error * inverse[column]
        left[:, column : column + 1] = rounded
        inverse -= torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        # What is rounded moves no more; rounding errors of the elimination would leave a trace of it.
        inverse[column], inverse[:, column] = 0.0, 0.0
        inverse[column, column] = 1.0
    return left


def plain_awq(weight: Tensor, hessian: Tensor, magnitude: Tensor, clip: bool) -> Tensor:
    """The best of the scales ``magnitude ** a`` (section 3.2), then the best cut of each group; (O, I), float64."""
    columns = range(weight.shape[1])

    def error(rounded: Tensor) -> float:
        difference = weight - rounded
        return float(((difference @ hessian) * difference).sum())

    scales = []
    for step in range(STEPS):
        scale = magnitude.pow(step / STEPS).clamp(min=1e-4)
        scales.append(scale / (scale.max() * scale.min()).sqrt())
    rounded = [Grids.of(weight * scale).round(weight * scale, columns) / scale for scale in scales]
    best = min(range(STEPS), key=lambda step: error(rounded[step]))
    if not clip:
        return rounded[best]
    scaled, found = weight * scales[best], torch.zeros_like(weight)
    moments = hessian / scales[best][:, None] / scales[best]
    least = torch.full((len(weight), -(-weight.shape[1] // GROUP)), torch.inf, dtype=torch.float64)
    for step in range(int(STEPS * MOST_CUT) + 1):
        tried = Grids.of(scaled, cut=step / STEPS).round(scaled, columns)
        for index, start in enumerate(range(0, weight.shape[1], GROUP)):
            own = slice(start, start + GROUP)
            apart = scaled[:, own] - tried[:, own]
            lost = ((apart @ moments[own, own]) * apart).sum(1)
            better = lost < least[:, index]
            least[better, index] = lost[better]
            found[better, own] = tried[better, own]
    return found / scales[best]


def agreement(subject: Subject) -> list[dict[str, Any]]:
    """Rows: output errors of ours over those of the plain ones, and the share of numbers that are the same."""
    seen = dense_inputs(subject)
    gptq, awq = (f"{name}(bits={BITS}, group_size={GROUP}" for name in ("gptq", "awq"))
    plain: dict[str, Callable[[str, Tensor, Tensor], Tensor]] = {
        f"{gptq})": lambda name, weight, hessian: plain_gptq(weight, hessian),
        f"{awq}, clip=False)": lambda name, weight, hessian: plain_awq(
            weight, hessian, seen[name].magnitude.double(), False
        ),
        f"{awq})": lambda name, weight, hessian: plain_awq(
            weight, hessian, seen[name].magnitude.double(), not any(part in name for part in ("q_proj", "k_proj"))
        ),
    }
    made = []
    for text, reference in plain.items():
        method = parse(text)[0]
        assert isinstance(method, WeightMethod)
        made += _rows(subject, method, reference)
    return [*made, *_beside_package(subject)]


def _beside_package(subject: Subject) -> list[dict[str, Any]]:
    """Rows of GPTQ's first block beside llm-compressor's, where that is installed; its scales have 32 bits."""
    config = f"llm-compressor GPTQ, {BITS} bits, groups of {GROUP}, or the half that divides the inputs"
    peer = next(peer for peer in peers() if peer.config == config)
    if peer.missing:
        print(f"not compared with {config}: {peer.missing}", flush=True)
        return []
    seen, begin = dense_inputs(subject), time.perf_counter()
    theirs, method = peer.run(subject)[0], GPTQ(bits=BITS, group_size=GROUP)
    same, lost, count = 0, [0.0, 0.0], 0
    for target in (t for t in subject.targets if t.block == subject.targets[0].block):
        name, inputs = target.parameter, seen[target.parameter]
        weight = subject.model.get_parameter(name).detach()
        (grid,) = method.terms(name, target.shape[0], target.shape[1], weight.dtype)
        (stored,) = method.find(name, weight, (grid,), inputs)
        found, package = grid.decode(stored, weight.shape[1], torch.float32), theirs[name]
        for place, rounded in enumerate((found, package)):
            lost[place] += float(inputs.error(rounded - weight).sum())
        step = stored["scale"].float().repeat_interleave(GROUP, 1)[:, : weight.shape[1]]
        same += int(((found - package).abs() < step / 10).sum())
        count += weight.numel()
    about = {
        "technique": method.name,
        "config": str(method),
        **subject.about,
        "data": f"the first block, on {sum(t.numel() for t in subject.texts)} tokens",
        "seed": 0,
        "peer": config,
        "peer_value": 1,
        "seconds": round(time.perf_counter() - begin, 2),
    }
    ratio = lost[0] / lost[1]
    verdict = "agrees" if 1 / NEAR <= ratio <= NEAR else "ours loses more" if ratio > NEAR else "ours loses less"
    errors = {"metric": "output error over llm-compressor's", "unit": "ratio", "value": f"{ratio:.4f}"}
    equal = {"metric": "codes equal to llm-compressor's", "unit": "fraction", "value": f"{same / count:.4f}"}
    return [stamp({**about, **errors, "status": verdict}), stamp({**about, **equal, "status": "same inputs"})]


def _rows(
    subject: Subject, method: WeightMethod, reference: Callable[[str, Tensor, Tensor], Tensor]
) -> list[dict[str, Any]]:
    seen, begin = dense_inputs(subject), time.perf_counter()
    same, lost = [], [0.0, 0.0]
    for target in subject.targets:
        name, inputs = target.parameter, seen[target.parameter]
        weight = subject.model.get_parameter(name).detach()
        formats = method.terms(name, target.shape[0], target.shape[1], weight.dtype)
        (stored,) = method.find(name, weight, formats, inputs)
        dense, hessian = weight.double(), inputs.hessian.double()
        found = formats[0].decode(stored, weight.shape[1], torch.float32).double()
        plain = reference(name, dense, hessian)
        for place, rounded in enumerate((found, plain)):
            error = rounded - dense
            lost[place] += float(((error @ hessian) * error).sum() / ((dense @ hessian) * dense).sum())
        same.append(float(((found - plain).abs() < SAME * (dense.amax() - dense.amin())).double().mean()))
    ratio = lost[0] / lost[1]
    row = {
        "technique": method.name,
        "config": str(method),
        **subject.about,
        "data": f"the dense model's inputs on {sum(t.numel() for t in subject.texts)} tokens",
        "seed": 0,
        "peak_bytes": "",
        "seconds": round(time.perf_counter() - begin, 2),
    }
    verdict = "matches" if ratio <= NEAR else "not reproduced: ours loses more than the plain one"
    return [
        stamp(
            {
                **row,
                "metric": "output error over that of a plain float64 implementation",
                "unit": "ratio",
                "value": f"{ratio:.4f}",
                "baseline": "the plain one's relative error, mean of the matrices",
                "baseline_value": f"{lost[1] / len(same):.5g}",
                "status": verdict,
            }
        ),
        stamp(
            {
                **row,
                "metric": "numbers equal to those of a plain float64 implementation",
                "unit": "fraction",
                "value": f"{sum(same) / len(same):.4f}",
                "status": "ties and order differ by rounding; what counts is the output error",
            }
        ),
    ]
