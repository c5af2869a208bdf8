"""Planning a job: from a model, its workload and a budget to the cheapest plan that fits."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from pintpot.core import registry
from pintpot.core.expression import parse
from pintpot.core.ledger import Ledger, Moment
from pintpot.core.plan import ModelIdentity, Plan, Rejection
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Technique
from pintpot.core.workload import Budget, Compress, Generate, Workload
from pintpot.jobs.model_source import model_folder
from pintpot.jobs.packed_shape import PackedShape, as_planned, shape_of_folder
from pintpot.jobs.simulate import simulate
from pintpot.ledger.forecast import baseline_work, forecast
from pintpot.ledger.machine import Machine
from pintpot.ledger.machine import machine as this_machine
from pintpot.ledger.predict import baseline
from pintpot.planner.options import candidates, check
from pintpot.planner.plan_file import read_plan
from pintpot.planner.problem import Problem, excess, limits_of, ordered
from pintpot.planner.reject import rejections
from pintpot.planner.solve import Simulate, Solution, solve

PLAIN = "none"
"""The expression that asks for the plain job."""
SIMULATED_BLOCKS = 40
SIMULATED_TOKENS = 4096
"""Blocks of a model that is trained, and tokens of a generation, up to which a choice is simulated unless asked
otherwise: simulating recomputed blocks and packed caches takes time in proportion, and a plan should take seconds."""


def plan(
    model: ModelShape | str | Path,
    workload: Workload,
    budget: Budget | str | int | None = None,
    *,
    techniques: str | Collection[Technique] | None = None,
    exclude: Collection[str] = (),
    machine: Machine | None = None,
    simulated: bool | None = None,
    seed: int = 0,
) -> Plan:
    """Choose the cheapest composition of techniques with which a job fits: least risk, then least time.

    Only the model's configuration is read. The choice is made on closed-form predictions and, unless a prompt is long
    or a model to train is deep, verified by running the job on tensors that hold no data. Same arguments, same plan.

    Args:
        model: a shape, a model folder or its ``config.json``, or a hub name.
        workload: the sizes of the job.
        budget: bytes by tier, or the device's alone (``"6GiB"``); no limit when absent.
        techniques: use exactly these, or this expression (``"none"``: the plain job); the plan then says
            whether they fit.
        exclude: names of techniques never to choose.
        machine: the rates that the speed is forecast from; those of this machine when absent.
        simulated: whether to verify by simulation, whatever the size.
        seed: kept in the plan for the run's random choices.

    Raises:
        BudgetError: when nothing fits, with the smallest budget that would and its composition.
        CompositionError: for techniques that are unknown or cannot stand together, or none that serves the job.
        ModelFolderError: when the model cannot be found or read.
    """
    shape = model if isinstance(model, ModelShape) else shape_of_folder(model_folder(model))
    limits = budget if isinstance(budget, Budget) else Budget.of(budget)
    for name in exclude:
        registry.get(name)
    problem = pose(shape, workload, limits, machine or this_machine())
    exact = _is_small(shape, workload) if simulated is None else simulated
    verify = partial(simulate, shape, workload) if exact else None
    if techniques is not None:
        return forced(problem, techniques, verify=verify, seed=seed)
    return choose(problem, registry.techniques(), exclude=exclude, verify=verify, seed=seed)


def plan_from_file(path: str | Path, model: ModelShape | str | Path, *, machine: Machine | None = None) -> Plan:
    """The plan of a file for a model; predicted again when it was edited by hand since it was written.

    Raises:
        PlanError: when the file is malformed (with the line), or was written for another model.
    """
    shape = model if isinstance(model, ModelShape) else shape_of_folder(model_folder(model))
    read = read_plan(path, shape)
    if read.predicted.moments:
        return read
    held = as_planned(shape, read.model)
    return plan(held, read.workload, read.budget, techniques=read.techniques, machine=machine, seed=read.seed)


def pose(shape: ModelShape, workload: Workload, budget: Budget, machine: Machine) -> Problem:
    """The planning problem of a job without its techniques: the plain job's bytes, work and clock.

    How long compressing takes is not forecast.
    """
    if isinstance(workload, Compress):
        return Problem(shape, workload, budget, simulate(shape, workload))
    plain = baseline(shape, workload)
    return Problem(
        shape=shape,
        workload=workload,
        budget=budget,
        baseline=plain,
        work=baseline_work(shape, workload),
        clock=lambda work: forecast(work, workload, machine),
    )


def choose(
    problem: Problem,
    kinds: Mapping[str, type[Technique]],
    *,
    exclude: Collection[str] = (),
    verify: Simulate | None = None,
    seed: int = 0,
) -> Plan:
    """The cheapest plan of a problem from some kinds of techniques.

    Raises:
        BudgetError: when nothing fits.
        CompositionError: when no technique can do the job.
    """
    usable, unfit = candidates(problem.shape, problem.workload, problem.baseline, kinds, exclude)
    full = replace(problem, techniques=usable)
    solution = solve(full, verify)
    reasons = sorted((*unfit, *rejections(full, solution.techniques)), key=lambda r: r.technique)
    return _plan(full, solution, tuple(reasons), seed)


def forced(
    problem: Problem, techniques: str | Collection[Technique], *, verify: Simulate | None = None, seed: int = 0
) -> Plan:
    """The plan with exactly these techniques, whether they fit or not (``plan.fits``).

    Raises:
        CompositionError: when they are unknown, cannot stand together, or cannot do the job.
    """
    if isinstance(techniques, str):
        techniques = () if techniques.strip() == PLAIN else parse(techniques)
    composition = ordered(techniques)
    check(composition, problem.workload)
    ledger = verify(composition) if verify is not None and composition else problem.predict(composition)
    return _plan(problem, Solution(composition, ledger), (), seed)


def _is_small(shape: ModelShape, workload: Workload) -> bool:
    """Whether simulating a job takes seconds."""
    if isinstance(workload, Generate):
        return workload.prompt_tokens + workload.new_tokens <= SIMULATED_TOKENS
    return len({p.block for p in shape.parameters if p.block}) <= SIMULATED_BLOCKS


def _plan(problem: Problem, solution: Solution, rejected: tuple[Rejection, ...], seed: int) -> Plan:
    shape = problem.shape
    return Plan(
        model=ModelIdentity(
            shape.name,
            shape.fingerprint,
            str(shape.dtype).removeprefix("torch."),
            shape.size_bytes if isinstance(shape, PackedShape) else None,
        ),
        workload=problem.workload,
        budget=problem.budget,
        techniques=solution.techniques,
        predicted=_bare(solution.ledger),
        forecast=problem.forecast(solution.techniques),
        risk=problem.risk(solution.techniques),
        rejected=rejected,
        fits=not excess(solution.ledger, limits_of(problem.budget)),
        seed=seed,
    )


def _bare(ledger: Ledger) -> Ledger:
    """The bytes of a prediction alone, so that a plan equals itself after a round trip through its file."""
    moments = (Moment(m.phase, {cell: int(size) for cell, size in m.cells.items() if size}) for m in ledger.moments)
    return Ledger("predicted", tuple(moments))
