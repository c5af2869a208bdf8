"""From what a user asks for (a budget, techniques by name, or a plan file) to the plan that a job runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeGuard

import torch

from pintpot.core.errors import BudgetError, CompositionError, PlanError
from pintpot.core.expression import expression, parse
from pintpot.core.ledger import Tier
from pintpot.core.model_folder import open_model
from pintpot.core.plan import Plan
from pintpot.core.registry import techniques
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Technique
from pintpot.core.units import format_bytes, parse_bytes
from pintpot.core.workload import Budget, Workload, workload_from_dict
from pintpot.jobs.dtypes import DTYPES
from pintpot.jobs.model_source import model_folder
from pintpot.jobs.packed_shape import PackedShape, as_planned, in_size, shape_of_folder
from pintpot.jobs.plan import PLAIN, plan_from_file
from pintpot.jobs.plan import plan as make_plan
from pintpot.planner.solve import flags


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What the user asks of a job's memory.

    Attributes:
        budget: bytes allowed; techniques are chosen so that the job fits.
        techniques: an expression such as ``"rtn4*kivi2"``: use exactly these.
        plan: a plan, or a plan file: run it as it is.
        exclude: names of techniques never to choose.
        weights_size: most bytes of the weights, such as ``"12MiB"``, of a folder that can be loaded in any size. When
            absent it is loaded whole, or where that does not fit into the budget, as much of it as does.
        dtype: name of the dtype to hold weights in; when absent, the model's own for generation, and float32 for
            training (an update of the usual size is lost in a bfloat16 weight).
        seed: for every random choice.
    """

    budget: Budget = field(default_factory=Budget)
    techniques: str | tuple[Technique, ...] | None = None
    plan: Plan | Path | None = None
    exclude: tuple[str, ...] = ()
    weights_size: str | int | None = None
    dtype: str | None = None
    seed: int = 0


def workload_of(job: str, sizes: Mapping[str, int | None]) -> Workload:
    """The workload of a job from the sizes that were given (those that are ``None`` were not).

    Raises:
        PlanError: when the job is unknown or has no such size.
    """
    return workload_from_dict({"job": job, **{name: size for name, size in sizes.items() if size is not None}})


def shape_of(model: str | Path, workload: Workload, wish: Wish, task: str | None = None) -> ModelShape:
    """The shape of a model as the job will hold it: in its dtype, in the size and for the task that were asked for.

    Raises:
        BudgetError: when the size is too small.
        CompositionError: when it has no such task, or a size was asked for and the model has only one.
        PlanError: when the dtype is unknown.
    """
    if wish.dtype is not None and wish.dtype not in DTYPES:
        raise PlanError(f"unknown dtype {wish.dtype!r}", hint=f"one of: {', '.join(DTYPES)}")
    dtype = DTYPES[wish.dtype] if wish.dtype else (torch.float32 if workload.training else None)
    shape = shape_of_folder(model_folder(model), dtype, task)
    return shape if wish.weights_size is None else in_size(shape, parse_bytes(wish.weights_size))


def choose(model: str | Path, workload: Workload, wish: Wish, task: str | None = None) -> Plan:
    """The plan to run: the given one, or one made of the given techniques, or the cheapest that fits the budget.

    Args:
        model: a model folder or hub name.
        workload: the sizes of the job.
        wish: the memory budget, techniques or plan.
        task: that a merged model will be switched to.

    Raises:
        PlanError: when the given plan is for another job or model.
        BudgetError: when nothing fits.
        CompositionError: when the techniques cannot stand together, or there is no such task.
    """
    shape = shape_of(model, workload, wish, task)
    packed = isinstance(shape, PackedShape)
    if wish.plan is not None:
        plan = _given(wish.plan, shape, workload)
    else:
        asked = _asked(wish.techniques)
        if packed and asked is not None:
            refuse_packed(shape, workload, asked)
        methods = (name for name, kind in techniques("weights").items() if not kind.facts.part)
        excluded = (*wish.exclude, *(methods if packed else ()))
        try:
            plan = make_plan(shape, workload, wish.budget, techniques=asked, exclude=excluded, seed=wish.seed)
        except BudgetError:
            if not _may_shrink(shape, wish):
                raise
            plan = make_plan(shape, workload, wish.budget, techniques=(), seed=wish.seed)
        if _may_shrink(shape, wish):
            plan = _shrunk(plan, shape)
    if packed:
        refuse_packed(shape, workload, plan.techniques)
    return plan


def _may_shrink(shape: ModelShape, wish: Wish) -> TypeGuard[PackedShape]:
    return isinstance(shape, PackedShape) and shape.ranked and wish.weights_size is None


def _shrunk(plan: Plan, shape: PackedShape) -> Plan:
    """The plan with as much of the weights as fits beside everything else, for a folder that is ranked.

    Raises:
        BudgetError: when not even the first term of each weight does.
    """
    limit = plan.budget.device
    if limit is None:
        return plan
    size = open_model(shape.name).weight_bytes
    while (excess := plan.predicted.peak_bytes() - limit) > 0:
        size -= excess
        plan = make_plan(in_size(shape, size), plan.workload, plan.budget, techniques=plan.techniques, seed=plan.seed)
    return plan


def require_fit(plan: Plan) -> Plan:
    """The plan, when its predicted peaks are within its budget: nothing is run that is foreseen not to fit.

    Raises:
        BudgetError: naming the tier and both sizes.
    """
    for tier in Tier:
        limit, needed = plan.budget.limit(tier), plan.predicted.peak_bytes(tier)
        if limit is not None and needed > limit:
            raise BudgetError(
                f"{plan.workload.job} needs {format_bytes(needed)} of {tier} memory with "
                f"{expression(plan.techniques) or 'no technique'}, and {format_bytes(limit)} are allowed",
                hint=f"allow {flags(plan.predicted, [tier])}, or leave the choice of techniques to the planner",
            )
    return plan


def _asked(wanted: str | Sequence[Technique] | None) -> tuple[Technique, ...] | None:
    """The techniques that were asked for; ``None`` leaves them to the planner."""
    if wanted is None:
        return None
    if isinstance(wanted, str):
        return () if wanted.strip() == PLAIN else parse(wanted)
    return tuple(wanted)


def refuse_packed(shape: ModelShape, workload: Workload, chosen: Sequence[Technique]) -> None:
    """Refuse to pack the weights of a compressed folder again, or to train them.

    Raises:
        CompositionError: when the techniques do that.
    """
    slots = {technique.facts.slot for technique in chosen}
    if any(technique.facts.slot == "weights" and not technique.facts.part for technique in chosen):
        raise CompositionError(f"{shape.name} is compressed already", hint="leave out the weights technique")
    for technique in chosen:
        if "dense_weights" in technique.facts.needs and not workload.training:
            raise CompositionError(
                f"{technique.name} needs dense weights, and {shape.name} is compressed", hint="use the dense model"
            )
    if workload.training and "adapters" not in slots:
        raise CompositionError(
            f"the weights of {shape.name} are packed and cannot be trained themselves", hint="use --techniques lora"
        )


def _given(given: Plan | Path, shape: ModelShape, workload: Workload) -> Plan:
    """A given plan, predicted anew where the job's sizes are not those that it was made for."""
    plan = plan_from_file(given, shape) if isinstance(given, Path) else given
    if isinstance(shape, PackedShape) and shape.size_bytes is not None:
        raise PlanError("a plan says itself how much of the weights is loaded", hint="leave out the size")
    if plan.model.fingerprint != shape.fingerprint:
        raise PlanError(
            f"the plan was written for another model ({plan.model.name}), not for {shape.name}",
            hint="make a plan for this model with: pintpot plan",
        )
    if plan.workload.job != workload.job:
        raise PlanError(
            f"the plan is for {plan.workload.job}, not for {workload.job}",
            hint=f"make one with: pintpot plan MODEL --job {workload.job}",
        )
    if plan.workload == workload:
        return plan
    held = as_planned(shape, plan.model)
    return make_plan(held, workload, plan.budget, techniques=plan.techniques, seed=plan.seed)
