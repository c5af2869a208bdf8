"""Time before it is spent: the work of a job's phases, and how long a machine takes for it.

The work is counted, not modelled: the steps that the jobs run (`pintpot.ledger.steps`) run on tensors that have
shapes and no bytes, and every operation is counted. So one rule serves every architecture, and attention, the
vocabulary, the cache and the optimizer are all in it. Deep models are counted at two small depths and continued.

The time is a roofline (Williams et al. 2009, doi:10.1145/1498765.1498785): matrix products take the longer of moving
their matrices and of arithmetic; what other operations move, new memory, and starting the operations add to that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pintpot.core.plan import Forecast
from pintpot.core.shape import ModelShape
from pintpot.core.work import PhaseWork, Work
from pintpot.core.workload import Generate, Train, Workload
from pintpot.ledger import steps
from pintpot.ledger.depth import shallow_depths, with_depth
from pintpot.ledger.fakes import MissingShapes, PassThroughCache
from pintpot.ledger.machine import Machine
from pintpot.ledger.predict import Assembled, Build, plain
from pintpot.ledger.work_counter import WorkCounter


def baseline_work(shape: ModelShape, workload: Workload) -> Work:
    """The work of the plain job: dense weights, the model's own cache, AdamW over all parameters.

    Phases are `prefill` (the whole prompt) and `decode` (one token of each sequence, half way through the answer), or
    `step` (one update). Jobs that do not run the model have none.
    """
    return count_work(plain(workload), shape, workload)


def count_work(build: Build, shape: ModelShape, workload: Workload) -> Work:
    """The work of a job by phase, as `baseline_work` describes it.

    Args:
        build: makes the job, with its techniques applied; called under `FakeTensorMode`.
        shape: the model.
        workload: its sizes.
    """
    depths = shallow_depths(shape.config)
    if depths is None:
        return _count(build, shape, workload)
    first, second = (_count(build, with_depth(shape, depth), workload) for depth in depths[:2])
    layers = int(shape.config.get_text_config(decoder=True).num_hidden_layers)
    times = (layers - depths[0]) // (depths[1] - depths[0])
    return Work({name: _continued(first.phases[name], second.phases[name], times) for name in first.phases})


def forecast(work: Work, workload: Workload, machine: Machine) -> Forecast:
    """How long the phases of a job take on a machine that does nothing else."""
    seconds: dict[str, float] = {}
    causes: list[tuple[str, str]] = []
    for name, phase in work.phases.items():
        parts = phase_parts(phase, _rows(name, workload), machine)
        seconds[name] = sum(parts.values())
        causes.append((name, max(parts, key=lambda cause: parts[cause])))
    return Forecast(
        prefill_seconds=seconds.get("prefill"),
        decode_seconds=seconds.get("decode"),
        step_seconds=seconds.get("step"),
        bound_by=tuple(causes),
    )


def phase_parts(phase: PhaseWork, rows: int, machine: Machine) -> dict[str, float]:
    """Seconds of one phase by what they are spent on: ``memory``, ``arithmetic``, ``launches`` and ``disk``.

    Args:
        phase: what is to be done.
        rows: rows of its matrix products (tokens that pass through the model at once).
        machine: by whom.
    """
    # A technique that moves less has already lowered the whole, and may have lowered it below the plain products.
    product_bytes = min(phase.product_bytes, phase.read_bytes)
    arithmetic = sum(flops / machine.product_flops(dtype, rows) for dtype, flops in phase.flops.items())
    dtype = max(phase.flops, key=lambda name: phase.flops[name], default="float32")
    moving = product_bytes / machine.product_bytes_per_second(dtype, rows)
    moving += phase.dots * machine.dot_seconds(dtype, rows)
    memory = (phase.read_bytes - product_bytes) / machine.read_bytes_per_second
    if machine.fresh_bytes_per_second:
        memory += phase.fresh_bytes / machine.fresh_bytes_per_second
    if moving > arithmetic:
        memory, arithmetic = memory + moving, 0.0
    launches = phase.overhead_seconds
    starting = phase.operations * machine.small_op_seconds
    # A GPU works while the next operations are being started; a CPU starts them itself.
    launches += starting if machine.kind == "cpu" else max(0.0, starting - memory - arithmetic)
    disk = phase.disk_bytes / machine.disk_read_bytes_per_second
    return {"memory": memory, "arithmetic": arithmetic, "launches": launches, "disk": disk}


def _rows(phase: str, workload: Workload) -> int:
    if isinstance(workload, Generate):
        return workload.batch * (workload.prompt_tokens if phase == "prefill" else 1)
    return workload.batch * workload.tokens if isinstance(workload, Train) else 1


def _count(build: Build, shape: ModelShape, workload: Workload) -> Work:
    if isinstance(workload, Generate):
        count: Callable[[Assembled, Any], Mapping[str, PhaseWork]] = _count_generation
    elif isinstance(workload, Train):
        count = _count_step
    else:
        return Work()
    with FakeTensorMode(), MissingShapes():
        return Work(count(build(shape), workload))


def _count_generation(job: Assembled, workload: Generate) -> Mapping[str, PhaseWork]:
    with torch.no_grad(), job.scope():
        with WorkCounter() as first:
            progress = job.prefill(_tokens(workload.batch, workload.prompt_tokens))
            token = steps.choose(progress)
        if workload.new_tokens == 1:
            return {"prefill": first.work()}
        # A state of constant size needs no filling.
        between = workload.new_tokens // 2 - 1
        if between > 0 and not getattr(job.model, "_is_stateful", False):
            progress = steps.decode(job.model, _tokens(workload.batch, between), progress)
        with WorkCounter() as each:
            steps.choose(steps.decode(job.model, token, progress))
    return {"prefill": first.work(), "decode": each.work()}


def _count_step(job: Assembled, workload: Train) -> Mapping[str, PhaseWork]:
    optimizer = job.optimizer
    if optimizer is None:
        return {}
    if not getattr(optimizer, "gradient_free", False):
        # The state is made by the first update and is not part of the others.
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.empty_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    tokens = _tokens(workload.batch, workload.tokens)
    config: Any = job.model.config
    inputs = {} if config.is_encoder_decoder else PassThroughCache.inputs(job.model)
    with WorkCounter() as counter:
        steps.train_step(job.model, optimizer, tokens, tokens, scope=job.scope, inputs=inputs)
    return {"step": counter.work()}


def _continued(first: PhaseWork, second: PhaseWork, times: int) -> PhaseWork:
    """The work after so many times the growth from the first to the second."""

    def grow(low: float, high: float) -> float:
        return low + times * (high - low)

    return PhaseWork(
        read_bytes=int(grow(first.read_bytes, second.read_bytes)),
        flops={name: grow(first.flops.get(name, 0.0), flops) for name, flops in second.flops.items()},
        product_bytes=int(grow(first.product_bytes, second.product_bytes)),
        dots=int(grow(first.dots, second.dots)),
        fresh_bytes=int(grow(first.fresh_bytes, second.fresh_bytes)),
        operations=int(grow(first.operations, second.operations)),
    )


def _tokens(batch: int, tokens: int) -> Tensor:
    return torch.zeros(batch, tokens, dtype=torch.long)
